"""What `noisewise compare ocm` runs: mixtures whose covariances are known, networks of images trained here, and CIFAR-10."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.diffusion.experiments.ocm.problems import problems

    return problems(scale, device)


def _check(scale: str, device: str, protocols: tuple[str, ...]) -> None:
    from noisewise.diffusion.experiments.ocm.problems import check

    check(scale, device, protocols)


def _illustrate(*arguments: Any) -> None:
    from noisewise.diffusion.experiments.ocm.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "ocm",
    "OCM beside its peers",
    "few-step samples and likelihood bounds with the covariance of x0, at equal network calls",
    _problems,
    _illustrate,
    protocols=("A", "B", "C", "D"),
    optional=("C", "D"),
    absent={"quick": ("D",), "cpu": ("D",)},
    seeds={"quick": (0,), "cpu": (0, 1, 2), "paper": (0, 1, 2)},
    check=_check,
)
run = COMPARISON.run
