"""Four covariance operators against the matrices they stand for: draws, determinants, distances, and what is clamped."""

import itertools
import math

import pytest
import torch

from noisewise.denoising import (
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    IsotropicCovariance,
    KrylovCovariance,
)
from noisewise.denoising.lanczos import lanczos
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def orthogonal(batch, dim, seed=0):
    return torch.linalg.qr(torch.randn((batch, dim, dim), dtype=torch.float64, generator=seeded(seed)))[0]


def with_spectrum(values, seed=0):
    """Symmetric matrices [batch, dim, dim] with these eigenvalues [batch, dim]."""
    q = orthogonal(*values.shape, seed)
    return (q * values.unsqueeze(-2)) @ q.mT


class Product:
    """Multiplies by matrices, and counts how often."""

    def __init__(self, matrix):
        self.matrix, self.calls = matrix, 0

    def __call__(self, v):
        self.calls += 1
        return (self.matrix @ v.unsqueeze(-1)).squeeze(-1)


def krylov(matrix, rank, probes=1, **options):
    return KrylovCovariance(Product(matrix), matrix[..., 0], seeded(9), rank, probes, **options)


def root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def draw_from(covariance, z):
    """The draw that a covariance makes of the standard normal numbers `z`: its generator gives them."""
    generator = seeded(4)
    expected = torch.randn(z.shape, dtype=z.dtype, generator=seeded(4))
    torch.testing.assert_close(expected, z)
    return covariance.sample(generator)


Z = torch.randn((3, 5), dtype=torch.float64, generator=seeded(4))
SPECTRUM = torch.rand((3, 5), dtype=torch.float64, generator=seeded(1)) + 0.1
MATRIX = with_spectrum(SPECTRUM)
MEMBERS = {
    "isotropic": (
        IsotropicCovariance(SPECTRUM[:, 0], 5),
        SPECTRUM[:, :1, None] * torch.eye(5, dtype=torch.float64),
    ),
    "diagonal": (DiagonalCovariance(SPECTRUM), torch.diag_embed(SPECTRUM)),
    "full": (FullCovariance(MATRIX), MATRIX),
    # of full rank: every one of its answers but those by probes is exact
    "krylov": (krylov(MATRIX, 5), MATRIX),
}


@pytest.mark.parametrize("noised", [False, True])
@pytest.mark.parametrize("name", MEMBERS)
def test_every_member_is_the_matrix_it_stands_for(name, noised):
    covariance, matrix = MEMBERS[name]
    if noised:
        corruption = Corruption(0.7, 0.4)
        covariance = covariance.corrupted(corruption)
        matrix = corruption.a**2 * matrix + corruption.s**2 * torch.eye(5, dtype=torch.float64)
    assert isinstance(covariance, Covariance)
    v = torch.randn((3, 5), dtype=torch.float64, generator=seeded(2))
    torch.testing.assert_close(covariance.matvec(v), (matrix @ v.unsqueeze(-1)).squeeze(-1))
    torch.testing.assert_close(covariance.dense(), matrix)
    distance = (v * torch.linalg.solve(matrix, v)).sum(-1)
    torch.testing.assert_close(covariance.mahalanobis(v), distance)
    assert bool((covariance.mahalanobis(torch.zeros_like(v)) == 0).all())
    torch.testing.assert_close(draw_from(covariance, Z), (root(matrix) @ Z.unsqueeze(-1)).squeeze(-1))
    if name != "krylov":
        torch.testing.assert_close(covariance.diag(), matrix.diagonal(dim1=-2, dim2=-1))
        torch.testing.assert_close(covariance.logdet(), torch.logdet(matrix))
    assert covariance.clipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", MEMBERS)
