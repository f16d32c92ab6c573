"""Protocol D: scikit-learn's digits, 64 pixels: samples against held-out images, and the calibration of each covariance."""

import functools

import torch
from torch import Tensor

from noisewise.comparison import TUNING_SEED, Problem, System
from noisewise.denoising.models import Energy
from noisewise.denoising.moments import gaussian_posterior, isotropic_variance
from noisewise.energy.experiments.mmgibbs.learned import learned_gaussian
from noisewise.energy.experiments.mmgibbs.systems import Drawn, Setup, gibbs_systems
from noisewise.energy.network import EnergyNet
from noisewise.energy.training import fit_energy
from noisewise.errors import require
from noisewise.metrics.distances import mmd2
from noisewise.metrics.measurement import Measurement
from noisewise.noise import Corruption
from noisewise.training import Plan

__all__ = ["digits", "digits_data", "trained_digits"]

_SIGMA = 0.3
_TRAINING = {"quick": 150, "cpu": 4000, "paper": 40_000}
_HIDDEN = {"quick": 64, "cpu": 256, "paper": 512}
_CHAINS = {"quick": 100, "cpu": 200, "paper": 2000}
_STEPS = {"quick": 6, "cpu": 60, "paper": 200}
_HELD_OUT = 360
_SHOWN = 40


def digits_data() -> tuple[Tensor, Tensor]:
    """Training and held-out images, [n, 64] in [0, 1], float32, by a fixed shuffle."""
    x = torch.as_tensor(require("sklearn.datasets", "sampling").load_digits().data / 16, dtype=torch.float32)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[_HELD_OUT:]], x[order[:_HELD_OUT]]


@functools.lru_cache(maxsize=8)
def trained_digits(seed: int, scale: str) -> Energy:
    """An energy of noisy digits."""
    net = EnergyNet(64, hidden=_HIDDEN[scale], seed=seed)
    fit_energy(net, digits_data()[0], "dsm", Corruption(1.0, _SIGMA), **vars(_plan(seed, scale)))
    return Energy(net)


def _plan(seed: int, scale: str) -> Plan:
    return Plan(steps=_TRAINING[scale], batch_size=128, seed=seed)


def digits(scale: str, device: str) -> Problem:
    """The digits at `scale`."""
    chains, steps = _CHAINS[scale], _STEPS[scale]

    def setup(seed: int) -> Setup:
        train, _ = digits_data()
        generator = torch.Generator().manual_seed(seed + 1)
        start = train[torch.randint(len(train), (chains,), generator=generator)]
        return Setup(trained_digits(seed, scale), Corruption(1.0, _SIGMA), start, train, seed)

    coverings = ("full", "krylov", "hutchinson", "isotropic")
    systems = (
        *gibbs_systems(setup, steps, coverings, rank=8),
        learned_gaussian(setup, _HIDDEN[scale], functools.partial(_plan, scale=scale)),
    )
    drawn_full = systems[0].draw
    if scale == "quick":
        systems = tuple(system for system in systems if system.name in ("full", "krylov, rank 8", "walk-jump"))
    # the others are compared with it under the same seed
    full = functools.lru_cache(maxsize=8)(lambda seed: drawn_full(steps, seed))
    systems = (System("full", lambda budget, seed: full(seed)), *systems[1:])
    return Problem(
        protocol="D",
        name="digits",
        budget=steps,
        systems=systems,
        measure=functools.partial(_measure, full),
        criterion="MMD^2",
        picture=lambda drawn: {"draws": drawn.positions[-1][:_SHOWN].tolist()},
        notes=(
            f"digits: 1437 training images of 64 pixels in [0, 1], sigma {_SIGMA:g}, {_TRAINING[scale]} training steps; "
            f"{chains} chains from training images, {steps} sweeps (Langevin twice as many steps of a tuned size), against "
            f"{_HELD_OUT} held-out images (step sizes are chosen against training images). The gap to full compares the mean "
            "and the deviation of each pixel with those of the full covariance under the same seed, relative to the latter; its "
            "floor is that of two independent samples by full. The last two columns look at the covariances themselves: their "
            "trace over the squared residuals of held-out images, 1 where it is right, and their mean against the covariance "
            "of those residuals.",
        ),
    )


def _measure(full: functools._lru_cache_wrapper, drawn: Drawn) -> dict[str, Measurement]:
    x, (train, held_out), seed = drawn.positions[-1], digits_data(), drawn.setup.seed
    if seed >= TUNING_SEED:
        # step sizes are not chosen on the images that they are judged by
        train, held_out = train[_HELD_OUT:], train[:_HELD_OUT]
    bandwidth = 2 * float(train.var(0).sum())
    floor = float(mmd2(train[:_HELD_OUT], held_out, biased=False, bandwidth=bandwidth))
    reference = full(seed).positions[-1]
    # halves of the reference differ by the root of two more than two whole samples would
    other = _gap(reference[::2], reference[1::2]) / 2**0.5
    found = {
        "MMD^2": mmd2(x, held_out, biased=False, bandwidth=bandwidth, floor=floor),
        "gap to full": Measurement(_gap(x, reference), floor=other, n=len(x)),
    }
    if drawn.covariance is not None:
        found["covariances clamped"] = Measurement(drawn.clipped or 0.0, floor=0.0, n=len(x))
    # the matrix of a Krylov covariance is formed without its rank: only draws show what it approximates
    if drawn.covariance not in (None, "none", "krylov"):
        found["predicted over squared residuals"], found["error of the covariance"] = _calibration(
            drawn.setup.model, drawn.covariance, seed
        )
    return found


def _gap(x: Tensor, reference: Tensor) -> float:
    statistics = [torch.cat([sample.mean(0), sample.std(0)]) for sample in (x, reference)]
    return float((statistics[0] - statistics[1]).norm() / statistics[1].norm())


def _calibration(model: Energy, covariance: str, seed: int) -> tuple[Measurement, Measurement]:
    """Trace of the predicted covariance over that of held-out residuals, and the relative error of the mean matrix."""
    noise, (train, held_out) = Corruption(1.0, _SIGMA), digits_data()
    generator = torch.Generator().manual_seed(seed)
    x_t = noise.corrupt(held_out, generator)
    variance = isotropic_variance(model, train, noise, generator) if covariance == "isotropic" else None
    posterior = gaussian_posterior(
        model, x_t, noise, covariance=covariance, rank=8, variance=variance, generator=generator
    )
    residual = held_out - posterior.mean
    observed = torch.einsum("ni,nj->ij", residual, residual) / len(residual)
    predicted = posterior.covariance.dense().mean(0)
    ratio = float(predicted.trace() / observed.trace())
    squares = residual.square().sum(-1)
    error = ratio * float(squares.std() / squares.mean()) / len(squares) ** 0.5
    return (
        Measurement(ratio, error, floor=1.0, n=len(residual), better="neither"),
        Measurement(float((predicted - observed).norm() / observed.norm()), n=len(residual)),
    )
