"""Mean and variance of every branch of a multi-resolution convolution, without convolving by every branch.

Batch normalisation of c_i = u * k_i asks for two numbers of each channel, and both follow from k_i and from statistics of u
that all branches share: the mean from running sums of u, the energy over all times from the autocorrelations of k_i and u
(Wiener & Khinchin). Batch statistics end at the last step, though, so the energy of what rings on behind it is taken away
again; it depends on the last inputs alone, as many as the branch is long. A branch of more than half the length is cheaper
to compute as it is, from the spectrum of u, which is there. Sums without a batch axis are made in float64.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from noisewise.sequence.convolution import fast_length

__all__ = ["Moments", "Signal", "branch_moments", "constant_response"]


class Moments(NamedTuple):
    """Of each branch's output over all rows and valid steps; the variance is the biased one."""

    mean: Float[Tensor, "branch direction channel"]
    variance: Float[Tensor, "branch direction channel"]


@dataclass(frozen=True)
class Signal:
    """An input, the same centred for each channel, and the spectrum of that.

    `u` and `centred` are 0 where a row has ended; u = centred + offset at all valid steps. Offsets are numbers, not functions of u:
    whatever they are, the sum is u, and so are its derivatives. `mask` is None where all rows are whole.
    """

    u: Float[Tensor, "batch channel length"]
    centred: Float[Tensor, "batch channel length"]
    offset: Float[Tensor, " channel"]
    spectrum: Tensor
    n: int
    lengths: Int[Tensor, " batch"] | None = None
    mask: Bool[Tensor, "batch 1 length"] | None = None

    @classmethod
    def of(
        cls, u: Float[Tensor, "batch channel length"], mask: Bool[Tensor, "batch 1 length"] | None = None
    ) -> "Signal":
        """Centre `u` and transform it once. `mask`: True at valid steps, which come first in each row."""
        length, lengths = u.shape[-1], None
        if mask is None:
            offset = u.detach().mean((0, 2), dtype=torch.float64)
            centred = u - offset.to(u).unsqueeze(-1)
        else:
            lengths = mask.sum((1, 2))
            u = torch.where(mask, u, 0.0)
            offset = u.detach().sum((0, 2), dtype=torch.float64) / lengths.sum()
            centred = torch.where(mask, u - offset.to(u).unsqueeze(-1), 0.0)
        n = fast_length(2 * length - 1)
        # the offset that was really taken off
        return cls(u, centred, offset.to(u), torch.fft.rfft(centred, n), n, lengths, mask)

    @property
    def count(self) -> int | Tensor:
        """Valid steps of all rows."""
        batch, _, length = self.centred.shape
        return batch * length if self.lengths is None else self.lengths.sum()

    def valid(self) -> Float[Tensor, "batch 1 length"]:
        """1 at valid steps, 0 after a row's end, float64; a single row where all are whole."""
        if self.mask is not None:
            return self.mask.double()
        return torch.ones(1, 1, self.centred.shape[-1], dtype=torch.float64, device=self.centred.device)

    def at_end(self, forward: bool) -> Float[Tensor, "batch channel length"]:
        """u with each row's last step (its first one, reversed, for the other direction) in the last place; 0 before."""
        if not forward:
            return self.u.flip(-1)
        if self.lengths is None:
            return self.u
        length = self.u.shape[-1]
        index = torch.arange(length, device=self.u.device) - (length - self.lengths.unsqueeze(-1))
        found = self.u.gather(-1, index.clamp(min=0).unsqueeze(1).expand_as(self.u))
        return torch.where((index >= 0).unsqueeze(1), found, 0.0)


def branch_moments(
    signal: Signal, kernels: list[Float[Tensor, "direction channel lag"]], exact: bool = True
) -> Moments:
    """Of c_i = u * k_i for all sub-kernels; the second direction looks ahead: c_i[t] = sum_j k_i[j] u[t + j].

    Not `exact`: the energy counts what rings on after the end, as if zeros followed and were counted in no mean; cheaper,
    another normaliser, never smaller.
    """
    directions = kernels[0].shape[0]
    # [direction, batch, channel, length]
    both = [signal.at_end(direction == 0) for direction in range(directions)]
    turned = torch.stack(both) if directions > 1 else both[0].unsqueeze(0)
    sums = _partial_sums(turned)
    correlation = _autocorrelation(signal)
    means, variances = [], []
    for kernel in kernels:
        support = kernel.shape[-1]
        wide = kernel.double()
        mean = (wide * sums[..., :support]).sum(-1) / signal.count
        if exact and 2 * support > turned.shape[-1]:
            means.append(mean)
            variances.append(_direct(signal, kernel, mean))
            continue
        energy = _full_energy(wide, correlation)
        if exact and support > 1:
            energy = energy - _tail_energy(turned[..., -(support - 1) :], kernel)
        means.append(mean)
        variances.append((energy / signal.count - mean.square()).clamp(min=0))
    return Moments(torch.stack(means), torch.stack(variances))


