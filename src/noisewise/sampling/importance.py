"""Importance weights that are kept from degenerating: the largest power of them under which enough draws still count."""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["effective_share", "largest_power"]

_BISECTIONS = 40


def effective_share(log_weight: Float[Tensor, " draw"]) -> Float[Tensor, ""]:
    """Effective number of draws over their number, 1 / (n sum W_i^2) with W the normalised weights; in (0, 1]."""
    return 1 / (log_weight.softmax(0).square().sum() * len(log_weight))


def largest_power(
    log_weight: Float[Tensor, " draw"], share: float | Tensor, most: Float[Tensor, ""] | float = 1.0
) -> Float[Tensor, ""]:
    """The largest exponent up to `most` under which the weights keep the effective share `share`; by bisection.

    -inf is a weight of zero at every exponent.
    """

    def effective(power: Tensor) -> Tensor:
        return effective_share(torch.where(torch.isfinite(log_weight), power * log_weight, -torch.inf))

    top = torch.as_tensor(most, dtype=log_weight.dtype, device=log_weight.device)
    low, high = torch.zeros_like(top), top
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = effective(middle) >= share
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    return torch.where(effective(top) >= share, top, low)
