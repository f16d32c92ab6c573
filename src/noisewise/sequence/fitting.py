"""`fit_sequence`: trains a sequence model by the house's loop, whose averaged weights get batch statistics of their own."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from noisewise.errors import InvalidInput
from noisewise.metrics.measurement import Measurement
from noisewise.sequence.block import parameter_groups, takes_lengths
from noisewise.sequence.layer import MRConv
from noisewise.training import (
    Fit,
    FitResult,
    Plan,
    accelerator_for,
    check_share,
    evaluating,
    fingerprint,
    run_fit,
    seeded_dropout,
)
from noisewise.typing import check_count, check_positive

__all__ = ["TASKS", "SequenceFit", "SequenceRows", "fit_sequence", "recalibrate"]

TASKS = ("classification", "regression")
_KIND = "sequence fit"
# batches of training rows from which statistics are estimated anew
_RECALIBRATION_BATCHES = 16
# a fingerprint of the data looks at about so many numbers
_FINGERPRINT = 2**20
# of what functional.cross_entropy leaves out
_IGNORED = -100


@dataclass(frozen=True)
class SequenceRows:
    """Rows of signals or tokens `x`, their `y`, and how many steps of each are valid (None: all)."""

    x: Tensor
    y: Tensor
    lengths: Int[Tensor, " row"] | None
    device: torch.device

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: Tensor) -> "SequenceRows":
        """Those rows, up to the end of the longest of them, on `device`."""
        index = index.to(self.x.device)
        lengths = None if self.lengths is None else self.lengths[index]
        x = self.x[index] if lengths is None else self.x[index][..., : int(lengths.max())]
        moved = None if lengths is None else lengths.to(self.device)
        return SequenceRows(x.to(self.device), self.y[index].to(self.device), moved, self.device)


@dataclass(frozen=True, repr=False)
class SequenceFit(FitResult):
    """A `FitResult`, and `held_out`: "loss", and "accuracy" of classes, of the returned model on rows it did not train on.

    The same rows chose the step that the model is from, so both are a little too good: test on rows of your own.
    """

    held_out: dict[str, Measurement] = field(default_factory=dict)


def fit_sequence(
    model: nn.Module,
    data: tuple[Any, ...],
    *,
    task: str = "classification",
    steps: int | None = None,
    epochs: float | int | None = None,
    batch_size: int = 32,
    lr: float | int = 1e-2,
    kernel_lr: float | int = 1e-3,
    weight_decay: float | int = 0.05,
    warm_up: float | int = 0.1,
    clip: float | int = 1.0,
    label_smoothing: float | int = 0.0,
    ema: float | int = 0.99,
    validation: float | int | tuple[Any, ...] = 0.1,
    patience: int = 0,
    max_seconds: float | int | None = None,
    resume: str | Path | None = None,
    precision: str = "no",
    accelerator: Any = None,
    progress: bool = False,
    seed: int = 0,
) -> SequenceFit:
    """Train `model`, in place, and leave it in eval mode, ready to be merged; any module will do that maps x to outputs.

    `data`: (X, y) or (X, y, lengths); X [row, channel, step] or tokens [row, step]. `task`: "classification", where y holds
    classes 0, 1, ..., [row], or [row, step] for a model with an output each step; "regression", where y is like the output.
    AdamW with sub-kernels at `kernel_lr` without decay and everything else at `lr` with `weight_decay`; both rates rise for the
    share `warm_up` of the steps and fall to 0 as a cosine; gradient norms are clipped at `clip`. `steps`, or `epochs` (20), each
    as many draws with replacement as there are rows to train on. `ema`: decay of the average of the weights (0: the last
    ones), whose batch normalisations get statistics of the average itself, from training rows, before it is measured and
    returned. `validation`: share of rows held out, or (X, y[, lengths]); the average with the least loss there is returned, 0
    returns the last. `patience`, `max_seconds` and Ctrl-C end a fit early. `resume`: a folder, from which the same call goes
    on to the identical result after a crash. `precision`: "no" or "bf16". `accelerator`: your own, for many processes.

    Raises `InvalidInput` before long work for NaN, empty rows, labels that the model has no output for, shapes that do not
    fit; `NoisewiseError` for a merged model and a loss that stays non-finite; `RunFolderError` for the folder of another run.
    """
    if task not in TASKS:
        raise InvalidInput(
            f"task must be one of {', '.join(TASKS)}, got {task!r}; an output each step is either of them"
        )
    if label_smoothing and task != "classification":
        raise InvalidInput(f"label_smoothing={label_smoothing:g} belongs to classes, and would do nothing for {task!r}")
    if precision not in ("no", "bf16"):
        raise InvalidInput(f"precision must be 'no' or 'bf16', got {precision!r}")
    rows = _as_rows(model, data, task, "data")
    share, split = 0.0, None
    if isinstance(validation, tuple):
        held = _as_rows(model, validation, task, "validation")
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        split = (torch.arange(len(rows), len(rows) + len(held)).to(rows.device), shuffled.to(rows.device))
        rows, training = _joined(model, rows, held), len(rows)
    else:
        share = check_share("validation", validation, 1)
        training = len(rows) - round(share * len(rows))
    plan = Plan(
        steps=_steps(steps, epochs, training, check_count("batch_size", batch_size)),
        batch_size=batch_size,
        learning_rate=check_positive("lr", lr),
        weight_decay=check_share("weight_decay", weight_decay, math.inf),
        ema=check_share("ema", ema, 1),
        clip=check_positive("clip", clip),
        validation=share,
        seed=check_count("seed", seed, 0),
        patience=check_count("patience", patience, 0),
    )
    limit = math.inf if max_seconds is None else check_positive("max_seconds", max_seconds)
    loss = _SequenceLoss(task, check_share("label_smoothing", label_smoothing, 1))
    config = {
        **vars(plan),
        "kernel_lr": check_positive("kernel_lr", kernel_lr),
        "warm_up": check_share("warm_up", warm_up, 1),
        "task": task,
        "label_smoothing": loss.label_smoothing,
        "precision": precision,
        "rows": [training, len(rows)],
        "data": _name(rows),
        "start": fingerprint(list(model.state_dict().values())),
    }
    model.train()
    fit = Fit(
        model, rows, loss, plan, accelerator=accelerator or accelerator_for(precision, rows.device, "sequence"),
        measure=loss.measure, groups=parameter_groups(model, lr, kernel_lr, weight_decay), warm_up=config["warm_up"],
        recalibrate=lambda net: recalibrate(net, _batches(rows, fit.training, batch_size)), split=split, look_rows=batch_size,
    )  # fmt: skip
    result = run_fit(fit, _KIND, config, resume, limit, progress)
    model.eval()
    return SequenceFit(**vars(result), held_out=_held_out(model, loss, rows, fit.held_out, batch_size))


def recalibrate(module: nn.Module, batches: Iterable[Any]) -> None:
    """Replace the running statistics of every batch normalisation, `MRConv`'s too, by averages over `batches` with equal weights.

    Each batch is what `module` takes first, or a pair with `lengths`. Everything else is in eval mode, as when it is used. A
    module whose weights were averaged or changed needs it before it is merged.
    """
    norms: list[Any] = [part for part in module.modules() if _has_statistics(part)]
    if not norms:
        return
    momenta = [part.momentum for part in norms]
    with evaluating(module), torch.no_grad():
        for part in norms:
            part.training = True
            part.running_mean.zero_()
            part.running_var.fill_(1.0)
            part.num_batches_tracked.zero_()
        try:
            for index, batch in enumerate(batches):
                for part in norms:
                    part.momentum = 1 / (index + 1)
                x, lengths = batch if isinstance(batch, tuple) else (batch, None)
                _output(module, x, lengths)
        finally:
            for part, momentum in zip(norms, momenta, strict=True):
                part.momentum = momentum


@dataclass(frozen=True)
class _SequenceLoss:
    """The mean loss of a batch; that of held-out rows is without label smoothing, in eval mode."""

    task: str
    label_smoothing: float

    def __call__(self, module: Any, rows: SequenceRows, generator: torch.Generator) -> Tensor:
        with seeded_dropout(generator):
            output = _output(module, rows.x, rows.lengths)
        target, steps = _asked(module, self.task, output, rows)
        if self.task == "classification":
            return functional.cross_entropy(output, target, ignore_index=_IGNORED, label_smoothing=self.label_smoothing)
        error = (output - target).square()
        if steps is None:
            return error.mean()
        return torch.where(steps.unsqueeze(1), error, 0.0).sum() / (steps.sum() * error.shape[1])

    def measure(self, module: Any, rows: SequenceRows, generator: torch.Generator) -> Tensor:
        """Of held-out rows."""
        with evaluating(module), torch.no_grad():
            return self.of_rows(module, rows)["loss"].mean()

    def of_rows(self, module: Any, rows: SequenceRows) -> dict[str, Float[Tensor, " row"]]:
        """Loss of each row, its mean over valid steps, and for classes the share that is right."""
        output = _output(module, rows.x, rows.lengths)
        target, steps = _asked(module, self.task, output, rows)
        if self.task == "classification":
            loss = functional.cross_entropy(output, target, reduction="none", ignore_index=_IGNORED)
            found = {"loss": loss, "accuracy": (output.argmax(1) == target).to(loss)}
        else:
            found = {"loss": (output - target).square().mean(1)}
        if steps is None:
            return {name: value.reshape(len(value), -1).mean(1) for name, value in found.items()}
        return {name: torch.where(steps, value, 0.0).sum(1) / steps.sum(1) for name, value in found.items()}


def _output(module: Any, x: Tensor, lengths: Tensor | None) -> Tensor:
    output = module(x) if lengths is None else module(x, lengths=lengths)
    return output.float() if output.dtype in (torch.bfloat16, torch.float16) else output


def _asked(module: Any, task: str, output: Tensor, rows: SequenceRows) -> tuple[Tensor, Tensor | None]:
    """y with the axes and steps of the output, and which of its steps count; whatever stands in y behind an end is gone."""
    y, steps = rows.y, _valid(module, output, rows)
    if task == "regression" and y.ndim == output.ndim - 1:
        y = y.unsqueeze(1)
    y = y[..., : output.shape[-1]] if output.ndim == 3 else y
    if steps is None:
        return y, None
    return torch.where(steps, y, _IGNORED) if y.ndim == 2 else torch.where(steps.unsqueeze(1), y, 0.0), steps


def _valid(module: Any, output: Tensor, rows: SequenceRows) -> Tensor | None:
    """True at the valid steps of an output each step, [row, step]; None where all count."""
    if rows.lengths is None or output.ndim < 3:
        return None
    ends = -(-rows.lengths // _patch(module))
    return torch.arange(output.shape[-1], device=output.device) < ends.unsqueeze(-1)


def _patch(module: Any) -> int:
    return int(getattr(getattr(module, "module", module), "patch", 1))


def _has_statistics(part: nn.Module) -> bool:
    if isinstance(part, MRConv):
        return part.norm == "batch"
    return isinstance(part, _BatchNorm) and part.running_mean is not None


def _batches(rows: SequenceRows, index: Tensor, size: int) -> Iterator[Any]:
    """The first batches of rows, all of one size."""
    size = min(size, len(index))
    for picked in index[: len(index) // size * size].split(size)[:_RECALIBRATION_BATCHES]:
        batch = rows[picked]
        yield batch.x if batch.lengths is None else (batch.x, batch.lengths)


def _held_out(
    model: nn.Module, loss: _SequenceLoss, rows: SequenceRows, index: Tensor, size: int
) -> dict[str, Measurement]:
    if not len(index):
        return {}
    with torch.no_grad():
        parts = [loss.of_rows(model, rows[picked]) for picked in index.split(size)]
    found = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts]).double()
        se = None if len(values) < 2 else float(values.std()) / math.sqrt(len(values))
        better = "lower" if name == "loss" else "higher"
        found[name] = Measurement(float(values.mean()), se=se, n=len(values), better=better)
    return found


def _steps(steps: int | None, epochs: float | int | None, rows: int, batch_size: int) -> int:
    if steps is not None and epochs is not None:
        raise InvalidInput(f"steps={steps} and epochs={epochs} both say how long: give one")
    if steps is not None:
        return check_count("steps", steps)
    return max(1, round(check_positive("epochs", 20 if epochs is None else epochs) * math.ceil(rows / batch_size)))


# ---- checks


def _as_rows(model: nn.Module, data: Any, task: str, name: str) -> SequenceRows:
    """Data in tensors that the model takes, and whose answers it can give."""
    if not isinstance(data, tuple | list) or len(data) not in (2, 3):
        raise InvalidInput(f"{name} must be (X, y) or (X, y, lengths), got {type(data).__name__}")
    first = next(model.parameters(), None)
    if first is None:
        raise InvalidInput(f"{type(model).__name__} has no parameters to train")
    x, y = _as_tensor(data[0], f"X of {name}"), _as_tensor(data[1], f"y of {name}")
    lengths = None if len(data) < 3 or data[2] is None else _as_tensor(data[2], f"lengths of {name}")
    if x.is_floating_point():
        x = x.to(first.dtype)
    if not x.ndim or not x.numel():
        raise InvalidInput(f"X of {name} is empty: shape {tuple(x.shape)}")
    if not y.ndim or len(y) != len(x):
        raise InvalidInput(f"X of {name} has {len(x)} rows, y has {len(y) if y.ndim else 'none'}")
    if lengths is not None and not takes_lengths(model):
        raise InvalidInput(
            f"{type(model).__name__} takes no lengths=: cut or pad the rows to one length, and leave it out"
        )
    _check_finite(x, lengths, f"X of {name}")
    y = y.to(first.dtype) if task == "regression" else _as_classes(y, name)
    rows = SequenceRows(x, y, lengths, first.device)
    _check_answers(model, rows, task, name)
    return rows


def _as_tensor(values: Any, name: str) -> Tensor:
    if isinstance(values, Tensor):
        return values
    try:
        return torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"{name} must be numbers in an array, got {type(values).__name__}{_of_dtype(values)}: {error}"
        ) from error


def _of_dtype(values: Any) -> str:
    return f" of {values.dtype}" if hasattr(values, "dtype") else ""


def _check_finite(x: Tensor, lengths: Tensor | None, name: str) -> None:
    if lengths is not None and (lengths.shape != x.shape[:1] or lengths.is_floating_point()):
        raise InvalidInput(
            f"lengths must be {len(x)} whole numbers, one for each row of {name}, got shape {tuple(lengths.shape)} of "
            f"{lengths.dtype}"
        )
    if lengths is not None:
        wrong = ((lengths < 1) | (lengths > x.shape[-1])).nonzero().flatten().tolist()
        if wrong:
            raise InvalidInput(
                f"row {wrong[0]} of {name} has length {int(lengths[wrong[0]])}: lengths must lie in 1 to {x.shape[-1]}; leave "
                "empty rows out"
            )
    if not x.is_floating_point():
        return
    finite = torch.isfinite(x)
    if lengths is not None:
        finite |= torch.arange(x.shape[-1], device=x.device) >= lengths.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    bad = (~finite).reshape(len(x), -1).any(1).nonzero().flatten().tolist()
    if bad:
        raise InvalidInput(
            f"{name} has NaN or infinite values in {len(bad)} of {len(x)} rows, the first is row {bad[0]}: leave them out or "
            "fill them"
        )


def _as_classes(y: Tensor, name: str) -> Tensor:
    if y.is_floating_point() or y.is_complex():
        raise InvalidInput(
            f"classes in y of {name} must be whole numbers, got {y.dtype}: task='regression' fits numbers"
        )
    return y.long()


def _check_answers(model: nn.Module, rows: SequenceRows, task: str, name: str) -> None:
    """Ask the model about the longest row."""
    row = 0 if rows.lengths is None else int(rows.lengths.argmax())
    one = rows[torch.tensor([row])]
    with evaluating(model), torch.no_grad():
        output = _output(model, one.x, one.lengths)
    if output.ndim not in (2, 3):
        raise InvalidInput(
            f"a model must give (batch, outputs) or (batch, outputs, steps), got shape {tuple(output.shape)}"
        )
    shape, y = (len(rows), *output.shape[1:]), rows.y
    per_step = rows.lengths is not None and output.ndim == 3
    got = (*y.shape[:-1], min(y.shape[-1], shape[-1])) if per_step else tuple(y.shape)
    wanted = [(shape[0], *shape[2:])] if task == "classification" else [shape]
    if task == "regression" and shape[1] == 1:
        wanted.append((shape[0], *shape[2:]))
    if got not in wanted:
        raise InvalidInput(
            f"y of {name} has shape {tuple(y.shape)}, but for task={task!r} the outputs {shape} of the model want "
            f"{' or '.join(map(str, wanted))}"
        )
    steps = _valid(model, output.expand(len(rows), *output.shape[1:]), rows)
    counted = y if steps is None else y[..., : steps.shape[-1]][_over_channels(steps, y)]
    if task == "classification":
        least, most = int(counted.min()), int(counted.max())
        if least < 0 or most >= shape[1]:
            raise InvalidInput(
                f"classes in y of {name} go from {least} to {most}, but the model has the outputs 0 to {shape[1] - 1}: number "
                "them from 0, or build it with a larger d_output"
            )
    elif not bool(torch.isfinite(counted).all()):
        bad = (~torch.isfinite(y)).reshape(len(y), -1).any(1).nonzero().flatten().tolist()
        raise InvalidInput(f"y of {name} has NaN or infinite values, the first in row {bad[0]}: leave those rows out")


def _over_channels(steps: Tensor, y: Tensor) -> Tensor:
    steps = steps.to(y.device)
    return steps if y.ndim == 2 else steps.unsqueeze(1).expand(-1, y.shape[1], -1)


def _joined(model: nn.Module, rows: SequenceRows, more: SequenceRows) -> SequenceRows:
    """Both, padded to the longer."""
    if rows.x.shape[1:-1] != more.x.shape[1:-1] or rows.x.dtype != more.x.dtype:
        raise InvalidInput(
            f"X of validation has shape {tuple(more.x.shape)} of {more.x.dtype}, that of data {tuple(rows.x.shape)} of "
            f"{rows.x.dtype}"
        )
    lengths = None
    if rows.lengths is not None or more.lengths is not None or rows.x.shape[-1] != more.x.shape[-1]:
        lengths = torch.cat([_ends(rows), _ends(more)])
        if not takes_lengths(model):
            raise InvalidInput(
                f"X of validation has {more.x.shape[-1]} steps, that of data {rows.x.shape[-1]}, and {type(model).__name__} "
                "takes no lengths=: cut or pad them to one length"
            )
    parts = []
    for one, other in ((rows.x, more.x), (rows.y, more.y)):
        pair = (one, other)
        if one.ndim > 1:
            longest = max(one.shape[-1], other.shape[-1])
            pair = tuple(functional.pad(part, (0, longest - part.shape[-1])) for part in pair)  # type: ignore[assignment]
        parts.append(torch.cat(pair))
    return SequenceRows(parts[0], parts[1], lengths, rows.device)


def _ends(rows: SequenceRows) -> Tensor:
    return torch.full((len(rows),), rows.x.shape[-1]) if rows.lengths is None else rows.lengths


def _name(rows: SequenceRows) -> float:
    """One number that other data do not have."""
    parts = [rows.x, rows.y, *([] if rows.lengths is None else [rows.lengths])]
    return fingerprint([part.flatten()[:: max(1, part.numel() // _FINGERPRINT)] for part in parts])
