"""`noisewise energy fit` and `noisewise energy sample`: an energy model of a table of numbers, and rows drawn from it."""

import csv
import json
import math
import sys
import warnings
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisewise.command import COMMAND, RUN, refuse_file, refuse_unfinished
from noisewise.errors import InvalidInput, NoisewiseWarning, RunFolderError
from noisewise.files import as_csv, write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    import torch

    from noisewise.energy.mixture import MixtureScoreMatching
    from noisewise.training import FitResult

__all__ = ["EnergyMethod", "energy_app", "read_table"]

# above this many columns a full covariance per row is not worth its price
_LARGEST_FULL = 200
# beside config.json and model.safetensors, so that `from_pretrained` reads the folder itself
_REPORT = "report.txt"

energy_app = typer.Typer(no_args_is_help=True, help="Fit an energy model to a table, and draw rows from it.")


class EnergyMethod(StrEnum):
    """`mfd` sees the weights of separated modes; `dsm` learns the density blurred by noise of `--sigma`."""

    MFD = "mfd"
    DSM = "dsm"


# the options that only one method reads, and the noise of dsm where none is given
_OWN = {"beta": EnergyMethod.MFD, "reference": EnergyMethod.MFD, "sigma": EnergyMethod.DSM}
_SIGMA = 0.3


@energy_app.command("fit")
def fit_command(
    data: Annotated[
        Path,
        typer.Argument(
            help="CSV file of numbers with commas, one row a line. A first line of names is kept; one of numbers is a row."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model, its report and its checkpoint.")],
    method: Annotated[
        EnergyMethod, typer.Option(help="mfd for clustered data, dsm for a noisy energy.")
    ] = EnergyMethod.MFD,
    beta: Annotated[
        float | None, typer.Option(help="mfd: share of the data in the bridge, in (0, 1).", show_default="0.8")
    ] = None,
    reference: Annotated[str | None, typer.Option(help="mfd: gaussian or student-t.", show_default="gaussian")] = None,
    sigma: Annotated[
        float | None, typer.Option(help="dsm: noise, in standard deviations of the columns.", show_default="0.3")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1500,
    max_seconds: Annotated[float | None, typer.Option(help="Stop training after so many seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the numbers of the report as JSON.")] = False,
) -> None:
    """Fit an energy model to the rows of DATA; the same command again goes on after a crash or Ctrl-C."""
    from noisewise.energy.rows import LEAST_ROWS, check_varies

    given = {name: value for name, value in (("beta", beta), ("reference", reference)) if value is not None}
    _refuse_idle(method, {"beta": beta, "reference": reference, "sigma": sigma})
    refuse_file(out)
    rows, names = read_table(data)
    if len(rows) < LEAST_ROWS:
        raise InvalidInput(f"{str(data)!r} holds {len(rows)} rows of numbers: at least {LEAST_ROWS} rows are needed")
    check_varies(rows, names)
    command = {"method": method.value, "names": names, "rows": len(rows)}
    if (out / COMMAND).is_file() and not _same(out / COMMAND, command):
        raise RunFolderError(f"{out} holds a fit of other data or by another method; choose another folder")
    if method is EnergyMethod.DSM:
        facts, text = _fit_dsm(rows, out, command, _SIGMA if sigma is None else sigma, steps, max_seconds, seed)
    else:
        facts, text = _fit_mfd(rows, out, command, given, steps, max_seconds, seed)
    write_atomically(out / _REPORT, text + "\n")
    typer.echo(json.dumps(facts, indent=2) if as_json else text)
    if facts["interrupted"]:
        typer.echo(
            f"interrupted at step {facts['steps']} of {steps}; the same command goes on to the same model", err=True
        )
        raise typer.Exit(130)


@energy_app.command("sample")
def sample_command(
    folder: Annotated[Path, typer.Argument(help="Folder that `noisewise energy fit` wrote.")],
    n: Annotated[int, typer.Option("-n", help="Rows to draw.")] = 1000,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="CSV file; without it, rows go to the screen.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the rows, or with --out their number and place, as JSON.")
    ] = False,
) -> None:
    """Draw rows from a fitted model; those of a dsm model are draws of its noisy density, denoised by a Gaussian."""
    from noisewise.energy.mixture import MixtureScoreMatching

    n = check_count("-n", n)
    command = _read_command(folder)
    if "interrupted_at" in command:
        warnings.warn(
            f"the fit in {folder} was interrupted at step {command['interrupted_at']}: run the same fit command again to go on",
            NoisewiseWarning,
            stacklevel=2,
        )
    if command["method"] == EnergyMethod.MFD:
        drawn = MixtureScoreMatching.from_pretrained(folder).sample(n, seed)
    else:
        drawn = _sample_dsm(folder, command, n, seed)
    if out is not None:
        write_atomically(out, as_csv(command["names"], drawn.tolist()))
    if as_json:
        kept = {"n": n} | ({"rows": drawn.tolist()} if out is None else {"out": str(out)})
        typer.echo(json.dumps({"names": command["names"], **kept}, indent=2))
    elif out is None:
        sys.stdout.write(as_csv(command["names"], drawn.tolist()))
    else:
        typer.echo(f"{n} rows: {out}")


def _refuse_idle(method: EnergyMethod, options: dict[str, Any]) -> None:
    """Raise `InvalidInput` for an option that was given and that `method` does not read."""
    for name, value in options.items():
        if value is not None and _OWN[name] is not method:
            raise InvalidInput(
                f"--{name} {value} belongs to --method {_OWN[name].value} and would do nothing for {method.value}: leave it out"
            )


def read_table(path: Path) -> tuple["torch.Tensor", list[str]]:
    """Numbers [row, column] in float64, and the names of the columns (empty without a first line of names).

    Raises `InvalidInput` that names the line of anything else, of empty cells and of NaN and infinite values.
    """
    import torch

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(number, line) for number, line in enumerate(csv.reader(file), 1) if line]
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"{str(path)!r} is no UTF-8 text: a CSV file of numbers is wanted (from an array: numpy.savetxt(path, array, "
            'delimiter=","))'
        ) from error
    except (OSError, csv.Error) as error:
        raise InvalidInput(f"{str(path)!r} cannot be read as a CSV file: {error}") from error
    names: list[str] = []
    if lines and not all(map(_is_number, lines[0][1])):
        names = [cell.strip() for cell in lines.pop(0)[1]]
    if not lines:
        raise InvalidInput(f"{str(path)!r} holds no rows of numbers{_other_separator(names)}")
    width = len(lines[0][1])
    for number, line in lines:
        if len(line) != width or not all(map(_is_number, line)):
            raise InvalidInput(
                f"line {number} of {str(path)!r} is not {width} number{'s' * (width > 1)}: {','.join(line)[:80]!r}"
                + _other_separator(line)
            )
    if names and len(names) != width:
        raise InvalidInput(f"the first line of {str(path)!r} has {len(names)} names for {width} columns")
    cells = [[float(cell) if cell.strip() else math.nan for cell in line] for _, line in lines]
    bad = [number for (number, _), row in zip(lines, cells, strict=True) if not all(map(math.isfinite, row))]
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        raise InvalidInput(
            f"{len(bad)} of {len(lines)} data rows of {str(path)!r} hold empty, NaN or infinite cells (line {shown} of the "
            "file): remove or fill them"
        )
    return torch.tensor(cells, dtype=torch.float64), names


