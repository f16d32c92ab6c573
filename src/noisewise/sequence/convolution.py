"""Long depthwise convolutions by FFT: the causal one, the one that looks both ways, and the lengths that FFTs like."""

import functools
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from noisewise.errors import InvalidInput

__all__ = ["convolved", "fast_length", "kernel_gradient", "long_conv", "spectrum_of"]


@functools.lru_cache(maxsize=256)
def fast_length(n: int) -> int:
    """The smallest even 2^a 3^b 5^c that is at least `n`: FFTs of other lengths can take several times as long."""
    best = 1 << max(n - 1, 1).bit_length()
    five = 1
    while five < best:
        three = five
        while three < best:
            # the power of two that lifts it to n, and at least one, so that the length is even
            best = min(best, three * 2 ** max((-(-n // three) - 1).bit_length(), 1))
            three *= 3
        five *= 5
    return best


def long_conv(
    u: Float[Tensor, "batch channel length"],
    kernel: Float[Tensor, "channel lag"],
    backward: Float[Tensor, "channel lag"] | None = None,
) -> Float[Tensor, "batch channel length"]:
    """y[t] = sum_j kernel[j] u[t - j], and + sum_j backward[j] u[t + j] where that is given; zeros lie around `u`.

    Lag 0 belongs to both kernels. Lags of `length` and more meet nothing and are left out. Half precision is computed in
    float32; the result has the dtype of `u`. Time O(length log length) for each channel of each row. Differentiable once.
    Raises `InvalidInput` for kernels of other channels.
    """
    if kernel.shape[0] != u.shape[1]:
        raise InvalidInput(
            f"the kernel has {kernel.shape[0]} channels, the input {u.shape[1]}: give (batch, channel, length)"
        )
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    kernels = kernel.unsqueeze(0) if backward is None else _both(kernel, backward)
    n = fast_length(2 * u.shape[-1] - 1)
    return convolved(wide, torch.fft.rfft(wide.detach(), n), kernels.to(wide), n).to(u)


def convolved(
    u: Float[Tensor, "batch channel length"], spectrum: Tensor, kernels: Float[Tensor, "direction channel lag"], n: int,
    constant: Float[Tensor, "rows channel #length"] | None = None,
) -> Float[Tensor, "batch channel length"]:  # fmt: skip
    """`long_conv` by both directions of `kernels`, where the transform of `u` of size `n` is at hand; `constant` is added."""
    if torch.is_grad_enabled() and (u.requires_grad or kernels.requires_grad):
        return _Convolution.apply(u, spectrum, kernels, n, constant)
    y = torch.fft.irfft(spectrum * spectrum_of(kernels, u.shape[-1], n), n)[..., : u.shape[-1]]
    return y if constant is None else y + constant


def spectrum_of(kernels: Float[Tensor, "direction channel lag"], length: int, n: int) -> Tensor:
    """The transform of size `n` of kernels cropped to `length` lags; those of the second direction are negative."""
    past = torch.fft.rfft(kernels[0, :, :length], n)
    # the transform of a reversed sequence is the conjugate
    return past if len(kernels) == 1 else past + torch.fft.rfft(kernels[1, :, :length], n).conj()


def _both(kernel: Tensor, backward: Tensor) -> Tensor:
    lags = max(kernel.shape[-1], backward.shape[-1])
    return torch.stack([functional.pad(k, (0, lags - k.shape[-1])) for k in (kernel, backward)])


class _Convolution(torch.autograd.Function):
    """Torch would differentiate a real FFT by a complex one of twice the work; a correlation needs real ones alone."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, spectrum: Tensor, kernels: Tensor, n: int, constant: Tensor | None) -> Tensor:
        length = u.shape[-1]
        other = spectrum_of(kernels, length, n)
        ctx.save_for_backward(spectrum, other)
        ctx.sizes = length, kernels.shape[-1], len(kernels), n
        ctx.constant = None if constant is None else constant.shape
        y = torch.fft.irfft(spectrum * other, n)[..., :length]
        return y.contiguous() if constant is None else y + constant

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (spectrum, other), (length, lags, directions, n) = ctx.saved_tensors, ctx.sizes
        g = torch.fft.rfft(gradient, n)
        to_u = torch.fft.irfft(g * other.conj(), n)[..., :length] if ctx.needs_input_grad[0] else None
        to_kernels = kernel_gradient(g, spectrum, directions, min(lags, length), n)
        to_constant = None if ctx.constant is None else gradient.sum_to_size(ctx.constant)
        return to_u, None, functional.pad(to_kernels, (0, max(0, lags - length))), None, to_constant


def kernel_gradient(
    g: Tensor, spectrum: Tensor, directions: int, lags: int, n: int
) -> Float[Tensor, "direction channel lag"]:
    """sum over rows and times of g[t] u[t - j], and of g[t] u[t + j], from the transforms of both; no lag may be cut off."""
    crossed = torch.fft.irfft((g * spectrum.conj()).sum(0), n)
    if directions == 1:
        return crossed[..., :lags].unsqueeze(0)
    return torch.stack([crossed[..., :lags], torch.cat([crossed[..., :1], crossed[..., n - lags + 1 :].flip(-1)], -1)])
