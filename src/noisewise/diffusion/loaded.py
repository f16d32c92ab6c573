"""The pipeline and the head that a command of `noisewise diffusion` is given, loaded and checked."""

import hashlib
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from noisewise.command import SUMMARY, read_json, refuse_unfinished
from noisewise.diffusion.head import CovarianceHead
from noisewise.diffusion.images import read_counted
from noisewise.diffusion.keeping import HEAD, SEEN
from noisewise.diffusion.levels import NoiseLevels
from noisewise.errors import InvalidInput, NoisewiseWarning, require
from noisewise.training import fingerprint

__all__ = ["Loaded", "head_mark", "load_head", "load_pipeline", "marks_of", "warn_seen"]

# configurations of networks that take more than x_t and t
_CONDITIONED = ("cross_attention_dim", "num_class_embeds", "class_embed_type", "num_embeds_ada_norm")


@dataclass(frozen=True)
class Loaded:
    """A pipeline of images without conditions: its network, its noise levels, and the shape of an image."""

    source: str
    pipeline: Any
    network: Any
    levels: NoiseLevels
    event: tuple[int, int, int]
    device: str

    def images(self, data: str, limit: int | None) -> torch.Tensor:
        """[n, *event] in [-1, 1], on the device; says how many were fitted to the network's size."""
        x, other = read_counted(data, self.event[0], self.event[1:], limit)
        if other:
            height, width = self.event[1:]
            print(
                f"{other} of {len(x)} images are not {height} x {width}: the middle of each was cut out and resized",
                file=sys.stderr,
            )
        return x.to(self.device)

    def mark(self) -> float:
        """A number that other weights do not have."""
        return fingerprint([weight[:64] for weight in self.network.parameters()])

    def sources(self, data: str, images: torch.Tensor) -> dict[str, Any]:
        """What was read, so that the same command on other contents is told from the same command."""
        place = Path(data).expanduser()
        digest = hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()
        return {
            "model": self.source,
            "weights": self.mark(),
            "data": str(place.resolve()) if place.exists() else data,
            "images_sha256": digest,
        }


def load_pipeline(source: str, device: str | None) -> Loaded:
    """The pipeline in a folder, or of a hub id. Raises `InvalidInput` for one that this command line has no form of."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path.resolve()
        if not (path / "model_index.json").is_file():
            if not (path.parent / "model_index.json").is_file():
                raise InvalidInput(
                    f"{source!r} holds no model_index.json: give the folder that pipeline.save_pretrained wrote (a network "
                    "alone does not say the noise that it was trained with)"
                )
            path = path.parent
        name = str(path)
    elif path.exists():
        raise InvalidInput(f"{source!r} is a file; give the folder of a diffusers pipeline")
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InvalidInput(f"there is no folder {source!r}, and a hub id is OWNER/NAME")
    else:
        name = source
    library = require("diffusers", "diffusion")
    bars = require("diffusers.utils.logging", "diffusion")
    bars.disable_progress_bar()
    try:
        pipeline = library.DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise InvalidInput(f"{source!r} cannot be loaded as a diffusers pipeline: {error}") from error
    finally:
        bars.enable_progress_bar()
    return _checked(name, pipeline, device)


def _checked(source: str, pipeline: Any, device: str | None) -> Loaded:
    kind = type(pipeline).__name__
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if network is None or getattr(pipeline, "scheduler", None) is None:
        raise InvalidInput(f"{kind} has no unet or transformer with a scheduler: a diffusion pipeline is needed")
    asked = [name for name in _CONDITIONED if network.config.get(name) is not None]
    if getattr(pipeline, "vae", None) is not None or asked:
        why = f"takes conditions ({', '.join(asked)})" if asked else "works on latents"
        raise InvalidInput(
            f"{kind} {why}; this command line is for pipelines of images without conditions. From Python: "
            "fit_covariance(model, head, (data, class_labels)), then generate(..., class_labels=...) or attach(pipeline, head)"
        )
    channels, size = network.config.get("in_channels"), network.config.get("sample_size")
    if channels is None or size is None:
        raise InvalidInput(f"{type(network).__name__} does not say its in_channels and sample_size")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network.to(torch.device(place)).eval()
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"--device {place} cannot be used: {str(error).splitlines()[0]}") from error
    levels = NoiseLevels.from_scheduler(pipeline.scheduler)
    return Loaded(source, pipeline, network, levels, (int(channels), int(height), int(width)), place)


def load_head(folder: Path, loaded: Loaded) -> CovarianceHead:
    """The head in `folder` or `folder`/head, checked against the network."""
    place = folder / HEAD if (folder / HEAD).is_dir() else folder
    if not (place / "config.json").is_file():
        refuse_unfinished(folder, "head of `noisewise diffusion fit`")
    head = CovarianceHead.from_pretrained(place)
    head.check_model(loaded.network, loaded.levels)
    summary = place.parent / SUMMARY
    if summary.is_file() and read_json(summary).get("interrupted"):
        warnings.warn(
            f"the fit in {place.parent} was interrupted: run the same fit command again to go on",
            NoisewiseWarning,
            stacklevel=3,
        )
    return head.to(loaded.device).eval()


def head_mark(head: CovarianceHead) -> float:
    """A number that another head does not have."""
    return fingerprint([*head.parameters(), head.residual, head.gamma])


def marks_of(images: torch.Tensor) -> list[str]:
    """A short name of each image, which another one does not have."""
    return [hashlib.sha256(image.tobytes()).hexdigest()[:16] for image in images.cpu().numpy()]


def warn_seen(folder: Path, images: torch.Tensor) -> None:
    """Warn of images that the head in `folder` or `folder`/head was fitted on, where its fit is beside it."""
    record = (folder if (folder / HEAD).is_dir() else folder.parent) / SEEN
    if not record.is_file():
        return
    seen = set(record.read_text(encoding="utf-8").split())
    known = sum(mark in seen for mark in marks_of(images))
    if known:
        warnings.warn(
            f"{known} of these {len(images)} images are among those that the head was fitted on: it may look better on them than "
            "on new ones; give images that it has not seen",
            NoisewiseWarning,
            stacklevel=3,
        )
