"""Words that every module uses: the bill of a computation, and helpers that check arguments."""

import math
from dataclasses import dataclass

from noisewise.errors import InvalidInput

__all__ = ["Cost", "check_count", "check_positive"]


@dataclass(frozen=True)
class Cost:
    """What a computation used, counted per row of a batch: one chain evaluated once is one call.

    `gradients`: value-and-gradient calls; `energies`: value-only calls; `seconds`: wall time; `nonfinite`: calls that
    came back NaN or +inf in log density and were treated as rejections.
    """

    gradients: int = 0
    energies: int = 0
    seconds: float = 0.0
    nonfinite: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.gradients + other.gradients,
            self.energies + other.energies,
            self.seconds + other.seconds,
            self.nonfinite + other.nonfinite,
        )


def check_count(name: str, value: object, minimum: int = 1) -> int:
    """Return `value` as an int of at least `minimum`; raise `InvalidInput` that quotes it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value != int(value):
        raise InvalidInput(f"{name} must be a whole number, got {value!r}")
    if value < minimum:
        raise InvalidInput(f"{name} must be at least {minimum}, got {value!r}")
    return int(value)


def check_positive(name: str, value: object) -> float:
    """Return `value` as a finite float above zero; raise `InvalidInput` that quotes it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
        raise InvalidInput(f"{name} must be a finite number above 0, got {value!r}")
    return float(value)
