"""What `noisewise compare digs` runs: protocols A to D, every system at the same bill of gradient calls."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.sampling.experiments.digs.forty_modes import forty_modes
    from noisewise.sampling.experiments.digs.network import network
    from noisewise.sampling.experiments.digs.real_posterior import real_posterior
    from noisewise.sampling.experiments.digs.two_modes import two_mode_problems

    problems = [forty_modes(scale, device), *two_mode_problems(scale, device)]
    if scale != "quick":
        problems.append(network(scale, device))
    return (*problems, real_posterior(scale, device))


def _report(*arguments: Any) -> None:
    from noisewise.sampling.experiments.digs.pictures import write_report

    write_report(*arguments)


COMPARISON = Comparison("digs", _problems, _report, protocols=("A", "B", "C", "D"), absent={"quick": ("C",)})
run = COMPARISON.run
