"""from_numpy: rejected points, errors that name the row, results of the wrong shape."""

import numpy as np
import pytest
import torch

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.targets.numpy import from_numpy


def positive_quadrant(x):
    """log density -sum(x) on x > 0; raises outside, as BridgeStan does."""
    if (x <= 0).any():
        raise RuntimeError("x must be positive")
    return -x.sum(), -np.ones_like(x)


def gaussian(x):
    return -0.5 * (x**2).sum(-1), -x


POINTS = torch.tensor([[1.0, 2.0], [-1.0, 2.0], [0.5, 0.25]])


def test_an_error_at_a_point_names_row_and_point_and_the_remedy():
    target = from_numpy(positive_quadrant, 2, batched=False)
    with pytest.raises(
        NoisewiseError, match=r"row 1, x = \[-1\.0, 2\.0\].*must be positive.*reject_on=\(RuntimeError,\)"
    ):
        target.log_prob_and_score(POINTS)


def test_listed_errors_are_points_outside_the_support():
    target = from_numpy(positive_quadrant, 2, batched=False, reject_on=(RuntimeError,))
    value, score = target.log_prob_and_score(POINTS)
    assert value.tolist() == [-3.0, -torch.inf, -0.75]
    assert score.tolist() == [[-1.0, -1.0], [0.0, 0.0], [-1.0, -1.0]]
    with pytest.raises(NoisewiseError, match="row 1"):
        from_numpy(positive_quadrant, 2, batched=False, reject_on=(ValueError,)).log_prob(POINTS)


def test_reject_on_needs_a_callable_for_single_points():
    with pytest.raises(InvalidInput, match="batched=False"):
        from_numpy(gaussian, 2, reject_on=(RuntimeError,))


def test_a_callable_that_overwrites_its_argument_or_reuses_its_result_does_no_harm():
    buffer = np.empty(2)

    def careless(x):
        value = -0.5 * (x**2).sum()
        np.negative(x, out=buffer)
        x[:] = np.nan
        return value, buffer

    target = from_numpy(careless, 2, batched=False)
    x = POINTS.double()
    value, score = target.log_prob_and_score(x)
    torch.testing.assert_close(x, POINTS.double(), rtol=0, atol=0)
    torch.testing.assert_close(score, -x, rtol=0, atol=0)
    torch.testing.assert_close(value, -0.5 * (x**2).sum(-1))


def test_names_are_kept_and_counted():
    assert from_numpy(gaussian, 2, names=["a", "b"]).names == ["a", "b"]
    with pytest.raises(InvalidInput, match="names has 1 entries for dim 2"):
        from_numpy(gaussian, 2, names=["a"])


@pytest.mark.parametrize(
    ("fn", "options", "message"),
    [
        (lambda x: (gaussian(x)[0][:, None], -x), {}, r"log_prob must have shape \[3\].*got \[3, 1\]"),
        (lambda x: (gaussian(x)[0].sum(), -x), {}, r"log_prob must have shape \[3\].*got \[\]"),
        (lambda x: (gaussian(x)[0], -x.sum(-1)), {}, r"score must have shape \[3, 2\].*got \[3\]"),
        (lambda x: gaussian(x)[0], {}, r"pair \(log density, gradient\), got ndarray"),
        (lambda x: (x, x), {"batched": False}, r"a number and a gradient of shape \[2\]"),
        (lambda x: (x.sum(), x[:1]), {"batched": False}, r"a number and a gradient of shape \[2\]"),
    ],
)
def test_results_of_another_shape_are_refused(fn, options, message):
    with pytest.raises(InvalidInput, match=message):
        from_numpy(fn, 2, **options).log_prob_and_score(POINTS)


def test_a_dimension_below_one_is_refused():
    with pytest.raises(InvalidInput, match="dim must be at least 1, got 0"):
        from_numpy(gaussian, 0)
