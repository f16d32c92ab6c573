"""Targets of the comparison and what is measured on each; every network trains for the same number of steps."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import Problem
from noisewise.metrics.measurement import Measurement
from noisewise.neural.evaluate import evaluate
from noisewise.neural.experiments.dikl.systems import Drawn, chain_systems, network_systems
from noisewise.targets.double_wells import many_well
from noisewise.targets.gaussian_mixture import GaussianMixture, gmm40
from noisewise.targets.particles import double_well_4, lennard_jones

__all__ = ["problems"]

_STEPS = {"quick": 300, "cpu": 2000, "paper": 20_000}
# calls of the target that the chains behind a network make
_CALLS = {"quick": 100_000, "cpu": 1_000_000, "paper": 20_000_000}
_DRAWS = {"quick": 2000, "cpu": 5000, "paper": 10_000}
_SHOWN = 1500
_MIXTURE = ("modes covered", "share within 3 sd", "TV of mode weights", "energy W1", "MMD2")
_WELLS = ("worst well gap", "mean well gap", "well patterns", "energy W1", "MMD2")
_CLUSTER = ("distance TVD", "energy TVD", "energy W1", "W2 modulo symmetry")
_WIDE = ("DiKL", "DiKL, mixture latent", "reverse KL")
_NARROW = ("DiKL", "DiKL, Gaussian latent", "DiKL, posterior draws of a shared pool", "reverse KL")
_ABLATION = (
    "DiKL",
    "DiKL, exact noisy score",
    "DiKL, Gaussian latent",
    "DiKL, published levels and weight",
    "DiKL, posterior draws of a shared pool",
    "DiKL, posterior draws by DiGS",
    "published recipe, small",
    "reverse KL",
)
_REFINED = ("DiKL", "DiKL, then 20 MALA steps", "reverse KL")
# steps on clusters, whose networks are dearer, as a share
_CLUSTER_STEPS = 0.4
_QUICK = ("DiKL", "reverse KL", "parallel tempering")


def forty_modes_in(dim: int) -> GaussianMixture:
    """Forty Gaussians as those of the plane, their means uniform on [-40, 40]^dim."""
    means = (torch.rand(40, dim, generator=torch.Generator().manual_seed(0)) - 0.5) * 80
    return GaussianMixture(means, float(torch.nn.functional.softplus(torch.tensor(1.0))) ** 2)


def problems(scale: str) -> tuple[Problem, ...]:
    """At quick scale the forty modes of the plane alone."""
    first = _problem("A", "GMM-40", gmm40(), _MIXTURE, "TV of mode weights", scale, _ABLATION)
    if scale == "quick":
        return (first,)
    eight = "forty modes in 8 dimensions"
    clusters = [("DW-4", double_well_4())] + ([("LJ-13", lennard_jones(13))] if scale == "paper" else [])
    return (
        first,
        _problem("B", "many-well-8", many_well(8), _WELLS, "worst well gap", scale, _WIDE),
        _problem("C", eight, forty_modes_in(8), _MIXTURE, "TV of mode weights", scale, _NARROW),
        _problem("D", "many-well-32", many_well(32), _WELLS, "worst well gap", scale, _WIDE),
        *(_problem("E", name, cluster, _CLUSTER, "distance TVD", scale, _REFINED) for name, cluster in clusters),
    )


def _problem(
    protocol: str, name: str, target: Any, metrics: tuple[str, ...], criterion: str, scale: str, networks: tuple[str, ...]
) -> Problem:  # fmt: skip
    calls, draws = _CALLS[scale], _DRAWS[scale]
    cluster = bool(getattr(target, "particles", 0))
    steps = round(_STEPS[scale] * (_CLUSTER_STEPS if cluster else 1))
    known = network_systems(target, calls, draws)
    chosen = " The weight of noise levels was chosen among five on seeds 0 and 100, which are left out here."
    systems = (*(known[network] for network in networks), *chain_systems(target, calls, draws))
    if scale == "quick":
        systems = tuple(system for system in systems if system.name in _QUICK)
    return Problem(
        protocol=protocol,
        name=name,
        budget=steps,
        systems=systems,
        measure=functools.partial(_measure, target, metrics),
        criterion=criterion,
        picture=_picture(target),
        notes=(
            f"{name}: each network trains for {steps:,} steps of its generator; the bill is that of training, and "
            f"{draws:,} draws then cost one network evaluation each. DiKL learns the target's score from chains of {calls:,} "
            "calls, and in twice as many steps before; the chains beside it may make as many calls, and their draws are thinned "
            "from the last two thirds. Networks that draw p(x | x_t) for every batch make as many calls as the bill says."
            + (chosen if cluster else ""),
        ),
    )


def _measure(target: Any, metrics: tuple[str, ...], drawn: Drawn) -> dict[str, Measurement]:
    return evaluate(drawn.positions, target, metrics=metrics, seed=drawn.seed)


def _picture(target: Any) -> Callable[[Drawn], dict[str, Any]]:
    def picture(drawn: Drawn) -> dict[str, Any]:
        x: Tensor = drawn.positions[:_SHOWN]
        return {"draws": [[round(v, 3) for v in row] for row in x[:, :2].tolist()], "history": drawn.history}

    return picture
