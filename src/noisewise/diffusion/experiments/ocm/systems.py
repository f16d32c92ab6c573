"""Every covariance on one noise network, and the solvers that need none; the budget is the number of network calls."""

import dataclasses
import functools
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noisewise.comparison import System
from noisewise.diffusion.fitting import fit_covariance
from noisewise.diffusion.generate import generate
from noisewise.diffusion.head import CovarianceHead
from noisewise.diffusion.levels import NoiseLevels
from noisewise.diffusion.likelihood import vlb_terms
from noisewise.diffusion.model import DiffusionModel, Prediction, tensor_of
from noisewise.diffusion.scheduler import CovarianceScheduler
from noisewise.diffusion.sources import DctSource, HeadSource, LanczosSource, ProbeSource, fit_spectrum
from noisewise.errors import NoisewiseWarning, require
from noisewise.typing import Cost

__all__ = ["Drawn", "Setup", "covariance_systems", "solver_systems"]

# objective and whether the map is the authors' unconstrained one
_HEADS = {
    "OCM": ("ocm", False),
    "OCM, then residuals": ("ocm_residual", False),
    "residual NLL": ("residual_nll", False),
    "OCM, linear (paper)": ("ocm", True),
    "NPR, softplus": ("npr", False),
    "NPR": ("npr", True),
    "SN": ("sn", True),
    "I-DDPM": ("vlb", True),
    "Analytic": ("analytic", False),
}


@dataclass(frozen=True)
class Setup:
    """A noise network of one seed, its data, and how it is sampled."""

    net: nn.Module
    train: Tensor
    test: Tensor
    seed: int
    draws: int
    head_steps: int
    batch: int
    clip: float | None
    max_variance: float
    levels: int | None
    site: str | None = None
    probes: int = 16
    rank: int = 3

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of x0."""
        return tuple(self.train.shape[1:])

    def scheduler(self, **options: Any) -> CovarianceScheduler:
        """Steps on the linear schedule, clipped as the data are."""
        return CovarianceScheduler(clip_sample=self.clip is not None, max_variance=self.max_variance, **options)


@dataclass(frozen=True)
class Drawn:
    """Draws in the DDPM form and in DDIM's with eta = 0, and the bound in nats of each test row; None where there is none."""

    setup: Setup
    cost: Cost
    ddpm: Tensor | None = None
    ddim: Tensor | None = None
    bound: Tensor | None = None
    source: Any = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Floored:
    """A head cut from below at a share of each level's mean."""

    head: CovarianceHead
    share: float
    graph: bool = False

    def __call__(self, prediction: Prediction, previous: int | None = None) -> Tensor:
        least = self.share * self.head.mean_ratio(prediction) * (prediction.s / prediction.a).square()
        return torch.maximum(HeadSource(self.head)(prediction, previous), least.expand_as(prediction.clean))


