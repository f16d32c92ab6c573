"""Normalisers: the constant that was put in comes out, the bridge has the least error, and errors are honest (oracle 6)."""

import math

import pytest
import torch

from noisewise.energy import gaussian_reference
from noisewise.energy.losses import mixture_log_prob
from noisewise.energy.normalizer import NORMALIZERS, log_normalizer
from noisewise.errors import InvalidInput
from noisewise.targets import GaussianMixture

F64 = torch.float64
P = GaussianMixture(torch.tensor([[-4.0], [4.0]], dtype=F64), 1.0, torch.tensor([0.2, 0.8], dtype=F64))
M = gaussian_reference(P.sample(10_000, torch.Generator().manual_seed(0)))


def estimates(beta, constant=0.0, repeats=40, n=2000):
    """log Z of exp(constant) times the exact bridge, [method, repeat], and the stated errors."""
    values, errors = torch.empty(3, repeats), torch.empty(3, repeats)
    for repeat in range(repeats):
        generator = torch.Generator().manual_seed(repeat)
        kept = round(beta * n)
        rows = torch.cat([P.sample(kept, generator), M.sample(n - kept, generator)])
        drawn = M.sample(n, generator)
        energy = lambda x: -mixture_log_prob(P.log_prob(x), M.log_prob(x), beta) - constant  # noqa: E731
        for index, method in enumerate(NORMALIZERS):
            found = log_normalizer(energy, M, drawn, rows, method)
            values[index, repeat], errors[index, repeat] = found.value, found.se
    return values, errors


@pytest.mark.parametrize("beta", [0.5, 0.8])
def test_every_method_returns_the_constant_and_the_bridge_errs_least(beta):
    values, errors = estimates(beta, constant=3.5)
    rmse = (values - 3.5).square().mean(1).sqrt()
    assert (values.mean(1) - 3.5).abs().max() < 4 * errors.max() / math.sqrt(40)
    assert rmse[0] <= rmse[1:].min()
    # 40 repeats know a standard deviation to 11 %; strata make the rows a little better than independent
    stated = errors.mean(1)
    assert ((rmse / stated > 0.5) & (rmse / stated < 1.45)).all(), (rmse, stated)


def test_a_constant_shifts_every_estimate_by_itself():
    plain, shifted = estimates(0.8, 0.0, repeats=2)[0], estimates(0.8, 700.0, repeats=2)[0]
    assert torch.allclose(shifted - plain, torch.full_like(plain, 700.0), atol=1e-3)


def test_the_reference_itself_has_log_normaliser_zero_without_error():
    generator = torch.Generator().manual_seed(0)
    for method in NORMALIZERS:
        rows, drawn = M.sample(50, generator), M.sample(50, generator)
        found = log_normalizer(lambda x: -M.log_prob(x), M, drawn, rows, method)
        assert found.value == pytest.approx(0, abs=1e-9)
        assert found.se == pytest.approx(0, abs=1e-9)
        assert found.effective > 1e9


def test_bad_input_is_named():
    x = M.sample(10, torch.Generator().manual_seed(0))
    with pytest.raises(InvalidInput, match="'annealed'"):
        log_normalizer(lambda y: y[:, 0], M, x, x, "annealed")
    with pytest.raises(InvalidInput, match="10 of 10"):
        log_normalizer(lambda y: y[:, 0] * math.nan, M, x, x)
    with pytest.raises(InvalidInput, match="at least 2"):
        log_normalizer(lambda y: y[:, 0], M, x[:1], x[:1])
