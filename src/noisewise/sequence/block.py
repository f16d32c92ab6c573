"""A residual block around a long convolution, and what is done to every convolution of a module: merging, learning rates."""

import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.sequence.kernels import SubKernels
from noisewise.sequence.layer import MRConv, check_options
from noisewise.sequence.merged import LongConv
from noisewise.sequence.signals import valid_steps
from noisewise.training import check_share
from noisewise.typing import check_count

__all__ = [
    "BLOCK_NORMS",
    "LayerOf",
    "MRConvBlock",
    "make_norm",
    "merge_layers",
    "parameter_groups",
    "replace_layers",
    "takes_lengths",
]

BLOCK_NORMS = ("layer", "batch")
LayerOf = Callable[[int, int], nn.Module]


class MRConvBlock(nn.Module):
    """x -> MRConv -> GELU -> dropout -> linear -> GLU -> + x -> norm for (batch, d_model, length); `prenorm` has the norm first.

    `dropout` takes whole channels, at all steps alike. `block_norm`: "layer", over the channels of each step, or "batch". Other
    `options` are those of `MRConv`. `layer`: another layer in its place, made by `layer(d_model, length)`, which maps
    (batch, d_model, length) to the same shape and may take `lengths=`. `seed`: weights are drawn by a generator of their own.
    Raises `InvalidInput` for arguments that do not fit.
    Source: Cunningham et al., NeurIPS 2024 (arXiv 2408.09453), figure 2.
    """

    def __init__(
        self, d_model: int, length: int, *, dropout: float | int = 0.0, prenorm: bool = True, block_norm: str = "layer",
        layer: LayerOf | None = None, seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if layer is not None and options:
            raise InvalidInput(
                f"{', '.join(sorted(options))} would do nothing: they belong to MRConv, and layer= stands in its place"
            )
        check_options(options, taken=("d_model", "length", "seed"))
        self.prenorm = prenorm
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = MRConv(d_model, length, seed=seed, **options) if layer is None else layer(d_model, length)
            self.layer = made
            self.activation = nn.GELU()
            self.dropout = nn.Dropout1d(check_share("dropout", dropout, 1))
            self.pointwise = nn.Conv1d(check_count("d_model", d_model), 2 * d_model, 1)
            self.gate = nn.GLU(dim=1)
            self.norm = make_norm(block_norm, d_model)

    def forward(
        self, x: Float[Tensor, "batch channel length"], state: Any = None, lengths: Int[Tensor, " batch"] | None = None
    ) -> Any:
        """An output of the shape of `x`; (output, state) where a `state` of `init_state` is given.

        `lengths`: valid steps of each row; what lies behind is neither read nor, in the output, anything but 0.
        """
        if state is not None:
            self._check_stream("forward")
            y, state = self.layer(self._before(x, None), state)
            return self._after(x, y, None), state
        mask = valid_steps(x, lengths)
        u = self._before(x, mask)
        y = self.layer(u, lengths=lengths) if mask is not None and takes_lengths(self.layer) else self.layer(u)
        if y.shape != x.shape:
            raise InvalidInput(
                f"{type(self.layer).__name__} made shape {tuple(y.shape)} of {tuple(x.shape)}: a layer keeps the shape"
            )
        return self._after(x, y, mask)

    def init_state(self, batch: int) -> Any:
        """A stream of `batch` rows before its first input; as `MRConv.init_state`."""
        self._check_stream("init_state")
        return self.layer.init_state(batch)  # type: ignore[operator]

    def step(self, x_t: Float[Tensor, "batch channel"], state: Any) -> tuple[Float[Tensor, "batch channel"], Any]:
        """The output of one more input of each row. `state` is changed in place and returned."""
        self._check_stream("step")
        x = x_t.unsqueeze(-1)
        y, state = self.layer.step(self._before(x, None).squeeze(-1), state)  # type: ignore[operator]
        return self._after(x, y.unsqueeze(-1), None).squeeze(-1), state

    def prefill(self, x: Float[Tensor, "batch channel length"]) -> tuple[Float[Tensor, "batch channel length"], Any]:
        """All outputs of `x` at once, of any length, and the state to go on from."""
        return self(x, self.init_state(len(x)))

    def extra_repr(self) -> str:
        """Where its norm stands."""
        return f"prenorm={self.prenorm}"

    def _before(self, x: Tensor, mask: Bool[Tensor, "batch 1 length"] | None) -> Tensor:
        """What the layer reads."""
        u = self.norm(x, mask) if self.prenorm else x
        return u if mask is None else torch.where(mask, u, 0.0)

    def _after(self, x: Tensor, y: Tensor, mask: Bool[Tensor, "batch 1 length"] | None) -> Tensor:
        """What follows the layer, up to the block's output."""
        y = x + self.gate(self.pointwise(self.dropout(self.activation(y))))
        y = y if self.prenorm else self.norm(y, mask)
        return y if mask is None else torch.where(mask, y, 0.0)

    def _check_stream(self, method: str) -> None:
        if self.training:
            raise NoisewiseError(f"a block in train mode has no {method} of a stream: call .eval()")
        if not hasattr(self.layer, "init_state"):
            raise InvalidInput(f"{type(self.layer).__name__} has no stream, so the block has no {method} with a state")


class _LayerNorm(nn.LayerNorm):
    """Over the channels of each step."""

    def forward(self, x: Tensor, mask: Bool[Tensor, "batch 1 length"] | None = None) -> Tensor:
        return super().forward(x.mT).mT


class _BatchNorm(nn.BatchNorm1d):
    """Of each channel over rows and their valid steps; 0 behind the end of a row."""

    def forward(self, x: Tensor, mask: Bool[Tensor, "batch 1 length"] | None = None) -> Tensor:
        if mask is None:
            return super().forward(x)
        valid = mask.squeeze(1)
        normed = super().forward(x.mT[valid])
        return normed.new_zeros(x.mT.shape).index_put((valid,), normed).mT


def make_norm(block_norm: str, channels: int) -> nn.Module:
    """A norm of (batch, channels, length) that takes a mask of valid steps."""
    if block_norm not in BLOCK_NORMS:
        raise InvalidInput(f"block_norm must be one of {', '.join(BLOCK_NORMS)}, got {block_norm!r}")
    return _LayerNorm(channels) if block_norm == "layer" else _BatchNorm(channels)


def merge_layers(module: nn.Module) -> nn.Module:
    """A copy of `module` in eval mode with every `MRConv` in it as one `LongConv`; the rest is copied.

    The copy is for use: `train()` raises at the first merged layer, with what comes before it in train mode already.
    Raises `InvalidInput` for a module without an MRConv, `NoisewiseError` for one that has seen no batch in train mode.
    """
    return replace_layers(module, lambda layer: layer.merge())


def replace_layers(module: nn.Module, build: Callable[[MRConv], LongConv]) -> nn.Module:
    """A copy of `module` in eval mode with `build(layer)` for every `MRConv` in it."""
    found = {name: layer for name, layer in module.named_modules() if isinstance(layer, MRConv)}
    if not found:
        raise InvalidInput(f"{type(module).__name__} holds no MRConv: it is merged already, or never had one")
    built = {id(layer): build(layer) for layer in found.values()}
    # a copy meets each of these in its memo and takes the new layer for the old one, wherever that is used
    return copy.deepcopy(module, dict(built)).eval()


def parameter_groups(
    module: nn.Module, lr: float | int = 1e-2, kernel_lr: float | int = 1e-3, weight_decay: float | int = 0.05
) -> list[dict[str, Any]]:
    """Groups for torch.optim.AdamW: sub-kernels at `kernel_lr` without decay, everything else at `lr` with `weight_decay`.

    A parameter with an attribute `_optim`, a dict such as {"lr": 1e-3, "weight_decay": 0.0}, as state-space layers set it, gets
    what that says, and the rest as it would be without.
    """
    kernels = {id(p) for part in module.modules() if isinstance(part, SubKernels) for p in part.parameters()}
    groups: dict[tuple[tuple[str, Any], ...], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        settings: dict[str, Any] = {"lr": float(lr), "weight_decay": float(weight_decay)}
        if id(parameter) in kernels:
            settings = {"lr": float(kernel_lr), "weight_decay": 0.0}
        own = getattr(parameter, "_optim", None)
        if own is not None:
            settings |= own
        groups.setdefault(tuple(sorted(settings.items())), []).append(parameter)
    return [{"params": parameters, **dict(settings)} for settings, parameters in groups.items()]


def takes_lengths(layer: nn.Module) -> bool:
    """Whether its forward has an argument of that name, or takes any."""
    parameters = inspect.signature(layer.forward).parameters
    return "lengths" in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())
