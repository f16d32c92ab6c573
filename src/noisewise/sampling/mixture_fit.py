"""Mixtures fitted to draws: a full-covariance Gaussian mixture by EM with the number of components chosen by BIC."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.sampling.importance import largest_power
from noisewise.targets.gaussian_mixture import GaussianMixture

__all__ = ["StudentMixture", "fit_mixture", "fit_possible", "reweighted", "tempered_weights"]

_GRID = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 56, 64)
# BIC is searched on a subsample; the chosen model is fitted to all draws
_SEARCH_DRAWS = 2000
# above this a full covariance per component asks for more draws than a warm-up gives
_FULL_COVARIANCE_DIM = 60
_WIDEN = 1.05
_WEIGHT_FLOOR = 0.05
# weights are cut to a power under which this share of the draws counts
_LEAST_EFFECTIVE = 0.1
# draws with less than this share of the mean weight are places where a chain was stuck
_IMPOSSIBLE = 1e-3
# below this share of impossible draws a second fit changes nothing
_FEW_DROPPED = 0.01


def fit_mixture(draws: Float[Tensor, "draw dim"], seed: int, max_components: int = 64) -> GaussianMixture:
    """Fit a Gaussian mixture to `draws`, widened by 5 % and with a floor on the weights, in the draws' dtype and device.

    The search over the number of components stops when BIC has risen three times in a row. Covariances are full up to 60
    dimensions, diagonal above. EM is scikit-learn's. Raises `InvalidInput` with fewer than two draws or non-finite ones.
    """
    count, dim = draws.shape
    if count < 2 or not bool(torch.isfinite(draws).all()):
        raise InvalidInput(
            f"a mixture needs at least two finite draws, got {count} with finite={bool(torch.isfinite(draws).all())}"
        )
    mixture = require("sklearn.mixture", "sampling").GaussianMixture
    limits = require("threadpoolctl", "sampling").threadpool_limits
    full = dim <= _FULL_COVARIANCE_DIM
    rows = draws.detach().double().cpu()
    # work on coordinates of unit scale, so that scikit-learn's absolute ridge means the same on every target
    centre, scale = rows.mean(0), rows.std(0).clamp(min=1e-12)
    table = ((rows - centre) / scale).numpy()

    def fit(data: Any, components: int, restarts: int) -> Any:
        model = mixture(
            components,
            covariance_type="full" if full else "diag",
            n_init=restarts,
            random_state=seed,
            reg_covar=1e-7,
            max_iter=200,
            init_params="k-means++",
        )
        return _quietly(model, data)

    # in random order: rows come step by step, and a stride would see only some of the chains
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:_SEARCH_DRAWS].sort().values
    search = table[order.numpy()]
    # one thread: the tables are small, and results do not depend on the machine
    with limits(1):
        best, best_bic, rises = 1, math.inf, 0
        for components in _GRID:
            if components > max_components or components * (dim + 1) > len(search):
                break
            bic = fit(search, components, 2).bic(search)
            best, best_bic, rises = (components, bic, 0) if bic < best_bic else (best, best_bic, rises + 1)
            if rises == 3:
                break
        model = fit(table, best, 2)
    weights = torch.as_tensor(model.weights_).clamp(min=_WEIGHT_FLOOR / best)
    covariances = _WIDEN * _shrunk(torch.as_tensor(model.covariances_), torch.as_tensor(model.weights_), count, dim)
    means = torch.as_tensor(model.means_) * scale + centre
    covariances = covariances * (scale.outer(scale) if full else scale**2)
    return GaussianMixture(means.to(draws), covariances.to(draws), (weights / weights.sum()).to(draws))


def fit_possible(
    draws: Float[Tensor, "draw dim"], log_prob: Float[Tensor, " draw"], seed: int, max_components: int = 64
) -> tuple[GaussianMixture, Bool[Tensor, " draw"]]:
    """A mixture fitted to those draws that the target holds possible, and which those are.

    Chains can be stuck in places of no weight. A fit to all draws takes such a place for a mode, and the ratio target /
    mixture shows that it is none. Of genuine draws fewer than one in a thousand is dropped on average, since the mean of
    mixture / target over the target is 1. `log_prob`: of the target at the draws.
    """
    mixture = fit_mixture(draws, seed, max_components)
    possible = tempered_weights(log_prob - mixture.log_prob(draws)) * len(draws) > _IMPOSSIBLE
    if int((~possible).sum()) > len(draws) * _FEW_DROPPED:
        mixture = fit_mixture(draws[possible], seed, max_components)
    return mixture, possible


def tempered_weights(log_weight: Float[Tensor, " draw"]) -> Float[Tensor, " draw"]:
    """Importance weights with sum 1, cut to a power under which a tenth of the draws count: no lucky draw decides alone."""
    power = largest_power(log_weight, _LEAST_EFFECTIVE)
    return torch.where(torch.isfinite(log_weight), power * log_weight, -torch.inf).softmax(0)


def reweighted(
    mixture: GaussianMixture, draws: Float[Tensor, "draw dim"], weight: Float[Tensor, " draw"]
) -> GaussianMixture:
    """The mixture with component weights from weighted draws of it, its components as they are.

    A mode that few chains had reached gets its due. Source: population Monte Carlo, Cappe, Douc, Guillin, Marin & Robert,
    Statistics and Computing 18, 2008.
    """
    weights = (weight @ mixture.responsibilities(draws)).clamp(min=_WEIGHT_FLOOR / len(mixture.means))
    return GaussianMixture(mixture.means, mixture.covariances, weights / weights.sum())


def _shrunk(covariances: Tensor, weights: Tensor, count: int, dim: int) -> Tensor:
    """Each full covariance moved towards its own diagonal as if by `dim` further draws: few draws stay invertible.

    Not towards the mean of all: components differ in scale by orders of magnitude, and a narrow mode must stay narrow.
    """
    if covariances.ndim == 2:
        return covariances
    own = (weights * count).reshape(-1, 1, 1)
    diagonal = torch.diag_embed(covariances.diagonal(dim1=-2, dim2=-1))
    return (own * covariances + dim * diagonal) / (own + dim)


def _quietly(model: Any, data: Any) -> Any:
    """Fit without scikit-learn's convergence warnings: BIC judges the result, and exactness never depends on it."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(data)


