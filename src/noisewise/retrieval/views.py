"""A fitted `Mafin` in the dress of sentence-transformers, which evaluation harnesses and stores take."""

from typing import Any

from torch import Tensor

from noisewise.errors import NoisewiseError, require

__all__ = ["as_sentence_transformer"]

_modules = require("sentence_transformers.base.modules.input_module", "retrieval")


def as_sentence_transformer(mafin: Any) -> Any:
    """A `SentenceTransformer` whose only module asks `mafin`; `encode` alone embeds documents, as `encode_document` does.

    Texts pass the black box as they are: a prompt is put before them only if you give one. Cosine is its similarity. Saving
    it raises `NoisewiseError`: save the Mafin.
    """
    transformers = require("sentence_transformers", "retrieval")
    return transformers.SentenceTransformer(modules=[_MafinModule(mafin)], device="cpu", similarity_fn_name="cosine")


class _MafinModule(_modules.InputModule):  # type: ignore[misc]
    """Texts to vectors in one go; the forward has nothing left to do."""

    def __init__(self, mafin: Any) -> None:
        super().__init__()
        self._mafin = mafin

    def preprocess(self, inputs: list[str], prompt: str | None = None, **options: Any) -> dict[str, Tensor]:
        texts = self._prepend_prompt(inputs, prompt) if prompt else list(inputs)
        encode = self._mafin.encode_query if options.get("task") == "query" else self._mafin.encode_document
        return {"sentence_embedding": encode(texts, convert_to_tensor=True)}

    def forward(self, features: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
        return features

    def get_embedding_dimension(self) -> int:
        return self._mafin.get_embedding_dimension()

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **options: Any) -> None:
        raise NoisewiseError(
            "a Mafin seen as a SentenceTransformer is not saved there: call save_pretrained of the Mafin"
        )
