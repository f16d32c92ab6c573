"""from_numpyro: torch.distributions is the oracle; models that cannot be sampled are refused by site."""

import sys

import numpy as np
import pytest
import torch
import torch.distributions as td

from noisewise.errors import InvalidInput, MissingExtra
from noisewise.targets.numpyro import from_numpyro
from noisewise.targets.target import check_target

numpyro = pytest.importorskip("numpyro")
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


def torch_simplex_log_prob(x):
    """The same program with torch.distributions and torch's own bijections."""
    log_prob = 0.0
    values = {}
    for name, slot, prior in [
        ("weights", x[:, :2], lambda _: td.Dirichlet(torch.ones(3).double())),
        ("bound", x[:, 2], lambda _: td.Gamma(torch.tensor(2.0).double(), torch.tensor(1.0).double())),
        ("level", x[:, 3], lambda v: td.Uniform(torch.zeros_like(v["bound"]), v["bound"])),
    ]:
        distribution = prior(values)
        bijection = td.biject_to(distribution.support)
        values[name] = bijection(slot)
        log_prob = log_prob + distribution.log_prob(values[name]) + bijection.log_abs_det_jacobian(slot, values[name])
    centers = values["level"].unsqueeze(-1) + torch.arange(3.0).double()
    mixture = td.MixtureSameFamily(td.Categorical(values["weights"]), td.Normal(centers, 1.0))
    return log_prob + sum(mixture.log_prob(torch.full_like(x[:, 0], y)) for y in Y)


def test_log_prob_agrees_with_torch_distributions_and_bijections(simplex):
    assert simplex.names == ["weights[0]", "weights[1]", "bound", "level"]
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    value, _ = check_target(simplex, x)
    torch.testing.assert_close(value, torch_simplex_log_prob(x), rtol=1e-10, atol=1e-10)
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
