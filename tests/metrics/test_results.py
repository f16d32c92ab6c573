import io
import json
import math
import os

import pytest
from rich.console import Console

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.files import write_atomically
from noisewise.metrics import Measurement, Results, Row, describe_environment, paired_difference
from noisewise.typing import Cost

SCORES = {"FittedDiGS": [0.10, 0.11, 0.09], "HMC": [0.80, 0.82, 0.79], "MALA": [0.10, 0.12, 0.10]}


def results(**scores):
    rows = [
        Row(system, "GMM-40", seed, {"TV": Measurement(value, floor=0.08)}, Cost(100 * (seed + 1), 10, 1.5))
        for system, values in (scores or SCORES).items()
        for seed, value in enumerate(values)
    ]
    return Results("digs", "quick", "noisewise compare digs --scale quick", rows, wall_seconds=3.0, notes=("a note",))


def test_round_trip(tmp_path):
    written = results()
    assert Results.load(written.save(tmp_path / "run" / "results.json")) == written


def test_file_is_strict_json_and_what_failed_returns_as_nan(tmp_path):
    path = results(A=[math.nan, math.inf, 0.5]).save(tmp_path / "results.json")
    text = path.read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["schema"] == 1
    values = [row.measurements["TV"].value for row in Results.load(path).rows]
    assert math.isnan(values[0])
    assert math.isnan(values[1])
    assert values[2] == 0.5


def test_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = results().save(tmp_path / "results.json")
    before = path.read_bytes()

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", disk_full)
        with pytest.raises(OSError, match="No space"):
            results(A=[1.0]).save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["results.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        Results("digs", "quick", "c", [], environment={"x": math.nan}).save(path)
    assert path.read_bytes() == before


def test_written_files_have_ordinary_permissions(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert write_atomically(tmp_path / "made", "x").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 2, "rows": []}', "schema 2"),
        ("[]", "schema None"),
        ("{", "not JSON"),
        ('{"schema": 1, "rows": []}', "damaged"),
        ('{"schema": 1, "rows": [{"system": "A"}]}', "damaged"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, text, message):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(RunFolderError, match=message) as raised:
        Results.load(path)
    assert str(path) in str(raised.value)
    with pytest.raises(RunFolderError, match="missing"):
        Results.load(tmp_path / "missing.json")


def test_summary_has_means_errors_floors_costs_and_paired_differences():
    by_system = {entry.system: entry for entry in results().summary()}
    hmc = by_system["HMC"]
    expected = paired_difference(SCORES["HMC"], SCORES["FittedDiGS"])
    assert hmc.differences["TV"] == expected
    assert by_system["FittedDiGS"].differences == {}
    assert hmc.measurements["TV"].value == pytest.approx(sum(SCORES["HMC"]) / 3)
    assert hmc.measurements["TV"].se == pytest.approx(0.0152752523 / math.sqrt(3))
    assert hmc.measurements["TV"].floor == pytest.approx(0.08)
    assert hmc.cost["gradients"] == 200
    other = {entry.system: entry for entry in results().summary(against="HMC")}
    assert other["FittedDiGS"].differences["TV"].mean == pytest.approx(-expected.mean)
    with pytest.raises(InvalidInput, match="NUTS"):
        results().summary(against="NUTS")


def test_a_lead_is_bold_only_where_the_data_decide_it():
    # MALA is worse than FittedDiGS on average, but not beyond its interval
    assert "**" not in results().markdown().replace("**bold**", "")
    assert "**0.1" in results(FittedDiGS=[0.10, 0.11, 0.09], HMC=[0.80, 0.82, 0.79]).markdown()
    # a system that failed on a seed cannot lead
    assert "**" not in results(A=[0.1, math.nan, 0.1], B=[0.8, 0.8, 0.81]).markdown()


def test_failed_seeds_are_shown_and_pairs_use_common_seeds():
    summary = results(A=[1.0, 2.0, 3.0], B=[2.0, math.nan, 4.5]).summary()
    assert summary[1].measurements["TV"].n == 2
    assert summary[1].differences["TV"] == paired_difference([2.0, 4.5], [1.0, 3.0])
    assert "(2 of 3 seeds)" in results(A=[1.0, 2.0, 3.0], B=[2.0, math.nan, 4.5]).markdown()
    assert "n/a (0 of 3 seeds)" in results(A=[1.0, 2.0, 3.0], B=[math.nan] * 3).markdown()


def test_one_seed_keeps_the_error_of_its_measurement():
    row = Row("A", "P", 0, {"w": Measurement(0.7, 0.02)})
    assert Results("digs", "quick", "c", [row]).summary()[0].measurements["w"].se == 0.02


def test_markdown_carries_what_makes_it_again_and_no_foreign_markup():
    rows = [Row("<script>", "a|b", 0, {"TV": Measurement(0.5)}, notes=("<img src=x>",))]
    page = Results("digs", "quick", "noisewise compare digs", rows).markdown()
    assert "`noisewise compare digs`" in page
    assert describe_environment()["versions"]["torch"] in page
    assert "<script>" not in page
    assert "<img" not in page
    assert "a\\|b" in page
    table = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1


@pytest.mark.parametrize("width", [80, 140])
def test_terminal_table_shows_every_system_and_floor(width):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(results().table())
    text = console.export_text()
    for word in [*SCORES, "floor", "0.08", "TV ↓", "note: a note"]:
        assert word in text


def test_markup_in_names_is_not_interpreted_on_the_terminal():
    console = Console(width=100, record=True, file=io.StringIO())
    rows = [Row("[red]A[/red]", "[bold]P", 0, {"[x]TV": Measurement(0.5)})]
    console.print(Results("digs", "quick", "c", rows).table())
    text = console.export_text()
    assert "[red]A[/red]" in text
    assert "[bold]P" in text
    assert "[x]TV" in text


def test_two_rows_for_one_seed_are_refused():
    row = Row("A", "P", 0, {})
    with pytest.raises(InvalidInput, match="seed 0"):
        Results("digs", "quick", "c", [row, row])


def test_what_only_describes_has_no_winner():
    rows = [
        Row(system, "p", seed, {"share": Measurement(value + seed / 1000, better="neither")})
        for system, value in (("a", 0.9), ("b", 0.7))
        for seed in range(3)
    ]
    for entry in Results("m", "cpu", "c", rows).summary():
        assert entry.decided == frozenset()
        for pair in entry.differences.values():
            assert pair.better is None
