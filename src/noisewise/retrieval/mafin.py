"""`Mafin`: better search on an embedding that cannot be trained, by one vector that holds it and what was found to help it."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.files import write_atomically
from noisewise.pretrained import read_pretrained, write_pretrained
from noisewise.retrieval.beir import Corpus, Qrels, Queries, check_judgements, text_of
from noisewise.retrieval.blackbox import CachedBlackBox, FetchCost
from noisewise.retrieval.bm25 import BM25
from noisewise.retrieval.cache import EmbeddingCache
from noisewise.retrieval.card import model_card
from noisewise.retrieval.distillation import distil_bm25
from noisewise.retrieval.fitting import RankingData, RetrievalFit, fit_joint
from noisewise.retrieval.forms import Form
from noisewise.retrieval.guard import GuardReport
from noisewise.retrieval.joint import Augment, JointEncoder
from noisewise.retrieval.lexical import LexicalBlock
from noisewise.retrieval.pairs import Pairs
from noisewise.retrieval.selection import Selector, check_form
from noisewise.retrieval.table import WordPieceTable
from noisewise.typing import check_count

__all__ = ["Mafin", "started"]

_NAME = "Mafin"
_LEAST_PAIRS = 20
# of `fit_joint`, that a fit takes
_OPTIONS = tuple(
    name
    for name in inspect.signature(fit_joint).parameters
    if name not in ("joint", "data", "dev", "seed", "resume", "progress")
)


class Mafin:
    """A black-box embedding with a small vector beside it, so that cosine ranks better than the black box alone.

    `black_box`: what `as_black_box` takes, such as a function from a list of texts to an array (text, dim), or an
    `OpenAICompatible` client. `augment`: what may stand beside it: "auto", a `WordPieceTable` and a `LexicalBlock`; one or both
    of those; any `Augment`, such as a `SentenceEncoder`. `weighting`: "equal", "lambda" or a number, see `JointEncoder`.
    `cache`: a file or an `EmbeddingCache` where black-box vectors are kept; None keeps them in memory. `black_dim`: keep
    only so many principal directions of the black-box vectors, to store less; None keeps them whole. `max_dim`: the most
    numbers that a vector may have; pgvector's indexes take 2,000, and 4,000 as halfvec.

    After `fit`: `choice_`, which form was chosen; `report_`, the guard's table; `fits_`, the trainings behind it; `form_`.

    Source: Zhang et al. 2024 (arXiv 2402.12177) for the joint vector and its training; the words, the guard and the start by
    distillation are ours.
    """

    def __init__(
        self,
        black_box: Any,
        augment: Any = "auto",
        weighting: str | float | int = "equal",
        *,
        cache: EmbeddingCache | str | Path | None = None,
        black_dim: int | None = None,
        max_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        self.black_box = black_box
        self.augment = augment
        self.weighting = weighting
        self.cache = cache
        self.black_dim = black_dim
        self.max_dim = max_dim
        self.seed = seed

    # ---- learning

    def fit(
        self,
        corpus: Mapping[str, Any],
        queries: Mapping[str, str],
        qrels: Mapping[str, Mapping[str, int]] | Iterable[tuple[str, str]],
        dev: Mapping[str, Mapping[str, int]] | None = None,
        *,
        search: Mapping[str, Any] | None = None,
        form: str | None = None,
        distil: int = 200,
        resume: str | Path | None = None,
        progress: bool = False,
        **options: Any,
    ) -> "Mafin":
        """Learn from judged `queries` over `corpus`, and choose what is measured to be best; returns self.

        `corpus[id]`: {"title", "text"} or a text; `qrels[query][document] = grade`, above 0 being relevant, or pairs (query id,
        document id). `dev`: judgements to choose on, of other queries; by default a fifth of the queries is
        held out where that is 50 or more, and else all are used by cross-fitting. `search`: the corpus that will be searched,
        where it is another one: what needs no labels is learned from it. `form`: a row of the guard's table, such as "Mafin", to
        build unjudged; None leaves the choice to the guard. `distil`: label-free training steps by which a trainable part starts
        as a copy of BM25, 0 for none. `resume`: a folder, from which the same call goes on after a crash. `options`: of
        `fit_joint`, such as epochs, lr, batch_size, hard_negatives.

        Raises `InvalidInput` for fewer than 20 pairs, ids that have no text, empty texts, and options there are not;
        and what the black box raises.
        """
        unknown = sorted(set(options) - set(_OPTIONS))
        if unknown:
            raise InvalidInput(f"there is no option {unknown[0]!r} of a fit; there are {', '.join(_OPTIONS)}")
        seed = check_count("seed", self.seed, 0)
        table, lexical = _parts(self.augment, seed)
        added = 0 if form is None else check_form(form, table, lexical)
        passages, asked = _corpus(corpus), _queries(queries)
        judged, held = _qrels(qrels), {} if dev is None else _qrels(dev)
        twice = sorted(judged.keys() & held.keys())
        if twice:
            raise InvalidInput(f"query {twice[0]!r} is in qrels and in dev (and {len(twice)} are): keep them apart")
        check_judgements(passages, asked, judged)
        check_judgements(passages, asked, held, "dev")
        searched = {} if search is None else _corpus(search)
        check_judgements(searched, {}, {}, "search") if searched else None
        names, documents = [*judged, *held], list(passages)
        texts = [text_of(passage) for passage in passages.values()]
        pairs = Pairs.of(judged | held, names, documents)
        if len(pairs) < _LEAST_PAIRS:
            raise InvalidInput(
                f"{len(pairs)} judged pairs with a grade above 0 are too few to learn from or to choose by, {_LEAST_PAIRS} are "
                "the least: judge more, or let an LLM write queries for your passages with noisewise.retrieval.synthesize"
            )
        box = self._connected()
        vectors = torch.from_numpy(box.vectors(texts, "document", progress))
        self.rotation_ = _rotation(vectors, self.black_dim)
        asked_texts = [asked[name] for name in names]
        asked_vectors = torch.from_numpy(box.vectors(asked_texts, "query", progress))
        data = RankingData(asked_texts, texts, self._reduced(asked_vectors), self._reduced(vectors), pairs)
        whole = None if self.rotation_ is None else (asked_vectors, vectors)
        kept = data.document_vectors.shape[1]
        if self.max_dim is not None and kept + added > check_count("max_dim", self.max_dim):
            raise InvalidInput(
                f"{form or 'the black box'} has {kept + added} numbers, more than max_dim={self.max_dim}: keep fewer of the "
                "black box with black_dim=, or take a smaller LexicalBlock(dim=) or WordPieceTable(dim=)"
            )
        unlabelled = [*texts, *(text_of(passage) for passage in searched.values())]
        if lexical is not None:
            lexical.fit(texts)
        if table is not None:
            language = "english" if lexical is None else lexical.language
            started(table, unlabelled, language, distil, seed, progress)
        folder = None if resume is None else Path(resume)
        apart = Pairs.of(held, names, documents) if held else None
        selector = Selector(
            data, apart, table, lexical, self.weighting, options, seed, folder, progress, self.max_dim, whole
        )
        chosen = selector.select() if form is None else selector.build(form)
        self.form_, self.report_, self.fits_ = chosen.form, chosen.report, chosen.fits
        self.choice_ = self.form_.name
        self.fingerprint_ = torch.from_numpy(box.fingerprint())
        return self.adapt(searched) if searched else self

    def adapt(self, corpus: Mapping[str, Any]) -> "Mafin":
        """Learn the words of another corpus, which needs no labels: vectors of passages change; weights do not. Returns self."""
        form = self._fitted()
        if form.lexical is not None:
            texts = [text_of(passage) for passage in _corpus(corpus).values()]
            block = LexicalBlock(form.lexical.dim, form.lexical.language, form.lexical.seed).fit(texts)
            self.form_ = Form(form.name, form.black_dim, form.joint, block, form.weight)
        return self

    # ---- use

    def encode_query(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """Unit vectors of queries, (text, dim), or (dim,) for a single text. Options as of `encode_document`."""
        return self._encode(sentences, "query", **options)

    def encode_document(self, sentences: str | Sequence[str], **options: Any) -> Any:
        """Unit vectors of passages, (text, dim), or (dim,) for a single text: float32, numpy unless `convert_to_tensor`.

        Options: `batch_size` (of the small model), `show_progress_bar`, `convert_to_numpy`, `convert_to_tensor`, and
        `normalize_embeddings`, which changes nothing, for they always are units. Vectors of the black box come from the cache
        where they are in it. A passage with a title is "title text", as `text_of` joins them.
        """
        return self._encode(sentences, "document", **options)

    def similarity(self, queries: Any, documents: Any) -> Float[Tensor, "query document"]:
        """Cosines of two sets of vectors."""
        a, b = (torch.as_tensor(np.asarray(part)).float() for part in (queries, documents))
        if a.shape[-1] != b.shape[-1]:
            raise InvalidInput(f"queries have {a.shape[-1]} numbers a vector, documents {b.shape[-1]}")
        return (
            functional.normalize(a.reshape(-1, a.shape[-1]), dim=1)
            @ functional.normalize(b.reshape(-1, b.shape[-1]), dim=1).mT
        )

    def get_embedding_dimension(self) -> int:
        """Numbers of a vector."""
        return self._fitted().dim

    @property
    def cost(self) -> FetchCost:
        """What the black box was asked since this model was made or loaded."""
        return self._connected().cost

    # ---- keeping

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json`, `model.safetensors`, the small model if there is one, and a model card; no key and no text."""
        form, path = self._fitted(), Path(folder)
        if form.joint is not None:
            form.joint.save_pretrained(path / "joint")
        config = {
            "black_box": self._connected().identity,
            "choice": form.name,
            "black_dim": form.black_dim,
            "weight": form.weight,
            "joint": form.joint is not None,
            "lexical": None if form.lexical is None else form.lexical.config(),
            "report": None if self.report_ is None else self.report_.to_dict(),
        }
        tensors = {"fingerprint": self.fingerprint_}
        if self.rotation_ is not None:
            tensors["rotation"] = self.rotation_
        if form.lexical is not None:
            tensors |= {f"lexical.{name}": value for name, value in form.lexical.tensors().items()}
        write_pretrained(path, _NAME, config, tensors)
        write_atomically(path / "README.md", model_card(config, form.dim))
        return path

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        black_box: Any,
        *,
        cache: EmbeddingCache | str | Path | None = None,
        check: bool = True,
        augment: Any = None,
    ) -> "Mafin":
        """What `save_pretrained` wrote, on the black box it was fitted to.

        `check`: ask the black box for eight fixed texts, and compare with what it said then. `augment`: the small model, where
        it is of a class of your own. Raises `RunFolderError` for the folder of another class and damage, `NoisewiseError` where
        the black box is another one or gives other vectors than it did.
        """
        config, tensors = read_pretrained(folder, _NAME)
        try:
            joint = JointEncoder.from_pretrained(Path(folder) / "joint", augment) if config["joint"] else None
            numbers = {name.removeprefix("lexical."): v for name, v in tensors.items() if name.startswith("lexical.")}
            lexical = None if config["lexical"] is None else LexicalBlock.from_saved(config["lexical"], numbers)
            form = Form(config["choice"], config["black_dim"], joint, lexical, config["weight"])
            report = None if config["report"] is None else GuardReport.from_dict(config["report"])
            fingerprint, identity = tensors["fingerprint"], config["black_box"]
        except (KeyError, TypeError) as error:
            raise RunFolderError(f"{folder} is damaged: {error}") from error
        made = cls(black_box, cache=cache)
        made.form_, made.report_, made.choice_, made.fits_ = form, report, form.name, {}
        made.rotation_, made.fingerprint_ = tensors.get("rotation"), fingerprint
        box = made._connected()
        if box.identity != identity:
            raise NoisewiseError(
                f"{folder} was fitted to {_said(identity)}, the black box given is {_said(box.identity)}: vectors of two models "
                "do not mix; give the one it was fitted to, or fit again"
            )
        if check:
            box.check_fingerprint(fingerprint.numpy())
        return made

    def as_sentence_transformer(self) -> Any:
        """This model as a `sentence_transformers.SentenceTransformer`, for code that takes one; not to be trained there."""
        from noisewise.retrieval.views import as_sentence_transformer

        self._fitted()
        return as_sentence_transformer(self)

    def as_mteb(self) -> Any:
        """This model by MTEB's encoder protocol: `mteb.evaluate(model.as_mteb(), tasks)`. Raises `MissingExtra` without mteb."""
        from noisewise.retrieval.views import as_mteb

        self._fitted()
        return as_mteb(self, str(self._connected().identity["model"]))

    # ---- parts

    form_: Form
    report_: GuardReport | None
    fits_: dict[str, RetrievalFit]
    choice_: str
    rotation_: Tensor | None
    fingerprint_: Tensor

    def _connected(self) -> CachedBlackBox:
        """The black box behind its cache, one for the life of this object."""
        if not hasattr(self, "_box"):
            given = self.black_box
            if isinstance(given, CachedBlackBox) and self.cache is not None:
                raise InvalidInput(
                    "the black box given has a cache of its own: leave cache= out, or give what is behind it"
                )
            self._box = given if isinstance(given, CachedBlackBox) else CachedBlackBox(given, self.cache)
        return self._box

    def _fitted(self) -> Form:
        if not hasattr(self, "form_"):
            raise InvalidInput("this Mafin is not fitted yet: call fit(corpus, queries, qrels), or load one")
        return self.form_

    def _encode(
        self,
        sentences: str | Sequence[str],
        kind: str,
        *,
        batch_size: int = 256,
        show_progress_bar: bool | None = None,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        normalize_embeddings: bool = True,
    ) -> Any:
        form = self._fitted()
        texts = (
            [sentences]
            if isinstance(sentences, str)
            else list(sentences)
            if isinstance(sentences, Iterable)
            else [sentences]
        )
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InvalidInput(
                    f"text {index} is no text but {text!r:.60}: text_of(passage) joins a title and a text"
                )
        if not texts:
            found = torch.empty(0, form.dim)
        else:
            black = self._reduced(torch.from_numpy(self._connected().vectors(texts, kind, bool(show_progress_bar))))
            found = form.vectors(texts, black, kind, batch_size)
        if isinstance(sentences, str):
            found = found[0]
        return found if convert_to_tensor or not convert_to_numpy else found.numpy()

    def _reduced(self, vectors: Float[Tensor, "text dim"]) -> Float[Tensor, "text kept"]:
        return vectors if self.rotation_ is None else functional.normalize(vectors @ self.rotation_, dim=1)


