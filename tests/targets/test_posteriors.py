"""The two data posteriors of the zoo: the Bayesian network and the posteriordb mixture."""

import math

import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.targets import bnn, posteriordb_mixture

NORMAL = torch.distributions.Normal


def _network(theta, x):
    """The network as its formula says, one draw at a time."""
    first, bias, last = theta[:500].reshape(20, 25), theta[500:525], theta[525:]
    return (x @ first / math.sqrt(20) + 0.1 * bias).relu() @ last / math.sqrt(25)


def test_network_density_is_prior_times_likelihood():
    target = bnn(dtype=torch.float64)
    theta = torch.randn(4, 550, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.stack(
        [
            NORMAL(_network(row, target.train.x), 0.1).log_prob(target.train.y).sum()
            + NORMAL(0.0, 1.0).log_prob(row).sum()
            for row in theta
        ]
    )
    value = target.log_prob(theta)
    torch.testing.assert_close(value - value[0], expected - expected[0], rtol=1e-10, atol=1e-7)


def test_network_metrics_are_those_of_the_formula():
    target = bnn(dtype=torch.float64)
    theta = target.true_parameters + 0.01 * torch.randn(
        3, 550, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    likelihood = torch.stack([NORMAL(_network(row, target.test.x), 0.1).log_prob(target.test.y) for row in theta])
    torch.testing.assert_close(target.test_nll(theta), -likelihood.mean(-1))
    torch.testing.assert_close(target.log_predictive(theta), likelihood.exp().mean(0).log().mean())


def test_true_parameters_predict_at_the_noise_level():
    """Their test NLL is log(0.1) + log(2 pi) / 2 + 1 / 2 within 4 standard errors of chi^2 / 2."""
    target = bnn()
    expected = math.log(0.1) + math.log(2 * math.pi) / 2 + 0.5
    nll = float(target.test_nll(target.true_parameters.unsqueeze(0)))
    assert abs(nll - expected) < 4 * math.sqrt(0.5 / 500)
    assert target.names[0] == "W1[0,0]"
    assert target.names[-1] == "w2[24]"


def test_seed_draws_another_problem():
    assert torch.equal(bnn(seed=3).train.y, bnn(seed=3).train.y)
    assert not torch.equal(bnn(seed=3).train.y, bnn(seed=4).train.y)
    with pytest.raises(InvalidInput, match="seed must be at least 0, got -1"):
        bnn(seed=-1)


def test_mixture_density_is_the_model_of_the_stan_file():
    """Against torch.distributions, with the Jacobian of exp and sigmoid, up to the priors' constants."""
    target = posteriordb_mixture()
    x = target.reference(5) + 0.3 * torch.randn(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mu1, mu2, sigma1, sigma2, theta = target.constrain(x).unbind(-1)
    y = target.data.unsqueeze(-1)
    likelihood = torch.logaddexp(
        theta.log() + NORMAL(mu1, sigma1).log_prob(y), (1 - theta).log() + NORMAL(mu2, sigma2).log_prob(y)
    ).sum(0)
    prior = sum(NORMAL(0.0, 2.0).log_prob(value) for value in (mu1, mu2, sigma1, sigma2))
    prior = prior + torch.distributions.Beta(5.0, 5.0).log_prob(theta)
    jacobian = sigma1.log() + sigma2.log() + theta.log() + (1 - theta).log()
    expected = likelihood + prior + jacobian
    value = target.log_prob(x)
    torch.testing.assert_close(value - value[0], expected - expected[0], rtol=1e-10, atol=1e-7)


@pytest.mark.parametrize("collapse", [True, False])
def test_reference_draws_belong_to_the_density(collapse):
    """E[score] = 0 and E[x_i score_i] = -1 over the reference draws, each within 4 standard errors."""
    target = posteriordb_mixture(collapse)
    x = target.reference(10_000)
    score = target.log_prob_and_score(x)[1]
    error = score.std(0) / 100
    assert (score.mean(0).abs() < 4 * error).all()
    product = x * score
    assert ((product.mean(0) + 1).abs() < 4 * product.std(0) / 100).all()


def test_swapping_labels_changes_nothing_but_the_score_order():
    target = posteriordb_mixture()
    x = target.reference(20)
    swapped = target.swap_labels(x)
    value, score = target.log_prob_and_score(x)
    swapped_value, swapped_score = target.log_prob_and_score(swapped)
    torch.testing.assert_close(swapped_value, value, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(swapped_score, target.swap_labels(score), rtol=1e-8, atol=1e-7)
    natural = target.constrain(swapped)
    torch.testing.assert_close(natural[:, 4], 1 - target.constrain(x)[:, 4])


def test_reference_has_both_label_modes_equally():
    target = posteriordb_mixture()
    parameters = target.constrain(target.reference(10_000))
    share = (parameters[:, 0] < parameters[:, 1]).double().mean()
    assert abs(share - 0.5) < 4 * 0.005
    assert (parameters[:, 0].sign() != parameters[:, 1].sign()).all()
    assert torch.equal(target.reference(50, seed=1), target.reference(50, seed=1))
    assert not torch.equal(target.reference(50, seed=1), target.reference(50, seed=2))


def test_ordered_reference_is_the_same_data_in_one_mode():
    ordered, free = posteriordb_mixture(collapse=False), posteriordb_mixture()
    parameters = ordered.constrain(ordered.reference(10_000))
    assert (parameters[:, 0] < parameters[:, 1]).all()
    both = free.constrain(free.reference(10_000))
    torch.testing.assert_close(both[:, :2].min(-1).values.mean(), parameters[:, 0].mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("collapse", [True, False])
def test_unconstrain_inverts_constrain(collapse):
    target = posteriordb_mixture(collapse)
    x = target.reference(50)
    torch.testing.assert_close(target.unconstrain(target.constrain(x)), x, rtol=1e-9, atol=1e-9)


def test_extreme_parameters_stay_finite():
    """Tiny and huge widths and weights: no NaN, and float32 as float64."""
    target = posteriordb_mixture()
    x = torch.tensor([[0.0, 0, -6, 5, 30], [50.0, -50, -6, -6, 0], [0.0, 0, 0, 0, -60]])
    for rows in (x, x.double()):
        value, score = target.log_prob_and_score(rows)
        assert torch.isfinite(value).all()
        assert torch.isfinite(score).all()


def test_bad_arguments_are_quoted():
    target = posteriordb_mixture()
    with pytest.raises(InvalidInput, match=r"sigma must be above 0, got -1"):
        target.unconstrain(torch.tensor([0.0, 0, -1, 1, 0.5]))
    with pytest.raises(InvalidInput, match=r"theta must lie in \(0, 1\), got 1"):
        target.unconstrain(torch.tensor([0.0, 0, 1, 1, 1.0]))
    with pytest.raises(InvalidInput, match=r"mu must be ordered.*-1"):
        posteriordb_mixture(collapse=False).unconstrain(torch.tensor([1.0, 0, 1, 1, 0.5]))
    with pytest.raises(InvalidInput, match="holds 10000 reference draws, 20000"):
        target.reference(20_000)
    with pytest.raises(InvalidInput, match="no label symmetry"):
        posteriordb_mixture(collapse=False).swap_labels(torch.zeros(1, 5))
