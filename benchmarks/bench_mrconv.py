"""MRConv's speed as ratios: a training step to one plain FFT convolution, memory kept for backward, a merged layer, a stream."""

import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from interleaved import environment, interleaved
from torch import Tensor, nn

from noisewise.files import write_atomically
from noisewise.sequence import LongConv, MRConv, long_conv
from noisewise.sequence.experiments.mrconv.peers import S4D, FreeKernel, MultiresNet, SGConv
from noisewise.sequence.experiments.mrconv.training import kept_for_backward

RESULTS = Path(__file__).parent / "results" / "mrconv.json"
CHANNELS, ROWS, KERNEL_SIZE = 128, 4, 32
LENGTHS = (1024, 4096, 16384)
ROUNDS = {1024: 30, 4096: 12, 16384: 6}
STREAM_ROUNDS, STREAM_STEPS = 20, 64
# a stream in blocks meets its largest FFT once in as many steps as the kernel has lags, so all of them are timed
CYCLES = {1024: 8, 4096: 4, 16384: 2}
FREE = "free kernel"

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def results(pytestconfig):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"training_step": {}, "saved_for_backward": {}, "inference": {}, "stream_step": {}}
    yield found
    torch.set_num_threads(before)
    if all(set(part) == {str(length) for length in LENGTHS} for part in found.values()):
        write_atomically(
            RESULTS, json.dumps({"command": "make bench", "environment": environment(), **found}, indent=2) + "\n"
        )
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + json.dumps(found, indent=2))


class Plain(FreeKernel):
    """One convolution and nothing else."""

    def forward(self, u: Tensor) -> Tensor:
        return long_conv(u, self.taps)


class TorchsDerivative(FreeKernel):
    """The same convolution as everybody writes it, whose derivative torch takes by complex FFTs."""

    def forward(self, u: Tensor) -> Tensor:
        n = 2 * u.shape[-1]
        return torch.fft.irfft(torch.fft.rfft(u, n) * torch.fft.rfft(self.taps, n), n)[..., : u.shape[-1]]


def _layers(length: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        FREE: Plain(CHANNELS, length),
        "free kernel, torch's own derivative": TorchsDerivative(CHANNELS, length),
        "exact statistics": MRConv(CHANNELS, length, "fourier", KERNEL_SIZE),
        "full-support statistics": MRConv(CHANNELS, length, "fourier", KERNEL_SIZE, stats="full"),
        "branches": MRConv(CHANNELS, length, "fourier", KERNEL_SIZE, stats="branches"),
        "norm of kernels": MRConv(CHANNELS, length, "fourier", KERNEL_SIZE, norm="kernel"),
        "exact statistics, dilated": MRConv(CHANNELS, length, "dilated", KERNEL_SIZE),
        "exact statistics, fourier+sparse": MRConv(CHANNELS, length, "fourier+sparse", KERNEL_SIZE),
        "S4D": S4D(CHANNELS, length, 64),
        "SGConv": SGConv(CHANNELS, length, KERNEL_SIZE),
        "MultiresNet": MultiresNet(CHANNELS, length),
    }


def _input(length: int) -> Tensor:
    return torch.randn(ROWS, CHANNELS, length, generator=torch.Generator().manual_seed(0))


def _ratios(variants: dict[str, Callable[[], Any]], base: str, rounds: int) -> dict[str, Any]:
    times = interleaved(variants, rounds)
    return {
        name: _spread([t / b for t, b in zip(own, times[base], strict=True)]) | {"seconds": statistics.median(own)}
        for name, own in times.items()
    }


def _spread(ratios: list[float]) -> dict[str, float]:
    ordered, n = sorted(ratios), len(ratios)
    return {"median": statistics.median(ordered), "low": ordered[n // 10], "high": ordered[-1 - n // 10]}


@pytest.mark.parametrize("length", LENGTHS)
def test_a_training_step_in_plain_convolutions(results, length):
    u = _input(length).requires_grad_(True)
    g = _input(length).flip(0)

    def step(layer: nn.Module) -> None:
        layer.zero_grad(set_to_none=True)
        u.grad = None
        layer(u).backward(g)

    variants = {name: (lambda layer=layer: step(layer)) for name, layer in _layers(length).items()}
    results["training_step"][str(length)] = _ratios(variants, FREE, ROUNDS[length])


@pytest.mark.parametrize("length", LENGTHS)
def test_memory_kept_for_backward(results, length):
    u = _input(length).requires_grad_(True)
    kept = {name: kept_for_backward(layer, u) for name, layer in _layers(length).items()}
    results["saved_for_backward"][str(length)] = {
        name: {"ratio": size / kept[FREE], "mebibytes": size / 2**20} for name, size in kept.items()
    }


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_a_merged_layer_in_plain_convolutions(results, length):
    u = _input(length)
    layers = _layers(length)
    layer = layers["exact statistics"]
    layer(u)
    layer.eval()
    merged = layer.merge()
    variants = {
        FREE: lambda: layers[FREE](u),
        "merged": lambda: merged(u),
        "not merged": lambda: layer(u),
        "S4D, its kernel generated": lambda: layers["S4D"](u),
        "SGConv, its kernel generated": lambda: layers["SGConv"](u),
        "MultiresNet": lambda: layers["MultiresNet"](u),
    }
    results["inference"][str(length)] = _ratios(variants, FREE, ROUNDS[length])


@pytest.mark.parametrize("length", LENGTHS)
@torch.no_grad()
def test_a_stream_step_does_not_grow_with_the_length(results, length):
    variants: dict[str, Callable[[], Any]] = {}
    for kind in ("fourier", "dilated", "sparse", "fourier+sparse"):
        variants[kind] = _stream(_trained(kind, length), length, STREAM_STEPS)
    # the same kernels without what is known of them
    blocks = {"any kernel, in blocks": _stream(_trained("fourier", length).merge(), length, length)}
    results["stream_step"][str(length)] = _each(interleaved(variants, STREAM_ROUNDS), STREAM_STEPS) | _each(
        interleaved(blocks, CYCLES[length]), length
    )


def _each(times: dict[str, list[float]], steps: int) -> dict[str, dict[str, float]]:
    """Seconds of one step, the mean of so many in a row, over rounds."""
    return {name: {key: value / steps for key, value in _spread(own).items()} for name, own in times.items()}


def _trained(kind: str, length: int) -> MRConv:
    layer = MRConv(CHANNELS, length, kind, KERNEL_SIZE)
    layer(torch.randn(1, CHANNELS, length, generator=torch.Generator().manual_seed(0)))
    return layer.eval()


def _stream(layer: MRConv | LongConv, length: int, count: int) -> Callable[[], None]:
    """`count` steps of one row whose ring is full."""
    u = torch.randn(1, CHANNELS, length, generator=torch.Generator().manual_seed(1))
    _, state = layer.prefill(u)

    def steps() -> None:
        for t in range(count):
            layer.step(u[..., t], state)

    return steps
