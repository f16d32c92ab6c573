"""Diagnostics of a run: modes found in its draws, traffic between them, R-hat and ESS, and warnings that chains are stuck."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import require
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.modes import ModeWeights, assign_modes, label_ess, mode_flips, mode_weights
from noisewise.sampling.mixture_fit import fit_mixture
from noisewise.targets.gaussian_mixture import GaussianMixture
from noisewise.typing import Cost

if TYPE_CHECKING:
    from rich.console import Group

    from noisewise.sampling.draws import Draws

__all__ = ["Modes", "Summary", "diagnose", "find_modes", "summarise"]

# below this a start at that level never changes anything within a run of usual length
_NO_JUMPS = 1e-3
# a level reaches another mode when its noise is wider than two standard deviations of a mode
_REACH = 2.0
_NO_SWAPS = 0.05
_NO_FIT = 0.02
# two components belong to one mode when the density between them falls by less than this factor (e)
_VALLEY = 1.0
# nor are components closer than this many standard deviations: a skewed mode takes several, a valley needs more
_OVERLAP = 4.0
_SEARCH_DRAWS = 2000
# Vehtari et al., Bayesian Analysis 16, 2021, ask for less than 1.01 and 400; the notes leave room for chance
_HIGH_R_HAT, _LOW_ESS = 1.05, 100.0
# a chain leaves a place where target / fit is e^12 times the usual once in some hundred thousand fitted moves
_OUT_OF_PROPORTION = 12.0
_LOW = 0.01
# no density of one scale is so much wider than the starts (or than 1, where they are smaller)
_DIVERGED = 1e6
# single draws in a far tail are no missed mode
_UNCOVERED_SHARE = 0.005


@dataclass(frozen=True)
class Modes:
    """Modes of a set of draws: components of a fitted mixture, joined where no valley lies between them.

    `centres`: [mode, dim], the mean of each mode's heaviest component; `count`.
    """

    mixture: GaussianMixture
    mode_of_component: Int[Tensor, " component"]

    @property
    def count(self) -> int:
        """Number of modes."""
        return int(self.mode_of_component.max()) + 1

    @property
    def centres(self) -> Float[Tensor, "mode dim"]:
        """Mean of each mode's heaviest component."""
        weights = self.mixture.weights
        heaviest = [
            int(torch.where(self.mode_of_component == mode, weights, -torch.inf).argmax()) for mode in range(self.count)
        ]
        return self.mixture.means[heaviest]

    def label(self, x: Float[Tensor, "row dim"]) -> Int[Tensor, " row"]:
        """Mode of each row: that of its most responsible component."""
        return self.mode_of_component.to(x.device)[self.mixture.responsibilities(x).argmax(-1)]


def find_modes(draws: Float[Tensor, "*batch dim"], seed: int = 0) -> Modes:
    """Modes of draws, from at most 2000 of them; a mode that no draw is in cannot be found."""
    rows = draws.reshape(-1, draws.shape[-1])
    rows = rows[
        torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:_SEARCH_DRAWS].to(rows.device)
    ]
    rows = rows.double()
    mixture = fit_mixture(rows, seed)
    means = mixture.means
    peak = mixture.log_prob(means)
    share = torch.linspace(0, 1, 11, dtype=means.dtype, device=means.device)[1:-1]
    between = means[:, None, None] + share[:, None] * (means[None, :, None] - means[:, None, None])
    lowest = mixture.log_prob(between.reshape(-1, means.shape[1])).reshape(len(means), len(means), -1).amin(-1)
    joined = lowest > torch.minimum(peak[:, None], peak[None, :]) - _VALLEY
    joined = joined | (_separation(mixture) < _OVERLAP)
    return Modes(mixture, _connected(joined | joined.T | torch.eye(len(means), dtype=torch.bool, device=means.device)))


def _separation(mixture: GaussianMixture) -> Float[Tensor, "component component"]:
    """Mahalanobis distance between means in the mean of the two covariances."""
    covariances = mixture.full_covariances
    between = (covariances[:, None] + covariances[None, :]) / 2
    offset = mixture.means[:, None] - mixture.means[None, :]
    return (offset * torch.linalg.solve(between, offset.unsqueeze(-1)).squeeze(-1)).sum(-1).sqrt()