def _parts(augment: Any, seed: int) -> tuple[Any, LexicalBlock | None]:
    """(the trainable part, the words), either of which may be None."""
    if isinstance(augment, str):
        if augment != "auto":
            raise InvalidInput(f"augment must be 'auto', a part or a list of parts, got {augment!r}")
        return WordPieceTable(seed=seed), LexicalBlock(seed=seed)
    given = list(augment) if isinstance(augment, list | tuple) else [augment]
    words = [part for part in given if isinstance(part, LexicalBlock)]
    small = [part for part in given if isinstance(part, nn.Module) and isinstance(part, Augment)]
    if not given or len(words) + len(small) != len(given) or max(len(words), len(small)) > 1:
        names = [type(part).__name__ for part in given]
        raise InvalidInput(f"augment is one LexicalBlock, one trainable part, or both, got {names}")
    return small[0] if small else None, words[0] if words else None


def started(
    table: Any, texts: Sequence[str], language: str | None, steps: int, seed: int, progress: bool = False
) -> None:
    """Give a trainable part the vocabulary of `texts`, and a start that ranks them as BM25 does, after `steps` of training."""
    table.prepare(texts)
    if check_count("distil", steps, 0):
        fit = distil_bm25(table, BM25.of(texts, language=language), texts, steps=steps, seed=seed, progress=progress)
        if fit.interrupted:
            raise KeyboardInterrupt
    table.eval()


