"""Merged sequence modules as files for other runtimes: torch.export programs and ONNX."""

import copy
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import InvalidInput, NoisewiseError, require
from noisewise.files import write_atomically
from noisewise.sequence.convolution import spectrum_of
from noisewise.sequence.layer import MRConv
from noisewise.sequence.merged import LongConv

__all__ = ["export_onnx", "export_program"]

# they remark on operators of libraries that are not installed, and on their own optimisations
_TALKATIVE = ("torch.onnx", "onnxscript", "onnx_ir")
# beyond so many lags a convolution that is not an FFT costs too much
_DIRECT = 4096


class _Direct(nn.Module):
    """A merged convolution as torch's own, which every runtime knows; O(length lags)."""

    weight: Tensor
    bias: Tensor

    def __init__(self, conv: LongConv) -> None:
        super().__init__()
        directions, self.channels, self.lags = conv.kernel.shape
        past, future = conv.kernel[0].flip(-1), conv.kernel[1:].sum(0)
        if directions > 1:
            both = functional.pad(past, (0, self.lags - 1)) + functional.pad(future, (self.lags - 1, 0))
        self.ahead = self.lags - 1 if directions > 1 else 0
        self.register_buffer("weight", (both if directions > 1 else past).unsqueeze(1))
        self.register_buffer("bias", conv.bias)

    def forward(self, u: Tensor, state: None = None, lengths: None = None) -> Tensor:
        padded = functional.pad(u, (self.lags - 1, self.ahead))
        return functional.conv1d(padded, self.weight, self.bias, groups=self.channels)


class _Spectral(nn.Module):
    """A merged convolution by FFTs of a power of two, the only length that runtimes compute as exactly as torch."""

    spectrum: Tensor
    bias: Tensor

    def __init__(self, conv: LongConv) -> None:
        super().__init__()
        self.n = 1 << (2 * conv.length - 2).bit_length()
        self.register_buffer(
            "spectrum", torch.view_as_real(spectrum_of(conv.kernel, conv.length, self.n)).movedim(-1, 0)
        )
        self.register_buffer("bias", conv.bias.unsqueeze(-1))

    def forward(self, u: Tensor, state: None = None, lengths: None = None) -> Tensor:
        # complex numbers as pairs: exporters know few complex operations
        own = torch.view_as_real(torch.fft.rfft(u, self.n))
        a, b = own[..., 0], own[..., 1]
        c, d = self.spectrum[0], self.spectrum[1]
        product = torch.view_as_complex(torch.stack([a * c - b * d, a * d + b * c], -1))
        return torch.fft.irfft(product, self.n)[..., : u.shape[-1]] + self.bias


def export_program(module: nn.Module, example: tuple[Tensor, ...] | Tensor, path: str | Path) -> Path:
    """Write `module`, merged, as a torch.export program (.pt2) for any number of rows; torch.export.load reads it.

    `example`: an input, or all of them in a tuple. A module that is not merged yet is, its original untouched. Raises
    `NoisewiseError` where torch cannot export it, and in train mode.
    """
    ready, inputs = _prepared(module, portable=False), _inputs(example)
    try:
        program = torch.export.export(ready, inputs, dynamic_shapes={"input": _rows(inputs)})
    except Exception as error:
        raise NoisewiseError(f"torch.export cannot follow {type(module).__name__}: {error}") from error
    held = io.BytesIO()
    torch.export.save(program, held)
    return write_atomically(Path(path), held.getvalue())


def export_onnx(module: nn.Module, example: tuple[Tensor, ...] | Tensor, path: str | Path) -> Path:
    """Write `module`, merged, as ONNX for any number of rows: inputs input_0, input_1, ..., output "output".

    Convolutions of at most 4096 lags become ordinary ones, which every runtime knows; longer ones FFTs (opset 17 and later).
    Needs noisewise[onnx]. Raises `NoisewiseError` where the exporter cannot follow the module, and in train mode.
    """
    for library in ("onnx", "onnxscript"):
        require(library, "onnx")
    ready, inputs = _prepared(module, portable=True), _inputs(example)
    names = [f"input_{i}" for i in range(len(inputs))]
    with _quiet(), tempfile.TemporaryDirectory() as folder:
        try:
            program = torch.onnx.export(
                ready, inputs, dynamo=True, input_names=names, output_names=["output"], verbose=False,
                dynamic_shapes={"input": _rows(inputs)},
            )  # fmt: skip
        except Exception as error:
            raise NoisewiseError(f"the ONNX exporter cannot follow {type(module).__name__}: {error}") from error
        assert program is not None
        held = Path(folder) / "model.onnx"
        program.save(held, external_data=False)
        return write_atomically(Path(path), held.read_bytes())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of the exporter; its errors remain."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


class _Whole(nn.Module):
    """A module whose inputs are positional, whatever its own signature calls them."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *input: Tensor) -> Tensor:
        return self.module(*input)


def _prepared(module: nn.Module, portable: bool) -> nn.Module:
    """A merged copy; `portable`: with its long convolutions in a form that other runtimes know."""
    if module.training:
        raise NoisewiseError("a module in train mode cannot be exported: call .eval()")
    whole = _Whole(copy.deepcopy(module)).eval()
    for name, layer in list(whole.named_modules()):
        if isinstance(layer, MRConv | LongConv):
            merged = layer.merge() if isinstance(layer, MRConv) else layer
            parent, _, own = name.rpartition(".")
            setattr(whole.get_submodule(parent), own, _portable(merged) if portable else merged)
    return whole


def _portable(conv: LongConv) -> nn.Module:
    return _Direct(conv) if conv.length <= _DIRECT else _Spectral(conv)


def _inputs(example: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
    """The example with two rows at least: exporters take a single one for the only number there is."""
    given = (example,) if isinstance(example, Tensor) else tuple(example)
    if not given or any(not len(one) for one in given):
        raise InvalidInput("an example needs a row")
    return tuple(one if len(one) > 1 else torch.cat([one, one]) for one in given)


def _rows(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    rows = torch.export.Dim("rows", min=1)
    return tuple({0: rows} for _ in inputs)
