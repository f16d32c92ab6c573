"""`sample`: the one entry to every kernel, which checks what it is given and hands it to a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.runs import RunFolder
from noisewise.sampling.draws import KIND, Draws
from noisewise.sampling.fitted import FittedDiGS
from noisewise.sampling.kernel import Kernel
from noisewise.sampling.plan import Budget, Plan
from noisewise.sampling.run import Run, moved_to, seeded
from noisewise.targets.target import Target, as_target
from noisewise.typing import check_count

__all__ = ["Budget", "continue_run", "sample"]


def sample(
    kernel_or_target: Kernel | Target | Any,
    *,
    chains: int | None = None,
    draws: int | None = None,
    warmup: int = 0,
    init: Float[Tensor, "chain dim"] | Sequence[Any] | Any = None,
    seed: int = 0,
    budget: float | int | Budget | None = None,
    thin: int = 1,
    checkpoint: str | Path | None = None,
    progress: bool = True,
    dim: int | None = None,
) -> Draws:
    """Draw from a kernel's target; a bare target gets `FittedDiGS`, which finds its modes and weighs them.

    `chains`: number of chains, by default that of `init`, or 64. `draws` per chain, by default 1000, or with a budget as
    many as it pays for. `warmup`: iterations that adapt whatever the kernel left open, or burn in, then discarded; 0 leaves
    it to the kernel: nothing when all its settings are given, else 20 % of the budget or about 2000 gradients per chain.
    `init`: starts, [chain, dim] or one [dim] for all; by default standard normal draws. Their dtype and device are the
    run's. `budget`: value-and-gradient calls over all chains, or a `Budget`; the run stops before it would exceed it.
    `thin`: iterations per draw. `checkpoint`: a folder, written every two seconds; the same call goes on from it after a
    crash, to the same draws, and returns all that it holds. `dim`: needed only for a bare torch
    callable, or for a model kernel (`DenoisingGibbs`, `WalkJump`) without `init`.

    Ctrl-C returns the draws made so far. The first call of the target is checked (shape, dtype, finiteness, independent
    rows); the two extra rows of that check are not billed. Raises `InvalidInput` before any long work.
    """
    kernel = _as_kernel(kernel_or_target, dim)
    start = _starts(_dim(kernel, dim), init, chains, seed)
    kernel = kernel.bind(start) if hasattr(kernel, "bind") else kernel
    plan = Plan(
        draws=None if draws is None else check_count("draws", draws),
        warmup=check_count("warmup", warmup, 0),
        thin=check_count("thin", thin),
        budget=budget if isinstance(budget, Budget) else Budget(gradients=budget),
    )
    config = {
        "kernel": kernel.describe(),
        "chains": len(start),
        "dim": start.shape[1],
        "dtype": str(start.dtype).removeprefix("torch."),
        "start": _fingerprint(start),
        "one_start": bool((start == start[0]).all()) and len(start) > 1,
        "warmup": plan.warmup,
        "seed": check_count("seed", seed, 0),
        "thin": plan.thin,
        "budget": plan.budget.gradients,
        "target": type(kernel.model if hasattr(kernel, "bind") else kernel.target).__name__,
    }
    folder = None if checkpoint is None else RunFolder(checkpoint)
    if folder is not None and folder.exists:
        folder.expect(KIND, config)
        run = Run.restore(kernel, start, plan, config, folder)
    else:
        run = Run.begin(kernel, start, plan, config, folder)
    return run.finish(progress)


def continue_run(kernel_or_target: Any, earlier: Draws, draws: int, progress: bool) -> Draws:
    """`draws` more per chain after `earlier`; what `Draws.resume` does."""
    kernel = _as_kernel(kernel_or_target, earlier.positions.shape[-1])
    dim = earlier.positions.shape[-1]
    if kernel.describe() != earlier.config["kernel"] or _dim(kernel, dim) != dim:
        raise InvalidInput(
            f"resume needs the kernel of the first run, {earlier.config['kernel']}, got {kernel.describe()}"
        )
    if not earlier.positions.shape[1]:
        raise InvalidInput("there are no draws to go on from: the run stopped in its warm-up; call sample again")
    kernel = kernel.bind(earlier.positions[:, 0]) if hasattr(kernel, "bind") else kernel
    kernel = kernel.with_settings(moved_to(earlier.settings, earlier.positions))
    state = kernel.state_type()(**moved_to(earlier.final.state, earlier.positions))
    cold = state.cold if hasattr(state, "cold") else state
    if not hasattr(kernel, "bind"):
        # chains with densities of their own are evaluated together
        rows = 1 if getattr(kernel.target, "chains", None) is None else len(cold.position)
        value = kernel.target.log_prob_and_score(cold.position[:rows])[0]
        if not torch.allclose(value, cold.log_prob[:rows], rtol=1e-3, atol=1e-3):
            raise InvalidInput(
                f"the target gives {value[0].item():.6g} where the first run had {cold.log_prob[0].item():.6g}: "
                "it is another target"
            )
    plan = Plan(check_count("draws", draws), 0, earlier.config["thin"], Budget())
    run = Run(kernel, state, seeded(0, earlier.positions.device), plan, dict(earlier.config), None)
    run.generator.set_state(earlier.final.generator)
    run.cost, run.warmed = earlier.cost, True
    run.reach = float(earlier.positions[:, 0].abs().max())
    run.squares = earlier.squares.clone() if earlier.squares is not None else run.squares
    return earlier.joined(run.finish(progress))


def _as_kernel(obj: Any, dim: int | None) -> Any:
    if isinstance(obj, type):
        raise InvalidInput(f"got the class {obj.__name__}, not an instance: {obj.__name__}(target, ...)")
    if hasattr(obj, "step") and hasattr(obj, "warmup_phases"):
        return obj
    return FittedDiGS(as_target(obj, dim))


def _dim(kernel: Any, given: int | None) -> int | None:
    """Number of coordinates; a model does not know it, so that `given` or the starts decide."""
    return given if hasattr(kernel, "bind") else kernel.target.dim


def _starts(dim: int | None, init: Any, chains: int | None, seed: int) -> Float[Tensor, "chain dim"]:
    if chains is not None:
        chains = check_count("chains", chains)
    if init is None:
        if dim is None:
            raise InvalidInput("a model does not know its dimension: give starts, init=[chain, dim], or dim=")
        generator = torch.Generator().manual_seed(seed + 1_000_003)
        return torch.randn((chains or 64, dim), generator=generator)
    start = torch.as_tensor(init)
    if not start.dtype.is_floating_point:
        start = start.to(torch.get_default_dtype())
    if start.ndim == 1:
        start = start.expand(chains or 64, -1)
    if start.ndim != 2 or start.shape[1] != (dim or start.shape[1]):
        size = dim or "dim"
        raise InvalidInput(f"init must be [chain, {size}] or [{size}], got shape {tuple(torch.as_tensor(init).shape)}")
    if chains is not None and len(start) != chains:
        raise InvalidInput(f"chains={chains} was asked for, but init has {len(start)} rows")
    return start.detach().clone()


def _fingerprint(start: Tensor) -> float:
    """One number that differs between different starts, so that a checkpoint is not continued from others."""
    flat = start.detach().double().cpu().flatten()
    return float((flat * torch.linspace(1, 2, len(flat), dtype=torch.float64)).sum())
