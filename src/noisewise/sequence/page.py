"""The page of a fit of sequences: what was asked for, how the loss went down, what is right, and what the layers hear."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from noisewise.errors import require
from noisewise.metrics.measurement import Measurement
from noisewise.report import Report
from noisewise.sequence.pictures import kernel_report

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["fit_lines", "learning_curve", "write_page"]

_BLUE, _ORANGE, _GRID = "#0072B2", "#D55E00", "#E3E7EA"
# a larger table of confusions is no help to the eye
_MAX_CLASSES = 30


def write_page(model: nn.Module, facts: dict[str, Any], typed: str, path: Path) -> Path:
    """Write the page of the fit that `facts` tell of; `typed` is its command line."""
    report = Report("Sequence model", f"{facts['task']} of {facts['data']}").code(typed)
    report.table(["", ""], fit_lines(facts))
    for text in facts["warnings"]:
        report.warning(text)
    report.section("How the loss went down", (
        "The training loss is that of random batches since the look before, the held-out loss that of the averaged weights on "
        "rows that were not trained on. The weights of the best look are those that are kept."
    ))  # fmt: skip
    curve = learning_curve(facts["history"], facts["best_step"])
    report.figure(curve, "Loss by training step; dashed: the look that is kept.")
    for heading, key, text in (
        ("On held-out rows", "held_out", "These rows chose the step of the weights, so the numbers flatter a little."),
        ("On the groups left out", "test", "Rows of groups that took no part in the fit, in no way."),
    ):
        if facts.get(key):
            report.section(heading, text).table(["measurement", "value", "rows"], score_rows(facts[key]))
    if facts.get("confusion") and len(facts["classes"]) <= _MAX_CLASSES:
        report.table(
            ["class", *facts["classes"]],
            [[name, *row] for name, row in zip(facts["classes"], facts["confusion"], strict=True)],
            "Rows of each class (down) by the class that was answered (across).",
        )
    kernel_report(model, report)
    return report.save(path)


def score_rows(scores: dict[str, Any]) -> list[list[Any]]:
    """Name with its better direction, value and number of rows of measurements in JSON values."""
    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    found = {name: Measurement.from_dict(one) for name, one in scores.items()}
    return [[name + arrows[one.better], str(one), one.n] for name, one in found.items()]


def learning_curve(history: Sequence[dict[str, Any]], best_step: int) -> "Figure":
    """Training and held-out loss of each look, and the step that is kept."""
    figure = require("matplotlib.figure", "sequence").Figure(figsize=(7.5, 3.4), layout="constrained", dpi=110)
    axes = figure.subplots()
    for name, label, colour in (("loss", "training", _BLUE), ("validation", "held out", _ORANGE)):
        points = [(look["step"], look[name]) for look in history if look[name] is not None]
        if points:
            axes.plot(*zip(*points, strict=True), ".-", color=colour, label=label, linewidth=1.2, markersize=4)
    if best_step:
        axes.axvline(best_step, color="#222222", linewidth=0.9, linestyle="--")
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel("loss", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    # none where a fit ended before its first look
    if history:
        axes.legend(frameon=False, fontsize=9)
    return figure


def fit_lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """What was fitted, to what and at which cost, in words."""
    cost = facts["cost"]
    tests = f", {facts['test_rows']} more of groups left out" if facts["test_rows"] else ""
    cut = f"; {facts['cut_rows']} cut to {facts['length']} steps" if facts["cut_rows"] else ""
    patches = f", patches of {facts['patch']}" if facts["patch"] > 1 else ""
    return [
        ("data", f"{facts['rows']} rows, {facts['held_out_rows']} of them held out{tests}{cut}"),
        ("model", f"{facts['parameters']:,} parameters, {facts['layers']} layers of {facts['width']} channels, {facts['kind']}"),
        ("length", f"{facts['length']} steps{patches}"),
        ("fit", f"{facts['steps']} of {facts['steps_asked']} steps, the best {facts['best_step']}"),
        ("cost", f"{cost['gradients']:,} rows through the network, {cost['seconds']:.1f} s"),
    ]  # fmt: skip
