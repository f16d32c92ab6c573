"""The Gaussian with the mean and covariance of p(x | x_t), from a model of the noisy density and its derivative.

E[x | x_t] = (x_t + s^2 score) / a and Cov[x | x_t] = (s^2 / a^2) (I + s^2 d score / d x_t): the first two cumulants of an
exponential family. Source: Zhang, Hawkins-Hooker, Paige & Barber, NeurIPS 2023, arXiv 2305.11650, here for a general a.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.denoising.covariance import (
    Covariance,
    DiagonalCovariance,
    FullCovariance,
    IsotropicCovariance,
)
from noisewise.denoising.lanczos import KrylovCovariance, rademacher
from noisewise.denoising.models import Denoiser, Energy, Model, as_model
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.noise import Corruption
from noisewise.typing import check_count, check_positive

__all__ = ["COVARIANCES", "GaussianPosterior", "NonFiniteRows", "gaussian_posterior", "isotropic_variance"]

COVARIANCES = ("full", "diagonal", "hutchinson", "isotropic", "krylov", "none")

_LARGEST_FULL = 4096
# entries of the derivative that are taken in one batched call
_CHUNK_ENTRIES = 2**20
_ASYMMETRY = 1e-2


class NonFiniteRows(InvalidInput):
    """Points at which a model is not finite; `rows`: which of the batch, a mask [batch]."""

    def __init__(self, message: str, rows: Tensor) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class GaussianPosterior:
    """N(mean, covariance), the Gaussian closest to p(x | x_t) in KL(p || Gaussian), for a batch of x_t.

    `mean` has the shape of x_t; `covariance` is an operator on flattened events.
    """

    mean: Float[Tensor, "batch *event"]
    covariance: Covariance

    @cached_property
    def variance(self) -> Float[Tensor, "batch *event"]:
        """Diagonal of the covariance, in the shape of x_t; an estimate by probes for "hutchinson" and "krylov"."""
        return self.covariance.diag().reshape(self.mean.shape)

    @property
    def clipped(self) -> Int[Tensor, " batch"]:
        """How many eigenvalues, or entries of a diagonal, the covariance had below 0: a model that is no noisy density."""
        return self.covariance.clipped

    def sample(self, generator: torch.Generator) -> Float[Tensor, "batch *event"]:
        """One draw for each x_t."""
        return self.mean + self.covariance.sample(generator).reshape(self.mean.shape)

    def log_prob(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Normalised log density of one x for each x_t; -inf where the covariance is singular, as after clipping."""
        offset = (x - self.mean).flatten(1)
        logdet = self.covariance.logdet()
        value = -0.5 * (self.covariance.mahalanobis(offset) + logdet + offset.shape[1] * math.log(2 * math.pi))
        return torch.where(logdet == -torch.inf, -torch.inf, value)


def gaussian_posterior(
    model: Any,
    x_t: Float[Tensor, "batch *event"],
    corruption: Corruption,
    covariance: str = "full",
    rank: int = 8,
    probes: int = 1,
    generator: torch.Generator | None = None,
    variance: float | int | Tensor | None = None,
    force: bool = False,
) -> GaussianPosterior:
    """Mean and covariance of p(x | x_t) for x_t = a x + s eps, from an `Energy`, a `Score` or a `Denoiser`.

    `covariance`, with its cost beyond one score evaluation, one product being a vector-Jacobian product with the score:
    "full", dim products and a factorisation; "diagonal", its exact diagonal, dim products; "hutchinson", the diagonal
    estimated by `probes` products; "krylov", full but never formed, `rank` products per draw; "isotropic", the same number
    for all x_t, `variance=` from `isotropic_variance`, nothing; "none", the mean alone, nothing.
    `generator` gives the probes of "hutchinson" and "krylov", by default one seeded with 0: a chain passes its own.
    `force`: allow "full" above dim 4,096. Events of any shape are flattened inside. Nothing returned carries a graph, but a
    "krylov" posterior keeps that of the score alive.

    Warns (`NoisewiseWarning`) when the derivative of a score or denoiser is asymmetric by more than 1e-2, so that no density
    has it, where all of it is seen ("full"). Raises `InvalidInput` for arguments that do not fit, for a model whose output
    is not finite (rows named), and for an `Energy` without second derivatives, a ReLU network.
    """
    if covariance not in COVARIANCES:
        raise InvalidInput(f"covariance must be one of {COVARIANCES}, got {covariance!r}")
    if not isinstance(x_t, Tensor):
        raise InvalidInput(f"x_t must be a torch tensor, got {type(x_t).__name__}: torch.as_tensor(x_t)")
    if x_t.ndim < 2 or 0 in x_t.shape:
        raise InvalidInput(f"x_t must be [batch, *event] with at least one row and entry, got shape {tuple(x_t.shape)}")
    rank, probes = check_count("rank", rank), check_count("probes", probes)
    if variance is not None and covariance != "isotropic":
        raise InvalidInput(f"variance= belongs to covariance='isotropic', got it with {covariance!r}")
    _refuse(~torch.isfinite(x_t).flatten(1).all(-1), "x_t is not finite")
    model, dim = as_model(model), x_t[0].numel()
    if covariance in ("isotropic", "none"):
        mean = _finite_mean(model, x_t, corruption)
        c = 0.0 if covariance == "none" else _calibrated(variance)
        return GaussianPosterior(mean, IsotropicCovariance(mean.new_full((len(x_t),), c), dim))
    if covariance == "full" and dim > _LARGEST_FULL and not force:
        raise InvalidInput(
            f"covariance='full' at dim {dim:,} means {dim**2:,} entries for each x_t and {dim:,} products; use 'krylov', or "
            "force=True"
        )
    linear = _Linearised(model, x_t, corruption)
    generator = torch.Generator(x_t.device).manual_seed(0) if generator is None else generator
    if covariance == "full":
        operator: Covariance = FullCovariance(linear.matrix())
    elif covariance == "diagonal":
        operator = DiagonalCovariance(linear.diagonal())
    elif covariance == "hutchinson":
        operator = DiagonalCovariance(linear.probed_diagonal(probes, generator))
    else:
        operator = KrylovCovariance(linear.product, linear.mean.flatten(1), generator, rank, probes)
    return GaussianPosterior(linear.mean, operator)


