"""fit_energy: it learns known scores, stops and goes on to the identical result, and counts what it used."""

import _thread
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch
from safetensors import safe_open
from torch import nn

from noisewise.energy import EnergyNet, dsm_loss, fit_energy, score_matching_loss
from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.noise import Corruption

NOISE = Corruption(1.0, 0.5)


def data(n=600, dim=2):
    return 2.0 * torch.randn(n, dim, generator=torch.Generator().manual_seed(0)) + 1.0


def small(seed=0):
    return EnergyNet(2, hidden=12, depth=2, seed=seed)


def fit(net=None, steps=60, **options):
    options = {"loss": "dsm", "corruption": NOISE, "batch_size": 64, "seed": 3, **options}
    return fit_energy(net or small(), data(), steps=steps, **options)


def assert_identical(a, b):
    assert a.history == b.history
    assert (a.best_step, a.steps, a.cost.gradients) == (b.best_step, b.steps, b.cost.gradients)
    for left, right in zip(a.net.parameters(), b.net.parameters(), strict=True):
        assert torch.equal(left, right)


# --- what is learnt


@pytest.mark.parametrize(
    ("loss", "corruption", "variance"),
    [("dsm", Corruption(1.0, 1.0), 5.0), ("dsm", Corruption(0.6, 0.8), 2.08), ("sm", None, 4.0)],
)
def test_the_score_of_a_gaussian_is_learnt(loss, corruption, variance):
    # x_t = a x + s eps has variance 4 a^2 + s^2 and mean a
    net = EnergyNet(2, hidden=32, depth=2)
    fit_energy(net, data(4000), loss, corruption, steps=500, learning_rate=5e-3)
    a = 1.0 if corruption is None else corruption.a
    x = a + variance**0.5 * torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    expected = -(x - a) / variance
    with torch.no_grad():
        error = (net.score(x) - expected).square().sum(1).mean() / expected.square().sum(1).mean()
    # the share of the score's variance that is left unexplained
    assert error < 0.03


def test_the_network_records_its_noise_level():
    net = small()
    fit(net, steps=5)
    assert net.corruption == NOISE
    fit(net, steps=5, loss="sm", corruption=None)
    assert net.corruption is None


def test_a_loss_of_your_own_is_the_built_in_one():
    mine = fit(loss=lambda energy, x, generator: dsm_loss(energy, x, NOISE, generator), corruption=None)
    assert_identical(mine, fit())


def test_arrays_and_lists_are_fitted_as_tensors_are():
    for rows in (data().numpy()[::-1], data().flip(0).tolist()):
        net = small()
        result = fit_energy(net, rows, "sm", steps=5)
        assert_identical(result, fit_energy(small(), data().flip(0), "sm", steps=5))


def test_weights_with_the_least_held_out_loss_come_back():
    result = fit(steps=100, learning_rate=0.05)
    best = min(result.history, key=lambda entry: entry["validation"])
    assert result.best_step == best["step"]
    assert fit(validation=0.0).best_step == 60


def test_one_seed_one_result_without_the_global_generator():
    before = torch.get_rng_state()
    first = fit()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(77)
    assert_identical(first, fit())
    assert fit(seed=4).history != first.history


def test_the_bill_counts_rows_that_went_through_the_network():
    result = fit(steps=50)
    held = 60
    # one look every second step
    assert result.cost.gradients == 50 * 64 + 25 * held
    assert result.cost.seconds > 0


# --- stopping and going on


def stopping_loss(after):
    """The built-in loss that is interrupted once, after so many training steps."""
    calls = {"left": after}

    def loss(energy, x, generator):
        if len(x) == 64:
            calls["left"] -= 1
            if calls["left"] == 0:
                raise KeyboardInterrupt
        return dsm_loss(energy, x, NOISE, generator)

    return loss


def test_interrupted_and_resumed_is_the_uninterrupted_fit(tmp_path):
    whole = fit(loss=stopping_loss(-1), corruption=None)
    net = small()
    for after in (2, 1, 20):
        stopped = fit(net, loss=stopping_loss(after), corruption=None, checkpoint=tmp_path)
        assert stopped.interrupted
        assert stopped.steps < 60
    resumed = fit(net, loss=stopping_loss(-1), corruption=None, checkpoint=tmp_path)
    assert not resumed.interrupted
    assert_identical(whole, resumed)
    # a finished fit is read, not made again; from a fresh start of the same seed too
    again = fit(loss=stopping_loss(1), corruption=None, checkpoint=tmp_path)
    assert_identical(whole, again)


