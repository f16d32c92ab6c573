"""`fit_covariance`: trains a covariance head on a frozen diffusion network, on accelerate, with exact resumption."""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from noisewise.diffusion.head import OBJECTIVES, CovarianceHead, weights_of
from noisewise.diffusion.model import DiffusionModel, Prediction, as_diffusion_model
from noisewise.diffusion.rows import Rows, Trajectories, as_rows
from noisewise.diffusion.targets import DataCovariance, along_axes, dct_basis, npr_target, ocm_target, sn_target
from noisewise.errors import InvalidInput, NoisewiseWarning
from noisewise.training import Fit, FitResult, Loss, Plan, accelerator_for, check_share, fingerprint, run_fit
from noisewise.typing import Cost, check_count, check_positive

__all__ = ["fit_covariance", "frozen", "interpolated", "noised"]

_KIND = "covariance fit"
# levels at which the tables of a head are measured, the least rows and entries at each, and how many rows at once
_GRID, _ROWS, _ENTRIES, _CHUNK = 50, 256, 8192, 64
# below this a mean relative variance is rounding; only data-free tables, which may be negative, come near it
_LEAST = 1e-5
# a network that predicts no noise at all is off by 1, and random weights of diffusers' networks by at most 1.2; well-trained
# ones by 2 where their data are on another scale
_FOREIGN = 1.5
# share of the steps of "ocm_residual" that regress the network's derivative, before the residuals correct it
_OCM_SHARE = 0.7
# a fingerprint of the data looks at about so many numbers
_FINGERPRINT = 2**20


