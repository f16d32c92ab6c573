"""Pictures of a fitted covariance: its mean along the noise levels, its calibration, and maps of uncertainty."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.diffusion.uncertainty import Calibration
from noisewise.errors import InvalidInput, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from noisewise.diffusion.head import CovarianceHead

__all__ = ["calibration_plot", "mean_variance_plot", "uncertainty_plot"]

_BLUE, _ORANGE, _INK = "#0072B2", "#D55E00", "#222222"
_COLOURS = (_BLUE, _ORANGE, "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKS = ("o", "s", "^", "D", "v", "P")
# more rows say nothing more to the eye
_MAX_ROWS = 8


def mean_variance_plot(head: "CovarianceHead") -> "Figure":
    """The mean relative variance of a fitted head at each level, by the errors of the network and by the size of its answer.

    Both estimate the mean of r, and agree where the network is the exact posterior mean. Levels at which the second is not
    positive are left out of its curve, and counted. Raises `InvalidInput` for a head that was not fitted.
    """
    if not bool(torch.isfinite(head.residual).all()):
        raise InvalidInput("this head was not fitted: fit_covariance(model, head, data)")
    level = torch.arange(len(head.a))
    by_errors = (head.residual * (head.a / head.s).square()).cpu()
    by_size = (1 - head.gamma).cpu()
    figure, axes = _figure(width=6.4, height=3.4)
    axes.plot(level.tolist(), by_errors.tolist(), color=_BLUE, label="by its errors: E (eps - eps_hat)²")
    shown = by_size > 0
    axes.plot(
        level[shown].tolist(),
        by_size[shown].tolist(),
        color=_ORANGE,
        linestyle="--",
        label="by its size: 1 - E eps_hat²",
    )
    axes.set(yscale="log", xlabel="time step t", ylabel="mean relative variance")
    if not bool(shown.all()):
        share = float((~shown).double().mean())
        axes.set_title(f"1 - E eps_hat² is not positive at {share:.0%} of the levels", fontsize=9, loc="right")
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    return figure


def calibration_plot(found: Sequence[Calibration]) -> "Figure":
    """Mean squared error of x0 against the variance that was predicted, one series a level; right variances lie on the line.

    Bars are one standard error. Bins whose variance or error is not positive have no place on the axes, and are counted.
    """
    if not found:
        raise InvalidInput("nothing to draw: give at least one Calibration")
    figure, axes = _figure(width=5.4, height=4.8)
    drawn: list[float] = []
    hidden = 0
    for place, one in enumerate(found):
        rows = [row for row in zip(one.predicted, one.observed, one.se, strict=True) if row[0] > 0 and row[1] > 0]
        hidden += len(one.predicted) - len(rows)
        if not rows:
            continue
        predicted, observed, se = zip(*rows, strict=True)
        drawn += [*predicted, *observed]
        axes.errorbar(
            predicted, observed, yerr=se, fmt=_MARKS[place % len(_MARKS)], color=_COLOURS[place % len(_COLOURS)],
            markersize=4, linewidth=1, label=f"t = {one.t}: error / variance {one.ratio:.2f} ± {one.ratio_se:.2f}",
        )  # fmt: skip
    if not drawn:
        raise InvalidInput("no bin has a positive variance and a positive error")
    ends = (min(drawn) / 1.5, max(drawn) * 1.5)
    axes.plot(ends, ends, color=_INK, linewidth=1, linestyle="--", zorder=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=ends,
        ylim=ends,
        xlabel="predicted variance of x0",
        ylabel="squared error of x0",
    )
    axes.set_aspect("equal")
    if hidden:
        axes.set_title(f"{hidden} bins not positive, not shown", fontsize=9, loc="right")
    figure.legend(loc="outside upper center", ncols=1, frameon=False, fontsize=9)
    return figure


def uncertainty_plot(
    clean: Float[Tensor, "n channel height width"],
    noisy: Float[Tensor, "n channel height width"],
    mean: Float[Tensor, "n channel height width"],
    deviation: Float[Tensor, "n channel height width"],
    t: int,
) -> "Figure":
    """Image, noised image, E[x0 | x_t] and the standard deviation of each pixel (over channels: its root mean square)."""
    rows = min(len(clean), _MAX_ROWS)
    if not rows:
        raise InvalidInput("nothing to draw: give at least one image")
    titles = ("image", f"x_t, t = {t}", "E[x0 | x_t]", "sd of x0")
    figure = _empty(width=1.45 * len(titles) + 0.7, height=0.5 + 1.35 * rows)
    panels = figure.subplots(rows, len(titles), squeeze=False)
    spread = deviation[:rows].detach().double().square().mean(1).sqrt().cpu()
    most = max(float(spread.max()), 1e-12)
    for row in range(rows):
        for axes, x in zip(panels[row][:3], (clean[row], noisy[row], mean[row]), strict=True):
            _show(axes, x)
        shown = panels[row][3].imshow(spread[row].numpy(), cmap="viridis", vmin=0.0, vmax=most)
    for place, axes in enumerate(panels.flatten()):
        axes.set_xticks([])
        axes.set_yticks([])
        if place < len(titles):
            axes.set_title(titles[place], fontsize=9)
    figure.colorbar(shown, ax=panels[:, 3].tolist(), shrink=0.8)
    return figure


def _show(axes: "Axes", x: Tensor) -> None:
    """[-1, 1] as black to white, or as colours."""
    unit = ((x.detach().float().cpu() + 1) / 2).clamp(0, 1)
    if len(unit) == 3:
        axes.imshow(unit.permute(1, 2, 0).numpy())
    else:
        axes.imshow(unit.mean(0).numpy(), cmap="gray", vmin=0.0, vmax=1.0)


def _figure(width: float, height: float) -> tuple["Figure", "Axes"]:
    figure = _empty(width, height)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.grid(color="#E3E7EA", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _empty(width: float, height: float) -> Any:
    return require("matplotlib.figure", "diffusion").Figure(figsize=(width, height), layout="constrained", dpi=110)
