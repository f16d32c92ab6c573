"""An outcome of the comparison: what a system drew, and how the one loop makes it."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from noisewise.errors import NoisewiseWarning
from noisewise.sampling.loop import sample
from noisewise.typing import Cost

__all__ = ["Outcome", "outcome_of", "run_kernel", "thinned"]

# of a run that has no warm-up, this share of its first draws is dropped
_BURN_IN = 0.1


@dataclass(frozen=True)
class Outcome:
    """What a system made of its budget: kept draws [chain, draw, dim] on the CPU, the bill, and what to remark.

    `acceptance`: of the DiGS start, by noise scale r; empty for other systems.
    """

    positions: Tensor
    cost: Cost
    notes: tuple[str, ...] = ()
    acceptance: Mapping[float, float] = field(default_factory=dict)


def run_kernel(kernel_or_target: Any, init: Tensor, budget: float | int, seed: int, thin: int = 1) -> Outcome:
    """The one loop on `kernel_or_target` from the starts `init`; its warnings become notes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoisewiseWarning)
        draws = sample(kernel_or_target, init=init, budget=budget, seed=seed, thin=thin, progress=False)
    levels = getattr(kernel_or_target, "levels", None)
    acceptance: dict[float, float] = {}
    if "mwg_acceptance" in draws.stats and levels is not None:
        a, s = draws.settings.get("a"), draws.settings.get("s")
        r = list(levels.r) if a is None or s is None else (s / a).tolist()
        acceptance = dict(zip(r, draws.stats["mwg_acceptance"].double().mean(0).tolist(), strict=True))
    warmed = getattr(kernel_or_target, "step_size", None) is None
    return outcome_of(draws.positions, draws.cost, draws.warnings, warmed, acceptance)


def outcome_of(
    positions: Tensor,
    cost: Cost,
    notes: tuple[str, ...] = (),
    warmed: bool = True,
    acceptance: Mapping[float, float] | None = None,
) -> Outcome:
    """The outcome with its burn-in dropped where there was no warm-up."""
    first = 0 if warmed else int(_BURN_IN * positions.shape[1])
    return Outcome(positions[:, first:].cpu(), cost, tuple(notes), acceptance or {})


def thinned(positions: Tensor, rows: int) -> Tensor:
    """At most `rows` draws, evenly spread along every chain; chain by chain when there are more chains than rows."""
    chains, draws, _ = positions.shape
    keep = min(max(rows // chains, 1), draws)
    index = torch.linspace(0, draws - 1, keep, dtype=torch.float64).round().long()
    return positions[:, index].reshape(-1, positions.shape[-1])[:rows]
