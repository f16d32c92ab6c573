"""The systems that classify sequences: one model with a layer of each kind, trained by `fit_sequence`, measured on test rows."""

import copy
import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from noisewise.comparison import System
from noisewise.metrics.measurement import Measurement
from noisewise.sequence.experiments.mrconv.peers import (
    GRU,
    S4D,
    BothWays,
    DilatedStack,
    FreeKernel,
    SGConv,
    Transformer,
)
from noisewise.sequence.fitting import fit_sequence
from noisewise.sequence.layer import MRConv
from noisewise.sequence.model import SequenceModel
from noisewise.typing import Cost

__all__ = [
    "Shape",
    "Split",
    "Trained",
    "classified",
    "columns",
    "decimated",
    "kept_for_backward",
    "majority",
    "matched",
    "models",
    "network",
    "pace",
    "shaped_like",
    "stretched",
]

_BATCH, _EVALUATED = 32, 100
# steps and rounds that tell how fast a system trains beside another
_PACE_STEPS, _PACE_ROUNDS = 8, 5
# Where there is a kernel, it learns at the rate of the rest: the S4 family's 0.001 for kernels is made for long training, and so
# few epochs want more. The middle ones come first, for scales that tune nothing.
_RATES = tuple({"lr": lr} for lr in (3e-2, 1e-1, 1e-2, 3e-1))
_RATES_OF = {
    "dilated CNN": tuple({"lr": lr} for lr in (1e-2, 3e-2, 3e-3, 1e-1)),
    "GRU": tuple({"lr": lr} for lr in (1e-2, 3e-2, 3e-3, 1e-1)),
    "transformer": tuple({"lr": lr} for lr in (3e-3, 1e-2, 1e-3, 3e-2)),
}


class Split(NamedTuple):
    """Rows to train on and rows to test on, with the valid steps of each where they differ."""

    x: Tensor
    y: Int[Tensor, " row"]
    test_x: Tensor
    test_y: Int[Tensor, " test"]
    lengths: Int[Tensor, " row"] | None = None
    test_lengths: Int[Tensor, " test"] | None = None


