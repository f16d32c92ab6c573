"""Mode weights of a fitted density by importance sampling, with bootstrap errors."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.energy.bridged import Bridged, corrected_ratio
from noisewise.metrics.modes import ModeWeights

__all__ = ["density_weights"]

_REPLICATES = 100


@torch.no_grad()
def density_weights(
    bridge: Bridged,
    drawn: Float[Tensor, "drawn dim"],
    log_share: Float[Tensor, " drawn"],
    labels: Int[Tensor, " drawn"],
    modes: int,
    generator: torch.Generator,
) -> ModeWeights:
    """Probability of each label under `bridge.log_density`, from draws of a proposal g, log m - log g there, and their labels.

    Errors: replicates with Poisson counts for the draws and a normal error for the log normaliser, which enters each
    weight by what the reference takes away.
    """
    member = nn.functional.one_hot(labels, modes).to(drawn) * log_share.exp().unsqueeze(-1)
    log_ratio = bridge.log_ratio(drawn)

    def weigh(shift: float, counts: Tensor) -> Tensor:
        mass = (counts * corrected_ratio(log_ratio + shift, bridge.beta).clamp(min=bridge.floor)) @ member
        return mass / mass.sum()

    one = torch.ones_like(log_ratio)
    shifts = torch.randn(_REPLICATES, dtype=drawn.dtype, device=drawn.device, generator=generator)
    replicates = [
        weigh(shift, torch.poisson(one, generator=generator)) for shift in (bridge.normalizer.se * shifts).tolist()
    ]
    return ModeWeights(weigh(0.0, one), torch.stack(replicates).std(0), len(drawn))
