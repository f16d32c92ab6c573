"""`OpenAICompatible`: an embedding model behind `POST /embeddings`, asked in batches by several threads, faults and all."""

import base64
import binascii
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Any

import numpy as np

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.retrieval.transport import RateLimits, Stream, Transport, TryAgain
from noisewise.retrieval.vectors import (
    CostEstimate,
    FetchCost,
    RefusedText,
    UnusableText,
    check_kind,
    check_not_empty,
    count_tokens_roughly,
)
from noisewise.typing import check_count

__all__ = ["OpenAICompatible"]

# how often one text is asked for again when its vector is unusable; of many batches some meet bad luck thrice
_SECOND_CHANCES = 4
# no vocabulary has longer ones on average
_CHARACTERS_PER_TOKEN = 16
# where tokens are guessed as bytes / 4, a text is cut at bytes / 3: a cut too early costs words, one too late the call
_MARGIN = 4 / 3
# answers that must agree before a dimension that nobody gave is believed
_AGREEING = 2


@dataclass(eq=False)
class _Piece:
    """What is sent of one text: all of it, or one chunk of `of`."""

    position: int
    text: str
    tokens: int
    of: int = 1
    missed: int = 0
    spoilt: int = 0


@dataclass(eq=False)
class _Sorted:
    """Vectors that are ready, by the positions of their texts, pieces to ask for again, and the error that ends it."""

    positions: list[int] = field(default_factory=list)
    vectors: list[np.ndarray] = field(default_factory=list)
    again: list[_Piece] = field(default_factory=list)
    error: NoisewiseError | None = None


