"""The report of the comparison: tables, measurements, draws on GMM-40, mode weights, the dimension sweep, acceptances."""

import re
from typing import TYPE_CHECKING

import torch

from noisewise.comparison import Pictures
from noisewise.errors import require
from noisewise.metrics.results import Results
from noisewise.plots import acceptance_plot, measurement_plot, mode_weight_plot, scatter_plot
from noisewise.report import Report
from noisewise.targets.gaussian_mixture import gmm40

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["illustrate", "sweep_plot"]

_SHOWN = ("noisewise.sample (FittedDiGS)", "DiGS (published: a=.1, L=5, h=.1)", "PT (tuned)", "HMC")
_PLOTTED = {
    "GMM-40": ("TV of mode weights", "W2", "ESS per 1e6 gradients"),
    "BNN": ("NLL per draw", "NLL of the predictive mixture"),
    "posteriordb mixture": ("|P(mu1 < mu2) - 1/2|", "W2"),
}
_SWEPT = ("|w - .7|", "label ESS")


def illustrate(report: Report, results: Results, pictures: Pictures) -> None:
    """Add the figures. `pictures`: what rows kept for drawing, by problem and system."""
    for problem, names in _PLOTTED.items():
        if problem in results.problems:
            report.section(problem)
            for name in names:
                if name in results.measurement_names(problem):
                    report.figure(measurement_plot(results, name, problem), f"{problem}: {name}")
            if problem == "GMM-40":
                _forty_modes(report, pictures)
    if _dimensions(results):
        report.section("Two modes")
        for name in _SWEPT:
            report.figure(sweep_plot(results, name), f"{name} against dimension; mean ± standard error over seeds")
        _acceptances(report, pictures)


def _forty_modes(report: Report, pictures: Pictures) -> None:
    for system in _SHOWN:
        picture = pictures.get(("GMM-40", system))
        if picture is None:
            continue
        report.figure(
            scatter_plot(torch.tensor(picture["draws"]), log_prob=gmm40().log_prob), f"{system}: draws over the density"
        )
        se = None if picture["se"] is None else torch.tensor(picture["se"])
        weights, truth = torch.tensor(picture["weights"]), torch.tensor(picture["truth"])
        report.figure(mode_weight_plot(weights, se, truth), f"{system}: weights of the forty modes")


def _acceptances(report: Report, pictures: Pictures) -> None:
    for (problem, system), picture in pictures.items():
        pairs = picture.get("acceptance")
        if pairs:
            r, acceptance = zip(*sorted(pairs), strict=True)
            report.figure(
                acceptance_plot(r, acceptance), f"{system} on {problem}: acceptance of the start by noise scale"
            )


def _dimensions(results: Results) -> dict[str, int]:
    """Problems of the dimension sweep with their dimension."""
    found = {problem: re.fullmatch(r"two modes, d=(\d+)", problem) for problem in results.problems}
    return {problem: int(match.group(1)) for problem, match in found.items() if match}


def sweep_plot(results: Results, name: str) -> "Figure":
    """One measurement against the dimension, one line per system, mean ± standard error; failures have no point."""
    dimension = _dimensions(results)
    figure = require("matplotlib.figure", "sampling").Figure(figsize=(7.5, 4.2), layout="constrained", dpi=110)
    axes = figure.subplots()
    lines: dict[str, list[tuple[int, float, float]]] = {}
    for entry in results.summary():
        if entry.problem in dimension and name in entry.measurements:
            measured = entry.measurements[name]
            lines.setdefault(entry.system, []).append((dimension[entry.problem], measured.value, measured.se or 0.0))
    marks = "os^Dv*"
    for index, (system, points) in enumerate(lines.items()):
        dims, values, errors = zip(*sorted(points), strict=True)
        axes.errorbar(dims, values, yerr=errors, marker=marks[index % len(marks)], capsize=3, label=system)
    axes.set_xscale("log")
    ticks = sorted(set(dimension.values()))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    # a system that never leaves its mode scores 0 effective labels: linear below 1, logarithmic above
    axes.set_yscale("symlog", linthresh=1.0 if name == "label ESS" else 1e-3)
    axes.set_ylim(bottom=0)
    axes.set(xlabel="dimension", ylabel=name)
    axes.grid(axis="y", color="#E3E7EA", linewidth=0.8)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure
