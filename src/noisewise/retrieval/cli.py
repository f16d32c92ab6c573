"""`noisewise retrieval`: fit a Mafin to judged queries over an endpoint, score it, write queries, know the bill first."""

import hashlib
import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    make_folder,
    read_command,
    read_json,
    refuse_file,
    refuse_unfinished,
    typed,
)
from noisewise.errors import InvalidInput, RunFolderError
from noisewise.files import write_atomically
from noisewise.typing import check_count, check_positive

if TYPE_CHECKING:
    from noisewise.retrieval.beir import Corpus, Qrels, Queries
    from noisewise.retrieval.blackbox import CachedBlackBox
    from noisewise.retrieval.evaluation import Evaluation
    from noisewise.retrieval.mafin import Mafin
    from noisewise.retrieval.vectors import CostEstimate

__all__ = ["Augments", "TooLong", "retrieval_app"]

_MODEL, _CACHE = "model", "vectors.sqlite"
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
        "black_dim": black_dim, "language": language, "epochs": check_positive("--epochs", epochs),
        "lr": check_positive("--lr", lr), "batch_size": check_count("--batch-size", batch_size),
        "hard_negatives": check_count("--hard-negatives", hard_negatives, 0), "seed": check_count("--seed", seed, 0),
    }  # fmt: skip
    refuse_file(out)
    with interruptible("what was fetched is kept; the same command goes on"):
        corpus, queries, qrels = _load(data)
        chosen_dev = dev or ("dev" if "dev" in qrels and split != "dev" else None)
        judged, held = _judged(qrels, split, data), {} if chosen_dev is None else _judged(qrels, chosen_dev, data)
        searched = None if search is None else _load(search)[0]
        if dry_run:
            box = _box(options, cache or (out / _CACHE if (out / _CACHE).is_file() else None), price, rpm, tpm)
            _show_estimate(_estimates(box, corpus, [queries[name] for name in (*judged, *held)]), as_json)
            return
        marks = {"data": data, "data_sha256": _digest(corpus, queries, qrels)}
        claim(out, {"command": "retrieval fit", **marks, **options}, (RUN, _MODEL))
        if not _finished(out):
            box = _box(options, cache or out / _CACHE, price, rpm, tpm)
            mafin = _mafin(box, options).fit(
                corpus, queries, judged, held or None, search=searched, form=form, resume=out / RUN, progress=True,
                epochs=options["epochs"], lr=options["lr"], batch_size=batch_size, hard_negatives=hard_negatives,
            )  # fmt: skip
            mafin.save_pretrained(out / _MODEL)
            facts = _facts(mafin, box, data, options, len(corpus), len(judged), len(held))
            line = typed(["noisewise", "retrieval", "fit", data, "-o", str(out)], options, _USUAL)
            from noisewise.retrieval.page import write_page

            write_page(mafin, facts, line, out / REPORT)
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
        options = _options_of(model)
        corpus, queries, qrels = _load(data)
        judged = _judged(qrels, split, data)
        box = _box(options, cache or model / _CACHE, price, rpm, tpm)
        if dry_run:
            _show_estimate(_estimates(box, corpus, [queries[name] for name in judged]), as_json)
            return
        from noisewise.retrieval.mafin import Mafin

        mafin = Mafin.from_pretrained(model / _MODEL, box)
        if adapt:
            mafin.adapt(corpus)
        facts = _scores(mafin, box, corpus, queries, judged)
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
    corpus, queries, _ = _load(data)
    _show_estimate(_estimates(_box(options, cache, price, rpm, tpm), corpus, list(queries.values())), as_json)


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
    corpus = read_corpus(data)
    prices = None if price is None else (price, price if answer_price is None else answer_price)
    llm = ChatEndpoint(endpoint, model, key=key_env or None, price=prices, rpm=rpm, tpm=tpm)
    given: dict[str, Any] = {
        "per_document": check_count("--per-document", per_document),
        "sample": None if sample is None else check_count("--sample", sample),
        "examples": tuple(example or ()),
        "seed": check_count("--seed", seed, 0),
    }
    with interruptible("what was written is kept; the same command goes on"):
        if dry_run:
            _show_estimate(
                {"queries": estimate_synthesis(corpus, llm, out=out if out.is_dir() else None, **given)}, as_json
            )
            return
        make_folder(out)
        queries, qrels = synthesize(corpus, llm, out=out, language=_language(language), progress=True, **given)
        _write_beir(out, corpus, queries, qrels)
    facts = {"out": str(out), "passages": len(corpus), "queries": len(queries), "cost": vars(llm.cost)}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    typer.echo(
        f"{len(queries)} queries for {len({d for of in qrels.values() for d in of})} passages: {out}\ncost: {llm.cost}"
    )


