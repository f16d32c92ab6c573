"""Long depthwise convolutions by FFT: the causal one, the one that looks both ways, and the lengths that FFTs like."""

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput

__all__ = ["fast_length", "long_conv", "spectrum_of"]


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
    float32; the result has the dtype of `u`. Time O(length log length) for each channel of each row. Raises `InvalidInput`
    for kernels of other channels.
    """
    if kernel.shape[0] != u.shape[1]:
        raise InvalidInput(f"the kernel has {kernel.shape[0]} channels, the input {u.shape[1]}: give (batch, channel, length)")
    length = u.shape[-1]
    wide = u.to(torch.promote_types(u.dtype, torch.float32))
    n = fast_length(2 * length - 1)
    spectrum = spectrum_of(kernel.to(wide), None if backward is None else backward.to(wide), length, n)
    return torch.fft.irfft(torch.fft.rfft(wide, n) * spectrum, n)[..., :length].to(u)


def spectrum_of(
    kernel: Float[Tensor, "*rows lag"], backward: Float[Tensor, "*rows lag"] | None, length: int, n: int
) -> Tensor:
    """The real FFT of size `n` of a kernel cropped to `length` lags; lags of `backward` are negative."""
    spectrum = torch.fft.rfft(kernel[..., :length], n)
    # the transform of a reversed sequence is the conjugate
    return spectrum if backward is None else spectrum + torch.fft.rfft(backward[..., :length], n).conj()
