"""Metropolis-adjusted Langevin (Roberts & Tweedie 1996) and its unadjusted form, for a batch of chains."""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

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
from noisewise.targets.target import Target, as_target
from noisewise.targets.tilted import Tilt
from noisewise.typing import check_count

__all__ = ["MALA", "ULA", "LangevinNoise", "LocalInfo"]


class LocalInfo(NamedTuple):
    """Mean acceptance over chains, [1], and how many proposals were rejected as non-finite."""

    acceptance: Float[Tensor, " level"]
    nonfinite: Tensor


class LangevinNoise(NamedTuple):
    """Standard normals of the proposals and log-uniforms of the acceptances, one row per step."""

    normal: Float[Tensor, "step chain dim"]
    log_uniform: Float[Tensor, "step chain"]


@dataclass(frozen=True)
class MALA:
    """Langevin proposals x' = x + h M score + sqrt(2 h M) xi with a Metropolis correction.

    `step_size` h, in squared units of the target (the convention of the DiGS authors and of BlackJAX: others write
    h^2 / 2); None lets warm-up find it (acceptance 0.574), 0.1 without warm-up. `steps` per iteration. `metric`: diagonal
    of M, [dim], None for a warm-up estimate (ones without warm-up).
    Raises `InvalidInput` for non-positive settings. Source: Roberts & Tweedie, Bernoulli 2(4), 1996.
    """

    target: Target
    step_size: float | int | Tensor | None = None
    steps: int = 1
    metric: Float[Tensor, " dim"] | None = None
    target_acceptance: float | int = field(default=0.574, repr=False)
    adjusted = True
    metric_exponent = 1.0  # step_size * metric is what moves the chain

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))
        as_setting("step_size", self.step_size)
        as_setting("metric", self.metric)
        check_count("steps", self.steps)

    @property
    def gradients_per_step(self) -> int:
        """One value-and-gradient call per Langevin step: the current point is cached."""
        return self.steps

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
        """`steps` Langevin steps of every chain."""
        h = torch.as_tensor(
            0.1 if self.step_size is None else self.step_size, dtype=state.position.dtype, device=state.position.device
        )
        state, moved = self.advance(state, self.noise(state.position, generator), h, Tilt())
        return state, LocalInfo(moved.acceptance.mean().reshape(1), moved.nonfinite)

    def noise(self, position: Float[Tensor, "chain dim"], generator: torch.Generator) -> LangevinNoise:
        """All random numbers of one `advance`."""
        options: dict[str, Any] = {"dtype": position.dtype, "device": position.device, "generator": generator}
        return LangevinNoise(
            torch.randn((self.steps, *position.shape), **options),
            torch.rand((self.steps, len(position)), **options).neg_().log1p_(),
        )

    def advance(
        self, state: ChainState, noise: LangevinNoise, step_size: Tensor, tilt: Tilt
    ) -> tuple[ChainState, Moved]:
        """Langevin steps on the tilted target."""
        spread = 1.0 if self.metric is None else self.metric.to(state.position).sqrt()
        drift, diffusion = step_size * spread**2, (2 * step_size).sqrt() * spread
        # log q(x | x') - log q(x' | x) in the proposal's own noise: no difference of large squares
        back = (step_size / 2).sqrt() * spread
        tilted, slope = tilt(*state)
        acceptance = torch.zeros_like(state.log_prob)
        nonfinite = torch.zeros((), dtype=torch.long, device=state.log_prob.device)
        for xi, log_uniform in zip(noise.normal, noise.log_uniform, strict=True):
            proposed_position = state.position + drift * slope + diffusion * xi
            proposed = ChainState(proposed_position, *self.target.log_prob_and_score(proposed_position))
            tilted_proposed, slope_proposed = tilt(*proposed)
            reverse = xi + back * (slope + slope_proposed)
            log_ratio = tilted_proposed - tilted + 0.5 * (xi.square() - reverse.square()).sum(-1)
            valid = finite(proposed.log_prob, proposed.score)
            log_ratio = torch.where(valid, log_ratio, -torch.inf)
            accept = log_uniform < log_ratio if self.adjusted else valid
            state = select(accept, proposed, state)
            tilted = torch.where(accept, tilted_proposed, tilted)
            slope = torch.where(accept.unsqueeze(-1), slope_proposed, slope)
            acceptance = acceptance + log_ratio.clamp(max=0).exp()
            nonfinite = nonfinite + (~valid).sum()
        return state, Moved(acceptance / self.steps, nonfinite)

    def initial_step_size(self, scale: Float[Tensor, " dim"], dim: int) -> Tensor:
        """h of about the squared scale over d^(1/3), the optimal order for MALA."""
        return scale.square().min() * dim ** (-1 / 3)

    def settings(self) -> dict[str, Tensor]:
        """`step_size` and `metric`, where set."""
        return given_settings(step_size=self.step_size, metric=self.metric)

    def with_settings(self, settings: dict[str, Tensor]) -> "MALA":
        """The same kernel with these settings."""
        changes: dict[str, Any] = dict(settings)
        return replace(self, **changes)

    def warmup_phases(self, gradients: int, state: ChainState) -> list[Phase]:
        """Step-size and metric adaptation, unless both were given."""
        if self.step_size is not None:
            return []
        return [TuneSteps(self, gradients)]

    def state_type(self) -> type:
        """`ChainState`."""
        return ChainState

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        return {
            "kernel": type(self).__name__,
            "steps": self.steps,
            **plain_settings(step_size=self.step_size, metric=self.metric),
        }


@dataclass(frozen=True)
class ULA(MALA):
    """Langevin steps *without* the Metropolis correction: biased at every step size; a baseline, never a default.

    `step_size` as in `MALA`; warm-up sets it where a corrected chain would accept 90 % of the proposals.
    Non-finite proposals are refused. Source: Roberts & Tweedie, Bernoulli 2(4), 1996.
    """

    target_acceptance: float | int = field(default=0.9, repr=False)
    adjusted = False
