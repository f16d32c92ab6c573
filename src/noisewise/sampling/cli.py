"""`noisewise sample`: draw from a function in a user's file, or from a zoo problem, into a folder with a report."""

import importlib
import importlib.util
import inspect
import json
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from noisewise.command import COMMAND, REPORT, SUMMARY, digest, read_command
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.files import write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    import torch

    from noisewise.sampling import Budget
    from noisewise.sampling.draws import Draws
    from noisewise.targets.target import Target

__all__ = [
    "ZOO",
    "Dtype",
    "SamplingMethod",
    "load_target",
    "refuse_changed",
    "sample_command",
    "source_digest",
]

# what lies in the folder of -o beside summary.json and report.html; the draws are a run folder, for `Draws.load`
_DRAWS = "draws"
_CHAINS = 64
# known problems by the name they go by on the command line, and what `noisewise.targets` calls them
ZOO = {
    "gmm40": "gmm40",
    "many_well": "many_well",
    "dw4": "double_well_4",
    "double_well_4": "double_well_4",
    "lj13": "lennard_jones",
    "lennard_jones": "lennard_jones",
    "funnel": "funnel",
    "bnn": "bnn",
    "posteriordb_mixture": "posteriordb_mixture",
}


class SamplingMethod(StrEnum):
    """The kernels by their short names; `auto` leaves the choice to `sample`, which takes FittedDiGS."""

    AUTO = "auto"
    DIGS = "digs"
    PT = "pt"
    SMC = "smc"
    MALA = "mala"
    HMC = "hmc"
    ULA = "ula"


_KERNELS = {
    SamplingMethod.DIGS: "DiGS",
    SamplingMethod.PT: "ParallelTempering",
    SamplingMethod.SMC: "TemperedSMC",
    SamplingMethod.MALA: "MALA",
    SamplingMethod.HMC: "HMC",
    SamplingMethod.ULA: "ULA",
}


class Dtype(StrEnum):
    """Precision of the chains."""

    FLOAT32 = "float32"
    FLOAT64 = "float64"


