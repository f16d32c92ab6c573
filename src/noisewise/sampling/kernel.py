"""The words that every kernel shares: state, noise, `init` and `step`, and the protocols that the loop relies on."""

import math
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.targets.target import Target
from noisewise.targets.tilted import Tilt

__all__ = [
    "ChainState",
    "InnerKernel",
    "Kernel",
    "Moved",
    "Phase",
    "as_setting",
    "finite",
    "given_settings",
    "local_scale",
    "plain_settings",
    "select",
    "starting_scale",
]


class ChainState(NamedTuple):
    """Where each chain is, with the log density and score of the *target* there (never of a tilted one)."""

    position: Float[Tensor, "chain dim"]
    log_prob: Float[Tensor, " chain"]
    score: Float[Tensor, "chain dim"]


class Moved(NamedTuple):
    """What a move did: acceptance probability of each chain (mean over its steps), and rejected non-finite values."""

    acceptance: Float[Tensor, " chain"]
    nonfinite: Tensor


@runtime_checkable
class Kernel(Protocol):
    """A transition that leaves its target invariant (ULA excepted), pure in `state` and `generator`.

    `gradients_per_step`, `energies_per_step`: calls per chain that one `step` makes, known before it runs.
    `settings()` and `with_settings(...)`: everything that warm-up may change, as named tensors. A kernel that samples what a
    model implies has no target: it has a `model`, `bind(start)` in its place, which returns it for points of the starts'
    dimension, and `gradients_at_start` where `init` makes more than one call per chain.
    """

    @property
    def target(self) -> Target:
        """What it leaves invariant."""
        ...

    @property
    def gradients_per_step(self) -> int:
        """Value-and-gradient calls per chain and step."""
        ...

    @property
    def energies_per_step(self) -> int:
        """Value-only calls per chain and step."""
        ...

    def init(self, position: Float[Tensor, "chain dim"]) -> Any:
        """State at `position`; one value-and-gradient call per chain."""
        ...

    def start(self, cold: ChainState) -> Any:
        """State from a point whose value and score are known; no call."""
        ...

    def step(self, state: Any, generator: torch.Generator) -> tuple[Any, Any]:
        """One iteration: the new state, and an info tuple with `acceptance` (one entry per step size) and `nonfinite`."""
        ...

    def settings(self) -> dict[str, Tensor]:
        """What warm-up has set, by name."""
        ...

    def with_settings(self, settings: dict[str, Tensor]) -> "Kernel":
        """The same kernel with these settings."""
        ...

    def warmup_phases(self, gradients: int, state: ChainState) -> "list[Phase]":
        """The phases of a warm-up that may use `gradients` calls per chain; empty when nothing is left open."""
        ...

    def state_type(self) -> type:
        """The NamedTuple class of its states."""
        ...

    def describe(self) -> dict[str, Any]:
        """Name and arguments as plain JSON values, for run folders and reports."""
        ...


@runtime_checkable
class InnerKernel(Kernel, Protocol):
    """A kernel that can also move under a tilt, as DiGS, parallel tempering and SMC need it."""

    def noise(self, position: Float[Tensor, "chain dim"], generator: torch.Generator) -> Any:
        """All random numbers of one `advance`.

        Acceptances compare with log(1 - u): u itself can be 0 in float32, whose logarithm would accept anything finite.
        """
        ...

    def advance(self, state: ChainState, noise: Any, step_size: Tensor, tilt: Tilt) -> tuple[ChainState, Moved]:
        """Move under `tilt` with the given random numbers; a deterministic function of its arguments.

        `step_size` is a scalar or [chain, 1].
        """
        ...

    def initial_step_size(self, scale: Float[Tensor, " dim"], dim: int) -> Tensor:
        """A step size for a density of local standard deviations `scale`, where adaptation starts."""
        ...


