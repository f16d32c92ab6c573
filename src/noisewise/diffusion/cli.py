"""`noisewise diffusion`: a covariance head for a diffusers pipeline; images, bounds and a comparison of samplers with it."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from noisewise.command import REPORT, RUN, SUMMARY, claim, interruptible, refuse_file, typed
from noisewise.diffusion.keeping import HEAD, LEAST, RESULTS, finished
from noisewise.errors import InvalidInput
from noisewise.files import write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    from noisewise.diffusion.loaded import Loaded
    from noisewise.metrics.measurement import Measurement

__all__ = ["Covariance", "Kind", "Objective", "diffusion_app"]

_IMAGES, _SHEET = "images", "contact-sheet.png"
# images on a sheet
_ON_SHEET = 64

diffusion_app = typer.Typer(
    no_args_is_help=True, help="Learn how uncertain a diffusion model is; sample, bound and compare with it."
)


class Objective(StrEnum):
    """What the head learns: the paper's diagonal, the better bound, the two baselines, or a table alone."""

    OCM = "ocm"
    OCM_RESIDUAL = "ocm_residual"
    RESIDUAL_NLL = "residual_nll"
    NPR = "npr"
    SN = "sn"
    ANALYTIC = "analytic"


class Kind(StrEnum):
    """The head: one convolution, or a residual block that knows the time before it."""

    SIMPLE = "simple"
    COMPLEX = "complex"


class Covariance(StrEnum):
    """The diagonal that the head gives, or the whole matrix by backward passes."""

    DIAG = "diag"
    LANCZOS = "lanczos"