# --- what a command is given


def _load(source: str) -> "tuple[Corpus, Queries, dict[str, Qrels]]":
    """A set without passages and queries that are empty."""
    from noisewise.retrieval.beir import drop_empty, load_beir

    corpus, queries, qrels = load_beir(source)
    kept, asked, _ = drop_empty(corpus, queries, {})
    return kept, asked, {split: drop_empty(corpus, queries, judged)[2] for split, judged in qrels.items()}


def _digest(*parts: Any) -> str:
    """Of all that was read, so that the same command on other contents is told from the same command."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _judged(qrels: "dict[str, Qrels]", split: str, data: str) -> "Qrels":
    if split not in qrels:
        raise InvalidInput(f"{data} has no split {split!r}; it has {', '.join(sorted(qrels))}")
    return {query: of for query, of in qrels[split].items() if any(grade > 0 for grade in of.values())}


def _box(
    options: dict[str, Any], cache: Path | None, price: float | None, rpm: float | None, tpm: float | None
) -> "CachedBlackBox":
    """The black box of the options, behind a cache."""
    from noisewise.retrieval.blackbox import CachedBlackBox

    if (options["encoder"] is None) == (options["endpoint"] is None):
        raise InvalidInput("give the black box: --endpoint URL with --model NAME, or --encoder FOLDER, and not both")
    if options["encoder"] is not None:
        from noisewise.errors import require

        return CachedBlackBox(
            require("sentence_transformers", "retrieval").SentenceTransformer(options["encoder"]), cache
        )
    if options["model"] is None:
        raise InvalidInput(f"--endpoint {options['endpoint']} needs --model NAME")
    from noisewise.retrieval.endpoint import OpenAICompatible

    def by_kind(name: str) -> dict[str, str] | None:
        found = {kind: options[f"{kind}_{name}"] for kind in ("query", "document")}
        return {kind: value for kind, value in found.items() if value is not None} or None

    return CachedBlackBox(
        OpenAICompatible(
            options["endpoint"], options["model"], dimensions=options["dimensions"], key=options["key_env"] or None,
            input_types=by_kind("type"), prefixes=by_kind("prefix"), too_long=options["too_long"],
            max_tokens=options["max_tokens"], price=price, rpm=rpm, tpm=tpm,
        ),
        cache,
    )  # fmt: skip


def _language(name: str) -> str | None:
    return None if name == "none" else name


def _mafin(box: "CachedBlackBox", options: dict[str, Any]) -> "Mafin":
    from noisewise.retrieval.lexical import LexicalBlock
    from noisewise.retrieval.mafin import Mafin
    from noisewise.retrieval.table import WordPieceTable

    seed, weighting = options["seed"], options["weighting"]
    parts: list[Any] = []
    if options["augment"] != Augments.WORDS:
        parts.append(WordPieceTable(seed=seed))
    if options["augment"] != Augments.TABLE:
        parts.append(LexicalBlock(language=_language(options["language"]), seed=seed))
    try:
        weight: Any = weighting if weighting in ("equal", "lambda") else float(weighting)
    except ValueError as error:
        raise InvalidInput(f"--weighting must be equal, lambda or a number, got {weighting!r}") from error
    return Mafin(box, parts, weight, black_dim=options["black_dim"], seed=seed)


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


def _estimates(box: "CachedBlackBox", corpus: "Corpus", queries: list[str]) -> "dict[str, CostEstimate]":
    from noisewise.retrieval.beir import text_of

    passages = [text_of(passage) for passage in corpus.values()]
    return {"passages": box.estimate(passages, "document"), "queries": box.estimate(queries, "query")}


# --- what a command says


def _facts(
    mafin: "Mafin", box: "CachedBlackBox", data: str, options: dict[str, Any], passages: int, queries: int, dev: int
) -> dict[str, Any]:
    return {
        **options,
        "data": data,
        "passages": passages,
        "queries": queries,
        "dev_queries": dev,
        "choice": mafin.choice_,
        "dimensions": mafin.get_embedding_dimension(),
        "report": None if mafin.report_ is None else mafin.report_.to_dict(),
        "training_seconds": sum(fit.cost.seconds for fit in mafin.fits_.values()),
        "cost": vars(box.cost),
    }


def _show_fit(facts: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    console = Console()
    if facts["report"] is not None:
        from noisewise.retrieval.guard import GuardReport

        console.print(escape(str(GuardReport.from_dict(facts["report"]))), soft_wrap=True, highlight=False)
    console.print(f"choice: {escape(facts['choice'])}, {facts['dimensions']} numbers a vector", highlight=False)
    console.print(f"cost:   {facts['cost']['calls']:,} calls, {facts['cost']['tokens']:,} tokens", highlight=False)
    console.print(f"model:  {escape(str(out / _MODEL))}", soft_wrap=True, highlight=False)
    console.print(f"report: {(out / REPORT).resolve().as_uri()}", soft_wrap=True, highlight=False)


def _scores(
    mafin: "Mafin", box: "CachedBlackBox", corpus: "Corpus", queries: "Queries", judged: "Qrels"
) -> dict[str, Any]:
    """Means of both, and paired gains."""
    from noisewise.retrieval.beir import text_of
    from noisewise.retrieval.evaluation import evaluate, exact_run, paired_bootstrap

    names, asked = list(corpus), list(judged)
    texts, questions = [text_of(corpus[name]) for name in names], [queries[name] for name in asked]
    found: dict[str, Evaluation] = {
        mafin.choice_: evaluate(
            judged, exact_run(asked, mafin.encode_query(questions), names, mafin.encode_document(texts))
        ),
        "black box": evaluate(
            judged, exact_run(asked, box.vectors(questions, "query"), names, box.vectors(texts, "document"))
        ),
    }
    facts: dict[str, Any] = {
        "queries": len(asked),
        "passages": len(names),
        "choice": mafin.choice_,
        "cost": vars(box.cost),
    }
    for name, one in found.items():
        facts.setdefault("scores", {})[name] = {measure: value.to_dict() for measure, value in one.mean.items()}
    ours, theirs = found[mafin.choice_].per_query, found["black box"].per_query
    gains = {measure: paired_bootstrap(ours[measure], theirs[measure]) for measure in ours}
    facts["gain"] = {measure: [gain.mean, gain.low, gain.high] for measure, gain in gains.items()}
    return facts


def _show_scores(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from noisewise.metrics.measurement import Measurement

    names = list(facts["scores"])
    table = Table("measure ↑", *names, *(["gain, 95 % interval"] * (len(names) > 1)),
                  title=f"{facts['queries']} queries, {facts['passages']} passages", title_justify="left")  # fmt: skip
    for measure, (mean, low, high) in facts["gain"].items():
        cells = [str(Measurement.from_dict(facts["scores"][name][measure])) for name in names]
        table.add_row(measure, *cells, *([f"{mean:+.3f} [{low:.3f}, {high:.3f}]"] * (len(names) > 1)))
    Console().print(table)


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
