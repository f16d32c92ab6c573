"""The report of the comparison: errors and accuracies by system, and identified kernels beside the true one."""

from typing import TYPE_CHECKING, Any

from noisewise.comparison import Pictures
from noisewise.errors import require
from noisewise.metrics.results import Results
from noisewise.plots import measurement_plot
from noisewise.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["illustrate", "kernel_plot"]

_PLOTTED = ("NMSE", "NMSE at half the rate", "accuracy, %", "accuracy at half the rate, %")
_SHOWN = ("MRConv fourier", "MRConv fourier+sparse", "MRConv dilated", "free kernel", "S4D", "SGConv")


def illustrate(report: Report, results: Results, pictures: Pictures) -> None:
    """Add the figures."""
    for problem in results.problems:
        report.section(problem)
        for name in _PLOTTED:
            if name in results.measurement_names(problem):
                report.figure(measurement_plot(results, name, problem), f"{problem}: {name}")
        kernels = {
            system: pictures[problem, system] for system in _SHOWN if "kernel" in pictures.get((problem, system), {})
        }
        if kernels:
            report.figure(
                kernel_plot(kernels), f"{problem}: the kernel of the first channel, and the true one in black"
            )


def kernel_plot(kernels: dict[str, dict[str, Any]]) -> "Figure":
    """The identified kernel of each system over the true one; lags on a scale that is linear at first, then logarithmic."""
    figure_class = require("matplotlib.figure", "sampling").Figure
    figure = figure_class(figsize=(7.5, 1.5 * len(kernels)), layout="constrained")
    panels = figure.subplots(len(kernels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (system, found) in zip(panels, kernels.items(), strict=True):
        axes.plot(found["truth"], color="#222222", linewidth=1.2)
        axes.plot(found["kernel"], color="#D55E00", linewidth=0.9)
        axes.set_title(system, loc="left", fontsize=9)
        axes.set_xscale("symlog", linthresh=16)
    # a free kernel's noise and outliers may lie far outside
    reach = 1.5 * max(abs(value) for value in next(iter(kernels.values()))["truth"])
    panels[0].set_ylim(-reach, reach)
    panels[-1].set_xlabel("lag")
    return figure
