"""A diffusion network seen as E[x0 | x_t], with its features and the products of its derivative."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.denoising.models import denoised
from noisewise.diffusion.levels import PREDICTIONS, NoiseLevels
from noisewise.errors import InvalidInput, NoisewiseError

__all__ = [
    "DiffusionModel",
    "Prediction",
    "as_diffusion_model",
    "declares_variance",
    "first_channels",
    "module_at",
    "tensor_of",
    "watch",
]


@dataclass
class Prediction:
    """What a network says at x_t: `clean` = E[x0 | x_t] and `eps`, detached, at least float32; `features` at its site, detached.

    `a`, `s` broadcast against x_t. `product` needs a prediction that was made with `graph=True`.
    """

    x_t: Tensor
    t: Tensor
    clean: Tensor
    eps: Tensor
    a: Tensor
    s: Tensor
    features: Tensor | None = None
    _leaf: Tensor | None = None
    _output: Tensor | None = None

    def product(self, v: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """R^T v with R = a d clean / d x_t = (a^2/s^2) Cov[x0 | x_t]: the relative covariance, one backward pass."""
        if self._output is None or self._leaf is None:
            raise InvalidInput("this prediction holds no graph: predict(..., graph=True)")
        # the sampling loops of others run in inference or no-grad mode
        with torch.inference_mode(False):
            (pulled,) = torch.autograd.grad(self._output, self._leaf, v.clone(), retain_graph=True, allow_unused=True)
        if pulled is None:
            raise InvalidInput(
                "the network's output does not depend on x_t through torch operations, so it has no derivative: no detach(), "
                ".item(), numpy or torch.no_grad() inside it"
            )
        return self.a * pulled

    def free(self) -> None:
        """Let the graph go."""
        self._leaf = self._output = None


@dataclass
class DiffusionModel:
    """`network(x_t, t, **conditions)` with its noise levels; `site`: name of the module whose input is the feature.

    `calls`: rows evaluated so far.
    """

    network: nn.Module
    levels: NoiseLevels
    site: str | None = None
    calls: int = field(default=0, init=False)

    def predict(self, x_t: Float[Tensor, "batch *event"], t: Any, graph: bool = False, **conditions: Any) -> Prediction:
        """Evaluate once, in the network's own mode. `graph`: keep what `Prediction.product` needs.

        Raises `InvalidInput` for x_t or an output of another shape, a time step outside the schedule, and conditions that the
        network does not take.
        """
        channels = getattr(self.network, "config", {}).get("in_channels")
        if channels is not None and (x_t.ndim < 3 or x_t.shape[1] != channels):
            raise InvalidInput(
                f"{type(self.network).__name__} takes [batch, {channels}, *space], got x_t of shape {tuple(x_t.shape)}"
            )
        with torch.inference_mode(False), torch.set_grad_enabled(graph), watch(self.network, self.site) as seen:
            index = self.levels.index(_plain(t), len(x_t), x_t.device)
            leaf = _plain(x_t).detach().requires_grad_(graph)
            # x0 is a difference that half precision does not survive
            wide = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
            a, s = self.levels.at(index, wide)
            conditions = {name: _plain(value) for name, value in conditions.items()}
            output = tensor_of(self._called(leaf, index, conditions))
            output = first_channels(output, leaf, self.levels.learned_variance or declares_variance(self.network, leaf))
            output = output.to(wide.dtype)
            clean = denoised(PREDICTIONS[self.levels.prediction], output, wide, a, s)
        self.calls += len(x_t)
        found = clean.detach()
        # predicted noise is exact where the network gives it; elsewhere it follows from x0
        eps = output.detach() if self.levels.prediction == "epsilon" else (x_t - a * found) / s
        if self.site is not None and not seen:
            raise InvalidInput(
                f"{type(self.network).__name__} did not call its module {self.site!r}: name another site"
            )
        features = None if self.site is None else seen[-1]
        return Prediction(x_t, index, found, eps, a, s, features, leaf if graph else None, clean if graph else None)

    def _called(self, x_t: Tensor, index: Tensor, conditions: dict[str, Any]) -> Any:
        """The network's answer; what it says against its conditions, with their names and values."""
        classes = getattr(self.network, "config", {}).get("num_class_embeds")
        try:
            return self.network(x_t, self.levels.told(index), **conditions)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            # memory is no one's argument, and without conditions most errors are the network's own affair
            mine = conditions or classes or isinstance(error, TypeError)
            if isinstance(error, NoisewiseError | torch.OutOfMemoryError) or not mine:
                raise
            said = ", ".join(f"{name}={_said(value)}" for name, value in conditions.items())
            refused = f"cannot take {said}" if conditions else "cannot go without conditions"
            advice = f" (its {classes} classes count from 0)" if classes else ""
            raise InvalidInput(
                f"{type(self.network).__name__} {refused} for {len(x_t)} rows of x_t{advice}: {error}"
            ) from error


