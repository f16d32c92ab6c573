"""Pictures of samples: over the density or beside trusted draws, energies and pair distances over a band of chance; of a fit.

A fit's curves are drawn from its history alone.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.plots import scatter_plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["distance_plot", "energy_plot", "sample_plot", "training_plot"]

_BLUE, _ORANGE, _INK = "#0072B2", "#D55E00", "#222222"
_BAND = "#C9D1D7"
_BINS = 80
# More panels or points than these say nothing more to the eye.
_MAX_PAIRS = 4
_MAX_DRAWN = 5_000
# What a history says of each look beside its curves.
_PLACES = ("stage", "step", "done", "gradients", "seconds")


def sample_plot(
    samples: Float[Tensor, "n dim"], target: Any, reference: Float[Tensor, "m dim"] | None = None
) -> "Figure":
    """Samples of a 2-D target over its contours; of others the pairs (x0, x1), (x2, x3), ... above those of `reference`.

    At most four pairs; a last coordinate without a partner is left out. Raises `InvalidInput` for one coordinate and for
    samples of another dim; `MissingExtra` without matplotlib.
    """
    _check(samples, target)
    if samples.shape[1] == 2:
        return scatter_plot(samples, reference, target.log_prob, names=getattr(target, "names", None))
    if samples.shape[1] < 2:
        raise InvalidInput(f"a picture of pairs needs 2 coordinates, got samples of shape {tuple(samples.shape)}")
    sets = [("samples", samples, _BLUE)] + ([] if reference is None else [("reference", reference, _INK)])
    pairs = min(samples.shape[1] // 2, _MAX_PAIRS)
    figure = _figure(width=0.6 + 2.0 * pairs, height=0.5 + 2.0 * len(sets))
    panels = figure.subplots(len(sets), pairs, squeeze=False, sharex="col", sharey="col")
    names = getattr(target, "names", None) or [f"x[{i}]" for i in range(samples.shape[1])]
    for row, (title, x, colour) in zip(panels, sets, strict=True):
        shown = x[torch.isfinite(x).all(-1)][:_MAX_DRAWN].detach().cpu()
        for pair, axes in enumerate(row):
            first, second = 2 * pair, 2 * pair + 1
            axes.plot(
                shown[:, first], shown[:, second], ".", color=colour, alpha=0.25, markersize=2.5, markeredgewidth=0
            )
            _dress(axes)
            axes.set_ylabel(names[second], fontsize=8, labelpad=1)
        row[0].set_title(f"{title} (n = {len(x)})", fontsize=9, loc="left")
    for pair, axes in enumerate(panels[-1]):
        axes.set_xlabel(names[2 * pair], fontsize=8)
    return figure


def energy_plot(samples: Float[Tensor, "n dim"], target: Any, reference: Float[Tensor, "m dim"]) -> "Figure":
    """Histogram of the energies of the samples over the band where those of perfect samples would lie.

    The band: the histogram of the reference, two standard errors of as many perfect samples and of the reference to either
    side. The axis spans the reference and a margin; samples beyond it are counted in a note. Raises `InvalidInput` for
    samples of another dim.
    """
    _check(samples, target)
    with torch.no_grad():
        given, trusted = (-target.log_prob(x).detach().double().cpu() for x in (samples, reference.to(samples)))
    return _band_plot(given.unsqueeze(-1), trusted.unsqueeze(-1), "energy")


def distance_plot(samples: Float[Tensor, "n dim"], target: Any, reference: Float[Tensor, "m dim"]) -> "Figure":
    """Histogram of all pair distances, drawn as in `energy_plot`; `target` is a cluster of particles.

    Raises `InvalidInput` for a target without `pair_distances` and for samples of another dim.
    """
    _check(samples, target)
    if not hasattr(target, "pair_distances"):
        raise InvalidInput(f"{type(target).__name__} has no pair_distances: it is no cluster of particles")
    given, trusted = (target.pair_distances(x.detach()).double().cpu() for x in (samples, reference))
    return _band_plot(given, trusted, "distance of two particles")


def training_plot(history: Sequence[Mapping[str, float | int | str]]) -> "Figure":
    """Every number that a fit's `history_` follows, over the steps of the generator; what never changed is left out.

    Raises `InvalidInput` for a history of fewer than two looks, or in which nothing changed.
    """
    names = [name for name in dict.fromkeys(key for look in history for key in look) if name not in _PLACES]
    curves = {name: [(look["step"], look[name]) for look in history if name in look] for name in names}
    curves = {name: points for name, points in curves.items() if len({value for _, value in points}) > 1}
    if not curves:
        raise InvalidInput(f"nothing changes in a history of {len(history)} looks: train for more steps")
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = _figure(width=1.0 + 2.6 * columns, height=0.4 + 2.2 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, (name, points) in zip(panels, curves.items(), strict=False):
        step, value = zip(*points, strict=True)
        axes.plot(step, value, color=_BLUE, linewidth=1.2, marker="." if len(step) < 10 else "")
        axes.set_title(name.replace("_", " "), fontsize=9, loc="left")
        axes.set_xlabel("step", fontsize=8)
        _dress(axes)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    return figure


def _band_plot(given: Float[Tensor, "n values"], trusted: Float[Tensor, "m values"], label: str) -> "Figure":
    """Every row of values counts as one draw: the pairs of a cluster are not independent of each other."""
    low, high = _limits(trusted.flatten())
    edges = torch.linspace(low, high, _BINS + 1, dtype=torch.float64)
    width = (high - low) / _BINS
    density, error = _histogram(trusted, edges)
    # chance acts on the samples and on the reference: their counts are those of n and of m rows
    error = error * (1 + len(trusted) / len(given)) ** 0.5
    figure = _figure(width=5.6, height=3.4)
    axes = figure.subplots()
    axes.stairs(
        (density + 2 * error) / width,
        edges,
        baseline=((density - 2 * error).clamp(min=0) / width).numpy(),
        fill=True,
        color=_BAND,
        label=f"perfect samples, ± 2 s.e. (from {len(trusted)})",
        zorder=1,
    )
    axes.stairs(density / width, edges, color=_INK, linewidth=0.8, zorder=2)
    own, _ = _histogram(given, edges)
    axes.stairs(own / width, edges, color=_BLUE, linewidth=1.4, label=f"samples (n = {len(given)})", zorder=3)
    outside, usual = (float((~((v >= low) & (v <= high))).double().mean()) for v in (given, trusted))
    if outside:
        note = f"{100 * outside:.2f} % beyond the axis\n(reference {100 * usual:.2f} %)"
        axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=_ORANGE)
    _dress(axes)
    axes.set(xlabel=label, ylabel="density", xlim=(low, high), ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _limits(values: Float[Tensor, " n"]) -> tuple[float, float]:
    """A little more than the range of the values; a few far ones do not decide it."""
    ordered = values.sort().values
    tail = len(ordered) // 1000
    low, high = float(ordered[tail]), float(ordered[-1 - tail])
    margin = 0.25 * (high - low) or 1.0
    return low - margin, high + margin


def _histogram(values: Float[Tensor, "n values"], edges: Float[Tensor, " edge"]) -> tuple[Tensor, Tensor]:
    """Share of the values in each bin, and its standard error from the spread over rows."""
    cell = torch.searchsorted(edges, values.contiguous(), right=True)
    counts = torch.zeros(len(values), len(edges) + 1, dtype=torch.float64)
    counts.scatter_add_(1, cell, torch.ones_like(values))
    share = counts[:, 1:-1] / values.shape[1]
    return share.mean(0), share.std(0) / len(values) ** 0.5


def _check(samples: Tensor, target: Any) -> None:
    if samples.ndim != 2 or samples.shape[1] != target.dim or len(samples) < 2:
        raise InvalidInput(
            f"samples must have shape [n, {target.dim}], the dim of the target, with at least 2 rows, "
            f"got {tuple(samples.shape)}"
        )


def _figure(width: float, height: float) -> "Figure":
    return require("matplotlib.figure", "sampling").Figure(figsize=(width, height), layout="constrained", dpi=110)


def _dress(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", color="#E3E7EA", linewidth=0.8)
    axes.set_axisbelow(True)
