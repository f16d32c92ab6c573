"""The probabilistic ranking loss over candidates of each query: ListNet's top-one form, InfoNCE where one is relevant."""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from noisewise.errors import InvalidInput
from noisewise.training import check_share
from noisewise.typing import check_count, check_positive

__all__ = ["LogitScale", "information_bound", "ranking_loss"]

# 1/tau above it lets single pairs dominate, and float32 softmax saturate
_MOST = 100.0


class LogitScale(nn.Module):
    """1/tau, by which cosines are multiplied before a softmax; it learns its logarithm if `learned`, up to 100.

    Raises `InvalidInput` for a `scale` outside (0, 100].
    """

    def __init__(self, scale: float | int = 20.0, learned: bool = False) -> None:
        super().__init__()
        if check_positive("scale", scale) > _MOST:
            raise InvalidInput(f"scale=1/tau must be at most {_MOST:g}, got {scale!r}")
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)), requires_grad=learned)

    def forward(self, cosines: Float[Tensor, "query candidate"]) -> Float[Tensor, "query candidate"]:
        """Cosines over tau."""
        return cosines * self.log_scale.exp().clamp(max=_MOST)


def ranking_loss(
    scores: Float[Tensor, "query candidate"],
    target: Float[Tensor, "query candidate"],
    allowed: Bool[Tensor, "query candidate"] | None = None,
    smoothing: float | int = 0.0,
) -> Float[Tensor, ""]:
    """Mean over queries of - sum_j p*(d_j|q) log p(d_j|q), in nats: the divergence of p from p* but for p*'s entropy.

    `scores`: s(q, d) / tau, whose softmax over the `allowed` candidates (None: all) is p. `target`: relevance of at least 0,
    of which p* is the share. What is not allowed, such as a second copy of the positive, is neither a positive nor a negative.
    `smoothing`: the part of p* that is spread evenly over the allowed candidates.

    Raises `InvalidInput` for a query without an allowed candidate of positive relevance, and for a negative relevance.
    Source: Cao et al., "Learning to rank: from pairwise approach to listwise approach", ICML 2007; with one relevant
    candidate van den Oord et al. 2018 (arXiv 1807.03748), equation 4.
    """
    check_share("smoothing", smoothing, 1)
    if allowed is None:
        allowed = torch.ones_like(target, dtype=torch.bool)
    wanted = torch.where(allowed, target, 0.0)
    mass = wanted.sum(1, keepdim=True)
    if bool((wanted < 0).any()) or not bool((mass > 0).all()):
        row = int(((wanted < 0).any(1) | (mass.squeeze(1) <= 0)).nonzero()[0])
        raise InvalidInput(
            f"relevance of query {row} is negative somewhere, or 0 for all allowed candidates; leave such queries out"
        )
    even = allowed.to(target) / allowed.sum(1, keepdim=True)
    share = (1 - smoothing) * wanted / mass + smoothing * even
    log_p = scores.masked_fill(~allowed, -math.inf).log_softmax(1)
    # 0 * -inf would be NaN, in the gradient too
    return -(share * log_p.masked_fill(~allowed, 0.0)).sum(1).mean()


def information_bound(loss: float | int, candidates: int) -> float:
    """log K - L in nats, at most log K: below the mutual information of query and passage, in expectation.

    `loss`: the mean InfoNCE of pairs, each against its own positive and K - 1 passages of other pairs; K = `candidates`.
    Report it only together with K. Source: van den Oord et al. 2018 (arXiv 1807.03748), equation 5.
    """
    return math.log(check_count("candidates", candidates)) - float(loss)
