"""log Z of an unnormalised density q = exp(-f) from a reference of known normaliser, with standard errors.

Importance sampling needs draws of the reference, reverse importance sampling draws of q, bridge sampling both.
Source of the bridge: Meng & Wong, Statistica Sinica 6, 1996 (optimal bridge function); its equation is Bennett's, 1976.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.energy.reference import Reference
from noisewise.errors import InvalidInput

__all__ = [
    "NORMALIZERS",
    "LogNormalizer",
    "bridge_sampling",
    "importance_sampling",
    "log_normalizer",
    "reverse_importance_sampling",
]

NORMALIZERS = ("bridge", "importance", "reverse")


class LogNormalizer(NamedTuple):
    """`value`: log of the integral of exp(-f). `se`: its standard error. `n`: points behind it."""

    value: float
    se: float
    n: int

    @property
    def effective(self) -> float:
        """Independent points that would give this error with weights of unit variance, 1 / se^2."""
        return math.inf if self.se == 0 else 1 / self.se**2


def importance_sampling(log_ratio: Float[Tensor, " drawn"]) -> LogNormalizer:
    """From log_ratio = -f - log m at draws of m: log of the mean ratio. Unbounded weights where q has heavier tails."""
    value, se = _log_mean(log_ratio)
    return LogNormalizer(value, se, len(log_ratio))


def reverse_importance_sampling(log_ratio: Float[Tensor, " row"]) -> LogNormalizer:
    """From log_ratio = -f - log m at draws of q: 1 / Z is the mean of m / q, bounded where q holds a share of m."""
    value, se = _log_mean(-log_ratio)
    return LogNormalizer(-value, se, len(log_ratio))


def bridge_sampling(at_reference: Float[Tensor, " drawn"], at_rows: Float[Tensor, " row"]) -> LogNormalizer:
    """From log_ratio = -f - log m at draws of m and at draws of q, with the bridge function of least error.

    log Z = c solves sum over draws of m of sigmoid(u) = sum over draws of q of sigmoid(-u), u = log_ratio - c +
    log(n_q / n_m); the sums differ monotonically in c. The standard error is that of this estimating equation, valid
    also where the draws of q are only nearly so.
    """
    lower, upper = at_reference.double(), at_rows.double()
    _check_finite(lower)
    _check_finite(upper)
    offset = math.log(len(upper) / len(lower))

    def excess(c: float) -> float:
        return float(torch.sigmoid(lower - c + offset).sum() - torch.sigmoid(c - offset - upper).sum())

    everything = torch.cat([lower, upper])
    low, high = float(everything.min()) + offset - 40, float(everything.max()) + offset + 40
    # 200 halvings reach the last digit of any bracket
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    c = (low + high) / 2
    from_reference, from_rows = torch.sigmoid(lower - c + offset), torch.sigmoid(c - offset - upper)
    slope = float((from_reference * (1 - from_reference)).sum() + (from_rows * (1 - from_rows)).sum())
    spread = len(lower) * float(from_reference.var()) + len(upper) * float(from_rows.var())
    se = math.sqrt(spread) / slope if slope > 0 else math.inf
    return LogNormalizer(c, se, len(everything))


def log_normalizer(
    energy: Callable[[Tensor], Tensor],
    reference: Reference,
    drawn: Float[Tensor, "drawn dim"],
    rows: Float[Tensor, "row dim"],
    method: str = "bridge",
) -> LogNormalizer:
    """log Z of exp(-energy) from draws of the reference and rows of the density itself, by one of `NORMALIZERS`.

    Raises `InvalidInput` for another method, and for energies that are not finite.
    """
    if method not in NORMALIZERS:
        raise InvalidInput(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {method!r}")
    with torch.no_grad():
        at_reference = -energy(drawn) - reference.log_prob(drawn)
        at_rows = -energy(rows) - reference.log_prob(rows)
    if method == "importance":
        return importance_sampling(at_reference)
    if method == "reverse":
        return reverse_importance_sampling(at_rows)
    return bridge_sampling(at_reference, at_rows)


def _log_mean(log_weight: Tensor) -> tuple[float, float]:
    """log of the mean of exp(log_weight) and its standard error by the delta method."""
    log_weight = log_weight.double()
    _check_finite(log_weight)
    n = len(log_weight)
    value = float(torch.logsumexp(log_weight, 0)) - math.log(n)
    relative = (log_weight - value).exp()
    return value, float(relative.std()) / math.sqrt(n)


def _check_finite(log_ratio: Tensor) -> None:
    if len(log_ratio) < 2:
        raise InvalidInput(f"a normaliser with an error needs at least 2 points of each kind, got {len(log_ratio)}")
    bad = int((~torch.isfinite(log_ratio)).sum())
    if bad:
        raise InvalidInput(
            f"the energy is not finite at {bad} of {len(log_ratio)} points: the fit diverged; lower learning_rate or clip"
        )
