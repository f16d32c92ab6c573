"""The comparison's problems: each data set at each number of network calls, with its measurements."""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import Problem
from noisewise.denoising.covariance import FullCovariance
from noisewise.diffusion.experiments.ocm.digit_images import digit_images, digits_net
from noisewise.diffusion.experiments.ocm.measures import covariance_errors, digit_measurements, mixture_measurements
from noisewise.diffusion.experiments.ocm.mixtures import C_MAX, MIXTURES, mixture, mixture_net, relative_variance
from noisewise.diffusion.experiments.ocm.systems import Drawn, Setup, covariance_systems, levels_of, solver_systems
from noisewise.diffusion.model import DiffusionModel, Prediction
from noisewise.metrics.measurement import Measurement

__all__ = ["problems"]

_CALLS = {"quick": (5,), "cpu": (5, 10, 20, 50), "paper": (5, 10, 20, 50)}
_MIXTURE_DRAWS = {"quick": 300, "cpu": 5000, "paper": 20_000}
_MIXTURE_STEPS = {"quick": 200, "cpu": 2500, "paper": 20_000}
_IMAGE_DRAWS = {"quick": 50, "cpu": 300, "paper": 5000}
_IMAGE_STEPS = {"quick": 30, "cpu": 1000, "paper": 20_000}
_TESTED = {"quick": 300, "cpu": 2000, "paper": 10_000}
_TRAINING_ROWS = 20_000
_GREYS = 17
_COMMON = (
    "OCM",
    "OCM, then residuals",
    "residual NLL",
    "OCM, linear (paper)",
    "OCM, linear, floor .01 at use",
    "NPR, softplus",
    "NPR",
    "NPR, floor .01 at use",
    "SN",
    "I-DDPM",
    "Analytic",
    "beta~",
    "beta",
)
_ON_MIXTURES = (*_COMMON, "Lanczos, rank 2", "probes, 16 a step", "exact diagonal", "exact matrix")
_ON_IMAGES = (*_COMMON, "OCM, DCT", "Lanczos, rank 3")
_QUICK = ("OCM", "OCM, then residuals", "Analytic", "beta~", "beta")


def problems(scale: str, device: str) -> tuple[Problem, ...]:
    """All problems at `scale`."""
    names = MIXTURES[:1] if scale == "quick" else MIXTURES
    found = [problem for name in names for problem in _mixtures(name, scale)]
    return (*found, *_images(scale, device))


class _Exact:
    """The covariance of a mixture in closed form."""

    graph = False

    def __init__(self, name: str, full: bool) -> None:
        self.name, self.full = name, full

    def __call__(self, prediction: Prediction, previous: int | None = None) -> Any:
        r = relative_variance(self.name, prediction.x_t.double(), prediction.t, full=self.full)
        ratio = (prediction.s / prediction.a).double().square()
        if self.full:
            return FullCovariance((r * ratio.unsqueeze(-1)).to(prediction.x_t))
        return (r * ratio).to(prediction.x_t)


def _mixtures(name: str, scale: str) -> list[Problem]:
    @functools.cache
    def setup(seed: int) -> Setup:
        def rows(n: int, offset: int) -> Tensor:
            return mixture(name).sample(n, torch.Generator().manual_seed(offset + seed)).float()

        return Setup(
            mixture_net(name, seed, scale), rows(_TRAINING_ROWS, 5000), rows(_TESTED[scale], 6000), seed,
            _MIXTURE_DRAWS[scale], _MIXTURE_STEPS[scale], 256, None, C_MAX, None, site="out", rank=2,
        )  # fmt: skip

    names = _QUICK if scale == "quick" else _ON_MIXTURES
    oracles = {"exact diagonal": _Exact(name, False), "exact matrix": _Exact(name, True)}
    systems = (*covariance_systems(setup, oracles, names), *solver_systems(setup))
    return [
        Problem(
            protocol="A",
            name=f"nine Gaussians, {name}, {calls} calls",
            budget=calls,
            systems=systems,
            measure=functools.partial(_mixture_columns, name),
            criterion="1000 MMD^2",
            notes=(_mixture_note(scale),) if name == MIXTURES[0] and calls == _CALLS[scale][0] else (),
        )
        for calls in _CALLS[scale]
    ]


