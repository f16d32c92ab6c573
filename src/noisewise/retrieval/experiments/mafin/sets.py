"""The comparison's sets: passages, judged queries to learn from, to choose on and to test on, as each seed may see them."""

import functools
import os
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch

from noisewise.comparison import TUNING_SEED
from noisewise.errors import InvalidInput
from noisewise.retrieval.beir import Corpus, Qrels, Queries, drop_empty, load_beir
from noisewise.retrieval.blackbox import CachedBlackBox
from noisewise.retrieval.experiments.mafin.served import served_minilm
from noisewise.retrieval.pairs import Pairs, split_by_passage

__all__ = ["PIECES", "SETS", "JudgedSet", "black_box", "judged_set", "present"]

# the word pieces that the black box reads of a text, as if its endpoint cut the rest
PIECES = 96
_DEV_SHARE = 0.15
# of a set: the folder of its passages, that of its queries, and the one of another corpus that is searched with its own queries
SETS: dict[str, tuple[str, str, str | None]] = {
    "tenk": ("tenk-lyft", "tenk-lyft", "tenk-uber"),
    "covidqa": ("covidqa", "covidqa", None),
    "scifact-mini": ("scifact-mini", "scifact-mini", None),
    "cranfield": ("cranfield", "cranfield", None),
    "xquad-en": ("xquad-en", "xquad-en", None),
    # the same questions in other languages, with the same ids
    "German to English": ("xquad-en", "xquad-de", None),
    "Spanish to English": ("xquad-en", "xquad-es", None),
    "Chinese to English": ("xquad-en", "xquad-zh", None),
}
_SHIPPED = ("tenk-lyft", "tenk-uber")


@dataclass(frozen=True)
class JudgedSet:
    """`train` and `dev` are judged over `corpus`, `test` over `searched`, which may be the same.

    `drawn`: `dev` is no part of the set but drawn here, so that a user of the guard would not have parted it off.
    """

    name: str
    corpus: Corpus
    searched: Corpus
    queries: Queries
    train: Qrels
    dev: Qrels
    test: Qrels
    drawn: bool = False

    @property
    def apart(self) -> bool:
        """Whether another corpus is searched than the one that is learned from."""
        return self.corpus is not self.searched


def present(name: str) -> bool:
    """Whether the data of a set are at hand."""
    return all(_folder(folder) is not None for folder in SETS[name] if folder is not None)


@functools.lru_cache(maxsize=2)
def black_box(pieces: int = PIECES) -> CachedBlackBox:
    """The encoder behind its endpoint and a cache in memory, one for the life of the process."""
    return CachedBlackBox(served_minilm(pieces))


@functools.lru_cache(maxsize=16)
def _loaded(name: str) -> JudgedSet:
    places = [None if folder is None else _found(folder) for folder in SETS[name]]
    assert places[0] is not None
    assert places[1] is not None
    corpus = load_beir(places[0])[0]
    _, queries, qrels = load_beir(places[1])
    parts = {split: _kept(corpus, queries, judged) for split, judged in qrels.items()}
    corpus, queries, _ = drop_empty(corpus, queries, {})
    train, dev = parts["train"], parts.get("dev", {})
    if places[2] is None:
        return JudgedSet(name, corpus, corpus, queries, train, dev, parts["test"])
    searched, asked, judged = load_beir(places[2])
    test = _kept(searched, asked, judged["test"])
    searched, asked, _ = drop_empty(searched, asked, {})
    return JudgedSet(name, corpus, searched, queries | asked, train, dev, test)


def judged_set(
    name: str, seed: int, pairs: int | None = None, shuffled: bool = False, passages: int | None = None
) -> JudgedSet:
    """What a seed may see: a set without dev queries is parted by it; seeds of tuning are tested on dev queries.

    `pairs`: learn from so many judged pairs only, dev among them. `shuffled`: passages are dealt anew to the queries.
    `passages`: only the first so many of each corpus, with what is asked about them.
    """
    found = _loaded(name) if passages is None else _first(_loaded(name), passages)
    if not found.dev or pairs is not None:
        found = _parted(found, seed, pairs)
    if shuffled:
        found = replace(found, train=_dealt(found.train, seed), dev=_dealt(found.dev, seed))
    if seed < TUNING_SEED:
        return found
    inner = _parted(replace(found, dev={}), seed, None)
    return replace(inner, searched=found.corpus, test=found.dev)


def _first(found: JudgedSet, passages: int) -> JudgedSet:
    corpus, searched = (dict(list(whole.items())[:passages]) for whole in (found.corpus, found.searched))

    def about(kept: Corpus, qrels: Qrels) -> Qrels:
        return {query: judged for query, judged in qrels.items() if judged.keys() <= kept.keys()}

    return replace(
        found, corpus=corpus, searched=searched if found.apart else corpus, train=about(corpus, found.train),
        dev=about(corpus, found.dev), test=about(searched, found.test),
    )  # fmt: skip


def _parted(found: JudgedSet, seed: int, pairs: int | None) -> JudgedSet:
    """Dev queries drawn from those that are learned from, by passage."""
    judged = found.train | found.dev
    names, documents = list(judged), list(found.corpus)
    every = Pairs.of(judged, names, documents)
    if pairs is not None:
        order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
        every = every[order[:pairs]]
    parts = split_by_passage(every, _DEV_SHARE, seed)
    train: Qrels = {}
    dev: Qrels = {}
    for part, qrels in zip(parts, (train, dev), strict=True):
        for query, document, grade in zip(
            part.query.tolist(), part.document.tolist(), part.grade.tolist(), strict=True
        ):
            qrels.setdefault(names[query], {})[documents[document]] = int(grade)
    return replace(found, train=train, dev=dev, drawn=True)


def _dealt(qrels: Qrels, seed: int) -> Qrels:
    order = np.random.default_rng(seed).permutation(len(qrels))
    judged = list(qrels.values())
    return {query: judged[index] for query, index in zip(qrels, order, strict=True)}


def _kept(corpus: Corpus, queries: Queries, qrels: Qrels) -> Qrels:
    """Queries with something relevant that is not empty."""
    left = drop_empty(corpus, queries, qrels)[2]
    return {query: judged for query, judged in left.items() if any(grade > 0 for grade in judged.values())}


def _found(name: str) -> Path:
    place = _folder(name)
    if place is None:
        raise InvalidInput(f"{name}/ is not at hand: NOISEWISE_DATA must name a folder that holds it")
    return place


def _folder(name: str) -> Path | None:
    """In the package, or under the folder that the environment variable NOISEWISE_DATA names."""
    root = os.environ.get("NOISEWISE_DATA")
    places = [Path(root) / name] if root else []
    if name in _SHIPPED:
        places.append(Path(str(files("noisewise"))) / "data" / name)
    return next((place for place in places if (place / "qrels").is_dir()), None)
