"""How right a sequence model is: accuracy and F1 of classes, errors of values, with standard errors; and how fast."""

import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.metrics.measurement import Measurement
from noisewise.progress import Reporter
from noisewise.sequence.preparation import Inputs

__all__ = ["FEW_ROWS", "Answers", "answers_of", "confusion", "scores_of_classes", "scores_of_values", "share"]

# below so many rows a score is no more than a hint
FEW_ROWS = 30
_RESAMPLES = 400


class Answers(NamedTuple):
    """Outputs of a model, and the seconds that each row took."""

    output: Float[Tensor, "n output"]
    seconds: float


def answers_of(model: nn.Module, inputs: Inputs, batch_size: int = 64, progress: bool = False) -> Answers:
    """The outputs of `model`, in the mode in which it is, batch by batch on its own device; the first batch is run twice."""
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), torch.device("cpu"))

    def run(first: int) -> Tensor:
        chosen = slice(first, first + batch_size)
        x = inputs.x[chosen].to(device)
        lengths = None if inputs.lengths is None else inputs.lengths[chosen].to(device)
        return (model(x) if lengths is None else model(x, lengths=lengths)).float().cpu()

    outputs = []
    with torch.no_grad(), Reporter(progress) as reporter:
        # what is only done once is not the speed
        run(0)
        begin = time.perf_counter()
        for first in range(0, len(inputs), batch_size):
            outputs.append(run(first))
            done = min(first + batch_size, len(inputs))
            reporter.show("row", done, len(inputs), f"{done / (time.perf_counter() - begin):.3g} rows a second")
    return Answers(torch.cat(outputs), (time.perf_counter() - begin) / len(inputs))


def confusion(output: Float[Tensor, "n klass"], y: Int[Tensor, " n"]) -> Int[np.ndarray, "klass klass"]:
    """Rows of each class (down) by the class that was answered (across)."""
    classes = output.shape[1]
    cells = y.numpy() * classes + output.argmax(1).numpy()
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes)


def scores_of_classes(table: Int[np.ndarray, "klass klass"], seed: int = 0) -> dict[str, Measurement]:
    """Accuracy and macro F1 of a confusion table; "majority class" is what answering the most frequent one would score.

    F1 is the mean over classes that occur or were answered, its standard error that of `_RESAMPLES` bootstrap samples; they know
    no spread where all answers are right or all are wrong, and it is that of the accuracy there.
    """
    n = int(table.sum())
    right, most = float(np.trace(table) / n), float(table.sum(1).max() / n)
    occurs = (table.sum(0) + table.sum(1)) > 0
    drawn = np.random.default_rng(seed).multinomial(n, table.flatten() / n, _RESAMPLES).reshape(-1, *table.shape)
    accuracy, spread = share(right, n), float(_macro_f1(drawn, occurs).std(ddof=1))
    return {
        "accuracy": accuracy,
        "macro F1": Measurement(float(_macro_f1(table[None], occurs)[0]), spread or accuracy.se, n=n, better="higher"),
        "majority class": share(most, n),
    }


def share(value: float, n: int) -> Measurement:
    """A share of `n` rows, its standard error half of Wilson's interval (1927): not 0 where all rows are right, or none."""
    half = (value * (1 - value) / n + 1 / (4 * n**2)) ** 0.5 / (1 + 1 / n)
    return Measurement(value, half, n=n, better="higher")


def scores_of_values(output: Float[Tensor, " n"], y: Float[Tensor, " n"], seed: int = 0) -> dict[str, Measurement]:
    """Root of the mean squared error, and R2; standard errors are those of `_RESAMPLES` bootstrap samples."""
    truth, error = y.double().numpy(), (output - y).double().square().numpy()

    def rmse(w: np.ndarray) -> float:
        return float(np.sqrt(w @ error))

    def r2(w: np.ndarray) -> float:
        spread = float(w @ np.square(truth - w @ truth))
        return 1 - float(w @ error) / spread if spread else float("nan")

    return {
        "RMSE": _bootstrapped(rmse, len(truth), seed, "lower"),
        "R2": _bootstrapped(r2, len(truth), seed, "higher"),
    }


def _bootstrapped(score: Callable[[np.ndarray], float], n: int, seed: int, better: str) -> Measurement:
    rng = np.random.default_rng(seed)
    found = [score(np.bincount(rng.integers(n, size=n), minlength=n) / n) for _ in range(_RESAMPLES)]
    # a sample of one value has no spread
    known = [value for value in found if value == value]
    se = float(np.std(known, ddof=1)) if len(known) > 1 else None
    return Measurement(score(np.full(n, 1 / n)), se, n=n, better=better)


def _macro_f1(table: np.ndarray, occurs: np.ndarray) -> np.ndarray:
    hits = np.diagonal(table, axis1=-2, axis2=-1)
    either = table.sum(-1) + table.sum(-2)
    return np.where(either > 0, 2 * hits / np.maximum(either, 1), 0.0)[..., occurs].mean(-1)
