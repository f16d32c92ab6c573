"""Two isolated banana-shaped modes with known weights: the curved sibling of `two_modes`."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.targets.gaussian_mixture import GaussianMixture, two_modes
from noisewise.typing import check_count

__all__ = ["TwoBananas", "two_bananas"]


class TwoBananas:
    """Two Gaussian modes, each bent about its centre by u_2 -> u_2 + bend (u_1^2 - 1), u standard coordinates.

    The bend preserves volume and leaves each mode's mean where it was, so weights, log normaliser (0) and draws are
    exact. Made by `two_bananas`.
    """

    log_normalizer = 0.0

    def __init__(self, straight: GaussianMixture, bend: float) -> None:
        self.dim = straight.dim
        self.bend = bend
        self._straight = straight

    @property
    def mode_means(self) -> Float[Tensor, "modes dim"]:
        """Means of the two modes."""
        return self._straight.means

    @property
    def weights(self) -> Float[Tensor, " modes"]:
        """Weights of the two modes."""
        return self._straight.weights

    def _standard(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unbent standard coordinates [mode, dim, n], scales, and log joint [mode, n]."""
        if x.shape[-1] != self.dim:
            raise InvalidInput(
                f"x has {x.shape[-1]} coordinates (shape {tuple(x.shape)}), the target has dim {self.dim}"
            )
        centers, scale, weights = (
            tensor.to(x) for tensor in (self._straight.means, self._straight.covariances.sqrt(), self._straight.weights)
        )
        scale = scale.reshape(-1, 1, 1)
        standard = (x.reshape(-1, self.dim).T - centers.unsqueeze(-1)) / scale
        first, second = standard[:, 0], standard[:, 1]
        unbent = torch.cat([first.unsqueeze(1), (second - self.bend * (first**2 - 1)).unsqueeze(1), standard[:, 2:]], 1)
        log_peak = weights.log() - self.dim * (scale.flatten().log() + math.log(2 * math.pi) / 2)
        return unbent, scale, log_peak.unsqueeze(-1) - unbent.square().sum(1) / 2

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Normalised log density."""
        return self._standard(x)[2].logsumexp(0).reshape(x.shape[:-1])

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score, in closed form."""
        unbent, scale, log_joint = self._standard(x)
        # chain rule through the bend: the first coordinate also moves the second
        slope = torch.cat([(unbent[:, 0] - 2 * self.bend * unbent[:, 0] * unbent[:, 1]).unsqueeze(1), unbent[:, 1:]], 1)
        share = log_joint.softmax(0).unsqueeze(1)
        score = -(share * slope / scale).sum(0)
        return log_joint.logsumexp(0).reshape(x.shape[:-1]), score.T.reshape(x.shape)

    def component(self, x: Float[Tensor, "*batch dim"]) -> Int[Tensor, "*batch"]:
        """Index (0 or 1) of the more probable mode of each point."""
        return self._standard(x)[2].argmax(0).reshape(x.shape[:-1])

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n dim"]:
        """Exact independent draws."""
        straight = self._straight
        n = check_count("n", n, minimum=0)
        source = straight.means.device if generator is None else generator.device
        label = (
            torch.rand(n, dtype=torch.float64, device=source, generator=generator) >= straight.weights[0].item()
        ).long()
        u = torch.randn(n, self.dim, dtype=straight.means.dtype, device=source, generator=generator)
        bent = torch.cat([u[:, :1], u[:, 1:2] + self.bend * (u[:, :1] ** 2 - 1), u[:, 2:]], 1).to(straight.means.device)
        label = label.to(straight.means.device)
        return straight.means[label] + straight.covariances.sqrt()[label].unsqueeze(-1) * bent


def two_bananas(
    dim: int,
    weights: Sequence[float] = (0.3, 0.7),
    separation: float = 10.0,
    scales: Sequence[float] = (1.0, 1.0),
    bend: float = 0.5,
    dtype: torch.dtype = torch.float32,
) -> TwoBananas:
    """Two banana-shaped modes, centres `separation` apart along the diagonal and symmetric about 0.

    `dim` at least 2; `weights`: two, positive, sum 1; `scales`: width of each mode, above 0; `bend`: curvature in
    standard units, any finite number, 0 gives `two_modes`. Raises `InvalidInput`.
    """
    dim = check_count("dim", dim, minimum=2)
    if not math.isfinite(bend):
        raise InvalidInput(f"bend must be finite, got {bend!r}")
    return TwoBananas(two_modes(dim, weights, separation, scales, dtype), float(bend))