def _partial_sums(turned: Float[Tensor, "direction batch channel length"]) -> Tensor:
    """For each lag the sum over rows of all inputs that are at least so many steps before the end; float64."""
    summed = turned.sum(1, dtype=torch.float64)
    return summed.cumsum(-1).flip(-1)


def _autocorrelation(signal: Signal) -> Float[Tensor, "channel length"]:
    """sum over rows and times of u[t] u[t + lag], float64; constants join as they are, without cancelling anything."""
    wide = torch.float64
    valid = torch.fft.rfft(signal.valid(), signal.n)
    power = torch.view_as_real(signal.spectrum).square().sum((0, -1)).to(wide)
    offset = signal.offset.to(wide).unsqueeze(-1)
    if signal.mask is None:
        both = signal.spectrum.sum(0).to(valid) * valid[0].conj()
        alone = len(signal.centred) * valid.abs().square()[0]
    else:
        both = (signal.spectrum * valid.conj().to(signal.spectrum)).sum(0).to(valid)
        alone = valid.abs().square().sum(0)
    total = power + 2 * offset * both.real + offset.square() * alone
    return torch.fft.irfft(total.to(valid), signal.n)[..., : signal.centred.shape[-1]]


def _full_energy(kernel: Float[Tensor, "direction channel lag"], correlation: Tensor) -> Tensor:
    """sum_d A[d] R[d] over all lags, A the autocorrelation of the kernel: k against its Toeplitz product with R."""
    support = kernel.shape[-1]
    n = fast_length(2 * support - 1)
    lags = correlation[..., :support]
    ring = torch.cat([lags, lags.new_zeros(*lags.shape[:-1], n - 2 * support + 1), lags[..., 1:].flip(-1)], -1)
    product = torch.fft.irfft(torch.fft.rfft(kernel, n) * torch.fft.rfft(ring, n), n)[..., :support]
    return (kernel * product).sum(-1)


def _tail_energy(window: Float[Tensor, "direction batch channel last"], kernel: Tensor) -> Tensor:
    """Energy of what the last inputs, one fewer than the kernel has lags, leave behind the end; float64."""
    last = window.shape[-1]
    # the ring is as long as the window and its tail together, so nothing meets what went round
    n = fast_length(2 * last)
    spectrum = torch.fft.rfft(window, n) * torch.fft.rfft(kernel, n).unsqueeze(1)
    return torch.fft.irfft(spectrum, n)[..., last : 2 * last].square().sum((1, -1), dtype=torch.float64)


def _direct(signal: Signal, kernel: Tensor, mean: Tensor) -> Tensor:
    """The variance from the branch itself."""
    spectrum = torch.fft.rfft(kernel, signal.n)
    made = []
    for direction, own in enumerate(spectrum):
        branch = torch.fft.irfft(signal.spectrum * (own if direction == 0 else own.conj()), signal.n)
        branch = branch[..., : signal.centred.shape[-1]] + constant_response(signal, kernel[direction], direction == 0)
        deviation = branch - mean[direction].to(branch).unsqueeze(-1)
        if signal.mask is not None:
            deviation = torch.where(signal.mask, deviation, 0.0)
        made.append(deviation.square().sum((0, 2), dtype=torch.float64) / signal.count)
    return torch.stack(made)


def constant_response(
    signal: Signal, kernel: Float[Tensor, "channel lag"], forward: bool
) -> Float[Tensor, "rows channel length"]:
    """What a convolution makes of the offset; one row where all rows are whole. Float64, rounded at the end."""
    length = signal.centred.shape[-1]
    sums = functional.pad(kernel.double(), (0, length - kernel.shape[-1])).cumsum(-1)
    response = signal.offset.double().unsqueeze(-1) * sums
    if forward:
        return response.to(signal.centred).unsqueeze(0)
    if signal.lengths is None:
        return response.flip(-1).to(signal.centred).unsqueeze(0)
    # seen from step t of a row, so many constant inputs lie ahead
    ahead = (signal.lengths.unsqueeze(-1) - 1 - torch.arange(length, device=kernel.device)).clamp(min=0)
    taken = response.unsqueeze(0).expand(len(ahead), -1, -1).gather(-1, ahead.unsqueeze(1).expand(-1, len(response), -1))
    return taken.to(signal.centred)
