"""Targets whose value and score are computed outside torch; what the adapters of numpy, JAX, NumPyro and PyMC share."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from noisewise.errors import InvalidInput
from noisewise.typing import check_count

__all__ = ["BridgedTarget", "ModelTarget"]


class BridgedTarget:
    """A target from a function of another library that gives value and score together.

    `value_and_score` maps a detached [n, dim] tensor to tensors of shape [n] and [n, dim]; `value`, optional, gives the
    [n] alone where that is cheaper. Results take the dtype and device of x. `names`: one per coordinate, optional.
    `log_prob` composes with torch: its backward pass returns the library's score (first derivatives only).
    Raises `InvalidInput` when a result has another shape.
    """

    def __init__(
        self,
        value_and_score: Callable[[Tensor], Sequence[Tensor]],
        dim: int,
        *,
        value: Callable[[Tensor], Tensor] | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.dim = check_count("dim", dim)
        if names is not None and len(names) != self.dim:
            raise InvalidInput(f"names has {len(names)} entries for dim {self.dim}: {list(names)!r}")
        self.names = None if names is None else list(names)
        self._value_and_score = value_and_score
        self._value = value

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log density, of the dtype and device of x; differentiable once."""
        if x.requires_grad and torch.is_grad_enabled():
            return _ScoreAsGradient.apply(x, self.log_prob_and_score)
        if self._value is None:
            return self.log_prob_and_score(x)[0]
        rows = self._rows(x)
        return _result("log_prob", self._value(rows), rows, rows.shape[:1]).reshape(x.shape[:-1])

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and its gradient in x, detached, of the dtype and device of x."""
        rows = self._rows(x)
        value, score = self._value_and_score(rows)
        value = _result("log_prob", value, rows, rows.shape[:1])
        score = _result("score", score, rows, rows.shape)
        return value.reshape(x.shape[:-1]), score.reshape(x.shape)

    def _rows(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.dim:
            raise InvalidInput(f"x has {x.shape[-1]} coordinates, but the target has dim {self.dim}")
        return x.detach().reshape(-1, self.dim)


class ModelTarget(BridgedTarget):
    """A probabilistic program on R^dim: its parameters unconstrained, log-Jacobian included, laid end to end.

    `shapes`: unconstrained shape of each parameter, in order of its coordinates; `names` follow from it ("mu[0]").
    `constrained` maps [n, dim] to the parameters on their own scales, each with leading axis n.
    """

    def __init__(
        self,
        value_and_score: Callable[[Tensor], Sequence[Tensor]],
        shapes: Mapping[str, tuple[int, ...]],
        constrained: Callable[[Tensor], Mapping[str, Tensor]],
        *,
        value: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        names = [name for parameter, shape in shapes.items() for name in _coordinate_names(parameter, shape)]
        super().__init__(value_and_score, len(names), value=value, names=names)
        self.shapes = dict(shapes)
        self._constrained = constrained

    def unravel(self, x: Float[Tensor, "*batch dim"]) -> dict[str, Tensor]:
        """Each parameter's unconstrained coordinates, as views of x with shape [*batch, *its unconstrained shape]."""
        self._rows(x)
        return split_parameters(x, self.shapes)

    def constrain(self, x: Float[Tensor, "*batch dim"]) -> dict[str, Tensor]:
        """Parameters and deterministic quantities on their own scales, each of shape [*batch, *its shape]; no gradient.

        `draws.positions` with axes (chain, draw, dim) may be given whole.
        """
        rows = self._rows(x)
        return {
            name: (value.to(x) if value.is_floating_point() else value).reshape(*x.shape[:-1], *value.shape[1:])
            for name, value in self._constrained(rows).items()
        }


def split_parameters(flat: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Cut the last axis of a torch, numpy or JAX array into named blocks of the given shapes, in order."""
    blocks, start = {}, 0
    for name, shape in shapes.items():
        stop = start + math.prod(shape)
        blocks[name] = flat[..., start:stop].reshape(*flat.shape[:-1], *shape)
        start = stop
    return blocks


class _ScoreAsGradient(torch.autograd.Function):
    """Gives autograd the score that the library computed together with the value."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_prob_and_score: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Tensor:
        value, score = log_prob_and_score(x)
        ctx.save_for_backward(score)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_value: Tensor) -> tuple[Tensor, None]:
        (score,) = ctx.saved_tensors
        return grad_value.unsqueeze(-1) * score, None


def _result(name: str, tensor: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    if tensor.shape != shape:
        raise InvalidInput(
            f"{name} must have shape {list(shape)} for x of shape {list(rows.shape)}, got {list(tensor.shape)}; "
            "the callable returns the log density and its gradient, one entry per row"
        )
    return tensor.to(rows)


def _coordinate_names(parameter: str, shape: tuple[int, ...]) -> list[str]:
    if not shape:
        return [parameter]
    return [
        f"{parameter}[{','.join(map(str, index.tolist()))}]" for index in torch.ones(shape, dtype=torch.bool).nonzero()
    ]
