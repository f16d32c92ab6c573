"""Hamiltonian Monte Carlo (Duane et al. 1987; Neal 2011) with a fixed number of leapfrog steps, for a batch of chains."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.sampling.adaptation import TuneSteps
from noisewise.sampling.kernel import (
    ChainState,
    Moved,
    Phase,
    as_setting,
    finite,
    given_settings,
    plain_settings,
    select,
)
from noisewise.sampling.mala import LocalInfo
from noisewise.targets.target import Target, as_target
from noisewise.targets.tilted import Tilt
from noisewise.typing import check_count

__all__ = ["HMC", "HMCNoise"]


class HMCNoise(NamedTuple):
    """Momenta, log-uniforms of the acceptances, and the step-size factors, one row per trajectory."""

    momentum: Float[Tensor, "step chain dim"]
    log_uniform: Float[Tensor, "step chain"]
    factor: Float[Tensor, "step chain 1"]


@dataclass(frozen=True)
class HMC:
    """Trajectories of `leapfrogs` steps with fresh momenta N(0, 1/M) and a Metropolis correction.

    `step_size` eps in units of the target; None lets warm-up find it (acceptance 0.8), 0.1 without warm-up.
    `leapfrogs` per trajectory; `steps` trajectories per iteration; `jitter` in [0, 1): each trajectory's eps is multiplied
    by a uniform factor in 1 +- jitter, against resonance. `metric`: diagonal of M, [dim]; None for a warm-up estimate.
    `power`: inverse temperature of the target. Raises `InvalidInput` for settings out of range.
    Source: Duane et al., Physics Letters B 195, 1987; Neal, Handbook of MCMC, 2011.
    """

    target: Target
    step_size: float | int | Tensor | None = None
    leapfrogs: int = 10
    steps: int = 1
    jitter: float | int = 0.2
    metric: Float[Tensor, " dim"] | None = None
    power: float | int | Tensor = 1.0
    target_acceptance: float | int = field(default=0.8, repr=False)
    metric_exponent = 0.5  # step_size * sqrt(metric) is what moves the chain

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))
        as_setting("step_size", self.step_size)
        as_setting("metric", self.metric)
        as_setting("power", self.power)
        check_count("leapfrogs", self.leapfrogs)
        check_count("steps", self.steps)
        if not 0 <= self.jitter < 1:
            raise InvalidInput(f"jitter must lie in [0, 1), got {self.jitter!r}")

    @property
    def gradients_per_step(self) -> int:
        """One value-and-gradient call per leapfrog: the current point is cached."""
        return self.steps * self.leapfrogs

    @property
    def energies_per_step(self) -> int:
        """No value-only calls."""
        return 0

    def init(self, position: Float[Tensor, "chain dim"]) -> ChainState:
        """State at `position`; one value-and-gradient call per chain."""
        return self.start(ChainState(position, *self.target.log_prob_and_score(position)))

    def start(self, cold: ChainState) -> ChainState:
        """State from a point whose value and score are known."""
        return cold

    def step(self, state: ChainState, generator: torch.Generator) -> tuple[ChainState, LocalInfo]:
        """`steps` trajectories of every chain."""
        eps = torch.as_tensor(
            0.1 if self.step_size is None else self.step_size, dtype=state.position.dtype, device=state.position.device
        )
        state, moved = self.advance(state, self.noise(state.position, generator), eps, Tilt(power=self.power))
        return state, LocalInfo(moved.acceptance.mean().reshape(1), moved.nonfinite)

    def noise(self, position: Float[Tensor, "chain dim"], generator: torch.Generator) -> HMCNoise:
        """All random numbers of one `advance`."""
        options: dict[str, Any] = {"dtype": position.dtype, "device": position.device, "generator": generator}
        uniform = torch.rand((2, self.steps, len(position)), **options)
        return HMCNoise(
            torch.randn((self.steps, *position.shape), **options),
            torch.log1p(-uniform[0]),
            (1 + self.jitter * (2 * uniform[1] - 1)).unsqueeze(-1),
        )

    def advance(self, state: ChainState, noise: HMCNoise, step_size: Tensor, tilt: Tilt) -> tuple[ChainState, Moved]:
        """Trajectories on the tilted target."""
        spread = 1.0 if self.metric is None else self.metric.to(state.position).sqrt()
        acceptance = torch.zeros_like(state.log_prob)
        nonfinite = torch.zeros((), dtype=torch.long, device=state.log_prob.device)
        for fresh, log_uniform, factor in zip(*noise, strict=True):
            eps = step_size * factor * spread
            tilted, slope = tilt(*state)
            momentum, proposed = fresh + 0.5 * eps * slope, state
            valid = torch.ones_like(state.log_prob, dtype=torch.bool)
            for leapfrog in range(self.leapfrogs):
                position = proposed.position + eps * momentum
                log_prob, score = self.target.log_prob_and_score(position)
                here = finite(log_prob, score)
                nonfinite = nonfinite + (valid & ~here).sum()
                valid = valid & here
                # a trajectory that left the support drifts on without force and is rejected at its end
                proposed = ChainState(position, log_prob, torch.where(here.unsqueeze(-1), score, 0.0))
                tilted_proposed, slope = tilt(*proposed)
                momentum = momentum + (eps if leapfrog + 1 < self.leapfrogs else 0.5 * eps) * slope
            log_ratio = tilted_proposed - tilted + 0.5 * (fresh.square() - momentum.square()).sum(-1)
            # where infinities cancelled to NaN the trajectory diverged
            log_ratio = torch.where(valid & ~log_ratio.isnan(), log_ratio, -torch.inf)
            state = select(log_uniform < log_ratio, proposed, state)
            acceptance = acceptance + log_ratio.clamp(max=0).exp()
        return state, Moved(acceptance / self.steps, nonfinite)

    def initial_step_size(self, scale: Float[Tensor, " dim"], dim: int) -> Tensor:
        """eps of about the scale over d^(1/4), the optimal order for HMC."""
        return scale.min() * dim ** (-1 / 4)

    def settings(self) -> dict[str, Tensor]:
        """`step_size`, `metric` and `power`, where set."""
        return given_settings(step_size=self.step_size, metric=self.metric, power=self.power)

    def with_settings(self, settings: dict[str, Tensor]) -> "HMC":
        """The same kernel with these settings."""
        changes: dict[str, Any] = dict(settings)
        return replace(self, **changes)

    def warmup_phases(self, gradients: int, state: ChainState) -> list[Phase]:
        """Step-size and metric adaptation, unless a step size was given."""
        if self.step_size is not None:
            return []
        return [TuneSteps(self, gradients)]

    def state_type(self) -> type:
        """`ChainState`."""
        return ChainState

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        return {
            "kernel": "HMC",
            "leapfrogs": self.leapfrogs,
            "steps": self.steps,
            "jitter": self.jitter,
            **plain_settings(step_size=self.step_size, metric=self.metric, power=self.power),
        }
