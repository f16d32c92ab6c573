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


def _illustrate(*arguments: Any) -> None:
    from noisewise.sampling.experiments.digs.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "digs",
    "DiGS beside its peers",
    "equal gradient calls, warm-up included; floors are those of exact samplers",
    _problems,
    _illustrate,
    protocols=("A", "B", "C", "D"),
    absent={"quick": ("C",)},
)
run = COMPARISON.run
