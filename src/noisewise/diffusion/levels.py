"""The noise levels that a diffusion network was trained on, x_t = a(t) x + s(t) eps, as tables over its time steps."""

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput

__all__ = ["PREDICTIONS", "NoiseLevels"]

# diffusers' names, and those of `denoising.Denoiser`
PREDICTIONS = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


@dataclass(frozen=True, eq=False)
class NoiseLevels:
    """a and s [T] in float64 for t = 0 .. T-1, clean to noisy, and what the network predicts.

    `prediction`: "epsilon", "sample" (also a denoiser of EDM, with a = 1), "v_prediction" or "flow_prediction" (a = 1 - s).
    `learned_variance`: the network gives 2C channels, of which the first C are the prediction. The clean data are a = 1, s = 0.
    `times` [T]: what the network is told at each of them, where that is not t itself.
    Raises `InvalidInput` for tables that do not go from clean to noisy, and for an unknown prediction.
    """

    a: Float[Tensor, " T"]
    s: Float[Tensor, " T"]
    prediction: str = "epsilon"
    learned_variance: bool = False
    times: Float[Tensor, " T"] | None = None

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise InvalidInput(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        for name in ("a", "s") if self.times is None else ("a", "s", "times"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().cpu().double())
        a, s = self.a, self.s
        if a.ndim != 1 or a.shape != s.shape or len(a) < 2:
            raise InvalidInput(f"a and s must be two tables of equal length, got {tuple(a.shape)} and {tuple(s.shape)}")
        if self.times is not None and self.times.shape != a.shape:
            raise InvalidInput(f"times must have one entry a level, {tuple(a.shape)}, got {tuple(self.times.shape)}")
        if not bool((torch.isfinite(a) & torch.isfinite(s) & (a >= 0) & (s > 0)).all()):
            raise InvalidInput("noise levels must be finite, with a >= 0 and s > 0")
        if not bool((a[1:] * s[:-1] < a[:-1] * s[1:]).all()):
            raise InvalidInput("noise levels must go from clean to noisy: s/a must rise with t")
        if float(a[-1]) == 0 and self.prediction == "epsilon":
            raise InvalidInput(
                "the last level is pure noise (zero terminal SNR), from which predicted noise gives no image: such a network "
                "predicts v or the sample; set prediction_type"
            )

    def __len__(self) -> int:
        return len(self.a)

    @classmethod
    def from_alphas_cumprod(
        cls, alphas_cumprod: Float[Tensor, " T"], prediction: str = "epsilon", learned_variance: bool = False
    ) -> "NoiseLevels":
        """Variance-preserving levels, a^2 = alphas_cumprod."""
        kept = torch.as_tensor(alphas_cumprod).detach().cpu().double()
        if not bool(((kept >= 0) & (kept < 1)).all()):
            raise InvalidInput("alphas_cumprod must lie in [0, 1)")
        return cls(kept.sqrt(), (1 - kept).sqrt(), prediction, learned_variance)

    @classmethod
    def from_scheduler(cls, scheduler: Any) -> "NoiseLevels":
        """Of a diffusers scheduler with `alphas_cumprod`, or of one for flow matching. Raises `InvalidInput` for another."""
        if isinstance(scheduler, cls):
            return scheduler
        config = getattr(scheduler, "config", {})
        kept = getattr(scheduler, "alphas_cumprod", None)
        learned = config.get("variance_type") in ("learned", "learned_range")
        if isinstance(kept, Tensor):
            return cls.from_alphas_cumprod(kept, config.get("prediction_type", "epsilon"), learned)
        if "FlowMatch" in type(scheduler).__name__ and not config.get("use_dynamic_shifting"):
            steps = int(config["num_train_timesteps"])
            sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
            shift = float(config.get("shift", 1.0))
            sigma = shift * sigma / (1 + (shift - 1) * sigma)
            return cls(1 - sigma, sigma, "flow_prediction", learned, steps * sigma)
        raise InvalidInput(
            f"{type(scheduler).__name__} says no alphas_cumprod: give the scheduler that the network was trained with "
            "(DDPM, DDIM, DPM-Solver, flow matching without dynamic shifting), or NoiseLevels(a, s, prediction)"
        )

    @property
    def digest(self) -> str:
        """A short name of the tables and the prediction, to tell one schedule from another after rounding to float32."""
        text = ",".join(f"{value:.4g}" for value in torch.cat([self.a**2, self.s**2]).tolist())
        return hashlib.sha256(f"{self.prediction}:{text}".encode()).hexdigest()[:16]

    def index(self, t: Any, batch: int, device: torch.device) -> Tensor:
        """`t`, a number or [batch], as indices [batch]. Raises `InvalidInput` outside 0 .. T-1."""
        index = torch.as_tensor(t, device=device)
        if index.is_floating_point():
            if not bool((index == index.round()).all()):
                raise InvalidInput(f"time steps must be whole numbers in 0 .. {len(self) - 1}, got {t!r}")
            index = index.round().long()
        if index.ndim > 1 or (index.ndim == 1 and len(index) not in (1, batch)):
            raise InvalidInput(f"t must be one time step or [{batch}], got shape {tuple(index.shape)}")
        if bool(((index < 0) | (index >= len(self))).any()):
            raise InvalidInput(f"time steps must lie in 0 .. {len(self) - 1}, got {index.flatten()[:8].tolist()}")
        return index.expand(batch)

    def told(self, t: Tensor) -> Tensor:
        """What the network is told at the indices t [batch]."""
        return t if self.times is None else self.times[t.cpu()].to(device=t.device, dtype=torch.float32)

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of the indices t [batch], shaped to broadcast against `like` [batch, *event], in its dtype."""
        shape = (-1,) + (1,) * (like.ndim - 1)
        index = t.cpu()
        return self.a[index].to(like).reshape(shape), self.s[index].to(like).reshape(shape)

    def pair(self, t: int | None) -> tuple[float, float]:
        """a and s at one index; None is the clean data."""
        return (1.0, 0.0) if t is None else (float(self.a[t]), float(self.s[t]))