def test_the_draws_of_every_member_have_its_covariance(name):
    covariance, matrix = MEMBERS[name]
    n, generator = 600, seeded(3)
    draws = torch.stack([covariance.sample(generator) for _ in range(n)])
    products = torch.einsum("nbi,nbj->nbij", draws, draws)
    se = products.std(0) / math.sqrt(n)
    assert bool(((products.mean(0) - matrix).abs() < 4.5 * se + 1e-12).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_many_steps_as_distinct_eigenvalues_are_exact(dtype):
    # states differ in how many distinct eigenvalues they have, 3, 2 and 1: those that are done early wait for the others
    values = torch.tensor([[4.0, 1.0, 0.2] * 10, [4.0, 1.0, 1.0] * 10, [0.5] * 30])
    matrix = with_spectrum(values.double()).to(dtype)
    covariance = krylov(matrix, 3)
    z = torch.randn((3, 30), dtype=dtype, generator=seeded(4))
    tolerance = 3e-6 if dtype == torch.float32 else 1e-13
    exact = (root(matrix.double()).to(dtype) @ z.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(covariance.sample(seeded(4)), exact, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(
        covariance.mahalanobis(z), (z * torch.linalg.solve(matrix, z)).sum(-1), rtol=1e2 * tolerance, atol=0
    )
    # more steps change nothing, and are not taken
    generous = krylov(matrix, 20)
    torch.testing.assert_close(generous.sample(seeded(4)), exact, rtol=0, atol=10 * tolerance)
    assert generous._product.calls == 3


def test_a_scale_of_the_covariance_scales_the_draw_and_nothing_else():
    # entries of 1e-8 in float32, where a misplaced 1 would drown them
    matrix = with_spectrum(torch.tensor([[4.0, 1.0, 0.2] * 4, [1.0, 1.0, 2.0] * 4], dtype=torch.float64)).float()
    draw, small = krylov(matrix, 6).sample(seeded(4)), krylov(1e-8 * matrix, 6).sample(seeded(4))
    torch.testing.assert_close(small * 1e4, draw, rtol=1e-3, atol=1e-4)


def test_on_a_smooth_spectrum_a_few_steps_are_close_and_more_are_closer():
    # the decaying spectrum of the design's prototype: a few per cent at 2 steps, 1 % at 5
    values = 0.25 + 1.0 / (1 + torch.arange(100, dtype=torch.float64)).unsqueeze(0)
    matrix = with_spectrum(values)
    z = torch.randn((1, 100), dtype=torch.float64, generator=seeded(4))
    exact = (root(matrix) @ z.unsqueeze(-1)).squeeze(-1)
    errors = [float((krylov(matrix, k).sample(seeded(4)) - exact).norm() / exact.norm()) for k in (2, 5, 10, 20)]
    assert errors[0] < 0.1
    assert errors[1] < 0.01
    assert errors[3] < 1e-4
    assert errors == sorted(errors, reverse=True)


def test_lanczos_ends_where_its_residual_says_so():
    values = 1 + 1e-3 * torch.rand((2, 50), dtype=torch.float64, generator=seeded(5))
    covariance = krylov(with_spectrum(values), 50, tolerance=1e-5)
    exact = (root(with_spectrum(values)) @ torch.randn((2, 50), dtype=torch.float64, generator=seeded(4))[..., None])[
        ..., 0
    ]
    torch.testing.assert_close(covariance.sample(seeded(4)), exact, rtol=0, atol=1e-4)
    assert covariance._product.calls <= 4


def test_distances_are_ruled_by_small_eigenvalues_that_a_draw_need_not_resolve():
    values = torch.logspace(-6, 0, 12, dtype=torch.float64).unsqueeze(0)
    matrix = with_spectrum(values)
    v = torch.randn((1, 12), dtype=torch.float64, generator=seeded(8))
    exact = (v * torch.linalg.solve(matrix, v)).sum(-1)
    torch.testing.assert_close(krylov(matrix, 12, tolerance=0.1).mahalanobis(v), exact, rtol=1e-6, atol=0)


def test_the_basis_stays_orthogonal_where_plain_lanczos_loses_it():
    # one dominant eigenvalue converges at once, after which the three-term recurrence alone brings it back
    values = torch.cat([torch.linspace(0.001, 1, 79, dtype=torch.float64), torch.tensor([1e4], dtype=torch.float64)])
    matrix = with_spectrum(values.unsqueeze(0))
    z = torch.randn((1, 80), dtype=torch.float64, generator=seeded(6))
    basis = lanczos(Product(matrix), z, 60, 0.0).basis[:, 0]
    torch.testing.assert_close(basis @ basis.T, torch.eye(60, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_log_determinant_by_quadrature_is_right_on_average():
    matrix = with_spectrum(torch.linspace(0.2, 3.0, 40, dtype=torch.float64).expand(2, 40))
    estimates = torch.stack(
        [KrylovCovariance(Product(matrix), matrix[..., 0], seeded(i), 15).logdet() for i in range(200)]
    )
    se = estimates.std(0) / math.sqrt(200)
    assert bool(((estimates.mean(0) - torch.logdet(matrix)).abs() < 4 * se).all())
    # one probe of random signs has the variance 2 sum_{i != j} log(S)_ij^2; 200 of them know it to 10 %
    values, vectors = torch.linalg.eigh(matrix)
    off = ((vectors * values.log().unsqueeze(-2)) @ vectors.mT).square()
    variance = 2 * (off.sum((-2, -1)) - off.diagonal(dim1=-2, dim2=-1).sum(-1))
    torch.testing.assert_close(estimates.var(0), variance, rtol=0.4, atol=0)
    # of a multiple of I every probe is exact
    torch.testing.assert_close(
        krylov(2.5 * torch.eye(40, dtype=torch.float64).expand(2, 40, 40), 4).logdet(),
        torch.full((2,), 40 * math.log(2.5), dtype=torch.float64),
    )


def test_hutchinson_over_all_sign_vectors_is_the_diagonal(monkeypatch):
    # the mean over all 2^d sign vectors is exact, and so is the variance of one probe
    matrix = with_spectrum(SPECTRUM)[:1]
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)), dtype=torch.float64)
    probes = iter(signs)
    monkeypatch.setattr("noisewise.denoising.lanczos.rademacher", lambda like, generator: next(probes).unsqueeze(0))
    covariance = krylov(matrix, 2)
    estimates = torch.stack([KrylovCovariance(covariance._product, matrix[..., 0], seeded(0)).diag()[0] for _ in signs])
    exact = matrix[0].diagonal()
    inside = (estimates > 0).all(0)  # no probe of these was clamped
    assert bool(inside.any())
    torch.testing.assert_close(estimates.mean(0)[inside], exact[inside])
    off = (matrix[0].square().sum(-1) - exact.square())[inside]
    torch.testing.assert_close(estimates.var(0, correction=0)[inside], off)


def test_one_probe_is_exact_for_a_diagonal_matrix():
    matrix = torch.diag_embed(SPECTRUM)
    torch.testing.assert_close(krylov(matrix, 2).diag(), SPECTRUM)


def test_negative_eigenvalues_are_clamped_and_counted_by_state():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-0.5, 2.0, 3.0, 4.0], [-2.0, -1.0, 3.0, 4.0]], dtype=torch.float64)
    matrix, counts = with_spectrum(values), [0, 1, 2]
    nearest = with_spectrum(values.clamp(min=0))
    full = FullCovariance(matrix)
    assert full.clipped.tolist() == counts
    torch.testing.assert_close(full.dense(), nearest)
    covariance = krylov(matrix, 4)
    z = torch.randn((3, 4), dtype=torch.float64, generator=seeded(4))
    torch.testing.assert_close(covariance.sample(seeded(4)), (root(nearest) @ z.unsqueeze(-1)).squeeze(-1))
    assert covariance.clipped.tolist() == counts
    diagonal = DiagonalCovariance(values)
    assert diagonal.clipped.tolist() == counts
    torch.testing.assert_close(diagonal.diag(), values.clamp(min=0))
    assert IsotropicCovariance(values[:, 0], 4).clipped.tolist() == [0, 1, 1]
    # where an eigenvalue was clamped no density is left
    for member in (full, diagonal, covariance):
        assert torch.isneginf(member.logdet()).tolist() == [False, True, True]
        assert torch.isposinf(member.mahalanobis(z)).tolist() == [False, True, True]
        # noise gives it one again
        assert bool(torch.isfinite(member.corrupted(Corruption(1.0, 0.1)).logdet()).all())


