"""`as_black_box`: functions, sentence-transformers models and vectors that exist already, seen as black boxes."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from noisewise.errors import InvalidInput
from noisewise.retrieval.vectors import BlackBox, RefusedText, UnusableText, check_kind, unit_rows

__all__ = ["as_black_box"]

# texts per call, so that what was computed is kept now and then
_BATCH = 256
# numbers of each weight that tell one fine-tuned model from another
_SAMPLED = 4096


def as_black_box(source: Any, name: str | None = None) -> BlackBox:
    """A black box out of `source`; `name` stands in the cache's keys as the model's, so it must change when the vectors do.

    A `BlackBox` is returned as it is. A sentence-transformers model is asked by `encode_query` and `encode_document`, so its
    prompts are honoured, and named by its own name and a hash of its weights. A function from a list of n texts to an array
    [n, dim] is named by its module and name. A pair (texts, array [text, dim]) of precomputed vectors is named by a hash of
    both, and refuses every other text. Raises `InvalidInput` for anything else, and for a pair that does not fit.
    """
    if callable(getattr(source, "encode_query", None)) and callable(getattr(source, "encode_document", None)):
        return _Encoder(source, name)
    if isinstance(source, tuple) and len(source) == 2:
        return _Precomputed(source[0], source[1], name)
    if isinstance(source, BlackBox):
        if name is not None:
            raise InvalidInput(
                f"{source!r} has an identity of its own, so name={name!r} would do nothing: leave it out"
            )
        return source
    if callable(source):
        return _Function(source, name)
    raise InvalidInput(
        f"a black box is an object with identity and embed (such as OpenAICompatible), a function from texts to an array, a "
        f"sentence-transformers model or a pair (texts, array), got {type(source).__name__}"
    )


class _Function:
    def __init__(self, function: Callable[[list[str]], Any], name: str | None) -> None:
        self._function = function
        named = function if hasattr(function, "__qualname__") else type(function)
        self._name = name or f"{named.__module__}.{named.__qualname__}"

    def __repr__(self) -> str:
        return f"as_black_box({self._name!r})"

    @property
    def identity(self) -> dict[str, str | int | None]:
        return {"provider": "function", "model": self._name, "dimensions": None}

    def variant(self, text: str, kind: str) -> str:
        return ""

    def embed(self, texts: Sequence[str], kind: str) -> Iterator[tuple[list[int], np.ndarray]]:
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            yield from _checked(self._function(part), part, start, self._name)


class _Encoder:
    def __init__(self, model: Any, name: str | None) -> None:
        self._model = model
        card = getattr(model, "model_card_data", None)
        own = getattr(card, "model_id", None) or getattr(card, "base_model", None) or type(model).__name__
        self._name = name or f"{own}#{_hash_of_weights(model)}"

    def __repr__(self) -> str:
        return f"as_black_box({self._name!r})"

    @property
    def identity(self) -> dict[str, str | int | None]:
        # an encoder that reads more of a text gives other vectors
        return {
            "provider": "sentence-transformers",
            "model": self._name,
            "dimensions": getattr(self._model, "truncate_dim", None),
            "max_seq_length": getattr(self._model, "max_seq_length", None),
        }

    def variant(self, text: str, kind: str) -> str:
        prompts = {key: prompt for key, prompt in (getattr(self._model, "prompts", None) or {}).items() if prompt}
        routed = any(type(part).__name__ == "Router" for part in getattr(self._model, "children", tuple)())
        return f"{kind} {sorted(prompts.items())}" if prompts or routed else ""

    def embed(self, texts: Sequence[str], kind: str) -> Iterator[tuple[list[int], np.ndarray]]:
        check_kind(kind)
        encode = self._model.encode_query if kind == "query" else self._model.encode_document
        for start in range(0, len(texts), _BATCH):
            part = list(texts[start : start + _BATCH])
            yield from _checked(encode(part, show_progress_bar=False, convert_to_numpy=True), part, start, self._name)


class _Precomputed:
    def __init__(self, texts: Sequence[str], vectors: Any, name: str | None) -> None:
        array = _as_array(vectors)
        if array.ndim != 2 or len(array) != len(texts):
            raise InvalidInput(
                f"precomputed vectors must be one row per text: {len(texts)} texts, but shape {tuple(array.shape)}"
            )
        self._vectors, wrong = unit_rows(array)
        if wrong:
            raise UnusableText(
                wrong[0], texts[wrong[0]], "has a vector of zeros, NaN or infinite numbers; leave it out"
            )
        self._rows: dict[str, int] = {}
        digest = hashlib.sha256()
        for row, text in enumerate(texts):
            first = self._rows.setdefault(text, row)
            if not np.array_equal(self._vectors[first], self._vectors[row]):
                raise InvalidInput(f"texts {first} and {row} are the same, but their vectors differ: leave one out")
            digest.update(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() + self._vectors[row].tobytes())
        self._name = name or digest.hexdigest()[:16]
        self.fixed_dim = self._vectors.shape[1]

    def __repr__(self) -> str:
        return f"as_black_box(({len(self._rows)} texts, vectors))"

    @property
    def identity(self) -> dict[str, str | int | None]:
        return {"provider": "precomputed", "model": self._name, "dimensions": self._vectors.shape[1]}

    def variant(self, text: str, kind: str) -> str:
        return ""

    def embed(self, texts: Sequence[str], kind: str) -> Iterator[tuple[list[int], np.ndarray]]:
        for index, text in enumerate(texts):
            if text not in self._rows:
                raise RefusedText(
                    index, text, "has no precomputed vector: add it, or use a black box that can embed it"
                )
        for start in range(0, len(texts), _BATCH):
            positions = list(range(start, min(start + _BATCH, len(texts))))
            yield positions, self._vectors[[self._rows[texts[position]] for position in positions]]


def _checked(vectors: Any, texts: list[str], start: int, name: str) -> Iterator[tuple[list[int], np.ndarray]]:
    """Vectors of `texts`, the first of which is number `start`; usable ones come out before an error names one that is not."""
    array = _as_array(vectors)
    if array.ndim != 2 or len(array) != len(texts):
        raise InvalidInput(f"{name} must give an array ({len(texts)}, dim) for {len(texts)} texts, got {array.shape}")
    _, wrong = unit_rows(array)
    good = [row for row in range(len(texts)) if row not in set(wrong)]
    if good:
        yield [start + row for row in good], array[good]
    if wrong:
        raise UnusableText(
            start + wrong[0],
            texts[wrong[0]],
            f"got a vector of zeros, NaN or infinite numbers from {name}; leave it out",
        )


def _as_array(vectors: Any) -> np.ndarray:
    """A float32 array from an array, a tensor on any device or lists."""
    if hasattr(vectors, "detach"):
        vectors = vectors.detach().float().cpu().numpy()
    try:
        with np.errstate(over="ignore"):
            return np.asarray(vectors, np.float32)
    except (ValueError, TypeError) as error:
        raise InvalidInput(
            f"vectors must be an array of numbers [text, dim], got {type(vectors).__name__}: {error}"
        ) from error


def _hash_of_weights(model: Any) -> str:
    digest = hashlib.sha256()
    for key, value in getattr(model, "state_dict", dict)().items():
        digest.update(key.encode() + value.detach().flatten()[:_SAMPLED].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