@runtime_checkable
class Phase(Protocol):
    """A part of warm-up: it runs one kernel for some steps and changes its settings after each.

    `memory` is a dict of tensors, so that a checkpoint can hold it. `opening_gradients`, `closing_gradients`: calls
    per chain that `begin` and `end` make.
    """

    opening_gradients: int
    closing_gradients: int

    def template(self) -> Kernel:
        """The kernel of this phase, before tuning; used to restore a checkpoint."""
        ...

    def begin(
        self, kernel: Kernel, state: Any, generator: torch.Generator
    ) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """From the last phase's kernel and state to this one's, its memory, and its number of steps."""
        ...

    def update(
        self, kernel: Kernel, state: Any, info: Any, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """After step `index` of `steps`."""
        ...

    def finished(self, state: Any) -> bool:
        """Whether the phase may end before its steps ran out."""
        ...

    def end(
        self, kernel: Kernel, state: Any, memory: dict[str, Tensor], generator: torch.Generator
    ) -> tuple[Kernel, Any]:
        """The kernel and state that the next phase, or the run proper, starts from."""
        ...


def finite(log_prob: Float[Tensor, " chain"], score: Float[Tensor, "chain dim"]) -> Tensor:
    """Which chains have a finite log density and score: anything else is a rejection."""
    return torch.isfinite(log_prob) & torch.isfinite(score).all(-1)


def select(accept: Tensor, proposed: ChainState, current: ChainState) -> ChainState:
    """`proposed` where `accept`, `current` elsewhere; NaN of a rejected proposal never enters."""
    column = accept.unsqueeze(-1)
    return ChainState(
        torch.where(column, proposed.position, current.position),
        torch.where(accept, proposed.log_prob, current.log_prob),
        torch.where(column, proposed.score, current.score),
    )


def as_setting(name: str, value: Any, like: Tensor | None = None) -> Tensor | None:
    """A step size, metric or ladder given by the user, as a positive finite tensor; None stays None."""
    if value is None:
        return None
    tensor = torch.as_tensor(
        value, dtype=None if like is None else like.dtype, device=None if like is None else like.device
    )
    if not tensor.dtype.is_floating_point:
        tensor = tensor.to(torch.get_default_dtype())
    if not bool((torch.isfinite(tensor) & (tensor > 0)).all()):
        raise InvalidInput(f"{name} must be finite and above 0, got {value!r}")
    return tensor


def given_settings(**settings: Any) -> dict[str, Tensor]:
    """Those settings that are not None, as tensors; numbers keep all their digits, whatever the chains' dtype."""
    return {
        name: value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64)
        for name, value in settings.items()
        if value is not None
    }


def plain_settings(**settings: Any) -> dict[str, Any]:
    """Settings as JSON values: tensors become lists, None says that warm-up decides."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        return value if value is None or math.isfinite(value) else str(value)

    return {name: plain(value) for name, value in settings.items()}


def starting_scale(state: ChainState) -> Float[Tensor, " dim"]:
    """`local_scale` at the starts, where step sizes begin; at a mode the score vanishes and says nothing.

    Then the size of the coordinates themselves (at least 1) is the bound; adaptation takes it from there. On the CPU.
    """
    return local_scale(state.score).clamp(max=max(1.0, float(state.position.abs().max()))).cpu()


def local_scale(score: Float[Tensor, "*batch dim"]) -> Float[Tensor, " dim"]:
    """Standard deviation of each coordinate inside a mode, from scores: E[score_i^2] = 1 / sd_i^2 for a Gaussian mode.

    Blind to how far apart the modes are, which is the point. The median over chains keeps starts in the far tails
    from setting it.
    """
    squared = score.reshape(-1, score.shape[-1]).double().square()
    # median of a chi-square with one degree of freedom is 0.4549 times its mean
    typical = squared.median(0).values / 0.4549
    mean = squared.mean(0)
    value = torch.where(typical > 0, torch.minimum(typical, mean), mean)
    return value.clamp(min=1e-60).rsqrt().clamp(max=torch.finfo(score.dtype).max ** 0.25).to(score.dtype)
