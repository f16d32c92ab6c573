"""Draws of p(x | y) for a batch of noisy points y = x + sigma eps, each with a sigma of its own, and the noisy score.

The variance-exploding form of any Gaussian corruption: y = x_t / a, sigma = s / a.
Source: He, Chen, Zhang, Barber & Hernandez-Lobato, AISTATS 2025, arXiv 2410.12456, section 3 and its official code.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from noisewise.denoising.posterior import denoising_tilt
from noisewise.denoising.score import denoising_score, mixed_score, target_score
from noisewise.errors import InvalidInput
from noisewise.neural.steps import StepSizes
from noisewise.sampling.hmc import HMC
from noisewise.sampling.kernel import ChainState, finite
from noisewise.sampling.mala import MALA
from noisewise.targets.target import Target
from noisewise.targets.tilted import Tilt
from noisewise.typing import Cost, check_count, check_positive

__all__ = ["PosteriorDraws", "PosteriorSampler", "fitted_variance"]

_METHODS = ("importance", "annealed", "pool", "digs")
_KERNELS = ("hmc", "mala")
# pairs of a pool draw and a noisy point whose weights are in memory at once
_PAIRS = 2**22

Projection = Callable[[Tensor], Tensor]


class PosteriorDraws(NamedTuple):
    """Moments of p(x | y) for each noisy point, and the draws behind them; nothing in it carries a gradient.

    `mean_position`, `mean_score`: E[x | y] and E[grad log p(x) | y], `noisy` and 0 where `valid` is False: no draw there had
    a finite density of the target and the point is to be skipped. `ess`: effective number of draws before resampling.
    `langevin_acceptance`, `anneal_acceptance`: per point, NaN where no draw had a density when the moves began; None where no
    such move was made. `cost`: one row is one call.
    `positions`, with `log_prob` and `score` of the target (not of the posterior) and unnormalised `log_weights`, -inf for
    a draw without density; None where the method shares its draws among points ("pool" without resampling). Averaged over
    draws, exp(log_weights) of "importance" and "annealed" without bias estimates the integral of p(x) N(y; x, sigma^2).
    """

    noisy: Float[Tensor, "batch dim"]
    sigma: Float[Tensor, " batch"]
    mean_position: Float[Tensor, "batch dim"]
    mean_score: Float[Tensor, "batch dim"]
    ess: Float[Tensor, " batch"]
    valid: Bool[Tensor, " batch"]
    langevin_acceptance: Float[Tensor, " batch"] | None
    anneal_acceptance: Float[Tensor, " batch"] | None
    cost: Cost
    positions: Float[Tensor, "draw batch dim"] | None = None
    log_prob: Float[Tensor, "draw batch"] | None = None
    score: Float[Tensor, "draw batch dim"] | None = None
    log_weights: Float[Tensor, "draw batch"] | None = None

    def noisy_score(
        self, identity: str = "mixed", variance: float | int | Float[Tensor, " batch"] = 1.0
    ) -> Float[Tensor, "batch dim"]:
        """grad log of the noisy density at `noisy` by the "denoising", "target" or "mixed" identity; 0 where not `valid`.

        `variance` v, for "mixed": it is c of the denoising and 1 - c of the target identity, c = sigma^2 / (v + sigma^2),
        without variance where p is N(m, v I); the paper has 1. `fitted_variance` finds one per noise level.
        Raises `InvalidInput` for another identity or v that is not above 0.
        """
        # the moments are already weighted: to the identities they are one draw
        position, score = self.mean_position.unsqueeze(0), self.mean_score.unsqueeze(0)
        if identity == "denoising":
            return denoising_score(position, self.noisy, self.sigma).value
        if identity == "target":
            return target_score(score, self.sigma).value
        if identity == "mixed":
            _check_variance(variance)
            return mixed_score(position, score, self.noisy, self.sigma, variance=variance).value
        raise InvalidInput(f"identity must be denoising, target or mixed, got {identity!r}")


@dataclass(frozen=True)
class PosteriorSampler:
    """Draws of p(x | y), proportional to p(x) N(y; x, sigma^2 I), for many noisy points at once.

    `method`:
    - "importance": `particles` proposals N(y, sigma^2 I) for each point, of weight p(x). Best in low dimension.
    - "annealed": the same, moved towards the posterior by annealed importance sampling in `anneal_steps` stages (1 is plain
      importance sampling) with `leapfrog` steps of the `kernel` between them: "hmc" (one trajectory) or "mala".
    - "pool": the proposals of all points are one pool, of weight p(x_j) N(y_i; x_j, sigma_i^2) / sum_k N(x_j; y_k, sigma_k^2)
      for point i: as many draws as there are in all, but they must be near each other, so low dimension only.
    - "digs": `langevin_steps` MALA moves from the clean x that y was made of, as in diffusive Gibbs sampling: an exact draw
      when that x follows the target, and close when it nearly does. `particles` chains leave it, or one with `resample`.
      Without a start it is "importance".

    `resample`: keep one draw of each point, by the Gumbel-max trick, as the paper does; otherwise all count, weighted.
    `langevin_steps`: MALA moves of every kept draw on its posterior; its last `averaged` states are kept.
    `box`: truncate the proposals to [-box, box] in each coordinate, and the target with them; the paper has 1000.
    Raises `InvalidInput` for settings out of range or without effect in the method.
    """

    method: str = "importance"
    particles: int = 8
    anneal_steps: int = 1
    kernel: str = "hmc"
    leapfrog: int = 1
    resample: bool = False
    langevin_steps: int = 0
    averaged: int = 1
    box: float | int | None = None

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise InvalidInput(f"method must be one of {', '.join(_METHODS)}, got {self.method!r}")
        if self.kernel not in _KERNELS:
            raise InvalidInput(f"kernel must be hmc or mala, got {self.kernel!r}")
        for name, least in (
            ("particles", 1),
            ("anneal_steps", 1),
            ("leapfrog", 1),
            ("averaged", 1),
            ("langevin_steps", 0),
        ):
            check_count(name, getattr(self, name), least)
        if self.box is not None:
            check_positive("box", self.box)
        if self.anneal_steps > 1 and self.method != "annealed":
            raise InvalidInput(f"anneal_steps={self.anneal_steps} needs method='annealed', got {self.method!r}")
        if self.averaged > max(self.langevin_steps, 1):
            raise InvalidInput(
                f"averaged={self.averaged} states cannot be kept of langevin_steps={self.langevin_steps} moves"
            )
        if self.method == "digs" and self.langevin_steps == 0:
            raise InvalidInput("method 'digs' moves from the clean x: give langevin_steps of at least 1, got 0")
        if self.method == "pool" and self.langevin_steps and not self.resample:
            raise InvalidInput(
                f"the pool's draws belong to no single point: langevin_steps={self.langevin_steps} needs resample=True"
            )
        if self.method in ("pool", "digs") and self.box is not None:
            raise InvalidInput(f"box={self.box} is for importance and annealed, not for {self.method!r}")

    @torch.no_grad()
    def draw(
        self,
        target: Target,
        noisy: Float[Tensor, "batch dim"],
        sigma: Float[Tensor, " batch"],
        steps: StepSizes | None,
        generator: torch.Generator,
        start: Float[Tensor, "batch dim"] | None = None,
        project: Projection | None = None,
    ) -> PosteriorDraws:
        """Draws for every noisy point, of the dtype and device of `noisy`.

        `sigma`: [batch] noise scales in units of x. `steps`: needed as soon as anything moves. `start`: the clean points of
        method "digs". `project`: for a target that is a density on a subspace, the orthogonal projection [..., dim] on it
        (the removal of the centre of mass): applied to noisy points, noise and scores.
        A value of the target that is not finite is a draw without weight or a rejection, and counted in `cost.nonfinite`.
        Raises `InvalidInput` for points or scales that are not finite, and for missing steps or a start without use.
        """
        self._check(target, noisy, sigma, steps, start, project)
        noisy, sigma = noisy.detach(), sigma.detach()
        counted = _Counted(target, self.box, project)
        if project is not None:
            noisy = project(noisy)
        anneal_acceptance = langevin_acceptance = None
        if self.method == "pool":
            positions = _proposals(noisy, sigma, self.particles, generator, project)
            state = counted.state(positions.flatten(0, 1))
            dimension = noisy.shape[-1] if project is None else _rank(project, noisy)
            pooled = _pool_moments(state, noisy, sigma, dimension, generator if self.resample else None)
            if pooled.chosen is None:
                return _moments_only(noisy, sigma, pooled, counted.cost)
            ess, state, draws = pooled.ess, _rows(state, pooled.chosen), 1
            log_weights = torch.where(pooled.ess > 0, 0.0, -torch.inf).to(noisy).unsqueeze(0)
        elif start is not None:
            clean = start if project is None else project(start)
            draws = 1 if self.resample else self.particles
            # one call for each point, however many chains leave it
            state = ChainState(*(_repeated(part, draws) for part in counted.state(clean)))
            log_weights = torch.where(torch.isfinite(state.log_prob), 0.0, -torch.inf).to(noisy).reshape(draws, -1)
            ess = log_weights.exp().sum(0)
        else:
            draws = self.particles
            state, log_weights, anneal_acceptance = self._weighted(counted, noisy, sigma, steps, generator)
            ess = _normalised(log_weights).square().sum(0).reciprocal().nan_to_num(posinf=0.0)
            if self.resample:
                state, log_weights = self._resampled(counted, state, log_weights, generator)
                draws = 1
        kept = [state]
        if self.langevin_steps:
            assert steps is not None  # checked above
            kept, langevin_acceptance = self._langevin(counted, state, noisy, sigma, draws, steps, generator)
        return _with_moments(noisy, sigma, kept, log_weights, ess, langevin_acceptance, anneal_acceptance, counted.cost)

    def _check(
        self,
        target: Target,
        noisy: Tensor,
        sigma: Tensor,
        steps: StepSizes | None,
        start: Tensor | None,
        project: Projection | None,
    ) -> None:
        if noisy.shape[-1] != target.dim:
            raise InvalidInput(f"noisy has {noisy.shape[-1]} coordinates, but the target has dim {target.dim}")
        named = (
            (("noisy", noisy), ("sigma", sigma))
            if start is None
            else (("noisy", noisy), ("sigma", sigma), ("start", start))
        )
        for name, tensor in named:
            rows = torch.isfinite(tensor.reshape(len(tensor), -1)).all(-1)
            rows = rows & (tensor > 0) if name == "sigma" else rows
            if not bool(rows.all()):
                row = int((~rows).nonzero()[0])
                what = "finite and above 0" if name == "sigma" else "finite"
                raise InvalidInput(f"{name} must be {what}, got {tensor[row].tolist()} in row {row}")
        if steps is None and (self.anneal_steps > 1 or self.langevin_steps):
            raise InvalidInput(
                f"anneal_steps={self.anneal_steps} and langevin_steps={self.langevin_steps} move the draws: give steps, "
                "such as StepSizes.spaced(lo, hi, bins, scale, dim)"
            )
        if start is not None and self.method != "digs":
            raise InvalidInput(f"start is for method 'digs'; {self.method!r} has no use for it")
        if project is not None and self.box is not None:
            raise InvalidInput(f"box={self.box} and project exclude each other: the projection leaves no box in place")

    def _weighted(
        self, counted: "_Counted", noisy: Tensor, sigma: Tensor, steps: StepSizes | None, generator: torch.Generator
    ) -> tuple[ChainState, Tensor, Tensor | None]:
        """Weighted draws by annealing from N(y, sigma^2 I) to the posterior: log pi_k = (k / K) log p + log N, up to a constant.

        The proposal is the likelihood as a function of x, so that every increment of a log weight is log p / K.
        """
        count, stages = self.particles, self.anneal_steps
        if self.box is None:
            positions, log_inside = _proposals(noisy, sigma, count, generator, counted.project), torch.zeros_like(sigma)
        else:
            positions, log_inside = _truncated(noisy, sigma, count, self.box, generator)
        rows = positions.flatten(0, 1)
        if stages == 1 and self.resample:
            # scores of draws that resampling drops would be for nothing
            value = counted.log_prob(rows)
            state = ChainState(rows, value, torch.zeros_like(rows))
        else:
            state = counted.state(rows)
        log_weights = state.log_prob / stages
        if stages == 1:
            return state, log_weights.reshape(count, -1) + log_inside, None
        assert steps is not None  # checked in draw
        kernel: Any = (
            HMC(counted, leapfrogs=self.leapfrog) if self.kernel == "hmc" else MALA(counted, steps=self.leapfrog)
        )
        spread, centre = _repeated(sigma, count).unsqueeze(-1), _repeated(noisy, count)
        alive, accepted = torch.isfinite(log_weights), torch.zeros_like(log_weights)
        for stage in range(1, stages):
            power = stage / stages
            size = _repeated(steps.anneal(sigma, power), count) ** (2 * kernel.metric_exponent)
            noise = counted.noise(kernel, rows, generator)
            state, moved = kernel.advance(state, noise, size.unsqueeze(-1), denoising_tilt(Tilt(power), centre, spread))
            log_weights = log_weights + state.log_prob / stages
            accepted = accepted + moved.acceptance / (stages - 1)
        return state, log_weights.reshape(count, -1) + log_inside, _mean_over_draws(accepted, alive, count)

    def _resampled(
        self, counted: "_Counted", state: ChainState, log_weights: Tensor, generator: torch.Generator
    ) -> tuple[ChainState, Tensor]:
        """One draw per point, with probability proportional to its weight: the largest log weight plus Gumbel noise."""
        uniform = torch.rand(log_weights.shape, dtype=log_weights.dtype, device=log_weights.device, generator=generator)
        # log of -log u: u may be 0 but never 1, so that the noise is never +inf
        chosen = (log_weights - (-uniform.log()).log()).argmax(0)
        batch = log_weights.shape[1]
        kept = _rows(state, chosen * batch + torch.arange(batch, device=chosen.device))
        if self.anneal_steps == 1:
            kept = counted.state(kept.position)
        alive = torch.isfinite(log_weights).any(0)
        return kept, torch.where(alive, 0.0, -torch.inf).to(log_weights).unsqueeze(0)

    def _langevin(
        self,
        counted: "_Counted",
        state: ChainState,
        noisy: Tensor,
        sigma: Tensor,
        draws: int,
        steps: StepSizes,
        generator: torch.Generator,
    ) -> tuple[list[ChainState], Tensor]:
        """The last `averaged` states of MALA on the posterior, and the acceptance of each point."""
        tilt = denoising_tilt(Tilt(), _repeated(noisy, draws), _repeated(sigma, draws).unsqueeze(-1))
        size = _repeated(steps.langevin(sigma).square(), draws).unsqueeze(-1)
        alive, accepted = torch.isfinite(state.log_prob), torch.zeros_like(state.log_prob)
        kept: list[ChainState] = []
        kernel = MALA(counted)
        for index in range(self.langevin_steps):
            state, moved = kernel.advance(state, counted.noise(kernel, state.position, generator), size, tilt)
            accepted = accepted + moved.acceptance / self.langevin_steps
            if index >= self.langevin_steps - self.averaged:
                kept.append(state)
        return kept, _mean_over_draws(accepted, alive, draws)


def fitted_variance(
    draws: PosteriorDraws, steps: StepSizes, variance: float | int | Float[Tensor, " bin"] = 1.0
) -> Float[Tensor, " bin"]:
    """The v of the mixed identity that has the least estimated variance over the weighted draws in each bin of `steps`.

    Least squares for c = sigma^2 / (v + sigma^2) where all points of a bin share their sigma, reweighted least squares
    otherwise. `variance`: [bin] or one number, what to improve on, by a factor of at most 1000: it stays where it is better,
    where a bin has no weighted draws, and where the draws say nothing. Smooth the result over calls (of its logarithm)
    before use as `noisy_score(variance=v[steps.bins(sigma)])`. Trust it where `ess` is above 2 or so: where one draw has
    nearly all the weight its spread is one about itself (on 40 modes, from sigma = 46 on, 32 draws gave a fit of no use).
    Raises `InvalidInput` for draws without particles or v that is not above 0.
    """
    if draws.positions is None or draws.score is None or draws.log_weights is None:
        raise InvalidInput("fitted_variance compares the draws of each point; a pool without resampling has none")
    _check_variance(variance)
    # the delta method's variance of a self-normalised mean: sum of w^2 (f - mean)^2
    squared = _normalised(draws.log_weights).square().unsqueeze(-1)
    position = draws.positions - draws.mean_position
    score = torch.where(squared > 0, draws.score - draws.mean_score, 0.0)
    index, bins = steps.bins(draws.sigma), len(steps.levels)
    per_row = torch.stack(
        [(squared * product).double().sum((0, 2)) for product in (position.square(), position * score, score.square())]
    )
    noise = draws.sigma.double().square()

    def summed(rows: Tensor) -> Tensor:
        return torch.zeros(bins, dtype=torch.float64, device=rows.device).index_add_(0, index, rows)

    def spread(v: Tensor) -> Tensor:
        row = v[index]
        return summed((per_row[0] + 2 * row * per_row[1] + row.square() * per_row[2]) / (row + noise).square())

    first = torch.as_tensor(variance, dtype=torch.float64, device=noise.device).expand(bins)
    best, least = first, spread(first)
    v = first
    for _ in range(_REWEIGHTINGS):
        # where the derivative of the spread vanishes, the powers of v + sigma^2 held fixed
        weight = (v[index] + noise) ** -3
        above = summed(weight * (per_row[0] - per_row[1] * noise))
        below = summed(weight * (per_row[2] * noise - per_row[1]))
        # below 0 in numerator or denominator the best c is above 1 or below 0: then the nearest v has c = 1 or 0
        ratio = above.clamp(min=0) / below.clamp(min=0)
        v = torch.where(ratio.isnan(), first, ratio).clamp(first / 1000, first * 1000)
        here = spread(v)
        best, least = torch.where(here < least, v, best), torch.minimum(here, least)
    return best.to(draws.sigma)


_REWEIGHTINGS = 8


class _Counted:
    """The target as the moves see it: calls counted, values that are not finite made -inf, box and projection applied."""

    def __init__(self, target: Target, box: float | int | None, project: Projection | None) -> None:
        self.dim = target.dim
        self.project = project
        self._target = target
        self._box = box
        self._gradients = self._energies = 0
        self._nonfinite: int | Tensor = 0

    @property
    def cost(self) -> Cost:
        return Cost(self._gradients, self._energies, nonfinite=int(self._nonfinite))

    def log_prob(self, x: Tensor) -> Tensor:
        self._energies += len(x)
        value = self._target.log_prob(x).detach()
        return self._settled(x, value, torch.isfinite(value))

    def log_prob_and_score(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._gradients += len(x)
        value, score = (part.detach() for part in self._target.log_prob_and_score(x))
        good = finite(value, score)
        score = torch.where(good.unsqueeze(-1), score, 0.0)
        return self._settled(x, value, good), score if self.project is None else self.project(score)

    def state(self, position: Tensor) -> ChainState:
        return ChainState(position, *self.log_prob_and_score(position))

    def noise(self, kernel: Any, position: Tensor, generator: torch.Generator) -> Any:
        """The random numbers of a move, its Gaussian ones (the first field of either kernel) in the subspace."""
        noise = kernel.noise(position, generator)
        return noise if self.project is None else noise._replace(**{noise._fields[0]: self.project(noise[0])})

    def _settled(self, x: Tensor, value: Tensor, good: Tensor) -> Tensor:
        self._nonfinite = self._nonfinite + (~good).sum()
        if self._box is not None:
            good = good & (x.abs() <= self._box).all(-1)
        return torch.where(good, value, -torch.inf)


class _Pooled(NamedTuple):
    """Moments of each point over the pool, and the pool draw that Gumbel-max chose for it."""

    mean_position: Tensor
    mean_score: Tensor
    ess: Tensor
    chosen: Tensor | None


def _pool_moments(
    pool: ChainState, noisy: Tensor, sigma: Tensor, dimension: int, generator: torch.Generator | None
) -> _Pooled:
    """Self-normalised means over the pool, in chunks: a running maximum keeps every exponent at most 0."""
    batch = len(noisy)
    top = noisy.new_full((batch,), -torch.inf)
    highest, chosen = top.clone(), torch.zeros(batch, dtype=torch.long, device=noisy.device)
    total, squares = torch.zeros_like(top), torch.zeros_like(top)
    values = torch.cat([pool.position, pool.score], -1)
    sums = noisy.new_zeros(batch, values.shape[-1])
    size = max(1, _PAIRS // batch)
    for first in range(0, len(values), size):
        part = slice(first, first + size)
        # differences, not |x|^2 - 2 x y + |y|^2: at small sigma the latter has no digits left
        distance = torch.cdist(pool.position[part], noisy, compute_mode="donot_use_mm_for_euclid_dist")
        log_kernel = -0.5 * (distance / sigma).square() - dimension * sigma.log()
        log_weights = log_kernel + (pool.log_prob[part] - log_kernel.logsumexp(-1)).unsqueeze(-1)
        if generator is not None:
            uniform = torch.rand(log_weights.shape, dtype=noisy.dtype, device=noisy.device, generator=generator)
            best, where = (log_weights - (-uniform.log()).log()).max(0)
            chosen = torch.where(best > highest, first + where, chosen)
            highest = torch.maximum(best, highest)
        new = torch.maximum(top, log_weights.amax(0))
        # where no draw had a density yet both are -inf
        reference = torch.where(torch.isfinite(new), new, 0.0)
        shrink, weights = (top - reference).exp(), (log_weights - reference).exp()
        total = total * shrink + weights.sum(0)
        squares = squares * shrink.square() + weights.square().sum(0)
        sums = sums * shrink.unsqueeze(-1) + weights.T @ values[part]
        top = new
    means = sums / total.unsqueeze(-1)
    ess = torch.where(total > 0, total.square() / squares, 0.0)
    position, score = means.split(noisy.shape[-1], -1)
    return _Pooled(position, score, ess, chosen if generator is not None else None)


def _moments_only(noisy: Tensor, sigma: Tensor, pooled: _Pooled, cost: Cost) -> PosteriorDraws:
    valid = pooled.ess > 0
    position = torch.where(valid.unsqueeze(-1), pooled.mean_position, noisy)
    score = torch.where(valid.unsqueeze(-1), pooled.mean_score, 0.0)
    return PosteriorDraws(noisy, sigma, position, score, pooled.ess, valid, None, None, cost)


def _with_moments(
    noisy: Tensor,
    sigma: Tensor,
    kept: list[ChainState],
    log_weights: Tensor,
    ess: Tensor,
    langevin_acceptance: Tensor | None,
    anneal_acceptance: Tensor | None,
    cost: Cost,
) -> PosteriorDraws:
    """Means over the weighted draws, every state of a chain having the weight of its start."""
    batch, dim = noisy.shape
    position = torch.cat([state.position for state in kept]).reshape(-1, batch, dim)
    log_prob = torch.cat([state.log_prob for state in kept]).reshape(-1, batch)
    score = torch.cat([state.score for state in kept]).reshape(-1, batch, dim)
    log_weights = torch.where(torch.isfinite(log_prob), log_weights.repeat(len(kept), 1), -torch.inf)
    valid = torch.isfinite(log_weights).any(0)
    weights = _normalised(log_weights).unsqueeze(-1)
    mean_position = torch.where(valid.unsqueeze(-1), (weights * position).sum(0), noisy)
    return PosteriorDraws(
        noisy, sigma, mean_position, (weights * score).sum(0), torch.where(valid, ess, 0.0), valid,
        langevin_acceptance, anneal_acceptance, cost, position, log_prob, score, log_weights,
    )  # fmt: skip


def _normalised(log_weights: Tensor) -> Tensor:
    """Weights that sum to 1 over draws; all 0 where every one is -inf."""
    alive = torch.isfinite(log_weights).any(0)
    return torch.where(alive, torch.where(alive, log_weights, 0.0).softmax(0), 0.0)


def _proposals(
    noisy: Tensor, sigma: Tensor, count: int, generator: torch.Generator, project: Projection | None
) -> Float[Tensor, "draw batch dim"]:
    eps = torch.randn((count, *noisy.shape), dtype=noisy.dtype, device=noisy.device, generator=generator)
    return noisy + sigma.unsqueeze(-1) * (eps if project is None else project(eps))


def _truncated(
    noisy: Tensor, sigma: Tensor, count: int, box: float | int, generator: torch.Generator
) -> tuple[Float[Tensor, "draw batch dim"], Float[Tensor, " batch"]]:
    """N(y, sigma^2 I) inside [-box, box]^dim by inversion, and the log of its mass there, 0 from 37 sigma outside on."""
    # mirrored to positive y: a box that lies in a tail then lies in the lower one, where float64 keeps its digits
    centre, spread = noisy.double().abs(), sigma.double().unsqueeze(-1)
    low, high = (torch.special.ndtr((edge - centre) / spread) for edge in (-box, box))
    uniform = torch.rand((count, *noisy.shape), dtype=torch.float64, device=noisy.device, generator=generator)
    inside = centre + spread * torch.special.ndtri(low + uniform * (high - low))
    positions = torch.where(noisy < 0, -inside, inside).clamp(-box, box)
    return positions.to(noisy), (high - low).log().sum(-1).to(sigma)


def _rank(project: Projection, like: Tensor) -> int:
    """Dimension of the subspace: the trace of its projection."""
    return round(float(project(torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)).trace()))


def _rows(state: ChainState, rows: Tensor) -> ChainState:
    return ChainState(*(part[rows] for part in state))


def _repeated(rows: Tensor, times: int) -> Tensor:
    """Row r of the result belongs to point r % batch."""
    return rows.repeat(times, *[1] * (rows.ndim - 1))


def _mean_over_draws(acceptance: Tensor, alive: Tensor, draws: int) -> Float[Tensor, " batch"]:
    """Mean acceptance of each point over its draws; one without a density accepts any that has one, which says nothing."""
    shaped, weight = acceptance.reshape(draws, -1), alive.reshape(draws, -1).to(acceptance)
    return (shaped * weight).sum(0) / weight.sum(0)


def _check_variance(variance: float | int | Tensor) -> None:
    tensor = torch.as_tensor(variance)
    if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise InvalidInput(f"variance must be finite and above 0, got {variance!r}")