class OpenAICompatible:
    """The embedding model `model` of an OpenAI-compatible server at `base_url` (ending in /v1, mostly); a `BlackBox`.

    `dimensions`: asked of the server, None for the model's own. `key`: NAME of the environment variable with the key, None for
    no key; the key is read at each request, never kept, shown or written. `input_types`, `prefixes`: what queries and documents
    are told apart by, {"query": ..., "document": ...}, as the field `input_type` or in front of the text. `encoding`: "base64"
    (a quarter of the bytes) or "float"; either is understood. A request holds up to `batch_size` texts and `batch_tokens` tokens;
    `workers` requests are under way at once, within `rpm` requests and `tpm` tokens a minute.
    Texts over `max_tokens`: "raise", "truncate" (at a space where one is near) or "chunk": the mean of the vectors of its parts,
    weighted by their tokens. Tokens are `count_tokens(text)`, or guessed as a quarter of the bytes, and then cuts keep a margin.
    `price`: money per million tokens. `provider`: the name in cache keys, host and path by default.
    `timeout`, `retries`, `backoff`: seconds, tries after the first, seconds before the second, see `Transport`. A text that the
    server leaves out is asked for again, one with NaN, infinities, zeros only or a wrong dimension up to four times more.
    Raises `InvalidInput` for options that cannot work. Source: OpenAI API reference, "Create embeddings".
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        dimensions: int | None = None,
        key: str | None = "OPENAI_API_KEY",
        input_types: Mapping[str, str] | None = None,
        prefixes: Mapping[str, str] | None = None,
        encoding: str = "base64",
        batch_size: int = 128,
        batch_tokens: int = 100_000,
        max_tokens: int = 8191,
        too_long: str = "raise",
        rpm: float | int | None = None,
        tpm: float | int | None = None,
        timeout: float | int = 60.0,
        retries: int = 8,
        backoff: float | int = 0.5,
        workers: int = 4,
        price: float | int | None = None,
        count_tokens: Callable[[str], int] | None = None,
        provider: str | None = None,
    ) -> None:
        if not model.strip():
            raise InvalidInput(f"model must name a model of the server, got {model!r}")
        if encoding not in ("base64", "float"):
            raise InvalidInput(f"encoding must be 'base64' or 'float', got {encoding!r}")
        if too_long not in ("raise", "truncate", "chunk"):
            raise InvalidInput(f"too_long must be 'raise', 'truncate' or 'chunk', got {too_long!r}")
        if price is not None and not price >= 0:
            raise InvalidInput(f"price must be money per million tokens, at least 0, got {price!r}")
        self.transport = Transport(base_url, key, RateLimits(rpm, tpm), timeout, retries, backoff)
        self.provider = provider or self.transport.provider
        self.model, self.encoding, self.too_long, self.price = model, encoding, too_long, price
        self.dimensions = None if dimensions is None else check_count("dimensions", dimensions)
        self.input_types = _by_kind("input_types", input_types)
        self.prefixes = _by_kind("prefixes", prefixes)
        self.batch_size = check_count("batch_size", batch_size)
        self.max_tokens = check_count("max_tokens", max_tokens)
        # one request must fit into a minute's tokens, or the limit could not be kept
        self.batch_tokens = min(check_count("batch_tokens", batch_tokens), *([] if tpm is None else [int(tpm)]), 2**62)
        self.workers = check_count("workers", workers)
        self._count = count_tokens or count_tokens_roughly
        exact = count_tokens is not None or too_long == "raise"
        self._limit = self.max_tokens if exact else max(1, int(self.max_tokens / _MARGIN))
        self._dim = self.dimensions
        self._texts = 0

    def __repr__(self) -> str:
        return f"OpenAICompatible({self.transport.base_url!r}, {self.model!r}, dimensions={self.dimensions})"

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Provider, model, dimensions."""
        return {"provider": self.provider, "model": self.model, "dimensions": self.dimensions}

    @property
    def cost(self) -> FetchCost:
        """What was used since this object was made."""
        tokens = self.transport.tokens
        money = None if self.price is None else tokens * self.price / 1e6
        return FetchCost(self.transport.calls, self._texts, tokens, money)

    def variant(self, text: str, kind: str) -> str:
        """What the vector of `text` depends on beside it: input type and prefix, and how it is cut where it is too long."""
        parts = [self.input_types.get(kind, ""), self.prefixes.get(kind, "")]
        if self.too_long != "raise" and self._too_long(self.prefixes.get(kind, "") + text):
            parts.append(f"{self.too_long} {self._limit}")
        return "\0".join(parts).rstrip("\0")

    def estimate(self, texts: Sequence[str], kind: str) -> CostEstimate:
        """Tokens, money and minutes for `texts`, without a call. Raises as `embed` does for empty and over-long texts."""
        pieces = self._pieces(texts, kind)
        tokens = sum(piece.tokens for piece in pieces)
        waiting, requests = deque(pieces), 0
        while waiting:
            self._next_batch(waiting)
            requests += 1
        money = None if self.price is None else tokens * self.price / 1e6
        return CostEstimate(len(texts), len(texts), tokens, money, self.transport.limits.minutes(requests, tokens))

    def embed(self, texts: Sequence[str], kind: str) -> Iterator[tuple[list[int], np.ndarray]]:
        """Positions in `texts` and their vectors float32 [n, dim], as the server gave them, batch by batch, in any order.

        Ctrl-C: nothing more is sent, what is under way still comes out, then KeyboardInterrupt. So it is with errors:
        `InvalidInput` before any call for empty, over-long texts and a missing key, `UnusableText` that names the index of a
        text without a usable vector, `NoisewiseError` for a server that does not answer or refuses.
        """
        pieces = self._pieces(texts, kind)
        if not pieces:
            return
        self.transport.secret()
        waiting, running = deque(pieces), 0

        def take() -> list[_Piece] | None:
            nonlocal running
            batch = self._next_batch(waiting)
            running += batch is not None
            return batch

        stream = Stream(take, lambda batch, stop: self._ask(batch, kind, stop), self.workers)
        settling = _Settling(texts, self._dim, self.transport.retries)
        try:
            for batch, rows in stream:
                running -= 1
                found = settling.sort(batch, rows, last=not waiting and not running)
                self._dim = settling.dim
                waiting.extendleft(reversed(found.again))
                if found.error is not None:
                    stream.halt(found.error)
                if found.positions:
                    self._texts += len(found.positions)
                    yield found.positions, np.stack(found.vectors)
        except (KeyboardInterrupt, Exception):
            found = settling.rest()
            if found.positions:
                self._texts += len(found.positions)
                yield found.positions, np.stack(found.vectors)
            raise

    def close(self) -> None:
        """Close the connections; the next call opens new ones."""
        self.transport.close()

    # ---- what is sent

    def _pieces(self, texts: Sequence[str], kind: str) -> list[_Piece]:
        check_kind(kind)
        check_not_empty(texts)
        pieces = []
        for position, text in enumerate(texts):
            sent = self.prefixes.get(kind, "") + text
            if not self._too_long(sent):
                pieces.append(_Piece(position, sent, self._count(sent)))
                continue
            if self.too_long == "raise":
                raise RefusedText(
                    position, text, f"has about {self._count(sent)} tokens, but {self.model} takes {self.max_tokens}: give "
                    "too_long='truncate' or 'chunk', or max_tokens= of the model, or count_tokens= where the guess is wrong",
                )  # fmt: skip
            parts = _cut(text, self.prefixes.get(kind, ""), self._count, self._limit, self.too_long == "truncate")
            pieces += [_Piece(position, part, self._count(part), len(parts)) for part in parts]
        return pieces

    def _too_long(self, sent: str) -> bool:
        # no token is less than a byte, so most texts need no count
        return 4 * len(sent) > self._limit and self._count(sent) > self._limit

    def _next_batch(self, waiting: deque[_Piece]) -> list[_Piece] | None:
        batch: list[_Piece] = []
        tokens = 0
        while waiting and len(batch) < self.batch_size:
            if batch and tokens + waiting[0].tokens > self.batch_tokens:
                break
            batch.append(waiting.popleft())
            tokens += batch[-1].tokens
        return batch or None

    def _ask(self, batch: list[_Piece], kind: str, stop: Event) -> list[np.ndarray | None]:
        body: dict[str, Any] = {"model": self.model, "input": [piece.text for piece in batch]}
        body["encoding_format"] = self.encoding
        if self.dimensions is not None:
            body["dimensions"] = self.dimensions
        if kind in self.input_types:
            body["input_type"] = self.input_types[kind]
        tokens = sum(piece.tokens for piece in batch)
        return self.transport.post("/embeddings", body, tokens, lambda answer: _read(answer, len(batch)), stop)


