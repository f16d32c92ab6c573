"""The report of a trained sampler: one offline HTML page with its bill, warnings, training curves and draws."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.neural.pictures import distance_plot, energy_plot, sample_plot, training_plot
from noisewise.report import Report

if TYPE_CHECKING:
    from noisewise.neural.dikl import DiKLSampler

__all__ = ["CAVEAT", "CHAINS", "chain_draws", "write_page"]

CHAINS = "the chains of training"
CAVEAT = "the numbers say how well the network learned them, not whether they are right"
_SHOWN, _TRUSTED = 2_000, 5_000
_ROWS = 50


def chain_draws(sampler: "DiKLSampler") -> Tensor | None:
    """Draws of the target by the chains of training, on its own scale, or None where there were none of use."""
    return getattr(sampler, "chain_draws_", None)


def _compared(sampler: "DiKLSampler") -> tuple[Tensor | None, str]:
    """What the draws are shown beside, and its name: exact or trusted draws, or else those of the chains of training."""
    target: Any = sampler.target
    if hasattr(target, "sample"):
        return target.sample(_TRUSTED, torch.Generator().manual_seed(0)), "exact draws"
    if hasattr(target, "reference"):
        return target.reference(_TRUSTED), "trusted draws"
    return chain_draws(sampler), CHAINS


def write_page(sampler: "DiKLSampler", path: str | Path, name: str, command: str, budget: int | None) -> Path:
    """Write the page of a fitted sampler of the target called `name` to `path`; the pictures are of 2 000 new draws.

    `command`: the line that made it. `budget`: the calls that it was allowed.
    """
    target: Any = sampler.target
    draws = sampler.sample(_SHOWN)
    report = Report(f"DiKLSampler on {name}", f"preset {sampler.preset}, {target.dim} dimensions")
    for text in sampler.warnings_:
        report.warning(text)
    _bill(report, sampler, budget)
    report.code(command)
    _training(report, sampler)
    _pictures(report, draws, sampler)
    _moments(report, draws, target)
    return report.save(path)


def _bill(report: Report, sampler: "DiKLSampler", budget: int | None) -> None:
    cost = sampler.cost
    row = {
        "steps of the generator": f"{sampler.steps_:,}",
        "budget of calls": "none" if budget is None else f"{budget:,}",
        "gradient calls": f"{cost.gradients:,}",
        "value-only calls": f"{cost.energies:,}",
        "not finite": f"{cost.nonfinite:,}",
        "seconds": f"{cost.seconds:.1f}",
        "seed": str(sampler.seed),
        "interrupted": "yes" if sampler.interrupted_ else "no",
    }
    report.section("Summary")
    report.table(list(row), [list(row.values())])


def _training(report: Report, sampler: "DiKLSampler") -> None:
    report.section(
        "Training", "What each look at the fit saw. A loss that stays level is no sign of samples that are right."
    )
    if any("target_score" in look for look in sampler.history_):
        report.text(
            "Target score and score are losses of denoising score matching, of the noisy target's network and of the one for the "
            f"generator's noisy draws (lower is better, noisy; about the dimension, {sampler.target.dim}, for a network that "
            "knows nothing); direction is the root mean square of the generator's gradient, which falls as the densities meet."
        )
    try:
        report.figure(training_plot(sampler), alt="Curves of the fit over its steps")
    except InvalidInput as error:
        report.text(str(error))


def _pictures(report: Report, draws: Tensor, sampler: "DiKLSampler") -> None:
    target: Any = sampler.target
    report.section("Draws", "One network evaluation each.")
    cluster = hasattr(target, "pair_distances")
    trusted, called = _compared(sampler)
    trusted = None if trusted is None else trusted.to(draws)
    if trusted is None:
        report.text("The target has neither exact nor trusted draws, so there is nothing to hold the energies against.")
    elif called == CHAINS:
        report.text(f"Shown beside {CHAINS}: {CAVEAT}.")
    if target.dim > 1 and not cluster:
        few = trusted if trusted is None else trusted[: len(draws)]
        report.figure(sample_plot(draws, target, few, called), alt="Pairs of coordinates of the draws")
    if trusted is None:
        return
    report.figure(energy_plot(draws, target, trusted, called), alt=f"Energies of the draws over those of {called}")
    if cluster:
        report.figure(distance_plot(draws, target, trusted, called), alt=f"Pair distances over those of {called}")


def _moments(report: Report, draws: Tensor, target: Any) -> None:
    names = getattr(target, "names", None) or [f"x[{i}]" for i in range(target.dim)]
    mean, sd = draws.mean(0).tolist(), draws.std(0).tolist()
    report.table(
        ["coordinate", "mean", "sd"],
        [[name, f"{mean[i]:.4g}", f"{sd[i]:.4g}"] for i, name in enumerate(names[:_ROWS])],
        caption="" if target.dim <= _ROWS else f"the first {_ROWS} of {target.dim} coordinates",
    )
