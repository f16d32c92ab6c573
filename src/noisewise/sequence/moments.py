"""Mean and variance of every branch of a multi-resolution convolution, without convolving by every branch.

Batch normalisation of c_i = u * k_i asks for two numbers of each channel, and both follow from k_i and from statistics of u
that all branches share: the mean from running sums of u, the energy over all times from the autocorrelations of k_i and u
(Wiener & Khinchin). Batch statistics end at the last step, though, so the energy of what rings on behind it is taken away
again; it depends on the last inputs alone, as many as the branch is long. A branch of more than half the length is cheaper
to compute as it is, from the spectrum of u, which is there. Sums without a batch axis are made in float64.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from noisewise.sequence.convolution import fast_length

__all__ = ["Moments", "Signal", "branch_moments", "constant_response"]


class Moments(NamedTuple):
    """Of each branch's output over all rows and valid steps; the variance is the biased one."""

    mean: Float[Tensor, "branch direction channel"]
    variance: Float[Tensor, "branch direction channel"]


@dataclass(frozen=True)
class Signal:
    """An input, the same centred for each channel, and the spectrum of that, which carries no derivatives.

    `u` and `centred` are 0 where a row has ended; u = centred + offset at all valid steps. Offsets are numbers, not functions of
    u: whatever they are, the sum is u, and so are its derivatives; None where nothing was taken off. `mask` is None where all
    rows are whole.
    """

    u: Float[Tensor, "batch channel length"]
    centred: Float[Tensor, "batch channel length"]
    offset: Float[Tensor, " channel"] | None
    spectrum: Tensor
    n: int
    lengths: Int[Tensor, " batch"] | None = None
    mask: Bool[Tensor, "batch 1 length"] | None = None

    @classmethod
    def of(
        cls,
        u: Float[Tensor, "batch channel length"],
        mask: Bool[Tensor, "batch 1 length"] | None = None,
        centre: bool = True,
    ) -> "Signal":
        """Centre `u` and transform it once. `mask`: True at valid steps, which come first in each row."""
        length, lengths = u.shape[-1], None
        if mask is not None:
            lengths = mask.sum((1, 2))
            u = torch.where(mask, u, 0.0)
        n = fast_length(2 * length - 1)
        if not centre:
            # rows must not meet: what is taken off all of them would carry one row's size, or its NaN, to the others
            return cls(u, u, None, torch.fft.rfft(u.detach(), n), n, lengths, mask)
        steps = len(u) * length if lengths is None else lengths.sum()
        # near the mean is near enough: whatever is taken off is counted exactly
        offset = u.detach().sum((0, 2)) / steps
        centred = u - offset.unsqueeze(-1)
        if mask is not None:
            centred = torch.where(mask, centred, 0.0)
        return cls(u, centred, offset, torch.fft.rfft(centred.detach(), n), n, lengths, mask)

    @property
    def count(self) -> int | Tensor:
        """Valid steps of all rows."""
        batch, _, length = self.u.shape
        return batch * length if self.lengths is None else self.lengths.sum()

    def valid(self) -> Float[Tensor, "batch 1 length"]:
        """1 at valid steps, 0 after a row's end, float64; a single row where all are whole."""
        if self.mask is not None:
            return self.mask.double()
        return torch.ones(1, 1, self.u.shape[-1], dtype=torch.float64, device=self.u.device)

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

    def from_end(
        self, x: Float[Tensor, "batch channel length"], forward: bool
    ) -> Float[Tensor, "batch channel length"]:
        """What `at_end` has moved, back at its place."""
        if not forward:
            return x.flip(-1)
        if self.lengths is None:
            return x
        length = x.shape[-1]
        index = torch.arange(length, device=x.device) + (length - self.lengths.unsqueeze(-1))
        return x.gather(-1, index.clamp(max=length - 1).unsqueeze(1).expand_as(x))


def branch_moments(signal: Signal, kernels: list[Float[Tensor, "direction channel _"]], exact: bool = True) -> Moments:
    """Of c_i = u * k_i for all sub-kernels; the second direction looks ahead: c_i[t] = sum_j k_i[j] u[t + j].

    Not `exact`: the energy counts what rings on after the end, as if zeros followed and were counted in no mean; cheaper,
    another normaliser, never smaller. Differentiable once.
    """
    return Moments(*_BranchMoments.apply(signal, exact, signal.u, *kernels))


