"""Which noise levels a sampler of K steps visits: even and uneven spacings, and paths that are optimal for the bound."""

import itertools
from collections.abc import Callable

import numpy as np
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.typing import check_count, check_positive

__all__ = ["step_schedule"]


def step_schedule(
    num_train_timesteps: int,
    num_steps: int,
    kind: str = "linear",
    *,
    power: float | int = 2,
    gamma: Float[Tensor, " time"] | None = None,
    alphas_cumprod: Float[Tensor, " time"] | None = None,
    costs: Float[Tensor, "node node"] | None = None,
) -> list[int]:
    """The K = `num_steps` indices t that a sampler visits, ascending in 1..T, T = `num_train_timesteps`; data is t = 0.

    Subtract 1 for libraries that count from 0. Halves are rounded to the even neighbour. `kind`:

    - "linear": 1 + i (T-1)/(K-1), both ends.
    - "power": 1 + (T-1) (1 - (1 - i/(K-1))^(1/power)), both ends; a `power` above 1 is denser near the data.
    - "linspace", "leading", "trailing": as diffusers spaces them, without an offset. "linspace" is "linear" with ties
      rounded before the 1 is added; "trailing" contains T, "leading" does not unless K = T.
    - "linear_ddim": 1 + i floor(T/K), which is "leading"; "quad_ddim": 1 + floor(0.8 T i^2/(K-1)^2), ends at about 0.8 T.
    - "ot": the path 1 -> ... -> T of least sum over its edges s -> t of log(1 - b_{t|s} gamma_t / (1 - a_t)), where a_t is
      `alphas_cumprod` and b_{t|s} = 1 - a_t/a_s. That is the variational bound of the sampler with the optimal isotropic
      variance, in units of dim/2, less terms that every such path shares. `gamma` [T] is E|eps_hat|^2/dim at each t, at
      most 1 for the exact score. Where it first exceeds 1 the estimate has failed: that part and one of equal length
      before it get evenly spaced steps instead, 0.8 of the share that is theirs by length.
    - "dp": the path 0 -> ... -> T of K edges with the least sum of `costs[s, t]`, s < t, a table [T+1, T+1] of the terms
      of the bound; what is on and below its diagonal is not read, +inf forbids an edge. Time K T^2.

    Raises `InvalidInput` for K below 2 or above T, an unknown `kind`, a table that is missing, of the wrong shape, NaN or
    out of range, a `gamma` that exceeds 1 so early that nothing is left to optimise, costs that leave no path, and for
    "power" and "quad_ddim" when rounding repeats an index ("quad_ddim": beyond about sqrt(0.8 T) steps).
    Source: Bao et al., ICLR 2022 (arXiv 2201.06503): "linear", "power", "ot"; Song et al., ICLR 2021 (arXiv 2010.02502):
    "linear_ddim", "quad_ddim"; Lin et al., WACV 2024 (arXiv 2305.08891): "linspace", "leading", "trailing"; Watson et al.,
    arXiv 2106.03802: "dp".
    """
    total = check_count("num_train_timesteps", num_train_timesteps, 2)
    count = check_count("num_steps", num_steps, 2)
    if count > total:
        raise InvalidInput(f"num_steps must be at most num_train_timesteps = {total}, got {count}")
    if kind == "power":
        schedule = _power(total, count, check_positive("power", power))
    elif kind == "ot":
        schedule = _optimal_trajectory(count, *_checked_levels(total, gamma, alphas_cumprod))
    elif kind == "dp":
        schedule = _cheapest_path(_checked_costs(total, costs), count)[1:]
    elif kind in _SPACINGS:
        schedule = _SPACINGS[kind](total, count)
    else:
        known = ", ".join(f'"{name}"' for name in (*_SPACINGS, "power", "ot", "dp"))
        raise InvalidInput(f"unknown kind {kind!r} of step schedule; choose one of {known}")
    for earlier, later in itertools.pairwise(schedule):
        if later <= earlier:
            advice = "a power nearer 1" if kind == "power" else 'kind="power"'
            raise InvalidInput(
                f'"{kind}" rounds two of its {count} steps to t = {later} of {total}; take fewer steps or {advice}'
            )
    return schedule


def _linear(total: int, count: int) -> list[int]:
    # one division of integers: a running sum of strides would break ties by its rounding errors
    return [round(1 + i * (total - 1) / (count - 1)) for i in range(count)]


def _power(total: int, count: int, power: float) -> list[int]:
    return [round(1 + (total - 1) * (1 - (1 - i / (count - 1)) ** (1 / power))) for i in range(count)]


def _linspace(total: int, count: int) -> list[int]:
    return [1 + int(t) for t in np.linspace(0, total - 1, count).round()]


