"""Where a reverse step has the covariance of x0 from: a head, a table, probes, or the whole matrix by Lanczos' process.

A source is called with a `Prediction`, and the level that the step goes to, and gives Cov[x0 | x_t] in units of x0^2: a
tensor of variances in the shape of x_t, or a `Covariance` operator on flattened events.
"""

import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.denoising.covariance import Covariance, clamped, standard_normal
from noisewise.denoising.lanczos import KrylovCovariance
from noisewise.diffusion.head import CovarianceHead
from noisewise.diffusion.model import DiffusionModel, Prediction
from noisewise.diffusion.targets import along_axes, dct_basis, ocm_target
from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = [
    "DctCovariance",
    "DctSource",
    "HeadSource",
    "LanczosSource",
    "ProbeSource",
    "Source",
    "as_source",
    "fit_spectrum",
]


@runtime_checkable
class Source(Protocol):
    """What says Cov[x0 | x_t]; `graph`: whether it needs a prediction that keeps its graph."""

    @property
    def graph(self) -> bool:
        """Whether predictions must be made with `graph=True`."""
        ...

    def __call__(self, prediction: Prediction, previous: int | None = None) -> Tensor | Covariance:
        """Variances in the shape of x_t, or an operator on flattened events."""
        ...


@dataclass(frozen=True)
class HeadSource:
    """The diagonal, by a fitted head: its features come with the prediction, so that it costs next to nothing."""

    head: CovarianceHead
    graph: bool = False

    def __call__(self, prediction: Prediction, previous: int | None = None) -> Float[Tensor, "batch *event"]:
        """diag Cov[x0 | x_t]; of a head fitted by "vlb" what its variance of the step to `previous` implies."""
        with torch.no_grad():
            if self.head.config.objective == "vlb":
                return self.head.implied_variance(prediction, previous)
            return self.head.clean_variance(prediction)


@dataclass(frozen=True)
class ProbeSource:
    """The diagonal, by `probes` backward passes through the network at every step: unbiased, dear, an oracle for heads."""

    probes: int
    generator: torch.Generator
    graph: bool = True

    def __post_init__(self) -> None:
        check_count("probes", self.probes)

    def __call__(self, prediction: Prediction, previous: int | None = None) -> Float[Tensor, "batch *event"]:
        """diag Cov[x0 | x_t], which may be negative where probes are few or the network is no score; 1 at pure noise."""
        r = ocm_target(prediction, self.probes, self.generator)
        prediction.free()
        return torch.where(prediction.a > 0, r * (prediction.s / prediction.a).square(), 1.0)


@dataclass(frozen=True)
class LanczosSource:
    """The whole covariance, trained by nothing: draws by `rank` backward passes a step, no matrix formed.

    The eigenvalues are cut at `largest`, by default the number of entries of an event, which is what a variance of 1 per pixel
    allows along one direction.
    """

    rank: int
    generator: torch.Generator
    largest: float | int | None = None
    graph: bool = True

    def __post_init__(self) -> None:
        check_count("rank", self.rank)

    def __call__(self, prediction: Prediction, previous: int | None = None) -> Tensor | KrylovCovariance:
        """Cov[x0 | x_t] as an operator on flattened events, whose draws keep the prediction's graph alive; 1 at pure noise."""
        flat = prediction.clean.flatten(1)
        shape = prediction.clean.shape
        scale = (prediction.s / prediction.a).square()

        def product(v: Tensor) -> Tensor:
            shaped = v.reshape(shape)
            return torch.where(prediction.a > 0, scale * prediction.product(shaped), shaped).flatten(1)

        largest = float(flat.shape[1]) if self.largest is None else self.largest
        return KrylovCovariance(product, flat, self.generator, self.rank, largest=largest)


@dataclass(frozen=True)
class DctSource:
    """The head's variances with correlations between pixels: one spectrum a level in the basis of the DCT, `fit_spectrum`.

    Variances are cut at `max_variance`.
    """

    head: CovarianceHead
    spectrum: Float[Tensor, "T *event"]
    max_variance: float | int = math.inf
    graph: bool = False

    def __call__(self, prediction: Prediction, previous: int | None = None) -> "DctCovariance":
        """Cov[x0 | x_t]."""
        with torch.no_grad():
            variance = self.head.clean_variance(prediction).clamp(max=self.max_variance)
        spectrum = self.spectrum.to(variance)[prediction.t.to(self.spectrum.device)]
        return DctCovariance(variance, spectrum)


