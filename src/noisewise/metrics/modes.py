"""Mode weights of a sample with their between-chain error, total variation, and how often chains change modes."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.metrics.measurement import Measurement
from noisewise.typing import Cost, check_count

__all__ = [
    "ModeWeights",
    "assign_modes",
    "histogram_total_variation",
    "label_ess",
    "mode_flips",
    "mode_weights",
    "modes_found",
    "total_variation",
]

# Rows whose distances to all modes are held at once.
_CHUNK = 2**16
# Rates are quoted per this many calls of the target.
_CALLS = 1_000_000


class ModeWeights(NamedTuple):
    """Estimated probability of each mode.

    `weights`: [mode], float64, sums to 1. `se`: [mode] standard errors, or None where they cannot be known (one chain).
    `n`: number of draws.
    """

    weights: Float[Tensor, " mode"]
    se: Float[Tensor, " mode"] | None
    n: int

    def measurements(self) -> list[Measurement]:
        """One Measurement per mode."""
        errors = [None] * len(self.weights) if self.se is None else self.se.tolist()
        return [Measurement(w, se, n=self.n) for w, se in zip(self.weights.tolist(), errors, strict=True)]


def assign_modes(
    draws: Float[Tensor, "*batch dim"], assign: Float[Tensor, "mode dim"] | Callable[[Tensor], Tensor]
) -> Int[Tensor, "*batch"]:
    """Mode label of each draw: the nearest row of `assign`, or what the callable `[n, dim] -> [n]` says.

    Raises `InvalidInput` where shapes disagree, draws are not finite, or the callable returns no whole numbers.
    """
    if not torch.isfinite(draws).all():
        raise InvalidInput("draws contain NaN or infinite values; a mode cannot be named for them")
    flat = draws.reshape(-1, draws.shape[-1])
    if isinstance(assign, Tensor):
        if assign.ndim != 2 or assign.shape[1] != flat.shape[1]:
            raise InvalidInput(f"mode means must have shape [mode, {flat.shape[1]}], got {tuple(assign.shape)}")
        means = assign.to(flat)
        labels = torch.cat([torch.cdist(part, means).argmin(-1) for part in flat.split(_CHUNK)])
    else:
        labels = assign(flat)
        if labels.shape != (len(flat),) or labels.is_floating_point() or labels.is_complex():
            raise InvalidInput(
                f"assign must map [{len(flat)}, {flat.shape[1]}] to [{len(flat)}] whole numbers, got shape "
                f"{tuple(labels.shape)} of {labels.dtype}"
            )
    return labels.long().reshape(draws.shape[:-1])


def mode_weights(
    draws: Float[Tensor, "chain draw dim"] | Float[Tensor, "n dim"],
    assign: Float[Tensor, "mode dim"] | Callable[[Tensor], Tensor],
    modes: int | None = None,
) -> ModeWeights:
    """Share of the draws in each mode, with a standard error that sees slow mixing.

    `assign`: mode means (a draw belongs to the nearest), or a callable of labels 0..modes-1, for which `modes` must be
    given. Draws [chain, draw, dim]: the error is the spread of the chain means over sqrt(chains), None for one chain.
    Draws [n, dim] are taken as independent: sqrt(w (1 - w) / n). Raises `InvalidInput` for labels outside 0..modes-1.
    """
    if modes is None:
        if not isinstance(assign, Tensor):
            raise InvalidInput("modes is needed when assign is a callable: mode_weights(draws, labels, modes=K)")
        modes = len(assign)
    modes = check_count("modes", modes)
    if draws.ndim not in (2, 3) or draws.shape[:-1].numel() == 0:
        raise InvalidInput(f"draws must have shape [chain, draw, dim] or [n, dim], got {tuple(draws.shape)}")
    labels = assign_modes(draws, assign)
    if draws.ndim == 2:
        weights = _chain_means(labels[None], modes)[0]
        return ModeWeights(weights, (weights * (1 - weights) / len(labels)).sqrt(), len(labels))
    means = _chain_means(labels, modes)
    se = means.std(0) / math.sqrt(len(means)) if len(means) > 1 else None
    return ModeWeights(means.mean(0), se, labels.numel())


def total_variation(
    p: Float[Tensor, " mode"] | ModeWeights, q: Float[Tensor, " mode"] | ModeWeights, *, floor: float | None = None
) -> Measurement:
    """Total variation 1/2 sum |p - q| of two probability vectors, in [0, 1].

    Raises `InvalidInput` unless both have one length, no negative entry, and a sum of 1 to within 1e-4; divide counts
    by their sum first.
    """
    n = p.n if isinstance(p, ModeWeights) else None
    p, q = (_probabilities(name, v) for name, v in (("p", p), ("q", q)))
    if p.shape != q.shape:
        raise InvalidInput(f"p has {len(p)} entries and q has {len(q)}")
    return Measurement(0.5 * float((p - q.to(p.device)).abs().sum()), floor=floor, n=n)


def histogram_total_variation(
    x: Float[Tensor, "n dim"] | Float[Tensor, " n"],
    y: Float[Tensor, "m dim"] | Float[Tensor, " m"],
    bins: int | Sequence[int],
    range: Sequence,
    *,
    floor: float | None = None,
) -> Measurement:
    """Total variation of two histograms on a regular grid, mass outside the grid included.

    `bins`: number of bins, one for all or one per coordinate. `range`: (low, high) of the grid, or one pair per
    coordinate. What lies outside is not dropped: each coordinate has one more bin below and one above its range.
    Raises `InvalidInput` for NaN, empty samples, or grids that do not fit.
    """
    x, y = (v[:, None] if v.ndim == 1 else v for v in (x, y))
    if len(x) == 0 or len(y) == 0 or x.shape[1] != y.shape[1]:
        raise InvalidInput(f"cannot compare histograms of shapes {tuple(x.shape)} and {tuple(y.shape)}")
    if torch.isnan(x).any() or torch.isnan(y).any():
        raise InvalidInput("x or y contains NaN; count and remove such draws, and say so")
    dim = x.shape[1]
    pairs = [tuple(range)] * dim if not isinstance(range[0], Sequence) else [tuple(pair) for pair in range]
    counts = [bins] * dim if isinstance(bins, int) else list(bins)
    if len(pairs) != dim or len(counts) != dim:
        raise InvalidInput(f"got {len(counts)} bin numbers and {len(pairs)} ranges for {dim} coordinates")
    cell_x, cell_y = (torch.zeros(len(v), dtype=torch.long, device=x.device) for v in (x, y))
    for axis, ((low, high), count) in enumerate(zip(pairs, counts, strict=True)):
        count = check_count("bins", count)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise InvalidInput(
                f"the range of coordinate {axis} must be (low, high) with low < high, got {(low, high)!r}"
            )
        edges = torch.linspace(low, high, count + 1, dtype=torch.float64, device=x.device)
        cell_x = cell_x * (count + 2) + _bin_of(x[:, axis], edges)
        cell_y = cell_y * (count + 2) + _bin_of(y[:, axis].to(x.device), edges)
    # only occupied cells are stored, so fine grids in several coordinates stay small
    cells, position = torch.unique(torch.cat([cell_x, cell_y]), return_inverse=True)
    p = torch.bincount(position[: len(x)], minlength=len(cells)).double() / len(x)
    q = torch.bincount(position[len(x) :], minlength=len(cells)).double() / len(y)
    return Measurement(0.5 * float((p - q).abs().sum()), floor=floor, n=len(x))


def label_ess(
    labels: Int[Tensor, "chain draw"], mode: int | None = None, cost: Cost | int | None = None
) -> Measurement:
    """Effective number of independent mode labels, w (1 - w) / se^2, with se from the spread of the chain means.

    `mode`: which mode's weight w; by default the mode with the least, among those seen. `cost`: calls of the target
    (or a `Cost`, all calls of which count); the result is then per 1e6 calls. Chains that all sit in one mode have
    label ESS 0, however good their R-hat looks. The standard error is that of a variance estimated from `chain` means.
    Raises `InvalidInput` for fewer than 2 chains.
    """
    chains, draws = labels.shape
    if chains < 2 or draws < 1:
        raise InvalidInput(f"label ESS needs at least 2 chains, got labels of shape {tuple(labels.shape)}")
    candidates = labels.unique().tolist() if mode is None else [mode]
    value = min(_label_ess_of_mode(labels == candidate) for candidate in candidates)
    value *= _per_calls(cost)
    se = value * math.sqrt(2 / (chains - 1)) if math.isfinite(value) else None
    return Measurement(value, se, n=chains, unit="" if cost is None else "per 1e6 calls", better="higher")


def mode_flips(labels: Int[Tensor, "chain draw"], cost: Cost | int | None = None) -> Measurement:
    """How often the mode changes from one draw to the next, summed over chains; per 1e6 calls when `cost` is given.

    Flatters samplers that flip back and forth: `label_ess` is the honest figure. The standard error is that of the
    spread over chains (None for one chain).
    """
    chains, draws = labels.shape
    flips = (labels[:, 1:] != labels[:, :-1]).sum(-1).double()
    scale = _per_calls(cost)
    se = float(flips.std()) * math.sqrt(chains) * scale if chains > 1 else None
    unit = "flips" if cost is None else "flips per 1e6 calls"
    return Measurement(float(flips.sum()) * scale, se, n=chains * draws, unit=unit, better="higher")


def modes_found(labels: Int[Tensor, "*batch"], modes: int) -> Measurement:
    """Number of modes 0..modes-1 with at least one draw. Says nothing of their weights: see `mode_weights`."""
    modes = check_count("modes", modes)
    found = len(torch.unique(_checked_labels(labels, modes)))
    return Measurement(found, floor=modes, n=labels.numel(), better="higher")


def _chain_means(labels: Tensor, modes: int) -> Tensor:
    """[chain, draw] labels -> [chain, mode] shares, float64."""
    chains, draws = labels.shape
    offset = torch.arange(chains, device=labels.device)[:, None] * modes
    counts = torch.bincount((_checked_labels(labels, modes) + offset).flatten(), minlength=chains * modes)
    return counts.reshape(chains, modes).double() / draws


def _checked_labels(labels: Tensor, modes: int) -> Tensor:
    outside = (labels < 0) | (labels >= modes)
    if outside.any():
        raise InvalidInput(f"label {int(labels[outside][0])} is outside 0..{modes - 1}; raise modes or mend assign")
    return labels


def _probabilities(name: str, vector: Tensor | ModeWeights) -> Tensor:
    vector = (vector.weights if isinstance(vector, ModeWeights) else vector).double()
    total = float(vector.sum())
    if vector.ndim != 1 or not (vector >= 0).all() or not abs(total - 1) <= 1e-4:
        raise InvalidInput(
            f"{name} must be one vector of probabilities; got shape {tuple(vector.shape)} with sum {total:.6g} and "
            f"smallest entry {float(vector.min()) if vector.numel() else math.nan:.3g}; divide counts by their sum"
        )
    return vector


def _bin_of(values: Tensor, edges: Tensor) -> Tensor:
    """0 below the range, 1..count inside, count + 1 above; the last edge belongs to the last bin, as in numpy."""
    index = torch.searchsorted(edges, values.double().contiguous(), right=True)
    return index - (values.double() == edges[-1]).long()


def _label_ess_of_mode(inside: Tensor) -> float:
    means = inside.double().mean(-1)
    weight = float(means.mean())
    if weight in (0.0, 1.0):
        return 0.0
    variance = float(means.var()) / len(means)
    return weight * (1 - weight) / variance if variance > 0 else math.inf


def _per_calls(cost: Cost | int | None) -> float:
    if cost is None:
        return 1.0
    calls = cost.gradients + cost.energies if isinstance(cost, Cost) else cost
    return _CALLS / check_count("cost", calls)
