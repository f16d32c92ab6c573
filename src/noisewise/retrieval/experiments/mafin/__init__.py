"""What `noisewise compare mafin` runs: search on real sets over an encoder behind an endpoint, beside what experts try first."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.retrieval.experiments.mafin.problems import problems

    return problems(scale)


def _illustrate(*arguments: Any) -> None:
    from noisewise.retrieval.experiments.mafin.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "mafin",
    "Mafin beside what experts try first",
    "the same sets, the same black box behind a real endpoint, the same judgements; paired gains over the black box",
    _problems,
    _illustrate,
    protocols=("A", "B", "C", "D", "E", "W"),
    seeds={"quick": (0,), "cpu": (0, 1, 2), "paper": (0, 1, 2)},
)
run = COMPARISON.run