def _connected(joined: Tensor) -> Tensor:
    """Labels 0, 1, ... of the connected components of a symmetric relation."""
    reach = joined.float()
    for _ in range(max(math.ceil(math.log2(len(joined))), 1)):
        reach = ((reach @ reach) > 0).float()
    first = reach.argmax(1)
    return torch.unique(first, return_inverse=True)[1]


def diagnose(draws: "Draws", kernel: Any, reach: float = math.inf) -> list[str]:
    """Warnings about a finished run, each with its remedy; cheap, without any call of the target.

    `reach`: largest coordinate of the starts, in absolute value.
    """
    found = _diverged(draws, kernel, reach)
    if found:
        # what the other diagnostics say of such draws is void
        return found
    stats = draws.stats
    if "mwg_acceptance" in stats:
        found += _stuck(draws, kernel)
    swaps = stats.get("swap_acceptance")
    if swaps is not None and swaps.shape[-1]:
        rate = swaps.double().mean(0)
        if float(rate.min()) < _NO_SWAPS:
            pair = int(rate.argmin())
            found.append(
                f"temperatures {pair} and {pair + 1} of the ladder swap only {float(rate.min()):.1%} of the time: replicas do "
                "not travel between hot and cold; add temperatures or let sample scout the ladder (betas=None)"
            )
    fitted = stats.get("fitted_acceptance")
    if fitted is not None and kernel.reference is not None and float(fitted.double().mean()) < _NO_FIT:
        found.append(
            f"the fitted moves are accepted only {float(fitted.double().mean()):.2%} of the time; mode weights rest on the "
            "ladder alone: give a longer warm-up, or refit with FittedDiGS.fitted_to(draws) and start a new run"
        )
    if getattr(kernel, "reference", None) is not None and kernel.components == "gaussian":
        found += _uncovered(draws, kernel)
    return found


def _diverged(draws: "Draws", kernel: Any, reach: float) -> list[str]:
    """Chains that end beyond all scale of their starts, or were not finite on the way: no acceptance step held them."""
    chains, count, _ = draws.positions.shape
    last = draws.positions[:, -1].abs().amax(-1)
    away = ~torch.isfinite(draws.positions).flatten(1).all(1) | (last > _DIVERGED * max(reach, 1.0))
    if not bool(away.any()):
        return []
    remedy = (
        "lower step_size"
        if hasattr(kernel, "step_size")
        else "the model gives no density's score out there: check the sign of its score and its noise level, or train it longer"
    )
    return [
        f"{int(away.sum())} of {chains} chains have diverged: after {count} draws a position is {float(last.max()):.3g}, where "
        f"the starts reached {reach:.3g}; these draws are worthless: {remedy}"
    ]


