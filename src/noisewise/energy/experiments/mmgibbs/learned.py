"""Protocol B: energies learned by denoising score matching on four toys; and, on request, the authors' single chains."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from noisewise.comparison import Problem, System
from noisewise.denoising.models import Energy
from noisewise.energy.experiments.mmgibbs.systems import KEPT, Drawn, Setup, fresh_generator, gibbs_systems
from noisewise.energy.experiments.mmgibbs.toys import TOYS, Toy
from noisewise.energy.network import EnergyNet
from noisewise.energy.training import fit_energy
from noisewise.metrics.distances import mmd2, wasserstein2
from noisewise.metrics.floors import sample_floor
from noisewise.metrics.measurement import Measurement
from noisewise.networks.mlp import MLP
from noisewise.noise import Corruption
from noisewise.sampling.denoising_gibbs import DenoisingGibbs
from noisewise.sampling.loop import sample
from noisewise.training import Fit, Plan
from noisewise.typing import Cost

__all__ = ["learned_energies", "learned_gaussian", "official"]

_TRAINING = {"quick": 300, "cpu": 3000, "paper": 10_000}
_HIDDEN = {"quick": 64, "cpu": 128, "paper": 400}
_CHAINS = {"quick": 500, "cpu": 4000, "paper": 10_000}
_STEPS = {"quick": 12, "cpu": 60, "paper": 200}
_ROWS, _BATCH, _RATE = 10_000, 256, 2e-3
_TRANSPORTED = 2000
# finer than what the data resolve, and a loss that only a few constant pixels decide is kept away
_LEAST_LOG_DEVIATION = -4.0
_COVERINGS = ("full", "diagonal", "hutchinson", "isotropic", "krylov")
_OFFICIAL_STEPS, _OFFICIAL_DRAWS = 10_000, 10_000


def learned_energies(scale: str, device: str) -> tuple[Problem, ...]:
    """One problem for each toy; at quick scale the rings alone."""
    toys = [toy for toy in TOYS if scale != "quick" or toy.name == "rings"]
    return tuple(_problem(toy, scale) for toy in toys)


def _problem(toy: Toy, scale: str) -> Problem:
    chains, steps = _CHAINS[scale], _STEPS[scale]

    def setup(seed: int) -> Setup:
        model, data = trained(toy, seed, scale)
        start = torch.randn(chains, 2, generator=torch.Generator().manual_seed(seed + 1))
        return Setup(model, Corruption(1.0, toy.s), start, data, seed)

    return Problem(
        protocol="B",
        name=f"{toy.name}, learned energy",
        budget=steps,
        systems=(
            *gibbs_systems(setup, steps, _COVERINGS),
            learned_gaussian(setup, _HIDDEN[scale], functools.partial(_plan, scale=scale)),
        ),
        measure=functools.partial(_measure, toy),
        criterion="MMD^2",
        picture=lambda drawn: {"draws": drawn.positions[-1][:2000].tolist()},
        notes=(
            f"{toy.name}: one energy for each seed, trained by denoising score matching at sigma {toy.s:g} on {_ROWS} rows, "
            f"{_TRAINING[scale]} steps; all systems use it, but for the learned Gaussian, which trains its own network of "
            f"the same width in the same way. {chains} chains from N(0, I), {steps} sweeps (Langevin twice as many steps of a "
            "tuned size). The bill is that of sampling.",
        ),
    )


@functools.lru_cache(maxsize=8)
def trained(toy: Toy, seed: int, scale: str) -> tuple[Energy, Tensor]:
    """An energy trained on the toy, and its data."""
    data = toy.sample(_ROWS, torch.Generator().manual_seed(seed))
    net = EnergyNet(2, hidden=_HIDDEN[scale], seed=seed)
    fit_energy(net, data, "dsm", Corruption(1.0, toy.s), **vars(_plan(seed, scale)))
    return Energy(net), data


def _plan(seed: int, scale: str) -> Plan:
    return Plan(steps=_TRAINING[scale], batch_size=_BATCH, learning_rate=_RATE, seed=seed)


def _measure(toy: Toy, drawn: Drawn) -> dict[str, Measurement]:
    x = drawn.positions[-1]
    fresh = toy.sample(len(x), fresh_generator(drawn))
    floor_mmd, floor_w2 = _floors(toy, len(x))
    found = {
        "MMD^2": mmd2(x, fresh, biased=False, floor=floor_mmd),
        "W2": wasserstein2(x[:_TRANSPORTED], fresh[:_TRANSPORTED], floor=floor_w2),
    }
    if drawn.clipped is not None:
        found["covariances clamped"] = Measurement(drawn.clipped, floor=0.0, n=len(x))
    return found


@functools.lru_cache(maxsize=8)
def _floors(toy: Toy, n: int) -> tuple[float, float]:
    return (
        sample_floor(functools.partial(mmd2, biased=False), toy.sample, n, repeats=4).mean,
        sample_floor(wasserstein2, toy.sample, min(n, _TRANSPORTED), repeats=3).mean,
    )


def learned_gaussian(setup: Callable[[int], Setup], hidden: int, plan: Callable[[int], Plan]) -> System:
    """A denoiser that is a network for mean and deviations, fitted by the likelihood of a diagonal Gaussian.

    `hidden` and `plan(seed)`: those of the energy that it stands beside, averaging and selection on held-out rows included.
    """

    def draw(budget: float | int, seed: int) -> Drawn:
        s = setup(seed)
        net = MLP(s.data.shape[1], 2 * s.data.shape[1], hidden=hidden, depth=3, seed=seed)
        # p(x | x_t) lies where the data lie; without bounds a chain that strays is blown away for good
        low, high = s.data.amin(0), s.data.amax(0)
        largest = math.log(float((high - low).max()) / 2)

        def loss(net: Any, x: Tensor, generator: torch.Generator) -> Tensor:
            mean, log_sd = _moments(net, s.noise.corrupt(x, generator))
            return (0.5 * ((x - mean) / log_sd.exp()).square() + log_sd).sum(-1).mean()

        Fit(net, s.data, loss, plan(seed)).run(None, math.inf, False)
        begin = time.monotonic()
        generator = torch.Generator().manual_seed(seed)
        x, kept = s.start, []
        with torch.no_grad():
            for step in range(1, int(budget) + 1):
                mean, log_sd = _moments(net, s.noise.corrupt(x, generator))
                x = mean.clamp(low, high) + log_sd.clamp(max=largest).exp() * torch.randn(x.shape, generator=generator)
                if step % max(int(budget) // KEPT, 1) == 0:
                    kept.append(x)
        cost = Cost(energies=int(budget) * len(x), seconds=time.monotonic() - begin)
        return Drawn(torch.stack(kept[:KEPT]), s.start, cost, s)

    return System("learned Gaussian", draw)


def _moments(net: nn.Module, x_t: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log deviation."""
    mean, log_sd = net(x_t).chunk(2, -1)
    return mean, log_sd.clamp(min=_LEAST_LOG_DEVIATION)


