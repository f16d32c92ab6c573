import copy
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from pathlib import Path

import pytest
import torch
from diffusion_nets import GaussianNoise, linear_levels
from safetensors import safe_open
from torch import nn
from torch.utils.data import TensorDataset

from noisewise.diffusion import CovarianceHead, NoiseLevels, fit_covariance
from noisewise.diffusion.model import DiffusionModel
from noisewise.diffusion.targets import DataCovariance, along_axes, dct_basis, ocm_target
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError

LEVELS = linear_levels()
COVARIANCE = torch.tensor([[1.0, 0.3], [0.3, 0.25]], dtype=torch.float64)


def gaussian():
    return GaussianNoise(COVARIANCE).eval()


def data(n=4000, seed=0):
    root = torch.linalg.cholesky(COVARIANCE)
    draws = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (draws @ root.T).float()


def head_of(net, **options):
    return CovarianceHead.for_model(
        net, options.pop("kind", "complex"), noise_schedule=LEVELS, site="out", event=(2,), features=16, **options
    )


def fit(net, head, rows=None, objective="ocm", **options):
    settings = {"steps": 30, "batch_size": 64, "noise_schedule": LEVELS} | options
    return fit_covariance(net, head, rows, objective, **settings)


def relative(head, net, t, n=200):
    model = DiffusionModel(net, LEVELS, "out")
    a, s = LEVELS.pair(t)
    x_t = a * data(n, 5) + s * torch.randn(n, 2, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        return head.relative_variance(model.predict(x_t, t)).double().mean(0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ocm", "ocm_residual", "npr", "residual_nll"])
def test_every_objective_learns_the_diagonal_of_a_gaussian(objective):
    net = gaussian()
    head = head_of(net)
    fit(
        net,
        head,
        data(),
        objective,
        steps=1500 if objective == "ocm" else 6000,
        batch_size=256,
        learning_rate=3e-3,
    )
    for t in (20, 100, 300, 600):
        truth = net.relative(t).diagonal()
        found = relative(head, net, t)
        # one squared error serves all levels, and residuals scatter by sqrt(2) r: where r is small NPR knows thousandths at best
        atol = 5e-3 if objective == "npr" else 2e-3
        assert torch.allclose(found, truth, rtol=0.08, atol=atol), (t, found, truth)


def test_tables_are_the_closed_forms_of_a_gaussian():
    net = gaussian()
    head = head_of(net)
    fit(net, head, data(20_000), "analytic")
    for t in (0, 111, 500, 999):
        a, s = LEVELS.pair(t)
        ratio = float(net.relative(t).diagonal().mean())
        # a mean of squares of 4096 rows of 2 correlated entries has a relative error of at most sqrt(2 / 4096)
        assert float(head.residual[t]) == pytest.approx(ratio * (s / a) ** 2, rel=4 * math.sqrt(2 / 4096))
        assert float(head.gamma[t]) == pytest.approx(1 - ratio, abs=4 * math.sqrt(2 / 4096))


def test_tables_hold_between_the_levels_that_are_measured():
    net = gaussian()
    head = head_of(net)
    fit(net, head, data(20_000), "analytic")
    a, s = LEVELS.a, LEVELS.s
    found = head.residual * (a / s).square()
    truth = torch.stack([net.relative(t).diagonal().mean() for t in range(0, 400)])
    # 20 000 rows at each of 50 levels, and a straight line of log r over 20 levels between them
    assert torch.allclose(found[:400], truth, rtol=0.1)


@pytest.mark.parametrize("objective", ["ocm", "ocm_residual", "residual_nll"])
def test_a_schedule_that_ends_in_pure_noise_is_fitted_to_its_end(objective):
    class Velocity(GaussianNoise):
        def forward(self, x, t):
            index = torch.as_tensor(t).expand(len(x)).long()
            a, s = (table[index].unsqueeze(-1) for table in (self.levels.a, self.levels.s))
            eps = super().forward(x, t)
            # v = a eps - s x0, with x0 from its own posterior mean where a is 0
            clean = torch.where(a > 0, (x - s * eps) / a.clamp(min=1e-12), self.mean.to(x))
            return (a * eps - s * clean).to(x.dtype)

    kept = LEVELS.a**2
    ended = NoiseLevels.from_alphas_cumprod((kept - kept[-1]) * kept[0] / (kept[0] - kept[-1]), "v_prediction")
    net = Velocity(COVARIANCE, levels=ended).eval()
    head = CovarianceHead.for_model(net, noise_schedule=ended, site="out", event=(2,), features=16)
    rows = data()
    result = fit(net, head, rows, objective, noise_schedule=ended, steps=40, batch_size=256, validation=0.1)
    assert result.cost.nonfinite == 0
    assert all(entry["validation"] is not None and math.isfinite(entry["validation"]) for entry in result.history)
    prediction = DiffusionModel(net, ended, "out").predict(torch.randn(5, 2), 999)
    variance = head.clean_variance(prediction)
    # of nothing known the posterior is the data's law
    assert torch.allclose(variance, torch.tensor(float(COVARIANCE.diagonal().mean())).expand(5, 2), rtol=0.3)


def test_a_fresh_head_says_the_mean_of_the_level_and_stays_positive():
    net = gaussian()
    head = head_of(net)
    fit(net, head, data(), "ocm", steps=1)
    model = DiffusionModel(net, LEVELS, "out")
    prediction = model.predict(data(50), 300)
    with torch.no_grad():
        r = head.relative_variance(prediction)
    assert torch.allclose(r, (head.mean_ratio(prediction) * 1.001).expand_as(r), rtol=1e-2)
    with torch.no_grad():
        head.out.bias.fill_(-50.0)
        assert bool((head.relative_variance(prediction) > 0).all())


def test_the_model_is_left_as_it_was():
    net = gaussian().train()
    net.scale.requires_grad_(True)
    before = copy.deepcopy(net.state_dict())
    fit(net, head_of(net), data())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert net.training
    assert net.dropout.training
    assert net.scale.requires_grad
    assert net.scale.grad is None


def test_a_head_of_other_weights_is_warned_of():
    net = gaussian()
    head = head_of(net)
    fit(net, head, data(), "ocm", steps=1)
    head.check_model(net, LEVELS)
    head.check_model(copy.deepcopy(net).to(torch.bfloat16), LEVELS)
    with torch.no_grad():
        net.scale.mul_(1.3)
    with pytest.warns(NoisewiseWarning, match="other weights"):
        head.check_model(net, LEVELS)
    fit(net, head, data(), "ocm", steps=1)
    head.check_model(net, LEVELS)


def test_dropout_is_off_during_a_fit():
    heads = []
    for mode in (True, False):
        net = gaussian().train(mode)
        heads.append(head_of(net))
        fit(net, heads[-1], data())
    assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), heads[1].parameters(), strict=True))


