"""The method's page: its figures are those that were recorded."""

import re
import statistics
from pathlib import Path

from noisewise.metrics.results import Results

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "methods" / "mafin.md"
SETS = ("tenk", "covidqa", "scifact-mini", "cranfield", "xquad-en")
NUMBERS = (32, 64, 128, 256)
WHOLE = ("black box", "BM25", "black box + words", "Mafin", "guard's choice")


def recorded() -> dict[tuple[str, str, str], float]:
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in Results.load(DOCS / "results" / "mafin" / "results.json").rows:
        assert not [note for note in row.notes if note.startswith("failed")]
        for column, one in row.measurements.items():
            values.setdefault((row.problem, row.system, column), []).append(one.value)
    assert all(len(seeds) == 3 for seeds in values.values())
    return {key: statistics.fmean(seeds) for key, seeds in values.items()}


def measured() -> str:
    return PAGE.read_text(encoding="utf-8").partition("## What we measured")[2].partition("## API")[0]


def tables() -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = [{}]
    for line in measured().splitlines():
        if not line.startswith("|"):
            found += [{}] * bool(found[-1])
            continue
        name, *cells = [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
        if set(name) != {"-"} and not name.startswith(("nDCG", "gain")):
            found[-1][name] = cells
    return [table for table in found if table]


def check(cells: list[str], keys: list[tuple[str, str, str]], values: dict[tuple[str, str, str], float]) -> None:
    for cell, key in zip(cells, keys, strict=True):
        digits = len(cell.partition(".")[2])
        assert abs(float(cell) - values[key]) <= 0.5 * 10.0**-digits + 1e-9, (cell, key)


def test_the_tables_are_what_was_recorded():
    values, (scores, gains, languages, numbers, whole) = recorded(), tables()
    assert len(scores) == 14
    for name, cells in scores.items():
        check(cells, [(of, name, "nDCG@10") for of in SETS], values)
    assert len(gains) == 6
    for name, cells in gains.items():
        of, _, system = name.partition(": ")
        check(cells, [(f"{of}, {pairs} pairs", system, "gain") for pairs in (50, 100, 200, 500)], values)
    assert len(languages) == 5
    for name, cells in languages.items():
        check(cells, [(f"{of} to English", name, "nDCG@10") for of in ("German", "Spanish", "Chinese")], values)
    assert len(numbers) == 4
    for name, cells in numbers.items():
        of, _, words = name.partition(", ")
        systems = [f"{kept} numbers of the black box" + (" + words" if words else "") for kept in NUMBERS]
        last = "black box + words" if words else "black box"
        check(cells, [(f"{of}, storage", system, "nDCG@10") for system in (*systems, last)], values)
    assert len(whole) == 2
    for of, cells in whole.items():
        check(cells, [(f"{of}, whole", system, "nDCG@10") for system in WHOLE], values)


def test_what_the_text_says_of_gains_is_what_was_recorded():
    values, text = recorded(), " ".join(measured().split())
    said = (
        (r"Mafin alone gains ([.\d]+) on tenk", ("tenk", "Mafin", "gain")),
        (r"the chosen vector reaches ([.\d]+\d)", ("tenk", "guard's choice", "nDCG@10")),
        (r"unjudged, words gain ([.\d]+\d) there", ("tenk, shuffled", "black box + words", "gain")),
    )
    for pattern, key in said:
        check([re.search(pattern, text).group(1)], [key], values)
    assert values["tenk, shuffled", "guard's choice", "gain"] == 0
