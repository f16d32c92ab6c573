"""Every kernel on fixed settings, by name, so that one truth is tested on all of them; targets that count or misbehave."""

import math
from collections.abc import Callable
from typing import Any

import torch

from noisewise.noise import Corruption, NoiseSchedule
from noisewise.sampling import HMC, MALA, DiGS, FittedDiGS, ParallelTempering, TemperedSMC
from noisewise.sampling.kernel import ChainState
from noisewise.sampling.smc import SMCState
from noisewise.sampling.tempering import PTState
from noisewise.targets import GaussianMixture

BETAS = (1.0, 0.4, 0.15)


def metric(target: Any) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, target.dim, dtype=torch.float64)


def wrong_reference(target: Any) -> GaussianMixture:
    """A bad guess of two modes on the diagonal: both shifted, too wide or too narrow, and weighed equally."""
    half = torch.full((target.dim,), 2.5 / math.sqrt(target.dim), dtype=torch.float64)
    return GaussianMixture(torch.stack([-half, half]) + 0.3, torch.tensor([1.5, 0.6], dtype=torch.float64))


def tempered(target: Any, inner: Any = None) -> ParallelTempering:
    inner = HMC(target, leapfrogs=3) if inner is None else inner
    step = torch.tensor([0.3, 0.5, 0.8], dtype=torch.float64)
    return ParallelTempering(target, betas=BETAS, inner=inner, step_size=step if isinstance(inner, HMC) else step**2)


def fitted(target: Any, **options: Any) -> FittedDiGS:
    return FittedDiGS(target, tempering=tempered(target), reference=wrong_reference(target), moves=2, **options)


# one chain state per chain: MALA, HMC, DiGS, SMC at beta = 1, the fitted moves without a ladder
SINGLE: dict[str, Callable[[Any], Any]] = {
    "MALA": lambda t: MALA(t, step_size=0.2, steps=3),
    "MALA metric": lambda t: MALA(t, step_size=0.2, steps=3, metric=metric(t)),
    "HMC": lambda t: HMC(t, step_size=0.35, leapfrogs=5),
    "HMC metric": lambda t: HMC(t, step_size=0.35, leapfrogs=5, steps=2, metric=metric(t)),
    "DiGS L=1": lambda t: DiGS(t, Corruption(0.5, 1.5), inner=MALA(t, steps=1), step_size=0.2),
    "DiGS L=5": lambda t: DiGS(t, NoiseSchedule.vp_alpha(0.3), sweeps=2, inner=MALA(t, steps=5), step_size=0.2),
    "DiGS HMC": lambda t: DiGS(t, Corruption(1.0, 2.0), inner=HMC(t, leapfrogs=3), step_size=0.3),
    "DiGS tries=8": lambda t: DiGS(t, Corruption(1.0, 3.0), tries=8, inner=MALA(t, steps=2), step_size=0.2),
    "DiGS metric": lambda t: DiGS(t, Corruption(1.0, 2.0), metric=metric(t), inner=MALA(t, steps=2), step_size=0.2),
    "DiGS metric HMC tries": lambda t: DiGS(
        t, Corruption(0.8, 2.0), metric=metric(t), tries=3, inner=HMC(t, leapfrogs=3), step_size=0.3
    ),
    "DiGS levels": lambda t: DiGS(
        t,
        NoiseSchedule.from_scale(0.5, 4.0, 3),
        sweeps=2,
        inner=MALA(t, steps=2),
        step_size=torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64),
    ),
    "DiGS default steps": lambda t: DiGS(t),
    "SMC at beta=1": lambda t: TemperedSMC(t, mean=0.5, scale=3.0, step_size=0.3, moves=2, leapfrogs=3),
    "fitted r=inf": lambda t: fitted(t, ladder=False),
    "fitted r=1": lambda t: fitted(t, ladder=False, r=1.0),
    "fitted r=.3": lambda t: fitted(t, ladder=False, r=0.3),
    "fitted t": lambda t: fitted(t, ladder=False, components="t", degrees=4.0),
}

# one replica per temperature and chain
LADDERS: dict[str, Callable[[Any], Any]] = {
    "PT HMC": tempered,
    "PT MALA": lambda t: tempered(t, MALA(t, steps=2)),
    "PT DiGS": lambda t: tempered(t, DiGS(t, Corruption(1.0, 1.5), inner=MALA(t, steps=2))),
    "PT DiGS tries": lambda t: tempered(
        t, DiGS(t, NoiseSchedule.from_scale(0.5, 3.0, 2), tries=3, inner=HMC(t, leapfrogs=2))
    ),
    "PT metric": lambda t: ParallelTempering(t, betas=BETAS, step_size=0.5, metric=metric(t)),
    "fitted ladder r=inf": lambda t: fitted(t),
    "fitted ladder r=1": lambda t: fitted(t, r=1.0),
    "fitted ladder t": lambda t: fitted(t, components="t"),
}

EVERY = {**SINGLE, **LADDERS}


def at(kernel: Any, x: torch.Tensor) -> Any:
    """The kernel's state when all its chains are draws `x` of the target itself (SMC: annealed to the end)."""
    cold = ChainState(x, *kernel.target.log_prob_and_score(x))
    if isinstance(kernel, TemperedSMC):
        return SMCState(*cold, x.new_ones(()), x.new_zeros(()))
    return kernel.start(cold)


def ladder_at(kernel: Any, replicas: torch.Tensor, parity: int) -> PTState:
    """A ladder's state with `replicas` [temperature, chain, dim]."""
    values = [kernel.target.log_prob_and_score(replica) for replica in replicas]
    return PTState(replicas, *(torch.stack(part) for part in zip(*values, strict=True)), torch.tensor(parity))


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counting:
    """A target that counts the rows it is asked for, by kind."""

    def __init__(self, target: Any) -> None:
        self._target = target
        self.dim = target.dim
        self.gradients = self.energies = 0

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        self.energies += x.shape[:-1].numel()
        return self._target.log_prob(x)

    def log_prob_and_score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.gradients += x.shape[:-1].numel()
        return self._target.log_prob_and_score(x)


class Line:
    """A density on the line that is not normalised, with exact draws of every power of it from its inverse CDF."""

    dim = 1

    def __init__(self, log_density: Callable[[torch.Tensor], torch.Tensor], low: float, high: float) -> None:
        self._log_density = log_density
        self._grid = torch.linspace(low, high, 200_001, dtype=torch.float64)

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return self._log_density(x.squeeze(-1))

    def log_prob_and_score(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            value = self.log_prob(leaf)
            (score,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), score

    def draw(self, n: int, generator: torch.Generator, power: float = 1.0) -> torch.Tensor:
        """Draws of p^power, [n, 1], float64."""
        weight = (power * self._log_density(self._grid)).softmax(0)
        cdf = weight.cumsum(0) - weight / 2
        u = torch.rand(n, dtype=torch.float64, generator=generator)
        upper = torch.searchsorted(cdf, u).clamp(1, len(cdf) - 1)
        share = ((u - cdf[upper - 1]) / (cdf[upper] - cdf[upper - 1])).clamp(0, 1)
        return (self._grid[upper - 1] + share * (self._grid[upper] - self._grid[upper - 1])).unsqueeze(-1)


def two_bumps(x: torch.Tensor) -> torch.Tensor:
    """Weights .3 and .7, standard deviations 1 and .5, centres 5 apart."""
    wide = math.log(0.3) - 0.5 * (x + 2.5) ** 2
    narrow = math.log(0.7 / 0.5) - 0.5 * ((x - 2.5) / 0.5) ** 2
    return torch.logaddexp(wide, narrow)
