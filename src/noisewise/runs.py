"""Run folders: what a long computation was asked for, its atomic checkpoint, its finished pieces and its events."""

import json
import time
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from noisewise import __version__
from noisewise.errors import RunFolderError
from noisewise.files import write_atomically

__all__ = ["RunFolder"]

_SCHEMA = 1
_CONFIG, _CHECKPOINT, _EVENTS = "run.json", "checkpoint.safetensors", "events.jsonl"


class RunFolder:
    """A folder with `run.json` (schema, kind, configuration), `checkpoint.safetensors`, `piece-*.safetensors`, `events.jsonl`.

    Every file but the event log is written aside, synced and renamed, so that a crash at any moment leaves the last
    checkpoint and all pieces that it counts.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def exists(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / _CONFIG).is_file()

    def begin(self, kind: str, config: dict[str, Any]) -> None:
        """Claim the folder for a new run. Raises `RunFolderError` when another run, or other files, are there."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise RunFolderError(f"{self.path} is not empty and holds no run that could go on; give another folder")
        record = {"schema": _SCHEMA, "kind": kind, "noisewise": __version__, "config": config}
        write_atomically(self.path / _CONFIG, json.dumps(record, indent=2) + "\n")

    def config(self, kind: str) -> dict[str, Any]:
        """The configuration stored by `begin`. Raises `RunFolderError` for another kind or schema, or a damaged file."""
        try:
            record = json.loads((self.path / _CONFIG).read_text())
        except FileNotFoundError as error:
            raise RunFolderError(f"{self.path} holds no run: {_CONFIG} is missing") from error
        except ValueError as error:
            raise RunFolderError(f"{self.path / _CONFIG} is damaged: {error}") from error
        if record.get("schema") != _SCHEMA:
            raise RunFolderError(f"{self.path} has schema {record.get('schema')!r}, this version reads {_SCHEMA}")
        if record.get("kind") != kind:
            raise RunFolderError(f"{self.path} holds a {record.get('kind')!r} run, not a {kind!r} run")
        return record["config"]

    def expect(self, kind: str, config: dict[str, Any]) -> None:
        """Raise `RunFolderError` that names the first difference when the run here was asked for something else."""
        stored, asked = self.config(kind), json.loads(json.dumps(config))
        for key in sorted(stored.keys() | asked.keys()):
            if stored.get(key) != asked.get(key):
                raise RunFolderError(
                    f"{self.path} holds a run with {key}={stored.get(key)!r}, but {key}={asked.get(key)!r} was asked for; "
                    "give another folder, or the same arguments to go on"
                )

    def checkpoint(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """Replace the checkpoint atomically by `tensors` and the JSON values `progress`."""
        self._write(_CHECKPOINT, tensors, progress)

    def restore(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors (on the CPU) and progress of the last checkpoint; None before the first."""
        return self._read(_CHECKPOINT) if (self.path / _CHECKPOINT).is_file() else None

    def put_piece(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Write finished piece `index`; it counts once a checkpoint says so, until then a resumed run overwrites it."""
        self._write(f"piece-{index:05d}.safetensors", tensors, {})

    def piece(self, index: int) -> dict[str, Tensor]:
        """Read finished piece `index`."""
        return self._read(f"piece-{index:05d}.safetensors")[0]

    def event(self, what: str, **values: Any) -> None:
        """Append one line to the event log."""
        line = json.dumps({"time": round(time.time(), 3), "event": what, **values})
        with open(self.path / _EVENTS, "a") as file:
            file.write(line + "\n")

    def _write(self, name: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        ready = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
        write_atomically(self.path / name, save(ready, metadata={"values": json.dumps(values)}))

    def _read(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            with safe_open(self.path / name, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
                return tensors, json.loads((file.metadata() or {}).get("values", "{}"))
        except FileNotFoundError as error:
            raise RunFolderError(f"{self.path / name} is missing, so the run cannot be read") from error
        except (SafetensorError, ValueError) as error:
            raise RunFolderError(f"{self.path / name} is damaged: {error}") from error
