"""The page of a fit: what the guard saw and chose, how the small model learned, and which queries gain and which lose."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisewise.errors import require
from noisewise.report import Report
from noisewise.retrieval.guard import GuardReport

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from noisewise.retrieval.mafin import Mafin

__all__ = ["guard_plot", "write_page"]

_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#8A9299"


def write_page(mafin: "Mafin", facts: dict[str, Any], typed: str, path: Path) -> Path:
    """Write the page of the fit that `facts` tell of; `typed` is its command line."""
    report = Report("Mafin", f"{facts['choice']} on {facts['data']}").code(typed)
    box = mafin.cost
    report.table(
        ["", ""],
        [
            ("data", f"{facts['passages']:,} passages, {facts['queries']:,} judged queries"
                     + (f" and {facts['dev_queries']:,} to choose on" if facts["dev_queries"] else "")),
            ("chosen", f"{facts['choice']}: {facts['dimensions']:,} numbers a vector"),
            ("cost", f"{box}; {facts['training_seconds']:.1f} s of training"),
        ],
    )  # fmt: skip
    if mafin.report_ is not None:
        report.section("What the guard saw", mafin.report_.rule)
        report.figure(
            guard_plot(mafin.report_),
            "Mean criterion on labelled queries, with standard errors; the chosen form in orange.",
        )
        report.table(
            ["form", mafin.report_.criterion, "gain, 95 % interval", "passed", "numbers added", ""],
            [
                [row.name, str(row.score), "" if index == 0 else str(row.gain), "yes" if row.passed else "",
                 row.added or "", row.note]
                for index, row in enumerate(mafin.report_.rows)
            ],
        )  # fmt: skip
        for note in mafin.report_.notes:
            report.text(note)
    return report.save(path)


def guard_plot(report: GuardReport) -> "Figure":
    """Every form's mean with its standard error, the chosen one marked, from simple to complex."""
    rows = list(reversed(report.rows))
    figure = require("matplotlib.figure", "retrieval").Figure(
        figsize=(7.5, 0.6 + 0.36 * len(rows)), layout="constrained", dpi=110
    )
    axes = figure.subplots()
    for place, row in enumerate(rows):
        colour = _ORANGE if row.name == report.choice else _GREY if row.reference else _BLUE
        axes.errorbar(row.score.value, place, xerr=row.score.se, fmt="o", color=colour, capsize=3, markersize=5)
    axes.axvline(report.rows[0].score.value, color="#222222", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    axes.set_xlabel(report.criterion, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color="#E3E7EA", linewidth=0.8)
    return figure
