"""`noisewise diffusion`: a covariance head for a diffusers pipeline; images, bounds and a comparison of samplers with it."""

import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from noisewise.command import (
    REPORT,
    RUN,
    SUMMARY,
    claim,
    interruptible,
    read_json,
    refuse_file,
    refuse_unfinished,
    typed,
)
from noisewise.errors import InvalidInput, NoisewiseWarning, require
from noisewise.files import write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    import torch

    from noisewise.diffusion.head import CovarianceHead
    from noisewise.diffusion.levels import NoiseLevels
    from noisewise.metrics.measurement import Measurement

__all__ = ["Covariance", "Kind", "Objective", "diffusion_app"]

_HEAD, _IMAGES, _SHEET, _RESULTS = "head", "images", "contact-sheet.png", "results.json"
# images that a fit needs; of them so many are held out, at most, and so many of those bounded
_LEAST, _MOST_HELD_OUT, _BOUNDED = 40, 500, 256
# steps of the bound of a fit, and the levels of its calibration as shares of T
_STEPS, _SHARES = 10, (0.1, 0.3, 0.6)
_BATCH, _ON_SHEET, _MAPPED = 64, 64, 6
# configurations of networks that take more than x_t and t
_CONDITIONED = ("cross_attention_dim", "num_class_embeds", "class_embed_type", "num_embeds_ada_norm")
# what the fixed variances are called in tables and in JSON
_FIXED = {"beta~": None, "beta": "large"}
# the samplers of diffusers: class, variance, spacing. DDIM steps by T // K whatever it visits, which only "trailing" suits
_PEERS = {
    "DDPM, beta~": ("DDPMScheduler", "fixed_small", "linspace"),
    "DDPM, beta": ("DDPMScheduler", "fixed_large", "linspace"),
    "DDIM": ("DDIMScheduler", "fixed_small", "trailing"),
    "DPM-Solver++": ("DPMSolverMultistepScheduler", "fixed_small", "linspace"),
    "UniPC": ("UniPCMultistepScheduler", "fixed_small", "linspace"),
}

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


@dataclass(frozen=True)
class _Loaded:
    """A pipeline of images without conditions: its network, its noise levels, and the shape of an image."""

    source: str
    pipeline: Any
    network: Any
    levels: "NoiseLevels"
    event: tuple[int, int, int]
    device: str

    def images(self, data: str, limit: int | None) -> "torch.Tensor":
        """[n, *event] in [-1, 1], on the device."""
        from noisewise.diffusion.images import read_images

        return read_images(data, self.event[0], self.event[1:], limit).to(self.device)

    def mark(self) -> float:
        """A number that other weights do not have."""
        from noisewise.training import fingerprint

        return fingerprint([weight[:64] for weight in self.network.parameters()])


