"""`noisewise energy`: a table becomes a model, the model becomes rows, and bad tables are named by line."""

import csv

import pytest
import torch

from noisewise.cli import app
from noisewise.energy import EnergyNet, MixtureScoreMatching
from noisewise.energy.cli import energy_app, read_table
from noisewise.errors import InvalidInput, RunFolderError
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
    energy_app([str(argument) for argument in arguments], standalone_mode=False)


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


def test_a_table_without_names_and_with_empty_cells(tmp_path):
    path = tmp_path / "plain.csv"
    path.write_text("1,2\n3,\n\n5,6\n")
    rows, names = read_table(path)
    assert names == []
    assert rows[1].isnan().tolist() == [False, True]
    with pytest.raises(InvalidInput, match=r"rows 1\)"):
        run("fit", path, "--out", tmp_path / "fit")


@pytest.mark.parametrize(
    ("text", "quoted"), [("a,b\n1,2\n3,x\n", "line 3"), ("1,2\n3\n", "line 2"), ("a,b\n", "no rows"), ("", "no rows")]
)
def test_a_bad_table_is_named_by_its_line(tmp_path, text, quoted):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InvalidInput, match=quoted):
        read_table(path)


def test_missing_files_and_folders_are_named(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.csv"):
        run("fit", tmp_path / "none.csv", "--out", tmp_path / "fit")
    with pytest.raises(RunFolderError, match="no finished"):
        run("sample", tmp_path)
