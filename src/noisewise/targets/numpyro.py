"""Targets from NumPyro models: the joint density on the unconstrained space, Jacobian included."""

from collections.abc import Callable
from typing import Any

import numpy as np

from noisewise.errors import InvalidInput, require
from noisewise.targets.bridge import ModelTarget, split_parameters
from noisewise.targets.jax import call_jax, rowwise_value_and_grad

__all__ = ["from_numpyro"]


def from_numpyro(model: Callable[..., Any], *model_args: Any, seed: int = 0, **model_kwargs: Any) -> ModelTarget:
    """Make a `Target` of a NumPyro model with continuous latent sites, called with `model_args` and `model_kwargs`.

    Coordinates are the latent sites in order of the program, each unconstrained by NumPyro's own transform and
    flattened; `.names` has one name per coordinate ("mu[0]"), `.unravel(x)` cuts them into sites, `.constrain(x)` gives
    sites and deterministic quantities on their own scales. `seed` fixes what the program draws besides latent sites
    (subsampling, initial values of numpyro.param). Pass data as numpy arrays in the arguments, which
    serve float32 and float64 alike; precision and compilation are as in `from_jax`.

    Raises `InvalidInput` for a model with no latent site, or a discrete or Delta one (named); `MissingExtra` without
    numpyro.
    """
    require("numpyro", "numpyro")
    jax = require("jax", "numpyro")
    util = require("numpyro.infer.util", "numpyro")
    handlers = require("numpyro.handlers", "numpyro")
    if not callable(model):
        raise InvalidInput(f"model must be a NumPyro program (a callable), got {model!r}")

    def seeded(*args: Any, **kwargs: Any) -> Any:
        # a fresh handler at each call: it keeps its key as state, which must not leak out of a trace
        return handlers.seed(model, rng_seed=seed)(*args, **kwargs)

    def arguments() -> tuple[tuple[Any, ...], dict[str, Any]]:
        # JAX remembers the precision in which it first saw a numpy array; each trace gets arrays it has not seen
        def fresh(leaf: Any) -> Any:
            return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

        return jax.tree_util.tree_map(fresh, (model_args, model_kwargs))

    args, kwargs = arguments()
    shapes = _unconstrained_shapes(handlers.trace(seeded).get_trace(*args, **kwargs))

    def log_prob(x: Any) -> Any:
        return -util.potential_energy(seeded, *arguments(), split_parameters(x, shapes))

    def constrained(x: Any) -> Any:
        sites = split_parameters(x, shapes)
        return util.constrain_fn(seeded, *arguments(), sites, return_deterministic=True)

    value = jax.jit(jax.vmap(log_prob))
    value_and_score = jax.jit(rowwise_value_and_grad(jax.vmap(log_prob)))
    constrained = jax.jit(jax.vmap(constrained))
    return ModelTarget(
        lambda x: call_jax(value_and_score, x),
        shapes,
        lambda x: call_jax(constrained, x),
        value=lambda x: call_jax(value, x),
    )


def _unconstrained_shapes(trace: dict[str, dict[str, Any]]) -> dict[str, tuple[int, ...]]:
    distributions = require("numpyro.distributions", "numpyro")
    latent = {name: site for name, site in trace.items() if site["type"] == "sample" and not site["is_observed"]}
    if not latent:
        raise InvalidInput("the NumPyro model has no latent sample site, so there is nothing to sample")
    shapes = {}
    for name, site in latent.items():
        distribution = site["fn"]
        if distribution.support.is_discrete:
            raise InvalidInput(
                f"site {name!r} is discrete ({type(distribution).__name__}), and the samplers need a gradient in every "
                "coordinate: sum it out, for example with numpyro.distributions.MixtureSameFamily"
            )
        if isinstance(distribution, distributions.Delta):
            raise InvalidInput(f"site {name!r} is a Delta, which has no density: use numpyro.deterministic for it")
        shapes[name] = tuple(distributions.biject_to(distribution.support).inv(site["value"]).shape)
    return shapes