def official(scale: str, device: str) -> tuple[Problem, ...]:
    """The authors' protocol: one chain, all of its 10 000 states against 10 000 data points, by their biased MMD^2."""
    if scale == "quick":
        return ()
    return tuple(_official(toy, scale) for toy in TOYS if toy.name != "checkerboard")


@functools.lru_cache(maxsize=4)
def _official_floor(toy: Toy) -> float:
    return sample_floor(mmd2, toy.sample, _OFFICIAL_DRAWS, repeats=2).mean


def _official(toy: Toy, scale: str) -> Problem:
    def setup(seed: int) -> Setup:
        model, data = trained(Toy(toy.name, toy.sample, 0.2), seed, scale)
        generator = torch.Generator().manual_seed(seed + 1)
        start = 0.1 * torch.randn(1, 2, generator=generator) + (1.0 if toy.name == "MoG4" else 0.0)
        return Setup(model, Corruption(1.0, 0.2), start, data, seed)

    def chain(covariance: str) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int) -> Drawn:
            from noisewise.denoising.moments import isotropic_variance

            s = setup(seed)
            options: dict[str, Any] = {"covariance": covariance}
            if covariance == "isotropic":
                options["variance"] = isotropic_variance(s.model, s.data, s.noise, torch.Generator().manual_seed(seed))
            run = sample(
                DenoisingGibbs(s.model, s.noise, **options), init=s.start, draws=int(budget), seed=seed, progress=False
            )
            return Drawn(run.positions.cpu(), s.start, run.cost, s)

        return draw

    def measure(drawn: Drawn) -> dict[str, Measurement]:
        fresh = toy.sample(_OFFICIAL_DRAWS, fresh_generator(drawn))
        return {"MMD^2, authors'": mmd2(drawn.positions[-1], fresh, floor=_official_floor(toy))}

    return Problem(
        protocol="OFFICIAL",
        name=f"{toy.name}, one chain",
        budget=_OFFICIAL_STEPS,
        systems=tuple(System(covariance, chain(covariance)) for covariance in ("full", "isotropic", "diagonal")),
        measure=measure,
        criterion="MMD^2, authors'",
        notes=(
            f"{toy.name}, one chain: {_OFFICIAL_STEPS} states of a single chain from one point, all kept, as the authors do; "
            "on separated modes this measures whether the chain left its first one.",
        ),
    )
