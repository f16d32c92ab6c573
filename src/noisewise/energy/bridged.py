"""The fitted bridge q = exp(-f) / Z of data and reference, and the density of the data that is left when m is taken out.

Source: Zhang et al., 2022, arXiv 2209.07396; floor, renormalisation and residual energy are ours.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.energy.network import score_of
from noisewise.energy.normalizer import LogNormalizer

__all__ = ["Bridged", "Mass", "ResidualEnergy", "corrected_log_prob"]


class ResidualEnergy(nn.Module):
    """f(z) = net(z) - log m(z): the network learns only what the data change of the reference, whose tails it keeps."""

    def __init__(self, net: nn.Module, reference: Any) -> None:
        super().__init__()
        self.net = net
        self.reference = reference

    def forward(self, x: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """Energies of the bridge."""
        return self.net(x) - self.reference.log_prob(x)


class Mass(NamedTuple):
    """What the correction had to mend. `negative`: mass below zero before, with `se`; `total`: mass after the floor."""

    negative: float
    se: float
    total: float


def corrected_log_prob(
    log_bridged: Float[Tensor, "*batch"],
    log_reference: Float[Tensor, "*batch"],
    beta: float | int,
    floor: float | int = 0.0,
) -> Float[Tensor, "*batch"]:
    """log p of p = max((q - (1 - beta) m) / beta, floor m), from log q of the bridge and log m; not renormalised.

    Where the bridge holds less than its share of m the difference is not positive: -inf with `floor` 0.
    """
    excess = math.log1p(-beta) + log_reference - log_bridged
    positive = excess < 0
    # evaluated at a harmless value where it is not positive, so that no NaN reaches the gradient
    safe = torch.where(positive, excess, -torch.ones_like(excess))
    inside = log_bridged + torch.log(-torch.expm1(safe)) - math.log(beta)
    value = torch.where(positive, inside, torch.full_like(inside, -math.inf))
    return value if floor == 0 else torch.maximum(value, math.log(floor) + log_reference)


@dataclass(frozen=True)
class Bridged:
    """The bridge on the standardised scale z, normalised; `density` is the corrected density of the data.

    `energy`: f, [batch, dim] -> [batch]; `normalizer`: log Z of it; `floor`: least density in units of m's.
    """

    energy: Any
    reference: Any
    beta: float
    normalizer: LogNormalizer
    floor: float
    total: float = 1.0

    def log_prob(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """Normalised log density of the bridge."""
        return -self.energy(z) - self.normalizer.value

    def log_ratio(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """log q / m with q normalised."""
        return self.log_prob(z) - self.reference.log_prob(z)

    def log_density(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """Log density of the data: reference taken out, floored, renormalised."""
        value = corrected_log_prob(self.log_prob(z), self.reference.log_prob(z), self.beta, self.floor)
        return value - math.log(self.total)

    def score(self, z: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Gradient of `log_density`; where the floor holds it is that of the reference."""
        return score_of(lambda point: -self.log_density(point), z)

    @torch.no_grad()
    def weights(self, drawn: Float[Tensor, "drawn dim"]) -> Float[Tensor, " drawn"]:
        """Density of the data over that of the reference, at draws of the reference: importance weights."""
        return corrected_ratio(self.log_ratio(drawn), self.beta).clamp(min=self.floor) / self.total

    @torch.no_grad()
    def mass(self, drawn: Float[Tensor, "drawn dim"]) -> Mass:
        """Negative and total mass of the correction from draws of the reference.

        (q - (1 - beta) m) / beta integrates to 1, so both are means of bounded functions under m.
        """
        ratio = corrected_ratio(self.log_ratio(drawn), self.beta)
        negative = (-ratio).clamp(min=0)
        lifted = (self.floor - ratio).clamp(min=0)
        return Mass(float(negative.mean()), float(negative.std()) / math.sqrt(len(drawn)), 1 + float(lifted.mean()))


def corrected_ratio(log_ratio: Tensor, beta: float) -> Tensor:
    """p / m of the corrected density, also where it is negative."""
    return (log_ratio.exp() - (1 - beta)) / beta
