"""Step sizes of Langevin and annealing moves on p(x | y): one per noise level, adapted, or one for all as published."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count, check_positive

__all__ = ["StepSizes"]

_RULES = ("smooth", "paper", "fixed")
# between the optimum of MALA (0.574) and the caution that a few steps from a poor start want
_ACCEPTANCE = 0.7


@dataclass(frozen=True, eq=False)  # tensors have no single equality
class StepSizes:
    """Lengths of the moves of a `PosteriorSampler` for each noise level; `adapted` returns the next ones.

    `levels`: [bin] noise scales in units of x, increasing; a noisy point belongs to the nearest one on the log scale.
    `log_langevin`, `log_anneal`: [bin] logs of a length; HMC steps by it and MALA's step size is its square.
    `scale`: standard deviation inside a mode, in units of x. Lengths then count in standard deviations of the posterior of
    a Gaussian mode, (1 / scale^2 + 1 / sigma^2)^(-1/2); with None they are in units of x themselves.
    `rule` of adaptation: "smooth", each bin towards an acceptance of 0.7; "paper", the square of the Langevin length times
    1.5 above 0.6 and divided by it below 0.5 (arXiv 2410.12456, official code), annealing steps as they are; "fixed".
    Make one by `per_level`, `spaced` or `published`. Raises `InvalidInput` for settings out of range.
    """

    levels: Float[Tensor, " bin"]
    log_langevin: Float[Tensor, " bin"]
    log_anneal: Float[Tensor, " bin"]
    scale: float | int | None
    rule: str = "smooth"

    def __post_init__(self) -> None:
        if self.rule not in _RULES:
            raise InvalidInput(f"rule must be one of {', '.join(_RULES)}, got {self.rule!r}")
        if self.scale is not None:
            check_positive("scale", self.scale)
        levels = self.levels.tolist()
        for level in levels or [math.nan]:
            check_positive("a noise level", level)
        for lower, upper in itertools.pairwise(levels):
            if lower >= upper:
                raise InvalidInput(f"noise levels must increase, but {lower:.6g} is followed by {upper:.6g}")

    @classmethod
    def per_level(cls, levels: Any, scale: float | int, dim: int) -> "StepSizes":
        """One bin for each of `levels` (increasing, in units of x), from lengths of the optimal order in `dim`, d^(-1/6)."""
        levels = torch.as_tensor(levels, dtype=torch.float64).reshape(-1)
        start = torch.full_like(levels, -math.log(check_count("dim", dim)) / 6)
        return cls(levels, start, start, check_positive("scale", scale))

    @classmethod
    def spaced(cls, lo: float | int, hi: float | int, bins: int, scale: float | int, dim: int) -> "StepSizes":
        """`bins` of equal width in log sigma that cover [lo, hi]."""
        lo, hi, bins = check_positive("lo", lo), check_positive("hi", hi), check_count("bins", bins)
        if lo >= hi:
            raise InvalidInput(f"lo must be below hi, got {lo!r} and {hi!r}")
        middle = (torch.arange(bins, dtype=torch.float64) + 0.5) / bins
        return cls.per_level(lo * (middle * math.log(hi / lo)).exp(), scale, dim)

    @classmethod
    def published(
        cls, langevin: float | int = 0.01, anneal: float | int = 1.0, rule: str = "fixed", squared: bool = False
    ) -> "StepSizes":
        """One for all levels, in units of x: `langevin` is MALA's step size h, `anneal` HMC's leapfrog step.

        `squared`: `anneal` is a MALA step size too.
        """
        length = check_positive("anneal", anneal) ** (0.5 if squared else 1.0)
        logs = [0.5 * math.log(check_positive("langevin", langevin)), math.log(length)]
        one = torch.tensor(logs, dtype=torch.float64)
        return cls(torch.ones(1, dtype=torch.float64), one[:1], one[1:], None, rule)

    def bins(self, sigma: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The bin of each noise scale."""
        log = self.levels.log()
        return torch.bucketize(sigma.double().log(), ((log[1:] + log[:-1]) / 2).to(sigma.device))

    def langevin(self, sigma: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Length of a Langevin move on the posterior at each noise scale; the step size h of `MALA` is its square."""
        return self._lengths(self.log_langevin, sigma, 1.0)

    def anneal(self, sigma: Float[Tensor, " batch"], power: float | int = 1.0) -> Float[Tensor, " batch"]:
        """Length of an annealing move where the target enters to the given power."""
        return self._lengths(self.log_anneal, sigma, power)

    def adapted(
        self,
        sigma: Float[Tensor, " batch"],
        langevin: Float[Tensor, " batch"] | None = None,
        anneal: Float[Tensor, " batch"] | None = None,
    ) -> "StepSizes":
        """The next step sizes, from acceptance rates of moves at these noise scales; None where no such move was made.

        NaN is passed over; a bin without a rate stays as it is.
        """
        if self.rule == "fixed":
            return self
        changes: dict[str, Any] = {}
        if langevin is not None:
            changes["log_langevin"] = self.log_langevin + self._change(sigma, langevin)
        if anneal is not None and self.rule != "paper":
            changes["log_anneal"] = self.log_anneal + self._change(sigma, anneal)
        return replace(self, **changes)

    def state(self) -> dict[str, Tensor]:
        """Everything as tensors, for a checkpoint."""
        return {
            "levels": self.levels,
            "log_langevin": self.log_langevin,
            "log_anneal": self.log_anneal,
            "scale": torch.tensor(math.nan if self.scale is None else self.scale, dtype=torch.float64),
            "rule": torch.tensor(_RULES.index(self.rule)),
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "StepSizes":
        """What `state` was taken of."""
        levels, langevin, anneal = (state[name].double().cpu() for name in ("levels", "log_langevin", "log_anneal"))
        scale = float(state["scale"])
        return cls(levels, langevin, anneal, None if math.isnan(scale) else scale, _RULES[int(state["rule"])])

    def _lengths(self, log: Tensor, sigma: Tensor, power: float | int) -> Tensor:
        length = log.exp().to(sigma)[self.bins(sigma)]
        return length if self.scale is None else length * (power / self.scale**2 + sigma**-2).rsqrt()

    def _change(self, sigma: Tensor, acceptance: Tensor) -> Tensor:
        known = torch.isfinite(acceptance)
        rates = torch.stack([torch.where(known, acceptance, 0.0), known]).double()
        sums = torch.zeros((2, len(self.levels)), dtype=torch.float64, device=sigma.device)
        sums.index_add_(1, self.bins(sigma), rates)
        mean = (sums[0] / sums[1]).cpu()
        if self.rule == "paper":
            # a factor of 1.5 on the squared length
            change = 0.5 * math.log(1.5) * ((mean > 0.6).double() - (mean < 0.5).double())
        else:
            change = mean - _ACCEPTANCE
        return torch.where(sums[1].cpu() > 0, change, 0.0)
