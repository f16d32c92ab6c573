"""Protocol B: two isolated modes of known weights in 2 to 50 dimensions, straight, bent and of unequal widths."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import Problem, System
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.modes import label_ess, mode_flips, mode_weights
from noisewise.noise import NoiseSchedule
from noisewise.sampling.digs import DiGS
from noisewise.sampling.experiments.digs.problem import Outcome, run_kernel
from noisewise.sampling.fitted import FittedDiGS
from noisewise.sampling.hmc import HMC
from noisewise.sampling.ladder import geometric_ladder
from noisewise.sampling.mala import MALA
from noisewise.sampling.tempering import ParallelTempering
from noisewise.targets.bananas import two_bananas
from noisewise.targets.gaussian_mixture import two_modes

__all__ = ["two_mode_problems"]

_BUDGET = {"quick": 1.5e5, "cpu": 1e6, "paper": 1e7}
_CHAINS = 50
_HEAVY = 0.7  # weight of the mode in which no chain starts
# rungs of the tempering ladder per decade of beta, plus one
_TEMPERATURES = {2: 4, 5: 5, 10: 6, 20: 6, 50: 8}
_PT_GRID = ((0.1, 2), (0.05, 2), (0.2, 2), (0.1, 4), (0.05, 4), (0.2, 4), (0.1, 8), (0.02, 8))


def two_mode_problems(scale: str, device: str) -> tuple[Problem, ...]:
    """The dimension sweep and its harder relatives; at quick scale d = 10 alone."""
    straight = [(f"two modes, d={dim}", two_modes(dim), dim not in (50,), False) for dim in _TEMPERATURES]
    if scale == "quick":
        straight = [entry for entry in straight if entry[0].endswith("d=10")]
        harder = []
    else:
        harder = [
            ("bananas, d=10", two_bananas(10), False, False),
            ("unequal widths, d=10", two_modes(10, scales=(1.0, 0.5)), False, True),
        ]
    return tuple(
        _problem(name, target, plain, both, scale, device) for name, target, plain, both in [*straight, *harder]
    )


def _problem(name: str, target: Any, plain_digs: bool, both_modes: bool, scale: str, device: str) -> Problem:
    systems = _systems(target, plain_digs, both_modes, device)
    if scale == "quick":
        systems = tuple(system for system in systems if "ladder" not in system.name and "scouted" not in system.name)
    where = "half the chains start in each mode" if both_modes else "all chains start in the mode of weight .3"
    return Problem(
        protocol="B",
        name=name,
        budget=_BUDGET[scale],
        systems=systems,
        measure=functools.partial(_measure, target),
        criterion="label ESS",
        better="higher",
        picture=lambda outcome: {"acceptance": [list(pair) for pair in outcome.acceptance.items()]},
        notes=(
            f"{name}: {_BUDGET[scale]:.3g} gradient calls each, warm-up included; {_CHAINS} chains, {where}. Truth .700; "
            "standard errors are those of the spread of the chain means, and 0 where no chain ever moved. The floor of "
            "|w - .7| is that of a perfect estimate, not of exact draws.",
        ),
    )


def _systems(target: Any, plain_digs: bool, both_modes: bool, device: str) -> tuple[System, ...]:
    dim = target.dim

    def of(make: Callable[..., Any]) -> Callable[..., Outcome]:
        def draw(budget: float, seed: int, **setting: Any) -> Outcome:
            return run_kernel(make(**setting), _starts(target, both_modes, seed).to(device), budget, seed)

        return draw

    def digs() -> DiGS:
        return DiGS(target, schedule=NoiseSchedule.vp_alpha(levels=5), inner=MALA(target, steps=10))

    def pt(beta_min: float, leapfrogs: int) -> ParallelTempering:
        # as many rungs per decade whatever the hottest one is, so that swap rates stay comparable
        rungs = 1 + math.ceil((_TEMPERATURES[dim] - 1) * -math.log10(beta_min))
        inner = HMC(target, leapfrogs=leapfrogs, target_acceptance=0.9)
        return ParallelTempering(target, betas=geometric_ladder(beta_min, rungs), inner=inner)

    systems = [
        System("noisewise.sample (FittedDiGS)", of(lambda: target)),
        System("FittedDiGS, no ladder", of(lambda: FittedDiGS(target, ladder=False))),
        System("PT (tuned)", of(pt), tuple({"beta_min": b, "leapfrogs": n} for b, n in _PT_GRID)),
        System("PT (scouted)", of(lambda: ParallelTempering(target))),
    ]
    if plain_digs:
        systems.insert(2, System("DiGS (5 VP levels, L=10)", of(digs)))
    return tuple(systems)


def _starts(target: Any, both_modes: bool, seed: int) -> Tensor:
    """Draws of a normal at the start mode, of its width; alternately in both modes where asked."""
    generator = torch.Generator().manual_seed(seed)
    mode = torch.arange(_CHAINS) % 2 if both_modes else torch.zeros(_CHAINS, dtype=torch.long)
    width = torch.tensor([1.0, 0.5])[mode] if both_modes else torch.ones(_CHAINS)
    return target.mode_means[mode] + width.unsqueeze(-1) * torch.randn(_CHAINS, target.dim, generator=generator)


def _measure(target: Any, outcome: Outcome) -> dict[str, Measurement]:
    found = mode_weights(outcome.positions, target.component, modes=2)
    labels = target.component(outcome.positions)
    weight, se = float(found.weights[1]), float(found.se[1])  # type: ignore[index]
    off = abs(weight - _HEAVY)
    calls = outcome.cost.gradients + outcome.cost.energies
    return {
        "|w - .7|": Measurement(off, se, floor=0.0, n=_CHAINS),
        "standard errors off": Measurement(off / se if se > 0 else math.inf, n=_CHAINS),
        "label ESS": label_ess(labels, mode=1, cost=calls),
        "mode flips": mode_flips(labels, cost=calls),
        "weight of the .7 mode": Measurement(weight, se, floor=_HEAVY, n=_CHAINS, better="neither"),
    }
