"""The comparison's problems: each data set at each number of network calls, with its measurements."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import Problem
from noisewise.denoising.covariance import FullCovariance
from noisewise.diffusion.experiments.ocm.cifar import CifarPlan, cifar_problems, prepare_cifar
from noisewise.diffusion.experiments.ocm.digit_images import digit_images, digits_net
from noisewise.diffusion.experiments.ocm.measures import (
    LabelledImages,
    covariance_errors,
    image_measurements,
    labelled_digits,
    mixture_measurements,
)
from noisewise.diffusion.experiments.ocm.mixtures import C_MAX, MIXTURES, mixture, mixture_net, relative_variance
from noisewise.diffusion.experiments.ocm.omniglot import find_omniglot
from noisewise.diffusion.experiments.ocm.omniglot_net import labelled_omniglot, omniglot_net
from noisewise.diffusion.experiments.ocm.systems import (
    Drawn,
    Setup,
    covariance_systems,
    levels_of,
    mean_of,
    solver_systems,
)
from noisewise.diffusion.model import DiffusionModel, Prediction
from noisewise.errors import InvalidInput
from noisewise.metrics.measurement import Measurement

__all__ = ["check", "problems"]

_CALLS = {"quick": (5,), "cpu": (5, 10, 20, 50), "paper": (5, 10, 20, 50)}
_MIXTURE_DRAWS = {"quick": 300, "cpu": 5000, "paper": 20_000}
_MIXTURE_STEPS = {"quick": 200, "cpu": 2500, "paper": 20_000}
_IMAGE_DRAWS = {"quick": 50, "cpu": 300, "paper": 5000}
_IMAGE_STEPS = {"quick": 30, "cpu": 1000, "paper": 20_000}
_TESTED = {"quick": 300, "cpu": 2000, "paper": 10_000}
_TRAINING_ROWS = 20_000
_OMNIGLOT_CALLS = {"quick": (5,), "cpu": (10, 20), "paper": (10, 20, 50)}
_OMNIGLOT_DRAWS = {"quick": 20, "cpu": 200, "paper": 5000}
_OMNIGLOT_TESTED = {"quick": 20, "cpu": 200, "paper": 726}
_OMNIGLOT_STEPS = {"quick": 20, "cpu": 400, "paper": 20_000}
# "Analytic" passes over all rows at each of fifty levels, which on one core takes as long as the network's training
_OMNIGLOT_FITTED = {"quick": 1500, "cpu": 1500, "paper": 4114}
_GREYS = 17
# the reader's shares of ink are rounded to 8 bits
_EIGHT_BITS = 256
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
_ON_OMNIGLOT = (
    "OCM",
    "OCM, then residuals",
    "residual NLL",
    "NPR, softplus",
    "Analytic",
    "beta~",
    "beta",
    "Lanczos, rank 3",
)
_QUICK = ("OCM", "OCM, then residuals", "Analytic", "beta~", "beta")


def problems(scale: str, device: str) -> tuple[Problem, ...]:
    """All problems at `scale`."""
    names = MIXTURES[:1] if scale == "quick" else MIXTURES
    found = [problem for name in names for problem in _mixtures(name, scale)]
    found += [*_digits(scale), *_omniglot(scale)]
    return (*found, *cifar_problems(CifarPlan.from_environment(), device)) if scale == "paper" else tuple(found)


def check(scale: str, device: str, protocols: tuple[str, ...]) -> None:
    """Raise where Omniglot (C), or anything of CIFAR-10 (D), was asked for and is not at hand."""
    if "C" in protocols:
        find_omniglot()
    if "D" in protocols:
        if scale != "paper":
            raise InvalidInput(f"protocol D, CIFAR-10, is part of --scale paper alone, got --scale {scale}")
        prepare_cifar(CifarPlan.from_environment(), device)


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


def _digits(scale: str) -> list[Problem]:
    @functools.cache
    def setup(seed: int) -> Setup:
        train, test = digit_images()
        return Setup(
            digits_net(seed, scale), train, test[: _TESTED[scale]], seed, _IMAGE_DRAWS[scale], _IMAGE_STEPS[scale], 64,
            1.0, 1.0, _GREYS,
        )  # fmt: skip

    names = _QUICK if scale == "quick" else _ON_IMAGES
    return _images("B", "digits", _CALLS[scale], setup, names, labelled_digits, _digits_note(scale))


def _omniglot(scale: str) -> list[Problem]:
    @functools.cache
    def setup(seed: int) -> Setup:
        data = labelled_omniglot()
        return Setup(
            omniglot_net(seed, scale), data.train[: _OMNIGLOT_FITTED[scale]], data.held_out[: _OMNIGLOT_TESTED[scale]],
            seed, _OMNIGLOT_DRAWS[scale], _OMNIGLOT_STEPS[scale], 32, 1.0, 1.0, _EIGHT_BITS,
        )  # fmt: skip

    names = _QUICK if scale == "quick" else _ON_OMNIGLOT
    return _images("C", "Omniglot", _OMNIGLOT_CALLS[scale], setup, names, labelled_omniglot, _omniglot_note(scale))


def _images(
    protocol: str,
    title: str,
    calls: tuple[int, ...],
    setup: Callable[[int], Setup],
    names: tuple[str, ...],
    labelled: Callable[[], LabelledImages],
    note: str,
) -> list[Problem]:
    systems = (*covariance_systems(setup, {}, names), *solver_systems(setup))
    return [
        Problem(
            protocol=protocol,
            name=f"{title}, {budget} calls",
            budget=budget,
            systems=systems,
            measure=functools.partial(_image_columns, labelled),
            criterion="1000 MMD^2",
            notes=(note,) if budget == calls[0] else (),
        )
        for budget in calls
    ]


def _mixture_columns(name: str, drawn: Drawn) -> dict[str, Measurement]:
    found: dict[str, Measurement] = {}
    if drawn.bound is not None:
        found["bound, nats"] = mean_of(drawn.bound)
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


def _image_columns(labelled: Callable[[], LabelledImages], drawn: Drawn) -> dict[str, Measurement]:
    found = drawn.bits()
    for draws, form in ((drawn.ddpm, ""), (drawn.ddim, ", eta 0")):
        if draws is not None:
            measured = image_measurements(labelled(), draws, drawn.setup.seed)
            found |= {f"{column}{form}": value for column, value in measured.items()}
    return found


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


def _digits_note(scale: str) -> str:
    return (
        f"digits: 8 x 8, 1500 training images, bounds on 297 others of 17 grey levels; a UNet2DModel trained here for each seed; "
        f"heads {_IMAGE_STEPS[scale]} steps of 64; {_IMAGE_DRAWS[scale]} draws; squared MMD in the features of a classifier "
        f"against the held-out images, TV of labels against the data's shares. {_COLUMNS}"
    )


def _omniglot_note(scale: str) -> str:
    return (
        f"Omniglot: 28 x 28, eight alphabets, 4114 training images by 17 drawers, bounds on {_OMNIGLOT_TESTED[scale]} of 726 by "
        f"three others, with 256 grey levels, of which averages over parts of black and white pages take some forty; a "
        f"UNet2DModel trained here for each seed; heads {_OMNIGLOT_STEPS[scale]} steps of 32, on {_OMNIGLOT_FITTED[scale]} of "
        f"the training images; {_OMNIGLOT_DRAWS[scale]} draws; "
        f"squared MMD in the features of a classifier of alphabets against the held-out images, TV of its labels against the "
        f"data's shares. The floor of MMD is that of training images, which the classifier knows. {_COLUMNS}"
    )
