"""Three identities that give the score of a noisy density as a mean over p(x | x_t), with their standard errors.

Source: He, Chen, Zhang, Barber & Hernandez-Lobato, AISTATS 2025, arXiv 2410.12456, section 3; the target score identity
is from De Bortoli et al., arXiv 2402.08667.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.noise import Corruption

__all__ = ["ScoreEstimate", "denoising_score", "mixed_score", "target_score"]


class ScoreEstimate(NamedTuple):
    """A Monte Carlo estimate of grad log q(x_t) and its standard error, from draws taken as independent.

    `se` is infinite for a single draw, and too small for draws of a chain that mixes slowly.
    """

    value: Float[Tensor, "batch dim"]
    se: Float[Tensor, "batch dim"]


def denoising_score(
    draws: Float[Tensor, "draw batch dim"],
    x_t: Float[Tensor, "batch dim"],
    corruption: Corruption | Float[Tensor, " batch"],
    log_weights: Float[Tensor, "draw batch"] | None = None,
) -> ScoreEstimate:
    """(a E[x] - x_t) / s^2, the denoising identity (Tweedie); its variance grows as s falls.

    `draws` of p(x | x_t); with `log_weights`, which need no normalisation, of any other density. `corruption`: one for all
    rows, or [batch], the sigma of each row of x_t = x + sigma eps. Raises `InvalidInput` for values that are not finite.
    """
    mean, se = _self_normalised(draws, log_weights)
    a, s = _scales(corruption)
    # the difference first: a E[x] and x_t are close to each other where s is small
    return ScoreEstimate((a * mean - x_t) / s**2, a / s**2 * se)


def target_score(
    target_scores: Float[Tensor, "draw batch dim"],
    corruption: Corruption | Float[Tensor, " batch"],
    log_weights: Float[Tensor, "draw batch"] | None = None,
) -> ScoreEstimate:
    """E[grad log p(x)] / a, the target score identity; its variance grows as a falls.

    `target_scores`: grad log p of the clean target at draws of p(x | x_t); the others as in `denoising_score`.
    Raises `InvalidInput` for values that are not finite.
    """
    mean, se = _self_normalised(target_scores, log_weights)
    a, _ = _scales(corruption)
    return ScoreEstimate(mean / a, se / a)


def mixed_score(
    draws: Float[Tensor, "draw batch dim"],
    target_scores: Float[Tensor, "draw batch dim"],
    x_t: Float[Tensor, "batch dim"],
    corruption: Corruption | Float[Tensor, " batch"],
    log_weights: Float[Tensor, "draw batch"] | None = None,
    variance: float | int | Float[Tensor, " batch"] = 1.0,
) -> ScoreEstimate:
    """(a E[x + v grad log p(x)] - x_t) / (a^2 v + s^2): the two others with weights s^2 and a^2 v over their sum.

    Without variance where the target's covariance is v I, so give as `variance` that of a mode (one number, or one per
    row); the paper has 1. The others as in `denoising_score` and `target_score`. Raises `InvalidInput` for values that are
    not finite.
    """
    v = variance.unsqueeze(-1) if isinstance(variance, Tensor) else variance
    mean, se = _self_normalised(draws + v * target_scores, log_weights)
    a, s = _scales(corruption)
    total = a**2 * v + s**2
    return ScoreEstimate((a * mean - x_t) / total, a / total * se)


def _scales(corruption: Corruption | Tensor) -> tuple[Any, Any]:
    """The a and s of x_t = a x + s eps: two numbers, or 1 and a column of sigmas."""
    return (1.0, corruption.unsqueeze(-1)) if isinstance(corruption, Tensor) else (corruption.a, corruption.s)


def _self_normalised(
    values: Float[Tensor, "draw batch dim"], log_weights: Float[Tensor, "draw batch"] | None
) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch dim"]]:
    """Weighted mean over draws and its delta-method standard error, sqrt(sum w^2 (f - mean)^2 n / (n - 1))."""
    n = len(values)
    if n == 0:
        raise InvalidInput("an average over no draws was asked for: the first axis of draws has length 0")
    weights = _weights(values, log_weights)
    # a draw without weight may lie where the target has no score
    values = torch.where(weights > 0, values, torch.zeros_like(values))
    bad = (~torch.isfinite(values)).any(-1).any(0).nonzero().flatten()
    if len(bad):
        raise InvalidInput(
            f"draws or scores of state {int(bad[0])} are not finite ({len(bad)} of {values.shape[1]} states): drop those "
            "draws, or give them the log weight -inf"
        )
    mean = (weights * values).sum(0)
    if n == 1:
        return mean, torch.full_like(mean, torch.inf)
    spread = (weights * (values - mean)).square().sum(0)
    return mean, (spread * n / (n - 1)).sqrt()


def _weights(values: Tensor, log_weights: Tensor | None) -> Float[Tensor, "draw batch 1"]:
    if log_weights is None:
        return values.new_full((*values.shape[:2], 1), 1 / len(values))
    top = log_weights.amax(0)
    bad = (~torch.isfinite(top)).nonzero().flatten()
    if len(bad):
        state = int(bad[0])
        raise InvalidInput(
            f"the largest log weight of state {state} is {top[state].item()} ({len(bad)} of {len(top)} states): each needs "
            "a draw of positive weight, and none that is NaN or inf"
        )
    return log_weights.softmax(0).to(values).unsqueeze(-1)