def _said(value: Any) -> str:
    """A condition in few words."""
    if isinstance(value, Tensor) and value.numel() > 8:
        return (
            f"a tensor {tuple(value.shape)} of {value.dtype} from {float(value.min()):.4g} to {float(value.max()):.4g}"
        )
    return str(value.tolist()) if isinstance(value, Tensor) else repr(value)


def _plain(value: Any) -> Any:
    # a graph cannot keep tensors of inference mode
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


def as_diffusion_model(model: Any, noise_schedule: Any, site: str | None = None) -> DiffusionModel:
    """`model` as a `DiffusionModel`. Raises `InvalidInput` for what is no module, and where the schedule is missing."""
    if isinstance(model, DiffusionModel):
        return DiffusionModel(model.network, model.levels, site or model.site)
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"model must be a torch.nn.Module model(x_t, t), got {type(model).__name__}")
    if noise_schedule is None:
        raise InvalidInput(
            "which noise the network was trained on is not known: noise_schedule=pipeline.scheduler, or NoiseLevels(a, s)"
        )
    return DiffusionModel(model, NoiseLevels.from_scheduler(noise_schedule), site)


def declares_variance(network: nn.Module, x_t: Tensor) -> bool:
    """Whether the network's own configuration says that it gives as many channels of variance beside its prediction."""
    config = getattr(network, "config", {})
    return x_t.ndim > 1 and config.get("in_channels") == x_t.shape[1] and config.get("out_channels") == 2 * x_t.shape[1]


def first_channels(output: Tensor, x_t: Tensor, learned_variance: bool) -> Tensor:
    """`output` in the shape of x_t: of 2C channels the first C where the configuration says that the rest is a variance."""
    if output.shape == x_t.shape:
        return output
    doubled = output.ndim == x_t.ndim > 1 and output.shape == (len(x_t), 2 * x_t.shape[1], *x_t.shape[2:])
    if doubled and learned_variance:
        return output[:, : x_t.shape[1]]
    advice = (
        "; if the second half of the channels is a learned variance, say so: variance_type='learned_range' in the scheduler's "
        "configuration"
        if doubled
        else ""
    )
    raise InvalidInput(f"the network must give the shape of x_t, {tuple(x_t.shape)}, got {tuple(output.shape)}{advice}")


@contextmanager
def watch(network: nn.Module, site: str | None) -> Iterator[list[Tensor]]:
    """The inputs of the module `site`, detached, in the order of its calls, while the block lasts."""
    seen: list[Tensor] = []
    if site is None:
        yield seen
        return
    hook = module_at(network, site).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
    try:
        yield seen
    finally:
        hook.remove()


def module_at(network: nn.Module, site: str) -> nn.Module:
    """The module of that name. Raises `InvalidInput` that shows some names."""
    try:
        return network.get_submodule(site)
    except AttributeError as error:
        names = ", ".join([name for name, _ in network.named_children()][-6:])
        raise InvalidInput(f"{type(network).__name__} has no module {site!r}; the last of its own: {names}") from error


def tensor_of(output: Any) -> Tensor:
    """The tensor in what diffusers networks return: an object with `sample`, a tuple, or the tensor itself."""
    if isinstance(output, Tensor):
        return output
    found = getattr(output, "sample", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return output[0]
    raise InvalidInput(f"the network must give a tensor or an object with `sample`, got {type(output).__name__}")
