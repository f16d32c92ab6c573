"""NUTS and tempered SMC of BlackJAX as outside peers, at the same bill of gradient calls; needs noisewise[bench]."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from noisewise.errors import InvalidInput, require
from noisewise.sampling.experiments.digs.problem import Outcome, outcome_of
from noisewise.typing import Cost

__all__ = ["gaussian_mixture", "nuts", "tempered_smc"]

_ADAPTATION = 200
_CHUNK = 25


def gaussian_mixture(means: np.ndarray, variance: float) -> Callable[[Any], Any]:
    """JAX log density of an equally weighted isotropic mixture, [dim] -> scalar."""
    jax = require("jax", "bench")

    def log_density(x: Any) -> Any:
        squares = ((x - jax.numpy.asarray(means)) ** 2).sum(-1)
        normalizer = len(means) * (2 * np.pi * variance) ** (means.shape[1] / 2)
        return jax.scipy.special.logsumexp(-squares / (2 * variance)) - np.log(normalizer)

    return log_density


def nuts(log_density: Callable[[Any], Any], start: np.ndarray, budget: float | int, seed: int) -> Outcome:
    """NUTS with window adaptation per chain, from `start` [chain, dim].

    The bill is the sum of leapfrog steps over chains, those of the adaptation included, and two calls per chain at the
    starts of adaptation and sampling; the doublings that find a first step size are not reported by BlackJAX and stay
    out. Draws are kept until the bill reaches `budget`. Raises `InvalidInput` where the adaptation alone spends it.
    """
    jax, blackjax = require("jax", "bench"), require("blackjax", "bench")
    begin = time.monotonic()
    chains = len(start)
    # at most a tenth of the budget goes to adaptation, at about seven leapfrogs an iteration
    steps = int(min(max(budget / chains / 70, 20), 5 * _ADAPTATION))
    adapt = blackjax.window_adaptation(blackjax.nuts, log_density)
    key, key_warm = jax.random.split(jax.random.key(seed))

    def warm(one_key: Any, position: Any) -> Any:
        (state, parameters), info = adapt.run(one_key, position, num_steps=steps)
        return state, parameters, info.info.num_integration_steps.sum()

    state, parameters, leapfrogs = jax.jit(jax.vmap(warm))(jax.random.split(key_warm, chains), jax.numpy.asarray(start))
    spent = int(leapfrogs.sum()) + 2 * chains
    if spent >= budget:
        raise InvalidInput(f"NUTS spent {spent} gradients on adaptation, more than the budget of {budget:g}")
    kernel = blackjax.nuts.build_kernel()

    def one(one_key: Any, one_state: Any, one_parameters: Any) -> Any:
        one_state, info = kernel(one_key, one_state, log_density, **one_parameters)
        return one_state, (one_state.position, info.num_integration_steps)

    def chunk(chunk_key: Any, states: Any) -> Any:
        def body(carry: Any, body_key: Any) -> Any:
            return jax.vmap(one)(jax.random.split(body_key, chains), carry, parameters)

        return jax.lax.scan(body, states, jax.random.split(chunk_key, _CHUNK))

    compiled, kept = jax.jit(chunk), []
    while spent < budget:
        key, key_chunk = jax.random.split(key)
        state, (positions, counts) = compiled(key_chunk, state)
        bills = spent + np.asarray(counts).sum(-1).cumsum()
        within = int((bills <= budget).sum())
        kept.append(np.asarray(positions)[:within])
        if within:
            spent = int(bills[within - 1])
        if within < _CHUNK:
            break
    return _outcome(np.concatenate(kept), spent, begin)


def tempered_smc(
    log_density: Callable[[Any], Any],
    dim: int,
    scale: float,
    particles: int,
    budget: float | int,
    seed: int,
    step_size: float = 1.0,
    moves: int = 4,
    leapfrogs: int = 5,
    ess: float = 0.9,
) -> Outcome:
    """Adaptive tempered SMC from N(0, scale^2), HMC moves of a fixed step size, then plain HMC while the budget lasts.

    The bill: particles x (one call to start each mutation + leapfrogs x moves) per temperature.
    """
    jax, blackjax = require("jax", "bench"), require("blackjax", "bench")
    resampling = require("blackjax.smc.resampling", "bench")
    extend = require("blackjax.smc", "bench").extend_params
    begin = time.monotonic()

    def log_prior(x: Any) -> Any:
        return jax.scipy.stats.norm.logpdf(x, 0.0, scale).sum(-1)

    kernel = blackjax.hmc.build_kernel()
    settings = {
        "step_size": step_size,
        "inverse_mass_matrix": jax.numpy.ones(dim),
        "num_integration_steps": leapfrogs,
    }
    smc = blackjax.adaptive_tempered_smc(
        log_prior,
        lambda x: log_density(x) - log_prior(x),
        kernel,
        blackjax.hmc.init,
        extend(settings),
        resampling.systematic,
        ess,
        num_mcmc_steps=moves,
    )
    key, key_start = jax.random.split(jax.random.key(seed))
    state = smc.init(scale * jax.random.normal(key_start, (particles, dim)))
    step = jax.jit(smc.step)
    spent, per_step = 0, particles * (1 + leapfrogs * moves)
    while float(_inverse_temperature(state)) < 1 and spent + per_step <= budget:
        key, key_step = jax.random.split(key)
        state, _ = step(key_step, state)
        spent += per_step
    reached = float(_inverse_temperature(state))
    notes = () if reached >= 1 else (f"the annealing reached only beta = {reached:.3g} within the budget",)

    def move(one_key: Any, one_state: Any) -> Any:
        return kernel(one_key, one_state, log_density, **settings)[0]

    states = jax.vmap(lambda x: blackjax.hmc.init(x, log_density))(state.particles)
    advance = jax.jit(jax.vmap(move))
    spent += particles
    kept = [np.asarray(states.position)]
    while spent + particles * leapfrogs <= budget:
        key, key_step = jax.random.split(key)
        states = advance(jax.random.split(key_step, particles), states)
        kept.append(np.asarray(states.position))
        spent += particles * leapfrogs
    return _outcome(np.stack(kept), spent, begin, notes)


def _inverse_temperature(state: Any) -> Any:
    return state.tempering_param if hasattr(state, "tempering_param") else state.lmbda


def _outcome(positions: np.ndarray, gradients: int, begin: float, notes: tuple[str, ...] = ()) -> Outcome:
    """[draw, chain, dim] -> the outcome; seconds include compilation, as a user sees them."""
    cost = Cost(gradients=gradients, seconds=time.monotonic() - begin)
    return outcome_of(torch.as_tensor(positions.copy()).transpose(0, 1), cost, notes)