Model = Annotated[str, typer.Argument(help="Folder of a diffusers pipeline (or of its network in it), or a hub id.")]
Data = Annotated[
    str, typer.Argument(help="Folder of images, .npy array (uint8, or floats in [0, 1] or [-1, 1]), or NAME:SPLIT.")
]
HeadFolder = Annotated[Path, typer.Option("--head", help="OUT or OUT/head of `noisewise diffusion fit`.")]
Limit = Annotated[int | None, typer.Option(help="Read at most so many images.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="cuda where there is one")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


@diffusion_app.command("fit")
def fit_command(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the head, its report and its checkpoint.")],
    objective: Annotated[
        Objective, typer.Option(help="residual_nll: the best bounds in our comparison; ocm: the paper's.")
    ] = Objective.RESIDUAL_NLL,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 5000,
    kind: Annotated[Kind, typer.Option(help="complex: one residual block more.")] = Kind.SIMPLE,
    probes: Annotated[int, typer.Option(help="ocm: random signs, a backward pass each.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Images of a training step.")] = 128,
    max_seconds: Annotated[
        float | None, typer.Option(help="Stop training after so many seconds; the same command goes on.")
    ] = None,
    limit: Limit = None,
    device: Device = None,
    seed: Seed = 0,
    as_json: JsonFlag = False,
) -> None:
    """Fit a covariance head to MODEL on DATA; the same command again goes on after a crash, Ctrl-C or --max-seconds."""
    options: dict[str, Any] = {
        "objective": objective.value,
        "steps": check_count("--steps", steps),
        "kind": kind.value,
        "probes": check_count("--probes", probes),
        "batch_size": check_count("--batch-size", batch_size),
        "limit": None if limit is None else check_count("--limit", limit, LEAST),
        "seed": check_count("--seed", seed, 0),
    }
    most = None if max_seconds is None else check_positive("--max-seconds", max_seconds)
    if probes > 1 and objective not in (Objective.OCM, Objective.OCM_RESIDUAL):
        raise InvalidInput(
            f"--probes {probes} belongs to --objective ocm and would do nothing for {objective}: leave it out"
        )
    refuse_file(out)
    with interruptible("the same command goes on"):
        from noisewise.diffusion.head_fits import fit_head, measure, split, write_page
        from noisewise.diffusion.loaded import load_head, load_pipeline

        loaded = load_pipeline(model, device)
        images = loaded.images(data, limit)
        if len(images) < LEAST:
            raise InvalidInput(f"{data!r} holds {len(images)} images: a fit needs at least {LEAST}")
        claim(out, {"command": "fit", **loaded.sources(data, images), **options}, (RUN, HEAD))
        facts = finished(out)
        if facts is None:
            facts = fit_head(loaded, images, out, options, most)
            write_atomically(out / SUMMARY, json.dumps(facts, indent=2))
            if not facts["interrupted"]:
                facts |= measure(loaded, load_head(out, loaded), split(images, seed)[1], seed)
                words = ["noisewise", "diffusion", "fit", model, data, "-o", str(out)]
                write_page(loaded, out, images, facts, typed(words, options))
                write_atomically(out / SUMMARY, json.dumps(facts, indent=2))
    _show_fit(facts, out, as_json)
    if facts["interrupted"]:
        typer.echo(f"interrupted at step {facts['steps_made']} of {steps}; the same command goes on", err=True)
        raise typer.Exit(130)


@diffusion_app.command("sample")
def sample_command(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for images/, a contact sheet and the command.")],
    head: Annotated[Path | None, typer.Option("--head", help="OUT or OUT/head of `noisewise diffusion fit`.")] = None,
    n: Annotated[int, typer.Option("-n", help="Images.")] = 64,
    steps: Annotated[int, typer.Option(help="Network calls for each image.")] = 20,
    eta: Annotated[
        float | None,
        typer.Option(
            help="DDIM's form, in [0, 1]; 0 still has the noise of the covariance.", show_default="DDPM's form"
        ),
    ] = None,
    covariance: Annotated[
        Covariance, typer.Option(help="lanczos needs no head, and three backward passes a step.")
    ] = Covariance.DIAG,
    device: Device = None,
    seed: Seed = 0,
    as_json: JsonFlag = False,
) -> None:
    """Draw images with the covariance of a head; the same command again goes on with what is missing."""
    n, steps, seed = check_count("-n", n), check_count("--steps", steps, 2), check_count("--seed", seed, 0)
    _check_covariance(head, covariance)
    refuse_file(out)
    from noisewise.diffusion.comparing import ours, seed_of
    from noisewise.diffusion.images import contact_sheet, read_images, write_images
    from noisewise.diffusion.loaded import head_mark, load_head, load_pipeline
    from noisewise.diffusion.scheduler import CovarianceScheduler

    loaded = load_pipeline(model, device)
    found = None if head is None else load_head(head, loaded)
    scheduler = CovarianceScheduler.from_config(loaded.pipeline.scheduler.config, eta=eta)
    scheduler.set_timesteps(steps)
    options = {"n": n, "steps": steps, "eta": eta, "covariance": covariance.value, "seed": seed}
    marks = {"model": loaded.source, "weights": loaded.mark(), "head": None if found is None else head_mark(found)}
    claim(out, {"command": "sample", **marks, **options}, (_IMAGES,))
    made = 0
    with interruptible("the same command goes on"):
        for first, size in _batches("images", n):
            names = [out / _IMAGES / f"{index:06d}.png" for index in range(first, first + size)]
            if all(name.is_file() for name in names):
                continue
            source: Any = "lanczos" if found is None else found
            write_images(out / _IMAGES, ours(loaded, scheduler, source, size, steps, seed_of(seed, first)), first)
            made += size
        kept = read_images(out / _IMAGES, loaded.event[0], loaded.event[1:], _ON_SHEET)
        (sheet,) = write_images(out / f".{_SHEET}", contact_sheet(kept))
        sheet.replace(out / _SHEET)
        sheet.parent.rmdir()
    if as_json:
        facts = {"n": n, "made_now": made, "images": str(out / _IMAGES), "sheet": str(out / _SHEET), **options}
        typer.echo(json.dumps(facts, indent=2))
    else:
        said = f"{n} images" if made == n else f"{n} images, {made} of them new"
        typer.echo(f"{said}, {steps} network calls each: {out / _IMAGES}\nsheet: {out / _SHEET}")


@diffusion_app.command("nll")
def nll_command(
    model: Model,
    data: Data,
    head: HeadFolder,
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas.")] = "5,10,20",
    levels: Annotated[int, typer.Option(help="Grey levels of the images between black and white.")] = 256,
    limit: Limit = 256,
    device: Device = None,
    seed: Seed = 0,
    as_json: JsonFlag = False,
) -> None:
    """Bound -log2 p of the images of DATA, which the head must not have seen, beside the two fixed variances."""
    counts = _counts(steps)
    levels, seed = check_count("--levels", levels, 2), check_count("--seed", seed, 0)
    most = None if limit is None else check_count("--limit", limit)
    from noisewise.diffusion.head_fits import bounds_of
    from noisewise.diffusion.loaded import load_head, load_pipeline, warn_seen

    loaded = load_pipeline(model, device)
    found = load_head(head, loaded)
    _check_steps(counts, loaded)
    images = loaded.images(data, most)
    warn_seen(head, images)
    with interruptible("nothing was kept"):
        table = {}
        for count in _shown("bounds, steps", counts):
            table[count] = bounds_of(loaded, found, images, count, levels, seed)
    if as_json:
        rows = {str(count): {name: one.to_dict() for name, one in row.items()} for count, row in table.items()}
        typer.echo(json.dumps({"images": len(images), "levels": levels, "bits_per_dim": rows}, indent=2))
        return
    shown = Table("steps", *(f"{name} ↓" for name in next(iter(table.values()))), title_justify="left",
                  title=f"bits/dim of {len(images)} images ± se")  # fmt: skip
    for count, row in table.items():
        shown.add_row(f"{count}", *(_value(one) for one in row.values()))
    Console().print(shown)


@diffusion_app.command("compare")
def compare_command(
    model: Model,
    data: Data,
    head: HeadFolder,
    steps: Annotated[str, typer.Option(help="Numbers of steps, with commas.")] = "5,10,20",
    n: Annotated[int, typer.Option("-n", help="Images of each sampler and seed; at most half of DATA.")] = 256,
    seeds: Annotated[int, typer.Option(help="Repetitions of the sampling.")] = 3,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder that keeps finished rows; the same command goes on there."),
    ] = None,
    limit: Limit = 2000,
    device: Device = None,
    seed: Seed = 0,
    as_json: JsonFlag = False,
) -> None:
    """Samplers of diffusers beside ours, on MODEL: bound, distance to the images of DATA, network calls and seconds."""
    counts, seeds, seed = _counts(steps), check_count("--seeds", seeds), check_count("--seed", seed, 0)
    n, most = check_count("-n", n, 2), None if limit is None else check_count("--limit", limit, 4)
    if out is not None:
        refuse_file(out)
    from noisewise.diffusion.comparing import compare
    from noisewise.diffusion.loaded import head_mark, load_head, load_pipeline, warn_seen

    loaded = load_pipeline(model, device)
    found = load_head(head, loaded)
    _check_steps(counts, loaded)
    images = loaded.images(data, most)
    warn_seen(head, images)
    if len(images) < 4:
        raise InvalidInput(f"{data!r} holds {len(images)} images: a distance and its floor need at least 4")
    n = min(n, len(images) // 2)
    if out is not None:
        marks = {"head": head_mark(found), **loaded.sources(data, images)}
        claim(out, {"command": "compare", **marks, "n": n, "seeds": seeds, "seed": seed}, (RESULTS,))
    again = "nothing was kept: -o FOLDER keeps finished rows" if out is None else "the same command goes on"
    with interruptible(again):
        rows = compare(loaded, found, images, counts, n, seeds, seed, out)
    if as_json:
        typer.echo(json.dumps({"images": len(images), "n": n, "seeds": seeds, "rows": rows}, indent=2))
        return
    _show_comparison(rows, n, seeds)


# --- what a command is given


def _check_covariance(head: Path | None, covariance: Covariance) -> None:
    if covariance is Covariance.DIAG and head is None:
        raise InvalidInput(
            "--head is needed: the folder of `noisewise diffusion fit`; only --covariance lanczos can go without"
        )
    if covariance is Covariance.LANCZOS and head is not None:
        raise InvalidInput(
            "--covariance lanczos takes its matrix from the network and would not read --head: leave one out"
        )


def _counts(text: str) -> list[int]:
    """Numbers of steps out of "5,10,20"."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise InvalidInput(f"--steps must be whole numbers with commas, such as 5,10,20, got {text!r}")
    return sorted({check_count("--steps", int(part), 2) for part in parts})


def _check_steps(counts: list[int], loaded: "Loaded") -> None:
    if counts[-1] > len(loaded.levels):
        raise InvalidInput(f"--steps {counts[-1]} is more than the {len(loaded.levels)} levels that the model has")


# --- what a command shows


def _show_fit(facts: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from noisewise.metrics.measurement import Measurement

    console = Console()
    share = facts["parameters"] / facts["parameters_of_network"]
    loss = facts["held_out_loss"]
    table = Table(show_header=False, box=None)
    table.add_row(
        "[bold]head[/bold]", f"{facts['objective']}, {facts['kind']}, {share:.2%} of the network's parameters"
    )
    steps = f"{facts['steps_made']} steps, the best {facts['best_step']}, {facts['images']} images"
    table.add_row("[bold]fit[/bold]", "tables only" if facts["objective"] == Objective.ANALYTIC else steps)
    table.add_row("[bold]held-out loss[/bold]", "none" if loss is None else f"{loss:.4g}")
    for name, one in facts.get("bits_per_dim", {}).items():
        said = f"{_value(Measurement.from_dict(one))} bits/dim in {facts['bound_steps']} steps"
        table.add_row(f"[bold]bound, {name}[/bold]", said)
    console.print(table)
    if facts["cut"]:
        console.print(
            f"--max-seconds ended the fit at step {facts['steps_made']} of {facts['steps']}; the same command goes on"
        )
    console.print(f"head:   {escape(str(out / HEAD))}", soft_wrap=True, highlight=False)
    if (out / REPORT).is_file():
        console.print(f"report: {(out / REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)


def _batches(what: str, n: int) -> Iterator[tuple[int, int]]:
    """First index and size of each batch of n, with a word on how far it is."""
    from noisewise.diffusion.comparing import BATCH

    for first in _shown(what, list(range(0, n, BATCH))):
        yield first, min(BATCH, n - first)


def _shown(what: str, items: list[int]) -> Iterator[int]:
    from noisewise.progress import Reporter

    with Reporter(True) as reporter:
        for place, item in enumerate(items):
            reporter.show(what, place, len(items), f"at {item}")
            yield item


def _show_comparison(rows: list[dict[str, Any]], n: int, seeds: int) -> None:
    from noisewise.metrics.measurement import Measurement, format_value

    title = f"{n} images for each of {seeds} seeds, ± se; without a head: of diffusers"
    table = Table("sampler", "steps", "bits/dim ↓", "MMD² ↓", "calls", "seconds", title=title, title_justify="left")
    for row in rows:
        bound, distance = row.get("bits_per_dim"), Measurement.from_dict(row["mmd2"])
        table.add_row(
            row["sampler"],
            f"{row['steps']}",
            "–" if bound is None else _value(Measurement.from_dict(bound)),
            _value(distance),
            f"{row['calls_per_image']:g}",
            f"{row['seconds']:.2g}",
            end_section=row["sampler"] == rows[-1]["sampler"],
        )
    floor = Measurement.from_dict(rows[0]["mmd2"]).floor
    if floor is not None:
        table.add_row("data, as many", "", "", format_value(floor), "", "", style="dim")
    console = Console()
    console.print(table)
    console.print(
        "The bound is one of the stochastic samplers, with either fixed variance and with the head; the others have none. "
        "MMD² of pixels sees brightness and shapes, not details: for large images measure features.",
        highlight=False,
    )


def _value(one: "Measurement") -> str:
    from noisewise.metrics.measurement import format_value

    return format_value(one.value, one.se)
