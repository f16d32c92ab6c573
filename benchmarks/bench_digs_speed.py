"""How fast DiGS runs on GMM-40 beside its published form, JAX and torch.compile: ratios in one process, one thread.

`make bench` prints the table and writes benchmarks/results/digs-speed.json. Every contender makes the same sweeps of
5 MALA steps (alpha = 0.1, h = 0.1); seconds are given per 1000 MALA steps, which are 200 sweeps.
"""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# before JAX starts: all contenders have one thread
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax
import jax_digs
import pytest
import torch
from interleaved import compared, environment, interleaved
from published_digs import MixtureEnergy, published_digs
from rich.console import Console
from rich.table import Table

from noisewise.noise import Corruption
from noisewise.sampling import MALA, DiGS
from noisewise.targets import as_target, from_jax, gmm40
from noisewise.targets.tilted import Tilt

ALPHA, SIGMA, STEP_SIZE, STEPS = 0.1, math.sqrt(0.99), 0.1, 5
SWEEPS = 200  # make 1000 MALA steps
TIMED = {10: 200, 100: 100, 1000: 40}  # sweeps of one timing, by chains: many short rounds see more of a busy machine
CHAINS = tuple(TIMED)
ROUNDS = 7
RESULTS = Path(__file__).parent / "results" / "digs-speed.json"

TARGET = gmm40()
DEVIATION = math.log1p(math.e)
JAX_LOG_PROB = jax_digs.mixture_log_prob(TARGET.means.numpy(), DEVIATION**2)

OURS = "noisewise DiGS"
PORT = "published procedure"
REBUILT = "published procedure, distribution rebuilt per call"
SAME_TARGET = "noisewise DiGS on the published target"
HAND_JAX = "hand-written jax.jit + lax.scan"
ADAPTED = "noisewise DiGS on a from_jax target"
EAGER = "sweeps one by one, eager"
COMPILED = "sweeps one by one, torch.compile"


def digs(target: Any, sweeps: int = SWEEPS) -> DiGS:
    inner = MALA(target, step_size=STEP_SIZE, steps=STEPS)
    return DiGS(target, schedule=Corruption(ALPHA, SIGMA), sweeps=sweeps, inner=inner)


def noisewise_run(target: Any, chains: int, sweeps: int = SWEEPS) -> Callable[[], Any]:
    kernel, generator = digs(target, sweeps), torch.Generator().manual_seed(1)
    state = kernel.init(torch.zeros(chains, 2))

    def run() -> Any:
        nonlocal state
        state, info = kernel.step(state, generator)
        return state.position, info

    return run


def published_run(energy: MixtureEnergy, chains: int, sweeps: int = SWEEPS) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.zeros(chains, 2)

    def run() -> Any:
        nonlocal x
        x = published_digs(x, energy, ALPHA, SIGMA, sweeps, STEPS, STEP_SIZE, generator)
        return x, None

    return run


def jax_run(chains: int, sweeps: int = SWEEPS) -> Callable[[], Any]:
    program = jax_digs.compiled_digs(JAX_LOG_PROB, SIGMA / ALPHA, sweeps, STEPS, STEP_SIZE)
    state = jax_digs.initial_state(JAX_LOG_PROB, torch.zeros(chains, 2).numpy())
    key = jax.random.key(1)

    def run() -> Any:
        nonlocal state, key
        key, now = jax.random.split(key)
        state = jax.block_until_ready(program(now, state))
        return torch.from_numpy(jax.device_get(state[0]).copy()), None

    return run


def sweep_function() -> Callable[..., Any]:
    """One sweep, noise given: a pure function of tensors."""
    kernel, step_size, r = digs(TARGET), torch.tensor(STEP_SIZE), SIGMA / ALPHA
    return lambda state, noise: kernel.sweep(state, noise, r, step_size, Tilt())[0]


def swept_run(sweep: Callable[..., Any], chains: int, sweeps: int) -> Callable[[], Any]:
    kernel, generator = digs(TARGET, sweeps), torch.Generator().manual_seed(1)
    state = kernel.init(torch.zeros(chains, 2))

    def run() -> Any:
        nonlocal state
        for noise in kernel.noise(state.position, generator)[0]:
            state = sweep(state, noise)
        return state.position, None

    return run


pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def results(pytestconfig):
    """Rows of the table, and facts; printed and written when all has run."""
    found: dict[str, Any] = {"ratios": [], "calls_per_1000_mala_steps": {}, "torch_compile": {}}
    yield found
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        report(found)


@pytest.mark.parametrize("chains", CHAINS)
def test_against_the_published_procedure_and_jax(results, chains):
    energies = [MixtureEnergy(TARGET.means, DEVIATION, rebuild) for rebuild in (False, True)]
    on_their_target = as_target(MixtureEnergy(TARGET.means, DEVIATION, False).log_prob, dim=2)
    sweeps = TIMED[chains]
    contenders = {
        OURS: noisewise_run(TARGET, chains, sweeps),
        PORT: published_run(energies[0], chains, sweeps),
        REBUILT: published_run(energies[1], chains, sweeps),
        SAME_TARGET: noisewise_run(on_their_target, chains, sweeps),
        HAND_JAX: jax_run(chains, sweeps),
        ADAPTED: noisewise_run(from_jax(JAX_LOG_PROB, 2), chains, sweeps),
    }
    seconds = interleaved(contenders, ROUNDS)
    pairs = [(OURS, PORT), (OURS, REBUILT), (SAME_TARGET, PORT), (HAND_JAX, OURS), (HAND_JAX, ADAPTED)]
    for ours, other in pairs:
        results["ratios"].append(row(chains, ours, other, seconds))


