"""DiGS with a fitted denoiser inside parallel tempering: the exact sampler that noisewise uses when none is named."""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.sampling.kernel import ChainState, Kernel, Phase, finite, select
from noisewise.sampling.ladder import TuneLadder
from noisewise.sampling.mixture_fit import StudentMixture, fit_mixture, fit_possible, reweighted, tempered_weights
from noisewise.sampling.tempering import ParallelTempering, PTState
from noisewise.targets.gaussian_mixture import GaussianMixture
from noisewise.targets.target import Target, as_target
from noisewise.typing import check_count

__all__ = ["FittedDiGS", "FittedInfo"]

# below this the fitted move does not pay for its call
_POOR_FIT = 0.02
# draws for the fit: the last two thirds of the tempering warm-up, at most this many over all chains
_FIT_DRAWS = 6000
# share of the ladder's warm-up after which the first fit is made
_FIRST_FIT = 0.5
# batches of draws of the fit: some to weigh its components, some moves to see how often it is accepted
_WEIGHING_DRAWS, _TRIAL_MOVES = 10, 10


class FittedInfo(NamedTuple):
    """As `PTInfo`, plus the mean acceptance of the fitted moves (0 where the fit was dropped)."""

    acceptance: Float[Tensor, " temperature"]
    swap_acceptance: Float[Tensor, " pair"]
    fitted_acceptance: Float[Tensor, ""]
    nonfinite: Tensor


