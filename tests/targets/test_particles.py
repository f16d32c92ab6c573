"""Particle clusters: known minima, symmetries, the guarded core and the shipped samples."""

import math

import pytest
import torch
from scipy.spatial.distance import pdist

from noisewise.errors import InvalidInput
from noisewise.targets import double_well_4, lennard_jones

CLUSTERS = [
    pytest.param(double_well_4(), 2, id="dw4"),
    pytest.param(lennard_jones(), 3, id="lj13"),
]


def _icosahedron():
    """Centre and twelve vertices at unit distance from it."""
    golden = (1 + math.sqrt(5)) / 2
    vertices = [[0.0, a, b * golden] for a in (-1, 1) for b in (-1, 1)]
    shell = torch.tensor([row[k:] + row[:k] for row in vertices for k in range(3)], dtype=torch.float64)
    return torch.cat([torch.zeros(1, 3, dtype=torch.float64), shell / torch.linalg.vector_norm(shell[0])])


def test_thirteen_particles_reach_the_known_minimum():
    """The global minimum of 13 Lennard-Jones particles is -44.3268 with pairs counted once, -88.6536 here."""
    shape = _icosahedron()
    radii = torch.linspace(0.9, 1.0, 2001, dtype=torch.float64)
    x = (radii[:, None, None] * shape).flatten(1)
    trap = 12 * radii**2 / 2  # the centre of the cluster is its mean
    energy = -lennard_jones().log_prob(x) - trap
    assert float(energy.min()) == pytest.approx(-88.6536, abs=1e-4)


def test_pair_energies_by_hand():
    x = torch.tensor([[0.0, 0, 0, 2.0, 0, 0]], dtype=torch.float64)
    expected = 2 * (2.0**-12 - 2 * 2.0**-6) + 0.5 * (1 + 1)
    assert float(-lennard_jones(2).log_prob(x)) == pytest.approx(expected, rel=1e-12)
    square = torch.tensor([[0.0, 0, 3, 0, 3, 3, 0, 3]], dtype=torch.float64)
    pair = [0.9 * (d - 4) ** 4 - 4 * (d - 4) ** 2 for d in (3, 3, 3, 3, 3 * math.sqrt(2), 3 * math.sqrt(2))]
    assert float(-double_well_4().log_prob(square)) == pytest.approx(sum(pair), rel=1e-12)


