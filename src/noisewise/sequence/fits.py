"""A fit of `noisewise sequence`: from rows of a file to a saved model, and what came of it as JSON values."""

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noisewise.command import RUN
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.metrics.measurement import Measurement
from noisewise.sequence.fitting import fit_sequence
from noisewise.sequence.model import SequenceModel
from noisewise.sequence.preparation import Inputs, Preparation
from noisewise.sequence.readers import Sequences
from noisewise.sequence.scores import (
    FEW_ROWS,
    answers_of,
    confusion,
    scores_of_classes,
    scores_of_values,
    share,
)

if TYPE_CHECKING:
    from noisewise.training import FitResult

__all__ = ["fit_rows", "note_of_length", "notes_of_scores", "scores_of", "split"]

_LEAST_TRAINED = 2
# beyond so many steps of the blocks a fit with the usual width is a matter of hours on a CPU
_LONG, _EASY = 4000, 2000


def fit_rows(
    given: Sequences, test: Sequences | None, folder: Path, options: dict[str, Any], form: dict[str, Any],
    seconds: float | None, device: str,
) -> dict[str, Any]:  # fmt: skip
    """Fit a model to all rows but those that choose its step, and save it as `folder`/model; what came of it, as JSON values.

    `options` are those of the command line, `form` those of `read_sequences` among them. Scaling is of the rows that are
    trained on. The fit goes on from `folder`/run.
    """
    kept, out = split(len(given), options["validation"], options["seed"])
    prepared = Preparation.of(given, options["task"], options["scale"], form, kept)
    trained, held = _rows(prepared.inputs(given), kept), _rows(prepared.inputs(given), out)
    model = SequenceModel(
        prepared.channels, len(prepared.classes) or 1, prepared.length, d_model=options["width"], n_layers=options["layers"],
        patch=options["patch"], vocabulary=prepared.vocabulary, dropout=options["dropout"], seed=options["seed"],
        kind=options["kind"], kernel_size=options["kernel_size"], bidirectional=options["bidirectional"],
    ).to(device)  # fmt: skip
    asked = max(1, round(options["epochs"] * math.ceil(len(kept) / options["batch_size"])))
    with warnings.catch_warnings(record=True) as noted:
        # the summary repeats them, on the screen, as JSON and in the report
        warnings.simplefilter("always", NoisewiseWarning)
        result = fit_sequence(
            model, _triple(trained), task=options["task"], steps=asked, batch_size=options["batch_size"], lr=options["lr"],
            kernel_lr=options["kernel_lr"], weight_decay=options["weight_decay"],
            validation=_triple(held) if len(held) else 0, max_seconds=seconds, resume=folder / RUN,
            precision=options["precision"], progress=True, seed=options["seed"],
        )  # fmt: skip
    model.save_pretrained(folder / "model")
    prepared.save(folder / "model")
    scores = dict(result.held_out)
    if "accuracy" in scores:
        scores["accuracy"] = share(float(scores["accuracy"]), len(held))
    notes = [str(one.message) for one in noted if issubclass(one.category, NoisewiseWarning)]
    notes += notes_of_scores(scores, "held out")
    if prepared.classes and len(held):
        notes += _note_of_chance(scores["accuracy"], held.y, prepared.classes)
    facts = _facts(result, asked, notes)
    facts |= {
        **options,
        "length": prepared.length,
        "rate": prepared.rate,
        "classes": list(prepared.classes),
        "rows": len(given),
        "held_out_rows": len(held),
        "test_rows": 0 if test is None else len(test),
        "cut_rows": int(given.cut.sum()),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "held_out": {name: one.to_dict() for name, one in scores.items()},
    }
    if test is not None:
        found, table = scores_of(prepared, answers_of(model, prepared.inputs(test)).output, test)
        facts |= {"test": {name: one.to_dict() for name, one in found.items()}, "confusion": table}
        facts["warnings"] += notes_of_scores(found, "left out")
    return facts


def split(n: int, validation: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows that are trained on, and the share of rows that chooses the step. Raises `InvalidInput` where too few are left."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held = round(validation * n)
    if n - held < _LEAST_TRAINED:
        raise InvalidInput(
            f"--validation {validation:g} of {n} rows leaves {n - held} to train on, and {_LEAST_TRAINED} are needed: lower it, "
            "or give more rows"
        )
    return order[held:], order[:held]


def scores_of(
    prepared: Preparation, output: Tensor, sequences: Sequences
) -> tuple[dict[str, Measurement], list[list[int]]]:
    """Scores of the output of a model, and the table of confusions, empty for values."""
    y = torch.from_numpy(sequences.y)
    if prepared.classes:
        table = confusion(output, y)
        return scores_of_classes(table), table.tolist()
    return scores_of_values(prepared.answers(output).squeeze(1), y), []


def notes_of_scores(scores: dict[str, Measurement], what: str) -> list[str]:
    """That scores of few rows are rough."""
    n = max((one.n or 0 for one in scores.values()), default=FEW_ROWS)
    if n >= FEW_ROWS:
        return []
    return [f"few rows: {n} {what}, so that their scores say little; with {FEW_ROWS} or more they begin to"]


def note_of_length(length: int, patch: int, tokens: bool, steps: int) -> str | None:
    """How long fits of long rows become shorter; None where rows are short."""
    seen = -(-length // patch)
    if seen <= _LONG:
        return None
    larger = patch * 2 ** math.ceil(math.log2(seen / _EASY))
    # a patch is of samples
    shorter = "" if tokens else f"--patch {larger} ({-(-length // larger):,} steps a row) or "
    return (
        f"{steps:,} training steps of rows of {seen:,} steps may take long: {shorter}a smaller --width makes it faster"
    )


def _note_of_chance(accuracy: Measurement, y: Tensor, classes: tuple[str, ...]) -> list[str]:
    counts = y.bincount(minlength=len(classes))
    most = float(counts.max() / counts.sum())
    # rows of one class tell nothing
    if float(accuracy) > most + 1e-9 or most == 1:
        return []
    return [
        f"the held-out accuracy, {float(accuracy):.3g}, is no better than to answer {classes[int(counts.argmax())]!r} always, "
        f"{most:.3g}: nothing was learned yet that holds; raise --epochs or --kernel-lr, or give more rows"
    ]


def _facts(result: "FitResult", asked: int, noted: list[str]) -> dict[str, Any]:
    return {
        "steps": result.steps,
        "steps_asked": asked,
        "best_step": result.best_step,
        "interrupted": result.interrupted,
        # by --max-seconds
        "cut": not result.interrupted and result.steps < asked,
        "cost": vars(result.cost),
        "history": result.history,
        "warnings": list(dict.fromkeys(noted)),
    }


def _rows(inputs: Inputs, index: Tensor) -> Inputs:
    return Inputs(inputs.x[index], inputs.y[index], None if inputs.lengths is None else inputs.lengths[index])


def _triple(inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs.x, inputs.y) if inputs.lengths is None else (inputs.x, inputs.y, inputs.lengths)