def row(chains: int, ours: str, other: str, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the table; seconds per 1000 MALA steps."""
    per_round = compared(seconds, ours, other)
    scale = SWEEPS / TIMED[chains]
    per_round |= {name: scale * per_round[name] for name in ("seconds_ours", "seconds_other")}
    return {"chains": chains, "of": other, "to": ours, **per_round}


def test_a_compiled_sweep(results):
    """Equal to the eager one on the same noise, then timed; needs a C++ compiler."""
    eager = sweep_function()
    for chains in CHAINS:
        torch._dynamo.reset()
        compiled = torch.compile(sweep_function(), fullgraph=True, dynamic=False)
        kernel = digs(TARGET)
        generator = torch.Generator().manual_seed(2)
        state = kernel.init(TARGET.sample(chains, generator))
        noise = kernel.noise(state.position, generator)[0][0]
        begun = time.perf_counter()
        try:
            got = compiled(state, noise)
        except torch._dynamo.exc.BackendCompilerFailed as error:  # pragma: no cover
            results["torch_compile"]["failed"] = str(error).partition("\n")[0]
            pytest.skip(f"torch.compile did not work here: {error}")
        compile_seconds = time.perf_counter() - begun
        for mine, theirs in zip(eager(state, noise), got, strict=True):
            # a fused sum rounds otherwise; an accept that flips on it would differ by far more
            torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-4)
        sweeps = TIMED[chains]
        runs = {EAGER: swept_run(eager, chains, sweeps), COMPILED: swept_run(compiled, chains, sweeps)}
        results["torch_compile"][str(chains)] = {"compile_seconds": compile_seconds}
        results["ratios"].append(row(chains, COMPILED, EAGER, interleaved(runs, ROUNDS)))


def test_calls_of_the_target(results):
    """L + 1 calls per sweep where the published procedure makes L + 3."""
    energy = MixtureEnergy(TARGET.means, DEVIATION, False)
    published_run(energy, 10)()
    theirs, energy.calls = energy.calls, 0
    counted = as_target(energy.log_prob, dim=2)
    run = noisewise_run(counted, 10)
    energy.calls = 0  # the state's first value is paid once per run, not per sweep
    run()
    assert energy.calls == SWEEPS * (STEPS + 1) == digs(TARGET).gradients_per_step
    assert theirs == SWEEPS * (STEPS + 3)
    results["calls_per_1000_mala_steps"] = {OURS: energy.calls, PORT: theirs}


@pytest.mark.parametrize("build", [noisewise_run, lambda _, chains: jax_run(chains), None])
def test_all_sample_the_same_law(build):
    """Mode weights and second moment of each contender against the exact ones: a fast wrong sampler is no contender."""
    chains = 200
    run = (
        published_run(MixtureEnergy(TARGET.means, DEVIATION, False), chains) if build is None else build(TARGET, chains)
    )
    run()
    draws = torch.cat([run()[0] for _ in range(5)])
    moment = draws.square().sum(-1).mean()
    exact = (TARGET.covariance().diagonal() + TARGET.mean().square()).sum()
    deviation = TARGET.sample(20_000, torch.Generator().manual_seed(3)).square().sum(-1).std()
    # 1000 MALA steps apart, draws are all but independent
    assert abs(moment - exact) < 5 * deviation / math.sqrt(chains * 2)
    weights = torch.bincount(TARGET.component(draws), minlength=40) / len(draws)
    assert 0.5 * (weights - 1 / 40).abs().sum() < 0.15


def report(found: dict[str, Any]) -> None:
    """Print the table, and write the file that the docs read."""
    table = Table(title="DiGS on GMM-40, seconds per 1000 MALA steps of all chains: how many times longer")
    for column in ("chains", "this", "takes, in units of this", "median", "min", "max"):
        table.add_column(column, justify="right" if column in ("chains", "median", "min", "max") else "left")
    for row in found["ratios"]:
        spread = (f"{row[name]:.3g}" for name in ("median", "min", "max"))
        table.add_row(
            str(row["chains"]),
            f"{row['of']} ({row['seconds_other']:.3f} s)",
            f"{row['to']} ({row['seconds_ours']:.3f} s)",
            *spread,
        )
    console = Console(width=160)
    console.print()
    console.print(table)
    console.print(f"calls of the target per 1000 MALA steps: {found['calls_per_1000_mala_steps']}")
    console.print(f"torch.compile, seconds to compile a sweep: {found['torch_compile']}")
    whole = all(found.values()) and len({row["chains"] for row in found["ratios"]}) == len(CHAINS)
    if not whole:
        console.print("not all of it ran: the results file is left as it is")
        return
    document = {
        "command": "make bench",
        "what": "GMM-40, alpha 0.1, h 0.1, L = 5; seconds per 1000 MALA steps; "
        "ratio, by round: seconds of `of` over seconds of `to`",
        "environment": environment(),
        **found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(rounded(document), indent=1) + "\n")
    console.print(f"written: {RESULTS}")


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value
