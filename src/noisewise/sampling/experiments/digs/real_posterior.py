"""Protocol D: the two-mode mixture posterior of posteriordb against its symmetrised reference draws."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import Problem, System
from noisewise.metrics.distances import wasserstein2
from noisewise.metrics.floors import sample_floor
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.modes import mode_weights
from noisewise.sampling.digs import DiGS
from noisewise.sampling.experiments.digs.problem import Outcome, run_kernel, thinned
from noisewise.sampling.fitted import FittedDiGS
from noisewise.sampling.hmc import HMC
from noisewise.sampling.smc import TemperedSMC
from noisewise.sampling.tempering import ParallelTempering
from noisewise.targets.posteriordb import MixturePosterior, posteriordb_mixture

__all__ = ["real_posterior"]

_BUDGET = {"quick": 2e5, "cpu": 2e6, "paper": 2e7}
_TRANSPORTED = {"quick": 500, "cpu": 2000, "paper": 2000}
_CHAINS = 20
_SMC_SETTINGS = (
    (500, 0.9, 4),
    (500, 0.5, 2),
    (200, 0.5, 4),
    (200, 0.5, 8),
    (200, 0.8, 4),
    (100, 0.5, 8),
    (100, 0.8, 8),
)
_QUICK = ("noisewise.sample (FittedDiGS)", "HMC")
_ONE_MODE = "all from reference draws with mu1 < mu2, so in one of two modes"
_SMC_STARTS = "SMC starts its particles at N(0, 2^2) on the unconstrained scale instead. "
# to cross from one mode to the other takes more calls than a demonstration has
_SPREAD = "from standard normal points (at larger scales all from one mode)"


def real_posterior(scale: str, device: str) -> Problem:
    """The posteriordb mixture at `scale`."""
    target = posteriordb_mixture()
    spread = scale == "quick"
    systems = _systems(target, spread, device)
    if scale == "quick":
        systems = tuple(system for system in systems if system.name in _QUICK)
    return Problem(
        protocol="D",
        name="posteriordb mixture",
        budget=_BUDGET[scale],
        systems=systems,
        measure=functools.partial(_measure, target, _TRANSPORTED[scale]),
        criterion="W2",
        picture=lambda outcome: {"draws": target.constrain(thinned(outcome.positions, 2000)).tolist()},
        notes=(
            f"posteriordb mixture: {_BUDGET[scale]:.3g} gradient calls each, warm-up included; {_CHAINS} chains, "
            f"{_SPREAD if spread else _ONE_MODE}. "
            f"{'' if spread else _SMC_STARTS}Standard errors are those of the spread "
            "of the chain means; the reference's own error is added to them. The floor of |P - 1/2| is that of a "
            "perfect estimate, not of exact draws.",
        ),
    )


def _systems(target: MixturePosterior, spread: bool, device: str) -> tuple[System, ...]:
    def of(make: Callable[..., Any]) -> Callable[..., Outcome]:
        def draw(budget: float, seed: int, **setting: Any) -> Outcome:
            start = _spread_starts(target, seed) if spread else _one_mode_starts(target, seed)
            return run_kernel(make(**setting), start.to(device), budget, seed)

        return draw

    def smc(budget: float, seed: int, particles: int, **setting: Any) -> Outcome:
        start = torch.zeros(particles, target.dim, dtype=torch.float64, device=device)
        return run_kernel(TemperedSMC(target, mean=0.0, scale=2.0, **setting), start, budget, seed)

    return (
        System("noisewise.sample (FittedDiGS)", of(lambda: target)),
        System("FittedDiGS, no ladder", of(lambda: FittedDiGS(target, ladder=False))),
        System("DiGS (default)", of(lambda: DiGS(target))),
        System("PT (scouted)", of(lambda: ParallelTempering(target))),
        System("TemperedSMC", smc, tuple({"particles": n, "ess": e, "moves": m} for n, e, m in _SMC_SETTINGS)),
        System(
            "HMC", of(lambda leapfrogs: HMC(target, leapfrogs=leapfrogs)), tuple({"leapfrogs": n} for n in (10, 5, 20))
        ),
    )


def _one_mode_starts(target: MixturePosterior, seed: int) -> Tensor:
    reference = target.reference(1000, seed=seed)
    return reference[reference[:, 0] < reference[:, 1]][:_CHAINS]


def _spread_starts(target: MixturePosterior, seed: int) -> Tensor:
    """Standard normal, which is what a user who knows nothing gets."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_CHAINS, target.dim, dtype=torch.float64, generator=generator)


def _measure(target: MixturePosterior, transported: int, outcome: Outcome) -> dict[str, Measurement]:
    weights = mode_weights(outcome.positions, lambda x: (x[:, 0] < x[:, 1]).long(), modes=2)
    share, se = float(weights.weights[1]), float(weights.se[1])  # type: ignore[index]
    parameters = target.constrain(outcome.positions)
    few = target.constrain(thinned(outcome.positions, transported))
    reference, floor = _reference(target, transported)
    return {
        "|P(mu1 < mu2) - 1/2|": Measurement(abs(share - 0.5), se, floor=0.0, n=len(parameters)),
        "standard errors off": Measurement(abs(share - 0.5) / se if se > 0 else math.inf, n=len(parameters)),
        "largest |z| of the means": Measurement(_largest_z(target, parameters), n=len(parameters)),
        "W2": wasserstein2(few, reference, floor=floor),
        "P(mu1 < mu2)": Measurement(share, se, floor=0.5, n=len(parameters), better="neither"),
    }


def _largest_z(target: MixturePosterior, parameters: Tensor) -> float:
    """Largest deviation of the five posterior means, in standard errors of the run and the reference together."""
    reference = target.reference(10_000)
    # both labellings of every draw: the mean over the swap is then exact
    both = (target.constrain(reference) + target.constrain(target.swap_labels(reference))) / 2
    truth, truth_se = both.mean(0), both.std(0) / math.sqrt(len(both))
    means = parameters.mean(1)
    se = means.std(0) / math.sqrt(len(means))
    return float(((means.mean(0) - truth).abs() / (se.square() + truth_se.square()).sqrt()).max())


@functools.lru_cache(maxsize=4)
def _reference(target: MixturePosterior, n: int) -> tuple[Tensor, float]:
    draws = target.constrain(target.reference(10_000))
    return draws[:n], sample_floor(wasserstein2, draws, n, n_reference=n, repeats=4).mean
