import math

import pytest
import torch
from diffusion_nets import GaussianNoise, linear_levels

from noisewise.denoising.covariance import FullCovariance
from noisewise.diffusion import (
    CovarianceHead,
    calibration,
    fit_covariance,
    posterior_variance,
    vlb_bits_per_dim,
    vlb_terms,
)
from noisewise.diffusion.sources import LanczosSource
from noisewise.errors import InvalidInput

LEVELS = linear_levels()


class Exact:
    """The covariance of x0 of a Gaussian in closed form."""

    graph = False

    def __init__(self, net, full, factor=1.0):
        self.net, self.full, self.factor = net, full, factor

    def __call__(self, prediction, previous=None):
        t = int(prediction.t[0])
        a, s = LEVELS.pair(t)
        matrix = self.factor * self.net.relative(t) * (s / a) ** 2
        if self.full:
            return FullCovariance(matrix.expand(len(prediction.clean), -1, -1))
        return matrix.diagonal().expand_as(prediction.clean).clone()


def rows(net, n, seed=0):
    root = torch.linalg.cholesky(net.covariance)
    return torch.randn(n, len(root), dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) @ root.T


def entropy(covariance):
    return 0.5 * float(torch.logdet(2 * math.pi * math.e * covariance))


def prior(covariance):
    """E KL(q(x_T | x0) || N(0, I)) less the mutual information of x0 and x_T: KL(q(x_T) || N(0, I))."""
    a, s = LEVELS.pair(999)
    marginal = a**2 * covariance + s**2 * torch.eye(len(covariance), dtype=torch.float64)
    return 0.5 * float(torch.trace(marginal) - len(covariance) - torch.logdet(marginal))


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("full", [True, False])
def test_with_the_optimal_covariance_in_every_step_the_bound_is_the_entropy(steps, full):
    correlated = [[1.0, 0.6], [0.6, 0.5]] if full else [[1.0, 0.0], [0.0, 0.25]]
    net = GaussianNoise(correlated).eval()
    x = rows(net, 4000)

    def bound(factor):
        source = Exact(net, full, factor)
        return vlb_terms(net, x, source, steps, noise_schedule=LEVELS, clip=None, last="covariance").sum(1)

    best = bound(1.0)
    truth = entropy(net.covariance) + prior(net.covariance)
    assert abs(float(best.mean()) - truth) < 4 * float(best.std()) / len(best) ** 0.5
    for factor in (0.7, 1.4):
        other = bound(factor) - best
        assert float(other.mean()) > 3 * float(other.std()) / len(best) ** 0.5


def test_a_diagonal_of_correlated_data_costs_bits():
    net = GaussianNoise([[1.0, 0.8], [0.8, 1.0]]).eval()
    x = rows(net, 3000)
    full, diagonal = (
        vlb_terms(net, x, Exact(net, f), 4, noise_schedule=LEVELS, clip=None, last="covariance").sum(1)
        for f in (True, False)
    )
    gap = diagonal - full
    assert float(gap.mean()) > 4 * float(gap.std()) / len(x) ** 0.5


def test_lanczos_of_full_rank_gives_the_bound_of_the_exact_matrix():
    net = GaussianNoise([[1.0, 0.6], [0.6, 0.5]]).eval()
    x = rows(net, 40)
    source = LanczosSource(2, torch.Generator().manual_seed(0))
    found = vlb_terms(net, x, source, 3, noise_schedule=LEVELS, clip=None)
    exact = vlb_terms(net, x, Exact(net, True), 3, noise_schedule=LEVELS, clip=None)
    assert torch.allclose(found, exact, rtol=1e-6, atol=1e-6)


def test_bits_of_images_are_those_of_a_discrete_law():
    # every image is one grey value; a decoder that knows it exactly leaves nothing to say in its own term
    net = GaussianNoise(1e-8 * torch.eye(3, dtype=torch.float64)).eval()
    x = torch.zeros(8, 3, dtype=torch.float64)
    terms = vlb_terms(net, x, Exact(net, False), 5, noise_schedule=LEVELS, levels=3, clip=1.0)
    assert float(terms[:, -1].abs().max()) < 1e-6
    bits = vlb_bits_per_dim(net, x, Exact(net, False), 5, noise_schedule=LEVELS, levels=3)
    assert bits.unit == "bits/dim"
    assert float(bits) == pytest.approx(float(terms.sum(1).mean()) / 3 / math.log(2))


