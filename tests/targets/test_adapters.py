"""Truths that hold for the adapters of every library at once: gradients, Jacobians, agreement, composition with torch."""

import math

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput
from noisewise.targets.jax import from_jax
from noisewise.targets.numpy import from_numpy
from noisewise.targets.numpyro import from_numpyro
from noisewise.targets.pymc import from_pymc
from noisewise.targets.target import Target, TorchTarget, check_target

# one regression-like model in four languages: mu ~ N(0, 2)^2, s ~ HalfNormal(1.5), y ~ N(mu0 + x mu1, s); u = log s
X = np.linspace(-1.0, 1.0, 6)
Y = np.array([-0.4, 0.1, 0.3, 0.2, 1.1, 0.9])
NORMALIZER = 2 * math.log(2 * math.sqrt(2 * math.pi)) + math.log(1.5 * math.sqrt(math.pi / 2))
NORMALIZER += len(Y) * math.log(math.sqrt(2 * math.pi))


def torch_log_prob(z):
    mu, u = z[..., :2], z[..., 2]
    s = u.exp()
    residual = torch.as_tensor(Y).to(z) - mu[..., :1] - mu[..., 1:] * torch.as_tensor(X).to(z)
    prior = -(mu**2).sum(-1) / 8 - s**2 / (2 * 1.5**2) + u
    return prior - (residual**2).sum(-1) / (2 * s**2) - len(Y) * u - NORMALIZER


def numpy_value_and_grad(z):
    mu, u = z[:, :2], z[:, 2]
    s2 = np.exp(2 * u)
    residual = Y - mu[:, :1] - mu[:, 1:] * X
    squares = (residual**2).sum(1)
    value = -(mu**2).sum(1) / 8 - s2 / 4.5 + u - squares / (2 * s2) - len(Y) * u - NORMALIZER
    d_mu = -mu / 4 + np.stack([residual.sum(1), (residual * X).sum(1)], 1) / s2[:, None]
    return value, np.column_stack([d_mu, -s2 / 2.25 + 1 + squares / s2 - len(Y)])


def jax_log_prob(z):
    import jax.numpy as jnp

    s = jnp.exp(z[2])
    squares = ((jnp.asarray(Y, z.dtype) - z[0] - z[1] * jnp.asarray(X, z.dtype)) ** 2).sum()
    prior = -(z[:2] ** 2).sum() / 8 - s**2 / 4.5 + z[2]
    return prior - squares / (2 * s**2) - len(Y) * z[2] - NORMALIZER


def numpyro_model(x, y):
    import numpyro
    import numpyro.distributions as dist

    mu = numpyro.sample("mu", dist.Normal(0, 2).expand([2]).to_event(1))
    s = numpyro.sample("s", dist.HalfNormal(1.5))
    numpyro.deterministic("mean", mu.sum() * s)
    numpyro.sample("y", dist.Normal(mu[0] + x * mu[1], s), obs=y)


def pymc_model():
    pymc = pytest.importorskip("pymc")
    with pymc.Model() as model:
        mu = pymc.Normal("mu", 0, 2, shape=2)
        s = pymc.HalfNormal("s", 1.5)
        pymc.Deterministic("mean", mu.sum() * s)
        pymc.Normal("y", mu[0] + X * mu[1], s, observed=Y)
    return model


def build_regression(library):
    if library == "numpy":
        return from_numpy(numpy_value_and_grad, 3)
    if library == "numpy-rows":
        return from_numpy(lambda z: tuple(part[0] for part in numpy_value_and_grad(z[None])), 3, batched=False)
    if library == "jax":
        pytest.importorskip("jax")
        return from_jax(jax_log_prob, 3)
    if library == "numpyro":
        pytest.importorskip("numpyro")
        return from_numpyro(numpyro_model, X, y=Y)
    # the mode that compiles in a second; the default one is tested in test_from_pymc
    return from_pymc(pymc_model(), mode="FAST_COMPILE")


@pytest.fixture(scope="module", params=["numpy", "numpy-rows", "jax", "numpyro", "pymc"])
def regression(request):
    return build_regression(request.param)


@pytest.fixture
def points():
    return torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_score_is_the_central_difference_of_log_prob(regression, points):
    h = 1e-5
    score = regression.log_prob_and_score(points)[1]
    for i in range(regression.dim):
        step = torch.zeros(3, dtype=torch.float64)
        step[i] = h
        slope = (regression.log_prob(points + step) - regression.log_prob(points - step)) / (2 * h)
        torch.testing.assert_close(score[:, i], slope, rtol=1e-5, atol=1e-5)


