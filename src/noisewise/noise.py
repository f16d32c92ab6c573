"""Gaussian corruption x_t = a x + s eps and schedules of it; shared by samplers, score identities and diffusion models."""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count, check_positive

__all__ = ["Corruption", "NoiseSchedule"]

# Below this, x_t / a loses all digits of x in float32.
_SMALLEST_A = 1e-6


@dataclass(frozen=True)
class Corruption:
    """One noise level: x_t = a x + s eps with eps ~ N(0, I).

    `a`: signal coefficient in (0, 1]; `s`: noise standard deviation, above 0, in units of x. The one number that governs
    a denoising sampler is `r = s / a`, the noise scale in units of x (digs paper, arXiv 2402.03008, section 2).
    Raises `InvalidInput` for a outside (0, 1] or s <= 0.
    """

    a: float | int
    s: float | int

    def __post_init__(self) -> None:
        if not isinstance(self.a, int | float) or not _SMALLEST_A <= self.a <= 1:
            raise InvalidInput(
                f"alpha (a) must lie in (0, 1] and be at least {_SMALLEST_A:g}, got {self.a!r}; "
                "for more noise raise s, which has no upper limit"
            )
        check_positive("sigma (s)", self.s)

    @property
    def r(self) -> float:
        """Noise scale in units of x, s / a."""
        return self.s / self.a

    def corrupt(self, x: Float[Tensor, "*batch dim"], generator: torch.Generator) -> Float[Tensor, "*batch dim"]:
        """Draw x_t = a x + s eps, of the dtype and device of `x`."""
        eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return self.a * x + self.s * eps


@dataclass(frozen=True)
class NoiseSchedule:
    """Noise levels in order from the cleanest (index 0) to the noisiest, as `Corruption`s with increasing `r`.

    Raises `InvalidInput` when empty or when `r` does not increase strictly.
    """

    levels: tuple[Corruption, ...]

    def __init__(self, levels: Sequence[Corruption]) -> None:
        levels = tuple(levels)
        if not levels:
            raise InvalidInput("a NoiseSchedule needs at least one level, got none")
        for cleaner, noisier in itertools.pairwise(levels):
            if noisier.r <= cleaner.r:
                raise InvalidInput(
                    f"levels must go from clean to noisy, but r = s/a goes from {cleaner.r:.6g} to {noisier.r:.6g}"
                )
        object.__setattr__(self, "levels", levels)

    def __len__(self) -> int:
        return len(self.levels)

    def __iter__(self) -> Iterator[Corruption]:
        return iter(self.levels)

    def __getitem__(self, index: int) -> Corruption:
        return self.levels[index]

    @property
    def a(self) -> tuple[float, ...]:
        """Signal coefficients, clean to noisy."""
        return tuple(level.a for level in self.levels)

    @property
    def s(self) -> tuple[float, ...]:
        """Noise standard deviations, clean to noisy, in units of x."""
        return tuple(level.s for level in self.levels)

    @property
    def r(self) -> tuple[float, ...]:
        """Noise scales s / a, clean to noisy, in units of x."""
        return tuple(level.r for level in self.levels)

    @classmethod
    def vp_alpha(cls, alpha_min: float | int = 0.1, alpha_max: float | int = 0.9, levels: int = 1) -> "NoiseSchedule":
        """Variance-preserving levels with a linear in index and s^2 = 1 - a^2, as DiGS uses them.

        `0 < alpha_min <= alpha_max < 1`. One level is the single level `alpha_min`, as in the authors' code.
        Suits targets of scale about 1; for another scale use `from_scale`.
        Source: Chen et al., ICML 2024, arXiv 2402.03008.
        """
        levels = check_count("levels", levels)
        for name, alpha in (("alpha_min", alpha_min), ("alpha_max", alpha_max)):
            if not _SMALLEST_A <= alpha < 1:
                raise InvalidInput(f"{name} must lie in (0, 1), got {alpha!r}; at 1 no noise is left")
        if levels > 1 and alpha_min >= alpha_max:
            raise InvalidInput(f"alpha_min must be below alpha_max, got {alpha_min!r} and {alpha_max!r}")
        alphas = (
            [alpha_min] if levels == 1 else torch.linspace(alpha_max, alpha_min, levels, dtype=torch.float64).tolist()
        )
        return cls([Corruption(alpha, math.sqrt(1 - alpha**2)) for alpha in alphas])

    @classmethod
    def vp_beta(cls, beta_min: float | int = 1e-4, beta_max: float | int = 0.02, levels: int = 1000) -> "NoiseSchedule":
        """Variance-preserving levels with beta linear in index, a^2 = prod(1 - beta).

        Source: Ho, Jain & Abbeel, NeurIPS 2020, section 4.
        """
        levels = check_count("levels", levels)
        if not 0 < beta_min <= beta_max < 1:
            raise InvalidInput(f"need 0 < beta_min <= beta_max < 1, got {beta_min!r} and {beta_max!r}")
        beta = torch.linspace(beta_min, beta_max, levels, dtype=torch.float64)
        a_squared = torch.cumprod(1 - beta, 0).tolist()
        return cls([Corruption(math.sqrt(v), math.sqrt(1 - v)) for v in a_squared])

    @classmethod
    def cosine(cls, levels: int = 1000, offset: float | int = 0.008, max_beta: float | int = 0.999) -> "NoiseSchedule":
        """Cosine schedule: a^2 = f(t)/f(0), f(t) = cos^2((t + offset) / (1 + offset) pi/2), beta clipped at `max_beta`.

        Source: Nichol & Dhariwal, ICML 2021, section 3.2.
        """
        levels = check_count("levels", levels)
        check_positive("offset", offset)
        if not 0 < max_beta < 1:
            raise InvalidInput(f"max_beta must lie in (0, 1), got {max_beta!r}")
        t = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
        f = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
        beta = (1 - f[1:] / f[:-1]).clamp(max=max_beta)
        a_squared = torch.cumprod(1 - beta, 0).tolist()
        return cls([Corruption(math.sqrt(v), math.sqrt(1 - v)) for v in a_squared])

    @classmethod
    def ve(cls, sigma_min: float | int, sigma_max: float | int, levels: int) -> "NoiseSchedule":
        """Variance-exploding levels: a = 1, s geometric from `sigma_min` to `sigma_max`, in units of x.

        One level is the single level `sigma_max`. Source: Song & Ermon, NeurIPS 2019.
        """
        levels = check_count("levels", levels)
        check_positive("sigma_min", sigma_min)
        check_positive("sigma_max", sigma_max)
        if levels == 1:
            return cls([Corruption(1.0, sigma_max)])
        if sigma_min >= sigma_max:
            raise InvalidInput(f"sigma_min must be below sigma_max, got {sigma_min!r} and {sigma_max!r}")
        ratio = math.log(sigma_max / sigma_min) / (levels - 1)
        return cls([Corruption(1.0, sigma_min * math.exp(ratio * index)) for index in range(levels)])

    @classmethod
    def from_scale(cls, min_r: float | int, max_r: float | int, levels: int) -> "NoiseSchedule":
        """Variance-preserving levels with r = s/a geometric from `min_r` (a mode's width) to `max_r` (the modes' spread).

        Both in units of x. One level is the single level `max_r`.
        """
        geometric = cls.ve(min_r, max_r, levels)
        return cls([Corruption(1 / math.hypot(1, level.r), level.r / math.hypot(1, level.r)) for level in geometric])
