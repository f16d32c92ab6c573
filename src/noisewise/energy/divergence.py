"""Fisher divergences between known densities, plain and mixed with a reference, with standard errors.

Plain: blind to the weights of separated modes. Mixed: Zhang et al., 2022, arXiv 2209.07396.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.energy.losses import check_beta, mixture_log_prob
from noisewise.energy.network import score_of
from noisewise.energy.reference import as_reference
from noisewise.errors import InvalidInput
from noisewise.metrics.measurement import Measurement
from noisewise.typing import check_count

__all__ = ["fisher_divergence", "mixture_fisher_divergence"]


def fisher_divergence(
    p: Any, q: Any, n: int = 10_000, *, samples: Float[Tensor, "row dim"] | None = None, seed: int = 0
) -> Measurement:
    """FD(p || q) = E_p |grad log p - grad log q|^2 / 2, by `n` draws of p or on the given `samples` of p.

    `p`, `q`: objects with `score`, or `log_prob` (torch operations, normalised or not); `p` with `sample(n, generator)`
    unless `samples` are given. It is nearly 0 for two densities that differ only in the weights of separated modes: see
    `mixture_fisher_divergence`. Raises `InvalidInput` for objects that lack these.
    """
    p, q = _as_density(p), _as_density(q)
    x = _draws("p", p, n, seed) if samples is None else samples
    return _mean(_half_square(_score(p, x) - _score(q, x)))


def mixture_fisher_divergence(
    p: Any, q: Any, m: Any, beta: float | int = 0.8, n: int = 10_000, *, seed: int = 0
) -> Measurement:
    """FD of beta p + (1 - beta) m to beta q + (1 - beta) m, by `n` draws of the first in two strata; 0 only for p = q.

    `p`, `q`, `m`: objects with NORMALISED `log_prob` and, if they have it, `score`; `p` and `m` with `sample(n, generator)`;
    `m` may be a torch distribution. `beta` in (0, 1], 1 being the plain `fisher_divergence` on the same draws.
    Raises `InvalidInput` for another beta and for objects that lack these. Source: arXiv 2209.07396.
    """
    if beta == 1:
        return fisher_divergence(p, q, n, seed=seed)
    share = check_beta(beta)
    p, q, m = _as_density(p), _as_density(q), as_reference(m)
    n = check_count("n", n, 4)
    from_p = min(max(2, round(share * n)), n - 2)
    x = _draws("p", p, from_p, seed)
    drawn = m.sample(n - from_p, torch.Generator(device=x.device).manual_seed(seed + 1_000_003)).to(x)
    strata = []
    for part in (x, drawn):
        first, second = (_mixed_score(density, m, share, part) for density in (p, q))
        strata.append(_half_square(first - second))
    (a, b), (in_p, in_m) = (share, 1 - share), strata
    value = a * in_p.mean() + b * in_m.mean()
    variance = a**2 * in_p.var() / len(in_p) + b**2 * in_m.var() / len(in_m)
    return Measurement(float(value), math.sqrt(float(variance)), floor=0.0, n=n)


def _mixed_score(q: Any, m: Any, beta: float, x: Tensor) -> Tensor:
    """Score of beta q + (1 - beta) m: the two scores, weighted by what each density holds of the mixture at x."""
    with torch.no_grad():
        log_q = _log_prob(q, x)
        weight = (math.log(beta) + log_q - mixture_log_prob(log_q, _log_prob(m, x), beta)).exp().unsqueeze(1)
    return weight * _score(q, x) + (1 - weight) * _score(m, x)


def _score(density: Any, x: Tensor) -> Tensor:
    if callable(getattr(density, "score", None)):
        return density.score(x).detach()
    return score_of(lambda point: -_log_prob(density, point), x).detach()


def _log_prob(density: Any, x: Tensor) -> Tensor:
    if not callable(getattr(density, "log_prob", None)):
        raise InvalidInput(f"a density needs log_prob(x), {type(density).__name__} has none")
    return density.log_prob(x)


def _as_density(obj: Any) -> Any:
    """A torch distribution with the methods of our densities; anything else as it is."""
    return as_reference(obj) if isinstance(obj, torch.distributions.Distribution) else obj


def _draws(name: str, density: Any, n: int, seed: int) -> Tensor:
    if not callable(getattr(density, "sample", None)):
        raise InvalidInput(f"{name} needs sample(n, generator), {type(density).__name__} has none; or give samples=")
    generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
    return density.sample(check_count("n", n, 2), generator)


def _half_square(difference: Tensor) -> Tensor:
    return difference.double().square().sum(1) / 2


def _mean(terms: Tensor) -> Measurement:
    return Measurement(float(terms.mean()), float(terms.std()) / math.sqrt(len(terms)), floor=0.0, n=len(terms))
