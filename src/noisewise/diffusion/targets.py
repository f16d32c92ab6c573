"""What a covariance head is trained to predict: draws whose mean, given x_t, is the relative variance r of x0.

Sources: Ou et al., ICLR 2025, arXiv 2406.10808 (OCM); Bao et al., ICML 2022, arXiv 2206.07309 (NPR and SN).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.denoising.lanczos import rademacher
from noisewise.diffusion.model import Prediction

__all__ = ["DataCovariance", "npr_target", "ocm_target", "probed_diagonal", "sn_target"]


def probed_diagonal(
    prediction: Prediction, probes: int, generator: torch.Generator
) -> tuple[Float[Tensor, "probe batch *event"], Float[Tensor, "probe batch *event"]]:
    """`probes` draws of v * (R^T v) with random signs v, each with mean diag R, and the signs."""
    signs = [rademacher(prediction.x_t.float(), generator) for _ in range(probes)]
    return torch.stack([v * prediction.product(v) for v in signs]), torch.stack(signs)


def ocm_target(
    prediction: Prediction, probes: int, generator: torch.Generator, control: "DataCovariance | None" = None
) -> Float[Tensor, "batch *event"]:
    """Hutchinson's estimate of diag R, the relative variance that the network's own derivative implies.

    Its variance at entry i is the sum of R_ij^2 over j != i, over the number of probes. `control`: subtract what the same
    signs would give for the data's covariance, which has mean 0: the mean is unchanged, whatever its coefficient.
    """
    found, signs = probed_diagonal(prediction, probes, generator)
    if control is not None:
        found = found - torch.stack([control.deviation(prediction, v) for v in signs])
    return found.mean(0)


def npr_target(prediction: Prediction, eps: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
    """(eps - eps_hat)^2, whose mean is r whatever the error of the mean: optimal for the variance around eps_hat."""
    return (eps - prediction.eps).square()


def sn_target(eps: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
    """eps^2; r is its mean minus eps_hat^2."""
    return eps.square()


class DataCovariance:
    """The control variate: v * (A v) - diag A with A = a^2 S (a^2 S + s^2)^-1, S the data's covariance in the DCT's basis.

    `spectrum` [*event]: variance of each DCT coefficient of the data. `coefficients` [T]: how much of it is subtracted at each
    level, fitted by `fit`; with 1 everywhere it would do harm at low noise.
    """

    def __init__(self, spectrum: Float[Tensor, "*event"], coefficients: Float[Tensor, " T"]) -> None:
        self.spectrum = spectrum
        self.coefficients = coefficients
        self._bases = [dct_basis(n, spectrum) for n in spectrum.shape]

    def deviation(self, prediction: Prediction, v: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Coefficient times (v * (A v) - diag A)."""
        shape = (-1,) + (1,) * (v.ndim - 1)
        c = self.coefficients[prediction.t.to(self.coefficients.device)].to(v).reshape(shape)
        return c * self.raw(prediction, v)

    def raw(self, prediction: Prediction, v: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """v * (A v) - diag A."""
        a_squared, s_squared = prediction.a.float().square(), prediction.s.float().square()
        gain = a_squared * self.spectrum / (a_squared * self.spectrum + s_squared)
        product = along_axes(gain * along_axes(v, self._bases), [basis.T for basis in self._bases])
        return v * product - along_axes(gain, [basis.T.square() for basis in self._bases])

    def fit_coefficient(self, prediction: Prediction, probes: int, generator: torch.Generator) -> float:
        """The coefficient that leaves the least variance at this prediction's level, by regression."""
        found, signs = probed_diagonal(prediction, probes, generator)
        control = torch.stack([self.raw(prediction, v) for v in signs])
        # r varies between states; its mean over the probes of one state is taken out where there are several
        centred = found - found.mean(0) if probes > 1 else found
        size = float(control.square().sum())
        return (
            float((centred * control).sum()) / size * (probes / (probes - 1) if probes > 1 else 1) if size > 0 else 0.0
        )


def dct_basis(n: int, like: Tensor) -> Float[Tensor, "n n"]:
    """The orthonormal DCT-II, coefficient by place."""
    k, i = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
    basis = torch.cos(torch.pi * (i + 0.5) * k / n) * (2 / n) ** 0.5
    basis[0] /= 2**0.5
    return basis.to(like)


def along_axes(x: Float[Tensor, "batch *event"], bases: list[Tensor]) -> Float[Tensor, "batch *event"]:
    """Each axis of the events times its matrix."""
    for axis, basis in enumerate(bases, 1):
        x = torch.movedim(torch.movedim(x, axis, -1) @ basis.T, -1, axis)
    return x
