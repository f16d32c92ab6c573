"""Checks of input signals, the same for every layer."""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from noisewise.errors import InvalidInput

__all__ = ["check_signal", "valid_steps"]


def check_signal(u: Tensor, channels: int, length: int) -> None:
    """Raise `InvalidInput` for anything but floating-point (batch, `channels`, at most `length`) with a step and a row."""
    if u.ndim != 3 or u.shape[1] != channels:
        swapped = " (the last two axes look swapped: use u.mT)" if u.ndim == 3 and u.shape[2] == channels else ""
        raise InvalidInput(f"expected (batch, {channels}, length), got shape {tuple(u.shape)}{swapped}")
    if not u.is_floating_point():
        raise InvalidInput(f"a signal must be floating point, got {u.dtype}: convert it with .float()")
    if not u.shape[0] or not u.shape[2]:
        raise InvalidInput(f"a signal needs a row and a step, got shape {tuple(u.shape)}")
    if u.shape[2] > length:
        raise InvalidInput(
            f"the signal has {u.shape[2]} steps, the layer at most {length}: cut it, or build the layer with a larger length"
        )


def valid_steps(u: Tensor, lengths: Int[Tensor, "batch"] | None) -> Bool[Tensor, "batch 1 length"] | None:
    """True up to the end of each row; None without `lengths`. Raises `InvalidInput` for lengths that cannot be."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor):
        raise InvalidInput(f"lengths must be a tensor of whole numbers, got {lengths!r}: use torch.tensor(lengths)")
    if lengths.shape != u.shape[:1] or lengths.is_floating_point():
        raise InvalidInput(
            f"lengths must be {u.shape[0]} whole numbers, one for each row, got shape {tuple(lengths.shape)} of {lengths.dtype}"
        )
    least, most = (int(lengths.min()), int(lengths.max()))
    if least < 1 or most > u.shape[-1]:
        raise InvalidInput(f"lengths must lie in 1 to {u.shape[-1]}, got {least} to {most}: leave empty rows out")
    return (torch.arange(u.shape[-1], device=u.device) < lengths.to(u.device).unsqueeze(-1)).unsqueeze(1)
