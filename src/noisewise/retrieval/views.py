"""A fitted `Mafin` in the dress of sentence-transformers, which stores take, and of MTEB's encoders, which it scores."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from noisewise.errors import NoisewiseError, require

__all__ = ["MtebEncoder", "as_mteb", "as_sentence_transformer"]

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


def as_mteb(mafin: Any, black_box: str) -> "MtebEncoder":
    """`mafin`, on the `black_box` of that name, by the encoder protocol of MTEB 2. Raises `MissingExtra` without mteb."""
    described = require("mteb.models.model_meta", "mteb")
    # MTEB wants "organisation/name"
    name = re.sub(r"[^A-Za-z0-9.]+", "-", f"{mafin.choice_} on {black_box}").strip("-.")
    meta = described.ModelMeta.create_empty(
        overwrites={
            "name": f"noisewise/{name}",
            "revision": _digest(mafin),
            "embed_dim": mafin.get_embedding_dimension(),
            "similarity_fn_name": described.ScoringFunction.COSINE,
        }
    )
    return MtebEncoder(mafin, meta)


class MtebEncoder:
    """Queries and passages told apart by `prompt_type`; tasks that know no queries embed all texts as passages.

    `mteb_model_meta`: its revision is a digest of all numbers of the model, so that MTEB, which keeps results by name and
    revision, never takes those of one model for another's. Source: MTEB 2, `mteb.models.EncoderProtocol`.
    """

    def __init__(self, mafin: Any, mteb_model_meta: Any) -> None:
        self._mafin = mafin
        self.mteb_model_meta = mteb_model_meta

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **options: Any,
    ) -> Float[np.ndarray, "text dim"]:
        """Unit vectors of the "text" of all batches of `inputs`, in order; of `options`, batch size and progress bar count."""
        texts = [text for batch in inputs for text in batch["text"]]
        asked = getattr(prompt_type, "value", prompt_type) == "query"
        known = {name: options[name] for name in ("batch_size", "show_progress_bar") if options.get(name) is not None}
        return (self._mafin.encode_query if asked else self._mafin.encode_document)(texts, **known)

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, "a b"]:
        """Cosines of all pairs."""
        return self._mafin.similarity(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Float[Tensor, " pair"]:
        """Cosines of row and row."""
        a, b = (torch.as_tensor(np.asarray(part)).float() for part in (embeddings1, embeddings2))
        return functional.cosine_similarity(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), dim=1)


def _digest(mafin: Any) -> str:
    """Of every number that a vector depends on."""
    form = mafin.form_
    tensors = {"fingerprint": mafin.fingerprint_}
    if mafin.rotation_ is not None:
        tensors["rotation"] = mafin.rotation_
    for part, found in (
        ("joint", {} if form.joint is None else form.joint.state_dict()),
        ("words", {} if form.lexical is None else form.lexical.tensors()),
    ):
        tensors |= {f"{part}.{name}": value for name, value in found.items()}
    content = hashlib.sha256(repr((form.name, form.weight)).encode())
    for name in sorted(tensors):
        content.update(name.encode() + tensors[name].detach().cpu().contiguous().numpy().tobytes())
    return content.hexdigest()[:16]
