"""`Energy`, `Score` and `Denoiser`: one way to speak to any network that was trained on noisy data.

Each gives the score of the noisy density and the mean of p(x | x_t), which are linear in one another (Tweedie's formula;
Efron, JASA 106, 2011).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.noise import Corruption

__all__ = ["Denoiser", "Energy", "Model", "Score", "as_model", "check_corruption", "denoised"]

_PREDICTIONS = ("x0", "epsilon", "v", "flow")


@dataclass(frozen=True)
class Energy:
    """The energy of a noisy density, q(x_t) proportional to exp(-fn(x_t)).

    `fn`: a module or callable [batch, *event] -> [batch], twice differentiable (SiLU, softplus, tanh; never ReLU).
    `corruption`: the noise level it was trained at, by default the attribute `corruption` of `fn`; another is refused.
    Under grad mode the score is recorded, so that losses train parameters; under `torch.no_grad()` it is a plain tensor.
    Raises `InvalidInput` for outputs of the wrong shape and for a value without a gradient.
    """

    fn: Any
    corruption: Corruption | None = None

    def __post_init__(self) -> None:
        _settle(self)

    def log_prob(self, x_t: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Unnormalised log density of the noisy variable."""
        energy = self.fn(x_t)
        if not isinstance(energy, Tensor) or energy.shape != x_t.shape[:1]:
            shown = tuple(energy.shape) if isinstance(energy, Tensor) else type(energy).__name__
            raise InvalidInput(
                f"an energy must map {tuple(x_t.shape)} to ({len(x_t)},), one value per row, got {shown}; "
                "sum over every axis but the first"
            )
        return -energy

    def score(self, x_t: Float[Tensor, "batch *event"], corruption: Corruption) -> Float[Tensor, "batch *event"]:
        """Gradient of the log density of the noisy variable."""
        check_corruption(self, corruption)
        recorded = torch.is_grad_enabled()
        # inference mode would refuse the graph that the gradient itself needs
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x_t if recorded and x_t.requires_grad else _leaf(x_t)
            log_prob = self.log_prob(leaf)
            gradient = None
            if log_prob.requires_grad:
                (gradient,) = torch.autograd.grad(log_prob.sum(), leaf, create_graph=recorded, allow_unused=True)
        if gradient is None:
            raise InvalidInput(
                "the energy gave a value that does not depend on x_t through torch operations: no detach(), .item(), "
                "numpy or torch.no_grad() inside it"
            )
        return gradient

    def mean(self, x_t: Float[Tensor, "batch *event"], corruption: Corruption) -> Float[Tensor, "batch *event"]:
        """E[x | x_t] = (x_t + s^2 score) / a."""
        return _tweedie(x_t, self.score(x_t, corruption), corruption)


@dataclass(frozen=True)
class Score:
    """The score of a noisy density: `fn` gives grad log q(x_t), [batch, *event] -> the same shape.

    `corruption`: as for `Energy`. Raises `InvalidInput` for outputs of the wrong shape.
    """

    fn: Any
    corruption: Corruption | None = None

    def __post_init__(self) -> None:
        _settle(self)

    def score(self, x_t: Float[Tensor, "batch *event"], corruption: Corruption) -> Float[Tensor, "batch *event"]:
        """What `fn` gives."""
        check_corruption(self, corruption)
        return _same_shape(self.fn(x_t), x_t, "a score")

    def mean(self, x_t: Float[Tensor, "batch *event"], corruption: Corruption) -> Float[Tensor, "batch *event"]:
        """E[x | x_t] = (x_t + s^2 score) / a."""
        return _tweedie(x_t, self.score(x_t, corruption), corruption)


