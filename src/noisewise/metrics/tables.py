"""A comparison as tables: markdown for the documentation, rich for the terminal. Nothing here computes."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from noisewise.metrics.measurement import Measurement, format_value
from noisewise.metrics.results import Results, SystemSummary

if TYPE_CHECKING:
    from rich.console import Group

__all__ = ["LEGEND", "ProblemTable", "cost_cells", "markdown", "problem_tables", "seed_count", "terminal", "value_cell"]

LEGEND = (
    "Mean over seeds ± its standard error (for one seed, the error of the measurement itself); ↓ lower or ↑ higher is "
    "better. Second figure: paired difference to the reference system with its 95 % interval. Bold: the best mean, "
    "where the paired 95 % interval against the second best excludes zero. Floor: what perfect samples of the same "
    "size score."
)
# Measurement columns that a terminal of usual width can show side by side.
_COLUMNS = 4


class ProblemTable(NamedTuple):
    """One problem, ready to print: `headers` and `floors` have one entry per measurement, `rows` one per system."""

    problem: str
    seeds: tuple[int, ...]
    names: tuple[str, ...]
    headers: tuple[str, ...]
    rows: tuple[SystemSummary, ...]
    floors: tuple[str, ...]


def problem_tables(results: Results, against: str | None = None) -> Iterator[ProblemTable]:
    """One `ProblemTable` per problem; `against` as in `Results.summary`."""
    summary = results.summary(against)
    for problem in results.problems:
        rows = tuple(entry for entry in summary if entry.problem == problem)
        names = results.measurement_names(problem)
        found = [[entry.measurements[name] for entry in rows if name in entry.measurements] for name in names]
        yield ProblemTable(
            problem,
            tuple(sorted({seed for entry in rows for seed in entry.seeds})),
            names,
            tuple(_header(name, measured[0]) for name, measured in zip(names, found, strict=True)),
            rows,
            tuple(_floor(measured) for measured in found),
        )


def cost_cells(entry: SystemSummary) -> list[str]:
    """Mean calls (gradients, energies) and seconds of one system, as text."""
    calls = [_count(entry.cost["gradients"]), _count(entry.cost["energies"])]
    return [*calls, f"{entry.cost['seconds']:.3g}"]


def value_cell(entry: SystemSummary, name: str) -> str:
    """`mean ± se`, with the number of finished seeds where some failed; a dash where it was not measured."""
    if name not in entry.measurements:
        return "–"
    measured = entry.measurements[name]
    text = format_value(measured.value, measured.se)
    return text if measured.n == len(entry.seeds) else f"{text} ({measured.n} of {len(entry.seeds)} seeds)"


def markdown(results: Results, against: str | None = None) -> str:
    """Tables per problem with what is needed to make them again."""
    lines = [f"## {_escape(results.method)}, scale {_escape(results.scale)}", "", *_provenance(results), "", LEGEND, ""]
    for table in problem_tables(results, against):
        lines += [f"### {_escape(table.problem)}", "", _seeds(table), ""]
        headers = ["system", *table.headers, "gradients", "energies", "seconds"]
        lines += ["| " + " | ".join(map(_escape, headers)) + " |", "|---" + "|---:" * (len(headers) - 1) + "|"]
        for entry in table.rows:
            cells = [_markdown_cell(entry, name) for name in table.names]
            lines.append("| " + " | ".join([_escape(entry.system), *cells, *cost_cells(entry)]) + " |")
        if any(table.floors):
            floors = [floor or "–" for floor in table.floors]
            lines.append("| " + " | ".join(["*floor*", *floors, "", "", ""]) + " |")
        lines.append("")
    notes = [*results.notes, *results.row_notes()]
    lines += [f"- {_escape(note)}" for note in notes] + ([""] if notes else [])
    return "\n".join(lines)


def terminal(results: Results, against: str | None = None) -> "Group":
    """Tables per problem as one rich renderable."""
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    parts: list[RenderableType] = []
    for problem in problem_tables(results, against):
        for start in range(0, max(len(problem.names), 1), _COLUMNS):
            last = start + _COLUMNS >= len(problem.names)
            shown = slice(start, start + _COLUMNS)
            title = f"{problem.problem} · {seed_count(problem)}" if start == 0 else None
            table = Table(
                title=title and Text(title, style="bold"), title_justify="left", show_lines=False, pad_edge=False
            )
            table.add_column("system", no_wrap=True)
            for header in [*problem.headers[shown], *(["grads", "energies", "s"] if last else [])]:
                table.add_column(Text(header), justify="right")
            for entry in problem.rows:
                cells: list[RenderableType] = [Text(entry.system)]
                for name in problem.names[shown]:
                    cell = Text(value_cell(entry, name), style="bold green" if name in entry.decided else "")
                    if name in entry.differences:
                        cell.append(f"\n{entry.differences[name]}", style="not bold dim default")
                    cells.append(cell)
                table.add_row(*cells, *(cost_cells(entry) if last else []))
            if any(problem.floors[shown]):
                table.add_section()
                table.add_row("floor", *(floor or "–" for floor in problem.floors[shown]), style="italic")
            parts.append(table)
    parts.append(Text(LEGEND, style="dim"))
    parts.extend(Text(f"note: {note}") for note in [*results.notes, *results.row_notes()])
    return Group(*parts)


def _provenance(results: Results) -> list[str]:
    environment = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    machine = f"{environment.get('device', 'unknown device')} ({environment.get('device_name', 'unknown')})"
    return [
        f"`{results.command}`",
        "",
        f"noisewise {results.noisewise}, {results.date}, {results.wall_seconds:.0f} s in all; {machine}, "
        f"{environment.get('threads', '?')} threads; Python {environment.get('python', '?')}, {versions}.",
    ]


def _markdown_cell(entry: SystemSummary, name: str) -> str:
    text = value_cell(entry, name)
    if name in entry.decided:
        text = f"**{text}**"
    return f"{text}<br>{entry.differences[name]}" if name in entry.differences else text


def _header(name: str, measured: Measurement) -> str:
    unit = f" ({measured.unit})" if measured.unit else ""
    arrow = {"lower": " ↓", "higher": " ↑", "neither": ""}[measured.better]
    return f"{name}{unit}{arrow}"


def _floor(measured: Sequence[Measurement]) -> str:
    floors = [m.floor for m in measured if m.floor is not None]
    return format_value(math.fsum(floors) / len(floors)) if floors else ""


def _count(number: float) -> str:
    return f"{number:.3g}".replace("e+0", "e") if number >= 1e5 else f"{number:.0f}"


def seed_count(table: ProblemTable) -> str:
    """`1 seed`, `3 seeds`."""
    return "1 seed" if len(table.seeds) == 1 else f"{len(table.seeds)} seeds"


def _seeds(table: ProblemTable) -> str:
    reference = _escape(table.rows[0].against)
    return f"{seed_count(table)} ({_ranges(table.seeds)}); differences are to {reference}."


def _ranges(seeds: Sequence[int]) -> str:
    """0-2 for 0, 1, 2; the list where it has gaps."""
    if len(seeds) > 2 and list(seeds) == list(range(seeds[0], seeds[0] + len(seeds))):
        return f"{seeds[0]}-{seeds[-1]}"
    return ", ".join(map(str, seeds))


def _escape(text: str) -> str:
    """Text from files is data: no markup of it survives in a page."""
    for character, replacement in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " ")):
        text = text.replace(character, replacement)
    return text
