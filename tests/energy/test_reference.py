"""References: normalised, drawn from the density that they state, matched to the data's moments."""

import math

import pytest
import scipy.stats
import torch

from noisewise.energy import gaussian_reference, student_t_reference
from noisewise.energy.reference import Rescaled, as_reference, check_covers
from noisewise.errors import InvalidInput

F64 = torch.float64


def data(n=4000):
    eps = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
    return eps @ torch.tensor([[2.0, 0.0], [1.5, 0.5]], dtype=F64).T + torch.tensor([1.0, -3.0], dtype=F64)


@pytest.mark.parametrize("inflate", [1.0, 1.5])
def test_densities_agree_with_scipy(inflate):
    x = data()
    mean, covariance = x.mean(0).numpy(), inflate**2 * torch.cov(x.T).numpy()
    normal = scipy.stats.multivariate_normal(mean, covariance)
    assert torch.allclose(gaussian_reference(x, inflate).log_prob(x), torch.from_numpy(normal.logpdf(x)), atol=1e-10)
    t = scipy.stats.multivariate_t(mean, covariance * 5 / 7, df=7)
    assert torch.allclose(student_t_reference(x, 7, inflate).log_prob(x), torch.from_numpy(t.logpdf(x)), atol=1e-10)


@pytest.mark.parametrize("make", [gaussian_reference, lambda x: student_t_reference(x, degrees=9)])
def test_score_is_the_gradient_and_draws_have_the_moments_of_the_data(make):
    x = data()
    m = make(x)
    leaf = x[:50].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(m.log_prob(leaf).sum(), leaf)
    assert torch.allclose(m.score(x[:50]), gradient, atol=1e-12)
    draws = m.sample(200_000, torch.Generator().manual_seed(1))
    assert torch.allclose(draws.mean(0), x.mean(0), atol=4 * 2.5 / math.sqrt(len(draws)))
    assert torch.allclose(torch.cov(draws.T), torch.cov(x.T), rtol=0.04)


def test_a_t_with_many_degrees_is_a_gaussian():
    x = data(500)
    assert torch.allclose(student_t_reference(x, 1e7).log_prob(x), gaussian_reference(x).log_prob(x), atol=1e-4)


def test_a_rescaled_reference_carries_its_jacobian():
    x = data(200)
    shift, scale = x.mean(0), x.std(0)
    z = (x - shift) / scale
    seen = Rescaled(gaussian_reference(x), shift, scale)
    assert torch.allclose(seen.log_prob(z), gaussian_reference(z).log_prob(z), atol=1e-10)
    assert torch.allclose(seen.score(z), gaussian_reference(z).score(z), atol=1e-10)


def test_a_torch_distribution_draws_without_the_global_generator():
    m = as_reference(torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)))
    before = torch.get_rng_state()
    first, again = (m.sample(5, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_support_that_misses_rows_names_them():
    box = torch.distributions.Independent(torch.distributions.Uniform(torch.zeros(2), torch.ones(2)), 1)
    inside = torch.full((5, 2), 0.5)
    check_covers(as_reference(box), inside)
    inside[3, 1] = 1.5
    with pytest.raises(InvalidInput, match=r"1 of 5 rows \(3\)"):
        check_covers(as_reference(box), inside)


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        (lambda x: gaussian_reference(x[:1]), "at least 2 rows"),
        (lambda x: gaussian_reference(x, 0.0), "inflate"),
        (lambda x: gaussian_reference(torch.cat([x, x[:, :1] + 1], 1)), "linear combinations"),
        (lambda x: gaussian_reference(torch.cat([x, torch.ones(len(x), 1, dtype=F64)], 1)), "column 2"),
        (lambda x: student_t_reference(x, 2.0), "2.0"),
        (lambda x: as_reference(torch.tanh), "log_prob and sample"),
        (lambda x: as_reference(torch.distributions.Normal), "torch.distributions"),
    ],
)
def test_what_cannot_work_is_named(call, quoted):
    with pytest.raises(InvalidInput, match=quoted):
        call(data(50))
