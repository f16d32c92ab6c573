"""The data of protocol C, where they lie at hand: Omniglot's characters as 28 x 28 images, split by who drew them."""

import io
import os
import zipfile
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput, RunFolderError, require

__all__ = ["HELD_OUT_DRAWERS", "Omniglot", "find_omniglot", "omniglot", "omniglot_folder", "omniglot_images"]

HELD_OUT_DRAWERS = (18, 19, 20)
_SIDE = 28
_ARCHIVES = ("images_background_small1.zip", "images_background_small2.zip")


def omniglot_folder() -> Path | None:
    """`omniglot-small` in the folder that the environment variable NOISEWISE_DATA names, or None where it is not there."""
    root = os.environ.get("NOISEWISE_DATA")
    folder = Path(root) / "omniglot-small" if root else None
    return folder if folder is not None and all((folder / name).is_file() for name in _ARCHIVES) else None


def find_omniglot() -> Path:
    """`omniglot_folder`, or `InvalidInput` that says how to get it."""
    folder = omniglot_folder()
    if folder is None:
        raise InvalidInput(
            f"protocol C needs Omniglot: put {' and '.join(_ARCHIVES)} from the folder python of the repository "
            "brendenlake/omniglot into a folder omniglot-small, and set the environment variable NOISEWISE_DATA to the folder "
            f"that omniglot-small is in (it is {os.environ.get('NOISEWISE_DATA') or 'not set'})"
        )
    return folder


class Omniglot(NamedTuple):
    """Images with ink 1 on -1, and the number of each image's alphabet in `alphabets`."""

    train: Float[Tensor, "n 1 28 28"]
    held_out: Float[Tensor, "m 1 28 28"]
    train_labels: Int[Tensor, "n"]
    held_out_labels: Int[Tensor, "m"]
    alphabets: tuple[str, ...]


def omniglot(folder: Path | str) -> Omniglot:
    """All images by the order of their files; held out are drawers 18 to 20 of the 20 of each alphabet.

    `folder`: of the two archives images_background_small1.zip and images_background_small2.zip, which are read in memory.
    Greek and Latin are in both and are taken once. Raises `InvalidInput` where one is missing, `RunFolderError` where one is
    damaged.
    Source: Lake, Salakhutdinov & Tenenbaum, Science 350, 2015.
    """
    alphabets: list[str] = []
    train: list[tuple[Tensor, int]] = []
    held_out: list[tuple[Tensor, int]] = []
    for name in _ARCHIVES:
        path = Path(folder) / name
        if not path.is_file():
            raise InvalidInput(
                f"{folder} holds no {name}; get it from the repository brendenlake/omniglot, folder python"
            )
        try:
            found = _read(path, frozenset(alphabets))
        except (zipfile.BadZipFile, OSError) as error:
            raise RunFolderError(f"{path} is damaged ({error}); fetch it anew") from error
        for alphabet, drawer, image in found:
            if alphabet not in alphabets:
                alphabets.append(alphabet)
            (held_out if drawer in HELD_OUT_DRAWERS else train).append((image, alphabets.index(alphabet)))
    return Omniglot(
        torch.stack([image for image, _ in train]),
        torch.stack([image for image, _ in held_out]),
        torch.tensor([label for _, label in train]),
        torch.tensor([label for _, label in held_out]),
        tuple(alphabets),
    )


def omniglot_images(folder: Path | str) -> tuple[Float[Tensor, "n 1 28 28"], Float[Tensor, "m 1 28 28"]]:
    """The training and the held-out images of `omniglot`."""
    return omniglot(folder)[:2]


def _read(path: Path, seen: frozenset[str]) -> list[tuple[str, int, Tensor]]:
    """Alphabet, drawer and image of each file of the alphabets not yet `seen`."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            # archive/alphabet/character/0123_DRAWER.png
            parts = PurePosixPath(name).parts
            if len(parts) != 4 or not name.endswith(".png") or parts[1] in seen:
                continue
            drawer = int(PurePosixPath(name).stem.rpartition("_")[2])
            found.append((parts[1], drawer, _image(archive.read(name))))
    return found


def _image(content: bytes) -> Tensor:
    """[1, 28, 28]: each grey value is the share of ink in its part of the page."""
    pillow = require("PIL.Image", "diffusion")
    page = pillow.open(io.BytesIO(content)).convert("L").resize((_SIDE, _SIDE), pillow.Resampling.BOX)
    grey = torch.tensor(bytearray(page.tobytes()), dtype=torch.uint8).reshape(1, _SIDE, _SIDE)
    return 1 - grey.to(torch.float32) / 127.5
