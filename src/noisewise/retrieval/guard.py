"""The guard: the black box is left only where labelled queries say so beyond chance, and then for the simplest of the best.

Our design; the published method has none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from noisewise.errors import InvalidInput, require
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.paired import PairedDifference

__all__ = ["Candidate", "GuardReport", "Judged", "choose"]

_LEVEL = 0.05
# labelled queries below which the level is shared out among the candidates
_FEW = 20
_RESAMPLES, _RESAMPLING_SEED = 2000, 0
_NORMAL = 1.6448536269514722


@dataclass(frozen=True)
class Candidate:
    """A way to score passages, and the criterion of each labelled query that it did not learn from, in [0, 1].

    `added`: numbers that a vector has beside the black box's. `reference`: shown, but no candidate, for it is not one vector.
    """

    name: str
    values: Float[np.ndarray, " query"]
    added: int = 0
    note: str = ""
    reference: bool = False


@dataclass(frozen=True)
class Judged:
    """One row of the guard's table. `gain`: over the black box, paired by query; `passed`: its lower bound is above 0."""

    name: str
    score: Measurement
    gain: PairedDifference
    lower: float
    passed: bool
    added: int
    note: str = ""
    reference: bool = False


@dataclass(frozen=True)
class GuardReport:
    """What the guard saw and what it chose.

    `queries`: how many labelled ones stand behind every row. `false_alarm`: how often, of resamples of these very queries
    in which no candidate is better than the black box, the rule would leave it, in [0, 1]. `corrected`: whether the level
    was shared out among the candidates, for few queries. `notes`: what else a reader should know.
    """

    rows: tuple[Judged, ...]
    choice: str
    queries: int
    false_alarm: float
    corrected: bool
    criterion: str = "nDCG@10"
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        names = [row.name + " *" * (row.name == self.choice) for row in self.rows]
        width = max(map(len, names))
        lines = [f"{'':{width}}  {self.criterion:>15}  {'gain over the black box':>26}  {'added':>6}"]
        for name, row in zip(names, self.rows, strict=True):
            gain = "" if row is self.rows[0] else str(row.gain)
            lines.append(f"{name:{width}}  {row.score!s:>15}  {gain:>26}  {row.added or '':>6}  {row.note}".rstrip())
        return "\n".join([*lines, f"* chosen on {self.queries} labelled queries. {self.rule}", *self.notes])

    @property
    def rule(self) -> str:
        """In words, with its error."""
        level = "5 % shared out among the candidates" if self.corrected else "95 %"
        return (
            f"The black box is left only where the lower bound ({level}, one-sided) of the paired gain is above 0, and then for "
            "the simplest that is behind the best by no more than one standard error of that difference. Were nothing better, it "
            f"would be left in about {100 * self.false_alarm:.2g} % of such samples of queries."
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "criterion": self.criterion,
            "choice": self.choice,
            "queries": self.queries,
            "false_alarm": self.false_alarm,
            "corrected": self.corrected,
            "notes": list(self.notes),
            "rows": [
                {
                    "name": row.name,
                    "score": row.score.to_dict(),
                    "gain": [row.gain.mean, row.gain.low, row.gain.high],
                    "gain_se": row.gain.se,
                    "lower": row.lower,
                    "passed": row.passed,
                    "added": row.added,
                    "note": row.note,
                    "reference": row.reference,
                }
                for row in self.rows
            ],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> "GuardReport":
        """The inverse of `to_dict`."""
        rows = tuple(
            Judged(
                row["name"],
                Measurement.from_dict(row["score"]),
                PairedDifference(
                    row["gain"][0],
                    row["gain_se"],
                    row["gain"][1],
                    row["gain"][2],
                    record["queries"],
                    direction="higher",
                ),
                *(row[name] for name in ("lower", "passed", "added", "note", "reference")),
            )
            for row in record["rows"]
        )
        facts = {name: record[name] for name in ("choice", "queries", "false_alarm", "corrected", "criterion")}
        return cls(rows, **facts, notes=tuple(record["notes"]))


def choose(candidates: Sequence[Candidate], labelled: int | None = None, notes: Sequence[str] = ()) -> GuardReport:
    """Judge `candidates`, the black box first and then from simple to complex, all on the same queries.

    A candidate passes where mean - z se of its paired gain is above 0: z = 1.645, or, with values for fewer than 20
    queries, or fewer `labelled` ones, Student's quantile at 5 % over the number of candidates. Of those that pass, the
    first is chosen whose mean is within one standard error, of the paired difference, of the highest; else the black box.
    Raises `InvalidInput` for values that do not belong to the same queries, and fewer than 2 queries.
    """
    values = [np.asarray(candidate.values, dtype=np.float64) for candidate in candidates]
    n = len(values[0]) if values else 0
    if n < 2 or any(of.shape != (n,) or not np.isfinite(of).all() for of in values):
        raise InvalidInput(f"the guard needs values of the same 2 queries or more, got {[of.shape for of in values]}")
    real = [index for index, candidate in enumerate(candidates) if index and not candidate.reference]
    corrected = min(n, n if labelled is None else labelled) < _FEW
    quantile = _quantile(n, max(1, len(real))) if corrected else _NORMAL
    gains = [of - values[0] for of in values]
    lower = [_lower(gain, quantile) for gain in gains]
    passed = [index for index in real if lower[index] > 0]
    rows = tuple(
        Judged(
            candidate.name,
            Measurement(float(values[i].mean()), _error(values[i]), n=n, better="higher"),
            _difference(gains[i]),
            lower[i],
            i in passed,
            candidate.added,
            candidate.note,
            candidate.reference,
        )
        for i, candidate in enumerate(candidates)
    )
    choice = candidates[_simplest(values, passed)].name if passed else candidates[0].name
    alarm = _false_alarm(np.stack([gains[i] for i in real]), quantile) if real else 0.0
    return GuardReport(rows, choice, n, alarm, corrected, notes=tuple(notes))


def _simplest(values: list[np.ndarray], passed: list[int]) -> int:
    best = max(passed, key=lambda index: values[index].mean())
    behind = {index: values[best] - values[index] for index in passed}
    return next(index for index in passed if behind[index].mean() <= _error(behind[index]))


def _false_alarm(gains: Float[np.ndarray, "candidate query"], quantile: float) -> float:
    """The share of bootstrap samples of centred gains in which any candidate passes."""
    centred = gains - gains.mean(1, keepdims=True)
    rng, n = np.random.default_rng(_RESAMPLING_SEED), gains.shape[1]
    counts = rng.multinomial(n, np.full(n, 1 / n), _RESAMPLES).astype(np.float64)
    mean, square = counts @ centred.T / n, counts @ np.square(centred).T / n
    error = np.sqrt(np.maximum(square - mean**2, 0) / (n - 1))
    return float(((mean - quantile * error > 0) & (error > 0)).any(1).mean())


def _lower(gain: np.ndarray, quantile: float) -> float:
    return float(gain.mean() - quantile * _error(gain))


def _error(values: np.ndarray) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def _quantile(n: int, candidates: int) -> float:
    return float(require("scipy.stats", "retrieval").t.ppf(1 - _LEVEL / candidates, n - 1))


def _difference(gain: np.ndarray) -> PairedDifference:
    half = _error(gain) * float(require("scipy.stats", "retrieval").t.ppf(0.975, len(gain) - 1))
    mean = float(gain.mean())
    return PairedDifference(mean, _error(gain), mean - half, mean + half, len(gain), 0.95, "higher")
