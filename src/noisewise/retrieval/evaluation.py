"""How good a ranking is: trec_eval's measures, exact search for dense vectors, and paired intervals over queries."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.paired import PairedDifference
from noisewise.typing import check_count

__all__ = ["MEASURES", "Evaluation", "Run", "evaluate", "exact_run", "paired_bootstrap"]

Run = dict[str, dict[str, float]]
MEASURES = ("nDCG@10", "R@10", "R@100", "RR@10", "Success@5")

# scores of one block of queries against the whole corpus: 256 MB of float32 at most for a million passages
_QUERY_BLOCK, _DOCUMENT_BLOCK = 64, 16_384


@dataclass(frozen=True)
class Evaluation:
    """`mean[measure]`: a `Measurement` with its standard error over queries; `per_query[measure][query]`: in [0, 1]."""

    mean: dict[str, Measurement]
    per_query: dict[str, dict[str, float]]

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.mean.items())


def evaluate(
    qrels: Mapping[str, Mapping[str, int]],
    run: Mapping[str, Mapping[str, float | int]],
    measures: Sequence[str] = MEASURES,
) -> Evaluation:
    """Score `run[query][document]` by judgements `qrels[query][document]`, higher being better.

    `measures`: names of ir-measures that trec_eval computes, as "nDCG@10" (linear gains, ideal ranking cut at 10),
    "R@100", "RR@10", "Success@5", "AP", "P@1". Documents rank by score (compared as float32), equal scores by id from the last
    to the first, as in trec_eval, for every measure. Queries without a positive judgement are skipped; a query that misses
    from the run counts 0, as with trec_eval's -c; a grade below 0 counts as 0; documents without a judgement are not relevant.

    Raises `InvalidInput` for an empty run, queries of the run that are not judged, scores that are not finite, grades that
    are not whole, no query with a positive, and measures that are unknown or need more than trec_eval.
    Source: MacAvaney et al., Streamlining Evaluation with ir-measures, ECIR 2022; Van Gysel & de Rijke, Pytrec_eval, SIGIR 2018.
    """
    ir = require("ir_measures", "retrieval")
    require("pytrec_eval", "retrieval")
    parsed = {name: _measure(ir, name) for name in measures}
    judged = _positives(qrels)
    _check_run(run, qrels)
    ranked = {query: {key: float(score) for key, score in run[query].items()} for query in judged if run.get(query)}
    values: dict[Any, dict[str, float]] = {base: dict.fromkeys(judged, 0.0) for base, _ in parsed.values()}
    for metric in ir.pytrec_eval.iter_calc(list(values), judged, ranked):
        values[metric.measure][metric.query_id] = float(metric.value)
    per_query = {name: _cut(values[base], cutoff) for name, (base, cutoff) in parsed.items()}
    return Evaluation({name: _mean(list(scores.values())) for name, scores in per_query.items()}, per_query)


def exact_run(
    query_ids: Sequence[str],
    query_vectors: Float[np.ndarray, "query dim"] | Float[Tensor, "query dim"],
    document_ids: Sequence[str],
    document_vectors: Float[np.ndarray, "document dim"] | Float[Tensor, "document dim"],
    k: int = 100,
    exclude_same_id: bool = False,
) -> Run:
    """The `k` documents of highest inner product for each query, by brute force over blocks.

    Products are summed in float64 and rounded to float32, so that equal vectors get equal scores wherever they stand; ties
    go to the last id first, as trec_eval orders them, also at the cut. `exclude_same_id`: drop the document that bears
    the query's own id (ArguAna, Quora). Raises `InvalidInput` for ids that do not fit the vectors or come twice,
    dimensions that differ, and vectors that are not finite.
    """
    check_count("k", k)
    queries = _vectors("query", query_ids, query_vectors)
    documents = _vectors("document", document_ids, document_vectors)
    if queries.shape[1] != documents.shape[1]:
        raise InvalidInput(
            f"queries have {queries.shape[1]} dimensions, documents {documents.shape[1]}; they must agree"
        )
    # from the last id to the first: a stable sort by score then leaves ties in trec_eval's order
    order = sorted(range(len(document_ids)), key=document_ids.__getitem__, reverse=True)
    names = [document_ids[i] for i in order]
    documents = documents[order]
    place = {name: i for i, name in enumerate(names)}
    run: Run = {}
    for start in range(0, len(query_ids), _QUERY_BLOCK):
        keys = query_ids[start : start + _QUERY_BLOCK]
        scores = _products(queries[start : start + _QUERY_BLOCK], documents)
        for query, row in zip(keys, scores, strict=True):
            if exclude_same_id and query in place:
                row[place[query]] = -np.inf
            best = _top(row, k)
            run[query] = {names[i]: float(row[i]) for i in best if row[i] > -np.inf}
    return run


def paired_bootstrap(
    a: Mapping[str, float | int], b: Mapping[str, float | int], resamples: int = 10_000, seed: int = 0
) -> PairedDifference:
    """Mean of a - b over queries with its 95 % percentile interval; `a[query]`, `b[query]`: one measure, higher is better.

    Queries are drawn with replacement, the same for both systems; the result does not depend on the order of the keys.
    One query gives the whole line. Raises `InvalidInput` for different or no queries and values that are not finite.
    Source: Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; Sakai, SIGIR 2006.
    """
    check_count("resamples", resamples, minimum=100)
    if a.keys() != b.keys() or not a:
        lone = sorted(a.keys() ^ b.keys())
        raise InvalidInput(f"need the same queries on both sides, got {len(a)} and {len(b)}; only on one: {lone[:5]}")
    differences = np.array([float(a[query]) - float(b[query]) for query in sorted(a)])
    if not np.isfinite(differences).all():
        bad = [query for query in sorted(a) if not math.isfinite(float(a[query]) - float(b[query]))]
        raise InvalidInput(f"values must be finite; these queries have others: {bad[:5]}")
    n, mean = len(differences), math.fsum(differences) / len(differences)
    if n == 1:
        return PairedDifference(mean, math.nan, -math.inf, math.inf, 1, direction="higher")
    generator = np.random.default_rng(seed)
    chunk = max(1, 2_000_000 // n)
    sizes = [min(chunk, resamples - done) for done in range(0, resamples, chunk)]
    means = np.concatenate([differences[generator.integers(n, size=(size, n))].mean(1) for size in sizes])
    low, high = np.quantile(means, [0.025, 0.975])
    se = float(differences.std(ddof=1)) / math.sqrt(n)
    return PairedDifference(mean, se, float(low), float(high), n, direction="higher")


def _measure(ir: Any, name: str) -> tuple[Any, int | None]:
    """The measure that trec_eval computes and, for a reciprocal rank with a cut-off, that cut-off."""
    try:
        parsed = ir.parse_measure(name)
        cutoff = None
        if parsed.NAME == "RR" and "cutoff" in parsed.params:
            # trec_eval has no cut-off here, and ir-measures would turn to a library that breaks ties the other way
            cutoff = parsed["cutoff"]
            parsed = ir.RR(**{key: value for key, value in parsed.params.items() if key != "cutoff"})
        known = ir.pytrec_eval.supports(parsed)
    except (NameError, ValueError, TypeError, KeyError) as error:
        raise InvalidInput(f"unknown measure {name!r} ({error}); such as {', '.join(MEASURES)}, AP, P@1") from error
    if not known:
        raise InvalidInput(f"trec_eval does not compute {name!r}; such as {', '.join(MEASURES)}, AP, P@1")
    return parsed, cutoff


def _cut(values: dict[str, float], cutoff: int | None) -> dict[str, float]:
    if cutoff is None:
        return values
    return {query: value if value * cutoff >= 1 - 1e-6 else 0.0 for query, value in values.items()}


def _mean(scores: list[float]) -> Measurement:
    n = len(scores)
    mean = math.fsum(scores) / n
    se = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (n - 1) / n) if n > 1 else None
    return Measurement(mean, se, n=n, better="higher")


def _positives(qrels: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    judged = {}
    for query, documents in qrels.items():
        for document, grade in documents.items():
            if isinstance(grade, bool) or not isinstance(grade, int | np.integer):
                raise InvalidInput(
                    f"a grade is a whole number, got {grade!r} for query {query!r}, document {document!r}"
                )
        if any(grade > 0 for grade in documents.values()):
            judged[query] = {document: max(int(grade), 0) for document, grade in documents.items()}
    if not judged:
        raise InvalidInput(f"none of the {len(qrels)} judged queries has a positive judgement: nothing can be measured")
    return judged


def _check_run(run: Mapping[str, Mapping[str, float | int]], qrels: Mapping[str, Mapping[str, int]]) -> None:
    if not any(run.values()):
        raise InvalidInput(f"the run is empty: {len(run)} queries and not one document")
    if unknown := [query for query in run if query not in qrels]:
        raise InvalidInput(
            f"the run answers {len(unknown)} queries that are not judged: {unknown[:5]}; give the judgements of their split"
        )
    for query, documents in run.items():
        for document, score in documents.items():
            if not math.isfinite(score):
                raise InvalidInput(f"a score must be finite, got {score!r} for query {query!r}, document {document!r}")


def _vectors(what: str, ids: Sequence[str], vectors: Any) -> np.ndarray:
    array = np.asarray(vectors.detach().cpu() if isinstance(vectors, Tensor) else vectors)
    if array.ndim != 2 or len(array) != len(ids):
        raise InvalidInput(f"{len(ids)} {what} ids need as many vectors, got an array of shape {array.shape}")
    if len(set(ids)) != len(ids):
        twice = next(key for i, key in enumerate(ids) if key in ids[:i])
        raise InvalidInput(f"the {what} id {twice!r} comes twice; ids must be distinct")
    finite = np.isfinite(array).all(1)
    if not finite.all():
        raise InvalidInput(f"the vector of {what} {ids[int(np.argmin(finite))]!r} is not finite")
    return array


def _products(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    left = queries.astype(np.float64)
    scores = np.empty((len(queries), len(documents)), dtype=np.float32)
    for start in range(0, len(documents), _DOCUMENT_BLOCK):
        block = documents[start : start + _DOCUMENT_BLOCK].astype(np.float64)
        scores[:, start : start + len(block)] = left @ block.T
    return scores


def _top(row: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest, the largest first, ties in order of position."""
    kept = np.arange(len(row))
    if k < len(row):
        kept = np.flatnonzero(row >= np.partition(row, len(row) - k)[len(row) - k])
    return kept[np.argsort(-row[kept], kind="stable")][:k]
