"""Targets from JAX functions, compiled by jax.jit; the user's precision settings are left as they are."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisewise.errors import InvalidInput, require
from noisewise.targets.bridge import BridgedTarget

__all__ = ["call_jax", "from_jax"]


def from_jax(
    fn: Callable[[Any], Any], dim: int, *, batched: bool = False, names: Sequence[str] | None = None
) -> BridgedTarget:
    """Make a `Target` of a JAX log density; JAX differentiates and compiles it.

    `fn` maps one point [dim] to a scalar and is vmapped here; with `batched=True` it maps [n, dim] to [n], rows
    independent. Float64 tensors are computed in JAX's 64-bit mode, which is switched on for that call only; float32
    tensors in the precision of your JAX configuration. Data that `fn` holds as numpy arrays should pass through
    `jnp.asarray(data, x.dtype)` inside `fn`, for JAX otherwise fixes them to the first precision it sees. Each new
    number of rows compiles once (seconds for large models): keep the number of chains fixed. CUDA tensors stay on the
    device where JAX has one, by DLPack.

    Raises `MissingExtra` without jax; `InvalidInput` at the first call when JAX cannot trace `fn` or its result has
    another shape.
    """
    jax = require("jax", "jax")
    if not callable(fn):
        raise InvalidInput(f"fn must be callable, got {fn!r}")
    on_rows = fn if batched else jax.vmap(fn)
    value = jax.jit(on_rows)
    value_and_score = jax.jit(rowwise_value_and_grad(on_rows))
    return BridgedTarget(lambda x: call_jax(value_and_score, x), dim, value=lambda x: call_jax(value, x), names=names)


def rowwise_value_and_grad(on_rows: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, Any]]:
    """JAX function [n, dim] -> ([n], [n, dim]) out of one [n, dim] -> [n] whose rows are independent."""
    jax = require("jax", "jax")

    def value_and_score(x: Any) -> tuple[Any, Any]:
        value, pullback = jax.vjp(on_rows, x)
        return value, pullback(jax.numpy.ones_like(value))[0]

    return value_and_score


def call_jax(fn: Callable[[Any], Any], x: Tensor) -> Any:
    """Call a compiled JAX function on a torch tensor; its arrays come back as torch tensors with memory of their own.

    Float64 is computed in JAX's 64-bit mode, within this call only. Half precisions are computed in float32. Raises
    `InvalidInput` when JAX cannot trace or compile the function.
    """
    jax = require("jax", "jax")
    x = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
    with _enable_x64(jax) if x.dtype == torch.float64 else contextlib.nullcontext():
        try:
            if x.is_cuda and jax.default_backend() == "gpu":
                return over_dlpack(fn, x)
            # on the CPU numpy is the quicker road: JAX's from_dlpack costs about 0.1 ms, a copy of a batch 1 us
            return jax.tree_util.tree_map(lambda leaf: torch.from_numpy(np.array(leaf)), fn(x.cpu().numpy()))
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise InvalidInput(
                f"jax could not evaluate the function at x of shape {list(x.shape)} and dtype {x.dtype}: "
                f"{type(error).__name__}: {reason}. It must be jax.numpy operations on x. If it holds numpy arrays and "
                "has run in another precision before, JAX has fixed them to that one: write "
                "jnp.asarray(data, x.dtype) inside the function, or switch to 64 bits "
                "at the start with jax.config.update('jax_enable_x64', True)"
            ) from error


def over_dlpack(fn: Callable[[Any], Any], x: Tensor) -> Any:
    """Call a JAX function on a tensor without leaving its device; results are copied, for JAX arrays are immutable."""
    jax = require("jax", "jax")
    result = fn(jax.dlpack.from_dlpack(x.contiguous()))
    return jax.tree_util.tree_map(lambda leaf: torch.utils.dlpack.from_dlpack(leaf).clone(), result)


def _enable_x64(jax: Any) -> contextlib.AbstractContextManager[object]:
    # jax.enable_x64 since 0.8; before that it was jax.experimental.enable_x64
    return jax.enable_x64(True) if hasattr(jax, "enable_x64") else jax.experimental.enable_x64(True)
