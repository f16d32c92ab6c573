"""The exact-sampler floor: what a metric reads when the sample is perfect, and only its size is finite."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.metrics.measurement import Measurement
from noisewise.typing import check_count

__all__ = ["Floor", "sample_floor"]


class Floor(NamedTuple):
    """Mean score of exact draws and the standard error of that mean."""

    mean: float
    se: float


def sample_floor(
    metric: Callable[[Tensor, Tensor], Measurement | float],
    reference: Float[Tensor, "total dim"] | Callable[[int, torch.Generator], Tensor],
    n: int,
    *,
    n_reference: int | None = None,
    repeats: int = 20,
    seed: int = 0,
) -> Floor:
    """Score of `n` exact draws against `n_reference` other exact draws, averaged over `repeats`.

    `metric(draws, reference)`: one that needs no reference ignores its second argument. `reference`: a sampler
    `(n, generator) -> [n, dim]` such as `target.sample`, called anew in every repeat; or a tensor of exact draws, split
    at random into two disjoint parts (repeats then share rows, and the standard error is a little too small).
    `n_reference` defaults to `n`, or for a tensor to all other rows. Raises `InvalidInput` for fewer than 2 repeats and
    for a tensor with too few rows.
    """
    n = check_count("n", n)
    repeats = check_count("repeats", repeats, minimum=2)
    if isinstance(reference, Tensor):
        n_reference = check_count("n_reference", n_reference if n_reference is not None else max(1, len(reference) - n))
        if n + n_reference > len(reference):
            raise InvalidInput(
                f"{n} draws against {n_reference} disjoint ones need {n + n_reference} rows, but reference has "
                f"{len(reference)}; lower n or give more exact draws"
            )
    else:
        n_reference = check_count("n_reference", n if n_reference is None else n_reference)
    generator = torch.Generator().manual_seed(seed)
    scores = []
    for _ in range(repeats):
        if isinstance(reference, Tensor):
            order = torch.randperm(len(reference), generator=generator).to(reference.device)
            pooled = reference[order[: n + n_reference]]
        else:
            pooled = reference(n + n_reference, generator)
        scores.append(float(metric(pooled[:n], pooled[n:])))
    values = torch.tensor(scores, dtype=torch.float64)
    return Floor(float(values.mean()), float(values.std()) / math.sqrt(repeats))
