"""BM25 as dense coordinates: beside an embedding, one cosine ranks as embedding score plus g times BM25. Nothing is trained."""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, NoisewiseWarning, require
from noisewise.retrieval.bm25 import BM25
from noisewise.typing import check_count

__all__ = ["LexicalBlock"]

# beyond this many passages the exact decomposition (cubic time, quadratic memory) gives way to a randomised one
_EXACT_SVD = 4000
# singular values below this share of the largest are what rounding leaves of linearly dependent passages
_RANK = 1e-6
# share of a query's part outside the span of the corpus that its signs keep: for passages of the corpus that part is noise
# only, for later ones it is signal too
_OUTSIDE = 0.5
# a passage that weighs this much more than any at fit loses enough of its score to be worth a word
_HEAVY = 1.1


class LexicalBlock:
    """Fixed vectors whose inner product is a query's BM25 score, with a slack coordinate that makes all passages of one length.

    With l the sparse vectors of `BM25`, R a fixed projection [term, dim - 1] and M the largest |l(d) R| of the corpus:
    `encode_document` = [l(d) R / M ; sqrt(1 - |l(d) R / M|^2)], unit rows; `encode_query` = [M l(q) R ; 0], whose length
    weighs words against the other parts, so it is not normalised. Their product is (l(q) R).(l(d) R), BM25 itself where the
    corpus has at most dim - 1 passages (or terms), an approximation of it beyond. For unit vectors e_b of any embedding,
    [e_b ; sqrt(g) block] has passages of one length, so cosine ranks as e_b(q).e_b(d) + g BM25(q, d).

    R holds right singular vectors of the corpus's weights and, so that words which they leave out survive, random signs
    applied to the residual: half and half, or all singular vectors there are where they fit. The idf stands wholly on the
    query's side, which projects better. Of what a query has outside the span of the corpus's weights, which passages of the
    corpus meet as noise, its signs keep one half (all of it where all singular vectors fit, and beyond 4,000 passages):
    products stay unbiased for the corpus, and later passages are still found by words in new company.

    Passages that come later are weighted with the statistics of the corpus; one with |l(d) R| > M is scaled down to M, with a
    `NoisewiseWarning` from 1.1 M on.

    `dim`: coordinates, the slack included, at least 2. `language`: of stop list and stemmer, see `words_of`. `seed`: of the
    random signs. Keeps 8 bytes for each term and coordinate, 160 MB for 20,000 terms at 1,024.
    Source: slack coordinate: Bachrach et al., RecSys 2014; signs: Achlioptas, JCSS 66(4), 2003; singular vectors: Deerwester
    et al., JASIS 41(6), 1990.
    """

    bm25_: BM25
    max_norm_: float
    _basis: np.ndarray
    _signs: np.ndarray
    _query_signs: np.ndarray | None
    _document_projection: np.ndarray
    _query_projection: np.ndarray

    def __init__(self, dim: int = 1024, language: str | None = "english", seed: int = 0) -> None:
        self.dim = dim
        self.language = language
        self.seed = seed

    def fit(self, documents: Sequence[str]) -> "LexicalBlock":
        """Statistics, projection and M of `documents`; deterministic.

        Raises `InvalidInput` for a `dim` below 2, a language without a stemmer, and passages without a single word.
        """
        check_count("dim", self.dim, minimum=2)
        check_count("seed", self.seed, minimum=0)
        self.bm25_ = BM25.of(documents, language=self.language)
        weights, room = self.bm25_.corpus, self.dim - 1
        if min(weights.shape) <= room:
            basis = _right_singular_vectors(weights, min(weights.shape), self.seed)
        else:
            basis = _right_singular_vectors(weights, max(1, room // 2), self.seed)
        self._assemble(basis.astype(np.float32), _sign_bits(len(self.bm25_.terms), room - basis.shape[1], self.seed))
        if min(weights.shape) > room and weights.shape[0] <= _EXACT_SVD:
            own = _towards_span(weights, self._document_projection[:, basis.shape[1] :])
            self._assemble(self._basis, self._signs, own)
        # float32 like all that is encoded later, so that no passage of the corpus exceeds M
        self.max_norm_ = float(np.linalg.norm(_projected(weights, self._document_projection), axis=1).max())
        return self

    def encode_document(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """Unit rows, float32: projected weights over M, then the slack. A text without a known word is all slack."""
        self._check_fitted()
        rows = _projected(self.bm25_.document_weights(texts), self._document_projection) / self.max_norm_
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        if heavy := int((norms > _HEAVY).sum()):
            warnings.warn(
                f"{heavy} of {len(texts)} passages weigh more than any that the block was fitted on (up to {norms.max():.2f} "
                "times) and are scaled down, so they score too low; fit it again with them",
                NoisewiseWarning,
                stacklevel=2,
            )
        rows /= np.maximum(norms, 1.0)
        slack = np.sqrt(np.maximum(1.0 - (rows**2).sum(1, keepdims=True), 0.0))
        return torch.from_numpy(np.hstack([rows, slack]).astype(np.float32))

    def encode_query(self, texts: Sequence[str]) -> Float[Tensor, "text dim"]:
        """Rows of their own lengths, float32: M times the projected weights, then 0. A query without a known word is 0."""
        self._check_fitted()
        rows = _projected(self.bm25_.query_weights(texts), self._query_projection) * self.max_norm_
        return torch.from_numpy(np.hstack([rows, np.zeros((len(texts), 1))]).astype(np.float32))

    def config(self) -> dict[str, Any]:
        """What it was made with and learnt, but for the numbers of `tensors()`; strict JSON."""
        self._check_fitted()
        own = {"dim": self.dim, "language": self.language, "seed": self.seed, "max_norm": self.max_norm_}
        return own | {"bm25": self.bm25_.config()}

    def tensors(self) -> dict[str, Tensor]:
        """Vocabulary, idf, singular vectors (float32, `[term, kept]`), random signs (one bit each), the queries' own signs."""
        self._check_fitted()
        own = {"basis": torch.from_numpy(self._basis), "signs": torch.from_numpy(self._signs)}
        if self._query_signs is not None:
            own["query_signs"] = torch.from_numpy(self._query_signs)
        return {f"bm25.{key}": value for key, value in self.bm25_.tensors().items()} | own

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> "LexicalBlock":
        """Inverse of `config()` and `tensors()`: the same vectors, bit for bit."""
        block = cls(config["dim"], config["language"], config["seed"])
        numbers = {key.removeprefix("bm25."): value for key, value in tensors.items() if key.startswith("bm25.")}
        block.bm25_ = BM25.from_saved(config["bm25"], numbers)
        block.max_norm_ = config["max_norm"]
        query_signs = tensors["query_signs"].numpy() if "query_signs" in tensors else None
        block._assemble(tensors["basis"].numpy(), tensors["signs"].numpy(), query_signs)
        return block

    def _assemble(self, basis: np.ndarray, signs: np.ndarray, query_signs: np.ndarray | None = None) -> None:
        self._basis, self._signs, self._query_signs = basis, signs, query_signs
        room = self.dim - 1 - basis.shape[1]
        self._document_projection = np.hstack([basis, _on_residual(basis, _unpacked(signs, room))])
        self._query_projection = self._document_projection
        if query_signs is not None:
            self._query_projection = np.hstack([basis, query_signs])

    def _check_fitted(self) -> None:
        if not hasattr(self, "max_norm_"):
            raise InvalidInput("this LexicalBlock has seen no passages; call fit(documents) first")


def _projected(weights: Any, projection: np.ndarray) -> np.ndarray:
    """Rows times R, in float64, touching only the rows of R that the texts need: a query needs a handful."""
    used, columns = np.unique(weights.indices, return_inverse=True)
    sparse = require("scipy.sparse", "retrieval")
    compact = sparse.csr_array((weights.data, columns, weights.indptr), shape=(weights.shape[0], len(used)))
    return compact @ projection[used].astype(np.float64)


def _right_singular_vectors(weights: Any, k: int, seed: int) -> np.ndarray:
    """At most `k` orthonormal columns [term, kept], those of the largest singular values first, in float64."""
    n, terms = weights.shape
    if min(n, terms) <= _EXACT_SVD:
        linalg = require("scipy.linalg", "retrieval")
        # eigenvectors of the Gram matrix on the smaller side: passages hold few words, so it is cheap to form
        gram = (weights @ weights.T if n <= terms else weights.T @ weights).toarray()
        side = len(gram)
        squares, vectors = linalg.eigh(gram, subset_by_index=(side - k, side - 1))
        squares, vectors = squares[::-1], vectors[:, ::-1]
        kept = squares > max(squares[0], 0.0) * _RANK**2
        vectors = vectors[:, kept]
        columns = (weights.T @ vectors) / np.sqrt(squares[kept]) if n <= terms else vectors
    else:
        extmath = require("sklearn.utils.extmath", "retrieval")
        _, values, rows = extmath.randomized_svd(weights, k, n_iter=5, random_state=seed)
        columns = rows[values > values[0] * _RANK].T
    # the smallest singular vectors come out of a Gram matrix less orthogonal than the residual needs
    columns = np.linalg.qr(columns)[0]
    # a singular vector is known up to its sign: fix it, so that two LAPACKs agree
    largest = np.abs(columns).argmax(0)
    return columns * np.where(columns[largest, np.arange(columns.shape[1])] < 0, -1.0, 1.0)


def _sign_bits(terms: int, columns: int, seed: int) -> np.ndarray:
    """Random bits, packed, `[term, ceil(columns / 8)]`."""
    width = -(-columns // 8)
    # raw bits: numpy keeps the stream of a bit generator for ever, that of `Generator` methods it may change
    raw = np.random.PCG64(seed).random_raw(-(-terms * width // 8))
    return np.asarray(raw, dtype="<u8").view(np.uint8)[: terms * width].reshape(terms, width).copy()


def _unpacked(bits: np.ndarray, columns: int) -> np.ndarray:
    """Signs over the square root of their number, `[term, columns]`, whose products are unbiased."""
    signs = np.unpackbits(bits, axis=1, count=columns).astype(np.float32)
    return (2 * signs - 1) / np.float32(max(1, columns) ** 0.5)


def _on_residual(basis: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """(I - V V^T) S: what the signs see of a text once its part within the singular vectors is taken out."""
    return signs - basis @ (basis.T @ signs)


def _towards_span(weights: Any, signs: np.ndarray) -> np.ndarray:
    """The columns `signs` with only the share `_OUTSIDE` of what is orthogonal to all rows of `weights`."""
    linalg = require("scipy.linalg", "retrieval")
    gram = (weights @ weights.T).toarray()
    # the ridge is for passages that come twice; far below what could be seen
    gram[np.diag_indices_from(gram)] += 1e-9 * np.trace(gram) / len(gram)
    inside = weights.T @ linalg.solve(gram, weights @ signs.astype(np.float64), assume_a="pos")
    return (_OUTSIDE * signs + (1 - _OUTSIDE) * inside).astype(np.float32)
