"""Bananas, wells and the funnel against quadrature and their construction."""

import math

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.targets import funnel, many_well, two_bananas, two_modes


def _mass(target, low, high, points=1501):
    axes = [torch.linspace(a, b, points, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*axes)
    area = math.prod(float(axis[1] - axis[0]) for axis in axes)
    return grid, target.log_prob(grid).exp() * area


def test_bananas_keep_mass_and_weights_under_the_bend():
    target = two_bananas(2, scales=(1.0, 0.5), bend=0.7, dtype=torch.float64)
    grid, mass = _mass(target, (-12, -12), (12, 30))
    assert float(mass.sum()) == pytest.approx(1.0, abs=1e-9)
    first = target.component(grid) == 0
    assert float(mass[first].sum()) == pytest.approx(0.3, abs=1e-3)  # the tails of the modes overlap by that much
    for mode, rows in enumerate((first, ~first)):
        mean = mass[rows] @ grid[rows] / mass[rows].sum()
        torch.testing.assert_close(mean, target.mode_means[mode], rtol=0, atol=0.01)


def test_straight_bananas_are_two_modes():
    x = 4 * torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    straight, bent = two_modes(3, dtype=torch.float64), two_bananas(3, bend=0.0, dtype=torch.float64)
    for one, other in zip(straight.log_prob_and_score(x), bent.log_prob_and_score(x), strict=True):
        torch.testing.assert_close(one, other)


def test_banana_draws_have_the_weights_and_the_bent_covariance():
    target = two_bananas(4, separation=30.0, bend=0.5, dtype=torch.float64)
    x = target.sample(40_000, torch.Generator().manual_seed(0))
    label = target.component(x)
    assert abs((label == 0).double().mean() - 0.3) < 4 * math.sqrt(0.21 / 40_000)
    squares = (x[label == 1] - target.mode_means[1]).square()
    expected = torch.tensor([1.0, 1.0 + 2 * 0.5**2, 1.0, 1.0], dtype=torch.float64)  # Var(u^2) = 2
    assert ((squares.mean(0) - expected).abs() < 4 * squares.std(0) / len(squares) ** 0.5).all()


def test_many_well_normaliser_and_oracles():
    target = many_well(32)
    assert target.log_normalizer == pytest.approx(164.69568, abs=5e-6)
    assert target.right_probability == pytest.approx(0.844307, abs=5e-7)
    pair = many_well(2)
    grid, mass = _mass(pair, (-4, -9), (4, 9))
    assert float(mass.sum().log()) == pytest.approx(pair.log_normalizer, abs=1e-9)
    positive = (grid[:, 0] > 0).double() + 0.5 * (grid[:, 0] == 0)
    assert float((mass * positive).sum() / mass.sum()) == pytest.approx(pair.right_probability, abs=1e-4)


def test_many_well_draws_have_the_right_weights_and_energy():
    target = many_well(32, dtype=torch.float64)
    x = target.sample(10_000, torch.Generator().manual_seed(0))
    right = (x[:, 0::2] > 0).double()
    error = math.sqrt(0.844307 * 0.155693 / 160_000)
    assert abs(right.mean() - target.right_probability) < 4 * error
    energy = -target.log_prob(x)
    assert abs(energy.mean() + 137.1985) < 4 * energy.std() / 100


def test_many_well_draws_follow_the_quadrature_distribution():
    """Kolmogorov-Smirnov against the integrated density; 1.95 / sqrt(n) is exceeded once in a thousand."""
    x = many_well(2, dtype=torch.float64).sample(20_000, torch.Generator().manual_seed(5))[:, 0].sort().values
    grid = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    cumulative = ((6 - grid**2) * grid**2 + grid / 2).exp().cumsum(0)
    expected = (cumulative / cumulative[-1])[torch.searchsorted(grid, x).clamp(max=100_000)]
    empirical = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    assert (expected - empirical).abs().max() < 1.95 / math.sqrt(20_000)


def test_funnel_integrates_to_one_and_is_the_product_of_its_conditionals():
    x = torch.tensor([[1.0, 0.5, -2.0]], dtype=torch.float64)
    normal = torch.distributions.Normal
    expected = normal(0.0, 3.0).log_prob(x[0, 0]) + normal(0.0, math.exp(0.5)).log_prob(x[0, 1:]).sum()
    torch.testing.assert_close(funnel(3).log_prob(x)[0], expected.double(), rtol=1e-6, atol=1e-6)
    # substitute x1 = exp(v / 2) u, under which the grid sees every scale
    v = torch.linspace(-24, 24, 801, dtype=torch.float64)
    u = torch.linspace(-9, 9, 801, dtype=torch.float64)
    grid = torch.cartesian_prod(v, u)
    points = torch.stack([grid[:, 0], grid[:, 1] * (grid[:, 0] / 2).exp()], -1)
    mass = (funnel(2).log_prob(points) + grid[:, 0] / 2).exp().sum() * (v[1] - v[0]) * (u[1] - u[0])
    assert float(mass) == pytest.approx(1.0, abs=1e-9)


def test_funnel_neck_gives_no_nan():
    x = torch.zeros(1, 10)
    x[0, 0] = -150.0
    assert all(torch.isfinite(part).all() for part in funnel().log_prob_and_score(x))


def test_bad_arguments_are_quoted():
    with pytest.raises(InvalidInput, match=r"dim must be even.*got 5"):
        many_well(5)
    with pytest.raises(InvalidInput, match="dim must be at least 2, got 1"):
        funnel(1)
    with pytest.raises(InvalidInput, match="dim must be at least 2, got 1"):
        two_bananas(1)
    with pytest.raises(InvalidInput, match="bend must be finite, got inf"):
        two_bananas(2, bend=math.inf)
