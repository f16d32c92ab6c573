"""The contestants: each scores the passages that are searched for test queries, out of the same black box and judgements."""

import contextlib
import functools
import io
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
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
from noisewise.retrieval.experiments.mafin.sets import PIECES, JudgedSet, black_box
from noisewise.retrieval.fitting import RankingData, fit_joint
from noisewise.retrieval.forms import Form
from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.lexical import LexicalBlock
from noisewise.retrieval.mafin import Mafin, started
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
    Selector,
)
from noisewise.retrieval.table import WordPieceTable
from noisewise.typing import Cost

__all__ = [
    "ADAPTERS",
    "CHOICE",
    "HYBRID",
    "LEXICAL",
    "NUDGE",
    "SMALL",
    "Bench",
    "Searched",
    "columns",
    "reduced",
    "systems",
]

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
    test_texts: list[str]
    test_vectors: Tensor
    searched_names: list[str]
    searched_texts: list[str]
    searched_vectors: Tensor


class Bench:
    """A set for all systems of a problem: read once for a seed, and what several systems train alike is trained once.

    `judged(seed)`: what a seed may see. `pieces`: that the black box reads, by default the comparison's.
    """

    def __init__(self, judged: Callable[[int], JudgedSet], pieces: int = PIECES) -> None:
        self.judged, self.pieces = judged, pieces
        self._given: dict[int, _Given] = {}
        self._fits: dict[tuple[int, float | None, float], dict[str, Any]] = {}

    def given(self, seed: int) -> _Given:
        """The set as tensors."""
        if seed not in self._given:
            self._given[seed] = _as_tensors(self.judged(seed), self.pieces)
        return self._given[seed]

    def selector(self, seed: int, epochs: float, lr: float | None) -> Selector:
        """All that Mafin's candidates are made from, with the fits that were made for other systems."""
        given = self.given(seed)
        table, lexical = _started(given.judged.name, seed, tuple(given.data.documents), tuple(given.searched_texts))
        options = {"epochs": epochs} | ({} if lr is None else {"lr": lr})
        fits = self._fits.setdefault((seed, lr, epochs), {})
        return Selector(given.data, given.dev, table, lexical, "equal", options, seed, fits=fits)


# the seeds of a problem and that of its tuning
@functools.lru_cache(maxsize=4)
def _started(name: str, seed: int, documents: tuple[str, ...], searched: tuple[str, ...]) -> tuple[Any, LexicalBlock]:
    """The small model where labels begin to matter, and the words: the same for all problems on one set."""
    table = WordPieceTable(seed=seed)
    started(table, list(dict.fromkeys([*documents, *searched])), "english", 200, seed)
    return table, LexicalBlock(seed=seed).fit(documents)


def systems(names: tuple[str, ...], bench: Bench, untuned: bool = False) -> tuple[System, ...]:
    """A system for each name, whose budget is epochs of training. `untuned`: with the first learning rate."""

    def system(name: str) -> System:
        def draw(budget: float | int, seed: int, lr: float | None = None) -> Searched:
            given, begin = bench.given(seed), time.monotonic()
            scores, numbers, choice = _MAKERS[name](name, bench, float(budget), seed, lr)
            cost = Cost(seconds=time.monotonic() - begin)
            notes = (f"{choice} was chosen",) if choice else ()
            by_black = given.test_vectors @ given.searched_vectors.T
            return Searched(_evaluated(given, scores), _evaluated(given, by_black), numbers, cost, choice, notes)

        settings = _TUNED.get(name, ({},))
        extra = ("nudge", "bench") if name == NUDGE else None
        return System(name, draw, settings[:1] if untuned else settings, extra)

    return tuple(system(name) for name in names)


def reduced(numbers: int, words: bool, bench: Bench) -> System:
    """The black box cut to so many principal directions of the passages, alone or with words beside it."""
    name = f"{numbers} numbers of the black box" + (" + words" if words else "")

    def draw(budget: float | int, seed: int) -> Searched:
        given, begin = bench.given(seed), time.monotonic()
        mafin = Mafin(black_box(bench.pieces), LexicalBlock(seed=seed), black_dim=numbers, seed=seed)
        judged = given.judged
        mafin.fit(
            judged.corpus, judged.queries, judged.train, judged.dev, form=WORDS if words else BLACK,
            search=judged.searched if judged.apart else None,
        )  # fmt: skip
        q = mafin.encode_query(given.test_texts, convert_to_tensor=True)
        d = mafin.encode_document(given.searched_texts, convert_to_tensor=True)
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
    }


# ---- what each one does: (scores of test queries over the passages that are searched, numbers of a vector, choice)

_Made = tuple[Float[Tensor, "query document"], int, str]


def _by_black(name: str, bench: Bench, budget: float, seed: int, lr: float | None) -> _Made:
    given = bench.given(seed)
    return given.test_vectors @ given.searched_vectors.T, given.test_vectors.shape[1], ""


def _by_mafin(name: str, bench: Bench, budget: float, seed: int, lr: float | None) -> _Made:
    """A form of Mafin by its name, or the guard's choice."""
    selector = bench.selector(seed, budget, lr)
    if name == CHOICE and bench.given(seed).judged.drawn:
        # a user gives all there is, and the guard parts it as it wants; nothing may be shared with other systems then
        selector = replace(selector, dev=None, fits={})
    chosen = selector.select() if name == CHOICE else selector.build(name)
    return (*_scored(chosen.form, bench.given(seed)), chosen.form.name if name == CHOICE else "")