def _uncovered(draws: "Draws", kernel: Any) -> list[str]:
    """Draws where the target is out of all proportion to the fit: the fitted moves neither reach such a place nor leave it."""
    chains, count, _ = draws.positions.shape
    stride = max(chains * count // _SEARCH_DRAWS, 1)
    x = draws.flat()[::stride]
    log_prob = draws.stats["log_prob"].T.reshape(-1)[::stride].to(x)
    ratio = (log_prob - kernel.reference.log_prob(x)).double()
    # the mean of fit / target over the target is at most one over its normaliser, so that this low quantile lies near the
    # normaliser even where most draws are in the missed mode; the median would be in there with them
    usual = ratio.quantile(_LOW) - math.log(_LOW)
    share = float((ratio > usual + _OUT_OF_PROPORTION).double().mean())
    if share < _UNCOVERED_SHARE:
        return []
    return [
        f"{share:.2%} of the draws lie where the fitted mixture has next to no mass, in a mode or tail that warm-up missed: "
        "its weight rests on the ladder alone. Give a longer warm-up or starts that are more spread out, or refit with "
        "FittedDiGS.fitted_to(draws) and start a new run"
    ]


def _stuck(draws: "Draws", kernel: Any) -> list[str]:
    """DiGS changes modes only through starts that are accepted at a level wider than a mode."""
    acceptance = draws.stats["mwg_acceptance"].double().mean(0).cpu()
    r = torch.tensor(kernel.levels.r, dtype=torch.float64)
    scale = draws.local_scale.double().cpu()
    scale = scale if kernel.metric is None else scale / kernel.metric.double().sqrt().cpu()
    width = float(scale.median())
    wide = r > _REACH * width
    if bool((acceptance[wide] >= _NO_JUMPS).any()):
        return []
    seen = ", ".join(f"r={level:.3g}: {rate:.2g}" for level, rate in zip(r.tolist(), acceptance.tolist(), strict=True))
    why = (
        f"no noise level is wider than twice a mode's width ({width:.3g})"
        if not bool(wide.any())
        else f"every noise level wider than twice a mode's width ({width:.3g}) accepts under {_NO_JUMPS:g} of its starts"
    )
    return [
        f"these chains cannot change modes: {why} (start acceptance by level: {seen}). Mode weights reflect the starts, and "
        "modes without a start are missing. Use sample(target), which takes FittedDiGS, or ParallelTempering or TemperedSMC; "
        "or whiten the target (metric=...) if its coordinates have different scales"
    ]


@dataclass(frozen=True)
class Summary:
    """What `Draws.summary()` returns.

    Per coordinate: `mean`, `sd`, `r_hat`, `ess_bulk`, `ess_tail` ([dim], from ArviZ). `weights`: of the modes, with
    between-chain standard errors; `flips`: mode changes per chain; `label_ess`: effective draws of the mode label.
    `notes`: what to keep in mind. `interrupted`: stopped by Ctrl-C before the draws asked for.
    """

    names: list[str]
    mean: Tensor
    sd: Tensor
    r_hat: Tensor
    ess_bulk: Tensor
    ess_tail: Tensor
    weights: ModeWeights
    centres: Tensor | None
    flips: Measurement
    label_ess: Measurement | None
    cost: Cost
    notes: tuple[str, ...]
    interrupted: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "coordinates": {
                name: {
                    "mean": float(self.mean[i]),
                    "sd": float(self.sd[i]),
                    "r_hat": _number(self.r_hat[i]),
                    "ess_bulk": _number(self.ess_bulk[i]),
                    "ess_tail": _number(self.ess_tail[i]),
                }
                for i, name in enumerate(self.names)
            },
            "modes": {
                "weights": self.weights.weights.tolist(),
                "se": None if self.weights.se is None else self.weights.se.tolist(),
                "centres": None if self.centres is None else self.centres.tolist(),
                "flips": self.flips.to_dict(),
                "label_ess": None if self.label_ess is None else self.label_ess.to_dict(),
            },
            "cost": vars(self.cost),
            "notes": list(self.notes),
            "interrupted": self.interrupted,
        }

    def table(self) -> "Group":
        """Tables for the terminal: coordinates (the first 20), modes (the heaviest 12), notes."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        coordinates = Table("coordinate", "mean", "sd", "R-hat", "ESS bulk", "ESS tail", title="Coordinates")
        for i, name in enumerate(self.names[:20]):
            cells = [f"{float(self.mean[i]):.4g}", f"{float(self.sd[i]):.4g}", f"{float(self.r_hat[i]):.3f}"]
            coordinates.add_row(name, *cells, f"{float(self.ess_bulk[i]):.0f}", f"{float(self.ess_tail[i]):.0f}")
        count = len(self.weights.weights)
        modes = Table("mode", "weight", "± se", "centre", title="1 mode" if count == 1 else f"{count} modes")
        heaviest = self.weights.weights.argsort(descending=True)[:12].tolist()
        for mode in heaviest:
            se = "" if self.weights.se is None else f"{float(self.weights.se[mode]):.4f}"
            modes.add_row(str(mode), f"{float(self.weights.weights[mode]):.4f}", se, self._centre(mode))
        parts: list[Any] = [coordinates, modes]
        if len(self.names) > 20 or len(self.weights.weights) > 12:
            parts.append(
                Text(
                    f"({max(len(self.names) - 20, 0)} more coordinates, {max(len(self.weights.weights) - 12, 0)} more modes)"
                )
            )
        parts.append(Text(f"{self.cost.gradients:,} gradient calls, {self.cost.seconds:.1f} s"))
        parts += [Text(f"! {note}", style="yellow") for note in self.notes]
        return Group(*parts)

    def _centre(self, mode: int) -> str:
        """The first coordinates of a mode's centre, where it is known."""
        if self.centres is None:
            return ""
        shown = ", ".join(f"{value:.3g}" for value in self.centres[mode][:4].tolist())
        return f"({shown}, ...)" if self.centres.shape[1] > 4 else f"({shown})"


