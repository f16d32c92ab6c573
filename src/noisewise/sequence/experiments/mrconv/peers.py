"""The layers that stand beside MRConv, each from (batch, d_model, length) to the same, so that one block holds any of them.

S4D, SGConv and MultiresNet are written anew from their papers, as plainly as their minimal versions; none has a fused kernel.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from noisewise.sequence.convolution import long_conv

__all__ = ["GRU", "S4D", "BothWays", "DilatedStack", "FreeKernel", "MultiresNet", "SGConv", "Transformer"]


class _Convolution(nn.Module):
    """u * kernel(length) + skip u. `of_kernel`: names of the parameters that get the kernel's learning rate and no decay."""

    of_kernel: tuple[str, ...] = ()

    def __init__(self, d_model: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.skip = nn.Parameter(nn.init.normal_(torch.empty(d_model)))

    def kernel(self, length: int) -> Float[Tensor, "channel lag"]:
        """Lags 0 to `length` - 1, the skip not among them."""
        raise NotImplementedError

    def forward(self, u: Float[Tensor, "batch channel length"]) -> Float[Tensor, "batch channel length"]:
        """Causal."""
        return long_conv(u, self.kernel(u.shape[-1])) + self.skip.unsqueeze(-1) * u

    @torch.no_grad()
    def at_rate(self, rate: float) -> "FrozenKernel":
        """The kernel for signals with `rate` times as many samples a second: stretched by linear interpolation, over `rate`."""
        whole = self.kernel(self.length)
        lags = torch.arange(max(1, round(rate * whole.shape[-1])), dtype=torch.float64) / rate
        below = lags.floor().long().clamp(max=whole.shape[-1] - 1)
        share = (lags - below).to(whole)
        above = (below + 1).clamp(max=whole.shape[-1] - 1)
        return FrozenKernel((whole[:, below] * (1 - share) + whole[:, above] * share) / rate, self.skip)


class FrozenKernel(nn.Module):
    """u * kernel + skip u with fixed numbers."""

    def __init__(self, kernel: Float[Tensor, "channel lag"], skip: Float[Tensor, " channel"]) -> None:
        super().__init__()
        self.register_buffer("taps", kernel.detach().clone())
        self.register_buffer("skip", skip.detach().clone())

    taps: Tensor
    skip: Tensor

    def forward(self, u: Float[Tensor, "batch channel length"]) -> Float[Tensor, "batch channel length"]:
        """Causal."""
        return long_conv(u, self.taps) + self.skip.unsqueeze(-1) * u


class S4D(_Convolution):
    """The diagonal state space x' = A x + u, y = 2 Re C x, held constant between samples; its kernel is a Vandermonde product.

    `state`: real numbers in each channel's state. A starts at -1/2 + i pi n (S4D-Lin).
    Source: Gu, Gupta, Goel & Re, NeurIPS 2022 (arXiv 2206.11893).
    """

    of_kernel = ("log_dt", "log_decay", "frequency")

    def __init__(self, d_model: int, length: int, state: int = 64) -> None:
        super().__init__(d_model, length)
        low, high = math.log(1e-3), math.log(1e-1)
        self.log_dt = nn.Parameter(low + (high - low) * nn.init.uniform_(torch.empty(d_model)))
        self.C = nn.Parameter(nn.init.normal_(torch.empty(d_model, state // 2, 2)) * math.sqrt(0.5))
        self.log_decay = nn.Parameter(torch.full((d_model, state // 2), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(state // 2).repeat(d_model, 1).float())

    def discrete(self) -> tuple[Tensor, Tensor]:
        """(factor of the state from one sample to the next, C times the input's factor), both [channel, state / 2]."""
        A = torch.complex(-self.log_decay.exp(), self.frequency)
        turn = A * self.log_dt.exp().unsqueeze(-1)
        return turn.exp(), torch.view_as_complex(self.C) * (turn.exp() - 1) / A

    def kernel(self, length: int) -> Float[Tensor, "channel lag"]:
        """2 Re sum_n C_n (exp(dt A_n) - 1) / A_n exp(dt A_n lag)."""
        A = torch.complex(-self.log_decay.exp(), self.frequency)
        turn = A * self.log_dt.exp().unsqueeze(-1)
        powers = (turn.unsqueeze(-1) * torch.arange(length, device=turn.device)).exp()
        return 2 * torch.einsum("cn,cnl->cl", self.discrete()[1], powers).real

    @torch.no_grad()
    def at_rate(self, rate: float) -> FrozenKernel:
        """Samples lie dt / `rate` apart: the same system, sampled anew."""
        kept = self.log_dt.clone()
        self.log_dt.sub_(math.log(rate))
        made = FrozenKernel(self.kernel(max(1, round(rate * self.length))), self.skip)
        self.log_dt.copy_(kept)
        return made


class SGConv(_Convolution):
    """A kernel of pieces one behind the other, each twice as long as the one before, as many parameters and half the size.

    Pieces are stretched by linear interpolation; the kernel's norm of the first forward pass is divided out for good.
    Source: Li, Cai, Zhang, Chen & Dey, ICLR 2023 (arXiv 2210.09298).
    """

    of_kernel = ("pieces",)

    norm: Tensor

    def __init__(self, d_model: int, length: int, kernel_size: int = 64) -> None:
        super().__init__(d_model, length)
        scales = 1 + max(0, math.ceil(math.log2(length / kernel_size)))
        self.pieces = nn.Parameter(nn.init.normal_(torch.empty(scales, d_model, kernel_size)))
        self.register_buffer("norm", torch.zeros(d_model, 1))

    def unscaled(self) -> Float[Tensor, "channel lag"]:
        """All lags, as many as the pieces have together, before the norm is divided out."""
        scales = len(self.pieces)
        made = []
        for i, piece in enumerate(self.pieces):
            stretch = 2 ** max(0, i - 1)
            long = functional.interpolate(piece.unsqueeze(0), scale_factor=float(stretch), mode="linear").squeeze(0)
            made.append(2.0 ** (scales - 1 - i) * long)
        return torch.cat(made, -1)

    def kernel(self, length: int) -> Float[Tensor, "channel lag"]:
        """Cropped to `length`."""
        whole = self.unscaled()
        if not bool(self.norm.any()):
            self.norm.copy_(whole.detach().norm(dim=-1, keepdim=True))
        return whole[:, :length] / self.norm


class FreeKernel(_Convolution):
    """As many parameters as lags."""

    of_kernel = ("taps",)

    def __init__(self, d_model: int, length: int) -> None:
        super().__init__(d_model, length)
        self.taps = nn.Parameter(nn.init.normal_(torch.empty(d_model, length)) * length**-0.5)

    def kernel(self, length: int) -> Float[Tensor, "channel lag"]:
        """The parameters."""
        return self.taps[:, :length]


class MultiresNet(nn.Module):
    """A wavelet-like cascade: two short filters, shared by all levels, at dilations 1, 2, 4, ..., and a weight for each level.

    Source: Shi, Wang & Fox, ICML 2023 (arXiv 2305.01638).
    """

    def __init__(self, d_model: int, length: int, kernel_size: int = 4) -> None:
        super().__init__()
        self.depth = math.ceil(math.log2((length - 1) / (kernel_size - 1) + 1))
        bound = math.sqrt(2.0) / math.sqrt(2 * kernel_size)
        self.low = nn.Parameter(bound * (2 * nn.init.uniform_(torch.empty(d_model, 1, kernel_size)) - 1))
        self.high = nn.Parameter(bound * (2 * nn.init.uniform_(torch.empty(d_model, 1, kernel_size)) - 1))
        scale = math.sqrt(2.0) / math.sqrt(2 * self.depth + 2)
        # of the input, of each level's detail, of what is left at the end
        self.weights = nn.Parameter(scale * (2 * nn.init.uniform_(torch.empty(d_model, self.depth + 2)) - 1))

    def forward(self, u: Float[Tensor, "batch channel length"]) -> Float[Tensor, "batch channel length"]:
        """Causal."""
        rest = u
        y = self.weights[:, :1] * u
        for level in range(self.depth):
            detail = _causal(rest, self.high, 2**level)
            rest = _causal(rest, self.low, 2**level)
            y = y + self.weights[:, level + 1 : level + 2] * detail
        return y + self.weights[:, -1:] * rest


class DilatedStack(nn.Module):
    """Depthwise causal convolutions of `taps` at dilations 1, 2, 4, ... until they see `length`, with GELU and residuals."""

    def __init__(self, d_model: int, length: int, taps: int = 16) -> None:
        super().__init__()
        levels = max(1, math.ceil(math.log2((length - 1) / (taps - 1) + 1)))
        self.taps = nn.Parameter(nn.init.normal_(torch.empty(levels, d_model, 1, taps)) * taps**-0.5)
        self.bias = nn.Parameter(torch.zeros(levels, d_model))

    def forward(self, u: Float[Tensor, "batch channel length"]) -> Float[Tensor, "batch channel length"]:
        """Causal."""
        for level, (taps, bias) in enumerate(zip(self.taps, self.bias, strict=True)):
            u = u + functional.gelu(_causal(u, taps, 2**level) + bias.unsqueeze(-1))
        return u


class GRU(nn.Module):
    """One recurrent layer of torch."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.gru = nn.GRU(d_model, d_model, batch_first=True)

    def forward(self, u: Float[Tensor, "batch channel length"]) -> Float[Tensor, "batch channel length"]:
        """Causal."""
        return self.gru(u.mT)[0].mT


class Transformer(nn.Module):
    """torch's encoder, pre-norm, with a learned vector for each position; every step sees every other.

    `layers`: of the encoder. It takes the place of a whole stack of blocks.
    """

    def __init__(self, d_model: int, length: int, layers: int = 2, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.02 * nn.init.normal_(torch.empty(length, d_model)))
        layer = nn.TransformerEncoderLayer(
            d_model, heads, 2 * d_model, dropout, "gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(
        self, u: Float[Tensor, "batch channel length"], lengths: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channel length"]:
        """Looks both ways, but not behind the end of a row."""
        behind = None if lengths is None else torch.arange(u.shape[-1], device=u.device) >= lengths.unsqueeze(-1)
        return self.encoder(u.mT + self.positions[: u.shape[-1]], src_key_padding_mask=behind).mT


class BothWays(nn.Module):
    """The sum of two layers, one of which reads the signal from its end."""

    def __init__(self, ahead: nn.Module, back: nn.Module) -> None:
        super().__init__()
        self.ahead, self.back = ahead, back

    @classmethod
    def of(cls, layer: Callable[[int, int], nn.Module]) -> Callable[[int, int], nn.Module]:
        """What makes two of what `layer` makes."""
        return lambda d_model, length: cls(layer(d_model, length), layer(d_model, length))

    def forward(
        self, u: Float[Tensor, "batch channel length"], lengths: Int[Tensor, " batch"] | None = None
    ) -> Float[Tensor, "batch channel length"]:
        """`u` is 0 behind the end of a row, so reading it from behind begins with zeros."""
        return self.ahead(u) + self.back(u.flip(-1)).flip(-1)

    @torch.no_grad()
    def at_rate(self, rate: float) -> "BothWays":
        """Both of them."""
        return BothWays(self.ahead.at_rate(rate), self.back.at_rate(rate))  # type: ignore[operator]


def _causal(u: Tensor, filters: Float[Tensor, "channel 1 tap"], dilation: int) -> Tensor:
    """y[t] = sum_j filters[j] u[t - dilation j]."""
    reach = dilation * (filters.shape[-1] - 1)
    return functional.conv1d(functional.pad(u, (reach, 0)), filters.flip(-1), dilation=dilation, groups=len(filters))
