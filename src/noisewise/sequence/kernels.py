"""The sub-kernels of a multi-resolution convolution: few parameters each, twice as long from one resolution to the next."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["KINDS", "SubKernels", "resolutions"]

KINDS = ("dilated", "fourier", "sparse", "fourier+sparse", "dense")
# both parts of a mixed kernel start with half of its variance
_MIXED = math.sqrt(0.5)


class Resolution(NamedTuple):
    """Sub-kernel `index` has lags 0 to `support` - 1; `period` is l_0 2^index, which the last one may exceed `support` by."""

    index: int
    period: int
    support: int


def resolutions(length: int, kernel_size: int) -> tuple[Resolution, ...]:
    """Lengths l_0, 2 l_0, 4 l_0, ... up to the first that covers `length`, which is cropped to it."""
    count = (-(-length // kernel_size) - 1).bit_length() + 1
    return tuple(Resolution(i, kernel_size << i, min(kernel_size << i, length)) for i in range(count))


class SubKernels(nn.Module):
    """The sub-kernels k_i of all resolutions, in `directions` sets (2: one for the past, one for the future).

    `kind`: "dilated", `kernel_size` taps at distance 2^i; "fourier", the `modes` lowest frequencies of the period;
    "sparse", `taps` lags drawn once from `seed`; "fourier+sparse", both with a learned weight for each channel;
    "dense", every lag is free. Raises `InvalidInput` for another kind and for sizes that do not fit.
    Source: Cunningham et al., NeurIPS 2024 (arXiv 2408.09453), section 4; starting values are ours.
    """

    def __init__(
        self, channels: int, length: int, kind: str, kernel_size: int, directions: int = 1,
        modes: int | None = None, taps: int | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        if kind not in KINDS:
            raise InvalidInput(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
        self.kind, self.parts = kind, tuple(kind.split("+"))
        self.channels, self.directions = check_count("d_model", channels), directions
        kernel_size = check_count("kernel_size", kernel_size, 2)
        self.resolutions = resolutions(check_count("length", length), kernel_size)
        highest = kernel_size // 2 + 1
        self.modes = highest - 1 if modes is None else check_count("modes", modes)
        if "fourier" in self.parts and self.modes > highest:
            raise InvalidInput(
                f"modes={self.modes} are more frequencies than kernel_size={kernel_size} taps can hold: at most {highest}"
            )
        self.taps = kernel_size if taps is None else check_count("taps", taps)
        if "sparse" in self.parts and self.taps > kernel_size:
            raise InvalidInput(
                f"taps={self.taps} do not fit into the shortest sub-kernel: at most kernel_size={kernel_size}"
            )
        generator = torch.Generator().manual_seed(seed)
        for part in self.parts:
            for resolution in self.resolutions:
                self._add(part, resolution, generator)
        if len(self.parts) > 1:
            shape = (len(self.parts), len(self.resolutions), directions, channels, 1)
            self.mix = nn.Parameter(torch.full(shape, _MIXED))

    def _add(self, part: str, r: Resolution, generator: torch.Generator) -> None:
        rows = (self.directions, self.channels)
        count = {"dilated": len(self.lags_of_dilated(r)), "sparse": self._taps_of(r), "dense": r.support}.get(part, 0)
        if part == "sparse":
            # a buffer that is saved: other lags with these weights would be another kernel
            chosen = [torch.randperm(r.support, generator=generator)[:count] for _ in range(math.prod(rows))]
            self.register_buffer(f"lags_{r.index}", torch.stack(chosen).sort(-1).values.reshape(*rows, count))
        shape = (*rows, self.modes, 2) if part == "fourier" else (*rows, count)
        scale = 1.0 if part == "fourier" else count**-0.5
        self.register_parameter(f"{part}_{r.index}", nn.Parameter(scale * torch.randn(shape, generator=generator)))

    def forward(self) -> list[Float[Tensor, "direction channel lag"]]:
        """All sub-kernels, cropped to the length."""
        return [self.kernel(r) for r in self.resolutions]

    def kernel(self, r: Resolution) -> Float[Tensor, "direction channel lag"]:
        """k_i, of `r.support` lags."""
        made = [getattr(self, f"_{part}")(r) for part in self.parts]
        if len(made) == 1:
            return made[0]
        return sum((self.mix[part, r.index] * one for part, one in enumerate(made)), torch.zeros_like(made[0]))

    def lags_of_dilated(self, r: Resolution) -> Int[Tensor, " tap"]:
        """0, 2^i, 2 2^i, ..., as many as lie inside."""
        return torch.arange(0, r.support, r.period // self.resolutions[0].period)

    def lags(self, r: Resolution) -> Int[Tensor, "direction channel tap"]:
        """The lags of the sparse part."""
        return getattr(self, f"lags_{r.index}")

    def coefficients(self, r: Resolution) -> Tensor:
        """Complex a_n, [direction, channel, modes], with k_i[t] = Re sum_n a_n exp(2 pi j n t / period), and the mix in them."""
        a = torch.view_as_complex(getattr(self, f"fourier_{r.index}").contiguous()) * self._unit(r)
        weight = torch.full((self.modes, 1), 2.0, device=a.device)
        # zero frequency and half the period stand once in a real series, and their imaginary parts count for nothing
        weight[0] = 1.0
        if 2 * (self.modes - 1) == r.period:
            weight[-1] = 1.0
        a = torch.where(weight.squeeze(-1) == 1.0, a.real.to(a), a) * weight.squeeze(-1)
        return a * self.mix[0, r.index] if len(self.parts) > 1 else a

    def _unit(self, r: Resolution) -> float:
        # sub-kernels then start near unit energy, whatever their length
        return (2 * self.modes * r.period) ** -0.5

    def _taps_of(self, r: Resolution) -> int:
        return min(self.taps, r.support)

    def _dilated(self, r: Resolution) -> Tensor:
        step = r.period // self.resolutions[0].period
        made = self.dilated_at(r).new_zeros(self.directions, self.channels, r.support)
        made[..., ::step] = self.dilated_at(r)
        return made

    def dilated_at(self, r: Resolution) -> Float[Tensor, "direction channel tap"]:
        """The weights of the dilated part."""
        return getattr(self, f"dilated_{r.index}")

    def sparse_at(self, r: Resolution) -> Float[Tensor, "direction channel tap"]:
        """The weights of the sparse part, with the mix in them."""
        weights = getattr(self, f"sparse_{r.index}")
        return weights * self.mix[-1, r.index] if len(self.parts) > 1 else weights

    def _fourier(self, r: Resolution) -> Tensor:
        a = torch.view_as_complex(getattr(self, f"fourier_{r.index}").contiguous())
        return (torch.fft.irfft(a, r.period, norm="forward") * self._unit(r))[..., : r.support]

    def _sparse(self, r: Resolution) -> Tensor:
        weights = getattr(self, f"sparse_{r.index}")
        return weights.new_zeros(self.directions, self.channels, r.support).scatter(-1, self.lags(r), weights)

    def _dense(self, r: Resolution) -> Tensor:
        return getattr(self, f"dense_{r.index}")