class _BranchMoments(torch.autograd.Function):
    """Its own derivative, so that no spectrum of a row is made twice."""

    @staticmethod
    def forward(ctx: Any, signal: Signal, exact: bool, u: Tensor, *kernels: Tensor) -> Any:
        turned = _turned(signal, len(kernels[0]))
        sums, correlation = _partial_sums(turned), _autocorrelation(signal)
        count = float(signal.count)
        means, variances = [], []
        kept: list[Tensor | None] = []
        for kernel in kernels:
            wide = kernel.double()
            mean = (wide * sums[..., : kernel.shape[-1]]).sum(-1) / count
            if exact and _is_long(kernel, u):
                deviation = _deviation(signal, kernel, mean)
                variance = _energy(deviation) / count
                kept.append(deviation)
            else:
                product = _toeplitz(wide, correlation)
                energy = (wide * product).sum(-1)
                window = tail = None
                if exact and kernel.shape[-1] > 1:
                    window, tail = _tail(turned, kernel)
                    energy = energy - _energy(tail)
                variance = (energy / count - mean.square()).clamp(min=0)
                kept += [product, window, tail]
            means.append(mean)
            variances.append(variance)
        # only what is saved so is freed after use, and counted by who asks what a step keeps
        ctx.save_for_backward(u, signal.spectrum, sums, correlation, *means, *kernels, *kept)
        ctx.rest = signal.offset, signal.n, signal.lengths, signal.mask
        ctx.exact, ctx.branches = exact, len(kernels)
        return torch.stack(means), torch.stack(variances)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, to_mean: Tensor, to_variance: Tensor) -> Any:
        n = ctx.branches
        u, spectrum, sums, correlation, *rest = ctx.saved_tensors
        offset, ring, lengths, mask = ctx.rest
        # the centred rows are not needed any more
        signal = Signal(u, u, offset, spectrum, ring, lengths, mask)
        means, kernels, kept = rest[:n], rest[n : 2 * n], iter(rest[2 * n :])
        count = float(signal.count)
        turned, whole = _turned(signal, len(kernels[0])), _whole_spectrum(signal)
        # derivatives by what all branches share, gathered over them
        by_sums, by_correlation = torch.zeros_like(sums), torch.zeros_like(correlation)
        by_turned = torch.zeros_like(turned)
        by_spectrum: Tensor | None = None
        to_kernels = []
        for mean, kernel, by_mean, by_variance in zip(means, kernels, to_mean, to_variance, strict=True):
            wide, lags = kernel.double(), kernel.shape[-1]
            by_mean, by_variance = by_mean.double().unsqueeze(-1), by_variance.double().unsqueeze(-1)
            if ctx.exact and _is_long(kernel, u):
                # the deviations sum to 0, so the mean inside them has no derivative
                made, share = _through_branch(whole, kernel, next(kept), 2 * by_variance / count, signal.n)
                by_spectrum = made if by_spectrum is None else by_spectrum + made
            else:
                by_energy = by_variance / count
                by_mean = by_mean - 2 * mean.unsqueeze(-1) * by_variance
                share = 2 * by_energy * next(kept)
                by_correlation[..., :lags] += (by_energy * _own_correlation(wide)).sum(0)
                window, tail = next(kept), next(kept)
                if window is not None and tail is not None:
                    share = share + _through_tail(window, kernel, tail, -2 * by_energy, by_turned)
            by_sums[..., :lags] += by_mean * wide / count
            to_kernels.append((share + by_mean * sums[..., :lags] / count).to(kernel))
        to_u = None
        if ctx.needs_input_grad[2]:
            by_turned += by_sums.cumsum(-1).flip(-1).unsqueeze(1).to(by_turned)
            to_u = _to_input(signal, whole, by_turned, by_correlation, by_spectrum)
        return None, None, to_u, *to_kernels


def _is_long(kernel: Tensor, u: Tensor) -> bool:
    """Whether the branch itself is cheaper than its tail."""
    return 2 * kernel.shape[-1] > u.shape[-1]


def _turned(signal: Signal, directions: int) -> Float[Tensor, "direction batch channel length"]:
    """The rows with their ends last; reversed ones for the second direction."""
    if directions == 1:
        return signal.at_end(True).unsqueeze(0)
    return torch.stack([signal.at_end(True), signal.at_end(False)])


