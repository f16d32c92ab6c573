"""`noisewise retrieval`: fit a Mafin to judged queries over an endpoint, score it, write queries, know the bill first."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape

from noisewise.command import (
    COMMAND,
    REPORT,
    RUN,
    SUMMARY,
    claim,
    interruptible,
    read_command,
    read_json,
    refuse_file,
    refuse_unfinished,
    typed,
)
from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError, require
from noisewise.files import write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    from noisewise.retrieval.beir import Corpus, Qrels, Queries
    from noisewise.retrieval.blackbox import CachedBlackBox
    from noisewise.retrieval.evaluation import Evaluation
    from noisewise.retrieval.mafin import Mafin
    from noisewise.retrieval.transport import Transport
    from noisewise.retrieval.vectors import CostEstimate

__all__ = ["Augments", "TooLong", "retrieval_app"]

_MODEL, _CACHE = "model", "vectors.sqlite"
# what `Mafin.fit` takes at least
_LEAST_PAIRS = 20
# seconds in which an endpoint takes a connection
_REACHED = 10.0
_BOX = (
    "endpoint", "model", "encoder", "key_env", "dimensions", "query_type", "document_type", "query_prefix", "document_prefix",
    "too_long", "max_tokens",
)  # fmt: skip
_USUAL = {
    "key_env": "OPENAI_API_KEY", "too_long": "raise", "max_tokens": 8191, "split": "train", "augment": "auto",
    "weighting": "equal", "epochs": 10.0, "lr": 3e-3, "batch_size": 32, "hard_negatives": 0, "language": "english", "seed": 0,
}  # fmt: skip

retrieval_app = typer.Typer(
    no_args_is_help=True,
    help="Better search on an embedding that cannot be trained: fit, evaluate, write queries, know the bill.",
)


class Augments(StrEnum):
    """What may stand beside the black box."""

    AUTO = "auto"
    WORDS = "words"
    TABLE = "table"


class TooLong(StrEnum):
    """What happens to texts over --max-tokens."""

    RAISE = "raise"
    TRUNCATE = "truncate"
    CHUNK = "chunk"


Data = Annotated[
    str, typer.Argument(help="Folder of corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv (BEIR), or a hub id like BeIR/scifact.")
]  # fmt: skip
Endpoint = Annotated[str | None, typer.Option(help="OpenAI-compatible base URL, mostly ending in /v1.")]
ModelName = Annotated[str | None, typer.Option("--model", help="Embedding model of the endpoint.")]
Encoder = Annotated[
    str | None,
    typer.Option(help="Folder or name of a sentence-transformers model, as the black box instead of an endpoint."),
]
KeyEnv = Annotated[
    str, typer.Option(help="NAME of the environment variable that holds the key; '' for a server without keys.")
]
Dimensions = Annotated[int | None, typer.Option(help="Numbers of a vector to ask the endpoint for.")]
QueryType = Annotated[str | None, typer.Option(help="input_type that the endpoint wants for queries.")]
DocumentType = Annotated[str | None, typer.Option(help="input_type that the endpoint wants for documents.")]
QueryPrefix = Annotated[str | None, typer.Option(help="Put before queries.")]
DocumentPrefix = Annotated[str | None, typer.Option(help="Put before documents.")]
LongTexts = Annotated[TooLong, typer.Option(help="Texts over --max-tokens: refuse, cut, or the mean of their chunks.")]
MaxTokens = Annotated[int, typer.Option(help="That the endpoint takes of a text.")]
Price = Annotated[float | None, typer.Option(help="Money per million tokens.")]
Rpm = Annotated[float | None, typer.Option(help="Requests a minute that are allowed.")]
Tpm = Annotated[float | None, typer.Option(help="Tokens a minute that are allowed.")]
Cache = Annotated[Path | None, typer.Option(help="SQLite file of vectors.", show_default="OUT/vectors.sqlite")]
Split = Annotated[str, typer.Option(help="Judgements to learn from: qrels/SPLIT.tsv.")]
Language = Annotated[str, typer.Option(help="Of stop words and stemming; 'none' for words as they are.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would cost, and ask nothing.")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print JSON for a script.")]


@retrieval_app.command("fit")
def fit_command(
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder of the model, its report, its vectors and its checkpoints.")
    ],
    endpoint: Endpoint = None,
    model: ModelName = None,
    encoder: Encoder = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    dimensions: Dimensions = None,
    query_type: QueryType = None,
    document_type: DocumentType = None,
    query_prefix: QueryPrefix = None,
    document_prefix: DocumentPrefix = None,
    too_long: LongTexts = TooLong.RAISE,
    max_tokens: MaxTokens = 8191,
    price: Price = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    cache: Cache = None,
    split: Split = "train",
    dev: Annotated[
        str | None, typer.Option(help="Judgements to choose on.", show_default="dev where there is one")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Data whose passages will be searched, where they are others.")
    ] = None,
    augment: Annotated[Augments, typer.Option(help="What may stand beside the black box.")] = Augments.AUTO,
    form: Annotated[str | None, typer.Option(help="A row of the guard's table, to build unjudged.")] = None,
    weighting: Annotated[str, typer.Option(help="Of Mafin: equal, lambda or a number.")] = "equal",
    black_dim: Annotated[int | None, typer.Option(help="Keep so many principal directions of the black box.")] = None,
    max_dim: Annotated[
        int | None, typer.Option(help="Most numbers of a vector; pgvector indexes 2000, and 4000 as halfvec.")
    ] = None,
    language: Language = "english",
    epochs: Annotated[float, typer.Option(help="Passes over the judged pairs.")] = 10.0,
    lr: Annotated[float, typer.Option(help="Largest learning rate of the small model.")] = 3e-3,
    batch_size: Annotated[int, typer.Option(help="Pairs of a training step.")] = 32,
    hard_negatives: Annotated[int, typer.Option(help="Per query, from the black box's list.")] = 0,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Fit to judged queries of DATA and choose what is measured to be best; the same command goes on after a crash."""
    options: dict[str, Any] = {
        "endpoint": endpoint, "model": model, "encoder": encoder, "key_env": key_env, "dimensions": dimensions,
        "query_type": query_type, "document_type": document_type, "query_prefix": query_prefix,
        "document_prefix": document_prefix, "too_long": too_long.value, "max_tokens": check_count("--max-tokens", max_tokens),
        "split": split, "dev": dev, "search": search, "augment": augment.value, "form": form, "weighting": weighting,
        "black_dim": black_dim, "max_dim": max_dim, "language": language, "epochs": check_positive("--epochs", epochs),
        "lr": check_positive("--lr", lr), "batch_size": check_count("--batch-size", batch_size),
        "hard_negatives": check_count("--hard-negatives", hard_negatives, 0), "seed": check_count("--seed", seed, 0),
    }  # fmt: skip
    refuse_file(out)
    with interruptible("what was fetched is kept; the same command goes on"):
        corpus, queries, qrels = _load(data)
        chosen_dev = dev or ("dev" if "dev" in qrels and split != "dev" else None)
        judged, held = _judged(qrels, split, data), {} if chosen_dev is None else _judged(qrels, chosen_dev, data)
        asked = [(name, queries[name]) for name in (*judged, *held)]
        if dry_run:
            box = _cached(_client(options, price, rpm, tpm), cache or out / _CACHE, new=False)
            _show_estimate(_estimates(box, corpus, asked), as_json)
            return
        command = {"command": "retrieval fit", "data": data, "data_sha256": _digest(corpus, queries, qrels), **options}
        record = out / COMMAND
        _reclaim(out, command)
        if record.is_file():
            claim(out, command, (RUN, _MODEL))
        if not (record.is_file() and _finished(out)):
            client, parts, weight = _client(options, price, rpm, tpm), _augments(options), _weighting(weighting)
            searched = None if search is None else _passages(search)
            _check_fit(parts, options, judged, held, data)
            _check_answering(client)
            before = _cached(client, cache or out / _CACHE, new=False)
            _announce(_estimates(before, corpus, asked).values())
            claim(out, command, (RUN, _MODEL))
            box = _cached(client, cache or out / _CACHE)
            from noisewise.retrieval.mafin import Mafin

            resumed = (out / RUN).is_dir()
            mafin = Mafin(box, list(parts.values()), weight, black_dim=black_dim, max_dim=max_dim, seed=seed).fit(
                corpus, queries, judged, held or None, search=searched, form=form, resume=out / RUN, progress=True,
                epochs=options["epochs"], lr=options["lr"], batch_size=batch_size, hard_negatives=hard_negatives,
            )  # fmt: skip
            mafin.save_pretrained(out / _MODEL)
            facts = _facts(mafin, box, data, options, len(corpus), len(judged), len(held), resumed)
            line = typed(["noisewise", "retrieval", "fit", data, "-o", str(out)], options, _USUAL)
            from noisewise.retrieval.page import write_page

            write_page(mafin, facts, line, out, out / REPORT)
            write_atomically(out / SUMMARY, json.dumps(facts, indent=2))
    _show_fit(read_json(out / SUMMARY), out, as_json)