@diffusion_app.command("fit")
def fit_command(
    model: Model,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the head, its report and its checkpoint.")],
    objective: Annotated[
        Objective, typer.Option(help="ocm: the paper's; ocm_residual, residual_nll: often the better bound.")
    ] = Objective.OCM,
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
        "limit": None if limit is None else check_count("--limit", limit, _LEAST),
        "seed": check_count("--seed", seed, 0),
    }
    most = None if max_seconds is None else check_positive("--max-seconds", max_seconds)
    if probes > 1 and objective not in (Objective.OCM, Objective.OCM_RESIDUAL):
        raise InvalidInput(
            f"--probes {probes} belongs to --objective ocm and would do nothing for {objective}: leave it out"
        )
    refuse_file(out)
    with interruptible("the same command goes on"):
        loaded = _load(model, device)
        images = loaded.images(data, limit)
        if len(images) < _LEAST:
            raise InvalidInput(f"{data!r} holds {len(images)} images: a fit needs at least {_LEAST}")
        claim(out, {"command": "fit", **_sources(loaded, data, images), **options}, (RUN, _HEAD))
        facts = _finished(out)
        if facts is None:
            facts = _fit(loaded, images, out, options, most)
            write_atomically(out / SUMMARY, json.dumps(facts, indent=2))
            if not facts["interrupted"]:
                facts |= _measure(loaded, _head(out, loaded), _split(images, seed)[1], seed)
                words = ["noisewise", "diffusion", "fit", model, data, "-o", str(out)]
                _write_page(loaded, out, images, facts, typed(words, options))
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
    from noisewise.diffusion.images import contact_sheet, read_images, write_images
    from noisewise.diffusion.scheduler import CovarianceScheduler

    loaded = _load(model, device)
    found = None if head is None else _head(head, loaded)
    scheduler = CovarianceScheduler.from_config(loaded.pipeline.scheduler.config, eta=eta)
    scheduler.set_timesteps(steps)
    options = {"n": n, "steps": steps, "eta": eta, "covariance": covariance.value, "seed": seed}
    marks = {"model": loaded.source, "weights": loaded.mark(), "head": None if found is None else _head_mark(found)}
    claim(out, {"command": "sample", **marks, **options}, (_IMAGES,))
    made = 0
    with interruptible("the same command goes on"):
        for first, size in _batches("images", n):
            names = [out / _IMAGES / f"{index:06d}.png" for index in range(first, first + size)]
            if all(name.is_file() for name in names):
                continue
            source: Any = "lanczos" if found is None else found
            write_images(out / _IMAGES, _ours(loaded, scheduler, source, size, steps, _seed_of(seed, first)), first)
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
    loaded = _load(model, device)
    found = _head(head, loaded)
    _check_steps(counts, loaded)
    images = loaded.images(data, most)
    with interruptible("nothing was kept"):
        table = {}
        for count in _shown("bounds, steps", counts):
            table[count] = _bounds(loaded, found, images, count, levels, seed)
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
    loaded = _load(model, device)
    found = _head(head, loaded)
    _check_steps(counts, loaded)
    images = loaded.images(data, most)
    if len(images) < 4:
        raise InvalidInput(f"{data!r} holds {len(images)} images: a distance and its floor need at least 4")
    n = min(n, len(images) // 2)
    if out is not None:
        marks = {"head": _head_mark(found), **_sources(loaded, data, images)}
        claim(out, {"command": "compare", **marks, "n": n, "seeds": seeds, "seed": seed}, (_RESULTS,))
    again = "nothing was kept: -o FOLDER keeps finished rows" if out is None else "the same command goes on"
    with interruptible(again):
        rows = _compare(loaded, found, images, counts, n, seeds, seed, out)
    if as_json:
        typer.echo(json.dumps({"images": len(images), "n": n, "seeds": seeds, "rows": rows}, indent=2))
        return
    _show_comparison(rows, n, seeds)


# --- what a command is given


def _load(source: str, device: str | None) -> _Loaded:
    """The pipeline in a folder, or of a hub id. Raises `InvalidInput` for one that this command line has no form of."""
    path = Path(source).expanduser()
    if path.is_dir():
        path = path.resolve()
        if not (path / "model_index.json").is_file():
            if not (path.parent / "model_index.json").is_file():
                raise InvalidInput(
                    f"{source!r} holds no model_index.json: give the folder that pipeline.save_pretrained wrote (a network "
                    "alone does not say the noise that it was trained with)"
                )
            path = path.parent
        name = str(path)
    elif path.exists():
        raise InvalidInput(f"{source!r} is a file; give the folder of a diffusers pipeline")
    elif source.startswith((".", "/", "~")) or source.count("/") != 1:
        raise InvalidInput(f"there is no folder {source!r}, and a hub id is OWNER/NAME")
    else:
        name = source
    library = require("diffusers", "diffusion")
    bars = require("diffusers.utils.logging", "diffusion")
    bars.disable_progress_bar()
    try:
        pipeline = library.DiffusionPipeline.from_pretrained(name)
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise InvalidInput(f"{source!r} cannot be loaded as a diffusers pipeline: {error}") from error
    finally:
        bars.enable_progress_bar()
    return _checked(name, pipeline, device)


def _checked(source: str, pipeline: Any, device: str | None) -> _Loaded:
    import torch

    from noisewise.diffusion.levels import NoiseLevels

    kind = type(pipeline).__name__
    network = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if network is None or getattr(pipeline, "scheduler", None) is None:
        raise InvalidInput(f"{kind} has no unet or transformer with a scheduler: a diffusion pipeline is needed")
    asked = [name for name in _CONDITIONED if network.config.get(name) is not None]
    if getattr(pipeline, "vae", None) is not None or asked:
        why = f"takes conditions ({', '.join(asked)})" if asked else "works on latents"
        raise InvalidInput(
            f"{kind} {why}; this command line is for pipelines of images without conditions. From Python: "
            "fit_covariance(model, head, (data, class_labels)), then generate(..., class_labels=...) or attach(pipeline, head)"
        )
    channels, size = network.config.get("in_channels"), network.config.get("sample_size")
    if channels is None or size is None:
        raise InvalidInput(f"{type(network).__name__} does not say its in_channels and sample_size")
    height, width = size if isinstance(size, list | tuple) else (size, size)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        network.to(torch.device(place)).eval()
    except (RuntimeError, AssertionError) as error:
        raise InvalidInput(f"--device {place} cannot be used: {str(error).splitlines()[0]}") from error
    levels = NoiseLevels.from_scheduler(pipeline.scheduler)
    return _Loaded(source, pipeline, network, levels, (int(channels), int(height), int(width)), place)


def _head(folder: Path, loaded: _Loaded) -> "CovarianceHead":
    """The head in `folder` or `folder`/head, checked against the network."""
    from noisewise.diffusion.head import CovarianceHead

    place = folder / _HEAD if (folder / _HEAD).is_dir() else folder
    if not (place / "config.json").is_file():
        refuse_unfinished(folder, "head of `noisewise diffusion fit`")
    head = CovarianceHead.from_pretrained(place)
    head.check_model(loaded.network, loaded.levels)
    summary = place.parent / SUMMARY
    if summary.is_file() and read_json(summary).get("interrupted"):
        warnings.warn(
            f"the fit in {place.parent} was interrupted: run the same fit command again to go on",
            NoisewiseWarning,
            stacklevel=3,
        )
    return head.to(loaded.device).eval()


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


def _check_steps(counts: list[int], loaded: _Loaded) -> None:
    if counts[-1] > len(loaded.levels):
        raise InvalidInput(f"--steps {counts[-1]} is more than the {len(loaded.levels)} levels that the model has")


# --- folders


def _sources(loaded: _Loaded, data: str, images: "torch.Tensor") -> dict[str, Any]:
    """What was read, so that the same command on other contents is told from the same command."""
    place = Path(data).expanduser()
    digest = hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()
    return {
        "model": loaded.source,
        "weights": loaded.mark(),
        "data": str(place.resolve()) if place.exists() else data,
        "images_sha256": digest,
    }


def _finished(out: Path) -> dict[str, Any] | None:
    """The summary of a fit of which nothing is left to do."""
    if not (out / SUMMARY).is_file() or not (out / REPORT).is_file():
        return None
    facts = read_json(out / SUMMARY)
    return None if facts["interrupted"] or facts["cut"] else facts


# --- fit


def _split(images: "torch.Tensor", seed: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Images to fit on, and held-out ones, by a fixed shuffle."""
    import torch

    held = min(max(_LEAST // 4, len(images) // 10), _MOST_HELD_OUT)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).to(images.device)
    return images[order[held:]], images[order[:held]]


def _fit(
    loaded: _Loaded, images: "torch.Tensor", out: Path, options: dict[str, Any], most: float | None
) -> dict[str, Any]:
    """Fit and save the head; what came of it, as JSON values."""
    from noisewise.diffusion.fitting import fit_covariance
    from noisewise.diffusion.head import CovarianceHead

    kept, held = _split(images, options["seed"])
    head = CovarianceHead.for_model(
        loaded.network, options["kind"], noise_schedule=loaded.levels, parity=options["objective"] == Objective.SN,
        seed=options["seed"],
    )  # fmt: skip
    result = fit_covariance(
        loaded.network, head, kept, options["objective"], noise_schedule=loaded.levels, probes=options["probes"],
        steps=options["steps"], batch_size=options["batch_size"], max_seconds=most, resume=out / RUN, progress=True,
        seed=options["seed"],
    )  # fmt: skip
    head.save_pretrained(out / _HEAD)
    looks = [entry for entry in result.history if entry["step"] == result.best_step]
    asked = 0 if options["objective"] == Objective.ANALYTIC else options["steps"]
    return {
        **options,
        "images": len(kept),
        "held_out_images": len(held),
        "parameters": sum(weight.numel() for weight in head.parameters()),
        "parameters_of_network": sum(weight.numel() for weight in loaded.network.parameters()),
        "steps_made": result.steps,
        "best_step": result.best_step,
        "held_out_loss": looks[-1]["validation"] if looks else None,
        "interrupted": result.interrupted,
        # by --max-seconds
        "cut": not result.interrupted and result.steps < asked,
        "cost": vars(result.cost),
    }


def _measure(loaded: _Loaded, head: "CovarianceHead", held: "torch.Tensor", seed: int) -> dict[str, Any]:
    """The bounds and the calibration of a head on images that it has not seen."""
    from noisewise.diffusion.uncertainty import calibration

    count = min(_STEPS, len(loaded.levels))
    bounds = _bounds(loaded, head, held[:_BOUNDED], count, 256, seed)
    found = [
        calibration(loaded.network, head, held, t, noise_schedule=loaded.levels, seed=seed)
        for t in sorted({round(share * (len(loaded.levels) - 1)) for share in _SHARES})
    ]
    return {
        "bound_steps": count,
        "bits_per_dim": {name: one.to_dict() for name, one in bounds.items()},
        "calibration": [vars(one) for one in found],
    }


def _bounds(
    loaded: _Loaded, head: "CovarianceHead", images: "torch.Tensor", steps: int, levels: int, seed: int
) -> "dict[str, Measurement]":
    """beta~, beta and the head at the same noises."""
    from noisewise.diffusion.likelihood import vlb_bits_per_dim

    return {
        name: vlb_bits_per_dim(
            loaded.network, images, chosen, steps, levels=levels, noise_schedule=loaded.levels, seed=seed
        )
        for name, chosen in {**_FIXED, "head": head}.items()
    }


def _write_page(loaded: _Loaded, out: Path, images: "torch.Tensor", facts: dict[str, Any], typed: str) -> None:
    import torch

    from noisewise.diffusion.fitting import frozen
    from noisewise.diffusion.model import DiffusionModel
    from noisewise.diffusion.pictures import calibration_plot, mean_variance_plot, uncertainty_plot
    from noisewise.diffusion.uncertainty import Calibration
    from noisewise.metrics.measurement import Measurement
    from noisewise.report import Report

    head = _head(out, loaded)
    report = Report("Covariance head", f"{facts['objective']}, {type(loaded.network).__name__}, {loaded.source}").code(
        typed
    )
    report.section("The bound on held-out images", (
        f"Bits per dimension of {facts['bits_per_dim']['head']['n']} images that the fit has not seen, in "
        f"{facts['bound_steps']} steps; lower is better. beta~ and beta are the fixed variances that a sampler takes without a "
        "head."
    ))  # fmt: skip
    rows = [[name, _value(Measurement.from_dict(one))] for name, one in facts["bits_per_dim"].items()]
    report.table(["variance", "bits/dim"], rows)
    if facts["cut"]:
        report.warning(f"--max-seconds ended the fit at step {facts['steps_made']} of {facts['steps']}.")
    report.section("Mean relative variance", (
        "How uncertain the network is on average, in units of the noise's variance: 0 is certain, 1 as uncertain as the noise. "
        "The two curves are one where the network is the exact posterior mean; a gap says that it is not."
    )).figure(mean_variance_plot(head), "Mean relative variance along the noise levels.")  # fmt: skip
    found = [
        Calibration(
            one["t"], tuple(one["predicted"]), tuple(one["observed"]), tuple(one["se"]), one["ratio"], one["ratio_se"]
        )
        for one in facts["calibration"]
    ]
    report.section("Calibration", (
        "Pixels of held-out images, sorted by the predicted variance into bins of equal number. Points on the line: the "
        "predicted variance is the squared error. Above it, the head is too sure."
    )).figure(calibration_plot(found), "Squared error of x0 against its predicted variance.")  # fmt: skip
    shown = _split(images, facts["seed"])[1][:_MAPPED]
    t = found[len(found) // 2].t
    generator = torch.Generator(shown.device).manual_seed(facts["seed"])
    a, s = loaded.levels.pair(t)
    noisy = a * shown + s * torch.randn(shown.shape, device=shown.device, generator=generator)
    with frozen(loaded.network), torch.no_grad():
        prediction = DiffusionModel(loaded.network, loaded.levels, head.config.site).predict(noisy, t)
        spread = head.clean_variance(prediction).clamp(min=0).sqrt()
    report.section("Where the network is uncertain").figure(
        uncertainty_plot(shown, noisy, prediction.clean, spread, t),
        "Held-out images, noised; what the network takes them for; how far each pixel may be off.",
    )
    report.save(out / REPORT)


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
    console.print(f"head:   {escape(str(out / _HEAD))}", soft_wrap=True, highlight=False)
    if (out / REPORT).is_file():
        console.print(f"report: {(out / REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)


# --- sampling


def _head_mark(head: "CovarianceHead") -> float:
    from noisewise.training import fingerprint

    return fingerprint([*head.parameters(), head.residual, head.gamma])


def _seed_of(seed: int, first: int) -> int:
    """A seed of its own for each batch."""
    return seed * 1_000_003 + first


def _batches(what: str, n: int) -> Iterator[tuple[int, int]]:
    """First index and size of each batch of n, with a word on how far it is."""
    for first in _shown(what, list(range(0, n, _BATCH))):
        yield first, min(_BATCH, n - first)


def _shown(what: str, items: list[int]) -> Iterator[int]:
    from noisewise.progress import Reporter

    with Reporter(True) as reporter:
        for place, item in enumerate(items):
            reporter.show(what, place, len(items), f"at {item}")
            yield item


def _ours(loaded: _Loaded, scheduler: Any, covariance: Any, n: int, steps: int, seed: int) -> "torch.Tensor":
    from noisewise.diffusion.generate import generate

    return generate(loaded.network, scheduler, (n, *loaded.event), steps, covariance, seed=seed)


def _theirs(loaded: _Loaded, name: str, n: int, steps: int, seed: int) -> "torch.Tensor":
    """Images by a sampler of diffusers."""
    import inspect

    import torch

    from noisewise.diffusion.fitting import frozen
    from noisewise.diffusion.model import declares_variance, first_channels, tensor_of

    scheduler = _peer(loaded, name)
    scheduler.set_timesteps(steps, device=loaded.device)
    generator = torch.Generator(loaded.device).manual_seed(seed)
    random = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = torch.randn((n, *loaded.event), device=loaded.device, generator=generator) * scheduler.init_noise_sigma
    with frozen(loaded.network), torch.no_grad():
        for t in scheduler.timesteps:
            # 2C channels would silently be taken for a larger image
            learned = loaded.levels.learned_variance or declares_variance(loaded.network, x)
            output = first_channels(tensor_of(loaded.network(scheduler.scale_model_input(x, t), t)), x, learned)
            x = scheduler.step(output, t, x, **random).prev_sample
    return x


def _peer(loaded: _Loaded, name: str) -> Any:
    kind, variance, spacing = _PEERS[name]
    config = dict(loaded.pipeline.scheduler.config)
    config |= {"timestep_spacing": spacing, "variance_type": variance, "_class_name": kind}
    return getattr(require("diffusers", "diffusion"), kind).from_config(config)


# --- compare


def _compare(
    loaded: _Loaded, head: "CovarianceHead", images: "torch.Tensor", counts: list[int], n: int, seeds: int, seed: int,
    out: Path | None,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each sampler and number of steps; finished rows are read from `out`."""
    from noisewise.progress import Reporter

    kept = {} if out is None or not (out / _RESULTS).is_file() else read_json(out / _RESULTS)
    samplers = _samplers(loaded, head)
    distance = _Distance.of(images, n, seed)
    rows: list[dict[str, Any]] = []
    with Reporter(True) as reporter:
        for count in counts:
            for name, (draw, bounded) in samplers.items():
                key = f"{name}, {count}"
                if key not in kept:
                    reporter.show("rows", len(rows), len(counts) * len(samplers), key)
                    row = _row(loaded, draw, distance, count, n, seeds, seed)
                    if bounded:
                        row["bits_per_dim"] = _bound(loaded, images[:_BOUNDED], bounded[0], count, seed)
                    kept[key] = {"sampler": name, "steps": count, **row}
                    if out is not None:
                        write_atomically(out / _RESULTS, json.dumps(kept, indent=2))
                rows.append(kept[key])
    return rows


Draw = Callable[[int, int, int], "torch.Tensor"]


def _samplers(loaded: _Loaded, head: "CovarianceHead") -> dict[str, tuple[Draw, tuple[Any, ...]]]:
    """`draw(n, steps, seed)` of each sampler, and the variance of its bound where it has one."""
    from noisewise.diffusion.scheduler import CovarianceScheduler

    def peer(name: str) -> Draw:
        return lambda n, steps, seed: _theirs(loaded, name, n, steps, seed)

    def own(eta: float | None) -> Draw:
        scheduler = CovarianceScheduler.from_config(loaded.pipeline.scheduler.config, eta=eta)
        return lambda n, steps, seed: _ours(loaded, scheduler, head, n, steps, seed)

    found: dict[str, tuple[Draw, tuple[Any, ...]]] = {}
    for name in _PEERS:
        fixed = name.removeprefix("DDPM, ")
        found[name] = (peer(name), (_FIXED[fixed],) if fixed in _FIXED else ())
    found["head, DDPM"] = (own(None), (head,))
    found["head, eta 0"] = (own(0.0), ())
    return found


@dataclass(frozen=True)
class _Distance:
    """Squared MMD of pixels to some images, one bandwidth for all, and the score of as many other images."""

    reference: "torch.Tensor"
    bandwidth: float
    floor: float

    @classmethod
    def of(cls, images: "torch.Tensor", n: int, seed: int) -> "_Distance":
        import torch

        from noisewise.metrics.distances import mmd2
        from noisewise.metrics.floors import sample_floor

        flat = images.flatten(1).double().cpu()
        # mean squared distance of two different images
        bandwidth = max(float(2 * flat.var(0).sum()), 1e-12)
        floor = sample_floor(lambda x, y: mmd2(x, y, bandwidth=bandwidth), flat, n, seed=seed)
        order = torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))
        return cls(flat[order[: len(flat) - n]], bandwidth, floor.mean)

    def __call__(self, x: "torch.Tensor") -> float:
        """Of images on [-1, 1], clipped as a file would be."""
        from noisewise.metrics.distances import mmd2

        drawn = x.flatten(1).double().cpu().clamp(-1, 1)
        return float(mmd2(drawn, self.reference, bandwidth=self.bandwidth))


