"""The target as the networks see it: shifted and scaled by a pilot run, and without centre of mass where that is free."""

from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from noisewise.targets.target import Target

__all__ = ["Standardised", "centred"]


def centred(x: Float[Tensor, "*batch dim"], particles: int) -> Float[Tensor, "*batch dim"]:
    """Positions without their centre of mass, ordered (x0, y0, x1, ...)."""
    split = x.unflatten(-1, (particles, -1))
    return (split - split.mean(-2, keepdim=True)).flatten(-2)


@dataclass
class Standardised:
    """The density of u = (x - mean) / scale for a target of x; log densities keep the target's own constant.

    `mean`, `scale`: [dim], one number repeated for `particles` (0 for a target that is no cluster). For a cluster, u has no
    centre of mass, and where the target leaves that free or tied, a Gaussian of unit variance for each takes its place, so
    that chains in all coordinates have a density to sample.
    """

    target: Target
    mean: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]
    particles: int = 0
    dim: int = field(init=False)

    def __post_init__(self) -> None:
        self.dim = self.target.dim

    @property
    def project(self) -> Any:
        """Removal of the centre of mass, or None."""
        return None if not self.particles else self._centred

    def _centred(self, u: Tensor) -> Tensor:
        return centred(u, self.particles)

    def to_x(self, u: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Back to the scale of the target."""
        return u * self.scale.to(u) + self.mean.to(u)

    def to_u(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """From the scale of the target, without centre of mass where it has none."""
        u = (x - self.mean.to(x)) / self.scale.to(x)
        return centred(u, self.particles) if self.particles else u

    def log_prob(self, u: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Log density of the target at x(u)."""
        if not self.particles:
            return self.target.log_prob(self.to_x(u))
        inside = centred(u, self.particles)
        return self.target.log_prob(self.to_x(inside)) - (u - inside).square().sum(-1) / 2

    def log_prob_and_score(
        self, u: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density at x(u) and its gradient in u."""
        inside = centred(u, self.particles) if self.particles else u
        value, score = self.target.log_prob_and_score(self.to_x(inside))
        score = score * self.scale.to(score)
        if not self.particles:
            return value, score
        outside = u - inside
        return value - outside.square().sum(-1) / 2, centred(score, self.particles) - outside
