"""The comparison's problems: five sets, fewer pairs, other languages, fewer numbers, shuffled judgements, whole passages."""

import functools
from typing import Any

from noisewise.comparison import Problem, System
from noisewise.retrieval.experiments.mafin.sets import PIECES, judged_set, present
from noisewise.retrieval.experiments.mafin.systems import (
    ADAPTERS,
    CHOICE,
    HYBRID,
    LEXICAL,
    NUDGE,
    SMALL,
    Bench,
    columns,
    reduced,
    systems,
)
from noisewise.retrieval.selection import BLACK, CONCATENATION, FUSION, LAMBDA, MAFIN, MAFIN_WORDS, WORDS

__all__ = ["problems"]

_ALL = (
    BLACK, *ADAPTERS, NUDGE, SMALL, CONCATENATION, FUSION, MAFIN, LAMBDA, LEXICAL, HYBRID, WORDS, MAFIN_WORDS, CHOICE
)  # fmt: skip
_MAIN = ("tenk", "covidqa", "scifact-mini", "cranfield", "xquad-en")
_FOREIGN = ("German to English", "Spanish to English", "Chinese to English")
_EPOCHS = {"quick": 2, "cpu": 10, "paper": 10}
# judged pairs of the curve, numbers of the black box that are kept, word pieces that are enough for nearly every passage
_PAIRS, _NUMBERS, _WHOLE = (50, 100, 200, 500), (32, 64, 128, 256), 256
_CURVE, _QUICK = ("tenk", "covidqa"), 100
_BLACK_BOX = (
    f"Black box: all-MiniLM-L6-v2 behind an endpoint on this machine, 384 numbers, texts cut at {PIECES} word pieces, which "
    "favours whatever sees words; protocol W has texts whole. Gains are over it, paired by query, with 95 % intervals of a "
    "bootstrap over queries. Small model: a table of word pieces, 256 numbers, that starts by distilling BM25 on the passages, "
    "without labels. "
    "Two learning rates tried for whatever holds it, four for adapters, on dev queries; the guard's choice has the first. "
    "Adapters stop on dev queries and learn from all others; small models stop on 15 % of the training pairs. Systems of a "
    "problem share what they train alike, so times of rows do not compare."
)
_TOLD = {
    "tenk": "two questions a passage by an LLM, learned on one company's report and tested on another's",
    "covidqa": "questions by experts over scientific passages",
    "scifact-mini": "claims over a subset of SciFact's abstracts, not comparable with SciFact; without dev queries, so that each "
    "seed draws its own",
    "cranfield": "aerodynamics, several relevant abstracts a question",
    "xquad-en": "questions over paragraphs of an encyclopedia, which is nearly solved",
}


def problems(scale: str) -> tuple[Problem, ...]:
    """All problems at `scale` whose data are at hand."""
    if scale == "quick":
        told = f"tenk, {_QUICK} passages: the first of each corpus, and what is asked about them."
        return (
            _problem("A", f"tenk, {_QUICK} passages", "tenk", (BLACK, LEXICAL, WORDS, MAFIN), scale, (_BLACK_BOX, told),
                     passages=_QUICK)[1],
        )  # fmt: skip
    found = [
        _problem("A", name, name, _ALL, scale, (_BLACK_BOX, _note(name)) if name == "tenk" else (_note(name),))
        for name in _MAIN
    ]
    found += [
        _problem("B", f"{name}, {pairs} pairs", name, (WORDS, MAFIN, CHOICE), scale,
                 (f"{name} with fewer pairs: drawn anew by each seed, dev among them.",) * (pairs == _PAIRS[0]), pairs=pairs)
        for name in _CURVE for pairs in _PAIRS
    ]  # fmt: skip
    found += [
        _problem("C", name, name, (BLACK, "linear adapter", LEXICAL, MAFIN, CHOICE), scale,
                 ("xquad: the same questions in another language over the English paragraphs, with an English black box.",)
                 * (name == _FOREIGN[0]))
        for name in _FOREIGN
    ]  # fmt: skip
    found += [_fewer_numbers(name, scale) for name in _CURVE]
    found.append(
        _problem("E", "tenk, shuffled", "tenk", (BLACK, WORDS, MAFIN, CHOICE), scale,
                 ("tenk, shuffled: the relevant passages of training and dev queries are dealt anew, so that there is nothing to "
                  "learn.",), shuffled=True)
    )  # fmt: skip
    found += [
        _problem("W", f"{name}, whole", name, (BLACK, LEXICAL, HYBRID, WORDS, MAFIN, CHOICE), scale,
                 (f"whole: the black box reads {_WHOLE} word pieces, so nearly every passage to its end.",) * (name == "tenk"),
                 pieces=_WHOLE)
        for name in ("tenk", "scifact-mini")
    ]  # fmt: skip
    return tuple(problem for name, problem in found if present(name))


def _problem(
    protocol: str, title: str, name: str, names: tuple[str, ...], scale: str, notes: tuple[str, ...],
    pieces: int = PIECES, **options: Any,
) -> tuple[str, Problem]:  # fmt: skip
    bench = Bench(functools.partial(judged_set, name, **options), pieces)
    return name, _made(protocol, title, systems(names, bench, untuned=protocol in "BE"), scale, notes)


def _fewer_numbers(name: str, scale: str) -> tuple[str, Problem]:
    bench = Bench(functools.partial(judged_set, name))
    cut = tuple(reduced(numbers, words, bench) for words in (False, True) for numbers in _NUMBERS)
    note = f"{name}, storage: the black box cut to its first principal directions over the passages; words are 1024 numbers."
    whole = systems((BLACK, WORDS), bench)
    return name, _made("D", f"{name}, storage", (*whole, *cut), scale, (note,))


def _made(protocol: str, title: str, contestants: tuple[System, ...], scale: str, notes: tuple[str, ...]) -> Problem:
    return Problem(protocol, title, _EPOCHS[scale], contestants, columns, "nDCG@10", notes=notes, better="higher")


def _note(name: str) -> str:
    return f"{name}: {_TOLD[name]}; {_EPOCHS['cpu']} epochs."
