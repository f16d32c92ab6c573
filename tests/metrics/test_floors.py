import math

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.metrics import mode_weights, sample_floor, total_variation, wasserstein2


def standard_normal(n, generator):
    return torch.randn(n, 2, generator=generator, dtype=torch.float64)


def mean_square_gap(x, y):
    return float((x.mean(0) - y.mean(0)).square().sum())


def test_floor_of_a_mean_is_its_closed_form():
    # two independent means over 50 and 200 draws in 2-D: E|gap|^2 = 2 (1/50 + 1/200)
    floor = sample_floor(mean_square_gap, standard_normal, 50, n_reference=200, repeats=400, seed=1)
    assert floor.mean == pytest.approx(2 * (1 / 50 + 1 / 200), abs=4 * floor.se)
    assert floor.se < 0.1 * floor.mean


def test_floor_of_total_variation_of_two_equal_modes():
    means = torch.tensor([[-9.0, 0.0], [9.0, 0.0]], dtype=torch.float64)

    def sampler(n, generator):
        return means[torch.randint(2, (n,), generator=generator)]

    truth = torch.tensor([0.5, 0.5])
    floor = sample_floor(
        lambda x, y: total_variation(mode_weights(x, means), truth), sampler, 100, n_reference=1, repeats=300
    )
    # E|w - 1/2| of a binomial share, from its own distribution
    expected = sum(math.comb(100, k) * abs(k / 100 - 0.5) for k in range(101)) / 2**100
    assert floor.mean == pytest.approx(expected, abs=4 * floor.se)


def test_tensor_reference_is_split_into_disjoint_rows():
    rows = torch.arange(30, dtype=torch.float64)[:, None]

    def overlap(x, y):
        assert (len(x), len(y)) == (10, 20)
        return float(len(set(x.flatten().tolist()) & set(y.flatten().tolist())))

    assert sample_floor(overlap, rows, 10, repeats=5).mean == 0


def test_seed_decides_the_floor_and_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    first = sample_floor(wasserstein2, standard_normal, 20, repeats=3, seed=5)
    assert first == sample_floor(wasserstein2, standard_normal, 20, repeats=3, seed=5)
    assert first != sample_floor(wasserstein2, standard_normal, 20, repeats=3, seed=6)
    assert torch.equal(state, torch.random.get_rng_state())


def test_too_few_exact_draws():
    with pytest.raises(InvalidInput, match="40 rows"):
        sample_floor(mean_square_gap, torch.zeros(30, 2), 20, n_reference=20)
