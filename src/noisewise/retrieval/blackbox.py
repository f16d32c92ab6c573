"""`CachedBlackBox`: any black box behind one cache; each text is paid for once, whatever happens in between."""

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.progress import Reporter
from noisewise.retrieval.adapters import as_black_box
from noisewise.retrieval.cache import EmbeddingCache, content_keys
from noisewise.retrieval.vectors import (
    BlackBox,
    CostEstimate,
    FetchCost,
    Kind,
    RefusedText,
    UnusableText,
    check_kind,
    check_not_empty,
    count_tokens_roughly,
    unit_rows,
)

__all__ = [
    "PROBES",
    "BlackBox",
    "CachedBlackBox",
    "CostEstimate",
    "FetchCost",
    "Kind",
    "RefusedText",
    "UnusableText",
    "as_black_box",
]

# changing one letter makes every kept fingerprint look like a changed model
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "Revenue grew by 12 % in the third quarter of the fiscal year.",
    "Wie hoch ist die Miete einer Wohnung in Berlin?",
    "def add(a, b): return a + b",
    "A randomised trial of vitamin D in patients with asthma",
    "how to cancel a subscription",
    "今日の天気は晴れです。",
    "1234567890 !@#$%^&*()",
)
# rows of one look-up, so that a corpus is not in memory twice
_BLOCK = 8192
# so few texts are not worth waiting for another process that fills the cache
_FEW = 64
_ANONYMOUS = "<lambda>"


class CachedBlackBox:
    """Unit vectors of `black_box` (what `as_black_box` takes) through `cache`: a file, an `EmbeddingCache`, None for memory.

    `dim`: numbers of a vector, None before the first. `cost`: what was used since this object was made. Raises `InvalidInput`
    for what is no black box, and for an anonymous function with a file, where another one would find its vectors.
    """

    def __init__(self, black_box: Any, cache: EmbeddingCache | str | Path | None = None) -> None:
        self.black_box = as_black_box(black_box)
        self.cache = cache if isinstance(cache, EmbeddingCache) else EmbeddingCache(cache)
        if self.cache.path is not None and _ANONYMOUS in str(self.black_box.identity.get("model")):
            raise InvalidInput(
                f"a lambda has no name that could keep its vectors apart in {self.cache.path}: wrap it as "
                "as_black_box(function, name='...') with a name that changes when the function does"
            )
        self.dim: int | None = None
        self._cost = FetchCost()

    @property
    def identity(self) -> dict[str, str | int | None]:
        """Of the black box: provider, model, dimensions."""
        return self.black_box.identity

    @property
    def cost(self) -> FetchCost:
        """Calls, texts, tokens, money and seconds of fetching, so far."""
        return self._cost

    @property
    def calls(self) -> int:
        """Requests sent so far, retries too."""
        return self._cost.calls

    @property
    def texts_fetched(self) -> int:
        """Texts that came back so far; those found in the cache are not among them."""
        return self._cost.texts

    def vectors(self, texts: Sequence[str], kind: str, progress: bool = False) -> Float[np.ndarray, "text dim"]:
        """Vectors of `texts` as `kind` "query" or "document", float32 rows of length 1, in order.

        Each distinct text that is not in the cache is fetched once and stored as soon as its batch arrives, so that Ctrl-C, an
        error or a crash loses nothing that came. Raises `InvalidInput` that names empty texts by index, `UnusableText` that
        names a text without a usable vector, and what the black box raises.
        """
        keys = self._keys(texts, kind)
        rows = _Rows(len(texts))
        places: dict[bytes, list[int]] = {}
        for index, key in enumerate(keys):
            places.setdefault(key, []).append(index)
        missing = self._look_up(list(places), places, rows)
        if missing:
            with Reporter(progress) as report:
                waiting = lambda: report.show("texts embedded", 0, len(missing), "another process fills the cache")  # noqa: E731
                with self.cache.fetching(waiting) if len(missing) > _FEW else nullcontext():
                    missing = self._look_up(missing, places, rows)
                    self._fetch([texts[places[key][0]] for key in missing], missing, kind, places, rows, report)
        self.dim = rows.dim or self.dim
        return rows.taken(self.dim)

    def missing(self, texts: Sequence[str], kind: str) -> list[str]:
        """The distinct texts that are not in the cache, in order."""
        by_key = dict(zip(reversed(keys := self._keys(texts, kind)), reversed(texts), strict=True))
        absent = []
        for block in _blocks(list(dict.fromkeys(keys))):
            found = self.cache.get(block)
            absent += [by_key[key] for key in block if key not in found]
        return absent

    def estimate(self, texts: Sequence[str], kind: str) -> CostEstimate:
        """What `vectors` would cost now, without a call; money and minutes only where the black box knows a price and limits."""
        missing = self.missing(texts, kind)
        asked: Any = getattr(self.black_box, "estimate", None)
        if asked is None:
            return CostEstimate(len(texts), len(missing), sum(map(count_tokens_roughly, missing)))
        try:
            return replace(asked(missing, kind), texts=len(texts), missing=len(missing))
        except UnusableText as error:
            raise error.at(list(texts).index(error.text)) from None

    def fingerprint(self) -> Float[np.ndarray, "probe dim"]:
        """Unit vectors of the eight `PROBES`, asked for now and not looked up: what a later model can be told apart by.

        Precomputed vectors cannot change and know no other texts: they have a fingerprint without rows.
        """
        fixed: int | None = getattr(self.black_box, "fixed_dim", None)
        if fixed is not None:
            return np.empty((0, fixed), np.float32)
        rows = _Rows(len(PROBES))
        places = {str(index).encode(): [index] for index in range(len(PROBES))}
        self._fetch(list(PROBES), list(places), "document", places, rows, Reporter(False), keep=False)
        return rows.taken(None)

    def check_fingerprint(self, kept: Float[np.ndarray, "probe dim"], tolerance: float | int = 1e-3) -> None:
        """Raise `NoisewiseError` where a probe is now further than `tolerance` (cosine distance) from the `kept` fingerprint.

        Where either has no rows, dimensions are all that is compared.
        """
        now = self.fingerprint()
        name = f"{self.identity.get('provider')}/{self.identity.get('model')}"
        if now.shape[1] != kept.shape[1] or 0 < len(now) != len(kept) > 0:
            raise NoisewiseError(
                f"{name} now gives {now.shape[1]} numbers, the kept fingerprint has shape {tuple(kept.shape)}: the model is "
                "another one; fit again, with another cache"
            )
        if not len(now) or not len(kept):
            return
        distance = 1.0 - (now.astype(np.float64) * kept).sum(1)
        worst = int(distance.argmax())
        if not distance[worst] <= tolerance:
            raise NoisewiseError(
                f"{name} has changed: probe {worst} ({PROBES[worst]!r}) is at cosine distance {distance[worst]:.2g} from the "
                f"kept fingerprint, more than {tolerance:g}; fit again, with another cache, or ask the provider for the old model"
            )

    def _keys(self, texts: Sequence[str], kind: str) -> list[bytes]:
        check_kind(kind)
        check_not_empty(texts)
        variant: Any = getattr(self.black_box, "variant", None)
        variants = [kind if variant is None else variant(text, kind) for text in texts]
        return content_keys(self.identity, texts, variants)

    def _look_up(self, keys: list[bytes], places: dict[bytes, list[int]], rows: "_Rows") -> list[bytes]:
        """Fill in what the cache has, and return the keys it has not."""
        absent = []
        for block in _blocks(keys):
            found = self.cache.get(block)
            for key, vector in found.items():
                rows.put(places[key], vector, self.black_box)
            absent += [key for key in block if key not in found]
        return absent

    def _fetch(
        self,
        texts: list[str],
        keys: list[bytes],
        kind: str,
        places: dict[bytes, list[int]],
        rows: "_Rows",
        report: Reporter,
        keep: bool = True,
    ) -> None:
        """Fetch and fill in `texts`, whose keys are `keys`; errors speak of the caller's places."""
        if not texts:
            return
        begun, before = time.monotonic(), self._cost
        used: Any = getattr(self.black_box, "cost", None)
        arrived = batches = 0
        seen = np.zeros(len(texts), bool)
        try:
            with closing(_generated(self.black_box.embed(texts, kind))) as batches_of:
                for positions, raw in batches_of:
                    vectors, wrong = unit_rows(raw)
                    good = [row for row in range(len(positions)) if row not in set(wrong)]
                    kept = [keys[positions[row]] for row in good]
                    if keep and good:
                        self.cache.put(kept, vectors[good])
                    for key, row in zip(kept, good, strict=True):
                        rows.put(places[key], vectors[row], self.black_box)
                    if wrong:
                        at = positions[wrong[0]]
                        raise UnusableText(
                            at, texts[at], "has a vector of zeros, NaN or infinite numbers; leave it out"
                        )
                    seen[positions] = True
                    arrived, batches = arrived + len(positions), batches + 1
                    self._cost = _spent(before, self.black_box, used, batches, arrived, time.monotonic() - begun)
                    report.show("texts embedded", arrived, len(texts), str(self._cost))
        except UnusableText as error:
            raise error.at(places[keys[error.index]][0]) from None
        finally:
            self._cost = _spent(before, self.black_box, used, batches, arrived, time.monotonic() - begun)
        if not seen.all():
            at = int(seen.argmin())
            raise UnusableText(places[keys[at]][0], texts[at], "was never answered by the black box")


