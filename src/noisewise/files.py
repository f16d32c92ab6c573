"""Writing a file so that a crash leaves either the old one or the new one, never half of it; the text of a table."""

import contextlib
import csv
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["as_csv", "write_atomically"]


def as_csv(names: Sequence[str], rows: Sequence[Sequence[float]]) -> str:
    """The text of a CSV file of numbers, with a first line of `names` where there are any, commas and quotes included."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    if names:
        writer.writerow(names)
    writer.writerows([f"{value:.9g}" for value in row] for row in rows)
    return file.getvalue()


def write_atomically(path: str | os.PathLike, data: str | bytes) -> Path:
    """Write `data` (text as UTF-8) to `path`: aside in the same folder, fsync, rename. Makes missing folders.

    Raises `OSError` where the folder cannot be written; an older file at `path` is then intact.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, aside = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        # the name that was asked for, not the one aside
        error.filename = str(path)
        raise
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; a result is as readable as any file its owner writes
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    # the rename itself is durable only once the folder is written; systems without folder handles skip this
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
