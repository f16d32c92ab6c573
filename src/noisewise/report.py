"""One self-contained HTML file out of text, tables and figures: opens offline, needs no JavaScript, prints well."""

import base64
import html
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from noisewise.errors import InvalidInput, require
from noisewise.files import write_atomically
from noisewise.metrics.results import Results
from noisewise.metrics.tables import LEGEND, cost_cells, problem_tables, seed_count, value_cell
from noisewise.plots import acceptance_plot, measurement_plot, mode_weight_plot, scatter_plot, trace_plot

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Report",
    "acceptance_plot",
    "measurement_plot",
    "mode_weight_plot",
    "scatter_plot",
    "trace_plot",
]

# A vector picture of more points than this is larger than a bitmap and slow to draw.
_MAX_VECTOR_POINTS = 5000

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2126; --soft: #5b6570; --paper: #ffffff; --line: #d8dde2; --card: #f5f7f9;
  --warn: #8a4b00; --warn-card: #fff4e3; --accent: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa5b0; --paper: #15191d; --line: #343c44;
  --card: #1e2429; --warn: #ffc987; --warn-card: #35270f; --accent: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 78rem; color: var(--ink); background: var(--paper);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 2.6rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; }
.subtitle, figcaption, caption { color: var(--soft); }
nav ul { margin: 1rem 0 0; padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { border-bottom: 2px solid var(--soft); vertical-align: bottom; }
th.number, td.number { text-align: right; } td.number { white-space: nowrap; }
tr.floor td { color: var(--soft); font-style: italic; }
td small { display: block; color: var(--soft); font-weight: normal; }
figure { margin: 1.4rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { font-size: .9rem; max-width: 46rem; margin-top: .4rem; }
pre { background: var(--card); padding: .8rem 1rem; border-radius: 4px; font-size: .85rem;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.warning { background: var(--warn-card); color: var(--warn); border-left: 4px solid currentColor; padding: .7rem 1rem;
  margin: 1rem 0; border-radius: 0 4px 4px 0; max-width: 48rem; }
.warning strong { display: block; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } nav { display: none; }
  h2 { break-after: avoid; } figure, tr, .warning { break-inside: avoid; } table { font-size: 8pt; }
  th, td { padding: .2rem .3rem; } td.number { white-space: normal; } .scroll { overflow: visible; } }
"""


class Report:
    """A page built from top to bottom; every method adds to the current section and returns the report.

    All text is escaped: what comes from models, files and endpoints shows as it is and never as markup.
    """

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._parts: list[str] = []
        self._sections: list[str] = []

    def section(self, heading: str, text: str = "") -> "Report":
        """Begin a section, optionally with its first paragraphs."""
        self._sections.append(heading)
        self._parts.append(f'<h2 id="section-{len(self._sections)}">{html.escape(heading)}</h2>')
        return self.text(text) if text else self

    def text(self, text: str) -> "Report":
        """Paragraphs of plain text, separated by empty lines."""
        paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
        self._parts += [f"<p>{html.escape(part)}</p>" for part in paragraphs]
        return self

    def code(self, text: str) -> "Report":
        """A command or a configuration, in fixed width."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")
        return self

    def warning(self, text: str) -> "Report":
        """A box that a reader cannot overlook."""
        self._parts.append(f'<div class="warning" role="note"><strong>Warning</strong>{html.escape(text)}</div>')
        return self

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> "Report":
        """A table; a column of which every cell is a number, a Measurement or empty stands to the right.

        Raises `InvalidInput` for a row whose length is not that of `headers`.
        """
        for row in rows:
            if len(row) != len(headers):
                raise InvalidInput(f"a row has {len(row)} cells for {len(headers)} headers: {list(row)!r}")
        numeric = [all(_is_number(row[column]) for row in rows) for column in range(len(headers))]
        head = "".join(_cell(header, "th", right) for header, right in zip(headers, numeric, strict=True))
        body = (
            "<tr>" + "".join(_cell(v, "td", right) for v, right in zip(row, numeric, strict=True)) + "</tr>"
            for row in rows
        )
        self._parts.append(_table(caption, head, body))
        return self

    def results(self, results: Results, against: str | None = None) -> "Report":
        """The tables of a comparison, one per problem, with its command, floors, differences, costs and notes."""
        self.code(results.command).text(
            f"Scale {results.scale}, {results.date}, {results.wall_seconds:.0f} s. {LEGEND}"
        )
        for problem in problem_tables(results, against):
            headers = ("system", *problem.headers, "gradients", "energies", "seconds")
            head = "".join(_cell(header, "th", index > 0) for index, header in enumerate(headers))
            body = []
            for entry in problem.rows:
                cells = [_cell(entry.system, "td", False)]
                for name in problem.names:
                    value = html.escape(value_cell(entry, name))
                    value = f"<strong>{value}</strong>" if name in entry.decided else value
                    pair = entry.differences.get(name)
                    difference = f"<small>{html.escape(str(pair))}</small>" if pair else ""
                    cells.append(f'<td class="number">{value}{difference}</td>')
                cells += [_cell(cost, "td", True) for cost in cost_cells(entry)]
                body.append("<tr>" + "".join(cells) + "</tr>")
            if any(problem.floors):
                cells = [_cell("floor", "td", False), *(_cell(floor or "–", "td", True) for floor in problem.floors)]
                body.append('<tr class="floor">' + "".join(cells) + '<td colspan="3"></td></tr>')
            caption = f"{problem.problem}, {seed_count(problem)}, differences to {problem.rows[0].against}"
            self._parts.append(_table(caption, head, body))
        notes = [*results.notes, *results.row_notes()]
        if notes:
            self._parts.append("<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>")
        return self

    def figure(self, figure: "Figure", caption: str = "", alt: str = "") -> "Report":
        """A matplotlib figure, as SVG, or as PNG where it has more than 5000 points. `alt` defaults to the caption."""
        kind, picture = _render(figure)
        source = f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
        width = round(figure.get_size_inches()[0] * 96)
        self._parts.append(
            f'<figure><img src="{source}" width="{width}" alt="{html.escape(alt or caption or "figure")}">'
            + (f"<figcaption>{html.escape(caption)}</figcaption>" if caption else "")
            + "</figure>"
        )
        return self

    def html(self) -> str:
        """The whole page."""
        links = "".join(
            f'<li><a href="#section-{number}">{html.escape(heading)}</a></li>'
            for number, heading in enumerate(self._sections, start=1)
        )
        subtitle = f'<p class="subtitle">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        # the policy makes "offline" a fact: a browser loads nothing from anywhere and runs no script
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta http-equiv="Content-Security-Policy" '
            "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            f"<header><h1>{html.escape(self.title)}</h1>{subtitle}</header>\n"
            + (f"<nav><ul>{links}</ul></nav>\n" if len(self._sections) > 1 else "")
            + "<main>\n"
            + "\n".join(self._parts)
            + "\n</main>\n</body></html>\n"
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the page so that a crash leaves an older one whole."""
        return write_atomically(path, self.html())


def _table(caption: str, head: str, body: Iterable[str]) -> str:
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table>{title}<thead><tr>{head}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'
    )


def _cell(value: object, tag: str, right: bool) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    scope = ' scope="col"' if tag == "th" else ""
    style = ' class="number"' if right else ""
    return f"<{tag}{scope}{style}>{html.escape(text)}</{tag}>"


def _is_number(value: object) -> bool:
    return value is None or value == "" or hasattr(value, "__float__")


def _render(figure: "Figure") -> tuple[str, bytes]:
    matplotlib = require("matplotlib", "sampling")
    buffer = io.BytesIO()
    if _points(figure) > _MAX_VECTOR_POINTS:
        figure.savefig(buffer, format="png", dpi=160, facecolor="white")
        return "png", buffer.getvalue()
    # a fixed salt and no date: the same figure gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "noisewise"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    return "svg+xml", buffer.getvalue()


def _points(figure: "Figure") -> int:
    """Number of vertices that a vector picture of `figure` would hold, roughly."""
    total = 0
    for axes in figure.axes:
        paths = [line.get_path() for line in axes.lines]
        for collection in axes.collections:
            array, offsets = collection.get_array(), np.asarray(collection.get_offsets())
            total += max(len(offsets), 0 if array is None else array.size)
            paths += collection.get_paths()
        total += sum(np.asarray(path.vertices).shape[0] for path in paths)
        total += sum(np.asarray(image.get_array()).size for image in axes.images)
    return total