def _partial_sums(turned: Float[Tensor, "direction batch channel length"]) -> Tensor:
    """For each lag the sum over rows of all inputs that are at least so many steps before the end; float64."""
    return turned.sum(1, dtype=torch.float64).cumsum(-1).flip(-1)


def _whole_spectrum(signal: Signal) -> Tensor:
    """The transform of u, each frequency as exact as it is large: that of the centred rows, and of the offset by itself."""
    if signal.offset is None:
        return signal.spectrum
    valid = torch.fft.rfft(signal.valid(), signal.n) * signal.offset.double().unsqueeze(-1)
    return signal.spectrum + valid.to(signal.spectrum)


def _autocorrelation(signal: Signal) -> Float[Tensor, "channel length"]:
    """sum over rows and times of u[t] u[t + lag], float64; constants join as they are, without cancelling anything."""
    length, valid = signal.u.shape[-1], torch.fft.rfft(signal.valid(), signal.n)
    power = _power(signal.spectrum)
    if signal.offset is None:
        return torch.fft.irfft(power.to(valid), signal.n)[..., :length]
    offset = signal.offset.double().unsqueeze(-1)
    if signal.mask is None:
        both = signal.spectrum.sum(0).to(valid) * valid[0].conj()
        alone = len(signal.centred) * valid.abs().square()[0]
    else:
        both = (signal.spectrum * valid.conj().to(signal.spectrum)).sum(0).to(valid)
        alone = valid.abs().square().sum(0)
    total = power + 2 * offset * both.real + offset.square() * alone
    return torch.fft.irfft(total.to(valid), signal.n)[..., :length]


def _power(spectrum: Tensor) -> Tensor:
    """sum over rows of its squared modulus, float64."""
    parts = torch.view_as_real(spectrum).square().sum(0).double()
    # a sum over pairs of numbers is ten times slower
    return parts[..., 0] + parts[..., 1]


def _energy(x: Float[Tensor, "direction batch channel length"]) -> Float[Tensor, "direction channel"]:
    """sum over rows and steps of its square; along a row in the dtype of `x`, whose partial sums are pairwise."""
    return x.square().sum(-1).double().sum(1)


def _ring(lags: Tensor, n: int) -> Float[Tensor, "channel n"]:
    """A symmetric sequence around place 0 of a ring of `n`, from its lags 0, 1, ..."""
    return torch.cat([lags, lags.new_zeros(*lags.shape[:-1], n - 2 * lags.shape[-1] + 1), lags[..., 1:].flip(-1)], -1)


def _toeplitz(kernel: Float[Tensor, "direction channel lag"], correlation: Tensor) -> Tensor:
    """sum_j R[|j - m|] k[m]: k against it is the energy of u * k over all times, sum_d A[d] R[d]."""
    support = kernel.shape[-1]
    n = fast_length(2 * support - 1)
    spectrum = torch.fft.rfft(_ring(correlation[..., :support], n), n).real
    return torch.fft.irfft(torch.fft.rfft(kernel, n) * spectrum, n)[..., :support]


def _own_correlation(kernel: Float[Tensor, "direction channel lag"]) -> Tensor:
    """The derivative of that energy by R: A[0], 2 A[1], 2 A[2], ..."""
    support = kernel.shape[-1]
    n = fast_length(2 * support - 1)
    power = _power(torch.fft.rfft(kernel.unsqueeze(0), n))
    found = 2 * torch.fft.irfft(power.to(torch.complex128), n)[..., :support]
    found[..., 0] /= 2
    return found


