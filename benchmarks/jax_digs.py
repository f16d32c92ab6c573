"""DiGS written by hand for one target in JAX: the whole run is one compiled program, with cached values as in noisewise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def mixture_log_prob(means: np.ndarray, variance: float) -> Callable[[Any], Any]:
    """Normalised log density of equally weighted isotropic Gaussians at one point [dim]."""
    modes, dim = means.shape
    constant = -np.log(modes) - dim / 2 * np.log(2 * np.pi * variance)

    def log_prob(x: Any) -> Any:
        squares = jnp.square(x - means).sum(-1)
        return jax.nn.logsumexp(-squares / (2 * variance)) + constant

    return log_prob


def compiled_digs(log_prob: Callable[[Any], Any], r: float, sweeps: int, steps: int, step_size: float) -> Callable:
    """(key, (x, log_prob, score)) -> the same after `sweeps` sweeps; chains by vmap(value_and_grad), the loop by scan."""
    value_and_score = jax.vmap(jax.value_and_grad(log_prob))

    def choose(accept: Any, new: tuple, old: tuple) -> tuple:
        column = accept[:, None]
        return (
            jnp.where(column, new[0], old[0]),
            jnp.where(accept, new[1], old[1]),
            jnp.where(column, new[2], old[2]),
        )

    def sweep(state: tuple, key: Any) -> tuple[tuple, None]:
        x = state[0]
        key_noise, key_start, key_inner = jax.random.split(key, 3)
        normal = jax.random.normal(key_noise, (2, *x.shape))
        noisy = x + r * normal[0]
        z = noisy + r * normal[1]
        new = (z, *value_and_score(z))
        state = choose(jnp.log(jax.random.uniform(key_start, x.shape[:1])) < new[1] - state[1], new, state)

        def tilted(state: tuple) -> tuple[Any, Any]:
            offset = (state[0] - noisy) / r
            return state[1] - 0.5 * jnp.square(offset).sum(-1), state[2] - offset / r

        def mala(state: tuple, key: Any) -> tuple[tuple, None]:
            key_proposal, key_accept = jax.random.split(key)
            value, slope = tilted(state)
            xi = jax.random.normal(key_proposal, state[0].shape)
            proposed = state[0] + step_size * slope + jnp.sqrt(2 * step_size) * xi
            new = (proposed, *value_and_score(proposed))
            new_value, new_slope = tilted(new)
            back = xi + jnp.sqrt(step_size / 2) * (slope + new_slope)
            log_ratio = new_value - value + 0.5 * (jnp.square(xi) - jnp.square(back)).sum(-1)
            return choose(jnp.log(jax.random.uniform(key_accept, value.shape)) < log_ratio, new, state), None

        return jax.lax.scan(mala, state, jax.random.split(key_inner, steps))[0], None

    @jax.jit
    def run(key: Any, state: tuple) -> tuple:
        return jax.lax.scan(sweep, state, jax.random.split(key, sweeps))[0]

    return run


def initial_state(log_prob: Callable[[Any], Any], x: np.ndarray) -> tuple:
    """Position, value and score of each chain."""
    x = jnp.asarray(x)
    return (x, *jax.vmap(jax.value_and_grad(log_prob))(x))
