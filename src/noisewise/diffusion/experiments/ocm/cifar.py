"""Protocol D, at scale "paper" alone: CIFAR-10 by a public network, with FID, recall and the bound at few steps.

The protocol is that of Ou et al., ICLR 2025 (arXiv 2406.10808), and of Bao et al. before them: even steps with both ends, a
cut of the last noise, 50 000 draws against the training set, the bound on the test set.
"""

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from noisewise.comparison import Problem
from noisewise.diffusion.experiments.ocm.inception import inception_features
from noisewise.diffusion.experiments.ocm.systems import Drawn, Setup, covariance_systems, solver_systems
from noisewise.diffusion.images import read_images
from noisewise.errors import InvalidInput, require
from noisewise.metrics.frechet import frechet_distance
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.precision_recall import precision_recall

__all__ = ["CifarPlan", "cifar_problems", "prepare_cifar"]

# grey levels of images, 0 to 255, to features
Extractor = Callable[[Tensor], Tensor]

_NAMES = (
    "OCM",
    "OCM, then residuals",
    "residual NLL",
    "OCM, linear (paper)",
    "NPR",
    "SN",
    "Analytic",
    "beta~",
    "beta",
)
_GREYS = 256
# all seeds draw with the same network, and so with the same heads
_HEAD_SEED = 0


@dataclass(frozen=True)
class CifarPlan:
    """What the protocol takes, and how much of it.

    `model`: folder or id of a diffusers pipeline of images without conditions. `data`: the name of a data set with the splits
    train and test, or a folder that holds train and test, each a folder of images or a .npy file. `names`: systems with a
    covariance. `noise_clip`: most mean absolute noise of the last step, in grey levels, in the DDPM and the DDIM form.
    `neighbours`: of recall. `extractor(device)`: where FID and recall look. `heads`: folder that keeps the heads.
    Kind, rate, batch, steps and average of the heads are the authors'; ours are the cosine learning rate, the evaluation mode
    of the network, 5 % of the rows held out, and the positive map of those that are not "linear", "NPR" or "SN".
    """

    model: str
    data: str
    calls: tuple[int, ...] = (10, 25, 50, 100, 200)
    draws: int = 50_000
    tested: int = 10_000
    at_once: int = 500
    names: tuple[str, ...] = _NAMES
    kind: str = "simple"
    head_steps: int = 500_000
    batch: int = 128
    learning_rate: float | int = 1e-4
    ema: float | int = 0.9999
    noise_clip: tuple[float, float] = (2.0, 1.0)
    neighbours: int = 3
    extractor: Callable[[str], Extractor] = inception_features
    heads: Path | None = Path("runs") / "ocm-cifar10-heads"

    @classmethod
    def from_environment(cls) -> "CifarPlan":
        """The model of NOISEWISE_CIFAR10_MODEL and the data of NOISEWISE_CIFAR10_DATA, or the public ones.

        The public network holds the raw weights of its training, not the averaged ones: users report FID 12.4 with it where 3.2
        was published. Give the folder of a conversion of the averaged weights.
        """
        return cls(
            os.environ.get("NOISEWISE_CIFAR10_MODEL") or "google/ddpm-cifar10-32",
            os.environ.get("NOISEWISE_CIFAR10_DATA") or "uoft-cs/cifar10",
        )


@dataclass(frozen=True)
class _Materials:
    network: nn.Module
    schedule: Any
    train: Tensor
    test: Tensor
    extractor: Extractor


def cifar_problems(plan: CifarPlan, device: str) -> list[Problem]:
    """One problem for each number of network calls. Nothing is read before the first draw."""

    @functools.cache
    def setup(seed: int) -> Setup:
        m = prepare_cifar(plan, device)
        return Setup(
            m.network, m.train, m.test, seed, plan.draws, plan.head_steps, plan.batch, 1.0, 1.0, _GREYS, kind=plan.kind,
            learning_rate=plan.learning_rate, ema=plan.ema, schedule=m.schedule, noise_clip=plan.noise_clip,
            at_once=plan.at_once, head_seed=_HEAD_SEED, heads=plan.heads,
        )  # fmt: skip

    systems = (*covariance_systems(setup, {}, plan.names), *solver_systems(setup))
    return [
        Problem(
            protocol="D",
            name=f"CIFAR-10, {calls} calls",
            budget=calls,
            systems=systems,
            measure=functools.partial(_columns, plan, device),
            criterion="FID",
            notes=(_note(plan),) if calls == plan.calls[0] else (),
        )
        for calls in plan.calls
    ]


