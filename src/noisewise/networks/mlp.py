"""A plain multi-layer perceptron with smooth activations and a seeded start, and the check that a module is smooth."""

import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.errors import InvalidInput
from noisewise.typing import check_count, check_positive

__all__ = ["ACTIVATIONS", "MLP", "check_smooth"]

# all infinitely differentiable
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
}

# activations whose second derivative is zero almost everywhere or jumps
_KINKED = (
    nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Threshold,
    nn.Hardshrink, nn.Softshrink, nn.ELU, nn.CELU, nn.SELU, nn.Softsign, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip


class MLP(nn.Module):
    """`depth` hidden layers of `hidden` units with one smooth activation, then a linear layer.

    `dim_in`, `dim_out`, `hidden`, `depth`: at least 1. `gain`: factor of the first layer's initial weights and biases, above 0;
    the larger, the finer the structure of x that the network begins with. `activation`: "silu", "softplus",
    "tanh" or "gelu"; "relu" and its kin are refused, because an energy needs two derivatives. `seed`: weights and biases are
    drawn from U(-1/sqrt(fan in), 1/sqrt(fan in)) by a generator of their own, on the CPU, whatever the global generator did.
    Raises `InvalidInput`.
    """

    def __init__(
        self,
        dim_in: int,
        dim_out: int,
        hidden: int = 128,
        depth: int = 3,
        activation: str = "silu",
        seed: int = 0,
        gain: float | int = 1.0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InvalidInput(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}; it must be twice differentiable, "
                "which relu, leaky_relu, elu and the like are not"
            )
        check_count("depth", depth)
        widths = [check_count("dim_in", dim_in), *[check_count("hidden", hidden)] * depth]
        layers: list[nn.Module] = []
        for wide_in, wide_out in itertools.pairwise(widths):
            layers += [_empty_linear(wide_in, wide_out), ACTIVATIONS[activation]()]
        self.gain = check_positive("gain", gain)
        self.layers = nn.Sequential(*layers, _empty_linear(widths[-1], check_count("dim_out", dim_out)))
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw all weights afresh, as a new network with this `seed` has them."""
        generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
        factor = self.gain
        for layer in self.layers:
            if isinstance(layer, nn.Linear):
                bound = factor / math.sqrt(layer.in_features)
                for parameter in (layer.weight, layer.bias):
                    parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))
                factor = 1.0

    def forward(self, x: Float[Tensor, "*batch dim_in"]) -> Float[Tensor, "*batch dim_out"]:
        """The outputs, of the dtype of the weights."""
        return self.layers(x)


def check_smooth(module: nn.Module) -> None:
    """Raise `InvalidInput` that names the first layer whose second derivative is missing or zero (ReLU and its kin).

    Only layers that are modules can be seen; a call of a function such as torch.relu inside `forward` cannot.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, _KINKED):
            raise InvalidInput(
                f"layer {name!r} is {type(layer).__name__}, which is not twice differentiable: training a score and taking a "
                f"Hessian need two derivatives; use {', '.join(ACTIVATIONS)}"
            )


def _empty_linear(wide_in: int, wide_out: int) -> nn.Linear:
    # the usual constructor draws from the global generator
    return nn.utils.skip_init(nn.Linear, wide_in, wide_out)
