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

    index: int  # type: ignore[assignment]  # tuples have a method of that name
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

    def forward(self) -> list[Float[Tensor, "direction channel _"]]:
        """All sub-kernels, cropped to the length."""
        return [self.kernel(r) for r in self.resolutions]

    def kernel(self, r: Resolution) -> Float[Tensor, "direction channel lag"]:
        """k_i, of `r.support` lags."""
        made = [getattr(self, f"_{part}")(r) for part in self.parts]
        if len(made) == 1:
            return made[0]
        return sum((self.mix[part, r.index] * one for part, one in enumerate(made)), torch.zeros_like(made[0]))

    def at_rate(self, rate: float | int) -> list[Float[Tensor, "direction channel _"]]:
        """Sub-kernels for a signal that is sampled `rate` times as often: k'(t) = k(t / rate) / rate.

        Frequencies keep their period in time, those beyond half the new rate are dropped, and between the samples nothing is
        guessed. Single taps keep their weight and move to lag `rate` times theirs, shared between the two nearest ones; dense
        kernels are interpolated.
        """
        found = []
        for r in self.resolutions:
            lags = max(1, round(rate * r.support))
            own = [getattr(self, f"_{part}_at_rate")(r, rate, lags) for part in self.parts]
            mixed = [self.mix[part, r.index] * one for part, one in enumerate(own)] if len(own) > 1 else own
            found.append(sum(mixed, torch.zeros_like(own[0])))
        return found

    def lags_of_dilated(self, r: Resolution) -> Int[Tensor, " tap"]:
        """0, 2^i, 2 2^i, ..., as many as lie inside."""
        return torch.arange(0, r.support, r.period // self.resolutions[0].period)

    def lags(self, r: Resolution) -> Int[Tensor, "direction channel tap"]:
        """The lags of the sparse part."""
        return getattr(self, f"lags_{r.index}")

    def coefficients(self, r: Resolution) -> Tensor:
        """a_n of the fourier part, [direction, channel, mode]: k_i[t] = Re sum_n a_n exp(2 pi j n t / period), mix included."""
        a = self._amplitudes(r)
        return a * self.mix[0, r.index] if len(self.parts) > 1 else a

    def _amplitudes(self, r: Resolution) -> Tensor:
        a = self._complex(r) * self._unit(r)
        # zero frequency and half the period stand once in a real series, and their imaginary parts count for nothing
        once = torch.zeros(self.modes, dtype=torch.bool, device=a.device)
        once[0], once[-1] = True, self.modes == 1 or 2 * (self.modes - 1) == r.period
        return torch.where(once, a.real.to(a), 2 * a)

    def _unit(self, r: Resolution) -> float:
        # sub-kernels then start near unit energy, whatever their length
        return (2 * self.modes * r.period) ** -0.5

    def _complex(self, r: Resolution) -> Tensor:
        pairs = getattr(self, f"fourier_{r.index}")
        # there are no complex numbers and no FFTs of half precision
        return torch.view_as_complex(pairs.to(torch.promote_types(pairs.dtype, torch.float32)).contiguous())

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
        a = self._complex(r)
        return (torch.fft.irfft(a, r.period, norm="forward") * self._unit(r))[..., : r.support]

    def _sparse(self, r: Resolution) -> Tensor:
        weights = getattr(self, f"sparse_{r.index}")
        return weights.new_zeros(self.directions, self.channels, r.support).scatter(-1, self.lags(r), weights)

    def _dense(self, r: Resolution) -> Tensor:
        return getattr(self, f"dense_{r.index}")

    def _fourier_at_rate(self, r: Resolution, rate: float | int, lags: int) -> Tensor:
        a = self._amplitudes(r)[..., : int(rate * r.period / 2) + 1]
        time = torch.arange(lags, dtype=torch.float64, device=a.device) / (rate * r.period)
        angle = 2 * math.pi * torch.arange(a.shape[-1], dtype=torch.float64, device=a.device).unsqueeze(-1) * time
        return (a.real.double() @ angle.cos() - a.imag.double() @ angle.sin()).to(a.real) / rate

    def _dilated_at_rate(self, r: Resolution, rate: float | int, lags: int) -> Tensor:
        weights = self.dilated_at(r)
        return _moved(self.lags_of_dilated(r).to(weights.device).expand_as(weights), weights, rate, lags)

    def _sparse_at_rate(self, r: Resolution, rate: float | int, lags: int) -> Tensor:
        return _moved(self.lags(r), getattr(self, f"sparse_{r.index}"), rate, lags)

    def _dense_at_rate(self, r: Resolution, rate: float | int, lags: int) -> Tensor:
        weights = self._dense(r)
        at = (torch.arange(lags, device=weights.device) / rate).clamp(max=r.support - 1)
        low, share = at.long(), at - at.floor()
        return torch.lerp(weights[..., low], weights[..., (low + 1).clamp(max=r.support - 1)], share.to(weights)) / rate


def _moved(lags: Tensor, weights: Tensor, rate: float | int, count: int) -> Tensor:
    """Taps at `rate` times their lags, each shared linearly between the two lags around it; none falls off the end."""
    at = (lags * rate).clamp(max=count - 1)
    low, share = at.long(), (at - at.floor()).to(weights)
    made = weights.new_zeros(*weights.shape[:-1], count)
    made = made.scatter_add(-1, low, weights * (1 - share))
    return made.scatter_add(-1, (low + 1).clamp(max=count - 1), weights * share)
