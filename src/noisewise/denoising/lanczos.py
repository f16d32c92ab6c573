"""A covariance that is known only by its product with vectors: draws, variances and densities from Lanczos' process.

Source: Chow & Saad, SIAM J. Sci. Comput. 36(2), 2014 (draws); Ubaru, Chen & Saad, SIAM J. Matrix Anal. 38(4), 2017 (log
determinant); Golub & Meurant, Matrices, Moments and Quadrature, 2010 (quadratic forms).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.denoising.covariance import clamped, standard_normal
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption

__all__ = ["KrylovCovariance", "Tridiagonal", "lanczos", "rademacher"]

_LARGEST_DENSE = 2048


class Tridiagonal(NamedTuple):
    """Q^T S Q = T after some steps from v = norm * q_1, by its eigenvalues and their weights on q_1.

    `basis` holds the q's; a state whose Krylov space was exhausted early has zero vectors from there on, and entries of T
    that are decoupled from the first.
    """

    basis: Float[Tensor, "step batch dim"]
    ritz: Float[Tensor, "batch step"]
    vectors: Float[Tensor, "batch step step"]
    norm: Float[Tensor, " batch"]

    @property
    def first(self) -> Float[Tensor, "batch step"]:
        """First entry of each eigenvector of T."""
        return self.vectors[:, 0, :]

    def apply(self, values: Float[Tensor, "batch step"]) -> Float[Tensor, "batch dim"]:
        """f(S) v, nearly, with `values` = f(ritz): norm * Q f(T) e_1."""
        small = (self.vectors @ (values * self.first).unsqueeze(-1)).squeeze(-1)
        return self.norm.unsqueeze(-1) * torch.einsum("bk,kbd->bd", small, self.basis)

    def quadratic(self, values: Float[Tensor, "batch step"]) -> Float[Tensor, " batch"]:
        """v^T f(S) v by Gauss quadrature, with `values` = f(ritz)."""
        weight = self.first.square()
        # what is decoupled from q_1 has no weight, whatever f is there
        kept = torch.where(weight > torch.finfo(weight.dtype).eps ** 2, weight * values, torch.zeros_like(values))
        return self.norm.square() * kept.sum(-1)


def lanczos(
    product: Callable[[Tensor], Tensor], start: Float[Tensor, "batch dim"], rank: int, tolerance: float | int
) -> Tridiagonal:
    """At most `rank` products of a symmetric S from `start`, every vector orthogonalised against all before it, twice.

    Ends early when for every state the next vector would change S^(1/2) start by less than `tolerance`, relatively, or its
    space is exhausted.
    """
    norm = start.norm(dim=-1)
    q = start / norm.clamp(min=torch.finfo(start.dtype).tiny).unsqueeze(-1)
    alive = norm > 0
    basis: list[Tensor] = []
    diagonal: list[Tensor] = []
    off: list[Tensor] = []
    rounding = 10 * math.sqrt(start.shape[-1]) * torch.finfo(start.dtype).eps
    steps = min(rank, start.shape[-1])
    ritz = vectors = start.new_zeros(0)
    size = torch.zeros_like(norm)
    for step in range(steps):
        basis.append(q)
        w = product(q)
        alpha = (q * w).sum(-1)
        size = torch.maximum(size, w.norm(dim=-1))
        # a decoupled entry of the size of the others: zero would be an eigenvalue, one could drown the others
        diagonal.append(torch.where(alive, alpha, diagonal[0].abs() if diagonal else torch.ones_like(alpha)))
        space = torch.stack(basis)
        for _ in range(2):
            w = w - torch.einsum("kb,kbd->bd", torch.einsum("kbd,bd->kb", space, w), space)
        beta = w.norm(dim=-1)
        alive = alive & (beta > rounding * size)
        beta = torch.where(alive, beta, torch.zeros_like(beta))
        ritz, vectors = torch.linalg.eigh(_tridiagonal(diagonal, off))
        if step + 1 == steps or not bool((alive & (_residual(ritz, vectors, beta) > tolerance)).any()):
            break
        off.append(beta)
        q = torch.where(alive.unsqueeze(-1), w / beta.clamp(min=torch.finfo(w.dtype).tiny).unsqueeze(-1), 0.0)
    return Tridiagonal(torch.stack(basis), ritz, vectors, norm)


def _tridiagonal(diagonal: list[Tensor], off: list[Tensor]) -> Float[Tensor, "batch step step"]:
    matrix = torch.diag_embed(torch.stack(diagonal, -1))
    if off:
        side = torch.diag_embed(torch.stack(off, -1), offset=1)
        matrix = matrix + side + side.mT
    return matrix


def _residual(ritz: Tensor, vectors: Tensor, beta: Tensor) -> Float[Tensor, " batch"]:
    """How much the root's last coefficient would feed into the next vector, relative to the whole."""
    # by size, not clamped: a state whose first Ritz values are all negative is not done
    root = (vectors @ (ritz.abs().sqrt() * vectors[:, 0, :]).unsqueeze(-1)).squeeze(-1)
    whole = root.norm(dim=-1)
    share = torch.where(whole > 0, root[:, -1].abs() / whole, torch.ones_like(whole))
    top = ritz.abs().amax(-1).clamp(min=torch.finfo(ritz.dtype).tiny)
    return share * (beta / top).clamp(max=1)


