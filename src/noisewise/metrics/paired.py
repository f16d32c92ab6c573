"""Paired differences of two systems that ran on the same seeds, with Student's t interval."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, require

__all__ = ["PairedDifference", "paired_difference"]


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over pairs, with its standard error and interval.

    `se`: NaN for one pair, whose interval is the whole line. `low`, `high`: ends of the interval. `direction`: "lower"
    or "higher", which way the underlying measurement is better. `better`: "a" or "b" where the interval excludes 0,
    None where the data do not decide.
    """

    mean: float
    se: float
    low: float
    high: float
    n: int
    confidence: float = 0.95
    direction: str = "lower"

    @property
    def better(self) -> str | None:
        """ "a" or "b", only where the interval excludes 0."""
        if self.low <= 0 <= self.high or self.direction == "neither":
            return None
        return "a" if (self.mean < 0) == (self.direction == "lower") else "b"

    def __str__(self) -> str:
        if not math.isfinite(self.se):
            return f"{self.mean:+.3g} (one pair)"
        half_width = (self.high - self.low) / 2
        if half_width <= 1e-9 * abs(self.mean) or not 1e-4 <= max(abs(self.mean), half_width) < 1e6:
            return f"{self.mean:+.3g} [{self.low:.3g}, {self.high:.3g}]"
        # two digits of the interval's half width: more would be noise
        decimals = max(0, 1 - math.floor(math.log10(half_width)))
        return f"{self.mean:+.{decimals}f} [{self.low:.{decimals}f}, {self.high:.{decimals}f}]"


def paired_difference(
    a: Sequence[float | int] | Float[Tensor, " seed"],
    b: Sequence[float | int] | Float[Tensor, " seed"],
    *,
    confidence: float = 0.95,
    better: str = "lower",
) -> PairedDifference:
    """Mean of a - b over seeds with its t interval of coverage `confidence`, in (0, 1).

    `a[i]` and `b[i]` come from the same seed. `better`: "lower" or "higher", for the verdict. Raises `InvalidInput` for
    different lengths, no pairs, values that are not finite, or a confidence outside (0, 1).
    Source: Student, Biometrika 6(1), 1908.
    """
    first, second = [float(v) for v in a], [float(v) for v in b]
    if len(first) != len(second) or not first:
        raise InvalidInput(f"need the same seeds on both sides, got {len(first)} and {len(second)} values")
    if not all(map(math.isfinite, first + second)):
        raise InvalidInput(f"values must be finite; drop failed seeds from both sides and say so: {first} and {second}")
    if not 0 < confidence < 1:
        raise InvalidInput(f"confidence must lie in (0, 1), got {confidence!r}")
    if better not in ("lower", "higher", "neither"):
        raise InvalidInput(f'better must be "lower", "higher" or "neither", got {better!r}')
    differences = [u - v for u, v in zip(first, second, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    if n == 1:
        return PairedDifference(mean, math.nan, -math.inf, math.inf, n, confidence, better)
    se = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    quantile = float(require("scipy.stats", "sampling").t.ppf(0.5 + confidence / 2, n - 1))
    return PairedDifference(mean, se, mean - quantile * se, mean + quantile * se, n, confidence, better)
