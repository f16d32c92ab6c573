"""MRConv: a long depthwise convolution out of sub-kernels of growing length, each normalised by itself (NeurIPS 2024)."""

import difflib
import inspect
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning
from noisewise.sequence.convolution import convolved
from noisewise.sequence.kernels import SubKernels
from noisewise.sequence.merged import LongConv, start_stream
from noisewise.sequence.moments import Moments, Signal, branch_moments, constant_response
from noisewise.sequence.signals import check_signal, valid_steps
from noisewise.sequence.streaming import Blocks, Sliding, StreamState, Taps, Way
from noisewise.typing import check_count, check_positive

__all__ = ["NORMS", "STATS", "MRConv", "check_options"]

NORMS = ("batch", "kernel")
STATS = ("exact", "full", "branches")
# a branch whose variance is so near to eps is scaled by eps, not by its own deviation
_DEAD = 10.0


class MRConv(nn.Module):
    """y = sum_i alpha_i BN_i(u * k_i) + D u for each channel; input and output are (batch, d_model, length).

    The sub-kernels k_i have l_0 = `kernel_size`, 2 l_0, 4 l_0, ... lags, up to `length`, and as many parameters each; `kind`,
    `modes`, `taps` and `seed` are those of `SubKernels`. Training costs some four plain convolutions, whatever their number: the
    statistics of batch normalisation are computed without the branches (`stats="exact"`, equal to `"branches"`, which runs
    every one of them; `"full"` is a cheaper normaliser of its own). `merge` makes one kernel and a bias of it.

    `bidirectional` (or `causal=False`, the same): a second set of sub-kernels looks ahead, with branches and statistics of its
    own; lag 0 is in both. `norm`: "batch", or "kernel", which divides each k_i by its norm: in training, statistics of the
    batch let every step see the future and the other rows, those of the kernel do not, so models that predict their next
    input need it. `skip`: D u, as in state-space layers.

    Raises `InvalidInput` for arguments that do not fit. Half precision is computed in float32.
    Source: Cunningham, Giannone, Zhang & Deisenroth, NeurIPS 2024 (arXiv 2408.09453); exact statistics are ours.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self, d_model: int, length: int, kind: str = "fourier", kernel_size: int = 32, *, causal: bool | None = None,
        bidirectional: bool | None = None, norm: str = "batch", stats: str = "exact", modes: int | None = None,
        taps: int | None = None, skip: bool = True, eps: float | int = 1e-5, momentum: float | int = 0.1, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        for name, value, known in (("norm", norm, NORMS), ("stats", stats, STATS)):
            if value not in known:
                raise InvalidInput(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if causal is not None and causal is bidirectional:
            raise InvalidInput(f"causal={causal} and bidirectional={bidirectional} contradict each other: give one")
        self.bidirectional = bool(bidirectional) or causal is False
        self.d_model, self.length = check_count("d_model", d_model), check_count("length", length)
        self.norm, self.stats = norm, stats
        self.eps, self.momentum = check_positive("eps", eps), check_positive("momentum", momentum)
        if self.momentum > 1:
            raise InvalidInput(f"momentum must be at most 1, got {momentum!r}")
        directions = 2 if self.bidirectional else 1
        self.kernels = SubKernels(d_model, length, kind, kernel_size, directions, modes, taps, seed)
        branches = (len(self.kernels.resolutions), directions, d_model)
        self.alpha = nn.Parameter(torch.full(branches, (branches[0] * directions) ** -0.5))
        if norm == "batch":
            self.weight, self.bias = nn.Parameter(torch.ones(branches)), nn.Parameter(torch.zeros(branches))
            self.register_buffer("running_mean", torch.zeros(branches))
            self.register_buffer("running_var", torch.ones(branches))
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.long))
        generator = torch.Generator().manual_seed(seed + 1)
        self.skip = nn.Parameter(torch.randn(d_model, generator=generator)) if skip else None

    @property
    def kind(self) -> str:
        """Of the sub-kernels."""
        return self.kernels.kind

    def forward(
        self, u: Float[Tensor, "batch channel length"], state: StreamState | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Any:  # fmt: skip
        """y, of the shape of `u`; (y, state) where a `state` is given, which then holds the inputs before `u`.

        `lengths`: valid steps of each row; what lies behind is neither read nor counted nor, in y, anything but 0.
        Raises `InvalidInput` for other shapes and dtypes, for more steps than `length`, and in training for a single value.
        """
        if state is not None:
            self._check_frozen("stream")
            if lengths is not None:
                raise InvalidInput("a stream has no ends: lengths= does not go with a state")
            return state.take(u), state
        check_signal(u, self.d_model, self.length)
        mask = valid_steps(u, lengths)
        # FFTs of half precision would lose the tails of the kernels, and only know powers of two
        with torch.autocast(u.device.type, enabled=False):
            wide = u.to(torch.promote_types(u.dtype, torch.float32))
            signal = Signal.of(wide, mask, centre=self._by_batch)
            if self.stats == "branches":
                y = self._by_branches(signal)
            else:
                whole = [k.to(wide) for k in self.kernels()]
                kernels = [k[..., : u.shape[-1]] for k in whole]
                y = self._convolve(signal, *self._merged(kernels, self._moments(signal, kernels), whole))
        return (y if mask is None else torch.where(mask, y, 0.0)).to(u)

    def merge(self) -> LongConv:
        """One kernel and a bias that give what this layer gives in eval mode; computed in float64.

        Raises `NoisewiseError` for a layer whose running statistics have seen no batch. Warns of branches without variance.
        """
        self._check_tracked()
        with torch.no_grad():
            kernel, bias = self._merged([k.double() for k in self.kernels()], self._running())
        return LongConv(kernel.to(self.alpha), bias.to(self.alpha))

    def at_rate(self, rate: float | int) -> LongConv:
        """The merged layer for a signal that is sampled `rate` times as often (.5: every second sample), without training.

        Its longest input is `rate` times as long. Fourier kernels are exact up to half the new rate, taps are rounded to the new
        lags, see `SubKernels.at_rate`. The running statistics stay those of the old rate. Raises as `merge` does.
        """
        check_positive("rate", rate)
        self._check_tracked()
        with torch.no_grad():
            scales, bias = self._scales([k.double() for k in self.kernels()], self._running())
            kernel = self._summed(self.kernels.at_rate(rate), scales)
        return LongConv(kernel.to(self.alpha), bias.to(self.alpha))

    def init_state(self, batch: int) -> StreamState:
        """A stream of `batch` rows before its first input, with the weights of now.

        Raises `NoisewiseError` in train mode, `InvalidInput` for a bidirectional layer.
        """
        self._check_frozen("stream")
        with torch.no_grad():
            kernel, bias = self._merged([k.double() for k in self.kernels()], self._running())
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        return start_stream(kernel.to(dtype), bias.to(dtype), self._ways, batch)

    def step(
        self, u_t: Float[Tensor, "batch channel"], state: StreamState
    ) -> tuple[Float[Tensor, "batch channel"], StreamState]:
        """The output of one more input of each row. `state` is changed in place and returned."""
        self._check_frozen("stream")
        return state.step(u_t), state

    def prefill(
        self, u: Float[Tensor, "batch channel length"]
    ) -> tuple[Float[Tensor, "batch channel length"], StreamState]:
        """All outputs of `u` at once, of any length, and the state to go on from."""
        state = self.init_state(len(u))
        return state.take(u), state

    def extra_repr(self) -> str:
        """What it was built with."""
        words = [f"{self.d_model}, length={self.length}, kind={self.kind!r}"]
        words += [f"norm={self.norm!r}, stats={self.stats!r}"]
        return ", ".join([*words, *(["bidirectional=True"] if self.bidirectional else [])])

    def _check_tracked(self) -> None:
        if self.norm != "batch":
            return
        if not int(self.num_batches_tracked):
            raise NoisewiseError(
                "the layer has seen no batch in train mode, so its running statistics mean nothing: train it first"
            )
        if not bool(torch.isfinite(self.running_mean).all() and torch.isfinite(self.running_var).all()):
            raise NoisewiseError(
                "the running statistics are not finite: a batch held NaN or infinite values; clean the data, then train the "
                "layer anew, or make its statistics anew with recalibrate"
            )
        dead = int((self.running_var < _DEAD * self.eps).sum())
        if dead:
            warnings.warn(
                f"{dead} of {self.running_var.numel()} branches hardly vary (variance below {_DEAD:g} eps): what they carry is "
                "scaled by eps, not by their own deviation; check for constant channels",
                NoisewiseWarning,
                stacklevel=3,
            )

    # ---- statistics

    @property
    def _by_batch(self) -> bool:
        return self.norm == "batch" and self.training

    def _moments(self, signal: Signal, kernels: list[Tensor]) -> Moments | None:
        """Those of the batch in training, the running ones otherwise, None where kernels are normalised."""
        if not self._by_batch:
            return self._running()
        moments = branch_moments(signal, kernels, exact=self.stats == "exact")
        self._track(moments, signal.count)
        return moments

    def _running(self) -> Moments | None:
        return None if self.norm == "kernel" else Moments(self.running_mean, self.running_var)

    @torch.no_grad()
    def _track(self, moments: Moments, count: int | Tensor) -> None:
        n = float(count)
        if n < 2:
            raise InvalidInput(
                "statistics of a batch need more than a single value for each channel: give more steps or rows"
            )
        self.num_batches_tracked += 1
        self.running_mean.lerp_(moments.mean.to(self.running_mean), self.momentum)
        self.running_var.lerp_((moments.variance * (n / (n - 1))).to(self.running_var), self.momentum)

    # ---- the one convolution

    def _scales(self, kernels: list[Tensor], moments: Moments | None) -> tuple[Tensor, Tensor]:
        """Factor of each sub-kernel, and the sum of what each branch adds to all outputs; float64."""
        alpha = self.alpha.double()
        if moments is None:
            norms = torch.stack([torch.linalg.vector_norm(k.double(), dim=-1) for k in kernels])
            return alpha / (norms + self.eps), alpha.new_zeros(self.d_model)
        scale = alpha * self.weight.double() / (moments.variance.double() + self.eps).sqrt()
        return scale, (alpha * self.bias.double() - scale * moments.mean.double()).sum((0, 1))

    def _merged(
        self, kernels: list[Tensor], moments: Moments | None, whole: list[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """The kernel [direction, channel, lag], of the dtype of `kernels`, and the bias in float64.

        `whole`: the same kernels uncropped, whose norms count.
        """
        scales, bias = self._scales(whole or kernels, moments)
        return self._summed(kernels, scales), bias

    def _summed(self, kernels: list[Tensor], scales: Tensor) -> Tensor:
        """sum_i scale_i k_i, with the skip at lag 0."""
        kernel = kernels[0].new_zeros(*kernels[0].shape[:-1], 0)
        for scale, k in zip(scales, kernels, strict=True):
            # lengths grow, so that all of it is written about twice
            kernel = functional.pad(kernel, (0, k.shape[-1] - kernel.shape[-1])) + scale.to(k).unsqueeze(-1) * k
        if self.skip is not None:
            now = functional.pad(self.skip.to(kernel).unsqueeze(-1), (0, kernel.shape[-1] - 1))
            kernel = torch.cat([kernel[:1] + now, kernel[1:]])
        return kernel

    def _convolve(self, signal: Signal, kernel: Tensor, bias: Tensor) -> Tensor:
        """The convolution of the centred signal, and that of its offset with the bias, which may cancel each other."""
        constant = bias.reshape(1, -1, 1)
        if signal.offset is not None:
            for direction, own in enumerate(kernel):
                constant = constant + constant_response(signal, own, direction == 0)
        constant = constant.to(signal.centred)
        return convolved(signal.centred, signal.spectrum, kernel, signal.n, constant)

    # ---- the same by its branches

    def _by_branches(self, signal: Signal) -> Tensor:
        """The definition: every branch is convolved, kept and normalised."""
        kernels = [k.to(signal.u)[..., : signal.u.shape[-1]] for k in self.kernels()]
        spectrum = torch.fft.rfft(signal.centred, signal.n)
        branches = torch.stack([self._branch(signal, spectrum, k) for k in kernels])
        if self.norm == "kernel":
            scales, _ = self._scales([k.to(signal.u) for k in self.kernels()], None)
            y = (scales.to(branches).unsqueeze(2).unsqueeze(-1) * branches).sum((0, 1))
        else:
            y = self._normalised(signal, branches)
        return y if self.skip is None else y + self.skip.to(y).unsqueeze(-1) * signal.u

    def _branch(
        self, signal: Signal, spectrum: Tensor, kernel: Tensor
    ) -> Float[Tensor, "direction batch channel length"]:
        both = []
        for direction, own in enumerate(torch.fft.rfft(kernel, signal.n)):
            made = torch.fft.irfft(spectrum * (own if direction == 0 else own.conj()), signal.n)
            made = made[..., : signal.u.shape[-1]]
            if signal.offset is not None:
                made = made + constant_response(signal, kernel[direction], direction == 0).to(made)
            both.append(made)
        return torch.stack(both)

    def _normalised(self, signal: Signal, branches: Float[Tensor, "branch direction batch channel length"]) -> Tensor:
        if self._by_batch:
            valid = signal.valid().to(branches)
            mean = (branches * valid).sum((2, -1)) / signal.count
            deviation = (branches - mean.unsqueeze(2).unsqueeze(-1)) * valid
            moments = Moments(mean, deviation.square().sum((2, -1)) / signal.count)
            self._track(moments, signal.count)
        else:
            moments = Moments(self.running_mean.to(branches), self.running_var.to(branches))
        scale = self.weight / (moments.variance + self.eps).sqrt()
        shape = (*scale.shape[:2], 1, scale.shape[2], 1)
        normed = scale.reshape(shape) * (branches - moments.mean.reshape(shape)) + self.bias.reshape(shape)
        return (self.alpha.reshape(shape) * normed).sum((0, 1))

    # ---- streaming

    def _check_frozen(self, what: str) -> None:
        if self.training:
            raise NoisewiseError(
                f"a layer in train mode cannot {what}: its statistics change with every batch; call .eval()"
            )

    def _ways(self) -> tuple[Way, ...]:
        """Frequencies slide, few lags are met by their taps, dense kernels in blocks."""
        kernels = self.kernels
        scales = self._scales([k.double() for k in kernels()], self._running())[0][:, 0].double()
        if kernels.kind == "dense":
            whole = self._merged([k.double() for k in kernels()], self._running())[0][0]
            return (Blocks.of(whole.to(torch.promote_types(self.alpha.dtype, torch.float32))),)
        ways: list[Way] = []
        if "fourier" in kernels.parts:
            coefficients = [
                scale.unsqueeze(-1) * kernels.coefficients(r)[0]
                for scale, r in zip(scales, kernels.resolutions, strict=True)
            ]
            periods, supports = zip(*((r.period, r.support) for r in kernels.resolutions), strict=True)
            ways.append(Sliding(torch.stack(coefficients).to(torch.complex128), periods, supports))
        taps = self._taps(scales)
        return (*ways, taps) if taps.lags.shape[-1] else tuple(ways)

    def _taps(self, scales: Float[Tensor, "branch channel"]) -> Taps:
        """The lags of dilated and sparse parts, and lag 0 of the skip."""
        device = self.alpha.device
        lags, weights = [], []
        for scale, r in zip(scales, self.kernels.resolutions, strict=True):
            if "dilated" in self.kernels.parts:
                lags.append(self.kernels.lags_of_dilated(r).to(device).expand(self.d_model, -1))
                weights.append(scale.unsqueeze(-1) * self.kernels.dilated_at(r)[0])
            if "sparse" in self.kernels.parts:
                lags.append(self.kernels.lags(r)[0])
                weights.append(scale.unsqueeze(-1) * self.kernels.sparse_at(r)[0])
        if self.skip is not None:
            lags.append(torch.zeros(self.d_model, 1, dtype=torch.long, device=device))
            weights.append(self.skip.double().unsqueeze(-1))
        if not lags:
            return Taps(torch.zeros(self.d_model, 0, dtype=torch.long), self.alpha.new_zeros(self.d_model, 0))
        dtype = torch.promote_types(self.alpha.dtype, torch.float32)
        return Taps(torch.cat(lags, -1), torch.cat(weights, -1).to(dtype))


def check_options(names: Iterable[str], taken: Iterable[str]) -> None:
    """Raise `InvalidInput` for the first name that `MRConv` has no option of; `taken` are those that its owner gives itself."""
    known = [name for name in inspect.signature(MRConv).parameters if name not in taken]
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            advice = f"did you mean {near[0]}?" if near else f"options of MRConv are {', '.join(known)}"
            raise InvalidInput(f"{name}= is no option of MRConv: {advice}")