@functools.lru_cache(maxsize=1)
def prepare_cifar(plan: CifarPlan, device: str) -> _Materials:
    """The network, the images and the extractor, read once, downloads included.

    Raises `MissingExtra` without torch-fidelity, `InvalidInput` for a model or data that are not there or do not fit.
    """
    extractor = plan.extractor(device)
    network, schedule = _pipeline(plan.model)
    channels, size = network.config.in_channels, network.config.sample_size
    train_source, test_source = _splits(plan.data)
    train, test = read_images(train_source, channels, size), read_images(test_source, channels, size, plan.tested)
    network = network.to(device).eval().requires_grad_(False)
    return _Materials(network, schedule, train.to(device), test.to(device), extractor)


def _pipeline(source: str) -> tuple[Any, Any]:
    """The network and its scheduler's configuration."""
    library = require("diffusers", "diffusion")
    try:
        pipeline = library.DiffusionPipeline.from_pretrained(source)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise InvalidInput(
            f"{source!r} cannot be loaded as a diffusers pipeline ({error}): set NOISEWISE_CIFAR10_MODEL to the folder of one"
        ) from error
    network = getattr(pipeline, "unet", None)
    if network is None or network.config.get("sample_size") is None or network.config.get("in_channels") != 3:
        raise InvalidInput(f"{source!r} is no pipeline of colour images with a UNet: NOISEWISE_CIFAR10_MODEL")
    return network, pipeline.scheduler.config


def _splits(source: str) -> tuple[str, str]:
    """Where the training and the test images are."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        name = source.removesuffix(":train")
        return f"{name}:train", f"{name}:test"
    found = [
        next((p for p in (folder / part, folder / f"{part}.npy") if p.exists()), None) for part in ("train", "test")
    ]
    if None in found:
        raise InvalidInput(
            f"{source!r} must hold train and test, each a folder of images or a .npy file (NOISEWISE_CIFAR10_DATA)"
        )
    train, test = map(str, found)
    return train, test


def _columns(plan: CifarPlan, device: str, drawn: Drawn) -> dict[str, Measurement]:
    found = drawn.bits()
    reference = _reference(plan, device)
    for draws, form in ((drawn.ddpm, ""), (drawn.ddim, ", eta 0")):
        if draws is not None:
            features = _features(plan, device, draws)
            found[f"FID{form}"] = frechet_distance(features, reference)
            shares = precision_recall(features, reference, neighbours=plan.neighbours)
            found |= {f"precision{form}": shares.precision, f"recall{form}": shares.recall}
    return found


@functools.lru_cache(maxsize=1)
def _reference(plan: CifarPlan, device: str) -> Float[Tensor, "n dim"]:
    return _features(plan, device, prepare_cifar(plan, device).train)


def _features(plan: CifarPlan, device: str, images: Float[Tensor, "n channel h w"]) -> Float[Tensor, "n dim"]:
    extractor = prepare_cifar(plan, device).extractor
    return torch.cat([extractor(_grey_levels(part.to(device))) for part in images.split(plan.at_once)])


def _grey_levels(x: Float[Tensor, "n channel h w"]) -> UInt8[Tensor, "n channel h w"]:
    # as an image file holds them, on which the published numbers stand
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def _note(plan: CifarPlan) -> str:
    return (
        f"CIFAR-10: the network {plan.model}, the same for all seeds, which are those of sampling; heads of kind "
        f"{plan.kind!r}, {plan.head_steps} steps of {plan.batch} at {plan.learning_rate:g}, average {plan.ema:g}; {plan.draws} "
        f"draws, rounded to 8 bits, against all training images; even steps with both ends; the noise of the last step cut at "
        f"{plan.noise_clip[0]:g} grey levels (DDPM) and {plan.noise_clip[1]:g} (DDIM); bounds on {plan.tested} test images. "
        f"Precision and recall with {plan.neighbours} neighbours against the training images. Implementations of FID differ by "
        "some tenths: compare within this table."
    )
