"""Taking the reference out of the bridge: exact in, exact out; what is negative is measured (oracle 7)."""

import math

import pytest
import torch

from noisewise.energy.bridged import Bridged, Proposal, corrected_log_prob
from noisewise.energy.gaps import find_clusters, find_gaps
from noisewise.energy.losses import mixture_log_prob
from noisewise.energy.normalizer import LogNormalizer
from noisewise.energy.reference import gaussian_reference
from noisewise.targets import GaussianMixture

F64 = torch.float64
BETA = 0.8
P = GaussianMixture(torch.tensor([[-4.0], [4.0]], dtype=F64), 1.0, torch.tensor([0.2, 0.8], dtype=F64))
M = gaussian_reference(P.sample(10_000, torch.Generator().manual_seed(0)))
PROPOSAL = Proposal.around(
    find_clusters(P.sample(10_000, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0)), M
)
GRID = torch.linspace(-20, 20, 8001, dtype=F64)[:, None]
DX = 40 / 8000


def exact(x):
    return mixture_log_prob(P.log_prob(x), M.log_prob(x), BETA)


def wiggled(x):
    """The bridge times a factor with mean about 1, so that it falls short of its share of m in places."""
    return exact(x) + 0.8 * torch.sin(3 * x[:, 0])


def bridge(log_q, floor=0.0):
    log_z = float(torch.logsumexp(log_q(GRID), 0)) + math.log(DX)
    return Bridged(lambda x: -log_q(x), M, BETA, LogNormalizer(log_z, 0.01, 100), floor)


def test_the_exact_bridge_gives_the_density_of_the_data():
    # where the data hold at least a thousandth of the mixture; beyond, subtraction has lost the digits
    held = P.log_prob(GRID) > M.log_prob(GRID) - 7
    found = corrected_log_prob(exact(GRID), M.log_prob(GRID), BETA)
    assert held.sum() > 2000
    assert torch.allclose(found[held], P.log_prob(GRID)[held], atol=1e-10)


def test_the_negative_mass_is_that_of_quadrature():
    found = bridge(wiggled)
    log_q = found.log_prob(GRID)
    difference = (log_q.exp() - (1 - BETA) * M.log_prob(GRID).exp()) / BETA
    negative, total = float((-difference).clamp(min=0).sum() * DX), float(difference.clamp(min=0).sum() * DX)
    mass = found.mass(*PROPOSAL.draw(200_000, torch.Generator().manual_seed(1)))
    assert negative > 0.01
    assert abs(mass.negative - negative) < 4 * mass.se
    assert abs(mass.signed - 1) < 4 * mass.signed_se
    # what is above zero exceeds 1 by what is below
    assert abs(mass.total - total) < 4 * mass.signed_se


def test_a_wrong_normaliser_shows_as_another_mass():
    right = bridge(wiggled)
    wrong = Bridged(right.energy, M, BETA, LogNormalizer(right.normalizer.value - math.log(1.5), 0.01, 100), 0.0)
    mass = wrong.mass(*PROPOSAL.draw(200_000, torch.Generator().manual_seed(1)))
    assert abs(mass.signed - (1.5 - (1 - BETA)) / BETA) < 4 * mass.signed_se
    found = Bridged(wrong.energy, M, BETA, wrong.normalizer, 0.0, mass.total)
    assert float(found.log_density(GRID).exp().sum() * DX) == pytest.approx(1, abs=4 * mass.signed_se)


@pytest.mark.parametrize("spread", [1.0, 0.02])
def test_the_proposal_weighs_its_draws_exactly(spread):
    # E_g[m / g] = 1, and m / g is bounded, also where the clusters are far narrower than m
    data = spread * torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=F64)
    data[:500] += 3.0
    m = gaussian_reference(data)
    proposal = Proposal.around(find_clusters(data, torch.Generator().manual_seed(0)), m)
    drawn, log_share = proposal.draw(100_000, torch.Generator().manual_seed(1))
    share = log_share.exp()
    assert float(share.max()) <= 2
    assert abs(float(share.mean()) - 1) < 4 * float(share.std()) / 100_000**0.5
    for column in range(2):
        mean = share * drawn[:, column]
        assert abs(float(mean.mean() - m.mean[column])) < 4 * float(mean.std()) / 100_000**0.5


