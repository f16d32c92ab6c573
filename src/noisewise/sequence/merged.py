"""A merged long convolution: one kernel and a bias, whatever it was trained as."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.sequence.convolution import long_conv
from noisewise.sequence.signals import check_signal, valid_steps
from noisewise.sequence.streaming import Blocks, StreamState, Taps, Way
from noisewise.typing import check_count

__all__ = ["LongConv"]

# a kernel with so small a share of values that are not 0 streams by its taps
_SPARSE = 0.125


class LongConv(nn.Module):
    """y[t] = bias + sum_j kernel[0, j] u[t - j] (+ sum_j kernel[1, j] u[t + j] with two directions), for each channel.

    `kernel`: [direction, channel, lag], `bias`: [channel]; the whole state. It stands for a trained layer, so it refuses to go
    back to training: keep the layer that it was merged from.
    """

    kernel: Tensor
    bias: Tensor

    def __init__(self, kernel: Float[Tensor, "direction channel lag"], bias: Float[Tensor, " channel"]) -> None:
        super().__init__()
        self.register_buffer("kernel", kernel)
        self.register_buffer("bias", bias)
        super().train(False)

    @property
    def length(self) -> int:
        """Lags of the kernel, and the longest input."""
        return self.kernel.shape[-1]

    @property
    def bidirectional(self) -> bool:
        """Whether it looks ahead."""
        return len(self.kernel) > 1

    def train(self, mode: bool = True) -> "LongConv":
        """Raises `NoisewiseError` for `mode=True`."""
        if mode:
            raise NoisewiseError(
                "a merged layer has no branches to train any more: train the layer it was merged from, and merge that again; "
                "a module around this one is half in train mode now, so call .eval() on it"
            )
        return super().train(False)

    def forward(
        self, u: Float[Tensor, "batch channel length"], state: StreamState | None = None,
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Any:  # fmt: skip
        """y, of the shape of `u`; (y, state) where a `state` is given, which then holds the inputs before `u`.

        `lengths`: valid steps of each row; what lies behind is neither read nor, in y, anything but 0.
        """
        if state is not None:
            if lengths is not None:
                raise InvalidInput("a stream has no ends: lengths= does not go with a state")
            return state.take(u), state
        check_signal(u, self.bias.shape[0], self.length)
        mask = valid_steps(u, lengths)
        wide = u if mask is None else torch.where(mask, u, 0.0)
        backward = self.kernel[1] if self.bidirectional else None
        y = long_conv(wide, self.kernel[0], backward) + self.bias.to(u).unsqueeze(-1)
        return y if mask is None else torch.where(mask, y, 0.0)

    def ways(self) -> tuple[Way, ...]:
        """How it streams: by its taps where they are few, by blocks otherwise."""
        kernel = self.kernel[0].to(torch.promote_types(self.kernel.dtype, torch.float32), copy=True)
        taps = Taps.of(kernel)
        return (taps,) if taps.lags.shape[-1] <= _SPARSE * kernel.shape[-1] else (Blocks.of(kernel),)

    def init_state(self, batch: int) -> StreamState:
        """A stream of `batch` rows before its first input. Raises `InvalidInput` for a layer that looks ahead."""
        return start_stream(self.kernel, self.bias, self.ways, batch)

    def step(
        self, u_t: Float[Tensor, "batch channel"], state: StreamState
    ) -> tuple[Float[Tensor, "batch channel"], StreamState]:
        """The output of one more input of each row. `state` is changed in place and returned."""
        return state.step(u_t), state

    def prefill(
        self, u: Float[Tensor, "batch channel length"]
    ) -> tuple[Float[Tensor, "batch channel length"], StreamState]:
        """All outputs of `u` at once, of any length, and the state to go on from."""
        state = self.init_state(len(u))
        return state.take(u), state

    def extra_repr(self) -> str:
        """Channels, lags and directions."""
        directions, channels, lags = self.kernel.shape
        return f"{channels}, length={lags}{', bidirectional=True' if directions > 1 else ''}"


def start_stream(kernel: Tensor, bias: Tensor, ways: Any, batch: int) -> StreamState:
    """Checks, and a state with the ways that `ways()` gives."""
    if len(kernel) > 1:
        raise InvalidInput("a bidirectional layer reads inputs that a stream has not seen yet: use bidirectional=False")
    batch = check_count("batch", batch)
    wide = torch.promote_types(kernel.dtype, torch.float32)
    with torch.no_grad():
        return StreamState.start(
            kernel[0].detach().to(wide, copy=True), bias.detach().to(wide, copy=True), ways(), batch
        )
