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

__all__ = ["trusted_draws", "write_page"]

_SHOWN, _TRUSTED = 2_000, 5_000
_ROWS = 50


def trusted_draws(target: Any, n: int, seed: int = 0) -> Tensor | None:
    """`n` exact draws of `target`, or trusted ones, or None where it has neither."""
    if hasattr(target, "sample"):
        return target.sample(n, torch.Generator().manual_seed(seed))
    return target.reference(n) if hasattr(target, "reference") else None


def write_page(sampler: "DiKLSampler", path: str | Path, name: str) -> Path:
    """Write the page of a fitted sampler of the target called `name` to `path`; the pictures are of 2 000 new draws."""
    target: Any = sampler.target
    draws = sampler.sample(_SHOWN)
    cost = sampler.cost
    report = Report(f"DiKLSampler on {name}", f"preset {sampler.preset}, {target.dim} dimensions")
    for text in sampler.warnings_:
        report.warning(text)
    report.section("Summary")
    report.table(
        ["gradient calls", "value-only calls", "not finite", "seconds", "interrupted"],
        [[f"{cost.gradients:,}", f"{cost.energies:,}", f"{cost.nonfinite:,}", f"{cost.seconds:.1f}", _yes(sampler)]],
    )
    _training(report, sampler)
    _pictures(report, draws, target)
    _moments(report, draws, target)
    return report.save(path)


def _yes(sampler: "DiKLSampler") -> str:
    return "yes" if sampler.interrupted_ else "no"


def _training(report: Report, sampler: "DiKLSampler") -> None:
    report.section(
        "Training", "What each look at the fit saw. A loss that stays level is no sign of samples that are right."
    )
    try:
        report.figure(training_plot(sampler.history_), alt="Curves of the fit over its steps")
    except InvalidInput as error:
        report.text(str(error))


def _pictures(report: Report, draws: Tensor, target: Any) -> None:
    report.section("Draws", f"{len(draws)} of them, one network evaluation each.")
    cluster = hasattr(target, "pair_distances")
    trusted = trusted_draws(target, _TRUSTED)
    trusted = None if trusted is None else trusted.to(draws)
    if target.dim > 1 and not cluster:
        few = trusted if trusted is None else trusted[: len(draws)]
        report.figure(sample_plot(draws, target, few), alt="Pairs of coordinates of the draws")
    if trusted is None:
        report.text("The target has neither exact nor trusted draws, so there is nothing to hold the energies against.")
        return
    report.figure(energy_plot(draws, target, trusted), alt="Energies of the draws over those of perfect samples")
    if cluster:
        report.figure(distance_plot(draws, target, trusted), alt="Pair distances over those of perfect samples")


def _moments(report: Report, draws: Tensor, target: Any) -> None:
    names = getattr(target, "names", None) or [f"x[{i}]" for i in range(target.dim)]
    mean, sd = draws.mean(0).tolist(), draws.std(0).tolist()
    report.table(
        ["coordinate", "mean", "sd"],
        [[name, f"{mean[i]:.4g}", f"{sd[i]:.4g}"] for i, name in enumerate(names[:_ROWS])],
        caption="" if target.dim <= _ROWS else f"the first {_ROWS} of {target.dim} coordinates",
    )
