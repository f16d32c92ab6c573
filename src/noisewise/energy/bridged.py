"""The fitted bridge q = exp(-f) / Z of data and reference, and the density of the data that is left when m is taken out.

Source: Zhang et al., 2022, arXiv 2209.07396; floor, renormalisation and residual energy are ours.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.energy.gaps import Clusters
from noisewise.energy.network import score_of
from noisewise.energy.normalizer import LogNormalizer
from noisewise.targets.gaussian_mixture import GaussianMixture

__all__ = ["Bridged", "Mass", "ResidualEnergy", "corrected_log_prob"]


# deviations of the proposal in units of the clusters' own: the tails of p must not outrun it
_WIDER = 1.5


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
    """What the correction had to mend. `negative`: mass below zero before, with `se`; `total`: mass after the floor.

    `signed`: mass before the floor, what is negative subtracted, with `signed_se`; 1 if the normaliser is right.
    """

    negative: float
    se: float
    total: float
    signed: float
    signed_se: float


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
    def weights(self, drawn: Float[Tensor, "drawn dim"], log_share: Float[Tensor, " drawn"]) -> Float[Tensor, " drawn"]:
        """Importance weights of the data's density at draws of a proposal g; `log_share`: log m - log g there."""
        return corrected_ratio(self.log_ratio(drawn), self.beta).clamp(min=self.floor) * log_share.exp() / self.total

    @torch.no_grad()
    def mass(self, drawn: Float[Tensor, "drawn dim"], log_share: Float[Tensor, " drawn"]) -> Mass:
        """Masses of the correction from draws of a proposal g; `log_share`: log m - log g there.

        The signed mass is 1 where the normaliser is right. It rests on draws of the data as if they were draws of the bridge,
        so a fit that is wrong shows as another mass.
        """
        share = log_share.exp()
        ratio = corrected_ratio(self.log_ratio(drawn), self.beta)
        negative, signed = share * (-ratio).clamp(min=0), share * ratio
        root = math.sqrt(len(drawn))
        return Mass(
            float(negative.mean()), float(negative.std()) / root, float((share * ratio.clamp(min=self.floor)).mean()),
            float(signed.mean()), float(signed.std()) / root,
        )  # fmt: skip


@dataclass(frozen=True)
class Proposal:
    """Half reference, half Gaussians on the clusters of the data: it lies wherever the density of the data does."""

    reference: Any
    clusters: GaussianMixture

    @classmethod
    def around(cls, clusters: Clusters, reference: Any) -> "Proposal":
        """One Gaussian for each cluster, with its mean, `_WIDER` times its deviations, and its share of the rows."""
        means, covariances, counts = [], [], []
        dim = clusters.rows.shape[1]
        # what a cluster of few rows does not tell of its shape comes from the others
        common = clusters.width**2 * torch.eye(dim, dtype=clusters.rows.dtype, device=clusters.rows.device)
        for group in clusters.groups:
            offset = group - group.mean(0)
            means.append(group.mean(0))
            covariances.append(_WIDER**2 * (offset.T @ offset + (dim + 1) * common) / (len(group) + dim + 1))
            counts.append(len(group))
        weights = torch.tensor(counts, dtype=means[0].dtype, device=means[0].device)
        mixture = GaussianMixture(torch.stack(means), torch.stack(covariances), weights / weights.sum())
        return cls(reference, mixture)

    @torch.no_grad()
    def draw(self, n: int, generator: torch.Generator) -> tuple[Float[Tensor, "drawn dim"], Float[Tensor, " drawn"]]:
        """`n` draws (rounded up to an even number) and log m - log g at them, at most log 2."""
        half = -(-n // 2)
        like = self.clusters.means
        drawn = torch.cat(
            [self.reference.sample(half, generator).to(like), self.clusters.sample(half, generator).to(like)]
        )
        log_m = self.reference.log_prob(drawn)
        return drawn, log_m - (torch.logaddexp(log_m, self.clusters.log_prob(drawn)) - math.log(2))


def corrected_ratio(log_ratio: Tensor, beta: float) -> Tensor:
    """p / m of the corrected density, also where it is negative."""
    return (log_ratio.exp() - (1 - beta)) / beta
