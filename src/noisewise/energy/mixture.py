"""`MixtureScoreMatching`: an energy model that sees its mode weights, by score matching on a bridge of data and reference.

Three steps: fit the score of beta p + (1 - beta) m; find the normaliser with m's help; take m out again.
Source: Zhang et al., NeurIPS 2022 workshop, arXiv 2209.07396; normaliser by bridge sampling and the checks are ours.
"""

import copy
import inspect
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.energy import keeping
from noisewise.energy.bridged import Bridged, Proposal, ResidualEnergy
from noisewise.energy.gaps import Clusters, Gap, find_clusters, find_gaps
from noisewise.energy.losses import bridge_score_matching, check_beta, check_trace
from noisewise.energy.network import EnergyNet
from noisewise.energy.normalizer import NORMALIZERS, log_normalizer
from noisewise.energy.reference import (
    Rescaled,
    as_reference,
    check_covers,
    gaussian_reference,
    student_t_reference,
)
from noisewise.energy.rows import LEAST_ROWS, as_rows, check_rows, check_varies, few_rows
from noisewise.energy.training import fit_energy
from noisewise.energy.weights import density_weights
from noisewise.errors import InvalidInput, NoisewiseWarning, require
from noisewise.metrics.measurement import Measurement
from noisewise.metrics.modes import ModeWeights, assign_modes, mode_weights
from noisewise.targets.target import TorchTarget
from noisewise.typing import check_count, check_positive

__all__ = ["Blindness", "MixtureScoreMatching"]

# draws of the reference behind normaliser, masses and weights
_DRAWS = 100_000
# below or above these a result stands on weak ground
_GAP_POINTS, _EFFECTIVE, _NEGATIVE = 50, 100, 0.01
# a mass further from 1 than this, errors apart, is no rounding of the normaliser
_MASS = 0.05
_CHAINS = 100
# a fitted weight may miss the share of the rows by so many standard errors, or by this part of itself, which refits from
# other seeds differ by
_WEIGHT_ERRORS, _WEIGHT_MARGIN = 4.0, 0.05


class Blindness(NamedTuple):
    """Mode weights of refits from other seeds. `weights`: [refit, mode]; `spread`: [mode], their standard deviation.

    A method that sees the weights has a spread as small as its errors; plain score matching of separated modes has not.
    """

    weights: Float[Tensor, "refit mode"]
    spread: Float[Tensor, " mode"]


