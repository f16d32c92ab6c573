"""Sequences with their labels out of files: arrays in .npz, whole or end to end; UCR and UEA archives (.ts); WAV recordings."""

import math
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

from noisewise.errors import InvalidInput, NoisewiseWarning, require
from noisewise.typing import check_count, check_positive

__all__ = ["TASKS", "Sequences", "read_sequences"]

TASKS = ("classification", "regression")
# columns of an .npz file that are labels, rates and sequences without being named
_LABELS, _RATES, _FLAT = ("y", "label", "labels"), ("rate", "sampling_rate"), ("audio", "signal")
_SHOWN = 5
# integers that are parts of the largest
_WHOLE_SAMPLES = (np.int16, np.int32)


@dataclass(frozen=True)
class Sequences:
    """Sequences of one data set with their labels.

    `X`: signals, float32, or whole numbers (tokens), with 0 behind the end of each row. `y`: places in `classes`, or float32
    values where `classes` is empty; -1 and NaN without labels. `lengths`: valid steps of each row. `groups`: a name for each
    row, such as its speaker. `rate`: samples a second, where it is known; `resampled`: those that were brought to it. `cut`:
    True for rows of which only the beginning is kept. `names`: files of the rows, or their numbers. `full_scale`: whether
    samples are parts of the largest, as those of integers are.
    """

    X: Float[np.ndarray, "n channels length"] | Int[np.ndarray, "n length"]
    y: Int[np.ndarray, " n"] | Float[np.ndarray, " n"]
    lengths: Int[np.ndarray, " n"]
    cut: Bool[np.ndarray, " n"]
    classes: tuple[str, ...] = ()
    groups: Shaped[np.ndarray, " n"] | None = None
    rate: float | None = None
    resampled: tuple[float, ...] = ()
    names: Shaped[np.ndarray, " n"] | None = None
    full_scale: bool = False

    def __len__(self) -> int:
        return len(self.X)

    @property
    def tokens(self) -> bool:
        """Whether rows are symbols rather than signals."""
        return self.X.ndim == 2

    def rows(self, chosen: Shaped[np.ndarray, " rows"]) -> "Sequences":
        """The rows of a mask or of an index."""
        columns = ("X", "y", "lengths", "cut", "groups", "names")
        return replace(self, **{name: one[chosen] for name in columns if (one := getattr(self, name)) is not None})


@dataclass
class _Raw:
    """What a file holds: rows [channels, length] or, of symbols, [length], their labels and groups, and what to call a row."""

    rows: list[np.ndarray]
    labels: np.ndarray | None
    groups: np.ndarray | None = None
    rates: list[float] | None = None
    name: Callable[[int], str] = "row {}".format
    files: list[str] | None = None
    full_scale: bool = False


