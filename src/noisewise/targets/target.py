"""What a sampler needs of a density: `Target`, the checks of its first call, and `as_target` for torch objects."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.typing import check_count

__all__ = ["Target", "TorchTarget", "as_target", "check_start", "check_target"]


@runtime_checkable
class Target(Protocol):
    """An unnormalised density on R^dim, evaluated for a batch of points at once.

    Optional, where known: `sample(n, generator) -> [n, dim]` exact draws, `log_normalizer` (float, the log of the
    integral of exp(log_prob)), `reference(n) -> [n, dim]` trusted draws, `names` (one per coordinate), `mode_means`
    ([modes, dim], centres to which draws can be assigned).

    Rows are independent of each other and alike, unless a target has a density of its own for each chain. Such a target
    says so by `chains` (how many; None when all are alike): it takes k x chains rows, row r belonging to chain
    r % chains, and `at_rows(rows) -> Target` is the target of those chains alone, `rows` being an integer tensor.
    """

    dim: int

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log density; -inf outside the support."""
        ...

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and its gradient in x; a closed form may keep a graph when `x` requires one."""
        ...


class TorchTarget:
    """A target from a differentiable torch callable `[batch, dim] -> [batch]`; the score comes from one autograd call.

    `names`: one name per coordinate, optional.
    """

    def __init__(self, log_prob: Callable[[Tensor], Tensor], dim: int, names: Sequence[str] | None = None) -> None:
        if not callable(log_prob):
            raise InvalidInput(f"log_prob must be callable, got {log_prob!r}")
        self.dim = check_count("dim", dim)
        if names is not None and len(names) != self.dim:
            raise InvalidInput(f"names has {len(names)} entries for dim {self.dim}: {list(names)!r}")
        self.names = None if names is None else list(names)
        self._log_prob = log_prob

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log density."""
        return self._log_prob(x)

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score; raises `InvalidInput` when log_prob cuts the gradient."""
        with torch.enable_grad():
            leaf = x.detach().requires_grad_(True)
            value = self._log_prob(leaf)
            if not isinstance(value, Tensor) or not value.requires_grad:
                raise InvalidInput(
                    "log_prob gave a value without a gradient: it must be torch operations on x, without detach(), "
                    ".item(), numpy or torch.no_grad(); for other libraries use from_numpy or from_jax"
                )
            # rows are independent (checked once by check_target), so the gradient of the sum is each row's own
            (score,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), score


def as_target(obj: Any, dim: int | None = None) -> Target:
    """Make a `Target` of `obj`: a Target, a `torch.distributions.Distribution`, or a torch callable with `dim`.

    A callable takes [batch, dim] and returns [batch]. Raises `InvalidInput` for anything else, for a missing `dim` of a
    callable, and for one that contradicts the object's own.
    """
    if isinstance(obj, torch.distributions.Distribution):
        target: Target = _DistributionTarget(obj)
    elif isinstance(obj, Target):
        target = obj
    elif isinstance(obj, type):
        raise InvalidInput(f"got the class {obj.__name__}, not an instance of it: call it first")
    elif callable(obj):
        if dim is None:
            raise InvalidInput(
                f"dim is needed for the callable {getattr(obj, '__name__', obj)!r}: as_target(fn, dim=...)"
            )
        return TorchTarget(obj, dim)
    else:
        raise InvalidInput(
            f"cannot make a target of {type(obj).__name__}: give a Target, a torch callable with dim, or a "
            "torch.distributions.Distribution; for other libraries see from_numpy, from_jax, from_numpyro, from_pymc"
        )
    if dim is not None and dim != target.dim:
        raise InvalidInput(f"dim={dim} was given, but the target has dim {target.dim}")
    return target


class _DistributionTarget(TorchTarget):
    """A continuous vector-valued (or scalar, dim 1) torch distribution over all of R^dim."""

    def __init__(self, distribution: torch.distributions.Distribution) -> None:
        if len(distribution.batch_shape) or len(distribution.event_shape) > 1:
            raise InvalidInput(
                f"{type(distribution).__name__} has batch_shape {tuple(distribution.batch_shape)} and event_shape "
                f"{tuple(distribution.event_shape)}; a target is one density over vectors: wrap it in "
                "torch.distributions.Independent"
            )
        scalar = not distribution.event_shape
        support = getattr(distribution, "support", None)
        if support is not None and getattr(support, "is_discrete", False):
            raise InvalidInput(
                f"{type(distribution).__name__} is discrete; the samplers need a density with a gradient"
            )

        def log_prob(x: Tensor) -> Tensor:
            inside = x.squeeze(-1) if scalar else x
            if support is None:
                return distribution.log_prob(inside)
            valid = support.check(inside)
            # evaluate on a point of the support where x is outside, then overwrite: no NaN reaches the gradient
            safe = torch.where(valid if scalar else valid.unsqueeze(-1), inside, _inner_point(distribution))
            value = distribution.log_prob(safe)
            return torch.where(valid, value, torch.full_like(value, -torch.inf) + 0 * value)

        super().__init__(log_prob, 1 if scalar else distribution.event_shape[0])
        self._distribution = distribution
        self.log_normalizer = 0.0

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Exact draws; torch distributions read the global generator, so it is seeded from `generator` and restored."""
        seed = int(torch.randint(2**31 - 1, (), generator=generator))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            draws = self._distribution.sample((n,))
        return draws.reshape(n, self.dim)


