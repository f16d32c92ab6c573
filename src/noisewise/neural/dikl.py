"""`DiKLSampler`: a generator trained on an unnormalised density by the reverse diffusive KL divergence.

Source: He, Chen, Zhang, Barber & Hernandez-Lobato, AISTATS 2025, arXiv 2410.12456. What differs in the preset "cpu" (the
mixture latent, annealed log-uniform levels, the target's score learned from chains, standardisation) is ours.
"""

import copy
import math
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.neural import keeping
from noisewise.neural.correction import Weighted, weighted_draws
from noisewise.neural.denoisers import EGNNDenoiser, MLPDenoiser, RawDenoiser
from noisewise.neural.generators import LATENTS, EGNNGenerator, MLPGenerator, OwnGenerator
from noisewise.neural.levels import WEIGHTS, Levels
from noisewise.neural.posterior import PosteriorSampler
from noisewise.neural.standard import Standardised
from noisewise.neural.steps import StepSizes
from noisewise.neural.training import Chains, Rates, Training
from noisewise.noise import NoiseSchedule
from noisewise.progress import Reporter, gentle_interrupt
from noisewise.runs import RunFolder
from noisewise.sampling.kernel import local_scale
from noisewise.sampling.loop import sample as run_chains
from noisewise.sampling.mala import MALA
from noisewise.targets.target import Target, as_target, check_target
from noisewise.typing import Cost, check_count, check_positive

__all__ = ["PRESETS", "DiKLSampler"]

KIND = "dikl fit"
_CHECKPOINT_SECONDS = 5.0
_IDENTITIES = ("mixed", "denoising", "target")

# chains of the pilot, draws of them that are kept, and what a pilot that only standardises may cost
_CHAINS, _KEPT, _SHORT = 256, 20_000, 50_000
# share of a declared budget of seconds, and calls where no budget of calls was declared
_PILOT_SHARE, _PILOT_CALLS = 0.1, 1_000_000
# evaluations of all starts that time the target, and the least iterations of the chains
_TIMED, _LEAST, _FEW_CHAINS = 5, 500, 16
# what chains do around a call takes some times as long as a cheap one
_AROUND_A_CALL = 5
# share of the rest that learns the target's score; in steps, so many for each of the generator's
_TARGET_SHARE, _TARGET_STEPS = 0.25, 2
# levels on the standardised scale: from a part of a mode's width (the middle, on the log scale, of its narrowest coordinate
# and of all: lower levels sharpen narrow coordinates and shift the weights of modes) to beyond the spread of the modes
_LOWEST, _HIGHEST, _BINS = 0.25, 3.0, 12
# deviation of a mode from which on the generator adds z, and has no categories of its own accord: between 0.33 (three modes,
# where both hurt) and 0.7 (many wells, whose patterns outnumber the categories)
_WIDE = 0.5
# rows of a network at once, so that its layers stay in the cache
_SAMPLE_ROWS = 2048
# draws that are looked at when a fit ends, and the share of the chains' draws that counts as rare
_LOOKED_AT, _RARE = 2048, 0.01
# draws of the chains that are kept with the sampler, and the least worth of weighted draws
_SHOWN, _FEW_EFFECTIVE = 5000, 50
# how much further draws of the chains may lie out in their last third than in the one before: chains that run away, as random
# walks do, are at 1.29
_AWAY = 1.2
# part of a mode's width that float32 may round away, and of a log density's unit
_ROUNDED = 0.05
_STAGES = ("score of the target", "generator")


@dataclass(frozen=True)
class Preset:
    """Settings that belong together; what the constructor is given replaces them one by one."""

    latent: str
    hidden: int
    depth: int
    rates: Rates
    weight: str
    standardize: bool
    annealed: float
    posterior: Any
    table: NoiseSchedule | None
    published: bool


PRESETS = {
    "cpu": Preset("auto", 128, 4, Rates(3e-3, 2e-3, 256, 512, 5), "denoised", True, 0.5, "chains", None, False),
    "paper": Preset(
        "gaussian", 400, 4, Rates(1e-3, 1e-4, 1024, 1024, 50), "1/a", False, 0.0,
        PosteriorSampler("annealed", particles=10, anneal_steps=15, resample=True, langevin_steps=5, box=1000.0),
        NoiseSchedule.vp_beta(1e-4, 0.7, 30), True,
    ),
}  # fmt: skip
# what a cluster's network, dearer by the pair of particles, replaces in "cpu"; of five weights tried on four double wells
# "denoised" left draws too wide and "uniform" dropped shapes
_CLUSTER: dict[str, Any] = {"hidden": 64, "depth": 3, "rates": Rates(3e-3, 2e-3, 256, 256, 4), "weight": "ramped"}