def fit_covariance(
    model: nn.Module | DiffusionModel,
    head: CovarianceHead,
    data: Any = None,
    objective: str | None = None,
    *,
    noise_schedule: Any = None,
    probes: int = 1,
    control_variate: bool = False,
    steps: int = 5000,
    batch_size: int = 128,
    learning_rate: float | int = 1e-3,
    ema: float | int = 0.999,
    validation: float | int = 0.05,
    patience: int = 0,
    max_seconds: float | int | None = None,
    resume: str | Path | None = None,
    mixed_precision: str | None = None,
    accelerator: Any = None,
    progress: bool = False,
    seed: int = 0,
) -> FitResult:
    """Train `head`, in place, to say the posterior variance of x0 in the units of noise; `model` is not changed.

    `data`: clean events [row, *event] on the scale that the model was trained on, a Dataset of such events, or of tuples
    (x, class_labels) or of dicts whose other entries the network takes by name; None fits "ocm" on the model's own
    trajectories. `noise_schedule`: the scheduler that the model was trained with.
    `objective`: "ocm", the paper's, regresses the diagonal of the network's own derivative by `probes` random signs (backward
    passes). "residual_nll" fits the squared error of the predicted noise as a Gaussian likelihood, without a backward pass; its
    held-out bounds were the best of our comparison, so it is the default, but for "ocm" without data or with an unconstrained
    head. "ocm_residual" is the first for 70 % of the steps, then the second, which adds
    the error of the mean to what the derivative says. "npr" is the same by squared error; "sn" the squared noise; "vlb" a range
    between the two fixed variances (improved DDPM); "analytic" trains nothing and only measures one number a level.
    `control_variate`: subtract from the probes what they would give for the covariance of the data ("ocm" with data).
    `patience`: looks at the held-out loss (25 in a fit) without a better one before the fit ends; 0 is never. `resume`: a
    folder, from which the same call goes on to the identical result after a crash. `mixed_precision`: "no" or "bf16", for the
    head alone; targets are always float32. `accelerator`: your own, for many processes, each of which gets its share of a batch.
    The result's cost counts rows through the model. Ctrl-C returns what exists.

    Warns (`NoisewiseWarning`) where the model's error says that it was not trained on such data.
    Raises `InvalidInput` before long work for data that are not finite or of another shape, a half-precision model ("ocm"),
    a head of another model or schedule; `NoisewiseError` when the loss stays non-finite; `RunFolderError` for another's folder.
    Source: Ou et al., ICLR 2025, arXiv 2406.10808, and for the baselines Bao et al., arXiv 2201.06503 and 2206.07309, Nichol &
    Dhariwal, ICML 2021.
    """
    if objective is None:
        objective = "ocm" if data is None or head.config.parametrization == "linear" else "residual_nll"
    if objective not in OBJECTIVES:
        raise InvalidInput(f"objective must be one of {OBJECTIVES}, got {objective!r}")
    if data is None and objective != "ocm":
        raise InvalidInput(f"objective={objective!r} compares with clean data: give data=; only 'ocm' can go without")
    if control_variate and (objective not in ("ocm", "ocm_residual") or data is None):
        raise InvalidInput("control_variate=True belongs to objective='ocm' with data=, and would do nothing here")
    plan = Plan(
        steps=check_count("steps", steps),
        batch_size=check_count("batch_size", batch_size),
        learning_rate=check_positive("learning_rate", learning_rate),
        ema=check_share("ema", ema, 1),
        validation=check_share("validation", validation, 1),
        patience=check_count("patience", patience, 0),
        seed=check_count("seed", seed, 0),
        clip=math.inf,
    )
    limit = math.inf if max_seconds is None else check_positive("max_seconds", max_seconds)
    probes = check_count("probes", probes)
    known = as_diffusion_model(model, noise_schedule, head.config.site)
    head.check_model(known.network, known.levels, fitting=True)
    _check_precision(known.network)
    if head.config.parametrization == "softplus" and objective == "sn":
        raise InvalidInput(
            "objective='sn' learns E eps^2, from which eps_hat^2 is taken: it needs for_model(parity=True)"
        )
    if head.config.parametrization == "linear" and objective in ("residual_nll", "ocm_residual"):
        raise InvalidInput(f"objective={objective!r} needs a positive variance: for_model(parity=False)")
    event = (head.config.channels, *head.config.event)
    with frozen(known.network):
        generator = torch.Generator(device=head.device).manual_seed(plan.seed + 1)
        rows = Trajectories.of(known, event, generator) if data is None else as_rows(data, event, head.device)
        config = _config(plan, objective, probes, control_variate, rows, head, known, mixed_precision or "no")
        head.register_to_config(objective=objective, weights=config["model"])
        head.train()
        before, begin = known.calls, time.monotonic()
        _fill_tables(head, known, rows, generator, data is None, objective == "analytic")
        control = _control(known, rows, generator) if control_variate else None
        prepared = Cost(energies=known.calls - before, seconds=time.monotonic() - begin)
        if objective == "analytic":
            head.eval()
            return FitResult(head, [], 0, 0, prepared, objective=objective)
        accelerator = accelerator or accelerator_for(mixed_precision, head.device, "diffusion")
        loss: Loss = _HeadLoss(known, head, objective, probes, control)
        measure: Loss | None = None
        settled = 0
        if objective == "ocm_residual":
            first, second = (_HeadLoss(known, head, part, probes, control) for part in ("ocm", "residual_nll"))
            measure = second
            settled = math.ceil(_OCM_SHARE * plan.steps)

            def loss(module: Any, batch: Rows, own: torch.Generator) -> Tensor:
                return (first if fit.step < settled else second)(module, batch, own)

        fit = Fit(
            head, rows, loss, plan, counted=known.network, accelerator=accelerator, measure=measure, settled=settled
        )  # fmt: skip
        result = run_fit(fit, _KIND, config, resume, limit, progress)
    head.eval()
    return replace(result, cost=result.cost + prepared, objective=objective)


@dataclass
class _HeadLoss:
    """The loss of a batch of rows: noise them, ask the network, compare the head's answer with the objective's target."""

    model: DiffusionModel
    head: CovarianceHead
    objective: str
    probes: int
    control: DataCovariance | None

    def __call__(self, module: Any, rows: Rows, generator: torch.Generator) -> Tensor:
        first = 1 if self.objective == "vlb" else 0  # the step to the data has no range
        prediction, clean, eps = noised(self.model, rows, generator, self.objective == "ocm", first)
        if self.objective == "ocm":
            target = ocm_target(prediction, self.probes, generator, self.control)
        elif self.objective == "sn":
            target = sn_target(eps)
        elif self.objective == "npr":
            target = npr_target(prediction, eps)
        prediction.free()
        # through the module itself, so that several processes share gradients
        o = module(prediction.features, prediction.t).float()
        if self.objective == "residual_nll":
            # in units of the level's mean, which are finite at pure noise too
            share = self.head.share(o)
            error = (clean - prediction.clean).square() / self.head.mean_variance(prediction)
            return 0.5 * (error / share + share.log()).flatten(1).sum(1).mean()
        output = self.head.mapped(o, prediction)
        value = self._bound(output, prediction, clean) if self.objective == "vlb" else (output - target).square()
        return value.flatten(1).sum(1).mean()

    def _bound(self, logit: Tensor, prediction: Prediction, clean: Tensor) -> Tensor:
        """KL of one training step, its mean held fixed. Source: Nichol & Dhariwal, ICML 2021, section 3.1."""
        a_t, s_t = self.model.levels.at(prediction.t, clean.double())
        a_s, s_s = self.model.levels.at(prediction.t - 1, clean.double())
        forward = s_t.square() - (a_t / a_s * s_s).square()
        small, gain = forward * s_s.square() / s_t.square(), a_s * forward / s_t.square()
        share = logit.sigmoid()
        log_variance = share * forward.log().to(share) + (1 - share) * small.log().to(share)
        distance = small.to(share) + (gain * (clean - prediction.clean)).square().to(share)
        return 0.5 * (log_variance - small.log().to(share) + distance * (-log_variance).exp() - 1)


