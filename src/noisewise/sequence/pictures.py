"""Pictures of long convolutions: their kernels, what each resolution carries, and how far back they hear."""

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from noisewise.errors import InvalidInput, NoisewiseWarning, require
from noisewise.report import Report
from noisewise.sequence.layer import MRConv
from noisewise.sequence.merged import LongConv

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["branch_plot", "kernel_plot", "kernel_report", "reach", "reach_plot", "scale_plot"]

_BLUE, _ORANGE, _INK, _PALE, _GRID = "#0072B2", "#D55E00", "#222222", "#9AA5B0", "#E3E7EA"
# more panels say nothing more to the eye
_MAX_PANELS = 6
# a kernel with so small a share of values that are not 0 is drawn as taps
_SPARSE = 0.3
_MAX_WRITTEN = 120
# longer names of layers would squeeze what they stand beside
_MAX_NAME = 24
# fewer columns would be as wide as a page each
_MIN_COLUMNS = 4
_MAX_TICKS = 15


def kernel_report(module: nn.Module, report: Report | None = None) -> Report:
    """Pictures of all long convolutions inside `module`, in a page of their own or at the end of `report`.

    For each layer its merged kernel and the weights of its branches, for all of them what each resolution carries by depth,
    and the reach. Merged layers have no branches left, so only their kernels and their reach are drawn.
    Raises `InvalidInput` where there is none, `NoisewiseError` for layers that have seen no batch.
    """
    layers = _layers(module)
    page = Report("Long convolutions", f"{len(layers)} in {type(module).__name__}") if report is None else report
    for text in _merge_warnings(layers):
        page.warning(text)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoisewiseWarning)
        _draw(page, module, layers)
    return page


def _merge_warnings(layers: dict[str, MRConv | LongConv]) -> list[str]:
    """What merging each layer warns of, with the layer's name."""
    texts = []
    for name, layer in layers.items():
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always", NoisewiseWarning)
            _kernel(layer)
        texts += [f"{name}: {one.message}" if name else str(one.message) for one in found]
    return texts


def _draw(page: Report, module: nn.Module, layers: dict[str, MRConv | LongConv]) -> None:
    page.section("How far back each layer hears", _REACH).figure(
        reach_plot(module), "Each dot is a channel, the line their median; dashed: the longest lag that there is."
    )
    if any(isinstance(layer, MRConv) for layer in layers.values()):
        page.section("What each resolution carries", _SCALES).figure(
            scale_plot(module),
            "Share of each resolution in the squared norm of a layer's alpha over channels (and directions), in %.",
        )
    for name, layer in layers.items():
        page.section(f"Layer {name}" if name else "The layer", f"{type(layer).__name__}({layer.extra_repr()})")
        page.figure(kernel_plot(layer), f"Merged kernel{_without_skip(layer)}, by lag; {_shown(layer)}.")
        if isinstance(layer, MRConv):
            page.figure(branch_plot(layer), f"{_weight(layer)} of each sub-kernel; bars: the median channel.")


_REACH = (
    "The reach is the smallest lag up to which a merged kernel has 90 % of its energy. A layer whose reach is far below its "
    "length is local, whatever it could do. The direct path D u is not counted."
)
_SCALES = (
    "Every branch is normalised, so alpha says how much of the output it makes, up to gamma. All branches of a layer start with "
    "equal weights, so what differs in a row was learned. The last sub-kernel is cut at the length of the layer."
)


@torch.no_grad()
def reach(layer: MRConv | LongConv, share: float = 0.9) -> Int[Tensor, " channel"]:
    """Smallest lag, in either direction, up to which the merged kernel of each channel has `share` of its energy.

    Without the skip of an `MRConv`; a merged layer keeps it in lag 0. Raises `InvalidInput` for a share outside (0, 1).
    """
    if not 0 < share < 1:
        raise InvalidInput(f"share must lie between 0 and 1, got {share!r}")
    kernel = _kernel(layer)
    energy = kernel.square().sum(0)
    if len(kernel) > 1:
        # both directions meet in lag 0
        energy[:, 0] = kernel[:, :, 0].sum(0).square()
    return (energy.cumsum(-1) < share * energy.sum(-1, keepdim=True)).sum(-1)


