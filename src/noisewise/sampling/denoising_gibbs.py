"""Pseudo-Gibbs sampling of the clean density that a noisy model implies, its denoiser a Gaussian with the right moments.

Source: Zhang, Hawkins-Hooker, Paige & Barber, NeurIPS 2023, arXiv 2305.11650.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.denoising.covariance import DiagonalCovariance, FullCovariance
from noisewise.denoising.models import Energy, as_model, check_corruption
from noisewise.denoising.moments import COVARIANCES, GaussianPosterior, NonFiniteRows, gaussian_posterior
from noisewise.errors import InvalidInput
from noisewise.noise import Corruption
from noisewise.sampling.kernel import Phase, as_setting, given_settings, plain_settings
from noisewise.typing import check_count

__all__ = ["DenoisingGibbs", "GibbsInfo", "GibbsState"]

# those whose density is known exactly, as a Metropolis correction needs it
_CORRECTABLE = ("full", "diagonal", "isotropic", "none")


class GibbsState(NamedTuple):
    """The draw of each chain, and the clean point from which the chain goes on (the same, unless draws are means)."""

    position: Float[Tensor, "chain dim"]
    clean: Float[Tensor, "chain dim"]


class CorrectedState(NamedTuple):
    """The draw of each chain; the noisy point where the chain is, its log density, and the denoiser's moments there.

    `spread`: the covariance [chain, dim, dim] for "full", its diagonal [chain, dim] otherwise.
    """

    position: Float[Tensor, "chain dim"]
    noisy: Float[Tensor, "chain dim"]
    log_prob: Float[Tensor, " chain"]
    mean: Float[Tensor, "chain dim"]
    spread: Float[Tensor, "chain *dims"]


class GibbsInfo(NamedTuple):
    """Share of chains whose covariance had eigenvalues (or entries) to clamp: 0 for a true density, high for a poor model."""

    clipped: Float[Tensor, ""]


class CorrectedInfo(NamedTuple):
    """Mean acceptance of the correction, [1]; share of proposals whose covariance was clamped; rejected for not being finite."""

    acceptance: Float[Tensor, " level"]
    clipped: Float[Tensor, ""]
    nonfinite: Tensor


@dataclass(frozen=True)
class DenoisingGibbs:
    """Add noise, x_t = a x + s eps; then draw x from N(E[x | x_t], Cov[x | x_t]), both moments from the model; repeat.

    `model`: an `Energy`, `Score` or `Denoiser` of the noisy density at `corruption`. `covariance`: "full" (one
    Hessian-vector product per dimension), "diagonal" (the same cost, exact), "hutchinson" (`probes` products), "krylov"
    (the full one by `rank` products and no matrix), "isotropic" (`variance`, from `isotropic_variance`), or "none" (the mean
    alone: biased, see the docs). `final`: what a draw is, the sample or the sharper, under-dispersed "mean"; the chain goes
    on from the sample either way. There is no step size and nothing to warm up.

    The stationary law is the clean density where p(x | x_t) is Gaussian, and biased otherwise, more so for larger s.
    `correct=True`: a Metropolis correction makes the noisy chain exact for the model's density, so that only the last jump is
    approximate; needs an `Energy` and a covariance of "full", "diagonal", "isotropic" or "none".

    Cost per iteration and chain: one score call and the products above. Raises `InvalidInput` for settings out of range.
    Source: Zhang et al., NeurIPS 2023, arXiv 2305.11650, section 3; the correction is ours.
    """

    model: Any
    corruption: Corruption
    covariance: str = "full"
    final: str = "sample"
    rank: int = 8
    probes: int = 1
    variance: float | int | Tensor | None = None
    correct: bool = False
    force: bool = False
    dim: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", as_model(self.model))
        if not isinstance(self.corruption, Corruption):
            raise InvalidInput(f"corruption must be a Corruption(a, s), got {self.corruption!r}")
        check_corruption(self.model, self.corruption)
        if self.covariance not in COVARIANCES:
            raise InvalidInput(f"covariance must be one of {', '.join(COVARIANCES)}, got {self.covariance!r}")
        if self.final not in ("sample", "mean"):
            raise InvalidInput(f"final must be 'sample' or 'mean', got {self.final!r}")
        check_count("rank", self.rank)
        check_count("probes", self.probes)
        as_setting("variance", self.variance)
        if self.covariance == "isotropic" and self.variance is None:
            raise InvalidInput(
                "covariance='isotropic' needs its variance: calibrate first, "
                "variance=isotropic_variance(model, data, corruption, generator)"
            )
        if self.covariance != "isotropic" and self.variance is not None:
            raise InvalidInput(f"variance= belongs to covariance='isotropic', got it with {self.covariance!r}")
        if self.correct and self.covariance not in _CORRECTABLE:
            raise InvalidInput(
                f"correct=True needs the proposal's exact density: covariance one of {', '.join(_CORRECTABLE)}, "
                f"got {self.covariance!r}"
            )
        if self.correct and not isinstance(self.model, Energy):
            raise InvalidInput(f"correct=True needs an Energy, whose density is known, got {type(self.model).__name__}")

    def bind(self, start: Float[Tensor, "chain dim"]) -> "DenoisingGibbs":
        """This kernel for points of the starts' dimension, which its cost depends on."""
        return replace(self, dim=start.shape[1])

    @property
    def gradients_per_step(self) -> int:
        """One score call and the Hessian-vector products of the covariance, each counted as a call."""
        if self.covariance in ("full", "diagonal", "krylov") and self.dim is None:
            raise InvalidInput(f"the cost of covariance={self.covariance!r} depends on the dimension: give dim=")
        dim = self.dim or 0
        products = {"hutchinson": self.probes, "krylov": min(self.rank, dim), "isotropic": 0, "none": 0}
        return 1 + products.get(self.covariance, dim)

    @property
    def energies_per_step(self) -> int:
        """The correction needs the log density of each proposal."""
        return int(self.correct)

    @property
    def gradients_at_start(self) -> int:
        """A score call, which checks the model; for `correct=True` as many as one step."""
        return self.gradients_per_step if self.correct else 1

    def init(self, position: Float[Tensor, "chain dim"]) -> Any:
        """State at the clean points `position`; `correct=True` starts from the noisy points a x."""
        if not self.correct:
            with torch.no_grad():
                self.model.score(self.corruption.a * position, self.corruption)
            return GibbsState(position, position)
        state, _ = self._corrected(self.corruption.a * position)
        return state._replace(position=position)

    def start(self, cold: Any) -> Any:
        """The state itself."""
        return cold

    def step(self, state: Any, generator: torch.Generator) -> tuple[Any, Any]:
        """One sweep of noise and denoising, or one corrected move."""
        return self._corrected_step(state, generator) if self.correct else self._gibbs_step(state, generator)

    def _gibbs_step(self, state: GibbsState, generator: torch.Generator) -> tuple[GibbsState, GibbsInfo]:
        x_t = self.corruption.corrupt(state.clean, generator)
        try:
            posterior = self._posterior(x_t, generator)
        except NonFiniteRows as error:
            raise NonFiniteRows(
                f"{error}; x_t reaches {float(x_t.abs().max()):.3g}: where that is far beyond the data, the chains have diverged "
                "for want of a density with this score: check its sign and its noise level, or train longer",
                error.rows,
            ) from error
        clean = posterior.sample(generator)
        return GibbsState(posterior.mean if self.final == "mean" else clean, clean), GibbsInfo(_share(posterior, clean))

    def _corrected_step(
        self, state: CorrectedState, generator: torch.Generator
    ) -> tuple[CorrectedState, CorrectedInfo]:
        """Propose x_t' = a x + s eps with x from the denoiser's Gaussian at x_t, accepted for the model's own density."""
        noisy = self._transition(state).sample(generator)
        proposed, clipped, known = self._proposed(noisy, state)
        log_ratio = (
            proposed.log_prob
            - state.log_prob
            + self._transition(proposed).log_prob(state.noisy)
            - self._transition(state).log_prob(noisy)
        )
        valid = torch.isfinite(log_ratio) & known
        log_ratio = torch.where(valid, log_ratio, -torch.inf)
        uniform = torch.rand(len(noisy), dtype=noisy.dtype, device=noisy.device, generator=generator)
        accept = torch.log1p(-uniform) < log_ratio
        chosen = CorrectedState(
            *(
                torch.where(accept.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(proposed, state, strict=True)
            )
        )
        denoiser = GaussianPosterior(chosen.mean, _operator(chosen.spread))
        draw = chosen.mean if self.final == "mean" else denoiser.sample(generator)
        info = CorrectedInfo(log_ratio.clamp(max=0).exp().mean().reshape(1), clipped, (~valid).sum())
        return chosen._replace(position=draw), info

    def _posterior(self, x_t: Tensor, generator: torch.Generator | None) -> GaussianPosterior:
        with torch.no_grad():
            return gaussian_posterior(
                self.model,
                x_t,
                self.corruption,
                covariance=self.covariance,
                rank=self.rank,
                probes=self.probes,
                generator=generator,
                variance=self.variance,
                force=self.force,
            )

    def _proposed(self, noisy: Tensor, state: CorrectedState) -> tuple[CorrectedState, Tensor, Tensor]:
        """State at the proposals, and where the model could be evaluated; elsewhere the state stays, to be rejected."""
        known = torch.ones(len(noisy), dtype=torch.bool, device=noisy.device)
        while True:
            try:
                return *self._corrected(torch.where(known.unsqueeze(-1), noisy, state.noisy)), known
            except NonFiniteRows as error:
                if not bool((known & error.rows).any()):
                    raise
                known = known & ~error.rows

    def _corrected(self, noisy: Tensor) -> tuple[CorrectedState, Tensor]:
        posterior = self._posterior(noisy, None)
        spread = posterior.covariance.dense() if self.covariance == "full" else posterior.variance
        with torch.no_grad():
            log_prob = self.model.log_prob(noisy)
        return CorrectedState(posterior.mean, noisy, log_prob, posterior.mean, spread), _share(posterior, noisy)

    def _transition(self, state: CorrectedState) -> GaussianPosterior:
        """The law of the next x_t: N(a mean, a^2 Sigma + s^2 I)."""
        widened = _operator(state.spread).corrupted(self.corruption)
        return GaussianPosterior(self.corruption.a * state.mean, widened)

    def settings(self) -> dict[str, Tensor]:
        """`variance`, where set."""
        return given_settings(variance=self.variance)

    def with_settings(self, settings: dict[str, Tensor]) -> "DenoisingGibbs":
        """The same kernel with these settings."""
        changes: dict[str, Any] = dict(settings)
        return replace(self, **changes)

    def warmup_phases(self, gradients: int, state: Any) -> list[Phase]:
        """None: there is nothing to adapt."""
        return []

    def state_type(self) -> type:
        """`GibbsState`, or `CorrectedState` with the correction."""
        return CorrectedState if self.correct else GibbsState

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        return {
            "kernel": "DenoisingGibbs",
            "model": type(self.model).__name__,
            "a": self.corruption.a,
            "s": self.corruption.s,
            "covariance": self.covariance,
            "final": self.final,
            "rank": self.rank,
            "probes": self.probes,
            "correct": self.correct,
            **plain_settings(variance=self.variance),
        }


def _operator(spread: Tensor) -> FullCovariance | DiagonalCovariance:
    return FullCovariance(spread) if spread.ndim == 3 else DiagonalCovariance(spread)


def _share(posterior: GaussianPosterior, like: Tensor) -> Tensor:
    return (posterior.clipped > 0).to(like).mean()