def _rotation(vectors: Float[Tensor, "text dim"], kept: int | None) -> Tensor | None:
    """The principal directions, uncentred as cosines are, [dim, kept]."""
    if kept is None:
        return None
    if not 0 < check_count("black_dim", kept) <= vectors.shape[1]:
        raise InvalidInput(f"black_dim must be at most the black box's {vectors.shape[1]} dimensions, got {kept}")
    wide = vectors.double()
    _, axes = torch.linalg.eigh(wide.T @ wide)
    return axes[:, -kept:].flip(1).float().contiguous()


def _corpus(corpus: Mapping[str, Any]) -> Corpus:
    if not isinstance(corpus, Mapping) or not corpus:
        raise InvalidInput(f"corpus must map ids to texts or {{'title', 'text'}}, got {type(corpus).__name__}")
    made = {}
    for name, passage in corpus.items():
        if isinstance(passage, str):
            passage = {"title": "", "text": passage}
        if not isinstance(passage, Mapping) or not isinstance(passage.get("text"), str):
            raise InvalidInput(f"passage {name!r} must be a text or hold one as 'text', got {passage!r:.80}")
        made[str(name)] = {**passage, "title": str(passage.get("title") or "")}
    return made


def _queries(queries: Mapping[str, str]) -> Queries:
    if not isinstance(queries, Mapping):
        raise InvalidInput(
            f"queries must map ids to texts, got {type(queries).__name__}: dict(zip(ids, texts)) makes one"
        )
    for name, text in queries.items():
        if not isinstance(text, str):
            raise InvalidInput(f"query {name!r} must be a text, got {text!r:.60}")
    return {str(name): text for name, text in queries.items()}


