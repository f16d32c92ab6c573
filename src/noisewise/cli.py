"""The command line: what there is, whether it works here, and each slice's own commands; torch loads only when used."""

import importlib
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import noisewise
from noisewise.diffusion.cli import diffusion_app
from noisewise.energy.cli import energy_app
from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning
from noisewise.neural.cli import neural_app
from noisewise.retrieval.cli import retrieval_app
from noisewise.sampling.cli import sample_command
from noisewise.sequence.cli import sequence_app
from noisewise.typing import check_count

__all__ = ["METHODS", "Method", "app", "main"]


@dataclass(frozen=True)
class Method:
    """One published method: where it lives, what a user has it for, its paper, and the module that `compare` runs.

    `experiment` is None as long as the method is only planned.
    """

    key: str
    name: str
    slice: str
    purpose: str
    paper: str
    experiment: str | None = None

    @property
    def state(self) -> str:
        """`ready` or `planned`."""
        return "planned" if self.experiment is None else "ready"


METHODS = (
    Method(
        "digs",
        "DiGS, diffusive Gibbs sampling",
        "sampling",
        "a multi-modal log density; samples from all its modes",
        "Chen et al., ICML 2024, arXiv 2402.03008",
        "noisewise.sampling.experiments.digs",
    ),
    Method(
        "mmgibbs",
        "MM-Gibbs, moment-matching denoising Gibbs",
        "sampling",
        "a noisy energy or score model; clean samples",
        "Zhang et al., NeurIPS 2023, arXiv 2305.11650",
        "noisewise.energy.experiments.mmgibbs",
    ),
    Method(
        "dikl",
        "DiKL, reverse diffusive KL",
        "neural",
        "a log density; a network that samples it in one step",
        "He et al., AISTATS 2025, arXiv 2410.12456",
        "noisewise.neural.experiments.dikl",
    ),
    Method(
        "mfd",
        "MFD, mixture Fisher divergence",
        "energy",
        "clustered data; an energy model that sees its mode weights",
        "Zhang et al., NeurIPS 2022 workshop, arXiv 2209.07396",
        "noisewise.energy.experiments.mfd",
    ),
    Method(
        "ocm",
        "OCM, optimal covariance matching",
        "diffusion",
        "a diffusion model; likelihoods and samples in few steps",
        "Ou et al., ICLR 2025, arXiv 2406.10808",
        "noisewise.diffusion.experiments.ocm",
    ),
    Method(
        "mrconv",
        "MRConv, multi-resolution convolutions",
        "sequence",
        "long signals; a fast layer with long memory that streams",
        "Cunningham et al., NeurIPS 2024, arXiv 2408.09453",
        "noisewise.sequence.experiments.mrconv",
    ),
    Method(
        "mafin",
        "Mafin, model-augmented fine-tuning",
        "retrieval",
        "an embedding API that can't be trained; better search",
        "Zhang et al., 2024, arXiv 2402.12177",
        "noisewise.retrieval.experiments.mafin",
    ),
    Method(
        "apl",
        "APL, active preference learning for DPO",
        "preference",
        "an LLM and few preference labels; the best use of each",
        "Muldrew et al., ICML 2024, arXiv 2402.08114",
    ),
    Method(
        "caf",
        "CAF, active forgetting with several learners",
        "continual",
        "tasks one after another, no old data; little forgetting",
        "Nature Machine Intelligence 2023, arXiv 2308.14991",
    ),
    Method(
        "iwl",
        "IWL, integrated weak learning",
        "weak",
        "rules that vote and few gold labels; a classifier",
        "Hayes et al., 2022, arXiv 2206.09496",
    ),
)


class Scale(StrEnum):
    """How much work a comparison is: seconds, minutes on two cores, or the published protocol."""

    QUICK = "quick"
    CPU = "cpu"
    PAPER = "paper"


