"""Targets from PyMC models: the model's log density over its unconstrained value variables, Jacobian included."""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from noisewise.errors import InvalidInput, NoisewiseError, require
from noisewise.targets.bridge import ModelTarget

__all__ = ["from_pymc"]


def from_pymc(model: Any, *, mode: str | None = None) -> ModelTarget:
    """Make a `Target` of a `pymc.Model` with continuous free variables; one call evaluates the whole batch.

    Coordinates are the free variables in order of definition, each unconstrained by PyMC's own transform and flattened;
    `.names` has one name per coordinate ("mu[0]"), `.unravel(x)` cuts them into variables, `.constrain(x)` gives free
    variables and deterministics on their own scales. Value and score are compiled here, `constrain` at its first use.

    `mode`: PyTensor's compilation mode; by default that of pytensor.config, and where that was left alone "NUMBA" if
    numba is installed: the quickest at run time, and it needs no C compiler. Operations that a machine compiles for the
    first time can take a minute in all; PyTensor keeps them on disk, and later it is seconds. "FAST_COMPILE" takes a
    second and evaluates 10 to 100 times slower. A model with an operation that has no batched form is
    evaluated row by row. PyMC computes in float64 unless pytensor.config.floatX says otherwise; results take the dtype
    and device of x. Data that is changed later by pymc.set_data is seen, as long as no parameter changes its shape.

    Raises `InvalidInput` for anything but a model, for a model without free variables or with discrete ones (named),
    `NoisewiseError` when PyTensor cannot compile it, `MissingExtra` without pymc.
    """
    pymc = require("pymc", "pymc")
    pytensor = require("pytensor", "pymc")
    if not isinstance(model, pymc.Model):
        raise InvalidInput(
            f"model must be a pymc.Model, got {type(model).__name__}: pass the object of `with pm.Model()`"
        )
    _check_free_variables(model)
    point = model.initial_point(random_seed=0)
    shapes = {rv.name: point[model.rvs_to_values[rv].name].shape for rv in model.free_RVs}
    unobserved = {rv.name for rv in model.unobserved_RVs}
    # the list also holds the unconstrained value variables, which have names of their own ("s_log__")
    on_own_scale = [variable for variable in model.unobserved_value_vars if variable.name in unobserved]
    names = [variable.name for variable in on_own_scale]
    (log_prob, *on_own_scale), row = pymc.pytensorf.join_nonshared_inputs(
        point, [model.logp(), *on_own_scale], model.value_vars
    )
    start = np.concatenate([np.ravel(point[v.name]) for v in model.value_vars]).astype(row.dtype)
    compiled = functools.partial(_compile_rowwise, model, row, start, modes=_modes(mode))
    value_and_score = compiled([log_prob, pytensor.grad(log_prob, row)])

    @functools.cache
    def value() -> Callable[[Tensor], list[Tensor]]:
        return compiled([log_prob])

    @functools.cache
    def constrained() -> Callable[[Tensor], list[Tensor]]:
        return compiled(on_own_scale)

    return ModelTarget(
        value_and_score,
        shapes,
        lambda x: dict(zip(names, constrained()(x), strict=True)),
        value=lambda x: value()(x)[0],
    )


def _check_free_variables(model: Any) -> None:
    if not model.free_RVs:
        raise InvalidInput("the PyMC model has no free variable, so there is nothing to sample")
    discrete = {value.name for value in model.discrete_value_vars}
    names = [rv.name for rv in model.free_RVs if model.rvs_to_values[rv].name in discrete]
    if names:
        raise InvalidInput(
            f"free variable {', '.join(map(repr, names))} is discrete, and the samplers need a gradient in every "
            "coordinate: sum it out, for example with pymc.Mixture"
        )


def _modes(mode: str | None) -> Sequence[str | None]:
    """PyTensor modes to try in turn: the one given, else the user's configuration, else numba and the usual default."""
    configured = require("pytensor", "pymc").config.mode
    if mode is not None or configured != "Mode":
        return (mode or configured,)
    return (None,) if importlib.util.find_spec("numba") is None else ("NUMBA", None)


def _compile_rowwise(
    model: Any, row: Any, start: np.ndarray, outputs: Sequence[Any], modes: Sequence[str | None]
) -> Callable[[Tensor], list[Tensor]]:
    """Compile functions of one point `row` into one function [n, dim] -> list of [n, ...]; tried out at `start`."""
    failure: Exception | None = None
    for compile_rows in (_batched, _looped):
        for mode in modes:
            try:
                evaluate = compile_rows(model, row, outputs, mode)
                # numba compiles at the first call, so only a call shows that the operations are supported
                evaluate(np.stack([start, start]))
            except Exception as error:
                failure = failure or error
                continue
            return _on_tensors(evaluate, row.dtype)
    raise NoisewiseError(
        f"PyTensor could not compile the PyMC model: {type(failure).__name__}: {failure}; "
        "check that model.compile_logp() and model.compile_dlogp() work"
    ) from failure


def _batched(
    model: Any, row: Any, outputs: Sequence[Any], mode: str | None
) -> Callable[[np.ndarray], list[np.ndarray]]:
    tensor = require("pytensor.tensor", "pymc")
    replace = require("pytensor.graph.replace", "pymc")
    rows = tensor.tensor("rows", dtype=row.dtype, shape=(None, None))
    # outputs that do not depend on the parameters come out of vectorize_graph without the batch axis
    spread = [output + tensor.zeros_like(row).sum() for output in outputs]
    return model.compile_fn(
        replace.vectorize_graph(spread, {row: rows}), inputs=[rows], mode=mode, point_fn=False, trust_input=True
    )


def _looped(model: Any, row: Any, outputs: Sequence[Any], mode: str | None) -> Callable[[np.ndarray], list[np.ndarray]]:
    one = model.compile_fn(list(outputs), inputs=[row], mode=mode, point_fn=False, trust_input=True)
    return lambda x: [np.stack(parts) for parts in zip(*(one(point) for point in x), strict=True)]


def _on_tensors(evaluate: Callable[[np.ndarray], list[np.ndarray]], dtype: str) -> Callable[[Tensor], list[Tensor]]:
    def on_tensors(x: Tensor) -> list[Tensor]:
        # the copy is C-ordered and of the exact dtype, as trust_input demands
        rows = np.array(x.to("cpu", torch.float64).numpy(), dtype=dtype, order="C")
        return [torch.from_numpy(np.array(output)) for output in evaluate(rows)]

    return on_tensors
