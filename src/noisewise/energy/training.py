"""`fit_energy`: trains an energy by a score matching loss, with a moving average, a held-out loss, and exact resumption."""

import math
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from noisewise.energy.losses import check_trace, dsm_loss, score_matching_loss
from noisewise.energy.network import check_curvature
from noisewise.energy.rows import as_rows, check_rows
from noisewise.errors import InvalidInput
from noisewise.networks.mlp import check_smooth
from noisewise.noise import Corruption
from noisewise.training import Fit, FitResult, Loss, Plan, check_share, fingerprint, run_fit
from noisewise.typing import check_count, check_positive

__all__ = ["fit_energy"]

_KIND = "energy fit"


def fit_energy(
    net: nn.Module,
    data: Float[Tensor, "row *event"] | Any,
    loss: str | Loss = "dsm",
    corruption: Corruption | None = None,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float | int = 1e-3,
    weight_decay: float | int = 0.0,
    ema: float | int = 0.999,
    clip: float | int = 10.0,
    validation: float | int = 0.1,
    patience: int = 0,
    max_seconds: float | int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    seed: int = 0,
) -> FitResult:
    """Train `net`, in place, so that exp(-net) has the score of `data`, [row, *event] (tensor, array, list or frame).

    `loss`: "dsm" (needs `corruption`; `net` becomes the energy of the noisy density and records the noise level as
    `net.corruption`), "sm" (exact score matching, at most 64 coordinates), or your own `loss(energy, batch, generator)`, a
    differentiable scalar. Adam with decoupled `weight_decay`, a cosine learning rate from `learning_rate` to 0, gradient
    norms clipped at `clip`, an exponential moving average of the weights with decay `ema` (less at the beginning, so that
    the start is forgotten). `validation`: share of rows held out; the average with the least held-out loss is returned; 0
    holds out none and returns the last. `patience`: looks at that loss (25 in a fit) without a better one before
    the fit ends; 0 is never. `max_seconds` stops early. `checkpoint`: a folder, written every two seconds; the same call goes
    on from it after a crash, to the identical result. Ctrl-C returns what exists.

    Raises `InvalidInput` before any work for NaN rows, a ReLU-like network, a wrong output shape, a missing `corruption`
    and settings out of range; `NoisewiseError` when the loss stays non-finite; `RunFolderError` for the folder of another run.
    """
    objective, name = _as_loss(loss, corruption)
    rows = _prepared(net, data)
    if loss == "sm":
        check_trace("exact", rows[0].numel())
    plan = Plan(
        steps=check_count("steps", steps),
        batch_size=check_count("batch_size", batch_size),
        learning_rate=check_positive("learning_rate", learning_rate),
        weight_decay=check_share("weight_decay", weight_decay, math.inf),
        ema=check_share("ema", ema, 1),
        clip=check_positive("clip", clip),
        validation=check_share("validation", validation, 1),
        patience=check_count("patience", patience, 0),
        seed=check_count("seed", seed, 0),
    )
    limit = math.inf if max_seconds is None else check_positive("max_seconds", max_seconds)
    check_curvature(net, rows[:8])
    fit = Fit(net, rows, objective, plan)
    config = {
        **vars(plan),
        "loss": name,
        "corruption": None if corruption is None else [corruption.a, corruption.s],
        "rows": list(rows.shape),
        "data": fingerprint([rows]),
        "start": fingerprint(list(net.state_dict().values())),
    }
    result = run_fit(fit, _KIND, config, checkpoint, limit, progress)
    if isinstance(loss, str):
        net.corruption = corruption  # type: ignore[assignment]
    return result


def _as_loss(loss: Any, corruption: Corruption | None) -> tuple[Loss, str]:
    if loss not in ("dsm", "sm") and not callable(loss):
        raise InvalidInput(
            f'unknown loss: {loss!r}; it must be "dsm", "sm" or a callable loss(energy, batch, generator)'
        )
    if loss == "dsm":
        if corruption is None:
            raise InvalidInput('loss="dsm" needs the noise level: corruption=Corruption(a=1.0, s=...)')
        return lambda energy, x, generator: dsm_loss(energy, x, corruption, generator), "dsm"
    if corruption is not None:
        raise InvalidInput(f'corruption belongs to loss="dsm" and would do nothing for loss={loss!r}')
    if loss == "sm":
        return lambda energy, x, generator: score_matching_loss(energy, x, "exact", generator), "sm"
    return loss, getattr(loss, "__qualname__", type(loss).__name__)


def _prepared(net: Any, data: Any) -> Tensor:
    """The rows in the dtype and on the device of the network, after the checks of both."""
    if not isinstance(net, nn.Module):
        raise InvalidInput(
            f"net must be an EnergyNet or a torch.nn.Module that gives energies, got {type(net).__name__}"
        )
    check_smooth(net)
    data = as_rows(data)
    check_rows(data)
    first = next(net.parameters(), None)
    return data if first is None else data.to(first)