def test_ctrl_c_returns_what_exists():
    timer = threading.Timer(0.5, _thread.interrupt_main)
    timer.start()
    before = signal.getsignal(signal.SIGINT)
    result = fit(steps=10**6)
    assert result.interrupted
    assert 0 < result.steps < 10**6
    assert signal.getsignal(signal.SIGINT) is before
    with torch.no_grad():
        assert torch.isfinite(result.net.score(data())).all()


def test_max_seconds_stops_and_a_later_call_goes_on(tmp_path):
    first = fit(steps=400, max_seconds=0.05, checkpoint=tmp_path)
    assert 0 < first.steps < 400
    assert not first.interrupted
    assert_identical(fit(steps=400, checkpoint=tmp_path), fit(steps=400))


def test_another_run_in_the_folder_is_refused(tmp_path):
    fit(steps=5, checkpoint=tmp_path)
    with pytest.raises(RunFolderError, match="steps=5"):
        fit(steps=6, checkpoint=tmp_path)
    with pytest.raises(RunFolderError, match="start="):
        fit(small(seed=9), steps=5, checkpoint=tmp_path)


SCRIPT = """
import sys, time, torch
from noisewise.energy import EnergyNet, dsm_loss, fit_energy
from noisewise import training
from noisewise.noise import Corruption
torch.set_num_threads(1)
training._CHECKPOINT_SECONDS = 0.02

def slow(energy, x, generator):
    time.sleep(float(sys.argv[2]))
    return dsm_loss(energy, x, Corruption(1.0, 0.5), generator)

x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
net = EnergyNet(2, hidden=8, depth=2)
fit_energy(net, x, slow, steps=80, batch_size=32, checkpoint=sys.argv[1])
net.save_pretrained(sys.argv[1] + "-net")
"""


def python(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def step_of(folder):
    try:
        with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
            return json.loads(file.metadata()["values"])["step"]
    except OSError:
        return 0


@pytest.mark.slow
def test_killed_again_and_again_equals_unharmed(tmp_path):
    reached = 0
    for _ in range(3):
        process = python(tmp_path / "run", 0.02)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and step_of(tmp_path / "run") <= reached and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, process.stderr.read()
        assert reached < step_of(tmp_path / "run") < 80
        reached = step_of(tmp_path / "run")
    for name in ("run", "unharmed"):
        process = python(tmp_path / name, 0)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    harmed, unharmed = ((tmp_path / f"{name}-net" / "model.safetensors").read_bytes() for name in ("run", "unharmed"))
    assert harmed == unharmed


# --- bad input


def with_nan():
    x = data(50)
    x[[3, 7], 1] = torch.nan
    return x


class NoGrad(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return torch.relu(x @ self.weight)


@pytest.mark.parametrize(
    ("call", "quoted"),
    [
        (lambda: fit_energy(small(), data()), "corruption=Corruption"),
        (lambda: fit_energy(small(), data(), "sm", NOISE), "'sm'"),
        (lambda: fit_energy(small(), data(), "DSM"), "unknown loss: 'DSM'; it must be \"dsm\""),
        (lambda: fit_energy(EnergyNet(3), data(), "sm"), r"dim 3, got points of shape \(8, 2\): EnergyNet\(2\)"),
        (lambda: fit_energy(small(), [["a", "b"]] * 20, "sm"), "rows of numbers"),
        (lambda: fit_energy(small(), with_nan(), "sm"), "index 3, 7"),
        (lambda: fit_energy(small(), data(1), "sm"), "at least 2 rows"),
        (lambda: fit_energy(EnergyNet(65), torch.randn(9, 65, generator=torch.Generator()), "sm"), "sliced"),
        (lambda: fit_energy(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), data(), "sm"), "'1' is ReLU"),
        (lambda: fit_energy(NoGrad(), data(), "sm"), "exactly zero"),
        (lambda: fit_energy(nn.Linear(2, 2), data(), "sm"), r"\(8, 2\)"),
        (lambda: fit(steps=0), "steps"),
        (lambda: fit(learning_rate=0.0), "learning_rate"),
        (lambda: fit(ema=1.0), "ema"),
        (lambda: fit(validation=1.0), "validation"),
        (lambda: fit(validation=0.999), "fewer than 2"),
        (lambda: fit(max_seconds=0), "max_seconds"),
        (lambda: fit(loss=lambda e, x, g: e(x), corruption=None), "scalar"),
    ],
)
def test_what_cannot_work_is_named(call, quoted):
    with pytest.raises(InvalidInput, match=quoted):
        call()


def test_a_loss_that_stays_infinite_ends_the_fit():
    def broken(energy, x, generator):
        return score_matching_loss(energy, x) * torch.inf

    with pytest.raises(NoisewiseError, match="lower learning_rate"):
        fit(loss=broken, corruption=None, steps=200)
