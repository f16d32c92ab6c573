"""Losses of score-based fitting: denoising and Hyvärinen score matching, and the mixture Fisher divergence.

Sources: Vincent, Neural Computation 23(7), 2011 (denoising); Hyvärinen, JMLR 6, 2005; Song et al., UAI 2019 (sliced);
Zhang et al., 2022, arXiv 2209.07396 (mixture).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.energy.network import score_of
from noisewise.energy.reference import Reference, as_reference
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption

__all__ = [
    "MAX_EXACT_DIM",
    "as_energy",
    "bridge_score_matching",
    "check_beta",
    "check_trace",
    "dsm_loss",
    "mixture_fisher_loss",
    "mixture_log_prob",
    "reference_rows",
    "score_matching_loss",
    "score_matching_terms",
]

# the exact trace costs one more backward pass per coordinate
MAX_EXACT_DIM = 64
_TRACES = ("exact", "sliced")


def dsm_loss(
    energy: Any, x: Float[Tensor, "batch *event"], corruption: Corruption, generator: torch.Generator
) -> Float[Tensor, ""]:
    """Denoising score matching in denoiser form: the mean of |x - E[x | x_t]|^2, with (x_t + s^2 score) / a as that mean.

    It is s^4 / a^2 times the usual loss, hence of one scale for every noise level. `energy`: an `EnergyNet`, or a callable
    [batch, *event] -> [batch]; it becomes the energy of the noisy density. Source: arXiv 2305.11650, section 2.
    """
    eps = torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)
    x_t = corruption.a * x + corruption.s * eps
    mean = (x_t + corruption.s**2 * score_of(as_energy(energy), x_t)) / corruption.a
    return (x - mean).square().flatten(1).sum(1).mean()


def score_matching_loss(
    log_density_or_energy: Any,
    x: Float[Tensor, "batch dim"],
    trace: str = "exact",
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """Hyvärinen's loss, the mean of |s|^2 / 2 + tr ds/dx: the Fisher divergence to the law of x but for a constant.

    `log_density_or_energy`: an object with `energy` (or, without it, with `log_prob`), or a plain callable, which is an
    ENERGY f, [batch, dim] -> [batch], of the density exp(-f). `trace`: "exact" (dim backward passes, at most 64
    coordinates) or "sliced" (one random sign vector per row, which needs `generator`).
    Raises `InvalidInput` for another trace, too many coordinates, or a missing generator.
    """
    return score_matching_terms(as_energy(log_density_or_energy), x, trace, generator).mean()


def score_matching_terms(
    energy: Callable[[Tensor], Tensor], x: Float[Tensor, "batch dim"], trace: str, generator: torch.Generator | None
) -> Float[Tensor, " batch"]:
    """|s|^2 / 2 + tr ds/dx of each row, whose mean is `score_matching_loss`; arguments as there, `energy` being one."""
    check_trace(trace, x.shape[1])
    leaf = x if x.requires_grad else x.detach().requires_grad_(True)
    with torch.enable_grad():
        score = score_of(energy, leaf)
        square = score.square().sum(1) / 2
        if trace == "sliced":
            if generator is None:
                raise InvalidInput('trace="sliced" draws random directions: give a generator')
            # signs have the least variance of all directions with unit covariance
            signs = torch.randint(0, 2, x.shape, device=x.device, generator=generator).to(x) * 2 - 1
            return square + (_derivative((score * signs).sum(), leaf) * signs).sum(1)
        return square + sum(_derivative(score[:, i].sum(), leaf)[:, i] for i in range(x.shape[1]))


def mixture_fisher_loss(
    log_density: Any,
    x: Float[Tensor, "batch dim"],
    reference: Reference | Any,
    beta: float | int,
    generator: torch.Generator,
    trace: str = "exact",
) -> Float[Tensor, ""]:
    """Mixture Fisher divergence of the law of x to a NORMALISED density, but for a constant in that density.

    Both are mixed with `reference` m, in the proportions beta and 1 - beta. `log_density`: an object with `log_prob`, or a
    callable [batch, dim] -> [batch] that gives normalised log densities; an unnormalised one would be fitted to nonsense,
    for it use `MixtureScoreMatching`. The rows and fresh draws of m are two strata with exact weights beta and 1 - beta.
    `trace`: as in `score_matching_loss`. Source: arXiv 2209.07396, equation of the MFD, in Hyvärinen's form.
    """
    m = as_reference(reference)
    log_q = log_density.log_prob if hasattr(log_density, "log_prob") else log_density

    def energy(point: Tensor) -> Tensor:
        return -mixture_log_prob(log_q(point), m.log_prob(point), beta)

    drawn = reference_rows(m, x, beta, generator)
    terms = score_matching_terms(energy, torch.cat([x, drawn]), trace, generator)
    return check_beta(beta) * terms[: len(x)].mean() + (1 - beta) * terms[len(x) :].mean()


def bridge_score_matching(
    reference: Reference, beta: float | int, trace: str
) -> Callable[[Any, Tensor, torch.Generator], Tensor]:
    """The loss of the bridge's own energy: score matching on data rows and fresh reference draws, weighted exactly.

    For `fit_energy`; the energy needs no normaliser, and is that of beta p + (1 - beta) m.
    """
    share = check_beta(beta)

    def loss(energy: Any, x: Tensor, generator: torch.Generator) -> Tensor:
        drawn = reference_rows(reference, x, share, generator)
        terms = score_matching_terms(as_energy(energy), torch.cat([x, drawn]), trace, generator)
        return share * terms[: len(x)].mean() + (1 - share) * terms[len(x) :].mean()

    return loss


def mixture_log_prob(
    log_q: Float[Tensor, "*batch"], log_m: Float[Tensor, "*batch"], beta: float | int
) -> Float[Tensor, "*batch"]:
    """log(beta q + (1 - beta) m) of two log densities; beta in (0, 1)."""
    kept = torch.as_tensor([check_beta(beta), 1 - beta], dtype=torch.float64).log().tolist()
    return torch.logaddexp(kept[0] + log_q, kept[1] + log_m)


def reference_rows(
    reference: Reference, x: Float[Tensor, "batch dim"], beta: float | int, generator: torch.Generator
) -> Float[Tensor, "drawn dim"]:
    """As many draws of the reference as a bridge sample with these data rows has: batch (1 - beta) / beta, at least one."""
    number = max(1, round(len(x) * (1 - beta) / check_beta(beta)))
    return reference.sample(number, generator).to(x)


def check_beta(beta: object) -> float:
    """Return `beta`; raise `InvalidInput` outside (0, 1)."""
    if isinstance(beta, bool) or not isinstance(beta, int | float) or not 0 < beta < 1:
        raise InvalidInput(
            f"beta, the share of the data in the mixture, must lie in (0, 1), got {beta!r}; 0.8 to 0.95 works"
        )
    return float(beta)


def check_trace(trace: object, dim: int) -> None:
    """Raise `InvalidInput` for an unknown trace and for an exact one in too many coordinates."""
    if trace not in _TRACES:
        raise InvalidInput(f"trace must be one of {', '.join(_TRACES)}, got {trace!r}")
    if trace == "exact" and dim > MAX_EXACT_DIM:
        raise InvalidInput(
            f'trace="exact" needs one backward pass per coordinate and stops at {MAX_EXACT_DIM}, the data have {dim}; '
            'use trace="sliced"'
        )


def as_energy(obj: Any) -> Callable[[Tensor], Tensor]:
    """The energy of an object with `energy` or `log_prob`, or the callable itself."""
    if hasattr(obj, "energy"):
        return obj.energy
    if hasattr(obj, "log_prob"):
        return lambda x: -obj.log_prob(x)
    if not callable(obj):
        raise InvalidInput(f"an energy is an EnergyNet or a callable [batch, dim] -> [batch], got {type(obj).__name__}")
    return obj


def _derivative(value: Tensor, leaf: Tensor) -> Tensor:
    # a score that is linear in nothing but parameters has no graph to x
    if not value.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True)
    return torch.zeros_like(leaf) if gradient is None else gradient
