"""A fit learns, resumes exactly, and returns averaged weights whose statistics are their own."""

import json
import math
import os
import signal as signals
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from noisewise import training
from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.sequence import MRConv, SequenceModel, fit_sequence, recalibrate

SMALL = {"d_model": 8, "n_layers": 1, "kernel_size": 8, "prenorm": False, "block_norm": "batch", "bidirectional": True}


def waves(n=96, length=40, seed=0):
    """Noisy sines of two frequencies at random phases, and which."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(2, (n,), generator=generator)
    phase = 2 * math.pi * torch.rand(n, 1, generator=generator)
    x = (torch.arange(length) * (0.3 + 0.5 * y.unsqueeze(-1)) + phase).sin()
    return (x + 0.3 * torch.randn(n, length, generator=generator)).unsqueeze(1), y


def model(d_output=2, length=40, **options):
    return SequenceModel(1, d_output, length, **SMALL | options)


def fit(net, data, **options):
    return fit_sequence(net, data, **{"steps": 30, "batch_size": 16, "kernel_lr": 1e-2} | options)


def statistics(net):
    return {name: value.clone() for name, value in net.named_buffers() if "running" in name}


@pytest.mark.parametrize("block_norm", ["layer", "batch"])
def test_it_learns_classes_and_merging_keeps_them(block_norm):
    net = model(block_norm=block_norm)
    result = fit(net, waves(), steps=80)
    assert result.net is net
    assert not net.training
    x, y = waves(seed=1)
    assert float((net(x).argmax(-1) == y).float().mean()) > 0.95
    assert torch.allclose(net.merge()(x), net(x), atol=1e-4)
    assert set(result.held_out) == {"loss", "accuracy"}
    assert result.held_out["accuracy"].n == 10


def test_it_learns_numbers():
    x, y = waves()
    net = model(1)
    result = fit(net, (x, 2.0 * y - 1), task="regression", steps=80)
    x, y = waves(seed=1)
    assert float((net(x)[:, 0] - (2.0 * y - 1)).square().mean().detach()) < 0.2
    assert set(result.held_out) == {"loss"}


@pytest.mark.parametrize("patch", [1, 4])
def test_it_learns_a_class_for_each_step_of_ragged_rows(patch):
    x, _ = waves()
    lengths = torch.randint(5, 41, (len(x),), generator=torch.Generator().manual_seed(2))
    steps = nn.functional.avg_pool1d(x, patch)
    y = (steps > 0).long().squeeze(1)
    y = torch.where(torch.arange(y.shape[1]) < -(-lengths.unsqueeze(-1) // patch), y, -7)
    net = model(pool=None, patch=patch)
    result = fit(net, (x, y, lengths), steps=100)
    assert float(result.held_out["accuracy"]) > 0.9


def test_it_fits_numbers_for_each_step_and_reads_nothing_behind_the_end():
    x, _ = waves()
    lengths = torch.full((len(x),), 30)
    nets = []
    for fill in (0.0, math.nan):
        behind = torch.arange(40) >= 30
        net = model(1, pool=None)
        fit(net, (torch.where(behind, fill, x), torch.where(behind, fill, 3 * x), lengths), task="regression", steps=10)
        nets.append(net)
    pairs = zip(nets[0].state_dict().values(), nets[1].state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_loss_of_a_batch_is_the_closed_form():
    x, y = waves(20)
    net = model(dropout=0.0)
    result = fit(net, (x, y), steps=1, batch_size=16, label_smoothing=0.1, validation=(x, y))
    with torch.no_grad():
        log_p = net(x).log_softmax(-1)
    # held-out losses are without smoothing
    expected = -log_p[torch.arange(20), y]
    assert float(result.held_out["loss"]) == pytest.approx(float(expected.mean()), rel=1e-6)
    assert result.held_out["loss"].se == pytest.approx(float(expected.std()) / 20**0.5, rel=1e-5)
    assert result.history[-1]["validation"] == pytest.approx(float(expected.mean()), rel=1e-6)


# ---- statistics of averaged weights


def test_recalibrated_statistics_are_those_of_a_direct_pass():
    net = model(2, n_layers=2)
    x = waves()[0]
    net.train()(1e3 * x)
    recalibrate(net, [x])
    first = net.blocks[0]
    u = net.encoder(x)
    kernels = first.layer.kernels()
    padded = [(nn.functional.pad(u, (k.shape[-1] - 1, 0)), k[0].flip(-1).unsqueeze(1)) for k in kernels]
    branch = torch.stack([nn.functional.conv1d(signal, kernel, groups=8) for signal, kernel in padded])
    assert torch.allclose(first.layer.running_mean[:, 0], branch.mean((1, 3)), atol=1e-5)
    assert torch.allclose(first.layer.running_var[:, 0], branch.transpose(1, 2).flatten(2).var(-1), rtol=1e-4)
    before = []
    first.norm.register_forward_hook(lambda module, inputs, output: before.append(inputs[0]))
    # the output of the layer in train mode, that is by its own statistics of this batch
    first.eval().layer.training = True
    with torch.no_grad():
        first(u)
    assert torch.allclose(first.norm.running_mean, before[0].mean((0, 2)), atol=1e-5)
    assert torch.allclose(first.norm.running_var, before[0].transpose(0, 1).flatten(1).var(-1), rtol=1e-4)


def test_recalibration_averages_batches_and_leaves_the_rest_alone():
    x = waves()[0]
    net = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout(0.5), MRConv(1, 40, kernel_size=8), nn.BatchNorm1d(1)).train()
    net[3].eval()
    found = []
    for part in (x[:48], x[48:]):
        recalibrate(net, [part])
        found.append(statistics(net))
    recalibrate(net, [x[:48], x[48:]])
    for name, value in statistics(net).items():
        assert torch.allclose(value, (found[0][name] + found[1][name]) / 2, rtol=1e-4, atol=1e-6), name
    assert [int(net[i].num_batches_tracked) for i in (0, 2, 3)] == [2, 2, 2]
    assert (net[0].momentum, net[2].momentum) == (0.1, 0.1)
    assert net[0].training
    assert not net[3].training


def test_returned_statistics_belong_to_the_returned_weights():
    net, (x, y) = model(2), waves(64)
    fit(net, (x, y), validation=(x, y), batch_size=64, ema=0.99)
    found = statistics(net)
    recalibrate(net, [x])
    for name, value in statistics(net).items():
        assert torch.allclose(value, found[name], rtol=1e-4, atol=1e-6)


def test_the_look_that_chose_the_weights_saw_the_network_that_is_returned():
    net = model(2)
    result = fit(net, waves(200), steps=60)
    chosen = next(entry for entry in result.history if entry["step"] == result.best_step)
    assert float(result.held_out["loss"]) == pytest.approx(chosen["validation"], rel=1e-5)


def test_looking_does_not_disturb_the_fit(monkeypatch):
    weights = []
    for looks in (1, 5):
        monkeypatch.setattr(training, "_LOOKS", looks)
        net = model(2, dropout=0.2)
        result = fit(net, waves(), steps=10, label_smoothing=0.2)
        weights.append((result.best_step, net.state_dict()))
    assert weights[0][0] == weights[1][0] == 10
    assert all(torch.equal(a, b) for a, b in zip(*(w.values() for _, w in weights), strict=True))


# ---- rates


def test_rates_rise_and_fall_for_each_group(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step

    def noted(self, *inputs, **options):
        seen.append([group["lr"] for group in self.param_groups])
        return step(self, *inputs, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    fit(model(2), waves(), steps=20, lr=1e-2, kernel_lr=1e-3, warm_up=0.25)
    shape = [(t + 1) / 5 for t in range(5)] + [(1 + math.cos(math.pi * t / 15)) / 2 for t in range(15)]
    rates = torch.tensor(seen).T.sort(0).values
    assert torch.allclose(rates, torch.tensor([[1e-3], [1e-2]]) * torch.tensor(shape))


def test_dropout_follows_the_seed_and_not_the_global_generator():
    nets = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        nets.append(model(2, dropout=0.3))
        fit(nets[-1], waves(), steps=5)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(*(net.state_dict().values() for net in nets), strict=True))


def test_any_module_can_be_fitted():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(40, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))

        def forward(self, x):
            return self.net(x)

    net = Plain()
    fit(net, waves(), steps=20)
    with pytest.raises(InvalidInput, match="Plain takes no lengths"):
        fit(net, (*waves(), torch.full((96,), 40)))


def test_bfloat16_fits_and_leaves_float32_weights():
    net = model(2)
    result = fit(net, waves(), steps=60, precision="bf16")
    assert all(p.dtype == torch.float32 for p in net.parameters())
    assert float(result.held_out["accuracy"]) > 0.7
    assert net(waves()[0]).dtype == torch.float32


def test_validation_rows_may_be_longer_or_shorter():
    (x, y), (other, z) = waves(), waves(16, 30, seed=1)
    for data, held in (((x, y), (other, z)), ((other, z), (x, y))):
        net = model(2)
        result = fit(net, data, validation=held, steps=3)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(net(held[0]), held[1])
        assert float(result.held_out["loss"]) == pytest.approx(float(loss), rel=1e-5)


# ---- resuming


def test_stopped_and_resumed_equals_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_CHECKPOINT_SECONDS", 0.0)
    whole, parts = model(2, dropout=0.2), model(2, dropout=0.2)
    fit(whole, waves(), steps=40)
    for _ in range(200):
        parts = model(2, dropout=0.2)
        result = fit(parts, waves(), steps=40, max_seconds=0.1, resume=tmp_path / "run")
        if result.steps == 40:
            break
    assert result.steps == 40
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    # and a finished fit gives the same again, also of the network that it gave back
    again = fit(parts, waves(), steps=40, resume=tmp_path / "run")
    assert again.best_step == result.best_step
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
    for change in ({"kernel_lr": 1e-3}, {"warm_up": 0.0}, {"label_smoothing": 0.1}):
        with pytest.raises(RunFolderError, match=next(iter(change))):
            fit(model(2, dropout=0.2), waves(), steps=40, resume=tmp_path / "run", **change)
    with pytest.raises(RunFolderError, match="data"):
        fit(model(2, dropout=0.2), waves(seed=1), steps=40, resume=tmp_path / "run")


SCRIPT = """
import sys, time, torch
from noisewise import training
from noisewise.sequence import SequenceModel, fit_sequence
torch.set_num_threads(1)
training._CHECKPOINT_SECONDS = 0.0
generator = torch.Generator().manual_seed(0)
x, y = torch.randn(64, 1, 24, generator=generator), torch.randint(3, (64,), generator=generator)
lengths = torch.randint(1, 25, (64,), generator=generator)