@dataclass(frozen=True)
class StudentMixture:
    """A mixture of multivariate t distributions on the centres and shapes of a Gaussian mixture: the same, heavier tails.

    `degrees` of freedom, above 2 for a finite variance. An independence proposal must not be narrower than its target.
    """

    gaussian: GaussianMixture
    degrees: float | int = 5.0

    def __post_init__(self) -> None:
        if not self.degrees > 0:
            raise InvalidInput(f"degrees of freedom must be above 0, got {self.degrees!r}")

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return self.gaussian.dim

    def log_prob(self, x: Float[Tensor, "row dim"]) -> Float[Tensor, " row"]:
        """Normalised log density."""
        means, root, log_weights = self._parts(x)
        offset = x.unsqueeze(-2) - means
        standard = torch.linalg.solve_triangular(root, offset.unsqueeze(-1), upper=False).squeeze(-1)
        nu, dim = self.degrees, self.dim
        constant = math.lgamma((nu + dim) / 2) - math.lgamma(nu / 2) - 0.5 * dim * math.log(nu * math.pi)
        log_det = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_kernel = -0.5 * (nu + dim) * torch.log1p(standard.square().sum(-1) / nu)
        return (log_weights + constant - log_det + log_kernel).logsumexp(-1)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Exact draws: a Gaussian over the root of a chi-square per draw."""
        means, root, log_weights = self._parts(self.gaussian.mode_means)
        chosen = torch.multinomial(log_weights.exp(), n, replacement=True, generator=generator)
        options: dict[str, Any] = {"dtype": means.dtype, "device": means.device, "generator": generator}
        normal = torch.randn((n, self.dim), **options)
        # a chi-square with nu degrees of freedom is twice a standard gamma with shape nu / 2
        shape = torch.full((n,), self.degrees / 2, dtype=means.dtype, device=means.device)
        chi_square = 2 * torch._standard_gamma(shape, generator=generator)
        scaled = normal * (self.degrees / chi_square).sqrt().unsqueeze(-1)
        return means[chosen] + (root[chosen] @ scaled.unsqueeze(-1)).squeeze(-1)

    def _parts(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return (
            self.gaussian.means.to(like),
            torch.linalg.cholesky(self.gaussian.full_covariances.to(like)),
            self.gaussian.weights.to(like).log(),
        )