def summarise(draws: "Draws", modes: Modes | Tensor | Callable[[Tensor], Tensor] | None = None) -> Summary:
    """Coordinates by ArviZ; modes as given (`Modes`, centres or labels) or as found in the draws."""
    arviz = require("arviz", "sampling")
    positions = draws.positions
    chains, _, dim = positions.shape
    table = positions.double().cpu().numpy()
    with warnings.catch_warnings():
        # short runs make ArviZ warn; the numbers come back NaN and are shown so
        warnings.simplefilter("ignore")
        data = arviz.convert_to_dataset({"x": table})
        diagnostics = {
            "r_hat": arviz.rhat(data),
            "ess_bulk": arviz.ess(data, method="bulk"),
            "ess_tail": arviz.ess(data, method="tail"),
        }
    columns = {name: torch.as_tensor(value["x"].values).reshape(dim) for name, value in diagnostics.items()}
    modes = find_modes(positions) if modes is None else modes
    if isinstance(modes, Modes):
        assign: Any = modes.label
        centres: Tensor | None = modes.centres
    else:
        assign, centres = modes, modes if isinstance(modes, Tensor) else None
    labels = assign_modes(positions, assign)
    number = int(labels.max()) + 1 if centres is None else len(centres)
    names = draws.names or [f"x[{i}]" for i in range(dim)]
    return Summary(
        names=names,
        mean=positions.double().mean((0, 1)).cpu(),
        sd=positions.double().std((0, 1)).cpu(),
        **columns,
        weights=mode_weights(positions, assign, modes=number),
        centres=centres,
        flips=mode_flips(labels),
        label_ess=label_ess(labels) if chains > 1 and number > 1 else None,
        cost=draws.cost,
        notes=(*draws.warnings, *_notes(draws, labels, columns["r_hat"], columns["ess_bulk"], names)),
        interrupted=draws.interrupted,
    )


def _notes(
    draws: "Draws", labels: Int[Tensor, "chain draw"], r_hat: Tensor, ess: Tensor, names: Sequence[str]
) -> list[str]:
    """What R-hat says, and what it cannot see."""
    notes = []
    finite = torch.nan_to_num(r_hat, nan=1.0)
    if float(finite.max()) > _HIGH_R_HAT:
        notes.append(
            f"R-hat is {float(finite.max()):.3g} for {names[int(finite.argmax())]}: the chains do not agree; run longer, or "
            "use sample(target) where modes are apart"
        )
    elif float(torch.nan_to_num(ess, nan=torch.inf).min()) < _LOW_ESS:
        least = int(torch.nan_to_num(ess, nan=torch.inf).argmin())
        notes.append(f"the effective sample size of {names[least]} is only {float(ess[least]):.0f}: run longer")
    if draws.config["kernel"]["kernel"] == "ULA":
        notes.append("ULA has no accept step: its draws are biased at every step size; MALA is the same with one")
    if draws.config.get("one_start"):
        notes.append(
            "all chains started at one point: agreement between them (R-hat) does not show that all modes were found"
        )
    moving = (labels[:, 1:] != labels[:, :-1]).any()
    if len(labels.unique()) > 1 and not bool(moving):
        notes.append("chains sit in different modes and none ever changed: the mode weights are those of the starts")
    return notes


def _number(value: Tensor) -> float | None:
    return float(value) if math.isfinite(float(value)) else None
