"""The components of a Gaussian mixture on their fastest path: isotropic, diagonal and full covariances.

Points come as columns [dim, n] and differences x - mean are formed first, so that accuracy does not depend on where the
mixture lies; everything that follows reduces over leading axes, which runs at memory speed.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Components", "make_components"]


@dataclass(frozen=True)
class IsotropicComponents:
    """Components with covariances v_k I."""

    centers: Float[Tensor, "dim modes 1"]
    log_peak: Float[Tensor, "modes 1"]
    minus_precision: Float[Tensor, "modes 1"]
    minus_half_precision: Float[Tensor, "modes 1"]

    def log_joint(
        self, columns: Float[Tensor, "dim n"]
    ) -> tuple[Float[Tensor, "modes n"], Float[Tensor, "dim modes n"]]:
        """Log weight plus log density of each component, and the residual that `pull` needs."""
        difference = columns.unsqueeze(1) - self.centers
        return torch.addcmul(self.log_peak, difference.square().sum(0), self.minus_half_precision), difference

    def pull(self, residual: Float[Tensor, "dim modes n"], share: Float[Tensor, "modes n"]) -> Float[Tensor, "dim n"]:
        """Sum of the components' scores weighted by `share`."""
        return (residual * (share * self.minus_precision)).sum(1)


@dataclass(frozen=True)
class DiagonalComponents:
    """Components with diagonal covariances."""

    centers: Float[Tensor, "dim modes 1"]
    log_peak: Float[Tensor, "modes 1"]
    minus_precision: Float[Tensor, "dim modes 1"]

    def log_joint(
        self, columns: Float[Tensor, "dim n"]
    ) -> tuple[Float[Tensor, "modes n"], Float[Tensor, "dim modes n"]]:
        """Log weight plus log density of each component, and the residual that `pull` needs."""
        difference = columns.unsqueeze(1) - self.centers
        residual = difference * self.minus_precision
        return torch.add(self.log_peak, (difference * residual).sum(0), alpha=0.5), residual

    def pull(self, residual: Float[Tensor, "dim modes n"], share: Float[Tensor, "modes n"]) -> Float[Tensor, "dim n"]:
        """Sum of the components' scores weighted by `share`."""
        return (residual * share).sum(1)


@dataclass(frozen=True)
class FullComponents:
    """Components with full covariances, through the whitening W with W^T W = S^-1.

    `spread`: minus the transposed whitenings side by side, so that the weighted sum of scores is one matrix product.
    """

    centers: Float[Tensor, "modes dim 1"]
    log_peak: Float[Tensor, "modes 1"]
    whitening: Float[Tensor, "modes dim dim"]
    spread: Float[Tensor, "dim modes*dim"]

    def log_joint(
        self, columns: Float[Tensor, "dim n"]
    ) -> tuple[Float[Tensor, "modes n"], Float[Tensor, "modes dim n"]]:
        """Log weight plus log density of each component, and the residual that `pull` needs."""
        residual = torch.bmm(self.whitening, columns - self.centers)
        return torch.add(self.log_peak, residual.square().sum(1), alpha=-0.5), residual

    def pull(self, residual: Float[Tensor, "modes dim n"], share: Float[Tensor, "modes n"]) -> Float[Tensor, "dim n"]:
        """Sum of the components' scores weighted by `share`."""
        return self.spread @ (residual * share.unsqueeze(1)).flatten(0, 1)


Components = IsotropicComponents | DiagonalComponents | FullComponents


def make_components(
    means: Float[Tensor, "modes dim"],
    covariances: Float[Tensor, "modes *shape"],
    weights: Float[Tensor, " modes"],
    dtype: torch.dtype,
    device: torch.device,
) -> Components:
    """Constants of the density in `dtype` on `device`, computed in float64; the form follows the covariances' shape."""
    center, covariance, weight = (tensor.to("cpu", torch.float64) for tensor in (means, covariances, weights))
    dim = center.shape[1]
    log_weight = (weight / weight.sum()).log() - dim / 2 * math.log(2 * math.pi)

    def at(tensor: Tensor) -> Tensor:
        return tensor.to(device, dtype).contiguous()

    if covariance.ndim == 1:
        log_peak = log_weight - dim / 2 * covariance.log()
        precision = 1 / covariance.unsqueeze(-1)
        return IsotropicComponents(
            at(center.T.unsqueeze(-1)), at(log_peak.unsqueeze(-1)), at(-precision), at(-precision / 2)
        )
    if covariance.ndim == 2:
        log_peak = log_weight - covariance.log().sum(-1) / 2
        return DiagonalComponents(
            at(center.T.unsqueeze(-1)), at(log_peak.unsqueeze(-1)), at(-1 / covariance.T.unsqueeze(-1))
        )
    factor = torch.linalg.cholesky(covariance)
    log_peak = log_weight - factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    eye = torch.eye(dim, dtype=torch.float64).expand_as(factor)
    whitening = torch.linalg.solve_triangular(factor, eye, upper=False)
    return FullComponents(
        at(center.unsqueeze(-1)),
        at(log_peak.unsqueeze(-1)),
        at(whitening),
        at(-whitening.flatten(0, 1).T),
    )
