"""Adapters of black-box vectors, linear or not, on both sides: the usual way to tune an embedding that cannot be trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import NoisewiseError

__all__ = ["Adapter"]


@dataclass(frozen=True)
class _Vectors:
    rows: Float[Tensor, "text dim"]
    kind: str

    @property
    def lengths(self) -> Int[Tensor, " text"]:
        return torch.ones(len(self.rows), dtype=torch.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Tensor) -> "_Vectors":
        return _Vectors(self.rows[index], self.kind)


class Adapter(nn.Module):
    """Unit rows of x + f(x), x a black-box vector and f = 0 at the start, one f for queries and one for documents.

    `width`: None for a linear f, else the hidden numbers of a perceptron. `vectors[kind][text]`: black-box vectors.
    """

    def __init__(self, vectors: Mapping[str, Mapping[str, Tensor]], dim: int, width: int | None, seed: int) -> None:
        super().__init__()
        self.dim, self._vectors = dim, vectors
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.change = nn.ModuleDict({kind: _zero_map(dim, width) for kind in ("query", "document")})

    def prepare(self, documents: Sequence[str]) -> None:
        """There is nothing to learn before training."""

    def features(self, texts: Sequence[str], kind: str) -> _Vectors:
        """Their black-box vectors."""
        return _Vectors(torch.stack([self._vectors[kind][text] for text in texts]), kind)

    def forward(self, features: _Vectors) -> Float[Tensor, "text dim"]:
        """Unit rows."""
        return functional.normalize(features.rows + self.change[features.kind](features.rows), dim=1)

    def save_pretrained(self, folder: str | Path) -> Path:
        """It is only compared with."""
        raise NoisewiseError("an adapter of the comparison is not saved")


def _zero_map(dim: int, width: int | None) -> nn.Module:
    last = nn.Linear(dim if width is None else width, dim, bias=width is not None)
    nn.init.zeros_(last.weight)
    if width is None:
        return last
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(dim, width), nn.GELU(), last)
