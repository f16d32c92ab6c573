"""Adaptive tempered sequential Monte Carlo (Del Moral, Doucet & Jasra 2006): particles annealed from a Gaussian."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.sampling.hmc import HMC
from noisewise.sampling.importance import largest_power
from noisewise.sampling.kernel import ChainState, Kernel, Phase, as_setting, given_settings, local_scale, plain_settings
from noisewise.targets.target import Target, as_target
from noisewise.targets.tilted import Tilt

__all__ = ["SMCInfo", "SMCState", "TemperedSMC"]


class SMCState(NamedTuple):
    """Particles (one per chain), the inverse temperature that they represent, and the log normaliser so far."""

    position: Float[Tensor, "chain dim"]
    log_prob: Float[Tensor, " chain"]
    score: Float[Tensor, "chain dim"]
    beta: Float[Tensor, ""]
    log_normalizer: Float[Tensor, ""]


class SMCInfo(NamedTuple):
    """Mean acceptance of the moves, [1]; the inverse temperature reached; the effective share of particles."""

    acceptance: Float[Tensor, " level"]
    beta: Float[Tensor, ""]
    ess: Float[Tensor, ""]
    nonfinite: Tensor


@dataclass(frozen=True)
class TemperedSMC:
    """Particles go from N(mean, scale^2) to the target along p^beta q^(1-beta); one particle per chain.

    Each iteration takes the largest step in beta that keeps an effective share `ess` of the particles, resamples them
    systematically, and moves each `moves` times by HMC with `leapfrogs` steps. At beta = 1 it is plain HMC. Inside `sample`
    the annealing is the warm-up: it runs to beta = 1 whatever that takes, and draws follow. `mean`, `scale`: scalar or
    [dim], by default those of the starts (unit scale when all starts coincide); a mode outside that Gaussian is lost. Step
    sizes adapt on the way, as is customary; that bias vanishes with the number of particles.
    `log_normalizer` in the final state estimates log of the integral of exp(log_prob).
    Raises `InvalidInput` for settings out of range. Source: Del Moral, Doucet & Jasra, JRSS B 68, 2006.
    """

    target: Target
    mean: float | int | Tensor | None = None
    scale: float | int | Tensor | None = None
    ess: float | int = 0.9
    moves: int = 4
    leapfrogs: int = 5
    step_size: float | int | Tensor | None = None
    warmup_share = 0.95  # of a budget: the annealing is all the work, and ends early when it has arrived

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))
        own = getattr(self.target, "chains", None)
        if own is not None:
            raise InvalidInput(
                f"TemperedSMC moves particles from chain to chain, but this {type(self.target).__name__} has a density of "
                f"its own for each of {own} chains: run one SMC per chain, on target.at_rows(torch.tensor([chain])), or "
                "another kernel"
            )
        if not 0 < self.ess < 1:
            raise InvalidInput(f"ess must lie in (0, 1), got {self.ess!r}")
        as_setting("scale", self.scale)
        as_setting("step_size", self.step_size)
        object.__setattr__(self, "_hmc", HMC(self.target, leapfrogs=self.leapfrogs, steps=self.moves))

    @property
    def target_acceptance(self) -> float:
        """That of HMC."""
        return 0.8

    @property
    def gradients_per_step(self) -> int:
        """`moves` x `leapfrogs`."""
        return self.moves * self.leapfrogs

    @property
    def energies_per_step(self) -> int:
        """No value-only calls."""
        return 0

    def init(self, position: Float[Tensor, "chain dim"]) -> SMCState:
        """Particles at `position`, which must be draws of N(mean, scale^2); one value-and-gradient call per chain."""
        return self.start(ChainState(position, *self.target.log_prob_and_score(position)))

    def start(self, cold: ChainState) -> SMCState:
        """State at beta = 0 from particles whose values and scores are known."""
        zero = torch.zeros((), dtype=cold.position.dtype, device=cold.position.device)
        return SMCState(*cold, zero, zero.clone())

    def step(self, state: SMCState, generator: torch.Generator) -> tuple[SMCState, SMCInfo]:
        """Reweight to the next temperature, resample, move."""
        x = state.position
        mean, scale = self._reference(x)
        log_q = -0.5 * ((x - mean) / scale).square().sum(-1) - scale.expand(x.shape[-1]).log().sum()
        log_q = log_q - 0.5 * x.shape[-1] * math.log(2 * math.pi)
        gain = state.log_prob - log_q
        gain = torch.where(torch.isfinite(gain), gain, -torch.inf)
        # particles outside the support never come back: the share is that of the others, and they are resampled away
        inside = torch.isfinite(gain)
        increment = largest_power(gain, self.ess * inside.to(gain).mean(), 1 - state.beta)
        log_weight = torch.where(inside, increment * gain, -torch.inf)
        weight = log_weight.softmax(0)
        chosen = _systematic(weight, generator)
        beta = torch.where(increment >= 1 - state.beta, torch.ones_like(state.beta), state.beta + increment)
        particles = ChainState(x[chosen], state.log_prob[chosen], state.score[chosen])
        step = torch.as_tensor(0.1 if self.step_size is None else self.step_size, dtype=x.dtype, device=x.device)
        hmc: HMC = self._hmc  # type: ignore[attr-defined]
        tilt = Tilt(beta, (1 - beta) / scale**2, mean)
        particles, moved = hmc.advance(particles, hmc.noise(x, generator), step, tilt)
        log_normalizer = state.log_normalizer + log_weight.logsumexp(0) - math.log(len(x))
        info = SMCInfo(moved.acceptance.mean().reshape(1), beta, 1 / weight.square().sum() / len(x), moved.nonfinite)
        return SMCState(*particles, beta, log_normalizer), info

    def _reference(self, like: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
        mean = torch.as_tensor(0.0 if self.mean is None else self.mean, **options)
        return mean, torch.as_tensor(1.0 if self.scale is None else self.scale, **options)

    def settings(self) -> dict[str, Tensor]:
        """`mean`, `scale` and `step_size`, where set."""
        return given_settings(mean=self.mean, scale=self.scale, step_size=self.step_size)

    def with_settings(self, settings: dict[str, Tensor]) -> "TemperedSMC":
        """The same kernel with these settings."""
        changes: dict[str, Any] = dict(settings)
        return replace(self, **changes)

    def warmup_phases(self, gradients: int, state: ChainState) -> list[Phase]:
        """The annealing, as many steps as it takes within `gradients`."""
        return [_Anneal(self, gradients)]

    def state_type(self) -> type:
        """`SMCState`."""
        return SMCState

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        return {
            "kernel": "TemperedSMC",
            "ess": self.ess,
            "moves": self.moves,
            "leapfrogs": self.leapfrogs,
            **plain_settings(mean=self.mean, scale=self.scale, step_size=self.step_size),
        }


def _systematic(weight: Float[Tensor, " chain"], generator: torch.Generator) -> Tensor:
    """Systematic resampling: one uniform for all; equal weights give every particle exactly once, in order."""
    count = len(weight)
    start = torch.rand((), dtype=torch.float64, device=weight.device, generator=generator)
    grid = (torch.arange(count, dtype=torch.float64, device=weight.device) + start) / count
    return torch.searchsorted(weight.double().cumsum(0), grid).clamp(max=count - 1)


class _Anneal:
    """Run to beta = 1 with the step size adapting; particles first become draws of the reference."""

    opening_gradients = 1  # the particles drawn from the reference
    closing_gradients = 0

    def __init__(self, kernel: TemperedSMC, gradients: int) -> None:
        self._kernel = kernel
        self._steps = max(gradients // kernel.gradients_per_step, 1)

    def template(self) -> Kernel:
        """The kernel before annealing."""
        return self._kernel

    def begin(
        self, kernel: Any, state: ChainState, generator: torch.Generator
    ) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """Reference from the starts where it was left open; draw the particles from it."""
        x = state.position
        changes = {}
        if self._kernel.mean is None:
            changes["mean"] = x.mean(0)
        if self._kernel.scale is None:
            spread = x.std(0, correction=0)
            changes["scale"] = torch.where(spread > 0, spread, torch.ones_like(spread))
        kernel = self._kernel.with_settings(changes)
        mean, scale = kernel._reference(x)
        fresh = mean + scale * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        state = kernel.init(fresh)
        step = kernel._hmc.initial_step_size(scale.expand(x.shape[-1]), x.shape[-1])
        step = torch.minimum(step, 10 * local_scale(state.score).min().to(step))
        open_step = {"step_size": step} if self._kernel.step_size is None else {}
        return kernel.with_settings(open_step), state, {}, self._steps

    def update(
        self, kernel: Any, state: SMCState, info: SMCInfo, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """One multiplicative correction per temperature: the target narrows on the way, so old rates do not count."""
        if self._kernel.step_size is None:
            excess = float(info.acceptance) - kernel.target_acceptance
            kernel = kernel.with_settings({"step_size": kernel.step_size * math.exp(excess)})
        return kernel, state, memory

    def finished(self, state: SMCState) -> bool:
        """Whether beta = 1 was reached before the steps ran out."""
        return bool(state.beta == 1)

    def end(
        self, kernel: Any, state: SMCState, memory: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Kernel, Any]:
        """Warn where the target was not reached."""
        if not self.finished(state):
            warnings.warn(
                f"the annealing reached beta = {float(state.beta):.3g}, not 1, within its warm-up: the draws are not yet of "
                "the target; give a larger budget or warmup, or fewer particles",
                NoisewiseWarning,
                stacklevel=2,
            )
        return kernel, state
