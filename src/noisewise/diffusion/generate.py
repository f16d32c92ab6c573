"""Samples of any diffusion network by a `CovarianceScheduler`, outside diffusers' pipelines."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.diffusion.fitting import frozen
from noisewise.diffusion.model import as_diffusion_model
from noisewise.diffusion.scheduler import CovarianceScheduler
from noisewise.diffusion.sources import as_source
from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["generate"]


def generate(
    model: Any,
    scheduler: CovarianceScheduler,
    shape: tuple[int, ...],
    steps: int | None = None,
    covariance: Any = None,
    *,
    seed: int = 0,
    rank: int = 3,
    probes: int = 16,
    **conditions: Any,
) -> Float[Tensor, "batch *event"]:
    """`shape` = [batch, *event] draws in `steps` network calls each, from N(0, I), by `model(x_t, t, **conditions)`.

    `covariance`: a fitted head, "lanczos" (the whole matrix by `rank` backward passes a step), "probes", a source, or None for
    the scheduler's own variance. `steps` None: the scheduler's time steps as they were set. Raises `InvalidInput`.
    """
    if not isinstance(scheduler, CovarianceScheduler):
        raise InvalidInput(
            f"scheduler must be a CovarianceScheduler, got {type(scheduler).__name__}: use its from_config"
        )
    if len(shape) < 2:
        raise InvalidInput(f"shape must be (batch, *event), got {tuple(shape)}")
    head = getattr(covariance, "head", covariance)
    config = getattr(head, "config", None)
    known = as_diffusion_model(model, scheduler.levels, getattr(config, "site", None))
    if config is not None and hasattr(head, "check_model"):
        head.check_model(known.network, scheduler.levels)
    first = next(known.network.parameters(), None)
    device, dtype = (torch.device("cpu"), torch.float32) if first is None else (first.device, first.dtype)
    generator = torch.Generator(device).manual_seed(check_count("seed", seed, 0))
    source = as_source(covariance, generator, probes=probes, rank=rank)
    if steps is not None:
        scheduler.set_timesteps(steps)
    x = torch.randn(shape, dtype=dtype, device=device, generator=generator)
    with frozen(known.network):
        for t in scheduler.timesteps.tolist():
            prediction = known.predict(x, t, source is not None and source.graph, **conditions)
            x = scheduler.move(prediction, source, generator)
    return x