def reach_plot(module: nn.Module, share: float = 0.9) -> "Figure":
    """The reach of every channel of every long convolution inside `module`, beside the longest lag."""
    layers = _layers(module)
    figure, (axes,) = _figure(height=1.2 + 0.42 * len(layers))
    for row, layer in enumerate(layers.values()):
        lags = reach(layer, share).double()
        # channels beside each other, so that equal ones can be told
        offset = torch.linspace(-0.22, 0.22, len(lags)) if len(lags) > 1 else torch.zeros(1)
        axes.plot(lags, row + offset, ".", color=_BLUE, alpha=0.6, markersize=5, markeredgewidth=0, zorder=2)
        middle = float(lags.quantile(0.5))
        axes.plot([middle, middle], [row - 0.34, row + 0.34], color=_INK, linewidth=1.6, zorder=3)
        last = layer.length - 1
        axes.plot([last, last], [row - 0.4, row + 0.4], color=_ORANGE, linestyle="--", linewidth=1.4, zorder=1)
    _lag_axis(axes, 0, max(layer.length for layer in layers.values()) - 1)
    _name_rows(axes, layers)
    axes.set_ylim(len(layers) - 0.45, -0.55)
    axes.set_xlabel(f"lag with {100 * share:g} % of the energy")
    axes.grid(axis="x", color=_GRID, linewidth=0.8)
    axes.grid(axis="y", visible=False)
    return figure


def scale_plot(module: nn.Module) -> "Figure":
    """Share of ||alpha_i||^2 over channels in that of the layer, in %: a row for each `MRConv` inside, a column a resolution."""
    layers = {name: layer for name, layer in _layers(module).items() if isinstance(layer, MRConv)}
    if not layers:
        raise InvalidInput(
            "all layers here are merged and have no branches: draw the module that they were merged from"
        )
    columns = max(len(layer.alpha) for layer in layers.values())
    shares = torch.full((len(layers), columns), torch.nan, dtype=torch.float64)
    for row, layer in enumerate(layers.values()):
        norms = layer.alpha.detach().double().square().sum((1, 2)).cpu()
        shares[row, : len(norms)] = 100 * norms / norms.sum().clamp(min=torch.finfo(torch.float64).tiny)
    figure, (axes,) = _figure(height=1.5 + 0.42 * len(layers))
    # branches that are still equal are neither the darkest nor the palest
    darkest = min(100.0, max(float(shares.nan_to_num(0.0).max()), 2 * 100 / columns))
    picture = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=darkest, aspect="auto")
    if shares.numel() <= _MAX_WRITTEN:
        for row, column in shares.isnan().logical_not().nonzero().tolist():
            value = float(shares[row, column])
            colour = "white" if value > 0.55 * darkest else _INK
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color=colour)
    _name_rows(axes, layers)
    axes.set_xticks(range(columns), _column_names(layers.values(), columns))
    axes.set_xlim(-0.5, max(columns, _MIN_COLUMNS) - 0.5)
    axes.set_xlabel("lags of the sub-kernel")
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(picture, ax=axes, label="share of ‖α‖², %", pad=0.02).outline.set_visible(False)
    return figure


