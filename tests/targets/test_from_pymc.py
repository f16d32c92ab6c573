"""from_pymc: PyMC's own compiled density is the oracle; models that cannot be sampled are refused by variable."""

import sys

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput, MissingExtra, NoisewiseError
from noisewise.targets import pymc as adapter
from noisewise.targets.pymc import from_pymc
from noisewise.targets.target import check_target

pymc = pytest.importorskip("pymc")
pytensor = pytest.importorskip("pytensor")


def simplex_model():
    with pymc.Model() as model:
        weights = pymc.Dirichlet("weights", np.ones(3))
        level = pymc.Uniform("level", 0, 3)
        pymc.Deterministic("constant", pymc.math.constant(2.0))
        pymc.Potential("tilt", -(level**2))
        pymc.NormalMixture("y", weights, mu=np.arange(3.0) + level, sigma=1.0, observed=[0.2, 1.4, 2.2])
    return model


@pytest.fixture(scope="module")
def model():
    return simplex_model()


@pytest.fixture(scope="module")
def simplex(model):
    return from_pymc(model, mode="FAST_COMPILE")


@pytest.fixture
def points():
    return torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_log_prob_is_pymcs_own(model, simplex, points):
    assert simplex.names == ["weights[0]", "weights[1]", "level"]
    value, _ = check_target(simplex, points)
    own = model.compile_logp(mode="FAST_COMPILE")
    expected = [float(own({"weights_simplex__": row[:2], "level_interval__": row[2]})) for row in points.numpy()]
    torch.testing.assert_close(value, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


def test_constrained_values_lie_in_their_supports(simplex):
    x = 3 * torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    values = simplex.constrain(x)
    torch.testing.assert_close(values["weights"].sum(-1), torch.ones(2, 5, dtype=torch.float64))
    torch.testing.assert_close(values["level"], 3 * x[..., 2].sigmoid())
    assert (values["constant"] == 2).all()
    assert values["constant"].shape == (2, 5)


@pytest.mark.slow  # numba compiles for half a minute on a machine whose PyTensor cache is empty
def test_the_default_mode_is_numbas_and_that_of_the_configuration_where_it_was_set(monkeypatch):
    with pymc.Model() as model:
        pymc.Normal("x", 1.0, 2.0)
    x = torch.tensor([[0.5], [3.0]], dtype=torch.float64)
    tried = []
    monkeypatch.setattr(
        adapter, "_batched", lambda *arguments, run=adapter._batched: tried.append(arguments[-1]) or run(*arguments)
    )
    for flags, mode in [({"mode": "Mode"}, "NUMBA"), ({"mode": "FAST_COMPILE"}, "FAST_COMPILE")]:
        with pytensor.config.change_flags(**flags):
            score = from_pymc(model).log_prob_and_score(x)[1]
        torch.testing.assert_close(score, -(x - 1) / 4)
        assert tried.pop(0) == mode
        assert not tried


def test_operations_without_a_batched_form_give_the_same_values_row_by_row(model, simplex, points, monkeypatch):
    def refuses(*_):
        raise NotImplementedError("no batched form")

    monkeypatch.setattr(adapter, "_batched", refuses)
    by_row = from_pymc(model, mode="FAST_COMPILE")
    torch.testing.assert_close(by_row.log_prob_and_score(points), simplex.log_prob_and_score(points))
    torch.testing.assert_close(by_row.constrain(points), simplex.constrain(points))


def test_an_unknown_mode_is_quoted(model):
    with pytest.raises(NoisewiseError, match="TURBO"):
        from_pymc(model, mode="TURBO")


def test_discrete_variables_are_refused_by_name():
    with pymc.Model() as model:
        cluster = pymc.Bernoulli("cluster", 0.5)
        pymc.Normal("y", cluster, 1.0, observed=0.3)
    with pytest.raises(InvalidInput, match=r"'cluster' is discrete.*pymc\.Mixture"):
        from_pymc(model)


def test_a_model_without_free_variables_and_what_is_no_model_are_refused():
    with pymc.Model() as model:
        pymc.Normal("y", 0.0, 1.0, observed=0.3)
    with pytest.raises(InvalidInput, match="no free variable"):
        from_pymc(model)
    with pytest.raises(InvalidInput, match=r"must be a pymc\.Model, got function"):
        from_pymc(simplex_model)


def test_missing_pymc_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "pymc", None)
    with pytest.raises(MissingExtra, match=r"pip install 'noisewise\[pymc\]'"):
        from_pymc(None)
