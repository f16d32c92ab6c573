import math

import jaxtyping
import pytest
import scipy.stats
import torch

from noisewise.errors import InvalidInput
from noisewise.metrics import energy_distance, mmd2, wasserstein2

DISTANCES = [mmd2, energy_distance, wasserstein2]


def normal(n, dim, seed, dtype=torch.float64, scale=1.0):
    return scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def looped_mmd2(x, y, biased):
    """The recipe of Chen et al. (2024), one pair at a time."""
    pooled = torch.cat([x, y]).tolist()

    def square(u, v):
        return sum((a - b) ** 2 for a, b in zip(u, v, strict=True))

    apart = [square(u, v) for i, u in enumerate(pooled) for j, v in enumerate(pooled) if i != j]
    bandwidth = sum(apart) / len(apart)

    def kernel(u, v):
        return sum(math.exp(-square(u, v) / (bandwidth * 2.0 ** (i - 2))) for i in range(5))

    def within(points):
        pairs = [kernel(u, v) for i, u in enumerate(points) for j, v in enumerate(points) if biased or i != j]
        return sum(pairs) / len(pairs)

    x, y = x.tolist(), y.tolist()
    return within(x) + within(y) - 2 * sum(kernel(u, v) for u in x for v in y) / (len(x) * len(y))


@pytest.mark.parametrize("biased", [True, False])
def test_mmd2_of_draws_that_ran_away_says_so_however_far_they_are(biased):
    # a kernel of width 10 sees nothing of what is 1e4 away, and no more of what is 1e20 away
    x, y = normal(50, 3, 0), normal(60, 3, 1)
    value = {}
    for far in (1e4, 1e20):
        away = x.clone()
        away[:20] = far * torch.arange(1, 21).unsqueeze(-1)
        value[far] = mmd2(away, y, biased=biased, bandwidth=10.0).value
    assert value[1e20] == pytest.approx(value[1e4], rel=1e-9)
    assert value[1e20] > mmd2(x, y, biased=biased, bandwidth=10.0).value + 0.3


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_mmd2_equals_the_double_loop(biased, offset):
    x, y = normal(17, 3, 0) + offset, 2 * normal(23, 3, 1) + 0.5 + offset
    assert mmd2(x, y, biased=biased).value == pytest.approx(looped_mmd2(x, y, biased), abs=1e-11)


def test_tiling_does_not_change_the_sum(monkeypatch):
    x, y = normal(50, 2, 0), normal(37, 2, 1)
    whole = [float(distance(x, y)) for distance in (mmd2, energy_distance)]
    monkeypatch.setattr("noisewise.metrics.distances._TILE_ENTRIES", 7**2)
    assert [float(distance(x, y)) for distance in (mmd2, energy_distance)] == pytest.approx(whole, abs=1e-13)


def test_float32_draws_are_accumulated_in_float64():
    x, y = normal(3000, 2, 0, torch.float32, 20), normal(3000, 2, 1, torch.float32, 20)
    assert mmd2(x, y).value == pytest.approx(mmd2(x.double(), y.double()).value, abs=1e-12)


def test_unbiased_mmd2_is_zero_on_average_for_equal_laws():
    values = torch.tensor(
        [mmd2(normal(40, 2, 2 * s), normal(40, 2, 2 * s + 1), biased=False).value for s in range(200)]
    )
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(200)
    assert values.min() < 0


def test_mmd2_reads_a_given_bandwidth():
    x, y = torch.zeros(1, 1), torch.ones(1, 1)
    expected = 2 * sum(1 - math.exp(-1 / (3 * 2.0 ** (i - 2))) for i in range(5))
    assert mmd2(x, y, bandwidth=3).value == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("distance", DISTANCES)
def test_zero_for_identical_samples_and_symmetric(distance):
    x, y = normal(60, 3, 0), normal(60, 3, 1) + 0.3
    assert distance(x, x.flip(0)).value == pytest.approx(0, abs=1e-7)
    assert distance(x, y).value == pytest.approx(distance(y, x).value, rel=1e-10)
    assert distance(x, y).value > 0


@pytest.mark.parametrize("distance", DISTANCES)
def test_points_that_all_coincide(distance):
    assert distance(torch.ones(4, 2), torch.ones(3, 2)).value == 0


def test_wasserstein2_in_one_dimension_is_the_sorted_formula():
    x, y = normal(200, 1, 0), 3 * normal(200, 1, 1) ** 3
    expected = (x.flatten().sort().values - y.flatten().sort().values).square().mean().sqrt()
    assert wasserstein2(x, y).value == pytest.approx(float(expected), rel=1e-9)


def test_wasserstein2_of_a_translation_is_its_length():
    x = normal(150, 4, 0)
    shift = torch.tensor([3.0, -4.0, 0.0, 12.0], dtype=torch.float64)
    assert wasserstein2(x, x.flip(0) + shift).value == pytest.approx(13.0, rel=1e-10)


def test_energy_distance_in_one_dimension_agrees_with_scipy():
    x, y = normal(80, 1, 0), 2 * normal(90, 1, 1) + 1
    # scipy returns the square root
    expected = scipy.stats.energy_distance(x.flatten().numpy(), y.flatten().numpy()) ** 2
    assert energy_distance(x, y).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("distance", DISTANCES)
def test_bad_samples_are_named(distance, monkeypatch):
    good = torch.ones(3, 2)
    with pytest.raises(InvalidInput, match="row 1 of y"):
        distance(good, torch.tensor([[0.0, 0.0], [math.nan, 1.0]]))
    with pytest.raises(InvalidInput, match="x has no draws"):
        distance(torch.ones(0, 2), good)
    # as users run it: the shape checks of the test suite would raise first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidInput, match="2 coordinates and y has 3"):
        distance(good, torch.ones(3, 3))
    with pytest.raises(InvalidInput, match="flatten chains"):
        distance(torch.ones(2, 3, 2), good)


def test_unbiased_mmd2_needs_two_draws():
    with pytest.raises(InvalidInput, match="2 draws"):
        mmd2(torch.ones(1, 2), torch.ones(3, 2), biased=False)


def test_transport_that_does_not_fit_in_memory_is_refused(monkeypatch):
    monkeypatch.setattr("noisewise.metrics.distances._MAX_TRANSPORT_PAIRS", 100)
    with pytest.raises(InvalidInput, match="subsample"):
        wasserstein2(torch.ones(11, 2), torch.ones(10, 2))


def test_floor_travels_with_the_measurement():
    assert mmd2(torch.ones(2, 1), torch.zeros(2, 1), floor=0.1).floor == 0.1
