"""Targets from callables on numpy arrays, for a whole batch or for one point at a time (as BridgeStan gives them)."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.targets.bridge import BridgedTarget

__all__ = ["from_numpy"]


def from_numpy(
    value_and_grad: Callable[[np.ndarray], tuple[Any, Any]],
    dim: int,
    *,
    batched: bool = True,
    names: Sequence[str] | None = None,
    reject_on: tuple[type[Exception], ...] = (),
) -> BridgedTarget:
    """Make a `Target` of a callable that gives log density and gradient as float64 numpy arrays.

    `batched=True`: [n, dim] -> ([n], [n, dim]), one call per batch. `batched=False`: [dim] -> (number, [dim]), called
    row by row: what a library for single points offers. Results take the dtype and device of x; the callable gets a
    copy, which it may overwrite.

    With `batched=False`, an exception at a point becomes a `NoisewiseError` that names row and point. Those listed in
    `reject_on` mean "outside the support" instead: that row is -inf with score 0, which samplers reject. Raises
    `InvalidInput` for a result of another shape, or for `reject_on` with a batched callable.

    A Stan model through BridgeStan, whose parameters are unconstrained with the Jacobian included:

        model = bridgestan.StanModel("model.stan", data="data.json")
        target = from_numpy(
            model.log_density_gradient, dim=model.param_unc_num(), batched=False,
            names=model.param_unc_names(), reject_on=(RuntimeError,),
        )
    """
    if not callable(value_and_grad):
        raise InvalidInput(f"value_and_grad must be callable, got {value_and_grad!r}")
    if batched and reject_on:
        raise InvalidInput(
            f"reject_on={reject_on!r} needs batched=False: an exception in a batched callable does not tell which row "
            "it means; return -inf for such rows instead"
        )
    on_rows = value_and_grad if batched else _row_by_row(value_and_grad, reject_on)

    def value_and_score(x: Tensor) -> tuple[Tensor, Tensor]:
        value, score = _pair(on_rows(x.to("cpu", torch.float64, copy=True).numpy()))
        return torch.from_numpy(np.array(value, dtype=np.float64)), torch.from_numpy(np.array(score, dtype=np.float64))

    return BridgedTarget(value_and_score, dim, names=names)


def _row_by_row(
    value_and_grad: Callable[[np.ndarray], tuple[Any, Any]], reject_on: tuple[type[Exception], ...]
) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    def on_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, scores = np.full(len(x), -np.inf), np.zeros_like(x)
        for row, point in enumerate(x):
            coordinates = point.tolist()  # before the callable can overwrite them
            try:
                value, score = _pair(value_and_grad(point))
            except reject_on:
                continue
            except NoisewiseError:
                raise
            except Exception as error:
                raise NoisewiseError(
                    f"value_and_grad failed at row {row}, x = {coordinates}: {type(error).__name__}: {error}. "
                    f"If this means that x is outside the support, pass reject_on=({type(error).__name__},)"
                ) from error
            if np.shape(value) != () or np.shape(score) != point.shape:
                raise InvalidInput(
                    f"value_and_grad must give a number and a gradient of shape {list(point.shape)} for one point, got "
                    f"shapes {list(np.shape(value))} and {list(np.shape(score))}; "
                    "a callable for batches needs batched=True"
                )
            values[row], scores[row] = value, score
        return values, scores

    return on_rows


def _pair(result: object) -> tuple[Any, Any]:
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise InvalidInput(
            f"value_and_grad must return the pair (log density, gradient), got {type(result).__name__}: {result!r:.200}"
        )
    return result[0], result[1]