def kernel_plot(layer: MRConv | LongConv) -> "Figure":
    """The merged kernel of the first channels on a symmetric logarithmic axis of lags; negative lags look ahead.

    Without the skip of an `MRConv`, which stands in the corner: at lag 0 it would dwarf what was learned.
    """
    kernel = _kernel(layer)
    directions, channels, lags = kernel.shape
    shown = min(channels, _MAX_PANELS)
    whole = (
        kernel[0]
        if directions == 1
        else torch.cat([kernel[1, :, 1:].flip(-1), kernel[:, :, :1].sum(0), kernel[0, :, 1:]], -1)
    )
    lag = torch.arange(whole.shape[-1]) - (whole.shape[-1] - lags)
    taps = bool((whole != 0).double().mean() < _SPARSE)
    figure, panels = _figure(rows=shown, height=0.9 + 0.95 * shown, sharex=True)
    skip = layer.skip if isinstance(layer, MRConv) else None
    for channel, axes in enumerate(panels):
        axes.axhline(0, color=_PALE, linewidth=0.8, zorder=1)
        values = whole[channel]
        if taps:
            met = values != 0
            axes.vlines(lag[met].tolist(), 0, values[met].tolist(), color=_BLUE, linewidth=0.9, zorder=2)
            axes.plot(lag[met], values[met], ".", color=_BLUE, markersize=3, zorder=3)
        else:
            axes.plot(lag, values, color=_BLUE, linewidth=1.0, marker="." if lags <= 64 else "", markersize=4, zorder=2)
        title = f"channel {channel}" + (
            "" if skip is None else f", D = {_signed(f'{float(skip.detach()[channel]):.2g}')}"
        )
        axes.set_title(title, loc="right", fontsize=8, color=_INK, pad=2)
        axes.locator_params(axis="y", nbins=3)
    _lag_axis(panels[-1], int(lag[0]), lags - 1)
    panels[-1].set_xlabel("lag" if directions == 1 else "lag (negative: steps ahead)")
    figure.supylabel("kernel", fontsize=10)
    return figure


def branch_plot(layer: MRConv) -> "Figure":
    """|alpha_i gamma_i| of every channel of each branch, a bar at the median; |alpha_i| where kernels are normalised."""
    weights = layer.alpha if layer.norm == "kernel" else layer.alpha * layer.weight
    size = weights.detach().abs().double().cpu()
    branches, directions, channels = size.shape
    figure, (axes,) = _figure(height=3.0)
    width = 0.8 / directions
    for direction, (colour, name) in enumerate(zip((_BLUE, _ORANGE), ("past", "future"), strict=True)):
        if direction >= directions:
            break
        place = torch.arange(branches) + (direction - (directions - 1) / 2) * width
        own = size[:, direction]
        axes.bar(
            place.tolist(), own.quantile(0.5, -1).tolist(), 0.85 * width, color=colour, alpha=0.35, label=name, zorder=2
        )
        spread = torch.linspace(-0.3, 0.3, channels) * width if channels > 1 else torch.zeros(1)
        axes.plot(
            (place.unsqueeze(-1) + spread).flatten(), own.flatten(), ".", color=colour, markersize=4,
            markeredgewidth=0, alpha=0.7, zorder=3,
        )  # fmt: skip
    axes.set_xticks(range(branches), _column_names([layer], branches))
    axes.set(xlabel="lags of the sub-kernel", ylabel=_weight(layer), ylim=(0, None))
    axes.set_xlim(-0.6, max(branches, _MIN_COLUMNS) - 0.4)
    if directions > 1:
        figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def _layers(module: nn.Module) -> dict[str, MRConv | LongConv]:
    """The long convolutions inside, by their names."""
    found: Mapping[str, Any] = {name: one for name, one in module.named_modules() if isinstance(one, MRConv | LongConv)}
    if not found:
        raise InvalidInput(f"{type(module).__name__} has no MRConv or LongConv layer inside: nothing to draw")
    return dict(found)


@torch.no_grad()
def _kernel(layer: MRConv | LongConv) -> Float[Tensor, "direction channel lag"]:
    """The merged kernel without the skip, in float64."""
    merged = layer if isinstance(layer, LongConv) else layer.merge()
    kernel = merged.kernel.detach().double().cpu().clone()
    if isinstance(layer, MRConv) and layer.skip is not None:
        kernel[0, :, 0] -= layer.skip.double().cpu()
    return kernel


