"""Three identities that give the score of a noisy density as a mean over p(x | x_t), with their standard errors.

Source: He, Chen, Zhang, Barber & Hernandez-Lobato, AISTATS 2025, arXiv 2410.12456, section 3; the target score identity
is from De Bortoli et al., arXiv 2402.08667.
"""

from typing import NamedTuple

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
    corruption: Corruption,
    log_weights: Float[Tensor, "draw batch"] | None = None,
) -> ScoreEstimate:
    """(a E[x] - x_t) / s^2, the denoising identity (Tweedie); its variance grows as s falls.

    `draws` of p(x | x_t); with `log_weights`, which need no normalisation, of any other density.
    Raises `InvalidInput` for values that are not finite.
    """
    mean, se = _self_normalised(draws, log_weights)
    scale = corruption.a / corruption.s**2
    # the difference first: a E[x] and x_t are close to each other where s is small
    return ScoreEstimate((corruption.a * mean - x_t) / corruption.s**2, scale * se)


def target_score(
    target_scores: Float[Tensor, "draw batch dim"],
    corruption: Corruption,
    log_weights: Float[Tensor, "draw batch"] | None = None,
) -> ScoreEstimate:
    """E[grad log p(x)] / a, the target score identity; its variance grows as a falls.

    `target_scores`: grad log p of the clean target at draws of p(x | x_t); `log_weights` as in `denoising_score`.
    Raises `InvalidInput` for values that are not finite.
    """
    mean, se = _self_normalised(target_scores, log_weights)
    return ScoreEstimate(mean / corruption.a, se / corruption.a)


def mixed_score(
    draws: Float[Tensor, "draw batch dim"],
    target_scores: Float[Tensor, "draw batch dim"],
    x_t: Float[Tensor, "batch dim"],
    corruption: Corruption,
    log_weights: Float[Tensor, "draw batch"] | None = None,
) -> ScoreEstimate:
    """(a E[x + grad log p(x)] - x_t) / (a^2 + s^2): the two others with weights s^2 and a^2 over a^2 + s^2.

    Without variance where the target's covariance is I, so bring the target to a unit local scale. Arguments as in
    `denoising_score` and `target_score`. Raises `InvalidInput` for values that are not finite.
    """
    mean, se = _self_normalised(draws + target_scores, log_weights)
    total = corruption.a**2 + corruption.s**2
    return ScoreEstimate((corruption.a * mean - x_t) / total, corruption.a / total * se)


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
