"""Langevin on the noisy density of a model, and walk-jump sampling on it (Saremi & Hyvarinen, JMLR 20, 2019): baselines."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.denoising.models import as_model, check_corruption
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption
from noisewise.sampling.kernel import Phase, as_setting, given_settings, plain_settings

__all__ = ["NoisyLangevin", "WalkInfo", "WalkJump"]


class WalkState(NamedTuple):
    """Where each chain walks, x_t, and the score of the noisy density there."""

    noisy: Float[Tensor, "chain dim"]
    score: Float[Tensor, "chain dim"]
    position: Float[Tensor, "chain dim"]


class WalkInfo(NamedTuple):
    """How many new points had a score that is not finite and were not taken."""

    nonfinite: Tensor


@dataclass(frozen=True)
class NoisyLangevin:
    """Unadjusted Langevin on the noisy density q(x_t) of a model: its draws are noisy, and biased by the step size.

    `model`: an `Energy`, `Score` or `Denoiser` of x_t = a x + s eps. `step_size` h, in squared units of x_t (drift h score,
    noise sqrt(2 h)); by default s^2 / 4. Starts are read as clean, and a x is where the walk begins.
    Cost per iteration and chain: one score call. Raises `InvalidInput` for a step size that is not above 0.
    Source: the baseline of Zhang et al., NeurIPS 2023, arXiv 2305.11650.
    """

    model: Any
    corruption: Corruption
    step_size: float | int | Tensor | None = None
    gradients_per_step = 1
    energies_per_step = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_model(self.model))
        if not isinstance(self.corruption, Corruption):
            raise InvalidInput(f"corruption must be a Corruption(a, s), got {self.corruption!r}")
        check_corruption(self.model, self.corruption)
        as_setting("step_size", self.step_size)

    def bind(self, start: Float[Tensor, "chain dim"]) -> "NoisyLangevin":
        """This kernel; nothing in it depends on the starts."""
        return self

    def init(self, position: Float[Tensor, "chain dim"]) -> WalkState:
        """State at the clean points `position`; one score call per chain."""
        noisy = self.corruption.a * position
        return self._at(noisy, self._score(noisy))

    def start(self, cold: WalkState) -> WalkState:
        """The state itself."""
        return cold

    def step(self, state: WalkState, generator: torch.Generator) -> tuple[WalkState, WalkInfo]:
        """One Langevin step of every chain."""
        x_t = state.noisy
        h = self.corruption.s**2 / 4 if self.step_size is None else self.step_size
        h = torch.as_tensor(h, dtype=x_t.dtype, device=x_t.device)
        xi = torch.randn(x_t.shape, dtype=x_t.dtype, device=x_t.device, generator=generator)
        moved = x_t + h * state.score + (2 * h).sqrt() * xi
        score = self._score(moved)
        fine = torch.isfinite(score).all(-1, keepdim=True) & torch.isfinite(moved).all(-1, keepdim=True)
        noisy, score = torch.where(fine, moved, x_t), torch.where(fine, score, state.score)
        return self._at(noisy, score), WalkInfo((~fine).sum())

    def _score(self, x_t: Tensor) -> Tensor:
        with torch.no_grad():
            return self.model.score(x_t, self.corruption)

    def _at(self, noisy: Tensor, score: Tensor) -> WalkState:
        return WalkState(noisy, score, noisy)

    def settings(self) -> dict[str, Tensor]:
        """`step_size`, where set."""
        return given_settings(step_size=self.step_size)

    def with_settings(self, settings: dict[str, Tensor]) -> "NoisyLangevin":
        """The same kernel with these settings."""
        changes: dict[str, Any] = dict(settings)
        return replace(self, **changes)

    def warmup_phases(self, gradients: int, state: WalkState) -> list[Phase]:
        """None: without an acceptance rate there is nothing to adapt to."""
        return []

    def state_type(self) -> type:
        """`WalkState`."""
        return WalkState

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        return {
            "kernel": type(self).__name__,
            "model": type(self.model).__name__,
            "a": self.corruption.a,
            "s": self.corruption.s,
            **plain_settings(step_size=self.step_size),
        }


@dataclass(frozen=True)
class WalkJump(NoisyLangevin):
    """Walk by Langevin in the noisy density, and jump to the denoised mean E[x | x_t] for each draw: no call of its own.

    The draws are less dispersed than the clean density, by what the denoiser's posterior spreads. Arguments and errors as
    `NoisyLangevin`. Source: Saremi & Hyvarinen, JMLR 20, 2019.
    """

    def _at(self, noisy: Tensor, score: Tensor) -> WalkState:
        a, s = self.corruption.a, self.corruption.s
        return WalkState(noisy, score, (noisy + s**2 * score) / a)
