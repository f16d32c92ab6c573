"""Protocol C: the Bayesian neural network of the DiGS paper, two chains, equal gradient calls."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from noisewise.comparison import Problem, System
from noisewise.metrics.measurement import Measurement
from noisewise.noise import NoiseSchedule
from noisewise.sampling.digs import DiGS
from noisewise.sampling.experiments.digs.problem import Outcome, run_kernel
from noisewise.sampling.hmc import HMC
from noisewise.sampling.ladder import geometric_ladder
from noisewise.sampling.mala import MALA
from noisewise.sampling.tempering import ParallelTempering
from noisewise.targets.bayesian_network import BayesianNetwork, bnn
from noisewise.typing import Cost

__all__ = ["network"]

_CHAINS, _LEVELS, _INNER = 2, 5, 10
# (draws per chain, sweeps per level)
_SIZE = {"cpu": (15, 4), "paper": (75, 100)}
_LEARNING_RATE, _ROWS = 0.03, 500


def network(scale: str, device: str) -> Problem:
    """The network at `scale` (cpu or paper)."""
    target = bnn()
    draws, sweeps = _SIZE[scale]
    per_draw = _LEVELS * sweeps * (_INNER + 1)
    return Problem(
        protocol="C",
        name="BNN",
        budget=_CHAINS * (1 + draws * per_draw),
        systems=_systems(target, sweeps, per_draw, device),
        measure=functools.partial(_measure, target),
        criterion="NLL per draw",
        notes=(
            f"BNN: {_CHAINS} chains from N(0, I), {draws} draws each, {per_draw} gradient calls per draw and chain "
            "(noisewise.sample keeps every iteration); what adapts pays its warm-up in draws, the authors' fixed settings "
            "lose their first 10 % (the authors keep them). "
            "The floor is the score of the parameters that made the data. At this scale the gap between DiGS and HMC is noise.",
        ),
    )


def _systems(target: BayesianNetwork, sweeps: int, per_draw: int, device: str) -> tuple[System, ...]:
    def of(make: Callable[..., Any], **options: Any) -> Callable[..., Outcome]:
        def draw(budget: float | int, seed: int, **setting: Any) -> Outcome:
            kernel = make(**setting)
            # a bare target's kernel is found in warm-up: all of its draws are kept
            cost = kernel.gradients_per_step if hasattr(kernel, "gradients_per_step") else per_draw
            start = torch.randn(_CHAINS, target.dim, generator=torch.Generator().manual_seed(seed)).to(device)
            return run_kernel(kernel, start, budget, seed, thin=max(per_draw // cost, 1))

        return draw

    def digs() -> DiGS:
        inner = MALA(target, steps=_INNER, step_size=1e-4)
        return DiGS(target, schedule=NoiseSchedule.vp_alpha(levels=_LEVELS), sweeps=sweeps, inner=inner)

    def pt() -> ParallelTempering:
        return ParallelTempering(target, betas=geometric_ladder(1e-3, 5), inner=HMC(target, leapfrogs=20))

    def hmc() -> HMC:
        # 1000 leapfrogs in the paper; here all that one DiGS draw costs
        return HMC(target, step_size=5e-4, leapfrogs=per_draw, jitter=0.0)

    return (
        System("DiGS (published: T=5, L=10, h=1e-4)", of(digs)),
        System("noisewise.sample (FittedDiGS)", of(lambda: target)),
        System("HMC (published: h=5e-4)", of(hmc)),
        System("HMC (adapted)", of(lambda leapfrogs: HMC(target, leapfrogs=leapfrogs)), _leapfrog_settings()),
        System("MALA (published: h=1e-4)", of(lambda: MALA(target, step_size=1e-4))),
        System("PT (5 temperatures, adapted, swapping)", of(pt)),
        System("MAP (gradient descent)", functools.partial(_descend, target, device)),
    )


def _leapfrog_settings() -> tuple[dict[str, int], ...]:
    return tuple({"leapfrogs": count} for count in (20, 50, 100))


def _descend(target: BayesianNetwork, device: str, budget: float | int, seed: int) -> Outcome:
    """Full-batch gradient descent on E / 500, rate .03, from N(0, I): the authors' point estimate."""
    begin = time.monotonic()
    x = torch.randn(_CHAINS, target.dim, generator=torch.Generator().manual_seed(seed)).to(device)
    steps = int(budget // _CHAINS)
    for _ in range(steps):
        x = x + _LEARNING_RATE / _ROWS * target.log_prob_and_score(x)[1]
    cost = Cost(gradients=steps * _CHAINS, seconds=time.monotonic() - begin)
    return Outcome(x.unsqueeze(1).cpu(), cost)


def _measure(target: BayesianNetwork, outcome: Outcome) -> dict[str, Measurement]:
    draws = outcome.positions.reshape(-1, target.dim)
    truth = target.true_parameters.unsqueeze(0)
    return {
        "NLL per draw": Measurement(
            float(target.test_nll(draws).mean()), floor=float(target.test_nll(truth)), n=len(draws)
        ),
        "NLL of the predictive mixture": Measurement(
            -float(target.log_predictive(draws)), floor=float(target.test_nll(truth)), n=len(draws)
        ),
    }
