"""`noisewise neural`: a user's file becomes a network, the network draws, and the draws are measured."""

import json
import math
import os
import shutil
import signal
import threading
import time
import warnings

import numpy as np
import pytest
import torch

from noisewise.cli import app, main
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.neural import DiKLSampler
from noisewise.neural import dikl as fitting
from noisewise.neural.cli import neural_app
from noisewise.sampling.cli import load_target
from noisewise.targets import GaussianMixture

pytestmark = pytest.mark.filterwarnings("ignore::noisewise.errors.NoisewiseWarning")

TWO_MODES = """
import torch
from noisewise.targets import GaussianMixture

def log_prob(x):
    left, right = -(x + 3).square().sum(-1) / 2, -(x - 3).square().sum(-1) / 2
    return torch.logaddexp(left + torch.tensor(0.3).log(), right + torch.tensor(0.7).log())

exact = GaussianMixture(torch.tensor([[-3.0, -3.0], [3.0, 3.0]]), 1.0, torch.tensor([0.3, 0.7]))
"""
FEW = ("--steps", 20, "--budget", "1e5")


def run(*arguments):
    return neural_app([str(argument) for argument in arguments], standalone_mode=False)


def fit(path, out, *options, name="exact"):
    return run("fit", "--target", f"{path}:{name}", "--out", out, *(options or FEW))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A file of two modes with exact draws, and the folder of a short fit of it."""
    folder = tmp_path_factory.mktemp("fitted")
    path = folder / "two_modes.py"
    path.write_text(TWO_MODES)
    fit(path, folder / "fit")
    return path, folder / "fit"


@pytest.fixture
def two_modes(tmp_path):
    path = tmp_path / "two_modes.py"
    path.write_text(TWO_MODES)
    return path


def test_the_command_line_mounts_it():
    assert any(group.name == "neural" for group in app.registered_groups)


def test_the_short_names_of_the_literature_are_known():
    assert load_target("dw4").dim == 8
    assert load_target("lj13").dim == 39
    assert load_target("many_well", 4).dim == 4


def test_a_fit_leaves_a_folder_that_agrees_with_itself(fitted, capsys):
    path, out = fitted
    facts, command = (json.loads((out / name).read_text()) for name in ("summary.json", "command.json"))
    assert (facts["dim"], facts["steps"], facts["interrupted"]) == (2, 20, False)
    assert (command["source"], command["steps"], command["budget"]) == (f"{path}:exact", 20, 100_000)
    loaded = DiKLSampler.from_pretrained(out / "model", load_target(f"{path}:exact"))
    assert vars(loaded.cost) == facts["cost"]
    report = (out / "report.html").read_text()
    assert "Curves of the fit" in report
    assert "Energies of the draws" in report
    assert "https://" not in report
    # what it was asked for and what it did, and the line that does it again
    for said in ("budget of calls", "100,000", f"{facts['cost']['gradients']:,}", "--steps 20 --budget 100000 --out"):
        assert said in report
    # the same command reads what is finished, and says the same
    before = loaded.sample(50)
    run("fit", "--target", f"{path}:exact", *FEW, "--out", out, "--json")
    again = json.loads(capsys.readouterr().out)
    assert (again["steps"], again["cost"]["gradients"]) == (20, facts["cost"]["gradients"])
    assert DiKLSampler.from_pretrained(out / "model", load_target(f"{path}:exact")).sample(50).equal(before)


def test_draws_are_those_of_the_library_in_every_form(fitted, tmp_path, capsys):
    path, out = fitted
    exact = load_target(f"{path}:exact")
    drawn = DiKLSampler.from_pretrained(out / "model", exact).sample(30, seed=5)
    run("sample", out, "-n", 30, "--seed", 5, "--out", tmp_path / "draws.npy")
    assert "30 draws for 0 calls of the target" in capsys.readouterr().out
    assert torch.from_numpy(np.load(tmp_path / "draws.npy")).equal(drawn)
    run("sample", out, "-n", 30, "--seed", 5, "--out", tmp_path / "draws.csv")
    capsys.readouterr()
    run("sample", out, "-n", 30, "--seed", 5)
    text = capsys.readouterr().out
    assert text == (tmp_path / "draws.csv").read_text()
    assert text.startswith("x0,x1\n")
    np.testing.assert_allclose(np.loadtxt(text.splitlines()[1:], delimiter=","), drawn, rtol=1e-7)
    run("sample", out, "-n", 30, "--seed", 5, "--refine", 9, "--json")
    refined = json.loads(capsys.readouterr().out)
    assert refined["gradients"] >= 9 * 30
    # a network of twenty steps is far off, and MALA mends the shapes of modes
    assert exact.log_prob(torch.tensor(refined["rows"])).mean() > exact.log_prob(drawn).mean()


def test_the_table_has_the_numbers_of_evaluate_with_their_floors(fitted, capsys):
    _, out = fitted
    run("evaluate", out, "-n", 200, "--json")
    found = json.loads(capsys.readouterr().out)["measurements"]
    assert {"W2", "MMD2", "modes covered", "TV of mode weights"} <= found.keys()
    # twenty steps give no sampler: perfect draws score better
    assert found["W2"]["value"] > found["W2"]["floor"] > 0
    run("evaluate", out, "-n", 200)
    text = capsys.readouterr().out
    assert all(word in text for word in ("floor", "modes covered ↑", "W2 ↓"))


def test_a_target_without_exact_draws_is_measured_against_those_that_are_given(fitted, tmp_path, capsys):
    path, _ = fitted
    out = tmp_path / "fit"
    run("fit", "--target", f"{path}:log_prob", "--dim", 2, *FEW, "-o", out)
    exact = load_target(f"{path}:exact").sample(400, torch.Generator().manual_seed(1))
    np.save(tmp_path / "trusted.npy", exact.numpy())
    capsys.readouterr()
    run("evaluate", out, "-n", 200, "--reference", tmp_path / "trusted.npy", "--json")
    assert json.loads(capsys.readouterr().out)["measurements"]["W2"]["floor"] > 0
    np.save(tmp_path / "trusted.npy", exact.numpy()[:, :1])
    with pytest.raises(InvalidInput, match=r"shape \(400, 1\); needed are numbers of shape \(draws, 2\)"):
        run("evaluate", out, "--reference", tmp_path / "trusted.npy")
    with pytest.raises(InvalidInput, match=r"absent.npy cannot be read: No such file"):
        run("evaluate", out, "--reference", tmp_path / "absent.npy")
    with pytest.raises(InvalidInput, match=r"two_modes.py cannot be read: it is no .npy file") as refused:
        run("evaluate", out, "--reference", path)
    assert "pickle" not in str(refused.value)
    with pytest.raises(InvalidInput, match=r"neither a .npy file nor a folder of `noisewise sample -o`"):
        run("evaluate", out, "--reference", tmp_path)
    with pytest.raises(InvalidInput, match=r"is a folder of `noisewise neural fit`.*noisewise neural sample .* -o"):
        run("evaluate", out, "--reference", fitted[1])


def with_chains(monkeypatch, drawn):
    """Every sampler that is fitted or loaded has these draws of the chains of training."""
    monkeypatch.setattr(DiKLSampler, "chain_draws_", drawn, raising=False)
    # a fit or a file must not put its own in their place
    setting = DiKLSampler.__setattr__
    monkeypatch.setattr(
        DiKLSampler, "__setattr__", lambda me, name, x: None if name == "chain_draws_" else setting(me, name, x)
    )


def test_where_nothing_is_exact_the_chains_of_training_stand_in_and_are_called_so(
    fitted, tmp_path, monkeypatch, capsys
):
    path, _ = fitted
    drawn = load_target(f"{path}:exact").sample(400, torch.Generator().manual_seed(1))
    out = tmp_path / "fit"
    with_chains(monkeypatch, drawn)
    run("fit", "--target", f"{path}:log_prob", "--dim", 2, *FEW, "-o", out)
    page = (out / "report.html").read_text()
    assert "Energies of the draws over those of the chains of training" in page
    assert "how well the network learned them, not whether they are right" in page
    capsys.readouterr()
    run("evaluate", out, "-n", 200, "--json")
    found = json.loads(capsys.readouterr().out)
    np.save(tmp_path / "chains.npy", drawn.numpy())
    run("evaluate", out, "-n", 200, "--reference", tmp_path / "chains.npy", "--json")
    assert json.loads(capsys.readouterr().out)["measurements"] == found["measurements"]
    assert found["against"].startswith("the chains of training")
    run("evaluate", out, "-n", 200)
    assert "not whether they are right" in capsys.readouterr().out
    # without them nothing is left to measure against
    with_chains(monkeypatch, None)
    run("fit", "--target", f"{path}:log_prob", "--dim", 2, *FEW, "-o", out)
    assert "nothing to hold the energies against" in (out / "report.html").read_text()
    with pytest.raises(
        InvalidInput, match=r"two_modes.py:log_prob has neither exact draws nor a reference .*--reference"
    ):
        run("evaluate", out)


def test_exact_draws_go_before_those_of_the_chains(fitted, monkeypatch, capsys):
    _, out = fitted
    with_chains(monkeypatch, torch.zeros(400, 2))
    run("evaluate", out, "-n", 200, "--json")
    assert json.loads(capsys.readouterr().out)["against"] == "exact draws"


def test_weights_make_means_and_the_normaliser_of_draws(tmp_path, capsys):
    path, out = tmp_path / "bump.py", tmp_path / "fit"
    path.write_text("def log_prob(x): return -(x - 5).square().sum(-1) / 2\n")
    run("fit", "--target", f"{path}:log_prob", "--dim", 2, *FEW, "--out", out)
    capsys.readouterr()
    run("sample", out, "-n", 4000, "--seed", 3, "--weighted", "--out", tmp_path / "draws.npz", "--json")
    said = json.loads(capsys.readouterr().out)
    kept = {name: torch.from_numpy(array) for name, array in np.load(tmp_path / "draws.npz").items()}
    assert kept["draws"].shape == (4000, 2)
    assert abs(said["log_normalizer"] - math.log(2 * math.pi)) < 4 * said["log_normalizer_se"] < 0.5
    share = kept["log_weights"].softmax(0)
    assert 1 / share.square().sum() == pytest.approx(said["ess"], rel=1e-4)
    assert ((share.unsqueeze(-1) * kept["draws"]).sum(0) - 5).abs().max() < 4 * said["ess"] ** -0.5
    assert said["energies"] == 4000
    run("sample", out, "-n", 400, "--weighted", "--out", tmp_path / "draws.npz")
    text = capsys.readouterr().out
    assert "400 weighted draws, worth" in text
    assert "log Z" in text
    with pytest.raises(InvalidInput, match="--weighted and --refine 5 exclude each other"):
        run("sample", out, "--weighted", "--refine", 5, "--out", tmp_path / "draws.npz")
    with pytest.raises(InvalidInput, match=r"--weighted needs --out FILE.npz, got .*draws.npy"):
        run("sample", out, "--weighted", "--out", tmp_path / "draws.npy")


def test_a_bounded_target_is_fitted_from_starts_inside(tmp_path):
    path, starts, out = tmp_path / "half.py", tmp_path / "starts.npy", tmp_path / "fit"
    path.write_text(
        "import torch\n\ndef log_prob(x):\n"
        "    return torch.where((x > 9).all(-1), -(x - 9).sum(-1), torch.full_like(x[:, 0], -torch.inf) + 0 * x.sum(-1))\n"
    )
    command = ("fit", "--target", f"{path}:log_prob", "--dim", 2, "--steps", 20, "--budget", "3e5", "--out", out)
    with pytest.raises(InvalidInput, match=r"start inside the support, --init FILE\.npy"):
        run(*command)
    inside = 9 + np.random.default_rng(0).exponential(size=(64, 2))
    for rows, said in (
        (inside[0], r"shape \(2,\); needed are numbers of shape \(chains, 2\)"),
        (np.where(inside == inside[5, 1], np.nan, inside), r"--init .*the start of chain 5 is not finite"),
        (inside[:0], "holds no chains"),
    ):
        np.save(starts, rows)
        with pytest.raises(InvalidInput, match=said):
            run(*command, "--init", starts)
    np.save(starts, inside)
    run(*command, "--init", starts)
    facts = json.loads((out / "summary.json").read_text())
    assert facts["init"] == str(starts)
    assert "--init" in (out / "report.html").read_text()
    drawn = DiKLSampler.from_pretrained(out / "model", load_target(f"{path}:log_prob", 2)).sample(500)
    # starts on the target's own scale: without them no chain would have come here
    assert (drawn.median(0).values - 9.7).abs().max() < 1.5
    np.save(starts, inside + 1)
    with pytest.raises(RunFolderError, match="began from other starts than those of --init"):
        run(*command, "--init", starts)
    with pytest.raises(RunFolderError, match="began from other starts"):
        run(*command)
    np.save(starts, inside)
    run(*command, "--init", starts)


def test_ctrl_c_while_the_chains_run_says_how_to_go_on(two_modes, tmp_path, capsys):
    out = tmp_path / "fit"
    # a shell that starts the tests in the background has them ignore the signal
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def press():
        while not (out / "run" / "chains").exists():
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    try:
        assert fit(two_modes, out, "--steps", 20, "--budget", "1e9") == 130
    finally:
        signal.signal(signal.SIGINT, before)
    thread.join()
    assert "interrupted while the chains ran; the same command goes on" in capsys.readouterr().err
    with pytest.raises(RunFolderError, match="with --budget"):
        fit(two_modes, out, "--steps", 20, "--budget", "1e8")


def test_names_of_options_stand_for_those_of_the_library(two_modes, tmp_path):
    with pytest.raises(InvalidInput, match=r"^--budget must be at least .* got 5000$") as refused:
        fit(two_modes, tmp_path / "fit", "--steps", 20, "--budget", 5000)
    assert "max_" not in str(refused.value)
    two_modes.write_text("import numpy as np\n\ndef log_prob(x): return -np.sum(np.asarray(x) ** 2, -1)\n")
    with pytest.raises(InvalidInput, match=r"from_numpy.*NAME may be the Target object"):
        fit(two_modes, tmp_path / "fit", "--dim", 2, *FEW, name="log_prob")


def test_drawing_needs_no_file_of_the_target(two_modes, tmp_path, capsys):
    out = tmp_path / "fit"
    two_modes.write_text(
        TWO_MODES
        + "from noisewise.targets.target import TorchTarget\nnamed = TorchTarget(log_prob, 2, ['mu', 'tau'])\n"
    )
    fit(two_modes, out, name="named")
    capsys.readouterr()
    run("sample", out, "-n", 3)
    before = capsys.readouterr().out
    assert before.startswith("mu,tau\n")
    two_modes.write_text("raise RuntimeError('this must not run')\n")
    run("sample", out, "-n", 3)
    assert capsys.readouterr().out == before
    two_modes.unlink()
    run("sample", out, "-n", 3)
    assert capsys.readouterr().out == before


def test_the_same_command_goes_on_after_a_crash_to_the_same_sampler(fitted, tmp_path, monkeypatch):
    path, whole = fitted
    out = tmp_path / "fit"
    monkeypatch.setattr(fitting, "_CHECKPOINT_SECONDS", 0.0)
    step = fitting.Training.advance

    def crash(training, done):
        if training.step == 10:
            raise MemoryError
        step(training, done)

    with monkeypatch.context() as patch:
        patch.setattr(fitting.Training, "advance", crash)
        with pytest.raises(MemoryError):
            fit(path, out)
    with pytest.raises(RunFolderError, match="run the same fit command again to go on"):
        run("sample", out)
    fit(path, out)
    assert '"event": "resume"' in (out / "run" / "events.jsonl").read_text()
    mine, theirs = (
        DiKLSampler.from_pretrained(folder / "model", load_target(f"{path}:exact")).sample(100)
        for folder in (out, whole)
    )
    assert mine.equal(theirs)


def test_ctrl_c_ends_as_sample_does_and_leaves_what_exists(two_modes, tmp_path, capsys):
    out = tmp_path / "fit"

    def press():
        # the chains come first
        while not (out / "run" / "checkpoint.safetensors").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fitting, "_CHECKPOINT_SECONDS", 0.0)
        thread = threading.Thread(target=press, daemon=True)
        thread.start()
        assert fit(two_modes, out, "--steps", 100_000, "--budget", "1e5") == 130
        thread.join()
    assert "the same command goes on to the same sampler" in capsys.readouterr().err
    assert json.loads((out / "summary.json").read_text())["interrupted"]
    with pytest.warns(NoisewiseWarning, match="was interrupted: run the same fit command again to go on"):
        run("sample", out, "-n", 2)


def test_a_fit_refuses_a_changed_file_or_option_and_what_measures_warns(fitted, tmp_path):
    path, made = fitted
    mine, out = tmp_path / "two_modes.py", tmp_path / "fit"
    shutil.copytree(made, out)
    mine.write_text(TWO_MODES)
    command = json.loads((out / "command.json").read_text())
    (out / "command.json").write_text(json.dumps({**command, "source": f"{mine}:exact"}))
    with pytest.raises(RunFolderError, match="with --steps 20, but --steps 30 was asked for"):
        fit(mine, out, "--steps", 30, "--budget", "1e5")
    with pytest.raises(RunFolderError, match=r"holds a fit of .*two_modes\.py:exact, not of gmm40"):
        run("fit", "--target", "gmm40", *FEW, "--out", out)
    mine.write_text(TWO_MODES + "\n# another density\n")
    with pytest.raises(RunFolderError, match="has changed"):
        fit(mine, out)
    for arguments in (("sample", out, "-n", 2, "--refine", 3), ("evaluate", out, "-n", 50)):
        with pytest.warns(NoisewiseWarning, match=r"exact has changed since the fit in .* began"):
            run(*arguments)
    # a file that was moved is still the same
    mine.unlink()
    with pytest.raises(RunFolderError, match=r"no file .*--target FILE\.py:NAME"):
        run("evaluate", out, "-n", 50)
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoisewiseWarning)
        run("evaluate", out, "-n", 50, "--target", f"{path}:exact")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--target", "gmm41", "--steps", 20, "-o", "fit"], "known: gmm40"),
        (["fit", "--target", "absent.py:log_prob", "--steps", 20, "-o", "fit"], "no file 'absent.py'"),
        (["fit", "--target", "two_modes.py:log_p", "--steps", 20, "-o", "fit"], "has no 'log_p'"),
        (["fit", "--target", "two_modes.py:log_prob", "--steps", 20, "-o", "fit"], "add --dim"),
        (["fit", "--target", "gmm40", "-o", "fit"], "--seconds 60"),
        (["fit", "--target", "gmm40", "--budget", "1e6", "-o", "fit"], "--seconds 60"),
        (["fit", "--target", "gmm40", "--steps", 0, "-o", "fit"], "--steps must be at least 1"),
        (["fit", "--target", "gmm40", "--seconds", -1, "-o", "fit"], "--seconds must be a finite number above 0"),
        (["fit", "--target", "gmm40", "--steps", 20, "--generator", "egnn", "-o", "fit"], "egnn"),
        (["fit", "--target", "gmm40", "--steps", 20, "-o", "two_modes.py"], "is a file"),
        (["fit", "--target", "gmm40", "--steps", 20, "-o", "full"], "not empty"),
        (["fit", "--target", "gmm40", "--steps", 20, "-o", "/proc/x"], "--out /proc/x cannot be created"),
        (["fit", "--target", "gmm40", "--steps", 20, "--init", "absent.npy", "-o", "fit"], "absent.npy cannot be read"),
        (["sample", "nowhere"], "holds no finished `noisewise neural fit`"),
        (["sample", "two_modes.py"], "holds no finished `noisewise neural fit`"),
        (["evaluate", "full"], "holds no finished `noisewise neural fit`"),
        (["sample", "nowhere", "-n", 0], "-n must be at least 1"),
        (["sample", "nowhere", "--out", "draws.txt"], "must end in .npy or .csv"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_any_work(two_modes, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(two_modes.parent)
    (two_modes.parent / "full").mkdir()
    (two_modes.parent / "full" / "thesis.txt").write_text("")
    with pytest.raises(SystemExit) as stopped:
        main(["neural", *map(str, arguments)])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert said in captured.err
    assert not (two_modes.parent / "fit").exists()


def test_a_file_that_failed_its_checks_can_be_mended_in_place(two_modes, tmp_path):
    out = tmp_path / "fit"
    two_modes.write_text("def log_prob(x): return -x.log().sum(-1)\n")
    command = ("fit", "--target", f"{two_modes}:log_prob", "--dim", 2, *FEW, "--out", out)
    with pytest.raises(InvalidInput, match="start inside the support"):
        run(*command)
    two_modes.write_text("def log_prob(x): return -x.square().sum(-1)\n")
    run(*command)
    assert (out / "report.html").is_file()


def test_a_target_in_one_coordinate_has_its_report(tmp_path):
    path = tmp_path / "one.py"
    path.write_text("def log_prob(x): return -x.square().sum(-1)\n")
    run("fit", "--target", f"{path}:log_prob", "--dim", 1, *FEW, "--out", tmp_path / "fit")
    assert "x[0]" in (tmp_path / "fit" / "report.html").read_text()


@pytest.mark.parametrize("generator", ["mlp", "egnn"])
def test_a_cluster_is_shown_by_its_energies_and_distances(tmp_path, generator):
    out = tmp_path / "fit"
    run("fit", "--target", "dw4", "--generator", generator, "--steps", 2, "--budget", "1e5", "--out", out)
    assert "Pair distances over those of trusted draws" in (out / "report.html").read_text()
    run("sample", out, "-n", 4, "--out", tmp_path / "draws.npy")
    drawn = torch.from_numpy(np.load(tmp_path / "draws.npy"))
    assert drawn.reshape(4, 4, 2).mean(1).abs().max() < 1e-4
    assert drawn.equal(DiKLSampler.from_pretrained(out / "model", load_target("dw4")).sample(4))
    with pytest.raises(InvalidInput, match="not for particles"):
        run("sample", out, "--weighted", "--out", tmp_path / "draws.npz")


def test_exact_of_the_file_is_what_the_tests_take_it_for(fitted):
    assert isinstance(load_target(f"{fitted[0]}:exact"), GaussianMixture)
