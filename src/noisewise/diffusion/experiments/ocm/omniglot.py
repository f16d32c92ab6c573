"""Protocol C, where its data lie at hand: Omniglot's characters as 28 x 28 grey images, split by who drew them."""

import io
import os
import zipfile
from pathlib import Path, PurePosixPath

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, RunFolderError, require

__all__ = ["HELD_OUT_DRAWERS", "omniglot_folder", "omniglot_images"]

HELD_OUT_DRAWERS = (18, 19, 20)
_SIDE = 28
_ARCHIVES = ("images_background_small1.zip", "images_background_small2.zip")


def omniglot_folder() -> Path | None:
    """`omniglot-small` in the folder that the environment variable NOISEWISE_DATA names, or None where it is not there."""
    root = os.environ.get("NOISEWISE_DATA")
    folder = Path(root) / "omniglot-small" if root else None
    return folder if folder is not None and all((folder / name).is_file() for name in _ARCHIVES) else None


def omniglot_images(folder: Path | str) -> tuple[Float[Tensor, "n 1 28 28"], Float[Tensor, "m 1 28 28"]]:
    """Training and held-out images, ink 1 on -1; held out are drawers 18 to 20 of the 20 of each alphabet.

    `folder`: of the two archives images_background_small1.zip and images_background_small2.zip, which are read in memory.
    Greek and Latin are in both and are taken once. Raises `InvalidInput` where one is missing, `RunFolderError` where one is
    damaged.
    Source: Lake, Salakhutdinov & Tenenbaum, Science 350, 2015.
    """
    seen: set[str] = set()
    train: list[Tensor] = []
    held_out: list[Tensor] = []
    for name in _ARCHIVES:
        path = Path(folder) / name
        if not path.is_file():
            raise InvalidInput(
                f"{folder} holds no {name}; get it from the repository brendenlake/omniglot, folder python"
            )
        try:
            found = _read(path, seen)
        except (zipfile.BadZipFile, OSError) as error:
            raise RunFolderError(f"{path} is damaged ({error}); fetch it anew") from error
        for drawer, image in found:
            (held_out if drawer in HELD_OUT_DRAWERS else train).append(image)
    return torch.stack(train), torch.stack(held_out)


def _read(path: Path, seen: set[str]) -> list[tuple[int, Tensor]]:
    """Drawer and image of each file of the alphabets not yet `seen`, to which they are added."""
    found, here = [], set()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            # archive/alphabet/character/0123_DRAWER.png
            parts = PurePosixPath(name).parts
            if len(parts) != 4 or not name.endswith(".png") or parts[1] in seen:
                continue
            here.add(parts[1])
            drawer = int(PurePosixPath(name).stem.rpartition("_")[2])
            found.append((drawer, _image(archive.read(name))))
    seen |= here
    return found


def _image(content: bytes) -> Tensor:
    """[1, 28, 28]: each grey value is the share of ink in its part of the page."""
    pillow = require("PIL.Image", "diffusion")
    page = pillow.open(io.BytesIO(content)).convert("L").resize((_SIDE, _SIDE), pillow.Resampling.BOX)
    grey = torch.tensor(bytearray(page.tobytes()), dtype=torch.uint8).reshape(1, _SIDE, _SIDE)
    return 1 - grey.to(torch.float32) / 127.5
