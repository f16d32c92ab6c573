"""Long convolutions one input at a time, exactly: by their taps, by a sliding Fourier transform, or by relaxed blocks.

All three keep the last inputs in a ring. Taps cost as many products as the kernel has values that are not 0. A sum of
windowed exponentials is a recurrence of as many numbers as it has frequencies (the sliding DFT). Any other kernel is met in
blocks of growing size, each by one FFT (Fischer & Stockmeyer 1974; van der Hoeven 2002): O(log^2 length) a step on average.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.sequence.convolution import fast_length, long_conv

__all__ = ["Blocks", "Sliding", "StreamState", "Taps", "Way"]


@runtime_checkable
class Way(Protocol):
    """A convolution of the past: `memory` is its own part of a state, which it changes in place."""

    def memory(self, history: Tensor) -> dict[str, Tensor]:
        """What it keeps after the inputs `history`, [batch, channel, lags], oldest first and zeros before the first."""
        ...

    def step(self, u_t: Tensor, state: "StreamState", memory: dict[str, Tensor]) -> Tensor:
        """The output of the newest input, which stands in the ring already, [batch, channel]."""
        ...


@dataclass
class StreamState:
    """Where a stream stands; `step` and `forward` change it in place and return it. It belongs to the weights of its start.

    `ring` holds one input more than the kernel has lags, that of step t at t modulo its size; `position`: inputs so far, `since`:
    since the memories were made.
    """

    kernel: Float[Tensor, "channel lags"]
    bias: Float[Tensor, " channel"]
    ways: tuple[Way, ...]
    ring: Float[Tensor, "batch channel size"]
    memories: list[dict[str, Tensor]]
    position: int = 0
    since: int = 0

    @classmethod
    def start(cls, kernel: Tensor, bias: Tensor, ways: tuple[Way, ...], batch: int) -> "StreamState":
        """Before the first input; all inputs before it are zeros."""
        ring = kernel.new_zeros(batch, kernel.shape[0], kernel.shape[1] + 1)
        return cls(kernel, bias, ways, ring, [way.memory(ring) for way in ways])

    def history(self) -> Float[Tensor, "batch channel size"]:
        """The inputs in the ring, oldest first."""
        return self.ring.roll(-(self.position % self.ring.shape[-1]), -1)

    @torch.no_grad()
    def step(self, u_t: Float[Tensor, "batch channel"]) -> Float[Tensor, "batch channel"]:
        """Take one input of each row, give its output."""
        self._check(u_t, u_t.shape)
        own = u_t.to(self.ring)
        self.ring[..., self.position % self.ring.shape[-1]] = own
        self.position += 1
        self.since += 1
        y = self.bias.expand_as(own).clone()
        for way, memory in zip(self.ways, self.memories, strict=True):
            y += way.step(own, self, memory)
        return y.to(u_t)

    @torch.no_grad()
    def take(self, u: Float[Tensor, "batch channel length"]) -> Float[Tensor, "batch channel length"]:
        """Take a chunk of any length, by one FFT over it and what the kernel still sees before it."""
        self._check(u, u.shape[:-1])
        if not u.shape[-1]:
            return u.clone()
        seen = torch.cat([self.history(), u.to(self.ring)], -1)
        # the ring is two inputs longer than what the kernel sees before the first of the chunk
        y = long_conv(seen[..., 2:], self.kernel)[..., -u.shape[-1] :] + self.bias.unsqueeze(-1)
        last = seen[..., -self.ring.shape[-1] :]
        self.position += u.shape[-1]
        self.since = 0
        self.ring.copy_(last.roll(self.position % self.ring.shape[-1], -1))
        self.memories[:] = [way.memory(last) for way in self.ways]
        return y.to(u)

    def _check(self, u: Tensor, rows: torch.Size) -> None:
        if tuple(rows) != tuple(self.ring.shape[:2]):
            raise InvalidInput(
                f"the stream has {self.ring.shape[0]} rows of {self.ring.shape[1]} channels, got an input of shape "
                f"{tuple(u.shape)}: start another with init_state(batch)"
            )
        if not u.is_floating_point() or not bool(torch.isfinite(u).all()):
            raise InvalidInput("inputs of a stream must be finite floating-point numbers: one NaN would stay in it")


@dataclass(frozen=True)
class Taps:
    """sum_j weights[j] u[t - lags[j]]."""

    lags: Int[Tensor, "channel tap"]
    weights: Float[Tensor, "channel tap"]

    @classmethod
    def of(cls, kernel: Float[Tensor, "channel lag"]) -> "Taps":
        """The lags whose weight is not 0 in any channel."""
        lags = kernel.abs().sum(0).nonzero().squeeze(-1)
        return cls(lags.expand(len(kernel), -1), kernel[:, lags])

    def memory(self, history: Tensor) -> dict[str, Tensor]:
        """The ring is enough."""
        return {}

    def step(self, u_t: Tensor, state: StreamState, memory: dict[str, Tensor]) -> Tensor:
        """One gather."""
        index = (state.position - 1 - self.lags) % state.ring.shape[-1]
        return (state.ring.gather(-1, index.expand(len(u_t), -1, -1)) * self.weights).sum(-1)


@dataclass(frozen=True)
class Sliding:
    """sum_i sum_n Re(a_in S_in[t]), S_in[t] = sum_{j < support_i} exp(2 pi i n j / period_i) u[t - j].

    S[t] = e^(i w) S[t - 1] + u[t] - e^(i w support) u[t - support]. The poles lie on the unit circle: rounding errors stay,
    so S is complex128.
    """

    coefficients: Tensor
    periods: tuple[int, ...]
    supports: tuple[int, ...]

    def _angles(self) -> Float[Tensor, "branch mode"]:
        modes = torch.arange(self.coefficients.shape[-1], dtype=torch.float64, device=self.coefficients.device)
        periods = torch.tensor(self.periods, dtype=torch.float64, device=modes.device)
        return 2 * math.pi * modes / periods.unsqueeze(-1)

    def memory(self, history: Tensor) -> dict[str, Tensor]:
        """S of each sub-kernel, [batch, branch, channel, mode], and the factors of the recurrence."""
        angles = self._angles()
        newest_first = history.flip(-1).double()
        sums = []
        for angle, support in zip(angles, self.supports, strict=True):
            lag = torch.arange(support, dtype=torch.float64, device=history.device)
            wave = torch.polar(torch.ones(1, dtype=torch.float64, device=lag.device), angle * lag.unsqueeze(-1))
            sums.append(newest_first[..., :support].to(wave) @ wave)
        supports = torch.tensor(self.supports, dtype=torch.float64, device=history.device).unsqueeze(-1)
        one = torch.ones_like(angles)
        leaving = torch.polar(one, angles * supports).unsqueeze(1)
        return {"S": torch.stack(sums, 1), "turn": torch.polar(one, angles).unsqueeze(1), "leaving": leaving}

    def step(self, u_t: Tensor, state: StreamState, memory: dict[str, Tensor]) -> Tensor:
        """One turn of every S."""
        at = [(state.position - 1 - support) % state.ring.shape[-1] for support in self.supports]
        gone = state.ring[..., at].mT.double().unsqueeze(-1)
        memory["S"].mul_(memory["turn"]).add_(u_t.double().unsqueeze(1).unsqueeze(-1) - memory["leaving"] * gone)
        return (self.coefficients * memory["S"]).real.sum((1, -1)).to(u_t)


@dataclass(frozen=True)
class Blocks:
    """Any kernel: after step n the last Q inputs meet the next Q outputs, Q the largest power of two that divides n.

    Every pair of an input and a later output lies in exactly one such square: that of the n between them with the largest Q.
    """

    kernel: Float[Tensor, "channel lag"]
    spectra: tuple[Tensor, ...]

    @classmethod
    def of(cls, kernel: Float[Tensor, "channel lag"]) -> "Blocks":
        """Transform the kernel once for each size of a square, up to the first that covers all lags."""
        sizes = range((kernel.shape[-1] - 1).bit_length() + 1)
        return cls(kernel, tuple(torch.fft.rfft(kernel[..., : 2 << q], 2 << q) for q in sizes))

    @property
    def _largest(self) -> int:
        return 1 << (len(self.spectra) - 1)

    def memory(self, history: Tensor) -> dict[str, Tensor]:
        """What the inputs so far leave for the next outputs, the next one first."""
        past = history.shape[-1]
        n = fast_length(past + self.kernel.shape[-1] + self._largest)
        spectrum = torch.fft.rfft(history, n) * torch.fft.rfft(self.kernel, n)
        return {"pending": torch.fft.irfft(spectrum, n)[..., past : past + self._largest].contiguous()}

    def step(self, u_t: Tensor, state: StreamState, memory: dict[str, Tensor]) -> Tensor:
        """The newest input by lag 0, what was pending, and one square for the outputs to come."""
        pending, largest, n = memory["pending"], self._largest, state.since
        y = pending[..., (n - 1) % largest] + self.kernel[..., 0] * u_t
        pending[..., (n - 1) % largest] = 0
        size = min(n & -n, largest)
        seen = min(size, state.ring.shape[-1])
        at = (state.position - seen + torch.arange(seen, device=u_t.device)) % state.ring.shape[-1]
        inputs = torch.nn.functional.pad(state.ring[..., at], (size - seen, 0))
        square = torch.fft.rfft(inputs, 2 * size) * self.spectra[size.bit_length() - 1]
        # the ring of the FFT folds only outputs of lags that were met before
        later = (n + torch.arange(size, device=u_t.device)) % largest
        pending[..., later] += torch.fft.irfft(square, 2 * size)[..., size:]
        return y
