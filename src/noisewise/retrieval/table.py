"""`WordPieceTable`: a text as the weighted sum of vectors of its word pieces, which trains in seconds on one core."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError, require
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.retrieval.vectors import check_kind
from noisewise.training import check_share
from noisewise.typing import check_count

__all__ = ["Bags", "WordPieceTable", "trained_tokenizer"]

_NAME = "WordPieceTable"
_UNKNOWN = "[UNK]"
_SPECIAL = ("[PAD]", _UNKNOWN, "[CLS]", "[SEP]", "[MASK]")
_VOCABULARY = 30_000


@dataclass(frozen=True)
class Bags:
    """Word pieces of texts, one behind the other: `rows` of the table, how often each occurs, and where a text begins.

    `ends[i]` is where text i ends and the next begins; a piece that occurs again in a text is there once.
    """

    rows: Int[Tensor, " piece"]
    counts: Float[Tensor, " piece"]
    ends: Int[Tensor, " text"]

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def starts(self) -> Int[Tensor, " text"]:
        """Where each text begins."""
        return torch.cat([self.ends.new_zeros(1), self.ends])[: len(self.ends)]

    @property
    def lengths(self) -> Int[Tensor, " text"]:
        """Different pieces of each text."""
        return self.ends - self.starts

    def __getitem__(self, index: Int[Tensor, " picked"]) -> "Bags":
        lengths = self.lengths[index]
        ends = lengths.cumsum(0)
        # positions of the picked texts' pieces: each begins at its start, not where the one before ended
        shift = self.starts[index] - (ends - lengths)
        flat = torch.arange(int(lengths.sum())) + shift.repeat_interleave(lengths)
        return Bags(self.rows[flat], self.counts[flat], ends)


class WordPieceTable(nn.Module):
    """e(x) = sum over the word pieces of x of weight x count x vector, as a unit row: a bag of words with learned meanings.

    Weights start as inverse document frequencies of the corpus given to `prepare`. `encoder`: a sentence-transformers model,
    or the folder of one, whose own word pieces are used and whose table starts this one: its mean is taken off, its `dim`
    first principal components are kept, each row is made a unit. None: word pieces learned on the corpus, and random unit
    rows, with which cosines begin as noisy counts of shared pieces. Pieces of the corpus are trained, all others of the
    vocabulary are used as they started. `max_pieces`: of a text that are read. `token_dropout`: the share of a text's
    different pieces that training leaves out, each time others.

    Raises `InvalidInput` for an encoder without a word-piece table or with one narrower than `dim`, `NoisewiseError` where it is
    used before `prepare`.
    """

    other_table: Tensor
    other_log_weight: Tensor
    row_of: Tensor

    def __init__(
        self, dim: int = 256, encoder: Any = None, seed: int = 0, max_pieces: int = 256, token_dropout: float | int = 0.3
    ) -> None:  # fmt: skip
        super().__init__()
        self.dim, self.max_pieces = check_count("dim", dim), check_count("max_pieces", max_pieces)
        self.token_dropout = check_share("token_dropout", token_dropout, 1)
        self.seed = check_count("seed", seed, 0)
        self._encoder = encoder
        self._tokenizer: Any = None
        self._hold(0, 0, 0)

    @property
    def prepared(self) -> bool:
        """Whether it has a vocabulary."""
        return self._tokenizer is not None

    def prepare(self, documents: Sequence[str]) -> None:
        """Learn vocabulary and document frequencies of a corpus, and start anew from them.

        Training queries belong to it where they have words of their own, which otherwise stay as they start.
        Raises `InvalidInput` for a corpus without a word piece.
        """
        documents = list(documents)
        if not documents:
            raise InvalidInput("there is no document to learn word pieces from")
        device, dtype = self.table.device, self.table.dtype
        if self._encoder is None:
            tokenizer = trained_tokenizer(documents)
            vectors = _random_rows(tokenizer.get_vocab_size(), self.dim, self.seed)
        else:
            tokenizer, found = _encoder_parts(self._encoder)
            vectors = _principal_rows(found, self.dim)
        self._use(tokenizer)
        pieces, *_ = self._pieces(documents)
        frequency = np.bincount(pieces, minlength=len(vectors))
        if not len(pieces):
            raise InvalidInput(f"none of the {len(documents)} documents holds a word piece")
        idf = np.log1p((len(documents) - frequency + 0.5) / (frequency + 0.5))
        order = np.argsort(frequency == 0, kind="stable")
        own = int((frequency > 0).sum())
        self._hold(own, len(vectors) - own, len(vectors))
        self.row_of[torch.from_numpy(order)] = torch.arange(len(vectors))
        log_weight, rows = torch.from_numpy(np.log(idf[order])).float(), vectors[torch.from_numpy(order)]
        with torch.no_grad():
            self.table.copy_(rows[:own])
            self.log_weight.copy_(log_weight[:own])
            self.other_table.copy_(rows[own:])
            self.other_log_weight.copy_(log_weight[own:])
        self.to(device=device, dtype=dtype)

    def features(self, texts: Sequence[str], kind: str) -> Bags:
        """Word pieces of `texts`; queries and documents are read alike."""
        check_kind(kind)
        if not self.prepared:
            raise NoisewiseError("this table has no vocabulary yet: call prepare(documents) with your corpus first")
        pieces, text, counts = self._pieces(texts)
        ends = torch.from_numpy(np.cumsum(np.bincount(text, minlength=len(texts)), dtype=np.int64))
        return Bags(self.row_of.cpu()[torch.from_numpy(pieces)], torch.from_numpy(counts), ends)

    def forward(self, features: Bags) -> Float[Tensor, "text dim"]:
        """Unit rows; a text without a known piece is the first unit vector."""
        rows, starts = features.rows.to(self.table.device), features.starts.to(self.table.device)
        counts = features.counts.to(self.table)
        if self.training and self.token_dropout:
            counts = functional.dropout(counts, self.token_dropout)
        own = rows < len(self.table)
        at = torch.where(own, rows, 0)
        weights = torch.where(own, counts * self.log_weight[at].exp(), 0.0)
        summed = functional.embedding_bag(at, self.table, starts, mode="sum", per_sample_weights=weights)
        if not bool(own.all()):
            at = torch.where(own, 0, rows - len(self.table))
            weights = torch.where(own, 0.0, counts * self.other_log_weight[at].exp())
            summed = summed + functional.embedding_bag(
                at, self.other_table, starts, mode="sum", per_sample_weights=weights
            )
        empty = (summed == 0).all(1, keepdim=True)
        return functional.normalize(torch.where(empty, torch.eye(1, self.dim).to(summed), summed), dim=1)

    # ---- keeping

    def config(self) -> dict[str, Any]:
        """What `from_config` builds it from again, in JSON values; weights are in its state_dict."""
        if not self.prepared:
            raise NoisewiseError("a table without a vocabulary cannot be saved: call prepare(documents) first")
        return {
            "dim": self.dim, "seed": self.seed, "max_pieces": self.max_pieces, "token_dropout": self.token_dropout,
            "rows": [len(self.table), len(self.other_table)], "tokenizer": json.loads(self._tokenizer.to_str()),
        }  # fmt: skip

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WordPieceTable":
        """A table with that vocabulary, and weights to be loaded."""
        options = dict(config)
        (own, other), tokenizer = options.pop("rows"), options.pop("tokenizer")
        table = cls(**options)
        table._use(require("tokenizers", "retrieval").Tokenizer.from_str(json.dumps(tokenizer)))
        table._hold(own, other, own + other)
        return table

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json`, with the word pieces, and `model.safetensors`."""
        return write_pretrained(folder, _NAME, self.config(), self.state_dict())

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "WordPieceTable":
        """What `save_pretrained` wrote, in eval mode. Raises `RunFolderError` for the folder of another class and damage."""
        config, tensors = read_pretrained(folder, _NAME)
        try:
            table = cls.from_config(config)
            table.load_state_dict(tensors)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise RunFolderError(f"{folder} is damaged: {error}") from error
        return table.eval()

    def extra_repr(self) -> str:
        """What it was built with."""
        words = f"{len(self.table)} trained pieces of {len(self.row_of)}" if self.prepared else "not prepared"
        return f"dim={self.dim}, {words}"

    # ---- parts

    def _hold(self, own: int, other: int, pieces: int) -> None:
        self.table = nn.Parameter(torch.zeros(own, self.dim))
        self.log_weight = nn.Parameter(torch.zeros(own))
        self.register_buffer("other_table", torch.zeros(other, self.dim))
        self.register_buffer("other_log_weight", torch.zeros(other))
        self.register_buffer("row_of", torch.zeros(pieces, dtype=torch.int64))

    def _use(self, tokenizer: Any) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(self.max_pieces)
        self._tokenizer = tokenizer
        self._unknown = tokenizer.token_to_id(_UNKNOWN)

    def _pieces(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each different piece of each text: piece, text, and how often it is there, in the order of texts."""
        # a word has a piece at least: what lies behind the first words would be cut off after the work was done
        read = [" ".join(text.split(None, self.max_pieces)[: self.max_pieces]) for text in texts]
        encoded = self._tokenizer.encode_batch_fast(read, add_special_tokens=False)
        found = [encoding.ids for encoding in encoded]
        lengths = [len(ids) for ids in found]
        pieces = np.fromiter(itertools.chain.from_iterable(found), dtype=np.int64, count=sum(lengths))
        text = np.repeat(np.arange(len(found)), lengths)
        known = pieces != (-1 if self._unknown is None else self._unknown)
        size = self._tokenizer.get_vocab_size()
        keys, counts = np.unique(text[known] * size + pieces[known], return_counts=True)
        return keys % size, keys // size, counts.astype(np.float32)


def trained_tokenizer(documents: Sequence[str], vocabulary: int = _VOCABULARY) -> Any:
    """A word-piece tokenizer, of the library tokenizers, that is learned from `documents`: lower case, without accents."""
    tokenizers = require("tokenizers", "retrieval")
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    letters = sorted(
        {letter for text in documents for letter in normalizer.normalize_str(text) if not letter.isspace()}
    )
    # the library numbers letters inside words as it meets them in a hash table of random order, and breaks ties by these
    # numbers: named as special tokens, in order, they leave nothing to chance
    first = [*_SPECIAL, *letters, *(f"##{letter}" for letter in letters)]
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=max(check_count("vocabulary", vocabulary), len(first)), min_frequency=2, special_tokens=first,
        show_progress=False,
    )  # fmt: skip
    learner = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token=_UNKNOWN))
    learner.normalizer = normalizer
    learner.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    learner.train_from_iterator(documents, trainer)
    # without them as special tokens
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab=learner.get_vocab(), unk_token=_UNKNOWN))
    tokenizer.normalizer, tokenizer.pre_tokenizer = learner.normalizer, learner.pre_tokenizer
    tokenizer.decoder = tokenizers.decoders.WordPiece()
    return tokenizer


def _random_rows(rows: int, dim: int, seed: int) -> Tensor:
    drawn = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return functional.normalize(drawn, dim=1)


def _principal_rows(vectors: Tensor, dim: int) -> Tensor:
    if vectors.shape[1] < dim:
        raise InvalidInput(f"the encoder's table has {vectors.shape[1]} numbers a piece, dim={dim} asks for more")
    centred = vectors.double() - vectors.double().mean(0)
    _, axes = torch.linalg.eigh(centred.T @ centred)
    # the sign of an eigenvector is arbitrary, and changes no cosine
    return functional.normalize(centred @ axes[:, -dim:].flip(1), dim=1).float()


def _encoder_parts(encoder: Any) -> tuple[Any, Tensor]:
    """A tokenizer of its own, and the word-piece table of a model or of the folder of one."""
    tokenizers = require("tokenizers", "retrieval")
    if isinstance(encoder, str | Path):
        if not (Path(encoder) / "tokenizer.json").is_file():
            raise InvalidInput(
                f"{encoder} is no folder with a tokenizer.json: give that of a sentence-transformers model, or the model"
            )
        encoder = require("sentence_transformers", "retrieval").SentenceTransformer(str(encoder), device="cpu")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(encoder.tokenizer.backend_tokenizer.to_str())
        vectors = encoder[0].auto_model.get_input_embeddings().weight.detach().float().cpu()
    except (AttributeError, TypeError, IndexError) as error:
        raise InvalidInput(
            f"encoder={type(encoder).__name__} has no word-piece table to start from ({error})"
        ) from error
    if tokenizer.get_vocab_size() > len(vectors):
        raise InvalidInput(f"the encoder names {tokenizer.get_vocab_size()} pieces, its table holds {len(vectors)}")
    return tokenizer, vectors[: tokenizer.get_vocab_size()]