def test_stopped_and_resumed_equals_uninterrupted(tmp_path):
    net = gaussian()
    whole, parts = head_of(net), head_of(net)
    fit(net, whole, data(), "ocm_residual", steps=40)
    for _ in range(200):
        parts = head_of(net)
        result = fit(net, parts, data(), "ocm_residual", steps=40, max_seconds=0.1, resume=tmp_path / "run")
        if result.steps == 40:
            break
    assert result.steps == 40
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))
    assert torch.equal(whole.residual, parts.residual)
    with pytest.raises(RunFolderError, match="probes=1"):
        fit(net, head_of(net), data(), "ocm_residual", steps=40, probes=2, resume=tmp_path / "run")


def test_rows_through_the_model_are_counted_and_one_backward_pass_a_step():
    net = gaussian()
    calls = []
    hook = net.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    head = head_of(net)
    result = fit(net, head, data(), steps=10, validation=0.0)
    hook.remove()
    tables = 50 * 4000
    assert result.cost.gradients == 10 * 64
    assert sum(calls) == tables + 10 * 64


def test_without_data_it_learns_from_its_own_trajectories():
    net = gaussian()
    head = head_of(net)
    fit(net, head, None, steps=600, batch_size=256, learning_rate=3e-3)
    for t in (100, 400):
        truth = net.relative(t).diagonal()
        assert torch.allclose(relative(head, net, t), truth, rtol=0.25, atol=5e-3)


def test_another_map_is_not_continued(tmp_path):
    net = gaussian()
    fit(net, head_of(net), data(), steps=4, resume=tmp_path)
    with pytest.raises(RunFolderError, match="parametrization="):
        fit(net, head_of(net, parity=True), data(), steps=4, resume=tmp_path)


def test_patience_waits_for_the_residuals():
    net = gaussian()
    result = fit(net, head_of(net), data(), "ocm_residual", steps=100, patience=1, learning_rate=1e-9)
    assert result.steps >= 70