def covariance_systems(
    setup: Callable[[int], Setup], oracles: dict[str, Any], names: tuple[str, ...]
) -> tuple[System, ...]:
    """The systems of `names`, in their order. `oracles`: sources by name, for what is known in closed form."""

    @functools.cache
    def fitted(seed: int, name: str) -> tuple[CovarianceHead, str]:
        s, (objective, parity) = setup(seed), _HEADS[name]
        schedule = s.scheduler()
        shape: Any = {} if s.site is None else {"site": s.site, "event": s.event}
        head = CovarianceHead.for_model(
            s.net, "complex", noise_schedule=schedule, parity=parity, seed=seed, **shape
        )  # fmt: skip
        result = fit_covariance(
            s.net, head, s.train, objective, noise_schedule=schedule, steps=s.head_steps, batch_size=s.batch,
            learning_rate=3e-3, seed=seed,
        )  # fmt: skip
        return head, f"fitted in {result.cost.seconds:.0f} s"

    def source_of(s: Setup, name: str) -> tuple[Any, tuple[str, ...]]:
        generator = torch.Generator().manual_seed(s.seed + 17)
        if name in _HEADS:
            head, note = fitted(s.seed, name)
            return HeadSource(head), (note,)
        if name.endswith("floor .01 at use"):
            linear = "NPR" if name.startswith("NPR") else "OCM, linear (paper)"
            return _Floored(fitted(s.seed, linear)[0], 0.01), ()
        if name == "OCM, DCT":
            head, _ = fitted(s.seed, "OCM")
            model = DiffusionModel(s.net, s.scheduler().levels, head.config.site)
            return DctSource(head, fit_spectrum(model, head, s.train), s.max_variance), ()
        if name.startswith("Lanczos"):
            return LanczosSource(s.rank, generator, largest=s.max_variance * s.train[0].numel()), ()
        if name.startswith("probes"):
            return ProbeSource(s.probes, generator), ()
        return oracles.get(name), ()

    def draw_by(name: str) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int) -> Drawn:
            s, steps = setup(seed), int(budget)
            source, notes = source_of(s, name)
            large = name == "beta"
            options: dict[str, Any] = {"variance_type": "fixed_large"} if large else {}
            site = getattr(getattr(source, "head", None), "config", None)
            model = DiffusionModel(s.net, s.scheduler().levels, None if site is None else site.site)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", NoisewiseWarning)
                drawn = run(s, steps, model, source, options)
            said = dict.fromkeys(str(w.message) for w in caught if issubclass(w.category, NoisewiseWarning))
            return dataclasses.replace(drawn, notes=(*notes, *said))

        def run(s: Setup, steps: int, model: DiffusionModel, source: Any, options: dict[str, Any]) -> Drawn:
            large, seed, shape = name == "beta", s.seed, (s.draws, *s.event)
            begin = time.monotonic()
            ddpm = generate(model, s.scheduler(**options), shape, steps, source, seed=seed)
            seconds = time.monotonic() - begin
            # the larger variance and a range of two variances are those of the DDPM form
            both = not large and name != "I-DDPM"
            ddim = generate(model, s.scheduler(eta=0.0, **options), shape, steps, source, seed=seed) if both else None
            bound = None
            if not name.startswith(("Lanczos", "probes")) or s.test[0].numel() <= 4:
                bound = vlb_terms(
                    model, s.test, "large" if large else source, steps, levels=s.levels, clip=s.clip,
                    max_variance=s.max_variance, seed=seed,
                ).sum(1)  # fmt: skip
            products = s.rank if name.startswith("Lanczos") else s.probes if name.startswith("probes") else 0
            calls = steps * s.draws
            return Drawn(s, Cost(products * calls, calls, seconds), ddpm, ddim, bound, source)

        return draw

    return tuple(System(name, draw_by(name)) for name in names)


def solver_systems(setup: Callable[[int], Setup]) -> tuple[System, ...]:
    """diffusers' samplers at as many network calls; `trailing` spacing where nothing else is said."""

    def draw_by(kind: str, ddim: bool, **options: Any) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int) -> Drawn:
            s = setup(seed)
            diffusers = require("diffusers", "diffusion")
            own = dict(options)
            if kind in ("DDIMScheduler",):
                own |= {"clip_sample": s.clip is not None}
            scheduler = getattr(diffusers, kind)(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, **own)
            generator = torch.Generator().manual_seed(seed)
            begin = time.monotonic()
            x = _solved(s.net, scheduler, (s.draws, *s.event), int(budget), generator)
            cost = Cost(0, int(budget) * s.draws, time.monotonic() - begin)
            return Drawn(s, cost, ddim=x) if ddim else Drawn(s, cost, ddpm=x)

        return draw

    solver = "DPMSolverMultistepScheduler"
    return (
        System("diffusers DDIM", draw_by("DDIMScheduler", True, timestep_spacing="trailing")),
        System("DPM-Solver++", draw_by(solver, True, timestep_spacing="trailing")),
        System("DPM-Solver++, linspace", draw_by(solver, True, timestep_spacing="linspace")),
        System(
            "SDE-DPM-Solver++",
            draw_by(solver, False, timestep_spacing="trailing", algorithm_type="sde-dpmsolver++"),
        ),
        System("UniPC", draw_by("UniPCMultistepScheduler", True, timestep_spacing="trailing")),
        System("Euler ancestral", draw_by("EulerAncestralDiscreteScheduler", False, timestep_spacing="trailing")),
    )


@torch.no_grad()
def _solved(net: nn.Module, scheduler: Any, shape: tuple[int, ...], steps: int, generator: torch.Generator) -> Tensor:
    scheduler.set_timesteps(steps)
    x = torch.randn(shape, generator=generator) * scheduler.init_noise_sigma
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        index = torch.full((len(x),), round(float(t)), dtype=torch.long)
        output = tensor_of(net(scheduler.scale_model_input(x, t), index))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def levels_of() -> NoiseLevels:
    """The linear schedule of the comparison."""
    return CovarianceScheduler().levels
