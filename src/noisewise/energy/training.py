"""`fit_energy`: trains an energy by a score matching loss, with a moving average, a held-out loss, and exact resumption."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.energy.losses import check_trace, dsm_loss, score_matching_loss
from noisewise.energy.network import check_curvature
from noisewise.energy.rows import as_rows, check_rows
from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.networks.mlp import check_smooth
from noisewise.noise import Corruption
from noisewise.progress import Reporter, gentle_interrupt
from noisewise.runs import RunFolder
from noisewise.typing import Cost, check_count, check_positive

__all__ = ["EnergyFit", "Fit", "Loss", "Plan", "fit_energy"]

Loss = Callable[[Any, Tensor, torch.Generator], Tensor]

KIND = "energy fit"
_CHECKPOINT_SECONDS = 2.0
# looks at the held-out loss during a fit, the most rows that one look evaluates, and how many of them at once
_LOOKS, _HELD_OUT_ROWS, _LOOK_ROWS = 25, 4096, 1024
# steps in a row whose loss or gradient is not finite, before the fit gives up
_PATIENCE = 50


@dataclass(frozen=True)
class EnergyFit:
    """A fitted energy and how it came about.

    `net`: the module that was given, now with the best averaged weights. `history`: one entry per look at the held-out
    rows: `step`, `loss` (mean of the training loss since the look before), `validation` (None without held-out rows),
    `learning_rate`. `best_step`: where the returned weights are from. `steps`: how many were made; fewer than asked for
    after `max_seconds` or Ctrl-C (`interrupted`). `cost`: rows that went through the network, each once per evaluation
    with its gradients, looks included; `nonfinite`: steps that were left out because their gradient was not finite.
    """

    net: nn.Module
    history: list[dict[str, float | None]]
    best_step: int
    steps: int
    cost: Cost
    interrupted: bool = False


def fit_energy(
    net: nn.Module,
    data: Float[Tensor, "row *event"] | Any,
    loss: str | Loss = "dsm",
    corruption: Corruption | None = None,
    *,
    steps: int = 2000,
    batch_size: int = 256,
    learning_rate: float | int = 1e-3,
    weight_decay: float | int = 0.0,
    ema: float | int = 0.999,
    clip: float | int = 10.0,
    validation: float | int = 0.1,
    max_seconds: float | int | None = None,
    checkpoint: str | Path | None = None,
    progress: bool = False,
    seed: int = 0,
) -> EnergyFit:
    """Train `net`, in place, so that exp(-net) has the score of `data`, [row, *event] (tensor, array, list or frame).

    `loss`: "dsm" (needs `corruption`; `net` becomes the energy of the noisy density and records the noise level as
    `net.corruption`), "sm" (exact score matching, at most 64 coordinates), or your own `loss(energy, batch, generator)`, a
    differentiable scalar. Adam with decoupled `weight_decay`, a cosine learning rate from `learning_rate` to 0, gradient
    norms clipped at `clip`, an exponential moving average of the weights with decay `ema` (less at the beginning, so that
    the start is forgotten). `validation`: share of rows held out; the average with the least held-out loss is returned; 0
    holds out none and returns the last. `max_seconds` stops early. `checkpoint`: a folder, written every two seconds; the
    same call goes on from it after a crash, to the identical result. Ctrl-C returns what exists.

    Raises `InvalidInput` before any work for NaN rows, a ReLU-like network, a wrong output shape, a missing `corruption`
    and settings out of range; `NoisewiseError` when the loss stays non-finite; `RunFolderError` for the folder of another run.
    """
    objective, name = _as_loss(loss, corruption)
    rows = _prepared(net, data)
    if loss == "sm":
        check_trace("exact", rows[0].numel())
    plan = Plan(
        steps=check_count("steps", steps),
        batch_size=check_count("batch_size", batch_size),
        learning_rate=check_positive("learning_rate", learning_rate),
        weight_decay=_share("weight_decay", weight_decay, math.inf),
        ema=_share("ema", ema, 1),
        clip=check_positive("clip", clip),
        validation=_share("validation", validation, 1),
        seed=check_count("seed", seed, 0),
    )
    limit = math.inf if max_seconds is None else check_positive("max_seconds", max_seconds)
    check_curvature(net, rows[:8])
    fit = Fit(net, rows, objective, plan)
    config = {
        **vars(plan),
        "loss": name,
        "corruption": None if corruption is None else [corruption.a, corruption.s],
        "rows": list(rows.shape),
        "data": _fingerprint([rows]),
        "start": _fingerprint(list(net.state_dict().values())),
    }
    folder = None if checkpoint is None else RunFolder(checkpoint)
    if folder is not None and folder.exists:
        stored = folder.restore()
        if stored is not None and stored[1].get("result") == config["start"]:
            # the very network that an earlier call of this run gave back
            config["start"] = folder.config(KIND)["start"]
        folder.expect(KIND, config)
        if stored is not None:
            fit.restore(*stored)
            folder.event("resume", step=fit.step)
    elif folder is not None:
        folder.begin(KIND, config)
        folder.event("begin", rows=len(rows))
    result = fit.run(folder, limit, progress)
    if isinstance(loss, str):
        net.corruption = corruption  # type: ignore[assignment]
    return result


@dataclass(frozen=True)
class Plan:
    """Checked settings of a fit; meanings and defaults as in `fit_energy`."""

    steps: int
    batch_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    ema: float = 0.999
    clip: float = 10.0
    validation: float = 0.1
    seed: int = 0


@dataclass
class Fit:
    """A fit in progress, of any network by any loss. Everything that its future depends on goes into a checkpoint."""

    net: nn.Module
    rows: Tensor
    loss: Loss
    plan: Plan
    step: int = 0
    history: list[dict[str, float | None]] = field(default_factory=list)
    best_step: int = 0
    best_loss: float = math.inf
    failures: int = 0
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        plan, device = self.plan, self.rows.device
        self.names = [name for name, p in self.net.named_parameters() if p.requires_grad]
        self.weights = [p for p in self.net.parameters() if p.requires_grad]
        if not self.weights:
            raise InvalidInput(f"{type(self.net).__name__} has no parameters to train")
        self.optimizer = torch.optim.AdamW(self.weights, lr=plan.learning_rate, weight_decay=plan.weight_decay)
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
        self.held_out, self.training = self.rows[order[:held]], self.rows[order[held:]]
        self.interval = max(1, plan.steps // _LOOKS)

    def run(self, folder: RunFolder | None, limit: float, show: bool) -> EnergyFit:
        """Step to the end, to the time limit, or to Ctrl-C; put the best average into the network."""
        begin = saved = time.monotonic()
        spent = self.cost.seconds
        hook = self.net.register_forward_hook(self._count)
        interrupted = False
        try:
            with Reporter(show) as reporter, gentle_interrupt() as stop:
                while self.step < self.plan.steps and not stop.is_set() and time.monotonic() - begin < limit:
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
                    if folder is not None and time.monotonic() - saved > _CHECKPOINT_SECONDS:
                        folder.checkpoint(*self.packed())
                        saved = time.monotonic()
                interrupted = stop.is_set()
                tensors, values = self.packed()
                if self.step and not self.best_step:
                    # stopped before the first look: the checkpoint does not know of this one, so going on stays identical
                    self._look()
        finally:
            hook.remove()
        self._set(self.best)
        self.net.zero_grad(set_to_none=True)
        if folder is not None:
            folder.checkpoint(tensors, values | {"result": _fingerprint(list(self.net.state_dict().values()))})
            folder.event("interrupted" if interrupted else "stopped", step=self.step)
        return EnergyFit(self.net, list(self.history), self.best_step, self.step, self.cost, interrupted)

    def _advance(self) -> None:
        """One step of Adam on one batch, the average, and a look at the held-out rows when it is time."""
        plan = self.plan
        rate = plan.learning_rate * (1 + math.cos(math.pi * self.step / plan.steps)) / 2
        size = min(plan.batch_size, len(self.training))
        picked = torch.randint(len(self.training), (size,), device=self.rows.device, generator=self.generator)
        self.optimizer.zero_grad(set_to_none=True)
        value = self.loss(self.net, self.training[picked], self.generator)
        if not isinstance(value, Tensor) or value.ndim or not value.requires_grad:
            raise InvalidInput(f"a loss must return a differentiable scalar tensor, got {value!r}")
        value.backward()
        norm = nn.utils.clip_grad_norm_(self.weights, plan.clip)
        if math.isfinite(float(norm)) and math.isfinite(float(value.detach())):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
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

    def _look(self, rate: float | None = None) -> None:
        """Held-out loss of the average; the best average is kept."""
        held: float | None = None
        if len(self.held_out):
            # the same random numbers at every look, so that looks can be compared
            fixed = torch.Generator(device=self.rows.device).manual_seed(self.plan.seed + 1_000_003)
            own = [weight.detach().clone() for weight in self.weights]
            self._set(self.average)
            parts = self.held_out[:_HELD_OUT_ROWS].split(_LOOK_ROWS)
            total = sum(len(part) * float(self.loss(self.net, part, fixed).detach()) for part in parts)
            held = total / sum(map(len, parts))
            self._set(own)
        if held is None or (math.isfinite(held) and held < self.best_loss) or not self.best_step:
            self.best_loss = math.inf if held is None or not math.isfinite(held) else held
            self.best, self.best_step = [mean.clone() for mean in self.average], self.step
        trained, number = self.sum.tolist()
        entry = {"step": float(self.step), "loss": trained / number if number else None, "validation": held}
        self.history.append({**entry, "learning_rate": rate})
        self.sum.zero_()

    @torch.no_grad()
    def _set(self, values: list[Tensor]) -> None:
        for weight, value in zip(self.weights, values, strict=True):
            weight.copy_(value)

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
        names = ("step", "history", "best_step", "failures")
        progress = {name: getattr(self, name) for name in names} | {"cost": vars(self.cost)}
        progress["history"] = list(self.history)
        tensors = {name: value.detach().clone() for name, value in tensors.items()}
        return tensors, progress | {"best_loss": None if math.isinf(self.best_loss) else self.best_loss}

    def restore(self, tensors: dict[str, Tensor], progress: dict[str, Any]) -> None:
        """The inverse of `packed`."""
        for name in ("step", "history", "best_step", "failures"):
            setattr(self, name, progress[name])
        self.cost = Cost(**progress["cost"])
        self.best_loss = math.inf if progress["best_loss"] is None else progress["best_loss"]
        device = self.rows.device
        self.generator.set_state(tensors["generator"])
        self.sum = tensors["sum"].to(device)
        self._set([tensors[f"weight.{name}"] for name in self.names])
        self.average = [tensors[f"average.{name}"].to(device) for name in self.names]
        self.best = [tensors[f"best.{name}"].to(device) for name in self.names]
        for weight, name in zip(self.weights, self.names, strict=True):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"adam.{key}.{name}" in tensors]
            if keys:
                # the step counter stays on the CPU, as the optimiser keeps it
                self.optimizer.state[weight] = {
                    key: tensors[f"adam.{key}.{name}"].to("cpu" if key == "step" else device) for key in keys
                }


def _as_loss(loss: Any, corruption: Corruption | None) -> tuple[Loss, str]:
    if loss not in ("dsm", "sm") and not callable(loss):
        raise InvalidInput(
            f'unknown loss: {loss!r}; it must be "dsm", "sm" or a callable loss(energy, batch, generator)'
        )
    if loss == "dsm":
        if corruption is None:
            raise InvalidInput('loss="dsm" needs the noise level: corruption=Corruption(a=1.0, s=...)')
        return lambda energy, x, generator: dsm_loss(energy, x, corruption, generator), "dsm"
    if corruption is not None:
        raise InvalidInput(f'corruption belongs to loss="dsm" and would do nothing for loss={loss!r}')
    if loss == "sm":
        return lambda energy, x, generator: score_matching_loss(energy, x, "exact", generator), "sm"
    return loss, getattr(loss, "__qualname__", type(loss).__name__)


def _prepared(net: Any, data: Any) -> Tensor:
    """The rows in the dtype and on the device of the network, after the checks of both."""
    if not isinstance(net, nn.Module):
        raise InvalidInput(
            f"net must be an EnergyNet or a torch.nn.Module that gives energies, got {type(net).__name__}"
        )
    check_smooth(net)
    data = as_rows(data)
    check_rows(data)
    first = next(net.parameters(), None)
    return data if first is None else data.to(first)


def _share(name: str, value: object, below: float | int) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        limit = "at least 0" if math.isinf(below) else f"in [0, {below:g})"
        raise InvalidInput(f"{name} must be {limit}, got {value!r}")
    return float(value)


def _fingerprint(tensors: list[Tensor]) -> float:
    """One number that differs between different contents, so that a checkpoint is not continued from others."""
    flat = torch.cat([tensor.detach().double().cpu().flatten() for tensor in tensors])
    return float((flat * torch.linspace(1, 2, len(flat), dtype=torch.float64)).sum())


def _losses(entry: dict[str, float | None] | None) -> str:
    """The latest entry of a history in words."""
    pairs = [] if entry is None else [(name, entry[name]) for name in ("loss", "validation")]
    return ", ".join(f"{name} {value:.4g}" for name, value in pairs if value is not None)
