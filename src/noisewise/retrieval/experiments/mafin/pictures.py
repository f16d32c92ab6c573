"""The comparison's figures: what each system scores, and how that grows with pairs and shrinks with numbers."""

import statistics
from typing import TYPE_CHECKING, Any

from noisewise.errors import require
from noisewise.metrics.results import Results
from noisewise.plots import measurement_plot
from noisewise.report import Report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["curve", "illustrate"]

_SCORE = "nDCG@10"


def illustrate(report: Report, results: Results, pictures: Any) -> None:
    """Add the figures."""
    problems = results.problems
    for problem in problems:
        if not problem.endswith(" pairs"):
            report.figure(measurement_plot(results, _SCORE, problem), f"{problem}: {_SCORE}")
    for name in problems:
        pairs = {int(p.split()[-2]): p for p in problems if p.startswith(f"{name}, ") and p.endswith(" pairs")}
        if len(pairs) > 1:
            report.figure(
                curve(results, pairs), f"{name}: gain over the black box by judged pairs, mean and range of seeds"
            )


def curve(results: Results, problems: dict[int, str]) -> "Figure":
    """The gain of each system over the number of pairs, whose problems are given."""
    figure = require("matplotlib.figure", "retrieval").Figure(figsize=(6.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for system in dict.fromkeys(row.system for row in results.rows if row.problem in problems.values()):
        sizes, means, lows, highs = [], [], [], []
        for size, problem in sorted(problems.items()):
            gains = [r.measurements["gain"].value for r in results.rows if (r.problem, r.system) == (problem, system)]
            sizes.append(size)
            means.append(statistics.fmean(gains))
            lows.append(means[-1] - min(gains))
            highs.append(max(gains) - means[-1])
        axes.errorbar(sizes, means, [lows, highs], marker="o", capsize=3, label=system)
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xticks(sorted(problems), [str(size) for size in sorted(problems)])
    axes.minorticks_off()
    axes.set_xlabel("judged pairs")
    axes.set_ylabel(f"gain in {_SCORE}")
    axes.legend(frameon=False)
    return figure
