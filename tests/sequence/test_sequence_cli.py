"""`noisewise sequence`: a file becomes a model, its scores and its graph, and a fit that was cut short goes on."""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from sklearn import metrics

from noisewise import training
from noisewise.cli import app, main
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.sequence import listops
from noisewise.sequence.cli import KernelKind, ScaleBy, Task, sequence_app
from noisewise.sequence.kernels import KINDS
from noisewise.sequence.model import SequenceModel
from noisewise.sequence.preparation import SCALES, Inputs, Preparation, Prepared
from noisewise.sequence.readers import TASKS, read_sequences
from noisewise.sequence.scores import answers_of, confusion, scores_of_classes, scores_of_values

FEW = ("--width", 4, "--layers", 1, "--kernel-size", 8, "--batch-size", 16, "--epochs", 2)

SAME = ("--epochs", 20, "--lr", 5e-2, "--kernel-lr", 5e-2, "--group", "speaker", "--test-group", "cy")


def run(*arguments):
    return sequence_app([str(argument) for argument in arguments], standalone_mode=False)


def fit(path, out, *options):
    return run("fit", path, "-o", out, *FEW, *options)


def sines(n=60, length=48, seed=0):
    """Two classes of noisy sines that one look tells apart, of unequal length, by three speakers."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    t = np.arange(length)
    X = np.sin((0.3 + 0.9 * y)[:, None] * t + rng.uniform(0, 6, (n, 1))) + 0.1 * rng.normal(size=(n, length))
    lengths = rng.integers(length // 2, length + 1, n)
    return {
        "X": 5 * X + 3,
        "y": y,
        "lengths": lengths,
        "speaker": np.array(["ann", "bob", "cy"])[np.arange(n) // 2 % 3],
    }


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A file of two classes, and the folder of a fit that held one speaker out."""
    folder = tmp_path_factory.mktemp("fitted")
    path = folder / "sines.npz"
    np.savez(path, **sines())
    fit(path, folder / "fit", *SAME)
    return path, folder / "fit"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "sines.npz"
    np.savez(path, **sines())
    return path


def test_the_command_line_mounts_it_and_knows_all_kinds():
    assert any(group.name == "sequence" for group in app.registered_groups)
    assert sorted(KernelKind) == sorted(KINDS)
    assert list(Task) == list(TASKS)
    assert list(ScaleBy) == list(SCALES)