def _tail(turned: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """What the last inputs, one fewer than the kernel has lags, leave behind the end; and before it, their transform."""
    last = kernel.shape[-1] - 1
    # the ring is as long as the window and its tail together, so nothing meets what went round
    n = fast_length(2 * last)
    window = torch.fft.rfft(turned[..., -last:], n)
    tail = torch.fft.irfft(window * torch.fft.rfft(kernel, n).unsqueeze(1), n)[..., last : 2 * last]
    return window, tail.contiguous()


def _through_tail(window: Tensor, kernel: Tensor, tail: Tensor, factor: Tensor, by_turned: Tensor) -> Tensor:
    """Derivatives of the tail's energy: added to that by the turned rows, returned by the kernel. `factor`: by its square.

    What has no batch axis carries the factor, and the delay of the tail behind its window.
    """
    last = tail.shape[-1]
    n = fast_length(2 * last)
    turn = torch.arange(n // 2 + 1, device=tail.device, dtype=torch.float64) * (-2 * math.pi * last / n)
    delay = torch.polar(torch.ones_like(turn), turn) * factor
    g = torch.fft.rfft(tail, n)
    back = (torch.fft.rfft(kernel.double(), n).conj() * delay).to(g).unsqueeze(1)
    crossed = (g * window.conj()).sum(1) * delay.to(g)
    by_turned[..., -last:] += torch.fft.irfft(g.mul_(back), n)[..., :last]
    return torch.fft.irfft(crossed, n)[..., : kernel.shape[-1]].double()


def _deviation(signal: Signal, kernel: Tensor, mean: Tensor) -> Float[Tensor, "direction batch channel length"]:
    """The branch itself less its mean; 0 where a row has ended."""
    spectra = torch.fft.rfft(kernel, signal.n)
    made = []
    for direction, own in enumerate(spectra):
        branch = torch.fft.irfft(signal.spectrum * (own if direction == 0 else own.conj()), signal.n)
        constant = -mean[direction].unsqueeze(-1)
        if signal.offset is not None:
            constant = constant + constant_response(signal, kernel[direction], direction == 0)
        deviation = branch[..., : signal.centred.shape[-1]] + constant.to(branch)
        made.append(deviation if signal.mask is None else deviation * signal.mask)
    return torch.stack(made) if len(made) > 1 else made[0].unsqueeze(0)


def _through_branch(whole: Tensor, kernel: Tensor, deviation: Tensor, factor: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Derivatives of the branch's energy by the spectrum of u and by the kernel. `factor`: by the deviations."""
    spectra = torch.fft.rfft(kernel, n) * factor.to(kernel)
    by_spectrum: Tensor | None = None
    to_kernel = []
    for direction, own in enumerate(spectra):
        g = torch.fft.rfft(deviation[direction], n)
        crossed = (g * whole.conj()).sum(0)
        to_kernel.append(torch.fft.irfft(crossed if direction == 0 else crossed.conj(), n))
        made = g.mul_(own.conj() if direction == 0 else own)
        by_spectrum = made if by_spectrum is None else by_spectrum + made
    assert by_spectrum is not None
    return by_spectrum, factor * torch.stack(to_kernel)[..., : kernel.shape[-1]].double()


def _to_input(
    signal: Signal, whole: Tensor, by_turned: Tensor, by_correlation: Tensor, by_spectrum: Tensor | None
) -> Tensor:
    """The derivative by u, of the shape of u."""
    length = signal.u.shape[-1]
    # R[d] = sum_t u[t] u[t + d] lets each input meet both its neighbours at d
    lags = by_correlation.clone()
    lags[..., 0] *= 2
    found = torch.fft.rfft(_ring(lags, signal.n), signal.n).real.to(signal.centred) * whole
    if by_spectrum is not None:
        found += by_spectrum
    to_u = torch.fft.irfft(found, signal.n)[..., :length]
    for direction, own in enumerate(by_turned):
        to_u += signal.from_end(own, direction == 0)
    return to_u if signal.mask is None else to_u * signal.mask


def constant_response(
    signal: Signal, kernel: Float[Tensor, "channel lag"], forward: bool
) -> Float[Tensor, "rows channel length"]:
    """What a convolution makes of the offset, float64; one row where all rows are whole."""
    assert signal.offset is not None
    length = signal.centred.shape[-1]
    response = signal.offset.double().unsqueeze(-1) * kernel.cumsum(-1, dtype=torch.float64)
    if response.shape[-1] < length:
        response = torch.cat([response, response[:, -1:].expand(-1, length - response.shape[-1])], -1)
    if forward:
        return response.unsqueeze(0)
    if signal.lengths is None:
        return response.flip(-1).unsqueeze(0)
    # seen from step t of a row, so many constant inputs lie ahead
    ahead = (signal.lengths.unsqueeze(-1) - 1 - torch.arange(length, device=kernel.device)).clamp(min=0)
    rows = response.unsqueeze(0).expand(len(ahead), -1, -1)
    return rows.gather(-1, ahead.unsqueeze(1).expand(-1, len(response), -1))
