"""Clustered densities that are known, on a grid: what a fit is judged by."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.metrics.measurement import Measurement
from noisewise.targets.gaussian_mixture import GaussianMixture
from noisewise.typing import Cost

__all__ = ["Fitted", "Truth", "circles", "four_clusters", "judge", "two_clusters"]

# log densities below this are taken for it: KL would otherwise be infinite for a density that is cut to zero
_LEAST_LOG_DENSITY = -60.0


@dataclass(frozen=True)
class Truth:
    """A known density. `label(x) -> [n]`: the cluster that a point belongs to, and `weights` of the clusters.

    `reach`: the grid covers [-reach, reach] in each of `dim` coordinates with `nodes` nodes.
    """

    name: str
    dim: int
    sample: Callable[[int, torch.Generator], Float[Tensor, "n dim"]]
    log_prob: Callable[[Tensor], Float[Tensor, " n"]]
    label: Callable[[Tensor], Int[Tensor, " n"]]
    weights: Float[Tensor, " cluster"]
    reach: float
    nodes: int

    def grid(self) -> tuple[Float[Tensor, "node dim"], float]:
        """Nodes, float32, and the volume that each stands for."""
        line = torch.linspace(-self.reach, self.reach, self.nodes)
        axes = torch.meshgrid(*[line] * self.dim, indexing="ij")
        return torch.stack([axis.flatten() for axis in axes], -1), float(line[1] - line[0]) ** self.dim


@dataclass(frozen=True)
class Fitted:
    """A fitted density: `log_density`, not necessarily normalised; `negative`: mass that a correction left below zero."""

    log_density: Callable[[Tensor], Tensor]
    truth: Truth
    cost: Cost
    negative: float | None = None
    notes: tuple[str, ...] = ()


def two_clusters(half: float) -> Truth:
    """Normals of deviation 1 at -half and half with weights .2 and .8."""
    weights = torch.tensor([0.2, 0.8])
    mixture = GaussianMixture(torch.tensor([[-half], [half]]), 1.0, weights)
    return Truth(
        f"modes at ±{half:g}", 1, mixture.sample, mixture.log_prob, lambda x: (x[:, 0] > 0).long(), weights,
        2.5 * half + 4, 4001,
    )  # fmt: skip


def four_clusters() -> Truth:
    """Four normals of deviation .5 at the corners of a square of side 3 (six deviations), weights .1, .2, .3, .4."""
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    means = torch.tensor([[-1.5, -1.5], [-1.5, 1.5], [1.5, -1.5], [1.5, 1.5]])
    mixture = GaussianMixture(means, 0.25, weights)
    return Truth("four clusters", 2, mixture.sample, mixture.log_prob, mixture.component, weights, 5.0, 400)


def circles() -> Truth:
    """Concentric circles of radii 1 and 3 and width .1 with masses .3 and .7."""
    radii, width, weights = torch.tensor([1.0, 3.0]), 0.1, torch.tensor([0.3, 0.7])

    def sample(n: int, generator: torch.Generator) -> Tensor:
        which = torch.multinomial(weights, n, replacement=True, generator=generator)
        radius = radii[which] + width * torch.randn(n, generator=generator)
        angle = 2 * math.pi * torch.rand(n, generator=generator)
        return radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)

    def log_prob(x: Tensor) -> Tensor:
        # the radius is normal (ten widths from 0), the angle uniform: density over area is that of the radius over 2 pi r
        r = x.norm(dim=-1).clamp(min=1e-6)
        z = (r.unsqueeze(-1) - radii.to(x)) / width
        radial = (weights.to(x).log() - 0.5 * z.square() - math.log(width * math.sqrt(2 * math.pi))).logsumexp(-1)
        return radial - (2 * math.pi * r).log()

    return Truth("circles", 2, sample, log_prob, lambda x: (x.norm(dim=-1) > 2).long(), weights, 5.0, 400)


def judge(fitted: Fitted) -> dict[str, Measurement]:
    """KL(truth || fit) and cluster weights of the fit, all by quadrature on the truth's grid."""
    truth = fitted.truth
    nodes, volume = truth.grid()
    with torch.no_grad():
        log_p = truth.log_prob(nodes).double()
        log_q = torch.cat([fitted.log_density(part) for part in nodes.split(20_000)]).double()
    # both on the same nodes, so that a density is at distance zero from itself
    log_p, log_q = (value - value.logsumexp(0) - math.log(volume) for value in (log_p, log_q))
    log_q = log_q.clamp(min=_LEAST_LOG_DENSITY)
    p = log_p.exp() * volume
    kl = float((p * (log_p - log_q)).sum())
    member = torch.nn.functional.one_hot(truth.label(nodes), len(truth.weights)).double()
    weights = (log_q.exp() * volume) @ member
    weights = weights / weights.sum()
    found = {
        "KL": Measurement(kl, floor=0.0),
        "TV of cluster weights": Measurement(float((weights - truth.weights).abs().sum() / 2), floor=0.0),
        "weight of the least cluster": Measurement(
            float(weights[truth.weights.argmin()]), floor=float(truth.weights.min()), better="neither"
        ),
    }
    if fitted.negative is not None:
        found["negative mass"] = Measurement(fitted.negative, floor=0.0)
    return found
