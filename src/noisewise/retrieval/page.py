"""The page of a fit: what the guard saw and chose, how the small model learned, and how to use what came of it."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from noisewise.errors import require
from noisewise.report import Report
from noisewise.retrieval.guard import GuardReport, Judged
from noisewise.retrieval.vectors import FetchCost

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from noisewise.retrieval.fitting import RetrievalFit
    from noisewise.retrieval.mafin import Mafin

__all__ = ["guard_plot", "learning_plot", "write_page"]

_BLUE, _ORANGE, _GREY, _GRID = "#0072B2", "#D55E00", "#8A9299", "#E3E7EA"
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_USE = """from noisewise.retrieval import Mafin, OpenAICompatible

black_box = OpenAICompatible({url!r}, {model!r}{more})
model = Mafin.from_pretrained({folder!r}, black_box, cache={cache!r})
model.similarity(model.encode_query(["a question"]), model.encode_document(["a passage"]))"""


def write_page(mafin: "Mafin", facts: dict[str, Any], typed: str, out: Path, path: Path) -> Path:
    """Write the page of the fit into `out` that `facts` tell of; `typed` is its command line."""
    report = Report("Mafin", f"{facts['choice']} on {facts['data']}").code(typed)
    report.table(["", ""], _lines(facts))
    if mafin.report_ is None:
        report.text("Nothing was measured: --form asked for this form by its name.")
    else:
        report.section("What the guard saw", mafin.report_.rule)
        report.figure(
            guard_plot(mafin.report_),
            f"Mean {mafin.report_.criterion} of {mafin.report_.queries} labelled queries, which no form had learned from, with "
            "standard errors; the dashed line is the black box, the chosen form is orange, grey is for comparison only.",
        )
        black, *others = mafin.report_.rows
        report.table(
            ["form", f"{mafin.report_.criterion} ↑", "gain, 95 % interval", "verdict", "numbers added", ""],
            [
                _row(black, "", mafin.report_.choice),
                *(_row(row, str(row.gain), mafin.report_.choice) for row in others),
            ],
        )
        for note in mafin.report_.notes:
            report.text(note)
    if mafin.fits_:
        report.section("How the small model learned", (
            "Each line is one training, on its share of the judged pairs; its weights are those of the best look at its own "
            "held-out pairs, or of the start where nothing was better."
        ))  # fmt: skip
        report.figure(learning_plot(mafin.fits_), "1 - nDCG@10 of held-out pairs by training step, less being better.")
    report.section("How to use it").code(f"noisewise retrieval evaluate {out} DATA")
    if facts["endpoint"] is not None:
        report.code(_use(facts, out))
    return report.save(path)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    held = f" and {facts['dev_queries']:,} to choose on" if facts["dev_queries"] else ""
    alone = "" if facts["dim"] == facts["black_box_dim"] else f", the black box alone has {facts['black_box_dim']:,}"
    since = " since it was resumed" if facts["resumed"] else ""
    return [
        ("data", f"{facts['passages']:,} passages, {facts['queries']:,} judged queries{held}"),
        ("chosen", facts["choice"]),
        ("stored", f"{facts['dim']:,} numbers a vector{alone}"),
        ("cost", f"{FetchCost(**facts['cost'])}{since}; {facts['training_seconds']:.1f} s of training"),
    ]


def _row(row: Judged, gain: str, choice: str) -> list[Any]:
    verdict = "not a candidate" if row.reference else "passed" if row.passed else ""
    if row.name == choice:
        verdict = "passed, chosen" if row.passed else "chosen"
    return [row.name, str(row.score), gain, verdict, row.added or "", "" if row.reference else row.note]


def _use(facts: dict[str, Any], out: Path) -> str:
    given = {
        "dimensions": facts["dimensions"],
        "key": facts["key_env"] or None,
        "input_types": _by_kind(facts, "type"),
        "prefixes": _by_kind(facts, "prefix"),
        "too_long": facts["too_long"],
        "max_tokens": facts["max_tokens"],
    }
    usual = {
        "dimensions": None, "key": "OPENAI_API_KEY", "input_types": None, "prefixes": None, "too_long": "raise",
        "max_tokens": 8191,
    }  # fmt: skip
    more = "".join(f", {name}={value!r}" for name, value in given.items() if value != usual[name])
    cache = facts["cache"] or "vectors.sqlite"
    return _USE.format(url=facts["endpoint"], model=facts["model"], more=more, folder=str(out / "model"), cache=cache)


def _by_kind(facts: dict[str, Any], name: str) -> dict[str, str] | None:
    found = {kind: facts[f"{kind}_{name}"] for kind in ("query", "document")}
    return {kind: value for kind, value in found.items() if value is not None} or None


def guard_plot(report: GuardReport) -> "Figure":
    """Every form's mean with its standard error, the chosen one marked, from simple to complex."""
    rows = list(reversed(report.rows))
    figure, axes = _axes(0.6 + 0.36 * len(rows))
    for place, row in enumerate(rows):
        colour = _ORANGE if row.name == report.choice else _GREY if row.reference else _BLUE
        axes.errorbar(row.score.value, place, xerr=row.score.se, fmt="o", color=colour, capsize=3, markersize=5)
    axes.axvline(report.rows[0].score.value, color="#222222", linewidth=0.8, linestyle="--")
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=9)
    axes.set_xlabel(report.criterion, fontsize=9)
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    return figure


def learning_plot(fits: Mapping[str, "RetrievalFit"]) -> "Figure":
    """What each training had left to gain on its own held-out pairs, look by look; folds of one form share a colour."""
    figure, axes = _axes(3.2)
    forms: dict[str, list[RetrievalFit]] = {}
    for name, fit in fits.items():
        # "Mafin-3" is the fourth fold of Mafin
        head, _, fold = name.rpartition("-")
        forms.setdefault(head if fold.isdecimal() else name, []).append(fit)
    for (form, folds), colour in zip(forms.items(), _COLOURS, strict=False):
        for index, fit in enumerate(folds):
            points = [(look["step"], look["validation"]) for look in fit.history if look["validation"] is not None]
            if points:
                label = None if index else f"{form}, {len(folds)} fold{'s' * (len(folds) > 1)}"
                axes.plot(
                    *zip(*points, strict=True), ".-", color=colour, label=label, linewidth=1, markersize=3, alpha=0.7
                )
    axes.set_xlabel("training step", fontsize=9)
    axes.set_ylabel("1 - nDCG@10", fontsize=9)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def _axes(height: float) -> tuple["Figure", Any]:
    figure = require("matplotlib.figure", "retrieval").Figure(figsize=(7.5, height), layout="constrained", dpi=110)
    axes = figure.subplots()
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
