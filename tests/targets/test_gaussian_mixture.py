"""Gaussian mixtures against torch.distributions, quadrature and their own identities."""

import math
import subprocess
import sys

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.targets import GaussianMixture, gmm40, two_modes
from noisewise.targets.gaussian_mixture import gmm40_test_function

FORMS = ["isotropic", "diagonal", "full"]


def _mixture(form, dim=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    means = 2 * torch.randn(3, dim, generator=generator, dtype=torch.float64)
    root = torch.randn(3, dim, dim, generator=generator, dtype=torch.float64)
    covariances = {
        "isotropic": torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64),
        "diagonal": 0.2 + torch.rand(3, dim, generator=generator, dtype=torch.float64),
        "full": root @ root.mT + 0.3 * torch.eye(dim, dtype=torch.float64),
    }[form]
    return GaussianMixture(means.to(dtype), covariances.to(dtype), [0.2, 0.5, 0.3])


def _grid(low=-25.0, high=25.0, points=1001):
    axis = torch.linspace(low, high, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), float(axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("form", FORMS)
def test_log_prob_agrees_with_torch_distributions(form):
    mixture = _mixture(form, dim=4)
    components = torch.distributions.MultivariateNormal(mixture.means, mixture.full_covariances)
    reference = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(mixture.weights), components)
    x = 4 * torch.randn(50, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(mixture.log_prob(x), reference.log_prob(x), rtol=1e-12, atol=1e-12)
    posterior = (reference.mixture_distribution.logits + components.log_prob(x.unsqueeze(1))).softmax(-1)
    torch.testing.assert_close(mixture.responsibilities(x), posterior)
    assert torch.equal(mixture.component(x), posterior.argmax(-1))


@pytest.mark.parametrize("form", FORMS)
def test_density_mean_and_covariance_by_quadrature(form):
    mixture = _mixture(form)
    grid, area = _grid()
    mass = mixture.log_prob(grid).exp() * area
    assert abs(float(mass.sum()) - math.exp(mixture.log_normalizer)) < 1e-9
    mean = mass @ grid
    torch.testing.assert_close(mixture.mean(), mean)
    torch.testing.assert_close(mixture.covariance(), (grid - mean).T @ ((grid - mean) * mass.unsqueeze(-1)))


@pytest.mark.parametrize("form", FORMS)
def test_moments_of_draws_are_the_closed_form(form):
    mixture = _mixture(form)
    x = mixture.sample(40_000, torch.Generator().manual_seed(0))
    assert ((x.mean(0) - mixture.mean()).abs() < 4 * x.std(0) / len(x) ** 0.5).all()
    offset = x - mixture.mean()
    products = offset.unsqueeze(-1) * offset.unsqueeze(-2)
    assert ((products.mean(0) - mixture.covariance()).abs() < 4 * products.std(0) / len(x) ** 0.5).all()


@pytest.mark.parametrize("form", FORMS)
def test_noisy_is_the_convolution(form):
    """p_t(x_t) = integral of p(x) N(x_t; a x, s^2) dx, by quadrature."""
    mixture, a, s = _mixture(form), 0.6, 0.8
    grid, area = _grid()
    mass = mixture.log_prob(grid).exp() * area
    for x_t in torch.tensor([[0.3, -1.0], [3.0, 2.0]], dtype=torch.float64):
        kernel = (-(x_t - a * grid).square().sum(-1) / (2 * s**2)).exp() / (2 * math.pi * s**2)
        assert float((mass * kernel).sum().log()) == pytest.approx(float(mixture.noisy(a, s).log_prob(x_t)), abs=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_posterior_moments_by_quadrature_and_tweedie(form):
    mixture, a, s = _mixture(form), 0.6, 0.8
    grid, _ = _grid()
    log_prior = mixture.log_prob(grid)
    x_t = torch.tensor([[0.3, -1.0], [3.0, 2.0], [-40.0, 1.0]], dtype=torch.float64)
    mean, covariance = mixture.posterior(x_t, a, s)
    for row in range(2):
        mass = (log_prior - (x_t[row] - a * grid).square().sum(-1) / (2 * s**2)).softmax(0)
        expected = mass @ grid
        torch.testing.assert_close(mean[row], expected)
        torch.testing.assert_close(covariance[row], (grid - expected).T @ ((grid - expected) * mass.unsqueeze(-1)))
    # Tweedie: a E[x | x_t] = x_t + s^2 score(x_t), and the covariance is its derivative, (s^2 / a) d mean / d x_t
    noisy = mixture.noisy(a, s)
    torch.testing.assert_close(a * mean, x_t + s**2 * noisy.score(x_t), rtol=1e-9, atol=1e-9)
    leaf = x_t.clone().requires_grad_(True)
    _, score = noisy.log_prob_and_score(leaf)
    rows = [torch.autograd.grad(score[:, i].sum(), leaf, retain_graph=True)[0] for i in range(2)]
    hessian = torch.stack(rows, 1)
    eye = torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(covariance, s**2 / a**2 * (eye + s**2 * hessian), rtol=1e-8, atol=1e-9)


def test_posterior_components_make_the_posterior_density():
    mixture, a, s = _mixture("full"), 0.6, 0.8
    x_t = torch.tensor([0.3, -1.0], dtype=torch.float64)
    posterior = GaussianMixture(*(mixture.posterior_components(x_t, a, s)[i] for i in (1, 2, 0)))
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bayes = mixture.log_prob(x) - (x_t - a * x).square().sum(-1) / (2 * s**2) - math.log(2 * math.pi * s**2)
    torch.testing.assert_close(posterior.log_prob(x), bayes - mixture.noisy(a, s).log_prob(x_t))


@pytest.mark.parametrize("form", FORMS)
def test_translation_moves_the_density_along(form):
    """Differences are formed first, so a mixture a million units away is as exact as one at the origin."""
    mixture = _mixture(form)
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shift = torch.tensor([2.0**20, -(2.0**20)], dtype=torch.float64)
    moved = GaussianMixture(mixture.means + shift, mixture.covariances, mixture.weights)
    for here, there in zip(mixture.log_prob_and_score(x), moved.log_prob_and_score(x + shift), strict=True):
        torch.testing.assert_close(here, there, rtol=1e-8, atol=1e-8)


def test_forms_of_the_same_covariance_agree():
    mixture = gmm40(torch.float64)
    variance = mixture.covariances[0].item()
    x = 40 * torch.randn(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = mixture.log_prob_and_score(x)
    eye = torch.eye(2, dtype=torch.float64)
    for covariances in (
        variance,
        torch.full((40,), variance),
        torch.full((40, 2), variance),
        variance * eye.unsqueeze(0),
    ):
        given = covariances.double() if isinstance(covariances, torch.Tensor) else covariances
        same = GaussianMixture(mixture.means, given).log_prob_and_score(x)
        torch.testing.assert_close(same, expected, rtol=1e-6, atol=1e-6)


def test_square_second_axis_is_read_as_diagonals():
    """Two components in two dimensions: [2, 2] holds diagonals, not one shared matrix."""
    means = torch.zeros(2, 2)
    variances = torch.tensor([[1.0, 4.0], [9.0, 16.0]])
    torch.testing.assert_close(GaussianMixture(means, variances).full_covariances, torch.diag_embed(variances))


def test_large_batches_go_through_in_parts_unchanged():
    mixture = gmm40()
    x = mixture.sample(5000, torch.Generator().manual_seed(0))
    value, score = mixture.log_prob_and_score(x)
    pieces = [mixture.log_prob_and_score(part) for part in x.split(500)]
    torch.testing.assert_close(value, torch.cat([piece[0] for piece in pieces]))
    torch.testing.assert_close(score, torch.cat([piece[1] for piece in pieces]))


def test_far_points_have_the_score_of_the_nearest_component():
    mixture = two_modes(3, dtype=torch.float64)
    x = torch.tensor([[1e6, 0.0, 0.0]], dtype=torch.float64)
    value, score = mixture.log_prob_and_score(x)
    torch.testing.assert_close(score, mixture.means[1] - x)
    assert torch.isfinite(value).all()


_COMPILE = """
import torch
from noisewise.targets import GaussianMixture
x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
for covariances in (torch.ones(2), torch.ones(2, 3), torch.eye(3).repeat(2, 1, 1)):
    mixture = GaussianMixture(torch.tensor([[0.0, 1, 2], [2, 1, 0]]), covariances, [0.3, 0.7])
    compiled = torch.compile(mixture.log_prob_and_score, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixture.log_prob_and_score(x))
"""


def test_every_form_compiles_without_a_graph_break():
    """In a process of its own: the run-time shape checks of this test run cannot be traced."""
    subprocess.run([sys.executable, "-c", _COMPILE], check=True, timeout=300)


@pytest.mark.parametrize("form", FORMS)
def test_value_and_score_can_be_differentiated(form):
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_mixture(form).log_prob_and_score, x)


def test_to_changes_dtype_of_parameters_and_draws():
    mixture = gmm40().to(dtype=torch.float64)
    assert mixture.sample(3, torch.Generator().manual_seed(0)).dtype == mixture.covariance().dtype == torch.float64


def test_gmm40_means_are_the_published_ones():
    expected = torch.tensor([[-0.2995, 21.4577], [-32.9218, -29.4376], [-15.4062, 10.7263]])
    torch.testing.assert_close(gmm40().means[:3], expected, rtol=0, atol=5e-5)
    assert gmm40().covariances.sqrt()[0].item() == pytest.approx(1.31326, abs=1e-5)
    assert torch.equal(gmm40(torch.float64).means, gmm40().means.double())


def test_gmm40_test_function_has_the_closed_form_expectation():
    f, expectation = gmm40_test_function(torch.float64)
    assert expectation == pytest.approx(1777.886, abs=5e-4)
    values = f(gmm40(torch.float64).sample(100_000, torch.Generator().manual_seed(0)))
    assert abs(values.mean() - expectation) < 4 * values.std() / 100_000**0.5


def test_two_modes_are_apart_by_the_separation_in_any_dimension():
    for dim in (1, 2, 20):
        mixture = two_modes(dim, separation=7.0, scales=(1.0, 0.5))
        assert torch.linalg.vector_norm(mixture.mode_means[1] - mixture.mode_means[0]).item() == pytest.approx(
            7.0, rel=1e-5
        )
        torch.testing.assert_close(mixture.mode_means.sum(0), torch.zeros(dim))
        torch.testing.assert_close(mixture.weights, torch.tensor([0.3, 0.7]))
        torch.testing.assert_close(mixture.covariances, torch.tensor([1.0, 0.25]))


@pytest.mark.parametrize(
    ("means", "covariances", "weights", "message"),
    [
        (torch.zeros(3), 1.0, None, r"means must have shape \[modes, dim\], got \(3,\)"),
        (torch.tensor([[0.0], [math.nan]]), 1.0, None, r"\[nan\] for component 1"),
        (torch.zeros(3, 2), torch.ones(2, 2), None, r"\[3, 2\] \(diagonals\).*got \(2, 2\)"),
        (torch.zeros(3, 2), torch.eye(2).expand(2, 2, 2), None, r"got \(2, 2, 2\)"),
        (torch.zeros(3, 2), -1.0, None, r"above 0, got -1.0 for component 0"),
        (torch.zeros(2, 2), [[1.0, 0.0], [1.0, 1.0]], None, r"\[1.0, 0.0\] for component 0"),
        (torch.zeros(1, 2), [[[1.0, 2.0], [2.0, 1.0]]], None, r"component 0 is not positive definite.*-1"),
        (torch.zeros(1, 2), [[[1.0, 0.5], [0.0, 1.0]]], None, r"not symmetric"),
        (torch.zeros(2, 2), 1.0, [0.5, 0.6], r"sum to 1, got.*sum 1.1"),
        (torch.zeros(2, 2), 1.0, [1.2, -0.2], r"above 0, got"),
        (torch.zeros(2, 2), 1.0, [1.0], r"shape \[2\].*got \(1,\)"),
    ],
)
def test_bad_parameters_are_quoted(means, covariances, weights, message):
    with pytest.raises(InvalidInput, match=message):
        GaussianMixture(means, covariances, weights)


def test_bad_arguments_are_quoted():
    with pytest.raises(InvalidInput, match=r"s must be a finite number above 0, got -1\.0"):
        gmm40().noisy(0.5, -1.0)
    with pytest.raises(InvalidInput, match=r"weights must be two numbers"):
        two_modes(2, weights=(1.0,))
    with pytest.raises(InvalidInput, match=r"separation must be .* got 0\.0"):
        two_modes(2, separation=0.0)
    with pytest.raises(InvalidInput, match=r"float32 or float64, got torch\.float16"):
        gmm40().log_prob(torch.zeros(1, 2, dtype=torch.float16))