class Slow(SequenceModel):
    def forward(self, *inputs, **options):
        time.sleep(float(sys.argv[3]) if self.training else 0.0)
        return super().forward(*inputs, **options)

net = Slow(1, 3, 24, d_model=8, n_layers=2, kernel_size=8, dropout=0.2, block_norm="batch")
fit_sequence(net, (x, y, lengths), steps=40, batch_size=16, resume=sys.argv[1], max_seconds=60)
net.save_pretrained(sys.argv[2])
"""


def process(*arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def step_of(folder):
    try:
        with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
            return json.loads(file.metadata()["values"])["step"]
    except OSError:
        return 0


@pytest.mark.slow
def test_killed_and_resumed_equals_unharmed(tmp_path):
    running = process(tmp_path / "run", tmp_path / "net", 0.02)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and step_of(tmp_path / "run") < 10 and running.poll() is None:
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert running.returncode == -signals.SIGKILL, running.stderr.read()
    assert 10 <= step_of(tmp_path / "run") < 40
    for name in ("run", "unharmed"):
        finished = process(tmp_path / name, tmp_path / f"net-{name}", 0.0)
        assert finished.wait(120) == 0, finished.stderr.read()
    files = [(Path(tmp_path) / f"net-{name}" / "model.safetensors").read_bytes() for name in ("run", "unharmed")]
    assert files[0] == files[1]


def test_bad_input_is_named(shapes_unchecked):
    x, y = waves(20)
    bad = x.clone()
    bad[3, 0, 5] = math.nan
    net = model(2)
    cases = [
        ((x, y + 1), {}, "from 1 to 2, but the model has the outputs 0 to 1"),
        ((x, y - 1), {}, "from -1 to 0"),
        ((x, y.float()), {}, "task='regression'"),
        ((x, y), {"task": "per-step"}, "got 'per-step'"),
        ((x, y), {"task": "regression"}, r"y of data has shape \(20,\)"),
        ((bad, y), {}, "1 of 20 rows, the first is row 3"),
        ((x, y), {"validation": (bad, y)}, "X of validation has NaN"),
        ((x, y, torch.tensor([40] * 19 + [0])), {}, "row 19 of X of data has length 0"),
        ((x, y, torch.tensor([40])), {}, "20 whole numbers"),
        ((x[:0], y[:0]), {}, "empty"),
        ((x, y[:5]), {}, "20 rows, y has 5"),
        ((x, 3.0), {}, "20 rows, y has none"),
        ((x, ["slow"] * 20), {}, "y of data must be numbers in an array, got list"),
        ((x, np.array([{}] * 20)), {"task": "regression"}, "y of data must be numbers .*got ndarray of object"),
        ((np.array(["a"] * 20), y), {}, "X of data must be numbers"),
        ((x, y), {"validation": (x, np.full(20, "slow"))}, "y of validation must be numbers"),
        (x, {}, "got Tensor"),
        ((waves(20, 41)[0], y), {}, "41 steps"),
        ((x.expand(-1, 2, -1), y), {}, r"expected \(batch, 1, length\)"),
        ((x, y), {"steps": 3, "epochs": 2}, "give one"),
        ((x, y), {"precision": "fp8"}, "fp8"),
        ((x, y), {"kernel_lr": 0}, "kernel_lr"),
        ((x, y), {"warm_up": 1.5}, "warm_up"),
        ((x, 1.0 * y), {"task": "regression", "label_smoothing": 0.1}, "label_smoothing"),
    ]
    for data, options, message in cases:
        with pytest.raises(InvalidInput, match=message):
            fit(net, data, **options)
    with pytest.raises(InvalidInput, match="row 2"):
        fit(model(1), (x, torch.where(torch.arange(20) == 2, math.nan, 1.0)), task="regression")
    fit(net, (x, y), steps=2)
    with pytest.raises(NoisewiseError, match="cannot be trained"):
        fit(net.merge(), (x, y))


def test_a_fit_prints_in_a_line():
    x = torch.randn(20, 1, 32, generator=torch.Generator().manual_seed(0))
    model = SequenceModel(1, 2, 32, d_model=4, n_layers=1, kernel_size=8)
    found = fit_sequence(model, (x, torch.arange(20) % 2), steps=2, batch_size=8)
    assert len(repr(found)) < 300
    assert "history" not in repr(found)
