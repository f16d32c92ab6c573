"""`noisewise neural fit`, `sample` and `evaluate`: a log density becomes a network, the network draws, the draws are measured."""

import io
import json
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.files import as_csv, write_atomically
from noisewise.sampling.cli import ZOO, load_target, read_command, refuse_changed, source_digest
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    import torch

    from noisewise.neural.dikl import DiKLSampler

__all__ = ["Generator", "Preset", "neural_app"]

# what lies in the folder of --out: the run to go on from, and what `DiKLSampler.from_pretrained` reads
_COMMAND, _RUN, _MODEL = "command.json", "run", "model"
_SUMMARY, _REPORT = "summary.json", "report.html"
_OPTIONS = ("dim", "preset", "generator", "steps", "seconds", "budget", "seed")

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
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Train a network that samples the target in one step; the same command again goes on after a crash or Ctrl-C."""
    options: dict[str, Any] = {
        "preset": preset.value,
        "generator": generator.value,
        "steps": None if steps is None else check_count("--steps", steps),
        "seconds": None if seconds is None else check_positive("--seconds", seconds),
        "budget": None if budget is None else float(check_count("--budget", budget)),
        "seed": check_count("--seed", seed, 0),
    }
    if steps is None and seconds is None and (preset is Preset.CPU or budget is None):
        raise InvalidInput("say how long to train: --seconds 60, or --steps 2000 for the same sampler on every machine")
    from noisewise.neural.dikl import DiKLSampler
    from noisewise.neural.page import write_page

    density = load_target(target, dim)
    sampler = DiKLSampler(density, generator.value, preset.value, seed=options["seed"])
    _claim(out, {"source": _placed(target), "sha256": source_digest(target), "dim": density.dim, **options})
    with warnings.catch_warnings():
        # the summary repeats them, on the screen, as JSON and in the report
        warnings.simplefilter("ignore", NoisewiseWarning)
        sampler.fit(
            max_steps=options["steps"], max_seconds=options["seconds"], max_gradients=options["budget"],
            resume=out / _RUN, progress=True,
        )  # fmt: skip
    sampler.save_pretrained(out / _MODEL)
    facts = _facts(sampler, target, options)
    write_atomically(out / _SUMMARY, json.dumps(facts, indent=2))
    write_page(sampler, out / _REPORT, target)
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
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help=".npy or .csv file; without it, rows go to the screen.")
    ] = None,
    moved: Moved = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the draws, or with --out their number and place, as JSON.")
    ] = False,
) -> None:
    """Draw from a trained sampler, one network evaluation for each draw."""
    n = check_count("-n", n)
    if out is not None and out.suffix not in (".npy", ".csv"):
        raise InvalidInput(f"--out {out} must end in .npy or .csv")
    sampler = _load(folder, moved)
    names = getattr(sampler.target, "names", None) or [f"x{i}" for i in range(sampler.target.dim)]
    before = sampler.cost.gradients
    drawn = sampler.sample(n, check_count("--seed", seed, 0), check_count("--refine", refine, 0))
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
    sampler = _load(folder, moved)
    target = sampler.target
    if reference is None and not (hasattr(target, "sample") or hasattr(target, "reference")):
        source = read_command(folder / _COMMAND)["source"]
        raise InvalidInput(
            f"{source} has neither exact draws nor a reference to measure against: make trusted ones with `noisewise sample "
            "... -o RUN` and add --reference RUN"
        )
    trusted = None if reference is None else _read_draws(reference, target.dim)
    found = evaluate(sampler.sample(n, seed, refine), target, trusted, seed=seed)
    if as_json:
        measured = {name: one.to_dict() for name, one in found.items()}
        typer.echo(json.dumps({"n": n, "seed": seed, "refine": refine, "measurements": measured}, indent=2))
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
    Console().print(table)


def _placed(source: str) -> str:
    """`source` with the whole path of its file, so that it is found from any folder."""
    path, colon, name = source.rpartition(":")
    return f"{Path(path).resolve()}:{name}" if colon else source


def _claim(out: Path, command: dict[str, Any]) -> None:
    """Record the command of a new fit; refuse a folder that holds something else, or a fit by other options."""
    record = out / _COMMAND
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file; --out names a folder")
    if (out / _RUN).exists():
        if not record.is_file():
            raise RunFolderError(f"{out} holds no run of `noisewise neural fit`; choose another folder")
        _refuse_other(read_command(record), command, out)
        return
    if out.is_dir() and any(path.name != _COMMAND for path in out.iterdir()):
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
    console.print(f"report: {(out / _REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)


def _load(folder: Path, moved: str | None) -> "DiKLSampler":
    """The sampler of a finished or interrupted fit, on the target that it was trained on."""
    from noisewise.neural.dikl import DiKLSampler

    if not (folder / _COMMAND).is_file() or not (folder / _MODEL).is_dir():
        if (folder / _RUN).is_dir():
            raise RunFolderError(
                f"the fit in {folder} was cut short before it was saved: run the same fit command again to go on"
            )
        raise RunFolderError(f"{folder} holds no finished `noisewise neural fit`")
    command = read_command(folder / _COMMAND)
    source = command["source"] if moved is None else moved
    path, colon, _ = source.rpartition(":")
    if colon and not Path(path).is_file():
        raise RunFolderError(f"there is no file {path!r} any more: say where it is now, --target FILE.py:NAME")
    # before the file is run
    refuse_changed(command, source, folder)
    target = load_target(source, command["dim"])
    sampler = DiKLSampler.from_pretrained(folder / _MODEL, target)
    if sampler.interrupted_:
        warnings.warn(
            f"the fit in {folder} was interrupted: run the same fit command again to go on",
            NoisewiseWarning,
            stacklevel=3,
        )
    return sampler


def _as_npy(drawn: "torch.Tensor") -> bytes:
    import numpy as np

    file = io.BytesIO()
    np.save(file, drawn.numpy(), allow_pickle=False)
    return file.getvalue()


def _read_draws(path: Path, dim: int) -> "torch.Tensor":
    """Draws [n, dim] of a .npy file, or of a folder that `noisewise sample -o` wrote."""
    import numpy as np
    import torch

    if path.is_dir():
        from noisewise.sampling.draws import Draws

        positions = Draws.load(path / "draws").positions
        return positions.reshape(-1, positions.shape[-1])
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InvalidInput(f"--reference {path} cannot be read as a .npy file of numbers: {error}") from error
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.ndim != 2 or array.shape[1] != dim:
        found = f"{array.dtype} of shape {array.shape}" if isinstance(array, np.ndarray) else "several arrays"
        raise InvalidInput(f"--reference {path} holds {found}; needed are numbers of shape (draws, {dim})")
    return torch.as_tensor(array)
