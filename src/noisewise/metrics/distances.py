"""Distances between two samples: squared MMD with the DiGS paper's recipe, exact Wasserstein-2, energy distance."""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, NoisewiseError, require
from noisewise.metrics.measurement import Measurement
from noisewise.typing import check_positive

__all__ = ["centred_pair", "energy_distance", "mmd2", "wasserstein2"]

# One tile of pairwise distances holds this many float64: 4 MiB, which stays in the cache of most processors.
_TILE_ENTRIES = 2**19
# Beyond this many pairs the cost matrix of optimal transport alone needs more than 3 GB.
_MAX_TRANSPORT_PAIRS = 400_000_000


def mmd2(
    x: Float[Tensor, "n dim"],
    y: Float[Tensor, "m dim"],
    *,
    biased: bool = True,
    bandwidth: float | int | None = None,
    floor: float | None = None,
) -> Measurement:
    """Squared maximum mean discrepancy under a sum of five Gaussian kernels exp(-|x - y|^2 / bw_i), bw_i = bw 2^(i-2).

    `bandwidth` (bw, in squared units of x) defaults to the mean squared distance between different points of the pooled
    sample. `biased=True` is the V-statistic, which counts the diagonal and is never negative; `biased=False` the
    U-statistic, which is 0 on average for equal laws. Computed in float64, tile by tile. Has no standard error of its
    own: repeat it over seeds. Raises `InvalidInput` for samples that are empty, not finite or of different `dim`, and
    for fewer than 2 draws when unbiased.
    Source: Gretton et al., JMLR 13, 2012; kernels and bandwidth of Chen et al., ICML 2024 (arXiv 2402.03008).
    """
    x, y = centred_pair(x, y)
    if not biased and min(len(x), len(y)) < 2:
        raise InvalidInput(f"the unbiased MMD needs 2 draws on each side, got {len(x)} and {len(y)}")
    width = _pooled_bandwidth(x, y) if bandwidth is None else check_positive("bandwidth", bandwidth)
    if width == 0:  # every point is the same: the two samples are equal
        return Measurement(0.0, floor=floor, n=len(x))
    within_x = _mean_kernel_within(x, width, biased)
    within_y = _mean_kernel_within(y, width, biased)
    value = within_x + within_y - 2 * _kernel_sum(x, y, width) / (len(x) * len(y))
    return Measurement(max(value, 0.0) if biased else value, floor=floor, n=len(x))


def energy_distance(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], *, floor: float | None = None) -> Measurement:
    """2 E|x - y| - E|x - x'| - E|y - y'| over all pairs (V-statistic), in units of x; 0 only for equal laws.

    Raises `InvalidInput` for samples that are empty, not finite or of different `dim`.
    Source: Székely & Rizzo, J. Stat. Plan. Inference 143, 2013.
    """
    x, y = centred_pair(x, y)
    between = 2 * _distance_sum(x, y) / (len(x) * len(y))
    within = _distance_sum(x, x) / len(x) ** 2 + _distance_sum(y, y) / len(y) ** 2
    return Measurement(max(between - within, 0.0), floor=floor, n=len(x))


def wasserstein2(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], *, floor: float | None = None) -> Measurement:
    """Exact Wasserstein-2 distance of two samples, in units of x: the root of the least mean squared transport cost.

    Solved by POT's network simplex in float64; time grows about as n^2 to n^3, seconds at 2000 draws. A finite sample
    has a large floor (see `sample_floor`): compare equal n only. Raises `InvalidInput` for samples that are empty, not
    finite, of different `dim`, or too large; `NoisewiseError` if the solver does not finish; `MissingExtra` where POT
    is not installed.
    Source: Flamary et al., JMLR 22, 2021 (POT).
    """
    ot = require("ot", "sampling")
    x, y = centred_pair(x, y)
    if len(x) * len(y) > _MAX_TRANSPORT_PAIRS:
        raise InvalidInput(
            f"exact transport between {len(x)} and {len(y)} draws needs {8 * len(x) * len(y) / 1e9:.0f} GB; "
            "pass a random subsample of both, of a few thousand draws"
        )
    cost = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square().cpu().numpy()
    squared, log = ot.emd2([], [], cost, numItermax=100_000_000, log=True)
    if log["warning"] is not None:
        raise NoisewiseError(f"optimal transport did not finish ({log['warning']}); pass a smaller subsample")
    return Measurement(math.sqrt(max(float(squared), 0.0)), floor=floor, n=len(x))


