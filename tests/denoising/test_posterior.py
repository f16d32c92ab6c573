"""The posterior of each chain's own x_t, sampled by every kernel, has the moments of the closed form."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "sampling"))

from every_kernel import EVERY, seeded

from noisewise import sample
from noisewise.denoising import DenoisingPosterior
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption
from noisewise.sampling import HMC, MALA, TemperedSMC
from noisewise.targets import GaussianMixture
from noisewise.targets.target import Target, check_target

CORRUPTION = Corruption(0.8, 0.9)
X_T = torch.tensor([[0.4, -0.2], [1.6, 0.8], [-2.0, 1.0]], dtype=torch.float64)
GAUSSIAN = GaussianMixture(
    torch.tensor([[0.5, -0.5]], dtype=torch.float64), torch.tensor([[[1.0, 0.5], [0.5, 0.8]]], dtype=torch.float64)
)
MIXTURE = GaussianMixture(
    torch.tensor([[1.2, 0.0], [-1.0, 0.6]], dtype=torch.float64),
    torch.tensor([[[0.6, 0.2], [0.2, 0.4]], [[0.3, -0.1], [-0.1, 0.7]]], dtype=torch.float64),
    torch.tensor([0.35, 0.65], dtype=torch.float64),
)
COPIES = 4000


def exact_draws(target, x_t, generator):
    """One draw of p(x | x_t) for each row: a component, then its Gaussian."""
    weights, means, covariances = target.posterior_components(x_t, CORRUPTION.a, CORRUPTION.s)
    chosen = torch.multinomial(weights, 1, generator=generator).squeeze(-1)
    mean = means[torch.arange(len(x_t)), chosen]
    root = torch.linalg.cholesky(covariances)[chosen]
    eps = torch.randn(x_t.shape, dtype=x_t.dtype, generator=generator)
    return mean + torch.einsum("cij,cj->ci", root, eps)


def assert_moments(draws, target, x_t):
    """`draws` [n, state, dim], independent over n: mean and second moments within 4 standard errors of the closed form."""
    mean, covariance = target.posterior(x_t, CORRUPTION.a, CORRUPTION.s)
    offset = draws - mean
    products = torch.einsum("nsi,nsj->nsij", offset, offset)
    for value, exact in ((offset, torch.zeros_like(mean)), (products, covariance)):
        se = value.std(0) / len(value) ** 0.5
        assert bool(((value.mean(0) - exact).abs() < 4 * se).all()), (value.mean(0) - exact) / se


@pytest.mark.parametrize("name", [name for name in EVERY if "SMC" not in name])
@pytest.mark.parametrize("target", [GAUSSIAN, MIXTURE], ids=["gaussian", "mixture"])
def test_every_kernel_keeps_the_moments_of_each_chains_own_posterior(name, target, shapes_unchecked):
    # from exact draws of each chain's posterior two steps must leave exact draws: a kernel that mixed up whose x_t is
    # whose would drag the three posteriors, which lie standard deviations apart, together
    x_t = X_T.repeat(COPIES, 1)
    posterior = DenoisingPosterior(target, x_t, CORRUPTION)
    kernel, generator = EVERY[name](posterior), seeded(len(name))
    start = exact_draws(target, x_t, generator)
    state = kernel.init(start)
    for _ in range(2):
        state, _ = kernel.step(state, generator)
    assert float((state.position != start).any(-1).double().mean()) > 0.3
    assert_moments(state.position.reshape(COPIES, 3, 2), target, X_T)


@pytest.mark.parametrize("name", ["MALA", "HMC", "DiGS L=5", "DiGS tries=8", "PT HMC", "fitted ladder r=1"])
def test_from_one_wrong_start_each_chain_finds_its_own_posterior(name, shapes_unchecked):
    x_t = X_T.repeat(COPIES // 2, 1)
    kernel, generator = EVERY[name](DenoisingPosterior(MIXTURE, x_t, CORRUPTION)), seeded(1)
    state = kernel.init(torch.zeros_like(x_t))
    for _ in range(60):
        state, _ = kernel.step(state, generator)
    assert_moments(state.position.reshape(-1, 3, 2), MIXTURE, X_T)


def test_it_is_the_posterior_up_to_a_constant_per_observation():
    x = torch.randn((5, 3, 2), dtype=torch.float64, generator=seeded(0))
    posterior = DenoisingPosterior(MIXTURE, X_T, CORRUPTION)
    joint = torch.distributions.Normal(CORRUPTION.a * x, CORRUPTION.s).log_prob(X_T).sum(-1) + MIXTURE.log_prob(x)
    gap = posterior.log_prob(x) - joint
    torch.testing.assert_close(gap, gap[:1].expand_as(gap))
    leaf = x.clone().requires_grad_(True)
    value, score = posterior.log_prob_and_score(x)
    torch.testing.assert_close(value, posterior.log_prob(x))
    torch.testing.assert_close(score, torch.autograd.grad(posterior.log_prob(leaf).sum(), leaf)[0])


def test_rows_repeat_the_chains_and_at_rows_takes_some_of_them():
    x = torch.randn((6, 2), dtype=torch.float64, generator=seeded(0))
    posterior = DenoisingPosterior(MIXTURE, X_T, CORRUPTION)
    values = posterior.log_prob(x)
    for row in range(6):
        alone = DenoisingPosterior(MIXTURE, X_T[row % 3], CORRUPTION)
        torch.testing.assert_close(alone.log_prob(x[row : row + 1]), values[row : row + 1])
    rows = torch.tensor([2, 0])
    torch.testing.assert_close(posterior.at_rows(rows).log_prob(x[rows]), values[rows])
    with pytest.raises(InvalidInput, match="4 rows cannot belong to 3 chains"):
        posterior.log_prob(x[:4])


def test_two_observations_of_one_point_are_one_of_less_noise():
    # the precisions (a / s)^2 add up, and the centres average by them
    first, second = Corruption(1.0, 0.5), Corruption(0.5, 0.5)
    nested = DenoisingPosterior(DenoisingPosterior(MIXTURE, X_T, first), X_T[0], second)
    total = first.r**-2 + second.r**-2
    center = (first.r**-2 * X_T + second.r**-2 * X_T[0] / second.a) / total
    joint = DenoisingPosterior(MIXTURE, center, Corruption(1.0, total**-0.5))
    x = torch.randn((3, 2), dtype=torch.float64, generator=seeded(0))
    torch.testing.assert_close(nested.log_prob_and_score(x)[1], joint.log_prob_and_score(x)[1])
    rows = torch.tensor([1])
    torch.testing.assert_close(
        nested.at_rows(rows).log_prob_and_score(x[rows])[1], joint.log_prob_and_score(x)[1][rows]
    )


def test_a_run_over_observations_is_checked_and_right(shapes_unchecked):
    x_t = X_T.repeat(400, 1)
    posterior = DenoisingPosterior(MIXTURE, x_t, CORRUPTION)
    assert isinstance(posterior, Target)
    draws = sample(HMC(posterior, leapfrogs=4), init=x_t, draws=5, warmup=60, thin=4, progress=False)
    assert_moments(draws.positions[:, -1].reshape(400, 3, 2), MIXTURE, X_T)


def test_a_run_over_one_observation_has_its_moments(shapes_unchecked):
    posterior = DenoisingPosterior(MIXTURE, X_T[1], CORRUPTION)
    assert posterior.chains is None
    start = X_T[1].expand(1500, 2)
    draws = sample(TemperedSMC(posterior, mean=0.0, scale=2.0), init=start, draws=20, warmup=40, progress=False)
    assert_moments(draws.positions[:, -1:].contiguous(), MIXTURE, X_T[1:2])


def test_a_wrong_number_of_chains_is_refused_before_the_run():
    posterior = DenoisingPosterior(MIXTURE, X_T, CORRUPTION)
    with pytest.raises(InvalidInput, match="each of 3 chains, but 6 were started"):
        sample(MALA(posterior), init=X_T.repeat(2, 1), draws=2, progress=False)


def test_smc_refuses_a_density_for_each_chain_and_takes_one():
    posterior = DenoisingPosterior(MIXTURE, X_T, CORRUPTION)
    with pytest.raises(InvalidInput, match="own for each of 3 chains"):
        TemperedSMC(posterior)
    TemperedSMC(DenoisingPosterior(MIXTURE, X_T[0], CORRUPTION))


def test_rows_that_depend_on_each_other_are_still_found_out():
    mixing = DenoisingPosterior(lambda_target(lambda x: -(x - x.mean(0)).square().sum(-1)), X_T, CORRUPTION)
    with pytest.raises(InvalidInput, match="when other chains leave the batch"):
        check_target(mixing, X_T)


def lambda_target(log_prob):
    from noisewise.targets import as_target

    return as_target(log_prob, dim=2)


def test_an_observation_that_cannot_be_is_refused():
    with pytest.raises(InvalidInput, match=r"\(3, 2\)|dim 2"):
        DenoisingPosterior(MIXTURE, torch.zeros(3, dtype=torch.float64), CORRUPTION)
    x_t = X_T.clone()
    x_t[1, 0] = torch.nan
    with pytest.raises(InvalidInput, match="row 1"):
        DenoisingPosterior(MIXTURE, x_t, CORRUPTION)