def sample_command(
    source: Annotated[
        str, typer.Argument(help=f"FILE.py:NAME, run as Python: trust it first. Or a known problem: {', '.join(ZOO)}.")
    ],
    dim: Annotated[int | None, typer.Option(help="Coordinates; needed where NAME is a plain function.")] = None,
    method: Annotated[
        SamplingMethod, typer.Option(help="auto takes FittedDiGS, which suits a target nobody tuned.")
    ] = (SamplingMethod.AUTO),
    budget: Annotated[
        str | None, typer.Option(help="Most gradient calls over all chains, warm-up included (1e6), or seconds (60s).")
    ] = None,
    chains: Annotated[
        int | None, typer.Option(help="Chains, advanced together; 64 where nothing says otherwise.")
    ] = None,
    draws: Annotated[
        int | None, typer.Option(help="Kept draws per chain; what the budget pays for, or 1000 without one.")
    ] = None,
    warmup: Annotated[int, typer.Option(help="Adaptation steps before the first draw; 0 leaves it to the method.")] = 0,
    thin: Annotated[int, typer.Option(help="Steps per kept draw.")] = 1,
    seed: Annotated[int, typer.Option(help="Same seed, same machine: the same draws.")] = 0,
    init_scale: Annotated[float | None, typer.Option(help="Starts are normal with this standard deviation.")] = None,
    init: Annotated[Path | None, typer.Option(help="Starts from a .npy file, (chains, dim) or (dim).")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the chains.")] = Dtype.FLOAT32,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for draws, summary and report.html.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in --out.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Draw from a log density: a torch function (batch, dim) -> (batch), a Target, or a torch distribution."""
    options: dict[str, Any] = {
        "chains": None if chains is None else check_count("--chains", chains),
        "draws": None if draws is None else check_count("--draws", draws),
        "warmup": check_count("--warmup", warmup, 0),
        "thin": check_count("--thin", thin),
        "seed": check_count("--seed", seed, 0),
    }
    if init is not None and init_scale is not None:
        raise InvalidInput(f"--init {init} and --init-scale {init_scale:g} exclude each other: give one of them")
    if resume and out is None:
        raise InvalidInput("--resume needs the folder of the run: add -o FOLDER")
    limit = None if budget is None else _parse_budget(budget)
    target = load_target(source, dim)
    starts = _make_starts(target.dim, options["chains"], options["seed"], dtype, init_scale, init)
    if out is not None:
        command = {
            "source": source,
            "sha256": source_digest(source),
            "method": method.value,
            "dim": target.dim,
            **options,
        }
        command |= {
            "budget": budget,
            "dtype": dtype.value,
            "init_scale": init_scale,
            "init": str(init) if init else None,
        }
        _prepare_folder(out, command, resume)

    sampling: Any = importlib.import_module("noisewise.sampling")  # its lazy names are unknown to a type checker
    kernel = target if method is SamplingMethod.AUTO else getattr(sampling, _KERNELS[method])(target)
    checkpoint = None if out is None else out / _DRAWS
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", NoisewiseWarning
        )  # the summary repeats them, on the screen, as JSON and in the report
        result = sampling.sample(kernel, init=starts, budget=limit, checkpoint=checkpoint, **options)
    _show(result, out, as_json)


def _show(result: "Draws", out: Path | None, as_json: bool) -> None:
    """Print the summary and leave it in the folder with the report; an interrupted run shows what it has."""
    kept = result.positions.shape[1]
    if result.interrupted:
        advice = "nothing was kept" if out is None else "the same command with --resume goes on to the same draws"
        typer.echo(f"interrupted after {kept} draws per chain; {advice}", err=True)
    if kept == 0:
        if result.interrupted:
            raise typer.Exit(130)
        raise InvalidInput("; ".join(result.warnings) or "there are no draws; raise the budget")
    summary = result.summary()
    facts = summary.to_dict()
    if out is not None:
        write_atomically(out / SUMMARY, json.dumps(facts, indent=2))
        result.report(out / REPORT)
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        console = Console()
        console.print(summary.table())
        if out is None:
            console.print("nothing was kept; -o FOLDER keeps draws, summary and report", highlight=False)
        else:
            console.print(f"report: {(out / REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)
    if result.interrupted:
        raise typer.Exit(130)


def load_target(source: str, dim: int | None = None) -> "Target":
    """The target that `FILE.py:NAME` or the name of a zoo problem stands for; a file is run as Python.

    `dim` is needed where NAME is a plain function. Raises `InvalidInput` for an unknown problem, a missing file or
    name, a file that fails, and anything that is no target.
    """
    from noisewise import targets
    from noisewise.targets.target import Target, as_target

    path, colon, name = source.rpartition(":")
    if not colon:
        if source not in ZOO:
            raise InvalidInput(
                f"{source!r} is neither FILE.py:NAME nor a known problem; known: {', '.join(ZOO)}"
                + (f"; for a file say which function: {source}:log_prob" if source.endswith(".py") else "")
            )
        make = getattr(targets, ZOO[source])
        sized = dim is not None and "dim" in inspect.signature(make).parameters
        return as_target(make(dim=dim) if sized else make(), dim=dim)
    found = _load_name(Path(path), name)
    if callable(found) and dim is None and not isinstance(found, Target | type):
        raise InvalidInput(f"{source} is a function, so its number of coordinates is needed: add --dim")
    return as_target(found, dim=dim)


def _load_name(path: Path, name: str) -> Any:
    """What the user's file calls `name`; the file's folder is importable while it runs, as for a script."""
    if not path.is_file():
        raise InvalidInput(f"there is no file {str(path)!r} (looked in {Path.cwd()})")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InvalidInput(f"{str(path)!r} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InvalidInput(f"{path} fails when it is run: {type(error).__name__}: {error}") from error
    finally:
        sys.path.pop(0)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InvalidInput(f"{path} has no {name!r}; it has: {', '.join(own) or 'no public functions'}")
    found = getattr(module, name)
    if not callable(found) and not hasattr(found, "log_prob"):
        raise InvalidInput(f"{name!r} in {path} is {found!r}, not a function, a Target or a torch distribution")
    return found


def _parse_budget(text: str) -> "Budget":
    """`1e6` -> a million gradient calls, `60s` -> 60 seconds."""
    from noisewise.sampling import Budget

    try:
        if text.endswith("s"):
            return Budget(seconds=check_positive("--budget", float(text[:-1])))
        return Budget(gradients=check_count("--budget", float(text)))
    except InvalidInput:
        raise
    except (ValueError, OverflowError) as error:
        raise InvalidInput(
            f"--budget must be gradient calls such as 1e6 or seconds such as 60s, got {text!r}"
        ) from error


def _make_starts(
    dim: int, chains: int | None, seed: int, dtype: Dtype, init_scale: float | None, init: Path | None
) -> "torch.Tensor | None":
    """Starts [chain, dim] or [dim] from the file, or from N(0, init_scale^2); None leaves them to `sample`."""
    import numpy as np
    import torch

    kind = getattr(torch, dtype.value)
    if init is not None:
        try:
            array = np.load(init, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InvalidInput(f"--init {init} cannot be read as a .npy file of numbers: {error}") from error
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.shape[-1:] != (dim,):
            found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
            raise InvalidInput(f"--init {init} holds {found}; needed are numbers of shape ({dim},) or (chains, {dim})")
        return torch.as_tensor(array).to(kind)
    if init_scale is None and dtype is Dtype.FLOAT32:
        return None
    scale = 1.0 if init_scale is None else check_positive("--init-scale", init_scale)
    # a stream of its own: the run's generator is seeded with `seed` itself
    generator = torch.Generator().manual_seed(seed + 2_000_003)
    return scale * torch.randn(chains or _CHAINS, dim, dtype=kind, generator=generator)


def source_digest(source: str) -> str | None:
    """SHA-256 of the user's file, so that a resumed run is refused when its target has changed; None for a known problem."""
    path, colon, _ = source.rpartition(":")
    return digest(Path(path)) if colon else None


def refuse_changed(before: dict[str, Any], source: str, out: Path) -> None:
    """Raise `RunFolderError` where the user's file is not the one that the run in `out` began with."""
    if before.get("sha256") != source_digest(source):
        raise RunFolderError(
            f"the file of {source} has changed since the run in {out} began; "
            "start again in another folder, or put the file back"
        )


def _prepare_folder(out: Path, command: dict[str, Any], resume: bool) -> None:
    """Refuse a folder that holds something else; record the command. `sample` compares the options themselves."""
    record = out / COMMAND
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; -o names a folder")
    begun = (out / _DRAWS).exists()
    if resume:
        if not begun or not record.is_file():
            raise RunFolderError(f"{out} holds no run to resume; leave --resume out to start one")
        refuse_changed(read_command(record), command["source"], out)
    elif begun:
        raise RunFolderError(f"{out} already holds a run; go on with it by --resume, or choose another folder")
    elif out.is_dir() and any(path.name != COMMAND for path in out.iterdir()):
        raise RunFolderError(f"{out} is not empty; choose a new folder")
    write_atomically(record, json.dumps(command, indent=2))