def _inner_point(distribution: torch.distributions.Distribution) -> Tensor:
    mean = distribution.mean
    return torch.where(torch.isfinite(mean), mean, torch.ones_like(mean)).detach()


def check_start(x: Float[Tensor, "chain dim"]) -> None:
    """Raise `InvalidInput` naming the first chain whose start is not finite."""
    bad = (~torch.isfinite(x)).any(-1).nonzero().flatten()
    if len(bad):
        chain = int(bad[0])
        raise InvalidInput(
            f"the start of chain {chain} is not finite: {x[chain].tolist()}"
            + (f" ({len(bad)} of {len(x)} chains are affected)" if len(bad) > 1 else "")
        )


def check_target(target: Target, x: Float[Tensor, "chain dim"]) -> tuple[Tensor, Tensor]:
    """Evaluate `target` at the starts `x` and check all that a batched sampler relies on; return value and score there.

    Checked: shape [chain] of log_prob and [chain, dim] of the score, dtype, finiteness at every start (the chain is
    named), and that rows are independent of each other (two of them alone, taken by `at_rows` where chains have densities
    of their own, give the same values). One value-and-gradient call per chain and two more. Raises `InvalidInput`.
    """
    chains, dim = x.shape
    if dim != target.dim:
        raise InvalidInput(f"the starts have {dim} coordinates, but the target has dim {target.dim}")
    check_start(x)
    own: Any = getattr(target, "chains", None)
    if own is not None and own != chains:
        raise InvalidInput(f"the target has a density of its own for each of {own} chains, but {chains} were started")
    try:
        value, score = target.log_prob_and_score(x)
    except NoisewiseError:
        raise
    except Exception as error:  # whatever the user's own function raises
        raise InvalidInput(
            f"log_prob failed on points of shape [{chains}, {dim}]: {type(error).__name__}: {error}; it must be torch "
            f"operations on x, and dim={dim} must be its number of coordinates (for NumPy or JAX: from_numpy, from_jax)"
        ) from error
    if value.shape != (chains,):
        shown = tuple(value.shape)
        advice = {
            (): "it seems to sum over the batch: sum over the last axis only, .sum(-1)",
            (chains, 1): "drop the last axis with .squeeze(-1)",
            (chains, dim): "sum over the last axis, .sum(-1)",
        }.get(shown, "return one value per row")
        raise InvalidInput(f"log_prob must map [{chains}, {dim}] to [{chains}], got shape {shown}; {advice}")
    if score.shape != x.shape:
        raise InvalidInput(f"the score must have the shape of x, {tuple(x.shape)}, got {tuple(score.shape)}")
    for name, tensor in (("log_prob", value), ("score", score)):
        if tensor.dtype != x.dtype:
            raise InvalidInput(
                f"{name} has dtype {tensor.dtype} for starts of dtype {x.dtype}; "
                "make the target follow its input, or give starts of the target's dtype"
            )
    finite = torch.isfinite(value) & torch.isfinite(score).all(-1)
    if not finite.all():
        chain = int((~finite).nonzero()[0])
        raise InvalidInput(
            f"log_prob is {value[chain].item()} with score {score[chain].tolist()} at the start of chain {chain}, "
            f"{x[chain].tolist()}; start inside the support"
        )
    if chains > 1:
        # another batch of two of the rows: a mean over the batch or a batch norm shows, an order-dependence too
        rows = torch.tensor([chains - 1, 0], device=x.device)
        pair: Any = target if own is None else target.at_rows(rows)  # type: ignore[attr-defined]
        value_pair, score_pair = pair.log_prob_and_score(x[rows])
        tolerance = 1e-3 if x.dtype == torch.float32 else 1e-6
        for name, there, here in (("log_prob", value[rows], value_pair), ("score", score[rows], score_pair)):
            gap = (there - here).abs().reshape(2, -1).amax(-1)
            allowed = tolerance * (1 + there.abs().reshape(2, -1).amax(-1))
            if (gap > allowed).any():
                worst = int((gap - allowed).argmax())
                raise InvalidInput(
                    f"{name} of chain {int(rows[worst])} changes by {gap[worst].item():.3g} when other chains leave "
                    "the batch: each row must depend on its own x only (look for batch norms, batch means, randomness)"
                )
    return value, score
