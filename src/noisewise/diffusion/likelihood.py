"""The variational bound of a diffusion model in few steps, term by term: what a covariance is worth, in bits.

Source: Ho, Jain & Abbeel, NeurIPS 2020, equation 5; the last term as in Bao et al., ICLR 2022, arXiv 2201.06503.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.denoising.covariance import FullCovariance
from noisewise.diffusion.fitting import frozen
from noisewise.diffusion.model import DiffusionModel, Prediction, as_diffusion_model
from noisewise.diffusion.reverse import Step, reverse_step
from noisewise.diffusion.sources import Source, as_source
from noisewise.diffusion.steps import step_schedule
from noisewise.errors import InvalidInput
from noisewise.metrics.measurement import Measurement
from noisewise.typing import check_count

__all__ = ["vlb_bits_per_dim", "vlb_terms"]

_CHUNK = 256
_LOG_FLOOR = 1e-12
_LAST = ("fixed", "covariance")


def vlb_bits_per_dim(
    model: Any,
    data: Float[Tensor, "row *event"],
    covariance: Any = None,
    steps: int | list[int] = 50,
    *,
    levels: int = 256,
    **options: Any,
) -> Measurement:
    """The bound on -log2 p(x) per entry of images with `levels` grey levels on [-1, 1], its mean and standard error over rows.

    Arguments as `vlb_terms`. Lower is better; a perfect model of the data reaches their entropy.
    """
    per_row = vlb_terms(model, data, covariance, steps, levels=check_count("levels", levels, 2), **options).sum(1)
    bits = per_row / (data[0].numel() * math.log(2))
    se = float(bits.std() / len(bits) ** 0.5) if len(bits) > 1 else None
    return Measurement(float(bits.mean()), se, n=len(bits), unit="bits/dim")


def vlb_terms(
    model: Any,
    data: Float[Tensor, "row *event"],
    covariance: Any = None,
    steps: int | list[int] = 50,
    *,
    noise_schedule: Any = None,
    levels: int | None = None,
    clip: float | int | None = 1.0,
    max_variance: float | int | None = None,
    floor: float | int = 0.0,
    last: str = "fixed",
    seed: int = 0,
    **conditions: Any,
) -> Float[Tensor, "row term"]:
    """The bound on -log p(x) in nats, float64: the prior's term, the steps' from noisy to clean, and the decoder's.

    `covariance`: a fitted head, a source, "lanczos" or "probes"; None is the smaller fixed variance, "large" the larger.
    `steps`: how many, at even spacing with both ends, or the indices 1 .. T that `step_schedule` gives. One draw of noise a
    term and row. `levels`: grey levels on [-1, 1] of the decoder; None is a density. `clip`: x0 is clipped to +- it.
    `max_variance`: bound of the variances of x0, `clip`^2 by default. `floor`: least r. `last`: variance of the decoder, "fixed"
    (that of the step between the two cleanest levels, as published) or "covariance" (that of x0).
    Raises `InvalidInput` for rows of another shape, K < 2 or > T, and a variance that is NaN.
    """
    known = as_diffusion_model(model, noise_schedule, _site(covariance))
    if last not in _LAST:
        raise InvalidInput(f"last must be one of {_LAST}, got {last!r}")
    if data.ndim < 2 or not bool(torch.isfinite(data).all()):
        raise InvalidInput(f"data must be finite rows [row, *event], got shape {tuple(data.shape)}")
    total = len(known.levels)
    visited = step_schedule(total, steps) if isinstance(steps, int) else [check_count("steps", t) for t in steps]
    if len(visited) < 2 or visited != sorted(set(visited)) or visited[-1] > total:
        raise InvalidInput(f"steps must be at least two rising indices in 1 .. {total}, got {visited[:8]}")
    if visited[-1] < total / 2:
        raise InvalidInput(
            f"steps={visited[:8]} are indices in 1 .. {total} and must reach the noise; one number says how many"
        )
    reach = float(data.abs().max())
    if clip is not None and reach > 1.001 * clip:
        raise InvalidInput(
            f"the data reach {reach:.4g}, beyond clip={clip:g} to which x0 is cut: give clip=None, or data on the scale that the "
            "model was trained on"
        )
    generator = torch.Generator(data.device).manual_seed(check_count("seed", seed, 0))
    large = covariance == "large" if isinstance(covariance, str) else False
    source = None if large else as_source(covariance, generator)
    bound = _Bound(known, source, large, clip, max_variance, float(floor), conditions)
    path: list[int | None] = [None, *(t - 1 for t in visited)]
    rows = []
    with frozen(known.network):
        for x in data.split(_CHUNK):
            terms = [
                _prior(x, known.levels.pair(path[-1])),
                *(bound.step(x, path[place], path[place - 1], generator) for place in range(len(path) - 1, 1, -1)),
                bound.decoder(x, path[1], levels, last, generator),
            ]
            rows.append(torch.stack(terms, 1))
    return torch.cat(rows)


def _site(covariance: Any) -> str | None:
    head = getattr(covariance, "head", covariance)
    return getattr(getattr(head, "config", None), "site", None)


def _prior(x: Tensor, pair: tuple[float, float]) -> Float[Tensor, " row"]:
    """KL(q(x_T | x0) || N(0, I))."""
    a, s = pair
    return 0.5 * (s**2 - 1 - 2 * math.log(s) + (a * x.double()).square()).flatten(1).sum(1)


class _Bound:
    """The terms of one model and one covariance."""

    def __init__(
        self,
        model: DiffusionModel,
        source: Source | None,
        large: bool,
        clip: Any,
        most: Any,
        floor: float,
        conditions: Any,
    ) -> None:
        self.model, self.source, self.large = model, source, large
        self.clip, self.floor, self.conditions = clip, floor, conditions
        self.most = math.inf if clip is None and most is None else float(clip**2 if most is None else most)

    def step(self, x: Tensor, t: Any, s: Any, generator: torch.Generator) -> Float[Tensor, " row"]:
        """KL between the true posterior of the step and the model's."""
        prediction = self._predict(x, t, generator)
        step = reverse_step(self.model.levels.pair(t), self.model.levels.pair(s))
        offset = (step.gain * (x - self._clipped(prediction)).double()).flatten(1)
        variance, offset = self._variance(prediction, step, s, offset)
        small = step.variance
        return 0.5 * ((variance / small).log() + (small + offset.square()) / variance - 1).sum(1)

    def decoder(
        self, x: Tensor, t: Any, levels: int | None, last: str, generator: torch.Generator
    ) -> Float[Tensor, " row"]:
        """-log p(x0 | x_1)."""
        prediction = self._predict(x, t, generator)
        offset = (x - self._clipped(prediction)).double().flatten(1)
        if last == "fixed":
            table = self.model.levels
            fixed = reverse_step(table.pair(1), table.pair(0)).variance
            variance: Tensor = torch.full_like(offset, fixed)
        else:
            step = reverse_step(self.model.levels.pair(t), (1.0, 0.0))
            variance, offset = self._variance(prediction, step, None, offset)
        if levels is None:
            return 0.5 * (offset.square() / variance + (2 * math.pi * variance).log()).sum(1)
        return _discretised(x.double().flatten(1), offset, variance.sqrt(), levels)

    def _predict(self, x: Tensor, t: Any, generator: torch.Generator) -> Prediction:
        a, s = self.model.levels.pair(t)
        eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        graph = self.source is not None and self.source.graph
        return self.model.predict(a * x + s * eps, t, graph, **self.conditions)

    def _clipped(self, prediction: Prediction) -> Tensor:
        return prediction.clean if self.clip is None else prediction.clean.clamp(-self.clip, self.clip)

    def _variance(self, prediction: Prediction, step: Step, s: int | None, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Variances of the step along some axes, in float64, and the offset along the same."""
        if self.source is None:
            value = step.large if self.large else step.variance
            return torch.full_like(offset, value), offset
        found = self.source(prediction, s)
        if isinstance(found, Tensor):
            a, sigma = float(prediction.a.flatten()[0]), float(prediction.s.flatten()[0])
            least = self.floor * (sigma / a) ** 2 if a > 0 else 0.0
            clean = found.double().flatten(1).clamp(min(least, self.most), self.most)
        else:
            # along its own axes a matrix is a diagonal
            full = FullCovariance(found.dense().double())
            clean, offset = full.eigenvalues.clamp(max=self.most * offset.shape[1]), full.along(offset)
        prediction.free()
        variance = step.variance + step.gain**2 * clean
        if not bool(torch.isfinite(variance).all()):
            raise InvalidInput("the covariance is NaN or infinite: was the head fitted, on this network and its scale?")
        return variance, offset


def _discretised(x: Tensor, offset: Tensor, deviation: Tensor, levels: int) -> Float[Tensor, " row"]:
    """-log of the Gaussian's mass in the bin of each grey level, the outermost bins open."""
    half = 1 / (levels - 1)
    upper = torch.special.ndtr((offset + half) / deviation)
    lower = torch.special.ndtr((offset - half) / deviation)
    edge = 1 - half / 4
    upper = torch.where(x > edge, torch.ones_like(upper), upper)
    lower = torch.where(x < -edge, torch.zeros_like(lower), lower)
    return -(upper - lower).clamp(min=_LOG_FLOOR).log().sum(1)