def read_sequences(
    path: str | Path, *, label: str | None = None, group: str | None = None, length: int | None = None,
    task: str = "classification", classes: Sequence[str] | None = None, rate: float | int | None = None,
    tokens: bool | None = None, mono: bool = False, labelled: bool = True,
) -> Sequences:  # fmt: skip
    """Read a `.npz` file, a `.ts` file of the UCR and UEA archives, or a folder with a folder of WAV files for each class.

    An `.npz` file holds `X`, (n, length) or (n, channels, length), and `y`; with `lengths`, rows end before the array does. Or
    sequences end to end in a one-dimensional array, with `offsets`, n + 1 places where each begins and the last one ends.
    `label` and `group` name the columns to take for labels (by default `y`) and for groups. WAV files may lie deeper in the
    folder of their class; hidden files are left out.

    `length`: cut or fill all rows to so many steps. `classes`: those of a model that the data are for, else all there are.
    `rate`: resample signals to so many samples a second. `tokens`: whether whole numbers are symbols; None takes those of X for
    symbols that are never negative. `mono`: the mean of the channels. `labelled=False`: labels are not asked for, and WAV files
    may lie anywhere in the folder, or be one.

    Integer signals of 16 and 32 bits are scaled to [-1, 1], as WAV files are. Raises `InvalidInput` that names the row for NaN
    and infinities, for damaged files, other shapes, missing labels and a single class, `MissingExtra` for `.ts` without aeon.
    """
    if task not in TASKS:
        raise InvalidInput(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    most = None if length is None else check_count("length", length)
    wanted = None if rate is None else check_positive("rate", rate)
    place = Path(path).expanduser()
    if place.is_dir():
        raw = _read_wavs(place, _by_class(place)) if labelled else _read_wavs(place, _anywhere(place), labelled=False)
    elif not place.exists():
        raise InvalidInput(f"there is no file or folder {str(path)!r}")
    elif place.suffix == ".npz":
        raw = _read_npz(place, label, group, tokens, labelled)
    elif place.suffix == ".ts":
        raw = _read_ts(place, labelled)
    elif place.suffix.lower() == ".wav" and not labelled:
        raw = _read_wavs(place.parent, [place], labelled=False)
    else:
        raise InvalidInput(
            f"{str(path)!r} is not known by its ending: give an .npz file (np.savez(path, X=X, y=y)), a .ts file of the UCR or "
            "UEA archive, or a folder of WAV files"
        )
    for option, name in (("label", label), ("group", group)):
        if name is not None and place.suffix != ".npz":
            raise InvalidInput(
                f"{option} {name!r} names a column of an .npz file, and {str(path)!r} has none: leave it out"
            )
    return _assembled(raw, str(path), most, task, classes, wanted, mono)


# --- .npz


def _read_npz(path: Path, label: str | None, group: str | None, tokens: bool | None, labelled: bool) -> _Raw:
    name = ""
    try:
        with np.load(path, allow_pickle=False) as file:
            columns = {}
            for name in file.files:
                columns[name] = file[name]
    except (ValueError, EOFError, BadZipFile, KeyError, AttributeError, TypeError, OSError) as error:
        # numpy would advise to allow pickles, which run whatever is in them
        if str(error).startswith("Object arrays"):
            raise InvalidInput(
                f"column {name!r} of {str(path)!r} holds Python objects, which are not read: store numbers or "
                "np.array(..., dtype=str); rows of unequal length filled to one array, with their lengths"
            ) from error
        said = error.strerror if isinstance(error, OSError) and error.strerror else "damaged, or not of np.savez"
        raise InvalidInput(f"{str(path)!r} cannot be read as an .npz file of arrays: {said}") from error
    rows, used = (_end_to_end if "offsets" in columns else _whole)(columns, path, tokens)
    n = len(rows)
    others = {name: column for name, column in columns.items() if name not in used and column.shape == (n,)}
    labels = _column(others, label, "label", _LABELS, path) if labelled else None
    groups = None if group is None else _column(others, group, "group", (), path)
    rate = next((float(columns[name]) for name in _RATES if name in columns and not columns[name].ndim), None)
    full_scale = any(columns[name].dtype in _WHOLE_SAMPLES for name in used - {"lengths", "offsets"})
    return _Raw(rows, labels, groups, None if rate is None else [rate] * n, full_scale=full_scale and rows[0].ndim == 2)


def _column(
    others: dict[str, np.ndarray], asked: str | None, what: str, usual: tuple[str, ...], path: Path
) -> np.ndarray:
    for name in usual if asked is None else (asked,):
        if name in others:
            return others[name]
    known = ", ".join(others) or "none"
    missing = usual[0] if asked is None else asked
    raise InvalidInput(
        f"{str(path)!r} has no column {missing!r} with a {what} for each row; columns with a value for each: {known}"
    )


def _whole(columns: dict[str, np.ndarray], path: Path, tokens: bool | None) -> tuple[list[np.ndarray], set[str]]:
    """Rows of X, up to their lengths."""
    if "X" not in columns:
        raise InvalidInput(
            f"{str(path)!r} holds {', '.join(columns) or 'nothing'}; needed are X and y, or sequences end to end with their "
            "offsets"
        )
    X = columns["X"]
    if X.ndim not in (2, 3) or not X.size or X.dtype.kind not in "fiub":
        raise InvalidInput(
            f"X of {str(path)!r} is {X.dtype} of shape {X.shape}; needed are numbers of shape (n, length) or (n, channels, "
            "length)"
        )
    lengths = columns.get("lengths")
    if lengths is None:
        lengths = np.full(len(X), X.shape[-1])
    if (
        lengths.shape != X.shape[:1]
        or lengths.dtype.kind not in "iu"
        or lengths.min() < 1
        or lengths.max() > X.shape[-1]
    ):
        raise InvalidInput(
            f"lengths of {str(path)!r} must be {len(X)} whole numbers in 1 to {X.shape[-1]}, got {lengths.dtype} of shape "
            f"{lengths.shape}" + (f", {lengths.min()} to {lengths.max()}" if lengths.size else "")
        )
    whole = X.ndim == 2 and X.dtype.kind in "iu"
    if whole if tokens is None else tokens:
        if whole and not (X < 0).any():
            return [row[:end] for row, end in zip(X, lengths, strict=True)], {"X", "lengths"}
        if tokens:
            raise InvalidInput(f"X of {str(path)!r} is no array (n, length) of symbols: {X.dtype} of shape {X.shape}")
    signals = _scaled(X if X.ndim == 3 else X[:, None])
    return [row[:, :end] for row, end in zip(signals, lengths, strict=True)], {"X", "lengths"}


def _end_to_end(columns: dict[str, np.ndarray], path: Path, tokens: bool | None) -> tuple[list[np.ndarray], set[str]]:
    """Rows between offsets of the one array that is as long as the last of them says."""
    offsets = columns["offsets"]
    if offsets.ndim != 1 or len(offsets) < 2 or offsets.dtype.kind not in "iu":
        raise InvalidInput(
            f"offsets of {str(path)!r} must be n + 1 whole numbers, got {offsets.dtype} of shape {offsets.shape}"
        )
    offsets = offsets.astype(np.int64)
    empty = np.flatnonzero(np.diff(offsets) < 1)
    if offsets[0] != 0 or len(empty):
        raise InvalidInput(
            f"offsets of {str(path)!r} must begin with 0 and grow"
            + (f"; row {empty[0]} runs from {offsets[empty[0]]} to {offsets[empty[0] + 1]}" if len(empty) else "")
        )
    fitting = [
        name
        for name, column in columns.items()
        if column.shape == (int(offsets[-1]),) and column.dtype.kind in "fiu" and name != "offsets"
    ]
    flat = fitting if len(fitting) == 1 else [name for name in fitting if name in _FLAT]
    if len(flat) != 1:
        raise InvalidInput(
            f"{str(path)!r} has offsets up to {offsets[-1]}, and {len(fitting) or 'no'} one-dimensional arrays of so many "
            f"numbers to cut there: {', '.join(fitting or columns)}"
        )
    values = columns[flat[0]]
    whole = values.dtype.kind in "iu" and not (values < 0).any()
    if tokens and not whole:
        raise InvalidInput(f"{flat[0]} of {str(path)!r} holds no symbols: they are whole numbers of at least 0")
    symbols = whole and flat[0] not in _FLAT if tokens is None else tokens
    parts = np.split(values if symbols else _scaled(values), offsets[1:-1])
    return (parts if symbols else [part[None] for part in parts]), {flat[0], "offsets"}


def _scaled(values: np.ndarray) -> np.ndarray:
    """Float32; samples of integers of 16 and 32 bits as parts of the largest."""
    if values.dtype in _WHOLE_SAMPLES:
        return values.astype(np.float32) / -float(np.iinfo(values.dtype).min)
    return values.astype(np.float32)


# --- .ts


def _read_ts(path: Path, labelled: bool) -> _Raw:
    datasets = require("aeon.datasets", "timeseries")
    try:
        X, y = datasets.load_from_ts_file(str(path))
    except (OSError, ValueError, IndexError, KeyError, TypeError) as error:
        raise InvalidInput(f"{str(path)!r} cannot be read as a .ts file: {error}") from error
    rows = [np.asarray(row, np.float32).reshape(-1, np.shape(row)[-1]) for row in X]
    if not labelled:
        return _Raw(rows, None)
    # a file without labels has none for its rows
    if y is None or len(y) != len(rows):
        raise InvalidInput(f"{str(path)!r} has no label for each of its {len(rows)} rows")
    return _Raw(rows, np.asarray(y))


# --- WAV


def _by_class(folder: Path) -> list[Path]:
    """FOLDER/CLASS/**/*.wav, in the order of their names."""
    files, outside = _visible_wavs(folder, "*/**/*"), _visible_wavs(folder, "*")
    if not files:
        raise InvalidInput(
            f"{str(folder)!r} holds no WAV files in folders named by their class, such as {folder.name}/yes/001.wav"
            + (f"; those in {folder.name} itself have no class" if outside else "")
        )
    if outside:
        warnings.warn(
            f"{len(outside)} WAV files in {str(folder)!r} itself, such as {outside[0].name}, have no class and are left out: "
            "move them into the folder of theirs",
            NoisewiseWarning,
            stacklevel=3,
        )
    return files


def _anywhere(folder: Path) -> list[Path]:
    """All WAV files in the folder, in the order of their names."""
    files = sorted({*_visible_wavs(folder, "*"), *_visible_wavs(folder, "*/**/*")})
    if not files:
        raise InvalidInput(f"{str(folder)!r} holds no WAV files")
    return files


def _visible_wavs(folder: Path, pattern: str) -> list[Path]:
    # macOS leaves ._001.wav beside 001.wav on other file systems
    return sorted(
        (
            path
            for path in folder.glob(pattern)
            if path.suffix.lower() == ".wav"
            and path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        ),
        key=lambda path: path.relative_to(folder).as_posix(),
    )


def _read_wavs(folder: Path, files: list[Path], labelled: bool = True) -> _Raw:
    """A row for each file, whose class is the first folder on its way."""
    rates, rows = zip(*map(_read_wav, files), strict=True)
    classes = np.array([path.relative_to(folder).parts[0] for path in files]) if labelled else None
    names = [str(path) for path in files]
    return _Raw(list(rows), classes, None, list(rates), names.__getitem__, names, full_scale=True)


def _read_wav(path: Path) -> tuple[float, Float[np.ndarray, "channel length"]]:
    wavfile = require("scipy.io.wavfile", "sequence")
    try:
        with warnings.catch_warnings():
            # of tags that are not samples nobody wants to hear, of missing samples one must
            warnings.simplefilter("ignore", wavfile.WavFileWarning)
            warnings.filterwarnings("error", "Reached EOF prematurely", wavfile.WavFileWarning)
            rate, samples = wavfile.read(path)
    except struct.error as error:
        raise InvalidInput(f"{str(path)!r} cannot be read as a WAV file: its header is cut short") from error
    except (ValueError, EOFError, OSError, TypeError, ZeroDivisionError, wavfile.WavFileWarning) as error:
        raise InvalidInput(f"{str(path)!r} cannot be read as a WAV file: {error}") from error
    if not samples.size:
        raise InvalidInput(f"{str(path)!r} holds no samples: remove it")
    # 8 bits have their zero in the middle
    signal = (samples.astype(np.float32) - 128) / 128 if samples.dtype == np.uint8 else _scaled(samples)
    return float(rate), (signal[None] if signal.ndim == 1 else np.ascontiguousarray(signal.T))


# --- what all of them share


def _assembled(
    raw: _Raw, path: str, length: int | None, task: str, classes: Sequence[str] | None, rate: float | None, mono: bool
) -> Sequences:
    """Rows of one length, checked, with their labels as places in the classes, or as values."""
    if not raw.rows:
        raise InvalidInput(f"{path!r} holds no rows")
    if raw.rows[0].ndim == 2:
        raw.rows = _signals(raw, path, rate, mono)
    elif rate is not None or mono:
        raise InvalidInput(f"{path!r} holds symbols, which have neither a rate nor channels: leave out rate and mono")
    ends = np.array([row.shape[-1] for row in raw.rows])
    longest = int(ends.max()) if length is None else length
    first = raw.rows[0]
    X = np.zeros((len(ends), *first.shape[:-1], longest), np.float32 if first.ndim == 2 else np.int64)
    for place, row in enumerate(raw.rows):
        X[place, ..., : row.shape[-1]] = row[..., :longest]
    y, names = _labelled(raw, path, task, classes)
    groups = None if raw.groups is None else np.array([_name(one) for one in raw.groups.tolist()])
    known = rate if rate is not None else raw.rates[0] if raw.rates else None
    others = tuple(sorted({one for one in raw.rates or () if one != known}))
    called = np.array(raw.files if raw.files is not None else [str(place) for place in range(len(ends))])
    return Sequences(
        X, y, np.minimum(ends, longest), ends > longest, names, groups, known, others, called, raw.full_scale
    )


def _signals(raw: _Raw, path: str, rate: float | None, mono: bool) -> list[np.ndarray]:
    """Finite, of one rate and as many channels."""
    for place, row in enumerate(raw.rows):
        if not np.isfinite(row).all():
            channel, step = (int(index[0]) for index in np.nonzero(~np.isfinite(row)))
            count = sum(not np.isfinite(one).all() for one in raw.rows)
            raise InvalidInput(
                f"{count} of {len(raw.rows)} rows of {path!r} hold NaN or infinities, the first in {raw.name(place)}, column "
                f"{step} (channel {channel}): fill or remove them"
            )
    rows = [row.mean(0, keepdims=True) for row in raw.rows] if mono else raw.rows
    for place, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise InvalidInput(
                f"{raw.name(place)} has {len(row)} channels, {raw.name(0)} has {len(rows[0])}: take their mean with mono=True "
                "(--mono)"
            )
    if rate is None:
        for place, own in enumerate(raw.rates or ()):
            if raw.rates and own != raw.rates[0]:
                raise InvalidInput(
                    f"{raw.name(place)} has {own:g} samples a second, {raw.name(0)} has {raw.rates[0]:g}: resample all to one "
                    f"rate with rate={min(raw.rates):g} (--rate {min(raw.rates):g})"
                )
        return rows
    if raw.rates is None:
        raise InvalidInput(
            f"{path!r} does not say its samples a second, so it cannot be resampled to {rate:g}: WAV files do, and .npz files "
            "with a number named rate"
        )
    return [_resampled(row, own, rate) for row, own in zip(rows, raw.rates, strict=True)]


def _resampled(row: Float[np.ndarray, "channel length"], own: float, rate: float) -> np.ndarray:
    if own == rate:
        return row
    for name, value in (("rate", rate), ("the rate of the data", own)):
        if value != int(value):
            raise InvalidInput(f"{name} must be a whole number to resample by, got {value:g}")
    common = math.gcd(int(own), int(rate))
    up, down = int(rate) // common, int(own) // common
    return require("scipy.signal", "sequence").resample_poly(row, up, down, axis=-1).astype(np.float32)


def _labelled(raw: _Raw, path: str, task: str, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if raw.labels is None:
        n = len(raw.rows)
        return (np.full(n, np.nan, np.float32), ()) if task == "regression" else (np.full(n, -1), tuple(classes or ()))
    if task == "regression":
        return _values(raw.labels, raw.name, path), ()
    if raw.labels.dtype.kind == "f" and (raw.labels != np.round(raw.labels)).any():
        place = int(np.flatnonzero(raw.labels != np.round(raw.labels))[0])
        raise InvalidInput(
            f"the label of {raw.name(place)} of {path!r} is {raw.labels[place]:g}: numbers that are not whole are no classes; "
            "for values use task='regression' (--task regression)"
        )
    labels = [_name(one) for one in raw.labels.tolist()]
    found = sorted(set(labels), key=_order)
    if classes is not None:
        strange = [name for name in found if name not in classes]
        if strange:
            raise InvalidInput(
                f"{path!r} has labels that the model does not know: {', '.join(strange[:_SHOWN])}; it knows {', '.join(classes)}"
            )
    elif len(found) < 2:
        raise InvalidInput(
            f"all {len(labels)} rows of {path!r} have the label {found[0]!r}: at least two classes are needed"
        )
    names = tuple(found if classes is None else classes)
    code = {name: place for place, name in enumerate(names)}
    return np.array([code[name] for name in labels], np.int64), names


def _values(labels: np.ndarray, name: Callable[[int], str], path: str) -> Float[np.ndarray, " n"]:
    try:
        if labels.dtype.kind not in "fiubUS":
            raise ValueError(f"they are {labels.dtype}")
        values = labels.astype(np.float32)
    except ValueError as error:
        raise InvalidInput(
            f"labels of {path!r} are no numbers, as regression needs: {error}; leave out task='regression' (--task regression) "
            "for classes"
        ) from error
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise InvalidInput(
            f"the label of {name(int(bad[0]))} of {path!r} is {values[bad[0]]}: remove {len(bad)} such rows"
        )
    return values


def _name(label: Any) -> str:
    """A class by its name: 3 for 3.0 as for "3"."""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def _order(name: str) -> tuple[bool, float, str]:
    """Whole numbers by size, then names."""
    number = name.removeprefix("-").isdecimal()
    return (not number, float(name) if number else 0.0, name)
