"""The contestants: DiKL in its forms, reverse KL, and chains that may call the target as often."""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from noisewise.comparison import System
from noisewise.errors import NoisewiseWarning
from noisewise.neural.dikl import DiKLSampler
from noisewise.neural.posterior import PosteriorDraws, PosteriorSampler
from noisewise.neural.training import Rates
from noisewise.noise import Corruption, NoiseSchedule
from noisewise.sampling.loop import sample
from noisewise.sampling.tempering import ParallelTempering
from noisewise.targets.gaussian_mixture import GaussianMixture
from noisewise.typing import Cost

__all__ = ["Drawn", "ExactScore", "chain_systems", "network_systems"]

# at most so many chains beside the networks, and at least so many calls for each: of 32 to 512 chains, within the noise of the
# best for parallel tempering, on two seeds of its own and 10^5 and 10^6 calls
_CHAINS, _CALLS_EACH = 256, 2000
# reverse KL: one level of a third of a mode's width in the plane of the forty modes, on the standardised scale
_ONE_LEVEL = 0.02
# draws of each point for the posterior of a direct estimate
_POOLED = 8
# the published recipe with networks, batches and score steps of our size, and posterior draws of which a step takes 0.1 s
_SMALL = Rates(1e-3, 1e-4, 256, 512, 5)
_FEW = PosteriorSampler("annealed", particles=8, anneal_steps=3, resample=True, langevin_steps=2, box=1000.0)
# deviation of the forty modes of the plane in each coordinate
_STANDARDISED = 23.0
# calls of the target that mend each draw from a network
_REFINED = 20


@dataclass(frozen=True)
class Drawn:
    """Draws [n, dim], the bill of making the sampler and them, and how training went."""

    positions: Tensor
    cost: Cost
    seed: int
    history: list[dict[str, float]]
    notes: tuple[str, ...] = ()


class ExactScore:
    """The noisy score of a Gaussian mixture in closed form: what the best estimate of the target's score could do."""

    method = "exact"

    def draw(
        self, target: Any, noisy: Tensor, sigma: Tensor, steps: Any, generator: torch.Generator, start: Any = None,
        project: Any = None,
    ) -> PosteriorDraws:  # fmt: skip
        """Exact moments of p(x | y); the mixture's components must share one isotropic covariance."""
        mixture: GaussianMixture = target.target
        y = target.to_x(noisy)
        s = (sigma.unsqueeze(-1) * target.scale).square()
        width = mixture.full_covariances[0].diagonal().to(y)
        total = (width + s).unsqueeze(1)
        log_weight = mixture.weights.to(y).log() - ((y.unsqueeze(1) - mixture.means).square() / total).sum(-1) / 2
        centre = log_weight.softmax(-1) @ mixture.means.to(y)
        mean = target.to_u((width * y + s * centre) / (width + s))
        one = torch.ones_like(sigma)
        return PosteriorDraws(noisy, sigma, mean, torch.zeros_like(mean), 2 * one, one > 0, None, None, Cost())


def network_systems(target: Any, calls: int, draws: int) -> dict[str, System]:
    """DiKL, its forms, and reverse KL: one small level, all else equal."""

    once = functools.partial(_fitted, target, calls)
    plain = functools.lru_cache(maxsize=8)(once)

    def fit(refine_steps: int = 0, **options: Any) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int) -> Drawn:
            # two rows may share a network; a copy, because draws that are mended add to its bill
            sampler = copy.copy(plain(int(budget), seed) if not options else once(int(budget), seed, **options))
            x = sampler.sample(draws, seed=seed + 1, refine_steps=refine_steps)
            return Drawn(x, sampler.cost, seed, sampler.history_, sampler.warnings_)

        return draw

    pool = PosteriorSampler("pool", particles=_POOLED)
    # there the noisy score is all but the target's own, which a draw or two give wherever the generator is
    near = PosteriorSampler("importance", particles=2)
    digs = PosteriorSampler("digs", particles=1, langevin_steps=5)
    one_level: dict[str, Any] = {
        "schedule": NoiseSchedule([Corruption(1.0, _ONE_LEVEL)]),
        "posterior": near,
        "weight": "uniform",
    }
    published = NoiseSchedule.vp_beta(1e-4, 0.7, 30)
    # the scale that the networks see is some 23 times that of the paper, who never uses the first level
    levels = NoiseSchedule([Corruption(1.0, float(r) / _STANDARDISED) for r in published.r[1:]])
    systems = (
        System("DiKL", fit()),
        System("DiKL, exact noisy score", fit(posterior=ExactScore(), estimator="denoising")),
        System("DiKL, Gaussian latent", fit(latent="gaussian")),
        System("DiKL, mixture latent", fit(latent="mixture")),
        System("DiKL, published levels and weight", fit(schedule=levels, weight="1/a")),
        System("DiKL, posterior draws of a shared pool", fit(posterior=pool)),
        System("DiKL, posterior draws by DiGS", fit(posterior=digs)),
        System("published recipe, small", fit(preset="paper", hidden=128, rates=_SMALL, posterior=_FEW)),
        System(f"DiKL, then {_REFINED} MALA steps", fit(refine_steps=_REFINED)),
        System("reverse KL", fit(**one_level)),
    )
    return {system.name: system for system in systems}


def _fitted(target: Any, calls: int, steps: int, seed: int, **options: Any) -> DiKLSampler:
    generator = "egnn" if getattr(target, "particles", 0) else "mlp"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoisewiseWarning)  # they are notes of the row
        sampler = DiKLSampler(target, generator, **{"seed": seed, **options})
        return sampler.fit(max_steps=steps, max_gradients=calls if sampler.plan.posterior == "chains" else None)


def chain_systems(target: Any, calls: int, draws: int) -> tuple[System, ...]:
    """Parallel tempering and the library's default, with the calls that DiKL's chains have."""

    def chains(make: Callable[[Any], Any]) -> Callable[..., Drawn]:
        def draw(budget: float | int, seed: int) -> Drawn:
            bare = DiKLSampler(target).bare()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", NoisewiseWarning)
                run = sample(
                    make(bare),
                    chains=min(max(calls // _CALLS_EACH, 16), _CHAINS),
                    budget=calls,
                    seed=seed,
                    progress=False,
                )
            kept = run.positions[:, run.positions.shape[1] // 3 :].transpose(0, 1).reshape(-1, target.dim)
            picked = torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed))[:draws]
            notes = tuple(dict.fromkeys(str(one.message) for one in caught))
            return Drawn(bare.to_u(kept[picked]), replace(run.cost), seed, [], notes)

        return draw

    return (
        System("parallel tempering", chains(lambda bare: ParallelTempering(bare))),
        System("noisewise.sample", chains(lambda bare: bare)),
    )
