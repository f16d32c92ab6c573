"""Losses against closed forms: denoising of a Gaussian, Hyvärinen's identity, maximum likelihood, the bridge."""

import math

import pytest
import torch

from noisewise.energy import EnergyNet, dsm_loss, gaussian_reference, mixture_fisher_loss, score_matching_loss
from noisewise.energy.losses import mixture_log_prob, score_matching_terms
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption
from noisewise.targets import GaussianMixture

F64 = torch.float64


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixture(*weights, gap=3.0):
    return GaussianMixture(torch.tensor([[-gap], [gap]], dtype=F64), 1.0, torch.tensor(weights, dtype=F64))


def grid(reach=14.0, nodes=8001):
    x = torch.linspace(-reach, reach, nodes, dtype=F64)[:, None]
    return x, 2 * reach / (nodes - 1)


# --- denoising score matching


@pytest.mark.parametrize(("a", "s"), [(1.0, 0.5), (0.6, 0.8)])
def test_dsm_of_the_true_noisy_energy_is_the_posterior_variance(a, s):
    # x ~ N(0, c): the loss is E Var[x | x_t] = c s^2 / (a^2 c + s^2) per coordinate, and the least there is
    c, dim, n = 4.0, 2, 200_000
    x = c**0.5 * torch.randn(n, dim, dtype=F64, generator=seeded())
    best = dim * c * s**2 / (a**2 * c + s**2)

    def energy(x_t, scale=1.0):
        return scale * x_t.square().sum(1) / (2 * (a**2 * c + s**2))

    value = dsm_loss(energy, x, Corruption(a, s), seeded(1)).item()
    # the squared errors are chi-square with dim degrees: relative standard error sqrt(2 / (dim n))
    assert value == pytest.approx(best, rel=4 * math.sqrt(2 / (dim * n)))
    for wrong in (0.8, 1.2):
        assert dsm_loss(lambda y, w=wrong: energy(y, w), x, Corruption(a, s), seeded(1)).item() > value


def test_dsm_is_the_usual_loss_times_s4_over_a2():
    a, s = 0.6, 0.8
    net = EnergyNet(2, hidden=8, depth=1).double()
    x = torch.randn(50, 2, dtype=F64, generator=seeded())
    eps = torch.randn(x.shape, dtype=F64, generator=seeded(3))
    usual = (net.score(a * x + s * eps) + eps / s).square().sum(1).mean()
    assert torch.allclose(dsm_loss(net, x, Corruption(a, s), seeded(3)), s**4 / a**2 * usual)


# --- Hyvärinen


def test_score_matching_of_a_gaussian_family_is_maximum_likelihood():
    # oracle 5: with statistics x and x^2 the gradient vanishes at the sample's own mean and variance
    x = 1.7 + 0.6 * torch.randn(500, 1, dtype=F64, generator=seeded())
    mean, variance = x.mean(), x.var(unbiased=False)
    theta = torch.stack([-mean / variance, 1 / (2 * variance)]).requires_grad_(True)
    loss = score_matching_loss(lambda y: theta[0] * y[:, 0] + theta[1] * y[:, 0] ** 2, x)
    (gradient,) = torch.autograd.grad(loss, theta)
    assert gradient.abs().max() < 1e-12


def test_exact_and_sliced_agree_on_average_and_exactly_for_a_diagonal_hessian():
    net = EnergyNet(3, hidden=16, depth=2).double()
    x = torch.randn(4, 3, dtype=F64, generator=seeded())
    exact = score_matching_loss(net, x).item()
    many = x.repeat(20_000, 1)
    terms = score_matching_terms(net, many, "sliced", seeded(1)).detach().reshape(-1, 4).mean(1)
    assert abs(terms.mean().item() - exact) < 4 * terms.std().item() / math.sqrt(len(terms))
    diagonal = lambda y: (y**4).sum(1)  # noqa: E731
    assert torch.allclose(score_matching_loss(diagonal, x), score_matching_loss(diagonal, x, "sliced", seeded(2)))


def test_an_energy_a_density_and_a_callable_speak_of_the_same_thing():
    target = mixture(0.3, 0.7)
    x = target.sample(20, seeded())
    by_density = score_matching_loss(target, x)
    by_callable = score_matching_loss(lambda y: -target.log_prob(y), x)
    assert torch.allclose(by_density, by_callable)


