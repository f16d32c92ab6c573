"""Protocol F, of paper scale only: tasks of the Long Range Arena, sequential CIFAR and Speech Commands, data brought along.

Depth, width, norm, dropout, rates, batches and epochs are those that the S4 family published for these tasks (Gu et al. 2022);
MRConv's own are not public, and the kinds and kernel sizes here are our choice. The retrieval task, two documents to a row, is
left out.
"""

import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noisewise.comparison import Problem
from noisewise.errors import InvalidInput
from noisewise.sequence.experiments.mrconv.training import Shape, Split, columns, models
from noisewise.sequence.readers import Sequences, read_sequences

__all__ = ["ARENA", "Arena", "arena_folder", "arena_problems"]

_SYSTEMS = ("MRConv fourier", "MRConv fourier+sparse", "MRConv sparse", "S4D", "SGConv")


@dataclass(frozen=True)
class Arena:
    """One task: its files are NAME-train.npz and NAME-test.npz, as `read_sequences` reads them."""

    name: str
    shape: Shape
    lr: float
    batch: int
    epochs: int
    rate: float | None = None


def _shape(length: int, classes: int, depth: int, width: int, norm: str, prenorm: bool, **others: Any) -> Shape:
    return Shape(
        length, classes, n_layers=depth, d_model=width, block_norm=norm, prenorm=prenorm, bidirectional=True, **others
    )


ARENA = (
    Arena("listops", _shape(2048, 10, 6, 256, "batch", False, vocabulary=18, kernel_size=8), 0.01, 32, 40),
    Arena("text", _shape(4096, 2, 6, 256, "batch", True, vocabulary=256, kernel_size=8), 0.01, 16, 32),
    Arena("image", _shape(1024, 10, 6, 512, "batch", False, dropout=0.1), 0.01, 50, 200),
    Arena("pathfinder", _shape(1024, 2, 6, 256, "batch", True), 0.004, 64, 200),
    Arena("path-x", _shape(16_384, 2, 6, 256, "batch", True), 0.001, 16, 50),
    Arena("scifar", _shape(1024, 10, 6, 512, "layer", False, d_input=3, dropout=0.1), 0.01, 50, 200),
    Arena("speech-commands", _shape(16_000, 35, 6, 128, "batch", True), 0.01, 16, 40, rate=0.5),
)


def arena_folder() -> Path | None:
    """`long-range` in the folder that the environment variable NOISEWISE_DATA names, or None where it is not there."""
    root = os.environ.get("NOISEWISE_DATA")
    folder = Path(root) / "long-range" if root else None
    return folder if folder is not None and folder.is_dir() else None


def arena_problems(folder: Path, device: str, tasks: Sequence[Arena] = ARENA) -> list[Problem]:
    """A problem for each of `tasks` whose two files are in `folder`. Networks are trained on `device`."""
    return [
        _problem(task, folder, device)
        for task in tasks
        if all((folder / f"{task.name}-{part}.npz").is_file() for part in ("train", "test"))
    ]


def _problem(task: Arena, folder: Path, device: str) -> Problem:
    @functools.lru_cache(maxsize=1)
    def split() -> Split:
        train, test = (
            read_sequences(folder / f"{task.name}-{part}.npz", length=task.shape.length) for part in ("train", "test")
        )
        if train.classes != test.classes:
            raise InvalidInput(f"{task.name}: classes {train.classes} are trained, {test.classes} are tested")
        return _tensors(train, test)

    systems = models(
        _SYSTEMS, task.shape, lambda seed: split(), task.rate, ({"lr": task.lr, "kernel_lr": 1e-3},), device,
        batch_size=task.batch, weight_decay=0.05, label_smoothing=0.0, validation=0.1,
    )  # fmt: skip
    note = (
        f"long range, {task.name}: settings inherited from the S4 family ({task.epochs} epochs, batches of {task.batch}, "
        f"learning rate {task.lr:g}, of kernels 0.001); the average with least loss on a "
        "tenth of the training rows is tested, and nothing is tuned."
    )
    return Problem(
        "F", f"long range, {task.name}", task.epochs, systems, columns, "accuracy, %", notes=(note,), better="higher"
    )


def _tensors(train: Sequences, test: Sequences) -> Split:
    """Lengths only where rows differ."""
    rows = [torch.from_numpy(part) for part in (train.X, train.y, test.X, test.y)]
    lengths = [torch.from_numpy(part.lengths) for part in (train, test)]
    whole = all(bool((steps == train.X.shape[-1]).all()) for steps in lengths)
    return Split(*rows) if whole else Split(*rows, *lengths)