class DctCovariance:
    """D U^T diag(d) U D: variances from `variance`, correlations diagonal in the DCT; every operation in closed form.

    `variance`, `spectrum` [batch, *event]. D is such that the diagonal is `variance` exactly.
    """

    def __init__(self, variance: Float[Tensor, "batch *event"], spectrum: Float[Tensor, "batch *event"]) -> None:
        flat, self.clipped = clamped(variance.flatten(1))
        self._shape = variance.shape
        self._spectrum = spectrum.clamp(min=0)
        self._bases = [dct_basis(n, variance) for n in variance.shape[1:]]
        own = along_axes(self._spectrum, [basis.T.square() for basis in self._bases])
        self._scale = (flat.reshape(self._shape) / own).sqrt()

    def matvec(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
        """S v."""
        inner = along_axes(self._scale * v.reshape(self._shape), self._bases)
        return (self._scale * self._back(self._spectrum * inner)).flatten(1)

    def sample(self, generator: torch.Generator) -> Float[Tensor, "batch dim"]:
        """One draw of N(0, S) for each state."""
        return (self._scale * self._back(self._spectrum.sqrt() * standard_normal(self._scale, generator))).flatten(1)

    def diag(self) -> Float[Tensor, "batch dim"]:
        """The variances."""
        own = along_axes(self._spectrum, [basis.T.square() for basis in self._bases])
        return (self._scale.square() * own).flatten(1)

    def logdet(self) -> Float[Tensor, " batch"]:
        """log det S."""
        return (2 * self._scale.log() + self._spectrum.log()).flatten(1).sum(1)

    def dense(self) -> Float[Tensor, "batch dim dim"]:
        """The matrices."""
        size = self._scale[0].numel()
        eye = torch.eye(size, dtype=self._scale.dtype, device=self._scale.device)
        return torch.stack([self.matvec(unit.expand(len(self._scale), -1)) for unit in eye], -1)

    def mahalanobis(self, v: Float[Tensor, "batch dim"]) -> Float[Tensor, " batch"]:
        """v^T S^-1 v."""
        inner = along_axes(v.reshape(self._shape) / self._scale, self._bases)
        return (inner.square() / self._spectrum).flatten(1).sum(1)

    def _back(self, v: Tensor) -> Tensor:
        return along_axes(v, [basis.T for basis in self._bases])


def fit_spectrum(
    model: DiffusionModel, head: CovarianceHead, data: Any, levels: int = 25, rows: int = 256, seed: int = 0
) -> Float[Tensor, "T *event"]:
    """The spectrum of the errors of x0 in the DCT, once divided by the head's deviations, at every level; mean 1 at each.

    A pass over `rows` clean events at each of `levels` levels, interpolated between them.
    """
    from noisewise.diffusion.fitting import frozen, interpolated, noised
    from noisewise.diffusion.rows import as_rows

    generator = torch.Generator(device=head.device).manual_seed(seed)
    kept = as_rows(data, (head.config.channels, *head.config.event), head.device)
    grid = torch.linspace(0, len(model.levels) - 1, levels).round().long().unique().tolist()
    found = []
    with frozen(model.network), torch.no_grad():
        for t in grid:
            index = torch.randint(len(kept), (min(rows, len(kept)),), generator=generator, device=head.device)
            prediction, clean, _ = noised(model, kept[index], generator, False, t=t)
            error = (clean - prediction.clean) / head.clean_variance(prediction).sqrt()
            bases = [dct_basis(n, error) for n in error.shape[1:]]
            power = along_axes(error, bases).square().mean(0)
            found.append(power / power.mean())
    return interpolated(grid, torch.stack(found).log(), len(model.levels)).exp()


def as_source(covariance: Any, generator: torch.Generator, *, probes: int = 16, rank: int = 3) -> Source | None:
    """A head, "probes", "lanczos" or a source as a `Source`; None stays None. Raises `InvalidInput`."""
    if covariance is None or (callable(covariance) and hasattr(covariance, "graph")):
        return covariance
    if isinstance(covariance, CovarianceHead):
        return HeadSource(covariance)
    if covariance == "probes":
        return ProbeSource(probes, generator)
    if covariance == "lanczos":
        return LanczosSource(rank, generator)
    raise InvalidInput(f"covariance must be a CovarianceHead, 'probes', 'lanczos' or None, got {covariance!r}")