def test_a_result_prints_in_one_line_and_keeps_its_history():
    net = gaussian()
    result = fit(net, head_of(net), data(), steps=50)
    best = next(entry["validation"] for entry in result.history if entry["step"] == result.best_step)
    assert len(result.history) == 25
    assert repr(result) == (
        f"FitResult(CovarianceHead by 'ocm', 50 steps, the best {result.best_step}, held-out loss {best:.4g}, "
        f"{result.cost.seconds:.1f} s)"
    )
    assert "no held-out loss" in repr(fit(net, head_of(net), data(), "analytic"))


def test_patience_ends_a_fit():
    net = gaussian()
    result = fit(net, head_of(net), data(), steps=400, patience=1, learning_rate=1e-9)
    assert result.steps < 400


def test_datasets_of_items_give_what_a_tensor_gives():
    net = gaussian()
    rows = data(64)
    heads = []
    for form in (rows, TensorDataset(rows), [{"x": row} for row in rows], rows.numpy()):
        heads.append(head_of(net))
        fit(net, heads[-1], form, steps=4)
    for head in heads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(heads[0].parameters(), head.parameters(), strict=True))


def test_class_labels_reach_the_network():
    class Labelled(GaussianNoise):
        def forward(self, x, t, class_labels=None):
            self.seen = class_labels
            return super().forward(x, t)

    net = Labelled(COVARIANCE).eval()
    fit(net, head_of(net), (data(64), torch.arange(64)), steps=2)
    assert net.seen is not None
    assert net.seen.shape == (3,)  # the last look at 5 % of 64 rows


def test_the_control_variate_keeps_the_mean_and_never_adds_variance():
    net = gaussian()
    model = DiffusionModel(net, LEVELS, "out")
    rows = data()
    spectrum = along_axes(rows, [dct_basis(2, rows)]).square().mean(0)
    t = 300
    prediction = model.predict(data(2000, 3), t, graph=True)
    control = DataCovariance(spectrum, torch.zeros(1000, dtype=torch.float64))
    c = control.fit_coefficient(prediction, 8, torch.Generator().manual_seed(0))
    control.coefficients = torch.full((1000,), c, dtype=torch.float64)
    plain = ocm_target(prediction, 1, torch.Generator().manual_seed(1))
    controlled = ocm_target(prediction, 1, torch.Generator().manual_seed(1), control)
    truth = net.relative(t).diagonal()
    error = 4 * float(plain.std()) / 2000**0.5
    assert torch.allclose(controlled.double().mean(0), truth, atol=error)
    assert float(controlled.var(0).sum()) <= float(plain.var(0).sum()) * 1.001


def warned_of(net, rows, levels=LEVELS):
    head = CovarianceHead.for_model(net, noise_schedule=levels, site="out", event=(2,), features=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(net, head, rows, "analytic", noise_schedule=levels)
    assert all(one.category is NoisewiseWarning for one in caught)
    return [str(one.message) for one in caught]


@pytest.mark.parametrize(("factor", "shift"), [(5, 0), (1, 3), (255, 0)])
def test_data_on_another_scale_are_warned_of(factor, shift):
    net = GaussianNoise(torch.eye(2)).eval()
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    assert warned_of(net, x) == []
    (said,) = warned_of(net, factor * x + shift)
    # E(eps - eps_hat)^2 = a^4 + s^2 a^2 (factor^2 + shift^2), at most where s = a
    found = float(re.search(r"off by (\S+) in mean square", said).group(1))
    worst = (LEVELS.a**4 + LEVELS.s**2 * LEVELS.a**2 * (factor**2 + shift**2)).max()
    assert found == pytest.approx(float(worst), rel=0.1)
    assert f"go from {float((factor * x + shift)[:64].min()):.3g} to" in said


def test_a_network_of_x0_may_be_off_by_more_than_the_least_noise():
    class Clean(GaussianNoise):
        def forward(self, x, t):
            a, s = (table[t].unsqueeze(-1) for table in (self.levels.a, self.levels.s))
            return ((x - s * super().forward(x, t)) / a + 0.05).to(x.dtype)

    levels = linear_levels(prediction="sample")
    net = Clean(torch.eye(2), levels=levels).eval()
    x = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    assert warned_of(net, x, levels) == []
    assert len(warned_of(net, 5 * x, levels)) == 1


def test_it_fits_with_accelerate_in_bfloat16_with_targets_in_float32():
    net = gaussian()
    head = head_of(net)
    result = fit(net, head, data(), mixed_precision="bf16", steps=5)
    assert result.steps == 5
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in head.parameters())


