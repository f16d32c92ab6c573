"""`SentenceEncoder`: any sentence-transformers model as the trainable part; `small_transformer` builds one from nothing."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError, require
from noisewise.retrieval.table import trained_tokenizer
from noisewise.retrieval.vectors import check_kind
from noisewise.typing import check_count

__all__ = ["SentenceEncoder", "Texts", "small_transformer"]

# names under which models keep the prompt of a kind, as sentence-transformers tries them
_PROMPTS = {"query": ("query",), "document": ("document", "passage", "corpus")}


@dataclass(frozen=True)
class Texts:
    """Texts of one kind; a model cuts them into tokens when they are encoded."""

    texts: tuple[str, ...]
    kind: str

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def lengths(self) -> Int[Tensor, " text"]:
        """Characters of each text."""
        return torch.tensor([len(text) for text in self.texts], dtype=torch.int64)

    def __getitem__(self, index: Int[Tensor, " picked"]) -> "Texts":
        return Texts(tuple(self.texts[at] for at in index.tolist()), self.kind)


class SentenceEncoder(nn.Module):
    """A sentence-transformers model, trained whole; its prompts for queries and documents are used where it has some.

    `model`: the model, the folder of one, or the id of one, which is then fetched from its hub. A learning rate near 2e-5
    suits pre-trained ones, 1e-3 those of `small_transformer`.

    Raises `InvalidInput` for what cannot be loaded.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        if isinstance(model, str | Path):
            load = require("sentence_transformers", "retrieval").SentenceTransformer
            try:
                model = load(str(model), device="cpu")
            except (OSError, ValueError) as error:
                raise InvalidInput(f"{model} is no sentence-transformers model that can be loaded: {error}") from error
        dim = getattr(model, "get_embedding_dimension", lambda: None)()
        if not isinstance(model, nn.Module) or dim is None:
            raise InvalidInput(
                f"expected a sentence-transformers model with a known dimension, got {type(model).__name__}"
            )
        self.model: Any = model
        self.dim = int(dim)

    def prepare(self, documents: Sequence[str]) -> None:
        """Nothing: its vocabulary is its own."""

    def features(self, texts: Sequence[str], kind: str) -> Texts:
        """The texts and their kind."""
        return Texts(tuple(texts), check_kind(kind))

    def forward(self, features: Texts) -> Float[Tensor, "text dim"]:
        """Unit rows. Raises `NoisewiseError` where the model gives a zero or something that is not finite."""
        if not len(features):
            return torch.zeros(0, self.dim, device=self.model.device)
        prompts = getattr(self.model, "prompts", {}) or {}
        prompt = next((prompts[name] for name in _PROMPTS[features.kind] if prompts.get(name)), None)
        tokens = self.model.preprocess(list(features.texts), prompt=prompt)
        moved = {k: v.to(self.model.device) if isinstance(v, Tensor) else v for k, v in tokens.items()}
        vectors = self.model(moved)["sentence_embedding"]
        norm = vectors.detach().norm(dim=1)
        if not bool((norm.isfinite() & (norm > 0)).all()):
            index = int((~(norm.isfinite() & (norm > 0))).nonzero()[0])
            raise NoisewiseError(
                f"{type(self.model).__name__} gave a vector of norm {float(norm[index]):g} for the {features.kind} that begins "
                f"{features.texts[index][:60]!r}: lower the learning rate if it was trained just now"
            )
        return functional.normalize(vectors, dim=1)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the folder of a sentence-transformers model, which that library loads too."""
        self.model.save_pretrained(str(folder), create_model_card=False)
        return Path(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "SentenceEncoder":
        """What `save_pretrained` wrote, in eval mode. Raises `RunFolderError` where there is none."""
        if not (Path(folder) / "modules.json").is_file():
            raise RunFolderError(f"{folder} holds no saved SentenceEncoder: modules.json is missing")
        return cls(folder).eval()


def small_transformer(
    documents: Sequence[str],
    layers: int = 2,
    width: int = 128,
    *,
    heads: int = 4,
    vocabulary: int = 8000,
    max_length: int = 256,
    seed: int = 0,
) -> Any:
    """A sentence-transformers model with random weights: BERT of `layers` x `width`, mean of tokens, word pieces of `documents`.

    It needs some thousand pairs; below that a `WordPieceTable` learns more. Raises `InvalidInput` for a width that heads do not
    divide.
    """
    if check_count("width", width) % check_count("heads", heads):
        raise InvalidInput(f"width={width} cannot be divided among heads={heads}")
    transformers = require("transformers", "retrieval")
    sentence_transformers = require("sentence_transformers", "retrieval")
    modules = require("sentence_transformers.sentence_transformer.modules", "retrieval")
    pieces = trained_tokenizer(documents, vocabulary)
    config = transformers.BertConfig(
        vocab_size=pieces.get_vocab_size(), hidden_size=width, num_hidden_layers=check_count("layers", layers),
        num_attention_heads=heads, intermediate_size=4 * width, max_position_embeddings=check_count("max_length", max_length),
    )  # fmt: skip
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "cls", "sep", "mask")} | {"unk_token": "[UNK]"}
    # the library builds its first module from a folder only
    with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
        torch.manual_seed(check_count("seed", seed, 0))
        transformers.BertModel(config).save_pretrained(folder)
        transformers.BertTokenizerFast(tokenizer_object=pieces, model_max_length=max_length, **names).save_pretrained(
            folder
        )
        first = modules.Transformer(folder, max_seq_length=max_length)
    return sentence_transformers.SentenceTransformer(modules=[first, modules.Pooling(width)], device="cpu")