def test_a_mostly_negative_matrix_keeps_what_is_positive():
    # the first Rayleigh quotient of nearly every start is negative here, or zero
    for values in ([-4.0, -3.0, -2.0, 1.0], [-1.0, -1.0, 1.0, 1.0]):
        matrix = with_spectrum(torch.tensor([values], dtype=torch.float64))
        z = torch.randn((1, 4), dtype=torch.float64, generator=seeded(4))
        exact = (root(matrix) @ z.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(krylov(matrix, 4).sample(seeded(4)), exact)
    swap = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    space = lanczos(Product(swap), torch.tensor([[1.0, 0.0]], dtype=torch.float64), 2, 1e-8)
    torch.testing.assert_close(space.apply(space.ritz.clamp(min=0).sqrt()), torch.full((1, 2), 0.5).double())


def test_rounding_below_zero_is_not_counted():
    v = torch.randn((20, 6, 2), generator=seeded(7))
    assert int(FullCovariance(v @ v.mT).clipped.sum()) == 0  # rank 2 of 6 in float32


def test_zero_is_a_covariance_too():
    for member in (
        IsotropicCovariance(torch.zeros(2), 3),
        FullCovariance(torch.zeros(2, 3, 3)),
        krylov(torch.zeros(2, 3, 3), 3),
    ):
        assert bool((member.sample(seeded()) == 0).all())
        assert member.clipped.tolist() == [0, 0]
        assert bool(torch.isneginf(member.logdet()).all())


def test_a_matrix_too_large_to_form_is_refused():
    covariance = KrylovCovariance(lambda v: v, torch.zeros((1, 5000)), seeded())
    with pytest.raises(InvalidInput, match="dim 5000"):
        covariance.dense()
