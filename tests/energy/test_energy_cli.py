"""`noisewise energy`: a table becomes a model, the model becomes rows, and bad tables are named by line."""

import csv
import json
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import torch

from noisewise.cli import app, main
from noisewise.energy import EnergyNet, MixtureScoreMatching
from noisewise.energy.cli import energy_app, read_table
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.targets import GaussianMixture

pytestmark = pytest.mark.filterwarnings("ignore::noisewise.errors.NoisewiseWarning")


@pytest.fixture
def table(tmp_path):
    truth = GaussianMixture(torch.tensor([[-4.0, 100.0], [4.0, 130.0]]), 1.0, torch.tensor([0.3, 0.7]))
    rows = truth.sample(400, torch.Generator().manual_seed(0))
    path = tmp_path / "data.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["left", "right"], *rows.tolist()])
    return path


def run(*arguments):
    return energy_app([str(argument) for argument in arguments], standalone_mode=False)


def test_the_command_line_mounts_it():
    assert any(group.name == "energy" for group in app.registered_groups)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mfd", "dsm"])
def test_a_table_becomes_a_model_that_gives_rows_like_its_own(table, tmp_path, method, capsys):
    out, drawn = tmp_path / "fit", tmp_path / "drawn.csv"
    run("fit", table, "--method", method, "--out", out, "--steps", 300)
    assert (out / "report.txt").read_text().strip() in capsys.readouterr().out
    run("sample", out, "-n", 300, "-o", drawn)
    rows, names = read_table(drawn)
    original = read_table(table)[0]
    assert names == ["left", "right"]
    assert rows.shape == (300, 2)
    # both clusters, on the scale of the data
    assert 0.05 < float((rows[:, 0] < 0).double().mean()) < 0.6
    assert (rows.mean(0) - original.mean(0)).abs().max() < original.std(0).max()
    loaded = (MixtureScoreMatching if method == "mfd" else EnergyNet).from_pretrained(out)
    assert (loaded.corruption.s == 0.3) if method == "dsm" else (loaded.score(original) > -10)
    # the same command again reads what is finished
    run("fit", table, "--method", method, "--out", out, "--steps", 300)
    with pytest.raises(RunFolderError, match="another method"):
        run("fit", table, "--method", "dsm" if method == "mfd" else "mfd", "--out", out)


def test_a_table_without_names_and_with_quoted_ones(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("1,2\n\n5,6\n")
    rows, names = read_table(path)
    assert names == []
    assert rows.tolist() == [[1, 2], [5, 6]]
    path.write_text('"left, upper","say ""so"""\n1,2\n')
    assert read_table(path)[1] == ["left, upper", 'say "so"']


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("a,b\n1,2\n3,x\n", "line 3"),
        ("1,2\n3\n", "line 2"),
        ("a,b\n", "no rows"),
        ("", "no rows"),
        ("a,b\n1,2\n\n3,\nnan,4\n", r"2 of 3 data rows .*line 4, 5 of the file"),
        ("a,b,c\n1,2\n", "3 names for 2 columns"),
        ("a;b\n1;2\n", "semicolons"),
        ("1,5;2,5\n1,5;2,5\n", "semicolons"),
        ("1\t2\n3\t4\n", "tabs"),
        ("1;2\n", "semicolons"),
    ],
)
def test_a_bad_table_is_named_by_its_line(tmp_path, text, quoted):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=quoted):
        read_table(path)


def test_a_binary_file_is_no_csv(tmp_path):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(size=(20, 2)))
    with pytest.raises(InvalidInput, match="a CSV file of numbers is wanted"):
        read_table(tmp_path / "rows.npy")


def test_columns_are_called_by_their_names(table, tmp_path):
    text = table.read_text().splitlines()
    table.write_text("\n".join([text[0], *(f"{line.split(',')[0]},7" for line in text[1:])]))
    for method in ("mfd", "dsm"):
        with pytest.raises(InvalidInput, match=r"column 2 \('right'\) is constant at 7"):
            run("fit", table, "--method", method, "--out", tmp_path / "fit")
    table.write_text("\n".join(text[:9]))
    with pytest.raises(InvalidInput, match="at least 10 rows"):
        run("fit", table, "--out", tmp_path / "fit")


