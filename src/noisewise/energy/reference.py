"""Reference densities m that bridge the modes of the data: smooth, normalised, easy to draw from, wider than the gaps."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.energy.network import score_of
from noisewise.errors import InvalidInput
from noisewise.targets.target import as_target
from noisewise.typing import check_positive

__all__ = [
    "Reference",
    "Rescaled",
    "StudentT",
    "as_reference",
    "check_covers",
    "gaussian_reference",
    "student_t_reference",
]

# a covariance with a smaller ratio of eigenvalues is that of columns that repeat each other
_SINGULAR = 1e-9


@runtime_checkable
class Reference(Protocol):
    """A normalised density with draws."""

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Normalised log density."""
        ...

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Independent draws."""
        ...


@dataclass(frozen=True)
class StudentT:
    """Multivariate Student t, or a Gaussian where `degrees` is infinite.

    `mean`: [dim]; `factor`: [dim, dim], lower Cholesky factor of the shape matrix (the covariance of a Gaussian; for a t
    the covariance is degrees / (degrees - 2) times it). Methods follow the dtype and device of `x`.
    """

    mean: Float[Tensor, " dim"]
    factor: Float[Tensor, "dim dim"]
    degrees: float | int = math.inf

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return len(self.mean)

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Normalised log density."""
        factor = self.factor.to(x)
        flat = (x - self.mean.to(x)).reshape(-1, self.dim)
        square = torch.linalg.solve_triangular(factor, flat.T, upper=False).square().sum(0).reshape(x.shape[:-1])
        log_volume = float(self.factor.double().diagonal().log().sum())
        dim, nu = self.dim, self.degrees
        if math.isinf(nu):
            return -square / 2 - (dim / 2 * math.log(2 * math.pi) + log_volume)
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - dim / 2 * math.log(nu * math.pi) - log_volume
        return constant - (nu + dim) / 2 * torch.log1p(square / nu)

    def score(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Gradient of the log density."""
        factor = self.factor.to(x)
        offset = x - self.mean.to(x)
        pulled = torch.cholesky_solve(offset.reshape(-1, self.dim).T, factor).T.reshape(x.shape)
        if math.isinf(self.degrees):
            return -pulled
        square = (pulled * offset).sum(-1, keepdim=True)
        return -pulled * (self.degrees + self.dim) / (self.degrees + square)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Independent draws, in the dtype and device of `mean`."""
        eps = torch.randn(n, self.dim, dtype=self.mean.dtype, device=self.mean.device, generator=generator)
        if not math.isinf(self.degrees):
            # a chi-square with nu degrees of freedom is twice a standard gamma with shape nu / 2
            shape = torch.full((n, 1), self.degrees / 2, dtype=eps.dtype, device=eps.device)
            eps = eps * (self.degrees / (2 * torch._standard_gamma(shape, generator=generator))).sqrt()
        return self.mean + eps @ self.factor.T


@dataclass(frozen=True)
class Rescaled:
    """A reference given on the scale of the data, seen on the scale z = (x - shift) / scale.

    `shift`, `scale`: [dim], scale above 0.
    """

    inner: Reference
    shift: Float[Tensor, " dim"]
    scale: Float[Tensor, " dim"]

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Normalised log density of z, Jacobian included."""
        raw = x * self.scale.to(x) + self.shift.to(x)
        return self.inner.log_prob(raw) + self.scale.double().log().sum().to(x)

    def score(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Gradient of the log density in z."""
        return score_of(lambda point: -self.log_prob(point), x)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Independent draws of z."""
        drawn = self.inner.sample(n, generator)
        return (drawn - self.shift.to(drawn)) / self.scale.to(drawn)


def gaussian_reference(data: Float[Tensor, "row dim"], inflate: float | int = 1.0) -> StudentT:
    """The Gaussian with the mean of the data and `inflate`^2 times their covariance, the default bridge.

    Raises `InvalidInput` for fewer than two rows, a constant column, or columns that are linear combinations of others.
    """
    mean, factor = _moments(data, inflate)
    return StudentT(mean, factor)


def student_t_reference(
    data: Float[Tensor, "row dim"], degrees: float | int = 5.0, inflate: float | int = 1.0
) -> StudentT:
    """The multivariate t with the mean of the data and `inflate`^2 times their covariance; heavier tails than a Gaussian.

    `degrees` of freedom, above 2 (below, there is no covariance). Raises `InvalidInput` as `gaussian_reference` does.
    """
    if check_positive("degrees", degrees) <= 2:
        raise InvalidInput(f"degrees must be above 2, got {degrees!r}: below it a t has no covariance to match")
    mean, factor = _moments(data, inflate)
    return StudentT(mean, factor * math.sqrt((degrees - 2) / degrees), degrees)


def as_reference(obj: Any) -> Any:
    """`obj` itself when it has `log_prob` and `sample(n, generator)`; a torch distribution wrapped so that it has.

    Raises `InvalidInput` for anything else.
    """
    if isinstance(obj, torch.distributions.Distribution):
        return as_target(obj)
    missing = [name for name in ("log_prob", "sample") if not callable(getattr(obj, name, None))]
    if missing or isinstance(obj, type):
        raise InvalidInput(
            f"a reference needs log_prob(x) and sample(n, generator); {type(obj).__name__} lacks {' and '.join(missing)}: "
            "use gaussian_reference(data), student_t_reference(data) or a torch.distributions.Distribution"
        )
    return obj


def check_covers(reference: Reference, data: Float[Tensor, "row dim"]) -> None:
    """Raise `InvalidInput` that names the rows where the reference has no density."""
    value = reference.log_prob(data)
    if not isinstance(value, Tensor) or value.shape != (len(data),):
        found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidInput(f"the reference's log_prob must map {tuple(data.shape)} to ({len(data)},), got {found}")
    outside = (~torch.isfinite(value)).nonzero().flatten().tolist()
    if outside:
        shown = ", ".join(map(str, outside[:5])) + (", ..." if len(outside) > 5 else "")
        raise InvalidInput(
            f"the reference has no density at {len(outside)} of {len(data)} rows ({shown}): its support must cover all data; "
            "take a wider one, such as gaussian_reference(data)"
        )


def _moments(data: Tensor, inflate: float | int) -> tuple[Tensor, Tensor]:
    """Mean, and the Cholesky factor of `inflate`^2 times the covariance."""
    check_positive("inflate", inflate)
    if data.ndim != 2 or len(data) < 2:
        raise InvalidInput(f"data must be [row, dim] with at least 2 rows, got shape {tuple(data.shape)}")
    precise = data.double()
    mean = precise.mean(0)
    offset = precise - mean
    covariance = offset.T @ offset / (len(data) - 1)
    constant = (covariance.diagonal() <= 0).nonzero().flatten().tolist()
    if constant:
        raise InvalidInput(f"column {constant[0]} of the data is constant: remove it")
    deviation = covariance.diagonal().sqrt()
    if float(torch.linalg.eigvalsh(covariance / (deviation[:, None] * deviation))[0]) < _SINGULAR:
        raise InvalidInput(
            f"the {data.shape[1]} columns of the {len(data)} rows are linear combinations of each other, so no density of "
            "full dimension fits: remove columns, or reduce them by principal components"
        )
    return mean.to(data), float(inflate) * torch.linalg.cholesky(covariance).to(data)
