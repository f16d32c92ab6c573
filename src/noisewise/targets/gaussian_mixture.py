"""Gaussian mixtures with closed-form score, corruption and denoising posterior, and benchmarks made of them."""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.targets._mixture_components import Components, make_components
from noisewise.typing import check_count, check_positive

__all__ = ["GaussianMixture", "gmm40", "gmm40_test_function", "two_modes"]


class GaussianMixture:
    """A mixture of Gaussians, normalised; every method follows the dtype and device of `x`.

    `means`: [modes, dim]. `covariances`: a number or [modes] (isotropic variances), [modes, dim] (diagonals), or
    [modes, dim, dim] (full). A 2-D tensor is always read as diagonals; one full matrix shared by all modes is given as
    [1, dim, dim]. `weights`: [modes], positive, sum 1; equal by default. Raises `InvalidInput` for anything else.

    `log_normalizer` is 0; `mode_means` are the `means`.
    """

    log_normalizer = 0.0

    def __init__(
        self,
        means: Tensor | Sequence,
        covariances: Tensor | Sequence | float | int,
        weights: Tensor | Sequence | None = None,
    ) -> None:
        self.means = _checked_means(means)
        self.dim = self.means.shape[1]
        self.covariances = _checked_covariances(covariances, self.means)
        self.weights = _checked_weights(weights, self.means)
        self._components: dict[tuple[torch.dtype, torch.device], Components] = {}

    def __repr__(self) -> str:
        kind = ("isotropic", "diagonal", "full")[self.covariances.ndim - 1]
        return f"GaussianMixture(modes={len(self.means)}, dim={self.dim}, covariances={kind}, dtype={self.means.dtype})"

    @property
    def mode_means(self) -> Float[Tensor, "modes dim"]:
        """Centres to which draws can be assigned."""
        return self.means

    @property
    def full_covariances(self) -> Float[Tensor, "modes dim dim"]:
        """Covariance matrices of the components, whatever form they were given in."""
        if self.covariances.ndim == 3:
            return self.covariances
        variances = self.covariances.reshape(len(self.means), -1).expand(-1, self.dim)
        return torch.diag_embed(variances)

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> "GaussianMixture":
        """The same mixture with its parameters in another dtype or on another device."""
        return GaussianMixture(*(tensor.to(device, dtype) for tensor in (self.means, self.covariances, self.weights)))

    def _at(self, x: Tensor) -> Components:
        key = (x.dtype, x.device)
        if key not in self._components:
            if x.dtype not in _LOWEST_EXPONENT:
                raise InvalidInput(f"x must be float32 or float64, got {x.dtype}")
            self._components[key] = make_components(self.means, self.covariances, self.weights, x.dtype, x.device)
        return self._components[key]

    def _columns(self, x: Tensor) -> Tensor:
        """Rows of x as columns [dim, n]: reductions over modes and coordinates then run over contiguous rows."""
        if x.shape[-1] != self.dim:
            raise InvalidInput(
                f"x has {x.shape[-1]} coordinates (shape {tuple(x.shape)}), the mixture has dim {self.dim}"
            )
        columns = x.t() if x.ndim == 2 else x.reshape(-1, self.dim).t()
        # for a few rows the copy costs more than it gains
        return columns if columns.shape[1] * len(self.means) <= _FEW_ELEMENTS else columns.contiguous()

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Normalised log density."""
        top, unnormalised = _softmax_parts(self._at(x).log_joint(self._columns(x))[0])
        return (top + unnormalised.sum(0).log()).reshape(x.shape[:-1])

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score in one pass without autograd.

        Nothing is recorded unless `x` requires a gradient; then both can be differentiated, for example to a Hessian.
        """
        components, columns = self._at(x), self._columns(x)
        rows = _CACHED_ELEMENTS // self.means.numel()
        if columns.shape[1] <= 2 * rows or x.device.type != "cpu":
            log_prob, score = _value_and_score(components, columns)
        else:
            parts = [_value_and_score(components, part) for part in columns.split(max(rows, 64), dim=1)]
            log_prob, score = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts], dim=1)
        if x.ndim == 2:
            return log_prob, score.t()
        return log_prob.reshape(x.shape[:-1]), score.t().reshape(x.shape)

    def score(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Gradient of the log density."""
        return self.log_prob_and_score(x)[1]

    def responsibilities(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch modes"]:
        """Probability of each component given x; rows sum to 1."""
        log_joint, _ = self._at(x).log_joint(self._columns(x))
        return log_joint.softmax(0).t().reshape(*x.shape[:-1], len(self.means))

    def component(self, x: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        """Index of the most probable component of each point."""
        return self._at(x).log_joint(self._columns(x))[0].argmax(0).reshape(x.shape[:-1])

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Exact independent draws, in the mixture's dtype and device."""
        n = check_count("n", n, minimum=0)
        source = self.means.device if generator is None else generator.device
        # float64 weights: multinomial's float32 running sums lose the tail of many components
        probability = self.weights.to("cpu", torch.float64).to(source)
        if n == 0:
            return self.means.new_empty(0, self.dim)
        label = torch.multinomial(probability, n, replacement=True, generator=generator).to(self.means.device)
        eps = torch.randn(n, self.dim, dtype=self.means.dtype, device=source, generator=generator).to(self.means.device)
        if self.covariances.ndim < 3:
            deviation = self.covariances.sqrt().reshape(len(self.means), -1)
            return self.means[label] + deviation[label] * eps
        draws = torch.empty_like(eps)
        for mode, factor in enumerate(torch.linalg.cholesky(self.covariances)):
            rows = label == mode
            draws[rows] = self.means[mode] + eps[rows] @ factor.T
        return draws

    def mean(self) -> Float[Tensor, " dim"]:
        """Mean of the whole mixture."""
        return self.weights @ self.means

    def covariance(self) -> Float[Tensor, "dim dim"]:
        """Covariance of the whole mixture."""
        offset = self.means - self.mean()
        within = torch.einsum("k,kij->ij", self.weights, self.full_covariances)
        return within + torch.einsum("k,ki,kj->ij", self.weights, offset, offset)

    def noisy(self, a: float, s: float) -> "GaussianMixture":
        """The law of x_t = a x + s eps, again a mixture: means a m, covariances a^2 S + s^2 I. `a`, `s` above 0."""
        a, s = check_positive("a", a), check_positive("s", s)
        widened = a**2 * self.covariances
        if widened.ndim == 3:
            widened = widened + s**2 * torch.eye(self.dim, dtype=widened.dtype, device=widened.device)
        else:
            widened = widened + s**2
        return GaussianMixture(a * self.means, widened, self.weights)

    def posterior_components(
        self, x_t: Float[Tensor, "*batch dim"], a: float, s: float
    ) -> tuple[Float[Tensor, "*batch modes"], Float[Tensor, "*batch modes dim"], Float[Tensor, "modes dim dim"]]:
        """Weights, means and covariances of the mixture p(x | x_t), the covariances shared by all x_t = a x + s eps.

        With G = a S (a^2 S + s^2 I)^-1: means m + G (x_t - a m), covariances (s^2 / a) G. `a`, `s` above 0.
        """
        weights = self.noisy(a, s).responsibilities(x_t)
        covariances = self.full_covariances.to(torch.float64)
        eye = torch.eye(self.dim, dtype=torch.float64, device=covariances.device)
        gain = a * torch.linalg.solve(a**2 * covariances + s**2 * eye, covariances)
        gain = ((gain + gain.mT) / 2).to(x_t)
        means = self.means.to(x_t)
        innovation = x_t.unsqueeze(-2) - a * means
        return weights, means + torch.einsum("kij,...kj->...ki", gain, innovation), (s**2 / a) * gain

    def posterior(
        self, x_t: Float[Tensor, "*batch dim"], a: float, s: float
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim dim"]]:
        """Mean and covariance of p(x | x_t) for x_t = a x + s eps, in closed form. `a`, `s` above 0."""
        weights, means, covariances = self.posterior_components(x_t, a, s)
        mean = torch.einsum("...k,...ki->...i", weights, means)
        offset = means - mean.unsqueeze(-2)
        within = torch.einsum("...k,kij->...ij", weights, covariances)
        return mean, within + torch.einsum("...k,...ki,...kj->...ij", weights, offset, offset)


def _value_and_score(components: Components, columns: Tensor) -> tuple[Tensor, Tensor]:
    log_joint, residual = components.log_joint(columns)
    if log_joint.numel() <= _FEW_ELEMENTS:
        # the largest share is exp(top) over the sum of all, which gives that sum without another pass
        share = log_joint.softmax(0)
        return log_joint.amax(0) - share.amax(0).log(), components.pull(residual, share)
    top, unnormalised = _softmax_parts(log_joint)
    total = unnormalised.sum(0)
    return top + total.log(), components.pull(residual, unnormalised) / total


def _softmax_parts(log_joint: Tensor) -> tuple[Tensor, Tensor]:
    """Largest of [modes, n] over modes, and exp of the rest relative to it.

    The exponent is cut just above the smallest normal number: what would underflow is far below rounding, and exp and
    every product after it run an order of magnitude slower on subnormal numbers.
    """
    top = log_joint.amax(0)
    return top, (log_joint - top).clamp_(min=_LOWEST_EXPONENT[log_joint.dtype]).exp_()


# differences [dim, modes, rows] of this many numbers stay in a core's cache; larger batches go through in parts
_CACHED_ELEMENTS = 2**16
# below this many log densities the number of torch calls is the whole cost, and the fused softmax saves some
_FEW_ELEMENTS = 2**10
_LOWEST_EXPONENT = {dtype: 0.92 * math.log(torch.finfo(dtype).tiny) for dtype in (torch.float32, torch.float64)}


def _checked_means(means: Tensor | Sequence) -> Tensor:
    means = torch.as_tensor(means).detach()
    if not means.is_floating_point():
        means = means.to(torch.float32)
    if means.ndim != 2 or 0 in means.shape:
        raise InvalidInput(f"means must have shape [modes, dim], got {tuple(means.shape)}")
    bad = (~torch.isfinite(means)).any(-1).nonzero().flatten()
    if len(bad):
        raise InvalidInput(f"means must be finite, got {means[bad[0]].tolist()} for component {int(bad[0])}")
    return means


def _checked_covariances(covariances: Tensor | Sequence | float | int, means: Tensor) -> Tensor:
    modes, dim = means.shape
    given = torch.as_tensor(covariances).detach().to(means)
    if given.ndim == 0:
        given = given.expand(modes)
    elif given.shape == (1, dim, dim):
        given = given.expand(modes, dim, dim)
    if given.shape not in ((modes,), (modes, dim), (modes, dim, dim)):
        raise InvalidInput(
            f"covariances of {modes} components in dim {dim} must be a number or have shape [{modes}] (isotropic "
            f"variances), [{modes}, {dim}] (diagonals), [{modes}, {dim}, {dim}] or, shared, [1, {dim}, {dim}] (full); "
            f"got {tuple(given.shape)}"
        )
    given = given.contiguous()
    for mode, covariance in enumerate(given):
        if covariance.ndim == 2:
            _check_positive_definite(mode, covariance)
        elif not bool((torch.isfinite(covariance) & (covariance > 0)).all()):
            raise InvalidInput(f"variances must be finite and above 0, got {covariance.tolist()} for component {mode}")
    return given


def _check_positive_definite(mode: int, covariance: Tensor) -> None:
    shown = covariance.tolist() if len(covariance) <= 4 else f"a {tuple(covariance.shape)} matrix"
    if not bool(torch.isfinite(covariance).all()):
        raise InvalidInput(f"the covariance of component {mode} is not finite: {shown}")
    asymmetry = float((covariance - covariance.T).abs().amax())
    if asymmetry > 1e-5 * float(covariance.abs().amax()):
        raise InvalidInput(f"the covariance of component {mode} is not symmetric (by {asymmetry:.3g}): {shown}")
    if int(torch.linalg.cholesky_ex(covariance)[1]):
        smallest = float(torch.linalg.eigvalsh(covariance.to(torch.float64))[0])
        raise InvalidInput(
            f"the covariance of component {mode} is not positive definite (least eigenvalue {smallest:.3g}): {shown}; "
            "add a small multiple of the identity, or give float64"
        )


def _checked_weights(weights: Tensor | Sequence | None, means: Tensor) -> Tensor:
    modes = len(means)
    if weights is None:
        return means.new_full((modes,), 1 / modes)
    given = torch.as_tensor(weights).detach().to(means)
    if given.shape != (modes,):
        raise InvalidInput(f"weights must have shape [{modes}], one per component, got {tuple(given.shape)}")
    if not bool((torch.isfinite(given) & (given > 0)).all()):
        raise InvalidInput(f"weights must be finite and above 0, got {given.tolist()}")
    total = float(given.sum(dtype=torch.float64))
    if abs(total - 1) > 1e-4:
        raise InvalidInput(
            f"weights must sum to 1, got {given.tolist()} with sum {total:.6g}; divide them by their sum"
        )
    return given


def gmm40(dtype: torch.dtype = torch.float32) -> GaussianMixture:
    """Forty equally weighted isotropic Gaussians in the plane, means uniform on [-40, 40]^2, deviation softplus(1).

    The means come from seed 0. Unlike the code it comes from, log densities below -1e4 are kept, not cut to -inf.
    Source: Midgley et al., ICLR 2023 (FAB), section 4.1.
    """
    # the published means are the float32 numbers of torch's generator, whatever dtype is asked for
    means = (torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float32) - 0.5) * 2 * 40
    deviation = math.log1p(math.e)
    return GaussianMixture(means.to(dtype), deviation**2)


def gmm40_test_function(
    dtype: torch.dtype = torch.float32,
) -> tuple[Callable[[Float[Tensor, "*batch 2"]], Float[Tensor, "*batch"]], float]:
    """The quadratic f whose expectation under `gmm40` is benchmarked, and E[f] in closed form (1777.886).

    f(x) = (x + v)^T A (x + v) + b^T (x + v), with v, A, b from seed 0.
    Source: Midgley et al., ICLR 2023 (FAB), appendix on the mixture of Gaussians.
    """
    generator = torch.Generator().manual_seed(0)
    shift = 2 * torch.randn(2, generator=generator, dtype=torch.float32)
    matrix = 2 * torch.rand(2, 2, generator=generator, dtype=torch.float32)
    slope = torch.rand(2, generator=generator, dtype=torch.float32)
    v, a_matrix, b = (tensor.to(torch.float64) for tensor in (shift, matrix, slope))
    mixture = gmm40(torch.float64)
    center = mixture.mean() + v
    expectation = float(center @ a_matrix @ center + b @ center + (a_matrix * mixture.covariance()).sum())

    def quadratic(x: Float[Tensor, "*batch 2"]) -> Float[Tensor, "*batch"]:
        y = x + v.to(x)
        return ((y @ a_matrix.to(x)) * y).sum(-1) + y @ b.to(x)

    return quadratic, expectation


def two_modes(
    dim: int,
    weights: Sequence[float] = (0.3, 0.7),
    separation: float = 10.0,
    scales: Sequence[float] = (1.0, 1.0),
    dtype: torch.dtype = torch.float32,
) -> GaussianMixture:
    """Two isotropic Gaussians, centres `separation` apart along the diagonal and symmetric about 0.

    `weights`: two, positive, sum 1; `scales`: the two standard deviations, above 0. The problem that isolated modes
    pose to a sampler, in any dimension. Raises `InvalidInput`.
    """
    centers, deviations = two_centers(dim, weights, separation, scales)
    return GaussianMixture(centers.to(dtype), deviations.square().to(dtype), torch.tensor(list(weights), dtype=dtype))


def two_centers(
    dim: int, weights: Sequence[float], separation: float, scales: Sequence[float]
) -> tuple[Float[Tensor, "2 dim"], Float[Tensor, "2"]]:
    """Centres (float64) and deviations of a two-mode problem, after checking its arguments."""
    dim = check_count("dim", dim)
    check_positive("separation", separation)
    for name, pair in (("weights", weights), ("scales", scales)):
        if len(pair) != 2:
            raise InvalidInput(f"{name} must be two numbers, one per mode, got {tuple(pair)!r}")
    deviations = torch.tensor([check_positive("scales", scale) for scale in scales], dtype=torch.float64)
    half = torch.full((dim,), separation / 2 / math.sqrt(dim), dtype=torch.float64)
    return torch.stack([-half, half]), deviations
