"""`noisewise sequence`: a model of labelled sequences out of a file, its scores, answers and graph; ListOps to try it on."""

import csv
import hashlib
import io
import json
import warnings
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
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.files import write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    from torch import Tensor

    from noisewise.sequence.preparation import Preparation
    from noisewise.sequence.readers import Sequences

__all__ = ["KernelKind", "Precision", "ScaleBy", "Task", "sequence_app"]

_MODEL = "model"
_LEAST_TRAINED = 2
# what `from_pretrained` needs to be there
_KEPT = ("config.json", "preparation.json")
# options of `fit` that are not typed again where they are as usual
_USUAL = {
    "task": "classification", "kind": "fourier", "kernel_size": 32, "width": 64, "layers": 4, "patch": 1, "dropout": 0.0,
    "epochs": 20.0, "batch_size": 32, "lr": 1e-2, "kernel_lr": 1e-3, "weight_decay": 0.05, "validation": 0.1,
    "scale": "data", "precision": "no", "seed": 0,
}  # fmt: skip

sequence_app = typer.Typer(
    no_args_is_help=True,
    help="Fit a model of long signals, score it, let it answer, export it as one graph; draw ListOps.",
)


class Task(StrEnum):
    """Whether labels are classes or values."""

    CLASSIFICATION = "classification"
    REGRESSION = "regression"


class KernelKind(StrEnum):
    """What sub-kernels are made of."""

    FOURIER = "fourier"
    DILATED = "dilated"
    SPARSE = "sparse"
    FOURIER_SPARSE = "fourier+sparse"
    DENSE = "dense"


class ScaleBy(StrEnum):
    """What signals are brought to mean 0 and standard deviation 1 by: the training rows, each row itself, or nothing."""

    DATA = "data"
    ROW = "row"
    NONE = "none"


class Precision(StrEnum):
    """Of the training: float32, or bfloat16 where that loses nothing."""

    NO = "no"
    BF16 = "bf16"


