"""What `noisewise compare ocm` runs: two mixtures whose covariances are known, and a network of images trained here."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.diffusion.experiments.ocm.problems import problems

    return problems(scale, device)


def _illustrate(*arguments: Any) -> None:
    from noisewise.diffusion.experiments.ocm.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "ocm",
    "OCM beside its peers",
    "few-step samples and likelihood bounds with the covariance of x0, at equal network calls",
    _problems,
    _illustrate,
    protocols=("A", "B"),
    seeds={"quick": (0,), "cpu": (0, 1, 2), "paper": (0, 1, 2)},
)
run = COMPARISON.run
