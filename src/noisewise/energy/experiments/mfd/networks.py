"""Protocols B and C: a small energy network on clusters in one dimension, and on clusters and circles in the plane."""

import functools

import torch
from torch import Tensor

from noisewise.comparison import Problem
from noisewise.energy.experiments.mfd.fits import Density, density_systems
from noisewise.energy.experiments.mfd.truths import Fitted, Truth, circles, four_clusters, judge, two_clusters

__all__ = ["networks"]

_ROWS = 10_000
_STEPS = {"quick": 300, "cpu": 1200, "paper": 10_000}
# two dimensions cost several times as much per step
_PLANAR_STEPS = {"cpu": 800, "paper": 20_000}
_DECAYS = {1: (0.0, 1e-2, 1e-1), 2: (0.0, 1e-2)}
_HIDDEN = {1: 32, 2: 64}
_QUICK = ("MFD, beta .8", "FD", "maximum likelihood by quadrature")
_LIKELIHOOD_NODES = {1: 400, 2: 60}


def networks(scale: str) -> tuple[Problem, ...]:
    """At quick scale the two clusters alone."""
    one = _problem("B", two_clusters(4.0), 1.0, scale)
    if scale == "quick":
        return (one,)
    return one, _problem("C", four_clusters(), 0.5, scale), _problem("C", circles(), 0.1, scale)


def _problem(protocol: str, truth: Truth, mode_width: float, scale: str) -> Problem:
    def data(seed: int) -> Tensor:
        return truth.sample(_ROWS, torch.Generator().manual_seed(seed))

    def wrap(density: Density, seed: int) -> Fitted:
        return Fitted(density.log_density, truth, density.cost, density.negative, density.notes)

    def likelihood(mean: Tensor, deviation: Tensor) -> tuple[Tensor, float]:
        line = torch.linspace(-truth.reach, truth.reach, _LIKELIHOOD_NODES[truth.dim])
        nodes = torch.stack([axis.flatten() for axis in torch.meshgrid(*[line] * truth.dim, indexing="ij")], -1)
        volume = float((line[1] - line[0]) ** truth.dim / deviation.prod())
        return (nodes - mean) / deviation, volume

    systems = density_systems(data, _HIDDEN[truth.dim], wrap, mode_width, likelihood, _DECAYS[truth.dim])
    steps = _STEPS[scale] if truth.dim == 1 else _PLANAR_STEPS[scale]
    if scale == "quick":
        systems = tuple(system for system in systems if system.name in _QUICK)
    return Problem(
        protocol=protocol,
        name=f"{truth.name}, network",
        budget=steps,
        systems=systems,
        measure=judge,
        criterion="KL",
        picture=functools.partial(_picture, truth),
        notes=(
            f"{truth.name}, network: {_ROWS} rows, {steps} training steps, {_HIDDEN[truth.dim]} units in 3 layers; "
            "every system trains the same network on top of the same Gaussian reference, on standardised data; its weight "
            "decay is chosen by KL on the tuning seed (half the steps). DSM is judged as it is, a density of noisy data. "
            "Maximum likelihood by quadrature is the upper bound, where a grid exists. MFD in one stage has a Gaussian base "
            "narrower than m in place of m, its width tuned too: its constant is not determined otherwise.",
        ),
    )


def _picture(truth: Truth, fitted: Fitted) -> dict[str, list[float]]:
    if truth.dim > 1:
        return {}
    nodes = torch.linspace(-truth.reach, truth.reach, 400).unsqueeze(-1)
    log_q = fitted.log_density(nodes)
    step = float(nodes[1, 0] - nodes[0, 0])
    density = (log_q - log_q.logsumexp(0)).exp() / step
    return {
        "x": nodes[:, 0].tolist(),
        "density": density.tolist(),
        "truth": truth.log_prob(nodes).exp().tolist(),
    }
