"""`noisewise neural fit`, `sample` and `evaluate`: a log density becomes a network, the network draws, the draws are measured."""

import io
import json
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from zipfile import BadZipFile

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from noisewise.command import (
    COMMAND,
    REPORT,
    RUN,
    SUMMARY,
    digest,
    make_folder,
    read_command,
    refuse_file,
    refuse_unfinished,
    typed,
)
from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning, RunFolderError
from noisewise.files import as_csv, write_atomically
from noisewise.sampling.cli import ZOO, load_target, refuse_changed, source_digest
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    import torch

    from noisewise.neural.dikl import DiKLSampler
    from noisewise.targets.target import Target

__all__ = ["Generator", "Preset", "neural_app"]

# what `DiKLSampler.from_pretrained` reads
_MODEL = "model"
_OPTIONS = ("dim", "preset", "generator", "steps", "seconds", "budget", "seed")
# what the library calls the options of the command line
_SAID_HERE = {
    "max_gradients": "--budget",
    "max_seconds": "--seconds",
    "max_steps": "--steps",
    "sample(n, refine_steps=20)": "noisewise neural sample --refine 20",
    "start inside the support": "start inside the support, --init FILE.npy",
}

neural_app = typer.Typer(
    no_args_is_help=True, help="Train a network to sample a log density, draw from it, measure it."
)


class Preset(StrEnum):
    """Our recipe for two cores, or the published settings for 40 Gaussians."""

    CPU = "cpu"
    PAPER = "paper"


class Generator(StrEnum):
    """The network: an MLP, or one that turns and relabels with the particles of a cluster."""

    MLP = "mlp"
    EGNN = "egnn"


Folder = Annotated[Path, typer.Argument(help="Folder that `noisewise neural fit` wrote.")]
Moved = Annotated[
    str | None, typer.Option("--target", help="Where the file of the target is now, if it was moved: FILE.py:NAME.")
]
Refine = Annotated[int, typer.Option(help="MALA steps on the target after the network; they cost calls.")]


