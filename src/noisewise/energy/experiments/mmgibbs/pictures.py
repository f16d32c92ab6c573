"""The report of the comparison: tables, distances by system, draws on the toys, digits as pictures."""

from typing import TYPE_CHECKING

import torch

from noisewise.comparison import Pictures
from noisewise.errors import require
from noisewise.metrics.results import Results
from noisewise.plots import measurement_plot
from noisewise.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["illustrate", "images_plot", "scatter_grid"]

_ROWS, _COLUMNS = 4, 10


def illustrate(report: Report, results: Results, pictures: Pictures) -> None:
    """Add the figures. `pictures`: what rows kept for drawing, by problem and system."""
    for problem in results.problems:
        report.section(problem)
        for name in results.measurement_names(problem)[:1]:
            report.figure(measurement_plot(results, name, problem), f"{problem}: {name}")
        drawn = {system: picture["draws"] for (p, system), picture in pictures.items() if p == problem and picture}
        if not drawn:
            continue
        if problem == "digits":
            for system, draws in drawn.items():
                report.figure(images_plot(torch.tensor(draws)), f"{system}: the last states of forty chains")
        else:
            report.figure(scatter_grid(drawn), f"{problem}: the last states of the chains")


def scatter_grid(drawn: dict[str, list[list[float]]]) -> "Figure":
    """One small scatter plot for each system, on common axes."""
    columns = 4
    rows = -(-len(drawn) // columns)
    figure = require("matplotlib.figure", "sampling").Figure(figsize=(7.5, 2.1 * rows), layout="constrained", dpi=110)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    every = torch.cat([torch.tensor(draws) for draws in drawn.values()])
    reach = 1.1 * float(every[torch.isfinite(every)].abs().quantile(0.999))
    for axes in panels[len(drawn) :]:
        axes.set_visible(False)
    for axes, (system, draws) in zip(panels, drawn.items(), strict=False):
        x = torch.tensor(draws)
        axes.plot(x[:, 0], x[:, 1], ".", color="#0072B2", alpha=0.25, markersize=2, markeredgewidth=0)
        axes.set_title(system, fontsize=8)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal")
        axes.tick_params(labelsize=6)
    return figure


def images_plot(x: torch.Tensor) -> "Figure":
    """Square images in [0, 1], [n, pixels], in rows of ten."""
    side = round(x.shape[1] ** 0.5)
    shown = x[: _ROWS * _COLUMNS].reshape(-1, side, side)
    figure = require("matplotlib.figure", "sampling").Figure(figsize=(6.5, 2.7), layout="constrained", dpi=110)
    for axes, image in zip(figure.subplots(_ROWS, _COLUMNS).flatten(), shown, strict=False):
        axes.imshow(image.numpy(), cmap="gray_r", vmin=0, vmax=1)
    for axes in figure.axes:
        axes.set_axis_off()
    return figure
