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


def _report(*arguments: Any) -> None:
    from noisewise.energy.experiments.mmgibbs.pictures import write_report

    write_report(*arguments)


COMPARISON = Comparison("mmgibbs", _problems, _report, protocols=("A", "B", "D", "OFFICIAL"), optional=("OFFICIAL",))
run = COMPARISON.run
