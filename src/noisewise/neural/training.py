"""The training of a neural sampler, step by step: everything that its future depends on is in one object and its checkpoint."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.errors import NoisewiseError
from noisewise.neural.levels import Levels
from noisewise.neural.posterior import PosteriorDraws, PosteriorSampler
from noisewise.neural.standard import Standardised
from noisewise.neural.steps import StepSizes
from noisewise.typing import Cost

__all__ = ["Chains", "Rates", "Training"]

# learning rates fall along a cosine to these shares: the score network must follow the generator to the end
_LAST_GENERATOR, _LAST_SCORE = 0.01, 0.1
_CLIP = 10.0
# steps in a row without a usable gradient, before the fit gives up
_PATIENCE = 50
# looks at a fit in progress that go into its history
_LOOKS = 50
_SCORE_BOUND = 20.0


@dataclass(frozen=True)
class Rates:
    """How fast what is learned, and on how many draws."""

    generator: float
    score: float
    batch: int
    score_batch: int
    score_steps: int


@dataclass(frozen=True)
class Chains:
    """Draws u of the target by Markov chains with their scores, [row, dim] each, on the standardised scale."""

    position: Float[Tensor, "row dim"]
    score: Float[Tensor, "row dim"]


@dataclass
class Training:
    """A fit in progress on the standardised target.

    `score`: network for the noisy model; `target_score`: for the noisy target, learned from `chains` in its own steps before
    the generator's; None where `posterior` estimates it for each batch. `variance`: of a mode in each coordinate, for the mixed
    identity.
    `published`: as in the paper, weigh the loss of the score network for one without preconditioning, and leave the learning
    rates as they are.
    """

    target: Standardised
    generator: nn.Module
    score: nn.Module
    target_score: nn.Module | None
    chains: Chains | None
    posterior: PosteriorSampler | Any
    steps: StepSizes | None
    levels: Levels
    rates: Rates
    estimator: str
    variance: Float[Tensor, " dim"]
    random: torch.Generator
    published: bool = False
    learned: int = 0
    step: int = 0
    skipped: int = 0
    in_a_row: dict[str, int] = field(default_factory=dict)
    degenerate: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.optimizers = {
            "generator": torch.optim.Adam(self.generator.parameters(), lr=self.rates.generator, fused=True),
            "score": torch.optim.Adam(self.score.parameters(), lr=self.rates.score, fused=True),
        }
        self.networks = {"generator": self.generator, "score": self.score}
        if self.target_score is not None:
            self.networks["target_score"] = self.target_score
            self.optimizers["target_score"] = torch.optim.Adam(
                self.target_score.parameters(), lr=self.rates.score, fused=True
            )
        self._seen: dict[str, float] = {}

    # --- steps

    def learn_target(self, done: float) -> None:
        """One step of the target's score network on the chains, `done` of its share of the run being over.

        The regression's target is the mixed identity, whose variance stays bounded as sigma goes to 0.
        """
        # the caller knows
        assert self.chains is not None
        assert self.target_score is not None
        rows = self.rates.score_batch
        self._rate("target_score", self.rates.score, done, _LAST_GENERATOR)
        picked = torch.randint(len(self.chains.position), (rows,), generator=self.random)
        clean, score = self.chains.position[picked], self.chains.score[picked]
        sigma = self.levels.draw(rows, self.random).sigma
        noisy = self._noisy(clean, sigma)
        square = sigma.square().unsqueeze(-1)
        share = square / (square + self.variance)
        # far from the modes a score is large, and as a single draw of no use
        bound = _SCORE_BOUND * self.variance.rsqrt()
        aim = share * clean + (1 - share) * (noisy + square * score.clamp(-bound, bound))
        self._fit_score("target_score", self.target_score, noisy, sigma, aim)
        self.learned += 1

    def advance(self, done: float) -> None:
        """One step of the generator after `score_steps` of the model's score network."""
        self._rate("generator", self.rates.generator, done, _LAST_GENERATOR)
        self._rate("score", self.rates.score, done, _LAST_SCORE)
        for _ in range(self.rates.score_steps):
            with torch.no_grad():
                clean = self.draw(self.rates.score_batch)
            sigma = self.levels.draw(len(clean), self.random).sigma
            self._fit_score("score", self.score, self._noisy(clean, sigma), sigma, clean)
        clean = self.draw(self.rates.batch)
        sigma, weight = self.levels.draw(len(clean), self.random, done)
        noisy = self._noisy(clean.detach(), sigma)
        with torch.no_grad():
            theirs, valid = self._target_mean(noisy, sigma, clean.detach())
            gap = (self.score(noisy, sigma) - theirs) / sigma.square().unsqueeze(-1)
            direction = weight.unsqueeze(-1) * torch.where(valid.unsqueeze(-1), gap, 0.0)
        loss = (direction * clean).sum(-1).mean()
        # a batch without one usable point has a gradient, and it is zero
        self._descend("generator", self.generator, loss if bool(valid.any()) else loss * math.nan, _CLIP)
        self.step += 1
        self._seen["direction"] = float(direction.square().sum(-1).mean().sqrt())

    def draw(self, n: int, random: torch.Generator | None = None) -> Float[Tensor, "n dim"]:
        """`n` draws of the generator on the standardised scale."""
        drawn = self.generator(self.generator.latent(n, self.random if random is None else random))  # type: ignore[operator]
        return drawn if self.target.project is None else self.target.project(drawn)

    def note(self, stage: str, done: float, always: bool = False) -> None:
        """Add to the history, at most `_LOOKS` times in each stage, or `always`. Steps of both stages are counted on."""
        last = self.history[-1] if self.history else None
        known = (
            last is not None
            and last["stage"] == stage
            and math.floor(done * _LOOKS) <= math.floor(last["done"] * _LOOKS)
        )
        if known and not always:
            return
        entry = {"stage": stage, "step": self.learned + self.step, "done": done, "gradients": self.cost.gradients}
        # JSON knows no infinities
        seen = {name: value for name, value in self._seen.items() if math.isfinite(value)}
        self.history.append({**entry, "seconds": self.cost.seconds, **seen})

    def _noisy(self, clean: Tensor, sigma: Tensor) -> Tensor:
        eps = torch.randn(clean.shape, generator=self.random)
        project = self.target.project
        return clean + sigma.unsqueeze(-1) * (eps if project is None else project(eps))

    def _target_mean(self, noisy: Tensor, sigma: Tensor, clean: Tensor) -> tuple[Tensor, Tensor]:
        """Denoised mean under the target, and where it can be used."""
        if self.target_score is not None:
            return self.target_score(noisy, sigma), torch.ones(len(noisy), dtype=torch.bool)
        start = clean if getattr(self.posterior, "method", None) == "digs" else None
        draws: PosteriorDraws = self.posterior.draw(
            self.target, noisy, sigma, self.steps, self.random, start=start, project=self.target.project
        )
        self.cost = self.cost + draws.cost
        if self.steps is not None:
            self.steps = self.steps.adapted(sigma, draws.langevin_acceptance, draws.anneal_acceptance)
        self._seen |= {"ess": float(draws.ess.median()), "poor": float((draws.ess < 1.5).double().mean())}
        for name in ("langevin_acceptance", "anneal_acceptance"):
            found = getattr(draws, name)
            if found is not None:
                self._seen[name] = float(found.nanmean())
        # a running mean over about a hundred steps
        self.degenerate += 0.01 * (self._seen["poor"] - self.degenerate)
        score = (
            draws.noisy_score(self.estimator, float(self.variance.mean()))
            if self.estimator == "mixed"
            else draws.noisy_score(self.estimator)
        )
        return noisy + sigma.square().unsqueeze(-1) * score, draws.valid & torch.isfinite(score).all(-1)

    def _fit_score(self, name: str, net: nn.Module, noisy: Tensor, sigma: Tensor, aim: Tensor) -> None:
        square = sigma.square()
        # with clean draws of unit variance the network's own output then has one scale at every level
        weight = 1 / square if self.published else (1 + square) / square
        loss = (weight * (net(noisy, sigma) - aim).square().sum(-1)).mean()
        self._descend(name, net, loss, math.inf)
        self._seen[name] = float(loss.detach())

    def _descend(self, name: str, net: nn.Module, loss: Tensor, clip: float) -> None:
        optimizer = self.optimizers[name]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(net.parameters(), clip)
        if bool(torch.isfinite(norm)) and bool(torch.isfinite(loss.detach())):
            optimizer.step()
            self.in_a_row[name] = 0
            return
        self.skipped += 1
        self.in_a_row[name] = self.in_a_row.get(name, 0) + 1
        if self.in_a_row[name] >= _PATIENCE:
            raise NoisewiseError(
                f"the {name.replace('_', ' ')} network had no finite gradient for {_PATIENCE} steps in a row, up to step "
                f"{self.step}: lower the learning rates, or look at the target's score far from its modes"
            )

    def _rate(self, name: str, rate: float, done: float, least: float) -> None:
        share = 1.0 if self.published else least + (1 - least) * (1 + math.cos(math.pi * min(done, 1.0))) / 2
        for group in self.optimizers[name].param_groups:
            group["lr"] = rate * share

    # --- keeping

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values of a checkpoint."""
        tensors = {"random": self.random.get_state()}
        for name, net in self.networks.items():
            tensors |= {f"{name}.{key}": value for key, value in net.state_dict().items()}
            optimizer = self.optimizers[name]
            for key, parameter in net.named_parameters():
                state = optimizer.state.get(parameter, {})
                tensors |= {f"adam.{name}.{key}.{part}": value for part, value in state.items()}
        values: dict[str, Any] = {
            name: getattr(self, name) for name in ("learned", "step", "skipped", "in_a_row", "degenerate")
        }
        values |= {"history": list(self.history), "cost": vars(self.cost), "seen": dict(self._seen)}
        if self.steps is not None:
            tensors |= {"steps.langevin": self.steps.log_langevin, "steps.anneal": self.steps.log_anneal}
        return {name: value.detach().clone() for name, value in tensors.items()}, values

    def restore(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """The inverse of `packed`."""
        self.random.set_state(tensors["random"])
        for name, net in self.networks.items():
            prefix = f"{name}."
            net.load_state_dict({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
            for key, parameter in net.named_parameters():
                start = f"adam.{name}.{key}."
                state = {k.removeprefix(start): v.clone() for k, v in tensors.items() if k.startswith(start)}
                if state:
                    self.optimizers[name].state[parameter] = state
        for name in ("learned", "step", "skipped", "in_a_row", "degenerate"):
            setattr(self, name, values[name])
        self.history, self.cost, self._seen = list(values["history"]), Cost(**values["cost"]), dict(values["seen"])
        if self.steps is not None:
            self.steps = replace(self.steps, log_langevin=tensors["steps.langevin"], log_anneal=tensors["steps.anneal"])
