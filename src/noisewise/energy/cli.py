"""`noisewise energy fit` and `noisewise energy sample`: an energy model of a table of numbers, and rows drawn from it."""

import csv
import json
import math
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.files import write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    import torch

__all__ = ["EnergyMethod", "energy_app", "read_table"]

# above this many columns a full covariance per row is not worth its price
_LARGEST_FULL = 200
# beside config.json and model.safetensors, so that `from_pretrained` reads the folder itself
_COMMAND, _RUN, _REPORT = "command.json", "run", "report.txt"

energy_app = typer.Typer(no_args_is_help=True, help="Fit an energy model to a table, and draw rows from it.")


class EnergyMethod(StrEnum):
    """`mfd` sees the weights of separated modes; `dsm` learns the density blurred by noise of `--sigma`."""

    MFD = "mfd"
    DSM = "dsm"


@energy_app.command("fit")
def fit_command(
    data: Annotated[Path, typer.Argument(help="CSV file of numbers, one row a line; a first line of names is kept.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the model, its report and its checkpoint.")],
    method: Annotated[
        EnergyMethod, typer.Option(help="mfd for clustered data, dsm for a noisy energy.")
    ] = EnergyMethod.MFD,
    beta: Annotated[float, typer.Option(help="mfd: share of the data in the bridge, in (0, 1).")] = 0.8,
    reference: Annotated[str, typer.Option(help="mfd: gaussian or student-t.")] = "gaussian",
    sigma: Annotated[float, typer.Option(help="dsm: noise, in standard deviations of the columns.")] = 0.3,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 1500,
    max_seconds: Annotated[float | None, typer.Option(help="Stop training after so many seconds.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
) -> None:
    """Fit an energy model to the rows of DATA; the same command again goes on after a crash or Ctrl-C."""
    from noisewise.energy.mixture import MixtureScoreMatching

    rows, names = read_table(data)
    command = {"method": method.value, "names": names, "rows": len(rows)}
    if (out / _COMMAND).is_file() and not _same(out / _COMMAND, command):
        raise RunFolderError(f"{out} holds a fit of other data or by another method; choose another folder")
    if method is EnergyMethod.DSM:
        text = _fit_dsm(rows, out, command, sigma, steps, max_seconds, seed)
    else:
        model = MixtureScoreMatching(
            reference=reference, beta=beta, steps=steps, seed=seed, max_seconds=max_seconds, checkpoint=out / _RUN,
            progress=True,
        ).fit(rows)  # fmt: skip
        model.save_pretrained(out)
        write_atomically(out / _COMMAND, json.dumps(command, indent=2))
        shares = zip(model.mode_weights().measurements(), range(1, model.clusters_.number + 1), strict=False)
        text = "\n".join([model.report(), *(f"weight of cluster {number}: {weight}" for weight, number in shares)])
    write_atomically(out / _REPORT, text + "\n")
    typer.echo(text)


@energy_app.command("sample")
def sample_command(
    folder: Annotated[Path, typer.Argument(help="Folder that `noisewise energy fit` wrote.")],
    n: Annotated[int, typer.Option("-n", help="Rows to draw.")] = 1000,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="CSV file; without it, rows go to the screen.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Draw rows from a fitted model; those of a dsm model are draws of its noisy density, denoised by a Gaussian."""
    from noisewise.energy.mixture import MixtureScoreMatching

    n = check_count("-n", n)
    command = _read_command(folder)
    if command["method"] == EnergyMethod.MFD:
        drawn = MixtureScoreMatching.from_pretrained(folder).sample(n, seed)
    else:
        drawn = _sample_dsm(folder, command, n, seed)
    lines = [",".join(command["names"])] if command["names"] else []
    lines += [",".join(f"{value:.9g}" for value in row) for row in drawn.tolist()]
    text = "\n".join(lines) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_atomically(out, text)
        typer.echo(f"{n} rows: {out}")


def read_table(path: Path) -> tuple["torch.Tensor", list[str]]:
    """Numbers [row, column] in float64, and the names of the columns (empty without a first line of names).

    Raises `InvalidInput` that names the line of anything else; an empty cell is NaN, which the fit refuses by row.
    """
    import torch

    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            lines = [(number, line) for number, line in enumerate(csv.reader(file), 1) if line]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"{str(path)!r} cannot be read as a CSV file: {error}") from error
    names: list[str] = []
    if lines and not all(map(_is_number, lines[0][1])):
        names = [cell.strip() for cell in lines.pop(0)[1]]
    if not lines:
        raise InvalidInput(f"{str(path)!r} holds no rows of numbers")
    width = len(lines[0][1])
    for number, line in lines:
        if len(line) != width or not all(map(_is_number, line)):
            raise InvalidInput(f"line {number} of {str(path)!r} is not {width} numbers: {','.join(line)[:80]!r}")
    cells = [[float(cell) if cell.strip() else math.nan for cell in line] for _, line in lines]
    return torch.tensor(cells, dtype=torch.float64), names


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return not cell.strip()
    return True


def _fit_dsm(
    rows: "torch.Tensor", out: Path, command: dict[str, Any], sigma: float, steps: int, limit: float | None, seed: int
) -> str:
    from noisewise.energy.network import EnergyNet
    from noisewise.energy.training import check_rows, fit_energy
    from noisewise.noise import Corruption

    check_positive("--sigma", sigma)
    check_rows(rows)
    mean, scale = rows.mean(0), rows.std(0)
    if not bool((scale > 0).all()):
        raise InvalidInput(f"column {int((scale <= 0).nonzero()[0])} is constant: remove it")
    # the noisy density has variance 1 + sigma^2 per column
    net = EnergyNet(rows.shape[1], base_scale=math.sqrt(1 + sigma**2), seed=seed)
    result = fit_energy(
        net, (rows - mean) / scale, "dsm", Corruption(1.0, sigma), steps=steps, max_seconds=limit,
        checkpoint=out / _RUN, progress=True, seed=seed,
    )  # fmt: skip
    net.save_pretrained(out)
    record = {**command, "mean": mean.tolist(), "scale": scale.tolist()}
    write_atomically(out / _COMMAND, json.dumps(record, indent=2))
    last = result.history[-1]
    return (
        f"EnergyNet by dsm, sigma {sigma:g} (standardised): held-out loss {last['validation']}, step {result.best_step}"
    )


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
        return json.loads((folder / _COMMAND).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise RunFolderError(f"{folder} holds no finished `noisewise energy fit`") from error
    except ValueError as error:
        raise RunFolderError(f"{folder / _COMMAND} is damaged: {error}") from error


def _same(path: Path, command: dict[str, Any]) -> bool:
    before = _read_command(path.parent)
    return all(before.get(name) == value for name, value in command.items())
