"""`EnergyNet`: a network whose summed outputs are an energy, so that its score behaves like a residual network.

Source: Zhang et al., NeurIPS 2023, arXiv 2305.11650 (head "sum" and "autoencoder"); Gaussian base term as in our MFD notes.
"""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.networks.mlp import MLP, check_smooth
from noisewise.noise import Corruption
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.typing import check_count, check_positive

__all__ = ["EnergyNet", "check_curvature", "score_of"]

_HEADS = ("sum", "autoencoder")


class EnergyNet(nn.Module):
    """Energy f of a density proportional to exp(-f), from a network with as many outputs as inputs.

    `dim`: number of coordinates. `hidden`, `depth`, `activation`, `gain`: of the `MLP` (`activation` twice differentiable:
    "silu", "softplus", "tanh", "gelu"). `head`: "sum", the sum of the outputs, or "autoencoder", |x - net(x)|^2.
    `base_scale`: c of a Gaussian base term |x|^2 / (2 c^2) that makes exp(-f) integrable, in units of x; None leaves it out.
    `net`: a module of your own, [batch, *event] -> [batch, ...], in place of the MLP; its layers must be twice
    differentiable. `seed`: of the initial weights; the global generator is not touched.

    `corruption`: None, or the noise level at which denoising score matching trained it: the energy is then that of the
    noisy density. Raises `InvalidInput` for a ReLU-like activation and for settings out of range.
    """

    def __init__(
        self,
        dim: int,
        hidden: int = 128,
        depth: int = 3,
        activation: str = "silu",
        head: str = "sum",
        base_scale: float | int | None = None,
        net: nn.Module | None = None,
        seed: int = 0,
        gain: float | int = 1.0,
    ) -> None:
        super().__init__()
        self.dim = check_count("dim", dim)
        if head not in _HEADS:
            raise InvalidInput(f"head must be one of {', '.join(_HEADS)}, got {head!r}")
        if base_scale is not None:
            check_positive("base_scale", base_scale)
        if net is not None and not isinstance(net, nn.Module):
            raise InvalidInput(f"net must be a torch.nn.Module, got {type(net).__name__}")
        self._own = net is None
        self._settings = {"dim": self.dim, "hidden": hidden, "depth": depth, "activation": activation, "seed": seed}
        self._settings["gain"] = gain
        self.head, self.base_scale = head, base_scale
        self.net = MLP(dim, dim, hidden, depth, activation, seed, gain) if net is None else net
        check_smooth(self.net)
        self.corruption: Corruption | None = None

    def forward(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Energies, in the dtype of the weights. Raises `InvalidInput` for points of another width than `dim`."""
        if self._own and x.shape[-1] != self.dim:
            raise InvalidInput(
                f"this EnergyNet has dim {self.dim}, got points of shape {tuple(x.shape)}: EnergyNet({x.shape[-1]}) takes these"
            )
        out = self.net(x)
        if not isinstance(out, Tensor) or len(out) != len(x) or (self.head == "autoencoder" and out.shape != x.shape):
            found = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InvalidInput(f"net must map {tuple(x.shape)} to the same shape, got {found}")
        value = out.flatten(1).sum(1) if self.head == "sum" else (x - out).square().flatten(1).sum(1)
        if self.base_scale is not None:
            value = value + x.square().flatten(1).sum(1) / (2 * self.base_scale**2)
        return value

    def energy(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Energies: the same as calling the network."""
        return self(x)

    def log_prob(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, " batch"]:
        """Minus the energy: the log density without its normaliser."""
        return -self(x)

    def score(self, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """-df/dx. In grad mode it is recorded (parameters and x); under `torch.no_grad()` it is a plain tensor."""
        return score_of(self, x)

    def reset(self, seed: int) -> None:
        """Draw the weights afresh, as a new network with this `seed` has them. Raises `InvalidInput` for your own `net`."""
        if not isinstance(self.net, MLP):
            raise InvalidInput(f"only the built-in MLP can be drawn afresh; build a new {type(self.net).__name__}")
        self.net.reset(seed)
        self._settings["seed"] = seed

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors`."""
        return write_pretrained(folder, "EnergyNet", self.to_config(), self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path, net: nn.Module | None = None) -> "EnergyNet":
        """Read what `save_pretrained` wrote, onto the CPU. `net`: needed where the saved energy had a module of its own.

        Raises `RunFolderError` for another class, schema or shape of weights.
        """
        return cls.from_config(*read_pretrained(folder, "EnergyNet"), net=net)

    def to_config(self) -> dict[str, Any]:
        """Everything but the weights, as JSON values."""
        dtype = next((str(p.dtype).removeprefix("torch.") for p in self.parameters()), "float32")
        noise = None if self.corruption is None else {"a": self.corruption.a, "s": self.corruption.s}
        config = {"head": self.head, "base_scale": self.base_scale, "dtype": dtype, "corruption": noise}
        return {**self._settings, **config, "net": None if self._own else type(self.net).__name__}

    @classmethod
    def from_config(
        cls, config: dict[str, Any], tensors: dict[str, Tensor], net: nn.Module | None = None
    ) -> "EnergyNet":
        """The energy that `to_config` and the state dict describe."""
        values = dict(config)
        own, dtype, noise = values.pop("net"), values.pop("dtype"), values.pop("corruption")
        if (own is None) != (net is None):
            what = "the built-in MLP: leave net out" if own is None else f"a {own} of your own: give it as net="
            raise RunFolderError(f"this energy was saved with {what}")
        try:
            made = cls(**values, net=net).to(getattr(torch, dtype))
            made.load_state_dict(tensors)
        except (TypeError, RuntimeError, AttributeError) as error:
            raise RunFolderError(f"the saved EnergyNet does not fit this version: {error}") from error
        made.corruption = None if noise is None else Corruption(noise["a"], noise["s"])
        return made


def score_of(energy: Any, x: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
    """-df/dx of a callable `energy` by one backward pass, recorded exactly when grad mode is on.

    Raises `InvalidInput` when the energies have another shape than [batch] or carry no gradient.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        leaf = x if recorded and x.requires_grad else x.detach().requires_grad_(True)
        value = energy(leaf)
        if not isinstance(value, Tensor) or value.shape != (len(x),):
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InvalidInput(f"an energy must map {tuple(x.shape)} to ({len(x)},), got {found}")
        if not value.requires_grad:
            raise InvalidInput("the energy carries no gradient: it must be torch operations on x, without detach()")
        (gradient,) = torch.autograd.grad(value.sum(), leaf, create_graph=recorded)
    return -gradient


def check_curvature(energy: Any, x: Float[Tensor, "batch *event"]) -> None:
    """Raise `InvalidInput` where the Hessian of `energy` is exactly zero at every row of `x`, as that of a ReLU network is."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_(True)
        score = score_of(energy, leaf)
        # irregular directions, so that no symmetric Hessian cancels
        direction = torch.linspace(1, math.e, score.numel(), dtype=x.dtype, device=x.device).reshape(score.shape)
        hessian = None
        if score.requires_grad:
            (hessian,) = torch.autograd.grad((score * direction).sum(), leaf, allow_unused=True)
    if hessian is None or not hessian.any():
        raise InvalidInput(
            "the energy has second derivatives that are exactly zero: an activation is not twice differentiable "
            "(relu and the like); use silu, softplus, tanh or gelu"
        )
