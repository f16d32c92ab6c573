"""Metrics of particle clusters: against numpy and scipy, invariances, bounds, and known defects."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance

from noisewise.errors import InvalidInput
from noisewise.metrics import (
    distance_tvd,
    energy_quantiles,
    energy_tvd,
    energy_wasserstein,
    sample_floor,
    symmetrised,
    wasserstein2,
    wasserstein2_modulo,
)
from noisewise.targets import double_well_4, lennard_jones


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def first_coordinate(x):
    """A log density whose energy is the first coordinate."""
    return -x[:, 0]


def moved(x, particles, space):
    return symmetrised(x, particles, space, seeded(9)) + 3.0


@pytest.mark.parametrize("mode", ["full", "paper"])
def test_equal_samples_are_at_zero_and_apart_ones_at_one(mode):
    x = normal(500, 6)
    assert energy_tvd(x, x, first_coordinate, mode=mode).value == 0
    assert distance_tvd(x, x, 3, 2, mode=mode).value == 0
    # two lumps, the reference in both outer bins and x in the middle: no common bin, none of x outside
    reference = torch.cat([torch.full((5, 2), -1.0), torch.full((5, 2), 1.0)])
    assert energy_tvd(torch.zeros(7, 2), reference, first_coordinate, mode=mode).value == 1


def test_the_papers_form_is_numpys_normalised_histogram():
    x, reference = 1.3 * normal(1500, 4) + 0.4, normal(1000, 4, seed=1)
    edges = np.histogram_bin_edges(reference[:, 0].numpy(), 200)
    p, q = (np.histogram(v[:, 0].numpy(), edges, density=True)[0] * np.diff(edges) for v in (x, reference))
    expected = 0.5 * np.abs(p - q).sum()
    assert energy_tvd(x, reference, first_coordinate, mode="paper").value == pytest.approx(expected, abs=1e-12)
    # with a bin on either side for what lies outside
    edges = np.concatenate([[-np.inf], edges, [np.inf]])
    p, q = (np.histogram(v[:, 0].numpy(), edges)[0] / len(v) for v in (x, reference))
    full = energy_tvd(x, reference, first_coordinate)
    assert full.value == pytest.approx(0.5 * np.abs(p - q).sum(), abs=1e-12)
    assert full.n == 1500


def test_the_papers_form_hides_the_worst_draws():
    reference = normal(4000, 2)
    spoilt = reference.clone()
    spoilt[:1000, 0] = 1e9
    assert energy_tvd(spoilt, reference, first_coordinate).value == pytest.approx(0.25, abs=0.01)
    # 3000 of the reference's own draws against all of it: noise alone
    assert energy_tvd(spoilt, reference, first_coordinate, mode="paper").value < 0.06
    every = torch.full((10, 2), 1e9, dtype=torch.float64)
    assert energy_tvd(every, reference, first_coordinate).value == 1
    assert math.isnan(energy_tvd(every, reference, first_coordinate, mode="paper").value)


def test_distances_of_scaled_clusters_by_hand():
    # equilateral triangles of sides 1 and 2 in equal shares; x has sides 1 only
    triangle = torch.tensor([0.0, 0, 1, 0, 0.5, math.sqrt(0.75)], dtype=torch.float64)
    reference = torch.stack([triangle, 2 * triangle])
    x = triangle.expand(4, 6)
    measured = distance_tvd(x, reference, 3, 2, bins=10)
    assert measured.value == pytest.approx(0.5, abs=1e-12)
    assert measured.n == 4
    assert wasserstein2_modulo(2 * x, x, 3, 2).value == pytest.approx(math.sqrt(3 / 3), abs=1e-9)


@pytest.mark.parametrize(("n", "m"), [(400, 400), (300, 517), (1, 5)])
def test_energy_wasserstein_is_scipys(n, m):
    x, reference = 2 * normal(n, 3) + 1, normal(m, 3, seed=1)
    expected = wasserstein_distance(x[:, 0].numpy(), reference[:, 0].numpy())
    assert energy_wasserstein(x, reference, first_coordinate).value == pytest.approx(expected, rel=1e-10)


def test_one_overlap_decides_the_mean_distance_but_no_quantile():
    reference = normal(1000, 2)
    spoilt = reference.clone()
    spoilt[0, 0] = 1e9
    shifted = torch.stack([reference[:, 0] + 0.7, reference[:, 1]], -1)
    assert energy_wasserstein(spoilt, reference, first_coordinate).value == pytest.approx(1e6, rel=1e-4)
    assert energy_wasserstein(shifted, reference, first_coordinate).value == pytest.approx(0.7, rel=1e-9)
    spoilt[0, 0] = math.inf
    assert energy_wasserstein(spoilt, reference, first_coordinate).value == math.inf
    for gap in energy_quantiles(spoilt, reference, first_coordinate).values():
        assert gap.value < 0.4
    for gap in energy_quantiles(shifted, reference, first_coordinate).values():
        assert gap.value == pytest.approx(0.7, rel=1e-9)


def test_quantile_errors_are_those_of_order_statistics():
    """The median of n normal draws has standard error sqrt(pi / 2 n), here sqrt 2 times that for two samples."""
    gap = energy_quantiles(normal(40_000, 1), normal(40_000, 1, seed=1), first_coordinate, (0.5,))[0.5]
    assert gap.se == pytest.approx(math.sqrt(math.pi / 40_000), rel=0.1)
    assert gap.value < 4 * gap.se


@pytest.mark.parametrize(("particles", "space"), [(4, 2), (13, 3)])
def test_neither_motion_nor_labels_are_seen(particles, space):
    x, reference = normal(60, particles * space), 1.1 * normal(60, particles * space, seed=1)
    turned = moved(x, particles, space)
    for metric in (wasserstein2_modulo, distance_tvd):
        before, after = metric(x, reference, particles, space), metric(turned, reference, particles, space)
        assert after.value == pytest.approx(before.value, rel=1e-9)
    assert wasserstein2_modulo(turned, x, particles, space).value < 1e-9
    assert wasserstein2(turned, x).value > 1


def test_symmetrised_draws_are_the_same_clusters():
    target = double_well_4()
    x = normal(200, 8) * 3
    turned = symmetrised(x, 4, 2, seeded())
    torch.testing.assert_close(target.log_prob(turned), target.log_prob(x))
    assert turned.reshape(200, 4, 2).mean(1).abs().max() < 1e-12
    # of one cluster, uniform on its orbit: every particle is everywhere, the mean is 0 and all coordinates are alike
    orbit = symmetrised(x[:1].expand(20_000, 8), 4, 2, seeded(1))
    centred = x[0].reshape(4, 2) - x[0].reshape(4, 2).mean(0)
    variance = float(centred.square().mean())
    assert (orbit.mean(0).abs() < 4 * math.sqrt(variance / 20_000)).all()
    spread = orbit.square()
    assert ((spread.mean(0) - variance).abs() < 4 * spread.std(0) / math.sqrt(20_000)).all()


@pytest.mark.parametrize(("particles", "space"), [(4, 2), (5, 3)])
def test_a_lower_bound_on_transport_with_alignment(particles, space):
    """x moved by known noise, then turned and relabelled: the noise is the cost of one coupling with alignment."""
    x = normal(40, particles * space)
    noise = 0.3 * normal(40, particles * space, seed=2)
    turned = symmetrised(x + noise, particles, space, seeded(3))
    offset = noise.reshape(40, particles, space)
    bound = math.sqrt(float((offset - offset.mean(1, keepdim=True)).square().sum((1, 2)).mean()))
    assert 0.2 * bound < wasserstein2_modulo(turned, x, particles, space).value <= bound


def test_transport_of_sorted_distances_is_scipys_assignment():
    x, reference = normal(50, 8), normal(50, 8, seed=1) + 0.5
    target = double_well_4()
    sorted_distances = [target.pair_distances(v).sort(-1).values / 2 for v in (x, reference)]
    cost = torch.cdist(*sorted_distances).square().numpy()
    expected = math.sqrt(cost[linear_sum_assignment(cost)].mean())
    assert wasserstein2_modulo(x, reference, 4, 2).value == pytest.approx(expected, rel=1e-6)
    shift = torch.tensor([1.0, -2.0, 0.5, 0, 0, 0, 0, 3], dtype=torch.float64)
    assert wasserstein2(x, x + shift).value == pytest.approx(float(shift.norm()), rel=1e-9)


@pytest.mark.parametrize(
    ("target", "space", "noise"), [(double_well_4(), 2, 0.3), (lennard_jones(), 3, 0.03)], ids=["dw4", "lj13"]
)
def test_noisy_clusters_are_far_above_the_floor(target, space, noise):
    reference = target.reference(2000)
    noisy = reference[:1000] + noise * normal(1000, target.dim).to(reference)
    wide = 1.1 * reference[:1000]  # transport of 200 draws sees no small blur

    def excess(metric, x):
        floor = sample_floor(metric, reference, 1000, repeats=3)
        return (metric(x, reference[1000:]).value - floor.mean) / floor.se

    assert excess(lambda x, y: energy_tvd(x, y, target), noisy) > 5
    assert excess(lambda x, y: distance_tvd(x, y, target.particles, space), noisy) > 5
    assert excess(lambda x, y: energy_quantiles(x, y, target, (0.99,))[0.99], noisy) > 5
    assert excess(lambda x, y: wasserstein2_modulo(x[:200], y[:200], target.particles, space), wide) > 5


def test_bad_input_is_quoted():
    x = normal(10, 8)
    with pytest.raises(InvalidInput, match=r"x must have shape \[n, 9\].*got \(10, 8\)"):
        distance_tvd(x, x, 3, 3)
    with pytest.raises(InvalidInput, match=r"mode must be .*got 'clipped'"):
        energy_tvd(x, x, first_coordinate, mode="clipped")
    with pytest.raises(InvalidInput, match="single value 0"):
        energy_tvd(x, torch.zeros(5, 8), first_coordinate)
    with pytest.raises(InvalidInput, match=r"levels .*got 1\.0"):
        energy_quantiles(x, x, first_coordinate, (1.0,))
    spoilt = x.clone()
    spoilt[3, 0] = math.nan
    with pytest.raises(InvalidInput, match=r"row 3 of x is nan \(1 of 10 rows\)"):
        energy_wasserstein(spoilt, x, first_coordinate)
    spoilt[3, 0] = math.inf
    with pytest.raises(InvalidInput, match="row 3 of reference is inf"):
        energy_tvd(x, spoilt, first_coordinate)
    with pytest.raises(InvalidInput, match="one sample is empty"):
        energy_tvd(x[:0], x, first_coordinate)