def _images(scale: str, device: str) -> list[Problem]:
    @functools.cache
    def setup(seed: int) -> Setup:
        train, test = digit_images()
        return Setup(
            digits_net(seed, scale), train, test[: _TESTED[scale]], seed, _IMAGE_DRAWS[scale], _IMAGE_STEPS[scale], 64,
            1.0, 1.0, _GREYS,
        )  # fmt: skip

    names = _QUICK if scale == "quick" else _ON_IMAGES
    systems = (*covariance_systems(setup, {}, names), *solver_systems(setup))
    return [
        Problem(
            protocol="B",
            name=f"digits, {calls} calls",
            budget=calls,
            systems=systems,
            measure=_image_columns,
            criterion="1000 MMD^2",
            notes=(_image_note(scale),) if calls == _CALLS[scale][0] else (),
        )
        for calls in _CALLS[scale]
    ]


def _mixture_columns(name: str, drawn: Drawn) -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}
    if drawn.bound is not None:
        found["bound, nats"] = _mean(drawn.bound)
    seed = drawn.setup.seed
    for draws, form in ((drawn.ddpm, ""), (drawn.ddim, ", eta 0")):
        if draws is not None:
            measured = mixture_measurements(name, draws, seed)
            found |= {f"{column}{form}": value for column, value in measured.items() if not (form and column == "W2")}
    head = getattr(drawn.source, "head", None)
    if head is not None and head.config.objective != "vlb":
        model = DiffusionModel(drawn.setup.net, levels_of(), head.config.site)

        def r(x_t: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                prediction = model.predict(x_t.float(), t)
                return drawn.source(prediction) * (prediction.a / prediction.s).square()

        found |= covariance_errors(r, name)
    return found


def _image_columns(drawn: Drawn) -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}
    if drawn.bound is not None:
        found["bits/dim"] = _mean(drawn.bound / (drawn.setup.test[0].numel() * math.log(2)))
    for draws, form in ((drawn.ddpm, ""), (drawn.ddim, ", eta 0")):
        if draws is not None:
            measured = digit_measurements(draws, drawn.setup.seed)
            found |= {f"{column}{form}": value for column, value in measured.items()}
    return found


def _mean(values: Tensor) -> Measurement:
    return Measurement(float(values.mean()), float(values.std()) / math.sqrt(len(values)), n=len(values))


_COLUMNS = (
    "Bounds: one draw of noise a term, the decoder's variance that of the step between the two cleanest levels. Columns without "
    "a mark are draws in the DDPM form, 'eta 0' those in DDIM's, which are still random through the covariance (beta~ alone is "
    "DDIM there); solvers of ordinary equations stand in the column of eta 0. Gradients are rows of backward passes, energies "
    "rows of network calls, seconds those of drawing alone; each head's note says how long its fit took."
)


def _mixture_note(scale: str) -> str:
    return (
        f"mixtures: the noise network is trained for each seed and shared by all systems, T=1000 linear; heads "
        f"{_MIXTURE_STEPS[scale]} steps of 256 rows, all of kind 'complex' at one learning rate, 3e-3, and no system is tuned on "
        f"these seeds; C is cut at {C_MAX}, x0 is not clipped; {_MIXTURE_DRAWS[scale]} draws. W2 sees mostly how many draws a "
        f"mode got. {_COLUMNS}"
    )


def _image_note(scale: str) -> str:
    return (
        f"digits: 8 x 8, 1500 training images, bounds on 297 others of 17 grey levels; a UNet2DModel trained here for each seed; "
        f"heads {_IMAGE_STEPS[scale]} steps of 64; {_IMAGE_DRAWS[scale]} draws; squared MMD in the features of a classifier "
        f"against the held-out images, TV of labels against the data's shares. {_COLUMNS}"
    )
