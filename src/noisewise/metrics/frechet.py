"""Fréchet distance between the Gaussians fitted to two samples: the formula behind FID, over features of any kind."""

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.metrics.distances import centred_pair
from noisewise.metrics.measurement import Measurement

__all__ = ["frechet_distance"]


def frechet_distance(
    x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], *, floor: float | int | None = None
) -> Measurement:
    """|mean_x - mean_y|^2 + tr(S_x + S_y - 2 (S_x S_y)^(1/2)), in squared units of x; S are the unbiased covariances.

    The squared Wasserstein-2 distance of the two fitted Gaussians, so blind to all but means and covariances; FID where x
    and y are Inception features. Fewer draws than dimensions are allowed, but the value is biased upwards at small n and
    m: compare equal numbers of draws only (see `sample_floor`). Computed in float64, in time (n + m) dim^2 for more draws
    than dimensions. Raises `InvalidInput` for fewer than 2 draws on a side, and for samples that are not finite or of
    different `dim`.
    Source: Dowson & Landau, J. Multivar. Anal. 12, 1982; Heusel et al., NeurIPS 2017 (arXiv 1706.08500).
    """
    x, y = centred_pair(x, y)
    if min(len(x), len(y)) < 2:
        raise InvalidInput(f"a covariance needs 2 draws on each side, got {len(x)} and {len(y)}")
    root_x, root_y = _covariance_root(x), _covariance_root(y)
    # With S = R^T R the roots of the eigenvalues of S_x S_y are the singular values of R_x R_y^T. Neither is a singular
    # S a special case then, nor is anything squared first: the root of a rounding error 1e-16 would be 1e-8, or complex.
    shared = torch.linalg.svdvals(root_x @ root_y.T).sum()
    apart = (x.mean(0) - y.mean(0)).square().sum()
    value = float(apart + root_x.square().sum() + root_y.square().sum() - 2 * shared)
    return Measurement(max(value, 0.0), floor=floor, n=len(x))


def _covariance_root(x: Float[Tensor, "n dim"]) -> Float[Tensor, "rank dim"]:
    """R with R^T R the unbiased covariance and min(n, dim) rows, from the draws themselves."""
    return torch.linalg.qr((x - x.mean(0)) / (len(x) - 1) ** 0.5, mode="r").R
