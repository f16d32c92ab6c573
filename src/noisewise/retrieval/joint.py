"""`JointEncoder`: a black box's vector and a trainable small one side by side, as one unit vector (Mafin, arXiv 2402.12177)."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import InvalidInput, RunFolderError
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.retrieval.vectors import check_kind
from noisewise.training import evaluating
from noisewise.typing import check_count, check_positive

__all__ = ["Augment", "Features", "JointEncoder"]

_NAME = "JointEncoder"


@runtime_checkable
class Features(Protocol):
    """Texts made ready for an augment, of which a tensor of indices picks some.

    `lengths`: of each text, in a unit of its own; texts of like lengths make the cheapest batches.
    """

    @property
    def lengths(self) -> Int[Tensor, " text"]:
        """One for each text."""
        ...

    def __len__(self) -> int: ...
    def __getitem__(self, index: Int[Tensor, " picked"]) -> "Features": ...


@runtime_checkable
class Augment(Protocol):
    """A trainable module, `nn.Module`, that maps texts to unit vectors of `dim` numbers.

    `prepare(documents)` is called once, before training, and learns a vocabulary where there is one to learn. `features` does
    the work on texts that does not depend on weights. The forward maps features to [text, dim], unit rows.
    """

    dim: int

    def prepare(self, documents: Sequence[str]) -> None:
        """Learn what there is to learn before training."""
        ...

    def features(self, texts: Sequence[str], kind: str) -> Features:
        """Texts of one kind, "query" or "document", made ready."""
        ...

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write all that `from_pretrained` needs."""
        ...

    def __call__(self, features: Any) -> Tensor:
        """[text, dim], unit rows."""
        ...


