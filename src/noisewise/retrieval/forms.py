"""What a vector of Mafin is made of: the black box, perhaps a small trained part beside it, perhaps words; one unit vector."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from noisewise.retrieval.joint import JointEncoder
from noisewise.retrieval.lexical import LexicalBlock

__all__ = ["Form"]


@dataclass(frozen=True)
class Form:
    """[e ; sqrt(g) words], one unit vector: e the black box's vector, or `joint`'s, and `words` of a `LexicalBlock`.

    All passages have one length before they are made units, so cosine ranks as e(q).e(d) + g BM25(q, d). `name`: the guard's
    for it. `weight`: g, 0 for no words.
    """

    name: str
    black_dim: int
    joint: JointEncoder | None = None
    lexical: LexicalBlock | None = None
    weight: float = 0.0

    @property
    def added(self) -> int:
        """Numbers of a vector beside the black box's."""
        small = 0 if self.joint is None else self.joint.dim - self.joint.black_dim
        return small + (0 if self.lexical is None else self.lexical.dim)

    @property
    def dim(self) -> int:
        """Numbers of a vector."""
        return self.black_dim + self.added

    def vectors(
        self, texts: Sequence[str], black: Float[Tensor, "text black"], kind: str, batch_size: int = 256
    ) -> Float[Tensor, "text dim"]:
        """Unit rows of `texts` of one `kind`, "query" or "document", whose black-box vectors are unit rows too."""
        if self.joint is None:
            dense: Any = functional.normalize(black, dim=1)
        else:
            device = next(self.joint.parameters()).device
            dense = self.joint.encode(texts, black.to(device), kind, batch_size).cpu()
        if self.lexical is None:
            return dense
        words = self.lexical.encode_query(texts) if kind == "query" else self.lexical.encode_document(texts)
        return functional.normalize(torch.cat([dense, math.sqrt(self.weight) * words], 1), dim=1)
