"""Importance weights for a generator's draws: exact for any generator, and honest about what it missed only where it looked.

A generator has no density. A mixture of Gaussians around a fixed set of its draws has one, and is close to it; draws of that
mixture are weighed by the target. The idea is ours, after adaptive importance sampling with kernel mixtures.
"""

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.sampling.importance import effective_share
from noisewise.typing import Cost

__all__ = ["Weighted", "weighted_draws"]

# widths of the Gaussians that are tried, in deviations of the draws around each centre, and draws that choose among them
_WIDTHS = (0.25, 0.5, 0.75, 1.0, 1.5)
_HELD_OUT = 1000
# pairs of a draw and a centre in memory at once
_PAIRS = 2**22
# a part of the mixture is wider, so that tails do not outrun it
_TAIL_SHARE, _TAIL_WIDTH = 0.2, 2.0


class Weighted(NamedTuple):
    """`positions` [n, dim] with `log_weights` [n] (unnormalised) for means under the target; `ess`: how many exact draws they
    are worth. `log_normalizer`: log of the integral of the target's density, with `log_normalizer_se`; both say nothing of
    modes where the generator has no draw. `cost`: calls of the target.
    """

    positions: Float[Tensor, "n dim"]
    log_weights: Float[Tensor, " n"]
    ess: float
    log_normalizer: float
    log_normalizer_se: float
    cost: Cost


@torch.no_grad()
def weighted_draws(sampler: Any, n: int, centres: int, generator: torch.Generator) -> Weighted:
    """`n` weighted draws of a fitted sampler's target; see `DiKLSampler.weighted`."""
    standard, net = sampler.fitted()
    drawn = net(net.latent(centres + _HELD_OUT, generator)).double()
    mixture = _Mixture.around(drawn[:centres], drawn[centres:])
    u = mixture.sample(n, generator)
    log_p = standard.log_prob(u.float()).double()
    usable = torch.isfinite(log_p)
    log_weights = torch.where(usable, log_p - mixture.log_prob(u), -torch.inf)
    # du = dx / scale
    log_mean = float(log_weights.logsumexp(0)) - math.log(n) + float(standard.scale.double().log().sum())
    share = float(effective_share(log_weights)) if bool(usable.any()) else 0.0
    # delta method: the relative variance of the mean weight is (1 / share - 1) / n
    # a single draw of all the weight has no spread to tell an error from
    se = math.sqrt(max(1 / share - 1, 0.0) / n) if share * n > 2 else math.inf
    bad = int((~usable & (log_p != -torch.inf)).sum())
    return Weighted(standard.to_x(u.float()), log_weights, share * n, log_mean, se, Cost(energies=n, nonfinite=bad))


class _Mixture(NamedTuple):
    """Equal Gaussians at `centre` [m, dim] with deviations `spread` [m, dim], a share of each twice as wide."""

    centre: Tensor
    spread: Tensor

    @classmethod
    def around(cls, centre: Tensor, held_out: Tensor) -> "_Mixture":
        """Deviations from the nearest other centres, times the width under which held-out draws are likeliest."""
        neighbours = min(2 * centre.shape[1] + 8, len(centre) - 1)
        parts = []
        for rows in centre.split(max(_PAIRS // len(centre), 1)):
            near = torch.cdist(rows, centre).topk(neighbours + 1, largest=False).indices[:, 1:]
            parts.append((centre[near] - rows.unsqueeze(1)).square().mean(1).sqrt())
        spread = torch.cat(parts)
        # coordinates in which neighbours agree by chance still get some width
        spread = spread.clamp(min=1e-3 * float(spread.mean()))
        tried = [cls(centre, width * spread) for width in _WIDTHS]
        likely = [float(one.log_prob(held_out).mean()) for one in tried]
        return tried[likely.index(max(likely))]

    def sample(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` draws."""
        picked = torch.randint(len(self.centre), (n,), generator=generator)
        wide = torch.rand(n, generator=generator) < _TAIL_SHARE
        factor = torch.where(wide, _TAIL_WIDTH, 1.0).unsqueeze(-1)
        eps = torch.randn(n, self.centre.shape[1], generator=generator, dtype=torch.float64)
        return self.centre[picked] + factor * self.spread[picked] * eps

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density, in chunks."""
        found, dim = [], u.shape[1]
        precision = self.spread.square().reciprocal()
        log_volume = self.spread.log().sum(-1) + dim / 2 * math.log(2 * math.pi)
        narrow, wide = math.log(1 - _TAIL_SHARE), math.log(_TAIL_SHARE) - dim * math.log(_TAIL_WIDTH)
        # |u - c|^2 expanded: three products instead of a tensor [draw, centre, dim]; centred, so that few digits cancel
        mean = self.centre.mean(0)
        centre = self.centre - mean
        square_centre = (centre.square() * precision).sum(-1)
        for rows in u.split(max(_PAIRS // len(centre), 1)):
            x = rows - mean
            square = x.square() @ precision.T - 2 * x @ (centre * precision).T + square_centre
            square = square.clamp(min=0)
            each = torch.logaddexp(narrow - square / 2, wide - square / (2 * _TAIL_WIDTH**2)) - log_volume
            found.append(each.logsumexp(-1) - math.log(len(centre)))
        return torch.cat(found)
