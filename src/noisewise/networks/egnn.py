"""An equivariant graph network for particles (Satorras et al., ICML 2021): it turns, mirrors and relabels as its input does."""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.errors import InvalidInput
from noisewise.typing import check_count, check_positive

__all__ = ["EGNN"]

# pairs of sine and cosine of the condition, periods 2 pi / frequency; a log sigma spans about ten
_FREQUENCIES = tuple(2.0**k for k in (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5))


class EGNN(nn.Module):
    """Displacements of `particles` in `space` dimensions: equivariant to rotation, reflection and permutation, blind to
    translation, with mean 0 over particles. All pairs exchange messages; every activation is SiLU.

    `hidden` units per node and message; `layers` of messages. `time`: the network takes a condition, one number per row
    (log sigma). `features`: numbers per particle that it takes besides. `attention`: messages are gated. `reach`: bound, in
    units of the input, on what one neighbour moves a particle over all layers. `gain` of the last coordinate weights: with
    the published 0.001 the output starts at almost 0, so that a generator places all particles on one point; 1 spreads
    them. `seed`: weights are drawn by a generator of their own, U(-1/sqrt(fan in), 1/sqrt(fan in)) but for those
    coordinate weights. Raises `InvalidInput`.
    Source: Satorras, Hoogeboom & Welling, ICML 2021; the form of Akhound-Sadegh et al., ICML 2024.
    """

    others: Tensor
    frequencies: Tensor

    def __init__(
        self,
        particles: int,
        space: int,
        hidden: int = 64,
        layers: int = 4,
        time: bool = False,
        attention: bool = True,
        reach: float | int = 15.0,
        gain: float | int = 0.001,
        features: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.particles = check_count("particles", particles, 2)
        self.space = check_count("space", space)
        self.features = check_count("features", features, 0)
        self.time = bool(time)
        check_count("hidden", hidden)
        reach = check_positive("reach", reach) / check_count("layers", layers)
        self._gain = check_positive("gain", gain)
        known = 1 + self.features + (1 + 2 * len(_FREQUENCIES) if time else 0)
        self.embedding = _linear(known, hidden)
        self.layers = nn.ModuleList(_Layer(hidden, attention, reach) for _ in range(layers))
        self.register_buffer("others", 1 - torch.eye(particles), persistent=False)
        self.register_buffer("frequencies", torch.tensor(_FREQUENCIES), persistent=False)
        self.reset(seed)

    @torch.no_grad()
    def reset(self, seed: int) -> None:
        """Draw all weights afresh, as a new network with this `seed` has them."""
        generator = torch.Generator().manual_seed(check_count("seed", seed, 0))
        bounds = {self.embedding: 1 / math.sqrt(self.embedding.in_features)}
        for layer in self.layers:
            bounds |= layer.bounds(self._gain)  # type: ignore[operator]
        for linear, bound in bounds.items():
            for parameter in linear.parameters():
                parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))

    def forward(
        self,
        x: Float[Tensor, "batch dim"],
        condition: Float[Tensor, " batch"] | None = None,
        features: Float[Tensor, "batch particles k"] | None = None,
    ) -> Float[Tensor, "batch dim"]:
        """Displacements at positions `x`, ordered (x0, y0, x1, ...) with dim = particles * space.

        Raises `InvalidInput` for a condition or features that are missing, unexpected or of another shape.
        """
        start = self._positions(x)
        position, node = start, self.embedding(self._known(start, condition, features))
        edge = _pairs(position)[1]
        for layer in self.layers:
            position, node = layer(position, node, edge, self.others)
        moved = position - start
        return (moved - moved.mean(1, keepdim=True)).reshape(x.shape)

    def _positions(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.particles * self.space:
            raise InvalidInput(
                f"x has {x.shape[-1]} coordinates, but {self.particles} particles in {self.space} dimensions have "
                f"{self.particles * self.space}"
            )
        return x.reshape(len(x), self.particles, self.space)

    def _known(self, start: Tensor, condition: Tensor | None, features: Tensor | None) -> Tensor:
        """What each node knows of itself: a constant, the embedded condition, its features."""
        shape = start.shape[:2]
        if (condition is not None) != self.time:
            raise InvalidInput(f"the network has time={self.time}, but condition is {condition!r}")
        if (0 if features is None else features.shape[-1]) != self.features:
            got = None if features is None else tuple(features.shape)
            raise InvalidInput(f"the network takes {self.features} features per particle, got {got}")
        parts = [start.new_ones((*shape, 1))]
        if condition is not None:
            column = condition.unsqueeze(-1)
            angle = column * self.frequencies
            embedded = torch.cat([column, angle.sin(), angle.cos()], -1)
            parts.append(embedded.unsqueeze(1).expand(*shape, -1))
        if features is not None:
            parts.append(features)
        return torch.cat(parts, -1)


class _Layer(nn.Module):
    """Messages over all pairs, then the move of coordinates and of node features."""

    def __init__(self, hidden: int, attention: bool, reach: float) -> None:
        super().__init__()
        self._reach = reach
        # the linear layer on (h_i, h_j, distances) in three parts: the first two are per node, not per pair
        self.receiver, self.sender = _linear(hidden, hidden), _linear(hidden, hidden, bias=False)
        self.distance = _linear(2, hidden, bias=False)
        self.message = _linear(hidden, hidden)
        self.gate = _linear(hidden, 1) if attention else None
        self.force, self.strength = _linear(hidden, hidden), _linear(hidden, 1, bias=False)
        self.own, self.heard, self.update = (
            _linear(hidden, hidden),
            _linear(hidden, hidden, bias=False),
            _linear(hidden, hidden),
        )
        self.activation = nn.SiLU()

    def bounds(self, gain: float) -> dict[nn.Module, float]:
        """The range of each part's weights; split layers as the whole layer would have it."""
        hidden = self.message.in_features
        pair, node, plain = 1 / math.sqrt(2 * hidden + 2), 1 / math.sqrt(2 * hidden), 1 / math.sqrt(hidden)
        bounds: dict[nn.Module, float] = dict.fromkeys((self.receiver, self.sender, self.distance), pair)
        bounds |= dict.fromkeys((self.own, self.heard), node)
        bounds |= dict.fromkeys((self.message, self.force, self.update), plain)
        if self.gate is not None:
            bounds[self.gate] = plain
        # xavier: gain * sqrt(6 / (fan in + fan out))
        bounds[self.strength] = gain * math.sqrt(6 / (hidden + 1))
        return bounds

    def forward(self, position: Tensor, node: Tensor, edge: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
        difference, square = _pairs(position)
        lengths = self.distance(torch.stack([square, edge], -1))
        first = self.activation(self.receiver(node).unsqueeze(2) + self.sender(node).unsqueeze(1) + lengths)
        message = self.activation(self.message(first))
        if self.gate is not None:
            message = message * self.gate(message).sigmoid()
        strength = self._reach * self.strength(self.activation(self.force(message))).squeeze(-1).tanh()
        # the floor keeps the root's gradient finite where particles coincide
        pull = strength / ((square + _COINCIDENT).sqrt() + 1)
        moved = position + torch.einsum("bij,bijs->bis", pull, difference)
        heard = torch.einsum("ij,bijh->bih", others, message)
        return moved, node + self.update(self.activation(self.own(node) + self.heard(heard)))


_COINCIDENT = 1e-8


def _pairs(position: Tensor) -> tuple[Tensor, Tensor]:
    """x_i - x_j and its squared length for all pairs."""
    difference = position.unsqueeze(2) - position.unsqueeze(1)
    return difference, difference.square().sum(-1)


def _linear(wide_in: int, wide_out: int, bias: bool = True) -> nn.Linear:
    # the usual constructor draws from the global generator
    return nn.utils.skip_init(nn.Linear, wide_in, wide_out, bias=bias)
