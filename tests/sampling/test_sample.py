"""The loop: one seed one result, resumed equals uninterrupted, killed equals unharmed, and an exact bill."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from every_kernel import EVERY, Counting, seeded

import noisewise.sampling.run as loop_module
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.noise import Corruption
from noisewise.sampling import HMC, MALA, Budget, DiGS, Draws, FittedDiGS, ParallelTempering, TemperedSMC, sample
from noisewise.targets import as_target, two_modes

# what warm-up has to set itself, beside all kernels on fixed settings
ADAPTIVE = {
    "MALA adapting": lambda t: MALA(t),
    "HMC adapting": lambda t: HMC(t, leapfrogs=2),
    "DiGS adapting": lambda t: DiGS(t, inner=MALA(t, steps=1)),
    "PT adapting": lambda t: ParallelTempering(t),
    "SMC": lambda t: TemperedSMC(t, mean=0.0, scale=5.0, moves=1, leapfrogs=2),
    "fitted adapting": lambda t: FittedDiGS(t),
    "fitted without ladder": lambda t: FittedDiGS(t, ladder=False, r=1.0),
}
ALL = {**EVERY, **ADAPTIVE}
# all the modes' problem is not the loop's: two close modes, few chains
TARGET = two_modes(2, separation=4.0, dtype=torch.float64)
pytestmark = pytest.mark.filterwarnings("ignore::noisewise.errors.NoisewiseWarning")


def run(kernel, draws, seed=5, chains=8, dtype=torch.float64, **options):
    init = torch.randn((chains, 2), dtype=dtype, generator=seeded(0))
    return sample(kernel, init=init, draws=draws, seed=seed, warmup=12, progress=False, **options)


def assert_identical(a: Draws, b: Draws):
    assert torch.equal(a.positions, b.positions)
    assert a.stats.keys() == b.stats.keys()
    for name in a.stats:
        assert torch.equal(a.stats[name], b.stats[name]), name
    for part in ("state", "settings"):
        left, right = getattr(a.final, part), getattr(b.final, part)
        assert left.keys() == right.keys()
        for name in left:
            assert torch.equal(left[name].double(), right[name].double()), (part, name)
    assert torch.equal(a.final.generator, b.final.generator)
    bills = [(d.cost.gradients, d.cost.energies, d.cost.nonfinite) for d in (a, b)]
    assert bills[0] == bills[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_resumed_equals_one_longer_run_with_an_exact_bill(name, dtype, tmp_path, shapes_unchecked):
    target = Counting(TARGET)
    kernel = ALL[name](target)
    whole = run(kernel, 9, dtype=dtype)
    # the two rows that check the target are documented as free
    assert target.gradients == whole.cost.gradients + 2
    assert target.energies == whole.cost.energies
    assert whole.positions.dtype == whole.stats["log_prob"].dtype == dtype
    first = run(kernel, 4, dtype=dtype)
    assert torch.equal(first.positions, whole.positions[:, :4])
    # through a folder, as another process would
    loaded = Draws.load(first.save(tmp_path / "run"))
    assert_identical(loaded, first)
    resumed = loaded.resume(kernel, 5, progress=False)
    assert_identical(resumed, whole)


@pytest.mark.parametrize("name", ["DiGS levels", "fitted adapting"])
def test_one_seed_gives_one_result_and_another_seed_another(name, shapes_unchecked):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a, b, c = (run(ALL[name](TARGET), 5, seed=seed) for seed in (3, 3, 4))
    assert_identical(a, b)
    assert not torch.equal(a.positions, c.positions)
    assert torch.equal(before, torch.random.get_rng_state())


def test_thinning_keeps_every_third_state_and_averages_what_happened_between():
    kernel = EVERY["MALA"](TARGET)
    every, third = run(kernel, 12), run(kernel, 4, thin=3)
    assert torch.equal(third.positions, every.positions[:, 2::3])
    torch.testing.assert_close(
        third.stats["acceptance"], every.stats["acceptance"].reshape(4, 3, -1).mean(1), rtol=1e-12, atol=1e-12
    )
    assert third.cost.gradients == every.cost.gradients


def test_what_warm_up_had_to_say_is_still_said_after_a_resume_and_a_crash(tmp_path, shapes_unchecked):
    def said(draws):
        return any("annealing reached" in text for text in draws.warnings)

    kernel = TemperedSMC(TARGET, mean=0.0, scale=5.0)
    options = {"init": torch.zeros(50, 2, dtype=torch.float64), "warmup": 2, "seed": 1, "progress": False}
    first = sample(kernel, draws=3, **options)
    assert said(first)
    assert said(first.resume(kernel, 3, progress=False))
    calls = Interrupted(TARGET)
    sample(TemperedSMC(calls, mean=0.0, scale=5.0), draws=3, **options)
    broken = Interrupted(TARGET, calls.calls - 2, RuntimeError)
    with pytest.raises(RuntimeError):
        sample(TemperedSMC(broken, mean=0.0, scale=5.0), draws=3, checkpoint=tmp_path / "run", **options)
    again = sample(
        TemperedSMC(Interrupted(TARGET), mean=0.0, scale=5.0), draws=3, checkpoint=tmp_path / "run", **options
    )
    assert said(again)


def test_a_saved_run_goes_on_as_a_checkpoint(tmp_path):
    kernel = EVERY["MALA"](TARGET)
    run(kernel, 4).save(tmp_path / "run")
    assert_identical(run(kernel, 9, checkpoint=tmp_path / "run"), run(kernel, 9))
    # fewer draws than a folder holds: nothing is thrown away
    assert run(kernel, 2, checkpoint=tmp_path / "run").positions.shape[1] == 9


def test_resuming_needs_the_same_kernel_and_the_same_target():
    draws = run(EVERY["MALA"](TARGET), 3)
    with pytest.raises(InvalidInput, match="kernel of the first run"):
        draws.resume(EVERY["HMC"](TARGET), 3)
    with pytest.raises(InvalidInput, match="another target"):
        draws.resume(EVERY["MALA"](two_modes(2, separation=6.0, dtype=torch.float64)), 3)


# --- budgets


@pytest.mark.parametrize("name", ALL)
def test_a_budget_is_used_and_never_exceeded(name, shapes_unchecked):
    for per_chain in (40, 300, 1500):
        target = Counting(TARGET)
        kernel = ALL[name](target)
        budget = 8 * per_chain + 3
        if budget < 8 * (1 + kernel.gradients_per_step):
            with pytest.raises(InvalidInput, match="less than one iteration"):
                sample(kernel, chains=8, budget=budget, progress=False)
            continue
        draws = sample(kernel, chains=8, budget=budget, progress=False)
        assert draws.cost.gradients <= budget
        assert target.gradients == draws.cost.gradients + 2
        if per_chain == 1500:
            assert draws.positions.shape[1] > 0
            assert draws.cost.gradients > 0.9 * budget


def test_a_run_whose_budget_leaves_no_draw_says_so():
    with pytest.warns(NoisewiseWarning, match="budget"):
        draws = sample(TARGET, chains=8, budget=8 * 60, progress=False)
    assert draws.positions.shape == (8, 0, 2)


class Ticking(Counting):
    """A target and a clock: every batched call takes a hundredth of a second."""

    def __init__(self, target):
        super().__init__(target)
        self.now = 0.0

    def log_prob_and_score(self, x):
        self.now += 0.01
        return super().log_prob_and_score(x)

    def monotonic(self):
        return self.now

    perf_counter = monotonic


@pytest.mark.parametrize("name", ["MALA", "MALA adapting", "PT adapting", "fitted adapting"])
def test_seconds_are_a_budget_too(name, monkeypatch, shapes_unchecked):
    target = Ticking(TARGET)
    monkeypatch.setattr("noisewise.sampling.run.time", target)
    draws = sample(ALL[name](target), chains=4, budget=Budget(seconds=20.0), progress=False)
    # the iteration that crosses the limit is finished, and the first call is made before the clock runs
    assert 20.0 - 1.0 < target.now < 20.0 + 1.0
    assert draws.cost.seconds == pytest.approx(target.now, abs=0.1)
    assert draws.positions.shape[1] > 100


def test_draws_and_budget_together_stop_at_the_first():
    kernel = EVERY["MALA"](TARGET)
    assert run(kernel, 5, budget=8 * 1000).positions.shape[1] == 5
    # of twenty affordable iterations, twelve are the warm-up that `run` asks for
    assert run(kernel, 500, budget=8 * (1 + 3 * 20)).positions.shape[1] == 8


# --- folders


@pytest.mark.parametrize("name", ["DiGS adapting", "fitted adapting", "SMC"])
def test_a_finished_folder_gives_its_draws_again_and_goes_on_when_more_are_asked_for(name, tmp_path, shapes_unchecked):
    kernel = ALL[name](TARGET)
    first = run(kernel, 5, checkpoint=tmp_path / "run")
    again = run(kernel, 5, checkpoint=tmp_path / "run")
    assert_identical(first, again)
    more = run(kernel, 9, checkpoint=tmp_path / "run")
    assert_identical(more, run(kernel, 9))
    assert_identical(Draws.load(tmp_path / "run"), more)


def test_a_folder_of_another_run_is_refused_by_the_name_of_the_difference(tmp_path):
    run(EVERY["MALA"](TARGET), 3, checkpoint=tmp_path)
    for kernel, options, said in (
        (EVERY["HMC"](TARGET), {}, "kernel="),
        (MALA(TARGET, step_size=0.3, steps=3), {}, "kernel=.*step_size"),
        (EVERY["MALA"](TARGET), {"seed": 6}, "seed=5, but seed=6"),
        (EVERY["MALA"](TARGET), {"thin": 2}, "thin=1, but thin=2"),
        (EVERY["MALA"](TARGET), {"chains": 9}, "chains=8, but chains=9"),
        (EVERY["MALA"](TARGET), {"dtype": torch.float32}, "dtype='float64', but dtype='float32'"),
        (EVERY["MALA"](TARGET), {"budget": 1e6}, "budget=None, but budget="),
    ):
        with pytest.raises(RunFolderError, match=said):
            run(kernel, 3, checkpoint=tmp_path, **options)


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "piece-00000.safetensors", "run.json"])
@pytest.mark.parametrize("damage", ["cut", "noise", "gone"])
def test_a_damaged_folder_is_named_not_believed(name, damage, tmp_path):
    kernel = EVERY["MALA"](TARGET)
    run(kernel, 3, checkpoint=tmp_path)
    path = tmp_path / name
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "noise":
        path.write_bytes(b"\x93" * 400)
    else:
        path.unlink()
    with pytest.raises(RunFolderError):
        Draws.load(tmp_path)
    if (name, damage) != ("checkpoint.safetensors", "gone"):  # then the run starts anew: see the next line
        with pytest.raises(RunFolderError):
            run(kernel, 3, checkpoint=tmp_path)
    else:
        assert_identical(run(kernel, 3, checkpoint=tmp_path), run(kernel, 3))


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("all my work")
    with pytest.raises(RunFolderError, match="not empty"):
        run(EVERY["MALA"](TARGET), 3, checkpoint=tmp_path)
    with pytest.raises(RunFolderError, match="not empty"):
        run(EVERY["MALA"](TARGET), 3).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "all my work"
    assert len(list(tmp_path.iterdir())) == 1


# --- Ctrl-C


class Interrupted(Counting):
    """Raises KeyboardInterrupt, as Ctrl-C does, or another `error` at its n-th batched call, once; `calls` counts them."""

    def __init__(self, target, at=0, error=KeyboardInterrupt):
        super().__init__(target)
        self.at, self.calls, self.error = at, 0, error

    def log_prob_and_score(self, x):
        self.calls += 1
        if self.calls == self.at:
            raise self.error
        return super().log_prob_and_score(x)


@pytest.mark.parametrize(
    "name", ["MALA", "DiGS levels", "DiGS metric HMC tries", "PT HMC", "fitted ladder r=inf", "fitted r=1"]
)
@pytest.mark.parametrize("fraction", [0.3, 0.55, 0.8])
def test_an_interrupt_among_the_draws_returns_them_and_resumes_to_the_same_result(
    name, fraction, tmp_path, shapes_unchecked
):
    total, calls = 12, []
    for draws in (1, total):
        counter = Interrupted(TARGET)
        whole = run(EVERY[name](counter), draws)
        calls.append(counter.calls)
    at = round(calls[0] + fraction * (calls[1] - calls[0]))
    for folder in (None, tmp_path / "run"):
        kernel = EVERY[name](Interrupted(TARGET, at))
        stopped = run(kernel, total, checkpoint=folder)
        made = stopped.positions.shape[1]
        assert stopped.interrupted
        assert 0 < made < total
        assert torch.equal(stopped.positions, whole.positions[:, :made])
        if folder is None:
            assert_identical(stopped.resume(kernel, total - made, progress=False), whole)
        else:
            assert_identical(run(kernel, total, checkpoint=folder), whole)
            assert not Draws.load(folder).interrupted


def test_an_interrupt_in_warm_up_returns_no_draws_and_the_folder_goes_on(tmp_path, shapes_unchecked):
    whole = run(FittedDiGS(TARGET), 6)
    target = Interrupted(TARGET, 120)
    kernel = FittedDiGS(target)
    stopped = run(kernel, 6, checkpoint=tmp_path / "run")
    assert stopped.interrupted
    assert stopped.positions.shape == (8, 0, 2)
    with pytest.raises(InvalidInput, match="warm-up"):
        stopped.resume(kernel, 3)
    assert_identical(run(kernel, 6, checkpoint=tmp_path / "run"), whole)


def interrupted_at(line, work):
    """Run `work`, raising KeyboardInterrupt before the `line`-th line that the module of the loop executes."""
    seen = 0

    def trace(frame, event, argument):
        nonlocal seen
        if frame.f_code.co_filename != loop_module.__file__:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return work(), seen
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("stored", [False, True])
def test_interrupts_at_any_moment_lose_nothing_and_repeat_nothing(stored, tmp_path, monkeypatch, shapes_unchecked):
    # a signal may come between any two lines of the loop: many random lines, each run resumed and compared
    monkeypatch.setattr(loop_module, "_CHECKPOINT_SECONDS", 0.0)
    kernel, total = MALA(TARGET, step_size=0.2), 12
    whole, lines = interrupted_at(-1, lambda: run(kernel, total, checkpoint=tmp_path / "whole" if stored else None))
    moments = torch.randint(lines, (60 if stored else 150,), generator=seeded(0)).tolist()
    seen = 0
    for moment in moments:
        folder = tmp_path / f"{moment}" if stored else None
        try:
            stopped, _ = interrupted_at(moment, lambda folder=folder: run(kernel, total, checkpoint=folder))
        except KeyboardInterrupt:
            stopped = None  # before the loop or after it: nothing is returned, but nothing stored is lost
        if stopped is not None:
            made = stopped.positions.shape[1]
            seen += stopped.interrupted and 0 < made < total
            assert all(len(value) == made for value in stopped.stats.values())
            assert torch.equal(stopped.positions, whole.positions[:, :made])
            if 0 < made < total and not stored:
                assert_identical(stopped.resume(kernel, total - made, progress=False), whole)
        if stored:
            assert_identical(run(kernel, total, checkpoint=folder), whole)
    assert seen >= 20


# --- other processes

SCRIPT = """
import json, os, signal, sys, time, warnings
import torch
from noisewise.sampling import DiGS, FittedDiGS, MALA, sample
from noisewise.noise import NoiseSchedule
from noisewise.targets import two_modes
import noisewise.sampling.run as run