@pytest.mark.parametrize("floor", [0.0, 1e-3, 0.05])
def test_floored_and_renormalised_it_integrates_to_one(floor):
    raw = bridge(wiggled, floor)
    mass = raw.mass(*PROPOSAL.draw(400_000, torch.Generator().manual_seed(2)))
    found = Bridged(raw.energy, M, BETA, raw.normalizer, floor, mass.total)
    assert float(found.log_density(GRID).exp().sum() * DX) == pytest.approx(1, abs=4 * mass.signed_se)
    least = (found.log_density(GRID) - M.log_prob(GRID)).exp().min().item()
    assert least == pytest.approx(floor / mass.total, abs=1e-12)


def test_importance_weights_are_the_ratio_of_densities():
    found = bridge(exact, 1e-3)
    x, log_share = PROPOSAL.draw(100, torch.Generator().manual_seed(3))
    log_g = M.log_prob(x) - log_share
    assert torch.allclose(found.weights(x, log_share).log(), found.log_density(x) - log_g, atol=1e-9)


def test_the_score_of_the_data_is_untangled_from_the_two_others():
    # (s_q - (1 - w) s_m) / w with w the share of the data in the bridge
    found = Bridged(lambda y: -exact(y), M, BETA, LogNormalizer(0.0, 0.01, 100), 0.0)
    x = torch.linspace(-6, 6, 50, dtype=F64)[:, None]
    w = (math.log(BETA) + P.log_prob(x) - exact(x)).exp()[:, None]
    leaf = x.clone().requires_grad_(True)
    (s_q,) = torch.autograd.grad(exact(leaf).sum(), leaf)
    untangled = (s_q - (1 - w) * M.score(x)) / w
    assert torch.allclose(found.score(x).detach(), untangled, rtol=1e-7)
    assert torch.allclose(found.score(x).detach(), P.score(x), atol=1e-7)


def test_where_nothing_is_left_the_floor_has_the_gradient_of_the_reference():
    found = bridge(lambda x: M.log_prob(x) + math.log(1 - BETA) - 0.1, 1e-3)
    raw = Bridged(found.energy, M, BETA, LogNormalizer(0.0, 0.01, 100), 1e-3)
    x = torch.linspace(-6, 6, 20, dtype=F64)[:, None]
    assert torch.allclose(raw.score(x).detach(), M.score(x), atol=1e-12)
    none = Bridged(found.energy, M, BETA, LogNormalizer(0.0, 0.01, 100), 0.0)
    assert torch.isneginf(none.log_density(x)).all()


def test_a_constant_in_the_energy_changes_nothing_but_the_normaliser():
    # oracle 8
    plain, shifted = bridge(wiggled, 1e-3), bridge(lambda x: wiggled(x) + 7.0, 1e-3)
    assert shifted.normalizer.value - plain.normalizer.value == pytest.approx(7.0)
    assert torch.allclose(plain.log_density(GRID), shifted.log_density(GRID), atol=1e-9)


# --- gaps


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_one_cloud_has_no_gap_and_far_clusters_are_told_apart(dim):
    cloud = GaussianMixture(torch.zeros(1, dim, dtype=F64), 1.0)
    apart = GaussianMixture(
        torch.stack([torch.full((dim,), v, dtype=F64) for v in (-5.0, 5.0)]), 1.0, torch.tensor([0.1, 0.9], dtype=F64)
    )
    generator = torch.Generator().manual_seed(4)
    for target, number in ((cloud, 1), (apart, 2)):
        rows = target.sample(4000, generator)
        clusters = find_clusters(rows, generator)
        m = gaussian_reference(rows)
        gaps = find_gaps(clusters, lambda n, m=m: m.sample(n, generator), 1000.0)
        assert len(gaps) == number - 1
        if gaps:
            assert clusters.number == 2
            # the larger one is number 0
            assert (clusters(target.means.flip(0)) == torch.tensor([0, 1])).all()


def test_reference_points_in_a_gap_are_counted_as_quadrature_has_them():
    rows = P.sample(4000, torch.Generator().manual_seed(5))
    clusters = find_clusters(rows, torch.Generator().manual_seed(6))
    (gap,) = find_gaps(clusters, lambda n: M.sample(n, torch.Generator().manual_seed(7)), 1000.0)
    left = float(clusters.rows[clusters.labels == 1].max())
    right = float(clusters.rows[clusters.labels == 0].min())
    assert gap.width == pytest.approx(right - left)
    margin = min(clusters.reach, gap.width / 4)
    inside = (GRID[:, 0] > left + margin) & (GRID[:, 0] < right - margin)
    expected = 1000 * float(M.log_prob(GRID)[inside].exp().sum() * DX)
    assert gap.points == pytest.approx(expected, rel=0.1)