@pytest.mark.parametrize(
    ("method", "option", "value"), [("mfd", "sigma", 0.3), ("dsm", "beta", 0.8), ("dsm", "reference", "gaussian")]
)
def test_an_option_of_the_other_method_is_refused(table, tmp_path, method, option, value):
    with pytest.raises(InvalidInput, match=f"--{option} {value} belongs to --method"):
        run("fit", table, "--method", method, f"--{option}", value, "--out", tmp_path / "fit")


@pytest.mark.parametrize("method", ["mfd", "dsm"])
def test_json_holds_the_numbers_of_the_report(tmp_path, method, capsys):
    table, out, drawn = tmp_path / "data.csv", tmp_path / "fit", tmp_path / "drawn.csv"
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.randn(100, 1, generator=generator) - 5, torch.randn(40, 1, generator=generator) + 5])
    with open(table, "w", newline="") as file:
        csv.writer(file).writerows([['a "b", c'], *rows.tolist()])
    run("fit", table, "--method", method, "--out", out, "--steps", 20, "--json")
    facts = json.loads(capsys.readouterr().out)
    report = (out / "report.txt").read_text()
    assert (facts["method"], facts["rows"], facts["steps"], facts["interrupted"]) == (method, 140, 20, False)
    if method == "mfd":
        assert f"log normaliser {facts['log_normalizer']['value']:.4f}" in report
        assert [cluster["share_of_rows"]["value"] for cluster in facts["clusters"]] == pytest.approx(
            [100 / 140, 40 / 140]
        )
        assert [cluster["centre"][0] for cluster in facts["clusters"]] == pytest.approx([-5, 5], abs=0.5)
        assert (facts["gaps"][0]["first"], facts["gaps"][0]["second"]) == (1, 2)
        assert facts["warnings"] == [
            line.removeprefix("warning: ") for line in report.splitlines() if "warning:" in line
        ]
    else:
        assert f"{facts['held_out_loss']:.4g}" in report
        run("sample", out, "-n", 5, "--json")
        shown = json.loads(capsys.readouterr().out)
        run("sample", out, "-n", 5, "-o", drawn, "--json")
        assert json.loads(capsys.readouterr().out) == {"names": ['a "b", c'], "n": 5, "out": str(drawn)}
        # and the file reads back, name included
        kept, names = read_table(drawn)
        assert names == shown["names"] == ['a "b", c']
        assert torch.allclose(kept, torch.tensor(shown["rows"], dtype=torch.float64), rtol=1e-8)


@pytest.mark.parametrize("method", ["mfd", "dsm"])
def test_ctrl_c_says_where_it_was_cut_and_ends_as_sample_does(table, tmp_path, method, capsys):
    out = tmp_path / "fit"
    command = ("fit", table, "--method", method, "--out", out, "--steps", 100_000)

    def press():
        while not (out / "run" / "events.jsonl").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    assert run(*command) == 130
    thread.join()
    captured = capsys.readouterr()
    step = int(
        re.search(r"^interrupted at step (\d+) of 100000; the same command goes on", captured.err, re.M).group(1)
    )
    assert f"interrupted at step {step}" in captured.out
    assert f"interrupted at step {step}" in (out / "report.txt").read_text()
    with pytest.warns(NoisewiseWarning, match=f"interrupted at step {step}: run the same fit command again"):
        run("sample", out, "-n", 2)
    # a fit that was killed leaves its checkpoint alone
    (out / "command.json").unlink()
    with pytest.raises(RunFolderError, match="run the same fit command again to go on"):
        run("sample", out)


def test_paths_that_the_system_refuses_are_one_sentence(table, tmp_path, capsys):
    for arguments, said in (
        (("fit", table, "--out", table), "is a file; --out names a folder"),
        (("fit", table, "--out", table / "below", "--steps", 2), "Not a directory"),
        (("sample", table), "no finished"),
        (("sample", tmp_path), "no finished"),
        (("fit", tmp_path, "--out", tmp_path / "fit"), "cannot be read"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["energy", *map(str, arguments)])
        captured = capsys.readouterr()
        assert stopped.value.code == 2, arguments
        assert captured.err.startswith("error: ")
        assert captured.err.count("\n") == 1
        assert said in captured.err


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.csv"):
        run("fit", tmp_path / "none.csv", "--out", tmp_path / "fit")
    with pytest.raises(RunFolderError, match="no finished"):
        run("sample", tmp_path)
