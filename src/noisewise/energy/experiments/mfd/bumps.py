"""Protocol A: an exponential family of Gaussian bumps, where score matching is a ridge regression in closed form."""

import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from noisewise.comparison import Problem, System
from noisewise.energy.experiments.mfd.truths import Fitted, Truth, judge, two_clusters
from noisewise.typing import Cost

__all__ = ["bumps"]

_ROWS = 3000
_RIDGES = tuple({"ridge": ridge} for ridge in (1e-4, 1e-6, 1e-5, 1e-3, 1e-2))
_CENTRES, _NEWTON = 36, 40


def bumps(scale: str) -> tuple[Problem, ...]:
    """Modes at +-4; beyond quick scale also at +-2, where they overlap, and +-6."""
    halves = (4.0,) if scale == "quick" else (4.0, 2.0, 6.0)
    return tuple(_problem(two_clusters(half)) for half in halves)


def _problem(truth: Truth) -> Problem:
    family = _Bumps(truth.reach)

    def fit(beta: float) -> Callable[..., Fitted]:
        return lambda budget, seed, ridge: family.score_matching(truth, int(budget), seed, beta, ridge)

    return Problem(
        protocol="A",
        name=f"{truth.name}, closed form",
        budget=_ROWS,
        systems=(
            System("MFD, beta .8", fit(0.8), _RIDGES),
            System("MFD, beta .95", fit(0.95), _RIDGES),
            System("MFD, beta .5", fit(0.5), _RIDGES),
            System("FD", fit(1.0), _RIDGES),
            System(
                "maximum likelihood",
                lambda budget, seed, ridge: family.likelihood(truth, int(budget), seed, ridge),
                _RIDGES,
            ),
        ),
        measure=judge,
        criterion="KL",
        tuning_seeds=10,  # a fit takes milliseconds, and a ridge that is too small explodes on some seeds only
        notes=(
            f"{truth.name}, closed form: log density = {_CENTRES} Gaussian bumps on a Gaussian base, {_ROWS} rows; each "
            "system's ridge is chosen by its mean KL over ten tuning seeds (half the rows). Maximum likelihood knows the "
            "normaliser.",
        ),
    )


class _Bumps:
    """log q = theta . phi(x) - x^2 / (2 c^2) up to a constant, phi equally spaced Gaussian bumps on [-reach, reach]."""

    def __init__(self, reach: float) -> None:
        self.centres = torch.linspace(-reach, reach, _CENTRES, dtype=torch.float64)
        self.width = float(self.centres[1] - self.centres[0])

    def _features(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """phi, phi' and phi'' at x [n], each [n, centre]."""
        z = (x.double().unsqueeze(-1) - self.centres) / self.width
        phi = torch.exp(-0.5 * z.square())
        return phi, -z / self.width * phi, (z.square() - 1) / self.width**2 * phi

    def score_matching(self, truth: Truth, rows: int, seed: int, beta: float, ridge: float) -> Fitted:
        """theta = -(A + ridge I)^-1 b on the bridge of data and N(mean, var); then the reference is taken out again."""
        begin = time.monotonic()
        x, mean, variance = self._data(truth, rows, seed)
        weight = torch.full((rows,), 1.0 / rows, dtype=torch.float64)
        if beta < 1:
            generator = torch.Generator().manual_seed(seed + 1)
            drawn = max(1, round(rows * (1 - beta) / beta))
            m_rows = mean + math.sqrt(variance) * torch.randn(drawn, generator=generator, dtype=torch.float64)
            x = torch.cat([x, m_rows])
            weight = torch.cat([beta * weight, torch.full((drawn,), (1 - beta) / drawn, dtype=torch.float64)])
        _, first, second = self._features(x)
        base = -(x - mean) / variance
        a = (first * weight.unsqueeze(-1)).mT @ first
        b = weight @ (second + first * base.unsqueeze(-1))
        theta = -torch.linalg.solve(a + ridge * torch.eye(_CENTRES, dtype=torch.float64), b)
        cost = Cost(gradients=len(x), seconds=time.monotonic() - begin)
        return self._fitted(truth, theta, mean, variance, beta, cost)

    def likelihood(self, truth: Truth, rows: int, seed: int, ridge: float) -> Fitted:
        """Newton's method on the likelihood with a quadrature for the normaliser, the same ridge added."""
        begin = time.monotonic()
        x, mean, variance = self._data(truth, rows, seed)
        nodes, _ = truth.grid()
        phi = self._features(nodes[:, 0])[0]
        base = -(nodes[:, 0].double() - mean).square() / (2 * variance)
        observed = self._features(x)[0].mean(0)
        theta = torch.zeros(_CENTRES, dtype=torch.float64)
        eye = torch.eye(_CENTRES, dtype=torch.float64)
        for _ in range(_NEWTON):
            q = (phi @ theta + base).softmax(0)
            expected = q @ phi
            fisher = (phi * q.unsqueeze(-1)).mT @ phi - torch.outer(expected, expected)
            step = torch.linalg.solve(fisher + ridge * eye, observed - expected - ridge * theta)
            # far from the optimum the curvature says little
            theta = theta + step * min(1.0, 2.0 / float(step.abs().max().clamp(min=1e-12)))
        cost = Cost(gradients=_NEWTON * rows, seconds=time.monotonic() - begin)
        return self._fitted(truth, theta, mean, variance, 1.0, cost)

    def _data(self, truth: Truth, rows: int, seed: int) -> tuple[Tensor, float, float]:
        x = truth.sample(rows, torch.Generator().manual_seed(seed))[:, 0].double()
        return x, float(x.mean()), float(x.var())

    def _fitted(self, truth: Truth, theta: Tensor, mean: float, variance: float, beta: float, cost: Cost) -> Fitted:
        def log_bridge(x: Tensor) -> Tensor:
            return self._features(x)[0] @ theta - (x.double() - mean).square() / (2 * variance)

        if beta == 1:
            return Fitted(lambda x: log_bridge(x[:, 0]), truth, cost)
        nodes, volume = truth.grid()
        log_z = float(log_bridge(nodes[:, 0]).logsumexp(0)) + math.log(volume)

        def difference(x: Tensor) -> Tensor:
            m = (-(x.double() - mean).square() / (2 * variance)).exp() / math.sqrt(2 * math.pi * variance)
            return ((log_bridge(x) - log_z).exp() - (1 - beta) * m) / beta

        negative = float((-difference(nodes[:, 0])).clamp(min=0).sum() * volume)
        return Fitted(lambda x: difference(x[:, 0]).clamp(min=1e-30).log(), truth, cost, negative)
