"""How sequences of files become the input of a model, and its output the classes or values of those files; kept beside it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.files import write_atomically
from noisewise.sequence.readers import Sequences, read_sequences

__all__ = ["SCALES", "Inputs", "Preparation", "Prepared"]

SCALES = ("data", "row", "none")
_FILE = "preparation.json"


@dataclass(frozen=True)
class Inputs:
    """What a model takes: `x`, its `y`, and the valid steps of each row, None where all are."""

    x: Float[Tensor, "n channel length"] | Int[Tensor, "n length"]
    y: Int[Tensor, " n"] | Float[Tensor, " n"]
    lengths: Int[Tensor, " n"] | None

    def __len__(self) -> int:
        return len(self.x)


@dataclass(frozen=True)
class Preparation:
    """The form of the data that a model was fitted to: how they are read, brought to one length and scaled.

    `scale`: "data" by the `mean` and `std` of each channel of the training rows, "row" by those of the row itself, "none". Values
    (`task` "regression") are brought to mean 0 and standard deviation 1 by those of `target`. `vocabulary`: number of symbols,
    None for signals. `ragged`: whether rows ended before the model did. `read`: options of `read_sequences`.
    """

    task: str
    length: int
    channels: int
    scale: str
    classes: tuple[str, ...] = ()
    vocabulary: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    target: tuple[float, float] = (0.0, 1.0)
    ragged: bool = False
    read: dict[str, Any] | None = None

    @classmethod
    def of(cls, train: Sequences, task: str, scale: str, read: dict[str, Any]) -> "Preparation":
        """That of training rows, read to the length of the model. Raises `InvalidInput` for symbols that shall be scaled."""
        if scale not in SCALES:
            raise InvalidInput(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        ragged = bool((train.lengths < train.X.shape[-1]).any())
        target = (0.0, 1.0)
        if task == "regression":
            target = (float(train.y.mean(dtype="float64")), float(train.y.std(dtype="float64")) or 1.0)
        if train.tokens:
            symbols = int(train.X.max()) + 1
            return cls(
                task, train.X.shape[-1], 1, "none", train.classes, symbols, target=target, ragged=ragged, read=read
            )
        mean, std = _moments(torch.from_numpy(train.X), torch.from_numpy(train.lengths), (0, 2))
        return cls(
            task, train.X.shape[-1], train.X.shape[1], scale, train.classes, None,
            tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()), target, ragged, read,
        )  # fmt: skip

    def read_again(self, path: str | Path, **changed: Any) -> Sequences:
        """Other data of the same form. Raises `InvalidInput` that names what is different."""
        options = {**(self.read or {}), **{name: value for name, value in changed.items() if value is not None}}
        found = read_sequences(
            path, length=self.length, task=self.task, classes=self.classes or None, **options
        )  # fmt: skip
        if found.tokens != (self.vocabulary is not None):
            said = ("symbols", "signals") if found.tokens else ("signals", "symbols")
            raise InvalidInput(f"{str(path)!r} holds {said[0]}, the model was fitted to {said[1]}")
        if found.tokens and int(found.X.max()) >= (self.vocabulary or 0):
            raise InvalidInput(
                f"{str(path)!r} has the symbol {int(found.X.max())}, the model knows those below {self.vocabulary}"
            )
        if not found.tokens and found.X.shape[1] != self.channels:
            raise InvalidInput(
                f"{str(path)!r} has {found.X.shape[1]} channels, the model was fitted to {self.channels}"
            )
        return found

    def inputs(self, sequences: Sequences) -> Inputs:
        """What the model takes, and what it shall answer: classes, or scaled values."""
        x, y = torch.from_numpy(sequences.X), torch.from_numpy(sequences.y)
        lengths = torch.from_numpy(sequences.lengths)
        ragged = bool((lengths < x.shape[-1]).any())
        if not sequences.tokens:
            x = self.scaled(x, lengths)
        return Inputs(x, y if self.classes else (y - self.target[0]) / self.target[1], lengths if ragged else None)

    def scaled(
        self, x: Float[Tensor, "n channel length"], lengths: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n channel length"]:
        """Signals as the model takes them; 0 behind the end of each row."""
        if self.scale == "none":
            return x
        if self.scale == "row":
            mean, std = _moments(x, lengths, (2,))
        else:
            mean, std = (torch.tensor(one).reshape(1, -1, 1) for one in (self.mean, self.std))
        scaled = (x - mean.to(x)) / std.to(x)
        return scaled if lengths is None else torch.where(_valid(x, lengths), scaled, 0.0)

    def answers(self, output: Float[Tensor, "n output"]) -> Float[Tensor, "n output"]:
        """Scores of classes as they are, values in the units of the data."""
        return output if self.classes else output * self.target[1] + self.target[0]

    def save(self, folder: Path) -> None:
        """Write it beside the model in `folder`."""
        write_atomically(folder / _FILE, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Preparation":
        """What `save` wrote. Raises `RunFolderError` for a folder without it, and for a damaged file."""
        try:
            record = json.loads((folder / _FILE).read_text(encoding="utf-8"))
            tuples = {name: tuple(record[name]) for name in ("classes", "mean", "std", "target")}
            return cls(**{**record, **tuples})
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RunFolderError(f"{folder} holds no {_FILE} of `noisewise sequence fit`") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RunFolderError(f"{folder / _FILE} is damaged: {error}") from error


class Prepared(nn.Module):
    """A model with its preparation before it and its answers behind it: rows of the data, whole, to scores or values."""

    def __init__(self, model: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        self.model, self.preparation = model, preparation
        self.train(model.training)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of the classes, (batch, class), or values, (batch, 1)."""
        return self.preparation.answers(self.model(x if x.ndim == 2 else self.preparation.scaled(x)))

    def example(self) -> Tensor:
        """One row, as long as the model is, to trace it by."""
        if self.preparation.vocabulary is not None:
            return torch.zeros(1, self.preparation.length, dtype=torch.long)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, self.preparation.channels, self.preparation.length, generator=generator)


def _moments(x: Tensor, lengths: Tensor | None, axes: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over valid steps in float32 or wider; 1 for what does not vary."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if lengths is None:
        mean = wide.mean(axes, keepdim=True)
        std = (wide - mean).square().mean(axes, keepdim=True).sqrt()
    else:
        valid = _valid(x, lengths)
        count = valid.sum(axes, keepdim=True).to(wide)
        mean = torch.where(valid, wide, 0.0).sum(axes, keepdim=True) / count
        std = (torch.where(valid, wide - mean, 0.0).square().sum(axes, keepdim=True) / count).sqrt()
    return mean, torch.where(std > 1e-6 * mean.abs(), std, torch.ones_like(std))


def _valid(x: Tensor, lengths: Tensor) -> Tensor:
    return (torch.arange(x.shape[-1], device=x.device) < lengths.to(x.device).unsqueeze(-1)).unsqueeze(1)