def _leading(total: int, count: int) -> list[int]:
    return [1 + i * (total // count) for i in range(count)]


def _trailing(total: int, count: int) -> list[int]:
    # the same range as in diffusers, so that ties fall alike; rounding may make it one longer, with an index below the data
    return [int(t) for t in np.arange(total, 0, -total / count)[:count].round()][::-1]


def _quad_ddim(total: int, count: int) -> list[int]:
    # in integers: the square of a rounded root can fall just short of a whole number
    return [1 + 4 * total * i * i // (5 * (count - 1) ** 2) for i in range(count)]


_SPACINGS: dict[str, Callable[[int, int], list[int]]] = {
    "linear": _linear,
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "linear_ddim": _leading,
    "quad_ddim": _quad_ddim,
}


def _optimal_trajectory(count: int, gamma: np.ndarray, abar: np.ndarray) -> list[int]:
    """The best path through the levels before twice the length on which `gamma` is above 1, and even steps after it."""
    total = len(gamma)
    above = np.flatnonzero(gamma > 1)
    doubtful = 2 * (total - int(above[0])) if above.size else 0
    trusted = total - doubtful
    if trusted < 1:
        raise InvalidInput(
            f"gamma is {gamma[above[0]]:.6g} at t = {above[0] + 1} of {total}, but mean squared noise cannot exceed 1, and "
            'too few levels are left before it; estimate gamma from more data, or take kind="linear"'
        )
    share = count * (5 * total - 4 * doubtful)
    even = min(max(count + -share // (5 * total), count - trusted, 1), doubtful)  # -share // n = -ceil(share / n)
    best = [1]
    if count - even > 1:
        best = [1 + node for node in _cheapest_path(_edge_logs(gamma[:trusted], abar[:trusted]), count - even - 1)]
    return best + [round(total - i * doubtful / even) for i in reversed(range(even))]


def _edge_logs(gamma: np.ndarray, abar: np.ndarray) -> np.ndarray:
    """log(1 - b_{t|s} gamma_t / (1 - abar_t)) for the edge s -> t, [time, time]; meaningless where s >= t.

    The optimal isotropic variance of p(x_s | x_t) is var = b_{t|s}/a_{t|s} (1 - b_{t|s} gamma_t / (1 - abar_t)), and the
    expected KL at it is dim/2 log(var / beta) with beta = b_{t|s} (1 - abar_s) / (1 - abar_t). All but the logarithm above
    is f(t) - f(s) with f = log((1 - abar) / abar), which on a path is the difference of its ends.
    """
    # 1 - b_{t|s} / (1 - abar_t) without its cancellation at small abar: the logarithm stays finite up to gamma = 1
    kept = abar / abar[:, None] * (1 - abar[:, None]) / (1 - abar)
    return np.log(1 - gamma + gamma * kept)


def _cheapest_path(costs: np.ndarray, edges: int) -> list[int]:
    """Nodes of the path from the first node to the last with exactly `edges` edges s -> t, s < t, of least total cost."""
    nodes = len(costs)
    into = np.where(np.tri(nodes, k=-1, dtype=bool), costs.T, np.inf)  # [to, from]: the search runs along rows
    through = np.empty_like(into)
    origins = np.empty((edges, nodes), dtype=np.intp)
    best = np.full(nodes, np.inf)
    best[0] = 0
    for origin in origins:
        np.add(into, best, out=through)
        through.argmin(1, out=origin)
        best = through[np.arange(nodes), origin]
    if not np.isfinite(best[-1]):
        raise InvalidInput(f"no path of {edges} edges has a finite cost; costs forbids too many edges with inf")
    path = [nodes - 1]
    for origin in origins[::-1]:
        path.append(int(origin[path[-1]]))
    return path[::-1]


def _checked_levels(total: int, gamma: Tensor | None, alphas_cumprod: Tensor | None) -> tuple[np.ndarray, np.ndarray]:
    gammas = _table("gamma", gamma, "ot", (total,))
    abar = _table("alphas_cumprod", alphas_cumprod, "ot", (total,))
    for t, value in enumerate(gammas.tolist(), start=1):
        if not 0 <= value < np.inf:
            raise InvalidInput(f"gamma is a mean square and must be finite and at least 0, got {value!r} at t = {t}")
    for t, (before, value) in enumerate(itertools.pairwise([1.0, *abar.tolist()]), start=1):
        if not 0 < value < before:
            raise InvalidInput(
                f"alphas_cumprod must fall strictly from below 1 and stay above 0, got {value!r} at t = {t} after "
                f'{before!r}; at pure noise gamma no longer tells the variance of the data: take kind="linear" or "dp"'
            )
    return gammas, abar


def _checked_costs(total: int, costs: Tensor | None) -> np.ndarray:
    table = _table("costs", costs, "dp", (total + 1, total + 1))
    bad = np.argwhere(np.triu(np.isnan(table) | (table == -np.inf), k=1))
    if len(bad):
        s, t = bad[0].tolist()
        raise InvalidInput(f"costs[{s}, {t}] is {table[s, t]}; every term s < t must be a number, or inf to forbid it")
    return table


def _table(name: str, values: Tensor | None, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    if values is None:
        raise InvalidInput(f'kind="{kind}" needs {name}, a tensor of shape {list(shape)}')
    if tuple(values.shape) != shape:
        raise InvalidInput(f"{name} must have shape {list(shape)}, got {list(values.shape)}")
    return values.detach().double().cpu().numpy()
