"""Every covariance on one noise network, and the solvers that need none; the budget is the number of network calls."""

import dataclasses
import functools
import math
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noisewise.comparison import System
from noisewise.diffusion.fitting import fit_covariance
from noisewise.diffusion.generate import generate
from noisewise.diffusion.head import CovarianceHead, weights_of
from noisewise.diffusion.levels import NoiseLevels
from noisewise.diffusion.likelihood import vlb_terms
from noisewise.diffusion.model import DiffusionModel, Prediction, tensor_of
from noisewise.diffusion.scheduler import CovarianceScheduler
from noisewise.diffusion.sources import DctSource, HeadSource, LanczosSource, ProbeSource, fit_spectrum
from noisewise.errors import NoisewiseWarning, require
from noisewise.metrics.measurement import Measurement
from noisewise.typing import Cost

__all__ = ["Drawn", "Setup", "covariance_systems", "levels_of", "mean_of", "solver_systems"]

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

# between the seeds of two parts of one row's draws
_PART = 1_000_003


@dataclass(frozen=True)
class Setup:
    """A noise network of one seed, its data, and how it is sampled.

    `levels`: grey levels of the decoder. `kind`, `learning_rate`, `ema`, `head_steps`, `batch`: of the fits of heads.
    `schedule`: configuration of the scheduler that the network came with; None is the linear one of 1000 levels. `noise_clip`:
    of the DDPM and of the DDIM form. `at_once`: draws in one batch, all of them where None. `head_seed`: of the heads that all
    seeds share, and `heads`: a folder that keeps them.
    """

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
    kind: str = "complex"
    learning_rate: float | int = 3e-3
    ema: float | int = 0.999
    schedule: Any = None
    noise_clip: tuple[float, float] = (0.0, 0.0)
    at_once: int | None = None
    head_seed: int | None = None
    heads: Path | None = None

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of x0."""
        return tuple(self.train.shape[1:])

    def scheduler(self, **options: Any) -> CovarianceScheduler:
        """Steps on the network's schedule, clipped as the data are; a schedule that was given is spaced as published."""
        options |= {"clip_sample": self.clip is not None, "max_variance": self.max_variance}
        if self.schedule is None:
            return CovarianceScheduler(**options)
        if not str(self.schedule.get("variance_type")).startswith("learned"):
            # public networks often come with the larger one, and a system says which it wants
            options.setdefault("variance_type", "fixed_small")
        return CovarianceScheduler.from_config(self.schedule, timestep_spacing="linear", **options)

    def solver(self, kind: str, **options: Any) -> Any:
        """A scheduler of diffusers on the network's schedule."""
        made = getattr(require("diffusers", "diffusion"), kind)
        if self.schedule is None:
            return made(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, **options)
        return made.from_config(self.schedule, **options)

    def drawn(self, draw: Callable[[tuple[int, ...], int], Tensor]) -> Tensor:
        """`draws` rows of draw(shape, seed), in parts that fit into memory, on the CPU."""
        size = self.at_once or self.draws
        rows = [min(size, self.draws - start) for start in range(0, self.draws, size)]
        return torch.cat([draw((n, *self.event), self.seed + place * _PART).cpu() for place, n in enumerate(rows)])


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

    def bits(self) -> dict[str, Measurement]:
        """The column bits/dim, where there is a bound."""
        if self.bound is None:
            return {}
        return {"bits/dim": mean_of(self.bound / (self.setup.test[0].numel() * math.log(2)))}


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
        place = _kept(s, name)
        if place is not None and (place / "config.json").is_file():
            device = next(s.net.parameters()).device
            return CovarianceHead.from_pretrained(place).to(device).eval(), "the head is that of an earlier fit"
        head = CovarianceHead.for_model(s.net, s.kind, noise_schedule=schedule, parity=parity, seed=seed, **shape)
        result = fit_covariance(
            s.net, head, s.train, objective, noise_schedule=schedule, steps=s.head_steps, batch_size=s.batch,
            learning_rate=s.learning_rate, ema=s.ema, resume=None if place is None else place / "run", seed=seed,
        )  # fmt: skip
        if place is not None:
            head.save_pretrained(place)
        return head, f"fitted in {result.cost.seconds:.0f} s"

    def source_of(s: Setup, name: str) -> tuple[Any, tuple[str, ...]]:
        generator = torch.Generator().manual_seed(s.seed + 17)
        own = s.seed if s.head_seed is None else s.head_seed
        if name in _HEADS:
            head, note = fitted(own, name)
            return HeadSource(head), (note,)
        if name.endswith("floor .01 at use"):
            linear = "NPR" if name.startswith("NPR") else "OCM, linear (paper)"
            return _Floored(fitted(own, linear)[0], 0.01), ()
        if name == "OCM, DCT":
            head, _ = fitted(own, "OCM")
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
            large, seed = name == "beta", s.seed

            def drawn(scheduler: CovarianceScheduler) -> Tensor:
                return s.drawn(lambda shape, own: generate(model, scheduler, shape, steps, source, seed=own))

            begin = time.monotonic()
            ddpm = drawn(s.scheduler(noise_clip=s.noise_clip[0], **options))
            seconds = time.monotonic() - begin
            # the larger variance and a range of two variances are those of the DDPM form
            both = not large and name != "I-DDPM"
            ddim = drawn(s.scheduler(eta=0.0, noise_clip=s.noise_clip[1], **options)) if both else None
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


def _kept(s: Setup, name: str) -> Path | None:
    """Where the head of this network and this length of fit is kept."""
    if s.heads is None:
        return None
    return s.heads / f"{re.sub(r'[^a-z]+', '-', name.lower()).strip('-')}-{s.head_steps}-{weights_of(s.net):.6g}"


def solver_systems(setup: Callable[[int], Setup]) -> tuple[System, ...]:
    """diffusers' samplers at as many network calls; `trailing` spacing where nothing else is said."""

    def draw_by(kind: str, ddim: bool, **options: Any) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int) -> Drawn:
            s = setup(seed)
            own = dict(options)
            if kind in ("DDIMScheduler",):
                own |= {"clip_sample": s.clip is not None}
            scheduler = s.solver(kind, **own)

            def part(shape: tuple[int, ...], seed: int) -> Tensor:
                return _solved(s.net, scheduler, shape, int(budget), torch.Generator().manual_seed(seed))

            begin = time.monotonic()
            x = s.drawn(part)
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
    device = next(net.parameters()).device
    x = (torch.randn(shape, generator=generator) * scheduler.init_noise_sigma).to(device)
    options = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    for t in scheduler.timesteps:
        index = torch.full((len(x),), round(float(t)), dtype=torch.long, device=device)
        output = tensor_of(net(scheduler.scale_model_input(x, t), index))
        x = scheduler.step(output, t, x, **options).prev_sample
    return x


def mean_of(values: Tensor) -> Measurement:
    """Of rows, with its standard error."""
    return Measurement(float(values.mean()), float(values.std()) / math.sqrt(len(values)), n=len(values))


def levels_of() -> NoiseLevels:
    """The linear schedule of the comparison."""
    return CovarianceScheduler().levels