warnings.simplefilter("ignore")
torch.set_num_threads(1)
run._CHECKPOINT_SECONDS = 0.05


class Slow:
    dim = 2

    def __init__(self, seconds):
        self.seconds, self.exact = seconds, two_modes(2, separation=5.0)

    def log_prob(self, x):
        return self.exact.log_prob(x)

    def log_prob_and_score(self, x):
        time.sleep(self.seconds)
        return self.exact.log_prob_and_score(x)


KERNELS = {
    "DiGS": lambda t: DiGS(t, inner=MALA(t, steps=2)),
    "FittedDiGS": lambda t: FittedDiGS(t),
}


def go(name, seconds, folder, **options):
    init = torch.zeros(6, 2) + torch.arange(6).unsqueeze(-1) / 5
    kernel = KERNELS[name](Slow(seconds))
    return sample(kernel, init=init, draws=40, warmup=30, seed=9, checkpoint=folder, progress=False, **options)
"""

KILLS = """
def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    return child


name, folder = sys.argv[1], sys.argv[2]
killed = []
for phase in ("warm-up", "warm-up", "draws", "draws", "draws"):
    child = forked(lambda: go(name, 0.003, folder))
    wait = torch.rand((), generator=torch.Generator().manual_seed(len(killed))).item() * 0.4
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            sys.exit("the run ended before it was killed")
        try:
            from safetensors import safe_open

            with safe_open(folder + "/checkpoint.safetensors", framework="pt") as file:
                progress = json.loads(file.metadata()["values"])
            done = progress["draws"]
            if (phase == "warm-up" and not progress["warmed"]) or (phase == "draws" and done > 3 * len(killed)):
                break
        except (OSError, Exception):
            pass
        time.sleep(0.01)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
        killed.append([phase, progress["warmed"], progress["draws"]])