def test_a_constant_in_the_energy_and_the_order_of_rows_change_nothing():
    # oracle 8
    net = EnergyNet(2, hidden=16, depth=2).double()
    x = torch.randn(40, 2, dtype=F64, generator=seeded())
    loss = score_matching_loss(net, x)
    assert torch.equal(loss, score_matching_loss(lambda y: net(y) + 5.0, x))
    assert torch.allclose(loss, score_matching_loss(net, x[torch.randperm(40, generator=seeded(1))]), rtol=1e-12)


# --- the mixture Fisher divergence


def test_hyvarinen_form_differs_from_the_definition_by_a_constant_of_the_data_alone():
    # oracle 2, by quadrature: E_p~ [loss(q)] - MFD(p || q) = -E_p~ |s_p~|^2 / 2 for every q
    beta, p = 0.7, mixture(0.2, 0.8)
    x, dx = grid(30.0)
    m = gaussian_reference(p.sample(1000, seeded()))
    bridged = lambda q: lambda y: mixture_log_prob(q.log_prob(y), m.log_prob(y), beta)  # noqa: E731
    leaf = x.clone().requires_grad_(True)
    score = lambda q: torch.autograd.grad(bridged(q)(leaf).sum(), leaf)[0]  # noqa: E731
    mass = bridged(p)(x).exp() * dx
    constant = float((mass * score(p).square().sum(1) / 2).sum())
    for q in (mixture(0.5, 0.5), mixture(0.9, 0.1), mixture(0.4, 0.6, gap=2.0)):
        definition = float((mass * (score(p) - score(q)).square().sum(1) / 2).sum())
        terms = score_matching_terms(lambda y, q=q: -bridged(q)(y), x, "exact", None).detach()
        assert float((mass * terms).sum()) - definition == pytest.approx(-constant, abs=1e-7)


def test_two_strata_weigh_data_and_reference_exactly():
    p, q, beta = mixture(0.2, 0.8), mixture(0.6, 0.4), 0.75
    m = gaussian_reference(p.sample(1000, seeded()))
    values = [mixture_fisher_loss(q, p.sample(400, seeded(s)), m, beta, seeded(100 + s)).item() for s in range(60)]
    x, dx = grid()
    mass = mixture_log_prob(p.log_prob(x), m.log_prob(x), beta).exp() * dx
    energy = lambda y: -mixture_log_prob(q.log_prob(y), m.log_prob(y), beta)  # noqa: E731
    expected = float((mass * score_matching_terms(energy, x, "exact", None).detach()).sum())
    values = torch.tensor(values)
    assert abs(values.mean().item() - expected) < 4 * values.std().item() / math.sqrt(60)


def test_the_weight_of_a_normalised_mixture_is_learnt_through_the_bridge():
    # autograd goes through w: minimising over the weight alone finds the share of the data
    x = mixture(0.2, 0.8, gap=4.0).sample(4000, seeded())
    share = float((x < 0).double().mean())
    m = gaussian_reference(x)
    logit = torch.zeros((), dtype=F64, requires_grad=True)
    optimizer = torch.optim.Adam([logit], lr=0.1)

    def log_q(y):
        weights = torch.stack([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)])
        parts = torch.stack([-((y[:, 0] + 4) ** 2) / 2, -((y[:, 0] - 4) ** 2) / 2]) - math.log(2 * math.pi) / 2
        return torch.logsumexp(parts + weights[:, None], 0)

    for step in range(60):
        optimizer.zero_grad()
        mixture_fisher_loss(log_q, x, m, 0.8, seeded(step)).backward()
        optimizer.step()
    assert torch.sigmoid(logit).item() == pytest.approx(share, abs=0.03)


# --- bad input


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        (lambda x: score_matching_loss(lambda y: y.square().sum(1), x, "trace"), "'trace'"),
        (lambda x: score_matching_loss(lambda y: y.square().sum(1), x, "sliced"), "generator"),
        (lambda x: score_matching_loss(lambda y: y.square().sum(1), torch.zeros(3, 65)), "sliced"),
        (lambda x: score_matching_loss(lambda y: y.square(), x), r"\(4, 2\)"),
        (lambda x: score_matching_loss(lambda y: y.detach().sum(1), x), "no gradient"),
        (lambda x: score_matching_loss(3, x), "int"),
        (lambda x: mixture_fisher_loss(lambda y: y.sum(1), x, gaussian_reference(x), 1.0, seeded()), "1.0"),
        (lambda x: mixture_fisher_loss(lambda y: y.sum(1), x, lambda y: y, 0.5, seeded()), "log_prob and sample"),
    ],
)
def test_what_cannot_work_is_named(call, quoted):
    with pytest.raises(InvalidInput, match=quoted):
        call(torch.randn(4, 2, dtype=F64, generator=seeded()))
