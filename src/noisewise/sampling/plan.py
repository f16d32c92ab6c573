"""What a run is asked for: how many draws, how they are spaced, and what it may cost."""

from dataclasses import dataclass

from noisewise.errors import InvalidInput

__all__ = ["Budget", "Plan"]


@dataclass(frozen=True)
class Budget:
    """What a run may use, warm-up included: value-and-gradient calls over all chains, or seconds of wall time, or both.

    Only a budget in gradients gives the same draws on every machine.
    """

    gradients: float | int | None = None
    seconds: float | int | None = None

    def __post_init__(self) -> None:
        for name, value in (("gradients", self.gradients), ("seconds", self.seconds)):
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise InvalidInput(f"budget: {name} must be above 0, got {value!r}")


@dataclass(frozen=True)
class Plan:
    """How much to do."""

    draws: int | None
    warmup: int
    thin: int
    budget: Budget
