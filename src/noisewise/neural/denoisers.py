"""Networks for the score of noisy densities, all read as denoised means: D(y, sigma) = y + sigma^2 score(y).

Source of the preconditioning: Karras et al., NeurIPS 2022 (EDM), for data of unit variance; the raw form is that of
He et al., AISTATS 2025, arXiv 2410.12456.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.networks.egnn import EGNN
from noisewise.networks.mlp import MLP

__all__ = ["EGNNDenoiser", "MLPDenoiser", "RawDenoiser"]

_FREQUENCIES = tuple(0.25 * 2.0**k for k in range(8))
# random Fourier pairs of the position, and their scale in few dimensions, where modes are small and many
_FOURIER, _FOURIER_SCALE, _FOURIER_DIM = 64, 4.0, 8


class _Preconditioned(nn.Module):
    """c_skip y + c_out net(c_in y, log sigma): the denoiser of N(0, I) plus what the network adds."""

    def forward(self, y: Float[Tensor, "batch dim"], sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Denoised means."""
        s = sigma.unsqueeze(-1)
        c_in = (1 + s.square()).rsqrt()
        return c_in.square() * y + s * c_in * self._net(c_in * y, sigma.log())

    def _net(self, scaled: Tensor, log_sigma: Tensor) -> Tensor:
        raise NotImplementedError


class MLPDenoiser(_Preconditioned):
    """The MLP on the position, log sigma by sines and cosines, and, up to 8 dimensions, Fourier features of the position.

    It starts as the denoiser of N(0, I), which is right for no generator and wrong by a bounded amount for each.
    """

    waves: Tensor
    frequencies: Tensor

    def __init__(self, dim: int, hidden: int, depth: int, seed: int = 0) -> None:
        super().__init__()
        waves = _FOURIER if dim <= _FOURIER_DIM else 0
        generator = torch.Generator().manual_seed(seed + 1)
        # of the same spread in every dimension, so that features decorrelate over the same distance
        self.register_buffer(
            "waves", _FOURIER_SCALE * math.sqrt(2 / max(dim, 2)) * torch.randn(dim, waves, generator=generator)
        )
        self.register_buffer("frequencies", torch.tensor(_FREQUENCIES), persistent=False)
        self.net = MLP(dim + 2 * waves + 1 + 2 * len(_FREQUENCIES), dim, hidden, depth, seed=seed)
        last = self.net.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def _net(self, scaled: Tensor, log_sigma: Tensor) -> Tensor:
        level = log_sigma.unsqueeze(-1) / 2
        phase, wave = level * self.frequencies, scaled @ self.waves
        return self.net(torch.cat([scaled, level, phase.sin(), phase.cos(), wave.sin(), wave.cos()], 1))


class EGNNDenoiser(_Preconditioned):
    """The EGNN with log sigma as its condition; equivariant, for mean-free y."""

    def __init__(self, particles: int, space: int, hidden: int, layers: int, seed: int = 0) -> None:
        super().__init__()
        self.net = EGNN(particles, space, hidden, layers, time=True, seed=seed)

    def _net(self, scaled: Tensor, log_sigma: Tensor) -> Tensor:
        return self.net(scaled, log_sigma)


class RawDenoiser(nn.Module):
    """The published score network: an MLP of x_t = a y gives the score of x_t, each hidden layer told the level.

    `levels`: sigma of each, increasing; a row belongs to the nearest on the log scale. The level's index enters by fixed random
    Fourier features of frequencies N(0, 30^2), as in the official code. No preconditioning: on targets of large scale it
    learns slowly.
    """

    waves: Tensor
    log_levels: Tensor

    def __init__(self, dim: int, hidden: int, depth: int, levels: tuple[float, ...], seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed + 1)
        self.register_buffer("waves", 30 * torch.randn(hidden // 2, generator=generator))
        self.register_buffer("log_levels", torch.tensor(levels).log(), persistent=False)
        self.hidden = nn.ModuleList(_linear(dim if k == 0 else hidden, hidden, generator) for k in range(depth))
        self.told = nn.ModuleList(_linear(2 * len(self.waves), hidden, generator) for _ in range(depth))
        self.last = _linear(hidden, dim, generator)

    def forward(self, y: Float[Tensor, "batch dim"], sigma: Float[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Denoised means."""
        index = (sigma.log().unsqueeze(-1) - self.log_levels).abs().argmin(-1)
        phase = 2 * math.pi * index.unsqueeze(-1) * self.waves
        level = torch.cat([phase.sin(), phase.cos()], -1)
        a = (1 + sigma.square()).rsqrt().unsqueeze(-1)
        x = a * y
        for layer, told in zip(self.hidden, self.told, strict=True):
            x = nn.functional.silu(layer(x) + told(level))
        return y + sigma.square().unsqueeze(-1) * a * self.last(x)


def _linear(wide_in: int, wide_out: int, generator: torch.Generator) -> nn.Linear:
    # the usual constructor draws from the global generator
    layer = nn.utils.skip_init(nn.Linear, wide_in, wide_out)
    bound = 1 / math.sqrt(wide_in)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer
