"""What an embedding is asked of and what it costs: the `BlackBox` protocol, unit rows, a text that has no vector, the bill."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from noisewise.errors import InvalidInput, NoisewiseError

__all__ = [
    "KINDS",
    "BlackBox",
    "CostEstimate",
    "FetchCost",
    "Kind",
    "RefusedText",
    "UnusableText",
    "check_kind",
    "check_not_empty",
    "count_tokens_roughly",
    "unit_rows",
]

Kind = Literal["query", "document"]
KINDS = ("query", "document")
_SHOWN = 40
# of English; other languages have fewer
_BYTES_PER_TOKEN = 4


@runtime_checkable
class BlackBox(Protocol):
    """Texts in, vectors out. `identity`: provider, model, dimensions: all that makes vectors differ, and never a key.

    Optional beside: `variant(text, kind) -> str`, what else the vector of this text depends on, "" where queries and documents
    are embedded alike (without it: `kind`); `estimate(texts, kind) -> CostEstimate`; `cost -> FetchCost`, what was used so far.
    """

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Provider, model, dimensions, and whatever else makes vectors differ."""
        ...

    def embed(self, texts: Sequence[str], kind: str) -> Iterator[tuple[list[int], np.ndarray]]:
        """Positions in `texts` and their vectors [n, dim], batch by batch, as they arrive, in any order."""
        ...


@dataclass(frozen=True)
class FetchCost:
    """What was used: calls (requests sent, retries too), texts that came back, tokens, money (None: no price), seconds."""

    calls: int = 0
    texts: int = 0
    tokens: int = 0
    money: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        money = "" if self.money is None else f", {self.money:.4f} in money"
        return f"{self.calls:,} calls, {self.tokens:,} tokens{money}"


@dataclass(frozen=True)
class CostEstimate:
    """What a job would cost, found without a call: `texts` asked for, `missing` of them to be paid, their `tokens`.

    `money`: in the unit of the price, None without a price. `minutes`: least time that the rate limits allow, None without any.
    """

    texts: int
    missing: int
    tokens: int
    money: float | None = None
    minutes: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.missing:,} of {self.texts:,} texts to fetch", f"about {self.tokens:,} tokens"]
        parts.append("no price given" if self.money is None else f"about {self.money:.4f} in money")
        if self.minutes is not None:
            parts.append(f"at least {self.minutes:.1f} minutes at the rate limits")
        return ", ".join(parts)


class UnusableText(NoisewiseError):
    """Text number `index` of those that were asked for has no usable vector; `reason` is said after its number and start."""

    def __init__(self, index: int, text: str, reason: str) -> None:
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
        super().__init__(f"text {index} ({shown!r}) {reason}")
        self.index, self.text, self.reason = index, text, reason

    def at(self, index: int) -> "UnusableText":
        """The same, for a caller whose list has this text elsewhere."""
        return type(self)(index, self.text, self.reason)


class RefusedText(UnusableText, InvalidInput):
    """A text that is not even asked for."""


def check_kind(kind: str) -> str:
    """Return `kind`; raise `InvalidInput` that quotes it where it is neither "query" nor "document"."""
    if kind not in KINDS:
        raise InvalidInput(f"kind must be 'query' or 'document', got {kind!r}")
    return kind


def check_not_empty(texts: Sequence[str]) -> None:
    """Raise `InvalidInput` that names the texts without any letter, by number."""
    if isinstance(texts, str):
        raise InvalidInput(f"texts must be a list of texts, got one text {texts[:_SHOWN]!r}: put it in a list")
    empty = [index for index, text in enumerate(texts) if not text.strip()]
    if empty:
        named = ", ".join(map(str, empty[:5])) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
        raise InvalidInput(f"texts must not be empty, but these are, by index: {named}; leave them out")


def count_tokens_roughly(text: str) -> int:
    """A quarter of the bytes of the UTF-8 text: near the truth for English, too low by a third or so for other languages."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)


def unit_rows(vectors: Any) -> tuple[Float[np.ndarray, "text dim"], list[int]]:
    """Rows in float32 scaled to length 1, and the numbers of the rows that cannot be: NaN, infinite or all zero."""
    rows = np.asarray(vectors, np.float32).astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        length = np.sqrt(np.square(rows).sum(1))
    good = np.isfinite(length) & (length > 0)
    rows /= np.where(good, length, 1.0)[:, None]
    return rows.astype(np.float32), np.flatnonzero(~good).tolist()