app = typer.Typer(
    name="noisewise",
    help="Published methods for work where the ideal signal is missing, measured honestly.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("sample")(sample_command)
app.add_typer(diffusion_app, name="diffusion")
app.add_typer(energy_app, name="energy")
app.add_typer(neural_app, name="neural")
app.add_typer(retrieval_app, name="retrieval")
app.add_typer(sequence_app, name="sequence")

JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"noisewise {noisewise.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


@app.command()
def methods(as_json: JsonFlag = False) -> None:
    """List the methods: what each is for, its paper, and whether it is there yet."""
    if as_json:
        rows = [{**asdict(method), "state": method.state} for method in METHODS]
        typer.echo(json.dumps(rows, indent=2))
        return
    table = Table("key", "method", "you have; you want", "paper", "slice", "state")
    for method in METHODS:
        color = "green" if method.experiment else "dim"
        table.add_row(
            method.key, method.name, method.purpose, method.paper, method.slice, f"[{color}]{method.state}[/{color}]"
        )
    Console().print(table)


@app.command()
def doctor(as_json: JsonFlag = False) -> None:
    """Say what is installed here, what is missing and the line that mends it; the exit code is always 0."""
    findings = _examine()
    if as_json:
        typer.echo(json.dumps(findings, indent=2))
        return
    console = Console()
    facts = Table(show_header=False, box=None)
    for name in ("noisewise", "python", "platform", "torch", "numpy", "cores", "threads", "devices"):
        value = findings[name]
        facts.add_row(f"[bold]{name}[/bold]", escape(", ".join(value) if isinstance(value, list) else str(value)))
    console.print(facts)
    extras = Table("extra", "there", "missing", "install with")
    for name, extra in findings["extras"].items():
        there = ", ".join(f"{library} {version}" for library, version in extra["installed"].items())
        missing = ", ".join(extra["missing"])
        extras.add_row(name, there, f"[red]{escape(missing)}[/red]" if missing else "", escape(extra["install"] or ""))
    console.print(extras)


def _examine() -> dict[str, Any]:
    """The facts that `doctor` prints; a torch that cannot be loaded is a finding, not an error."""
    findings: dict[str, Any] = {
        "noisewise": noisewise.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "numpy": _version("numpy"),
        "cores": os.cpu_count(),
    }
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: a shared library that does not load
        findings |= {"torch": f"cannot be loaded: {error}", "threads": None, "devices": []}
    else:
        cuda = [f"cuda:{index} ({torch.cuda.get_device_name(index)})" for index in range(torch.cuda.device_count())]
        mps = ["mps"] if torch.backends.mps.is_available() else []
        findings |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "devices": ["cpu", *cuda, *mps]}
    findings["extras"] = {name: _examine_extra(name) for name in _requirements() if name}
    return findings


def _examine_extra(name: str) -> dict[str, Any]:
    libraries = _libraries(name, _requirements())
    versions = {library: _version(library) for library in libraries}
    missing = [library for library, version in versions.items() if version is None]
    return {
        "installed": {library: version for library, version in versions.items() if version is not None},
        "missing": missing,
        "install": f"pip install 'noisewise[{name}]'" if missing else None,
    }


def _requirements() -> dict[str, list[str]]:
    """Requirement strings by extra, those of the base under the empty name, from the installed package's metadata."""
    by_extra: dict[str, list[str]] = {
        "": [],
        **{name: [] for name in metadata.metadata("noisewise").get_all("Provides-Extra", [])},
    }
    for line in metadata.requires("noisewise") or []:
        requirement, _, marker = line.partition(";")
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", marker)
        by_extra[extra.group(1) if extra else ""].append(requirement.strip())
    return by_extra


