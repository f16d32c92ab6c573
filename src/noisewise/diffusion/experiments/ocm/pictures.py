"""The report of the comparison: the bound and the distance of samples by system, and draws of the mixtures."""

from noisewise.comparison import Pictures
from noisewise.metrics.results import Results
from noisewise.plots import measurement_plot
from noisewise.report import Report

__all__ = ["illustrate"]

_PLOTTED = ("bits/dim", "1000 MMD^2", "1000 MMD^2, eta 0", "share within 3 sd", "FID", "FID, eta 0")


def illustrate(report: Report, results: Results, pictures: Pictures) -> None:
    """Add the figures."""
    for problem in results.problems:
        report.section(problem)
        for name in _PLOTTED:
            if name in results.measurement_names(problem):
                report.figure(measurement_plot(results, name, problem), f"{problem}: {name}")
