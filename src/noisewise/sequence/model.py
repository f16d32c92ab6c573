"""`SequenceModel`: an encoder, residual blocks of long convolutions and a head, for classes, numbers or an output each step."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import InvalidInput, NoisewiseError, NoisewiseWarning, RunFolderError
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.sequence.block import LayerOf, MRConvBlock, make_norm, parameter_groups, replace_layers
from noisewise.sequence.layer import MRConv
from noisewise.sequence.merged import LongConv
from noisewise.sequence.signals import check_signal, valid_steps
from noisewise.typing import check_count, check_positive

__all__ = ["POOLS", "SequenceModel"]

POOLS = ("mean", "last", None)
_NAME = "SequenceModel"


class SequenceModel(nn.Module):
    """(batch, d_input, length) -> (batch, d_output), or -> (batch, d_output, steps) with `pool=None`.

    `encoder` maps inputs to `d_model` channels: a linear map of each step; one of `patch` steps at a time, so that the blocks
    see length / patch steps; or, with `vocabulary`, a table of whole-number tokens (batch, length), where d_input is 1.
    `blocks`: `n_layers` of `MRConvBlock`, which takes `dropout`, `prenorm` (a last norm follows the blocks), `block_norm`,
    `layer` and, as `options`, what `MRConv` takes (kind, kernel_size, bidirectional, ...). `pool`: "mean" over steps,
    "last" step, or None, an output for each step (of each patch). `head`: a linear map.

    Raises `InvalidInput` for arguments that do not fit. Warns of a causal model with an output for each step that is normalised
    by the batch: in training it would hear the future.
    Source: Cunningham et al., NeurIPS 2024 (arXiv 2408.09453), section 4, and the state-space models it is compared with.
    """

    def __init__(
        self, d_input: int, d_output: int, length: int, *, d_model: int = 64, n_layers: int = 4, pool: str | None = "mean",
        patch: int = 1, vocabulary: int | None = None, dropout: float | int = 0.0, prenorm: bool = True,
        block_norm: str = "layer", layer: LayerOf | None = None, seed: int = 0, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if pool not in POOLS:
            raise InvalidInput(f"pool must be one of {POOLS}, got {pool!r}")
        self.d_input, self.d_output = check_count("d_input", d_input), check_count("d_output", d_output)
        self.length, self.patch, self.pool = check_count("length", length), check_count("patch", patch), pool
        self.vocabulary = None if vocabulary is None else check_count("vocabulary", vocabulary)
        if vocabulary is not None and (d_input, patch) != (1, 1):
            raise InvalidInput(
                f"with vocabulary={vocabulary} a step is one token: d_input and patch must be 1, got {d_input} and {patch}"
            )
        check_count("d_model", d_model)
        self._config: dict[str, Any] = {
            "d_input": d_input, "d_output": d_output, "length": length, "d_model": d_model, "n_layers": n_layers,
            "pool": pool, "patch": patch, "vocabulary": vocabulary, "dropout": dropout, "prenorm": prenorm,
            "block_norm": block_norm, "seed": seed,
        }  # fmt: skip
        self._options = options
        self._own_layer = None if layer is None else getattr(layer, "__qualname__", type(layer).__name__)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(check_count("seed", seed, 0))
            if vocabulary is None:
                self.encoder: nn.Module = nn.Conv1d(d_input, d_model, patch, stride=patch)
            else:
                self.encoder = nn.Embedding(vocabulary, d_model)
            self.head = nn.Linear(d_model, d_output)
        self.blocks = nn.ModuleList(
            MRConvBlock(
                d_model, -(-length // patch), dropout=dropout, prenorm=prenorm, block_norm=block_norm, layer=layer,
                # two numbers a layer: sub-kernels and skips are drawn by neighbouring seeds
                seed=seed + 2 * index, **options,
            )
            for index in range(check_count("n_layers", n_layers))
        )  # fmt: skip
        self.norm = make_norm(block_norm, d_model) if prenorm else None
        self._warn_of_the_future(block_norm)

    @property
    def merged(self) -> bool:
        """Whether its convolutions are merged ones."""
        return any(isinstance(part, LongConv) for part in self.modules())

    def train(self, mode: bool = True) -> "SequenceModel":
        """Raises `NoisewiseError` for `mode=True` where it is merged."""
        if mode and self.merged:
            raise NoisewiseError(
                "a merged model cannot be trained: train the model it was merged from, and merge that again"
            )
        return super().train(mode)

    def forward(self, x: Tensor, state: Any = None, lengths: Int[Tensor, " batch"] | None = None) -> Any:
        """The output; (output, state) where a `state` of `init_state` is given, which then holds the inputs before `x`.

        `lengths`: valid steps of each row; what lies behind is neither read nor, in an output for each step, anything but 0.
        Raises `InvalidInput` for other shapes and dtypes, tokens outside the vocabulary and more than `length` steps.
        """
        if state is not None:
            self._check_stream()
            h = self._encoded(x, None)
            for index, block in enumerate(self.blocks):
                h, state[index] = block(h, state[index])
            return self._headed(h, None, None), state
        h, lengths = self._steps(x, lengths)
        for block in self.blocks:
            h = block(h, lengths=lengths)
        return self._headed(h, valid_steps(h, lengths), lengths)

    def init_state(self, batch: int) -> list[Any]:
        """A stream of `batch` rows before its first input, with the weights of now: one state for each block.

        Raises `InvalidInput` where the model reads ahead (bidirectional layers, patches, the mean over all steps),
        `NoisewiseError` in train mode.
        """
        self._check_stream()
        return [block.init_state(batch) for block in self.blocks]  # type: ignore[operator]

    def step(self, u_t: Tensor, state: list[Any]) -> tuple[Tensor, list[Any]]:
        """The output after one more input of each row, (batch, d_input) or (batch,) tokens. `state` is changed in place."""
        self._check_stream()
        h = self._encoded(u_t.unsqueeze(-1), None).squeeze(-1)
        for index, block in enumerate(self.blocks):
            h, state[index] = block.step(h, state[index])  # type: ignore[operator]
        return self._headed(h.unsqueeze(-1), None, None).reshape(len(h), self.d_output), state

    def prefill(self, x: Tensor) -> tuple[Tensor, list[Any]]:
        """The output of `x`, of any length, and the state to go on from."""
        return self(x, self.init_state(len(x)))

    def merge(self) -> "SequenceModel":
        """A copy with every `MRConv` as one kernel, which gives what this model gives in eval mode; it cannot be trained."""
        return self._replaced(lambda layer: layer.merge(), self.length)

    def at_rate(self, rate: float | int) -> "SequenceModel":
        """A merged copy for signals sampled at `rate` times the rate of training (0.5: every second sample).

        Raises `InvalidInput` for tokens, which have no rate, and for patches, whose encoder reads samples of the old rate.
        """
        if self.vocabulary is not None or self.patch > 1:
            what = f"patch={self.patch}" if self.patch > 1 else f"vocabulary={self.vocabulary}"
            raise InvalidInput(
                f"a model with {what} cannot change the sampling rate: build it with patch=1, for signals"
            )
        rate = check_positive("rate", rate)
        return self._replaced(lambda layer: layer.at_rate(rate), max(1, round(self.length * rate)))

    def param_groups(
        self, lr: float | int = 1e-2, kernel_lr: float | int = 1e-3, weight_decay: float | int = 0.05
    ) -> list[dict[str, Any]]:
        """Groups for torch.optim.AdamW; see `parameter_groups`."""
        return parameter_groups(self, lr, kernel_lr, weight_decay)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json` and `model.safetensors`, merged or not. Raises `InvalidInput` for options that JSON cannot hold."""
        config = self._config | {"length": self.length, "options": self._options}
        config |= {"merged": self.merged, "layer": self._own_layer}
        if self.merged and self._own_layer is not None:
            raise InvalidInput(
                f"a merged model with layer={self._own_layer} cannot be saved: save the one it was merged from"
            )
        try:
            return write_pretrained(folder, _NAME, config, self.state_dict())
        except (TypeError, ValueError) as error:
            raise InvalidInput(f"the arguments of this model cannot be saved: {error}") from error

    @classmethod
    def from_pretrained(cls, folder: str | Path, layer: LayerOf | None = None) -> "SequenceModel":
        """What `save_pretrained` wrote, in eval mode. A model with a `layer` of your own needs that again.

        Raises `RunFolderError` for the folder of another class and damaged files.
        """
        config, tensors = read_pretrained(folder, _NAME)
        try:
            merged, own = config.pop("merged"), config.pop("layer")
            if (own is None) != (layer is None):
                saved = f"with layer={own}: give it again" if layer is None else "without layer=: leave it out"
                raise RunFolderError(f"{folder} holds a model that was saved {saved}")
            options = config.pop("options")
            if merged:
                model = cls(**config, layer=_empty_kernels(tensors))
                model._options, model._own_layer = options, None
            else:
                with warnings.catch_warnings():
                    # it is trained already
                    warnings.simplefilter("ignore", NoisewiseWarning)
                    model = cls(**config, **options, layer=layer)
            model.load_state_dict(tensors)
        except (KeyError, TypeError, RuntimeError, InvalidInput) as error:
            raise RunFolderError(f"{folder} is damaged: {error}") from error
        return model.eval()

    def extra_repr(self) -> str:
        """What it was built with."""
        words = [f"{self.d_input}, {self.d_output}, length={self.length}, pool={self.pool!r}"]
        words += [f"patch={self.patch}"] if self.patch > 1 else []
        return ", ".join([*words, *(["merged=True"] if self.merged else [])])

    def _warn_of_the_future(self, block_norm: str) -> None:
        layers = [part for part in self.modules() if isinstance(part, MRConv)]
        if self.pool is not None or not layers or any(layer.bidirectional for layer in layers):
            return
        by_batch = {"norm": (layers[0].norm, "kernel"), "block_norm": (block_norm, "layer")}
        leaks = {name: other for name, (own, other) in by_batch.items() if own == "batch"}
        if leaks:
            given = " and ".join(f"{name}='batch'" for name in leaks)
            remedy = " and ".join(f"{name}='{other}'" for name, other in leaks.items())
            warnings.warn(
                f"pool=None with {given}: statistics of the batch let every step hear later ones in training, so a model that "
                f"predicts its next input learns to read the answer there, and fails in use; build it with {remedy}",
                NoisewiseWarning,
                stacklevel=3,
            )

    # ---- from inputs to outputs

    def _steps(self, x: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Encoded inputs, and how many steps of the blocks are valid."""
        u = x.unsqueeze(1) if self.vocabulary is not None and x.ndim == 2 else x
        if self.vocabulary is None:
            check_signal(x, self.d_input, self.length)
        elif u.ndim == 3 and u.shape[-1] > self.length:
            raise InvalidInput(
                f"the input has {u.shape[-1]} steps, the model at most {self.length}: cut it, or build it longer"
            )
        h = self._encoded(x, valid_steps(u, lengths))
        return h, None if lengths is None else -(-lengths.to(h.device) // self.patch)

    def _encoded(self, x: Tensor, mask: Bool[Tensor, "batch 1 length"] | None) -> Tensor:
        if self.vocabulary is not None:
            tokens = self._tokens(x if mask is None else torch.where(mask.squeeze(1), x, 0))
            return self.encoder(tokens).mT
        if x.ndim != 3 or x.shape[1] != self.d_input or not x.is_floating_point():
            check_signal(x, self.d_input, max(1, x.shape[-1]))
        u = x if mask is None else torch.where(mask, x, 0.0)
        # the last patch may be a part of one
        return self.encoder(functional.pad(u, (0, -u.shape[-1] % self.patch)))

    def _tokens(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.is_floating_point() or not x.numel():
            raise InvalidInput(
                f"tokens must be whole numbers of shape (batch, length), got shape {tuple(x.shape)} of {x.dtype}"
            )
        least, most = int(x.min()), int(x.max())
        if least < 0 or most >= (self.vocabulary or 0):
            raise InvalidInput(
                f"tokens must lie in 0 to {(self.vocabulary or 0) - 1}, got {least} to {most}: raise vocabulary, or give "
                "lengths= if these are padding"
            )
        return x.long()

    def _headed(self, h: Tensor, mask: Bool[Tensor, "batch 1 length"] | None, lengths: Tensor | None) -> Tensor:
        h = h if self.norm is None else self.norm(h, mask)
        if self.pool is None:
            y = self.head(h.mT).mT
            return y if mask is None else torch.where(mask, y, 0.0)
        if mask is None or lengths is None:
            return self.head(h.mean(-1) if self.pool == "mean" else h[..., -1])
        if self.pool == "mean":
            return self.head(torch.where(mask, h, 0.0).sum(-1) / lengths.unsqueeze(-1).to(h))
        last = (lengths - 1).reshape(-1, 1, 1).expand(-1, h.shape[1], 1)
        return self.head(h.gather(-1, last).squeeze(-1))

    # ---- copies and streams

    def _replaced(self, build: Any, length: int) -> "SequenceModel":
        made: Any = replace_layers(self, build)
        made.length = length
        return made

    def _check_stream(self) -> None:
        if self.pool == "mean":
            raise InvalidInput(
                "pool='mean' is known only at the end of a signal: stream a model with pool=None or pool='last'"
            )
        if self.patch > 1:
            raise InvalidInput(
                f"patch={self.patch} steps enter at once, so single steps cannot stream: build with patch=1"
            )


def _empty_kernels(tensors: dict[str, Tensor]) -> LayerOf:
    """Layers for the merged kernels among `tensors`, in the order of the blocks."""
    kernels = itertools.count()

    def empty(d_model: int, length: int) -> nn.Module:
        prefix = f"blocks.{next(kernels)}.layer."
        return LongConv(torch.empty_like(tensors[f"{prefix}kernel"]), torch.empty_like(tensors[f"{prefix}bias"]))

    return empty
