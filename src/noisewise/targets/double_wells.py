"""The many-well problem: a product of two-dimensional double wells, with exact draws and normaliser."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["ManyWell", "many_well"]

# beyond +-5 the well has less than exp(-450) of its mass
_REACH = 5.0


class ManyWell:
    """Independent 2-D wells, log p(x1, x2) = -x1^4 + 6 x1^2 + x1 / 2 - x2^2 / 2 on coordinates (0, 1), (2, 3), ...

    2^(dim/2) modes. `log_normalizer` is 164.69568 for dim 32; `right_probability` is P(x1 > 0) = 0.844307 of each well.
    Made by `many_well`. Source: Midgley et al., ICLR 2023 (FAB), after Noé et al., Science 365, 2019.
    """

    def __init__(self, dim: int, dtype: torch.dtype = torch.float32) -> None:
        self.dim = dim
        self.dtype = dtype
        # the trapezoid rule converges geometrically on a smooth function that vanishes at both ends
        grid = torch.linspace(-_REACH, _REACH, 20001, dtype=torch.float64)
        step = 2 * _REACH / 20000
        mass = _log_well(grid).exp()
        z = float(mass.sum()) * step
        half = float(mass[10001:].sum() + mass[10000] / 2) * step
        # half a trapezoid rule ends where the integrand does not vanish: Euler-Maclaurin's first term, f'(0) h^2 / 12
        self.right_probability = (half + 0.5 * step**2 / 12) / z
        self.log_normalizer = dim // 2 * (math.log(z) + math.log(2 * math.pi) / 2)

    def _wells(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[-1] != self.dim:
            raise InvalidInput(
                f"x has {x.shape[-1]} coordinates (shape {tuple(x.shape)}), the target has dim {self.dim}"
            )
        return x[..., 0::2], x[..., 1::2]

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log density."""
        first, second = self._wells(x)
        return (_log_well(first) - second.square() / 2).sum(-1)

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score, in closed form."""
        first, second = self._wells(x)
        square = first.square()
        log_prob = ((6 - square) * square + first / 2 - second.square() / 2).sum(-1)
        return log_prob, torch.stack([(12 - 4 * square) * first + 0.5, -second], -1).flatten(-2)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Exact independent draws (rejection from a tight envelope, about 1.001 proposals each)."""
        n = check_count("n", n, minimum=0)
        wells = self.dim // 2
        first = _draw_wells(n * wells, generator).to(self.dtype).reshape(n, wells)
        source = None if generator is None else generator.device
        second = torch.randn(n, wells, dtype=self.dtype, device=source, generator=generator).cpu()
        return torch.stack([first, second], -1).flatten(-2)


def _log_well(x: Tensor) -> Tensor:
    return (6 - x * x) * x * x + x / 2


def _draw_wells(n: int, generator: torch.Generator | None) -> Tensor:
    """Rejection from a step function over the well: with its stationary points as knots, each step is a bound."""
    # -4 x^3 + 12 x + 1/2 = 0, by the trigonometric form of the cubic's roots
    angles = torch.arccos(torch.tensor(0.5 / 8, dtype=torch.float64)) / 3 - 2 * math.pi / 3 * torch.arange(3)
    knots = torch.cat([torch.linspace(-_REACH, _REACH, 4097, dtype=torch.float64), 2 * angles.cos()]).sort().values
    height = _log_well(knots)
    bound = torch.maximum(height[1:], height[:-1])
    width = knots.diff()
    cumulative = (bound.exp() * width).cumsum(0)
    device = torch.device("cpu") if generator is None else generator.device
    kept: list[Tensor] = []
    missing = n
    while missing > 0:
        proposals = missing + missing // 50 + 8
        u = torch.rand(3, proposals, dtype=torch.float64, device=device, generator=generator).cpu()
        step = torch.searchsorted(cumulative, u[0] * cumulative[-1]).clamp_(max=len(width) - 1)
        x = knots[step] + width[step] * u[1]
        accepted = x[u[2].log() <= _log_well(x) - bound[step]]
        kept.append(accepted[:missing])
        missing -= len(kept[-1])
    return torch.cat(kept) if kept else torch.empty(0, dtype=torch.float64)


def many_well(dim: int = 32, dtype: torch.dtype = torch.float32) -> ManyWell:
    """The many-well problem in `dim` dimensions, even and at least 2; `dtype` is that of its draws.

    Raises `InvalidInput` for an odd `dim`.
    """
    dim = check_count("dim", dim, minimum=2)
    if dim % 2:
        raise InvalidInput(f"dim must be even, two coordinates per well, got {dim}")
    return ManyWell(dim, dtype)
