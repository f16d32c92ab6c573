import math
import sys

import jaxtyping
import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.metrics import precision_recall


def normal(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(x, y, k):
    """Every pair, in exact differences."""

    def share(points, centres):
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = sorted(float((centre - other).norm()) for j, other in enumerate(centres) if j != i)
                if float((point - centre).norm()) <= others[k - 1]:
                    inside += 1
                    break
        return inside / len(points)

    return share(x, y), share(y, x)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("entries", [2**22, 20])
def test_agrees_with_every_pair_by_hand_whatever_the_blocks(monkeypatch, k, entries):
    monkeypatch.setattr(sys.modules["noisewise.metrics.precision_recall"], "_BLOCK_ENTRIES", entries)
    x, y = normal(23, 4, 0), 0.7 * normal(17, 4, 1) + 0.8
    found = precision_recall(x, y, neighbours=k)
    assert (found.precision.value, found.recall.value) == by_hand(x, y, k)
    assert 0 < found.precision.value < 1
    assert (found.precision.n, found.recall.n, found.recall.better) == (23, 17, "higher")


def test_a_line_of_whole_numbers_reaches_as_far_as_its_neighbours():
    # with k = 1 the balls of 0 .. 9 end at distance 1, the end itself included: together they cover [-1, 10]
    data = torch.arange(10.0).reshape(-1, 1)
    draws = torch.tensor([[-1.5], [-1.0], [4.3], [10.0], [10.5]])
    assert precision_recall(draws, data, neighbours=1).precision.value == 3 / 5
    # distances to the nearest other draw are .5, .5, 5.3, .5, .5: all of the data are within 5.3 of 4.3
    assert precision_recall(draws, data, neighbours=1).recall.value == 1


def test_draws_of_one_of_two_clusters_are_precise_and_recall_half():
    left, right = normal(60, 3, 0), normal(60, 3, 1) + 100
    data = torch.cat([left, right])
    some = precision_recall(left, data)
    assert (some.precision.value, some.recall.value) == (1, 0.5)
    # and the other way round: draws in a place without data
    wide = precision_recall(data, left)
    assert (wide.precision.value, wide.recall.value) == (0.5, 1)
    apart = precision_recall(left, right)
    assert (apart.precision.value, apart.recall.value) == (0, 0)


def test_equal_samples_score_one_and_translation_changes_nothing():
    x, y = normal(40, 5, 0), normal(30, 5, 1)
    same = precision_recall(x, x.flip(0))
    assert (same.precision.value, same.recall.value) == (1, 1)
    assert precision_recall(x + 1e6, y + 1e6) == precision_recall(x, y)
    # points that all coincide have balls of radius 0, which they lie in
    ones = torch.ones(5, 2) / 3
    assert precision_recall(ones, ones).recall.value == 1


def test_bad_samples_are_named(monkeypatch):
    x = torch.ones(3, 2)
    with pytest.raises(InvalidInput, match="more than 3 points on each side, got 3 and 9"):
        precision_recall(x, torch.ones(9, 2))
    with pytest.raises(InvalidInput, match="row 0 of x is not finite"):
        precision_recall(x * math.nan, x, neighbours=1)
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidInput, match="neighbours"):
        precision_recall(x, x, neighbours=0)