print(json.dumps(killed))
final = go(name, 0.0, folder)
unharmed = go(name, 0.0, folder + "-unharmed")
"""


def python(*parts, arguments=(), **options):
    code = "\n".join(textwrap.dedent(part) for part in parts)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("name", ADAPTIVE)
def test_killed_between_two_phases_of_warm_up_equals_unharmed(name, tmp_path, monkeypatch, shapes_unchecked):
    folder, save = tmp_path / "run", loop_module.Run._save

    def go(checkpoint):
        init = torch.randn((8, 2), dtype=torch.float64, generator=seeded(0))
        return sample(
            ALL[name](TARGET), init=init, draws=5, budget=60_000, seed=5, progress=False, checkpoint=checkpoint
        )

    def saved(self):
        save(self)
        if self.steps is None and not self.done:
            shutil.copytree(folder, tmp_path / f"after-{self.phase}", dirs_exist_ok=True)

    with monkeypatch.context() as patched:
        patched.setattr(loop_module.Run, "_save", saved)
        whole = go(folder)
    phases = sorted(tmp_path.glob("after-*"))
    assert phases or name == "SMC"
    for left in phases:
        assert_identical(go(left), whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DiGS", "FittedDiGS"])
def test_killed_again_and_again_in_warm_up_and_among_the_draws_equals_unharmed(name, tmp_path):
    process = python(SCRIPT, KILLS, arguments=[name, tmp_path / "run"])
    out, err = process.communicate(timeout=150)
    assert process.returncode == 0, err
    killed = json.loads(out.splitlines()[-1])
    assert len(killed) == 5
    assert any(not warmed for _, warmed, _ in killed)
    assert any(draws > 0 for _, _, draws in killed)
    harmed, unharmed = Draws.load(tmp_path / "run"), Draws.load(tmp_path / "run-unharmed")
    assert harmed.positions.shape == (6, 40, 2)
    assert_identical(harmed, unharmed)
    events = [json.loads(line)["event"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert events.count("resume") >= 4


@pytest.mark.slow
def test_ctrl_c_of_a_process_returns_the_draws_made_so_far(tmp_path):
    work = """
    draws = go("DiGS", 0.03, sys.argv[1])
    print(json.dumps([draws.interrupted, draws.positions.shape[1]]))
    """
    process = python(SCRIPT, work, arguments=[tmp_path / "run"])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list(tmp_path.glob("run/piece-*")):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    interrupted, made = json.loads(out.splitlines()[-1])
    assert interrupted
    assert 0 < made < 40
    stopped = Draws.load(tmp_path / "run")
    assert stopped.interrupted
    assert stopped.positions.shape[1] == made
    finish = python(
        SCRIPT,
        'go("DiGS", 0.0, sys.argv[1]); go("DiGS", 0.0, sys.argv[2])',
        arguments=[tmp_path / "run", tmp_path / "other"],
    )
    _, err = finish.communicate(timeout=60)
    assert finish.returncode == 0, err
    assert_identical(Draws.load(tmp_path / "run"), Draws.load(tmp_path / "other"))


# --- what comes out


def test_arviz_gets_the_same_numbers():
    draws = run(EVERY["DiGS levels"](as_target(TARGET)), 20)
    data = draws.to_arviz()
    assert torch.equal(torch.as_tensor(data.posterior["x"].values), draws.positions)
    assert torch.equal(torch.as_tensor(data.sample_stats["lp"].values), draws.stats["log_prob"].T)
    torch.testing.assert_close(draws.stats["log_prob"].T, TARGET.log_prob(draws.positions))


def test_chains_and_starts_by_default_are_standard_normal_and_counted():
    kernel = MALA(TARGET, step_size=1e-9)
    draws = sample(kernel, draws=1, progress=False)
    assert draws.positions.shape == (64, 1, 2)
    assert float(draws.positions.abs().mean()) == pytest.approx(0.8, abs=0.1)
    one = sample(kernel, draws=1, chains=5, init=[1.0, 2.0], progress=False)
    torch.testing.assert_close(one.positions[:, 0], torch.tensor([[1.0, 2.0]]).expand(5, 2), rtol=0, atol=1e-3)
    assert one.config["one_start"]


@pytest.mark.parametrize("level", [Corruption(1.0, 3.0)])
def test_the_mean_of_a_run_is_that_of_the_target(level, shapes_unchecked):
    draws = sample(DiGS(TARGET, level, step_size=0.3), chains=200, draws=150, seed=2, progress=False)
    means = draws.positions[:, 30:].mean(1)
    se = means.std(0) / len(means) ** 0.5
    assert bool(((means.mean(0) - TARGET.mean().float()).abs() < 4 * se).all())


# --- a GPU


@pytest.mark.gpu
@pytest.mark.parametrize(
    "kernel",
    [
        lambda t: DiGS(t, Corruption(1.0, 3.0), step_size=0.3),
        lambda t: ParallelTempering(t),
        lambda t: FittedDiGS(t),
        lambda t: TemperedSMC(t, mean=0.0, scale=5.0),
    ],
)
def test_cpu_and_gpu_agree_in_law_in_float64(kernel, tmp_path):
    results = []
    for device in ("cpu", "cuda"):
        target = two_modes(2, separation=6.0, dtype=torch.float64).to(device=device)
        init = torch.zeros((256, 2), dtype=torch.float64, device=device)
        draws = sample(kernel(target), init=init, draws=60, warmup=60, seed=1, progress=False)
        assert draws.positions.device.type == device
        assert draws.positions.dtype == torch.float64
        more = draws.resume(kernel(target), 60, progress=False)
        repeat = sample(kernel(target), init=init, draws=120, warmup=60, seed=1, progress=False)
        assert torch.equal(more.positions, repeat.positions)
        results.append(more.positions[:, 20:].cpu())
    for function in (lambda x: (x.sum(-1) > 0).double(), lambda x: x[..., 0], lambda x: x.square().sum(-1)):
        means = [function(x).mean(1) for x in results]
        se = sum(m.var() / len(m) for m in means) ** 0.5
        assert abs(float(means[0].mean() - means[1].mean())) < 4 * float(se)