def test_a_fit_leaves_a_folder_that_agrees_with_itself(fitted, capsys):
    path, out = fitted
    facts, command = (json.loads((out / name).read_text()) for name in ("summary.json", "command.json"))
    assert (facts["rows"], facts["held_out_rows"], facts["test_rows"], facts["length"]) == (40, 4, 20, 48)
    assert (facts["steps"], facts["steps_asked"], facts["interrupted"], facts["cut"]) == (60, 60, False, False)
    assert (command["command"], command["data"], command["epochs"]) == ("fit", str(path), 20)
    model = SequenceModel.from_pretrained(out / "model")
    assert sum(weight.numel() for weight in model.parameters()) == facts["parameters"]
    report = (out / "report.html").read_text()
    for said in (
        "How the loss went down",
        "On the groups left out",
        "How far back each layer hears",
        "--test-group cy",
    ):
        assert said in report
    assert "https://" not in report
    # the group left out is what evaluate scores there
    run("evaluate", out, path, "--test-group", "cy", "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["trained"]["scores"] == facts["test"]
    assert found["confusion"] == facts["confusion"]
    # sines of four times the frequency are no riddle
    assert facts["test"]["accuracy"]["value"] > 0.8 > facts["test"]["majority class"]["value"]
    # the same command reads what is finished, and says the same
    fit(path, out, *SAME, "--json")
    assert json.loads(capsys.readouterr().out) == facts


def test_merging_changes_no_answer_and_the_table_shows_both(fitted, capsys):
    path, out = fitted
    run("evaluate", out / "model", path, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["rows"] == 60
    assert found["largest_difference"] < 1e-4
    assert found["trained"]["scores"] == found["merged"]["scores"]
    assert np.sum(found["confusion"]) == 60
    assert min(found[form]["seconds_per_row"] for form in ("trained", "merged")) > 0
    run("evaluate", out, path)
    text = capsys.readouterr().out
    assert all(word in text for word in ("accuracy ↑", "macro F1 ↑", "majority class", "merged", "milliseconds a row"))


def crash_at(monkeypatch, step):
    advance = training.Fit._advance

    def crashing(fit):
        if fit.step == step:
            raise MemoryError
        advance(fit)

    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setattr(training.Fit, "_advance", crashing)


def test_the_same_command_goes_on_after_a_crash_to_the_same_model(data, tmp_path):
    fit(data, tmp_path / "whole", "--dropout", 0.2)
    with pytest.MonkeyPatch.context() as patch:
        crash_at(patch, 4)
        with pytest.raises(MemoryError):
            fit(data, tmp_path / "cut", "--dropout", 0.2)
    with pytest.raises(RunFolderError, match="run the same fit command again to go on"):
        run("evaluate", tmp_path / "cut", data)
    fit(data, tmp_path / "cut", "--dropout", 0.2)
    assert '"event": "resume"' in (tmp_path / "cut" / "run" / "events.jsonl").read_text()
    whole, cut = (SequenceModel.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(whole[name].equal(cut[name]) for name in whole)


def test_ctrl_c_leaves_what_exists_and_says_how_to_go_on(data, tmp_path, capsys):
    out = tmp_path / "fit"
    # a shell that starts the tests in the background has them ignore the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press():
        while not (out / "run" / "checkpoint.safetensors").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
            thread.start()
            assert fit(data, out, "--epochs", 1e5) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert "the same command goes on to the same model" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["interrupted"]
    with pytest.warns(NoisewiseWarning, match="was interrupted: run the same fit command again to go on"):
        run("evaluate", out, data)


def test_seconds_end_a_fit_that_the_same_command_goes_on_with(data, tmp_path, capsys):
    out = tmp_path / "fit"
    fit(data, out, "--max-seconds", 1e-3)
    assert json.loads((out / "summary.json").read_text())["cut"]
    assert "--max-seconds ended the fit at step" in capsys.readouterr().out
    fit(data, out)
    facts = json.loads((out / "summary.json").read_text())
    assert (facts["cut"], facts["steps"]) == (False, facts["steps_asked"])


def test_a_folder_of_another_command_or_other_data_is_refused(fitted, data, tmp_path):
    path, out = fitted
    with pytest.raises(RunFolderError, match="holds a fit with width 4, but 8 was asked for"):
        fit(path, out, *SAME, "--width", 8)
    # another length reads other numbers, which is no news
    with pytest.raises(
        RunFolderError, match="holds a fit with length nothing and width 4, but 40 and 8 were asked for"
    ):
        fit(path, out, *SAME, "--width", 8, "--length", 40)
    with pytest.raises(RunFolderError, match="holds a fit with data "):
        fit(data, out, *SAME)
    before = path.read_bytes()
    np.savez(path, **sines(seed=1))
    try:
        with pytest.raises(RunFolderError, match="holds a fit with other contents of data than there are now"):
            fit(path, out, *SAME)
    finally:
        path.write_bytes(before)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(RunFolderError, match="is not empty and holds other files"):
        fit(data, tmp_path / "full")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "absent.npz", "-o", "fit"], "there is no file or folder 'absent.npz'"),
        (["fit", "sines.npz", "-o", "sines.npz"], "is a file"),
        (["fit", "sines.npz", "-o", "fit", "--length", 0], "--length must be at least 1"),
        (["fit", "sines.npz", "-o", "fit", "--lr", 0], "--lr must be a finite number above 0"),
        (["fit", "sines.npz", "-o", "fit", "--dropout", 1], "--dropout must be in [0, 1)"),
        (["fit", "sines.npz", "-o", "fit", "--label", "word"], "columns with a value for each: y, speaker"),
        (["fit", "sines.npz", "-o", "fit", "--test-group", "cy"], "--test-group cy needs --group COLUMN"),
        (["fit", "sines.npz", "-o", "fit", "--group", "speaker", "--test-group", "dan"], "it has ann, bob, cy"),
        (
            ["fit", "sines.npz", "-o", "fit", "--group", "speaker", *(f"--test-group={x}" for x in ("ann", "bob", "cy"))],
            "leaves 0 rows to train on",
        ),
        (["fit", "sines.npz", "-o", "fit", "--rate", 4000], "does not say its samples a second"),
        (["fit", "sines.npz", "-o", "fit", "--device", "tpu9"], "--device tpu9 cannot be used here: leave it out, or give cpu"),
        (["fit", "sines.npz", "-o", "fit", "--device", "meta"], "--device meta cannot be used here"),
        (["fit", "sines.npz", "-o", "fit", "--validation", 0.99], "--validation 0.99 of 60 rows leaves 1 to train on"),
        (["predict", "nowhere", "sines.npz", "-o", "answers.txt"], "must end in .csv"),
        (["predict", "nowhere", "sines.npz", "-o", "answers.csv"], "holds no model of `noisewise sequence fit`"),
        (["evaluate", "nowhere", "sines.npz"], "holds no model of `noisewise sequence fit`"),
        (["export", "nowhere", "model.onnx"], "holds no model of `noisewise sequence fit`"),
        (["export", "nowhere", "model.pth"], "must end in .onnx or .pt2"),
        (["listops", "out.csv"], "must end in .npz"),
        (["listops", "out.npz", "--max-depth", 2], "no tree meets"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_one_sentence_before_any_work(data, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(data.parent)
    with pytest.raises(SystemExit) as stopped:
        main(["sequence", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not (data.parent / "fit").exists()


def test_values_come_back_in_their_units(tmp_path, capsys):
    rng = np.random.default_rng(0)
    X = rng.normal(size=(80, 2, 32))
    path = tmp_path / "values.npz"
    np.savez(path, X=X, y=1000 + 100 * X[:, 0].mean(-1))
    fit(path, tmp_path / "fit", "--task", "regression", "--epochs", 20, "--scale", "none", "--json")
    assert "loss" in json.loads(capsys.readouterr().out)["held_out"]
    run("evaluate", tmp_path / "fit", path, "--json")
    found = json.loads(capsys.readouterr().out)
    # the spread of y is about 18 around 1000
    assert found["trained"]["scores"]["RMSE"]["value"] < 15
    assert found["trained"]["scores"]["R2"]["value"] > 0.5
    assert found["confusion"] == []


def test_symbols_are_fitted_and_others_are_refused(tmp_path, capsys):
    run(
        "listops",
        tmp_path / "ops.npz",
        "-n",
        60,
        "--min-length",
        5,
        "--max-length",
        30,
        "--max-depth",
        4,
        "--max-args",
        4,
    )
    assert "60 expressions of" in capsys.readouterr().out
    fit(tmp_path / "ops.npz", tmp_path / "fit", "--kind", "sparse", "--bidirectional", "--epochs", 1)
    form = Preparation.load(tmp_path / "fit" / "model")
    longest = int(np.load(tmp_path / "ops.npz", allow_pickle=False)["lengths"].max())
    assert (form.vocabulary, form.length) == (len(listops.VOCABULARY), longest)
    assert "--kind sparse" in (tmp_path / "fit" / "report.html").read_text()
    np.savez(tmp_path / "more.npz", X=np.full((3, 9), 16), y=np.arange(3))
    with pytest.raises(InvalidInput, match="has the symbol 16, the model knows those below 16"):
        run("evaluate", tmp_path / "fit", tmp_path / "more.npz")
    np.savez(tmp_path / "more.npz", X=np.zeros((3, 9)), y=np.arange(3))
    with pytest.raises(InvalidInput, match="holds signals, the model was fitted to symbols"):
        run("evaluate", tmp_path / "fit", tmp_path / "more.npz")


def test_listops_are_those_of_the_library_and_the_file_is_the_same_every_time(tmp_path, capsys):
    bounds = ("--min-length", 10, "--max-length", 40, "--max-depth", 4, "--max-args", 4, "--seed", 7)
    for name in ("a.npz", "b.npz"):
        run("listops", tmp_path / name, "--n", 25, *bounds, "--json")
    said = json.loads(capsys.readouterr().out.partition("}\n")[0] + "}")
    assert said["vocabulary"] == list(listops.VOCABULARY)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    codes, values, lengths = listops.arrays(25, 10, 40, 4, 4, seed=7)
    found = read_sequences(tmp_path / "a.npz", length=40)
    assert np.array_equal(found.X, codes)
    assert np.array_equal(found.lengths, lengths)
    assert [int(found.classes[place]) for place in found.y] == values.tolist()


def test_a_graph_gives_what_the_model_gives(fitted, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    _, out = fitted
    form = Preparation.load(out / "model")
    rows = 3 + 5 * torch.randn(7, 1, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = Prepared(SequenceModel.from_pretrained(out / "model"), form)(rows)
    with pytest.warns(NoisewiseWarning, match="give it rows of the whole length"):
        run("export", out, tmp_path / "model.onnx")
    said = capsys.readouterr().out
    assert "input input_0: float32 of shape (rows, 1, 48)" in said
    assert "samples: numbers as they stand in the file of the fit\n" in said
    assert "output output: float32 of shape (rows, 2), scores of 0, 1, whose softmax is their probabilities" in said
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (made,) = session.run(["output"], {"input_0": rows.numpy()})
    np.testing.assert_allclose(made, wanted, atol=1e-4)
    with pytest.warns(NoisewiseWarning, match="give it rows of the whole length"):
        run("export", out, tmp_path / "model.pt2", "--json")
    assert json.loads(capsys.readouterr().out)["row"] == [1, 48]
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(rows), wanted, atol=1e-4, rtol=1e-4)


# --- preparation and scores


def test_scaling_leaves_mean_zero_and_deviation_one_of_valid_steps(data):
    found = read_sequences(data)
    valid = np.arange(48) < found.lengths[:, None]
    for scale in ("data", "row"):
        form = Preparation.of(found, "classification", scale, {})
        inputs = form.inputs(found)
        x = inputs.x.numpy()[:, 0]
        assert not x[~valid].any()
        parts = [x[valid]] if scale == "data" else [row[:end] for row, end in zip(x, found.lengths, strict=True)]
        for part in parts:
            assert abs(part.mean()) < 1e-5
            assert part.std() == pytest.approx(1, abs=1e-5)
        # rows without an end of their own are scaled by the same numbers
        whole = torch.from_numpy(found.X[found.lengths == 48])
        torch.testing.assert_close(form.scaled(whole), inputs.x[torch.from_numpy(found.lengths == 48)])
    constant = form.scaled(torch.full((1, 1, 48), 7.0))
    assert not constant.any()


def test_scores_are_those_of_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(4, (200,), generator=generator)
    output = torch.randn(200, 5, generator=generator) + 2 * torch.nn.functional.one_hot(y, 5)
    answered = output.argmax(1)
    table = confusion(output, y)
    assert np.array_equal(table, metrics.confusion_matrix(y, answered, labels=range(5)))
    found = scores_of_classes(table)
    assert float(found["accuracy"]) == pytest.approx(metrics.accuracy_score(y, answered))
    assert float(found["macro F1"]) == pytest.approx(metrics.f1_score(y, answered, average="macro"))
    assert float(found["majority class"]) == int(y.bincount().max()) / 200
    values, truth = (torch.randn(200, generator=generator) for _ in range(2))
    found = scores_of_values(values, truth)
    assert float(found["RMSE"]) == pytest.approx(metrics.root_mean_squared_error(truth, values), rel=1e-5)
    assert float(found["R2"]) == pytest.approx(metrics.r2_score(truth, values), rel=1e-5)


def test_standard_errors_are_the_spread_over_data_sets():
    # 100 data sets: the spread is known to 7 %, that of the bootstrap to less, so 0.3 is 4 standard errors
    rng = np.random.default_rng(0)
    kept = {name: [] for name in ("macro F1", "RMSE", "R2")}
    for _ in range(100):
        y = torch.from_numpy(rng.integers(3, size=200))
        output = torch.from_numpy(rng.normal(size=(200, 3))) + 1.5 * torch.nn.functional.one_hot(y, 3)
        found = scores_of_classes(confusion(output, y))
        truth = torch.from_numpy(rng.normal(size=200))
        found |= scores_of_values(truth + torch.from_numpy(rng.normal(size=200)) / 2, truth)
        for name, values in kept.items():
            values.append((found[name].value, found[name].se))
    for values in kept.values():
        spread, said = np.std([value for value, _ in values]), np.mean([se for _, se in values])
        assert said == pytest.approx(spread, rel=0.3)


def test_answers_come_in_the_order_of_the_rows(shapes_unchecked):
    x = torch.arange(10.0).reshape(10, 1, 1)
    found = answers_of(torch.nn.Flatten(), Inputs(x, torch.zeros(10), None), batch_size=3)
    assert found.output.flatten().tolist() == list(range(10))
