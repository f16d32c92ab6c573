"""The method's page: its examples run as they stand, without a warning, and its figures are those that were recorded."""

import re
import statistics
from pathlib import Path

import pytest
import torch

from noisewise.metrics.results import Results

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "methods" / "ocm.md"
# rows of the page's table, and the systems that they are
SYSTEMS = {
    '"residual_nll", the default': "residual NLL",
    '"ocm"': "OCM",
    '"ocm_residual"': "OCM, then residuals",
    '"npr", positive': "NPR, softplus",
    'the paper\'s head, "ocm", `parity=True`': "OCM, linear (paper)",
    '"analytic"': "Analytic",
    "fixed, beta": "beta",
    "fixed, beta~": "beta~",
    "exact diagonal": "exact diagonal",
    "exact matrix": "exact matrix",
}
PROBLEMS = (
    ("nine Gaussians, isotropic", "bound, nats"),
    ("nine Gaussians, anisotropic", "bound, nats"),
    ("digits", "bits/dim"),
)
DDPM, ETA_0 = "1000 MMD^2", "1000 MMD^2, eta 0"
# what the text says, in its order
SAID = (
    (r"MMD\^2 x 1000 of ([\d / .]+) for DPM-Solver\+\+", "digits", "DPM-Solver++", ETA_0, (5, 10, 20)),
    (r"([\d / .]+) for UniPC", "digits", "UniPC", ETA_0, (5, 10, 20)),
    (r'([\d / .]+) for "ocm" in DDPM', "digits", "OCM", DDPM, (5, 10, 20)),
    (r"([\d / .]+) in DDIM\'s\. Take", "digits", "OCM", ETA_0, (5, 10, 20)),
    (r'"lanczos" has ([\d / .]+) on digits', "digits", "Lanczos, rank 3", DDPM, (5, 10, 20)),
    (r"has ([\d / .]+)\. On Omniglot", "digits", "OCM, DCT", DDPM, (5, 10, 20)),
    (r"form has ([\d / .]+) at 10 and 20 calls, between", "Omniglot", "Lanczos, rank 3", DDPM, (10, 20)),
    (r"between DPM-Solver\+\+ \(([\d / .]+)\)", "Omniglot", "DPM-Solver++", ETA_0, (10, 20)),
    (r"form it fails there \(([\d / .]+)\)", "Omniglot", "Lanczos, rank 3", ETA_0, (10, 20)),
)


def recorded() -> dict[tuple[str, str, str], float]:
    values: dict[tuple[str, str, str], list[float]] = {}
    for row in Results.load(DOCS / "results" / "ocm" / "results.json").rows:
        for column, one in row.measurements.items():
            values.setdefault((row.problem, row.system, column), []).append(one.value)
    assert all(len(seeds) == 3 for seeds in values.values())
    return {key: statistics.fmean(seeds) for key, seeds in values.items()}


def check(text: str, found: list[float]) -> None:
    numbers = text.replace("*", "").split("/")
    assert len(numbers) == len(found)
    for number, value in zip(numbers, found, strict=True):
        digits = len(number.strip().partition(".")[2])
        assert abs(float(number) - value) <= 0.5 * 10.0**-digits + 1e-9, (text, found)


def test_the_table_of_bounds_is_what_was_recorded():
    means, seen = recorded(), set()
    ours = PAGE.read_text(encoding="utf-8").partition("## What we measured")[2].partition("### What was published")[0]
    for line in ours.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|") or name not in SYSTEMS:
            continue
        seen.add(name)
        for (problem, column), cell in zip(PROBLEMS, cells, strict=True):
            if cell:
                found = [means[f"{problem}, {calls} calls", SYSTEMS[name], column] for calls in (5, 10, 20)]
                check(cell, found)
    assert seen == SYSTEMS.keys()


@pytest.mark.parametrize(("pattern", "problem", "system", "column", "calls"), SAID)
def test_distances_in_the_text_are_what_was_recorded(pattern, problem, system, column, calls):
    means, text = recorded(), " ".join(PAGE.read_text(encoding="utf-8").split())
    check(re.search(pattern, text).group(1), [means[f"{problem}, {k} calls", system, column] for k in calls])


@pytest.mark.slow
def test_the_examples_of_the_page_run_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    space: dict = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), space)
    assert (tmp_path / "runs" / "head" / "config.json").is_file()
    assert space["draws"].shape == (100, 2)
    assert bool(torch.isfinite(space["nats"]).all())