@dataclass(frozen=True)
class FittedDiGS:
    """Fitted denoising moves on the cold replica, beside a parallel-tempering ladder that finds the modes.

    Warm-up: `tempering` runs and adapts; a Gaussian mixture q0 is fitted to its cold draws (components by BIC), its weights
    are corrected by importance sampling, and it is frozen.
    Then every iteration makes `moves` fitted moves and one tempering iteration. A fitted move noises the state, draws from
    the mixture's own denoising posterior q(z | x_t), and accepts with min(1, p(z) q0(x) / (p(x) q0(z))): exact for any q0;
    a bad fit costs acceptance, never correctness. Draws of the warm-up are discarded.

    `tempering`: a `ParallelTempering` on the same target, by default a scouted ladder. `moves` >= 1. `ladder=False`: drop the
    hot replicas after warm-up; quicker, but a mode that the fit missed is then lost. `r`: noise scale of the fitted move in
    units of the fit's total standard deviation; inf is an independence draw from q0, the best setting in every measured
    case. `components`: "gaussian" or "t" (heavy tails, `degrees` of freedom; needs r = inf). `reference`: a frozen mixture
    of your own instead of the fit. When the fit's acceptance is below 2 % it is dropped, with a warning, and what remains is
    parallel tempering. To refit, call `fitted_to(draws)` and start a new run.
    Cost per iteration and chain: moves + temperatures x 2 (moves + 2 without the ladder) value-and-gradient calls.
    Raises `InvalidInput` for settings out of range. Source: section 13 of our DiGS specification, extending
    Chen et al., ICML 2024; independence sampler: Tierney, Annals of Statistics 22, 1994.
    """

    target: Target
    tempering: ParallelTempering | None = None
    ladder: bool = True
    moves: int = 4
    r: float | int = math.inf
    components: str = "gaussian"
    degrees: float | int = 5.0
    max_components: int = 64
    reference: GaussianMixture | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", as_target(self.target))
        if self.tempering is None:
            object.__setattr__(self, "tempering", ParallelTempering(self.target))
        if self.tempering.target is not self.target:  # type: ignore[union-attr]
            raise InvalidInput(
                "tempering must be built on the same target object: FittedDiGS(t, tempering=ParallelTempering(t))"
            )
        check_count("moves", self.moves)
        check_count("max_components", self.max_components)
        if not self.r > 0:
            raise InvalidInput(f"r must be above 0, got {self.r!r}")
        if self.components not in ("gaussian", "t"):
            raise InvalidInput(f"components must be 'gaussian' or 't', got {self.components!r}")
        if self.components == "t" and not math.isinf(self.r):
            raise InvalidInput(f"t components have no closed denoising posterior: they need r=inf, got r={self.r!r}")
        if self.reference is not None and self.reference.dim != self.target.dim:
            raise InvalidInput(f"the reference has dim {self.reference.dim}, the target {self.target.dim}")
        object.__setattr__(self, "_denoiser", None if self.reference is None else self._build_denoiser(self.reference))

    @property
    def gradients_per_step(self) -> int:
        """`moves` (none before a fit) plus the tempering iteration."""
        return self._moves + self._local.gradients_per_step

    @property
    def energies_per_step(self) -> int:
        """Value-only calls of the local kernel."""
        return self._local.energies_per_step

    @property
    def _moves(self) -> int:
        return 0 if self.reference is None else self.moves

    @property
    def _local(self) -> Any:
        """What moves the chains between fitted moves: the ladder, or its cold rung alone."""
        tempering: Any = self.tempering
        if self.ladder or self.reference is None:
            return tempering
        cold = None if tempering.step_size is None else torch.as_tensor(tempering.step_size).reshape(-1)[0]
        return replace(tempering.inner, step_size=cold)

    def init(self, position: Float[Tensor, "chain dim"]) -> Any:
        """State at `position`; one value-and-gradient call per chain."""
        return self.start(ChainState(position, *self.target.log_prob_and_score(position)))

    def start(self, cold: ChainState) -> Any:
        """State from a point whose value and score are known."""
        return self._local.start(cold)

    def step(self, state: Any, generator: torch.Generator) -> tuple[Any, FittedInfo]:
        """`moves` fitted moves of the cold replica, then one iteration of the ladder."""
        acceptance = torch.zeros((), dtype=state.position.dtype, device=state.position.device)
        nonfinite = torch.zeros((), dtype=torch.long, device=state.position.device)
        if self._moves:
            cold = state.cold if isinstance(state, PTState) else state
            for _ in range(self.moves):
                cold, accepted, bad = self._fitted_move(cold, generator)
                acceptance, nonfinite = acceptance + accepted.mean() / self.moves, nonfinite + bad
            state = _with_cold(state, cold)
        state, info = self._local.step(state, generator)
        swaps = getattr(info, "swap_acceptance", info.acceptance[:0])
        return state, FittedInfo(info.acceptance, swaps, acceptance, nonfinite + info.nonfinite)

    def _fitted_move(self, state: ChainState, generator: torch.Generator) -> tuple[ChainState, Tensor, Tensor]:
        """z ~ q(z | x_t), accepted with p(z) q0(x) / (p(x) q0(z)); x_t is integrated out exactly (eq. 6 of the spec)."""
        denoiser: _Denoiser = self._denoiser  # type: ignore[attr-defined]
        z = denoiser.propose(state.position, generator)
        proposed = ChainState(z, *self.target.log_prob_and_score(z))
        log_q0, log_q0_z = denoiser.mixture.log_prob(torch.cat([state.position, z])).chunk(2)
        log_ratio = proposed.log_prob - log_q0_z - state.log_prob + log_q0
        valid = finite(proposed.log_prob, proposed.score)
        log_ratio = torch.where(valid & ~log_ratio.isnan(), log_ratio, -torch.inf)
        uniform = torch.rand(len(z), dtype=z.dtype, device=z.device, generator=generator)
        state = select(torch.log1p(-uniform) < log_ratio, proposed, state)
        return state, log_ratio.clamp(max=0).exp(), (~valid).sum()

    def _build_denoiser(self, reference: GaussianMixture) -> "_Denoiser":
        if self.components == "t":
            return _Independence(StudentMixture(reference, self.degrees))
        return _Independence(reference) if math.isinf(self.r) else _Denoising(reference, self.r)

    def fitted_to(self, draws: Float[Tensor, "*batch dim"], seed: int = 0) -> "FittedDiGS":
        """This kernel with its reference fitted to `draws` and frozen; start a new run with it, the old estimates do not mix."""
        rows = draws.reshape(-1, draws.shape[-1])
        rows = rows[:: max(math.ceil(len(rows) / _FIT_DRAWS), 1)]
        return replace(self, reference=fit_mixture(rows, seed, self.max_components))

    def _weighed(
        self, rows: int, generator: torch.Generator
    ) -> tuple["FittedDiGS", ChainState, Float[Tensor, " draw"]]:
        """This kernel with component weights from importance sampling, and the weighted draws of ten batches of `rows`.

        The ladder's draws may have met a mode only lately.
        """
        mixture: Any = self._denoiser.mixture  # type: ignore[attr-defined]
        z = mixture.sample(_WEIGHING_DRAWS * rows, generator)
        parts = [ChainState(part, *self.target.log_prob_and_score(part)) for part in z.split(rows)]
        draws = ChainState(*(torch.cat(column) for column in zip(*parts, strict=True)))
        weight = tempered_weights(torch.where(finite(*draws[1:]), draws.log_prob, -torch.inf) - mixture.log_prob(z))
        reference: Any = self.reference
        return replace(self, reference=reweighted(reference, z, weight)), draws, weight

    def settings(self) -> dict[str, Tensor]:
        """Those of the ladder, and the reference mixture."""
        tempering: Any = self.tempering
        settings = dict(tempering.settings())
        if self.reference is not None:
            settings["reference_means"] = self.reference.means
            settings["reference_covariances"] = self.reference.covariances
            settings["reference_weights"] = self.reference.weights
        return settings

    def with_settings(self, settings: dict[str, Tensor]) -> "FittedDiGS":
        """The same kernel with these settings; without a reference among them it has none (a poor fit was dropped)."""
        tempering: Any = self.tempering
        ladder = {name: value for name, value in settings.items() if not name.startswith("reference_")}
        changed = replace(self, tempering=tempering.with_settings(ladder), reference=None)
        if "reference_means" not in settings:
            return changed
        reference = GaussianMixture(
            settings["reference_means"], settings["reference_covariances"], settings["reference_weights"]
        )
        return replace(changed, reference=reference)

    def warmup_phases(self, gradients: int, state: ChainState) -> list[Phase]:
        """The ladder's own warm-up, then the fit; with a reference of your own only the ladder's."""
        tempering: Any = self.tempering
        phases = tempering.warmup_phases(gradients, state)
        tuning = phases[-1] if phases else None
        if not isinstance(tuning, TuneLadder):
            return [_TuneAndFit(self, gradients, None, last=True)]
        if self.reference is not None:
            return [*phases[:-1], _TuneAndFit(self, tuning.gradients, tuning, last=True)]
        first = int(_FIRST_FIT * tuning.gradients)
        last = tuning.gradients - first
        # the ladder is tuned in the first part alone, which pays its trial of the fit too
        tuning = TuneLadder(tempering, max(first - _TuneAndFit.closing_gradients, 1), adapt=tuning.adapt)
        return [
            *phases[:-1],
            _TuneAndFit(self, first, tuning, last=False),
            _TuneAndFit(self, last, None, last=True),
        ]

    def state_type(self) -> type:
        """`PTState`, or `ChainState` without the ladder."""
        return self._local.state_type()

    def describe(self) -> dict[str, Any]:
        """Name and arguments."""
        tempering: Any = self.tempering
        return {
            "kernel": "FittedDiGS",
            "ladder": self.ladder,
            "moves": self.moves,
            "r": "inf" if math.isinf(self.r) else self.r,
            "components": self.components,
            "degrees": self.degrees,
            "max_components": self.max_components,
            "reference": None if self.reference is None else self.reference.means.tolist(),
            "tempering": tempering.describe(),
        }


