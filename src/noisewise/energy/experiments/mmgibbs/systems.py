"""The samplers of the comparison on one model: every covariance of the Gibbs sampler, and the baselines always shown."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import System
from noisewise.denoising.moments import isotropic_variance
from noisewise.noise import Corruption
from noisewise.sampling.denoising_gibbs import DenoisingGibbs
from noisewise.sampling.loop import sample
from noisewise.sampling.walk_jump import NoisyLangevin, WalkJump
from noisewise.targets.gaussian_mixture import GaussianMixture
from noisewise.typing import Cost

__all__ = ["KEPT", "Drawn", "Setup", "exact_gibbs", "fresh_generator", "gibbs_systems"]

# points along each chain that are kept: enough to see how chains change modes
KEPT = 6
# a Langevin step is far shorter than a sweep of the Gibbs sampler: it gets twice the steps, and its size is tuned
_LANGEVIN_STEPS = 2
_STEP_SIZES = tuple({"step_size": f} for f in (0.25, 0.5, 0.125, 1.0))


@dataclass(frozen=True)
class Drawn:
    """Positions [kept, chain, dim] along the chains, the last of them the result, from `start` [chain, dim].

    `covariance`: that of the Gibbs sampler, and `clipped`: the share that had to be clamped; None for other samplers.
    `setup`: what it was run on.
    """

    positions: Tensor
    start: Tensor
    cost: Cost
    setup: "Setup"
    covariance: str | None = None
    clipped: float | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setup:
    """What a system needs for one seed: the model, its noise, the starts, and clean data to calibrate on."""

    model: Any
    noise: Corruption
    start: Tensor
    data: Tensor
    seed: int


def fresh_generator(drawn: Drawn) -> torch.Generator:
    """For the sample that draws are compared with: another one for each seed, so that tuning sees none that is reported."""
    return torch.Generator().manual_seed(12_345 + drawn.setup.seed)


def gibbs_systems(
    setup: Callable[[int], Setup], steps: int, coverings: tuple[str, ...], rank: int = 2
) -> tuple[System, ...]:
    """Denoising Gibbs with each covariance of `coverings`, then the mean alone, walk-jump and noisy Langevin.

    The budget of each is its number of sweeps; twice as many Langevin steps of a tuned size, in units of s^2.
    """

    def gibbs(covariance: str) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int) -> Drawn:
            s = setup(seed)
            variance = None
            if covariance == "isotropic":
                variance = isotropic_variance(s.model, s.data, s.noise, torch.Generator().manual_seed(seed))
            kernel = DenoisingGibbs(s.model, s.noise, covariance=covariance, rank=rank, variance=variance)
            return _run(kernel, s, int(budget))

        return draw

    def walk(kind: Any) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int, step_size: float) -> Drawn:
            s = setup(seed)
            kernel = kind(s.model, s.noise, step_size=step_size * s.noise.s**2)
            return _run(kernel, s, _LANGEVIN_STEPS * int(budget))

        return draw

    names = {"krylov": f"krylov, rank {rank}", "none": "mean only"}
    return (
        *(System(names.get(covariance, covariance), gibbs(covariance)) for covariance in (*coverings, "none")),
        System("walk-jump", walk(WalkJump), _STEP_SIZES),
        System("noisy Langevin", walk(NoisyLangevin), _STEP_SIZES),
    )


def _run(kernel: Any, setup: Setup, steps: int) -> Drawn:
    run = sample(kernel, init=setup.start, draws=KEPT, thin=max(steps // KEPT, 1), seed=setup.seed, progress=False)
    clipped = run.stats.get("clipped")
    share = None if clipped is None else float(clipped.double().mean())
    covariance = getattr(kernel, "covariance", None)
    positions = run.positions.transpose(0, 1).cpu()
    return Drawn(positions, setup.start.cpu(), run.cost, setup, covariance, share, run.warnings)


def exact_gibbs(target: GaussianMixture, setup: Callable[[int], Setup]) -> System:
    """Gibbs sampling with the true p(x | x_t) of a mixture: what the best denoiser could do."""

    def draw(budget: float | int, seed: int) -> Drawn:
        s, begin = setup(seed), time.monotonic()
        generator = torch.Generator().manual_seed(seed)
        x, kept = s.start, []
        for step in range(1, int(budget) + 1):
            x = _exact_draw(target, s.noise.corrupt(x, generator), s.noise, generator)
            if step % max(int(budget) // KEPT, 1) == 0:
                kept.append(x)
        cost = Cost(seconds=time.monotonic() - begin)
        return Drawn(torch.stack(kept[:KEPT]), s.start, cost, s)

    return System("exact posterior", draw)


def _exact_draw(target: GaussianMixture, x_t: Tensor, noise: Corruption, generator: torch.Generator) -> Tensor:
    weights, means, covariances = target.posterior_components(x_t, noise.a, noise.s)
    chosen = torch.multinomial(weights, 1, generator=generator).squeeze(-1)
    eps = torch.randn(x_t.shape, dtype=x_t.dtype, generator=generator)
    root = torch.linalg.cholesky(covariances)[chosen]
    return means[torch.arange(len(x_t)), chosen] + torch.einsum("nij,nj->ni", root, eps)
