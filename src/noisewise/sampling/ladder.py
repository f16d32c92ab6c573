"""Warm-up of a temperature ladder: scout how hot it must be and how many rungs it needs, then even out its swap rates."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.sampling.adaptation import dual_averaging, dual_averaging_start, score_metric
from noisewise.sampling.hmc import HMC
from noisewise.sampling.kernel import ChainState, Kernel, local_scale, starting_scale

__all__ = ["Scout", "TuneLadder", "even_ladder", "geometric_ladder"]

# a swap accepted 42 % of the time costs one unit; round trips are quickest for acceptance between .3 and .6
_UNITS_PER_SWAP = 0.8
# share of the pooled spread that independent start and end positions would show
_FREE = 0.6
_HOTTEST = 1e-3
_STAGES_PER_HALVING = 1
_LEAPFROGS = 3
_SCOUT_GAIN = 1.0


def geometric_ladder(beta_min: float | int, temperatures: int) -> Float[Tensor, " temperature"]:
    """Inverse temperatures from 1 to `beta_min` with a constant ratio, float64."""
    ladder = torch.logspace(0, math.log10(beta_min), temperatures, dtype=torch.float64)
    ladder[0] = 1.0
    return ladder


def swap_distance(acceptance: Tensor) -> Tensor:
    """Length of a ladder step from its swap acceptance a: z with a = 2 Phi(-z), which adds up along a ladder.

    For Gaussian energy differences the acceptance is 2 Phi(-z) with z proportional to the difference in beta, so that z is
    additive where the rejection rate saturates; for small z it is 1.25 times the rejection rate, the communication
    barrier of Syed et al. (2022).
    """
    return -torch.special.ndtri((acceptance.double() / 2).clamp(1e-6, 0.5 - 1e-6))


def even_ladder(
    betas: Float[Tensor, " rung"], acceptance: Float[Tensor, " pair"], temperatures: int
) -> Float[Tensor, " temperature"]:
    """Inverse temperatures between the same ends whose neighbours are equally far by `swap_distance`."""
    length = torch.cat([torch.zeros(1, dtype=torch.float64), swap_distance(acceptance).cumsum(0)])
    wanted = torch.linspace(0, float(length[-1]), temperatures, dtype=torch.float64)
    upper = torch.searchsorted(length, wanted).clamp(1, len(length) - 1)
    share = (wanted - length[upper - 1]) / (length[upper] - length[upper - 1])
    log = betas.double().log()
    ladder = (log[upper - 1] + share * (log[upper] - log[upper - 1])).exp()
    ladder[0], ladder[-1] = 1.0, betas[-1]
    return ladder


class Scout:
    """Heat all chains to beta = 0.001 and cool them again, to learn the ladder that the target needs.

    On the way down each stage shows whether chains still cross: positions at its start and end are then as different as
    two chains are. The coldest beta where they do is the hottest rung. The energies of the stages give the swap acceptance
    between them, and so the number of rungs. Chains end dispersed over the modes that they found.
    """

    opening_gradients = closing_gradients = 0

    def __init__(self, kernel: Any, gradients: int) -> None:
        self._kernel = kernel
        self._hmc = HMC(kernel.target, leapfrogs=_LEAPFROGS, metric=kernel.metric)
        stages = round(-math.log2(_HOTTEST) * _STAGES_PER_HALVING)
        self._cooling = geometric_ladder(_HOTTEST, stages + 1).flip(0)
        # heating only has to arrive; cooling has to measure
        per_stage = max(gradients // (_LEAPFROGS * stages), 8)
        self._heat_steps, self._cool_steps = max(per_stage // 4, 2), max(per_stage - per_stage // 4, 6)
        heating = self._cooling.flip(0).repeat_interleave(self._heat_steps)
        self._powers = torch.cat([heating, self._cooling.repeat_interleave(self._cool_steps)])

    def template(self) -> Kernel:
        """Tempered HMC."""
        return self._hmc

    def begin(
        self, kernel: Kernel, state: ChainState, generator: torch.Generator
    ) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """All chains at beta = 1."""
        chains, dim = state.position.shape
        stages = len(self._cooling)
        step = self._hmc.initial_step_size(starting_scale(state), dim)
        # energies of the second half of each cooling stage; start and end positions of each
        memory = {
            "log_step": step.double().log().reshape(1),
            "stages_done": torch.zeros((), dtype=torch.long),
            "energy": torch.zeros((stages, self._cool_steps - self._cool_steps // 2, chains), dtype=torch.float64),
            "first": torch.zeros((stages, chains, dim), dtype=state.position.dtype),
            "last": torch.zeros((stages, chains, dim), dtype=state.position.dtype),
            "last_log_prob": torch.zeros((stages, chains), dtype=state.position.dtype),
            "last_score": torch.zeros((stages, chains, dim), dtype=state.position.dtype),
            **_home(state),
        }
        return self._at(0, memory, state), state, memory, len(self._powers)

    def _at(self, index: int, memory: dict[str, Tensor], state: ChainState) -> Kernel:
        power = self._powers[index]
        step = memory["log_step"].exp()[0] / power.sqrt()
        return self._hmc.with_settings({"step_size": step.to(state.position), "power": power.to(state.position)})

    def update(
        self, kernel: Kernel, state: ChainState, info: Any, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """Adapt one step size in units of sqrt(1/beta), record the cooling stages, move on to the next beta."""
        # the density changes with every stage, so the latest rates count, not their average
        excess = info.acceptance.detach().cpu().double() - self._hmc.target_acceptance
        memory = {**memory, "log_step": memory["log_step"] + _SCOUT_GAIN * excess}
        if index == self._heat_steps - 1:
            memory |= _home(state)
        cooling = index - len(self._cooling) * self._heat_steps
        if cooling >= 0:
            stage, within = divmod(cooling, self._cool_steps)
            half = self._cool_steps // 2
            if within == 0:
                memory["first"][stage] = state.position.cpu()
            if within >= half:
                memory["energy"][stage, within - half] = state.log_prob.double().cpu()
            if within == self._cool_steps - 1:
                memory["last"][stage] = state.position.cpu()
                memory["last_log_prob"][stage] = state.log_prob.cpu()
                memory["last_score"][stage] = state.score.cpu()
                memory["stages_done"] = memory["stages_done"] + 1
        return self._at(min(index + 1, steps - 1), memory, state), state, memory

    def finished(self, state: Any) -> bool:
        """Never before its steps ran out."""
        return False

    def end(
        self, kernel: Kernel, state: ChainState, memory: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Kernel, Any]:
        """A ladder for the kernel, and its replicas at the positions that the chains had at those temperatures."""
        if int(memory["stages_done"]) < len(self._cooling):
            # the time ran out: no measurement to go by
            return self._kernel, state
        coldest = self._coldest_free(memory)
        betas = self._cooling[coldest:].flip(0)
        acceptance = _swap_acceptance(betas, memory["energy"][coldest:].flip(0))
        length = float(swap_distance(acceptance).sum())
        temperatures = min(max(math.ceil(length / _UNITS_PER_SWAP) + 1, 2), self._kernel.max_temperatures)
        ladder = even_ladder(betas, acceptance, temperatures)
        tempered = self._kernel.with_settings({"betas": ladder})
        step = tempered.initial_step_size(local_scale(state.score).cpu(), state.position.shape[1])
        if isinstance(self._kernel.inner, HMC):
            step = memory["log_step"].exp()[0] * ladder**-self._kernel.length_power
        tempered = tempered.with_settings({"step_size": step.to(state.position)})
        nearest = (self._cooling.log().unsqueeze(0) - ladder.log().unsqueeze(1)).abs().argmin(1)
        # every other chain keeps its cold half where it started: heating forgets narrow modes, starts may know them
        chains = state.position.shape[0]
        stays = (torch.arange(temperatures)[:, None] * 2 < temperatures) & (torch.arange(chains) % 2 == 1)
        replicas = tempered.start(state)._replace(
            **{
                name: torch.where(
                    stays.reshape(temperatures, chains, *[1] * (memory[last].ndim - 2)),
                    memory[home],
                    memory[last][nearest],
                ).to(state.position)
                for name, home, last in (
                    ("replica", "home", "last"),
                    ("log_prob", "home_log_prob", "last_log_prob"),
                    ("score", "home_score", "last_score"),
                )
            }
        )
        return tempered, replicas

    def _coldest_free(self, memory: dict[str, Tensor]) -> int:
        """Index of the coldest stage at which, and above which, chains cross freely; 0 when even the hottest is stuck."""
        free = 0
        for stage in range(len(self._cooling) - 1):
            if _mixing(memory["first"][stage].double(), memory["last"][stage].double()) < _FREE:
                break
            free = stage
        return free


def _home(state: ChainState) -> dict[str, Tensor]:
    """Where the chains are before they are heated."""
    return {
        "home": state.position.cpu().clone(),
        "home_log_prob": state.log_prob.cpu().clone(),
        "home_score": state.score.cpu().clone(),
    }


def _mixing(first: Float[Tensor, "chain dim"], last: Float[Tensor, "chain dim"]) -> float:
    """Squared displacement over what independent positions would show, the least over coordinates and the main axis.

    1 for chains that forget where they were, 0 for chains that stay.
    """
    both = torch.cat([first, last])
    centred = both - both.mean(0)
    axis = torch.linalg.svd(centred, full_matrices=False).Vh[:1].mT
    first, last = torch.cat([first, first @ axis], 1), torch.cat([last, last @ axis], 1)
    variance = torch.cat([first, last]).var(0, correction=1).clamp(min=1e-300)
    return float(((last - first).square().mean(0) / (2 * variance)).min())


def _swap_acceptance(
    betas: Float[Tensor, " rung"], log_prob: Float[Tensor, "rung draw chain"]
) -> Float[Tensor, " pair"]:
    """Mean acceptance of a swap between neighbouring stages, over random pairs of their recorded energies."""
    flat = log_prob.flatten(1)
    # pair each value with every shift of the other stage's by a fixed stride: many pairs, no random numbers
    shifts = [(index * 7919) % flat.shape[1] for index in range(min(16, flat.shape[1]))]
    return torch.stack(
        [
            torch.stack([(gap * (hot - cold.roll(shift))).clamp(max=0).exp().mean() for shift in shifts]).mean()
            for gap, cold, hot in zip(betas[:-1] - betas[1:], flat[:-1], flat[1:], strict=True)
        ]
    )


class TuneLadder:
    """Adapt one step size per temperature and the metric; where `adapt`, re-space the ladder twice to equal swap rates."""

    _RESPACE_AT = (0.2, 0.45)
    opening_gradients = closing_gradients = 0

    def __init__(self, kernel: Any, gradients: int, adapt: bool) -> None:
        self._kernel = kernel
        self.gradients = gradients
        self.adapt = adapt

    def template(self) -> Kernel:
        """The tempering kernel before tuning."""
        return self._kernel

    def begin(self, kernel: Any, state: Any, generator: torch.Generator) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """Start from the scouted ladder, or from replicas that all sit at the start."""
        if isinstance(state, ChainState):
            scale = starting_scale(state)
            kernel = self._kernel.with_settings(
                {
                    "betas": self._kernel.ladder,
                    "step_size": self._kernel.initial_step_size(scale, state.position.shape[-1]).to(state.position),
                }
            )
            state = kernel.start(state)
        memory = {
            **dual_averaging_start(kernel.step_size.cpu()),
            **_forget_swaps(kernel.temperatures),
            "squares": torch.zeros(state.replica.shape[-1], dtype=torch.float64),
            "seen": torch.zeros((), dtype=torch.float64),
        }
        return kernel, state, memory, max(self.gradients // kernel.gradients_per_step, 1)

    def update(
        self, kernel: Any, state: Any, info: Any, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """Dual averaging per temperature; ladder and metric at fixed shares of the warm-up."""
        memory = dual_averaging(memory, info.acceptance.detach().cpu(), kernel.target_acceptance)
        memory["swaps"] = memory["swaps"] + info.swap_acceptance.double().cpu()
        memory["swaps_seen"] = memory["swaps_seen"] + 1
        memory["squares"] = memory["squares"] + state.score[0].double().square().sum(0).cpu()
        memory["seen"] = memory["seen"] + state.score.shape[1]
        changes: dict[str, Tensor] = {}
        if steps >= 20 and index + 1 in {math.ceil(share * steps) for share in self._RESPACE_AT}:
            changes, memory = self._respace(kernel, state, memory)
        changes["step_size"] = memory["da_log"].exp().to(state.replica)
        return kernel.with_settings(changes), state, memory

    def _respace(
        self, kernel: Any, state: Any, memory: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        changes: dict[str, Tensor] = {}
        step = memory["da_log"].exp()
        ladder = kernel.ladder
        if self.adapt:
            respaced = even_ladder(ladder, memory["swaps"] / memory["swaps_seen"], len(ladder))
            step = step * (ladder / respaced) ** kernel.length_power
            changes["betas"] = respaced
        if self._kernel.metric is None and kernel.metric_exponent:
            metric = score_metric(memory["squares"], float(memory["seen"]))
            old = torch.ones((), dtype=torch.float64) if kernel.metric is None else kernel.metric.double().cpu()
            step = step * (old / metric).log().mean().mul(kernel.metric_exponent).exp()
            changes["metric"] = metric.to(state.replica)
        fresh = {"squares": torch.zeros_like(memory["squares"]), "seen": torch.zeros_like(memory["seen"])}
        return changes, {**memory, **dual_averaging_start(step), **_forget_swaps(len(ladder)), **fresh}

    def finished(self, state: Any) -> bool:
        """Never before its steps ran out."""
        return False

    def end(self, kernel: Any, state: Any, memory: dict[str, Tensor], generator: torch.Generator) -> tuple[Kernel, Any]:
        """Freeze the averaged step sizes."""
        return kernel.with_settings({"step_size": memory["da_mean"].exp().to(state.replica)}), state


def _forget_swaps(temperatures: int) -> dict[str, Tensor]:
    return {
        "swaps": torch.zeros(temperatures - 1, dtype=torch.float64),
        "swaps_seen": torch.zeros((), dtype=torch.float64),
    }