# ---- what comes back


class _Settling:
    """Sorts answers into vectors that are ready and pieces to ask for again, and joins the chunks of a text.

    A dimension that nobody gave is believed when two answers agree on it, or nothing else will come; until then answers wait.
    """

    def __init__(self, texts: Sequence[str], dim: int | None, chances: int) -> None:
        self.dim = dim
        self._texts, self._chances = texts, chances
        self._held: list[tuple[list[_Piece], list[np.ndarray | None]]] = []
        self._votes: Counter[int] = Counter()
        self._chunks: dict[int, list[tuple[int, np.ndarray]]] = {}

    def sort(self, batch: list[_Piece], rows: list[np.ndarray | None], last: bool) -> _Sorted:
        """Vectors that are ready, pieces to ask for again, and the error of a piece that had its chances."""
        self._held.append((batch, rows))
        found = _Sorted()
        if self.dim is None and not self._agree(rows, last):
            if last:
                # as many answers for one dimension as for another: one more decides
                first, _ = self._held.pop(0)
                self._again(found, first, "came back in different dimensions")
            return found
        self._sort_held(found)
        return found

    def rest(self) -> _Sorted:
        """Vectors that still waited for a second answer, when none will come."""
        found = _Sorted()
        if self._held and self._agree([], last=True):
            self._sort_held(found)
        return found

    def _sort_held(self, found: _Sorted) -> None:
        for pieces, vectors in self._held:
            for piece, vector in zip(pieces, vectors, strict=True):
                fault = self._fault(vector)
                if vector is None or fault is not None:
                    self._again(found, [piece], fault or "was left out", missed=vector is None)
                else:
                    self._settle(found, piece, vector)
        self._held = []

    def _agree(self, rows: list[np.ndarray | None], last: bool) -> bool:
        """Take a vote of this answer; True once the dimension is known, or there is nothing to vote on."""
        sizes = Counter(len(row) for row in rows if row is not None and len(row))
        if sizes:
            self._votes[sizes.most_common(1)[0][0]] += 1
        leaders = self._votes.most_common(2)
        if not leaders:
            return last
        clear = len(leaders) == 1 or leaders[0][1] > leaders[1][1]
        if clear and (last or leaders[0][1] >= _AGREEING):
            self.dim = leaders[0][0]
        return self.dim is not None

    def _fault(self, vector: np.ndarray | None) -> str | None:
        if vector is None:
            return None
        if len(vector) != self.dim:
            return f"came back with {len(vector)} numbers where {self.dim} were expected"
        if not np.isfinite(vector).all():
            return "came back with NaN or infinite numbers"
        return None if vector.any() else "came back with zeros only"

    def _again(self, found: _Sorted, pieces: list[_Piece], fault: str, missed: bool = False) -> None:
        for piece in pieces:
            piece.missed += missed
            piece.spoilt += not missed
            if piece.missed > self._chances or piece.spoilt > _SECOND_CHANCES:
                times = piece.missed if missed else piece.spoilt
                advice = "check model and dimensions=, or leave this text out; what came before is kept"
                found.error = UnusableText(
                    piece.position, self._texts[piece.position], f"{fault}, {times} times: {advice}"
                )
            else:
                found.again.append(piece)

    def _settle(self, found: _Sorted, piece: _Piece, vector: np.ndarray) -> None:
        if piece.of > 1:
            chunks = self._chunks.setdefault(piece.position, [])
            chunks.append((piece.tokens, vector))
            if len(chunks) < piece.of:
                return
            weights = np.array([tokens for tokens, _ in chunks], np.float32)
            vector = weights @ np.stack([part for _, part in self._chunks.pop(piece.position)]) / weights.sum()
        found.positions.append(piece.position)
        found.vectors.append(vector)


