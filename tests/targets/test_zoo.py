"""What holds for every member of the zoo at once: scores, row independence, dtype, batch shapes, exact draws."""

import pytest
import torch

from noisewise.targets import (
    GaussianMixture,
    Target,
    bnn,
    check_target,
    double_well_4,
    funnel,
    gmm40,
    lennard_jones,
    many_well,
    posteriordb_mixture,
    two_bananas,
    two_modes,
)


def _seeded(seed):
    return torch.Generator().manual_seed(seed)


def _full_mixture():
    root = torch.randn(3, 4, 4, generator=_seeded(1), dtype=torch.float64)
    covariances = root @ root.mT + 0.2 * torch.eye(4, dtype=torch.float64)
    return GaussianMixture(
        torch.randn(3, 4, generator=_seeded(2), dtype=torch.float64) * 3, covariances, [0.2, 0.3, 0.5]
    )


def _diagonal_mixture():
    variances = torch.rand(5, 3, generator=_seeded(3), dtype=torch.float64) + 0.1
    return GaussianMixture(torch.randn(5, 3, generator=_seeded(4), dtype=torch.float64) * 2, variances)


def _isotropic_mixture():
    means = torch.randn(4, 3, generator=_seeded(5), dtype=torch.float64)
    return GaussianMixture(means, [0.5, 1.0, 2.0, 0.1], [0.1, 0.2, 0.3, 0.4])


ZOO = {
    "isotropic": _isotropic_mixture,
    "diagonal": _diagonal_mixture,
    "full": _full_mixture,
    "gmm40": gmm40,
    "two_modes": lambda: two_modes(5, scales=(1.0, 0.5)),
    "two_bananas": lambda: two_bananas(5, scales=(1.0, 0.5)),
    "many_well": lambda: many_well(6),
    "double_well_4": double_well_4,
    "double_well_4_tethered": lambda: double_well_4(tether=1.0),
    "lennard_jones_13": lennard_jones,
    "lennard_jones_3_tethered": lambda: lennard_jones(3, tether=0.5),
    "funnel": funnel,
    "bnn": bnn,
    "posteriordb": posteriordb_mixture,
    "posteriordb_ordered": lambda: posteriordb_mixture(collapse=False),
}
EXACT = ["isotropic", "diagonal", "full", "gmm40", "two_modes", "two_bananas", "many_well", "funnel"]
zoo = pytest.mark.parametrize("target", [pytest.param(make(), id=name) for name, make in ZOO.items()])
exact = pytest.mark.parametrize("target", [pytest.param(ZOO[name](), id=name) for name in EXACT])


def _points(target, n, dtype=torch.float64):
    generator = _seeded(0)
    if hasattr(target, "reference"):
        return target.reference(n).to(dtype)
    if hasattr(target, "sample"):
        # exact draws, spread a little so that points between modes are seen as well
        x = target.sample(n, generator).to(dtype)
        return x + 0.3 * torch.randn(x.shape, generator=generator, dtype=dtype)
    return torch.randn(n, target.dim, generator=generator, dtype=dtype)


@zoo
def test_score_is_the_gradient_of_log_prob(target):
    x = _points(target, 12)
    value, score = target.log_prob_and_score(x)
    leaf = x.clone().requires_grad_(True)
    by_autograd = target.log_prob(leaf)
    torch.testing.assert_close(value, by_autograd.detach(), rtol=1e-12, atol=1e-10)
    (gradient,) = torch.autograd.grad(by_autograd.sum(), leaf)
    torch.testing.assert_close(score, gradient, rtol=1e-9, atol=1e-8)


@zoo
def test_score_agrees_with_central_differences(target):
    x = _points(target, 4)
    score = target.log_prob_and_score(x)[1]
    scale = score.abs().amax()
    step = 1e-6
    for coordinate in range(0, target.dim, max(1, target.dim // 8)):
        shift = torch.zeros(target.dim, dtype=x.dtype)
        shift[coordinate] = step
        slope = (target.log_prob(x + shift) - target.log_prob(x - shift)) / (2 * step)
        assert (slope - score[:, coordinate]).abs().amax() < 1e-6 * (1 + scale)


@zoo
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_first_call_checks_pass(target, dtype):
    assert isinstance(target, Target)
    check_target(target, _points(target, 7, dtype))


@zoo
def test_leading_batch_axes_are_rows(target):
    x = _points(target, 6)
    value, score = target.log_prob_and_score(x)
    for shape in ((2, 3), (3, 1, 2)):
        folded_value, folded_score = target.log_prob_and_score(x.reshape(*shape, target.dim))
        torch.testing.assert_close(folded_value, value.reshape(shape))
        torch.testing.assert_close(folded_score, score.reshape(*shape, target.dim))
        torch.testing.assert_close(target.log_prob(x.reshape(*shape, target.dim)), value.reshape(shape))
    torch.testing.assert_close(target.log_prob(x[0]), value[0])


@zoo
def test_float32_agrees_with_float64(target):
    x = _points(target, 50, torch.float32)
    value, score = target.log_prob_and_score(x)
    exact_value, exact_score = target.log_prob_and_score(x.double())
    assert value.dtype == score.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-4)
    assert (score - exact_score).abs().amax() < 1e-4 * (1 + exact_score.abs().amax())


@zoo
def test_names_count_the_coordinates(target):
    names = getattr(target, "names", None)
    assert names is None or len(names) == len(set(names)) == target.dim


@exact
def test_scores_average_to_zero_over_exact_draws(target):
    """The integral of grad p is 0: draws and density belong together (4 standard errors per coordinate)."""
    x = target.sample(20_000, _seeded(1)).double()
    score = target.log_prob_and_score(x)[1]
    z = score.mean(0) / (score.std(0) / len(x) ** 0.5)
    assert z.abs().max() < 4


@exact
def test_stein_identity_of_the_second_moment(target):
    """E[x . score] = -dim for exact draws, a check of scale and tails that the mean of the score does not see."""
    x = target.sample(20_000, _seeded(2)).double()
    product = (x * target.log_prob_and_score(x)[1]).sum(-1)
    assert abs(product.mean() + target.dim) < 4 * product.std() / len(x) ** 0.5


@exact
def test_draws_follow_the_generator_alone(target):
    state = torch.get_rng_state()
    first, second = target.sample(9, _seeded(3)), target.sample(9, _seeded(3))
    assert torch.equal(first, second)
    assert not torch.equal(first, target.sample(9, _seeded(4)))
    assert torch.equal(state, torch.get_rng_state())
    assert target.sample(0, _seeded(3)).shape == (0, target.dim)


@zoo
def test_wrong_number_of_coordinates_is_named(target):
    with pytest.raises(ValueError, match=rf"{target.dim + 1} (coordinates|parameters).*{target.dim}"):
        target.log_prob(torch.zeros(3, target.dim + 1))