def isotropic_variance(
    model: Any, x: Float[Tensor, "batch *event"], corruption: Corruption, generator: torch.Generator
) -> float:
    """The one variance c that suits all x_t, E[trace Cov[x | x_t]] / dim, from clean data `x` noised once.

    c = (s^2 / a^2) (1 - s^2 E||score||^2 / dim): integration by parts turns the trace of the score's derivative into the
    score's square, so no derivative is taken. One score evaluation per row.
    Raises `InvalidInput` when c is not positive: the model's scores are larger than those of any noisy density.
    Source: Bao, Li, Zhu & Zhang, ICLR 2022, arXiv 2201.06503.
    """
    x_t = corruption.corrupt(x, generator)
    with torch.no_grad():
        score = as_model(model).score(x_t, corruption)
    _refuse(~torch.isfinite(score).flatten(1).all(-1), "the model's output is not finite")
    mean_square = float(score.double().square().mean())
    c = corruption.r**2 * (1 - corruption.s**2 * mean_square)
    if c <= 0:
        raise InvalidInput(
            f"the isotropic variance comes out as {c:.4g}: the mean square of the model's score is {mean_square:.4g}, above "
            f"the 1 / s^2 = {corruption.s**-2:.4g} that noise alone allows; train the model longer, or check the corruption"
        )
    return c


