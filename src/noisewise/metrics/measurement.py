"""A number with what it needs to be read: its standard error, the score of perfect samples, and which way is better."""

import math
from dataclasses import dataclass, replace
from typing import Any

from noisewise.errors import InvalidInput

__all__ = ["Measurement", "format_value"]


@dataclass(frozen=True)
class Measurement:
    """One measured number; `float(measurement)` is its value.

    `value`: may be NaN or infinite, which means that the measurement failed. `se`: standard error, at least 0, None
    where unknown. `floor`: the score of perfect samples (exact draws against disjoint exact draws), or the ceiling of
    an oracle where higher is better. `n`: number of draws, seeds or chains behind it. `unit`: empty for pure numbers.
    `better`: "lower", "higher", or "neither" for what only describes. Raises `InvalidInput` for a negative `se`, a negative
    `n` or another `better`.
    """

    value: float | int
    se: float | int | None = None
    floor: float | int | None = None
    n: int | None = None
    unit: str = ""
    better: str = "lower"

    def __post_init__(self) -> None:
        for name in ("value", "se", "floor"):
            number = getattr(self, name)
            if name != "value" and number is None:
                continue
            if isinstance(number, bool) or not isinstance(number, int | float):
                raise InvalidInput(f"{name} of a Measurement must be a number, got {number!r}; call float() on tensors")
            object.__setattr__(self, name, float(number))
        if self.se is not None and self.se < 0:
            raise InvalidInput(f"se is a standard error and cannot be negative, got {self.se!r}")
        if self.n is not None and (isinstance(self.n, bool) or self.n < 0):
            raise InvalidInput(f"n counts draws and must be a whole number of at least 0, got {self.n!r}")
        if self.better not in ("lower", "higher", "neither"):
            raise InvalidInput(f'better must be "lower", "higher" or "neither", got {self.better!r}')

    def __float__(self) -> float:
        return float(self.value)

    def __str__(self) -> str:
        text = format_value(self.value, self.se)
        if self.unit:
            text += f" {self.unit}"
        if self.floor is not None:
            text += f" (floor {format_value(self.floor)})"
        return text

    def with_floor(self, floor: float | int | None) -> "Measurement":
        """The same measurement with the score of perfect samples filled in."""
        return replace(self, floor=floor)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON: unknown entries are left out, NaN and infinities become None."""
        entries: dict[str, Any] = {"value": _finite_or_none(self.value)}
        for name in ("se", "floor"):
            if (number := getattr(self, name)) is not None:
                entries[name] = _finite_or_none(number)
        if self.n is not None:
            entries["n"] = self.n
        return entries | {"unit": self.unit, "better": self.better}

    @classmethod
    def from_dict(cls, entries: dict[str, Any]) -> "Measurement":
        """Inverse of `to_dict`; a value, se or floor that was not finite comes back as NaN. Raises `InvalidInput`."""
        known = {"value", "se", "floor", "n", "unit", "better"}
        if "value" not in entries or set(entries) - known:
            raise InvalidInput(f"not a Measurement: {entries!r}; its keys are {sorted(known)}, and value is needed")
        fields: dict[str, Any] = dict(entries)
        for name in {"value", "se", "floor"} & set(fields):
            fields[name] = math.nan if fields[name] is None else fields[name]
        return cls(**fields)


def format_value(value: float | int, se: float | int | None = None) -> str:
    """`value ± se`, rounded to the digits that `se` supports: one of the error, two where it begins with 1.

    Without a standard error: four significant digits. Very large and small numbers share one power of ten.
    """
    if not math.isfinite(value):
        return "n/a" if math.isnan(value) else f"{value:g}"
    if se is None or not math.isfinite(se):
        return f"{value:.4g}"
    if se <= 1e-9 * abs(value):  # rounding errors of equal numbers
        return f"{value:.4g} ± 0"
    magnitude = max(abs(value), se)
    if not 1e-4 <= magnitude < 1e6:
        exponent = math.floor(math.log10(magnitude))
        return f"({_fixed(value / 10.0**exponent, se / 10.0**exponent)})e{exponent:+03d}"
    return _fixed(value, se)


def _fixed(value: float, se: float) -> str:
    mantissa, exponent = f"{se:.1e}".split("e")
    digits = 2 if mantissa.startswith("1") else 1
    decimals = max(0, digits - 1 - int(exponent))
    return f"{value:.{decimals}f} ± {se:.{decimals}f}"


def _finite_or_none(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None
