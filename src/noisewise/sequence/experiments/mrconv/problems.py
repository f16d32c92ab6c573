"""The comparison's problems: kernels, spoken digits by index and by speaker, ListOps and handwritten digits row by row."""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from noisewise.comparison import TUNING_SEED, Problem, System
from noisewise.errors import require
from noisewise.sequence import listops
from noisewise.sequence.experiments.mrconv.arena import arena_folder, arena_problems
from noisewise.sequence.experiments.mrconv.identification import identification_problems
from noisewise.sequence.experiments.mrconv.speech import (
    by_index,
    by_speaker,
    spoken_digits,
    spoken_digits_file,
)
from noisewise.sequence.experiments.mrconv.training import Shape, Split, columns, decimated, majority, matched, models

__all__ = ["handwritten_rows", "listops_split", "problems", "spoken_problems"]

_ALL = (
    "MRConv fourier",
    "MRConv fourier+sparse",
    "MRConv dilated",
    "S4D",
    "SGConv",
    "dilated CNN",
    "free kernel",
    "GRU",
    "transformer",
)
_BEST, _PEERS = (
    "MRConv fourier",
    ("MRConv fourier", "MRConv fourier+sparse", "S4D", "dilated CNN", "GRU", "transformer"),
)
_ON_LISTOPS = ("MRConv sparse", "MRConv fourier", "S4D", "GRU", "transformer")
_ON_ROWS = ("MRConv fourier", "MRConv dilated", "S4D", "dilated CNN", "GRU", "transformer")
_LONG = ("MRConv fourier", "S4D", "SGConv", "free kernel")
_QUICK = ("MRConv fourier", "S4D")
_CLIP, _WHOLE_CLIP, _PATCH = 4096, 16_384, 16
_EPOCHS = {"quick": 1, "cpu": 6, "paper": 20}
# of each part
_CLIPS = {"quick": 64, "cpu": None, "paper": None}
_LISTOPS_EPOCHS = {"quick": 1, "cpu": 2, "paper": 40}
_LISTOPS_ROWS = {"quick": (100, 100), "cpu": (8000, 2000), "paper": (96_000, 2000)}
_ROWS_EPOCHS = {"quick": 1, "cpu": 10, "paper": 50}
_TESTED_IMAGES = 297


def problems(scale: str, device: str) -> tuple[Problem, ...]:
    """All problems at `scale` whose data are there."""
    file, folder = spoken_digits_file(), arena_folder()
    found = [*identification_problems(scale)]
    if file is not None:
        found += spoken_problems(scale, file)
    found += [_listops(scale), _handwritten(scale)]
    if scale == "paper" and folder is not None:
        found += arena_problems(folder, device)
    return tuple(found)


def _accuracy(protocol: str, name: str, epochs: float | int, systems: tuple[System, ...], note: str) -> Problem:
    return Problem(protocol, name, epochs, systems, columns, "accuracy, %", notes=(f"{name}: {note}",), better="higher")


# ---- spoken digits