def centred_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both samples [n, dim] and [m, dim] in float64, less their pooled median, so that squared distances lose no digits.

    A mean would follow a single draw that has run away, and then it is the others that lose theirs. Raises `InvalidInput`
    for samples that are empty, not finite, of different `dim`, or not [draws, dim].
    """
    for name, sample in (("x", x), ("y", y)):
        if sample.ndim != 2:
            raise InvalidInput(f"{name} must have shape [n, dim], got {tuple(sample.shape)}; flatten chains and draws")
        if len(sample) == 0:
            raise InvalidInput(f"{name} has no draws")
        if not torch.isfinite(sample).all():
            row = int((~torch.isfinite(sample)).any(-1).nonzero()[0])
            shown = ", ".join(f"{value:g}" for value in sample[row][:4].tolist())
            more = ", ..." if sample.shape[1] > 4 else ""
            raise InvalidInput(f"row {row} of {name} is not finite: [{shown}{more}]")
    if x.shape[1] != y.shape[1]:
        raise InvalidInput(f"x has {x.shape[1]} coordinates and y has {y.shape[1]}; both samples need the same")
    x, y = x.detach().double(), y.detach().to(x.device).double()
    centre = torch.cat([x, y]).median(0).values
    return x - centre, y - centre


def _pooled_bandwidth(x: Tensor, y: Tensor) -> float:
    # sum_{i,j} |z_i - z_j|^2 = 2 N sum_i |z_i - mean|^2: no pass over the pairs is needed
    count = len(x) + len(y)
    mean = (x.sum(0) + y.sum(0)) / count
    return 2 * float((x - mean).square().sum() + (y - mean).square().sum()) / (count - 1)


def _mean_kernel_within(x: Tensor, width: float, biased: bool) -> float:
    total = _kernel_sum(x, x, width)
    count = len(x)
    # each of the five kernels is 1 on the diagonal
    return total / count**2 if biased else (total - 5 * count) / (count * (count - 1))


def _kernel_sum(x: Tensor, y: Tensor, width: float) -> float:
    """Sum of the five kernels over all pairs; bw_i doubles, so each kernel is the next one squared: one exp a pair."""
    scale = -1 / (4 * width)
    x_square, y_square = scale * x.square().sum(-1), scale * y.square().sum(-1)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, columns, multiplicity in _tiles(x, y):
        kernel = torch.addmm(y_square[columns], x[rows], y[columns].T, alpha=-2 * scale)
        kernel += x_square[rows, None]
        if x is y and rows == columns:
            kernel.fill_diagonal_(0)  # exactly, also far away, where the rounding errors of squares are large
        kernel.clamp_(max=0).exp_()  # rounding may leave -|x - y|^2 a little above 0
        subtotal = kernel.sum()
        for _ in range(4):
            subtotal += kernel.square_().sum()
        total += multiplicity * subtotal
    return float(total)


def _distance_sum(x: Tensor, y: Tensor) -> float:
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, columns, multiplicity in _tiles(x, y):
        # direct differences: the root of a rounded matmul form would spoil short distances
        tile = torch.cdist(x[rows], y[columns], compute_mode="donot_use_mm_for_euclid_dist")
        total += multiplicity * tile.sum()
    return float(total)


def _tiles(x: Tensor, y: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Row and column slices that cover all pairs, with how often each counts: twice off the diagonal when y is x."""
    side = math.isqrt(_TILE_ENTRIES)
    for top in range(0, len(x), side):
        for left in range(top if x is y else 0, len(y), side):
            multiplicity = 2 if x is y and left != top else 1
            yield slice(top, top + side), slice(left, left + side), multiplicity
