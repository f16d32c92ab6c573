"""What `noisewise compare mrconv` runs: kernels to identify, spoken digits, ListOps and images row by row."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.sequence.experiments.mrconv.problems import problems

    return problems(scale, device)


def _illustrate(*arguments: Any) -> None:
    from noisewise.sequence.experiments.mrconv.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "mrconv",
    "MRConv beside its peers",
    "kernels, spoken digits and expressions by layers of long memory in one and the same block",
    _problems,
    _illustrate,
    protocols=("A", "B", "C", "D", "E", "F", "S", "L", "R"),
    optional=("L", "R"),
    absent={"quick": ("F",), "cpu": ("F",)},
    seeds={"quick": (0,), "cpu": (0, 1, 2), "paper": (0, 1, 2)},
)
run = COMPARISON.run