class KrylovCovariance:
    """A covariance S through `product`, v [batch, dim] -> S v, which must be symmetric; no matrix is ever formed.

    A draw is S^(1/2) z by `rank` products, exact when S has at most `rank` distinct eigenvalues and close when its spectrum
    is smooth; `mahalanobis` takes as many, `logdet` `probes` times as many (stochastic Lanczos quadrature), `diag`
    `probes` (Hutchinson). Negative Ritz values are clamped and counted: `clipped` is that of the latest such call.
    Probes come from `generator`. `tolerance`: relative residual at which a draw takes no more products, by default the root
    of the rounding unit. Ritz values are cut at `largest`.
    `matvec` and `dense` are S as it is, not clamped.
    """

    def __init__(
        self,
        product: Callable[[Tensor], Tensor],
        like: Float[Tensor, "batch dim"],
        generator: torch.Generator,
        rank: int = 8,
        probes: int = 1,
        tolerance: float | int | None = None,
        then: tuple[float | int, float | int] = (1.0, 0.0),
        largest: float | int = math.inf,
    ) -> None:
        self._product = product
        self._like = like.detach()
        self._generator = generator
        self._rank = rank
        self._probes = probes
        self._tolerance = math.sqrt(torch.finfo(like.dtype).eps) if tolerance is None else tolerance
        # the covariance is scale * clamp(S) + shift
        self._scale, self._shift = then
        self._largest = largest
        self._clipped = torch.zeros(len(like), dtype=torch.long, device=like.device)

    @property
    def clipped(self) -> Int[Tensor, " batch"]:
        """Negative Ritz values of each state in the latest draw, `logdet` or `mahalanobis`; 0 before any."""
        return self._clipped

    def matvec(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """S v by one product."""
        return self._scale * self._product(v) + self._shift * v

    def sample(self, generator: torch.Generator) -> Float[Tensor, "batch dim"]:
        """One draw of N(0, S) for each state."""
        space, values = self._spectrum(standard_normal(self._like, generator), self._tolerance)
        return space.apply(values.sqrt())

    def diag(self) -> Float[Tensor, "batch dim"]:
        """Variances, estimated by probes; no entry below 0."""
        total = torch.zeros_like(self._like)
        for _ in range(self._probes):
            v = rademacher(self._like, self._generator)
            total = total + v * self.matvec(v)
        return (total / self._probes).clamp(min=0)

    def logdet(self) -> Float[Tensor, " batch"]:
        """log det S, estimated by probes."""
        total = self._like.new_zeros(len(self._like))
        for _ in range(self._probes):
            space, values = self._spectrum(rademacher(self._like, self._generator), 0.0)
            total = total + space.quadratic(values.log())
        return total / self._probes

    def dense(self) -> Float[Tensor, "batch dim dim"]:
        """The matrices, by dim products; raises `InvalidInput` above dim 2048."""
        batch, dim = self._like.shape
        if dim > _LARGEST_DENSE:
            raise InvalidInput(
                f"a dense covariance of dim {dim} has {dim**2:,} entries for each state (at most dim {_LARGEST_DENSE} is "
                "formed); use matvec, sample and diag"
            )
        eye = torch.eye(dim, dtype=self._like.dtype, device=self._like.device)
        return torch.stack([self.matvec(unit.expand(batch, -1)) for unit in eye], -1)

    def mahalanobis(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """v^T S^-1 v by Gauss quadrature."""
        space, values = self._spectrum(v, 0.0)
        return space.quadratic(1 / values)

    def corrupted(self, corruption: Corruption) -> "KrylovCovariance":
        """a^2 S + s^2 I, with the same products."""
        then = (corruption.a**2 * self._scale, corruption.a**2 * self._shift + corruption.s**2)
        return KrylovCovariance(
            self._product, self._like, self._generator, self._rank, self._probes, self._tolerance, then, self._largest
        )

    def _spectrum(self, start: Tensor, tolerance: float) -> tuple[Tridiagonal, Float[Tensor, "batch step"]]:
        """Lanczos from `start`, and the eigenvalues after clamping.

        The residual is that of the root; logarithms and inverses, which small eigenvalues rule, take every step.
        """
        space = lanczos(self._product, start, self._rank, tolerance)
        values, self._clipped = clamped(space.ritz)
        return space, self._scale * values.clamp(max=self._largest) + self._shift


def rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs of the shape, dtype and device of `like`."""
    signs = torch.randint(2, like.shape, device=like.device, generator=generator)
    return (2 * signs - 1).to(like.dtype)
