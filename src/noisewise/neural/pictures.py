"""Pictures of samples: over the density or beside trusted draws, energies and pair distances over a band of chance; of a fit.

A fit's curves are drawn from its history alone.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

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
    samples: Float[Tensor, "n dim"],
    target: Any,
    reference: Float[Tensor, "m dim"] | None = None,
    called: str = "reference",
) -> "Figure":
    """Draws of a 2-D target over its contours; of others the pairs (x0, x1), (x2, x3), ... above those of `reference`.

    At most four pairs; an odd last coordinate is paired with the one before it. `called`: the name of the reference. Raises
    `InvalidInput` for one coordinate and for samples of another dim; `MissingExtra` without matplotlib.
    """
    _check(samples, target)
    dim = samples.shape[1]
    if dim < 2:
        raise InvalidInput(f"a picture of pairs needs 2 coordinates, got samples of shape {tuple(samples.shape)}")
    sets = [("draws", samples, _BLUE)] + ([] if reference is None else [(called, reference, _INK)])
    if dim == 2:
        return _planar_plot(sets, target)
    pairs = [(first, min(first + 1, dim - 1)) for first in range(0, dim - 1, 2)]
    if dim % 2:
        pairs.append((dim - 2, dim - 1))
    pairs = pairs[:_MAX_PAIRS]
    figure = _figure(width=0.6 + 2.7 * len(pairs), height=0.4 + 2.7 * len(sets))
    panels = figure.subplots(len(sets), len(pairs), squeeze=False, sharex="col", sharey="col")
    names = getattr(target, "names", None) or [f"x[{i}]" for i in range(dim)]
    for row, (title, x, colour) in zip(panels, sets, strict=True):
        for axes, (first, second) in zip(row, pairs, strict=True):
            _scatter(axes, x, first, second, colour)
            _dress(axes)
            axes.set_ylabel(names[second], fontsize=9, labelpad=1)
        row[0].set_title(f"{title} (n = {len(x)})", fontsize=10, loc="left")
    for axes, (first, _) in zip(panels[-1], pairs, strict=True):
        axes.set_xlabel(names[first], fontsize=9)
    shown = len({coordinate for pair in pairs for coordinate in pair})
    if shown < dim:
        panels[0][-1].set_title(f"the first {shown} of {dim} coordinates", fontsize=9, loc="right")
    return figure


def _planar_plot(sets: Sequence[tuple[str, Tensor, str]], target: Any) -> "Figure":
    """The contours, axes and panels of `scatter_plot`, with the points and titles of the other pictures."""
    _, samples, _ = sets[0]
    reference = sets[1][1] if len(sets) > 1 else None
    figure = scatter_plot(samples, reference, target.log_prob, names=getattr(target, "names", None))
    for axes, (title, x, colour) in zip(figure.axes, sets, strict=True):
        axes.lines[0].remove()
        _scatter(axes, x, 0, 1, colour)
        axes.set_title(f"{title} (n = {len(x)})", fontsize=10)
    return figure


def _scatter(axes: "Axes", x: Float[Tensor, "n dim"], first: int, second: int, colour: str) -> None:
    shown = x[torch.isfinite(x).all(-1)][:_MAX_DRAWN].detach().cpu()
    # few points are seen one by one, many by where they pile up
    alpha = 0.8 if len(shown) <= 1000 else 0.55
    axes.plot(shown[:, first], shown[:, second], ".", color=colour, alpha=alpha, markersize=5, markeredgewidth=0)


def energy_plot(
    samples: Float[Tensor, "n dim"],
    target: Any,
    reference: Float[Tensor, "m dim"],
    called: str = "perfect samples",
) -> "Figure":
    """Histogram of the energies of the draws over the band where those of perfect samples would lie.

    The band: the histogram of the reference, two standard errors of as many perfect samples and of the reference to either
    side; `called`: its name in the legend. The axis spans the reference and a margin; where the middle 90 % of the draws
    reach further, it is compressed beyond the reference and holds them. Draws beyond it are counted in a note. Raises
    `InvalidInput` for samples of another dim.
    """
    _check(samples, target)
    with torch.no_grad():
        given, trusted = (-target.log_prob(x).detach().double().cpu() for x in (samples, reference.to(samples)))
    return _band_plot(given.unsqueeze(-1), trusted.unsqueeze(-1), "energy", called)


def distance_plot(
    samples: Float[Tensor, "n dim"],
    target: Any,
    reference: Float[Tensor, "m dim"],
    called: str = "perfect samples",
) -> "Figure":
    """Histogram of all pair distances, drawn as in `energy_plot`; `target` is a cluster of particles.

    Raises `InvalidInput` for a target without `pair_distances` and for samples of another dim.
    """
    _check(samples, target)
    if not hasattr(target, "pair_distances"):
        raise InvalidInput(f"{type(target).__name__} has no pair_distances: it is no cluster of particles")
    given, trusted = (target.pair_distances(x.detach()).double().cpu() for x in (samples, reference))
    return _band_plot(given, trusted, "distance of two particles", called)


def training_plot(fitted: Any) -> "Figure":
    """Every number that the `history_` of a fit follows, in the stage and over the steps of the stage in which it changes.

    `fitted`: the fitted sampler, or its `history_`. Raises `InvalidInput` for a history of fewer than two looks, or in which
    nothing changed.
    """
    history: Sequence[Mapping[str, Any]] = getattr(fitted, "history_", fitted)
    if not isinstance(history, Sequence) or isinstance(history, str):
        raise InvalidInput(f"training_plot takes a fitted sampler or its history_, got {type(fitted).__name__}")
    curves = _curves(history)
    if not curves:
        raise InvalidInput(f"nothing changes in a history of {len(history)} looks: train for more steps")
    columns = min(len(curves), 3)
    rows = -(-len(curves) // columns)
    figure = _figure(width=1.0 + 2.9 * columns, height=0.4 + 2.4 * rows)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, ((stage, name), points) in zip(panels, curves.items(), strict=False):
        step, value = zip(*points, strict=True)
        axes.plot(step, value, color=_BLUE, linewidth=1.2, marker="." if len(step) < 10 else "")
        axes.set_title(name.replace("_", " "), fontsize=10, loc="left")
        axes.set_xlabel(f"step ({stage})" if stage else "step", fontsize=9)
        _dress(axes)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    return figure


def _curves(history: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """Points (step of the stage, value) of each number that changes in a stage, by stage and name."""
    curves: dict[tuple[str, str], list[tuple[int, float]]] = {}
    before, stage = 0, history[0].get("stage", "") if history else ""
    for look in history:
        if look.get("stage", "") != stage:
            # steps are counted on, and the first look at a stage is after its first step
            stage, before = look["stage"], look["step"] - 1
        for name in look:
            if name not in _PLACES:
                curves.setdefault((stage, name), []).append((look["step"] - before, look[name]))
    return {key: points for key, points in curves.items() if len({value for _, value in points}) > 1}


def _band_plot(
    given: Float[Tensor, "n values"], trusted: Float[Tensor, "m values"], label: str, called: str
) -> "Figure":
    """Every row of values counts as one draw: the pairs of a cluster are not independent of each other."""
    scale = _Scale.of(given.flatten(), trusted.flatten())
    edges = torch.linspace(*scale.ends, _BINS + 1, dtype=torch.float64)
    width = float(edges[1] - edges[0])
    shown = scale.inverse(edges)
    density, error = _histogram(scale.forward(trusted), edges)
    # chance acts on the samples and on the reference: their counts are those of n and of m rows
    error = error * (1 + len(trusted) / len(given)) ** 0.5
    figure = _figure(width=5.6, height=3.4)
    axes = figure.subplots()
    axes.stairs(
        (density + 2 * error) / width,
        shown,
        baseline=((density - 2 * error).clamp(min=0) / width).numpy(),
        fill=True,
        color=_BAND,
        label=f"{called}, ± 2 s.e. (n = {len(trusted)})",
        zorder=1,
    )
    axes.stairs(density / width, shown, color=_INK, linewidth=0.8, zorder=2)
    own, _ = _histogram(scale.forward(given), edges)
    axes.stairs(own / width, shown, color=_BLUE, linewidth=1.4, label=f"draws (n = {len(given)})", zorder=3)
    low, high = float(shown[0]), float(shown[-1])
    outside, usual = (float((~((v >= low) & (v <= high))).double().mean()) for v in (given, trusted))
    if outside:
        note = f"{100 * outside:.2f} % beyond the axis\n(reference {100 * usual:.2f} %)"
        axes.text(0.99, 0.97, note, transform=axes.transAxes, ha="right", va="top", fontsize=8, color=_ORANGE)
    _dress(axes)
    height = "density"
    if scale.compressed:
        axes.set_xscale("function", functions=(scale.forward, scale.inverse))
        axes.set_xticks(*scale.ticks())
        label, height = f"{label} (axis compressed away from the reference)", "density along the axis"
    # room for the note
    top = axes.get_ylim()[1] * (1.15 if outside else 1.0)
    axes.set(xlabel=label, ylabel=height, xlim=(low, high), ylim=(0, top))
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


class _Scale(NamedTuple):
    """An axis from the reference's `low` to its `high`, or, `compressed`, beyond: there as an inverse hyperbolic sine, which is
    linear around the reference and logarithmic far from it. `ends`: of the axis, on its own scale.
    """

    centre: float
    half: float
    compressed: bool
    ends: tuple[float, float]

    @classmethod
    def of(cls, given: Tensor, trusted: Tensor) -> "_Scale":
        """The axis that holds the reference and the middle 90 % of the finite values given."""
        low, high = _limits(trusted)
        usual = given[torch.isfinite(given)].sort().values
        if not len(usual):
            usual = trusted
        tail = len(usual) // 20
        least, most = float(usual[tail]), float(usual[-1 - tail])
        if low <= least and most <= high:
            return cls(0.0, 1.0, False, (low, high))
        plain = cls((low + high) / 2, (high - low) / 2, True, (low, high))
        left, right = plain.forward(torch.tensor([min(low, least), max(high, most)], dtype=torch.float64)).tolist()
        # half a unit more is a factor of 1.6 far out
        margin = min(0.05 * (right - left), 0.5)
        return plain._replace(ends=(left - margin, right + margin))

    def forward(self, x: Any) -> Any:
        """From values to the axis."""
        if not self.compressed:
            return x
        return torch.asinh((torch.as_tensor(x, dtype=torch.float64) - self.centre) / self.half)

    def inverse(self, t: Any) -> Any:
        """From the axis to values."""
        return self.centre + self.half * torch.sinh(torch.as_tensor(t, dtype=torch.float64)) if self.compressed else t

    def ticks(self) -> tuple[list[float], list[str]]:
        """About seven round values, evenly over the axis, and what is written there."""
        edges = torch.linspace(*self.ends, 8, dtype=torch.float64)
        cells, middle = self.inverse(edges), self.inverse((edges[1:] + edges[:-1]) / 2)
        # on a logarithmic stretch a cell is wider than its middle is far out
        width = torch.minimum(cells[1:] - cells[:-1], (middle - self.centre).abs().clamp(min=self.half))
        units = 10 ** width.log10().floor()
        # 0 and -0 are one place
        places = sorted({float(value) + 0.0 for value in (middle / units).round() * units})
        return places, [_number(place) for place in places]


def _number(x: float) -> str:
    """A round value, the shorter way: 3e7, but 1000010 where that is meant."""
    short = f"{x:.0e}"
    text = short.replace("e+0", "e").replace("e+", "e") if abs(x) >= 1e5 and float(short) == x else f"{x:.12g}"
    return text.replace("-", "\N{MINUS SIGN}")


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