class _Look(NamedTuple):
    """Of a generator's draws: standard deviation over all coordinates, and the shares that are rare and impossible."""

    spread: float
    rare: float
    outside: float


class DiKLSampler:
    """A network that samples `target` in one evaluation, trained on the density alone.

    `target`: what `as_target` takes; `dim` for a callable. `generator`: "mlp", "egnn" (targets with `particles`), or your own
    module [n, latent] -> [n, dim], where z ~ N(0, I) has as many coordinates as the target, or as its attribute `latent_dim`
    says. It and all that follows live on a standardised scale, which a short run of chains
    finds (`standardize=False`: the target's own).

    `preset`: "cpu", our recipe, or "paper", the published settings for 40 Gaussians (minutes to days on a CPU: thousands of
    steps of seconds each; one step size for all levels; raw coordinates, so that a target of large scale learns slowly).
    Each of the following replaces the preset's own. `latent`: "gaussian"; "mixture", a Gaussian beside `categories` of equal
    mass; or "auto", of "cpu": mixture where modes are narrow for the spread of the target, Gaussian where they are wide.
    `hidden`, `depth` of the networks. `schedule`: a `NoiseSchedule` in place of continuous levels, in units of the scale that
    the networks see; one small level alone makes this the reverse KL divergence, which drops modes. `weight`: of a level's
    gradient, one of `levels.WEIGHTS`. `posterior`: where the score of the noisy target comes from: "chains", a network
    learned from Markov chains of `noisewise.sampling`, which then bear all cost in calls; or a `PosteriorSampler`, which
    draws p(x | x_t) for every batch. `estimator`: the identity that a `PosteriorSampler`'s draws go through, "mixed",
    "denoising" or "target". `steps`: its `StepSizes`. `rates`: learning rates and batches. `init`: starts of the chains,
    [chain, dim], by default standard normal. `seed`: same seed, same sampler, on the CPU bit for bit.

    After `fit`: `cost` (calls of the target, all of them, and wall seconds), `steps_` of the generator, `history_`,
    `warnings_`, `interrupted_`, and `chain_draws_` ([row, dim], up to 5,000; None without chains), what the network had to
    learn from: a reference for `evaluate` that is as good as those chains.
    Raises `InvalidInput` for arguments that do not fit; the target itself is checked by `fit`, before any long work.
    """

    def __init__(
        self,
        target: Any,
        generator: str | nn.Module = "mlp",
        preset: str = "cpu",
        *,
        dim: int | None = None,
        latent: str | None = None,
        categories: int = 256,
        hidden: int | None = None,
        depth: int | None = None,
        schedule: NoiseSchedule | None = None,
        weight: str | None = None,
        posterior: Any = None,
        estimator: str = "mixed",
        steps: StepSizes | None = None,
        rates: Rates | None = None,
        standardize: bool | None = None,
        init: Float[Tensor, "chain dim"] | None = None,
        seed: int = 0,
    ) -> None:
        self.target: Target = as_target(target, dim)
        if preset not in PRESETS:
            raise InvalidInput(f"preset must be one of {', '.join(PRESETS)}, got {preset!r}")
        given = PRESETS[preset]
        if generator == "egnn" and not given.published:
            given = replace(given, **_CLUSTER)
        changes = {
            "latent": latent, "hidden": hidden, "depth": depth, "weight": weight, "posterior": posterior, "rates": rates,
            "standardize": standardize, "table": schedule,
        }  # fmt: skip
        self.preset, self.plan = preset, replace(given, **{k: v for k, v in changes.items() if v is not None})
        if self.plan.weight not in WEIGHTS:
            raise InvalidInput(f"weight must be one of {', '.join(WEIGHTS)}, got {self.plan.weight!r}")
        if self.plan.latent not in LATENTS:
            raise InvalidInput(f"latent must be one of {', '.join(LATENTS)}, got {self.plan.latent!r}")
        if estimator not in _IDENTITIES:
            raise InvalidInput(f"estimator must be one of {', '.join(_IDENTITIES)}, got {estimator!r}")
        if not (self.plan.posterior == "chains" or hasattr(self.plan.posterior, "draw")):
            raise InvalidInput(f'posterior must be "chains" or a PosteriorSampler, got {self.plan.posterior!r}')
        if self.plan.published and self.plan.table is None:
            raise InvalidInput('preset="paper" needs a schedule of discrete levels')
        for name, value, wanted in (
            ("schedule", schedule, NoiseSchedule), ("steps", steps, StepSizes), ("rates", rates, Rates),
            ("standardize", standardize, bool), ("init", init, Tensor),
        ):  # fmt: skip
            if value is not None and not isinstance(value, wanted):
                raise InvalidInput(f"{name} must be a {wanted.__name__}, got {value!r}")
        if init is not None and (init.ndim != 2 or init.shape[1] != self.target.dim):
            raise InvalidInput(f"init must have shape [chain, {self.target.dim}], got {tuple(init.shape)}")
        check_count("hidden", self.plan.hidden)
        check_count("depth", self.plan.depth)
        self.categories = check_count("categories", categories, 2)
        self.estimator, self.steps, self.init, self.seed = estimator, steps, init, check_count("seed", seed, 0)
        self.particles = self._particles(generator)
        self._generator = generator
        self.cost = Cost()

    def _particles(self, generator: str | nn.Module) -> int:
        """Particles of a cluster, 0 for any other target."""
        if not isinstance(generator, nn.Module) and generator not in ("mlp", "egnn"):
            raise InvalidInput(f'generator must be "mlp", "egnn" or a torch.nn.Module, got {generator!r}')
        particles = getattr(self.target, "particles", 0)
        if generator == "egnn" and not particles:
            raise InvalidInput(
                f'generator="egnn" is for targets with particles (an attribute of that name), and '
                f'{type(self.target).__name__} has none; take "mlp"'
            )
        if particles and self.target.dim % particles:
            raise InvalidInput(f"dim {self.target.dim} is not divisible by {particles} particles")
        return particles

    # --- fitting

    def fit(
        self,
        *,
        max_steps: int | None = None,
        max_seconds: float | int | None = None,
        max_gradients: float | int | None = None,
        resume: str | Path | None = None,
        progress: bool = False,
    ) -> "DiKLSampler":
        """Train within what is declared; schedules are fractions of it, so it must be declared. Returns self.

        `max_steps` of the generator, `max_seconds` of wall time, `max_gradients` calls of the target (with "chains", all of
        them are the chains'; alone it bounds a fit only where a `PosteriorSampler` spends them). The first bound ends the fit;
        only `max_steps` without `max_seconds` gives the same sampler on every machine. `resume`: a folder, written every five
        seconds; the same call goes on from it after a crash, to the identical result. Ctrl-C returns what exists.

        Raises `InvalidInput` before any long work for a target whose log density has the wrong shape, no gradient, or no
        finite value at a start. Warns (`NoisewiseWarning`) of acceptance below 0.2 or above 0.95, of draws of one effective
        particle, of skipped steps, and of a generator that collapsed.
        """
        bounds = {"max_steps": max_steps, "max_seconds": max_seconds, "max_gradients": max_gradients}
        if max_steps is not None:
            check_count("max_steps", max_steps)
        for name in ("max_seconds", "max_gradients"):
            if bounds[name] is not None:
                check_positive(name, bounds[name])
        by_chains = self.plan.posterior == "chains"
        if max_steps is None and max_seconds is None and (by_chains or max_gradients is None):
            raise InvalidInput(
                "declare what a fit may use: max_seconds=..., or max_steps=... for the same result everywhere"
            )
        folder = None if resume is None else RunFolder(resume)
        calls = self._pilot_calls(max_seconds, max_gradients)
        if folder is not None:
            asked = self.config() | bounds
            if folder.exists:
                # what a timing decided stays decided
                calls = folder.config(KIND)["pilot_calls"]
                folder.expect(KIND, asked | {"pilot_calls": calls})
            else:
                folder.begin(KIND, asked | {"pilot_calls": calls})
        # the chains mind Ctrl-C, and say how far they are, by themselves
        run = _Fit(self, max_steps, max_seconds, max_gradients, calls, folder, progress)
        with Reporter(progress) as reporter, gentle_interrupt() as stop:
            run.run(stop, reporter)
        self._take(run, stop.is_set())
        return self

    def bare(self) -> Standardised:
        """The target on its own scale."""
        dim = self.target.dim
        return Standardised(self.target, torch.zeros(dim), torch.ones(dim), self.particles)

    def starts(self) -> Float[Tensor, "chain dim"]:
        """Where the chains begin."""
        if self.init is not None:
            return self.init
        generator = torch.Generator().manual_seed(self.seed + 1_000_003)
        return torch.randn(_CHAINS, self.target.dim, generator=generator)

    def _pilot_calls(self, max_seconds: float | int | None, max_gradients: float | int | None) -> int:
        """Calls of the target that chains may make: what was declared, or what fits a share of the seconds.

        The first of them check the target. 0 where nothing needs to be known of its scale.
        """
        by_chains = self.plan.posterior == "chains"
        start, bare = self.starts(), self.bare()
        check_target(bare, start)
        if not by_chains and not self.plan.standardize:
            return 0
        calls = float(max_gradients or _PILOT_CALLS)
        if max_seconds is not None:
            begin = time.perf_counter()
            for _ in range(_TIMED):
                bare.log_prob_and_score(start)
            rate = _TIMED * len(start) / (_AROUND_A_CALL * (time.perf_counter() - begin) + 1e-9)
            calls = min(calls, _PILOT_SHARE * max_seconds * rate)
        if not by_chains:
            calls = min(calls / 10, _SHORT)
        least = _LEAST * (len(start) if self.init is not None else _FEW_CHAINS)
        if max_gradients is not None and by_chains and max_gradients < least:
            raise InvalidInput(
                f"max_gradients must be at least {least:,} for the chains to find their way, got {max_gradients!r}"
            )
        return max(round(calls), least)

    def _take(self, run: "_Fit", interrupted: bool) -> None:
        training = run.training
        self.standard_, self.net_ = training.target, copy.deepcopy(training.generator).eval().requires_grad_(False)
        self.cost, self.history_, self.interrupted_ = training.cost, list(training.history), interrupted
        self.steps_ = training.step
        self.chain_draws_ = run.chain_draws
        look = self._looked_at(run.rare)
        self.warnings_ = (*run.warnings, *_faults(training, look, run.spread))
        for text in self.warnings_:
            warnings.warn(text, NoisewiseWarning, stacklevel=3)

    def _looked_at(self, likely: float | None) -> "_Look":
        """At some of the generator's draws; each takes a call of the target, which is billed. `likely`: log density."""
        standard, net = self.fitted()
        with torch.no_grad():
            u = net(net.latent(_LOOKED_AT, torch.Generator().manual_seed(0)))
            u = standard.project(u) if self.particles else u
            value = standard.log_prob(u)
        self.cost = self.cost + Cost(energies=len(u))
        return _Look(
            float(u.var(0).mean().sqrt()),
            0.0 if likely is None else float((~(value >= likely)).double().mean()),
            float((value == -torch.inf).double().mean()),
        )

    # --- drawing

    @torch.no_grad()
    def sample(self, n: int = 1000, seed: int = 0, refine_steps: int = 0) -> Float[Tensor, "n dim"]:
        """`n` independent draws, one network evaluation each.

        `refine_steps`: then so many MALA steps on the target, a third of them to find the step size, which mends the
        shapes of modes and not their weights; their calls are added to `cost`. Raises `InvalidInput` before `fit`.
        """
        standard, net = self.fitted()
        n, refine_steps = check_count("n", n), check_count("refine_steps", refine_steps, 0)
        generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
        u = torch.cat([net(part) for part in net.latent(n, generator).split(_SAMPLE_ROWS)])
        if self.particles:
            u = standard.project(u)
        if not refine_steps:
            return standard.to_x(u)
        u = self._possible(u, generator)
        warmup = max(refine_steps // 3, 1)
        with warnings.catch_warnings():
            # one draw for each chain has no diagnostics to speak of
            warnings.simplefilter("ignore", NoisewiseWarning)
            run = run_chains(
                MALA(standard),
                init=u,
                draws=1,
                thin=max(refine_steps - warmup, 1),
                warmup=warmup,
                seed=seed + 2_000_003,  # the moves must not see the numbers that made the starts
                progress=False,
            )
        self.cost = self.cost + run.cost
        refined = run.positions[:, -1]
        return standard.to_x(standard.project(refined) if self.particles else refined)

    def _possible(self, u: Tensor, generator: torch.Generator) -> Tensor:
        """Starts of moves: a draw where the target has no density gives its place to another, picked at random."""
        fine = torch.isfinite(self.standard_.log_prob(u))
        self.cost = self.cost + Cost(energies=len(u))
        if not bool(fine.any()):
            raise InvalidInput(
                f"none of {len(u)} draws has a finite log_prob: there is nothing to refine; train longer"
            )
        if bool(fine.all()):
            return u
        warnings.warn(
            f"{int((~fine).sum())} of {len(u)} draws had density 0 and were replaced by others before they were refined",
            NoisewiseWarning,
            stacklevel=3,
        )
        other = fine.nonzero().squeeze(-1)[torch.randint(int(fine.sum()), (len(u),), generator=generator)]
        return torch.where(fine.unsqueeze(-1), u, u[other])

    def weighted(self, n: int = 10_000, centres: int = 4096, seed: int = 0) -> Weighted:
        """`n` draws near those of the generator with exact importance weights, their effective number, and log Z.

        The draws are of a mixture of Gaussians around `centres` draws of the generator, whose density is known; one value-only
        call of the target each, added to `cost`. In many dimensions few of them count: look at `ess`. A mode that no centre
        is near is missing from everything. Raises `InvalidInput` before `fit`, and for particles, whose density has no
        normaliser in all coordinates.
        """
        self.fitted()
        if self.particles:
            raise InvalidInput("weighted draws are for targets with a density in all coordinates, not for particles")
        generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
        found = weighted_draws(self, check_count("n", n, 2), check_count("centres", centres, 100), generator)
        self.cost = self.cost + found.cost
        if found.ess < max(_FEW_EFFECTIVE, 0.01 * n):
            warnings.warn(
                f"the {n:,} weighted draws are worth {found.ess:.0f}: neither their means nor log Z can be trusted, whatever "
                "the error of the latter says; train longer, or take chains",
                NoisewiseWarning,
                stacklevel=2,
            )
        return found

    def fitted(self) -> tuple[Standardised, Any]:
        """The standardised target and the generator on its scale. Raises `InvalidInput` before `fit`."""
        if not hasattr(self, "net_"):
            raise InvalidInput("this DiKLSampler is not fitted yet: call fit(max_seconds=...) first")
        return self.standard_, self.net_

    # --- keeping

    def config(self) -> dict[str, Any]:
        """Settings as JSON values."""
        plan = self.plan
        own = isinstance(self._generator, nn.Module)
        return {
            "target": type(self.target).__name__,
            "dim": self.target.dim,
            "particles": self.particles,
            "generator": type(self._generator).__name__ if own else self._generator,
            "own_generator": own,
            "preset": self.preset,
            "latent": plan.latent,
            "categories": self.categories,
            "hidden": plan.hidden,
            "depth": plan.depth,
            "rates": vars(plan.rates),
            "weight": plan.weight,
            "standardize": plan.standardize,
            "annealed": plan.annealed,
            "posterior": _described(plan.posterior),
            "schedule": None if plan.table is None else [[level.a, level.s] for level in plan.table],
            "estimator": self.estimator,
            "seed": self.seed,
        }

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors`: the generator, its scale, the bill and the history."""
        return keeping.save(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, target: Any, generator: nn.Module | None = None, dim: int | None = None
    ) -> "DiKLSampler":
        """Read what `save_pretrained` wrote. `target`: the density, which is not saved; `generator`: yours, where it was.

        Raises `RunFolderError` for another class or schema, a damaged file, or a target of another dimension.
        """
        return keeping.load(cls, folder, target, generator, dim)

    def make_generator(self, skip: bool) -> nn.Module:
        """The generator before training; `skip`: whether an MLP adds z to its output."""
        plan, given = self.plan, self._generator
        if isinstance(given, nn.Module):
            return OwnGenerator(copy.deepcopy(given), self.target.dim)
        if given == "egnn":
            space = self.target.dim // self.particles
            return EGNNGenerator(self.particles, space, plan.hidden, plan.depth, plan.published, self.seed)
        mixed = plan.latent == "mixture" or (plan.latent == "auto" and not skip)
        categories = self.categories if mixed else 0
        return MLPGenerator(self.target.dim, plan.hidden, plan.depth, categories, skip, self.seed)


def _described(posterior: Any) -> Any:
    """The source of the target's score as a JSON value."""
    if isinstance(posterior, PosteriorSampler):
        return dict(vars(posterior))
    return posterior if isinstance(posterior, str) else type(posterior).__name__


class _Fit:
    """The stages of a fit: chains or a pilot, the target's score, the generator."""

    def __init__(
        self,
        sampler: DiKLSampler,
        max_steps: int | None,
        max_seconds: float | int | None,
        max_gradients: float | int | None,
        pilot_calls: int,
        folder: RunFolder | None,
        progress: bool,
    ) -> None:
        self.sampler, self.folder, self.pilot_calls, self.progress = sampler, folder, pilot_calls, progress
        self.max_steps, self.max_seconds, self.max_gradients = max_steps, max_seconds, max_gradients
        self.by_chains = sampler.plan.posterior == "chains"
        begin = time.monotonic()
        stored = folder.restore() if folder is not None else None
        drawn = self._pilot()
        self.begin = self.saved = time.monotonic()
        # what the chains took longer than they should is not the networks' to pay for alone
        self.left = None if max_seconds is None else max(max_seconds - (self.begin - begin), max_seconds / 2)
        self.training = self._training(drawn)
        self.spent = 0.0
        if stored is not None:
            self.training.restore(*stored)
            self.spent = stored[1]["spent"]
            assert folder is not None  # it was restored from
            folder.event("resume", step=self.training.step)

    def run(self, stop: Any, reporter: Reporter) -> None:
        """All that is left to do, until it is done or `stop` is set."""
        training, done, stage = self.training, 0.0, _STAGES[0]
        while self.by_chains and not stop.is_set() and (done := self._target_done()) < 1:
            training.learn_target(done)
            self._report(reporter, stage, training.learned, done)
        if not stop.is_set():
            stage = _STAGES[1]
        while not stop.is_set() and (done := self._done()) < 1:
            training.advance(done)
            self._report(reporter, stage, training.step, done)
        training.cost = replace(training.cost, seconds=self._billed())
        if not stop.is_set() and not (training.history and training.history[-1]["done"] == 1.0):
            training.note(stage, 1.0, always=True)
        self._checkpoint("interrupted" if stop.is_set() else "finished")

    # --- how far

    def _seconds(self) -> float:
        return self.spent + time.monotonic() - self.begin

    def _billed(self) -> float:
        """Seconds of the networks, and of the chains whenever those ran."""
        return self._seconds() + self.pilot_cost.seconds

    def _target_done(self) -> float:
        found = []
        if self.max_steps is not None:
            found.append(self.training.learned / (_TARGET_STEPS * self.max_steps))
        if self.left is not None:
            found.append(self._seconds() / (_TARGET_SHARE * self.left))
        return max(found)

    def _done(self) -> float:
        found = []
        if self.max_steps is not None:
            found.append(self.training.step / self.max_steps)
        if self.left is not None:
            share = _TARGET_SHARE if self.by_chains else 0.0
            found.append((self._seconds() / self.left - share) / (1 - share))
        if self.max_gradients is not None and not self.by_chains:
            found.append(self.training.cost.gradients / self.max_gradients)
        return max(found)

    # --- stages

    def _pilot(self) -> Tensor:
        """Draws of the target by chains, [row, dim]; few of them, where they only set the scale."""
        sampler = self.sampler
        bare = sampler.bare()
        where = None if self.folder is None else self.folder.path / "chains"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", NoisewiseWarning)
            start = sampler.starts()
            if sampler.init is None:
                # few calls are better spent on long chains than on many
                start = start[: max(self.pilot_calls // (2 * _LEAST), _FEW_CHAINS)]
            options: dict[str, Any] = {"init": start, "seed": sampler.seed, "progress": self.progress}
            if self.pilot_calls:
                run = run_chains(bare, budget=self.pilot_calls - self._kept(), checkpoint=where, **options)
            else:
                # the checks of a first call, and nothing else
                run = run_chains(MALA(bare, step_size=1e-12), draws=1, **options)
        self.warnings = [
            f"the chains of training: {one.message}" for one in caught if issubclass(one.category, NoisewiseWarning)
        ]
        if run.interrupted:
            # nothing to give back yet; what the chains did is in their own checkpoint
            raise KeyboardInterrupt
        self.pilot_cost = run.cost
        self.unsettled = _unsettled(run.positions, run.stats["log_prob"]) if self.pilot_calls else ""
        if self.unsettled:
            self.warnings.append(self.unsettled)
        # the first third still remembers where it began
        kept = run.positions[:, run.positions.shape[1] // 3 :].reshape(-1, sampler.target.dim)
        order = torch.randperm(len(kept), generator=torch.Generator().manual_seed(sampler.seed))[: self._kept()]
        return kept[order].to(torch.float32)

    def _kept(self) -> int:
        """Draws of the chains that are kept, one more call each."""
        return min(_KEPT, max(self.pilot_calls // 10, 1))

    def _training(self, drawn: Tensor) -> Training:
        sampler, plan = self.sampler, self.sampler.plan
        dim, particles = sampler.target.dim, sampler.particles
        zero, one = torch.zeros(dim), torch.ones(dim)
        standard = Standardised(sampler.target, zero, one, particles)
        drawn = standard.to_u(drawn)
        if plan.standardize:
            scale = drawn.std(0) if not particles else drawn.std().expand(dim)
            centre = zero if particles else drawn.mean(0)
            standard = Standardised(sampler.target, centre, scale.clamp(min=1e-12), particles)
            drawn = (drawn - centre) / standard.scale
        value, score = standard.log_prob_and_score(drawn)
        # one more call for each kept draw
        self.pilot_cost = self.pilot_cost + Cost(gradients=len(drawn))
        fine = torch.isfinite(value) & torch.isfinite(score).all(-1)
        self.chain_draws = standard.to_x(drawn[fine][:_SHOWN]) if self.by_chains else None
        known = bool(self.pilot_calls) and bool(fine.any())
        variance = local_scale(score[fine]).square() if known else one
        if particles:
            variance = variance.mean().expand(dim)
        # of the narrowest coordinate, and of all together; the spread of the modes
        narrow, width = float(variance.min().sqrt()), float(variance.mean().sqrt())
        spread = float(drawn.var(0).mean().sqrt()) if known else 1.0
        if known:
            self.warnings += self._rounded(standard, value[fine], variance.sqrt())
        self.spread = spread if known else 0.0
        self.rare = float(value[fine].double().quantile(_RARE)) if known and self.by_chains else None
        if known and plan.table is None and _LOWEST * math.sqrt(narrow * width) >= _HIGHEST * spread:
            raise InvalidInput(
                f"log_prob is all but flat where the chains went (its modes would be {width / spread:.3g} times as wide as the "
                "draws spread): it does not seem to have a finite integral, or they need init= near its modes"
            )
        if plan.table is None:
            levels = Levels(
                _LOWEST * math.sqrt(narrow * width), _HIGHEST * spread, plan.weight, plan.annealed, variance=narrow**2
            )
            steps = StepSizes.spaced(levels.lo, levels.hi, _BINS, narrow, dim)
        else:
            # the paper never uses its cleanest level
            table = tuple(plan.table.r)[1:] if plan.published and len(plan.table) > 1 else tuple(plan.table.r)
            levels = Levels(table[0], table[-1], plan.weight, plan.annealed, table, narrow**2)
            steps = StepSizes.published() if plan.published else StepSizes.per_level(table, narrow, dim)
        seed, posterior = sampler.seed, plan.posterior
        if particles and getattr(posterior, "box", None) is not None:
            # the published box is for targets without symmetry: on a subspace it has no place
            posterior = replace(posterior, box=None)
        return Training(
            standard, sampler.make_generator(not plan.published and width > _WIDE), self._denoiser(levels, seed + 1),
            self._denoiser(levels, seed + 2) if self.by_chains else None,
            Chains(drawn[fine], score[fine]) if self.by_chains else None,
            posterior, None if self.by_chains else (sampler.steps or steps), levels, plan.rates, sampler.estimator,
            variance, torch.Generator().manual_seed(seed), plan.published, cost=self.pilot_cost,
        )  # fmt: skip

    def _rounded(self, standard: Standardised, value: Tensor, width: Tensor) -> list[str]:
        """What float32 loses; raises `InvalidInput` where it cannot tell the points of a mode apart."""
        eps = torch.finfo(torch.float32).eps
        lost = eps * standard.mean.abs() / (width * standard.scale)
        if float(lost.max()) > _ROUNDED:
            at = int(lost.argmax())
            narrow, place = float((width * standard.scale)[at]), float(standard.mean[at])
            if self.unsettled:
                raise InvalidInput(f"the chains are lost around {place:.3g} in coordinate {at}: {self.unsettled}")
            raise InvalidInput(
                f"coordinate {at} has modes {narrow:.3g} wide around {place:.3g}, too far out for float32, which rounds away "
                f"{float(lost[at]):.0%} of a width: shift the target to around 0"
            )
        size = float(value.abs().median())
        if eps * size <= _ROUNDED:
            return []
        return [
            f"log_prob has values of about {size:.3g}, which float32 knows to {eps * size:.2g}: subtract a constant, or moves "
            "are accepted and draws weighed by rounding errors"
        ]

    def _denoiser(self, levels: Levels, seed: int) -> nn.Module:
        plan, dim, particles = self.sampler.plan, self.sampler.target.dim, self.sampler.particles
        if self.sampler._generator == "egnn":
            return EGNNDenoiser(particles, dim // particles, plan.hidden, plan.depth, seed)
        if plan.published:
            return RawDenoiser(dim, plan.hidden, plan.depth, levels.table or (), seed)
        return MLPDenoiser(dim, plan.hidden, plan.depth, seed)

    # --- saying and keeping

    def _report(self, reporter: Reporter, what: str, number: int, done: float) -> None:
        self.training.cost = replace(self.training.cost, seconds=self._billed())
        self.training.note(what, done)
        calls = self.training.cost.gradients
        seen = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in self.training._seen.items())
        reporter.show(f"{what}, step {number}:", round(100 * done), 100, f"{calls:.3g} calls, {seen}")
        if time.monotonic() - self.saved > _CHECKPOINT_SECONDS:
            self._checkpoint(None)

    def _checkpoint(self, event: str | None) -> None:
        self.saved = time.monotonic()
        if self.folder is None:
            return
        tensors, values = self.training.packed()
        self.folder.checkpoint(tensors, values | {"spent": self._seconds()})
        if event is not None:
            self.folder.event(event, step=self.training.step)


def _unsettled(positions: Tensor, log_prob: Tensor) -> str:
    """Signs that chains [chain, draw, dim] have not come to rest, in the words of a fit. `log_prob`: [draw, chain]."""
    draws = positions.shape[1]
    if draws < 9:
        return ""
    middle, last = slice(draws // 3, 2 * draws // 3), slice(2 * draws // 3, draws)
    climbed = float(log_prob[last].median() - log_prob[middle].median())
    if climbed > positions.shape[2]:
        return (
            f"log_prob still rose by {climbed:.3g} along the chains: they have not reached the modes (give init= near them, or a "
            "larger max_gradients), or there are none"
        )
    far = [(part - part.flatten(0, 1).median(0).values).abs().flatten(0, 1).median(0).values
           for part in (positions[:, middle], positions[:, last])]  # fmt: skip
    grown = float((far[1] / far[0].clamp(min=1e-30)).max())
    if grown > _AWAY:
        return (
            f"the chains still spread, by {grown - 1:.0%} from one third of their draws to the next: log_prob may have no finite "
            "integral, or they need a larger max_gradients"
        )
    return ""


def _faults(training: Training, look: _Look, spread: float) -> list[str]:
    """What to warn of. `spread`: of the chains' draws, 0 where it is not known."""
    found, seen = [], training._seen
    for name, what in (("langevin_acceptance", "Langevin"), ("anneal_acceptance", "annealing")):
        rate = seen.get(name)
        if rate is not None and not 0.2 <= rate <= 0.95:
            found.append(
                f"the {what} moves were accepted {rate:.0%} of the time: give steps=StepSizes... that suit the target, or let "
                "them adapt"
            )
    if training.degenerate > 0.3:
        found.append(
            f"at {training.degenerate:.0%} of the noisy points one draw has nearly all the weight: more particles, method "
            '"annealed" with more stages, or posterior="chains"'
        )
    if not training.step:
        found.append(
            "no step of the generator was made: the draws are those of an untrained network; raise max_seconds"
        )
    total = training.step * (1 + training.rates.score_steps) + training.learned
    if total and training.skipped > 0.05 * total:
        found.append(
            f"{training.skipped} of {total} steps were skipped, their gradients not finite: lower the learning rates"
        )
    least = 10 * training.target.dim
    # a network that knows nothing but the mean of its draws has a loss of about the dimension
    found += [
        f"the loss of the {name.replace('_', ' ')} network ended at {seen[name]:.3g}, above {least} = 10 dim: it diverged, or "
        "its draws lie far out; lower rates.score, or look at the target's tails"
        for name in ("target_score", "score")
        if seen.get(name, 0.0) > least
    ]
    if training.step and look.outside > 0.005:
        found.append(
            f"{look.outside:.1%} of the draws have density 0: a network cannot stop at an edge, and the scores that it learns "
            "from belong to densities that fall to 0 smoothly; transform what is bounded (log for x > 0, logit for an interval)"
        )
    elif training.step and look.rare > 0.15:
        found.append(
            f"{look.rare:.0%} of the draws are less likely than {1 - _RARE:.0%} of the chains' draws: the generator has not come "
            "to the modes yet; train longer, or mend each draw with sample(n, refine_steps=20)"
        )
    if training.step and look.spread < 0.1 * spread:
        found.append(
            f"the draws spread {look.spread / spread:.2g} times as far as the target's: the generator collapsed; train longer "
            "or from higher noise levels"
        )
    return found
