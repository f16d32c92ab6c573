"""The training of one network by any loss: batches, a moving average, a held-out loss, checkpoints that resume exactly."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noisewise.errors import InvalidInput, NoisewiseError, require
from noisewise.progress import Reporter, gentle_interrupt
from noisewise.runs import RunFolder
from noisewise.typing import Cost

__all__ = [
    "Fit",
    "FitResult",
    "Loss",
    "Plan",
    "accelerator_for",
    "check_share",
    "evaluating",
    "fingerprint",
    "run_fit",
    "seeded_dropout",
]

Loss = Callable[[Any, Any, torch.Generator], Tensor]

_CHECKPOINT_SECONDS = 2.0
# looks at the held-out loss during a fit, the most rows that one look evaluates, and how many of them at once
_LOOKS, _HELD_OUT_ROWS, _LOOK_ROWS = 25, 4096, 1024
# steps in a row whose loss or gradient is not finite, before the fit gives up
_PATIENCE = 50


@dataclass(frozen=True, repr=False)
class FitResult:
    """A fitted network and how it came about.

    `net`: the module that was given, now with the best averaged weights. `history`: one entry per look at the held-out
    rows: `step`, `loss` (mean of the training loss since the look before), `validation` (None without held-out rows),
    `learning_rate`. `best_step`: where the returned weights are from. `steps`: how many were made; fewer than asked for
    after `max_seconds` or Ctrl-C (`interrupted`). `cost`: rows that went through the network, each once per evaluation
    with its gradients, looks included; `nonfinite`: steps that were left out because their gradient was not finite.
    `objective`: what was learned, where a network can learn more than one thing. In print the history is one number, the best.
    """

    net: nn.Module
    history: list[dict[str, float | None]]
    best_step: int
    steps: int
    cost: Cost
    interrupted: bool = False
    objective: str = ""

    def __repr__(self) -> str:
        best = [entry["validation"] for entry in self.history if entry["step"] == self.best_step]
        held = best[-1] if best else None
        parts = [
            f"{type(self.net).__name__}" + (f" by {self.objective!r}" if self.objective else ""),
            f"{self.steps} steps, the best {self.best_step}",
            "no held-out loss" if held is None else f"held-out loss {held:.4g}",
            f"{self.cost.seconds:.1f} s",
        ]
        return f"{type(self).__name__}({', '.join([*parts, *(['interrupted'] * self.interrupted)])})"


@dataclass(frozen=True)
class Plan:
    """Checked settings of a fit.

    AdamW, a cosine learning rate from `learning_rate` to 0, gradient norms clipped at `clip`, a moving average of the weights
    with decay `ema` (less at the beginning), `validation`: share of rows held out, whose loss picks the average that is
    returned. `patience`: looks at it (25 in a fit) without a better one, after which the fit ends; 0 never ends it.
    """

    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    ema: float = 0.999
    clip: float = 10.0
    validation: float = 0.1
    seed: int = 0
    patience: int = 0


@dataclass
class Fit:
    """A fit in progress, of any network by any loss. Everything that its future depends on goes into a checkpoint.

    `rows`: a tensor, or what has a length and gives a batch for a tensor of indices. `loss(net, batch, generator)`: a
    differentiable scalar. `counted`: the module whose rows are the bill, by default `net`. `accelerator`: accelerate's, for
    many processes and mixed precision. `measure`: the loss of held-out rows, by default `loss` itself.
    `settled`: the step from which looks count for `patience`.

    `groups`: of parameters with rates and decays of their own, as optimisers take them. `warm_up`: share of the steps in which
    the rates rise to theirs, before the cosine. `recalibrate`: called on `net` with averaged weights in it, before they are
    measured and returned, to make its buffers fit them. `split`: rows that are held out and rows to train on, by index; by
    default they are drawn. `look_rows`: how many held-out rows are evaluated at once.
    """

    net: nn.Module
    rows: Any
    loss: Loss
    plan: Plan
    counted: nn.Module | None = None
    accelerator: Any = None
    measure: Loss | None = None
    settled: int = 0
    groups: list[dict[str, Any]] | None = None
    warm_up: float = 0.0
    recalibrate: Callable[[nn.Module], None] | None = None
    split: tuple[Tensor, Tensor] | None = None
    look_rows: int = _LOOK_ROWS
    step: int = 0
    history: list[dict[str, float | None]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    failures: int = 0
    waited: int = 0
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        plan = self.plan
        self.names = [name for name, p in self.net.named_parameters() if p.requires_grad]
        self.weights = [p for p in self.net.parameters() if p.requires_grad]
        if not self.weights:
            raise InvalidInput(f"{type(self.net).__name__} has no parameters to train")
        self.device = device = self.weights[0].device
        kept = self.net.state_dict()
        self.buffers = {name: buffer for name, buffer in self.net.named_buffers() if name in kept}
        self.optimizer = torch.optim.AdamW(
            self.groups or self.weights, lr=plan.learning_rate, weight_decay=plan.weight_decay
        )
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.average = [p.detach().clone() for p in self.weights]
        self.best = [p.clone() for p in self.average]
        self.sum = torch.zeros(2, dtype=torch.float64, device=device)
        self.generator = torch.Generator(device=device).manual_seed(plan.seed)
        order = torch.randperm(len(self.rows), device=device, generator=self.generator)
        held = round(plan.validation * len(self.rows))
        if len(self.rows) - held < 2:
            raise InvalidInput(
                f"validation={plan.validation:g} of {len(self.rows)} rows leaves fewer than 2 to train on"
            )
        self.held_out, self.training = (order[:held], order[held:]) if self.split is None else self.split
        self.module: Any = self.net
        if self.accelerator is not None:
            self.module, self.optimizer = self.accelerator.prepare(self.net, self.optimizer)
        if min(plan.batch_size, len(self.training)) < self._processes:
            raise InvalidInput(f"batch_size={plan.batch_size} gives {self._processes} processes less than a row each")
        self.interval = max(1, plan.steps // _LOOKS)

    def run(self, folder: RunFolder | None, limit: float, show: bool) -> FitResult:
        """Step to the end, to the time limit, or to Ctrl-C; put the best average into the network."""
        begin = saved = time.monotonic()
        spent = self.cost.seconds
        hook = (self.counted or self.net).register_forward_hook(self._count)
        interrupted = False
        try:
            with Reporter(show) as reporter, gentle_interrupt() as stop:
                while self.step < self.plan.steps and not self._over:
                    if self._agreed(stop.is_set() or time.monotonic() - begin >= limit):
                        break
                    state = self.generator.get_state()
                    try:
                        self._advance()
                    except KeyboardInterrupt:
                        # raised inside a loss, before anything changed but the random numbers
                        self.generator.set_state(state)
                        stop.set()
                        break
                    shown = self.history[-1] if self.history else None
                    reporter.show("fitting step", self.step, self.plan.steps, _losses(shown))
                    self.cost = replace(self.cost, seconds=spent + time.monotonic() - begin)
                    if folder is not None and self.is_main and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                        folder.checkpoint(*self.packed())
                        saved = time.monotonic()
                interrupted = stop.is_set()
                tensors, values = self.packed()
                if self.step and not self.best_step:
                    # stopped before the first look: the checkpoint does not know of this one, so going on stays identical
                    self._look()
        finally:
            hook.remove()
            if self.accelerator is not None:
                # what mixed precision put around the network's forward goes with the fit
                self.accelerator.unwrap_model(self.module, keep_fp32_wrapper=False)
        self._set(self.best)
        if self.recalibrate is not None:
            self.recalibrate(self.net)
        self.net.zero_grad(set_to_none=True)
        if folder is not None and self.is_main:
            folder.checkpoint(tensors, values | {"result": fingerprint(list(self.net.state_dict().values()))})
            folder.event("interrupted" if interrupted else "stopped", step=self.step)
        return FitResult(self.net, list(self.history), self.best_step, self.step, self.cost, interrupted)

    def _advance(self) -> None:
        """One step of Adam on one batch, the average, and a look at the held-out rows when it is time."""
        plan = self.plan
        rate = self._rate(plan.learning_rate)
        size = min(plan.batch_size, len(self.training))
        picked = torch.randint(len(self.training), (size,), device=self.device, generator=self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        value = self.loss(self.module, *self._share_of(picked))
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise InvalidInput(f"a loss must return a differentiable scalar tensor, got {value!r}")
        (value.backward if self.accelerator is None else functools.partial(self.accelerator.backward, value))()
        norm = nn.utils.clip_grad_norm_(self.weights, plan.clip)
        # a loss that is not finite has such a gradient too; of several processes each sees the same one
        if math.isfinite(float(norm)) and (self._processes > 1 or math.isfinite(float(value.detach()))):
            for group, own in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = self._rate(own)
            self.optimizer.step()
            self.failures = 0
            self.sum += torch.stack([value.detach().double(), torch.ones_like(value, dtype=torch.float64)])
        else:
            self.failures += 1
            self.cost = replace(self.cost, nonfinite=self.cost.nonfinite + 1)
            if self.failures >= _PATIENCE:
                raise NoisewiseError(
                    f"the loss or its gradient was not finite for {_PATIENCE} steps in a row, up to step {self.step}: "
                    f"lower learning_rate ({plan.learning_rate:g}) or clip ({plan.clip:g}), or standardise the data"
                )
        self.step += 1
        decay = min(plan.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, weight in zip(self.average, self.weights, strict=True):
                mean.lerp_(weight, 1 - decay)
        if self.step % self.interval == 0 or self.step == plan.steps:
            self._look(rate)

    def _rate(self, highest: float) -> float:
        """Of this step: a straight line up to `highest`, then a cosine down to 0."""
        rising = round(self.warm_up * self.plan.steps)
        if self.step < rising:
            return highest * (self.step + 1) / rising
        return highest * (1 + math.cos(math.pi * (self.step - rising) / (self.plan.steps - rising))) / 2

    def _look(self, rate: float | None = None) -> None:
        """Held-out loss of the average; the best average is kept."""
        held: float | None = None
        if len(self.held_out):
            # the same random numbers at every look, so that looks can be compared
            fixed = torch.Generator(device=self.device).manual_seed(self.plan.seed + 1_000_003)
            own = [weight.detach().clone() for weight in self.weights]
            kept = {name: buffer.clone() for name, buffer in self.buffers.items()}
            self._set(self.average)
            if self.recalibrate is not None:
                self.recalibrate(self.net)
            parts = self.held_out[:_HELD_OUT_ROWS].split(self.look_rows)
            total = sum(
                len(part) * float((self.measure or self.loss)(self.net, self._batch(part), fixed).detach())
                for part in parts
            )
            held = total / sum(map(len, parts))
            if self._processes > 1:
                # all must choose alike, however their devices round
                mean = self.accelerator.reduce(torch.tensor(held, dtype=torch.float64, device=self.device), "mean")
                held = float(mean)
            self._set(own)
            self._set_buffers(kept)
        if held is None or (math.isfinite(held) and held < self.best_loss) or not self.best_step:
            self.best_loss = math.inf if held is None or not math.isfinite(held) else held
            self.best, self.best_step = [mean.clone() for mean in self.average], self.step
            self.waited = 0
        elif self.step > self.settled:
            self.waited += 1
        trained, number = self.sum.tolist()
        entry = {"step": float(self.step), "loss": trained / number if number else None, "validation": held}
        self.history.append({**entry, "learning_rate": rate})
        self.sum.zero_()

    def _share_of(self, picked: Tensor) -> tuple[Any, torch.Generator]:
        """This process's part of the batch, and its random numbers: the one generator, or of each process its own a step."""
        index = self.training[picked]
        if self._processes == 1:
            return self._batch(index), self.generator
        rank = self.accelerator.process_index
        own = torch.Generator(device=self.device).manual_seed((self.plan.seed * 1_000_003 + self.step) * 4099 + rank)
        return self._batch(index[rank :: self._processes]), own

    def _batch(self, index: Tensor) -> Any:
        return self.rows[index.to(self.rows.device) if isinstance(self.rows, Tensor) else index]

    @property
    def _processes(self) -> int:
        return 1 if self.accelerator is None else self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        """Whether this process writes and shows."""
        return self.accelerator is None or self.accelerator.is_main_process

    @property
    def _over(self) -> bool:
        return bool(self.plan.patience) and self.waited >= self.plan.patience

    def _agreed(self, stop: bool) -> bool:
        """Whether any process wants to stop: all of them do then, at the same step."""
        if self._processes == 1:
            return stop
        return bool(self.accelerator.reduce(torch.tensor(float(stop), device=self.device), "sum") > 0)

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

    @torch.no_grad()
    def _set_buffers(self, values: dict[str, Tensor]) -> None:
        for name, value in values.items():
            self.buffers[name].copy_(value)

    def _count(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.cost = replace(self.cost, gradients=self.cost.gradients + len(inputs[0]))

    # --- keeping

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and JSON values of a checkpoint."""
        tensors: dict[str, Tensor] = {"generator": self.generator.get_state(), "sum": self.sum}
        for index, name in enumerate(self.names):
            weight = self.weights[index]
            tensors |= {
                f"weight.{name}": weight,
                f"average.{name}": self.average[index],
                f"best.{name}": self.best[index],
            }
            tensors |= {f"adam.{key}.{name}": value for key, value in self.optimizer.state.get(weight, {}).items()}
        tensors |= {f"buffer.{name}": buffer for name, buffer in self.buffers.items()}
        names = ("step", "history", "best_step", "failures", "waited")
        progress = {name: getattr(self, name) for name in names} | {"cost": vars(self.cost)}
        progress["history"] = list(self.history)
        tensors = {name: value.detach().clone() for name, value in tensors.items()}
        return tensors, progress | {"best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    def restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """The inverse of `packed`."""
        for name in ("step", "history", "best_step", "failures", "waited"):
            setattr(self, name, progress[name])
        self.cost = Cost(**progress["cost"])
        self.best_loss = math.inf if progress["best_loss"] is None else progress["best_loss"]
        device = self.device
        self.generator.set_state(tensors["generator"])
        self.sum = tensors["sum"].to(device)
        self._set([tensors[f"weight.{name}"] for name in self.names])
        # a folder of an earlier version holds none
        found = {name: tensors.get(f"buffer.{name}") for name in self.buffers}
        self._set_buffers({name: value for name, value in found.items() if value is not None})
        self.average = [tensors[f"average.{name}"].to(device) for name in self.names]
        self.best = [tensors[f"best.{name}"].to(device) for name in self.names]
        for weight, name in zip(self.weights, self.names, strict=True):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            if keys:
                # the step counter stays on the CPU, as the optimiser keeps it
                self.optimizer.state[weight] = {
                    key: tensors[f"adam.{key}.{name}"].to("cpu" if key == "step" else device) for key in keys
                }


def run_fit(
    fit: Fit, kind: str, config: dict[str, Any], checkpoint: str | Path | None, limit: float, show: bool
) -> FitResult:
    """Run `fit`, going on from the folder `checkpoint` where an equal `config` was begun there.

    `config["start"]` is the fingerprint of the network as it was given. Raises `RunFolderError` for the folder of another run.
    """
    folder = None if checkpoint is None else RunFolder(checkpoint)
    if folder is not None and folder.exists:
        stored = folder.restore()
        if stored is not None and stored[1].get("result") == config["start"]:
            # the very network that an earlier call of this run gave back
            config = {**config, "start": folder.config(kind)["start"]}
        folder.expect(kind, config)
        if stored is not None:
            fit.restore(*stored)
            if fit.is_main:
                folder.event("resume", step=fit.step)
    elif folder is not None and fit.is_main:
        folder.begin(kind, config)
        folder.event("begin", rows=len(fit.rows))
    return fit.run(folder, limit, show and fit.is_main)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in eval mode; afterwards each of its parts is in the mode in which it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def seeded_dropout(generator: torch.Generator) -> Iterator[None]:
    """Dropout knows only the global generator: it is seeded from `generator` inside, and put back."""
    device = generator.device
    drawn = int(torch.randint(2**62, (1,), generator=generator, device=device))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(drawn)
        yield


def accelerator_for(mixed_precision: str | None, device: torch.device, extra: str) -> Any:
    """accelerate's, or None where one process in float32 is all that is asked for; `extra` is what installs it."""
    if mixed_precision not in (None, "no", "bf16"):
        raise InvalidInput(f"mixed_precision must be 'no' or 'bf16', got {mixed_precision!r}")
    accelerate = require("accelerate", extra)
    state = accelerate.PartialState(cpu=device.type == "cpu")
    if state.num_processes == 1 and mixed_precision in (None, "no"):
        return None
    return accelerate.Accelerator(mixed_precision=mixed_precision, cpu=device.type == "cpu")


def check_share(name: str, value: object, below: float | int) -> float:
    """Return `value` as a float in [0, below); raise `InvalidInput` that quotes it otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        limit = "at least 0" if math.isinf(below) else f"in [0, {below:g})"
        raise InvalidInput(f"{name} must be {limit}, got {value!r}")
    return float(value)


def fingerprint(tensors: list[Tensor]) -> float:
    """One number that differs between different contents, so that a checkpoint is not continued from others."""
    flat = torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])
    return float((flat * torch.linspace(1, 2, len(flat), dtype=torch.float64)).sum())


def _losses(entry: dict[str, float | None] | None) -> str:
    """The latest entry of a history in words."""
    pairs = [] if entry is None else [(name, entry[name]) for name in ("loss", "validation")]
    return ", ".join(f"{name} {value:.4g}" for name, value in pairs if value is not None)
