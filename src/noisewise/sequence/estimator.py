"""`SequenceClassifier` and `SequenceRegressor`: sequence models by the convention of scikit-learn."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisewise.errors import InvalidInput, RunFolderError, require
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.sequence.fitting import SequenceFit, fit_sequence
from noisewise.sequence.model import SequenceModel
from noisewise.training import check_share
from noisewise.typing import check_count

_base = require("sklearn.base", "sequence")

__all__ = ["SequenceClassifier", "SequenceRegressor"]

# what a loaded estimator gets anew
_LEFT_OUT = ("resume", "progress")
_MODEL = (
    "d_model",
    "n_layers",
    "patch",
    "dropout",
    "prenorm",
    "block_norm",
    "seed",
    "kind",
    "kernel_size",
    "bidirectional",
)
_FIT = (
    "batch_size",
    "lr",
    "kernel_lr",
    "weight_decay",
    "label_smoothing",
    "ema",
    "patience",
    "resume",
    "progress",
    "seed",
)


class _SequenceEstimator(_base.BaseEstimator):  # type: ignore[misc]
    """What both share. See `SequenceModel` and `fit_sequence` for the arguments."""

    _task: str

    def __init__(
        self,
        d_model: int = 64,
        n_layers: int = 4,
        *,
        kind: str = "fourier",
        kernel_size: int = 32,
        bidirectional: bool = True,
        length: int | None = None,
        patch: int = 1,
        dropout: float | int = 0.0,
        prenorm: bool = True,
        block_norm: str = "layer",
        epochs: float | int = 20,
        batch_size: int = 32,
        lr: float | int = 1e-2,
        kernel_lr: float | int = 1e-3,
        weight_decay: float | int = 0.05,
        label_smoothing: float | int = 0.0,
        ema: float | int = 0.99,
        validation: float | int = 0.1,
        patience: int = 0,
        resume: str | Path | None = None,
        progress: bool = False,
        seed: int = 0,
    ) -> None:
        self.d_model = d_model
        self.n_layers = n_layers
        self.kind = kind
        self.kernel_size = kernel_size
        self.bidirectional = bidirectional
        self.length = length
        self.patch = patch
        self.dropout = dropout
        self.prenorm = prenorm
        self.block_norm = block_norm
        self.epochs = epochs
        self.batch_size = batch_size
        self.lr = lr
        self.kernel_lr = kernel_lr
        self.weight_decay = weight_decay
        self.label_smoothing = label_smoothing
        self.ema = ema
        self.validation = validation
        self.patience = patience
        self.resume = resume
        self.progress = progress
        self.seed = seed

    def _fit(self, X: Any, y: Tensor) -> Tensor:
        """Train on `y`, a tensor of answers; returns the indices of the rows that were trained on."""
        most = None if self.length is None else check_count("length", self.length)
        x, lengths = _as_signals(X, most)
        if len(y) != len(x):
            raise InvalidInput(f"X has {len(x)} rows, y has {len(y)}")
        generator = torch.Generator().manual_seed(check_count("seed", self.seed, 0))
        order = torch.randperm(len(x), generator=generator)
        held = round(check_share("validation", self.validation, 1) * len(x))
        if len(x) - held < 2:
            raise InvalidInput(f"validation={self.validation:g} of {len(x)} rows leaves fewer than 2 to train on")
        out, kept = order[:held], order[held:]
        self.mean_, self.scale_ = _moments(x[kept], None if lengths is None else lengths[kept])
        self.n_channels_, self.length_ = x.shape[1], most or x.shape[-1]
        x = self._standardised(x)
        answers, model = self._answers(y, kept), self._build()
        parts = [(x[rows], answers[rows], None if lengths is None else lengths[rows]) for rows in (kept, out)]
        self.fit_: SequenceFit = fit_sequence(
            model, parts[0], task=self._task, epochs=self.epochs, validation=parts[1] if held else 0,
            **{name: getattr(self, name) for name in _FIT},
        )  # fmt: skip
        self.history_, self.held_out_ = self.fit_.history, self.fit_.held_out
        self._take(model)
        return kept

    def _answers(self, y: Tensor, kept: Tensor) -> Tensor:
        return y

    def _build(self) -> SequenceModel:
        options = {name: getattr(self, name) for name in _MODEL}
        return SequenceModel(self.n_channels_, self._outputs(), self.length_, **options)

    def _outputs(self) -> int:
        raise NotImplementedError

    def _take(self, model: SequenceModel) -> None:
        self.model_, self.merged_ = model, model.merge()

    def _standardised(self, x: Tensor) -> Tensor:
        return (x - self.mean_) / self.scale_

    def _predicted(self, X: Any) -> Tensor:
        """Outputs of the merged model, row by row."""
        if not hasattr(self, "merged_"):
            raise InvalidInput(f"this {type(self).__name__} is not fitted yet: call fit(X, y), or load one")
        x, lengths = _as_signals(X, None if self.length is None else self.length_)
        if x.shape[1] != self.n_channels_:
            raise InvalidInput(f"X has {x.shape[1]} channels, the model was fitted on {self.n_channels_}")
        if x.shape[-1] > self.length_:
            row = 0 if lengths is None else int(lengths.argmax())
            raise InvalidInput(
                f"row {row} of X has {x.shape[-1]} steps, the longest row of fit had {self.length_}: build the estimator with "
                f"length={x.shape[-1]} and fit again, or cut the row"
            )
        if lengths is None and x.shape[-1] != self.length_:
            lengths = torch.full((len(x),), x.shape[-1])
        x = self._standardised(x)
        found = []
        with torch.no_grad():
            for rows in torch.arange(len(x)).split(self.batch_size):
                own = None if lengths is None else lengths[rows]
                found.append(self.merged_(x[rows], lengths=own))
        return torch.cat(found)

    def save(self, folder: str | Path) -> Path:
        """Write the fitted model and the settings: no pickles."""
        if not hasattr(self, "model_"):
            raise InvalidInput(
                f"this {type(self).__name__} is not fitted yet, so there is nothing to save: call fit(X, y)"
            )
        settings = {name: value for name, value in self.get_params().items() if name not in _LEFT_OUT}
        config = {"settings": settings, "channels": self.n_channels_, "length": self.length_} | self._known()
        tensors = {f"model.{name}": value for name, value in self.model_.state_dict().items()}
        tensors |= {"mean": self.mean_, "scale": self.scale_} | self._numbers()
        return write_pretrained(folder, type(self).__name__, config, tensors)

    @classmethod
    def load(cls, folder: str | Path) -> Any:
        """What `save` wrote. Raises `RunFolderError` for the folder of another class, and damaged ones."""
        config, tensors = read_pretrained(folder, cls.__name__)
        try:
            made = cls(**config["settings"])
            made.mean_, made.scale_ = tensors["mean"], tensors["scale"]
            made.n_channels_, made.length_ = config["channels"], config["length"]
            made._know(config, tensors)
            model = made._build()
            weights = {name.removeprefix("model."): v for name, v in tensors.items() if name.startswith("model.")}
            model.load_state_dict(weights)
        except (KeyError, TypeError, RuntimeError, InvalidInput) as error:
            raise RunFolderError(f"{folder} is damaged: {error}") from error
        made._take(model.eval())
        return made

    def _known(self) -> dict[str, Any]:
        return {}

    def _numbers(self) -> dict[str, Tensor]:
        return {}

    def _know(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        raise NotImplementedError


class SequenceClassifier(_base.ClassifierMixin, _SequenceEstimator):  # type: ignore[misc]
    """Classes of signals: `fit(X, y)` with X (row, step) or (row, channel, step), or a list of signals of unequal length.

    A `SequenceModel` with mean pooling, trained by `fit_sequence` with those arguments; channels are standardised by the rows
    that it trains on. `length`: steps of the model, to which longer rows are cut, in `fit` and in `predict`; None: those of the
    longest row of `fit`, and a longer one is refused later, as cross-validation of unequal rows may meet it.

    After `fit`: `classes_`, `model_` and `merged_`, which predicts, `held_out_` (loss and accuracy on the share `validation` of
    rows, which also chose the step that the model is from, so both are a little too good), `history_`, `mean_` and `scale_`.
    Nothing is checked before `fit`.
    """

    _task = "classification"

    def fit(self, X: Any, y: Any) -> "SequenceClassifier":
        """Learn from rows `X` and their classes `y`, of any type. Raises `InvalidInput` for data that cannot be learned from."""
        labels = np.asarray(y)
        if labels.ndim != 1 or labels.dtype.kind not in "iubUOf":
            raise InvalidInput(
                f"y must be one class a row (whole numbers or strings), got shape {labels.shape} of {labels.dtype}: numbers "
                "to be predicted are for SequenceRegressor"
            )
        if labels.dtype.kind == "f":
            broken = labels[~(np.isfinite(labels) & (labels == np.rint(labels)))]
            if len(broken):
                raise InvalidInput(
                    f"y holds {broken[0]:g}, and classes are whole numbers or strings: numbers to be predicted are for "
                    "SequenceRegressor"
                )
        try:
            self.classes_, codes = np.unique(labels, return_inverse=True)
        except TypeError as error:
            raise InvalidInput(
                f"y holds labels that cannot be sorted ({error}): give numbers only, or strings"
            ) from error
        if len(self.classes_) < 2:
            raise InvalidInput(f"y holds one class only ({labels[:1].tolist()}): give rows of two or more")
        self._fit(X, torch.as_tensor(codes))
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities of `classes_`, (row, class)."""
        return self._predicted(X).softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        likeliest = self._predicted(X).argmax(-1).numpy()
        return self.classes_[likeliest]

    def _outputs(self) -> int:
        return len(self.classes_)

    def _known(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist()}

    def _know(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.classes_ = np.asarray(config["classes"])


class SequenceRegressor(_base.RegressorMixin, _SequenceEstimator):  # type: ignore[misc]
    """Numbers of signals: as `SequenceClassifier`, with y (row,) or (row, number); `score` is R^2, and y is standardised too."""

    _task = "regression"

    def fit(self, X: Any, y: Any) -> "SequenceRegressor":
        """Learn from rows `X` and their numbers `y`. Raises `InvalidInput` for data that cannot be learned from."""
        numbers = _as_numbers(y, np.float64, "y")
        if numbers.ndim not in (1, 2) or not numbers.numel():
            raise InvalidInput(f"y must be (row,) or (row, number), got shape {tuple(numbers.shape)}")
        bad = (~torch.isfinite(numbers)).reshape(len(numbers), -1).any(1).nonzero().flatten().tolist()
        if bad:
            raise InvalidInput(f"y has NaN or infinite values, the first in row {bad[0]}: leave those rows out")
        self.one_number_ = numbers.ndim == 1
        self._width = 1 if self.one_number_ else numbers.shape[1]
        self._fit(X, numbers.reshape(len(numbers), -1))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Numbers, of the shape of y."""
        found = (self._predicted(X).double() * self.y_scale_ + self.y_mean_).numpy()
        return found[:, 0] if self.one_number_ else found

    def _answers(self, y: Tensor, kept: Tensor) -> Tensor:
        self.y_mean_ = y[kept].mean(0)
        scale = y[kept].std(0, correction=0)
        self.y_scale_ = torch.where(scale > 0, scale, 1.0)
        return (y - self.y_mean_) / self.y_scale_

    def _outputs(self) -> int:
        return self._width

    def _known(self) -> dict[str, Any]:
        return {"one_number": self.one_number_}

    def _numbers(self) -> dict[str, Tensor]:
        return {"y_mean": self.y_mean_, "y_scale": self.y_scale_}

    def _know(self, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.one_number_, self._width = config["one_number"], len(tensors["y_mean"])
        self.y_mean_, self.y_scale_ = tensors["y_mean"], tensors["y_scale"]


def _as_signals(X: Any, most: int | None) -> tuple[Tensor, Tensor | None]:
    """(row, channel, step) in float32, cut to `most` steps, padded with zeros, and the length of each row where they differ."""
    # unequal rows in an array
    listed = list(X) if isinstance(X, np.ndarray) and X.dtype == object and X.ndim == 1 else X
    if isinstance(listed, list | tuple):
        rows = [_as_numbers(row, np.float32, f"row {index} of X") for index, row in enumerate(listed)]
        if not rows:
            raise InvalidInput("X has no rows")
        rows = [row.unsqueeze(0) if row.ndim == 1 else row for row in rows]
        for index, row in enumerate(rows):
            if row.ndim != 2 or not row.numel() or row.shape[0] != rows[0].shape[0]:
                raise InvalidInput(
                    f"row {index} of X has shape {tuple(row.shape)}: every row must be (step,) or (channel, step), with as many "
                    f"channels as the first ({rows[0].shape[0]}) and a step"
                )
        rows = [row[..., :most] for row in rows]
        ends = torch.tensor([row.shape[-1] for row in rows])
        longest = int(ends.max())
        x = torch.stack([torch.nn.functional.pad(row, (0, longest - row.shape[-1])) for row in rows])
        lengths = None if int(ends.min()) == longest else ends
    else:
        x = X.detach().cpu().float() if isinstance(X, Tensor) else _as_numbers(X, np.float32, "X")
        x, lengths = (x.unsqueeze(1) if x.ndim == 2 else x), None
        if x.ndim != 3 or not x.numel():
            raise InvalidInput(
                f"X must be (row, step) or (row, channel, step), or a list of signals, got shape {tuple(x.shape)}"
            )
        x = x[..., :most]
    bad = (~torch.isfinite(x)).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
    if bad:
        raise InvalidInput(
            f"X has NaN or infinite values in {len(bad)} of {len(x)} rows, the first is row {bad[0]}: leave them out or fill them"
        )
    return x, lengths


def _as_numbers(values: Any, dtype: type, name: str) -> Tensor:
    try:
        return torch.as_tensor(np.asarray(values, dtype=dtype))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{name} must hold numbers: {error}") from error


def _moments(x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel over the valid steps of all rows, [channel, 1]; 1 for a constant one."""
    valid = torch.ones(len(x), 1, x.shape[-1], dtype=torch.float64)
    if lengths is not None:
        valid = (torch.arange(x.shape[-1]) < lengths.reshape(-1, 1, 1)).double()
    wide, count = x.double(), valid.sum()
    mean = (wide * valid).sum((0, 2)) / count
    deviation = (((wide - mean.unsqueeze(-1)).square() * valid).sum((0, 2)) / count).sqrt()
    scale = torch.where(deviation > 1e-12 * (1 + mean.abs()), deviation, 1.0)
    return mean.unsqueeze(-1).float(), scale.unsqueeze(-1).float()
