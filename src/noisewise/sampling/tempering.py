"""Parallel tempering (Geyer 1991) with deterministic even-odd swaps (Okabe et al. 2001; Syed et al. 2022), batched."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.sampling.hmc import HMC
from noisewise.sampling.kernel import ChainState, Phase, as_setting, given_settings, plain_settings
from noisewise.sampling.ladder import Scout, TuneLadder, geometric_ladder
from noisewise.targets.target import Target, as_target
from noisewise.targets.tilted import Tilt
from noisewise.typing import check_count

__all__ = ["PTInfo", "PTState", "ParallelTempering"]

_DEFAULT_TEMPERATURES = 8
_DEFAULT_BETA_MIN = 1e-2


class PTState(NamedTuple):
    """Replicas by temperature, the cold one (beta = 1) first; `parity` says which pairs swap next."""

    replica: Float[Tensor, "temperature chain dim"]
    log_prob: Float[Tensor, "temperature chain"]
    score: Float[Tensor, "temperature chain dim"]
    parity: Int[Tensor, ""]

    @property
    def position(self) -> Float[Tensor, "chain dim"]:
        """The cold replica of each chain: the draws."""
        return self.replica[0]

    @property
    def cold(self) -> ChainState:
        """The cold replica with its log density and score."""
        return ChainState(self.replica[0], self.log_prob[0], self.score[0])


class PTInfo(NamedTuple):
    """Mean over chains: acceptance of the inner kernel per temperature, and of each neighbour swap."""

    acceptance: Float[Tensor, " temperature"]
    swap_acceptance: Float[Tensor, " pair"]
    nonfinite: Tensor


@dataclass(frozen=True)
class ParallelTempering:
    """Replicas of p^beta, each moved by `inner`, then swaps of neighbours, even and odd pairs in turn.

    `betas`: inverse temperatures from 1 downwards; None: `sample` scouts how hot the ladder must be for chains to cross
    between modes and how many temperatures that takes (at most `max_temperatures`), and adapts the ladder to equal swap
    rates; without warm-up, eight geometric temperatures to beta = 0.01. `beta_min`: the hottest beta, instead of the
    scouted one. `inner`: a kernel on the same target (HMC, MALA or DiGS), by default HMC with two leapfrogs.
    `step_size`: one per temperature, None for adaptation (without it, 0.1 / sqrt(beta)).
    Cost per iteration and chain: temperatures x inner cost. Raises `InvalidInput` for a ladder that does not fall from 1.
    Source: Syed, Bouchard-Cote, Deligiannidis & Doucet, JRSS B 84, 2022.
    """

    target: Target
    betas: Sequence[float] | Tensor | None = None
    inner: Any = None
    step_size: float | int | Tensor | None = None
    metric: Float[Tensor, " dim"] | None = None
    beta_min: float | int | None = None
    max_temperatures: int = 24
    adapt_ladder: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))
        inner = HMC(self.target, leapfrogs=2) if self.inner is None else self.inner
        if not hasattr(inner, "advance"):
            raise InvalidInput(f"inner must be a kernel such as HMC, MALA or DiGS, got {self.inner!r}")
        if inner.target is not self.target:
            raise InvalidInput(
                "inner must be built on the same target object: ParallelTempering(target, inner=HMC(target))"
            )
        if self.metric is not None and hasattr(inner, "metric"):
            inner = replace(inner, metric=self.metric)
        object.__setattr__(self, "inner", inner)
        as_setting("step_size", self.step_size)
        as_setting("metric", self.metric)
        check_count("max_temperatures", self.max_temperatures, 2)
        if self.beta_min is not None and not 0 < self.beta_min < 1:
            raise InvalidInput(f"beta_min must lie in (0, 1), got {self.beta_min!r}")
        if self.betas is not None:
            betas = torch.as_tensor(self.betas, dtype=torch.float64)
            falls = betas.ndim == 1 and len(betas) >= 2 and bool((betas[1:] < betas[:-1]).all() & (betas[-1] > 0))
            if not falls or float(betas[0]) != 1:
                raise InvalidInput(
                    f"betas must fall strictly from 1 to above 0, at least two of them, got {self.betas!r}"
                )
        given = inner.step_size if self.step_size is None else self.step_size
        if given is not None and self.betas is None:
            raise InvalidInput(
                f"step_size={given!r} was given, but the ladder is open: give betas= too, or leave the step sizes to warm-up"
            )
        if given is not None and self.step_size is None:
            # the inner kernel's own step size is that of the cold rung
            cold = torch.as_tensor(given, dtype=torch.float64).min()
            object.__setattr__(self, "step_size", cold * self.ladder**-self.length_power)

    @property
    def ladder(self) -> Float[Tensor, " temperature"]:
        """The inverse temperatures in force, float64."""
        if self.betas is None:
            return geometric_ladder(self.beta_min or _DEFAULT_BETA_MIN, _DEFAULT_TEMPERATURES)
        return torch.as_tensor(self.betas, dtype=torch.float64)

    @property
    def temperatures(self) -> int:
        """How many replicas each chain has."""
        return len(self.ladder)

    @property
    def target_acceptance(self) -> float:
        """That of the inner kernel."""
        return self.inner.target_acceptance

    @property
    def metric_exponent(self) -> float:
        """That of the inner kernel."""
        return self.inner.metric_exponent

    @property
    def gradients_per_step(self) -> int:
        """Temperatures x inner cost; swaps are free, their values are cached."""
        return self.temperatures * self.inner.gradients_per_step

    @property
    def energies_per_step(self) -> int:
        """Value-only calls of the inner kernel in every temperature."""
        return self.temperatures * self.inner.energies_per_step

    def init(self, position: Float[Tensor, "chain dim"]) -> PTState:
        """All replicas at `position`; one value-and-gradient call per chain."""
        return self.start(ChainState(position, *self.target.log_prob_and_score(position)))

    def start(self, cold: ChainState) -> PTState:
        """All replicas at the cold one."""
        count = self.temperatures
        return PTState(
            cold.position.expand(count, -1, -1).contiguous(),
            cold.log_prob.expand(count, -1).contiguous(),
            cold.score.expand(count, -1, -1).contiguous(),
            torch.zeros((), dtype=torch.long, device=cold.position.device),
        )

    def step(self, state: PTState, generator: torch.Generator) -> tuple[PTState, PTInfo]:
        """Move every replica, then swap neighbours."""
        state, acceptance, nonfinite = self._move(state, generator)
        state, swaps = self._swap(state, generator)
        return state, PTInfo(acceptance, swaps, nonfinite)

    def _move(self, state: PTState, generator: torch.Generator) -> tuple[PTState, Tensor, Tensor]:
        """One `advance` of the inner kernel for all replicas of all chains in one batch."""
        count, chains, dim = state.replica.shape
        beta = self.ladder.to(state.replica)
        step = self._step_sizes(beta).repeat_interleave(chains).unsqueeze(-1)
        rows = ChainState(state.replica.reshape(-1, dim), state.log_prob.reshape(-1), state.score.reshape(-1, dim))
        noise = self.inner.noise(rows.position, generator)
        rows, moved = self.inner.advance(rows, noise, step, Tilt(power=beta.repeat_interleave(chains)))
        state = PTState(
            rows.position.reshape(count, chains, dim),
            rows.log_prob.reshape(count, chains),
            rows.score.reshape(count, chains, dim),
            state.parity,
        )
        return state, moved.acceptance.reshape(count, chains).mean(1), moved.nonfinite

    def _swap(self, state: PTState, generator: torch.Generator) -> tuple[PTState, Tensor]:
        """Swap pairs (i, i+1) of the current parity, then turn the parity: non-reversible, so replicas travel."""
        count, chains, dim = state.replica.shape
        beta = self.ladder.to(state.replica)
        log_ratio = (beta[:-1] - beta[1:]).unsqueeze(-1) * (state.log_prob[1:] - state.log_prob[:-1])
        uniform = torch.rand(log_ratio.shape, dtype=beta.dtype, device=beta.device, generator=generator)
        pair = torch.arange(count - 1, device=beta.device).unsqueeze(-1)
        accept = ((torch.log1p(-uniform) < log_ratio) & (pair % 2 == state.parity)).long()
        none = torch.zeros((1, chains), dtype=torch.long, device=beta.device)
        source = (
            torch.arange(count, device=beta.device).unsqueeze(-1)
            + torch.cat([accept, none])
            - torch.cat([none, accept])
        )
        wide = source.unsqueeze(-1).expand(-1, -1, dim)
        swapped = PTState(
            state.replica.gather(0, wide),
            state.log_prob.gather(0, source),
            state.score.gather(0, wide),
            1 - state.parity,
        )
        return swapped, log_ratio.clamp(max=0).exp().mean(1)

    def _step_sizes(self, beta: Tensor) -> Tensor:
        if self.step_size is None:
            return 0.1 * beta**-self.length_power
        return torch.as_tensor(self.step_size, dtype=beta.dtype, device=beta.device).reshape(-1).expand(len(beta))

    @property
    def length_power(self) -> float:
        """Exponent of 1/beta in a step size: lengths scale as beta^(-1/2), squared lengths as 1/beta."""
        return self.inner.metric_exponent or 1.0

    def initial_step_size(self, scale: Float[Tensor, " dim"], dim: int) -> Tensor:
        """The inner kernel's at beta = 1, growing as the tempered modes widen."""
        base = self.inner.initial_step_size(scale, dim)
        base = base if base.ndim == 0 else base.min()
        return base * self.ladder.to(base) ** -self.length_power

    def settings(self) -> dict[str, Tensor]:
        """`betas`, `step_size` and `metric`, where set."""
        return given_settings(betas=self.betas, step_size=self.step_size, metric=self.metric)

    def with_settings(self, settings: dict[str, Tensor]) -> "ParallelTempering":
        """The same kernel with these settings."""
        changes: dict[str, Any] = dict(settings)
        return replace(self, **changes)

    def warmup_phases(self, gradients: int, state: ChainState) -> list[Phase]:
        """Scout the ladder if it is open, then tune step sizes (and swap rates); nothing if all is given."""
        if self.betas is not None and self.step_size is not None:
            return []
        phases: list[Phase] = []
        scouting = gradients // 4 if self.betas is None and self.beta_min is None else 0
        if scouting:
            phases.append(Scout(self, scouting))
        return [*phases, TuneLadder(self, gradients - scouting, adapt=self.betas is None or self.adapt_ladder)]

    def state_type(self) -> type:
        """`PTState`."""
        return PTState

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        return {
            "kernel": "ParallelTempering",
            "beta_min": self.beta_min,
            "max_temperatures": self.max_temperatures,
            "inner": self.inner.describe(),
            **plain_settings(
                betas=None if self.betas is None else self.ladder, step_size=self.step_size, metric=self.metric
            ),
        }
