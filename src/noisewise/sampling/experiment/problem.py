"""A problem of the comparison: its systems, their common budget, the settings to try, and how an outcome is measured."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from noisewise.errors import NoisewiseWarning
from noisewise.metrics.measurement import Measurement
from noisewise.sampling.loop import sample
from noisewise.typing import Cost

__all__ = ["TUNING_SEED", "Outcome", "Problem", "System", "outcome_of", "run_kernel"]

# settings are chosen on this seed, which is never reported
TUNING_SEED = 100
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


@dataclass(frozen=True)
class System:
    """One contestant. `draw(budget, seed, **setting)`: spend `budget` gradient calls, warm-up included.

    `settings`: those that tuning tries; the first one holds where nothing is tuned. `extra`: the optional libraries
    it needs, as (module, extra), or None.
    """

    name: str
    draw: Callable[..., Outcome]
    settings: tuple[dict[str, Any], ...] = ({},)
    extra: tuple[str, str] | None = None


@dataclass(frozen=True)
class Problem:
    """One problem. `measure(outcome)` gives the measurements; `criterion` names the one that tuning looks at.

    `picture(outcome)`: JSON values that the report draws. `notes`: what to say of the problem.
    """

    protocol: str
    name: str
    budget: float | int
    systems: tuple[System, ...]
    measure: Callable[[Outcome], dict[str, Measurement]]
    criterion: str
    picture: Callable[[Outcome], dict[str, Any]] = lambda outcome: {}
    notes: tuple[str, ...] = ()


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
