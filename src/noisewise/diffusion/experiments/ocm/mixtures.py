"""Protocol A: nine Gaussians in the plane, whose noise, relative variance and full covariance are known at every state."""

import functools
import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.diffusion.experiments.ocm.noise_training import (
    NoisePlan,
    linear_alphas_cumprod,
    seeded,
    train_noise,
)
from noisewise.errors import InvalidInput
from noisewise.targets.gaussian_mixture import GaussianMixture

__all__ = ["C_MAX", "MIXTURES", "ExactNoise", "NoiseMLP", "mixture", "mixture_net", "relative_variance"]

MIXTURES = ("isotropic", "anisotropic")
# ((high - low) / 2)^2 of data that lie within 3.1 of 0 but for a few
C_MAX = 9.61
_GRID = (-3.0, 0.0, 3.0)
_DEVIATION, _LONG = 0.1, 0.6
_PLANS = {
    "quick": NoisePlan(200, 256, 2e-3, ema=0.98),
    "cpu": NoisePlan(4000, 256, 2e-3),
    "paper": NoisePlan(40_000, 1024, 1e-3, ema=0.9995),
}
_EMBEDDED = 64


@functools.lru_cache(maxsize=4)
def mixture(name: str) -> GaussianMixture:
    """Nine equally weighted Gaussians on {-3, 0, 3}^2, float64.

    "isotropic": of deviation .1. "anisotropic": of deviations .6 and .1, the long axis of the k-th (k = 0..8, the second
    coordinate fastest) turned by 20 k degrees.
    """
    if name not in MIXTURES:
        raise InvalidInput(f"name must be one of {', '.join(MIXTURES)}, got {name!r}")
    axis = torch.tensor(_GRID, dtype=torch.float64)
    means = torch.cartesian_prod(axis, axis)
    if name == "isotropic":
        return GaussianMixture(means, _DEVIATION**2)
    angle = math.pi * torch.arange(len(means), dtype=torch.float64) / len(means)
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], -1).reshape(-1, 2, 2)
    variances = torch.tensor([_LONG, _DEVIATION], dtype=torch.float64).square()
    return GaussianMixture(means, turn @ torch.diag(variances) @ turn.mT)


def relative_variance(
    name: str, x_t: Float[Tensor, "batch 2"], t: Int[Tensor, "*batch"] | int, full: bool = False
) -> Float[Tensor, "batch 2"] | Float[Tensor, "batch 2 2"]:
    """r = abar / (1 - abar) Cov[x0 | x_t], exact: its diagonal, or the matrix if `full`; of the dtype of `x_t`.

    `t`: level of all rows or of each, counted from 0. Computed in float64, level by level.
    """
    levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
    found = x_t.new_empty(len(x_t), 2, 2)
    for level in levels.unique().tolist():
        abar = float(linear_alphas_cumprod()[level])
        rows = levels == level
        a, s = math.sqrt(abar), math.sqrt(1 - abar)
        found[rows] = (abar / (1 - abar) * mixture(name).posterior(x_t[rows].double(), a, s)[1]).to(x_t)
    return found if full else found.diagonal(dim1=-2, dim2=-1)


class ExactNoise(nn.Module):
    """The noise that a perfect network predicts, E[eps | x_t], for the mixture `name`; differentiable.

    Each row may have its own `t`, which the mixture's score cannot: the components are widened in their own axes.
    """

    alphas_cumprod: Tensor
    means: Tensor
    variances: Tensor
    axes: Tensor

    def __init__(self, name: str) -> None:
        super().__init__()
        target = mixture(name)
        variances, axes = torch.linalg.eigh(target.full_covariances)
        self.register_buffer("alphas_cumprod", linear_alphas_cumprod())
        self.register_buffer("means", target.means)
        self.register_buffer("variances", variances)
        self.register_buffer("axes", axes)

    def forward(self, x: Float[Tensor, "batch 2"], t: Int[Tensor, "*batch"]) -> Float[Tensor, "batch 2"]:
        """E[eps | x_t = x] at level `t` (counted from 0), one for all rows or one each; of the dtype of `x`."""
        abar = self.alphas_cumprod[t].expand(len(x)).reshape(-1, 1, 1)
        offset = x.to(self.means).unsqueeze(1) - abar.sqrt() * self.means
        turned = torch.einsum("kji,bkj->bki", self.axes, offset)
        widened = abar * self.variances + 1 - abar
        whitened = turned / widened
        # equal weights and a common factor of the density drop out
        share = (-0.5 * (turned * whitened + widened.log()).sum(-1)).softmax(-1)
        pull = torch.einsum("bk,kij,bkj->bi", share, self.axes, whitened)
        return ((1 - abar).sqrt().squeeze(-1) * pull).to(x)


class NoiseMLP(nn.Module):
    """A small noise network for the plane: residual blocks with the time in each; `out` reads the last features.

    `hidden`: width of all layers and of the input of `out`. Weights are drawn from the global generator.
    """

    frequencies: Tensor

    def __init__(self, hidden: int = 128, blocks: int = 3) -> None:
        super().__init__()
        frequencies = torch.logspace(0, -4, _EMBEDDED // 2)
        self.register_buffer("frequencies", frequencies)
        self.time = nn.Sequential(nn.Linear(_EMBEDDED, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.enter = nn.Linear(2, hidden)
        self.blocks = nn.ModuleList(_Block(hidden) for _ in range(blocks))
        self.activation = nn.SiLU()
        self.out = nn.Linear(hidden, 2)

    def forward(self, x: Float[Tensor, "batch 2"], t: Int[Tensor, "*batch"]) -> Float[Tensor, "batch 2"]:
        """The predicted noise at level `t`, counted from 0, one for all rows or one each."""
        angle = t.to(x).expand(len(x)).unsqueeze(-1) * self.frequencies
        time = self.time(torch.cat([angle.sin(), angle.cos()], -1))
        h = self.enter(x)
        for block in self.blocks:
            h = block(h, time)
        return self.out(self.activation(h))


class _Block(nn.Module):
    """h + W (silu(V silu(h) + U time))."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.first, self.timed, self.last = (nn.Linear(hidden, hidden) for _ in range(3))
        self.activation = nn.SiLU()

    def forward(self, h: Tensor, time: Tensor) -> Tensor:
        return h + self.last(self.activation(self.first(self.activation(h)) + self.timed(time)))


@functools.lru_cache(maxsize=16)
def mixture_net(name: str, seed: int, scale: str) -> NoiseMLP:
    """A `NoiseMLP` trained on fresh draws of the mixture; float32, averaged weights, eval mode, frozen."""
    target = mixture(name).to(torch.float32)
    with seeded(seed):
        net = NoiseMLP()
    trained = train_noise(net, target.sample, linear_alphas_cumprod(), _PLANS[scale], seed)
    assert isinstance(trained, NoiseMLP)
    return trained
