"""Images as the tensors that diffusion networks take, from folders, arrays and data sets; and back to PNG files."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, MissingExtra, require
from noisewise.files import write_atomically
from noisewise.typing import check_count

__all__ = ["contact_sheet", "read_counted", "read_images", "write_images"]

_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# pillow's modes by number of channels
_MODES = {1: "L", 3: "RGB"}
# least side of an image in a sheet, and the gap around it
_SHOWN, _GAP = 64, 2


def read_images(
    source: str | Path, channels: int, size: int | tuple[int, int], limit: int | None = None
) -> Float[Tensor, "n channel height width"]:
    """Images in [-1, 1], the first `limit` of them, for a network of `channels` and `size` (a side, or height and width).

    `source`: a folder of image files, nested folders included, in the order of their names: the middle of each is cut to the
    aspect of `size`, then resized; alpha is dropped. Or a .npy array of exactly that size, [n, H, W], [n, C, H, W] or
    [n, H, W, C]: integers are grey levels 0 to 255; floats with any value below 0 are taken as [-1, 1], floats without one as
    [0, 1]. Or the name of a data set, "name" or "name:split" (train by default), whose first column of images is read as files.

    Raises `InvalidInput` where there are no images, for a file that cannot be read, and for other shapes and ranges;
    `MissingExtra` for the name of a data set where `datasets` is not installed.
    """
    return read_counted(source, channels, size, limit)[0]


def read_counted(
    source: str | Path, channels: int, size: int | tuple[int, int], limit: int | None = None
) -> tuple[Float[Tensor, "n channel height width"], int]:
    """As `read_images`, and how many of them had another size."""
    height, width = (size, size) if isinstance(size, int) else size
    shape = (check_count("channels", channels), check_count("size", height), check_count("size", width))
    most = None if limit is None else check_count("limit", limit)
    path = Path(source).expanduser()
    if path.is_dir():
        return _read_folder(path, shape, most)
    if path.suffix == ".npy":
        return _read_array(path, shape, most), 0
    if path.exists():
        raise InvalidInput(f"{str(source)!r} is neither a folder of images nor a .npy array")
    return _read_dataset(str(source), shape, most)


def write_images(folder: str | Path, x: Float[Tensor, "n channel height width"], first: int = 0) -> list[Path]:
    """Write each image, clipped to [-1, 1], as a PNG file of 8 bits in `folder`, numbered from `first`; their paths."""
    made = []
    for index, image in enumerate(_grey_levels(x), first):
        made.append(write_atomically(Path(folder) / f"{index:06d}.png", _as_png(image)))
    return made


def contact_sheet(x: Float[Tensor, "n channel height width"], columns: int = 8) -> Float[Tensor, "1 channel h w"]:
    """All images on one white sheet, row by row, small ones enlarged by whole factors."""
    if not len(x):
        raise InvalidInput("a sheet needs at least one image")
    columns = min(check_count("columns", columns), len(x))
    factor = max(1, _SHOWN // max(x.shape[-2:]))
    large = x.detach().float().cpu().repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    n, channels, height, width = large.shape
    rows = -(-n // columns)
    sheet = torch.ones(1, channels, rows * (height + _GAP) + _GAP, columns * (width + _GAP) + _GAP)
    for place, image in enumerate(large):
        top, left = (place // columns) * (height + _GAP) + _GAP, (place % columns) * (width + _GAP) + _GAP
        sheet[0, :, top : top + height, left : left + width] = image
    return sheet


def _read_folder(path: Path, shape: tuple[int, int, int], limit: int | None) -> tuple[Tensor, int]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and file.is_file())
    if not files:
        raise InvalidInput(f"there are no images in {str(path)!r}: files that end in {', '.join(_SUFFIXES)} are read")
    library = require("PIL.Image", "diffusion")
    images, other = [], 0
    for file in files[:limit]:
        try:
            with library.open(file) as image:
                images.append(_fitted(image, shape, str(file)))
                other += image.size != shape[:0:-1]
        except InvalidInput:
            raise
        # pillow raises these for what is cut short, is no image, or would unpack to gigabytes
        except (OSError, SyntaxError, ValueError, library.DecompressionBombError) as error:
            raise InvalidInput(f"{str(file)!r} cannot be read as an image ({error}): remove or mend it") from error
    return torch.stack(images), other


def _fitted(image: Any, shape: tuple[int, int, int], name: str) -> Tensor:
    """One picture, cut and resized, [channel, height, width] in [-1, 1]."""
    import numpy as np

    channels, height, width = shape
    if channels not in _MODES:
        raise InvalidInput(
            f"image files have 1 or 3 channels, the network takes {channels}: give a .npy array [n, {channels}, {height}, "
            f"{width}]"
        )
    if image.mode.startswith(("I", "F")):
        raise InvalidInput(
            f"{name!r} has more than 8 bits a pixel (mode {image.mode}): which value is white is not known here; give a .npy "
            "array in [-1, 1]"
        )
    upright = require("PIL.ImageOps", "diffusion").exif_transpose(image).convert(_MODES[channels])
    bicubic = require("PIL.Image", "diffusion").Resampling.BICUBIC
    # the cut comes first: a resize of a box would see what lies around it
    levels = np.array(_middle(upright, height, width).resize((width, height), bicubic))
    return _from_levels(torch.from_numpy(levels.reshape(height, width, channels)).permute(2, 0, 1))


def _middle(image: Any, height: int, width: int) -> Any:
    """The largest part of `image` with the aspect height : width, from its middle."""
    scale = min(image.width / width, image.height / height)
    wide, high = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (image.width - wide) // 2, (image.height - high) // 2
    return image.crop((left, top, left + wide, top + high))


def _from_levels(levels: Tensor) -> Tensor:
    return levels.float() / 127.5 - 1


def _read_array(path: Path, shape: tuple[int, int, int], limit: int | None) -> Tensor:
    import numpy as np

    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InvalidInput(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError) as error:
        # numpy would advise to allow pickles, which run whatever is in them
        raise InvalidInput(f"{str(path)!r} cannot be read: it is no array of numbers, as np.save writes") from error
    if array.dtype.kind not in "fiu":
        raise InvalidInput(f"{str(path)!r} holds {array.dtype}; images are integers 0 to 255, or floats")
    found = torch.from_numpy(_channels_first(array, shape, path)[:limit].copy(order="C").astype(np.float64))
    if not len(found):
        raise InvalidInput(f"{str(path)!r} holds no images: its shape is {array.shape}")
    return _scaled(found, array.dtype.kind in "iu", path)


def _channels_first(array: Any, shape: tuple[int, int, int], path: Path) -> Any:
    channels, height, width = shape
    if array.ndim == 3 and channels == 1 and array.shape[1:] == (height, width):
        return array[:, None]
    if array.ndim == 4 and array.shape[1:] == shape:
        return array
    if array.ndim == 4 and array.shape[1:] == (height, width, channels):
        return array.transpose(0, 3, 1, 2)
    raise InvalidInput(
        f"{str(path)!r} has shape {array.shape}; the network takes {channels} channel{'s' * (channels > 1)} of {height} x "
        f"{width}: [n, {channels}, {height}, {width}] or [n, {height}, {width}, {channels}]"
        + (f" or [n, {height}, {width}]" if channels == 1 else "")
    )


def _scaled(x: Tensor, whole: bool, path: Path) -> Tensor:
    bad = int((~torch.isfinite(x)).flatten(1).any(1).sum())
    if bad:
        raise InvalidInput(f"{bad} of {len(x)} images in {str(path)!r} are not finite")
    least, most = float(x.min()), float(x.max())
    if whole:
        if least < 0 or most > 255:
            raise InvalidInput(
                f"whole numbers in {str(path)!r} go from {least:g} to {most:g}; grey levels are 0 to 255"
            )
        return _from_levels(x)
    # a resized image may overshoot by rounding alone
    if least < -1 - 1e-6 or most > 1 + 1e-6:
        raise InvalidInput(
            f"floats in {str(path)!r} go from {least:g} to {most:g}; they must lie in [0, 1] or in [-1, 1]"
            + ("; grey levels 0 to 255 as whole numbers: array.astype('uint8')" if 1 < most <= 255 else "")
        )
    return (x if least < 0 else 2 * x - 1).clamp(-1, 1).float()


def _read_dataset(name: str, shape: tuple[int, int, int], limit: int | None) -> tuple[Tensor, int]:
    missing = f"there is no folder and no .npy file {name!r}"
    plain, _, split = name.partition(":")
    if plain.startswith((".", "/", "~")) or plain.count("/") > 1 or "\\" in plain or not plain:
        raise InvalidInput(missing)
    try:
        datasets = require("datasets", "diffusion")
    except MissingExtra as error:
        raise MissingExtra(f"{missing}; to read the data set of that name: pip install datasets") from error
    try:
        rows = datasets.load_dataset(plain, split=split or "train")
    except (OSError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{missing}, and the data set cannot be loaded: {error}") from error
    column = next((key for key, kind in rows.features.items() if isinstance(kind, datasets.Image)), None)
    if column is None:
        raise InvalidInput(f"the data set {name!r} has no column of images; it has {', '.join(rows.features)}")
    if not len(rows):
        raise InvalidInput(f"the data set {name!r} holds no rows")
    picked: Iterable[Any] = range(len(rows) if limit is None else min(limit, len(rows)))
    images, other = [], 0
    for index in picked:
        image = rows[index][column]
        images.append(_fitted(image, shape, f"{name}, row {index}"))
        other += image.size != shape[:0:-1]
    return torch.stack(images), other


def _grey_levels(x: Tensor) -> Tensor:
    """[n, height, width, channel], whole numbers 0 to 255."""
    if x.ndim != 4 or x.shape[1] not in _MODES:
        raise InvalidInput(f"images must be [n, 1 or 3, height, width], got {tuple(x.shape)}")
    if not bool(torch.isfinite(x).all()):
        raise InvalidInput(f"{int((~torch.isfinite(x)).flatten(1).any(1).sum())} of {len(x)} images are not finite")
    levels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1)


def _as_png(levels: Tensor) -> bytes:
    array = levels.numpy()
    file = io.BytesIO()
    image = require("PIL.Image", "diffusion").fromarray(array[..., 0] if array.shape[-1] == 1 else array)
    image.save(file, format="PNG")
    return file.getvalue()
