"""Protocol A: the exact score of four Gaussians, so that only the sampler errs; starts are draws of the target itself."""

import functools

import torch

from noisewise.comparison import Problem
from noisewise.denoising.models import Energy
from noisewise.energy.experiments.mmgibbs.systems import Drawn, Setup, exact_gibbs, fresh_generator, gibbs_systems
from noisewise.energy.experiments.mmgibbs.toys import four_gaussians
from noisewise.metrics.distances import mmd2, wasserstein2
from noisewise.metrics.floors import sample_floor
from noisewise.metrics.measurement import Measurement
from noisewise.noise import Corruption
from noisewise.targets.gaussian_mixture import GaussianMixture

__all__ = ["exact_scores"]

_SIGMAS = {"quick": (0.5,), "cpu": (0.2, 0.5, 0.8), "paper": (0.2, 0.5, 0.8)}
_CHAINS = {"quick": 500, "cpu": 4000, "paper": 10_000}
_STEPS = {"quick": 12, "cpu": 60, "paper": 60}
_TRANSPORTED = 1000
_COVERINGS = ("full", "diagonal", "hutchinson", "isotropic", "krylov")
_TRUE_WIDTH = 0.2


def exact_scores(scale: str, device: str) -> tuple[Problem, ...]:
    """One problem for each noise level."""
    target = four_gaussians()
    return tuple(_problem(target, sigma, _CHAINS[scale], _STEPS[scale]) for sigma in _SIGMAS[scale])


def _problem(target: GaussianMixture, sigma: float, chains: int, steps: int) -> Problem:
    noise = Corruption(1.0, sigma)
    model = exact_model(target, noise)

    def setup(seed: int) -> Setup:
        start = target.sample(chains, torch.Generator().manual_seed(seed))
        return Setup(model, noise, start, start, seed)

    return Problem(
        protocol="A",
        name=f"MoG4, exact score, sigma {sigma:g}",
        budget=steps,
        systems=(*gibbs_systems(setup, steps, _COVERINGS), exact_gibbs(target, setup)),
        measure=functools.partial(_measure, target),
        criterion="MMD^2",
        picture=lambda drawn: {"draws": drawn.positions[-1][:1000].tolist()},
        notes=(
            f"Exact score, sigma {sigma:g}: {chains} chains start at draws of the target and make {steps} sweeps (Langevin "
            "twice as many steps of a tuned size). The width of a mode is .2 in truth. A chain has left its mode when its "
            "nearest centre is another one; perfect mixing gives .75.",
        ),
    )


def exact_model(target: GaussianMixture, noise: Corruption) -> Energy:
    """The energy of the noisy mixture, in closed form."""
    noisy = target.noisy(noise.a, noise.s)
    # the score's pass keeps a graph for the second derivative, which log_prob's own shortcut does not
    return Energy(lambda x: -noisy.log_prob_and_score(x)[0])


def _measure(target: GaussianMixture, drawn: Drawn) -> dict[str, Measurement]:
    x = drawn.positions[-1]
    fresh = target.sample(len(x), fresh_generator(drawn))
    labels = target.component(x)
    offset = x - target.means[labels]
    squares = offset.square().mean(-1)
    width = float(squares.mean().sqrt())
    first = target.component(drawn.start)
    moved = (target.component(drawn.positions[0]) != first).double()
    floor_mmd, floor_w2 = _floors(len(x))
    found = {
        "MMD^2": mmd2(x, fresh, biased=False, floor=floor_mmd),
        "W2": wasserstein2(x[:_TRANSPORTED], fresh[:_TRANSPORTED], floor=floor_w2),
        "width of a mode": Measurement(
            width, float(squares.std()) / len(x) ** 0.5 / (2 * width), floor=_TRUE_WIDTH, n=len(x), better="neither"
        ),
        "left their mode after a sixth of the run": Measurement(
            float(moved.mean()), float(moved.std()) / len(x) ** 0.5, floor=0.75, n=len(x), better="higher"
        ),
    }
    if drawn.clipped is not None:
        found["covariances clamped"] = Measurement(drawn.clipped, floor=0.0, n=len(x))
    return found


@functools.lru_cache(maxsize=4)
def _floors(n: int) -> tuple[float, float]:
    draw = four_gaussians().sample
    return (
        sample_floor(functools.partial(mmd2, biased=False), draw, n, repeats=4).mean,
        sample_floor(wasserstein2, draw, min(n, _TRANSPORTED), repeats=4).mean,
    )