def _libraries(extra: str, requirements: dict[str, list[str]]) -> list[str]:
    """Distribution names behind `extra`, with `noisewise[a,b]` followed into a and b."""
    names: dict[str, None] = {}
    for requirement in requirements[extra]:
        match = re.match(r"([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?", requirement)
        if match is None:
            continue
        if match.group(1).lower() == "noisewise":
            for inner in (match.group(2) or "").split(","):
                names |= dict.fromkeys(_libraries(inner.strip(), requirements))
        else:
            names[match.group(1)] = None
    return list(names)


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@app.command()
def compare(
    method: Annotated[str, typer.Argument(help="A method that is ready; `noisewise methods` lists them.")],
    scale: Annotated[
        Scale, typer.Option(help="Seconds, minutes on two cores, or the published protocol.")
    ] = Scale.QUICK,
    seeds: Annotated[int | None, typer.Option(help="Repetitions; the experiment's own number where not given.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json and report.html; it may hold a part of it.")
    ] = None,
    protocol: Annotated[str | None, typer.Option(help="Only these protocols, with commas: A,B.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Run a method beside its baselines: same problems, seeds and budget; one table with error, floor and cost."""
    chosen = _find_method(method)
    folder = out or Path("runs") / f"compare-{chosen.key}-{scale.value}"
    protocols = (
        None if protocol is None else tuple(part.strip().upper() for part in protocol.split(",") if part.strip())
    )
    results = _run_experiment(chosen, scale, seeds, folder, protocols)
    _show_results(results, folder, as_json)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results and the report.")] = Path("runs/demo"),
    as_json: JsonFlag = False,
) -> None:
    """Every method that is ready beside its peers, at the smallest scale; a folder each and one report."""
    from noisewise.report import Report

    report = Report("noisewise: a demonstration", "each method beside its baselines, at the smallest scale")
    every = []
    for method in METHODS:
        if method.experiment is None:
            continue
        folder = out / method.key
        results = _run_experiment(method, Scale.QUICK, None, folder, None)
        report.section(method.name, f"You have; you want: {method.purpose}. {method.paper}.")
        importlib.import_module(method.experiment).COMPARISON.add_to(report, results, folder)
        report.save(out / "report.html")
        every.append(results)
        if not as_json:
            Console().print(results.table())
    if as_json:
        typer.echo(json.dumps([results.to_dict() for results in every], indent=2))
    else:
        _show_files(out)


def _find_method(key: str) -> Method:
    ready = ", ".join(method.key for method in METHODS if method.experiment)
    for method in METHODS:
        if method.key == key.lower():
            if method.experiment is None:
                raise InvalidInput(f"{method.name} is planned and not there yet; ready: {ready}")
            return method
    raise InvalidInput(f"there is no method {key!r}; ready: {ready}; all of them: noisewise methods")


def _run_experiment(
    method: Method, scale: Scale, seeds: int | None, out: Path, protocols: tuple[str, ...] | None
) -> Any:
    options: dict[str, Any] = {"scale": scale.value, "out": out}
    if seeds is not None:
        options["seeds"] = check_count("--seeds", seeds)
    if protocols is not None:
        options["protocols"] = protocols
    assert method.experiment is not None
    return importlib.import_module(method.experiment).run(**options)


def _show_results(results: Any, folder: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(results.to_dict(), indent=2))
        return
    Console().print(results.table())
    _show_files(folder)


def _show_files(folder: Path) -> None:
    console = Console()
    results = [folder / "results.json", *sorted(folder.glob("*/results.json"))]
    for path in results:
        if path.exists():
            console.print(f"results: {path}", soft_wrap=True, highlight=False)
    report = folder / "report.html"
    if report.exists():
        console.print(f"report:  {report.resolve().as_uri()}", soft_wrap=True, highlight=False)


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    if issubclass(category, NoisewiseWarning):
        Console(stderr=True).print(f"[yellow]warning:[/yellow] {escape(str(message))}", soft_wrap=True, highlight=False)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line with `arguments`, or with the process's own; always ends in `SystemExit`.

    What noisewise raises on purpose, and a path that cannot be read or written, is printed as one red line to stderr with
    exit code 2; set the environment variable NOISEWISE_TRACEBACK=1 to see where it came from.
    """
    with warnings.catch_warnings():  # also puts showwarning back
        warnings.showwarning = _print_warning
        try:
            app(arguments)
        except (NoisewiseError, OSError) as error:
            if os.environ.get("NOISEWISE_TRACEBACK") == "1":
                raise
            text = str(error) if isinstance(error, NoisewiseError) else _say(error)
            Console(stderr=True).print(f"[red]error:[/red] {escape(text)}", soft_wrap=True, highlight=False)
            sys.exit(2)


def _say(error: OSError) -> str:
    """What the system refused, in one sentence with the path."""
    if error.filename is None:
        return f"the system refused: {error}"
    return f"{str(error.filename)!r} cannot be used: {error.strerror}; give another path, or mend this one"
