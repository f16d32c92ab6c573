"""What a fit of `noisewise sequence` answers to other rows, at its own rate and scale, and what it says of weak ground."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from typer.testing import CliRunner

from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.sequence.cli import sequence_app
from noisewise.sequence.fits import note_of_length, notes_of_scores, split
from noisewise.sequence.preparation import Preparation, Prepared
from noisewise.sequence.readers import read_sequences
from noisewise.sequence.scores import scores_of_classes, share

FEW = ("--width", 4, "--layers", 1, "--kernel-size", 8, "--batch-size", 16)


def run(*arguments):
    return sequence_app([str(argument) for argument in arguments], standalone_mode=False)


def tone(frequency, rate, seconds=0.05, loud=8000):
    return (loud * np.sin(2 * np.pi * frequency * np.arange(int(rate * seconds)) / rate)).astype(np.int16)


def record(folder, name, frequency, rate=4000, channels=1):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    samples = tone(frequency, rate)
    wavfile.write(path, rate, samples if channels == 1 else np.stack([samples] * channels, 1))


@pytest.fixture(scope="module")
def tones(tmp_path_factory):
    """High and low tones, and the folder of a fit that tells them apart."""
    folder = tmp_path_factory.mktemp("tones")
    for i in range(12):
        record(folder / "clips", f"low/{i}.wav", 100 + 5 * i)
        record(folder / "clips", f"high/{i}.wav", 900 + 20 * i)
    fit = ("--epochs", 25, "--lr", 5e-2, "--kernel-lr", 5e-2)
    run("fit", folder / "clips", "-o", folder / "fit", *FEW, *fit)
    return folder / "clips", folder / "fit"


def lines(path):
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_predictions_are_those_of_the_model_in_python(tones, tmp_path, capsys):
    clips, out = tones
    for name, frequency in (("a.wav", 130), ("deep/er/b.wav", 1010)):
        record(tmp_path / "new", name, frequency)
    run("predict", out, tmp_path / "new", "-o", tmp_path / "answers.csv", "--json")
    facts = json.loads(capsys.readouterr().out)
    head, *rows = lines(tmp_path / "answers.csv")
    assert head == ["row", "class", "p(high)", "p(low)"]
    assert [row[0] for row in rows] == [str(tmp_path / "new" / name) for name in ("a.wav", "deep/er/b.wav")]
    assert [row[1] for row in rows] == ["low", "high"]
    assert (facts["rows"], facts["counts"]) == (2, {"high": 1, "low": 1})
    x = torch.from_numpy(read_sequences(tmp_path / "new", labelled=False).X)
    for folder, merged in ((out, True), (out / "model", False)):
        model = Prepared.from_pretrained(folder, merged=merged)
        assert model.model.merged == merged
        with torch.no_grad():
            shares = model(x).softmax(-1).numpy()
        np.testing.assert_allclose(np.array([row[2:] for row in rows], float), shares, atol=1e-4)
    with pytest.raises(RunFolderError, match=r"holds no preparation.json of `noisewise sequence fit`"):
        Prepared.from_pretrained(clips)


def test_values_are_predicted_in_their_units_and_rows_may_end_early(tmp_path, capsys):
    rng = np.random.default_rng(0)
    X, lengths = rng.normal(size=(40, 24)), rng.integers(12, 25, 40)
    path = tmp_path / "values.npz"
    np.savez(path, X=X, y=1000 + 100 * X[:, :12].mean(-1), lengths=lengths)
    run("fit", path, "-o", tmp_path / "fit", *FEW, "--task", "regression", "--epochs", 2)
    np.savez(path, X=X, lengths=lengths)
    run("predict", tmp_path / "fit", path, "-o", tmp_path / "values.csv", "--batch-size", 7)
    assert "40 rows: " in capsys.readouterr().out
    head, *rows = lines(tmp_path / "values.csv")
    assert (head, [row[0] for row in rows]) == (["row", "value"], [str(i) for i in range(40)])
    found = read_sequences(path, labelled=False)
    with torch.no_grad():
        wanted = Prepared.from_pretrained(tmp_path / "fit")(torch.from_numpy(found.X), torch.from_numpy(found.lengths))
    np.testing.assert_allclose([float(row[1]) for row in rows], wanted[:, 0], rtol=1e-5)


def test_recordings_at_another_rate_are_brought_to_that_of_the_fit(tones, tmp_path, capsys):
    _, out = tones
    form = Preparation.load(out / "model")
    assert (form.rate, form.full_scale, form.read["rate"]) == (4000, True, None)
    for i in range(6):
        record(tmp_path, f"low/{i}.wav", 110 + 7 * i, rate=16000)
        record(tmp_path, f"high/{i}.wav", 920 + 17 * i, rate=8000)
    with pytest.warns(
        NoisewiseWarning, match="has 8000, 16000 samples a second and was resampled to 4000, the rate of the"
    ):
        run("evaluate", out, tmp_path, "--json")
    found = json.loads(capsys.readouterr().out)
    # at their own rates low tones would be four times as low, and high ones twice as low: half of them wrong
    assert found["merged"]["scores"]["accuracy"]["value"] > 0.9
    assert found["cut_rows"] == 0
    assert "few rows: 12 scored" in found["warnings"][0]
    np.savez(tmp_path / "x.npz", X=np.ones((2, 200), np.float32), y=np.array(["low", "high"]))
    with pytest.raises(InvalidInput, match="does not say its samples a second, so it cannot be resampled to 4000"):
        run("evaluate", out, tmp_path / "x.npz")


def test_columns_that_the_fit_read_are_not_asked_of_recordings(tmp_path):
    np.savez(
        tmp_path / "x.npz", X=np.ones((3, 40)), word=np.array(["low", "high", "low"]), speaker=np.arange(3), rate=4000
    )
    read = {"label": "word", "group": "speaker", "rate": None, "tokens": None, "mono": False}
    form = Preparation.of(read_sequences(tmp_path / "x.npz", label="word"), "classification", "data", read)
    record(tmp_path / "clips", "low/a.wav", 120)
    assert form.read_again(tmp_path / "clips").y.tolist() == [1]
    assert form.read_again(tmp_path / "x.npz").groups.tolist() == ["0", "1", "2"]
    assert form.read_again(tmp_path / "x.npz", labelled=False).y.tolist() == [-1] * 3


def test_other_channels_are_refused_by_the_option_that_mends_it(tones, tmp_path):
    _, out = tones
    record(tmp_path / "stereo", "a.wav", 120, channels=2)
    with pytest.raises(InvalidInput, match=r"has 2 channels, the model was fitted to 1: .*\(--mono\)"):
        run("predict", out, tmp_path / "stereo", "-o", tmp_path / "a.csv")
    run("predict", out, tmp_path / "stereo", "-o", tmp_path / "a.csv", "--mono")
    assert lines(tmp_path / "a.csv")[1][1] == "low"


def test_an_exported_graph_says_what_it_takes(tones, tmp_path, capsys):
    _, out = tones
    run("export", out, tmp_path / "m.pt2", "--json")
    facts = json.loads(capsys.readouterr().out)
    assert facts["input"] == {
        "name": None,
        "dtype": "float32",
        "samples": "parts of the largest, in [-1, 1]: divide integers of 16 bits by 32768",
        "rate": 4000,
    }
    assert (facts["row"], facts["output"]["width"], facts["classes"]) == ([1, 200], 2, ["high", "low"])
    run("export", out, tmp_path / "m.pt2")
    assert "32768, 4000 a second\n" in capsys.readouterr().out


def test_rows_that_choose_the_step_do_not_scale_the_others(tmp_path):
    kept, held = split(40, 0.25, seed=3)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(40))
    X = np.random.default_rng(0).normal(size=(40, 1, 20)).astype(np.float32)
    X[held.numpy()] += 1000
    np.savez(tmp_path / "x.npz", X=X, y=np.arange(40) % 2)
    run("fit", tmp_path / "x.npz", "-o", tmp_path / "fit", *FEW, "--epochs", 1, "--validation", 0.25, "--seed", 3)
    form = Preparation.load(tmp_path / "fit" / "model")
    assert form.mean[0] == pytest.approx(X[kept.numpy()].mean(), abs=1e-5)
    assert form.std[0] == pytest.approx(X[kept.numpy()].std(), rel=1e-5)
    assert json.loads((tmp_path / "fit" / "summary.json").read_text())["held_out_rows"] == 10


def test_a_fit_that_learned_nothing_says_so(tmp_path, capsys):
    y = np.arange(80) % 4 == 0
    np.savez(tmp_path / "x.npz", X=np.random.default_rng(0).normal(size=(80, 16)).astype(np.float32), y=y.astype(int))
    run("fit", tmp_path / "x.npz", "-o", tmp_path / "fit", *FEW, "--epochs", 1, "--validation", 0.5, "--lr", 1e-6)
    said = capsys.readouterr().out
    assert "is no better than to answer '0' always" in said
    assert "few rows" not in said
    assert "is no better than to answer" in (tmp_path / "fit" / "report.html").read_text()


@pytest.mark.parametrize(("right", "n"), [(0, 4), (4, 4), (37, 80), (400, 400)])
def test_shares_have_half_of_wilsons_interval(right, n):
    found = share(right / n, n)
    # its ends are where |p - share| is one standard error at p, p (1 - p) / n: the roots of a quadratic
    p = right / n
    low, high = np.sort(np.roots([1 + 1 / n, -(2 * p + 1 / n), p * p]).real)
    assert found.se == pytest.approx((high - low) / 2, rel=1e-6)
    assert not str(found).endswith("± 0")


def test_scores_of_a_perfect_table_are_not_certain():
    found = scores_of_classes(np.diag([2, 2]))
    assert found["accuracy"].value == found["macro F1"].value == 1
    assert found["accuracy"].se == pytest.approx(0.1)
    assert "few rows: 4 held out" in notes_of_scores(found, "held out")[0]
    found = scores_of_classes(np.diag([20, 20]))
    assert found["accuracy"].se == found["macro F1"].se == pytest.approx(1 / 82)
    assert notes_of_scores(found, "held out") == []


def test_long_rows_are_said_to_take_long():
    assert note_of_length(4000, 1, False, 100) is None
    assert note_of_length(16000, 4, False, 100) is None
    said = note_of_length(16000, 1, False, 1250)
    assert "1,250 training steps of rows of 16,000 steps" in said
    assert "--patch 8 (2,000 steps a row) or a smaller --width" in said
    assert "--patch" not in note_of_length(16000, 1, True, 1250)


def test_a_kind_there_is_not_is_answered_by_those_there_are():
    refused = CliRunner().invoke(sequence_app, ["fit", "x.npz", "-o", "fit", "--kind", "wavelet"])
    assert refused.exit_code == 2
    assert all(kind in refused.output for kind in ("wavelet", "fourier", "dilated", "sparse", "dense"))
