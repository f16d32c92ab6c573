"""Covariances of a batch of states behind one interface: a number, a diagonal or a matrix each.

`KrylovCovariance`, which never forms a matrix, is in `lanczos.py`. What a model gives as a covariance need not be positive:
each member clamps at 0 and counts.
"""

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.noise import Corruption

__all__ = ["Covariance", "DiagonalCovariance", "FullCovariance", "IsotropicCovariance", "clamped", "standard_normal"]


@runtime_checkable
class Covariance(Protocol):
    """One covariance S for each of a batch of states, all of them [dim, dim], positive semi-definite after clamping.

    Where S is singular `logdet` is -inf and `mahalanobis` is inf off its range: no density exists there.
    """

    @property
    def clipped(self) -> Int[Tensor, " batch"]:
        """How many eigenvalues (entries of a diagonal) of each state were below 0 by more than rounding."""
        ...

    def matvec(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """S v of each state."""
        ...

    def sample(self, generator: torch.Generator) -> Float[Tensor, "batch dim"]:
        """One draw of N(0, S) for each state."""
        ...

    def diag(self) -> Float[Tensor, "batch dim"]:
        """The variances."""
        ...

    def logdet(self) -> Float[Tensor, " batch"]:
        """log det S."""
        ...

    def dense(self) -> Float[Tensor, "batch dim dim"]:
        """The matrices."""
        ...

    def mahalanobis(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """v^T S^-1 v, a squared distance."""
        ...

    def corrupted(self, corruption: Corruption) -> "Covariance":
        """a^2 S + s^2 I, the covariance of a x + s eps."""
        ...


def clamped(values: Float[Tensor, "batch entry"]) -> tuple[Float[Tensor, "batch entry"], Int[Tensor, " batch"]]:
    """`values` with what is below 0 set to 0, and how many of each row were below it by more than rounding."""
    rounding = values.shape[-1] * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return values.clamp(min=0), (values < -rounding).sum(-1)


class DiagonalCovariance:
    """Variances [batch, dim] of independent coordinates; negative ones are clamped and counted."""

    def __init__(self, variances: Float[Tensor, "batch dim"]) -> None:
        self._variances, self.clipped = clamped(variances)

    def matvec(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """S v."""
        return self._variances * v

    def sample(self, generator: torch.Generator) -> Float[Tensor, "batch dim"]:
        """One draw of N(0, S) for each state."""
        return self._variances.sqrt() * standard_normal(self._variances, generator)

    def diag(self) -> Float[Tensor, "batch dim"]:
        """The variances."""
        return self._variances

    def logdet(self) -> Float[Tensor, " batch"]:
        """Sum of their logarithms."""
        return self._variances.log().sum(-1)

    def dense(self) -> Float[Tensor, "batch dim dim"]:
        """Diagonal matrices."""
        return torch.diag_embed(self._variances)

    def mahalanobis(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """Sum of v_i^2 / variance_i."""
        return squared_over(v, self._variances).sum(-1)

    def corrupted(self, corruption: Corruption) -> "DiagonalCovariance":
        """a^2 S + s^2 I."""
        return DiagonalCovariance(corruption.a**2 * self._variances + corruption.s**2)


class IsotropicCovariance(DiagonalCovariance):
    """c I with one variance c [batch] for each state; 0 is a point."""

    def __init__(self, variance: Float[Tensor, " batch"], dim: int) -> None:
        super().__init__(variance.unsqueeze(-1).expand(-1, dim))
        self.clipped = self.clipped.clamp(max=1)  # one number was clamped, not dim


class FullCovariance:
    """Symmetric matrices [batch, dim, dim], factorised once; negative eigenvalues are clamped and counted."""

    def __init__(self, matrix: Float[Tensor, "batch dim dim"]) -> None:
        values, self._vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        self._values, self.clipped = clamped(values)

    @classmethod
    def _of(cls, values: Tensor, vectors: Tensor, clipped: Tensor) -> "FullCovariance":
        made = cls.__new__(cls)
        made._values, made._vectors, made.clipped = values, vectors, clipped
        return made

    @property
    def eigenvalues(self) -> Float[Tensor, "batch dim"]:
        """Ascending, after clamping."""
        return self._values

    def matvec(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """S v."""
        return self._back(self._values * self.along(v))

    def sample(self, generator: torch.Generator) -> Float[Tensor, "batch dim"]:
        """One draw of N(0, S) for each state."""
        # S^(1/2) z with the symmetric root: the draw does not depend on the signs and order of eigenvectors
        return self._back(self._values.sqrt() * self.along(standard_normal(self._values, generator)))

    def diag(self) -> Float[Tensor, "batch dim"]:
        """The variances."""
        return (self._vectors.square() * self._values.unsqueeze(-2)).sum(-1)

    def logdet(self) -> Float[Tensor, " batch"]:
        """Sum of the logarithms of the eigenvalues."""
        return self._values.log().sum(-1)

    def dense(self) -> Float[Tensor, "batch dim dim"]:
        """The matrices, after clamping."""
        return (self._vectors * self._values.unsqueeze(-2)) @ self._vectors.mT

    def mahalanobis(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """v^T S^-1 v."""
        return squared_over(self.along(v), self._values).sum(-1)

    def corrupted(self, corruption: Corruption) -> "FullCovariance":
        """a^2 S + s^2 I, without another factorisation."""
        values = corruption.a**2 * self._values + corruption.s**2
        return FullCovariance._of(values, self._vectors, torch.zeros_like(self.clipped))

    def along(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """v in the basis of the eigenvectors, in the order of `eigenvalues`."""
        return (v.unsqueeze(-2) @ self._vectors).squeeze(-2)

    def _back(self, v: Tensor) -> Tensor:
        return (self._vectors @ v.unsqueeze(-1)).squeeze(-1)


def standard_normal(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape, dtype and device of `like`."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def squared_over(v: Tensor, variance: Tensor) -> Tensor:
    """v^2 / variance, where 0 / 0 is 0: a point at its own mean."""
    return torch.where(v == 0, torch.zeros_like(v), v.square() / variance)
