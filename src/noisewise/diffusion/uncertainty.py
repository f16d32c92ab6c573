"""`posterior_variance`: how uncertain each pixel of x0 is given a noisy image; and whether such numbers are right."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.denoising.covariance import Covariance
from noisewise.diffusion.fitting import frozen, noised
from noisewise.diffusion.head import CovarianceHead
from noisewise.diffusion.model import as_diffusion_model
from noisewise.diffusion.rows import as_rows
from noisewise.diffusion.sources import LanczosSource, as_source
from noisewise.errors import InvalidInput
from noisewise.typing import check_count, check_positive

__all__ = ["Calibration", "calibration", "posterior_variance"]

_METHODS = ("head", "probes", "lanczos")


def posterior_variance(
    model: Any,
    x_t: Float[Tensor, "batch *event"],
    t: Any,
    method: str = "head",
    *,
    head: CovarianceHead | None = None,
    noise_schedule: Any = None,
    probes: int = 64,
    rank: int = 8,
    max_variance: float | int | None = None,
    seed: int = 0,
    **conditions: Any,
) -> Float[Tensor, "batch *event"]:
    """diag Cov[x0 | x_t] in units of x0^2, in the shape of x_t; `t`: one time step, or [batch].

    `method`: "head", a fitted `head=`, one network call; "probes", the network's own derivative by `probes` random signs, a
    backward pass each, unbiased, which can be negative; "lanczos", mean squares of `probes` draws of N(0, Cov) by `rank` backward
    passes each, the positive part of the derivative. `noise_schedule`: the scheduler of training, which may be that of flow
    matching, or `NoiseLevels`. `max_variance` cuts from above. Raises `InvalidInput`.
    """
    if method not in _METHODS:
        raise InvalidInput(f"method must be one of {_METHODS}, got {method!r}")
    if (method == "head") != (head is not None):
        raise InvalidInput(
            f"head= is what method='head' needs, and belongs to no other; got method={method!r}, head={head!r}"
        )
    known = as_diffusion_model(model, noise_schedule, None if head is None else head.config.site)
    if head is not None:
        head.check_model(known.network, known.levels)
    probes = check_count("probes", probes)
    generator = torch.Generator(x_t.device).manual_seed(check_count("seed", seed, 0))
    chosen: Any = head if head is not None else method
    source = LanczosSource(rank, generator) if method == "lanczos" else as_source(chosen, generator, probes=probes)
    assert source is not None
    with frozen(known.network):
        prediction = known.predict(x_t, t, source.graph, **conditions)
        found = source(prediction)
        if not isinstance(found, Tensor):
            found = _mean_square(found, probes, generator).reshape(x_t.shape)
        prediction.free()
    return found if max_variance is None else found.clamp(max=check_positive("max_variance", max_variance))


def _mean_square(operator: Covariance, draws: int, generator: torch.Generator) -> Tensor:
    return torch.stack([operator.sample(generator).square() for _ in range(draws)]).mean(0)


def _error_over_rows(values: Tensor, part: Tensor, entries: int) -> float:
    """Standard error of the mean over `part`, with entries of one row taken as dependent."""
    offset = values[part] - values[part].mean()
    per_row = values.new_zeros(len(values) // entries).index_add(0, part // entries, offset)
    return float(per_row.square().sum().sqrt() / len(part))


@dataclass(frozen=True)
class Calibration:
    """Predicted variances against squared errors, entries sorted by prediction into bins of equal number.

    `predicted`, `observed`, `se` [bin]: mean variance, mean squared error and its standard error over rows; `ratio` and
    `ratio_se`: squared error over variance, over all entries, 1 where the variances are right.
    """

    t: int
    predicted: tuple[float, ...]
    observed: tuple[float, ...]
    se: tuple[float, ...]
    ratio: float
    ratio_se: float


def calibration(
    model: Any,
    head: CovarianceHead,
    data: Any,
    t: int,
    *,
    noise_schedule: Any = None,
    bins: int = 10,
    rows: int = 1024,
    seed: int = 0,
) -> Calibration:
    """Noise `rows` held-out events once to level `t`, and compare the head's variances with (x0 - E[x0 | x_t])^2."""
    known = as_diffusion_model(model, noise_schedule, head.config.site)
    head.check_model(known.network, known.levels)
    bins = check_count("bins", bins, 2)
    generator = torch.Generator(head.device).manual_seed(check_count("seed", seed, 0))
    kept = as_rows(data, (head.config.channels, *head.config.event), head.device)
    known.levels.index(t, 1, head.device)
    index = torch.randperm(len(kept), generator=generator, device=head.device)[:rows]
    with frozen(known.network), torch.no_grad():
        prediction, clean, _ = noised(known, kept[index], generator, False, t=check_count("t", t, 0))
        variance = head.clean_variance(prediction).double().flatten()
    squares = (clean - prediction.clean).square().double()
    order = variance.argsort()
    errors = squares.flatten()
    parts = order.tensor_split(bins)
    per_row = (squares / variance.reshape(squares.shape)).flatten(1).mean(1)
    return Calibration(
        t,
        tuple(float(variance[part].mean()) for part in parts),
        tuple(float(errors[part].mean()) for part in parts),
        tuple(_error_over_rows(errors, part, squares[0].numel()) for part in parts),
        float(per_row.mean()),
        float(per_row.std() / len(per_row) ** 0.5),
    )