Data = Annotated[
    Path,
    typer.Argument(
        help=".npz of X and y, or of sequences end to end with offsets; .ts of the UCR and UEA archives; or a folder with a "
        "folder of WAV files for each class."
    ),
]
ModelFolder = Annotated[Path, typer.Argument(help="OUT or OUT/model of `noisewise sequence fit`.")]
Label = Annotated[str | None, typer.Option(help="Column of an .npz file that holds the labels.", show_default="y")]
Group = Annotated[str | None, typer.Option(help="Column of an .npz file that groups the rows, such as their speakers.")]
TestGroup = Annotated[
    list[str] | None, typer.Option("--test-group", help="A group that the fit must not see; may be given again.")
]
Mono = Annotated[bool, typer.Option("--mono", help="Take the mean of the channels.")]
BatchSize = Annotated[int, typer.Option(help="Rows at once; it matters for the speed alone.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...", show_default="cuda where there is one")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


@sequence_app.command("fit")
def fit_command(
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model, its report and its checkpoint.")],
    length: Annotated[
        int | None, typer.Option(help="Cut or fill all rows to so many steps.", show_default="the longest row")
    ] = None,
    task: Annotated[Task, typer.Option(help="Classes or values.")] = Task.CLASSIFICATION,
    kind: Annotated[
        KernelKind, typer.Option(help="fourier for smooth signals, dilated or sparse for symbols.")
    ] = KernelKind.FOURIER,
    kernel_size: Annotated[int, typer.Option(help="Lags of the shortest sub-kernel.")] = 32,
    width: Annotated[int, typer.Option(help="Channels of the model.")] = 64,
    layers: Annotated[int, typer.Option(help="Residual blocks.")] = 4,
    patch: Annotated[int, typer.Option(help="Samples that enter as one step.")] = 1,
    bidirectional: Annotated[
        bool,
        typer.Option(
            "--bidirectional/--causal",
            help="Whether layers look ahead too, as those of SequenceClassifier do unless told otherwise.",
        ),
    ] = False,
    dropout: Annotated[float, typer.Option(help="Share of channels.")] = 0.0,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = 20.0,
    batch_size: Annotated[int, typer.Option(help="Rows of a training step.")] = 32,
    lr: Annotated[float, typer.Option(help="Largest learning rate.")] = 1e-2,
    kernel_lr: Annotated[float, typer.Option(help="That of the sub-kernels; raise it for short fits.")] = 1e-3,
    weight_decay: Annotated[float, typer.Option(help="Of all but the sub-kernels.")] = 0.05,
    validation: Annotated[float, typer.Option(help="Share of the rows that choose the best step.")] = 0.1,
    scale: Annotated[ScaleBy, typer.Option(help="row: for recordings of unknown loudness.")] = ScaleBy.DATA,
    label: Label = None,
    group: Group = None,
    test_group: TestGroup = None,
    rate: Annotated[float | None, typer.Option(help="Resample recordings to so many samples a second.")] = None,
    mono: Mono = False,
    tokens: Annotated[
        bool | None,
        typer.Option(
            "--tokens/--samples", help="What whole numbers are.", show_default="tokens where none is negative"
        ),
    ] = None,
    precision: Annotated[Precision, typer.Option(help="bf16: mixed precision.")] = Precision.NO,
    max_seconds: Annotated[
        float | None, typer.Option(help="Stop training after so many seconds; the same command goes on.")
    ] = None,
    device: Device = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Fit a model to DATA; the same command again goes on after a crash, Ctrl-C or --max-seconds."""
    options: dict[str, Any] = {
        "length": None if length is None else check_count("--length", length),
        "task": task.value,
        "kind": kind.value,
        "kernel_size": check_count("--kernel-size", kernel_size, 2),
        "width": check_count("--width", width),
        "layers": check_count("--layers", layers),
        "patch": check_count("--patch", patch),
        "bidirectional": bidirectional,
        "dropout": _share("--dropout", dropout),
        "epochs": check_positive("--epochs", epochs),
        "batch_size": check_count("--batch-size", batch_size),
        "lr": check_positive("--lr", lr),
        "kernel_lr": check_positive("--kernel-lr", kernel_lr),
        "weight_decay": weight_decay,
        "validation": _share("--validation", validation),
        "scale": scale.value,
        "label": label,
        "group": group,
        "test_group": sorted(set(test_group or ())),
        "rate": None if rate is None else check_positive("--rate", rate),
        "mono": mono,
        "tokens": tokens,
        "precision": precision.value,
        "seed": check_count("--seed", seed, 0),
    }
    most = None if max_seconds is None else check_positive("--max-seconds", max_seconds)
    place = _device(device)
    refuse_file(out)
    from noisewise.sequence.fits import fit_rows, split

    with interruptible("the same command goes on"):
        everything = _read(data, options)
        train, test = _parted(everything, data, group, options["test_group"])
        kept, _ = split(len(train), options["validation"], options["seed"])
        marks = {"data": str(data.expanduser().resolve()), "data_sha256": _digest(everything)}
        claim(out, {"command": "fit", **marks, **options}, (RUN, _MODEL))
        facts = _finished(out)
        if facts is None:
            _say_how_long(train, len(kept), options)
            facts = {**fit_rows(train, test, out, options, _form(options), most, place), "data": str(data)}
            _write_page(facts, out, _typed(data, out, options))
            write_atomically(out / SUMMARY, json.dumps(facts, indent=2))
    _show_fit(facts, out, as_json)
    if facts["interrupted"]:
        said = f"interrupted at step {facts['steps']} of {facts['steps_asked']}; the same command goes on to the same model"
        typer.echo(said, err=True)
        raise typer.Exit(130)


@sequence_app.command("evaluate")
def evaluate_command(
    model: ModelFolder,
    data: Data,
    label: Label = None,
    group: Group = None,
    test_group: Annotated[
        list[str] | None, typer.Option("--test-group", help="Only the rows of this group; may be given again.")
    ] = None,
    mono: Mono = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    as_json: JsonFlag = False,
) -> None:
    """Score a fitted model on DATA, as it was trained and merged to one kernel a layer, with its speed."""
    from noisewise.sequence.fits import notes_of_scores, scores_of
    from noisewise.sequence.scores import answers_of

    batch_size, place = check_count("--batch-size", batch_size), _device(device)
    with interruptible("nothing was kept"):
        whole, preparation = _load(model, place)
        found = preparation.read_again(data, label=label, group=group, mono=mono or None)
        if test_group:
            _, chosen = _parted(found, data, group or (preparation.read or {}).get("group"), sorted(set(test_group)), 0)
            assert chosen is not None
            found = chosen
        inputs = preparation.inputs(found)
        facts: dict[str, Any] = {
            "rows": len(found),
            "cut_rows": int(found.cut.sum()),
            "classes": list(preparation.classes),
        }
        merged = whole.merge()
        answers = {
            name: answers_of(one, inputs, batch_size, progress=True)
            for name, one in (("trained", whole), ("merged", merged))
        }
        for name, one in answers.items():
            scores, table = scores_of(preparation, one.output, found)
            facts[name] = {
                "scores": {key: value.to_dict() for key, value in scores.items()},
                "seconds_per_row": one.seconds,
            }
            facts["confusion"] = table
        facts["largest_difference"] = float((answers["trained"].output - answers["merged"].output).abs().max())
        facts["warnings"] = notes_of_scores(scores, "scored")
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _show_scores(facts)


@sequence_app.command("predict")
def predict_command(
    model: ModelFolder,
    data: Annotated[
        Path,
        typer.Argument(help="As for fit, but labels are not needed: WAV files anywhere in a folder, or one of them."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="FILE.csv for a line for each row.")],
    mono: Mono = False,
    batch_size: BatchSize = 64,
    device: Device = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer rows of DATA: the likeliest class and the probability of each, or the value, by the merged model."""
    if out.suffix != ".csv":
        raise InvalidInput(f"--out {out} must end in .csv")
    from noisewise.sequence.scores import answers_of

    batch_size, place = check_count("--batch-size", batch_size), _device(device)
    with interruptible("nothing was written"):
        whole, preparation = _load(model, place)
        found = preparation.read_again(data, mono=mono or None, labelled=False)
        answers = answers_of(whole.merge(), preparation.inputs(found), batch_size, progress=True)
        names, rows = _answered(found, preparation, answers.output)
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([names, *rows])
        write_atomically(out, file.getvalue())
    facts: dict[str, Any] = {
        "out": str(out),
        "rows": len(found),
        "cut_rows": int(found.cut.sum()),
        "seconds_per_row": answers.seconds,
    }
    if preparation.classes:
        answered = [row[1] for row in rows]
        facts["counts"] = {name: answered.count(name) for name in preparation.classes}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    cut = (
        f", {facts['cut_rows']} of them cut to the {preparation.length} steps of the model" if facts["cut_rows"] else ""
    )
    typer.echo(f"{len(found)} rows{cut}: {out}")
    for name, count in facts.get("counts", {}).items():
        typer.echo(f"{name}: {count}")


@sequence_app.command("export")
def export_command(
    model: ModelFolder,
    out: Annotated[Path, typer.Argument(help="FILE.onnx, or FILE.pt2 for torch.export.load.")],
    as_json: JsonFlag = False,
) -> None:
    """Write the merged model, scaling of the data included, as one graph for rows of its whole length."""
    if out.suffix not in (".onnx", ".pt2"):
        raise InvalidInput(f"{out} must end in .onnx or .pt2")
    from noisewise.sequence.export import export_onnx, export_program
    from noisewise.sequence.preparation import Prepared

    with interruptible("nothing was written"):
        whole, preparation = _load(model, "cpu")
        graph = Prepared(whole.merge(), preparation).eval()
        (export_onnx if out.suffix == ".onnx" else export_program)(graph, graph.example(), out)
    if preparation.ragged:
        warnings.warn(
            "the model was fitted to rows of unequal length and minds where each ends, the graph does not: give it rows of the "
            "whole length; shorter ones filled with zeros are scored otherwise than by `noisewise sequence evaluate`",
            NoisewiseWarning,
            stacklevel=2,
        )
    facts = {"out": str(out), **_interface(preparation, named=out.suffix == ".onnx")}
    if as_json:
        typer.echo(json.dumps({**facts, "classes": list(preparation.classes)}, indent=2))
        return
    given, made = facts["input"], facts["output"]
    row = ", ".join(map(str, facts["row"]))
    typer.echo(
        f"{out}\n"
        f"input {given['name'] or '(the first argument)'}: {given['dtype']} of shape (rows, {row}), any number of rows, all so "
        "long\n"
        f"samples: {given['samples']}" + (f", {given['rate']:g} a second" if given["rate"] else "") + "\n"
        f"output {made['name'] or '(the result)'}: {made['dtype']} of shape (rows, {made['width']}), {made['meaning']}"
    )


@sequence_app.command("listops")
def listops_command(
    out: Annotated[Path, typer.Argument(help="FILE.npz for X, y and lengths.")],
    n: Annotated[int, typer.Option("--n", "-n", help="Sequences, all different.")] = 10_000,
    min_length: Annotated[int, typer.Option(help="All are longer.")] = 500,
    max_length: Annotated[int, typer.Option(help="All are shorter.")] = 2000,
    max_depth: Annotated[int, typer.Option(help="Levels of an expression, digits included.")] = 10,
    max_args: Annotated[int, typer.Option(help="Most arguments of an operator.")] = 10,
    seed: Annotated[int, typer.Option(help="The same sequences on every machine.")] = 0,
    as_json: JsonFlag = False,
) -> None:
    """Draw ListOps expressions with their values, by the rules of the Long Range Arena."""
    if out.suffix != ".npz":
        raise InvalidInput(f"{out} must end in .npz")
    import numpy as np

    from noisewise.sequence import listops

    with interruptible("nothing was written"):
        codes, values, lengths = listops.arrays(n, min_length, max_length, max_depth, max_args, seed)
        file = io.BytesIO()
        np.savez_compressed(file, X=codes.astype(np.uint8), y=values, lengths=lengths)
        write_atomically(out, file.getvalue())
    counts = np.bincount(values, minlength=10)
    facts = {"n": n, "out": str(out), "lengths": [int(lengths.min()), int(lengths.max())], "counts": counts.tolist()}
    if as_json:
        typer.echo(json.dumps({**facts, "vocabulary": list(listops.VOCABULARY)}, indent=2))
        return
    typer.echo(
        f"{n} expressions of {lengths.min()} to {lengths.max()} tokens: {out}\n"
        f"the most frequent value, {counts.argmax()}, has {counts.max() / n:.1%} of them"
    )


# --- what a command is given


def _share(name: str, value: float) -> float:
    if not 0 <= value < 1:
        raise InvalidInput(f"{name} must be in [0, 1), got {value!r}")
    return value


def _device(device: str | None) -> str:
    """The name of a device that works."""
    import torch

    known = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    place = device or ("cuda" if known["cuda"] else "cpu")
    try:
        # "meta" holds no numbers to bring back
        torch.empty(1, device=place).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        works = " or ".join(name for name, there in known.items() if there)
        raise InvalidInput(f"--device {place} cannot be used here: leave it out, or give {works}") from error
    return place


def _read(data: Path, options: dict[str, Any]) -> "Sequences":
    from noisewise.sequence.readers import read_sequences

    return read_sequences(data, length=options["length"], task=options["task"], **_form(options))


def _form(options: dict[str, Any]) -> dict[str, Any]:
    """How the data are read, apart from their length."""
    return {name: options[name] for name in ("label", "group", "rate", "tokens", "mono")}


def _parted(
    sequences: "Sequences", data: Path, group: str | None, names: list[str], least: int = _LEAST_TRAINED
) -> "tuple[Sequences, Sequences | None]":
    """Rows outside the named groups, at least so many, and those of them; None where none is named."""
    import numpy as np

    if not names:
        return sequences, None
    if sequences.groups is None:
        raise InvalidInput(f"--test-group {names[0]} needs --group COLUMN, which says the group of each row")
    known = sorted(set(sequences.groups.tolist()))
    strange = [name for name in names if name not in known]
    if strange:
        raise InvalidInput(
            f"column {group!r} of {str(data)!r} has no group {', '.join(strange)}; it has {', '.join(known[:20])}"
        )
    inside = np.isin(sequences.groups, names)
    if (~inside).sum() < least:
        raise InvalidInput(f"--test-group {' '.join(names)} leaves {(~inside).sum()} rows to train on")
    return sequences.rows(~inside), sequences.rows(inside)


def _digest(sequences: "Sequences") -> str:
    """Of all that was read, so that the same command on other contents is told from the same command."""
    mark = hashlib.sha256()
    groups = [] if sequences.groups is None else [sequences.groups]
    for array in (sequences.X, sequences.y, sequences.lengths, *groups):
        mark.update(f"{array.dtype}{array.shape}".encode())
        mark.update(array.tobytes())
    mark.update("\n".join(sequences.classes).encode())
    return mark.hexdigest()


def _typed(data: Path, out: Path, options: dict[str, Any]) -> str:
    flags = {"mono": ("--mono", None), "bidirectional": ("--bidirectional", None), "tokens": ("--tokens", "--samples")}
    valued = {name: value for name, value in options.items() if name not in (*flags, "test_group")}
    line = typed(["noisewise", "sequence", "fit", str(data), "-o", str(out)], valued, _USUAL)
    said = [flags[name][not options[name]] for name in flags if options[name] is not None]
    groups = [typed(["--test-group", name], {}) for name in options["test_group"]]
    return " ".join([line, *(word for word in said if word), *groups])


def _load(folder: Path, device: str) -> "tuple[Any, Preparation]":
    """The model in OUT or OUT/model, in eval mode, and how data are prepared for it."""
    from noisewise.sequence.model import SequenceModel
    from noisewise.sequence.preparation import Preparation, model_folder

    place = model_folder(folder)
    if not all((place / name).is_file() for name in _KEPT):
        refuse_unfinished(folder, "model of `noisewise sequence fit`")
    summary = place.parent / SUMMARY
    if summary.is_file() and read_json(summary).get("interrupted"):
        warnings.warn(
            f"the fit in {place.parent} was interrupted: run the same fit command again to go on",
            NoisewiseWarning,
            stacklevel=3,
        )
    return SequenceModel.from_pretrained(place).to(device), Preparation.load(place)


def _finished(out: Path) -> dict[str, Any] | None:
    """The summary of a fit of which nothing is left to do."""
    if not (out / SUMMARY).is_file() or not (out / REPORT).is_file():
        return None
    facts = read_json(out / SUMMARY)
    return None if facts["interrupted"] or facts["cut"] else facts


# --- fit


def _say_how_long(train: "Sequences", trained: int, options: dict[str, Any]) -> None:
    """Before a long fit, how it becomes shorter."""
    from noisewise.sequence.fits import note_of_length

    steps = max(1, round(options["epochs"] * -(-trained // options["batch_size"])))
    said = note_of_length(train.X.shape[-1], options["patch"], train.tokens, steps)
    if said is not None:
        typer.echo(f"note: {said}", err=True)


def _write_page(facts: dict[str, Any], out: Path, line: str) -> None:
    from noisewise.sequence.model import SequenceModel
    from noisewise.sequence.page import write_page

    write_page(SequenceModel.from_pretrained(out / _MODEL), facts, line, out / REPORT)


def _show_fit(facts: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    from noisewise.metrics.measurement import Measurement
    from noisewise.sequence.page import fit_lines

    console, table = Console(), Table(show_header=False, box=None)
    for name, value in (
        *fit_lines(facts),
        *((f"held out, {name}", str(Measurement.from_dict(one))) for name, one in facts["held_out"].items()),
        *((f"left out, {name}", str(Measurement.from_dict(one))) for name, one in facts.get("test", {}).items()),
    ):
        table.add_row(f"[bold]{escape(name)}[/bold]", escape(value))
    console.print(table)
    if facts["cut"]:
        console.print(
            f"--max-seconds ended the fit at step {facts['steps']} of {facts['steps_asked']}; the same command goes on"
        )
    for text in facts["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)
    console.print(f"model:  {escape(str(out / _MODEL))}", soft_wrap=True, highlight=False)
    console.print(f"report: {(out / REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)


# --- evaluate


def _show_scores(facts: dict[str, Any]) -> None:
    from noisewise.metrics.measurement import Measurement

    console = Console()
    table = Table("measurement", "as trained", "merged", title=f"{facts['rows']} rows", title_justify="left")
    arrows = {"lower": " ↓", "higher": " ↑", "neither": ""}
    for name, one in facts["trained"]["scores"].items():
        cells = [str(Measurement.from_dict(facts[form]["scores"][name])) for form in ("trained", "merged")]
        table.add_row(name + arrows[one["better"]], *cells)
    table.add_row(
        "milliseconds a row", *(f"{1e3 * facts[form]['seconds_per_row']:.3g}" for form in ("trained", "merged"))
    )
    console.print(table)
    console.print(f"largest difference of an output: {facts['largest_difference']:.1e}", highlight=False)
    if facts["cut_rows"]:
        console.print(f"{facts['cut_rows']} rows were cut to the length of the model", highlight=False)
    for text in facts["warnings"]:
        console.print(f"[yellow]warning:[/yellow] {escape(text)}", soft_wrap=True, highlight=False)
    if facts["confusion"]:
        names = [escape(name) for name in facts["classes"]]
        console.print("rows of each class (down) by the class that was answered (across):", highlight=False)
        shown = Table("class", *names)
        for name, row in zip(names, facts["confusion"], strict=True):
            shown.add_row(name, *map(str, row))
        console.print(shown)


# --- predict and export


def _answered(
    sequences: "Sequences", preparation: "Preparation", output: "Tensor"
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Names of the columns and a line for each row."""
    assert sequences.names is not None
    if not preparation.classes:
        values = preparation.answers(output).squeeze(1).tolist()
        return ["row", "value"], [(row, f"{x:.9g}") for row, x in zip(sequences.names, values, strict=True)]
    likeliest, shares = output.argmax(1).tolist(), output.softmax(1).tolist()
    lines = zip(sequences.names, likeliest, shares, strict=True)
    return ["row", "class", *(f"p({name})" for name in preparation.classes)], [
        (row, preparation.classes[place], *(f"{p:.6g}" for p in found)) for row, place, found in lines
    ]


def _interface(preparation: "Preparation", named: bool) -> dict[str, Any]:
    """What a graph takes and gives, which the file itself does not say; `named`: by names."""
    symbols = preparation.vocabulary is not None
    if symbols:
        samples = f"symbols 0 to {(preparation.vocabulary or 1) - 1}"
    elif preparation.full_scale:
        samples = "parts of the largest, in [-1, 1]: divide integers of 16 bits by 32768"
    else:
        samples = "numbers as they stand in the file of the fit"
    scores = f"scores of {', '.join(preparation.classes)}, whose softmax is their probabilities"
    return {
        "row": [preparation.length] if symbols else [preparation.channels, preparation.length],
        "input": {
            "name": "input_0" if named else None,
            "dtype": "int64" if symbols else "float32",
            "samples": samples,
            "rate": preparation.rate,
        },
        "output": {
            "name": "output" if named else None,
            "dtype": "float32",
            "width": len(preparation.classes) or 1,
            "meaning": scores if preparation.classes else "values in the units of the data",
        },
    }
