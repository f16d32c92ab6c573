"""A tempered target under a Gaussian factor: the density that tempering, annealing and denoising all sample."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

__all__ = ["Tilt"]


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
