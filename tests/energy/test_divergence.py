"""Divergences of known densities: blindness and its cure, quadrature, limits, and what objects are accepted."""

import math

import pytest
import torch

from noisewise.energy import fisher_divergence, gaussian_reference, mixture_fisher_divergence
from noisewise.energy.losses import mixture_log_prob
from noisewise.energy.network import score_of
from noisewise.errors import InvalidInput
from noisewise.targets import GaussianMixture

F64 = torch.float64


def mixture(left, gap=3.0):
    return GaussianMixture(torch.tensor([[-gap], [gap]], dtype=F64), 1.0, torch.tensor([left, 1 - left], dtype=F64))


def gaussian(mean, variance):
    return GaussianMixture(torch.tensor([[mean]], dtype=F64), variance)


def reference(p):
    return gaussian_reference(p.sample(2000, torch.Generator().manual_seed(8)))


def quadrature(p, q, m, beta):
    x = torch.linspace(-25, 25, 8001, dtype=F64)[:, None]
    bridged = [lambda y, d=d: -mixture_log_prob(d.log_prob(y), m.log_prob(y), beta) for d in (p, q)]
    difference = score_of(bridged[0], x) - score_of(bridged[1], x)
    return float(((-bridged[0](x)).exp() * difference.detach().square().sum(1) / 2).sum() * 50 / 8000)


def test_the_fisher_divergence_is_blind_where_the_mixture_divergence_sees():
    # oracle 1; KL(p || q) -> a log(a/b) + (1-a) log((1-a)/(1-b)) for disjoint modes
    p, q = mixture(0.2, gap=8.0), mixture(0.5, gap=8.0)
    m = reference(p)
    assert float(fisher_divergence(p, q)) < 1e-6
    seen = mixture_fisher_divergence(p, q, m, 0.8)
    assert seen.value > 4 * seen.se > 0
    x = p.sample(100_000, torch.Generator().manual_seed(0))
    kl = 0.2 * math.log(0.2 / 0.5) + 0.8 * math.log(0.8 / 0.5)
    ratio = p.log_prob(x) - q.log_prob(x)
    assert abs(ratio.mean().item() - kl) < 4 * ratio.std().item() / math.sqrt(len(x))


@pytest.mark.parametrize("beta", [0.3, 0.8, 1])
def test_no_density_diverges_from_itself(beta):
    p = mixture(0.2)
    assert float(mixture_fisher_divergence(p, p, reference(p), beta)) < 1e-25


@pytest.mark.parametrize("beta", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("left", [0.5, 0.9])
def test_monte_carlo_agrees_with_quadrature(beta, left):
    # oracle 2
    p, q = mixture(0.2), mixture(left)
    m = reference(p)
    found = mixture_fisher_divergence(p, q, m, beta, n=40_000)
    assert abs(found.value - quadrature(p, q, m, beta)) < 4 * found.se


def test_the_standard_error_is_the_spread_of_repeats():
    p, q = mixture(0.2), mixture(0.5)
    m = reference(p)
    found = [mixture_fisher_divergence(p, q, m, 0.8, n=2000, seed=seed) for seed in range(60)]
    spread = torch.tensor([f.value for f in found]).std().item()
    # 60 repeats know a standard deviation to 9 %
    assert sum(f.se for f in found) / 60 == pytest.approx(spread, rel=0.36)


def test_beta_one_is_the_fisher_divergence_bit_for_bit():
    # oracle 3
    p, q = mixture(0.2), mixture(0.7, gap=2.0)
    assert mixture_fisher_divergence(p, q, reference(p), 1, seed=4).value == fisher_divergence(p, q, seed=4).value


def test_with_the_data_as_their_own_reference_it_is_the_weighted_score_difference():
    # oracle 3: m = p gives p~ = p and E_p w^2 |s_p - s_q|^2 / 2 with w = beta q / (beta q + (1 - beta) p)
    p, q, beta = mixture(0.2), mixture(0.6, gap=2.0), 0.7
    x = torch.linspace(-25, 25, 8001, dtype=F64)[:, None]
    log_p, log_q = p.log_prob(x), q.log_prob(x)
    w = (math.log(beta) + log_q - mixture_log_prob(log_q, log_p, beta)).exp()[:, None]
    terms = (w * (p.score(x) - q.score(x))).square().sum(1) / 2
    expected = float((log_p.exp() * terms).sum() * 50 / 8000)
    assert quadrature(p, q, p, beta) == pytest.approx(expected, rel=1e-9)
    found = mixture_fisher_divergence(p, q, p, beta, n=40_000)
    assert abs(found.value - expected) < 4 * found.se


def test_two_gaussians_have_the_closed_form():
    # scores -(x - a)/v and -(x - b)/w: for v = w = 1 the difference is the constant b - a
    found = fisher_divergence(gaussian(0.5, 1.0), gaussian(2.0, 1.0))
    assert found.value == pytest.approx(1.5**2 / 2, rel=1e-12)
    wide = fisher_divergence(gaussian(0.0, 1.0), gaussian(0.0, 2.0), n=100_000)
    assert abs(wide.value - 0.5**2 / 2) < 4 * wide.se


def test_the_mixture_score_of_gaussians_is_the_finite_difference_of_its_log_density():
    # oracle 4
    q, m, beta = gaussian(0.5, 0.7), gaussian(-0.3, 2.0), 0.6
    x = torch.linspace(-4, 4, 41, dtype=F64)[:, None]
    log_mixed = lambda y: mixture_log_prob(q.log_prob(y), m.log_prob(y), beta)  # noqa: E731
    weight = (math.log(beta) + q.log_prob(x) - log_mixed(x)).exp()[:, None]
    coded = weight * q.score(x) + (1 - weight) * m.score(x)
    step = 1e-5
    assert torch.allclose(coded[:, 0], (log_mixed(x + step) - log_mixed(x - step)) / (2 * step), atol=1e-6)
    assert torch.allclose(coded, score_of(lambda y: -log_mixed(y), x).detach(), atol=1e-12)


def test_less_data_in_the_mixture_sees_less():
    # the limit beta -> 0 is of order beta^2
    p, q = mixture(0.2), mixture(0.5)
    m = reference(p)
    low, lower = (quadrature(p, q, m, beta) for beta in (0.02, 0.01))
    assert low / lower == pytest.approx(4, rel=0.1)


def test_torch_distributions_and_plain_log_densities_are_accepted():
    p = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    q = torch.distributions.MultivariateNormal(torch.ones(2, dtype=F64), torch.eye(2, dtype=F64))
    assert fisher_divergence(p, q).value == pytest.approx(1.0, rel=1e-12)
    same = mixture_fisher_divergence(p, p, q, 0.5)
    assert same.value < 1e-25
    given = fisher_divergence(p, q, samples=torch.zeros(3, 2, dtype=F64))
    assert given.n == 3
    assert given.value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        (lambda p: mixture_fisher_divergence(p, p, p, 0.0), "0.0"),
        (lambda p: mixture_fisher_divergence(p, p, p, 1.5), "1.5"),
        (lambda p: mixture_fisher_divergence(p, p, object(), 0.5), "log_prob and sample"),
        (lambda p: fisher_divergence(object(), p), "sample"),
        (lambda p: fisher_divergence(p, object()), "log_prob"),
    ],
)
def test_what_cannot_work_is_named(call, quoted):
    with pytest.raises(InvalidInput, match=quoted):
        call(mixture(0.2))
