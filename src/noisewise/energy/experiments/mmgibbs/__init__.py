"""What `noisewise compare mmgibbs` runs: exact scores, learned energies, digits, and the authors' protocol on request."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.energy.experiments.mmgibbs.digits import digits
    from noisewise.energy.experiments.mmgibbs.exact_score import exact_scores
    from noisewise.energy.experiments.mmgibbs.learned import learned_energies, official

    return (
        *exact_scores(scale, device),
        *learned_energies(scale, device),
        digits(scale, device),
        *official(scale, device),
    )


def _illustrate(*arguments: Any) -> None:
    from noisewise.energy.experiments.mmgibbs.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "mmgibbs",
    "MM-Gibbs beside its peers",
    "clean samples from one noisy model; floors are those of fresh data",
    _problems,
    _illustrate,
    protocols=("A", "B", "D", "OFFICIAL"),
    optional=("OFFICIAL",),
)
run = COMPARISON.run