def _weight(layer: MRConv) -> str:
    return "|α|" if layer.norm == "kernel" else "|α γ|"


def _without_skip(layer: MRConv | LongConv) -> str:
    return " without D" if isinstance(layer, MRConv) and layer.skip is not None else ""


def _shown(layer: MRConv | LongConv) -> str:
    channels = layer.d_model if isinstance(layer, MRConv) else len(layer.bias)
    return f"the first {_MAX_PANELS} of {channels} channels" if channels > _MAX_PANELS else "all channels"


def _column_names(layers: Iterable[MRConv], columns: int) -> list[str]:
    """How many lags the sub-kernels of each resolution have, in all layers; in units of l_0 where that differs."""
    found = [layer.kernels.resolutions for layer in layers]
    if len({own[0].period for own in found}) > 1:
        return [f"{2**index} l₀" for index in range(columns)]
    supports = [[own[index].support for own in found if index < len(own)] for index in range(columns)]
    return [f"{max(own)}" if min(own) == max(own) else f"{min(own)}–{max(own)}" for own in supports]


def _name_rows(axes: "Axes", layers: Mapping[str, MRConv | LongConv]) -> None:
    """Names beside the rows; of long ones the parts that differ, and above them what all of them share."""
    names = [name or type(layer).__name__ for name, layer in layers.items()]
    if len(names) > 1 and max(map(len, names)) > _MAX_NAME:
        parts = [name.split(".") for name in names]
        # every row keeps a name, also one that begins another's
        head = _shared([own[:-1] for own in parts])
        tail = _shared([own[len(head) :][:0:-1] for own in parts])[::-1]
        axes.set_title(".".join([*head, "[…]", *tail]), loc="left", fontsize=8, color=_INK, pad=6)
        names = [".".join(own[len(head) : len(own) - len(tail)]) for own in parts]
    half = _MAX_NAME // 2
    names = [name if len(name) <= _MAX_NAME else f"{name[: half - 1]}…{name[-half:]}" for name in names]
    axes.set_yticks(range(len(names)), names)


def _shared(parts: list[list[str]]) -> list[str]:
    """The first parts, as far as they are the same in all."""
    alike = itertools.takewhile(lambda own: len(set(own)) == 1, zip(*parts, strict=False))
    return [own[0] for own in alike]


def _signed(number: str) -> str:
    return number.replace("-", "\N{MINUS SIGN}")


def _figure(rows: int = 1, height: float = 3.2, **share: bool) -> tuple["Figure", list["Axes"]]:
    """Panels below each other, all pictures as wide as each other."""
    figure = require("matplotlib.figure", "sequence").Figure(figsize=(7.5, height), layout="constrained", dpi=110)
    panels = list(figure.subplots(rows, 1, squeeze=False, **share).flatten())
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=9)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
    return figure, panels


def _lag_axis(axes: "Axes", first: int, last: int) -> None:
    """Linear up to lag 1, logarithmic beyond, with a little room on both sides."""
    axes.set_xscale("symlog", linthresh=1, linscale=0.4)
    axes.set_xlim(first * 1.15 if first < 0 else -0.25, max(last, 1) * 1.15)
    inside = [n * 10**power for power in range(len(str(max(last, 1)))) for n in range(1, 10)]
    inside = [one for one in inside if one <= max(last, 1)]
    every = [tuple(range(1, 10))] if last < 10 else []
    for leading in (*every, (1, 2, 5), (1, 3), (1,)):
        named = [one for one in inside if int(str(one)[0]) in leading]
        ticks = [*(-one for one in reversed(named) if one <= -first), 0, *named]
        if len(ticks) <= _MAX_TICKS:
            break
    axes.set_xticks(ticks, [_signed(f"{one:,}") for one in ticks])
    axes.set_xticks([*(-one for one in inside if one <= -first), *inside], minor=True)
