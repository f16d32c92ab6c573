"""The report of a run: one offline HTML page with its summary, pictures, warnings and bill."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from noisewise.metrics.modes import assign_modes
from noisewise.report import Report, acceptance_plot, mode_weight_plot, scatter_plot, trace_plot
from noisewise.sampling.diagnostics import Summary, find_modes, summarise

if TYPE_CHECKING:
    from noisewise.sampling.draws import Draws

__all__ = ["write_page"]

_ROWS = 50


def write_page(
    draws: "Draws", path: str | Path, modes: Any = None, log_prob: Callable[[Tensor], Tensor] | None = None
) -> Path:
    """Write the page to `path`. `modes` as in `Draws.summary`; `log_prob` of a 2-D target draws its contours."""
    assign: Any = find_modes(draws.positions) if modes is None else modes
    label: Any = getattr(assign, "label", assign)
    summary = summarise(draws, assign)
    labels = assign_modes(draws.positions, label)
    kernel = draws.config["kernel"]["kernel"]
    chains, count, dim = draws.positions.shape
    report = Report(f"{kernel} on {draws.config['target']}", f"{chains} chains of {count} draws in {dim} dimensions")
    for text in summary.notes:
        report.warning(text)
    _numbers(report, draws, summary)
    report.section("Modes", "Weights are shares of the draws; errors are between chains, so they see slow mixing.")
    report.figure(
        mode_weight_plot(summary.weights.weights, summary.weights.se), alt="Weight of each mode with its error"
    )
    report.section("Draws")
    if dim > 1:
        contours = log_prob if dim == 2 else None
        report.figure(
            scatter_plot(draws.positions, log_prob=contours, names=draws.names), alt="The first two coordinates"
        )
    report.figure(
        trace_plot(draws.positions, labels, name=summary.names[0]), alt="Trace of the first coordinate by chain"
    )
    _transitions(report, draws)
    return report.save(path)


def _numbers(report: Report, draws: "Draws", summary: Summary) -> None:
    cost = draws.cost
    report.section("Summary")
    report.table(
        ["gradient calls", "value-only calls", "rejected as non-finite", "seconds", "mode flips", "label ESS"],
        [
            [
                f"{cost.gradients:,}",
                f"{cost.energies:,}",
                f"{cost.nonfinite:,}",
                f"{cost.seconds:.1f}",
                f"{summary.flips.value:.0f}",
                "-" if summary.label_ess is None else f"{summary.label_ess.value:.0f}",
            ]
        ],
    )
    report.table(
        ["coordinate", "mean", "sd", "R-hat", "ESS bulk", "ESS tail"],
        [
            [
                name,
                f"{float(summary.mean[i]):.4g}",
                f"{float(summary.sd[i]):.4g}",
                f"{float(summary.r_hat[i]):.3f}",
                f"{float(summary.ess_bulk[i]):.0f}",
                f"{float(summary.ess_tail[i]):.0f}",
            ]
            for i, name in enumerate(summary.names[:_ROWS])
        ],
        caption="" if len(summary.names) <= _ROWS else f"the first {_ROWS} of {len(summary.names)} coordinates",
    )


def _transitions(report: Report, draws: "Draws") -> None:
    """How the kernel moved: acceptance by noise level, temperature and swap."""
    report.section("Transitions", "Mean acceptance over chains and draws.")
    stats = draws.stats
    if "mwg_acceptance" in stats and draws.settings.get("a") is not None:
        r = draws.settings["s"] / draws.settings["a"]
        rate = stats["mwg_acceptance"].double().mean(0)
        report.figure(acceptance_plot(r, rate), "Acceptance of the Metropolis-within-Gibbs start by noise scale")
    rows = []
    for name, heading in (
        ("acceptance", "inner steps"),
        ("swap_acceptance", "swaps of neighbours"),
        ("fitted_acceptance", "fitted moves"),
    ):
        if name in stats and stats[name].numel():
            rate = stats[name].double().reshape(len(stats[name]), -1).mean(0)
            rows.append([heading, ", ".join(f"{value:.3f}" for value in rate.tolist())])
    report.table(["move", "acceptance (clean to noisy, cold to hot)"], rows)
    if "betas" in draws.settings:
        report.text("Inverse temperatures: " + ", ".join(f"{beta:.4g}" for beta in draws.settings["betas"].tolist()))
