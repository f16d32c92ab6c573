"""The report of the comparison: tables, divergences and weights by system, fitted densities in one dimension."""

from typing import TYPE_CHECKING

from noisewise.comparison import Pictures
from noisewise.errors import require
from noisewise.metrics.results import Results
from noisewise.plots import measurement_plot
from noisewise.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["density_plot", "illustrate"]

_PLOTTED = ("KL", "TV of cluster weights", "TV of class shares")


def illustrate(report: Report, results: Results, pictures: Pictures) -> None:
    """Add the figures. `pictures`: what rows kept for drawing, by problem and system."""
    for problem in results.problems:
        report.section(problem)
        for name in _PLOTTED:
            if name in results.measurement_names(problem):
                report.figure(measurement_plot(results, name, problem), f"{problem}: {name}")
        drawn = {system: picture for (p, system), picture in pictures.items() if p == problem and picture}
        if drawn:
            report.figure(density_plot(drawn), f"{problem}: the fitted densities of the lowest seed over the truth")


def density_plot(drawn: dict[str, dict[str, list[float]]]) -> "Figure":
    """One small panel for each system: its density over the truth."""
    columns = 3
    rows = -(-len(drawn) // columns)
    figure = require("matplotlib.figure", "sampling").Figure(figsize=(7.5, 1.7 * rows), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes, (system, picture) in zip(panels, drawn.items(), strict=False):
        axes.fill_between(picture["x"], picture["truth"], color="#D5DCE1", linewidth=0)
        axes.plot(picture["x"], picture["density"], color="#0072B2", linewidth=1.2)
        axes.set_title(system, fontsize=8)
        axes.tick_params(labelsize=6)
    return figure
