"""The contestants: each scores the passages that are searched for test queries, out of the same black box and judgements."""

import contextlib
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.comparison import System
from noisewise.errors import require
from noisewise.metrics.measurement import Measurement
from noisewise.retrieval.beir import text_of
from noisewise.retrieval.bm25 import BM25
from noisewise.retrieval.evaluation import Evaluation, evaluate, paired_bootstrap
from noisewise.retrieval.experiments.mafin.adapters import Adapter
from noisewise.retrieval.experiments.mafin.sets import JudgedSet, black_box
from noisewise.retrieval.fitting import RankingData, fit_joint
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.lexical import LexicalBlock
from noisewise.retrieval.mafin import Mafin
from noisewise.retrieval.pairs import Pairs, ndcg
from noisewise.retrieval.selection import (
    ALONE,
    BLACK,
    CONCATENATION,
    FUSION,
    LAMBDA,
    MAFIN,
    MAFIN_WORDS,
    WEIGHTS,
    WORDS,
)
from noisewise.typing import Cost

__all__ = ["ADAPTERS", "CHOICE", "HYBRID", "LEXICAL", "NUDGE", "SMALL", "Searched", "columns", "reduced", "systems"]

CHOICE, HYBRID, LEXICAL, NUDGE = "guard's choice", "black box + BM25, two indexes", "BM25", "NUDGE-N"
SMALL, ADAPTERS = "small model alone", {"linear adapter": None, "MLP adapter": 512}
_MEASURES, _CRITERION = ("nDCG@10", "R@10", "Success@5"), "nDCG@10"
_K = 100
_RATES = tuple({"lr": lr} for lr in (3e-3, 1e-3))
_ADAPTER_RATES = tuple({"lr": lr} for lr in (1e-3, 3e-4, 1e-4, 3e-3))


@dataclass(frozen=True)
class Searched:
    """How a system ranks, and how the black box does, on the same queries. `numbers`: of a stored vector."""

    found: Evaluation
    base: Evaluation
    numbers: int
    cost: Cost
    choice: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Given:
    """A set as tensors: passages to learn from, passages that are searched, and the test queries."""

    judged: JudgedSet
    data: RankingData
    dev: Pairs
    test_names: list[str]
    test_vectors: Tensor
    searched_names: list[str]
    searched_texts: list[str]
    searched_vectors: Tensor


def systems(
    names: tuple[str, ...], judged: Callable[[int], JudgedSet], pieces: int | None = None, untuned: bool = False
) -> tuple[System, ...]:
    """A system for each name, whose budget is epochs of training; `judged(seed)`: what a seed may see."""

    def system(name: str) -> System:
        def draw(budget: float | int, seed: int, lr: float | None = None) -> Searched:
            given, begin = _given(judged(seed), pieces), time.monotonic()
            scores, numbers, choice = _MAKERS[name](name, given, budget, seed, lr)
            cost = Cost(seconds=time.monotonic() - begin)
            notes = (f"{choice} was chosen",) if choice else ()
            by_black = given.test_vectors @ given.searched_vectors.T
            return Searched(_evaluated(given, scores), _evaluated(given, by_black), numbers, cost, choice, notes)

        extra = ("nudge", "bench") if name == NUDGE else None
        return System(name, draw, ({"lr": 3e-3},) if untuned and name in _TUNED else _TUNED.get(name, ({},)), extra)

    return tuple(system(name) for name in names)


def reduced(numbers: int, words: bool, judged: Callable[[int], JudgedSet]) -> System:
    """The black box cut to so many principal directions, alone or with words beside it."""
    name = f"{numbers} numbers of the black box" + (" + words" if words else "")

    def draw(budget: float | int, seed: int) -> Searched:
        given, begin = _given(judged(seed), None), time.monotonic()
        mafin = Mafin(black_box(), LexicalBlock(seed=seed), black_dim=numbers, seed=seed)
        _fit(mafin, given, form=WORDS)
        if words:
            q, d = _encoded(mafin, given)
        else:
            q, d = (_cut(mafin, vectors) for vectors in (given.test_vectors, given.searched_vectors))
        cost = Cost(seconds=time.monotonic() - begin)
        by_black = given.test_vectors @ given.searched_vectors.T
        return Searched(_evaluated(given, q @ d.T), _evaluated(given, by_black), d.shape[1], cost)

    return System(name, draw)