def test_the_fixed_variances_bracket_a_fitted_one():
    net = GaussianNoise([[0.09, 0.0], [0.0, 0.01]]).eval()
    x = rows(net, 1000).float()
    head = CovarianceHead.for_model(net, noise_schedule=LEVELS, site="out", event=(2,), features=16)
    fit_covariance(net, head, x, "analytic", noise_schedule=LEVELS)
    small, large, fitted = (
        float(vlb_terms(net, x, covariance, 5, noise_schedule=LEVELS, clip=None).sum(1).mean())
        for covariance in (None, "large", head)
    )
    assert fitted < large < small


def test_bad_input_is_named(shapes_unchecked):
    net = GaussianNoise([[1.0, 0.0], [0.0, 1.0]]).eval()
    x = rows(net, 4)
    cases = [
        ({"steps": 1}, "at least 2"),
        ({"steps": 1001}, "1001"),
        ({"steps": [5, 3]}, "rising"),
        ({"steps": [0, 3]}, "rising|at least"),
        ({"last": "none"}, "'none'"),
        ({"covariance": "diag"}, "'diag'"),
        ({"data": x * math.nan}, "finite"),
        ({"clip": 1.0}, "clip=None"),
        ({"steps": [5, 10]}, "must reach the noise"),
        ({"noise_schedule": None}, "noise_schedule"),
    ]
    for options, message in cases:
        settings = {"data": x, "covariance": None, "steps": 5, "noise_schedule": LEVELS, "clip": None} | options
        with pytest.raises(InvalidInput, match=message):
            vlb_terms(net, settings.pop("data"), settings.pop("covariance"), settings.pop("steps"), **settings)


def test_posterior_variances_agree_with_the_closed_form():
    net = GaussianNoise([[1.0, 0.6], [0.6, 0.5]]).eval()
    x_t = rows(net, 50)
    t = 300
    a, s = LEVELS.pair(t)
    truth = net.relative(t).diagonal() * (s / a) ** 2
    probed = posterior_variance(net, x_t, t, "probes", noise_schedule=LEVELS, probes=400)
    drawn = posterior_variance(net, x_t, t, "lanczos", noise_schedule=LEVELS, probes=400, rank=2)
    # 20 000 draws of each: the probes of 2 entries err by the correlation, squared normals by sqrt(2)
    assert torch.allclose(probed.mean(0), truth, rtol=0.05)
    assert torch.allclose(drawn.mean(0), truth, rtol=0.05)
    head = CovarianceHead.for_model(net, noise_schedule=LEVELS, site="out", event=(2,), features=16)
    with pytest.raises(InvalidInput, match="not fitted"):
        posterior_variance(net, x_t.float(), t, head=head, noise_schedule=LEVELS)
    fit_covariance(net, head, rows(net, 4000).float(), noise_schedule=LEVELS, steps=1)
    levels = torch.full((50,), t)
    assert torch.equal(
        posterior_variance(net, x_t.float(), levels, head=head, noise_schedule=LEVELS),
        posterior_variance(net, x_t.float(), t, head=head, noise_schedule=LEVELS),
    )
    with pytest.raises(InvalidInput, match="method"):
        posterior_variance(net, x_t, t, "guess", noise_schedule=LEVELS)
    with pytest.raises(InvalidInput, match="head="):
        posterior_variance(net, x_t, t, "head", noise_schedule=LEVELS)


def test_a_right_head_is_calibrated_and_a_wrong_one_is_not():
    net = GaussianNoise([[1.0, 0.0], [0.0, 1.0]]).eval()
    x = rows(net, 4000).float()
    head = CovarianceHead.for_model(net, noise_schedule=LEVELS, site="out", event=(2,), features=16)
    fit_covariance(net, head, x, noise_schedule=LEVELS, steps=1)
    right = calibration(net, head, x, 300, noise_schedule=LEVELS, bins=2)
    # the table itself is a mean of 4000 rows
    assert abs(right.ratio - 1) < 4 * (right.ratio_se + (2 / 4000) ** 0.5)
    head.residual.mul_(4)
    wrong = calibration(net, head, x, 300, noise_schedule=LEVELS, bins=2)
    assert wrong.ratio == pytest.approx(right.ratio / 4, rel=1e-3)
