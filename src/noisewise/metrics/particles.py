"""What is measured of samples of particle clusters: energies, pair distances, and transport that sees no symmetry copy."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.metrics.distances import wasserstein2
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.modes import histogram_total_variation
from noisewise.typing import check_count

__all__ = [
    "distance_tvd",
    "energy_quantiles",
    "energy_tvd",
    "energy_wasserstein",
    "symmetrised",
    "wasserstein2_modulo",
]


def energy_tvd(
    x: Float[Tensor, "n dim"],
    reference: Float[Tensor, "m dim"],
    target: Any,
    *,
    bins: int = 200,
    mode: str = "full",
    floor: float | int | None = None,
) -> Measurement:
    """Total variation of two energy histograms, in [0, 1]; energies are -log_prob of `target`.

    `target`: a Target, or a log density [n, dim] -> [n]. The `bins` lie between the least and the largest energy of the
    reference. `mode`: "full" gives what lies outside one more bin on each side; "paper" drops it and divides by what is
    left, which hides exactly the samples that are worst, and is NaN when nothing is left. The floor is large, 0.14 for
    2 000 draws against 2 000 (see `sample_floor`). Raises `InvalidInput` for NaN, for infinite energies of the reference,
    and for one that has a single energy.
    Source: He et al., AISTATS 2025 (arXiv 2410.12456): mode "paper".
    """
    given, trusted = _energies(x, reference, target)
    return _total_variation(given, trusted, bins, mode, floor)


def distance_tvd(
    x: Float[Tensor, "n dim"],
    reference: Float[Tensor, "m dim"],
    particles: int,
    space: int,
    *,
    bins: int = 200,
    mode: str = "full",
    floor: float | int | None = None,
) -> Measurement:
    """Total variation of the histograms of the distances of all pairs, pooled over pairs and draws, in [0, 1].

    Rows of x: `particles` points of `space` coordinates each. `bins` and `mode` as in `energy_tvd`; `n` counts draws.
    Raises `InvalidInput` where dim is not particles x space, and for NaN.
    Source: He et al., AISTATS 2025 (arXiv 2410.12456): mode "paper".
    """
    given, trusted = (_pair_distances(name, v, particles, space) for name, v in (("x", x), ("reference", reference)))
    return replace(_total_variation(given.flatten(), trusted.flatten(), bins, mode, floor), n=len(x))


def energy_wasserstein(
    x: Float[Tensor, "n dim"], reference: Float[Tensor, "m dim"], target: Any, *, floor: float | int | None = None
) -> Measurement:
    """Exact Wasserstein-1 distance of two samples of energies, the area between their distribution functions.

    `target` as in `energy_tvd`; in units of the energy. It is reported as it is: one overlap of two Lennard-Jones
    particles (energy 1e9) among n draws adds 1e9 / n and decides the value alone, infinite energies make it infinite. For
    such targets `energy_quantiles` is the sounder figure, since no draw can move it by more than one rank. Raises
    `InvalidInput` for NaN and for infinite energies of the reference.
    """
    given, trusted = (values.sort().values for values in _energies(x, reference, target))
    if torch.isinf(given).any():
        return Measurement(math.inf, floor=floor, n=len(x))
    every = torch.cat([given, trusted]).sort().values
    below = [torch.searchsorted(values, every[:-1], right=True).double() / len(values) for values in (given, trusted)]
    return Measurement(float(((below[0] - below[1]).abs() * every.diff()).sum()), floor=floor, n=len(x))


def energy_quantiles(
    x: Float[Tensor, "n dim"],
    reference: Float[Tensor, "m dim"],
    target: Any,
    levels: Sequence[float] = (0.01, 0.5, 0.99),
) -> dict[float, Measurement]:
    """Absolute gap between the energy quantiles of two samples, for each of the `levels` (inside 0 to 1).

    `target` as in `energy_tvd`; in units of the energy. The tails show what histograms and means hide: a missing
    low-energy tail, or some draws with overlaps. Standard errors are half the distance between the quantiles one binomial
    standard error to either side. Raises `InvalidInput` for NaN, for infinite energies of the reference, and for levels
    outside 0 to 1.
    """
    given, trusted = (values.sort().values for values in _energies(x, reference, target))
    gaps = {}
    for level in levels:
        if not 0 < level < 1:
            raise InvalidInput(f"levels are probabilities above 0 and below 1, got {level!r}")
        (here, error), (there, error_there) = _quantile(given, level), _quantile(trusted, level)
        se = math.hypot(error, error_there)
        gaps[level] = Measurement(abs(here - there), se if math.isfinite(se) else None, n=len(x))
    return gaps


def wasserstein2_modulo(
    x: Float[Tensor, "n dim"],
    reference: Float[Tensor, "m dim"],
    particles: int,
    space: int,
    *,
    floor: float | int | None = None,
) -> Measurement:
    """Wasserstein-2 distance of clusters taken up to motions, reflections and relabelling, in units of x.

    Each draw stands for its symmetry copies by the sorted vector of its pair distances, divided by sqrt(particles); the
    value is the exact W2 of these vectors. It is never above the W2 of the draws themselves, nor above the one whose cost
    is the distance after the best motion and relabelling: pair distances of centred clusters are sqrt(particles)-Lipschitz,
    and sorting only shortens. It is 0 only for equal laws of the sorted distances, and these tell clusters in
    general position apart (particles >= space + 2).

    Why not the others: the best relabelling and rotation of one pair of clusters has no closed form, and iterating
    (Hungarian, Kabsch) gives an upper bound only, at n^2 alignments, four million for 2 000 draws. W2 against randomly
    rotated and relabelled references is sound, but nearly all of it is the floor, 4.17 for LJ-13 at 2 000 draws
    (here: 0.12).

    Time as `wasserstein2`: seconds at 2 000 draws. Raises `InvalidInput` where dim is not particles x space, and what
    `wasserstein2` raises.
    Source: Boutin & Kemper, Adv. Appl. Math. 32, 2004 (reconstruction from the distribution of distances).
    """
    given, trusted = (_pair_distances(name, v, particles, space) for name, v in (("x", x), ("reference", reference)))
    scale = 1 / math.sqrt(particles)
    return wasserstein2(scale * given.sort(-1).values, scale * trusted.sort(-1).values, floor=floor)


def symmetrised(
    x: Float[Tensor, "n dim"], particles: int, space: int, generator: torch.Generator
) -> Float[Tensor, "n dim"]:
    """Each cluster about its centre of mass, turned or reflected and relabelled at random, by `generator` (on the CPU).

    Leaves a law that has these symmetries as it is. A chain keeps its labels and turns slowly: symmetrise its draws
    before a distance that sees symmetry copies. Raises `InvalidInput` where dim is not particles x space.
    """
    position = _positions("x", x, particles, space)
    position = position - position.mean(1, keepdim=True)
    normal = torch.randn(len(x), space, space, dtype=torch.float64, generator=generator)
    q, r = torch.linalg.qr(normal)
    # the signs make the factor unique, and so uniform on the orthogonal group (Mezzadri 2007)
    rotation = (q * torch.diagonal(r, dim1=-2, dim2=-1).sign().unsqueeze(-2)).to(position)
    order = torch.rand(len(x), particles, generator=generator).argsort(-1).to(x.device)
    relabelled = position.gather(1, order.unsqueeze(-1).expand(-1, -1, space))
    return (relabelled @ rotation).flatten(1)


def _positions(name: str, x: Tensor, particles: int, space: int) -> Tensor:
    particles, space = check_count("particles", particles, minimum=2), check_count("space", space)
    if x.ndim != 2 or x.shape[1] != particles * space:
        raise InvalidInput(
            f"{name} must have shape [n, {particles * space}], {particles} particles of {space} coordinates, "
            f"got {tuple(x.shape)}"
        )
    return x.detach().reshape(-1, particles, space)


def _pair_distances(name: str, x: Tensor, particles: int, space: int) -> Float[Tensor, "n pairs"]:
    position = _positions(name, x, particles, space).double()
    first, second = torch.triu_indices(particles, particles, 1, device=x.device)
    return torch.linalg.vector_norm(position[:, first] - position[:, second], dim=-1)


def _energies(x: Tensor, reference: Tensor, target: Any) -> tuple[Float[Tensor, " n"], Float[Tensor, " m"]]:
    """Energies of both samples in float64, those of the reference finite, those of x not NaN."""
    log_prob: Callable[[Tensor], Tensor] = getattr(target, "log_prob", target)
    if not callable(log_prob):
        raise InvalidInput(f"target must be a Target or a log density [n, dim] -> [n], got {target!r}")
    if not len(x) or not len(reference):
        raise InvalidInput(f"cannot compare {len(x)} draws with {len(reference)}: one sample is empty")
    with torch.no_grad():
        given, trusted = (-log_prob(sample).double() for sample in (x, reference.to(x)))
    if given.shape != (len(x),):
        raise InvalidInput(f"log_prob must map {list(x.shape)} to [{len(x)}], got shape {tuple(given.shape)}")
    for name, energy, bad in (
        ("x", given, torch.isnan(given)),
        ("reference", trusted, ~torch.isfinite(trusted)),
    ):
        if bad.any():
            row = int(bad.nonzero()[0])
            raise InvalidInput(
                f"the energy of row {row} of {name} is {float(energy[row])} ({int(bad.sum())} of {len(bad)} rows); "
                "remove such rows, and say so"
            )
    return given, trusted


def _total_variation(given: Tensor, trusted: Tensor, bins: int, mode: str, floor: float | int | None) -> Measurement:
    low, high = float(trusted.min()), float(trusted.max())
    if mode not in ("full", "paper"):
        raise InvalidInput(f'mode must be "full" or "paper", got {mode!r}')
    if not low < high:
        raise InvalidInput(f"the reference has the single value {low:g}: no histogram can be made of it")
    if mode == "paper":
        inside = given[(given >= low) & (given <= high)]
        if not len(inside):
            return Measurement(math.nan, floor=floor, n=len(given))
    else:
        inside = given
    measured = histogram_total_variation(inside, trusted, bins, (low, high))
    return replace(measured, floor=floor, n=len(given))


def _quantile(values: Tensor, level: float) -> tuple[float, float]:
    """Quantile of sorted values as the inverse of their distribution function, and its standard error."""
    count = len(values)
    spread = math.sqrt(level * (1 - level) / count)
    ranks = [min(max(math.ceil(count * p), 1), count) - 1 for p in (level - spread, level, level + spread)]
    below, quantile, above = (float(values[rank]) for rank in ranks)
    return quantile, (above - below) / 2
