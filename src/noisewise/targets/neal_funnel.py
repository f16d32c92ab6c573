"""Neal's funnel: one coordinate sets the scale of all the others, so no single step size fits."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["Funnel", "funnel"]

_NECK_VARIANCE = 9.0


class Funnel:
    """v = x_0 ~ N(0, 9), the other coordinates N(0, exp(v)) given v; normalised.

    Made by `funnel`. Source: Neal, Annals of Statistics 31(3), 2003, section 8.
    """

    log_normalizer = 0.0

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.dim = dim
        self.dtype = dtype
        self.names = ["v", *(f"x{index}" for index in range(1, dim))]

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if x.shape[-1] != self.dim:
            raise InvalidInput(
                f"x has {x.shape[-1]} coordinates (shape {tuple(x.shape)}), the target has dim {self.dim}"
            )
        v, rest = x[..., 0], x[..., 1:]
        inverse_scale = (-v / 2).exp().unsqueeze(-1)
        # scaled before squaring: exp(-v) alone would overflow, and 0 * inf is NaN, twice as early
        return v, inverse_scale, rest * inverse_scale

    def _log_density(self, v: Tensor, squares: Tensor) -> Tensor:
        constant = self.dim / 2 * math.log(2 * math.pi) + math.log(_NECK_VARIANCE) / 2
        return -(v * v / _NECK_VARIANCE + squares + (self.dim - 1) * v) / 2 - constant

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Normalised log density."""
        v, _, standard = self._parts(x)
        return self._log_density(v, standard.square().sum(-1))

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score, in closed form."""
        v, inverse_scale, standard = self._parts(x)
        squares = standard.square().sum(-1)
        score_v = (squares - (self.dim - 1)) / 2 - v / _NECK_VARIANCE
        return self._log_density(v, squares), torch.cat([score_v.unsqueeze(-1), -standard * inverse_scale], -1)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Exact independent draws."""
        n = check_count("n", n, minimum=0)
        source = None if generator is None else generator.device
        eps = torch.randn(n, self.dim, dtype=self.dtype, device=source, generator=generator)
        v = math.sqrt(_NECK_VARIANCE) * eps[:, :1]
        return torch.cat([v, eps[:, 1:] * (v / 2).exp()], 1)


def funnel(dim: int = 10, dtype: torch.dtype = torch.float32) -> Funnel:
    """Neal's funnel in `dim` dimensions, at least 2; `dtype` is that of its draws. Raises `InvalidInput`."""
    return Funnel(check_count("dim", dim, minimum=2), dtype)