def noised(
    model: DiffusionModel, rows: Rows, generator: torch.Generator, graph: bool, first: int = 0, t: int | None = None
) -> tuple[Prediction, Tensor, Tensor]:
    """What `model` says of rows at random levels (or all at `t`), with the clean rows and their noise.

    Rows that are already noisy (trajectories) stay as they are; clean rows and noise are then empty.
    """
    device = rows.x.device
    if rows.t is not None:
        with torch.autocast(device.type, enabled=False):
            return model.predict(rows.x, rows.t, graph, **rows.conditions), rows.x[:0], rows.x[:0]
    batch = len(rows.x)
    if t is None:
        index = torch.randint(first, len(model.levels), (batch,), device=device, generator=generator)
    else:
        index = torch.full((batch,), t, device=device)
    eps = torch.randn(rows.x.shape, device=device, generator=generator)
    a, s = model.levels.at(index, rows.x)
    with torch.autocast(device.type, enabled=False):
        return model.predict(a * rows.x + s * eps, index, graph, **rows.conditions), rows.x, eps


@contextmanager
def frozen(network: nn.Module) -> Iterator[None]:
    """The network in evaluation mode and without gradients of its weights; everything is put back."""
    modes = [(module, module.training) for module in network.modules()]
    wanted = [(weight, weight.requires_grad) for weight in network.parameters()]
    network.eval()
    for weight, _ in wanted:
        weight.requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for weight, grad in wanted:
            weight.requires_grad_(grad)


