"""Protocol A: a long kernel out of noisy inputs and outputs, where the prior of a layer is all that is at stake."""

import dataclasses
import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from noisewise.comparison import Problem, System
from noisewise.metrics.measurement import Measurement
from noisewise.sequence.convolution import long_conv
from noisewise.sequence.experiments.mrconv.peers import S4D, FreeKernel, SGConv
from noisewise.sequence.fitting import recalibrate
from noisewise.sequence.layer import MRConv
from noisewise.typing import Cost

__all__ = ["TARGETS", "Identified", "identification_problems", "target_kernels"]

TARGETS = ("smooth", "echoes", "both")
_CHANNELS, _LENGTH, _KERNEL_SIZE, _STATE = 8, 1024, 32, 64
_COSINES, _ECHOES, _FADING = 4, 12, 400.0
_DECAYS = (10.0, 500.0)
_TESTS = 16
# sequences and standard deviation of the noise
_DATA = {"scarce": (2, 0.5), "plenty": (12, 0.3)}
_STEPS = {"quick": 40, "cpu": 200, "paper": 2000}
# cycles a sample of the inputs for half the rate, which could hold twice as much
_BAND, _ONSET = 1 / 8, 64
_MIDDLE, _FAST = (0.03, 0.1, 0.01, 0.3, 0.003), (0.1, 0.03, 0.3, 0.01, 1.0)


class Task(NamedTuple):
    """Noisy training sequences, the true kernels and test sequences without noise."""

    u: Float[Tensor, "row channel length"]
    y: Float[Tensor, "row channel length"]
    kernel: Float[Tensor, "channel lag"]
    tests: Float[Tensor, "row channel length"]


@dataclass(frozen=True)
class Identified:
    """A fitted layer in eval mode, merged where it can be, and `slow`, the same for every second sample.

    `merging`: what merging changed, relative to the outputs.
    """

    layer: nn.Module
    slow: nn.Module
    task: Task
    cost: Cost
    parameters: int
    merging: float | None = None
    notes: tuple[str, ...] = ()


def identification_problems(scale: str) -> tuple[Problem, ...]:
    """Each target with scarce and with plenty data."""
    cells = [("smooth", "scarce")] if scale == "quick" else [(target, data) for target in TARGETS for data in _DATA]
    return tuple(_problem(target, data, scale, index == 0) for index, (target, data) in enumerate(cells))


def target_kernels(name: str, seed: int) -> Float[Tensor, "channel lag"]:
    """Unit-norm kernels of each channel: damped cosines ("smooth"), sparse fading taps ("echoes"), or their sum ("both")."""
    generator = torch.Generator().manual_seed(31_000 + seed)
    made = torch.zeros(_CHANNELS, _LENGTH, dtype=torch.float64)
    if name in ("smooth", "both"):
        made += _unit(_damped_cosines(generator))
    if name in ("echoes", "both"):
        made += _unit(_echoes(generator))
    return _unit(made)


def _damped_cosines(generator: torch.Generator) -> Tensor:
    lag = torch.arange(_LENGTH, dtype=torch.float64)
    shape = (_CHANNELS, _COSINES, 1)
    low, high = map(math.log, _DECAYS)
    decay = (low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)).exp()
    # a few cycles in each decay time, so that every cosine is a smooth one
    frequency = 2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64) / decay
    phase = 2 * math.pi * torch.rand(shape, generator=generator, dtype=torch.float64)
    height = torch.randn(shape, generator=generator, dtype=torch.float64) / decay.sqrt()
    return (height * (-lag / decay).exp() * (frequency * lag + phase).cos()).sum(1)


def _echoes(generator: torch.Generator) -> Tensor:
    made = torch.zeros(_CHANNELS, _LENGTH, dtype=torch.float64)
    for row in made:
        lags = torch.randperm(_LENGTH, generator=generator)[:_ECHOES]
        row[lags] = torch.randn(_ECHOES, generator=generator, dtype=torch.float64) * (-lags / _FADING).exp()
    return made


