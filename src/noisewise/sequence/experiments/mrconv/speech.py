"""Protocols B and C, where the data lie at hand: the digits of the Free Spoken Digit Dataset as raw audio of 8 kHz."""

import functools
import itertools
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from noisewise.errors import RunFolderError
from noisewise.sequence.experiments.mrconv.training import Split

__all__ = ["SPEAKERS", "SpokenDigits", "by_index", "by_speaker", "spoken_digits", "spoken_digits_file"]

# in the order in which speakers are held out; the last one only ever for tuning
SPEAKERS = ("george", "jackson", "lucas", "nicolas", "theo", "yweweler")
_TESTED, _TUNED = range(5), range(45, 50)


class SpokenDigits(NamedTuple):
    """Clips of zero mean and unit variance, cut or padded with zeros, what they say, who says it and for the how-manieth time."""

    clips: Float[Tensor, "clip 1 length"]
    digit: Int[Tensor, " clip"]
    speaker: Shaped[np.ndarray, " clip"]
    take: Int[np.ndarray, " clip"]


def spoken_digits_file() -> Path | None:
    """`fsdd/fsdd_8khz.npz` in the folder that the environment variable NOISEWISE_DATA names, or None where it is not there."""
    root = os.environ.get("NOISEWISE_DATA")
    file = Path(root) / "fsdd" / "fsdd_8khz.npz" if root else None
    return file if file is not None and file.is_file() else None


@functools.lru_cache(maxsize=2)
def spoken_digits(file: Path, length: int) -> SpokenDigits:
    """All clips, `length` samples each. Raises `RunFolderError` for a damaged file.

    Source: github.com/Jakobovski/free-spoken-digit-dataset, CC BY-SA 4.0.
    """
    try:
        with np.load(file, allow_pickle=False) as archive:
            audio, offsets = archive["audio"], archive["offsets"]
            digit, speaker, index = archive["digit"], archive["speaker"], archive["index"]
    except (ValueError, KeyError, OSError) as error:
        raise RunFolderError(f"{file} is damaged ({error}); fetch it anew") from error
    clips = np.zeros((len(digit), 1, length), np.float32)
    for row, (begin, end) in enumerate(itertools.pairwise(offsets.tolist())):
        clip = audio[begin : min(end, begin + length)].astype(np.float64)
        clips[row, 0, : len(clip)] = (clip - clip.mean()) / clip.std()
    return SpokenDigits(
        torch.from_numpy(clips), torch.from_numpy(digit.astype(np.int64)), speaker, index.astype(np.int64)
    )


def by_index(data: SpokenDigits, tuning: bool, clips: int | None = None) -> Split:
    """The usual split: index 0 to 4 is tested. For `tuning`, 45 to 49 are, and 0 to 4 are not read."""
    tested = np.isin(data.take, _TUNED if tuning else _TESTED)
    trained = ~tested & ~np.isin(data.take, _TESTED)
    return _split(data, trained, tested, clips)


def by_speaker(data: SpokenDigits, seed: int, tuning: bool, clips: int | None = None) -> Split:
    """One speaker is tested and the others are trained on: the one of the seed, of the first five; the sixth for `tuning`."""
    held_out = SPEAKERS[-1] if tuning else SPEAKERS[seed % (len(SPEAKERS) - 1)]
    tested = data.speaker == held_out
    return _split(data, ~tested, tested, clips)


def _split(data: SpokenDigits, trained: np.ndarray, tested: np.ndarray, clips: int | None) -> Split:
    """`clips`: at most so many of each part, spread over the file."""
    parts = [torch.from_numpy(np.flatnonzero(rows)) for rows in (trained, tested)]
    if clips is not None:
        parts = [rows[:: max(1, len(rows) // clips)] for rows in parts]
    (train, test) = parts
    return Split(data.clips[train], data.digit[train], data.clips[test], data.digit[test])