class _Independence:
    """r = inf: the noise has drowned the state, and the denoiser's posterior is the mixture itself."""

    def __init__(self, mixture: GaussianMixture | StudentMixture) -> None:
        self.mixture: Any = mixture

    def propose(self, x: Float[Tensor, "chain dim"], generator: torch.Generator) -> Float[Tensor, "chain dim"]:
        return self.mixture.sample(len(x), generator).to(x)


class _Denoising:
    """Finite r: x_t = x + R^(1/2) eps with R = r^2 M, M the mixture's total covariance, then z from its posterior."""

    def __init__(self, mixture: GaussianMixture, r: float) -> None:
        self.mixture: Any = mixture
        full = mixture.full_covariances.double()
        means, weights = mixture.means.double(), mixture.weights.double()
        centred = means - weights @ means
        noise = r**2 * (
            torch.einsum("k,kij->ij", weights, full) + torch.einsum("k,ki,kj->ij", weights, centred, centred)
        )
        noisy = full + noise
        self._gain = torch.linalg.solve(noisy, full).mT  # S (S + R)^-1, both symmetric
        posterior = full - self._gain @ full
        self._root = torch.linalg.cholesky((posterior + posterior.mT) / 2)
        self._noise_root = torch.linalg.cholesky(noise)
        self._noisy_mixture: Any = GaussianMixture(means, noisy, weights)
        self._means = means

    def propose(self, x: Float[Tensor, "chain dim"], generator: torch.Generator) -> Float[Tensor, "chain dim"]:
        options: dict[str, Any] = {"dtype": x.dtype, "device": x.device, "generator": generator}
        normal = torch.randn((2, *x.shape), **options)
        x_t = x + normal[0] @ self._noise_root.to(x).mT
        weights = self._noisy_mixture.responsibilities(x_t.double()).to(x)
        chosen = torch.multinomial(weights, 1, generator=generator).squeeze(-1)
        means, gain, root = self._means.to(x)[chosen], self._gain.to(x)[chosen], self._root.to(x)[chosen]
        return means + torch.einsum("cij,cj->ci", gain, x_t - means) + torch.einsum("cij,cj->ci", root, normal[1])


