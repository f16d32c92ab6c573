"""Three identities, one score: closed forms, no variance where theory says none, and honest standard errors."""

import math

import pytest
import torch

from noisewise.denoising import DenoisingPosterior, denoising_score, mixed_score, target_score
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption
from noisewise.sampling import MALA
from noisewise.targets import GaussianMixture


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def estimates(draws, target, x_t, corruption, log_weights=None):
    scores = target.score(draws)
    return {
        "denoising": denoising_score(draws, x_t, corruption, log_weights),
        "target": target_score(scores, corruption, log_weights),
        "mixed": mixed_score(draws, scores, x_t, corruption, log_weights),
    }


def gaussian_draws(n, variance, x_t, corruption, generator):
    """Exact draws of p(x | x_t) for N(0, v I)."""
    a, s = corruption.a, corruption.s
    noisy = a**2 * variance + s**2
    eps = torch.randn((n, *x_t.shape), dtype=x_t.dtype, generator=generator)
    return a * variance / noisy * x_t + math.sqrt(variance * s**2 / noisy) * eps


@pytest.mark.parametrize("corruption", [Corruption(0.6, 0.8), Corruption(1.0, 0.5), Corruption(0.3, 2.0)])
@pytest.mark.parametrize("variance", [0.25, 1.0, 4.0])
def test_on_a_gaussian_every_identity_gives_the_closed_form_within_its_standard_error(variance, corruption):
    x_t = torch.tensor([[0.3, -2.0], [5.0, 1.0]], dtype=torch.float64)
    target = GaussianMixture(torch.zeros((1, 2), dtype=torch.float64), variance)
    draws = gaussian_draws(4000, variance, x_t, corruption, seeded())
    exact = -x_t / (corruption.a**2 * variance + corruption.s**2)
    for name, (value, se) in estimates(draws, target, x_t, corruption).items():
        assert bool(((value - exact).abs() <= 4 * se + 1e-12).all()), name
    # the spread of each identity is known, so its standard error is too, to 4 of its own errors
    deviation = math.sqrt(variance * corruption.s**2 / (corruption.a**2 * variance + corruption.s**2) / 4000)
    expected = {"denoising": corruption.a / corruption.s**2, "target": 1 / (variance * corruption.a)}
    for name, scale in expected.items():
        se = estimates(draws, target, x_t, corruption)[name].se
        torch.testing.assert_close(se, torch.full_like(se, scale * deviation), rtol=4 / math.sqrt(8000), atol=0)


@pytest.mark.parametrize("corruption", [Corruption(0.6, 0.8), Corruption(0.05, math.sqrt(1 - 0.05**2))])
def test_the_mixed_identity_has_no_variance_on_the_standard_normal(corruption):
    x_t = torch.tensor([[0.3, -2.0], [5.0, 1.0]], dtype=torch.float64)
    target = GaussianMixture(torch.zeros((1, 2), dtype=torch.float64), 1.0)
    draws = torch.randn((3, 2, 2), dtype=torch.float64, generator=seeded())  # any draws, even wrong ones
    value, se = mixed_score(draws, target.score(draws), x_t, corruption)
    torch.testing.assert_close(value, -x_t)
    torch.testing.assert_close(se, torch.zeros_like(se), atol=1e-14, rtol=0)


MIXTURE = GaussianMixture(
    torch.tensor([[1.5, 0.0], [-1.5, 0.5]], dtype=torch.float64),
    torch.tensor([[[1.0, 0.4], [0.4, 0.5]], [[0.5, -0.2], [-0.2, 0.8]]], dtype=torch.float64),
    torch.tensor([0.3, 0.7], dtype=torch.float64),
)


@pytest.mark.parametrize("corruption", [Corruption(0.6, 0.8), Corruption(1.0, 0.7)])
def test_weighted_draws_of_the_likelihood_give_the_score_of_the_noisy_mixture(corruption):
    # N(x; x_t / a, (s / a)^2) as a proposal: the weight is the target itself, up to a constant per state
    x_t = torch.tensor([[0.3, -1.0], [2.0, 1.0], [-3.0, 0.0]], dtype=torch.float64)
    eps = torch.randn((20_000, 3, 2), dtype=torch.float64, generator=seeded(1))
    draws = x_t / corruption.a + corruption.r * eps
    log_weights = MIXTURE.log_prob(draws) + torch.tensor([0.0, 700.0, -900.0], dtype=torch.float64)
    exact = MIXTURE.noisy(corruption.a, corruption.s).score(x_t)
    for name, (value, se) in estimates(draws, MIXTURE, x_t, corruption, log_weights).items():
        assert bool(((value - exact).abs() < 4 * se).all()), name
        assert bool((se < 0.1).all()), name


