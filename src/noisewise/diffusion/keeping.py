"""The folders of `noisewise diffusion`: what was asked for there, on which contents, and what is finished."""

import json
from pathlib import Path
from typing import Any

from noisewise.errors import RunFolderError
from noisewise.files import write_atomically

__all__ = [
    "HEAD",
    "LEAST",
    "REPORT",
    "RESULTS",
    "RUN",
    "SEEN",
    "SUMMARY",
    "claim",
    "finished",
    "read_json",
    "refuse_file",
]

RUN, HEAD, SUMMARY, REPORT, RESULTS = "run", "head", "summary.json", "report.html", "results.json"
# short names of the images that a head was fitted on
SEEN = "fitted-on.txt"
_COMMAND = "command.json"
# images that a fit needs
LEAST = 40


def refuse_file(out: Path) -> None:
    """Raise `RunFolderError` where --out names a file."""
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; --out names a folder")


def claim(out: Path, command: dict[str, Any], own: tuple[str, ...]) -> None:
    """Record a new command; refuse a folder of something else, or of the same command with other options."""
    from noisewise.sampling.cli import read_command

    record = out / _COMMAND
    if record.is_file():
        before = read_command(record)
        for name in command:
            if before.get(name) != command[name]:
                said = [repr(value) if value is not None else "nothing" for value in (before.get(name), command[name])]
                raise RunFolderError(
                    f"{out} holds a {before.get('command')} with {name} {said[0]}, but {said[1]} was asked for; choose another "
                    "folder, or give the same command to go on"
                )
        return
    refuse_file(out)
    if out.exists() and any(out.iterdir()):
        held = "no command.json beside its results" if any((out / name).exists() for name in own) else "other files"
        raise RunFolderError(f"{out} is not empty and holds {held}; choose a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {out} cannot be created ({error.strerror}); choose another folder") from error
    write_atomically(record, json.dumps(command, indent=2))


def read_json(path: Path) -> dict[str, Any]:
    """The values in a file of this command line. Raises `RunFolderError` for a damaged one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}): remove it, and run the same command again") from error


def finished(out: Path) -> dict[str, Any] | None:
    """The summary of a fit of which nothing is left to do."""
    if not (out / SUMMARY).is_file() or not (out / REPORT).is_file():
        return None
    facts = read_json(out / SUMMARY)
    return None if facts["interrupted"] or facts["cut"] else facts
