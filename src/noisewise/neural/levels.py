"""Noise levels of training: which ones a step sees, and what the gradient at each counts."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_positive

__all__ = ["WEIGHTS", "Levels"]

# of the gradient, as functions of a and sigma = s / a; they are the same in terms of x_t and of y = x_t / a
WEIGHTS = ("denoised", "ramped", "uniform", "1/a", "s2/a", "s2/a2")
# share of a run after which a mode's variance sets in
_SHARPENED = 0.6
# where the generator's lowest level begins, as a share of the highest
_ANNEALED_FROM = 0.3


class Drawn(NamedTuple):
    """A noise level and the weight of its gradient for each row, [batch] each."""

    sigma: Float[Tensor, " batch"]
    weight: Float[Tensor, " batch"]


@dataclass(frozen=True)
class Levels:
    """Noise scales sigma = s / a: log-uniform on [`lo`, `hi`], or uniform over `table` where one is given.

    `weight`: those of the paper, "uniform", "1/a", "s2/a" and "s2/a2", for x_t = a x + s eps with a^2 + s^2 = 1; the last one is
    sigma^2, with which the gradient is a difference of denoised means. "denoised" is that, plus `variance` (of a mode) times a
    factor that rises from 0 to 1 over the last 40 % of a run: low levels know nothing of mode weights and, given their full
    weight early, shift them, but they make the modes sharp. "ramped" goes from sigma^2 to the same weight for every level over
    those 40 %: sharper still, for the few steps of a dear network. `annealed`: share of a run over which the lowest level
    that the generator sees falls from 0.3 `hi` to `lo`; the score networks see all of them at all times.
    Raises `InvalidInput` for levels that are not above 0 or out of order, and for an unknown weight.
    """

    lo: float
    hi: float
    weight: str = "denoised"
    annealed: float = 0.5
    table: tuple[float, ...] | None = None
    variance: float = 0.0

    def __post_init__(self) -> None:
        check_positive("the lowest noise level", self.lo)
        check_positive("the highest noise level", self.hi)
        if self.lo > self.hi or (self.table is None and self.lo == self.hi):
            raise InvalidInput(f"noise levels must go from lo to a larger hi, got lo={self.lo!r} and hi={self.hi!r}")
        if self.weight not in WEIGHTS:
            raise InvalidInput(f"weight must be one of {', '.join(WEIGHTS)}, got {self.weight!r}")
        if not 0 <= self.annealed <= 1:
            raise InvalidInput(f"annealed must lie in [0, 1], got {self.annealed!r}")

    def draw(self, n: int, generator: torch.Generator, done: float | int = 1.0) -> Drawn:
        """`n` levels as the generator sees them when the share `done` of the run is over."""
        if self.table is not None:
            known = torch.tensor(self.table, dtype=torch.float32)
            sigma = known[torch.randint(len(known), (n,), generator=generator)]
        else:
            lo = self.lo
            if self.annealed and done < self.annealed:
                top = max(_ANNEALED_FROM * self.hi, self.lo)
                lo = top * (self.lo / top) ** (done / self.annealed)
            sigma = lo * torch.exp(torch.rand(n, generator=generator) * math.log(self.hi / lo))
        return Drawn(sigma, self._weight(sigma, done))

    def _weight(self, sigma: Tensor, done: float | int) -> Tensor:
        a = (1 + sigma.square()).rsqrt()
        # d x_t / dx = a and the score of y is a times that of x_t: in terms of y the paper's weight w stays w
        late = max(0.0, (min(done, 1.0) - _SHARPENED) / (1 - _SHARPENED))
        return {
            "denoised": lambda: sigma.square() + late * self.variance,
            "ramped": lambda: sigma.pow(2 * (1 - late)),
            "uniform": lambda: torch.ones_like(sigma),
            "1/a": lambda: 1 / a,
            "s2/a": lambda: (sigma * a).square() / a,
            "s2/a2": lambda: sigma.square(),
        }[self.weight]()
