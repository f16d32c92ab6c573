"""A tempered target under a Gaussian factor: the density that tempering, annealing and denoising all sample."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.targets.target import Target

__all__ = ["Tilt", "TiltedTarget"]


class Tilt(NamedTuple):
    """log p(x) -> power * log p(x) - 1/2 sum_i precision_i (x_i - center_i)^2, up to a constant.

    `power`: inverse temperature, scalar or one per chain; `precision`: scalar, [dim] or [chain, 1]; `center`: scalar,
    [dim] or [chain, dim]. Tempering is (beta, 0, 0); the denoising posterior p(x | x_t) is (1, (a/s)^2, x_t / a).
    """

    power: Tensor | float | int = 1.0
    precision: Tensor | float | int = 0.0
    center: Tensor | float | int = 0.0

    def __call__(
        self, position: Float[Tensor, "chain dim"], log_prob: Float[Tensor, " chain"], score: Float[Tensor, "chain dim"]
    ) -> tuple[Float[Tensor, " chain"], Float[Tensor, "chain dim"]]:
        """Tilted log density and score, from those of the target: no call of the target is made."""
        offset = position - self.center
        pull = self.precision * offset
        power = self.power.unsqueeze(-1) if isinstance(self.power, Tensor) and self.power.ndim else self.power
        return self.power * log_prob - 0.5 * (pull * offset).sum(-1), power * score - pull


class TiltedTarget:
    """The target p(x)^power N(x; center, 1/precision), unnormalised, as a Target of its own."""

    def __init__(self, target: Target, tilt: Tilt) -> None:
        self.target = target
        self.tilt = tilt
        self.dim = target.dim

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log density."""
        return self.tilt(x, self.target.log_prob(x), torch.zeros_like(x))[0]

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score."""
        return self.tilt(x, *self.target.log_prob_and_score(x))
