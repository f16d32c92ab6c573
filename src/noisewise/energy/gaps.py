"""Are there gaps between clusters of the data, and does the reference put enough points into them to carry their weights?"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Clusters", "Gap", "find_clusters", "find_gaps"]

# rows that are compared with each other, and the least share of them that counts as a cluster
_ROWS, _LEAST_SHARE = 1500, 0.02
# rows are neighbours within the distance that this share of rows has to its fifth-nearest row
_LINKED_SHARE, _NEIGHBOUR = 0.98, 5
# clusters closer than this many linking distances are joined by their own scattered rows
_ISOLATED = 2.0
# a point lies in a gap when the way over it is at most this much longer than the gap
_DETOUR = 1.5


class Gap(NamedTuple):
    """The gap between clusters `first` and `second`: its `width`, and the `points` of the reference expected in it."""

    first: int
    second: int
    width: float
    points: float


@dataclass(frozen=True)
class Clusters:
    """Connected groups of rows. `rows`: [row, dim], a sample of the data; `labels`: [row]; `reach`: linking distance."""

    rows: Float[Tensor, "row dim"]
    labels: Int[Tensor, " row"]
    reach: float

    @property
    def number(self) -> int:
        """How many clusters there are."""
        return int(self.labels.max()) + 1

    @property
    def width(self) -> float:
        """Root mean square deviation of rows from the mean of their cluster, over all columns."""
        offset = torch.cat([group - group.mean(0) for group in self.groups])
        return float(offset.square().mean().sqrt())

    @property
    def detail(self) -> float:
        """How much finer than the standardised data their clusters are, 1 / width, between 1 and 10: a network's `gain`."""
        return min(max(1 / self.width, 1.0), 10.0)

    @property
    def groups(self) -> list[Float[Tensor, "member dim"]]:
        """The rows of each cluster."""
        return [self.rows[self.labels == label] for label in range(self.number)]

    def __call__(self, x: Float[Tensor, "n dim"]) -> Int[Tensor, " n"]:
        """Label of each point: that of the nearest row."""
        if self.number == 1:
            return torch.zeros(len(x), dtype=self.labels.dtype, device=x.device)
        return torch.cat([self.labels[torch.cdist(part, self.rows.to(part)).argmin(1)] for part in x.split(4096)])


def find_clusters(data: Float[Tensor, "row dim"], generator: torch.Generator) -> Clusters:
    """Groups of rows that single linkage connects; scattered rows, below 2 % of all, are left out."""
    order = torch.randperm(len(data), generator=generator, device=data.device)[:_ROWS]
    rows = data[order].double()
    distance = torch.cdist(rows, rows)
    nearest = distance.topk(min(_NEIGHBOUR + 1, len(rows)), largest=False).values[:, -1]
    reach = float(nearest.quantile(_LINKED_SHARE))
    root = _components(distance <= reach)
    sizes = torch.bincount(root, minlength=len(rows))
    big = (sizes >= max(2, _LEAST_SHARE * len(rows))).nonzero().flatten()
    if not len(big):
        big = sizes.argmax()[None]
    # the largest cluster is number 0
    big = big[sizes[big].argsort(descending=True)]
    label = torch.full_like(sizes, -1)
    label[big] = torch.arange(len(big), device=data.device)
    labels = label[root]
    kept = labels >= 0
    return Clusters(rows[kept], labels[kept], reach)


def find_gaps(
    clusters: Clusters, draw: Callable[[int], Float[Tensor, "drawn dim"]], reference_points: float
) -> list[Gap]:
    """The gaps along the shortest tree that joins all clusters; those that scattered rows cross are left out.

    `draw(n)`: draws of the reference; `reference_points`: how many of them the bridge sample holds.
    """
    groups = clusters.groups
    if len(groups) < 2:
        return []
    points = draw(20_000).to(clusters.rows)
    to_group = torch.stack([torch.cdist(points, group).amin(1) for group in groups])
    width = {(a, b): float(torch.cdist(groups[a], groups[b]).min()) for a in range(len(groups)) for b in range(a)}
    joined, gaps = {0}, []
    while len(joined) < len(groups):
        pair = min((p for p in width if (p[0] in joined) != (p[1] in joined)), key=width.__getitem__)
        joined |= set(pair)
        if width[pair] < _ISOLATED * clusters.reach:
            continue
        near, far = to_group[pair[0]], to_group[pair[1]]
        between = (near + far <= _DETOUR * width[pair]) & (
            torch.minimum(near, far) > min(clusters.reach, width[pair] / 4)
        )
        gaps.append(Gap(pair[1], pair[0], width[pair], reference_points * float(between.double().mean())))
    return gaps


def _components(linked: Tensor) -> Tensor:
    """Smallest index of each row's connected component, by spreading minima and jumping along them."""
    label = torch.arange(len(linked), device=linked.device)
    none = torch.full_like(label, len(linked))
    while True:
        least = torch.where(linked, label[None, :], none[None, :]).amin(1)
        least = torch.minimum(least, label)
        least = least[least]
        if torch.equal(least, label):
            return label
        label = least
