"""Generators x = g(z): a network from latent draws to draws of the target, on the standardised scale.

Source: He et al., AISTATS 2025, arXiv 2410.12456 (Gaussian latent, MLP and EGNN); the mixture latent is ours.
"""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.errors import InvalidInput
from noisewise.networks.egnn import EGNN
from noisewise.networks.mlp import MLP
from noisewise.typing import check_count

__all__ = ["LATENTS", "EGNNGenerator", "MLPGenerator", "OwnGenerator"]

LATENTS = ("gaussian", "mixture", "auto")
# numbers that stand for a category
_EMBEDDED = 16
# coordinates of z that go well with them
_PLANE = 2


class MLPGenerator(nn.Module):
    """An MLP of z ~ N(0, I) in `dim` coordinates; with `categories`, of z and the learned vector of a uniform category.

    With `skip`, z is added to the output: the draws begin spread over all of the target instead of near one point, which
    keeps the modes where they are wide; where they are narrow, z is noise that the network would have to take out again.

    A continuous map has to lead some of its mass from mode to mode; categories need not. Their masses are equal, so mode
    weights come in steps of about 1 / categories, finer where z splits one.
    """

    share: Tensor

    def __init__(
        self, dim: int, hidden: int, depth: int, categories: int = 0, skip: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.dim, self.categories = check_count("dim", dim), check_count("categories", categories, 0)
        self.net = MLP(dim + (_EMBEDDED if categories else 0), dim, hidden, depth, seed=seed)
        if categories:
            generator = torch.Generator().manual_seed(seed + 1)
            self.embedding = nn.Parameter(torch.randn(categories, _EMBEDDED, generator=generator))
            # z has the same share of the input in every dimension: with more of it the network spreads each category over the
            # modes, as a continuous map would; saved with the weights, which are of no use with another
            self.register_buffer("share", torch.tensor(1.0 if skip else math.sqrt(_PLANE / self.dim)))
        self.skip = skip

    def latent(self, n: int, generator: torch.Generator) -> Float[Tensor, "n latent"]:
        """`n` draws of z, with the category as a last number where there are any."""
        z = torch.randn(n, self.dim, generator=generator)
        if not self.categories:
            return z
        category = torch.randint(self.categories, (n, 1), generator=generator)
        return torch.cat([z, category.to(z)], 1)

    def forward(self, latent: Float[Tensor, "n latent"]) -> Float[Tensor, "n dim"]:
        """Positions of the latent draws."""
        z = latent[:, : self.dim]
        known = torch.cat([self.share * z, self.embedding[latent[:, -1].long()]], 1) if self.categories else z
        return self.net(known) + z if self.skip else self.net(known)


class EGNNGenerator(nn.Module):
    """An EGNN of z ~ N(0, I) without centre of mass: what turns or relabels z does so to the sample, which is mean-free.

    z is added to the displacements; `published`: they alone are the sample, which begins with all particles on one point.
    """

    def __init__(
        self, particles: int, space: int, hidden: int, layers: int, published: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.particles, self.space, self.dim, self.published = particles, space, particles * space, published
        self.net = EGNN(particles, space, hidden, layers, gain=1e-3 if published else 0.1, seed=seed)

    def latent(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """`n` draws of z."""
        z = torch.randn(n, self.particles, self.space, generator=generator)
        return (z - z.mean(1, keepdim=True)).flatten(1)

    def forward(self, latent: Float[Tensor, "n dim"]) -> Float[Tensor, "n dim"]:
        """Positions, mean-free."""
        return self.net(latent) if self.published else latent + self.net(latent)


class OwnGenerator(nn.Module):
    """A user's module [n, latent] -> [n, dim]. Its attribute `latent_dim` says how wide z ~ N(0, I) is; else it is `dim`.

    Raises `InvalidInput` when its output has another shape or no gradient.
    """

    def __init__(self, net: nn.Module, dim: int) -> None:
        super().__init__()
        self.net, self.dim = net, dim
        self.latent_dim = check_count("latent_dim", getattr(net, "latent_dim", dim))
        try:
            found: Any = net(torch.zeros(2, self.latent_dim))
        except RuntimeError as error:
            raise InvalidInput(
                f"the generator failed on z of shape [2, {self.latent_dim}]: {error}; z has as many coordinates as the target, "
                "or as the module's attribute latent_dim says"
            ) from error
        if not isinstance(found, Tensor) or found.shape != (2, dim):
            shown = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InvalidInput(f"the generator must map [n, {self.latent_dim}] to [n, {dim}], got {shown} for n = 2")
        if not found.requires_grad:
            raise InvalidInput("the generator's output carries no gradient: it has no parameters, or detaches")

    def latent(self, n: int, generator: torch.Generator) -> Float[Tensor, "n latent"]:
        """`n` draws of z."""
        return torch.randn(n, self.latent_dim, generator=generator)

    def forward(self, latent: Float[Tensor, "n latent"]) -> Float[Tensor, "n dim"]:
        """Positions of the latent draws."""
        return self.net(latent)