def _unit(kernels: Tensor) -> Tensor:
    return kernels / kernels.norm(dim=-1, keepdim=True)


@functools.lru_cache(maxsize=4)
def _task(target: str, data: str, seed: int) -> Task:
    rows, noise = _DATA[data]
    kernel = target_kernels(target, seed)
    generator = torch.Generator().manual_seed(32_000 + seed)
    u = torch.randn(rows, _CHANNELS, _LENGTH, generator=generator, dtype=torch.float64)
    y = long_conv(u, kernel) + noise * torch.randn(u.shape, generator=generator, dtype=torch.float64)
    tests = torch.randn(_TESTS, _CHANNELS, _LENGTH, generator=generator, dtype=torch.float64)
    return Task(u.float(), y.float(), kernel.float(), tests.float())


# ---- systems


def _mrconv(kind: str, frozen: tuple[str, ...] = (), **options: Any) -> Callable[[int], nn.Module]:
    def make(seed: int) -> nn.Module:
        layer = MRConv(
            _CHANNELS, _LENGTH, kind, **{"kernel_size": _KERNEL_SIZE, "seed": seed, "skip": False, **options}
        )
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
        return layer

    return make


def _peer(make: Callable[[], nn.Module]) -> Callable[[int], nn.Module]:
    def seeded(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layer: Any = make()
        # beside a kernel whose lag 0 is free a skip means nothing, until the kernel is stretched to another rate
        layer.skip.detach().zero_()
        layer.skip.requires_grad_(False)
        return layer

    return seeded


_SYSTEMS: dict[str, tuple[Callable[[int], nn.Module], tuple[float, ...]]] = {
    "MRConv fourier": (_mrconv("fourier"), _FAST),
    "MRConv dilated": (_mrconv("dilated"), _FAST),
    "MRConv sparse": (_mrconv("sparse"), _FAST),
    "MRConv fourier+sparse": (_mrconv("fourier+sparse"), _FAST),
    "free kernel": (_peer(lambda: FreeKernel(_CHANNELS, _LENGTH)), _MIDDLE),
    "S4D": (_peer(lambda: S4D(_CHANNELS, _LENGTH, _STATE)), _MIDDLE),
    "SGConv": (_peer(lambda: SGConv(_CHANNELS, _LENGTH, _KERNEL_SIZE)), _FAST),
}
# of the first system, one thing changed
_ABLATIONS: dict[str, tuple[Callable[[int], nn.Module], tuple[float, ...]]] = {
    "fourier, by branches": (_mrconv("fourier", stats="branches"), _FAST),
    "fourier, full statistics": (_mrconv("fourier", stats="full"), _FAST),
    "fourier, norm of kernels": (_mrconv("fourier", norm="kernel"), _FAST),
    "fourier, alpha frozen": (_mrconv("fourier", ("alpha",)), _FAST),
    "fourier, one resolution": (_mrconv("fourier", kernel_size=_LENGTH, modes=6 * _KERNEL_SIZE // 2), _FAST),
    "dense in branches": (_mrconv("dense"), _FAST),
}


def _problem(target: str, data: str, scale: str, first: bool) -> Problem:
    named = _SYSTEMS | _ABLATIONS if target == "smooth" and scale != "quick" else _SYSTEMS
    systems = tuple(
        System(name, functools.partial(_identify, make, target, data), tuple({"learning_rate": r} for r in rates))
        for name, (make, rates) in named.items()
    )
    return Problem(
        protocol="A",
        name=f"kernel, {target}, {data}",
        budget=_STEPS[scale],
        systems=systems,
        measure=functools.partial(_columns, smooth=target == "smooth"),
        criterion="NMSE",
        picture=_picture,
        notes=(_note(scale),) if first else (),
    )


def _identify(
    make: Callable[[int], nn.Module], target: str, data: str, budget: float | int, seed: int, learning_rate: float
) -> Identified:
    """Full-batch AdamW for `budget` steps, cosine to 0."""
    task, layer, steps = _task(target, data, seed), make(seed), int(budget)
    weights = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    begin = time.monotonic()
    for _ in range(steps):
        loss = (layer(task.u) - task.y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    cost = Cost(gradients=steps * len(task.u), seconds=time.monotonic() - begin)
    count = sum(p.numel() for p in layer.parameters())
    recalibrate(layer, [task.u])
    slow = layer.eval().at_rate(0.5)  # type: ignore[operator]
    if not isinstance(layer, MRConv):
        return Identified(layer, slow, task, cost, count)
    return Identified(layer.merge(), slow, task, cost, count, _merging(layer, task))


@torch.no_grad()
def _merging(layer: MRConv, task: Task) -> float:
    apart = layer(task.tests)
    return float((layer.merge()(task.tests) - apart).abs().max() / apart.std())


# ---- measurements


@torch.no_grad()
def _columns(found: Identified, smooth: bool) -> dict[str, Measurement]:
    tests, band, kernel = found.task.tests, _in_band(found.task.tests), found.task.kernel
    slow, slow_truth = band[..., ::2], long_conv(band, kernel)[..., ::2]
    # only a smooth kernel is about itself at half the rate
    floor = _nmse(long_conv(slow, 2 * kernel[..., ::2]), slow_truth).value if smooth else 0.0
    made = {
        "NMSE": _nmse(found.layer(tests), long_conv(tests, kernel)),
        "NMSE at half the rate": dataclasses.replace(_nmse(found.slow(slow), slow_truth), floor=floor),
        "parameters": Measurement(found.parameters, better="neither"),
        "training seconds": Measurement(found.cost.seconds),
    }
    if found.merging is not None:
        made["merge difference"] = Measurement(found.merging, floor=0.0)
    return made


def _nmse(y: Tensor, truth: Float[Tensor, "row channel length"]) -> Measurement:
    error = (y - truth).square().mean((0, 2)) / truth.var((0, 2))
    return Measurement(float(error.mean()), float(error.std()) / math.sqrt(len(error)), floor=0.0, n=len(error))


def _in_band(u: Float[Tensor, "row channel length"]) -> Float[Tensor, "row channel length"]:
    """Without high frequencies, and beginning softly, which would be heard at all frequencies otherwise."""
    spectrum = torch.fft.rfft(u)
    spectrum[..., round(_BAND * u.shape[-1]) :] = 0
    onset = (torch.arange(u.shape[-1]) / _ONSET).clamp(max=1)
    return torch.fft.irfft(spectrum, u.shape[-1]) * torch.sin(math.pi / 2 * onset).square()


@torch.no_grad()
def _picture(found: Identified) -> dict[str, Any]:
    """The kernel of the first channel and the true one, from the answer to an impulse."""
    impulse = torch.zeros(1, _CHANNELS, _LENGTH)
    answer = found.layer(impulse)
    impulse[..., 0] = 1
    kernel = (found.layer(impulse) - answer)[0, 0]
    return {"kernel": kernel.tolist(), "truth": found.task.kernel[0].tolist()}


def _note(scale: str) -> str:
    data = "; ".join(f"{name}: {rows} sequences, noise {noise:g}" for name, (rows, noise) in _DATA.items())
    return (
        f"kernels: {_CHANNELS} channels of {_LENGTH} lags and unit norm, white inputs ({data}), {_TESTS} test sequences without "
        f"noise; all systems {_STEPS[scale]} full-batch steps of AdamW, cosine, five learning rates tried for each; standard "
        "errors over channels, which have kernels of their own. MRConv is measured by its merged kernel. At half the "
        "rate: without training, every kernel stretched by its own layer's rule, inputs without high frequencies, every second "
        "sample of them and of the true outputs; the floor of smooth ones is every second lag of the true kernel."
    )
