"""`evaluate`: what is measured of samples of a target, each number beside the one that perfect samples reach."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.metrics import (
    Measurement,
    assign_modes,
    distance_tvd,
    energy_quantiles,
    energy_tvd,
    energy_wasserstein,
    mmd2,
    mode_weights,
    sample_floor,
    symmetrised,
    total_variation,
    wasserstein2,
    wasserstein2_modulo,
)
from noisewise.targets import GaussianMixture
from noisewise.targets.double_wells import ManyWell
from noisewise.targets.target import as_target

__all__ = ["evaluate"]

# Exact transport takes seconds at this size and grows with the cube; all pairs of the other are cheap.
_TRANSPORTED = 2_000
_COMPARED = 5_000
_FLOOR_REPEATS = 3
# A mode counts as covered from this share of its weight on.
_FAIR_SHARE = 0.2
# The share of a planar Gaussian within 3 standard deviations of its mean.
_WITHIN = 1 - math.exp(-4.5)


# Trusted draws: as many rows as there are, or a sampler of as many as wanted.
_Sampler = Callable[[int, torch.Generator], Tensor]
_Trusted = Tensor | _Sampler


class _Compared(NamedTuple):
    """`measure(samples, reference)` of draws, or of their energies [n, 1] where `energies`; at most `rows` of each."""

    measure: Callable[[Tensor, Tensor], Measurement]
    energies: bool = False
    rows: int = _COMPARED

    def __call__(self, samples: Tensor, trusted: _Trusted, target: Any, seed: int) -> Measurement:
        view = partial(_energies, target) if self.energies else _unchanged
        few = samples[: self.rows]
        source: _Trusted
        if isinstance(trusted, Tensor):
            few = few[: len(trusted) // 2]
            source = view(trusted)
            against = source[: len(few)]
        else:
            source = _viewed(trusted, view)
            # the floor has draws of its own
            against = view(trusted(len(few), torch.Generator().manual_seed(seed + 1)))
        n = len(few)
        floor = sample_floor(self.measure, source, n, n_reference=n, repeats=_FLOOR_REPEATS, seed=seed)
        return replace(self.measure(view(few), against), floor=floor.mean, n=n)


class _Known(NamedTuple):
    """`measure(samples)` against what is known of a target that has exact draws."""

    measure: Callable[[Tensor], Measurement]

    def __call__(self, samples: Tensor, trusted: _Trusted, target: Any, seed: int) -> Measurement:
        n = len(samples)
        floor = sample_floor(
            lambda exact, _: self.measure(exact), target.sample, n, n_reference=1, repeats=_FLOOR_REPEATS, seed=seed
        )
        return replace(self.measure(samples), floor=floor.mean, n=n)


def evaluate(
    samples: Any,
    target: Any,
    reference: Any = None,
    metrics: Sequence[str] | None = None,
    seed: int = 0,
) -> dict[str, Measurement]:
    """Measure samples of `target` by all that fits it, or by the `metrics` named; each with its floor and its n.

    `samples`: [n, dim], a tensor or an array; `reference`: trusted draws [m, dim]; None takes those of `target.sample` (exact)
    or else of `target.reference`. Every comparison is made at equal size, at most 5 000 rows (2 000 for W2), and half as many
    as a finite reference has: the floor is the mean over three random splits into two disjoint samples of that size, or exact
    draws against exact draws.

    - any target: `energy gap` (of the means), `energy W1`, `energy 1 % gap`, `energy 50 % gap`, `energy 99 % gap` (of
      quantiles), `W2`, `MMD2`. A single draw of huge energy decides the first two: the quantiles are the sounder figures.
    - `GaussianMixture`, draws assigned to the nearest mean: `modes covered`, those that hold at least 20 % of their weight
      in draws within 3 standard deviations; `share within 3 sd`; `TV of mode weights`. In other than 2 dimensions "3
      standard deviations" is the radius with as much of a Gaussian inside, 98.9 %.
    - `ManyWell`: `worst well gap` and `mean well gap` of P(x > 0) to the truth, over wells; `well patterns`, the number of
      different sign patterns relative to what exact draws have on average (above 1: spread too evenly).
    - clusters of particles: `energy TVD`, `distance TVD`, `W2 modulo symmetry`. Samples and reference are centred,
      turned and relabelled at random first, so that W2 and MMD2 compare the laws without the labels of a chain.

    `seed`: of the rows taken and of the floors. Raises `InvalidInput` for rows that are not finite, a wrong dim, fewer
    than 2 rows, a log_prob that is NaN, unknown names, and a target with neither exact nor trusted draws; `MissingExtra`
    where W2 lacks POT.
    Source: W2 and the TVDs at 2 000 draws: He et al., AISTATS 2025 (arXiv 2410.12456).
    """
    samples = torch.as_tensor(samples)
    # a plain function has the dim of its samples
    target = as_target(target, None if hasattr(target, "log_prob") or samples.ndim != 2 else samples.shape[1])
    menu = _menu(target)
    if isinstance(metrics, str):
        raise InvalidInput(f"metrics must be a list of names, got the string {metrics!r}: give [{metrics!r}]")
    names = list(menu) if metrics is None else list(metrics)
    if unknown := [name for name in names if name not in menu]:
        raise InvalidInput(f"no metric {unknown[0]!r} for {type(target).__name__}; there are: {', '.join(menu)}")
    generator = torch.Generator().manual_seed(seed)
    samples = _prepared("samples", samples, target, generator)
    trusted = _trusted(target, samples, reference, generator)
    return {name: menu[name](samples, trusted, target, seed) for name in names}


def _menu(target: Any) -> dict[str, _Compared | _Known]:
    menu: dict[str, _Compared | _Known] = {
        "energy gap": _Compared(_mean_gap, energies=True),
        "energy W1": _Compared(lambda x, y: energy_wasserstein(x, y, _minus), energies=True),
        **{
            f"energy {level:.0%} gap".replace("%", " %"): _Compared(partial(_quantile_gap, level), energies=True)
            for level in (0.01, 0.5, 0.99)
        },
        "W2": _Compared(wasserstein2, rows=_TRANSPORTED),
        "MMD2": _Compared(mmd2),
    }
    if isinstance(target, GaussianMixture):
        menu |= {
            "modes covered": _Known(partial(_modes_covered, target)),
            "share within 3 sd": _Known(partial(_share_within, target)),
            "TV of mode weights": _Known(lambda x: total_variation(mode_weights(x, target.means), target.weights)),
        }
    if isinstance(target, ManyWell):
        menu |= {
            "worst well gap": _Known(lambda x: Measurement(float(_well_gaps(target, x).max()))),
            "mean well gap": _Known(lambda x: Measurement(float(_well_gaps(target, x).mean()))),
            "well patterns": _Known(partial(_pattern_ratio, target)),
        }
    if cluster := _cluster(target):
        menu |= {
            "energy TVD": _Compared(lambda x, y: energy_tvd(x, y, _minus), energies=True),
            "distance TVD": _Compared(lambda x, y: distance_tvd(x, y, *cluster)),
            "W2 modulo symmetry": _Compared(lambda x, y: wasserstein2_modulo(x, y, *cluster), rows=_TRANSPORTED),
        }
    return menu


def _cluster(target: Any) -> tuple[int, int] | None:
    """Number of particles and of coordinates of each, for a target whose pair distances are all that it sees."""
    if not hasattr(target, "pair_distances"):
        return None
    return target.particles, target.dim // target.particles


def _prepared(name: str, x: Tensor, target: Any, generator: torch.Generator) -> Tensor:
    """Checked, in random order, clusters without the symmetry copy that they happen to be."""
    if x.ndim != 2 or x.shape[1] != target.dim:
        raise InvalidInput(f"{name} must have shape [n, {target.dim}], the dim of the target, got {tuple(x.shape)}")
    if len(x) < 2:
        raise InvalidInput(f"{name} has {len(x)} rows; nothing can be said of fewer than 2")
    if (bad := (~torch.isfinite(x)).any(-1)).any():
        row = int(bad.nonzero()[0])
        raise InvalidInput(
            f"row {row} of {name} is not finite ({int(bad.sum())} of {len(x)} rows); remove such rows, and say so"
        )
    x = x.detach()[torch.randperm(len(x), generator=generator).to(x.device)]
    cluster = _cluster(target)
    return symmetrised(x, *cluster, generator) if cluster else x


def _trusted(target: Any, samples: Tensor, reference: Tensor | None, generator: torch.Generator) -> _Trusted:
    if reference is None and hasattr(target, "sample"):
        return _viewed(target.sample, lambda x: x.to(samples))
    if reference is None:
        if not hasattr(target, "reference"):
            raise InvalidInput(
                f"{type(target).__name__} has neither exact draws (sample) nor trusted ones (reference): give "
                "reference=[m, dim], for example the draws of a long run of ParallelTempering, or a fitted sampler's "
                "chain_draws_, which tell how well it learned them"
            )
        reference = target.reference(2 * min(len(samples), _COMPARED))
    reference = _prepared("reference", torch.as_tensor(reference).to(samples), target, generator)
    if len(reference) < 4:
        raise InvalidInput(f"reference has {len(reference)} rows; the floor needs two samples of at least 2")
    return reference


def _viewed(sampler: _Sampler, view: Callable[[Tensor], Tensor]) -> _Sampler:
    return lambda n, generator: view(sampler(n, generator))


def _unchanged(x: Tensor) -> Tensor:
    return x


def _energies(target: Any, x: Tensor) -> Float[Tensor, "n 1"]:
    with torch.no_grad():
        energy = -target.log_prob(x).double()
    if (bad := torch.isnan(energy)).any():
        # by its coordinates: rows are no longer in the order in which they were given
        shown = ", ".join(f"{value:g}" for value in x[bad][0][:4].tolist())
        raise InvalidInput(f"log_prob is NaN for {int(bad.sum())} of {len(x)} draws, one of which begins [{shown}]")
    return energy.unsqueeze(-1)


def _minus(energy: Float[Tensor, "n 1"]) -> Float[Tensor, " n"]:
    """The log density of draws that are their own energies."""
    return -energy[:, 0]


def _mean_gap(x: Float[Tensor, "n 1"], reference: Float[Tensor, "m 1"]) -> Measurement:
    se = math.sqrt(float(x.var()) / len(x) + float(reference.var()) / len(reference))
    return Measurement(abs(float(x.mean() - reference.mean())), se if math.isfinite(se) else None)


def _quantile_gap(level: float, x: Float[Tensor, "n 1"], reference: Float[Tensor, "m 1"]) -> Measurement:
    return energy_quantiles(x, reference, _minus, (level,))[level]


def _inside(target: GaussianMixture, x: Float[Tensor, "n dim"]) -> tuple[Tensor, Tensor]:
    """Nearest mean of each draw, and whether it is within 3 standard deviations of it."""
    labels = assign_modes(x, target.means)
    half_square = float(require("scipy.special", "sampling").gammaincinv(target.dim / 2, _WITHIN))
    inside = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    factors = torch.linalg.cholesky(target.full_covariances.double())
    for mode, (mean, factor) in enumerate(zip(target.means, factors, strict=True)):
        rows = labels == mode
        offset = (x[rows] - mean.to(x)).double()
        whitened = torch.linalg.solve_triangular(factor.to(offset), offset.T, upper=False)
        inside[rows] = whitened.square().sum(0) <= 2 * half_square
    return labels, inside


def _modes_covered(target: GaussianMixture, x: Float[Tensor, "n dim"]) -> Measurement:
    labels, inside = _inside(target, x)
    held = torch.bincount(labels[inside], minlength=len(target.means)).cpu() / len(x)
    covered = held >= _FAIR_SHARE * target.weights.cpu()
    return Measurement(int(covered.sum()), unit=f"of {len(target.means)}", better="higher")


def _share_within(target: GaussianMixture, x: Float[Tensor, "n dim"]) -> Measurement:
    share = float(_inside(target, x)[1].double().mean())
    return Measurement(share, math.sqrt(share * (1 - share) / len(x)), better="higher")


def _well_gaps(target: ManyWell, x: Float[Tensor, "n dim"]) -> Float[Tensor, " well"]:
    return ((x[:, 0::2] > 0).double().mean(0) - target.right_probability).abs()


def _pattern_ratio(target: ManyWell, x: Float[Tensor, "n dim"]) -> Measurement:
    """Different patterns of wells among the draws, over the expected number among as many exact ones."""
    found = len(torch.unique(x[:, 0::2] > 0, dim=0))
    wells, right = target.dim // 2, target.right_probability
    expected = 0.0
    for k in range(wells + 1):
        # a pattern with k wells on the right is seen in n draws with probability 1 - (1 - p)^n
        p = right**k * (1 - right) ** (wells - k)
        expected -= math.comb(wells, k) * math.expm1(len(x) * math.log1p(-p))
    return Measurement(found / expected, better="neither")
