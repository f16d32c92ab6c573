"""What the commands that leave a folder have in common: its record, the refusal of another's folder, and Ctrl-C."""

import hashlib
import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import typer

from noisewise.errors import RunFolderError
from noisewise.files import write_atomically

__all__ = [
    "COMMAND",
    "REPORT",
    "RUN",
    "SUMMARY",
    "claim",
    "digest",
    "interruptible",
    "make_folder",
    "read_command",
    "read_json",
    "refuse_file",
    "refuse_unfinished",
    "typed",
]

# what lies in the folder of --out: the command, the run to go on from, and what came of it for a script and for a person
COMMAND, RUN, SUMMARY, REPORT = "command.json", "run", "summary.json", "report.html"


def claim(out: Path, command: dict[str, Any], own: tuple[str, ...]) -> None:
    """Record a new command; refuse a folder of something else, or of the same command with other options.

    `command["command"]` is its name; `own` are the files and folders that it writes. Raises `RunFolderError`.
    """
    record = out / COMMAND
    if record.is_file():
        before = read_command(record)
        differing = [name for name in command if before.get(name) != command[name]]
        # what was read may differ because an option does, and a digest tells nobody anything
        told = [name for name in differing if not name.endswith("_sha256")]
        if told:
            old, new = (
                [repr(one.get(name)) if one.get(name) is not None else "nothing" for name in told]
                for one in (before, command)
            )
            held = " and ".join(f"{name} {value}" for name, value in zip(told, old, strict=True))
            wanted = f"{' and '.join(new)} {'were' if told[1:] else 'was'}"
            raise RunFolderError(
                f"{out} holds a {before.get('command')} with {held}, but {wanted} asked for; choose another folder, or give the "
                "same command to go on"
            )
        if differing:
            raise RunFolderError(
                f"{out} holds a {before.get('command')} with other contents of {differing[0].removesuffix('_sha256')} than there "
                "are now; choose another folder, or bring them back to go on"
            )
        return
    refuse_file(out)
    if out.exists() and any(out.iterdir()):
        held = "no command.json beside its results" if any((out / name).exists() for name in own) else "other files"
        raise RunFolderError(f"{out} is not empty and holds {held}; choose a new folder")
    make_folder(out)
    write_atomically(record, json.dumps(command, indent=2))


def refuse_file(out: Path) -> None:
    """Raise `RunFolderError` where `out` is a file."""
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; --out names a folder")


def make_folder(out: Path) -> None:
    """Make the folder of --out. Raises `RunFolderError` where the system refuses."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out {out} cannot be created ({error.strerror}); choose another folder") from error


def refuse_unfinished(folder: Path, what: str) -> NoReturn:
    """Raise `RunFolderError` for a fit that was cut short before it was saved, or for a `folder` without `what`."""
    if (folder / RUN).is_dir():
        raise RunFolderError(
            f"the fit in {folder} was cut short before it was saved: run the same fit command again to go on"
        )
    raise RunFolderError(f"{folder} holds no {what}")


def read_command(record: Path) -> dict[str, Any]:
    """What a `command.json` holds. Raises `RunFolderError` for a damaged one, `OSError` where there is none."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{record} is damaged ({error}); start again in another folder") from error


def read_json(path: Path) -> dict[str, Any]:
    """What a summary or a table of results holds. Raises `RunFolderError` for a damaged one, `OSError` where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path} is damaged ({error}): remove it, and run the same command again") from error


def digest(path: Path) -> str:
    """SHA-256 of a user's file, so that a command is told from the same words on other contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@contextmanager
def interruptible(again: str) -> Iterator[None]:
    """Ctrl-C, in the words and with the exit code of a shell."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"interrupted; {again}", err=True)
        raise typer.Exit(130) from None


def typed(words: list[str], options: dict[str, Any], usual: dict[str, Any] | None = None) -> str:
    """A command line of `words` and options; those that were left out (None), or are as `usual`, are left out."""
    said = list(words)
    for name, value in options.items():
        if value is not None and value != (usual or {}).get(name):
            # 60, as it was typed, and not 60.0
            whole = isinstance(value, float) and value.is_integer()
            said += [f"--{name.replace('_', '-')}", str(int(value) if whole else value)]
    return shlex.join(said)