_Denoiser = _Independence | _Denoising


class _TuneAndFit:
    """A part of the warm-up whose later cold draws are kept, then the fit to them and a trial of it.

    In the first part the ladder is tuned; in the last one the first fit's moves carry chains between the modes, so that the
    fit to its draws sees them all.
    """

    opening_gradients = 0
    closing_gradients = _WEIGHING_DRAWS + _TRIAL_MOVES

    def __init__(self, kernel: FittedDiGS, gradients: int, tuning: TuneLadder | None, last: bool) -> None:
        self._kernel = kernel
        self._tuning = tuning
        self._gradients = gradients
        self._last = last

    def template(self) -> Kernel:
        """Before a fit, `FittedDiGS` is its ladder; the ladder stays until the last fit."""
        return replace(self._kernel, reference=None, ladder=True)

    def begin(self, kernel: Any, state: Any, generator: torch.Generator) -> tuple[Kernel, Any, dict[str, Tensor], int]:
        """As the ladder's tuning begins, with room for the cold draws."""
        # the trial of the fit is paid from the same allowance
        allowance = max(self._gradients - self.closing_gradients, 1)
        memory: dict[str, Tensor] = {}
        if self._tuning is not None:
            # after a crash between two phases the kernel is this phase's, and no longer the scouts'
            before = kernel.tempering if isinstance(kernel, FittedDiGS) else kernel
            tempering, state, memory, steps = self._tuning.begin(before, state, generator)
            fitted = replace(self.template(), tempering=tempering)  # type: ignore[type-var]
        else:
            fitted = kernel if isinstance(state, PTState) else self.template()
            state = state if isinstance(state, PTState) else fitted.start(state)
            steps = max(allowance // fitted.gradients_per_step, 1)
        chains, dim = state.position.shape
        kept = len(self._kept(steps, chains))
        memory = {
            **memory,
            "cold": torch.zeros((kept, chains, dim), dtype=state.position.dtype),
            "cold_log_prob": torch.zeros((kept, chains), dtype=state.position.dtype),
        }
        return fitted, state, memory, steps

    @staticmethod
    def _kept(steps: int, chains: int) -> range:
        """Which steps' cold draws the fit sees: evenly spread over the last two thirds."""
        first = steps // 3
        stride = max(math.ceil((steps - first) * chains / _FIT_DRAWS), 1)
        return range(first, steps, stride)

    def update(
        self, kernel: Any, state: Any, info: Any, memory: dict[str, Tensor], index: int, steps: int
    ) -> tuple[Kernel, Any, dict[str, Tensor]]:
        """Tune the ladder; keep the cold draw."""
        kept = self._kept(steps, state.position.shape[0])
        if index in kept:
            memory["cold"][kept.index(index)] = state.position.cpu()
            memory["cold_log_prob"][kept.index(index)] = state.cold.log_prob.cpu()
        if self._tuning is None:
            return kernel, state, memory
        tempering, state, memory = self._tuning.update(kernel.tempering, state, info, memory, index, steps)
        return replace(kernel, tempering=tempering), state, memory

    def finished(self, state: Any) -> bool:
        """Never before its steps ran out."""
        return False

    def end(self, kernel: Any, state: Any, memory: dict[str, Tensor], generator: torch.Generator) -> tuple[Kernel, Any]:
        """Freeze the ladder, fit, try the fit, and drop it with a warning where its acceptance is poor."""
        if self._tuning is not None:
            tempering, state = self._tuning.end(kernel.tempering, state, memory, generator)
            kernel = replace(kernel, tempering=tempering)
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=generator.device))
        if self._kernel.reference is None:
            kernel, state = self._fit(kernel, state, memory, seed, generator)
            trials = _TRIAL_MOVES
        else:
            kernel = replace(kernel, reference=self._kernel.reference)
            trials = self.closing_gradients
        cold: ChainState = state.cold
        rates = []
        for _ in range(trials):
            cold, accepted, _bad = kernel._fitted_move(cold, generator)
            rates.append(accepted.mean())
        state = _with_cold(state, cold)
        rate = float(torch.stack(rates).mean())
        if rate < _POOR_FIT:
            kernel = replace(kernel, reference=None)
        if not self._last:
            return kernel, state
        if rate < _POOR_FIT:
            warnings.warn(
                f"the fitted mixture's moves are accepted only {rate:.2%} of the time, so FittedDiGS goes on as parallel "
                f"tempering alone; give a longer warm-up (more draws to fit), components='t' for heavy tails, or fewer "
                f"dimensions ({self._kernel.target.dim} now)",
                NoisewiseWarning,
                stacklevel=2,
            )
            return kernel, state
        return replace(kernel, ladder=self._kernel.ladder), state if self._kernel.ladder else state.cold

    def _fit(
        self, kernel: FittedDiGS, state: PTState, memory: dict[str, Tensor], seed: int, generator: torch.Generator
    ) -> tuple[FittedDiGS, PTState]:
        """Fit to the kept draws and those of now; chains that are stuck where no weight is start anew from the fit."""
        cold = state.cold
        draws = torch.cat([memory["cold"].to(cold.position).flatten(0, 1), cold.position])
        log_prob = torch.cat([memory["cold_log_prob"].to(cold.log_prob).flatten(), cold.log_prob])
        mixture, possible = fit_possible(draws, log_prob, seed, kernel.max_components)
        kernel, fresh, weight = replace(kernel, reference=mixture)._weighed(len(cold.position), generator)
        chosen = torch.multinomial(weight, len(cold.position), replacement=True, generator=generator)
        stuck = ~possible[-len(cold.position) :]
        if getattr(self._kernel.target, "chains", None) is not None:
            # each chain has a density of its own: a draw weighed for one chain is no start for another
            return kernel, state
        return kernel, _with_cold(state, select(stuck, ChainState(*(part[chosen] for part in fresh)), cold))


def _with_cold(state: Any, cold: ChainState) -> Any:
    """`state` with its cold replica replaced."""
    if not isinstance(state, PTState):
        return cold
    return state._replace(
        replica=torch.cat([cold.position.unsqueeze(0), state.replica[1:]]),
        log_prob=torch.cat([cold.log_prob.unsqueeze(0), state.log_prob[1:]]),
        score=torch.cat([cold.score.unsqueeze(0), state.score[1:]]),
    )
