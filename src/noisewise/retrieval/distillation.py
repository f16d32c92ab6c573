"""`distil_bm25`: a start for a small encoder without labels or black box, that ranks a corpus as BM25 does."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.retrieval.bm25 import BM25, words_of
from noisewise.retrieval.fitting import Ranker
from noisewise.retrieval.loss import LogitScale, ranking_loss
from noisewise.retrieval.pairs import Candidates, first_copies
from noisewise.training import Fit, FitResult, Plan, fingerprint, run_fit, seeded_dropout
from noisewise.typing import check_count, check_positive

__all__ = ["distil_bm25", "drawn_queries"]

_KIND = "BM25 distillation"
# terms of a drawn query, both ends included
_TERMS = (4, 10)
_PER_DOCUMENT = 16
_SCORED_AT_ONCE = 512
_RUN = re.compile(r"\w+")


def distil_bm25(
    augment: Any,
    bm25: BM25,
    documents: Sequence[str],
    *,
    steps: int = 200,
    batch_size: int = 64,
    lr: float | int = 1e-2,
    scale: float | int = 20.0,
    teacher_scale: float | int = 20.0,
    near: int = 4,
    warm_up: float | int = 0.1,
    ema: float | int = 0.9,
    max_seconds: float | int | None = None,
    progress: bool = False,
    seed: int = 0,
) -> FitResult:
    """Train `augment`, in place, to rank `documents` for queries drawn from them as `bm25` ranks them; leave it in eval mode.

    A query is 4 to 10 words drawn from a passage by idf. Its candidates are the passages of its batch and the `near` ones that
    BM25 ranks highest for each of the batch's queries. The loss is the cross entropy from softmax(`teacher_scale` x BM25's
    score, in [0, 1)) to softmax(`scale` x cosine). Nothing is read but the passages.

    Raises `InvalidInput` for fewer than two different passages with known words.
    """
    check_count("near", near, 0)
    plan = Plan(
        steps=check_count("steps", steps), batch_size=check_count("batch_size", batch_size),
        learning_rate=check_positive("lr", lr), ema=float(ema), clip=1.0, validation=0.0, seed=check_count("seed", seed, 0),
    )  # fmt: skip
    limit = math.inf if max_seconds is None else check_positive("max_seconds", max_seconds)
    documents = [documents[index] for index in first_copies(documents).unique().tolist()]
    queries, source = drawn_queries(documents, bm25, steps * batch_size, seed)
    if len(set(source.tolist())) < 2:
        raise InvalidInput(
            f"{len(documents)} passages with few known words give nothing to tell apart; give a larger corpus"
        )
    rows = _DrawnRows(queries, source, bm25, documents, near, check_positive("teacher_scale", teacher_scale))
    ranker = Ranker(augment, LogitScale(scale))
    features = augment.features(queries, "query"), augment.features(documents, "document")

    def objective(ranker: Any, batch: Candidates, generator: torch.Generator) -> Tensor:
        with seeded_dropout(generator):
            q, d = ranker.encoder(features[0][batch.queries]), ranker.encoder(features[1][batch.documents])
        return ranking_loss(ranker.scale(q @ d.T), batch.target.to(q))

    augment.train()
    fit = Fit(
        ranker,
        rows,
        objective,
        plan,
        counted=augment,
        warm_up=warm_up,
        split=(torch.arange(0), torch.arange(len(rows))),
    )
    result = run_fit(fit, _KIND, {"start": fingerprint(list(ranker.state_dict().values()))}, None, limit, progress)
    augment.eval()
    return FitResult(**{**vars(result), "net": augment})


def drawn_queries(documents: Sequence[str], bm25: BM25, number: int, seed: int = 0) -> tuple[list[str], Tensor]:
    """About `number` queries, at most 16 a passage, and the passage of each: 4 to 10 of its words, drawn without repetition.

    A word's chance is in proportion to its idf; words that `bm25` does not know are not drawn, nor are passages without one.
    """
    draw = np.random.default_rng(check_count("seed", seed, 0))
    words, idf = _words_with_idf(documents, bm25)
    with_words = [index for index, found in enumerate(words) if found]
    each = min(_PER_DOCUMENT, -(-check_count("number", number) // max(1, len(with_words))))
    picked = draw.permutation(with_words)[: -(-number // each)]
    queries, source = [], []
    for index in sorted(picked.tolist()):
        log_weight = np.log([idf[word] for word in words[index]])
        # the greatest of log weight + Gumbel noise are a draw without replacement
        order = (-(log_weight + draw.gumbel(size=(each, len(log_weight))))).argsort(axis=1)
        lengths = draw.integers(_TERMS[0], _TERMS[1] + 1, size=each)
        queries += [
            " ".join(words[index][at] for at in row[:length]) for row, length in zip(order, lengths, strict=True)
        ]
        source += [index] * each
    return queries, torch.tensor(source, dtype=torch.int64)


@dataclass
class _DrawnRows:
    """Drawn queries as rows; a batch's candidates are its own passages and those near them, the target is the teacher's."""

    queries: list[str]
    source: Tensor
    bm25: BM25
    documents: list[str]
    near: int
    teacher_scale: float

    def __post_init__(self) -> None:
        self._asked = self.bm25.query_weights(self.queries)
        self._kept = self.bm25.document_weights(self.documents)
        near = min(self.near, len(self.documents))
        blocks = torch.arange(len(self.queries)).split(_SCORED_AT_ONCE)
        every = torch.arange(len(self.documents))
        self._near = torch.cat([self._scores(block, every).topk(near).indices for block in blocks])

    def __len__(self) -> int:
        return len(self.queries)

    def __getitem__(self, index: Tensor) -> Candidates:
        index = index.cpu().unique()
        documents = torch.cat([self.source[index], self._near[index].flatten()]).unique()
        target = (self.teacher_scale * self._scores(index, documents)).softmax(1)
        return Candidates(index, documents, target)

    def _scores(self, queries: Tensor, documents: Tensor) -> Tensor:
        product = self._asked[queries.numpy()] @ self._kept[documents.numpy()].T
        return torch.from_numpy(product.toarray()).float()


def _words_with_idf(documents: Sequence[str], bm25: BM25) -> tuple[list[list[str]], dict[str, float]]:
    """The different words of each document as they are written, sorted, and the idf of each word that has one above 0."""
    runs = [sorted(set(_RUN.findall(text.lower()))) for text in documents]
    vocabulary = sorted({run for found in runs for run in found})
    terms = dict(zip(vocabulary, words_of(vocabulary, bm25.language), strict=True))
    known = dict(zip(bm25.terms, bm25.idf.tolist(), strict=True))
    idf: dict[str, float] = {}
    written: dict[str, list[str]] = {}
    for run, found in terms.items():
        # a run of a script without spaces has many terms, which are written as they are
        written[run] = [run] if len(found) == 1 else sorted(set(found))
        for word, term in zip(written[run], found if len(found) == 1 else written[run], strict=True):
            if known.get(term, 0.0) > 0:
                idf[word] = known[term]
    return [sorted({word for run in found for word in written[run] if word in idf}) for found in runs], idf