@pytest.mark.parametrize(("target", "space"), CLUSTERS)
def test_energy_sees_neither_motion_nor_labels(target, space):
    x = target.reference(20).double()
    generator = torch.Generator().manual_seed(0)
    rotation = torch.linalg.qr(torch.randn(space, space, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(target.particles, generator=generator)
    position = x.reshape(20, target.particles, space)
    value, score = target.log_prob_and_score(x)
    moved_value, moved_score = target.log_prob_and_score((position[:, order] @ rotation + 5.0).flatten(1))
    torch.testing.assert_close(moved_value, value, rtol=1e-9, atol=1e-9)
    expected = (score.reshape(position.shape)[:, order] @ rotation).flatten(1)
    torch.testing.assert_close(moved_score, expected, rtol=1e-7, atol=1e-6)
    # forces between particles cancel
    assert score.reshape(position.shape).sum(1).abs().max() < 1e-9 * score.abs().max()


def test_tether_adds_the_energy_of_the_centre_of_mass_only():
    free, held = double_well_4(), double_well_4(tether=2.0)
    x = free.reference(10).double()
    center = x.reshape(10, 4, 2).mean(1)
    torch.testing.assert_close(free.log_prob(x) - held.log_prob(x), 4 * center.square().sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("target", "space"), CLUSTERS)
def test_coincident_particles_give_no_nan(target, space, dtype):
    x = target.reference(2).to(dtype)
    x[0, space : 2 * space] = x[0, :space]
    x[1] = 0.0
    value, score = target.log_prob_and_score(x)
    assert torch.isfinite(value).all()
    assert torch.isfinite(score).all()
    leaf = x.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(target.log_prob(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, score, rtol=1e-4, atol=1e-3)
    if space == 3:
        assert (value < -1e12).all()


def test_softened_core_is_continuous_and_repels():
    target = lennard_jones(2)
    distance = torch.tensor([0.1 - 1e-7, 0.1 + 1e-7, 0.05], dtype=torch.float64)
    x = torch.zeros(3, 6, dtype=torch.float64)
    x[:, 3] = distance
    value, score = target.log_prob_and_score(x)
    assert float(value[0] / value[1]) == pytest.approx(1, abs=1e-4)
    assert float(score[0, 3] / score[1, 3]) == pytest.approx(1, abs=1e-4)
    assert value[2] < value[0]
    assert (score[:, 3] > 0).all()


@pytest.mark.parametrize(("target", "space"), CLUSTERS)
def test_shipped_samples_belong_to_the_densities(target, space):
    """Stein: E[relative position . score] = -(particles - 1) space; 4 standard errors, draws taken as independent."""
    x = target.reference(10_000).double()
    position = x.reshape(len(x), -1, space)
    relative = (position - position.mean(1, keepdim=True)).flatten(1)
    product = (relative * target.log_prob_and_score(x)[1]).sum(-1)
    assert abs(product.mean() + (target.particles - 1) * space) < 4 * product.std() / 100


def test_shipped_double_wells_agree_with_other_long_runs():
    """Mean energy, mean pair distance, P(d < 4): an independent run's mean and standard error, within 4 of both.

    The DiKL authors' re-run has -22.507, 4.044 and 0.494; a split published earlier, with 3.974, is told apart.
    """
    target = double_well_4()
    x = target.reference(10_000).double()
    distances = target.pair_distances(x)
    found = {
        "energy": (-target.log_prob(x), -22.546, 0.027),
        "distance": (distances.mean(-1), 4.040, 0.019),
        "near": ((distances < 4).double().mean(-1), 0.497, 0.007),
    }
    for values, other, error in found.values():
        assert abs(values.mean() - other) < 4 * math.hypot(float(values.std()) / 100, error)
    mean = found["distance"][0]
    assert abs(mean.mean() - 4.044) < 4 * math.sqrt(2) * mean.std() / 100
    assert abs(mean.mean() - 3.974) > 8 * mean.std() / 100
    assert x.reshape(-1, 4, 2).mean(1).abs().max() < 1e-5


def test_shipped_double_wells_favour_no_label_and_no_direction():
    """By symmetry all coordinates have mean 0 and one variance, and any two particles minus a third of it in common."""
    x = double_well_4().reference(10_000).double()
    assert (x.mean(0).abs() < 4 * x.std(0) / 100).all()
    variance = float(x.square().mean())
    assert ((x.square().mean(0) - variance).abs() < 4 * x.square().std(0) / 100).all()
    product = x[:, 0] * x[:, 2]
    assert abs(product.mean() + variance / 3) < 4 * product.std() / 100


@pytest.mark.parametrize(("target", "space"), CLUSTERS)
def test_energies_of_shipped_clusters_pair_by_pair(target, space):
    """Against scipy's pair distances and the formulas in their textbook form."""
    for x, energy in zip(target.reference(20).double(), -target.log_prob(target.reference(20).double()), strict=True):
        position = x.reshape(-1, space).numpy()
        d = pdist(position)
        if space == 2:
            expected = (0.9 * (d - 4) ** 4 - 4 * (d - 4) ** 2).sum()
        else:
            # both orders of a pair, r_m = 1, and the trap about the mean
            expected = 2 * (d**-12 - 2 * d**-6).sum() + ((position - position.mean(0)) ** 2).sum() / 2
        assert float(energy) == pytest.approx(expected, rel=1e-9)


def test_energies_of_stored_clusters():
    """Recorded for this file of LJ-13 and this one of DW-4: neither the rows nor the densities may change unseen."""
    recorded = [
        (double_well_4(), [-23.80501702, -21.80823033, -21.92898179]),
        (lennard_jones(), [-39.05107144, -38.68756187, -28.82512562]),
    ]
    for target, expected in recorded:
        energy = -target.log_prob(target.reference(3).double())
        assert energy.tolist() == pytest.approx(expected, rel=1e-6)


def test_bad_arguments_are_quoted():
    with pytest.raises(InvalidInput, match="particles must be at least 2, got 1"):
        lennard_jones(1)
    with pytest.raises(InvalidInput, match=r"tether must be .*got -1\.0"):
        double_well_4(tether=-1.0)
    with pytest.raises(InvalidInput, match="holds 10000 reference samples, 10001"):
        lennard_jones().reference(10_001)
    assert not hasattr(lennard_jones(7), "reference")