def spoken_problems(scale: str, file: Path) -> list[Problem]:
    """Protocols B, C and S, of equal size and time, and of the optional ones L, whole clips, and R, another sampling rate."""
    clips, epochs = _CLIPS[scale], _EPOCHS[scale]
    names, peers, some = (_QUICK, _QUICK, _QUICK) if scale == "quick" else (_ALL, _PEERS, _LONG)

    def split_at(length: int, speakers: bool = False, fewer: int = 1) -> Callable[[int], Split]:
        @functools.lru_cache(maxsize=2)
        def split(seed: int) -> Split:
            data, tuning = spoken_digits(file, length), seed >= TUNING_SEED
            made = by_speaker(data, seed, tuning, clips) if speakers else by_index(data, tuning, clips)
            return (
                made if fewer == 1 else made._replace(x=decimated(made.x, fewer), test_x=decimated(made.test_x, fewer))
            )

        return split

    shape = Shape(_CLIP, patch=_PATCH)
    whole, single = Shape(_WHOLE_CLIP, patch=_PATCH), Shape(_CLIP // 2, d_model=16)
    alike = f"{shape.n_layers} blocks on {shape.steps} patches of {_PATCH} samples at 8 kHz, alike but for the layer"
    last = "four learning rates tried for each; the last averaged weights are tested, MRConv's merged."
    common = f"{alike}; {shape.d_model} channels and {epochs} epochs for every system, {last}"
    usual = (
        "Tested are recordings 0 to 4 of each speaker and digit, the same for all seeds; tuning tests 45 to 49 instead."
    )
    return [
        _accuracy("B", "spoken digits", epochs, models(names, shape, split_at(_CLIP)),
                  f"{common} {usual}"),
        _accuracy("C", "spoken digits, a new speaker", epochs, models(peers, shape, split_at(_CLIP, speakers=True)),
                  f"{common} Each seed holds out a speaker of its own, so seeds differ by more than chance, and all systems meet "
                  "the same ones; tuning holds out a sixth speaker, who is never reported."),
        _accuracy("S", "spoken digits, equal size and time", epochs, matched(peers, _BEST, shape, split_at(_CLIP)),
                  f"{alike}; every system as wide as gives it about the parameters of {_BEST} with {shape.d_model} channels, and "
                  f"trained for about the processor time of its {epochs} epochs, measured side by side at the start of each "
                  f"process, {last} {usual}"),
        _accuracy("L", "spoken digits, whole clips", epochs, models(some, whole, split_at(_WHOLE_CLIP)),
                  f"as spoken digits, but {_WHOLE_CLIP} samples of each clip, which are mostly padding."),
        _accuracy("R", "spoken digits, another rate", epochs, models(some, single, split_at(_CLIP, fewer=2), 0.5),
                  f"trained on single samples at 4 kHz, without patches, {single.d_model} channels; then tested at 2 kHz as "
                  "it is, each kernel stretched to that rate, on clips without the frequencies that 2 kHz cannot hold."),
    ]  # fmt: skip


# ---- ListOps


@functools.lru_cache(maxsize=2)
def listops_split(train: int, test: int, tuning: bool) -> Split:
    """Sequences of 51 to 199 tokens, depth 5 and 5 arguments at most; other ones for `tuning`."""
    drawn = listops.arrays(train + test, 50, 200, 5, 5, seed=1 if tuning else 0)
    x, y, lengths = (torch.from_numpy(part) for part in drawn)
    return Split(x[:train], y[:train], x[train:], y[train:], lengths[:train], lengths[train:])


def _listops(scale: str) -> Problem:
    (train, test), epochs = _LISTOPS_ROWS[scale], _LISTOPS_EPOCHS[scale]

    def split(seed: int) -> Split:
        return listops_split(train, test, seed >= TUNING_SEED)

    shape = Shape(200, vocabulary=len(listops.VOCABULARY), kernel_size=8)
    names = _QUICK if scale == "quick" else _ON_LISTOPS
    note = (
        f"51 to 199 tokens, depth 5, up to 5 arguments, {train} sequences to train on for {epochs} epochs, {test} to test; far "
        "smaller than the task of the Long Range Arena; the same for all seeds, and tuning has sequences of its own."
    )
    systems = (majority(split), *models(names, shape, split))
    return _accuracy("D", "ListOps, small", epochs, systems, note)


# ---- handwritten digits


@functools.lru_cache(maxsize=2)
def handwritten_rows(tuning: bool) -> Split:
    """scikit-learn's 8 x 8 digits as 64 grey values, row by row; the last 297 are tested, for `tuning` the 297 before them."""
    loaded = require("sklearn.datasets", "sampling").load_digits()
    x = torch.from_numpy(loaded.data.astype(np.float32) / 8 - 1).unsqueeze(1)
    y = torch.from_numpy(loaded.target.astype(np.int64))
    end = len(x) - _TESTED_IMAGES if tuning else len(x)
    first = end - _TESTED_IMAGES
    return Split(x[:first], y[:first], x[first:end], y[first:end])


def _handwritten(scale: str) -> Problem:
    def split(seed: int) -> Split:
        return handwritten_rows(seed >= TUNING_SEED)

    names = _QUICK if scale == "quick" else _ON_ROWS
    systems = models(names, Shape(64, kernel_size=8), split)
    note = (
        f"8 x 8 images as 64 steps of one grey value, {_ROWS_EPOCHS[scale]} epochs: whether every system learns at all, not "
        "whether it has a long memory. The last images are of other writers than the first, and tested for all seeds."
    )
    return _accuracy("E", "handwritten digits, row by row", _ROWS_EPOCHS[scale], systems, note)
