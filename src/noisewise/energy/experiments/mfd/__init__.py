"""What `noisewise compare mfd` runs: a closed form, small networks on known densities in one and two dimensions, digits."""

from typing import Any

from noisewise.comparison import Comparison, Problem

__all__ = ["COMPARISON", "run"]


def _problems(scale: str, device: str) -> tuple[Problem, ...]:
    from noisewise.energy.experiments.mfd.bumps import bumps
    from noisewise.energy.experiments.mfd.digit_classes import digit_classes
    from noisewise.energy.experiments.mfd.networks import networks

    return (*bumps(scale), *networks(scale), digit_classes(scale))


def _illustrate(*arguments: Any) -> None:
    from noisewise.energy.experiments.mfd.pictures import illustrate

    illustrate(*arguments)


COMPARISON = Comparison(
    "mfd",
    "MFD beside its peers",
    "one density model fitted by each loss; the truth and its mode weights are known",
    _problems,
    _illustrate,
    protocols=("A", "B", "C", "D"),
    absent={"quick": ("C",)},
    seeds={"quick": (0,), "cpu": (0, 1, 2, 3, 4), "paper": tuple(range(10))},
)
run = COMPARISON.run
