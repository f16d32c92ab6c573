"""Judged pairs of queries and passages: batches of distinct candidates, splits that share no passage, hard negatives, nDCG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.training import check_share
from noisewise.typing import check_count

__all__ = [
    "Candidates",
    "PairRows",
    "Pairs",
    "first_copies",
    "folds_by_passage",
    "hard_negatives",
    "ndcg",
    "split_by_passage",
]

# of a query's list by the black box, from 1: above it may be right and unjudged, below it is easy; rule 3 of the recipe
_FIRST, _LAST, _BELOW = 10, 60, 0.95
_QUERIES_AT_ONCE = 256
# more documents than any corpus here has
_WIDTH = 2**31


@dataclass(frozen=True)
class Pairs:
    """Passages that are relevant to queries: indices into lists of both, and grades above 0; each pair once."""

    query: Int[Tensor, " pair"]
    document: Int[Tensor, " pair"]
    grade: Float[Tensor, " pair"]

    def __post_init__(self) -> None:
        if not len(self.query) == len(self.document) == len(self.grade):
            raise InvalidInput(
                f"a pair has one query, document and grade, got {len(self.query)}, {len(self.document)}, {len(self.grade)}"
            )
        if not bool((self.grade > 0).all()):
            index = int((~(self.grade > 0)).nonzero()[0])
            raise InvalidInput(
                f"grade {float(self.grade[index]):g} of pair {index} is not above 0: leave such pairs out"
            )

    def __len__(self) -> int:
        return len(self.query)

    def __getitem__(self, index: Tensor) -> "Pairs":
        return Pairs(self.query[index], self.document[index], self.grade[index])

    @classmethod
    def of(
        cls, qrels: Mapping[str, Mapping[str, int]], queries: Sequence[str], documents: Sequence[str]
    ) -> "Pairs":  # fmt: skip
        """The judgements above 0 in `qrels`, by positions in the id lists `queries` and `documents`.

        Queries that are not in the list are left out. Raises `InvalidInput` for documents that are not.
        """
        query_at = {name: index for index, name in enumerate(queries)}
        document_at = {name: index for index, name in enumerate(documents)}
        found = [
            (query_at[query], document, grade)
            for query, judged in qrels.items()
            if query in query_at
            for document, grade in judged.items()
            if grade > 0
        ]
        missing = [document for _, document, _ in found if document not in document_at]
        if missing:
            raise InvalidInput(
                f"{len(missing)} judged documents are not in the corpus, the first of them {missing[:3]!r}"
            )
        columns = list(zip(*found, strict=True)) or [(), (), ()]
        at = [document_at[document] for document in columns[1]]
        return cls(
            torch.tensor(columns[0], dtype=torch.int64),
            torch.tensor(at, dtype=torch.int64),
            torch.tensor(columns[2], dtype=torch.float32),
        )

    def grades(
        self, queries: Int[Tensor, " query"], documents: Int[Tensor, " document"]
    ) -> Float[Tensor, "query document"]:  # fmt: skip
        """Of each query with each document, 0 where no pair is."""
        (rows, row_of), (columns, column_of) = (part.unique(return_inverse=True) for part in (queries, documents))
        found = torch.zeros(len(rows), len(columns))
        if len(self):
            row, column = _places(rows, self.query), _places(columns, self.document)
            known = (row >= 0) & (column >= 0)
            found[row[known], column[known]] = self.grade[known]
        # the usual case, of sorted and distinct ones, without another copy of what may be large
        found = found if torch.equal(rows, queries) else found[row_of]
        return found if torch.equal(columns, documents) else found[:, column_of]


@dataclass(frozen=True)
class Candidates:
    """A batch: distinct queries, distinct passages as candidates of each of them, and which are relevant to what degree."""

    queries: Int[Tensor, " query"]
    documents: Int[Tensor, " candidate"]
    target: Float[Tensor, "query candidate"]


@dataclass(frozen=True)
class PairRows:
    """`pairs` as rows of a fit; a batch of them has the passages of all its pairs as candidates, each passage once.

    `known`: all that is known to be relevant; what of it meets in a batch is never a negative. `copies`: of each document
    the first with the same text, which then stands for it. `hard`: further candidates for each query, -1 for none.
    """

    pairs: Pairs
    known: Pairs
    copies: Int[Tensor, " document"]
    hard: Int[Tensor, "query negative"] | None = None

    def __post_init__(self) -> None:
        merged = Pairs(self.known.query, self.copies[self.known.document], self.known.grade)
        object.__setattr__(self, "known", merged)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: Tensor) -> Candidates:
        picked = self.pairs[index.cpu()]
        queries, documents = picked.query.unique(), self.copies[picked.document]
        if self.hard is not None:
            further = self.hard[queries].flatten()
            documents = torch.cat([documents, self.copies[further[further >= 0]]])
        documents = documents.unique()
        return Candidates(queries, documents, self.known.grades(queries, documents))


def first_copies(documents: Sequence[str]) -> Int[Tensor, " document"]:
    """Of each document the first one with the very same text."""
    seen: dict[str, int] = {}
    return torch.tensor([seen.setdefault(text, index) for index, text in enumerate(documents)], dtype=torch.int64)


def split_by_passage(
    pairs: Pairs, share: float | int = 0.15, seed: int = 0, copies: Int[Tensor, " document"] | None = None
) -> tuple[Pairs, Pairs]:
    """Pairs to train on, and about `share` of all as dev pairs; no passage and no query is in both.

    `copies`: of `first_copies`, where a text may be there under several ids, which are one passage then. Queries that share
    passages, directly or through others, are drawn together. Where that would tie too many together, as in densely judged
    sets, queries are drawn, and other queries' pairs with their passages are left out of both.

    Raises `InvalidInput` where one side would be empty.
    """
    wanted = check_share("share", share, 1) * len(pairs)
    draw = np.random.default_rng(check_count("seed", seed, 0))
    query, document = _ends(pairs, copies)
    together = _tied(query, document) if len(pairs) else document
    held = _drawn(together, wanted, draw)
    if held.sum() < wanted / 2:
        held = _drawn(query, wanted, draw)
    left_out = np.isin(document, document[held]) & ~held
    training, dev = pairs[torch.from_numpy(~held & ~left_out)], pairs[torch.from_numpy(held)]
    if not len(training) or not len(dev):
        raise InvalidInput(
            f"{len(pairs)} pairs cannot be split into dev pairs, a share of {share:g}, and others without a passage in "
            "both: give more pairs, or dev pairs of your own"
        )
    return training, dev


def folds_by_passage(
    pairs: Pairs, number: int, seed: int = 0, copies: Int[Tensor, " document"] | None = None
) -> list[tuple[Pairs, Pairs]]:
    """(pairs to train on, held-out pairs) `number` times; each query is held out once, no passage and no query is in both.

    Queries that share passages are drawn together, as by `split_by_passage`, and where that would tie too many together its
    way out is taken; of fewer passages than `number` there are fewer folds. `copies`: as there. Raises `InvalidInput` for
    fewer queries than folds, and where a fold leaves nothing to train on.
    """
    check_count("number", number, 2)
    query, document = _ends(pairs, copies)
    if len(np.unique(query)) < number:
        raise InvalidInput(f"{len(np.unique(query))} labelled queries cannot be parted into {number} folds: label more")
    group = _tied(query, document)
    groups = len(np.unique(group))
    if 1 < groups < number:
        number = groups
    if np.bincount(group).max() > 2 * len(pairs) / number:
        group = query
    names, at, sizes = np.unique(group, return_inverse=True, return_counts=True)
    order = np.random.default_rng(check_count("seed", seed, 0)).permutation(len(names))
    fold, filled = np.zeros(len(names), int), np.zeros(number, int)
    # the largest groups first, each where there is most room
    for one in order[np.argsort(-sizes[order], kind="stable")]:
        fold[one] = filled.argmin()
        filled[fold[one]] += sizes[one]
    parts = []
    for index in range(number):
        held = fold[at] == index
        training = ~held & ~np.isin(document, document[held])
        if not held.any() or not training.any():
            raise InvalidInput(
                f"fold {index} of {number} has {int(held.sum())} pairs and leaves {int(training.sum())}: label queries "
                "for more passages"
            )
        parts.append((pairs[torch.from_numpy(training)], pairs[torch.from_numpy(held)]))
    return parts


def hard_negatives(
    query_vectors: Float[Tensor, "query dim"],
    document_vectors: Float[Tensor, "document dim"],
    pairs: Pairs,
    k: int,
    seed: int = 0,
) -> Int[Tensor, "query {k}"]:
    """`k` passages for each query that the black box ranks from 10 to 60, drawn at random; -1 where there are fewer.

    The vectors are unit rows. What is relevant, or scores .95 or more of the query's best positive and may well be relevant
    though nobody said so, is never drawn. Queries without a pair get none.
    """
    check_count("k", k)
    last = min(_LAST, len(document_vectors))
    generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
    found = torch.full((len(query_vectors), k), -1)
    for queries in pairs.query.unique().split(_QUERIES_AT_ONCE):
        scores = (query_vectors[queries] @ document_vectors.T).cpu()
        relevant = pairs.grades(queries, torch.arange(len(document_vectors))) > 0
        best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
        value, document = scores.topk(last)
        value, document = value[:, _FIRST - 1 :], document[:, _FIRST - 1 :]
        fits = ~relevant.gather(1, document) & (value < best - (1 - _BELOW) * best.abs())
        chance = torch.rand(fits.shape, generator=generator).masked_fill(~fits, -1.0)
        top = chance.topk(min(k, chance.shape[1]))
        found[queries, : top.indices.shape[1]] = document.gather(1, top.indices).masked_fill(top.values < 0, -1)
    return found


def ndcg(
    scores: Float[Tensor, "query document"], grades: Float[Tensor, "query document"], cut: int = 10
) -> Float[Tensor, " query"]:
    """nDCG@`cut` of each query, as trec_eval has it but for the order of ties: gain = grade, discount 1 / log2(rank + 1).

    `grades` hold every relevant document of a query; 0 for a query without any.
    """
    cut = min(check_count("cut", cut), scores.shape[1])
    discount = 1 / torch.arange(2, cut + 2, dtype=torch.float64).log2()
    gain = grades.double().gather(1, scores.topk(cut).indices) @ discount
    ideal = grades.double().topk(cut).values @ discount
    return torch.where(ideal > 0, gain / ideal.clamp(min=torch.finfo(torch.float64).tiny), 0.0)


def _places(of: Tensor, values: Tensor) -> Tensor:
    """Where each value stands in `of`, whose entries are distinct; -1 where it does not."""
    if not len(of):
        return torch.full_like(values, -1)
    place = torch.full((1 + max(int(of.max()), int(values.max())),), -1)
    place[of] = torch.arange(len(of))
    return place[values]


def _ends(pairs: Pairs, copies: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    """Queries and passages of pairs as arrays, each passage by its first copy."""
    return pairs.query.numpy(), (pairs.document if copies is None else copies[pairs.document]).numpy()


def _tied(query: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Of each pair the number of its connected component in the graph of queries and documents."""
    sparse = require("scipy.sparse", "retrieval")
    connected = require("scipy.sparse.csgraph", "retrieval").connected_components
    queries, documents = int(query.max()) + 1, int(document.max()) + 1
    edges = sparse.coo_matrix((np.ones(len(query)), (query, queries + document)), shape=(queries + documents,) * 2)
    return connected(edges, directed=False)[1][query]


def _drawn(group: np.ndarray, wanted: float, draw: np.random.Generator) -> np.ndarray:
    """Whether each pair is in one of the groups that are drawn, in random order, as long as they fit into about `wanted`."""
    names, sizes = np.unique(group, return_counts=True)
    taken, total = [], 0
    for index in draw.permutation(len(names)):
        # a group may overshoot by less than what would be missing without it
        if total + sizes[index] / 2 <= wanted:
            taken.append(names[index])
            total += int(sizes[index])
    return np.isin(group, taken)