@dataclass(frozen=True)
class Shape:
    """What all models of a problem share; `length` in steps of the input."""

    length: int
    classes: int = 10
    d_input: int = 1
    d_model: int = 24
    n_layers: int = 2
    patch: int = 1
    vocabulary: int | None = None
    kernel_size: int = 32
    dropout: float = 0.0
    block_norm: str = "layer"
    prenorm: bool = True
    bidirectional: bool = False

    @property
    def steps(self) -> int:
        """That the layers see."""
        return -(-self.length // self.patch)


@dataclass(frozen=True)
class Trained:
    """Which test rows a trained model has right; `changed`: predictions that merging changed; `kept`: bytes for backward."""

    right: Bool[Tensor, " test"]
    cost: Cost
    model: nn.Module | None = None
    parameters: int = 0
    kept: int | None = None
    changed: int | None = None
    at_other_rate: Bool[Tensor, " test"] | None = None
    notes: tuple[str, ...] = ()


# ---- models

# what stands in the blocks, by name: options of MRConv, or a layer
_LAYERS: dict[str, Callable[[Shape], dict[str, Any]]] = {
    "MRConv fourier": lambda s: {"kind": "fourier", "kernel_size": s.kernel_size},
    "MRConv fourier+sparse": lambda s: {"kind": "fourier+sparse", "kernel_size": s.kernel_size // 2},
    "MRConv dilated": lambda s: {"kind": "dilated", "kernel_size": s.kernel_size},
    "MRConv sparse": lambda s: {"kind": "sparse", "kernel_size": s.kernel_size},
    "MRConv fourier, full statistics": lambda s: {"kind": "fourier", "kernel_size": s.kernel_size, "stats": "full"},
    "S4D": lambda s: {"layer": functools.partial(S4D, state=64)},
    "SGConv": lambda s: {"layer": functools.partial(SGConv, kernel_size=s.kernel_size)},
    "dilated CNN": lambda s: {"layer": functools.partial(DilatedStack, taps=8)},
    "free kernel": lambda s: {"layer": FreeKernel},
    "GRU": lambda s: {"layer": lambda d_model, length: GRU(d_model)},
    # the two layers of the encoder come one behind the other, then a block's gate
    "transformer": lambda s: {"layer": functools.partial(Transformer, layers=s.n_layers, heads=2), "n_layers": 1},
}


def network(name: str, shape: Shape, seed: int) -> SequenceModel:
    """The model whose blocks hold the layer of that name."""
    options: dict[str, Any] = {"n_layers": shape.n_layers, **_LAYERS[name](shape)}
    if shape.bidirectional:
        options |= {"layer": BothWays.of(options["layer"])} if "layer" in options else {"bidirectional": True}
    return SequenceModel(
        shape.d_input, shape.classes, shape.length, d_model=shape.d_model, patch=shape.patch, vocabulary=shape.vocabulary,
        dropout=shape.dropout, block_norm=shape.block_norm, prenorm=shape.prenorm, seed=seed, **options,
    )  # fmt: skip


def models(
    names: tuple[str, ...], shape: Shape, split: Callable[[int], Split], rate: float | None = None,
    settings: tuple[dict[str, Any], ...] | None = None, device: str = "cpu", **options: Any,
) -> tuple[System, ...]:  # fmt: skip
    """A system for each name, whose budget is epochs.

    `split(seed)`: the rows. `rate`: also tested at that rate. `settings`: to tune over, by default four for each. `options`: of
    `fit_sequence`.
    """

    def system(name: str) -> System:
        def draw(budget: float | int, seed: int, lr: float, kernel_lr: float | None = None) -> Trained:
            rows, model = split(seed), network(name, shape, seed).to(device)
            cost = _fitted(model, rows, budget, seed, lr, lr if kernel_lr is None else kernel_lr, options)
            return _tested(name, model, rows, cost, rate)

        return System(name, draw, settings or _RATES_OF.get(name, _RATES))

    return tuple(system(name) for name in names)


def matched(names: tuple[str, ...], reference: str, shape: Shape, split: Callable[[int], Split]) -> tuple[System, ...]:
    """Systems as wide as gives them about the parameters of `reference`, and trained for about its time.

    The budget is epochs of `reference`; how many the others have in that time is measured on the spot, side by side.
    """

    def system(name: str) -> System:
        own = shaped_like(reference, name, shape)

        def draw(budget: float | int, seed: int, lr: float) -> Trained:
            rows, model = split(seed), network(name, own, seed)
            epochs = budget if name == reference else budget / pace(name, own, reference, shape)
            cost = _fitted(model, rows, epochs, seed, lr, lr, {})
            trained = _tested(name, model, rows, cost, None)
            return dataclasses.replace(trained, notes=(f"{own.d_model} channels, {epochs:.3g} epochs",))

        return System(name, draw, _RATES_OF.get(name, _RATES))

    return tuple(system(name) for name in names)


def shaped_like(reference: str, name: str, shape: Shape) -> Shape:
    """`shape` with the even width at which the model called `name` comes nearest to the parameters of `reference`."""

    def size(of: str, width: int) -> int:
        return sum(p.numel() for p in network(of, dataclasses.replace(shape, d_model=width), 0).parameters())

    wanted = size(reference, shape.d_model)
    widths = range(4, 4 * shape.d_model, 2)
    return dataclasses.replace(shape, d_model=min(widths, key=lambda width: abs(size(name, width) - wanted)))


@functools.lru_cache(maxsize=64)
def pace(name: str, own: Shape, reference: str, shape: Shape) -> float:
    """Processor time of a training step of `name` in those of `reference`, the median of rounds in which they take turns."""
    x = torch.randn(_BATCH, shape.d_input, shape.length, generator=torch.Generator().manual_seed(0))
    rows = Split(x, torch.arange(_BATCH) % shape.classes, x, torch.arange(_BATCH) % shape.classes)

    def seconds(of: str, its: Shape) -> float:
        model, begin = network(of, its, 0), time.process_time()
        _fitted(model, rows, _PACE_STEPS, 0, 1e-3, 1e-3, {})
        return time.process_time() - begin

    seconds(name, own), seconds(reference, shape)
    return statistics.median(seconds(name, own) / seconds(reference, shape) for _ in range(_PACE_ROUNDS))


def _fitted(
    model: SequenceModel,
    rows: Split,
    epochs: float | int,
    seed: int,
    lr: float,
    kernel_lr: float,
    options: dict[str, Any],
) -> Cost:
    for part in model.modules():
        for parameter in getattr(part, "of_kernel", ()):
            part.get_parameter(parameter)._optim = {"lr": kernel_lr, "weight_decay": 0.0}  # type: ignore[attr-defined]
    data = (rows.x, rows.y) if rows.lengths is None else (rows.x, rows.y, rows.lengths)
    usual = {"batch_size": _BATCH, "weight_decay": 0.01, "label_smoothing": 0.05, "validation": 0.0}
    return fit_sequence(model, data, epochs=epochs, lr=lr, kernel_lr=kernel_lr, seed=seed, **{**usual, **options}).cost


def _tested(name: str, model: SequenceModel, rows: Split, cost: Cost, rate: float | None) -> Trained:
    count = sum(p.numel() for p in model.parameters())
    device = next(model.parameters()).device
    batch = {} if rows.lengths is None else {"lengths": rows.lengths[:_BATCH].to(device)}
    kept = kept_for_backward(model, rows.x[:_BATCH].to(device), **batch)
    predicted = classified(model, rows.test_x, rows.test_lengths)
    changed, used = None, predicted
    if name.startswith("MRConv"):
        used = classified(model.merge(), rows.test_x, rows.test_lengths)
        changed = int((used != predicted).sum())
    other = None
    if rate is not None:
        every = round(1 / rate)
        ends = None if rows.test_lengths is None else -(-rows.test_lengths // every)
        other = classified(stretched(model, rate), decimated(rows.test_x, every), ends) == rows.test_y
    return Trained(used == rows.test_y, cost, model, count, kept, changed, other)


def majority(split: Callable[[int], Split]) -> System:
    """The most frequent class of the training rows, whatever the input."""

    def draw(budget: float | int, seed: int) -> Trained:
        rows = split(seed)
        return Trained(rows.test_y == rows.y.mode().values, Cost())

    return System("majority class", draw)


def stretched(model: SequenceModel, rate: float) -> SequenceModel:
    """A copy for signals of `rate` times as many samples a second, whichever layer it has."""
    layers: list[Any] = [block.layer for block in model.blocks]
    if isinstance(layers[0], MRConv):
        return model.at_rate(rate)
    made = copy.deepcopy(model).eval()
    for block, layer in zip(made.blocks, layers, strict=True):
        block.layer = layer.at_rate(rate)
    return made


def decimated(x: Float[Tensor, "row channel length"], by: int = 2) -> Float[Tensor, "row channel fewer"]:
    """Every `by`-th sample, after all frequencies that would fold were taken out by an FFT."""
    kept = torch.fft.rfft(x)[..., : x.shape[-1] // by // 2 + 1].clone()
    # the new Nyquist frequency stands once in a real series
    kept[..., -1] = 0
    return torch.fft.irfft(kept, x.shape[-1] // by) / by


@torch.no_grad()
def classified(model: nn.Module, x: Tensor, lengths: Tensor | None = None) -> Int[Tensor, " row"]:
    """The most probable class of each row, in eval mode."""
    model.eval()
    device, found = next(iter(model.state_dict().values())).device, []
    for rows in torch.arange(len(x)).split(_EVALUATED):
        batch = {} if lengths is None else {"lengths": lengths[rows].to(device)}
        found.append(model(x[rows].to(device), **batch).argmax(-1).cpu())
    return torch.cat(found)


def kept_for_backward(module: nn.Module, x: Tensor, **options: Any) -> int:
    """Bytes that autograd keeps of a forward pass in train mode; shared storages count once, parameters not at all.

    Changes no statistics of `module`, which is in eval mode afterwards.
    """
    copied = copy.deepcopy(module).train()
    own = {p.untyped_storage().data_ptr() for p in copied.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.random.fork_rng(devices=[]), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # the graph lives until here, so that no storage is taken twice
        y = copied(x, **options)
    del y
    return sum(kept.values())


# ---- measurements


def columns(found: Trained) -> dict[str, Measurement]:
    """Accuracy on test rows, of the merged model where there is one, and what it took."""
    made = {"accuracy, %": _share(found.right)}
    if found.model is None:
        return made
    if found.changed is not None:
        made["changed by merging"] = Measurement(found.changed, floor=0.0, n=len(found.right))
    if found.at_other_rate is not None:
        made["accuracy at half the rate, %"] = _share(found.at_other_rate)
    return made | {
        "training seconds": Measurement(found.cost.seconds),
        "parameters": Measurement(found.parameters, better="neither"),
        "kept for backward, MiB": Measurement((found.kept or 0) / 2**20),
    }


def _share(right: Bool[Tensor, " test"]) -> Measurement:
    n, p = len(right), float(right.double().mean())
    return Measurement(100 * p, 100 * math.sqrt(p * (1 - p) / n), n=n, better="higher")
