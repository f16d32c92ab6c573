"""Warm-up of step sizes by dual averaging (Hoffman & Gelman 2014) and of a diagonal metric from scores."""

import math
from typing import Any

import torch
from torch import Tensor

from noisewise.sampling.kernel import ChainState, Kernel, starting_scale

__all__ = ["BurnIn", "TuneSteps", "dual_averaging", "dual_averaging_start", "score_metric"]

# constants of Hoffman & Gelman, JMLR 15, 2014, section 3.2.1
_GAMMA, _T0, _KAPPA = 0.05, 10.0, 0.75
# shares of the warm-up after which the metric is estimated anew and the step size starts again
_METRIC_AT = (0.15, 0.4)


def dual_averaging_start(step_size: Tensor) -> dict[str, Tensor]:
    """Memory of dual averaging for a vector of step sizes, one per level or temperature."""
    log = step_size.double().log().reshape(-1)
    return {"da_count": torch.zeros((), dtype=torch.float64), "da_error": torch.zeros_like(log),
            "da_centre": log + math.log(2), "da_log": log, "da_mean": log}  # fmt: skip


def dual_averaging(memory: dict[str, Tensor], acceptance: Tensor, target: float) -> dict[str, Tensor]:
    """One update towards the acceptance rate `target`; `da_log` is the next log step, `da_mean` the final one."""
    count = memory["da_count"] + 1
    weight = 1 / (count + _T0)
    error = (1 - weight) * memory["da_error"] + weight * (target - acceptance.to(memory["da_error"]))
    log = memory["da_centre"] - count.sqrt() / _GAMMA * error
    # a step that no chain can take must not run away within a few iterations
    log = torch.clamp(log, memory["da_log"] - 2, memory["da_log"] + 2)
    share = count**-_KAPPA
    mean = share * log + (1 - share) * memory["da_mean"]
    return {**memory, "da_count": count, "da_error": error, "da_log": log, "da_mean": mean}


def score_metric(sum_of_squares: Tensor, count: float) -> Tensor:
    """Diagonal metric 1 / E[score_i^2], shrunk towards its geometric mean as if by five further draws.

    The score is local: unlike the draws' variance, it does not see how far the modes are from each other.
    """
    log = (count / sum_of_squares.double().clamp(min=1e-300)).log()
    # on the log scale: a mean of variances would drown the smallest ones in a thousandth of the largest
    return ((count * log + 5 * log.mean()) / (count + 5)).exp()


class BurnIn:
    """Steps of a kernel that has nothing to adapt: they forget the starts, and are discarded."""

    opening_gradients = closing_gradients = 0

    def __init__(self, kernel: Any, steps: int) -> None:
        self._kernel = kernel
        self._steps = steps

    def template(self) -> Kernel:
        """The kernel itself."""
        return self._kernel

    def begin(self, kernel: Any, state: Any, generator: torch.Generator) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """Its state at the starts."""
        return kernel, kernel.start(state), {}, self._steps

    def update(
        self, kernel: Any, state: Any, info: Any, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """Nothing changes."""
        return kernel, state, memory

    def finished(self, state: Any) -> bool:
        """Never before its steps ran out."""
        return False

    def end(self, kernel: Any, state: Any, memory: dict[str, Tensor], generator: torch.Generator) -> tuple[Kernel, Any]:
        """Nothing is left to do."""
        return kernel, state


class TuneSteps:
    """Adapt `step_size` (one per level) and, where the kernel has an open one, the diagonal `metric`."""

    opening_gradients = closing_gradients = 0

    def __init__(self, kernel: Any, gradients: int) -> None:
        self._kernel = kernel
        self._gradients = gradients

    def template(self) -> Kernel:
        """The kernel before tuning."""
        return self._kernel

    def begin(
        self, kernel: Any, state: ChainState, generator: torch.Generator
    ) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """Start from a step size of the order of the local scale of the scores at the starts."""
        dim = state.position.shape[-1]
        # what an earlier phase has settled stays
        base = self._kernel.with_settings(kernel.settings()) if type(kernel) is type(self._kernel) else self._kernel
        start = base.initial_step_size(starting_scale(state), dim).to(state.position)
        tuned = base.with_settings({"step_size": start})
        memory = {
            **dual_averaging_start(start.cpu()),
            "squares": torch.zeros(dim, dtype=torch.float64),
            "seen": torch.zeros((), dtype=torch.float64),
        }
        return tuned, state, memory, max(self._gradients // tuned.gradients_per_step, 1)

    def update(
        self, kernel: Any, state: ChainState, info: Any, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """Dual averaging after every step; the metric at two fixed shares of the warm-up."""
        memory = dual_averaging(memory, info.acceptance.detach().cpu(), kernel.target_acceptance)
        if self._kernel.metric is None and kernel.metric_exponent:
            memory["squares"] = memory["squares"] + state.score.double().square().sum(0).cpu()
            memory["seen"] = memory["seen"] + len(state.score)
            if index + 1 in {math.ceil(share * steps) for share in _METRIC_AT} and steps >= 20:
                old = torch.ones(()) if kernel.metric is None else kernel.metric.cpu()
                metric = score_metric(memory["squares"], float(memory["seen"]))
                # the step size is relative to the metric: keep its reach where it was until it adapts again
                factor = (old.double() / metric).log().mean().mul(kernel.metric_exponent).exp()
                memory = {
                    **memory,
                    **dual_averaging_start(memory["da_log"].exp() * factor),
                    "squares": torch.zeros_like(memory["squares"]),
                    "seen": torch.zeros_like(memory["seen"]),
                }
                kernel = kernel.with_settings({"metric": metric.to(state.position)})
        return kernel.with_settings({"step_size": self._shaped(memory["da_log"], state)}), state, memory

    def finished(self, state: Any) -> bool:
        """Never before its steps ran out."""
        return False

    def end(
        self, kernel: Any, state: ChainState, memory: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Kernel, Any]:
        """Freeze the averaged step size."""
        return kernel.with_settings({"step_size": self._shaped(memory["da_mean"], state)}), state

    @staticmethod
    def _shaped(log: Tensor, state: ChainState) -> Tensor:
        step = log.exp().to(state.position)
        return step[0] if len(step) == 1 else step