class _Linearised:
    """One evaluation of a model at x_t with its graph, and products with the covariance, shift v + scale J^T v.

    J is the derivative of the score; for a denoiser that of its mean, Cov = (s^2 / a) J, which loses no digits at large s.
    """

    def __init__(self, model: Model, x_t: Tensor, corruption: Corruption) -> None:
        a, s = corruption.a, corruption.s
        self._energy = isinstance(model, Energy)
        with torch.inference_mode(False), torch.enable_grad():
            self._leaf = (x_t.clone() if x_t.is_inference() else x_t.detach()).requires_grad_(True)
            if isinstance(model, Denoiser):
                self._output = model.mean(self._leaf, corruption)
                mean, self._scale, self._shift = self._output.detach(), s**2 / a, 0.0
            else:
                self._output = model.score(self._leaf, corruption)
                mean = (self._leaf.detach() + s**2 * self._output.detach()) / a
                self._scale, self._shift = (s / a) ** 2 * s**2, (s / a) ** 2
        self.mean = mean
        _refuse(~torch.isfinite(mean).flatten(1).all(-1), "the model's output is not finite")
        if not self._output.requires_grad:
            raise InvalidInput(_NOT_TWICE if self._energy else _NO_GRADIENT)

    def product(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """Covariance times v of each state, one vector-Jacobian product."""
        return self._shift * v + self._scale * self._checked(self._pull(v.unsqueeze(0)))[0]

    def probed_diagonal(self, probes: int, generator: torch.Generator) -> Float[Tensor, "batch dim"]:
        """Hutchinson's estimate, the mean of v * (S v) over random signs v."""
        like = self.mean.flatten(1)
        total = torch.zeros_like(like)
        for _ in range(probes):
            v = rademacher(like, generator)
            total = total + v * self.product(v)
        return total / probes

    def diagonal(self) -> Float[Tensor, "batch dim"]:
        """The exact diagonal, from all unit vectors; only a chunk of the derivative exists at a time."""
        parts, zero = [], True
        for first, rows in self._rows():
            zero = zero and not bool(rows.any())
            parts.append(rows[:, :, first : first + len(rows)].diagonal(dim1=0, dim2=2))
        self._refuse_zero(zero)
        return self._shift + self._scale * torch.cat(parts, -1)

    def matrix(self) -> Float[Tensor, "batch dim dim"]:
        """The covariance, symmetrised."""
        derivative = self._checked(torch.cat([rows for _, rows in self._rows()]).movedim(0, 1))
        if not self._energy:
            self._warn_asymmetric(derivative)
        eye = torch.eye(derivative.shape[-1], dtype=derivative.dtype, device=derivative.device)
        return self._shift * eye + self._scale * (derivative + derivative.mT) / 2

    def _rows(self) -> Iterator[tuple[int, Float[Tensor, "row batch dim"]]]:
        """The derivative of every output entry, some rows at a time, each with the index of its first row."""
        batch, dim = self.mean.flatten(1).shape
        chunk = max(1, min(dim, _CHUNK_ENTRIES // (batch * dim)))
        for first in range(0, dim, chunk):
            index = torch.arange(first, min(first + chunk, dim), device=self.mean.device)
            units = torch.zeros((len(index), 1, dim), dtype=self.mean.dtype, device=self.mean.device)
            units[torch.arange(len(index)), 0, index] = 1
            yield first, self._pull(units.expand(-1, batch, -1))

    def _pull(self, v: Float[Tensor, "row batch dim"]) -> Float[Tensor, "row batch dim"]:
        """J^T v for several v at once, one by one where the model's operations cannot be batched."""
        shaped = v.reshape(len(v), *self.mean.shape)
        with torch.inference_mode(False):
            if len(v) == 1:
                pulled = self._vector_jacobian(shaped[0], False).unsqueeze(0)
            else:
                try:
                    pulled = self._vector_jacobian(shaped, True)
                except RuntimeError:
                    pulled = torch.stack([self._vector_jacobian(one, False) for one in shaped])
        pulled = pulled.reshape(v.shape)
        _refuse(~torch.isfinite(pulled).all(-1).all(0), "the derivative of the model's output is not finite")
        return pulled

    def _vector_jacobian(self, v: Tensor, batched: bool) -> Tensor:
        (pulled,) = torch.autograd.grad(
            self._output, self._leaf, v, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        if pulled is None:
            raise InvalidInput(_NOT_TWICE if self._energy else _NO_GRADIENT)
        return pulled

    def _checked(self, derivative: Tensor) -> Tensor:
        self._refuse_zero(not bool(derivative.any()))
        return derivative

    def _refuse_zero(self, zero: bool) -> None:
        if zero and self._energy:
            raise InvalidInput(_NOT_TWICE)

    @staticmethod
    def _warn_asymmetric(derivative: Float[Tensor, "batch dim dim"]) -> None:
        gap = float((derivative - derivative.mT).norm() / (derivative + derivative.mT).norm())
        if gap > _ASYMMETRY:
            warnings.warn(
                f"the derivative of the model's output is asymmetric by {gap:.2g} of its size (allowed: {_ASYMMETRY:g}), so it "
                "is the score of no density; its symmetric part is used. Train longer, or train an Energy",
                NoisewiseWarning,
                stacklevel=4,
            )


_NOT_TWICE = (
    "the Hessian of the energy is exactly zero: activation not twice differentiable (ReLU and its like); use SiLU, softplus "
    "or tanh"
)
_NO_GRADIENT = (
    "the model's output does not depend on x_t through torch operations, so it has no derivative: no detach(), .item(), numpy "
    "or torch.no_grad() inside it"
)


def _finite_mean(model: Model, x_t: Tensor, corruption: Corruption) -> Tensor:
    with torch.no_grad():
        mean = model.mean(x_t.detach(), corruption)
    _refuse(~torch.isfinite(mean).flatten(1).all(-1), "the model's output is not finite")
    return mean


def _calibrated(variance: float | int | Tensor | None) -> float:
    if variance is None:
        raise InvalidInput(
            "covariance='isotropic' needs variance=: calibrate first, isotropic_variance(model, x, corruption, generator)"
        )
    return check_positive("variance", variance.item() if isinstance(variance, Tensor) else variance)


def _refuse(bad: Tensor, what: str) -> None:
    """Raise `NonFiniteRows` naming the rows where `bad` [batch] holds: at most eight of them."""
    if not bool(bad.any()):
        return
    rows = bad.nonzero().flatten().tolist()
    shown = ", ".join(str(row) for row in rows[:8]) + (", ..." if len(rows) > 8 else "")
    raise NonFiniteRows(f"{what} in {len(rows)} of {len(bad)} rows: {shown}", bad)