class MixtureScoreMatching:
    """Fits a density to rows of a table; score matching of the mixture with a reference sees the weights of its modes.

    `energy`: None for an `EnergyNet` of the data's dimension, or your own module [batch, dim] -> [batch]; a copy is trained,
    as the part of the bridge's energy that is added to -log m (an `EnergyNet` with a `base_scale` is taken as the whole
    energy instead). It sees standardised rows unless `standardize` is False. `reference` m: "gaussian" (mean and covariance
    of the data), "student-t" (with `degrees`), each with `inflate` times the standard deviations, or your own density on
    the scale of the data with `log_prob` and `sample(n, generator)`, torch distributions included. `beta` in (0, 1): share
    of the data in the mixture; 0.8 to 0.95 is the useful range. `trace`: "exact" up to 64 dimensions, or "sliced".
    `normalizer`: "bridge", "importance" or "reverse". `floor`: least density in units of m's; 0 lets log p be -inf where
    the fit left nothing. `steps` to `progress`: as in `fit_energy`; `validation` is 0, because on some thousand rows or fewer the
    held-out loss is so noisy that it would pick weights that hardly learned. Nothing is checked before `fit`.

    After `fit`: `log_normalizer_` and `log_normalizer_se_` (of the bridge, on the standardised scale), `negative_mass_` and
    `negative_mass_se_` (what the subtraction left below zero, before the floor), `gaps_`, `clusters_`, with their
    `cluster_weights_` in the fit, `cluster_shares_` of the rows and `cluster_centres_`, `history_`, `cost_`, `n_iter_` (steps
    made), `warnings_`, `bridged_`. A fitted model is a `Target`. On one connected
    cloud of data plain score matching does as well; in many more than ten dimensions no simple reference reaches the gaps.
    """

    def __init__(
        self,
        energy: Any = None,
        reference: Any = "gaussian",
        beta: float | int = 0.8,
        *,
        inflate: float | int = 1.0,
        degrees: float | int = 5.0,
        trace: str = "exact",
        normalizer: str = "bridge",
        standardize: bool = True,
        floor: float | int = 1e-3,
        hidden: int = 64,
        depth: int = 3,
        steps: int = 1500,
        batch_size: int = 256,
        learning_rate: float | int = 3e-3,
        weight_decay: float | int = 0.0,
        ema: float | int = 0.999,
        clip: float | int = 10.0,
        validation: float | int = 0.0,
        max_seconds: float | int | None = None,
        checkpoint: str | Path | None = None,
        progress: bool = False,
        seed: int = 0,
    ) -> None:
        self.energy = energy
        self.reference = reference
        self.beta = beta
        self.inflate = inflate
        self.degrees = degrees
        self.trace = trace
        self.normalizer = normalizer
        self.standardize = standardize
        self.floor = floor
        self.hidden = hidden
        self.depth = depth
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.ema = ema
        self.clip = clip
        self.validation = validation
        self.max_seconds = max_seconds
        self.checkpoint = checkpoint
        self.progress = progress
        self.seed = seed

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """All arguments of the constructor, by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> "MixtureScoreMatching":
        """Change arguments before a `fit`; raises `InvalidInput` for an unknown name."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise InvalidInput(f"{name!r} is no parameter of MixtureScoreMatching; it has {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn (1.6 or newer) asks an estimator before it clones, splits and scores."""
        tags = require("sklearn.utils", "energy")
        return tags.Tags(estimator_type="density_estimator", target_tags=tags.TargetTags(required=False))

    # --- fitting

    def fit(self, X: Any, y: None = None) -> "MixtureScoreMatching":
        """Fit to `X`, [row, dim] (tensor, array or list); `y` is ignored. Returns self.

        Warns, naming the remedy, when a gap holds fewer than 50 reference points, the normaliser rests on fewer than 100
        effective points, the mass of the fit is not 1, the negative mass exceeds 1 %, there are fewer than 50 rows a column,
        or the weight of a cluster is further from its share of the rows than four standard errors and a twentieth of it.
        Raises `InvalidInput` before any training for fewer than 10 rows, NaN rows, constant columns, a reference that misses
        rows, `beta` outside (0, 1) and every other setting that cannot work.
        """
        rows = _as_rows(X, LEAST_ROWS)
        self._check_settings(rows)
        z = self._standardise(rows)
        reference = self._make_reference(z)
        check_covers(reference, z)
        generator = torch.Generator(device=z.device).manual_seed(self.seed + 2_000_003)
        self.clusters_: Clusters = find_clusters(z, generator)
        self.cluster_shares_ = mode_weights(z, self.clusters_, self.clusters_.number)
        self.cluster_centres_ = self._centres(z)
        self._few = few_rows(rows)
        per_row = (1 - self.beta) / self.beta
        self.gaps_: list[Gap] = find_gaps(self.clusters_, lambda n: reference.sample(n, generator), per_row * len(rows))
        energy = self._make_energy(reference, z.shape[1]).to(z.device)
        result = fit_energy(
            energy, z, bridge_score_matching(reference, self.beta, self.trace), steps=self.steps,
            batch_size=self.batch_size, learning_rate=self.learning_rate, weight_decay=self.weight_decay, ema=self.ema,
            clip=self.clip, validation=self.validation, max_seconds=self.max_seconds, checkpoint=self.checkpoint,
            progress=self.progress, seed=self.seed,
        )  # fmt: skip
        self.history_, self.best_step_ = result.history, result.best_step
        self.cost_, self.interrupted_, self.n_iter_ = result.cost, result.interrupted, result.steps
        energy = energy.double().requires_grad_(False)
        bridge_rows = torch.cat([z, reference.sample(max(1, round(per_row * len(z))), generator).to(z)])
        self._finish(energy, reference, bridge_rows, generator)
        self._rows = rows
        return self

    def _finish(self, energy: nn.Module, reference: Any, bridge_rows: Tensor, generator: torch.Generator) -> None:
        """Steps two and three: the normaliser, and what is left when the reference is taken out."""
        drawn = reference.sample(_DRAWS, generator).to(bridge_rows)
        normalizer = log_normalizer(energy, reference, drawn, bridge_rows, self.normalizer)
        raw = Bridged(energy, reference, float(self.beta), normalizer, float(self.floor))
        mass = raw.mass(*Proposal.around(self.clusters_, reference).draw(_DRAWS, generator))
        self._set_fitted(replace(raw, total=mass.total), mass.negative, mass.se)
        self._signed = mass.signed, mass.signed_se
        self.cluster_weights_ = self.mode_weights()
        self.warnings_ = tuple(self._find_faults())
        for text in self.warnings_:
            warnings.warn(text, NoisewiseWarning, stacklevel=3)

    def _set_fitted(self, bridge: Bridged, negative: float, se: float) -> None:
        self.bridged_ = bridge
        self.log_normalizer_, self.log_normalizer_se_ = bridge.normalizer.value, bridge.normalizer.se
        self.negative_mass_, self.negative_mass_se_ = negative, se

    def _check_settings(self, rows: Tensor) -> None:
        check_beta(self.beta)
        check_trace(self.trace, rows.shape[1])
        if self.normalizer not in NORMALIZERS:
            raise InvalidInput(f"normalizer must be one of {', '.join(NORMALIZERS)}, got {self.normalizer!r}")
        if isinstance(self.floor, bool) or not isinstance(self.floor, int | float) or not 0 <= self.floor < 1:
            raise InvalidInput(f"floor must lie in [0, 1), got {self.floor!r}")
        check_positive("inflate", self.inflate)
        check_count("seed", self.seed, 0)
        if self.energy is not None and not isinstance(self.energy, nn.Module):
            raise InvalidInput(f"energy must be an EnergyNet or a torch.nn.Module, got {type(self.energy).__name__}")
        if isinstance(self.energy, EnergyNet) and self.energy.dim != rows.shape[1]:
            raise InvalidInput(f"energy has dim {self.energy.dim}, the data have {rows.shape[1]} columns")

    def _standardise(self, rows: Tensor) -> Tensor:
        deviation = rows.std(0)
        check_varies(rows)
        self.mean_ = rows.mean(0) if self.standardize else torch.zeros_like(deviation)
        self.scale_ = deviation if self.standardize else torch.ones_like(deviation)
        return (rows - self.mean_) / self.scale_

    def _centres(self, z: Tensor) -> Tensor:
        """Mean of the rows of each cluster, on the scale of the data."""
        member = nn.functional.one_hot(self.clusters_(z), self.clusters_.number).to(z)
        return (member.T @ z) / member.sum(0)[:, None] * self.scale_ + self.mean_

    def _make_reference(self, z: Tensor) -> Any:
        if self.reference == "gaussian":
            return gaussian_reference(z, self.inflate)
        if self.reference == "student-t":
            return student_t_reference(z, self.degrees, self.inflate)
        if isinstance(self.reference, str):
            raise InvalidInput(f'reference must be "gaussian", "student-t" or a density, got {self.reference!r}')
        return Rescaled(as_reference(self.reference), self.mean_, self.scale_)

    def _make_energy(self, reference: Any, dim: int) -> nn.Module:
        """The module that is trained, in float32 unless the given one is otherwise."""
        if self.energy is None:
            return ResidualEnergy(
                EnergyNet(dim, self.hidden, self.depth, seed=self.seed, gain=self.clusters_.detail), reference
            )
        own = copy.deepcopy(self.energy).requires_grad_(True)
        whole = isinstance(own, EnergyNet) and own.base_scale is not None
        return own if whole else ResidualEnergy(own, reference)

    def _find_faults(self) -> list[str]:
        found = [] if self._few is None else [self._few]
        found += [
            f"only {gap.points:.0f} reference points lie in the gap between clusters {gap.first + 1} and {gap.second + 1} of the "
            f"data: their relative weight is uncertain; raise inflate, lower beta, or give more rows"
            for gap in self.gaps_
            if gap.points < _GAP_POINTS
        ]
        normalizer = self.bridged_.normalizer
        if normalizer.effective < _EFFECTIVE:
            found.append(
                f"the log normaliser has a standard error of {normalizer.se:.2g} (fewer than {_EFFECTIVE} effective points): "
                "the reference hardly overlaps the data; use fewer dimensions or a closer reference"
            )
        signed, error = self._signed
        if abs(signed - 1) > _MASS + 4 * error:
            found.append(
                f"the fitted density has the mass {signed:.2f} ± {error:.1g}, so the fit of the bridge does not match the rows: "
                "log densities are renormalised, but shapes and weights are doubtful; train longer (steps), or scale down what "
                "is far apart"
            )
        if self.negative_mass_ > _NEGATIVE:
            found.append(
                f"{self.negative_mass_:.1%} of the mass is negative after the reference is taken out: the fit of the bridge is "
                "coarse; train longer (steps), or raise beta"
            )
        return found + self._misfits()

    def _misfits(self) -> list[str]:
        """Clusters whose fitted weight is further from their share of the rows than both are uncertain.

        The rows are taken for an unweighted sample of the density, so that the share has a binomial error.
        """
        fitted, raw = self.cluster_weights_, self.cluster_shares_
        assert fitted.se is not None and raw.se is not None  # noqa: PT018
        allowed = torch.maximum(_WEIGHT_ERRORS * torch.hypot(fitted.se, raw.se), _WEIGHT_MARGIN * raw.weights)
        excess = (fitted.weights - raw.weights).abs() / allowed
        wrong = int((excess > 1).sum())
        if not wrong:
            return []
        worst = int(excess.argmax())
        weight, share, _ = self._found_clusters()[worst]
        others = f" (and {wrong - 1} more cluster{'s' * (wrong > 2)})" if wrong > 1 else ""
        return [
            f"the fitted weight of cluster {worst + 1} is {weight}, its share of the {raw.n} rows {share}{others}: the fit is "
            "wrong there, unless the rows are a weighted sample; train longer (steps), take another beta or reference, or see "
            "blindness_check()"
        ]

    # --- what the fit says

    @property
    def bridged(self) -> Bridged:
        """The normalised bridge, on the standardised scale. Raises `InvalidInput` before `fit`."""
        if not hasattr(self, "bridged_"):
            raise InvalidInput("this MixtureScoreMatching is not fitted yet: call fit(X) first")
        return self.bridged_

    @torch.no_grad()
    def score_samples(self, X: Any) -> Float[Tensor, " row"]:
        """Log density of each row on the scale of the data, float64. Raises `InvalidInput` for NaN rows and other shapes."""
        bridge = self.bridged
        z = (self._rows_like_fit(X) - self.mean_) / self.scale_
        value = torch.cat([bridge.log_density(part) for part in z.split(16_384)])
        return value - self.scale_.log().sum()

    @property
    def dim(self) -> int:
        """Number of columns; with it a fitted model is a `Target` that `noisewise.sample` takes."""
        _ = self.bridged  # says so before `fit`
        return len(self.mean_)

    def log_prob(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
        """As `score_samples`, but differentiable in x and in its dtype, on the scale of the data."""
        bridge = self.bridged
        z = ((x.to(self.mean_) - self.mean_) / self.scale_).reshape(-1, self.dim)
        return (bridge.log_density(z) - self.scale_.log().sum()).reshape(x.shape[:-1]).to(x)

    def log_prob_and_score(
        self, x: Float[Tensor, "*batch dim"]
    ) -> tuple[Float[Tensor, "*batch"], Float[Tensor, "*batch dim"]]:
        """`log_prob` and its gradient in x, as a `Target` gives them."""
        return TorchTarget(self.log_prob, self.dim).log_prob_and_score(x)

    def score(self, X: Any, y: None = None) -> float:
        """Mean log density of the rows, the higher the better."""
        return float(self.score_samples(X).mean())

    def sample(
        self, n: int = 1000, seed: int = 0, kernel: Callable[[Any], Any] | None = None
    ) -> Float[Tensor, "row dim"]:
        """`n` draws of the fitted density on the scale of the data, by Markov chains of `noisewise.sampling.sample`.

        Not the signature of scikit-learn's density estimators: the number is `n`, not `n_samples`, and draws alone come back.

        `kernel`: makes a kernel of a target, such as `ParallelTempering`; None takes `FittedDiGS`. The chains begin at draws
        of the reference that were resampled by their weight; the warnings of the sampler are passed on.
        """
        from noisewise.sampling.loop import sample as run_chains

        bridge = self.bridged
        n = check_count("n", n)
        chains = min(n, _CHAINS)
        generator = torch.Generator(device=self.mean_.device).manual_seed(check_count("seed", seed, 0))
        drawn, log_share = Proposal.around(self.clusters_, bridge.reference).draw(_DRAWS, generator)
        picked = torch.multinomial(bridge.weights(drawn, log_share), chains, replacement=True, generator=generator)
        target = TorchTarget(bridge.log_density, len(self.mean_))
        made = run_chains(
            target if kernel is None else kernel(target),
            init=drawn[picked], draws=math.ceil(n / chains), seed=seed, progress=self.progress,
        )  # fmt: skip
        # draw by draw, so that a cut at n keeps all chains
        return made.positions.transpose(0, 1).reshape(-1, len(self.mean_))[:n] * self.scale_ + self.mean_

    @torch.no_grad()
    def mode_weights(
        self, partition: Float[Tensor, "mode dim"] | Callable[[Tensor], Tensor] | Any = None, seed: int = 0
    ) -> ModeWeights:
        """Probability of each part of space under the fitted density, with bootstrap errors.

        `partition`: centres on the scale of the data (tensor, array, list, frame; a point belongs to the nearest), a callable
        [n, dim] -> [n] of labels from 0, or None for the clusters that `fit` found. By importance weights of 100,000 draws,
        half of the reference and half of Gaussians on the clusters; the errors resample these draws and the normaliser, and do
        not include how the fit varies with the data: see `blindness_check`.
        """
        bridge = self.bridged
        generator = torch.Generator(device=self.mean_.device).manual_seed(check_count("seed", seed, 0))
        drawn, log_share = Proposal.around(self.clusters_, bridge.reference).draw(_DRAWS, generator)
        assign = self.clusters_ if partition is None else partition
        if not callable(assign):
            assign = self._rows_like_fit(assign, "partition")
        where = drawn if partition is None else drawn * self.scale_ + self.mean_
        labels = assign_modes(where, assign)
        if partition is None:
            # a cluster that no draw reaches has weight 0
            number = self.clusters_.number
        else:
            number = len(assign) if isinstance(assign, Tensor) else int(labels.max()) + 1
        return density_weights(bridge, drawn, log_share, labels, number, generator)

    def blindness_check(self, k: int = 3, partition: Any = None, X: Any = None) -> Blindness:
        """Refit from `k` other seeds, all else equal, and compare the mode weights.

        `partition`: as in `mode_weights`. `X`: the data, needed only after `from_pretrained`.
        """
        _ = self.bridged  # says so before `fit`
        if X is None and not hasattr(self, "_rows"):
            raise InvalidInput("a loaded model does not hold its data: blindness_check(k, X=data)")
        rows = self._rows if X is None else X
        found = []
        for offset in range(1, check_count("k", k, 2) + 1):
            params = {**self.get_params(), "seed": self.seed + offset, "checkpoint": None}
            if isinstance(self.energy, EnergyNet):
                params["energy"] = copy.deepcopy(self.energy)
                params["energy"].reset(self.seed + offset)
            again = MixtureScoreMatching(**params)
            with warnings.catch_warnings():
                # the first fit has said the same
                warnings.simplefilter("ignore", NoisewiseWarning)
                again.fit(rows)
            if partition is None:
                again.clusters_ = self.clusters_
            found.append(again.mode_weights(partition).weights)
        width = max(map(len, found))
        weights = torch.stack([nn.functional.pad(w, (0, width - len(w))) for w in found])
        return Blindness(weights, weights.std(0))

    def report(self) -> str:
        """What the fit found, in a few lines: clusters, gaps, normaliser, negative mass, cost, warnings."""
        bridge = self.bridged
        normalizer = bridge.normalizer
        lines = [
            f"MixtureScoreMatching: {len(self.mean_)} columns, beta {self.beta:g}, weights of step {self.best_step_} "
            f"of {self.steps}" + self._cut(),
            f"clusters of the data: {self.clusters_.number}"
            + ("; no gap found, so plain score matching may do as well" if self.clusters_.number == 1 else ""),
            *(
                f"cluster {number}: weight {weight}, share of the rows {share}, centre ({_numbers(centre)})"
                for number, (weight, share, centre) in enumerate(self._found_clusters(), 1)
                if self.clusters_.number > 1
            ),
            *(
                f"gap {gap.first + 1}-{gap.second + 1}: {gap.width:.3g} wide (standardised), {gap.points:.0f} reference points"
                for gap in self.gaps_
            ),
            f"log normaliser {normalizer.value:.4f} ± {normalizer.se:.1g} ({self.normalizer} sampling)",
            f"negative mass {self.negative_mass_:.3%} ± {self.negative_mass_se_:.3%}, floor {self.floor:g} of the reference",
            f"{self.cost_.gradients:.3g} network rows in {self.cost_.seconds:.1f} s",
            *(f"warning: {text}" for text in self.warnings_),
        ]
        return "\n".join(lines)

    def _found_clusters(self) -> list[tuple[Measurement, Measurement, list[float]]]:
        """Fitted weight, share of the rows and centre of each cluster."""
        both = (self.cluster_weights_.measurements(), self.cluster_shares_.measurements())
        return list(zip(*both, self.cluster_centres_.tolist(), strict=True))

    def _cut(self) -> str:
        """Where training was cut short, in words."""
        if self.n_iter_ >= self.steps:
            return ""
        return f", {'interrupted' if self.interrupted_ else 'stopped by max_seconds'} at step {self.n_iter_}"

    def _rows_like_fit(self, X: Any, name: str = "X") -> Tensor:
        rows = _as_rows(X, 1, name).to(self.mean_)
        if rows.shape[1] != len(self.mean_):
            raise InvalidInput(f"{name} has {rows.shape[1]} columns, the model was fitted to {len(self.mean_)}")
        return rows

    # --- keeping

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors`: settings, scales, reference, weights, normaliser, history."""
        return keeping.save(self, folder)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, energy: nn.Module | None = None, reference: Any = None
    ) -> "MixtureScoreMatching":
        """Read what `save_pretrained` wrote; `energy` and `reference`: yours, where the fit was made with such.

        Raises `RunFolderError` for another class or schema and for a damaged file.
        """
        return keeping.load(cls, folder, energy, reference)


def _numbers(values: list[float]) -> str:
    """The first coordinates of a point, for a line of a report."""
    return ", ".join(f"{value:.4g}" for value in values[:6]) + (", ..." if len(values) > 6 else "")


def _as_rows(X: Any, least: int, name: str = "X") -> Tensor:
    """[row, dim] in float64, with the rows that are not finite named."""
    rows = as_rows(X, name)
    if rows.ndim != 2:
        advice = f"; for one column use {name}[:, None]" if rows.ndim == 1 else ""
        raise InvalidInput(f"{name} must be [row, dim], got shape {tuple(rows.shape)}{advice}")
    rows = rows.double()
    check_rows(rows, least)
    return rows