def test_weighted_standard_errors_are_the_spread_over_repetitions():
    corruption, x_t = Corruption(0.6, 0.8), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    repeats, n = 2000, 200
    eps = torch.randn((n, repeats, 2), dtype=torch.float64, generator=seeded(2))
    draws = x_t / corruption.a + corruption.r * eps
    estimate = denoising_score(draws, x_t.expand(repeats, 2), corruption, MIXTURE.log_prob(draws))
    spread = estimate.value.std(0)
    # 2000 repetitions know a spread to 1.6 %; the delta method leaves terms of order 1 / n
    torch.testing.assert_close(estimate.se.square().mean(0).sqrt(), spread, rtol=0.1, atol=0)


def test_draws_of_a_kernel_on_the_posterior_give_the_score_of_the_noisy_mixture():
    corruption = Corruption(0.6, 0.8)
    x_t = torch.tensor([[0.3, -1.0], [2.0, 1.0]], dtype=torch.float64)
    chains = 1500  # independent chains of each state, all started at exact draws of nothing in particular
    posterior = DenoisingPosterior(MIXTURE, x_t.repeat(chains, 1), corruption)
    kernel, generator = MALA(posterior, step_size=0.2, steps=60), seeded(3)
    state, _ = kernel.step(kernel.init(x_t.repeat(chains, 1) / corruption.a), generator)
    draws = state.position.reshape(chains, 2, 2)
    exact = MIXTURE.noisy(corruption.a, corruption.s).score(x_t)
    for name, (value, se) in estimates(draws, MIXTURE, x_t, corruption).items():
        assert bool(((value - exact).abs() < 4 * se).all()), name


def test_uniform_weights_are_no_weights_and_dead_draws_are_no_draws():
    corruption, x_t = Corruption(0.6, 0.8), torch.tensor([[0.3, -1.0]], dtype=torch.float64)
    draws = torch.randn((50, 1, 2), dtype=torch.float64, generator=seeded(4))
    plain = denoising_score(draws, x_t, corruption)
    uniform = denoising_score(draws, x_t, corruption, torch.full((50, 1), 3.0, dtype=torch.float64))
    for one, other in zip(plain, uniform, strict=True):
        torch.testing.assert_close(one, other)
    # where the target has no mass its score may be nan; the weight says so
    scores, log_weights = -draws, torch.zeros((50, 1), dtype=torch.float64)
    scores[:10], log_weights[:10] = torch.nan, -torch.inf
    kept = target_score(scores[10:], corruption).value
    torch.testing.assert_close(target_score(scores, corruption, log_weights).value, kept)


def test_a_single_draw_has_no_known_error():
    draws = torch.ones((1, 2, 3))
    assert bool((target_score(draws, Corruption(0.6, 0.8)).se == torch.inf).all())


def test_what_is_not_finite_is_named():
    corruption = Corruption(0.6, 0.8)
    draws = torch.zeros((4, 3, 2))
    draws[1, 2, 0] = torch.nan
    with pytest.raises(InvalidInput, match=r"state 2 are not finite \(1 of 3"):
        target_score(draws, corruption)
    log_weights = torch.zeros((4, 3))
    log_weights[:, 1] = -torch.inf
    with pytest.raises(InvalidInput, match="state 1 is -inf"):
        denoising_score(torch.zeros((4, 3, 2)), torch.zeros((3, 2)), corruption, log_weights)
    with pytest.raises(InvalidInput, match="no draws"):
        target_score(torch.zeros((0, 3, 2)), corruption)


@pytest.mark.parametrize("variance", [0.25, 4.0])
def test_the_mixed_identity_told_the_variance_has_none_of_its_own_whatever_the_sigma_of_each_row(variance):
    x_t = torch.tensor([[0.3, -2.0], [5.0, 1.0], [0.1, 0.2]], dtype=torch.float64)
    sigma = torch.tensor([0.01, 1.0, 300.0], dtype=torch.float64)
    target = GaussianMixture(torch.zeros((1, 2), dtype=torch.float64), variance)
    draws = torch.randn((3, 3, 2), dtype=torch.float64, generator=seeded())
    for told in (variance, torch.full_like(sigma, variance)):
        value, se = mixed_score(draws, target.score(draws), x_t, sigma, variance=told)
        torch.testing.assert_close(value, -x_t / (variance + sigma**2).unsqueeze(-1))
        assert bool((se < 1e-14).all())


def test_a_sigma_per_row_is_a_corruption_per_row():
    x_t = torch.tensor([[0.3, -2.0], [5.0, 1.0]], dtype=torch.float64)
    draws = torch.randn((6, 2, 2), dtype=torch.float64, generator=seeded())
    together = estimates(draws, MIXTURE, x_t, torch.tensor([0.2, 3.0], dtype=torch.float64))
    for row, sigma in enumerate((0.2, 3.0)):
        alone = estimates(draws[:, row : row + 1], MIXTURE, x_t[row : row + 1], Corruption(1.0, sigma))
        for name, estimate in alone.items():
            torch.testing.assert_close(together[name].value[row], estimate.value[0])
            torch.testing.assert_close(together[name].se[row], estimate.se[0])