def columns(found: Searched) -> dict[str, Measurement]:
    """What trec_eval says, and the paired gain over the black box."""
    gain = paired_bootstrap(found.found.per_query[_CRITERION], found.base.per_query[_CRITERION])
    return {
        _CRITERION: found.found.mean[_CRITERION],
        "gain": Measurement(gain.mean, gain.se, n=gain.n, better="higher"),
        "gain, from": Measurement(gain.low, better="neither"),
        "gain, to": Measurement(gain.high, better="neither"),
        "R@10": found.found.mean["R@10"],
        "hit@5": found.found.mean["Success@5"],
        "numbers stored": Measurement(found.numbers, better="neither"),
        "seconds": Measurement(found.cost.seconds),
    }


# ---- what each one does: (scores of test queries over the passages that are searched, numbers of a vector, choice)

_Made = tuple[Float[Tensor, "query document"], int, str]


def _by_black(name: str, given: _Given, budget: float, seed: int, lr: float | None) -> _Made:
    return given.test_vectors @ given.searched_vectors.T, given.test_vectors.shape[1], ""


def _by_mafin(name: str, given: _Given, budget: float, seed: int, lr: float | None) -> _Made:
    """A form of Mafin by its name, or the guard's choice."""
    options = {} if lr is None else {"lr": lr}
    mafin = Mafin(black_box(), weighting="equal", seed=seed)
    _fit(mafin, given, epochs=budget, form=None if name == CHOICE else name, **options)
    q, d = _encoded(mafin, given)
    return q @ d.T, d.shape[1], mafin.choice_ if name == CHOICE else ""


def _by_small(name: str, given: _Given, budget: float, seed: int, lr: float | None) -> _Made:
    """The late fusion's small model, without the black box beside it."""
    mafin = Mafin(black_box(), seed=seed)
    _fit(mafin, given, epochs=budget, form=FUSION, **({} if lr is None else {"lr": lr}))
    joint = mafin.fits_[FUSION].net
    q = joint.encode(_test_texts(given), given.test_vectors, "query")  # type: ignore[operator]
    d = joint.encode(given.searched_texts, given.searched_vectors, "document")  # type: ignore[operator]
    return q @ d.T, mafin.form_.added, ""


def _by_adapter(name: str, given: _Given, budget: float, seed: int, lr: float | None) -> _Made:
    data, test = given.data, _test_texts(given)
    vectors = {
        "query": dict(zip([*data.queries, *test], torch.cat([data.query_vectors, given.test_vectors]), strict=True)),
        "document": dict(
            zip(
                [*data.documents, *given.searched_texts],
                torch.cat([data.document_vectors, given.searched_vectors]),
                strict=True,
            )
        ),
    }
    dim = data.document_vectors.shape[1]
    joint = JointEncoder(Adapter(vectors, dim, ADAPTERS[name], seed), dim, ALONE)
    training = data.pairs[(~torch.isin(data.pairs.query, given.dev.query)).nonzero().flatten()]
    own = RankingData(data.queries, data.documents, data.query_vectors, data.document_vectors, training)
    fit_joint(joint, own, dev=given.dev, epochs=budget, seed=seed, lr=1e-3 if lr is None else lr)
    q = joint.encode(test, given.test_vectors, "query")
    return q @ joint.encode(given.searched_texts, given.searched_vectors, "document").T, dim, ""


def _by_nudge(name: str, given: _Given, budget: float, seed: int, lr: float | None) -> _Made:
    """Moves the passages that are relevant to training queries; another corpus has none of them, and stays as it is."""
    dim = given.test_vectors.shape[1]
    if given.judged.apart:
        return given.test_vectors @ given.searched_vectors.T, dim, ""
    data = given.data
    held = torch.isin(data.pairs.query, given.dev.query)
    parts = [_of_nudge(data, data.pairs[part.nonzero().flatten()]) for part in (~held, held)]
    with contextlib.redirect_stdout(io.StringIO()):
        moved = (
            require("nudge", "bench")
            .NUDGEN(torch.device("cpu"))
            .finetune_embeddings(data.document_vectors.numpy(), *parts)
        )
    return given.test_vectors @ torch.as_tensor(np.asarray(moved)).float().T, dim, ""


