"""BM25 as a product of two sparse vectors, so that it can be projected, frozen and joined to an embedding."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.typing import check_positive

__all__ = ["BM25", "words_of"]

# written without spaces between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters
_UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# vowel signs that \w leaves out although words are spelt with them: Hebrew, Arabic, the scripts of India
_SIGNS = r"\u0300-\u036f\u0591-\u05bd\u064b-\u065f\u0900-\u0963\u0966-\u0dff"
_WORD = re.compile(rf"[\w{_SIGNS}]+")
_SPLIT = re.compile(rf"([{_UNSPACED}]+)")


def words_of(texts: Sequence[str], language: str | None = "english") -> list[list[str]]:
    """The terms of each text, in order and with repetitions.

    Lower case after Unicode NFKC; words of two or more letters or digits, without those of the English stop list where
    `language` is "english", stemmed by the Snowball stemmer of `language` (None: not stemmed). Runs of scripts that put
    no spaces between words (Chinese, Japanese, Thai, ...) become overlapping pairs of characters in every language.
    Raises `InvalidInput` for a language without a stemmer.
    """
    stop = _stop_words(language)
    stemmer = _stemmer(language)
    terms = []
    for text in texts:
        words: list[str] = []
        text = unicodedata.normalize("NFKC", text).lower()
        # every second part is a run of an unspaced script
        for place, part in enumerate(_SPLIT.split(text)):
            if place % 2:
                words.extend(part[i : i + 2] for i in range(max(1, len(part) - 1)))
            else:
                words.extend(word for word in _WORD.findall(part) if len(word) > 1 and word not in stop)
        terms.append(words if stemmer is None else stemmer.stemWords(words))
    return terms


def _stop_words(language: str | None) -> frozenset[str]:
    if language != "english":
        return frozenset()  # idf takes most of the weight of a language's frequent words anyway
    return require("sklearn.feature_extraction.text", "retrieval").ENGLISH_STOP_WORDS


def _stemmer(language: str | None) -> Any:
    if language is None:
        return None
    snowball = require("Stemmer", "retrieval")
    if language not in snowball.algorithms():
        known = ", ".join(snowball.algorithms())
        raise InvalidInput(f"there is no stemmer for the language {language!r}; give None, or one of {known}")
    # one for each call: a stemmer must not be shared by threads
    return snowball.Stemmer(language)


@dataclass(frozen=True, eq=False)
class BM25:
    """Okapi BM25 with the statistics of one corpus: `score(q, d) = query_weights(q) . document_weights(d)`.

    With f(t, x) the count of term t in x, n the number of passages and n_t the number of those that hold t,
    `document_weights` has f(t, d) / (f(t, d) + k1 (1 - b + b |d| / mean length)) and `query_weights` has
    f(t, q) idf(t) / sum_u f(u, q) idf(u), with idf(t) = log(1 + (n - n_t + 1/2) / (n_t + 1/2)). A score is thus the
    usual one (without its constant factor k1 + 1) divided by the query's sum of idf, and lies in [0, 1): 1 is the limit
    of a passage that repeats every word of the query. Statistics are frozen: passages that come later are weighted with
    them, their new words count for their length only.

    `terms`: the vocabulary, sorted, of V terms. `idf`: at least 0. `corpus`: the weights of the passages it was made
    from, None in one that was read back. Make one with `BM25.of`.
    Source: Robertson & Zaragoza, The Probabilistic Relevance Framework, 2009; the idf is Lucene's.
    """

    terms: tuple[str, ...]
    idf: Float[np.ndarray, " term"]
    mean_length: float
    k1: float | int = 1.2
    b: float | int = 0.75
    language: str | None = "english"
    corpus: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_positive("k1", self.k1)
        if not 0 <= self.b <= 1:
            raise InvalidInput(f"b must lie in [0, 1], got {self.b!r}")
        object.__setattr__(self, "_column", {term: column for column, term in enumerate(self.terms)})

    @classmethod
    def of(
        cls,
        documents: Sequence[str],
        k1: float | int = 1.2,
        b: float | int = 0.75,
        language: str | None = "english",
    ) -> "BM25":
        """The statistics and weights of `documents`. Raises `InvalidInput` where they hold no words at all."""
        words = words_of(documents, language)
        terms = tuple(sorted({word for document in words for word in document}))
        if not terms:
            raise InvalidInput(f"{len(documents)} passages without a single word cannot be searched by words")
        mean_length = sum(map(len, words)) / len(words)
        bare = cls(terms, np.zeros(len(terms)), mean_length, k1, b, language)
        weights = bare._saturations(words)
        holding = np.bincount(weights.indices, minlength=len(terms))
        idf = np.log1p((len(words) - holding + 0.5) / (holding + 0.5))
        return cls(terms, idf, mean_length, k1, b, language, weights)

    def document_weights(self, texts: Sequence[str]) -> Any:
        """Sparse rows (scipy csr, float64, `[text, term]`) of passages, known or new, each entry in (0, 1)."""
        return self._saturations(words_of(texts, self.language))

    def query_weights(self, texts: Sequence[str]) -> Any:
        """Sparse rows (scipy csr, float64, `[text, term]`) that sum to 1, or to 0 for a query without a known word."""
        counts = self._counts(words_of(texts, self.language))
        weights = counts.multiply(self.idf[None]).tocsr()
        total = np.asarray(weights.sum(1)).ravel()
        weights.data /= np.repeat(np.where(total > 0, total, 1.0), np.diff(weights.indptr))
        return weights

    def scores(
        self, queries: Sequence[str], documents: Sequence[str] | None = None
    ) -> Float[np.ndarray, "query document"]:
        """Scores in [0, 1), float64, of `documents` (texts), or of the corpus that it was made from.

        Raises `InvalidInput` where it was read back and `documents` is not given.
        """
        if documents is None and self.corpus is None:
            raise InvalidInput("a BM25 that was read back holds no passages; give scores(queries, documents)")
        weights = self.corpus if documents is None else self.document_weights(documents)
        return (self.query_weights(queries) @ weights.T).toarray()

    def config(self) -> dict[str, Any]:
        """What makes it, but for the numbers of `tensors()`; strict JSON."""
        return {"k1": self.k1, "b": self.b, "language": self.language, "mean_length": self.mean_length}

    def tensors(self) -> dict[str, Tensor]:
        """Vocabulary (UTF-8, one term a line) and idf; the passages' own weights are not kept."""
        vocabulary = np.frombuffer("\n".join(self.terms).encode(), dtype=np.uint8)
        return {"vocabulary": torch.tensor(vocabulary), "idf": torch.tensor(self.idf)}

    @classmethod
    def from_saved(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> "BM25":
        """Inverse of `config()` and `tensors()`."""
        terms = tuple(bytes(tensors["vocabulary"].numpy()).decode().split("\n"))
        return cls(terms, tensors["idf"].numpy(), **config)

    def _counts(self, words: Sequence[Sequence[str]]) -> Any:
        columns = [[self._column[word] for word in row if word in self._column] for row in words]  # type: ignore[attr-defined]
        rows = np.repeat(np.arange(len(columns)), [len(row) for row in columns])
        flat = np.fromiter((column for row in columns for column in row), dtype=np.int64, count=len(rows))
        sparse = require("scipy.sparse", "retrieval")
        # repeated entries are summed, columns come sorted
        return sparse.coo_array((np.ones(len(flat)), (rows, flat)), shape=(len(columns), len(self.terms))).tocsr()

    def _saturations(self, words: Sequence[Sequence[str]]) -> Any:
        counts = self._counts(words)
        length = np.fromiter(map(len, words), dtype=np.float64, count=len(words))
        damping = self.k1 * (1 - self.b + self.b * length / self.mean_length)
        counts.data /= counts.data + np.repeat(damping, np.diff(counts.indptr))
        return counts
