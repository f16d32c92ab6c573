"""from_numpyro: NumPyro's own potential is the oracle; models that cannot be sampled are refused by site."""

import sys

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput, MissingExtra
from noisewise.targets.numpyro import from_numpyro
from noisewise.targets.target import check_target

numpyro = pytest.importorskip("numpyro")
jax = pytest.importorskip("jax")
dist = numpyro.distributions


def simplex_model(y):
    """Constrained shapes differ from unconstrained ones, and one support depends on another site."""
    weights = numpyro.sample("weights", dist.Dirichlet(np.ones(3)))
    bound = numpyro.sample("bound", dist.Gamma(2.0, 1.0))
    level = numpyro.sample("level", dist.Uniform(0.0, bound))
    with numpyro.plate("rows", len(y)):
        mixture = dist.MixtureSameFamily(dist.Categorical(weights), dist.Normal(level + np.arange(3.0), 1.0))
        numpyro.sample("y", mixture, obs=y)


Y = np.array([0.2, 1.4, 2.2, 0.9])


@pytest.fixture(scope="module")
def simplex():
    return from_numpyro(simplex_model, Y)


def test_log_prob_is_minus_the_potential_of_initialize_model(simplex):
    assert simplex.names == ["weights[0]", "weights[1]", "bound", "level"]
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    value, _ = check_target(simplex, x)
    with jax.enable_x64(True):
        info = numpyro.infer.util.initialize_model(jax.random.PRNGKey(0), simplex_model, model_args=(Y,))
        potential = [
            float(info.potential_fn({"weights": row[:2], "bound": row[2], "level": row[3]})) for row in x.numpy()
        ]
    torch.testing.assert_close(value, -torch.tensor(potential, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(simplex.log_prob(x.float()), value.float(), rtol=1e-4, atol=1e-4)


def test_constrained_values_lie_in_their_supports(simplex):
    x = 3 * torch.randn(2, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    values = simplex.constrain(x)
    assert values["weights"].shape == (2, 5, 3)
    torch.testing.assert_close(values["weights"].sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(values["bound"], x[..., 2].exp())
    torch.testing.assert_close(values["level"], values["bound"] * x[..., 3].sigmoid())


def discrete():
    cluster = numpyro.sample("cluster", dist.Categorical(np.ones(2) / 2))
    numpyro.sample("y", dist.Normal(cluster, 1.0), obs=0.3)


def delta():
    numpyro.sample("fixed", dist.Delta(1.0))


def nothing_to_sample():
    numpyro.sample("y", dist.Normal(0.0, 1.0), obs=0.3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (discrete, "site 'cluster' is discrete.*MixtureSameFamily"),
        (delta, "site 'fixed' is a Delta.*numpyro.deterministic"),
        (nothing_to_sample, "no latent sample site"),
    ],
)
def test_models_that_cannot_be_sampled_are_refused_by_site(model, message):
    with pytest.raises(InvalidInput, match=message):
        from_numpyro(model)


def test_missing_numpyro_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "numpyro", None)
    with pytest.raises(MissingExtra, match=r"pip install 'noisewise\[numpyro\]'"):
        from_numpyro(discrete)