class _Rows:
    """The result, made when the first vector says how long its rows are."""

    def __init__(self, n: int) -> None:
        self._n = n
        self._array: np.ndarray | None = None

    @property
    def dim(self) -> int | None:
        return None if self._array is None else self._array.shape[1]

    def put(self, places: list[int], vector: np.ndarray, black_box: BlackBox) -> None:
        if self._array is None:
            self._array = np.empty((self._n, len(vector)), np.float32)
        if len(vector) != self._array.shape[1]:
            raise NoisewiseError(
                f"{black_box.identity.get('model')} has vectors of {self._array.shape[1]} and of {len(vector)} numbers under one "
                "name: the model has changed; give another cache, or dimensions="
            )
        # a list of one is an index ten times as slow
        self._array[places if len(places) > 1 else places[0]] = vector

    def taken(self, dim: int | None) -> np.ndarray:
        return np.empty((0, dim or 0), np.float32) if self._array is None else self._array


def _generated(
    batches: Iterator[tuple[list[int], np.ndarray]],
) -> Generator[tuple[list[int], np.ndarray], None, None]:
    # can be closed, whatever kind of iterator it is
    yield from batches


def _blocks(keys: list[bytes]) -> list[list[bytes]]:
    return [keys[start : start + _BLOCK] for start in range(0, len(keys), _BLOCK)]


def _spent(
    before: FetchCost, black_box: BlackBox, used: FetchCost | None, batches: int, texts: int, seconds: float
) -> FetchCost:
    """`before` and what came since, by the black box's own account where it keeps one, whose state then was `used`."""
    now: FetchCost | None = getattr(black_box, "cost", None)
    calls, tokens, money = batches, 0, before.money
    if used is not None and now is not None:
        calls, tokens = now.calls - used.calls, now.tokens - used.tokens
        if now.money is not None:
            money = (before.money or 0.0) + now.money - (used.money or 0.0)
    return FetchCost(
        before.calls + calls, before.texts + texts, before.tokens + tokens, money, before.seconds + seconds
    )