def _row(loaded: _Loaded, draw: Draw, distance: _Distance, steps: int, n: int, seeds: int, seed: int) -> dict[str, Any]:
    """Distance, calls and seconds of one sampler, over seeds."""
    import torch

    from noisewise.metrics.measurement import Measurement

    calls = 0

    def count(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal calls
        calls += len(inputs[0])

    hook = loaded.network.register_forward_hook(count)
    start = time.perf_counter()
    try:
        values = []
        for repeat in range(seeds):
            starts = range(0, n, _BATCH)
            drawn = [draw(min(_BATCH, n - first), steps, _seed_of(seed + repeat, first)) for first in starts]
            values.append(distance(torch.cat(drawn)))
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    found = torch.tensor(values, dtype=torch.float64)
    se = float(found.std() / seeds**0.5) if seeds > 1 else None
    measured = Measurement(float(found.mean()), se, distance.floor, n=n)
    return {"mmd2": measured.to_dict(), "calls_per_image": calls / (n * seeds), "seconds": seconds / seeds}


def _bound(loaded: _Loaded, images: "torch.Tensor", covariance: Any, steps: int, seed: int) -> dict[str, Any]:
    from noisewise.diffusion.likelihood import vlb_bits_per_dim

    return vlb_bits_per_dim(
        loaded.network, images, covariance, steps, noise_schedule=loaded.levels, seed=seed
    ).to_dict()


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