def test_every_library_agrees_with_torch_on_the_same_model(regression, points):
    expected_value, expected_score = TorchTarget(torch_log_prob, 3).log_prob_and_score(points)
    value, score = regression.log_prob_and_score(points)
    torch.testing.assert_close(score, expected_score, rtol=1e-9, atol=1e-9)
    # PyMC takes the logarithm of constants such as sigma=2 in single precision: one offset, the same at every point
    offset = (value - expected_value).mean()
    assert offset.abs() < 1e-7
    torch.testing.assert_close(value - offset, expected_value, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(regression.log_prob(points), value, rtol=1e-12, atol=1e-12)


def test_log_prob_composes_with_autograd(regression, points):
    x = points.clone().requires_grad_(True)
    weight = torch.arange(1.0, 8.0, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((weight * regression.log_prob(2 * x)).sum(), x)
    score = regression.log_prob_and_score(2 * points)[1]
    torch.testing.assert_close(gradient, 2 * weight.unsqueeze(-1) * score)
    with torch.no_grad():
        assert not regression.log_prob(x).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_the_callers_and_the_first_call_check_passes(regression, points, dtype):
    assert isinstance(regression, Target)
    value, score = check_target(regression, points.to(dtype))
    assert value.dtype == score.dtype == regression.log_prob(points.to(dtype)).dtype == dtype
    tolerance = 1e-7 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(value, torch_log_prob(points).to(dtype), rtol=tolerance, atol=tolerance)


def test_any_leading_axes_and_any_strides_give_the_same_values(regression, points):
    value, score = regression.log_prob_and_score(points)
    scattered = torch.empty(3, 14, dtype=torch.float64).T[::2]
    scattered.copy_(points)
    torch.testing.assert_close(regression.log_prob_and_score(scattered)[0], value, rtol=1e-12, atol=1e-12)
    grid_value, grid_score = regression.log_prob_and_score(points[:6].reshape(2, 3, 3))
    torch.testing.assert_close(grid_value.flatten(), value[:6], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grid_score.reshape(6, 3), score[:6], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(regression.log_prob(points[0]), value[0], rtol=1e-12, atol=1e-12)


def test_results_may_be_overwritten_without_harm(regression, points):
    before = points.clone()
    value, score = regression.log_prob_and_score(points)
    kept = value.clone(), score.clone()
    value.fill_(7)
    score.fill_(7)
    again = regression.log_prob_and_score(points)
    torch.testing.assert_close(again, kept, rtol=0, atol=0)
    torch.testing.assert_close(points, before, rtol=0, atol=0)


def test_wrong_dimension_is_named(regression):
    with pytest.raises(InvalidInput, match="4 coordinates, but the target has dim 3"):
        regression.log_prob(torch.zeros(2, 4))


# --- Jacobians: a positive parameter, sampled as u = log of it ---------------------------------------------------------


def half_normal_numpyro():
    import numpyro
    import numpyro.distributions as dist

    numpyro.sample("s", dist.HalfNormal(2.0))


def exponential_numpyro(y):
    import numpyro
    import numpyro.distributions as dist

    rate = numpyro.sample("rate", dist.Exponential(1.5))
    numpyro.sample("y", dist.Exponential(rate), obs=y)


WAITS = np.array([0.3, 1.2, 0.7])


def positive_target(library, model):
    pymc = pytest.importorskip("pymc") if library == "pymc" else None
    if library == "numpyro":
        pytest.importorskip("numpyro")
        return from_numpyro(half_normal_numpyro) if model == "half-normal" else from_numpyro(exponential_numpyro, WAITS)
    with pymc.Model() as built:
        if model == "half-normal":
            pymc.HalfNormal("s", 2.0)
        else:
            pymc.Exponential("y", pymc.Exponential("rate", 1.5), observed=WAITS)
    return from_pymc(built, mode="FAST_COMPILE")


@pytest.mark.parametrize("library", ["numpyro", "pymc"])
@pytest.mark.parametrize(
    ("model", "mean", "evidence"),
    [
        ("half-normal", 2 * math.sqrt(2 / math.pi), 1.0),
        # Exponential(1.5) prior and n waits: posterior Gamma(1 + n, 1.5 + sum)
        ("exponential", 4 / (1.5 + WAITS.sum()), 1.5 * math.gamma(4) / (1.5 + WAITS.sum()) ** 4),
    ],
)
def test_jacobian_is_included_by_quadrature(library, model, mean, evidence):
    target = positive_target(library, model)
    u = torch.linspace(-25, 4, 4001, dtype=torch.float64).unsqueeze(-1)
    density = target.log_prob(u).exp()
    (constrained,) = target.constrain(u).values()
    total = torch.trapezoid(density, u[:, 0])
    assert total.item() == pytest.approx(evidence, rel=1e-6)
    assert (torch.trapezoid(density * constrained, u[:, 0]) / total).item() == pytest.approx(mean, rel=1e-6)


# --- parameters by name --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", ["numpyro", "pymc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coordinates_have_names_and_parameters_their_own_scale(library, dtype):
    target = build_regression(library)
    assert target.names == ["mu[0]", "mu[1]", "s"]
    x = torch.randn(4, 5, 3, dtype=dtype, generator=torch.Generator().manual_seed(1))
    raw = target.unravel(x)
    torch.testing.assert_close(raw["mu"], x[..., :2], rtol=0, atol=0)
    torch.testing.assert_close(raw["s"], x[..., 2], rtol=0, atol=0)
    values = target.constrain(x)
    assert set(values) == {"mu", "s", "mean"}
    torch.testing.assert_close(values["mu"], x[..., :2])
    torch.testing.assert_close(values["s"], x[..., 2].exp())
    torch.testing.assert_close(values["mean"], x[..., :2].sum(-1) * x[..., 2].exp())
