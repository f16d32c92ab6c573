"""The two-dimensional data sets of the MM-Gibbs paper, as laws to draw from: four Gaussians, rings, roll, checkerboard."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.targets.gaussian_mixture import GaussianMixture

__all__ = ["TOYS", "Toy", "four_gaussians"]

# modes of deviation .2 at the corners of a square
_DEVIATION = 0.2


@dataclass(frozen=True)
class Toy:
    """A law in the plane: `sample(n, generator) -> [n, 2]`, float32, and the noise level `s` at which its model is trained."""

    name: str
    sample: Callable[[int, torch.Generator], Float[Tensor, "n 2"]]
    s: float


def four_gaussians(dtype: torch.dtype = torch.float32) -> GaussianMixture:
    """Four equally weighted Gaussians at (+-1, +-1) of deviation .2."""
    means = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]], dtype=dtype)
    return GaussianMixture(means, _DEVIATION**2)


def _rings(n: int, generator: torch.Generator) -> Tensor:
    """Circles of radius 1 and .5 with noise .05, times 1.3: the law of scikit-learn's make_circles in the paper."""
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    radius = torch.where(torch.rand(n, generator=generator) < 0.5, 1.0, 0.5)
    circle = radius.unsqueeze(-1) * torch.stack([angle.cos(), angle.sin()], -1)
    return 1.3 * (circle + 0.05 * torch.randn(n, 2, generator=generator))


def _roll(n: int, generator: torch.Generator) -> Tensor:
    """A spiral with noise .5, times .1: the first and third coordinate of scikit-learn's make_swiss_roll."""
    t = 1.5 * math.pi * (1 + 2 * torch.rand(n, generator=generator))
    spiral = torch.stack([t * t.cos(), t * t.sin()], -1)
    return 0.1 * (spiral + 0.5 * torch.randn(n, 2, generator=generator))


def _checkerboard(n: int, generator: torch.Generator) -> Tensor:
    """Uniform on the eight dark squares of a 4 x 4 board over [-2, 2]^2."""
    x = torch.randint(4, (n,), generator=generator)
    y = 2 * torch.randint(2, (n,), generator=generator) + x % 2
    corner = torch.stack([x, y], -1).float() - 2
    return corner + torch.rand(n, 2, generator=generator)


TOYS = (
    Toy("MoG4", four_gaussians().sample, 0.3),
    Toy("rings", _rings, 0.2),
    Toy("swiss roll", _roll, 0.2),
    Toy("checkerboard", _checkerboard, 0.3),
)
