"""One small energy network, fitted by each of the losses that an expert would ask for; all share reference and scale."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from noisewise.comparison import System
from noisewise.energy.bridged import ResidualEnergy
from noisewise.energy.gaps import find_clusters
from noisewise.energy.losses import mixture_log_prob, score_matching_loss
from noisewise.energy.mixture import MixtureScoreMatching
from noisewise.energy.network import EnergyNet
from noisewise.energy.reference import gaussian_reference
from noisewise.energy.training import fit_energy
from noisewise.errors import NoisewiseWarning
from noisewise.noise import Corruption
from noisewise.typing import Cost

__all__ = ["Density", "density_systems"]

_BATCH, _RATE, _CLIP = 256, 3e-3, 10.0
# no rows held out: on some hundreds of rows the loss of score matching is so noisy that it picks networks that hardly learned
_VALIDATION = 0.0
# deviations of the one-stage form's Gaussian base: narrower than m, or the constant that it learns is not determined
_BASES = (0.5, 0.8)

Loss = Callable[[Any, Tensor, torch.Generator], Tensor]


@dataclass(frozen=True)
class Density:
    """What a fit gives: an unnormalised log density on the scale of the data, its bill, and its negative mass if any."""

    log_density: Callable[[Tensor], Tensor]
    cost: Cost
    negative: float | None = None
    notes: tuple[str, ...] = ()


def density_systems(
    data: Callable[[int], Tensor],
    hidden: int,
    wrap: Callable[[Density, int], Any],
    mode_width: float,
    likelihood: Callable[[Tensor, Tensor], tuple[Tensor, float]] | None,
    decays: tuple[float, ...] = (0.0, 1e-2),
    with_one_stage: bool = True,
) -> tuple[System, ...]:
    """The systems; the budget of each is its number of training steps, weight decay is tuned over `decays`.

    `wrap(density, seed)` makes the outcome. `mode_width`: deviation of a mode in units of the data, for the noise levels of
    DSM. `likelihood(mean, scale)`: quadrature nodes on the standardised scale and their volume, where a grid exists.
    """

    def of(loss_of: Callable[[Any, Tensor], Loss | str], corruption: float | None = None) -> Callable[..., Any]:
        def draw(budget: float | int, seed: int, weight_decay: float) -> Any:
            x = data(seed)
            mean, scale = x.mean(0), x.std(0)
            z = (x - mean) / scale
            reference = gaussian_reference(z)
            net = ResidualEnergy(EnergyNet(x.shape[1], hidden=hidden, seed=seed, gain=_detail(z)), reference)
            # the noise is one number on the standardised scale
            noise = None if corruption is None else Corruption(1.0, corruption * mode_width / float(scale.mean()))
            fit = fit_energy(
                net, z, loss_of(reference, torch.stack([mean, scale])), noise, steps=int(budget), batch_size=_BATCH,
                learning_rate=_RATE, weight_decay=weight_decay, clip=_CLIP, validation=_VALIDATION, seed=seed,
            )  # fmt: skip
            return wrap(Density(lambda point: -_energy(net, (point - mean) / scale), fit.cost), seed)

        return draw

    def one_stage(budget: float | int, seed: int, weight_decay: float, base_scale: float) -> Any:
        x = data(seed)
        mean, scale = x.mean(0), x.std(0)
        z = (x - mean) / scale
        net = EnergyNet(x.shape[1], hidden=hidden, base_scale=base_scale, seed=seed, gain=_detail(z))
        fit = fit_energy(
            net, z, _one_stage(gaussian_reference(z)), steps=int(budget), batch_size=_BATCH, learning_rate=_RATE,
            weight_decay=weight_decay, clip=_CLIP, validation=_VALIDATION, seed=seed,
        )  # fmt: skip
        return wrap(Density(lambda point: -_energy(net, (point - mean) / scale), fit.cost), seed)

    def mfd(beta: float) -> Callable[..., Any]:
        def draw(budget: float | int, seed: int, weight_decay: float) -> Any:
            model = MixtureScoreMatching(
                beta=beta, hidden=hidden, steps=int(budget), batch_size=_BATCH, learning_rate=_RATE,
                weight_decay=weight_decay, clip=_CLIP, validation=_VALIDATION, seed=seed,
            )  # fmt: skip
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NoisewiseWarning)  # they are notes of the row
                model.fit(data(seed))
            density = Density(model.score_samples, model.cost_, model.negative_mass_, tuple(model.warnings_))
            return wrap(density, seed)

        return draw

    settings = tuple({"weight_decay": decay} for decay in decays)
    systems = [
        System("MFD, beta .8", mfd(0.8), settings),
        System("MFD, beta .95", mfd(0.95), settings),
        System("FD", of(lambda m, scale: "sm"), settings),
        System("FD, sliced", of(lambda m, scale: _sliced), settings),
        *(
            System(f"DSM, {share:g} mode widths", of(lambda m, scale: "dsm", share), settings)
            for share in (0.1, 0.3, 1.0)
        ),
        System("NCE with the same m", of(lambda m, scale: _contrastive(m)), settings),
    ]
    if with_one_stage:
        bases = tuple({**setting, "base_scale": c} for setting in settings for c in _BASES)
        systems.insert(2, System("MFD in one stage, beta .8", one_stage, bases))
    if likelihood is not None:
        systems.append(
            System("maximum likelihood by quadrature", of(lambda m, scale: _likelihood(*likelihood(*scale))), settings)
        )
    return tuple(systems)


def _detail(z: Tensor) -> float:
    """The gain that `MixtureScoreMatching` gives its network, for all the others."""
    return find_clusters(z, torch.Generator().manual_seed(0)).detail


def _energy(net: nn.Module, z: Tensor) -> Tensor:
    with torch.no_grad():
        return net(z)


def _sliced(energy: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    return score_matching_loss(energy, x, "sliced", generator)


def _contrastive(reference: Any) -> Loss:
    """Tell data from draws of m by the log ratio -f - log m, its constant learned with the rest."""

    def loss(energy: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        drawn = reference.sample(len(x), generator).to(x)
        logits = [-energy(point) - reference.log_prob(point) for point in (x, drawn)]
        return nn.functional.softplus(-logits[0]).mean() + nn.functional.softplus(logits[1]).mean()

    return loss


def _one_stage(reference: Any, beta: float = 0.8) -> Loss:
    """Score matching of log(beta r + (1 - beta) m) with log r = -f: positive by construction, its constant learned."""

    def loss(energy: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        drawn = reference.sample(max(1, round(len(x) * (1 - beta) / beta)), generator).to(x)

        def bridge(point: Tensor) -> Tensor:
            return -mixture_log_prob(-energy(point), reference.log_prob(point), beta)

        at_data, at_reference = score_matching_loss(bridge, x), score_matching_loss(bridge, drawn)
        return beta * at_data + (1 - beta) * at_reference

    return loss


def _likelihood(nodes: Tensor, volume: float) -> Loss:
    def loss(energy: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        return energy(x).mean() + (-energy(nodes)).logsumexp(0) + math.log(volume)

    return loss
