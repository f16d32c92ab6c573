"""Saving what was learnt: `config.json` for people, `model.safetensors` for numbers, nothing pickled."""

import hashlib
import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from noisewise import __version__
from noisewise.errors import RunFolderError
from noisewise.files import write_atomically

__all__ = ["read_pretrained", "write_pretrained"]

_SCHEMA = 1
_CONFIG, _MODEL = "config.json", "model.safetensors"


def write_pretrained(folder: str | Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write the class `name` with its JSON `config` and `tensors` into `folder`, each file atomically.

    The configuration carries the digest of the weights, so that two files of different saves are never read as one.
    """
    path = Path(folder)
    weights = save({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})
    digest = hashlib.sha256(weights).hexdigest()
    record = {"schema": _SCHEMA, "class": name, "noisewise": __version__, "config": config, "model_sha256": digest}
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    try:
        write_atomically(path / _MODEL, weights)
        write_atomically(path / _CONFIG, text)
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written to: {error.strerror}; give another folder") from error
    return path


def read_pretrained(folder: str | Path, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and tensors (on the CPU) of a saved `name`.

    Raises `RunFolderError` that names what was found, for another class or schema, and for missing or damaged files.
    """
    path = Path(folder)
    try:
        record = json.loads((path / _CONFIG).read_text(encoding="utf-8"))
        weights = (path / _MODEL).read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunFolderError(f"{path} holds no saved {name}: {Path(error.filename).name} is missing") from error
    except ValueError as error:
        raise RunFolderError(f"{path / _CONFIG} is damaged: {error}") from error
    if not isinstance(record, dict) or record.get("schema") != _SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else record
        raise RunFolderError(f"{path} has schema {found!r}, this version reads {_SCHEMA}")
    if record.get("class") != name:
        raise RunFolderError(f"{path} holds a saved {record.get('class')!r}, not {name!r}: load it with its own class")
    if record.get("model_sha256") != hashlib.sha256(weights).hexdigest():
        raise RunFolderError(
            f"{path / _MODEL} is not the file that {_CONFIG} was saved with: damaged, or a save was cut short"
        )
    try:
        return record["config"], load(weights)
    except (KeyError, SafetensorError) as error:
        raise RunFolderError(f"{path} is damaged: {error}") from error