def _other_separator(cells: Sequence[str]) -> str:
    """What to say of cells that were not separated by commas; nothing where no other separator is seen."""
    for separator, name in ((";", "semicolons"), ("\t", "tabs")):
        if any(separator in cell for cell in cells):
            return f"; the cells are separated by {name} ({separator!r}): save the file with commas, and decimal points"
    return ""


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return not cell.strip()
    return True


def _fit_mfd(
    rows: "torch.Tensor", out: Path, command: dict[str, Any], given: dict[str, Any], steps: int,
    limit: float | None, seed: int,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Fit and save by `MixtureScoreMatching`; what was found, as JSON values and as a report."""
    from noisewise.energy.mixture import MixtureScoreMatching

    model = MixtureScoreMatching(
        **given, steps=steps, seed=seed, max_seconds=limit, checkpoint=out / RUN, progress=True,
    )  # fmt: skip
    with warnings.catch_warnings():
        # the report repeats them
        warnings.simplefilter("ignore", NoisewiseWarning)
        model.fit(rows)
    model.save_pretrained(out)
    _write_command(out, command, model.n_iter_ if model.interrupted_ else None)
    return {**command, **_mfd_facts(model)}, model.report()


def _mfd_facts(model: "MixtureScoreMatching") -> dict[str, Any]:
    """The numbers of the report; clusters are counted from 1, as there."""
    from noisewise.metrics.measurement import Measurement

    weights, shares = (found.measurements() for found in (model.cluster_weights_, model.cluster_shares_))
    return {
        "beta": model.beta,
        "steps": model.n_iter_,
        "best_step": model.best_step_,
        "interrupted": model.interrupted_,
        "clusters": [
            {"weight": weight.to_dict(), "share_of_rows": share.to_dict(), "centre": centre}
            for weight, share, centre in zip(weights, shares, model.cluster_centres_.tolist(), strict=True)
        ],
        "gaps": [{**gap._asdict(), "first": gap.first + 1, "second": gap.second + 1} for gap in model.gaps_],
        "log_normalizer": Measurement(model.log_normalizer_, model.log_normalizer_se_, better="neither").to_dict(),
        "negative_mass": Measurement(model.negative_mass_, model.negative_mass_se_).to_dict(),
        "floor": model.floor,
        "cost": vars(model.cost_),
        "warnings": list(model.warnings_),
    }


def _fit_dsm(
    rows: "torch.Tensor", out: Path, command: dict[str, Any], sigma: float, steps: int, limit: float | None, seed: int
) -> tuple[dict[str, Any], str]:
    """Fit and save an `EnergyNet` of the standardised rows with noise; what was found, as JSON values and as a report."""
    from noisewise.energy.network import EnergyNet
    from noisewise.energy.rows import few_rows
    from noisewise.energy.training import fit_energy
    from noisewise.noise import Corruption

    check_positive("--sigma", sigma)
    mean, scale = rows.mean(0), rows.std(0)
    # the noisy density has variance 1 + sigma^2 per column
    net = EnergyNet(rows.shape[1], base_scale=math.sqrt(1 + sigma**2), seed=seed)
    result = fit_energy(
        net, (rows - mean) / scale, "dsm", Corruption(1.0, sigma), steps=steps, max_seconds=limit,
        checkpoint=out / RUN, progress=True, seed=seed,
    )  # fmt: skip
    net.save_pretrained(out)
    record = {**command, "mean": mean.tolist(), "scale": scale.tolist()}
    _write_command(out, record, result.steps if result.interrupted else None)
    warned = [text] if (text := few_rows(rows)) is not None else []
    facts = {**command, "sigma": sigma, **_dsm_facts(result), "warnings": warned}
    loss = "unknown" if facts["held_out_loss"] is None else f"{facts['held_out_loss']:.4g}"
    cut = (
        ""
        if result.steps >= steps
        else f", {'interrupted' if result.interrupted else 'stopped'} at step {result.steps}"
    )
    lines = [
        f"EnergyNet by dsm, sigma {sigma:g} (standardised): held-out loss {loss}, weights of step {result.best_step} of "
        f"{steps}{cut}",
        *(f"warning: {text}" for text in warned),
    ]
    return facts, "\n".join(lines)


def _dsm_facts(result: "FitResult") -> dict[str, Any]:
    # none was made where the first step was interrupted
    looks = [entry for entry in result.history if entry["step"] == result.best_step]
    return {
        "held_out_loss": looks[-1]["validation"] if looks else None,
        "steps": result.steps,
        "best_step": result.best_step,
        "interrupted": result.interrupted,
        "cost": vars(result.cost),
    }


def _write_command(out: Path, record: dict[str, Any], interrupted_at: int | None) -> None:
    """What was fitted; a fit that Ctrl-C cut short is marked, so that its draws can be warned of."""
    mark = {} if interrupted_at is None else {"interrupted_at": interrupted_at}
    write_atomically(out / COMMAND, json.dumps({**record, **mark}, indent=2))


def _sample_dsm(folder: Path, command: dict[str, Any], n: int, seed: int) -> "torch.Tensor":
    import torch

    from noisewise.denoising.models import Energy
    from noisewise.denoising.moments import gaussian_posterior
    from noisewise.energy.network import EnergyNet
    from noisewise.sampling.loop import sample
    from noisewise.targets.target import TorchTarget

    net = EnergyNet.from_pretrained(folder).double()
    if net.corruption is None:
        raise RunFolderError(f"the model in {folder} does not say at which noise level it was trained")
    mean, scale = (torch.tensor(command[name], dtype=torch.float64) for name in ("mean", "scale"))
    chains = min(n, 100)
    start = torch.randn(chains, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    made = sample(TorchTarget(net.log_prob, len(mean)), init=start, draws=-(-n // chains), seed=seed)
    noisy = made.positions.transpose(0, 1).reshape(-1, len(mean))[:n]
    covariance = "full" if len(mean) <= _LARGEST_FULL else "krylov"
    posterior = gaussian_posterior(Energy(net), noisy, net.corruption, covariance=covariance)
    return posterior.sample(torch.Generator().manual_seed(seed)) * scale + mean


def _read_command(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / COMMAND).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        refuse_unfinished(folder, "finished `noisewise energy fit`")
    except ValueError as error:
        raise RunFolderError(f"{folder / COMMAND} is damaged: {error}") from error


def _same(path: Path, command: dict[str, Any]) -> bool:
    before = _read_command(path.parent)
    return all(before.get(name) == value for name, value in command.items())