@retrieval_app.command("evaluate")
def evaluate_command(
    model: Annotated[Path, typer.Argument(help="OUT of `noisewise retrieval fit`.")],
    data: Data,
    split: Annotated[str, typer.Option(help="Judgements to score by: qrels/SPLIT.tsv.")] = "test",
    adapt: Annotated[
        bool, typer.Option("--adapt/--as-fitted", help="Learn the words of these passages first.")
    ] = False,
    price: Price = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    cache: Cache = None,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Score a fitted model on a split of DATA beside its black box, with the paired interval of the gain."""
    with interruptible("what was fetched is kept"):
        if model.name == _MODEL and (model.parent / COMMAND).is_file():
            # OUT/model is what the fit says that it wrote
            model = model.parent
        options = _options_of(model)
        corpus, queries, qrels = _load(data)
        judged = _judged(qrels, split, data)
        asked = [(name, queries[name]) for name in judged]
        client, kept = _client(options, price, rpm, tpm), cache or _cache_of(model)
        if dry_run:
            _show_estimate(_estimates(_cached(client, kept, new=False), corpus, asked), as_json)
            return
        _check_answering(client)
        box = _cached(client, kept)
        _announce(_estimates(box, corpus, asked).values())
        from noisewise.retrieval.mafin import Mafin

        mafin = Mafin.from_pretrained(model / _MODEL, box)
        if adapt and mafin.form_.lexical is None:
            typer.echo(f"noisewise: --adapt changes nothing, {mafin.choice_} holds no words", err=True)
        if adapt:
            mafin.adapt(corpus)
        facts = _scores(mafin, box, corpus, queries, judged)
        # the queries that a fit learns from and chooses by say too much good of it
        own = options["data_sha256"] == _digest(corpus, queries, qrels)
        facts["fitted_to"] = own and split in (options["split"], options["dev"] or "dev")
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    _show_scores(facts)


@retrieval_app.command("estimate-cost")
def estimate_command(
    data: Data,
    endpoint: Endpoint = None,
    model: ModelName = None,
    encoder: Encoder = None,
    key_env: KeyEnv = "OPENAI_API_KEY",
    dimensions: Dimensions = None,
    query_type: QueryType = None,
    document_type: DocumentType = None,
    query_prefix: QueryPrefix = None,
    document_prefix: DocumentPrefix = None,
    too_long: LongTexts = TooLong.RAISE,
    max_tokens: MaxTokens = 8191,
    price: Price = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    cache: Annotated[Path | None, typer.Option(help="SQLite file of vectors that are there already.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Say what embedding all passages and queries of DATA would cost, without a call."""
    options = {
        "endpoint": endpoint, "model": model, "encoder": encoder, "key_env": key_env, "dimensions": dimensions,
        "query_type": query_type, "document_type": document_type, "query_prefix": query_prefix,
        "document_prefix": document_prefix, "too_long": too_long.value, "max_tokens": check_count("--max-tokens", max_tokens),
    }  # fmt: skip
    if cache is not None and not cache.is_file():
        raise InvalidInput(f"--cache {cache} is no file: leave it out where nothing was embedded yet")
    corpus, queries = _texts(data)
    box = _cached(_client(options, price, rpm, tpm), cache)
    _show_estimate(_estimates(box, corpus, list(queries.items())), as_json)


@retrieval_app.command("synthesize")
def synthesize_command(
    data: Annotated[Path, typer.Argument(help="Folder with corpus.jsonl.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="New folder of the BEIR layout, for `fit`.")],
    endpoint: Annotated[str, typer.Option(help="OpenAI-compatible base URL of a chat model.")],
    model: Annotated[str, typer.Option("--model", help="Chat model of the endpoint.")],
    key_env: KeyEnv = "OPENAI_API_KEY",
    per_document: Annotated[int, typer.Option(help="Queries for each passage.")] = 2,
    sample: Annotated[int | None, typer.Option(help="So many passages, drawn at random.", show_default="all")] = None,
    example: Annotated[list[str] | None, typer.Option(help="A query whose style to follow; 3 to 8 are good.")] = None,
    language: Language = "english",
    price: Annotated[float | None, typer.Option(help="Money per million tokens asked.")] = None,
    answer_price: Annotated[
        float | None, typer.Option(help="Money per million tokens answered.", show_default="--price")
    ] = None,
    rpm: Rpm = None,
    tpm: Tpm = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample.")] = 0,
    dry_run: DryRun = False,
    as_json: JsonFlag = False,
) -> None:
    """Let a language model write queries for passages that nobody asked about; the same command goes on after a crash."""
    from noisewise.retrieval.beir import read_corpus
    from noisewise.retrieval.chat import ChatEndpoint
    from noisewise.retrieval.synthesis import estimate_synthesis, synthesize

    refuse_file(out)
    spoken, corpus = _language(language), read_corpus(data)
    prices = None if price is None else (price, price if answer_price is None else answer_price)
    llm = ChatEndpoint(endpoint, model, key=key_env or None, price=prices, rpm=rpm, tpm=tpm)
    given: dict[str, Any] = {
        "per_document": check_count("--per-document", per_document),
        "sample": None if sample is None else check_count("--sample", sample),
        "examples": tuple(example or ()),
        "seed": check_count("--seed", seed, 0),
    }
    with interruptible("what was written is kept; the same command goes on"):
        # a larger sample goes on in the same folder, so it is not of the command
        command = {
            "command": "retrieval synthesize", "data": str(data), "endpoint": endpoint, "model": model,
            "per_document": per_document, "example": list(given["examples"]), "language": language,
        }  # fmt: skip
        own = ("corpus.jsonl", "queries.jsonl", "qrels")
        if (out / COMMAND).is_file():
            claim(out, command, own)
        estimate = estimate_synthesis(corpus, llm, out=out if out.is_dir() else None, **given)
        if dry_run:
            _show_estimate({"answers": estimate}, as_json)
            return
        _check_answering(llm)
        claim(out, command, own)
        _announce([estimate])
        queries, qrels = synthesize(corpus, llm, out=out, language=spoken, progress=True, **given)
        _write_beir(out, corpus, queries, qrels)
    asked_about = len({document for of in qrels.values() for document in of})
    facts = {"out": str(out), "passages": asked_about, "queries": len(queries), "cost": vars(llm.cost)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(f"{len(queries)} queries for {asked_about} passages: {out}\ncost: {llm.cost}")


# --- what a command is given


def _load(source: str) -> "tuple[Corpus, Queries, dict[str, Qrels]]":
    """A set without passages and queries that are empty."""
    from noisewise.retrieval.beir import drop_empty, load_beir

    corpus, queries, qrels = load_beir(source)
    kept, asked, _ = drop_empty(corpus, queries, {})
    return kept, asked, {split: drop_empty(corpus, queries, judged)[2] for split, judged in qrels.items()}


def _texts(source: str) -> "tuple[Corpus, Queries]":
    """Passages and queries, if there are any yet, of a set that need not be judged."""
    from noisewise.retrieval.beir import drop_empty, read_corpus, read_queries

    folder = Path(source)
    if not folder.is_dir():
        return _load(source)[:2]
    asked = read_queries(folder) if any(folder.glob("queries.jsonl*")) else {}
    return drop_empty(read_corpus(folder), asked, {})[:2]


def _passages(source: str) -> "Corpus":
    """Those of a set that need not be judged, without empty ones."""
    from noisewise.retrieval.beir import drop_empty, read_corpus

    return drop_empty(read_corpus(source), {}, {})[0] if Path(source).is_dir() else _load(source)[0]


def _digest(*parts: Any) -> str:
    """Of all that was read, so that the same command on other contents is told from the same command."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _judged(qrels: "dict[str, Qrels]", split: str, data: str) -> "Qrels":
    if split not in qrels:
        raise InvalidInput(f"{data} has no split {split!r}; it has {', '.join(sorted(qrels))}")
    return {query: of for query, of in qrels[split].items() if any(grade > 0 for grade in of.values())}


def _client(options: dict[str, Any], price: float | None, rpm: float | None, tpm: float | None) -> Any:
    """The black box of the options, which was not asked for anything yet."""
    if (options["encoder"] is None) == (options["endpoint"] is None):
        raise InvalidInput("give the black box: --endpoint URL with --model NAME, or --encoder FOLDER, and not both")
    if options["encoder"] is not None:
        return _encoder(options["encoder"])
    if options["model"] is None:
        raise InvalidInput(f"--endpoint {options['endpoint']} needs --model NAME")
    from noisewise.retrieval.endpoint import OpenAICompatible

    def by_kind(name: str) -> dict[str, str] | None:
        found = {kind: options[f"{kind}_{name}"] for kind in ("query", "document")}
        return {kind: value for kind, value in found.items() if value is not None} or None

    return OpenAICompatible(
        options["endpoint"], options["model"], dimensions=options["dimensions"], key=options["key_env"] or None,
        input_types=by_kind("type"), prefixes=by_kind("prefix"), too_long=options["too_long"],
        max_tokens=options["max_tokens"], price=price, rpm=rpm, tpm=tpm,
    )  # fmt: skip


def _encoder(name: str) -> Any:
    transformers = require("sentence_transformers", "retrieval")
    try:
        return transformers.SentenceTransformer(name)
    except (OSError, ValueError) as error:
        said = str(error).partition("\n")[0]
        raise InvalidInput(
            f"--encoder {name} cannot be loaded ({said}); give the folder of a sentence-transformers model, or its hub id"
        ) from error


def _cached(client: Any, path: Path | None, new: bool = True) -> "CachedBlackBox":
    """`client` behind the vectors in `path`; without a `new` file, where there is none yet."""
    from noisewise.retrieval.blackbox import CachedBlackBox

    return CachedBlackBox(client, path if path is not None and (new or path.is_file()) else None)


def _language(name: str) -> str | None:
    if name == "none":
        return None
    known = require("Stemmer", "retrieval").algorithms()
    if name not in known:
        raise InvalidInput(f"--language must be none or one of {', '.join(known)}, got {name!r}")
    return name


def _weighting(given: str) -> Any:
    if given in ("equal", "lambda"):
        return given
    try:
        return check_positive("--weighting", float(given))
    except ValueError as error:
        raise InvalidInput(f"--weighting must be equal, lambda or a number above 0, got {given!r}") from error


def _augments(options: dict[str, Any]) -> dict[str, Any]:
    """What may stand beside the black box, by its name."""
    from noisewise.retrieval.lexical import LexicalBlock
    from noisewise.retrieval.table import WordPieceTable

    seed, language = options["seed"], _language(options["language"])
    parts: dict[str, Any] = {}
    if options["augment"] != Augments.WORDS:
        parts["table"] = WordPieceTable(seed=seed)
    if options["augment"] != Augments.TABLE:
        parts["words"] = LexicalBlock(language=language, seed=seed)
    return parts


def _check_fit(parts: dict[str, Any], options: dict[str, Any], judged: "Qrels", held: "Qrels", data: str) -> None:
    """Refuse what cannot be learned from, before a folder is made and anything is paid for."""
    from noisewise.retrieval.selection import check_form

    if options["form"] is not None:
        check_form(options["form"], parts.get("table"), parts.get("words"))
    twice = sorted(judged.keys() & held.keys())
    if twice:
        raise InvalidInput(
            f"query {twice[0]!r} is judged in --split and in --dev (and {len(twice)} are): keep them apart"
        )
    pairs = sum(grade > 0 for of in (*judged.values(), *held.values()) for grade in of.values())
    if pairs < _LEAST_PAIRS:
        raise InvalidInput(
            f"{data} has {pairs} judged pairs with a grade above 0 in split {options['split']!r}; {_LEAST_PAIRS} are the least "
            f"to learn from and to choose by: judge more, or let a language model write queries: noisewise retrieval synthesize "
            f"{data} -o FOLDER, and fit to FOLDER"
        )


def _check_answering(client: Any) -> None:
    """Refuse an endpoint without its key or that is not there, rather than after minutes of trying again."""
    transport: Transport | None = getattr(client, "transport", None)
    if transport is None:
        return
    if transport.key is not None and not os.environ.get(transport.key, "").strip():
        raise InvalidInput(
            f"the environment variable {transport.key}, which holds the key for {transport.provider}, is not set: set it, name "
            "another one by --key-env, or give --key-env '' for a server without keys"
        )
    httpx = require("httpx", "retrieval")
    near = urlsplit(transport.base_url).hostname in ("127.0.0.1", "::1", "localhost")
    try:
        # any answer is good; nothing is asked and no key is sent
        httpx.get(transport.base_url, timeout=_REACHED, trust_env=not near)
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise NoisewiseError(
            f"{transport.base_url} cannot be reached ({error or type(error).__name__}): check --endpoint, and whether it runs"
        ) from error
    except httpx.HTTPError:
        return


def _cache_of(folder: Path) -> Path:
    """Where the fit in `folder` keeps its vectors."""
    kept = read_json(folder / SUMMARY).get("cache") if (folder / SUMMARY).is_file() else None
    return Path(kept) if kept is not None and Path(kept).is_file() else folder / _CACHE


def _reclaim(out: Path, command: dict[str, Any]) -> None:
    """Let a corrected command have the folder of one that failed before it trained anything; vectors that were paid stay."""
    record = out / COMMAND
    untouched = not any((out / name).exists() for name in (RUN, _MODEL, SUMMARY, REPORT))
    if record.is_file() and untouched and read_command(record).get("command") == command["command"]:
        write_atomically(record, json.dumps(command, indent=2))


def _options_of(folder: Path) -> dict[str, Any]:
    """Of the fit in `folder`, which must be there."""
    if not (folder / _MODEL / "config.json").is_file():
        refuse_unfinished(folder, "model of `noisewise retrieval fit`")
    options = read_command(folder / COMMAND)
    if any(name not in options for name in _BOX):
        raise RunFolderError(f"{folder / COMMAND} does not name the black box: it is of another command")
    return options


def _finished(out: Path) -> bool:
    return (out / SUMMARY).is_file() and (out / REPORT).is_file()


def _estimates(box: "CachedBlackBox", corpus: "Corpus", queries: list[tuple[str, str]]) -> "dict[str, CostEstimate]":
    """Of passages and of queries (id, text). Raises `InvalidInput` that names one that is too long."""
    from noisewise.retrieval.beir import text_of
    from noisewise.retrieval.vectors import UnusableText

    found = {}
    passages = [(name, text_of(passage)) for name, passage in corpus.items()]
    for kind, texts in (("document", passages), ("query", queries)):
        try:
            found[kind] = box.estimate([text for _, text in texts], kind)
        except UnusableText as error:
            reason, _, _ = error.reason.partition(":")
            raise InvalidInput(
                f"{kind} {texts[error.index][0]!r} {reason}: give --too-long truncate or chunk, or the model's own --max-tokens"
            ) from error
    return {"passages": found["document"], "queries": found["query"]}


# --- what a command says


def _facts(
    mafin: "Mafin",
    box: "CachedBlackBox",
    data: str,
    options: dict[str, Any],
    passages: int,
    queries: int,
    dev: int,
    resumed: bool,
) -> dict[str, Any]:
    return {
        **options,
        "data": data,
        "passages": passages,
        "queries": queries,
        "dev_queries": dev,
        "choice": mafin.choice_,
        "dim": mafin.get_embedding_dimension(),
        "black_box_dim": box.dim,
        "report": None if mafin.report_ is None else mafin.report_.to_dict(),
        "training_seconds": sum(fit.cost.seconds for fit in mafin.fits_.values()),
        "cost": vars(box.cost),
        "resumed": resumed,
        "cache": None if box.cache.path is None else str(box.cache.path.resolve()),
    }


def _show_fit(facts: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    if facts["report"] is not None:
        from noisewise.retrieval.guard import GuardReport

        console.print(escape(str(GuardReport.from_dict(facts["report"]))), soft_wrap=True, highlight=False)
    console.print(f"choice: {escape(facts['choice'])}", highlight=False)
    _show_bill(console, facts)
    console.print(f"model:  {escape(str(out / _MODEL))}", soft_wrap=True, highlight=False)
    console.print(f"report: {(out / REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)


def _show_bill(console: Console, facts: dict[str, Any]) -> None:
    from noisewise.retrieval.vectors import FetchCost

    alone = "" if facts["dim"] == facts["black_box_dim"] else f", the black box alone has {facts['black_box_dim']:,}"
    console.print(f"stored: {facts['dim']:,} numbers a vector{alone}", highlight=False)
    since = ", since it was resumed" if facts.get("resumed") else ""
    console.print(f"cost:   {FetchCost(**facts['cost'])}{since}", highlight=False)


def _scores(
    mafin: "Mafin", box: "CachedBlackBox", corpus: "Corpus", queries: "Queries", judged: "Qrels"
) -> dict[str, Any]:
    """Means of both, and paired gains."""
    from noisewise.retrieval.beir import text_of
    from noisewise.retrieval.evaluation import evaluate, exact_run, paired_bootstrap

    names, asked = list(corpus), list(judged)
    texts, questions = [text_of(corpus[name]) for name in names], [queries[name] for name in asked]
    whole = box.vectors(questions, "query", progress=True), box.vectors(texts, "document", progress=True)
    ours = mafin.encode_query(questions), mafin.encode_document(texts)
    cut = mafin.choice_ == "black box" and mafin.rotation_ is not None
    name = f"black box, cut to {ours[0].shape[1]} numbers" if cut else mafin.choice_
    found: dict[str, Evaluation] = {
        one: evaluate(judged, exact_run(asked, q, names, d)) for one, (q, d) in ((name, ours), ("black box", whole))
    }
    pairs = {measure: (found[name].per_query[measure], of) for measure, of in found["black box"].per_query.items()}
    gains = {measure: paired_bootstrap(*pair) for measure, pair in pairs.items()}
    return {
        "queries": len(asked),
        "passages": len(names),
        "choice": mafin.choice_,
        "dim": mafin.get_embedding_dimension(),
        "black_box_dim": box.dim,
        "cost": vars(box.cost),
        "scores": {one: {measure: value.to_dict() for measure, value in of.mean.items()} for one, of in found.items()},
        "gain": {measure: [gain.mean, gain.low, gain.high] for measure, gain in gains.items()},
    }


def _show_scores(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from noisewise.metrics.measurement import Measurement

    names = list(facts["scores"])
    table = Table("measure ↑", *names, *(["gain, 95 % interval"] * (len(names) > 1)),
                  title=f"{facts['queries']} queries, {facts['passages']} passages", title_justify="left")  # fmt: skip
    for measure, (mean, low, high) in facts["gain"].items():
        cells = [str(Measurement.from_dict(facts["scores"][name][measure])) for name in names]
        table.add_row(measure, *cells, *([f"{mean:+.3f} [{low:.3f}, {high:.3f}]"] * (len(names) > 1)))
    console = Console()
    console.print(table)
    if facts["fitted_to"]:
        console.print("These queries were learned from or chosen by: others say how good it is.", highlight=False)
    _show_bill(console, facts)


def _announce(estimates: "Iterable[CostEstimate]") -> None:
    """What is about to be asked for, on one line, where it costs money or minutes."""
    one, *others = estimates
    for other in others:
        one = replace(
            one, texts=one.texts + other.texts, missing=one.missing + other.missing, tokens=one.tokens + other.tokens,
            money=_sum(one.money, other.money), minutes=_sum(one.minutes, other.minutes),
        )  # fmt: skip
    if one.missing and (one.money is not None or one.minutes is not None):
        typer.echo(f"noisewise: this will cost: {one}", err=True)


def _sum(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a + b


def _show_estimate(estimates: "dict[str, CostEstimate]", as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({name: vars(one) for name, one in estimates.items()}, indent=2))
        return
    for name, one in estimates.items():
        typer.echo(f"{name}: {one}")


def _write_beir(out: Path, corpus: "Corpus", queries: "Queries", qrels: "Qrels") -> None:
    """The judgements last: a folder that was cut short is none to fit to."""

    def lines(rows: list[dict[str, str]]) -> str:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    write_atomically(out / "corpus.jsonl", lines([{"_id": name, **passage} for name, passage in corpus.items()]))
    write_atomically(out / "queries.jsonl", lines([{"_id": name, "text": text} for name, text in queries.items()]))
    rows = [f"{query}\t{document}\t{grade}" for query, of in qrels.items() for document, grade in of.items()]
    write_atomically(out / "qrels" / "train.tsv", "\n".join(["query-id\tcorpus-id\tscore", *rows]) + "\n")