def test_bad_input_is_named(shapes_unchecked):
    net = gaussian()
    head = head_of(net)
    cases = [
        ({"objective": "ocn"}, "got 'ocn'"),
        ({"rows": None, "objective": "npr"}, "give data="),
        ({"rows": None, "objective": "ocm", "control_variate": True}, "control_variate"),
        ({"rows": torch.zeros(40, 3)}, r"shape \(2,\)"),
        ({"rows": torch.full((40, 2), math.nan)}, "40 of 40 rows"),
        ({"rows": data(4)}, "at least 8 rows"),
        ({"rows": "my_images"}, "read_images"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"probes": 0}, "probes"),
        ({"mixed_precision": "fp8"}, "fp8"),
        ({"noise_schedule": linear_levels(500)}, "another noise schedule"),
        ({"objective": "sn"}, "parity=True"),
        ({"noise_schedule": None}, "noise_schedule"),
    ]
    for options, message in cases:
        settings = {"rows": data(64)} | options
        with pytest.raises(InvalidInput, match=message):
            fit(net, head, **settings)
    with pytest.raises(InvalidInput, match=r"parity=False|positive"):
        fit(net, head_of(net, parity=True), data(64), "residual_nll")
    with pytest.raises(InvalidInput, match="made for a GaussianNoise"):
        fit(nn.Linear(2, 2), head, data(64))
    with pytest.raises(InvalidInput, match="cancels"):
        fit(gaussian().half(), head, data(64))


SCRIPT = """
import sys, time, torch
from diffusion_nets import GaussianNoise, linear_levels
from noisewise import training
from noisewise.diffusion import CovarianceHead, fit_covariance
torch.set_num_threads(1)
training._CHECKPOINT_SECONDS = 0.0
levels = linear_levels()

class Slow(GaussianNoise):
    def forward(self, x, t):
        time.sleep(float(sys.argv[3]) if self.training is False else 0.0)
        return super().forward(x, t)

net = Slow([[1.0, 0.3], [0.3, 0.25]]).eval()
head = CovarianceHead.for_model(net, noise_schedule=levels, site="out", event=(2,), features=16)
rows = torch.randn(256, 2, generator=torch.Generator().manual_seed(0))
result = fit_covariance(
    net, head, rows, "ocm_residual", noise_schedule=levels, steps=40, batch_size=32, resume=sys.argv[1]
)
head.save_pretrained(sys.argv[2])
print(result.cost.gradients)
"""


def process(*arguments, **environment):
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **environment},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def step_of(folder):
    try:
        with safe_open(folder / "checkpoint.safetensors", framework="pt") as file:
            return json.loads(file.metadata()["values"])["step"]
    except OSError:
        return 0


@pytest.mark.slow
def test_killed_and_resumed_equals_unharmed(tmp_path):
    running = process(tmp_path / "run", tmp_path / "head", 0.02)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and step_of(tmp_path / "run") < 10 and running.poll() is None:
        time.sleep(0.01)
    running.kill()
    running.wait()
    assert running.returncode == -signal.SIGKILL, running.stderr.read()
    assert 10 <= step_of(tmp_path / "run") < 40
    for name in ("run", "unharmed"):
        finished = process(tmp_path / name, tmp_path / f"head-{name}", 0.0)
        assert finished.wait(120) == 0, finished.stderr.read()
    heads = [CovarianceHead.from_pretrained(tmp_path / f"head-{name}").state_dict() for name in ("run", "unharmed")]
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())


@pytest.mark.slow
def test_two_processes_share_batches_and_end_with_one_head(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    running = [
        process(tmp_path / "run", tmp_path / f"head-{rank}", 0.0, RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in (0, 1)
    ]
    printed = [one.communicate(timeout=180) for one in running]
    assert [one.returncode for one in running] == [0, 0], printed
    heads = [CovarianceHead.from_pretrained(tmp_path / f"head-{rank}").state_dict() for rank in (0, 1)]
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    assert float(heads[0]["out.weight"].abs().sum()) > 0
    alone = process(tmp_path / "alone", tmp_path / "head-alone", 0.0)
    rows_alone = int(alone.communicate(timeout=180)[0])
    # 40 steps of 32 rows: 16 in each process
    assert rows_alone - int(printed[0][0].split()[-1]) == 40 * 16