class JointEncoder(nn.Module):
    """e(x) = [l(x) e_b(x) ; sqrt(1 - l(x)^2) e_t(x)], a unit vector of black_dim + augment.dim numbers for every l in (0, 1).

    `weighting`: "equal", l = 1/sqrt 2, so that a score is (cos_b + cos_t) / 2; a number w >= 0, l = 1/sqrt(1 + w^2), a score
    (cos_b + w^2 cos_t) / (1 + w^2); "lambda", where l is learned from the black box's vector, which is all it depends on, so
    that passages can be indexed before queries are known. It is then l = cos(phi), phi = pi/2 sigmoid(-(a . e_b + b)), whose
    slopes stay finite at both ends, and starts as the constant `start`, by default 1/sqrt 2: nearer to 1 is nearer to the black
    box. Black-box vectors are normalised here, get no gradient and are no part of the weights.

    Raises `InvalidInput` for another weighting, a negative w, and a start outside (0, 1).
    Source: Zhang et al. 2024 (arXiv 2402.12177); the angle is ours.
    """

    def __init__(
        self, augment: Any, black_dim: int, weighting: str | float | int = "equal", start: float | int | None = None
    ) -> None:
        super().__init__()
        if not isinstance(augment, nn.Module) or not isinstance(augment, Augment):
            raise InvalidInput(f"an augment is a module with dim, prepare and features, got {type(augment).__name__}")
        self.augment = augment
        self.black_dim = check_count("black_dim", black_dim)
        self.weighting = weighting
        self.start = 1 / math.sqrt(2) if start is None else check_positive("start", start)
        if weighting == "lambda":
            if self.start >= 1:
                raise InvalidInput(f"start is the first value of l(x), which lies in (0, 1), got {start!r}")
            share = math.acos(self.start) / (math.pi / 2)
            self.weight: nn.Linear | None = nn.Linear(black_dim, 1)
            nn.init.zeros_(self.weight.weight)
            nn.init.constant_(self.weight.bias, -math.log(share / (1 - share)))
            return
        if start is not None:
            raise InvalidInput(f"start={start!r} is of weighting='lambda'; weighting={weighting!r} says it all")
        if weighting != "equal" and (isinstance(weighting, str | bool) or not 0 <= weighting < math.inf):
            raise InvalidInput(f"weighting must be 'equal', 'lambda' or a number of at least 0, got {weighting!r}")
        self.weight = None

    @property
    def dim(self) -> int:
        """Numbers of a joint vector."""
        return self.black_dim + self.augment.dim

    def angle(self, black: Float[Tensor, "text black"]) -> Float[Tensor, " text"]:
        """phi(x) in [0, pi/2], l = cos(phi), of unit black-box vectors."""
        if self.weight is None:
            w = 1.0 if isinstance(self.weighting, str) else float(self.weighting)
            return black.new_full((len(black),), math.atan(w))
        return math.pi / 2 * torch.sigmoid(-self.weight(black).squeeze(1))

    def black_weights(self, black: Float[Tensor, "text black"]) -> Float[Tensor, " text"]:
        """l(x) of black-box vectors."""
        return self.angle(self._unit(black)).cos()

    def forward(self, black: Float[Tensor, "text black"], features: Any) -> Float[Tensor, "text joint"]:
        """Unit rows. Raises `InvalidInput` for black-box vectors of another dimension, zero or not finite."""
        unit = self._unit(black)
        phi = self.angle(unit).unsqueeze(1)
        return torch.cat([phi.cos() * unit, phi.sin() * self.augment(features).to(unit)], 1)

    @torch.no_grad()
    def encode(
        self,
        texts: Sequence[str],
        black: Float[Tensor, "text black"],
        kind: str,
        batch_size: int = 256,
        features: Features | None = None,
    ) -> Float[Tensor, "text joint"]:
        """Unit rows of `texts`, of one `kind`, "query" or "document", in eval mode and in the order they were given in.

        `features`: of the very texts, where they were made before.
        """
        check_count("batch_size", batch_size)
        if len(texts) != len(black):
            raise InvalidInput(f"{len(texts)} texts and {len(black)} black-box vectors: give one for each")
        check_kind(kind)
        if features is None:
            features = self.augment.features(list(texts), kind)
        joint = black.new_empty((len(texts), self.dim))
        with evaluating(self):
            for index in features.lengths.argsort(stable=True).split(batch_size):
                place = index.to(black.device)
                joint[place] = self(black[place], features[index])
        return joint

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write configuration and weights into `folder`, the augment's into `folder/augment`. Nothing of the black box."""
        path = Path(folder)
        self.augment.save_pretrained(path / "augment")
        config = {
            "augment": type(self.augment).__name__,
            "black_dim": self.black_dim,
            "weighting": self.weighting,
            "start": self.start if self.weight is not None else None,
        }
        tensors = {} if self.weight is None else {f"weight.{k}": v for k, v in self.weight.state_dict().items()}
        return write_pretrained(path, _NAME, config, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path, augment: Any = None) -> "JointEncoder":
        """What `save_pretrained` wrote, in eval mode. An augment of a class of your own has to be loaded and given.

        Raises `RunFolderError` for the folder of another class and damaged files.
        """
        config, tensors = read_pretrained(folder, _NAME)
        try:
            name = config.pop("augment")
            if augment is None:
                augment = _augment_class(name, folder).from_pretrained(Path(folder) / "augment")
            joint = cls(augment, **config)
            if joint.weight is not None:
                joint.weight.load_state_dict({key.removeprefix("weight."): value for key, value in tensors.items()})
        except (KeyError, TypeError, RuntimeError, InvalidInput) as error:
            raise RunFolderError(f"{folder} is damaged: {error}") from error
        return joint.eval()

    def extra_repr(self) -> str:
        """What it was built with."""
        return f"black_dim={self.black_dim}, weighting={self.weighting!r}"

    def _unit(self, black: Tensor) -> Tensor:
        if black.ndim != 2 or black.shape[1] != self.black_dim:
            raise InvalidInput(
                f"black-box vectors have shape {tuple(black.shape)}, this model was built for (texts, {self.black_dim}): "
                "use the black box and the dimensions that it was built with"
            )
        black = black.detach()
        norm = black.norm(dim=1, keepdim=True)
        bad = ~(norm.isfinite() & (norm > 0)).squeeze(1)
        if bool(bad.any()):
            index = int(bad.nonzero()[0])
            raise InvalidInput(
                f"black-box vector {index} has norm {float(norm[index]):g} (and {int(bad.sum())} are like it): fetch it again"
            )
        return functional.normalize(black, dim=1)


def _augment_class(name: str, folder: str | Path) -> Any:
    # each imports what only it needs
    if name == "WordPieceTable":
        from noisewise.retrieval.table import WordPieceTable

        return WordPieceTable
    if name == "SentenceEncoder":
        from noisewise.retrieval.encoder import SentenceEncoder

        return SentenceEncoder
    raise RunFolderError(f"{folder} holds an augment of class {name!r}: load it yourself and give it as augment=")
