"""The denoising posterior p(x | x_t) of a target, as a target of its own: what DiGS, DiKL and MM-Gibbs have in common."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from noisewise.errors import InvalidInput
from noisewise.noise import Corruption
from noisewise.targets.target import Target, as_target
from noisewise.targets.tilted import Tilt

__all__ = ["DenoisingPosterior", "denoising_tilt"]


def denoising_tilt(
    tilt: Tilt, noisy: Float[Tensor, "*rows dim"], spread: float | int | Float[Tensor, "*column"]
) -> Tilt:
    """The tilt of the denoising posterior of a tilted target: the product of the two Gaussian factors.

    `noisy`: x_t / a, one or one per row; `spread`: the noise scale s / a in units of x, scalar, [dim] or [row, 1].
    """
    precision = spread**-2 if isinstance(spread, Tensor) else torch.as_tensor(spread**-2).to(noisy)
    if isinstance(tilt.precision, float) and tilt.precision == 0:
        return Tilt(tilt.power, precision, noisy)
    total = precision + tilt.precision
    return Tilt(tilt.power, total, (precision * noisy + tilt.precision * tilt.center) / total)


class DenoisingPosterior:
    """p(x | x_t), proportional to p(x) N(x_t; a x, s^2 I), unnormalised: every kernel of `sampling` works on it.

    `target`: p, or what `as_target` makes one of. `x_t`: [dim], one observation for any number of chains, or [chain, dim],
    one per chain. Then a batch of k x chain rows repeats x_t k times, row r belonging to chain r % chain, which is how
    ladders and multiple tries line up their replicas, and any other number of rows is refused.
    `TemperedSMC`, whose particles change chains, wants one observation.
    Raises `InvalidInput` for an x_t of another shape or that is not finite.
    Source: Chen et al., ICML 2024, arXiv 2402.03008, equation 4.
    """

    def __init__(
        self, target: Target | Any, x_t: Float[Tensor, " dim"] | Float[Tensor, "chain dim"], corruption: Corruption
    ) -> None:
        self.target = as_target(target)
        self.dim = self.target.dim
        self.corruption = corruption
        if x_t.shape[-1] != self.dim or 0 in x_t.shape:
            raise InvalidInput(
                f"x_t must be [{self.dim}] or [chain, {self.dim}] for a target of dim {self.dim}, got {tuple(x_t.shape)}"
            )
        bad = (~torch.isfinite(x_t.reshape(-1, self.dim))).any(-1).nonzero().flatten()
        if len(bad):
            row = int(bad[0])
            raise InvalidInput(f"x_t must be finite, got {x_t.reshape(-1, self.dim)[row].tolist()} in row {row}")
        self.x_t = x_t.detach()
        self.names = getattr(self.target, "names", None)

    @property
    def chains(self) -> int | None:
        """How many chains have an observation of their own; None when all share one."""
        return len(self.x_t) if self.x_t.ndim == 2 else getattr(self.target, "chains", None)

    def at_rows(self, rows: Int[Tensor, " row"]) -> "DenoisingPosterior":
        """The posterior of these chains alone, one row each."""
        inner: Any = self.target
        if getattr(inner, "chains", None) is not None:
            inner = inner.at_rows(rows)
        x_t = self.x_t[rows.to(self.x_t.device)] if self.x_t.ndim == 2 else self.x_t
        return DenoisingPosterior(inner, x_t, self.corruption)

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """Unnormalised log density."""
        rows = x.reshape(-1, self.dim)
        return self._tilt(rows)(rows, self.target.log_prob(rows), torch.zeros_like(rows))[0].reshape(x.shape[:-1])

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """Log density and score; one call of the target."""
        rows = x.reshape(-1, self.dim)
        value, score = self._tilt(rows)(rows, *self.target.log_prob_and_score(rows))
        return value.reshape(x.shape[:-1]), score.reshape(x.shape)

    def _tilt(self, rows: Tensor) -> Tilt:
        noisy = self.x_t.to(rows)
        if noisy.ndim == 2:
            times, rest = divmod(len(rows), len(noisy))
            if rest:
                raise InvalidInput(
                    f"{len(rows)} rows cannot belong to {len(noisy)} chains with an x_t each: give a multiple of "
                    f"{len(noisy)} rows, or take some chains with at_rows"
                )
            noisy = noisy.repeat(times, 1)
        return denoising_tilt(Tilt(), noisy / self.corruption.a, self.corruption.r)