def _read(answer: Any, n: int) -> list[np.ndarray | None]:
    """Vectors in the order of the `n` texts of the request, None for those that are not there."""
    data = answer.get("data") if isinstance(answer, dict) else None
    items = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    if not items:
        raise TryAgain("answered without vectors")
    places = [item.get("index") for item in items]
    if all(place is None for place in places) and len(items) == n:
        places = list(range(n))
    rows: list[np.ndarray | None] = [None] * n
    for place, count in Counter(place for place in places if isinstance(place, int)).items():
        # two vectors for one text: either may be another's
        if 0 <= place < n and count == 1:
            rows[place] = _vector(items[places.index(place)].get("embedding"))
    return rows


def _vector(value: Any) -> np.ndarray:
    """Numbers from a list or from base64 of little-endian float32, none where it is neither."""
    try:
        if isinstance(value, str):
            return np.frombuffer(base64.b64decode(value, validate=True), "<f4")
        with np.errstate(over="ignore"):
            vector = np.asarray(value, np.float32)
    except (binascii.Error, ValueError, TypeError, OverflowError):
        return np.empty(0, np.float32)
    return vector if vector.ndim == 1 else np.empty(0, np.float32)


# ---- texts that are too long


def _cut(text: str, prefix: str, count: Callable[[str], int], limit: int, only_first: bool) -> list[str]:
    """The text in parts of at most `limit` tokens with `prefix` before each, cut at spaces where they are near."""
    parts: list[str] = []
    rest = text.strip()
    while rest and not (only_first and parts):
        end = _fitting(rest, prefix, count, limit)
        space = rest.rfind(" ", end * 4 // 5, end)
        if end < len(rest) and space > 0:
            end = space
        parts.append(prefix + rest[:end])
        rest = rest[end:].lstrip()
    return parts


def _fitting(text: str, prefix: str, count: Callable[[str], int], limit: int) -> int:
    """The most characters from the start of `text` that fit, by bisection."""
    low, high = 1, min(len(text), _CHARACTERS_PER_TOKEN * limit)
    if count(prefix + text[:low]) > limit:
        raise InvalidInput(
            f"max_tokens leaves {limit} tokens, too few for the prefix {prefix!r} and a letter: give more"
        )
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(prefix + text[:middle]) <= limit else (low, middle - 1)
    return low


def _by_kind(name: str, given: Mapping[str, str] | None) -> dict[str, str]:
    if given is not None and not set(given) <= {"query", "document"}:
        raise InvalidInput(f"{name} must have the keys 'query' and 'document' only, got {dict(given)!r}")
    return dict(given or {})
