import math

import jaxtyping
import numpy as np
import pytest
import scipy.linalg
import torch

from noisewise.errors import InvalidInput
from noisewise.metrics import frechet_distance


def normal(n, dim, seed):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(dim, seed):
    return torch.linalg.qr(normal(dim, dim, seed)).Q


def draws(mean, root, n, seed):
    """`n` draws whose sample mean is `mean` and whose unbiased sample covariance is root^T root, up to rounding."""
    noise = normal(n, len(root), seed)
    white = torch.linalg.qr(noise - noise.mean(0)).Q * math.sqrt(n - 1)
    return torch.as_tensor(mean, dtype=torch.float64) + white @ root


def textbook(x, y):
    x, y = x.numpy(), y.numpy()
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second)
    return np.square(x.mean(0) - y.mean(0)).sum() + np.trace(first + second - 2 * root.real)


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_closed_form_where_the_covariances_commute(offset):
    # |mean difference|^2 + sum (sd_x - sd_y)^2 in the common axes, one of which has no spread on either side
    axes = rotation(4, 0)
    x = draws(
        offset + torch.tensor([1.0, 0.0, 2.0, 0.0]), torch.diag(torch.tensor([3.0, 1.0, 0.5, 0.0]).double()), 50, 1
    )
    y = draws(
        offset + torch.tensor([0.0, 2.0, 0.0, 0.0]), torch.diag(torch.tensor([1.0, 1.0, 2.0, 0.0]).double()), 31, 2
    )
    expected = (1 + 4 + 4) + (4 + 0 + 2.25 + 0)
    assert frechet_distance(x @ axes, y @ axes).value == pytest.approx(expected, rel=1e-12 if offset == 0 else 1e-8)


def test_closed_form_in_two_dimensions_where_they_do_not():
    # tr S^(1/2) = sqrt(tr S + 2 sqrt(det S)) of a 2 x 2 matrix, here of S_x S_y
    root_x, root_y = (torch.tensor(entries, dtype=torch.float64) for entries in ([[2, 1], [0, 1]], [[1, -1], [0, 3]]))
    product = root_x.T @ root_x @ root_y.T @ root_y
    shared = math.sqrt(float(product.trace()) + 2 * math.sqrt(float(torch.linalg.det(product))))
    expected = 25 + float(root_x.square().sum() + root_y.square().sum()) - 2 * shared
    x, y = draws([3.0, 0.0], root_x, 20, 0), draws([0.0, 4.0], root_y, 40, 1)
    assert frechet_distance(x, y).value == pytest.approx(expected, rel=1e-12)


def test_agrees_with_the_matrix_root_of_the_textbook():
    x, y = normal(200, 6, 0) @ normal(6, 6, 1), normal(150, 6, 2) @ normal(6, 6, 3) + 0.5
    assert frechet_distance(x, y).value == pytest.approx(textbook(x, y), rel=1e-10)


@pytest.mark.parametrize(("n", "m", "dim"), [(50, 60, 4), (5, 60, 12), (5, 7, 12), (2, 2, 3)])
def test_symmetric_zero_for_equal_samples_and_blind_to_rotation_and_translation(n, m, dim):
    x, y = normal(n, dim, 0), 2 * normal(m, dim, 1) + 1
    value = frechet_distance(x, y).value
    assert value > 0
    assert frechet_distance(x, x.flip(0)).value == pytest.approx(0, abs=1e-12)
    assert frechet_distance(y, x).value == pytest.approx(value, rel=1e-12)
    turn = rotation(dim, 2)
    assert frechet_distance(x @ turn + 100, y @ turn + 100).value == pytest.approx(value, rel=1e-11)
    assert frechet_distance(3 * x, 3 * y).value == pytest.approx(9 * value, rel=1e-12)


def test_fewer_draws_than_dimensions_need_no_full_rank():
    # the roots of the eigenvalues of S_x S_y, found in the small space of the draws instead
    x, y = normal(4, 30, 0), normal(6, 30, 1)
    first, second = x - x.mean(0), y - y.mean(0)
    overlap = first @ second.T @ second @ first.T / (3 * 5)
    shared = torch.linalg.eigvalsh(overlap)[1:].sqrt().sum()  # centring leaves 3 of the 4
    spread = first.square().sum() / 3 + second.square().sum() / 5
    expected = (x.mean(0) - y.mean(0)).square().sum() + spread - 2 * shared
    assert frechet_distance(x, y).value == pytest.approx(float(expected), rel=1e-12)


def test_samples_in_orthogonal_planes_share_nothing():
    x, y = torch.zeros(40, 6), torch.zeros(50, 6)
    x[:, :2], y[:, 3:5] = normal(40, 2, 0).float(), normal(50, 2, 1).float()
    expected = (x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum()
    assert frechet_distance(x, y).value == pytest.approx(float(expected), rel=1e-6)


def test_points_that_all_coincide():
    assert frechet_distance(torch.ones(4, 2), torch.zeros(3, 2)).value == 2
    assert frechet_distance(torch.ones(4, 2), torch.ones(3, 2)).value == 0


def test_bad_samples_are_named(monkeypatch):
    good = torch.ones(3, 2)
    with pytest.raises(InvalidInput, match="row 1 of y"):
        frechet_distance(good, torch.tensor([[0.0, 0.0], [math.nan, 1.0]]))
    with pytest.raises(InvalidInput, match="2 draws on each side, got 3 and 1"):
        frechet_distance(good, good[:1])
    with pytest.raises(InvalidInput, match="x has no draws"):
        frechet_distance(good[:0], good)
    # as users run it: the shape checks of the test suite would raise first
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(InvalidInput, match="2 coordinates and y has 3"):
        frechet_distance(good, torch.ones(3, 3))


def test_floor_and_count_travel_with_the_measurement():
    measured = frechet_distance(torch.ones(4, 1), torch.zeros(2, 1), floor=0.1)
    assert (measured.floor, measured.n) == (0.1, 4)
