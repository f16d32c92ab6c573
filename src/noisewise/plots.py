"""Plots that every slice shares, each a matplotlib Figure of its own: no pyplot, no global state."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.metrics.measurement import format_value
from noisewise.metrics.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["acceptance_plot", "measurement_plot", "mode_weight_plot", "scatter_plot", "trace_plot"]

# Okabe & Ito (2008), told apart with any colour vision; its yellow is left out, which is too pale on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_BLUE, _ORANGE, _INK, _PALE = "#0072B2", "#D55E00", "#222222", "#9AA5B0"
_WIDTH = 7.5
# More panels or points than these say nothing more to the eye.
_MAX_PANELS = 6
_MAX_DRAWN = 20_000


def trace_plot(
    draws: Float[Tensor, "chain draw dim"],
    labels: Int[Tensor, "chain draw"] | None = None,
    coordinate: int = 0,
    name: str | None = None,
) -> "Figure":
    """One coordinate along each of the first chains, coloured by mode where `labels` are given."""
    chains = min(len(draws), _MAX_PANELS)
    title = name or f"x[{coordinate}]"
    figure, panels = _panels(rows=chains, height=0.9 + 1.05 * chains, sharex=True, sharey=True)
    values = draws[:chains, :, coordinate].detach().cpu().double()
    step = max(1, values.shape[1] * chains // _MAX_DRAWN)
    index = torch.arange(0, values.shape[1], step)
    colour = None if labels is None else _mode_colours(labels.cpu())
    for chain, axes in enumerate(panels):
        axes.plot(index, values[chain, index], color=_PALE if colour else _BLUE, linewidth=0.6, zorder=1)
        if labels is not None and colour is not None:
            shown = labels[chain].cpu()[index]
            for mode, shade in colour.items():
                inside = shown == mode
                axes.plot(index[inside], values[chain, index][inside], ".", color=shade, markersize=3, zorder=2)
        axes.set_title(f"chain {chain}", loc="right", fontsize=8, color=_INK, pad=2)
    figure.supylabel(title, fontsize=10)
    panels[-1].set_xlabel("draw")
    if colour is not None and len(colour) <= len(_COLOURS):
        handles = [_dot(shade, f"mode {mode}") for mode, shade in colour.items()]
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=9)
    return figure


def mode_weight_plot(
    weights: Float[Tensor, " mode"],
    se: Float[Tensor, " mode"] | None = None,
    truth: Float[Tensor, " mode"] | None = None,
) -> "Figure":
    """Estimated weight of each mode with its standard error, and the true weights as dark lines."""
    modes = len(weights)
    figure, (axes,) = _panels(height=3.2, width=min(_WIDTH, max(4.8, 2.2 + 0.5 * modes)))
    place = range(modes)
    axes.bar(place, weights.tolist(), width=0.7, color="#56B4E9", label="estimate", zorder=2)
    if se is not None:
        axes.errorbar(
            place,
            weights.tolist(),
            yerr=se.tolist(),
            fmt="none",
            ecolor=_INK,
            elinewidth=1.2,
            capsize=max(1.0, min(4.0, 80 / modes)),
            label="± standard error",
            zorder=3,
        )
    if truth is not None:
        axes.hlines(
            truth.tolist(),
            [i - 0.45 for i in place],
            [i + 0.45 for i in place],
            color=_ORANGE,
            linewidth=2,
            label="truth",
            zorder=4,
        )
    axes.set(xlabel="mode", ylabel="weight", ylim=(0, None), xlim=(-0.7, modes - 0.3))
    axes.xaxis.set_major_locator(require("matplotlib.ticker", "sampling").MaxNLocator(integer=True))
    if se is not None or truth is not None:
        figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def scatter_plot(
    draws: Float[Tensor, "*batch dim"],
    reference: Float[Tensor, "m dim"] | None = None,
    log_prob: Callable[[Tensor], Tensor] | None = None,
    coordinates: tuple[int, int] = (0, 1),
    names: Sequence[str] | None = None,
) -> "Figure":
    """Two coordinates of the draws, beside trusted draws or over the contours of a two-dimensional `log_prob`.

    `log_prob`: `[n, 2] -> [n]`, unnormalised. Raises `InvalidInput` for contours of a density that is not 2-D.
    """
    flat = draws.reshape(-1, draws.shape[-1]).detach().cpu()
    if log_prob is not None and flat.shape[1] != 2:
        raise InvalidInput(f"contours need a density over 2 coordinates, got draws of dim {flat.shape[1]}")
    samples = [("draws", flat)] if reference is None else [("draws", flat), ("reference", reference.detach().cpu())]
    columns = len(samples)
    width = _WIDTH if columns == 2 else 5.2
    figure, panels = _panels(
        columns=columns, width=width, height=4.0 if columns == 2 else 4.8, sharex=True, sharey=True
    )
    first, second = coordinates
    for axes, (title, sample) in zip(panels, samples, strict=True):
        finite = sample[torch.isfinite(sample).all(-1)]
        thinned = finite[:: max(1, len(finite) // _MAX_DRAWN)]
        alpha = 0.6 if len(thinned) < 1000 else 0.25
        colour = _BLUE if title == "draws" else _INK
        axes.plot(
            thinned[:, first], thinned[:, second], ".", color=colour, alpha=alpha, markersize=3, markeredgewidth=0
        )
        axes.set_title(f"{title} (n = {len(sample)})", fontsize=10)
        axes.set_xlabel(names[first] if names else f"x[{first}]")
    panels[0].set_ylabel(names[second] if names else f"x[{second}]")
    if log_prob is not None:
        for axes in panels:
            _contours(axes, log_prob, flat)
    return figure


def acceptance_plot(
    r: Float[Tensor, " level"] | Sequence[float],
    acceptance: Float[Tensor, " level"] | Sequence[float],
    threshold: float = 1e-3,
) -> "Figure":
    """Acceptance of the jump move at each noise scale r = s / a; below `threshold` a level does not jump.

    Levels at which nothing was accepted stand at the lower edge as open triangles.
    """
    scale = torch.as_tensor(r, dtype=torch.float64)
    rate = torch.as_tensor(acceptance, dtype=torch.float64)
    if scale.shape != rate.shape or scale.ndim != 1:
        raise InvalidInput(f"r has shape {tuple(scale.shape)} and acceptance {tuple(rate.shape)}")
    figure, (axes,) = _panels(height=3.4, width=5.6)
    positive = rate > 0
    bottom = min([threshold / 5, *(rate[positive] / 2).tolist()])
    axes.plot(scale[positive], rate[positive], "o-", color=_BLUE, label="accepted")
    if not positive.all():
        lowest = torch.full_like(scale[~positive], bottom)
        axes.plot(scale[~positive], lowest, "v", markerfacecolor="white", color=_ORANGE, clip_on=False, label="none")
    axes.axhline(threshold, color=_INK, linestyle="--", linewidth=1, label=f"jumps stop at {threshold:g}")
    axes.set(xscale="log", yscale="log", xlabel="noise scale r = s / a", ylabel="acceptance", ylim=(bottom, 1.3))
    if len(scale) <= 8:
        axes.set_xticks(scale.tolist(), [f"{value:.3g}" for value in scale.tolist()])
        axes.minorticks_off()
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def measurement_plot(results: Results, name: str, problem: str | None = None, against: str | None = None) -> "Figure":
    """One measurement of a comparison: mean ± standard error of each system, every seed as a dot, the floor dashed.

    One panel per problem that has it, or only `problem`. Raises `InvalidInput` where nothing was measured.
    """
    problems = [p for p in results.problems if name in results.measurement_names(p) and problem in (None, p)]
    if not problems:
        known = sorted({m for p in results.problems for m in results.measurement_names(p)})
        raise InvalidInput(f"no measurement {name!r} on {problem or 'any problem'}; there are {known}")
    count = max(len(results.systems(p)) for p in problems)
    figure, panels = _panels(rows=len(problems), height=len(problems) * (1.0 + 0.34 * count))
    summary = results.summary(against)
    for axes, shown in zip(panels, problems, strict=True):
        entries = [e for e in summary if e.problem == shown and name in e.measurements]
        _measurement_panel(axes, results, entries, name)
        axes.set_title(shown, fontsize=10, loc="left")
    measured = entries[0].measurements[name]
    unit = f", {measured.unit}" if measured.unit else ""
    panels[-1].set_xlabel(f"{name}{unit}" + ("" if measured.better == "neither" else f" ({measured.better} is better)"))
    return figure


def _measurement_panel(axes: "Axes", results: Results, entries: Sequence[Any], name: str) -> None:
    drawn = []
    for row, entry in enumerate(entries):
        seeds = list(results.values(entry.system, entry.problem, name).values())
        measured = entry.measurements[name]
        drawn += seeds
        axes.plot(seeds, [row + 0.25] * len(seeds), "o", color=_PALE, markersize=3, zorder=2)
        if seeds:
            axes.errorbar(measured.value, row, xerr=measured.se, fmt="o", color=_BLUE, capsize=3, zorder=3)
        else:
            axes.text(0.01, row, "failed", transform=axes.get_yaxis_transform(), va="center", fontsize=8, color=_ORANGE)
    floors = [e.measurements[name].floor for e in entries if e.measurements[name].floor is not None]
    if floors:
        floor = sum(floors) / len(floors)
        drawn.append(floor)
        axes.axvline(floor, color=_ORANGE, linestyle="--", linewidth=1.2, zorder=1)
        axes.set_title(f"dashed: floor {format_value(floor)}", loc="right", fontsize=9, color=_ORANGE)
    # spread over more than a factor of 30, the good systems would all sit on the axis
    if drawn and min(drawn) > 0 and max(drawn) > 30 * min(drawn):
        axes.set_xscale("log")
    axes.set_yticks(range(len(entries)), [entry.system for entry in entries])
    axes.set_ylim(len(entries) - 0.5, -0.5)
    axes.grid(axis="x", color="#E3E7EA", linewidth=0.8)
    axes.grid(axis="y", visible=False)


def _contours(axes: "Axes", log_prob: Callable[[Tensor], Tensor], draws: Tensor, side: int = 160) -> None:
    limits = (axes.get_xlim(), axes.get_ylim())
    grid_x, grid_y = (torch.linspace(low, high, side, dtype=draws.dtype) for low, high in limits)
    points = torch.cartesian_prod(grid_x, grid_y)
    with torch.no_grad():
        value = log_prob(points).reshape(side, side).T.double().cpu()
    top = value[torch.isfinite(value)].max()
    levels = [float(top) - drop for drop in (8.0, 4.5, 2.0, 0.5)]
    axes.contour(
        grid_x,
        grid_y,
        value.nan_to_num(nan=-torch.inf).clamp(min=levels[0] - 50),
        levels,
        colors=_ORANGE,
        linewidths=0.7,
        linestyles="solid",
    )


def _panels(
    rows: int = 1, columns: int = 1, width: float = _WIDTH, height: float = 3.2, **share: bool
) -> tuple["Figure", list["Axes"]]:
    figure = require("matplotlib.figure", "sampling").Figure(figsize=(width, height), layout="constrained", dpi=110)
    grid = figure.subplots(rows, columns, squeeze=False, **share)
    panels = list(grid.flatten())
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(axis="y", color="#E3E7EA", linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _mode_colours(labels: Tensor) -> dict[int, Any]:
    """One colour per mode that occurs; beyond seven they come from a map of even lightness and have no legend."""
    modes = labels.unique().tolist()
    if len(modes) <= len(_COLOURS):
        return dict(zip(modes, _COLOURS, strict=False))
    shades = require("matplotlib", "sampling").colormaps["viridis"].resampled(len(modes))
    return {mode: shades(index) for index, mode in enumerate(modes)}


def _dot(colour: str, label: str) -> Any:
    return require("matplotlib.lines", "sampling").Line2D([], [], color=colour, marker="o", linestyle="", label=label)
