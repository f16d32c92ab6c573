"""How sequences of files become the input of a model, and its output the classes or values of those files; kept beside it."""

import json
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.files import write_atomically
from noisewise.sequence.model import SequenceModel
from noisewise.sequence.readers import Sequences, read_sequences

__all__ = ["SCALES", "Inputs", "Preparation", "Prepared", "model_folder"]

SCALES = ("data", "row", "none")
_FILE, _MODEL = "preparation.json", "model"


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
    None for signals. `ragged`: whether rows ended before the model did. `read`: options of `read_sequences`. `rate`: samples a
    second, None where the data did not say. `full_scale`: whether samples are parts of the largest, as those of integers are.
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
    rate: float | None = None
    full_scale: bool = False

    @classmethod
    def of(
        cls, given: Sequences, task: str, scale: str, read: dict[str, Any], trained: Int[Tensor, " rows"] | None = None
    ) -> "Preparation":
        """That of rows, read to the length of the model; mean, std and target are of the rows `trained`, by default of all.

        Raises `InvalidInput` for another `scale`.
        """
        if scale not in SCALES:
            raise InvalidInput(f"scale must be one of {', '.join(SCALES)}, got {scale!r}")
        train = given if trained is None else given.rows(trained.numpy())
        ragged = bool((given.lengths < given.X.shape[-1]).any())
        target = (0.0, 1.0)
        if task == "regression":
            target = (float(train.y.mean(dtype="float64")), float(train.y.std(dtype="float64")) or 1.0)
        if train.tokens:
            symbols = int(given.X.max()) + 1
            return cls(
                task, train.X.shape[-1], 1, "none", train.classes, symbols, target=target, ragged=ragged, read=read
            )
        mean, std = _moments(torch.from_numpy(train.X), torch.from_numpy(train.lengths), (0, 2))
        return cls(
            task, train.X.shape[-1], train.X.shape[1], scale, train.classes, None,
            tuple(mean.flatten().tolist()), tuple(std.flatten().tolist()), target, ragged, read, given.rate, given.full_scale,
        )  # fmt: skip

    def read_again(self, path: str | Path, **changed: Any) -> Sequences:
        """Other data of the same form, resampled to its rate. Raises `InvalidInput` that names what is different."""
        kept = dict(self.read or {})
        if Path(path).suffix != ".npz" or changed.get("labelled") is False:
            # columns of the file of the fit
            kept |= {"label": None, "group": None}
        options = {**kept, **{name: value for name, value in changed.items() if value is not None}}
        asked = options.get("rate") is not None
        options["rate"] = options["rate"] if asked else self.rate
        found = read_sequences(
            path, length=self.length, task=self.task, classes=self.classes or None, **options
        )  # fmt: skip
        if found.resampled and not asked:
            rates = ", ".join(f"{rate:g}" for rate in found.resampled)
            warnings.warn(
                f"{str(path)!r} has {rates} samples a second and was resampled to {self.rate:g}, the rate of the fit",
                NoisewiseWarning,
                stacklevel=2,
            )
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
                + (": take their mean with mono=True (--mono)" if self.channels == 1 else "")
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


def model_folder(folder: str | Path) -> Path:
    """OUT/model of OUT or OUT/model."""
    place = Path(folder).expanduser()
    return place / _MODEL if (place / _MODEL).is_dir() else place


class Prepared(nn.Module):
    """A model with its preparation before it and its answers behind it: rows of the data to scores of classes or to values.

    `preparation.classes` names the scores; `.softmax(-1)` makes them probabilities.
    """

    def __init__(self, model: nn.Module, preparation: Preparation) -> None:
        super().__init__()
        self.model, self.preparation = model, preparation
        self.train(model.training)

    @classmethod
    def from_pretrained(cls, folder: str | Path, merged: bool = True) -> "Prepared":
        """The fit of `noisewise sequence fit` in OUT or OUT/model, in eval mode, with one kernel a layer where `merged`.

        Raises `RunFolderError` for other folders and damaged files.
        """
        place = model_folder(folder)
        preparation, model = Preparation.load(place), SequenceModel.from_pretrained(place)
        return cls(model.merge() if merged else model, preparation)

    def forward(self, x: Tensor, lengths: Int[Tensor, " batch"] | None = None) -> Tensor:
        """Scores of the classes, (batch, class), or values, (batch, 1), of rows up to their `lengths`.

        `x`: signals (batch, channel, step) in the units and at the rate of the data, or symbols (batch, step).
        """
        u = x if x.ndim == 2 else self.preparation.scaled(x, lengths)
        return self.preparation.answers(self.model(u) if lengths is None else self.model(u, lengths=lengths))

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