def _fill_tables(
    head: CovarianceHead, model: DiffusionModel, rows: Any, generator: torch.Generator, by_probes: bool, every: bool
) -> None:
    """`residual` and `gamma` at every level, from a pass over some rows (`every`: all) at each of a grid of levels."""
    a, s = model.levels.a, model.levels.s
    steps = int((a > 0).sum())
    grid = torch.linspace(0, steps - 1, min(steps, _GRID)).round().long().unique().tolist()
    number = len(rows) if every else max(_ROWS, _ENTRIES // math.prod((head.config.channels, *head.config.event)))
    ratio, gamma, least = [], [], []
    for t in grid:
        error, square, sure = _pass(model, rows, generator, t, number, by_probes)
        ratio.append(error)
        gamma.append(square)
        least.append(sure)
    if not by_probes:
        _warn_foreign(model, rows, grid, ratio, least)
    # r is smooth in t, where the variance itself rises twentyfold between two levels of the grid
    smooth = interpolated(grid, torch.tensor(ratio, dtype=torch.float64).log(), steps).exp()
    residual = smooth * (s[:steps] / a[:steps]).square()
    predicted = interpolated(grid, torch.tensor(gamma, dtype=torch.float64), steps)
    # at pure noise, if the schedule ends there, x0 is as uncertain as just before
    head.residual.copy_(torch.cat([residual, residual[-1:].expand(len(a) - steps)]))
    head.gamma.copy_(torch.cat([predicted, predicted[-1:].expand(len(a) - steps)]))


def _pass(
    model: DiffusionModel, rows: Any, generator: torch.Generator, t: int, number: int, by_probes: bool
) -> tuple[float, float, float]:
    """Mean r, mean square of the predicted noise, and what r is at least (4 standard errors), at level t."""
    if by_probes:
        prediction, _, _ = noised(model, rows.near(t, _CHUNK), generator, True)
        ratio = max(float(ocm_target(prediction, 4, generator).mean()), _LEAST)
        prediction.free()
        return ratio, float(prediction.eps.square().mean()), 0.0
    picked = torch.randint(len(rows), (min(number, len(rows)),), generator=generator, device=generator.device)
    if number >= len(rows):
        picked = torch.arange(len(rows), device=generator.device)
    errors, squares = [], []
    for index in picked.split(max(_CHUNK, number // 4)):
        with torch.no_grad():
            prediction, clean, _ = noised(model, rows[index], generator, False, t=t)
        scaled = (clean - prediction.clean) * (prediction.a / prediction.s)
        errors.append(scaled.square().flatten(1).double().mean(1))
        squares.append(prediction.eps.square().flatten(1).double().mean(1))
    error = torch.cat(errors)
    least = float(error.mean() - 4 * error.std() / len(error) ** 0.5)
    return float(error.mean()), float(torch.cat(squares).mean()), least


def _warn_foreign(model: DiffusionModel, rows: Any, grid: list[int], ratio: list[float], least: list[float]) -> None:
    """Say so where the network is further off on these data than one that predicts no noise."""
    # an error of x0 that does not matter is large in units of the least noise, for networks that predict x0 itself
    a, s = model.levels.a, model.levels.s
    known = [
        found
        for found in zip(least, ratio, grid, strict=True)
        if model.levels.prediction != "sample" or s[found[2]] >= a[found[2]]
    ]
    sure, error, worst = max(known, default=(0.0, 0.0, 0))
    if not sure > _FOREIGN:
        return
    x = rows[torch.arange(min(len(rows), _CHUNK))].x
    warnings.warn(
        f"the network's noise is off by {error:.3g} in mean square at t = {worst}, where predicting none would be off by 1: "
        f"these are not the data that it was trained on. They go from {float(x.min()):.3g} to {float(x.max()):.3g}; networks of "
        "images take [-1, 1], as read_images gives. Or noise_schedule and its prediction_type are not those of the training",
        NoisewiseWarning,
        stacklevel=4,
    )


def interpolated(grid: list[int], values: Tensor, steps: int) -> Tensor:
    """`values` [level, ...] of a rising grid of levels, linear in between, at the first `steps` levels."""
    place = torch.arange(steps, dtype=torch.float64)
    known = torch.tensor(grid, dtype=torch.float64)
    right = torch.searchsorted(known, place).clamp(1, len(grid) - 1)
    share = ((place - known[right - 1]) / (known[right] - known[right - 1])).to(values)
    share = share.reshape(-1, *(1,) * (values.ndim - 1))
    return values[right - 1] * (1 - share) + values[right] * share


def _control(model: DiffusionModel, rows: Any, generator: torch.Generator) -> DataCovariance:
    """The control variate of these data, its coefficient fitted at each of a grid of levels."""
    picked = torch.randperm(len(rows), generator=generator, device=generator.device)[:1024]
    x = rows[picked].x
    spectrum = along_axes(x - x.mean(0), [dct_basis(n, x) for n in x.shape[1:]]).square().mean(0)
    steps = len(model.levels)
    control = DataCovariance(spectrum, torch.zeros(steps, dtype=torch.float64))
    grid = torch.linspace(0, steps - 1, min(steps, _GRID // 4)).round().long().unique().tolist()
    found = []
    for t in grid:
        index = torch.randint(len(rows), (min(_CHUNK, len(rows)),), generator=generator, device=generator.device)
        prediction, _, _ = noised(model, rows[index], generator, True, t=t)
        found.append(control.fit_coefficient(prediction, 4, generator))
        prediction.free()
    control.coefficients = interpolated(grid, torch.tensor(found, dtype=torch.float64), steps)
    return control


def _check_precision(network: nn.Module) -> None:
    first = next(network.parameters(), None)
    if first is not None and first.dtype in (torch.float16, torch.bfloat16):
        raise InvalidInput(
            f"the model is {first.dtype}, in which r = 1 - s d eps / d x cancels: fit on model.float(); the head then serves "
            "the half-precision model"
        )


def _config(
    plan: Plan,
    objective: str,
    probes: int,
    control: bool,
    rows: Any,
    head: CovarianceHead,
    model: DiffusionModel,
    precision: str,
) -> dict[str, Any]:
    weights = [value for name, value in head.state_dict().items() if name not in ("residual", "gamma", "a", "s")]
    return {
        **{name: value for name, value in vars(plan).items() if name != "clip"},
        "objective": objective,
        "parametrization": head.config.parametrization,
        "schedule": model.levels.digest,
        "mixed_precision": precision,
        "probes": probes,
        "control_variate": control,
        "rows": len(rows),
        "data": rows.name(_FINGERPRINT),
        "model": weights_of(model.network),
        "start": fingerprint(weights),
    }
