"""The report of the comparison: measurements by system, and the draws of each in their first two coordinates."""

from typing import TYPE_CHECKING

from noisewise.comparison import Pictures
from noisewise.errors import require
from noisewise.metrics.results import Results
from noisewise.plots import measurement_plot
from noisewise.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draws_plot", "illustrate"]

_PLOTTED = ("TV of mode weights", "share within 3 sd", "worst well gap", "distance TVD", "energy W1")


def illustrate(report: Report, results: Results, pictures: Pictures) -> None:
    """Add the figures. `pictures`: what rows kept for drawing, by problem and system."""
    for problem in results.problems:
        report.section(problem)
        for name in _PLOTTED:
            if name in results.measurement_names(problem):
                report.figure(measurement_plot(results, name, problem), f"{problem}: {name}")
        drawn = {system: picture["draws"] for (p, system), picture in pictures.items() if p == problem and picture}
        if drawn:
            report.figure(draws_plot(drawn), f"{problem}: draws of the lowest seed, first two coordinates")


def draws_plot(drawn: dict[str, list[list[float]]]) -> "Figure":
    """One small panel for each system, on the range of all but the furthest draws."""
    columns = 3
    rows = -(-len(drawn) // columns)
    figure = require("matplotlib.figure", "sampling").Figure(figsize=(7.5, 2.5 * rows), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axis in (0, 1):
        values = sorted(row[axis] for draws in drawn.values() for row in draws)
        low, high = values[len(values) // 200], values[-1 - len(values) // 200]
        margin = 0.1 * (high - low)
        (panels[0].set_xlim if axis == 0 else panels[0].set_ylim)(low - margin, high + margin)
    for axes, (system, draws) in zip(panels, drawn.items(), strict=False):
        axes.plot([row[0] for row in draws], [row[1] for row in draws], ".", color="#0072B2", markersize=1.2, alpha=0.6)
        axes.set_title(system, fontsize=8)
        axes.tick_params(labelsize=6)
    return figure