@neural_app.command("fit")
def fit_command(
    target: Annotated[
        str,
        typer.Option(help=f"FILE.py:NAME, run as Python: trust it first. Or a known problem: {', '.join(ZOO)}."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model, its report and its checkpoint.")],
    dim: Annotated[int | None, typer.Option(help="Coordinates; needed where NAME is a plain function.")] = None,
    seconds: Annotated[float | None, typer.Option(help="Train for so many seconds, chains included.")] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps of the generator; the same sampler on every machine.")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Most gradient calls of the target, such as 1e6.")] = None,
    preset: Annotated[Preset, typer.Option(help="paper: the published settings, days on a CPU.")] = Preset.CPU,
    generator: Annotated[Generator, typer.Option(help="egnn is for clusters of particles.")] = Generator.MLP,
    init: Annotated[
        Path | None,
        typer.Option(
            help="Starts of the chains, a .npy file, (chains, dim), for a target that is bounded or far from 0."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a network that samples the target in one step; the same command again goes on after a crash or Ctrl-C."""
    options: dict[str, Any] = {
        "preset": preset.value,
        "generator": generator.value,
        "steps": None if steps is None else check_count("--steps", steps),
        "seconds": None if seconds is None else check_positive("--seconds", seconds),
        "budget": None if budget is None else check_count("--budget", budget),
        "seed": check_count("--seed", seed, 0),
    }
    if steps is None and seconds is None and (preset is Preset.CPU or budget is None):
        raise InvalidInput("say how long to train: --seconds 60, or --steps 2000 for the same sampler on every machine")
    from noisewise.neural.dikl import DiKLSampler
    from noisewise.neural.page import write_page

    density = load_target(target, dim)
    starts = None if init is None else _read_starts(init, density.dim)
    sampler = DiKLSampler(density, generator.value, preset.value, init=starts, seed=options["seed"])
    command = {"source": _placed(target), "sha256": source_digest(target), "dim": density.dim, **options}
    names = getattr(density, "names", None)
    _claim(out, command | {"init_sha256": None if init is None else digest(init), "names": names and list(names)})
    _fit(sampler, out, options)
    sampler.save_pretrained(out / _MODEL)
    facts = _facts(sampler, target, options | {"init": init and str(init)})
    write_atomically(out / SUMMARY, json.dumps(facts, indent=2))
    write_page(sampler, out / REPORT, target, _typed(target, dim, out, init, options), options["budget"])
    _show(facts, out, as_json)
    if sampler.interrupted_:
        typer.echo(f"interrupted at step {facts['steps']}; the same command goes on to the same sampler", err=True)
        raise typer.Exit(130)


@neural_app.command("sample")
def sample_command(
    folder: Folder,
    n: Annotated[int, typer.Option("-n", help="Draws.")] = 10_000,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    refine: Refine = 0,
    weighted: Annotated[
        bool, typer.Option("--weighted", help="Draws with exact importance weights, one call of the target each.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help=".npy or .csv file; without it, rows go to the screen. With --weighted a .npz file."
        ),
    ] = None,
    moved: Moved = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the draws, or with --out their number and place, as JSON.")
    ] = False,
) -> None:
    """Draw from a trained sampler, one network evaluation for each draw; the target's file is not needed for that."""
    n, seed = check_count("-n", n, 2 if weighted else 1), check_count("--seed", seed, 0)
    refine = check_count("--refine", refine, 0)
    if weighted:
        _weighted(folder, n, seed, refine, out, moved, as_json)
        return
    if out is not None and out.suffix not in (".npy", ".csv"):
        raise InvalidInput(f"--out {out} must end in .npy or .csv")
    command = _finished(folder)
    sampler = _load(folder, _density(folder, command, moved) if refine else _NoDensity.of(folder, command))
    names = command.get("names") or [f"x{i}" for i in range(sampler.target.dim)]
    before = sampler.cost.gradients
    drawn = sampler.sample(n, seed, refine)
    calls = sampler.cost.gradients - before
    if out is not None:
        write_atomically(out, _as_npy(drawn) if out.suffix == ".npy" else as_csv(names, drawn.tolist()))
    if as_json:
        kept = {"rows": drawn.tolist()} if out is None else {"out": str(out)}
        typer.echo(json.dumps({"names": names, "n": n, "gradients": calls, **kept}, indent=2))
    elif out is None:
        sys.stdout.write(as_csv(names, drawn.tolist()))
    else:
        typer.echo(f"{n} draws for {calls:,} calls of the target: {out}")


def _weighted(folder: Path, n: int, seed: int, refine: int, out: Path | None, moved: str | None, as_json: bool) -> None:
    if refine:
        raise InvalidInput(
            f"--weighted and --refine {refine} exclude each other: moved draws have no known density to weigh them by"
        )
    if out is None or out.suffix != ".npz":
        raise InvalidInput(f"--weighted needs --out FILE.npz, got {out or 'no --out'}")
    found = _load(folder, _density(folder, _finished(folder), moved)).weighted(n, seed=seed)
    write_atomically(out, _as_npz(draws=found.positions, log_weights=found.log_weights))
    log_z, error, calls = found.log_normalizer, found.log_normalizer_se, found.cost.energies
    if as_json:
        # JSON knows no infinities, which stand where no draw counts
        known = {"log_normalizer": log_z, "log_normalizer_se": error} if found.ess else {}
        typer.echo(json.dumps({"n": n, "ess": found.ess, **known, "energies": calls, "out": str(out)}, indent=2))
        return
    typer.echo(f"{n} weighted draws, worth {found.ess:.1f} exact ones, for {calls:,} calls of the target: {out}")
    typer.echo(f"log Z {log_z:.4f} ± {error:.4f}; it and the weights see no mode where the network has no draws")


@neural_app.command("evaluate")
def evaluate_command(
    folder: Folder,
    n: Annotated[int, typer.Option("-n", help="Draws to measure.")] = 5_000,
    seed: Annotated[int, typer.Option(help="Seed of the draws and of the floors.")] = 0,
    refine: Refine = 0,
    reference: Annotated[
        Path | None,
        typer.Option(help="Trusted draws: a .npy file, (draws, dim), or the folder of `noisewise sample -o`."),
    ] = None,
    moved: Moved = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the measurements as JSON.")] = False,
) -> None:
    """Measure draws of a trained sampler, each number beside its floor: what perfect samples would score."""
    from noisewise.neural.evaluate import evaluate

    n, seed, refine = check_count("-n", n, 2), check_count("--seed", seed, 0), check_count("--refine", refine, 0)
    command = _finished(folder)
    sampler = _load(folder, _density(folder, command, moved))
    trusted, against = _yardstick(sampler, command["source"], reference)
    found = evaluate(sampler.sample(n, seed, refine), sampler.target, trusted, seed=seed)
    if as_json:
        measured = {name: one.to_dict() for name, one in found.items()}
        facts = {"n": n, "seed": seed, "refine": refine, "against": against, "measurements": measured}
        typer.echo(json.dumps(facts, indent=2))
        return
    from noisewise.metrics.measurement import format_value

    table = Table(
        "measurement", "value", "floor", "draws", title=f"{n} draws, {refine} MALA steps", title_justify="left"
    )
    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    for name, one in found.items():
        floor = "" if one.floor is None else format_value(one.floor)
        value = f"{format_value(one.value, one.se)} {one.unit}".strip()
        table.add_row(escape(name + arrows[one.better]), value, floor, f"{one.n}")
    console = Console()
    console.print(table)
    console.print(f"measured against {escape(against)}", soft_wrap=True, highlight=False)


def _fit(sampler: "DiKLSampler", out: Path, options: dict[str, Any]) -> None:
    """`sampler.fit`, in the words of the command line."""
    try:
        with warnings.catch_warnings():
            # the summary repeats them, on the screen, as JSON and in the report
            warnings.simplefilter("ignore", NoisewiseWarning)
            sampler.fit(
                max_steps=options["steps"], max_seconds=options["seconds"], max_gradients=options["budget"],
                resume=out / RUN, progress=True,
            )  # fmt: skip
    except InvalidInput as error:
        raise InvalidInput(_said_here(str(error))) from error
    except KeyboardInterrupt:
        # the networks mind Ctrl-C by themselves; a second one at once is as a crash
        where = "" if any((out / RUN).glob("checkpoint*")) else " while the chains ran"
        typer.echo(f"interrupted{where}; the same command goes on", err=True)
        raise typer.Exit(130) from None
    sampler.warnings_ = tuple(_said_here(text) for text in sampler.warnings_)


def _said_here(text: str) -> str:
    """A message of the library with the names that its arguments have on the command line."""
    for there, here in _SAID_HERE.items():
        text = text.replace(there, here)
    return text + "; NAME may be the Target object that from_numpy returns" if "from_numpy" in text else text


def _typed(target: str, dim: int | None, out: Path, init: Path | None, options: dict[str, Any]) -> str:
    """The command line of a fit, options at their defaults left out."""
    given = {"target": target, "dim": dim, **options, "init": init, "out": out}
    usual = {"preset": Preset.CPU.value, "generator": Generator.MLP.value, "seed": 0}
    return typed(["noisewise", "neural", "fit"], given, usual)


def _placed(source: str) -> str:
    """`source` with the whole path of its file, so that it is found from any folder."""
    path, colon, name = source.rpartition(":")
    return f"{Path(path).resolve()}:{name}" if colon else source


def _claim(out: Path, command: dict[str, Any]) -> None:
    """Record the command of a new fit; refuse a folder that holds something else, or a fit by other options."""
    record = out / COMMAND
    refuse_file(out)
    if (out / RUN).exists():
        if not record.is_file():
            raise RunFolderError(f"{out} holds no run of `noisewise neural fit`; choose another folder")
        _refuse_other(read_command(record), command, out)
        return
    make_folder(out)
    if any(path.name != COMMAND for path in out.iterdir()):
        raise RunFolderError(f"{out} is not empty; choose a new folder")
    write_atomically(record, json.dumps(command, indent=2))


def _refuse_other(before: dict[str, Any], command: dict[str, Any], out: Path) -> None:
    if before.get("source") != command["source"]:
        raise RunFolderError(
            f"{out} holds a fit of {before.get('source')}, not of {command['source']}; choose another folder"
        )
    refuse_changed(before, command["source"], out)
    for name in _OPTIONS:
        if before.get(name) != command[name]:
            raise RunFolderError(
                f"{out} holds a fit with --{name} {_said(before.get(name))}, but --{name} {_said(command[name])} was asked "
                "for; choose another folder, or give the same options to go on"
            )
    if before.get("init_sha256") != command["init_sha256"]:
        raise RunFolderError(
            f"the chains of the fit in {out} began from "
            f"{'other starts than those of --init' if before.get('init_sha256') else 'starts of their own, without --init'}; "
            "choose another folder, or give the same starts to go on"
        )


def _said(value: Any) -> str:
    return "left out" if value is None else str(value)


def _facts(sampler: "DiKLSampler", source: str, options: dict[str, Any]) -> dict[str, Any]:
    return {
        "target": source,
        "dim": sampler.target.dim,
        **options,
        # of which --steps were asked for
        "steps": sampler.steps_,
        "interrupted": sampler.interrupted_,
        "cost": vars(sampler.cost),
        "warnings": list(sampler.warnings_),
    }


def _show(facts: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    table = Table(show_header=False, box=None)
    cost = facts["cost"]
    for name, value in (
        ("target", f"{facts['target']}, {facts['dim']} dimensions"),
        ("recipe", f"preset {facts['preset']}, generator {facts['generator']}, {facts['steps']} steps"),
        ("cost", f"{cost['gradients']:,} gradient calls, {cost['seconds']:.1f} s"),
    ):
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    console.print(table)
    for text in facts["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)
    console.print(f"model:  {escape(str(out / _MODEL))}", soft_wrap=True, highlight=False)
    console.print(f"report: {(out / REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)


class _NoDensity:
    """Stands for a target of which only the shape is needed: a network draws without its density."""

    def __init__(self, dim: int, particles: int) -> None:
        self.dim, self.particles = dim, particles

    @classmethod
    def of(cls, folder: Path, command: dict[str, Any]) -> "_NoDensity":
        from noisewise.pretrained import read_pretrained

        config, _ = read_pretrained(folder / _MODEL, "DiKLSampler")
        return cls(command["dim"], config.get("particles", 0))

    def log_prob(self, x: "torch.Tensor") -> Any:
        """Nothing asks for it."""
        raise NoisewiseError("the density was asked for where only the network should draw: please report this")

    def log_prob_and_score(self, x: "torch.Tensor") -> Any:
        """Nothing asks for it."""
        return self.log_prob(x)


def _finished(folder: Path) -> dict[str, Any]:
    """The command of a finished or interrupted fit in `folder`."""
    if not (folder / COMMAND).is_file() or not (folder / _MODEL).is_dir():
        refuse_unfinished(folder, "finished `noisewise neural fit`")
    return read_command(folder / COMMAND)


def _density(folder: Path, command: dict[str, Any], moved: str | None) -> "Target":
    """The target that the fit in `folder` was of, from its file as it is now."""
    source = command["source"] if moved is None else moved
    path, colon, _ = source.rpartition(":")
    if colon and not Path(path).is_file():
        raise RunFolderError(f"there is no file {path!r} any more: say where it is now, --target FILE.py:NAME")
    if command.get("sha256") != source_digest(source):
        # a comment may be all that is new, and what is measured says so if it is not
        warnings.warn(
            f"the file of {source} has changed since the fit in {folder} began: the network learned the density that was "
            "there, and is held against the one that is there now",
            NoisewiseWarning,
            stacklevel=3,
        )
    return load_target(source, command["dim"])


def _load(folder: Path, target: Any) -> "DiKLSampler":
    from noisewise.neural.dikl import DiKLSampler

    sampler = DiKLSampler.from_pretrained(folder / _MODEL, target)
    if sampler.interrupted_:
        warnings.warn(
            f"the fit in {folder} was interrupted: run the same fit command again to go on",
            NoisewiseWarning,
            stacklevel=3,
        )
    return sampler


def _yardstick(sampler: "DiKLSampler", source: str, reference: Path | None) -> tuple["torch.Tensor | None", str]:
    """What draws are measured against, None leaving it to the target, and its name."""
    from noisewise.neural.page import CAVEAT, CHAINS, chain_draws

    target = sampler.target
    if reference is not None:
        return _read_draws(reference, target.dim), str(reference)
    if hasattr(target, "sample") or hasattr(target, "reference"):
        return None, "exact draws" if hasattr(target, "sample") else "the target's own reference"
    drawn = chain_draws(sampler)
    if drawn is None:
        raise InvalidInput(
            f"{source} has neither exact draws nor a reference to measure against: make trusted ones with `noisewise sample "
            "... -o RUN` and add --reference RUN"
        )
    return drawn, f"{CHAINS}: {CAVEAT}"


def _as_npy(drawn: "torch.Tensor") -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, drawn.numpy(), allow_pickle=False)
    return file.getvalue()


def _as_npz(**arrays: "torch.Tensor") -> bytes:
    import numpy as np

    file = io.BytesIO()
    named: dict[str, Any] = {name: array.numpy() for name, array in arrays.items()}
    np.savez(file, **named)
    return file.getvalue()


def _read_draws(path: Path, dim: int) -> "torch.Tensor":
    """Draws [n, dim] of a .npy file, or of a folder that `noisewise sample -o` wrote."""
    if not path.is_dir():
        return _read_rows("--reference", path, dim, "draws")
    if (path / _MODEL).is_dir() or (path / RUN).is_dir():
        raise InvalidInput(
            f"--reference {path} is a folder of `noisewise neural fit`, and the draws of a network are not to be trusted: "
            "give the folder of `noisewise sample -o`; to compare two networks, first draw from that one, "
            f"noisewise neural sample {path} -o draws.npy"
        )
    if not (path / "draws").is_dir():
        raise InvalidInput(f"--reference {path} is neither a .npy file nor a folder of `noisewise sample -o`")
    from noisewise.sampling.draws import Draws

    return Draws.load(path / "draws").flat()


def _read_starts(path: Path, dim: int) -> "torch.Tensor":
    """Starts [chain, dim], on the target's own scale."""
    from noisewise.targets.target import check_start

    starts = _read_rows("--init", path, dim, "chains").float()
    try:
        check_start(starts)
    except InvalidInput as error:
        raise InvalidInput(f"--init {path}: {error}") from error
    return starts


def _read_rows(option: str, path: Path, dim: int, rows: str) -> "torch.Tensor":
    """The numbers [rows, dim] of a .npy file."""
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
    except OSError as error:
        raise InvalidInput(f"{option} {path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, BadZipFile) as error:
        # numpy would advise to allow pickles, which run whatever is in them
        raise InvalidInput(
            f"{option} {path} cannot be read: it is no .npy file of numbers, as np.save writes"
        ) from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != dim:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise InvalidInput(f"{option} {path} holds {found}; needed are numbers of shape ({rows}, {dim})")
    if not len(array):
        raise InvalidInput(f"{option} {path} holds no {rows}: its shape is {array.shape}")
    return torch.as_tensor(array)
