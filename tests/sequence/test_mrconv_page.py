"""The method's page: its figures are those that were recorded."""

import json
import re
import statistics
from pathlib import Path

import pytest

from noisewise.metrics.results import Results

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "methods" / "mrconv.md"
DIGITS, SPEAKER, TIMED = "spoken digits", "spoken digits, a new speaker", "spoken digits, equal size and time"
ACCURACIES = (DIGITS, SPEAKER, TIMED, "ListOps, small", "handwritten digits, row by row")
TARGETS = ("smooth", "echoes", "both")
HALF = "NMSE at half the rate"
LENGTHS = ("1024", "4096", "16384")
# systems of the benchmark, for a training step, memory and use
SPEEDS = {
    "torch's own derivative": ("free kernel, torch's own derivative", "free kernel, torch's own derivative", None),
    "MRConv": ("exact statistics", "exact statistics", "merged"),
    "full-support statistics": ("full-support statistics", "full-support statistics", None),
    "norm of kernels": ("norm of kernels", "norm of kernels", None),
    "by branches, as published": ("branches", "branches", None),
    "S4D, plain": ("S4D", "S4D", "S4D, its kernel generated"),
    "SGConv": ("SGConv", "SGConv", "SGConv, its kernel generated"),
    "MultiresNet": ("MultiresNet", "MultiresNet", "MultiresNet"),
}
# what the text says, and the means that it says it of
SAID = (
    (r"in (\d+) seconds against (\d+)", [(DIGITS, "MRConv fourier", "training seconds"), (DIGITS, "S4D", "training seconds")]),
    (r"stay as good as they were \(([.\d]+) and ([.\d]+)\)",
     [(f"kernel, smooth, {data}", "MRConv fourier", HALF) for data in ("scarce", "plenty")]),
    (r"S4D's are at ([.\d]+) and ([.\d]+)", [(f"kernel, smooth, {data}", "S4D", HALF) for data in ("scarce", "plenty")]),
    (r"interpolated, at ([.\d]+) and ([.\d]+\d)",
     [(f"kernel, smooth, {data}", "free kernel", HALF) for data in ("scarce", "plenty")]),
    (r"by branches ([.\d]+), as it must be, full-support statistics ([.\d]+), the norm of kernels ([.\d]+), "
     r"alpha frozen ([.\d]+), \*\*one resolution of as many frequencies ([.\d]+)\*\*, dense sub-kernels ([.\d]+)\.",
     [("kernel, smooth, scarce", name, "NMSE") for name in (
         "fourier, by branches", "fourier, full statistics", "fourier, norm of kernels", "fourier, alpha frozen",
         "fourier, one resolution", "dense in branches")]),
)  # fmt: skip


def recorded() -> dict[tuple[str, str, str], list[float]]:
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in Results.load(DOCS / "results" / "mrconv" / "results.json").rows:
        for column, one in row.measurements.items():
            values.setdefault((row.problem, row.system, column), []).append(one.value)
    assert all(len(seeds) == 3 for seeds in values.values())
    return values


def measured() -> str:
    return PAGE.read_text(encoding="utf-8").partition("## What we measured")[2].partition("## API")[0]


def tables() -> list[dict[str, list[str]]]:
    found: list[dict[str, list[str]]] = [{}]
    for line in measured().splitlines():
        if not line.startswith("|"):
            found += [{}] * bool(found[-1])
            continue
        name, *cells = [cell.strip().replace("*", "") for cell in line.strip("|").split("|")]
        if set(name) != {"-"} and not name.startswith(("accuracy", "error", "in plain")):
            found[-1][name] = cells
    return [table for table in found if table]


def agrees(text: str, value: float) -> bool:
    digits = len(text.strip().partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10.0**-digits + 1e-9


def test_the_table_of_accuracies_is_what_was_recorded():
    values, table = recorded(), tables()[0]
    assert len(table) == 11
    for name, cells in table.items():
        for problem, cell in zip(ACCURACIES, cells, strict=True):
            seeds = values.get((problem, name, "accuracy, %"))
            assert bool(cell) == (seeds is not None)
            if seeds is None:
                continue
            mean, _, error = cell.partition(" ± ")
            assert agrees(mean, statistics.fmean(seeds)), (name, problem)
            assert agrees(error or "0", statistics.stdev(seeds) / 3**0.5), (name, problem)


def test_the_table_of_kernels_is_what_was_recorded():
    values, table = recorded(), tables()[1]
    assert len(table) == 7
    for name, cells in table.items():
        for target, cell in zip(TARGETS, cells, strict=True):
            for data, number in zip(("scarce", "plenty"), cell.split("/"), strict=True):
                assert agrees(number, statistics.fmean(values[f"kernel, {target}, {data}", name, "NMSE"])), (
                    name,
                    target,
                    data,
                )


@pytest.mark.parametrize(("pattern", "keys"), SAID)
def test_numbers_in_the_text_are_what_was_recorded(pattern, keys):
    values = recorded()
    numbers = re.search(pattern, " ".join(measured().split())).groups()
    for number, key in zip(numbers, keys, strict=True):
        assert agrees(number, statistics.fmean(values[key])), (number, key)


def test_the_table_of_speeds_is_what_was_recorded():
    found = json.loads((DOCS.parent / "benchmarks" / "results" / "mrconv.json").read_text(encoding="utf-8"))
    parts = (("training_step", "median"), ("saved_for_backward", "ratio"), ("inference", "median"))
    table = tables()[2]
    assert len(table) == len(SPEEDS)
    for name, cells in table.items():
        for (part, key), cell, system in zip(parts, cells, SPEEDS[name], strict=True):
            numbers = cell.replace("merged", "").split("/") if system is not None else []
            for number, length in zip(numbers, LENGTHS, strict=False):
                assert agrees(number, found[part][length][system][key]), (name, part, length)
            assert len(numbers) in (0, 3)


def test_merging_changed_no_prediction():
    changes = [seeds for (_, _, column), seeds in recorded().items() if column == "changed by merging"]
    assert len(changes) == 11
    assert all(value == 0 for seeds in changes for value in seeds)