def _qrels(qrels: Mapping[str, Mapping[str, int]] | Iterable[tuple[str, str]]) -> Qrels:
    if isinstance(qrels, Mapping):
        for query, judged in qrels.items():
            if not isinstance(judged, Mapping):
                raise InvalidInput(f"qrels[{query!r}] must map documents to grades, got {judged!r:.60}")
            for document, grade in judged.items():
                if isinstance(grade, bool) or not isinstance(grade, int | np.integer):
                    raise InvalidInput(f"the grade of {query!r} and {document!r} must be a whole number, got {grade!r}")
        # a query without anything relevant teaches nothing and cannot be judged
        return {
            str(query): {str(document): int(grade) for document, grade in judged.items()}
            for query, judged in qrels.items()
            if any(grade > 0 for grade in judged.values())
        }
    made: Qrels = {}
    if isinstance(qrels, str) or not isinstance(qrels, Iterable):
        raise InvalidInput(f"qrels must be {{query: {{document: grade}}}} or pairs of ids, got {type(qrels).__name__}")
    for pair in qrels.tolist() if isinstance(qrels, np.ndarray) else qrels:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InvalidInput(f"a pair is (query id, document id), got {pair!r:.60}")
        made.setdefault(str(pair[0]), {})[str(pair[1])] = 1
    return made


def _said(identity: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items() if value is not None)
