"""One reverse step from noise level t to a cleaner s: the mean and the variance of the Gaussian p(x_s | x_t).

Written for any x_t = a x + s eps; with a^2 + s^2 = 1 these are the formulas of DDPM and DDIM with the covariance of x0.
Sources: Ho, Jain & Abbeel, NeurIPS 2020; Song, Meng & Ermon, ICLR 2021; Ou et al., ICLR 2025, arXiv 2406.10808, section 3.
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput

__all__ = ["Step", "reverse_step"]

Pair = tuple[float, float]


class Step(NamedTuple):
    """mean = `clean` x0 + `noise` eps + `state` x_t;  covariance = `variance` I + `gain`^2 Cov[x0 | x_t]."""

    clean: float
    noise: float
    state: float
    variance: float
    gain: float
    large: float

    def mean(
        self,
        clean: Float[Tensor, "batch *event"],
        eps: Float[Tensor, "batch *event"],
        x_t: Float[Tensor, "batch *event"],
    ) -> Float[Tensor, "batch *event"]:
        """E[x_s | x_t]."""
        return self.clean * clean + (self.noise * eps if self.noise else self.state * x_t)


def reverse_step(t: Pair, s: Pair, eta: float | int | None = None) -> Step:
    """The step from (a, s) at `t` to (a, s) at `s`, which may be the data, (1, 0).

    `eta` None: the DDPM posterior q(x_s | x_t, x0). A number in [0, 1]: DDIM's, with variance eta^2 times DDPM's; 1 is the same
    law as DDPM's. `large` is the forward variance between the two, the "big" choice of DDPM. Raises `InvalidInput`.
    """
    (a_t, s_t), (a_s, s_s) = t, s
    kept = a_t / a_s  # a_{t|s}
    forward = s_t**2 - (kept * s_s) ** 2
    if forward <= 0:
        raise InvalidInput(f"a step must go to a cleaner level, got (a, s) = {t} -> {s}")
    small = forward * s_s**2 / s_t**2
    if eta is None:
        clean = a_s * forward / s_t**2
        return Step(clean, 0.0, kept * s_s**2 / s_t**2, small, clean, forward)
    if isinstance(eta, bool) or not isinstance(eta, int | float) or not 0 <= eta <= 1:
        raise InvalidInput(f"eta must lie in [0, 1], or be None for the DDPM form, got {eta!r}")
    variance = eta**2 * small
    root = math.sqrt(max(s_s**2 - variance, 0.0))
    return Step(a_s, root, 0.0, variance, a_s - root * a_t / s_t, forward)
