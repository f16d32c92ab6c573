"""Improved precision and recall of a sample: the shares of draws and of data that lie within reach of the other side."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.metrics.distances import centred_pair
from noisewise.metrics.measurement import Measurement
from noisewise.typing import check_count

__all__ = ["PrecisionRecall", "precision_recall"]

# squared distances held at once: 32 MiB of float64
_BLOCK_ENTRIES = 2**22
# points that are as far as the radius count as inside; a squared distance has rounding errors of the squared norms
_SLACK = 1e-12


class PrecisionRecall(NamedTuple):
    """Share of draws that look like data, and share of data that the draws reach; 1 is best."""

    precision: Measurement
    recall: Measurement


def precision_recall(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], *, neighbours: int = 3) -> PrecisionRecall:
    """Of draws `x` against data `y`: a point is within reach of a sample if it lies in the ball around one of its points.

    The ball of a point ends at the `neighbours`-th nearest other point of its own sample. Precision falls with draws that
    look like no data, recall with data that no draw looks like. Both depend on n and m: compare equal numbers only, and
    perfect draws score well below 1. Computed in float64, block by block, in time (n + m)^2 dim. Has no standard error of
    its own: repeat it over seeds. Raises `InvalidInput` for samples with no more than `neighbours` points, not finite, or of
    different `dim`.
    Source: Kynkäänniemi et al., NeurIPS 2019 (arXiv 1904.06991).
    """
    k = check_count("neighbours", neighbours)
    x, y = centred_pair(x, y)
    if min(len(x), len(y)) <= k:
        raise InvalidInput(f"{k} neighbours need more than {k} points on each side, got {len(x)} and {len(y)}")
    precision, recall = _share_within(x, y, _radii(y, k)), _share_within(y, x, _radii(x, k))
    return PrecisionRecall(
        Measurement(precision, n=len(x), better="higher"), Measurement(recall, n=len(y), better="higher")
    )


def _radii(x: Float[Tensor, "n dim"], k: int) -> Float[Tensor, " n"]:
    """Squared distance of each point to the k-th nearest other one."""
    found = []
    for rows in _blocks(len(x), len(x)):
        squared = _squared_distances(x[rows], x)
        squared[torch.arange(len(squared)), torch.arange(len(x))[rows]] = math.inf
        found.append(squared.topk(k, dim=1, largest=False).values[:, -1])
    return torch.cat(found)


def _share_within(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"], radii: Float[Tensor, " m"]) -> float:
    """Of the points of `x`: in a ball around any point of `y`."""
    inside = 0
    for rows in _blocks(len(x), len(y)):
        slack = _SLACK * (x[rows].square().sum(-1, keepdim=True) + y.square().sum(-1))
        inside += int((_squared_distances(x[rows], y) <= radii + slack).any(1).sum())
    return inside / len(x)


def _squared_distances(x: Float[Tensor, "n dim"], y: Float[Tensor, "m dim"]) -> Float[Tensor, "n m"]:
    squares = x.square().sum(-1, keepdim=True) + y.square().sum(-1)
    return torch.addmm(squares, x, y.T, alpha=-2).clamp_(min=0)


def _blocks(n: int, m: int) -> list[slice]:
    size = max(1, _BLOCK_ENTRIES // m)
    return [slice(start, start + size) for start in range(0, n, size)]