@dataclass(frozen=True)
class Denoiser:
    """A network that predicts x ("x0"), the noise ("epsilon"), v = a eps - s x ("v") or eps - x ("flow") from a x + s eps.

    `fn`: [batch, *event] -> the same shape; `corruption`: as for `Energy`. A diffusion network takes a time too: bind it,
    `Denoiser(lambda x_t: net(x_t, t), "epsilon")`.
    Raises `InvalidInput` for another prediction and for outputs of the wrong shape.
    Source of v: Salimans & Ho, ICLR 2022, appendix D.
    """

    fn: Any
    prediction: str = "x0"
    corruption: Corruption | None = None

    def __post_init__(self) -> None:
        if self.prediction not in _PREDICTIONS:
            raise InvalidInput(f"prediction must be one of {_PREDICTIONS}, got {self.prediction!r}")
        _settle(self)

    def score(self, x_t: Float[Tensor, "batch *event"], corruption: Corruption) -> Float[Tensor, "batch *event"]:
        """(a x0 - x_t) / s^2 = -eps / s."""
        a, s, output = corruption.a, corruption.s, self._output(x_t, corruption)
        if self.prediction == "epsilon":
            return -output / s
        if self.prediction == "v":
            return -(s * x_t + a * output) / (s * (a**2 + s**2))
        return (a * denoised(self.prediction, output, x_t, a, s) - x_t) / s**2

    def mean(self, x_t: Float[Tensor, "batch *event"], corruption: Corruption) -> Float[Tensor, "batch *event"]:
        """E[x | x_t]."""
        return denoised(self.prediction, self._output(x_t, corruption), x_t, corruption.a, corruption.s)

    def _output(self, x_t: Tensor, corruption: Corruption) -> Tensor:
        check_corruption(self, corruption)
        return _same_shape(self.fn(x_t), x_t, f"a denoiser ({self.prediction})")


def denoised(prediction: str, output: Tensor, x_t: Tensor, a: float | int | Tensor, s: float | int | Tensor) -> Tensor:
    """E[x | x_t] from what a network gives: x itself, (x_t - s eps) / a, (a x_t - s v) / (a^2 + s^2), (x_t - s u) / (a + s).

    `a`, `s`: numbers, or tensors that broadcast against x_t.
    """
    if prediction == "x0":
        return output
    if prediction == "epsilon":
        return (x_t - s * output) / a
    if prediction == "v":
        return (a * x_t - s * output) / (a**2 + s**2)
    return (x_t - s * output) / (a + s)


Model = Energy | Score | Denoiser


def as_model(obj: Any) -> Model:
    """`obj` as an `Energy`, `Score` or `Denoiser`; an object with a method `energy` becomes an `Energy`.

    Raises `InvalidInput` for a bare network or callable, whose output nobody can name.
    """
    if isinstance(obj, Energy | Score | Denoiser):
        return obj
    energy = getattr(obj, "energy", None)
    if callable(energy) and not isinstance(obj, type):
        return Energy(energy, getattr(obj, "corruption", None))
    raise InvalidInput(
        f"what {type(obj).__name__} gives cannot be told from outside; wrap it: Energy(fn), Score(fn) or Denoiser(fn)"
    )


def _settle(model: Any) -> None:
    """Check `fn`, and take the corruption that it records."""
    if not callable(model.fn) or isinstance(model.fn, type):
        raise InvalidInput(f"fn must be a module or a callable, got {model.fn!r}")
    recorded = getattr(model.fn, "corruption", None)
    if recorded is not None and not isinstance(recorded, Corruption):
        raise InvalidInput(f"the attribute corruption of the network must be a Corruption, got {recorded!r}")
    if model.corruption is None:
        object.__setattr__(model, "corruption", recorded)
    elif recorded is not None:
        _check_same(recorded, model.corruption)


def check_corruption(model: Model, corruption: Corruption) -> None:
    """Raise `InvalidInput` where `model` knows that it was trained at another noise level."""
    if model.corruption is not None:
        _check_same(model.corruption, corruption)


def _check_same(trained: Corruption, asked: Corruption) -> None:
    # a noise level may have gone through a file or float32 on its way
    if not (math.isclose(trained.a, asked.a, rel_tol=1e-6) and math.isclose(trained.s, asked.s, rel_tol=1e-6)):
        raise InvalidInput(
            f"the model was trained at {trained}, but is asked at {asked}: use its own noise level, or train another model"
        )


def _leaf(x: Tensor) -> Tensor:
    """A tensor to differentiate by, also of one that was made in inference mode."""
    return (x.clone() if x.is_inference() else x.detach()).requires_grad_(True)


def _same_shape(output: Any, x_t: Tensor, what: str) -> Tensor:
    if not isinstance(output, Tensor) or output.shape != x_t.shape:
        shown = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InvalidInput(f"{what} must have the shape of x_t, {tuple(x_t.shape)}, got {shown}")
    return output


def _tweedie(x_t: Tensor, score: Tensor, corruption: Corruption) -> Tensor:
    return (x_t + corruption.s**2 * score) / corruption.a