def _by_small(name: str, bench: Bench, budget: float, seed: int, lr: float | None) -> _Made:
    """The late fusion's small model, without the black box beside it."""
    joint = bench.selector(seed, budget, lr).build(FUSION).form.joint
    assert joint is not None
    alone = JointEncoder(joint.augment, joint.black_dim, ALONE)
    scores, _ = _scored(Form(SMALL, joint.black_dim, alone), bench.given(seed))
    return scores, joint.dim - joint.black_dim, ""


def _by_adapter(name: str, bench: Bench, budget: float, seed: int, lr: float | None) -> _Made:
    given = bench.given(seed)
    data = given.data
    vectors = {
        "query": dict(
            zip([*data.queries, *given.test_texts], torch.cat([data.query_vectors, given.test_vectors]), strict=True)
        ),
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
    held = torch.isin(data.pairs.query, given.dev.query) | torch.isin(data.pairs.document, given.dev.document)
    training = data.pairs[(~held).nonzero().flatten()]
    own = RankingData(data.queries, data.documents, data.query_vectors, data.document_vectors, training)
    fit_joint(joint, own, dev=given.dev, epochs=budget, seed=seed, lr=_ADAPTER_RATES[0]["lr"] if lr is None else lr)
    return (*_scored(Form(name, dim, joint), given)[:1], dim, "")


def _by_nudge(name: str, bench: Bench, budget: float, seed: int, lr: float | None) -> _Made:
    """Moves the passages that are relevant to training queries; another corpus has none of them, and stays as it is."""
    given = bench.given(seed)
    dim = given.test_vectors.shape[1]
    if given.judged.apart:
        return given.test_vectors @ given.searched_vectors.T, dim, ""
    data = given.data
    held = torch.isin(data.pairs.query, given.dev.query)
    parts = [_of_nudge(data, data.pairs[part.nonzero().flatten()]) for part in (~held, held)]
    with contextlib.redirect_stdout(io.StringIO()):
        nudge = require("nudge", "bench").NUDGEN(torch.device("cpu"))
        # validated by its ten best, as everything here is
        moved = nudge.finetune_embeddings(data.document_vectors.numpy(), *parts, val_k=10)
    return given.test_vectors @ torch.as_tensor(np.asarray(moved)).float().T, dim, ""


def _of_nudge(data: RankingData, pairs: Pairs) -> dict[str, Any]:
    queries = pairs.query.unique()
    answers = [pairs.document[pairs.query == query].tolist() for query in queries]
    return {"q_embs": data.query_vectors[queries].numpy(), "q_ans_indx": answers}


def _by_words(name: str, bench: Bench, budget: float, seed: int, lr: float | None) -> _Made:
    given = bench.given(seed)
    return torch.from_numpy(BM25.of(given.searched_texts).scores(given.test_texts)).float(), 0, ""


def _by_two_indexes(name: str, bench: Bench, budget: float, seed: int, lr: float | None) -> _Made:
    """BM25 in full beside the black box, its weight chosen on all labelled queries."""
    given = bench.given(seed)
    data = given.data
    labelled = data.pairs.query.unique()
    texts = [data.queries[int(index)] for index in labelled]
    grades = data.pairs.grades(labelled, torch.arange(len(data.documents)))
    black = data.query_vectors[labelled] @ data.document_vectors.T
    words = torch.from_numpy(BM25.of(data.documents).scores(texts)).float()
    values = [float(ndcg(black + weight * words, grades).mean()) for weight in WEIGHTS]
    weight = WEIGHTS[int(np.argmax(values))]
    tested, *_ = _by_words(name, bench, budget, seed, lr)
    return _by_black(name, bench, budget, seed, lr)[0] + weight * tested, given.test_vectors.shape[1], ""


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


def _as_tensors(judged: JudgedSet, pieces: int) -> _Given:
    box = black_box(pieces)
    labelled = [*judged.train, *judged.dev]
    names = list(judged.corpus)
    texts = [text_of(judged.corpus[name]) for name in names]
    queries = [judged.queries[name] for name in labelled]
    searched, test = list(judged.searched), list(judged.test)
    searched_texts, test_texts = (
        [text_of(judged.searched[name]) for name in searched],
        [judged.queries[n] for n in test],
    )

    def vectors(of: list[str], kind: str) -> Tensor:
        return torch.from_numpy(box.vectors(of, kind))

    every = Pairs.of(judged.train | judged.dev, labelled, names)
    data = RankingData(queries, texts, vectors(queries, "query"), vectors(texts, "document"), every)
    dev, asked = Pairs.of(judged.dev, labelled, names), vectors(test_texts, "query")
    return _Given(
        judged, data, dev, test, test_texts, asked, searched, searched_texts, vectors(searched_texts, "document")
    )


def _scored(form: Form, given: _Given) -> tuple[Float[Tensor, "query document"], int]:
    """Of test queries, whose words are learned from the passages that are searched."""
    if form.lexical is not None and given.judged.apart:
        words = LexicalBlock(form.lexical.dim, form.lexical.language, form.lexical.seed).fit(given.searched_texts)
        form = replace(form, lexical=words)
    q = form.vectors(given.test_texts, given.test_vectors, "query")
    return q @ form.vectors(given.searched_texts, given.searched_vectors, "document").T, form.dim


def _evaluated(given: _Given, scores: Float[Tensor, "query document"]) -> Evaluation:
    best = scores.topk(min(_K, scores.shape[1]))
    run = {
        query: {given.searched_names[index]: score for index, score in zip(places, values, strict=True)}
        for query, places, values in zip(given.test_names, best.indices.tolist(), best.values.tolist(), strict=True)
    }
    return evaluate(given.judged.test, run, _MEASURES)
