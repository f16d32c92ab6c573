"""A run in progress: warm-up, draws, bill, checkpoints, interruption and resumption."""

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning
from noisewise.progress import Reporter
from noisewise.runs import RunFolder
from noisewise.sampling.adaptation import BurnIn
from noisewise.sampling.diagnostics import diagnose
from noisewise.sampling.draws import KIND, Draws, Final, pack, part, unpack
from noisewise.sampling.kernel import ChainState
from noisewise.sampling.plan import Plan
from noisewise.targets.target import check_start, check_target
from noisewise.typing import Cost

__all__ = ["Run", "moved_to", "seeded"]

_DEFAULT_DRAWS = 1000
# value-and-gradient calls per chain of a warm-up that nobody sized
_DEFAULT_WARMUP = 2000
_WARMUP_SHARE = 0.2
_CHECKPOINT_SECONDS = 2.0


class _Mark(NamedTuple):
    """All that a finished draw changes, replaced in one assignment: an interrupt between any two lines finds it whole."""

    state: Any
    generator: Tensor
    cost: Cost
    squares: Tensor
    nonfinite: Tensor
    pieces: int
    written: int
    rows: list[dict[str, Tensor]]
    kept: int


@dataclass
class Run:
    """A run in progress. Everything that its future depends on goes into a checkpoint."""

    kernel: Any
    state: Any
    generator: torch.Generator
    plan: Plan
    config: dict[str, Any]
    folder: RunFolder | None
    cost: Cost = field(default_factory=Cost)
    warmed: bool = False
    phase: int = 0
    index: int = 0
    steps: int | None = None
    memory: dict[str, Tensor] = field(default_factory=dict)
    pieces: int = 0
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    written: int = 0
    messages: list[str] = field(default_factory=list)
    interrupted: bool = False
    done: bool = False
    allowance: int = 0
    # size of the starts, against which a diverged chain is told
    reach: float = 0.0

    def __post_init__(self) -> None:
        self.phases: list[Any] = []
        self._mark: _Mark | None = None
        cold = self.state.position
        self.squares = torch.zeros(cold.shape[1] + 1, dtype=torch.float64, device=cold.device)
        self.nonfinite = torch.zeros((), dtype=torch.long, device=cold.device)
        self._clock = self._saved = time.monotonic()
        self._limit = math.inf if self.plan.budget.seconds is None else self._clock + self.plan.budget.seconds

    # --- beginnings

    @classmethod
    def begin(cls, kernel: Any, start: Tensor, plan: Plan, config: dict[str, Any], folder: RunFolder | None) -> "Run":
        """Check the target and the budget, then claim the folder."""
        cold = _checked_start(kernel, start)
        run = cls(kernel, cold, seeded(config["seed"], start.device), plan, config, folder)
        run.reach = float(start.abs().max())
        run.cost = Cost(gradients=len(start) * getattr(kernel, "gradients_at_start", 1))
        run.allowance = run._warmup_allowance(cold)
        run.phases = run._warmup_phases(cold)
        if not run.phases:
            run.state, run.warmed = kernel.start(cold), True
        run._check_budget()
        if folder is not None:
            folder.begin(KIND, config)
            folder.event("begin", chains=len(start), dim=start.shape[1])
        return run

    @classmethod
    def restore(cls, kernel: Any, start: Tensor, plan: Plan, config: dict[str, Any], folder: RunFolder) -> "Run":
        """Go on from the last checkpoint, or from the start when there is none."""
        stored = folder.restore()
        if stored is None:
            return cls.begin(kernel, start, plan, config, None)._in(folder)
        cold = _checked_start(kernel, start)
        run = cls(kernel, cold, seeded(config["seed"], start.device), plan, config, folder)
        run.reach = float(start.abs().max())
        tensors, progress = stored
        final, squares = unpack(tensors)
        for name in ("warmed", "phase", "index", "steps", "pieces", "allowance"):
            setattr(run, name, progress[name])
        run.phases = run._warmup_phases(cold)
        run.written = progress["draws"]
        run.messages = list(progress["warnings"])
        run.cost = Cost(**progress["cost"])
        template = kernel if run.warmed else run.phases[run.phase].template()
        run.kernel = template.with_settings(moved_to(final.settings, start))
        # where time ran out in a first phase, the chains have not become what the next one makes of them
        plain = set(final.state) == set(ChainState._fields)
        run.state = (ChainState if plain else run.kernel.state_type())(**moved_to(final.state, start))
        run.memory = part(tensors, "memory")
        run.generator.set_state(final.generator)
        run.squares = squares.to(start.device) if squares is not None else run.squares
        folder.event("resume", draws=run.written, phase=run.phase, index=run.index)
        return run

    def _in(self, folder: RunFolder) -> "Run":
        self.folder = folder
        return self

    def _warmup_phases(self, cold: Any) -> list[Any]:
        """The kernel's own; where nothing is left open, the steps that were asked for are made and discarded."""
        phases = self.kernel.warmup_phases(self.allowance, cold)
        return phases or ([BurnIn(self.kernel, self.plan.warmup)] if self.plan.warmup else [])

    def _warmup_allowance(self, cold: Any) -> int:
        """Value-and-gradient calls per chain that the warm-up may use."""
        if hasattr(self.kernel, "bind"):
            return 0  # nothing to adapt
        chains, budget = len(cold.position), self.plan.budget
        share = getattr(self.kernel, "warmup_share", _WARMUP_SHARE)
        allowed = []
        if self.plan.warmup:
            return self.plan.warmup * self.kernel.gradients_per_step
        if budget.gradients is not None:
            allowed.append(share * budget.gradients / chains)
        if budget.seconds is not None:
            self._bill(1, 0)
            began = time.perf_counter()
            self.kernel.target.log_prob_and_score(cold.position)
            # a kernel's own arithmetic costs about as much as a cheap target
            one_call = 2 * (time.perf_counter() - began)
            allowed.append(share * budget.seconds / one_call)
        if not allowed:
            return max(_DEFAULT_WARMUP, 20 * self.kernel.gradients_per_step)
        return max(int(min(allowed)), 1)

    def _check_budget(self) -> None:
        budget = self.plan.budget.gradients
        chains = self.config["chains"]
        if budget is not None and budget < chains * (1 + self.kernel.gradients_per_step):
            raise InvalidInput(
                f"a budget of {budget:g} gradient calls is less than one iteration of {self.config['kernel']['kernel']} needs: "
                f"{chains} chains x (1 + {self.kernel.gradients_per_step}); raise it or take fewer chains"
            )

    # --- the loop

    def finish(self, show: bool) -> Draws:
        """Run to the end, to the budget's end, or to Ctrl-C."""
        with warnings.catch_warnings():
            warnings.simplefilter("always", NoisewiseWarning)
            # kept as they come, so that every checkpoint has them; shown once, at the end
            warnings.showwarning = self._keep(warnings.showwarning)
            reporter = Reporter(show)
            try:
                with reporter:
                    self._warm_up(reporter)
                    self._draw(reporter)
                self.done = True
            except KeyboardInterrupt:
                # an iteration cut in half is undone; in warm-up the last checkpoint stands
                self.interrupted = True
                if self._mark is not None:
                    self._go_back(self._mark)
                if self.folder is not None:
                    self.folder.event("interrupted", draws=self._count)
        result = self._draws()
        found = diagnose(result, self.kernel, self.reach) if result.positions.shape[1] else self._why_no_draws()
        self.messages += [text for text in found if text not in self.messages]
        result = replace(result, warnings=tuple(self.messages))
        if self.folder is not None and (self.done or self._mark is not None):
            self._save()
        for text in self.messages:
            warnings.warn(text, NoisewiseWarning, stacklevel=3)
        return result

    def _keep(self, show: Callable[..., None]) -> Callable[..., None]:
        def keep(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
            if not issubclass(category, NoisewiseWarning):
                show(message, category, *where, **options)
            elif str(message) not in self.messages:
                self.messages.append(str(message))

        return keep

    def _warm_up(self, reporter: "Reporter") -> None:
        while not self.warmed:
            phase = self.phases[self.phase]
            if self.steps is None:
                if not self._affordable(0, phase.opening_gradients):
                    return
                self.kernel, self.state, self.memory, self.steps = phase.begin(self.kernel, self.state, self.generator)
                self._bill(phase.opening_gradients, 0)
            while self.index < self.steps and not phase.finished(self.state):
                if time.monotonic() > self._phase_limit() or not self._affordable(1, phase.closing_gradients):
                    break
                self.state, info = self.kernel.step(self.state, self.generator)
                self._bill(self.kernel.gradients_per_step, self.kernel.energies_per_step)
                self.nonfinite = self.nonfinite + info.nonfinite
                self.kernel, self.state, self.memory = phase.update(
                    self.kernel, self.state, info, self.memory, self.index, self.steps
                )
                self.index += 1
                reporter.show(
                    f"warm-up {self.phase + 1}/{len(self.phases)}", self.index, self.steps, self._bill_so_far()
                )
                self._save_now_and_then()
            if not self._affordable(0, phase.closing_gradients):
                return
            self.kernel, self.state = phase.end(self.kernel, self.state, self.memory, self.generator)
            self._bill(phase.closing_gradients, 0)
            self.phase, self.index, self.steps, self.memory = self.phase + 1, 0, None, {}
            self.warmed = self.phase == len(self.phases)
            if self.warmed and isinstance(self.state, ChainState) and self.kernel.state_type() is not ChainState:
                self.state = self.kernel.start(self.state)
            if self.folder is not None:
                self.folder.event("phase", done=self.phase, gradients=self.cost.gradients)
                self._save()

    def _phase_limit(self) -> float:
        """When the clock ends a phase: the phases share the warm-up's part of a budget in seconds evenly."""
        seconds = self.plan.budget.seconds
        if seconds is None or self.plan.warmup:
            return self._limit
        share = getattr(self.kernel, "warmup_share", _WARMUP_SHARE)
        return self._limit - seconds * (1 - share * (self.phase + 1) / len(self.phases))

    def _why_no_draws(self) -> list[str]:
        if self.interrupted:
            return []
        where = "warm-up left nothing of" if self.warmed else "warm-up, still unfinished, spent"
        chains, cost = self.config["chains"], self.kernel.gradients_per_step
        return [
            f"there are no draws: {where} the budget; raise it, or take fewer than {chains} chains (one draw of all chains "
            f"costs {chains} x {cost} gradient calls, and a warm-up should make some hundred iterations)"
        ]

    def _snapshot(self) -> _Mark:
        return _Mark(
            self.state,
            self.generator.get_state(),
            self.cost,
            self.squares,
            self.nonfinite,
            self.pieces,
            self.written,
            self.rows,
            len(self.rows),
        )

    def _go_back(self, mark: _Mark) -> None:
        self.state, self.cost, self.squares, self.nonfinite = mark.state, mark.cost, mark.squares, mark.nonfinite
        self.generator.set_state(mark.generator)
        self.pieces, self.written, self.rows = mark.pieces, mark.written, mark.rows[: mark.kept]

    def _draw(self, reporter: "Reporter") -> None:
        if not self.warmed:
            return
        budget = self.plan.budget
        wanted = self.plan.draws
        if wanted is None and budget.gradients is None and budget.seconds is None:
            wanted = _DEFAULT_DRAWS
        while wanted is None or self._count < wanted:
            if not self._affordable(self.plan.thin) or time.monotonic() > self._limit:
                break
            if self._mark is None:
                self._mark = self._snapshot()
            infos = []
            for _ in range(self.plan.thin):
                self.state, info = self.kernel.step(self.state, self.generator)
                infos.append(info)
            self._bill(self.plan.thin * self.kernel.gradients_per_step, self.plan.thin * self.kernel.energies_per_step)
            self._record(infos)
            self._mark = self._snapshot()
            total = wanted
            if budget.gradients is not None:
                per_draw = self.config["chains"] * self.plan.thin * self.kernel.gradients_per_step
                affordable = self._count + int((budget.gradients - self.cost.gradients) // max(per_draw, 1))
                total = affordable if wanted is None else min(wanted, affordable)
            reporter.show("draws", self._count, total, self._bill_so_far())
            self._save_now_and_then()

    def _record(self, infos: list[Any]) -> None:
        cold = self.state.cold if hasattr(self.state, "cold") else self.state
        row = {"positions": cold.position}
        if hasattr(self.kernel, "target"):
            seen = cold.score.new_tensor([len(cold.score)], dtype=torch.float64)
            self.squares = self.squares + torch.cat([cold.score.double().square().sum(0), seen])
        if hasattr(cold, "log_prob"):
            row["log_prob"] = cold.log_prob
        for name in infos[0]._fields:
            column = [getattr(info, name) for info in infos]
            if name == "nonfinite":
                self.nonfinite = self.nonfinite + torch.stack(column).sum()
            else:
                row[name] = column[0] if len(column) == 1 else torch.stack(column).mean(0)
        self.rows.append(row)

    def _bill_so_far(self) -> str:
        return f"{self.cost.gradients:.3g} gradients"

    def _affordable(self, iterations: int, closing: int = 0) -> bool:
        budget, chains = self.plan.budget.gradients, self.config["chains"]
        next_cost = chains * (iterations * self.kernel.gradients_per_step + closing)
        return budget is None or self.cost.gradients + next_cost <= budget

    def _bill(self, gradients: int, energies: int) -> None:
        chains = self.config["chains"]
        self.cost = replace(
            self.cost,
            gradients=self.cost.gradients + chains * gradients,
            energies=self.cost.energies + chains * energies,
        )

    # --- keeping

    @property
    def _count(self) -> int:
        return self.written + len(self.rows)

    def _tick(self) -> None:
        """Add the time since the last tick, and the non-finite counts, to the bill."""
        now = time.monotonic()
        self.cost = replace(
            self.cost,
            seconds=self.cost.seconds + now - self._clock,
            nonfinite=self.cost.nonfinite + int(self.nonfinite),
        )
        self.nonfinite = torch.zeros_like(self.nonfinite)
        self._clock = now

    def _final(self) -> Final:
        return Final(self.state._asdict(), self.kernel.settings(), self.generator.get_state())

    def _save_now_and_then(self) -> None:
        if self.folder is not None and time.monotonic() - self._saved > _CHECKPOINT_SECONDS:
            self._save()

    def _save(self) -> None:
        """A piece with the draws since the last one, then the checkpoint that counts it."""
        assert self.folder is not None
        self._tick()
        if self.rows:
            self.folder.put_piece(self.pieces, _stacked(self.rows))
            self.pieces, self.written, self.rows = self.pieces + 1, self._count, []
        progress = {
            "draws": self.written,
            "pieces": self.pieces,
            "finished": self.done,
            "cost": vars(self.cost),
            "names": getattr(getattr(self.kernel, "target", None), "names", None),
            "warnings": self.messages,
            "interrupted": self.interrupted,
            **{name: getattr(self, name) for name in ("warmed", "phase", "index", "steps", "allowance")},
        }
        self.folder.checkpoint(pack(self._final(), self.squares, self.memory), progress)
        self._saved = time.monotonic()
        if self._mark is not None:
            self._mark = self._snapshot()

    def _draws(self) -> Draws:
        self._tick()
        like = self.state.position
        pieces = [self.folder.piece(index) for index in range(self.pieces)] if self.folder is not None else []
        if self.rows:
            pieces = [*pieces, _stacked(self.rows)]
        merged = {
            name: torch.cat([piece[name].to(like.device) for piece in pieces]) for name in (pieces[0] if pieces else ())
        }
        if not merged:
            merged = {"positions": like.new_zeros((0, *like.shape))}
            merged |= {"log_prob": like.new_zeros((0, len(like)))} if hasattr(self.state, "log_prob") else {}
        names = getattr(getattr(self.kernel, "target", None), "names", None)
        return Draws(
            positions=merged.pop("positions").transpose(0, 1).contiguous(),
            stats=merged,
            cost=self.cost,
            config=self.config,
            final=self._final(),
            names=None if names is None else list(names),
            interrupted=self.interrupted,
            squares=self.squares,
        )


def _checked_start(kernel: Any, start: Tensor) -> Any:
    """The state at the starts, checked: of the target, or of the model that a kernel without a target samples."""
    if hasattr(kernel, "bind"):
        check_start(start)
        try:
            return kernel.init(start)
        except NoisewiseError:
            raise
        except Exception as error:  # whatever the user's own network raises
            raise InvalidInput(
                f"the model failed on starts of shape {tuple(start.shape)} and dtype {start.dtype}: "
                f"{type(error).__name__}: {error}; {_advice(kernel.model, start)}"
            ) from error
    return ChainState(start, *check_target(kernel.target, start))


def _advice(model: Any, start: Tensor) -> str:
    """What to do about a model that fails at the starts: the dtype, where that is known to differ, or the shape."""
    owner = getattr(model.fn, "__self__", model.fn)
    weight = next(owner.parameters(), None) if isinstance(owner, nn.Module) else None
    if weight is not None and weight.dtype != start.dtype:
        return f"its weights are {weight.dtype}: give init=init.to({weight.dtype}), or convert the network"
    return f"it must take [chain, {start.shape[1]}]: give init the number of coordinates that the model was trained on"


def _stacked(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def seeded(seed: int, device: torch.device) -> torch.Generator:
    """A generator of its own on `device`."""
    return torch.Generator(device=device).manual_seed(seed)


def moved_to(tensors: dict[str, Tensor], like: Tensor) -> dict[str, Tensor]:
    """Stored tensors on the device of `like`; the ladder stays where it was made."""
    return {name: value if name == "betas" else value.to(like.device) for name, value in tensors.items()}
