"""The command line as a user meets it: what it prints, what it writes, and how it refuses."""

import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import noisewise
from noisewise import cli
from noisewise.errors import InvalidInput, RunFolderError
from noisewise.sampling import Draws
from noisewise.sampling.cli import load_target

TWO_MODES = """
import torch

scale = 3.0

def log_prob(x):
    left, right = -(x + 4).square().sum(-1) / 2, -(x - 4).square().sum(-1) / 2
    return torch.logaddexp(left + torch.tensor(0.3).log(), right + torch.tensor(0.7).log())

normal = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
"""


KEYS = ["digs", "mmgibbs", "dikl", "mfd", "ocm", "mrconv", "mafin", "apl", "caf", "iwl"]


@pytest.fixture
def two_modes(tmp_path: Path) -> Path:
    path = tmp_path / "two_modes.py"
    path.write_text(TWO_MODES)
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refuse(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    """The one line that `main` prints to stderr for a command that must fail with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        cli.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


@pytest.mark.parametrize("arguments", [["--version"], ["--help"], ["methods"], ["sample", "--help"]])
def test_light_commands_load_no_torch(arguments):
    code = (
        "import sys\nfrom noisewise.cli import main\n"
        f"try: main({arguments!r})\nfinally: print('torch' in sys.modules, 'numpy' in sys.modules, file=sys.stderr)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0
    assert process.stderr.strip() == "False False"


def test_module_and_script_say_the_version():
    script = Path(sys.executable).with_name("noisewise")
    for command in ([sys.executable, "-m", "noisewise"], [str(script)]):
        process = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert process.stdout == f"noisewise {noisewise.__version__}\n"


def test_methods_lists_ten_and_knows_which_are_ready():
    rows = json.loads(run("methods", "--json"))
    assert [row["key"] for row in rows] == KEYS
    ready = [row["key"] for row in rows if row["state"] == "ready"]
    assert ready == ["digs", "mmgibbs", "dikl", "mfd", "ocm", "mrconv", "mafin"]
    assert "2402.03008" in rows[0]["paper"]
    text = run("methods")
    assert "digs" in text
    assert "planned" in text


def test_every_ready_method_has_its_experiment():
    for method in cli.METHODS:
        if method.experiment:
            assert callable(importlib.import_module(method.experiment).run)


def test_doctor_agrees_with_the_installed_packages():
    findings = json.loads(run("doctor", "--json"))
    assert findings["noisewise"] == noisewise.__version__
    assert findings["torch"] == torch.__version__
    assert findings["threads"] == torch.get_num_threads()
    assert findings["devices"][0] == "cpu"
    assert len(findings["devices"]) >= 1 + torch.cuda.device_count()
    assert findings["numpy"] == np.__version__
    assert set(findings["extras"]) >= {"sampling", "jax", "numpyro", "pymc", "all", "bench", "docs", "dev"}
    assert findings["extras"]["all"]["installed"].items() >= findings["extras"]["sampling"]["installed"].items()
    assert "pytest" in findings["extras"]["dev"]["installed"]
    assert "pot" in run("doctor")


def test_doctor_names_what_is_missing_and_the_line_that_mends_it(monkeypatch):
    real = cli._version
    monkeypatch.setattr(cli, "_version", lambda name: None if name == "pot" else real(name))
    extra = json.loads(run("doctor", "--json"))["extras"]["sampling"]
    assert extra["missing"] == ["pot"]
    assert extra["install"] == "pip install 'noisewise[sampling]'"
    assert "noisewise[sampling]" in run("doctor")


def test_requirements_follow_extras_of_extras():
    requirements = {"": [], "a": ["x>=1", "noisewise[b,c]"], "b": ["y[z]>=2"], "c": ["w-v_u"]}
    assert cli._libraries("a", requirements) == ["x", "y", "w-v_u"]


def test_unknown_and_planned_methods_are_refused_by_name(capsys):
    assert "no method 'gibs'; ready: digs" in refuse(capsys, "compare", "gibs")
    assert "APL" in refuse(capsys, "compare", "apl")
    assert "planned" in refuse(capsys, "compare", "APL")
    assert "--seeds must be at least 1, got 0" in refuse(capsys, "compare", "digs", "--seeds", 0)


def test_an_unknown_choice_is_refused(two_modes):
    result = CliRunner().invoke(cli.app, ["sample", f"{two_modes}:log_prob", "--dim", "2", "--method", "nuts"])
    assert result.exit_code == 2
    assert "nuts" in result.output
    assert "digs" in result.output


def test_traceback_on_request(monkeypatch):
    monkeypatch.setenv("NOISEWISE_TRACEBACK", "1")
    with pytest.raises(InvalidInput, match="gibs"):
        cli.main(["compare", "gibs"])


def test_markup_in_a_users_text_is_printed_as_it_stands(capsys):
    assert "[red]x[/red]" in refuse(capsys, "compare", "[red]x[/red]")


def test_load_target_takes_a_function_a_distribution_and_a_known_problem(two_modes):
    x = torch.tensor([[4.0, 4.0], [-4.0, -4.0]])
    value = load_target(f"{two_modes}:log_prob", 2).log_prob(x)
    torch.testing.assert_close(value, torch.tensor([0.7, 0.3]).log())
    assert load_target(f"{two_modes}:normal").dim == 2
    assert load_target("gmm40").dim == 2


@pytest.mark.parametrize(
    ("source", "dim", "words"),
    [
        ("absent.py:log_prob", 2, "no file"),
        ("two_modes.py:log_p", 2, "has no 'log_p'; it has: log_prob"),
        ("two_modes.py:scale", 2, "is 3.0, not a function"),
        ("two_modes.py:log_prob", None, "add --dim"),
        ("two_modes.py:normal", 3, "dim=3 was given"),
        ("two_modes.py", 2, "two_modes.py:log_prob"),
        ("broken.py:log_prob", 2, "ZeroDivisionError"),
        ("notes.txt:log_prob", 2, "must end in .py"),
        ("gmm41", None, "known: gmm40"),
        ("gmm40", 5, "dim 2"),
    ],
)
def test_a_source_that_cannot_work_is_refused_with_advice(two_modes, monkeypatch, source, dim, words):
    monkeypatch.chdir(two_modes.parent)
    Path("broken.py").write_text("log_prob = 1 / 0\n")
    Path("notes.txt").write_text("")
    with pytest.raises(InvalidInput, match=words):
        load_target(source, dim)


def test_a_users_file_may_import_its_neighbour(tmp_path):
    (tmp_path / "my_centre_of_gravity.py").write_text("centre = 7.0\n")
    (tmp_path / "mine.py").write_text(
        "from my_centre_of_gravity import centre\ndef log_prob(x): return -(x - centre).square().sum(-1)\n"
    )
    before = list(sys.path)
    assert load_target(f"{tmp_path / 'mine.py'}:log_prob", 1).log_prob(torch.tensor([[7.0]])).item() == 0
    assert sys.path == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--chains", "0"], "--chains must be at least 1, got 0"),
        (["--budget", "much"], "got 'much'"),
        (["--budget", "0"], "--budget must be at least 1"),
        (["--budget", "-3s"], "--budget must be a finite number above 0"),
        (["--budget", "infs"], "--budget must be a finite number above 0"),
        (["--budget", "10"], "a budget of 10 gradient calls"),
        (["--seed", "-1"], "--seed must be at least 0"),
        (["--init-scale", "-1"], "--init-scale"),
        (["--init", "a.npy", "--init-scale", "2"], "exclude each other"),
        (["--init", "absent.npy"], "cannot be read"),
        (["--init", "wrong.npy"], r"shape \(3,\)"),
        (["--init", "objects.npy"], "cannot be read"),
        (["--resume"], "add -o FOLDER"),
        (["--resume", "-o", "nowhere"], "no run to resume"),
        (["-o", "full"], "not empty"),
        (["-o", "wrong.npy"], "is a file"),
    ],
)
def test_options_that_cannot_work_are_refused_before_any_work(two_modes, monkeypatch, capsys, options, words):
    monkeypatch.chdir(two_modes.parent)
    np.save("wrong.npy", np.zeros(3))
    np.save("objects.npy", np.array([{}, {}], dtype=object))
    Path("full").mkdir()
    Path("full/thesis.txt").write_text("")
    message = refuse(capsys, "sample", "two_modes.py:log_prob", "--dim", 2, *options)
    assert re.search(words, message), message


@pytest.mark.parametrize("method", ["digs", "pt", "smc", "mala", "hmc", "ula"])
def test_sample_leaves_a_folder_that_agrees_with_itself(two_modes, tmp_path, method):
    out = tmp_path / "run"
    text = run(
        "sample", f"{two_modes}:log_prob", "--dim", 2, "--method", method, "--chains", 20, "--draws", 50,
        "--warmup", 50, "--init-scale", 4, "--dtype", "float64", "-o", out, "--json",
    )  # fmt: skip
    assert json.loads(text) == json.loads((out / "summary.json").read_text())
    draws = Draws.load(out / "draws")
    assert tuple(draws.positions.shape) == (20, 50, 2)
    assert str(draws.positions.dtype) == "torch.float64"
    command = json.loads((out / "command.json").read_text())
    assert (command["method"], command["chains"], command["dim"]) == (method, 20, 2)
    report = (out / "report.html").read_text()
    assert "http://" not in report.replace("http://www.w3.org", "")
    assert "https://" not in report


def test_the_default_finds_both_weights(two_modes, tmp_path):
    out = tmp_path / "run"
    text = run(
        "sample", f"{two_modes}:log_prob", "--dim", 2, "--chains", 20, "--draws", 200, "--budget", "6e4", "-o", out
    )
    assert "gradient calls" in text
    draws = Draws.load(out / "draws")
    assert draws.cost.gradients <= 60_000
    # 4 standard errors of 1000 effective draws are .058
    assert (draws.positions[..., 0] > 0).double().mean().item() == pytest.approx(0.7, abs=0.06)


def test_a_folder_with_a_run_is_kept_and_resumed_only_by_the_same_command(two_modes, tmp_path):
    out = tmp_path / "run"
    command = [
        "sample",
        f"{two_modes}:log_prob",
        "--dim",
        2,
        "--method",
        "mala",
        "--chains",
        4,
        "--draws",
        30,
        "-o",
        out,
    ]
    run(*command)
    first = Draws.load(out / "draws").positions
    with pytest.raises(RunFolderError, match="--resume"):
        run(*command)
    run(*command, "--resume")
    assert first.equal(Draws.load(out / "draws").positions)
    run(*command[:-4], "--draws", 40, "-o", out, "--resume")
    longer = Draws.load(out / "draws").positions
    assert longer.shape[1] == 40
    assert first.equal(longer[:, :30])
    with pytest.raises(RunFolderError, match="seed=0"):
        run(*command, "--resume", "--seed", 1)
    two_modes.write_text(TWO_MODES.replace("0.3", "0.4"))
    with pytest.raises(RunFolderError, match="has changed"):
        run(*command, "--resume")


def test_starts_come_from_a_file(two_modes, tmp_path):
    np.save(tmp_path / "start.npy", np.array([-4.0, -4.0]))
    out = tmp_path / "run"
    run(
        "sample", f"{two_modes}:log_prob", "--dim", 2, "--method", "mala", "--chains", 4, "--draws", 5,
        "--init", tmp_path / "start.npy", "-o", out,
    )  # fmt: skip
    # MALA with small steps has no way to the other mode, 11 standard deviations away, in five steps
    assert (Draws.load(out / "draws").positions < 0).all()
