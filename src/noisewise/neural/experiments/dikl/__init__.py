"""What `noisewise compare dikl` runs: forty modes in 2 and 8 dimensions, many wells, a cluster of particles."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.neural.experiments.dikl.problems import problems

    return problems(scale)


def _illustrate(*arguments: Any) -> None:
    from noisewise.neural.experiments.dikl.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "dikl",
    "DiKL beside its peers",
    "samples from one network call, beside chains with as many calls of the target",
    _problems,
    _illustrate,
    protocols=("A", "B", "C", "D", "E"),
    optional=("D",),
    absent={"quick": ("B", "C", "E")},
    seeds={"quick": (0,), "cpu": (0, 1, 2, 3, 4), "paper": (0, 1, 2)},
)
run = COMPARISON.run
