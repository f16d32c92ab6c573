"""Protocol A: forty Gaussians in the plane, all chains from the origin, equal gradient calls."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import Problem, System
from noisewise.errors import require
from noisewise.metrics.distances import mmd2, wasserstein2
from noisewise.metrics.floors import sample_floor
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.modes import assign_modes, mode_weights, modes_found, total_variation
from noisewise.noise import NoiseSchedule
from noisewise.sampling import blackjax_peers
from noisewise.sampling.digs import DiGS
from noisewise.sampling.experiments.digs.problem import Outcome, run_kernel, thinned
from noisewise.sampling.fitted import FittedDiGS
from noisewise.sampling.hmc import HMC
from noisewise.sampling.ladder import geometric_ladder
from noisewise.sampling.mala import MALA
from noisewise.sampling.smc import TemperedSMC
from noisewise.sampling.tempering import ParallelTempering
from noisewise.targets.gaussian_mixture import GaussianMixture, gmm40, gmm40_test_function

__all__ = ["bulk_ess", "forty_modes"]

_BUDGET = {"quick": 1e5, "cpu": 1.2e6, "paper": 1.2e7}
_KEPT = {"quick": 2000, "cpu": 10_000, "paper": 10_000}
_TRANSPORTED = {"quick": 500, "cpu": 2000, "paper": 2000}
_CHAINS, _PARTICLES = 100, 1000
# the prior of the annealing samplers covers the square of the modes: they are told where to look, the others are not
_PRIOR_SCALE = 40.0
_SHOWN = 2000
_QUICK = ("noisewise.sample (FittedDiGS)", "DiGS (published: a=.1, L=5, h=.1)", "PT (tuned)", "HMC")


_SMC_NOTE = (
    f"GMM-40: the SMC systems use {_PARTICLES} particles from N(0, {_PRIOR_SCALE:.0f}^2), which covers the modes; that favours "
    "them, the other systems start at one point. Their particles share ancestors, which the ESS over particles as chains does "
    "not see."
)


def forty_modes(scale: str, device: str) -> Problem:
    """GMM-40 at `scale`."""
    target = gmm40()
    kept, transported = _KEPT[scale], _TRANSPORTED[scale]
    systems = _systems(target, device)
    if scale == "quick":
        systems = tuple(system for system in systems if system.name in _QUICK)
    return Problem(
        protocol="A",
        name="GMM-40",
        budget=_BUDGET[scale],
        systems=systems,
        measure=functools.partial(_measure, target, kept, transported),
        criterion="TV of mode weights",
        picture=functools.partial(_picture, target),
        notes=(
            f"GMM-40: {_BUDGET[scale]:.3g} gradient calls each, warm-up included; {_CHAINS} chains, all from the origin. "
            f"Distances and mode weights use {kept} draws of each system, evenly spread along its chains (fewer where it "
            f"made fewer), W2 {transported} of them; ESS uses all its draws after warm-up. A system without warm-up loses "
            "its first 10 % of draws instead.",
            *([] if scale == "quick" else [_SMC_NOTE]),
        ),
    )


def _systems(target: GaussianMixture, device: str) -> tuple[System, ...]:
    start = torch.zeros(_CHAINS, 2, device=device)

    def of(make: Callable[..., Any]) -> Callable[..., Outcome]:
        return lambda budget, seed, **setting: run_kernel(make(**setting), start, budget, seed)

    def smc(budget: float, seed: int, **setting: Any) -> Outcome:
        particles = torch.zeros(_PARTICLES, 2, device=device)
        return run_kernel(TemperedSMC(target, mean=0.0, scale=_PRIOR_SCALE, **setting), particles, budget, seed)

    def digs(alpha: float, steps: int, step_size: float | None) -> DiGS:
        inner = MALA(target, steps=steps, step_size=step_size)
        return DiGS(target, schedule=NoiseSchedule.vp_alpha(alpha, levels=1), inner=inner)

    def pt(leapfrogs: int, acceptance: float) -> ParallelTempering:
        inner = HMC(target, leapfrogs=leapfrogs, target_acceptance=acceptance)
        return ParallelTempering(target, betas=geometric_ladder(1e-3, 5), inner=inner)

    means, variance = target.means.numpy(), float(target.covariances.flatten()[0])
    jax_extra = ("blackjax", "bench")
    return (
        System("noisewise.sample (FittedDiGS)", of(lambda: target)),
        System("FittedDiGS, no ladder", of(lambda: FittedDiGS(target, ladder=False))),
        System("DiGS (published: a=.1, L=5, h=.1)", of(lambda: digs(0.1, 5, 0.1))),
        System(
            "DiGS (tuned)",
            of(lambda alpha, steps: digs(alpha, steps, None)),
            tuple({"alpha": alpha, "steps": steps} for alpha in (0.1, 0.05) for steps in (1, 2, 5)),
        ),
        System(
            "PT (tuned)",
            of(pt),
            tuple(
                {"leapfrogs": n, "acceptance": a}
                for n, a in ((6, 0.8), (4, 0.8), (2, 0.8), (10, 0.8), (4, 0.9), (6, 0.65))
            ),
        ),
        System("PT (scouted)", of(lambda: ParallelTempering(target))),
        System(
            "TemperedSMC",
            smc,
            tuple({"ess": e, "moves": m} for e, m in ((0.9, 4), (0.5, 4), (0.95, 4), (0.9, 8), (0.98, 2))),
        ),
        System(
            "HMC", of(lambda leapfrogs: HMC(target, leapfrogs=leapfrogs)), tuple({"leapfrogs": n} for n in (10, 5, 20))
        ),
        System("MALA", of(lambda: MALA(target))),
        System(
            "BlackJAX NUTS",
            lambda budget, seed: blackjax_peers.nuts(
                blackjax_peers.gaussian_mixture(means, variance), start.cpu().numpy(), budget, seed
            ),
            extra=jax_extra,
        ),
        System(
            "BlackJAX tempered SMC",
            lambda budget, seed, **setting: blackjax_peers.tempered_smc(
                blackjax_peers.gaussian_mixture(means, variance), 2, _PRIOR_SCALE, _PARTICLES, budget, seed, **setting
            ),
            tuple({"step_size": h, "moves": m} for h, m in ((1.0, 4), (0.5, 4), (1.0, 8), (2.0, 4))),
            extra=jax_extra,
        ),
    )


def _measure(target: GaussianMixture, kept: int, transported: int, outcome: Outcome) -> dict[str, Measurement]:
    draws = thinned(outcome.positions, kept)
    truth = target.weights
    exact = target.sample(kept, torch.Generator().manual_seed(12_345)).to(draws)
    few = thinned(outcome.positions, transported)
    function, expectation = gmm40_test_function()
    floor = functools.partial(_floor, target)
    return {
        "modes found": modes_found(assign_modes(draws, target.means), len(target.means)),
        "TV of mode weights": total_variation(mode_weights(draws, target.means), truth, floor=floor("tv", len(draws))),
        "W2": wasserstein2(few, exact[:transported], floor=floor("w2", len(few), transported)),
        "MMD^2": mmd2(draws, exact, floor=floor("mmd2", len(draws), kept)),
        "relative error of E[f]": Measurement(
            abs(float(function(draws.double()).mean()) / expectation - 1), floor=floor("f", len(draws)), n=len(draws)
        ),
        "ESS per 1e6 gradients": Measurement(
            bulk_ess(outcome.positions) * 1e6 / outcome.cost.gradients, n=outcome.positions.shape[1], better="higher"
        ),
    }


@functools.lru_cache(maxsize=64)
def _floor(target: GaussianMixture, metric: str, n: int, n_reference: int = 1) -> float:
    """Score of `n` exact draws, averaged over repeats."""
    function, expectation = gmm40_test_function()
    scores: dict[str, tuple[Callable[[Tensor, Tensor], Any], int]] = {
        "tv": (lambda x, _: total_variation(mode_weights(x, target.means), target.weights), 20),
        "w2": (wasserstein2, 4),
        "mmd2": (mmd2, 3),
        "f": (lambda x, _: abs(float(function(x.double()).mean()) / expectation - 1), 50),
    }
    score, repeats = scores[metric]
    return sample_floor(score, target.sample, n, n_reference=n_reference, repeats=repeats).mean


def bulk_ess(positions: Tensor) -> float:
    """Least bulk ESS over the coordinates of [chain, draw, dim], by ArviZ; NaN for fewer than four draws a chain."""
    arviz = require("arviz", "sampling")
    if positions.shape[1] < 4:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ArviZ remarks on more chains than draws, as with particles
        data = arviz.convert_to_dataset({"x": positions.double().numpy()})
        return float(arviz.ess(data, method="bulk")["x"].min())


def _picture(target: GaussianMixture, outcome: Outcome) -> dict[str, Any]:
    weights = mode_weights(outcome.positions, target.means)
    return {
        "draws": thinned(outcome.positions, _SHOWN).tolist(),
        "weights": weights.weights.tolist(),
        "se": None if weights.se is None else weights.se.tolist(),
        "truth": target.weights.tolist(),
    }
