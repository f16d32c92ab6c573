"""Diffusive Gibbs sampling (Chen et al., ICML 2024, arXiv 2402.03008): noise the state, then sample its denoising posterior."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.denoising.posterior import denoising_tilt
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption, NoiseSchedule
from noisewise.sampling.adaptation import TuneSteps
from noisewise.sampling.kernel import (
    ChainState,
    Kernel,
    Moved,
    Phase,
    as_setting,
    finite,
    given_settings,
    local_scale,
    plain_settings,
    select,
)
from noisewise.sampling.mala import MALA
from noisewise.targets.target import Target, as_target
from noisewise.targets.tilted import Tilt
from noisewise.typing import check_count

__all__ = ["DiGS", "DiGSInfo"]


class DiGSInfo(NamedTuple):
    """Per noise level, clean to noisy, mean over chains and sweeps: acceptance of the inner steps and of the MwG start."""

    acceptance: Float[Tensor, " level"]
    mwg_acceptance: Float[Tensor, " level"]
    nonfinite: Tensor


class SweepNoise(NamedTuple):
    """Random numbers of one sweep at one level: forward noise, proposals, their uniforms, and those of the inner kernel."""

    forward: Float[Tensor, "chain dim"]
    proposal: Float[Tensor, "tries chain dim"]
    uniform: Float[Tensor, " chain"]
    inner: Any


@dataclass(frozen=True)
class DiGS:
    """One iteration walks the noise levels from the noisiest to the cleanest, `sweeps` times each: x_t = a x + s eps,
    then a Metropolis-within-Gibbs start of the denoising chain, then the `inner` kernel on p(x | x_t).

    `schedule`: a `NoiseSchedule`, a `Corruption`, or None: geometric in r = s/a between the local scale and the spread of
    the starts, chosen by `sample` (without it, the authors' five levels a = 0.1 .. 0.9). `inner`: a MALA or HMC kernel on
    the same target whose `steps` are the L inner steps; by default MALA with five steps; its step size, when None, is
    adapted per level in warm-up. `step_size`: one per level, or one for all; overrides the inner kernel's. `tries` > 1:
    multiple-try start, one proposal picked among `tries` and the current point (exact; `tries` value-only calls in place of
    none). `metric`: diagonal M, [dim], of the noise N(0, r^2 M).

    Superb for modes that overlap after noising in low dimension; on isolated modes the start's acceptance decays
    exponentially with dimension and chains stay where they began, silently: `sample` warns, `FittedDiGS` is the cure.
    Cost per iteration and chain: levels x sweeps x (L + 1) value-and-gradient calls.
    Raises `InvalidInput` for an inner kernel on another target or settings out of range.
    """

    target: Target
    schedule: NoiseSchedule | Corruption | None = None
    sweeps: int = 1
    inner: Any = None
    tries: int = 1
    step_size: float | int | Tensor | None = None
    metric: Float[Tensor, " dim"] | None = None
    target_acceptance: float | int = field(default=0.574, repr=False)
    metric_exponent = 0.0  # the noise bounds the condition number of p(x | x_t): no metric is adapted

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))
        check_count("sweeps", self.sweeps)
        check_count("tries", self.tries)
        as_setting("metric", self.metric)
        as_setting("step_size", self.step_size)
        if isinstance(self.schedule, Corruption):
            object.__setattr__(self, "schedule", NoiseSchedule([self.schedule]))
        if self.schedule is not None and not isinstance(self.schedule, NoiseSchedule):
            raise InvalidInput(f"schedule must be a NoiseSchedule, a Corruption or None, got {self.schedule!r}")
        inner = MALA(self.target, steps=5) if self.inner is None else self.inner
        if not isinstance(inner, type(inner)) or not hasattr(inner, "advance") or isinstance(inner, DiGS):
            raise InvalidInput(f"inner must be a MALA or HMC kernel on the same target, got {self.inner!r}")
        if inner.target is not self.target:
            raise InvalidInput(
                "inner must be built on the same target object as DiGS: DiGS(target, inner=MALA(target, ...))"
            )
        if self.step_size is None and inner.step_size is not None:
            object.__setattr__(self, "step_size", inner.step_size)
        if self.metric is not None and inner.metric is None:
            inner = replace(inner, metric=self.metric)
        object.__setattr__(self, "inner", inner)
        object.__setattr__(self, "target_acceptance", inner.target_acceptance)
        given = self.step_size
        if isinstance(given, Tensor) and given.ndim and len(given) not in (1, len(self.levels)):
            raise InvalidInput(f"step_size has {len(given)} entries for {len(self.levels)} noise levels")

    @property
    def levels(self) -> NoiseSchedule:
        """The schedule in force."""
        return NoiseSchedule.vp_alpha(levels=5) if self.schedule is None else self.schedule  # type: ignore[return-value]

    @property
    def gradients_per_step(self) -> int:
        """levels x sweeps x (L + 1)."""
        return len(self.levels) * self.sweeps * (self.inner.gradients_per_step + 1)

    @property
    def energies_per_step(self) -> int:
        """Value-only calls of the multiple-try start; none with one try."""
        return len(self.levels) * self.sweeps * (self.tries if self.tries > 1 else 0)

    def init(self, position: Float[Tensor, "chain dim"]) -> ChainState:
        """State at `position`; one value-and-gradient call per chain."""
        return self.start(ChainState(position, *self.target.log_prob_and_score(position)))

    def start(self, cold: ChainState) -> ChainState:
        """State from a point whose value and score are known."""
        return cold

    def step(self, state: ChainState, generator: torch.Generator) -> tuple[ChainState, DiGSInfo]:
        """One cycle over the noise levels."""
        rows, nonfinite = [], torch.zeros((), dtype=torch.long, device=state.position.device)
        steps = self._step_sizes(state.position)
        for level, step_size in reversed(list(zip(self.levels, steps, strict=True))):
            inner = mwg = torch.zeros((), dtype=state.position.dtype, device=state.position.device)
            for _ in range(self.sweeps):
                noise = self._sweep_noise(state.position, generator)
                state, started, moved = self.sweep(state, noise, level.r, step_size, Tilt())
                mwg = mwg + started.acceptance.mean()
                inner = inner + moved.acceptance.mean()
                nonfinite = nonfinite + started.nonfinite + moved.nonfinite
            rows.append(torch.stack([inner, mwg]) / self.sweeps)
        by_level = torch.stack(rows[::-1], 1)
        return state, DiGSInfo(by_level[0], by_level[1], nonfinite)

    def noise(self, position: Float[Tensor, "chain dim"], generator: torch.Generator) -> list[list[SweepNoise]]:
        """All random numbers of one `advance`, by level from noisy to clean."""
        return [[self._sweep_noise(position, generator) for _ in range(self.sweeps)] for _ in self.levels]

    def advance(
        self, state: ChainState, noise: list[list[SweepNoise]], step_size: Tensor, tilt: Tilt
    ) -> tuple[ChainState, Moved]:
        """One cycle under `tilt` with one step size for all levels, limited at each by its own noise scale.

        Inside a temperature the noise widens like the tempered modes do, r / sqrt(power).
        """
        moves = []
        widen = torch.as_tensor(tilt.power).rsqrt()
        widen = widen.unsqueeze(-1) if widen.ndim else widen
        for level, sweeps in zip(reversed(self.levels.levels), noise, strict=True):
            r = level.r * widen
            for sweep in sweeps:
                state, started, moved = self.sweep(state, sweep, r, self._limited(step_size, r), tilt)
                moves.append(Moved(moved.acceptance, started.nonfinite + moved.nonfinite))
        acceptance = torch.stack([move.acceptance for move in moves]).mean(0)
        return state, Moved(acceptance, torch.stack([move.nonfinite for move in moves]).sum())

    def sweep(
        self, state: ChainState, noise: SweepNoise, r: float | int | Tensor, step_size: Tensor, tilt: Tilt
    ) -> tuple[ChainState, Moved, Moved]:
        """Noise, start and denoise at one level; deterministic in its arguments, one denoising posterior.

        Everything depends on (a, s) through r = s / a alone, so the noisy variable is kept as x_t / a = x + r eps.
        """
        spread = r if self.metric is None else r * self.metric.to(state.position).sqrt()
        noisy = state.position + spread * noise.forward
        start = self._start if self.tries == 1 else self._multiple_try_start
        state, started = start(state, noisy + spread * noise.proposal, noise.uniform, tilt)
        state, moved = self.inner.advance(state, noise.inner, step_size, denoising_tilt(tilt, noisy, spread))
        return state, started, moved

    def _start(self, state: ChainState, z: Tensor, uniform: Tensor, tilt: Tilt) -> tuple[ChainState, Moved]:
        """Propose z ~ q(x | x_t) and accept on the target alone: all Gaussian terms cancel (eq. 5 of the spec)."""
        proposed = ChainState(z[0], *self.target.log_prob_and_score(z[0]))
        valid = finite(proposed.log_prob, proposed.score)
        log_ratio = torch.where(valid, tilt(*proposed)[0] - tilt(*state)[0], -torch.inf)
        accept = torch.log1p(-uniform) < log_ratio
        return select(accept, proposed, state), Moved(log_ratio.clamp(max=0).exp(), (~valid).sum())

    def _multiple_try_start(
        self, state: ChainState, z: Tensor, uniform: Tensor, tilt: Tilt
    ) -> tuple[ChainState, Moved]:
        """Pick among all z_k and x with weights exp(log p): given x_t they are exchangeable draws of q(x | x_t)."""
        tries, chains, dim = z.shape
        values = self.target.log_prob(z.reshape(-1, dim)).reshape(tries, chains).detach()
        bad = ~torch.isfinite(values)
        candidates = torch.cat([state.position.unsqueeze(0), z])
        tilted = torch.stack(
            [
                tilt(position, value, torch.zeros_like(position))[0]
                for position, value in zip(candidates, torch.cat([state.log_prob.unsqueeze(0), values]), strict=True)
            ]
        )
        tilted = torch.cat([tilted[:1], tilted[1:].masked_fill(bad, -torch.inf)])
        weights = tilted.softmax(0)
        chosen = (weights.cumsum(0) < uniform).sum(0).clamp(max=tries)
        # round-off of the cumulative sum must not pick a candidate of weight zero
        chosen = torch.where(weights.gather(0, chosen.unsqueeze(0))[0] > 0, chosen, torch.zeros_like(chosen))
        position = candidates.gather(0, chosen.view(1, -1, 1).expand(1, chains, dim))[0]
        proposed = ChainState(position, *self.target.log_prob_and_score(position))
        accept = (chosen > 0) & finite(proposed.log_prob, proposed.score)
        return select(accept, proposed, state), Moved(1 - weights[0], bad.sum())

    def _sweep_noise(self, position: Tensor, generator: torch.Generator) -> SweepNoise:
        options: dict[str, Any] = {"dtype": position.dtype, "device": position.device, "generator": generator}
        normal = torch.randn((1 + self.tries, *position.shape), **options)
        uniform = torch.rand(len(position), **options)
        return SweepNoise(normal[0], normal[1:], uniform, self.inner.noise(position, generator))

    def _step_sizes(self, position: Tensor) -> list[Tensor]:
        """One step size per level: as set, or 0.1 limited by each level's noise scale."""
        if self.step_size is None:
            base = torch.as_tensor(0.1, dtype=position.dtype, device=position.device)
            return [self._limited(base, level.r) for level in self.levels]
        steps = torch.as_tensor(self.step_size, dtype=position.dtype, device=position.device)
        return list(steps.reshape(-1).expand(len(self.levels)))

    def _limited(self, step_size: Tensor, r: float | int | Tensor) -> Tensor:
        """The largest curvature of the denoising posterior is that of the target plus 1 / r^2."""
        power = 1 / self.inner.metric_exponent  # step sizes are lengths for HMC, squared lengths for MALA
        length = step_size ** (power / 2)
        return (length**-2 + r**-2) ** (-1 / power)

    def initial_step_size(self, scale: Float[Tensor, " dim"], dim: int) -> Tensor:
        """One step size per level, from the inner kernel's for the target and the level's noise scale."""
        scale = scale if self.inner.metric is None else scale / self.inner.metric.sqrt().cpu()
        base = self.inner.initial_step_size(scale, dim)
        return torch.stack([self._limited(base, level.r) for level in self.levels])

    def settings(self) -> dict[str, Tensor]:
        """`step_size` per level and the noise scales `r`."""
        settings = given_settings(step_size=self.step_size)
        if self.schedule is not None:
            settings["a"] = torch.tensor(self.levels.a, dtype=torch.float64)
            settings["s"] = torch.tensor(self.levels.s, dtype=torch.float64)
        return settings

    def with_settings(self, settings: dict[str, Tensor]) -> "DiGS":
        """The same kernel with these settings."""
        changes: dict[str, Any] = {"step_size": settings.get("step_size", self.step_size)}
        if "a" in settings:
            pairs = zip(settings["a"].tolist(), settings["s"].tolist(), strict=True)
            changes["schedule"] = NoiseSchedule([Corruption(a, s) for a, s in pairs])
        return replace(self, **changes)

    def warmup_phases(self, gradients: int, state: ChainState) -> list[Phase]:
        """The schedule, from a stretch of the inner kernel, then step sizes per level, as far as they were left open."""
        if self.schedule is None:
            local = replace(self.inner, step_size=None)
            fifth = max(gradients // 5, 1)
            first = TuneSteps(local, fifth)
            tuning = [TuneSteps(self, gradients - fifth)] if self.step_size is None else []
            return [_ChooseSchedule(self, first), *tuning]
        if self.step_size is None:
            return [TuneSteps(self, gradients)]
        return []

    def state_type(self) -> type:
        """`ChainState`."""
        return ChainState

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        return {
            "kernel": "DiGS",
            "r": None if self.schedule is None else list(self.levels.r),
            "sweeps": self.sweeps,
            "tries": self.tries,
            "inner": self.inner.describe(),
            **plain_settings(step_size=self.step_size, metric=self.metric),
        }


class _ChooseSchedule:
    """Let the inner kernel settle in the modes next to the starts, then space the levels from their width to the spread."""

    opening_gradients = closing_gradients = 0

    def __init__(self, kernel: DiGS, local: TuneSteps) -> None:
        self._kernel = kernel
        self._local = local

    def template(self) -> Kernel:
        """The inner kernel."""
        return self._local.template()

    def begin(
        self, kernel: Any, state: ChainState, generator: torch.Generator
    ) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """Remember the starts' spread."""
        local, state, memory, steps = self._local.begin(kernel, state, generator)
        return local, state, {**memory, "spread": state.position.double().std(0, correction=0).cpu()}, steps

    def update(
        self, kernel: Any, state: ChainState, info: Any, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """Tune the inner kernel."""
        return self._local.update(kernel, state, info, memory, index, steps)

    def finished(self, state: Any) -> bool:
        """Never before its steps ran out."""
        return False

    def end(
        self, kernel: Any, state: ChainState, memory: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Kernel, Any]:
        """Geometric in r from the local scale to the spread of the starts, both in units of the metric."""
        metric = self._kernel.metric
        root = 1.0 if metric is None else metric.double().sqrt().cpu()
        narrow = float((local_scale(state.score).double().cpu() / root).median())
        spread = float(
            (torch.maximum(memory["spread"], state.position.double().std(0, correction=0).cpu()) / root).max()
        )
        # starts on one point say nothing of the spread: reach ten local scales, as a = 0.1 does at unit scale
        wide = max(spread, 10 * narrow)
        return replace(self._kernel, schedule=NoiseSchedule.from_scale(narrow, wide, 4)), state