def _of_nudge(data: RankingData, pairs: Pairs) -> dict[str, Any]:
    queries = pairs.query.unique()
    answers = [pairs.document[pairs.query == query].tolist() for query in queries]
    return {"q_embs": data.query_vectors[queries].numpy(), "q_ans_indx": answers}


def _by_words(name: str, given: _Given, budget: float, seed: int, lr: float | None) -> _Made:
    return torch.from_numpy(BM25.of(given.searched_texts).scores(_test_texts(given))).float(), 0, ""


def _by_two_indexes(name: str, given: _Given, budget: float, seed: int, lr: float | None) -> _Made:
    """BM25 in full beside the black box, its weight chosen on all labelled queries."""
    data = given.data
    labelled = data.pairs.query.unique()
    texts = [data.queries[int(index)] for index in labelled]
    grades = data.pairs.grades(labelled, torch.arange(len(data.documents)))
    black = data.query_vectors[labelled] @ data.document_vectors.T
    words = torch.from_numpy(BM25.of(data.documents).scores(texts)).float()
    values = [float(ndcg(black + weight * words, grades).mean()) for weight in WEIGHTS]
    weight = WEIGHTS[int(np.argmax(values))]
    words, *_ = _by_words(name, given, budget, seed, lr)
    return _by_black(name, given, budget, seed, lr)[0] + weight * words, given.test_vectors.shape[1], ""


_MAKERS: dict[str, Callable[..., _Made]] = {
    BLACK: _by_black,
    **dict.fromkeys(ADAPTERS, _by_adapter),
    NUDGE: _by_nudge,
    SMALL: _by_small,
    **dict.fromkeys((CONCATENATION, FUSION, MAFIN, LAMBDA, WORDS, MAFIN_WORDS, CHOICE), _by_mafin),
    LEXICAL: _by_words,
    HYBRID: _by_two_indexes,
}
_TUNED = dict.fromkeys(ADAPTERS, _ADAPTER_RATES) | dict.fromkeys((SMALL, FUSION, MAFIN, LAMBDA, MAFIN_WORDS), _RATES)


# ---- parts


def _given(judged: JudgedSet, pieces: int | None) -> _Given:
    box = black_box() if pieces is None else black_box(pieces)
    labelled = [*judged.train, *judged.dev]
    names = list(judged.corpus)
    texts = [text_of(judged.corpus[name]) for name in names]
    queries = [judged.queries[name] for name in labelled]
    searched, test = list(judged.searched), list(judged.test)
    searched_texts = [text_of(judged.searched[name]) for name in searched]

    def vectors(of: list[str], kind: str) -> Tensor:
        return torch.from_numpy(box.vectors(of, kind))

    data = RankingData(
        queries,
        texts,
        vectors(queries, "query"),
        vectors(texts, "document"),
        Pairs.of(judged.train | judged.dev, labelled, names),
    )
    return _Given(
        judged,
        data,
        Pairs.of(judged.dev, labelled, names),
        test,
        vectors([judged.queries[name] for name in test], "query"),
        searched,
        searched_texts,
        vectors(searched_texts, "document"),
    )


def _fit(mafin: Mafin, given: _Given, **options: Any) -> None:
    judged = given.judged
    mafin.fit(
        judged.corpus,
        judged.queries,
        judged.train,
        judged.dev,
        search=judged.searched if judged.apart else None,
        **options,
    )


def _encoded(mafin: Mafin, given: _Given) -> tuple[Tensor, Tensor]:
    q = mafin.encode_query(_test_texts(given), convert_to_tensor=True)
    return q, mafin.encode_document(given.searched_texts, convert_to_tensor=True)


def _cut(mafin: Mafin, vectors: Tensor) -> Tensor:
    assert mafin.rotation_ is not None
    return torch.nn.functional.normalize(vectors @ mafin.rotation_, dim=1)


def _test_texts(given: _Given) -> list[str]:
    return [given.judged.queries[name] for name in given.test_names]


def _evaluated(given: _Given, scores: Float[Tensor, "query document"]) -> Evaluation:
    best = scores.topk(min(_K, scores.shape[1]))
    run = {
        query: {given.searched_names[index]: score for index, score in zip(places, values, strict=True)}
        for query, places, values in zip(given.test_names, best.indices.tolist(), best.values.tolist(), strict=True)
    }
    return evaluate(given.judged.test, run, _MEASURES)
