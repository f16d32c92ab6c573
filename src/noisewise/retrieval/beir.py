"""Passages, queries and judgements in the layout of BEIR (Thakur et al. 2021), from a folder or from the hub."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from noisewise.errors import InvalidInput, NoisewiseError, require

__all__ = [
    "Corpus",
    "Qrels",
    "Queries",
    "check_judgements",
    "drop_empty",
    "load_beir",
    "read_corpus",
    "read_queries",
    "text_of",
]

Corpus = dict[str, dict[str, str]]
Queries = dict[str, str]
Qrels = dict[str, dict[str, int]]

# one line of a file: where it stands, for messages, and its fields
_Record = tuple[str, dict[str, Any]]

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_SHARD = re.compile(r"-\d+-of-\d+$")
_JUDGED = ("query-id", "corpus-id", "score")
# where sets on the hub keep their judgements; folders of BEIR use the first
_QRELS_FOLDERS = ("qrels", "data", "default")


def load_beir(source: str | Path) -> tuple[Corpus, Queries, dict[str, Qrels]]:
    """Corpus, queries and judgements by split: `corpus[id] = {"title", "text"}`, `qrels[split][query][document] = grade`.

    `source`: a folder with `corpus.jsonl`, `queries.jsonl` (either may end in .gz; `_id`, `text` and an optional `title`)
    and `qrels/<split>.tsv` (query, document, whole grade; with or without the header); or the id of a data set on the
    Hugging Face hub, such as "BeIR/scifact" or "mteb/scifact", whose files are downloaded once (`HF_ENDPOINT` and
    `HF_HUB_OFFLINE` are respected) and whose Parquet files need pyarrow.

    What the files say is kept, empty passages included (Cranfield has two, one of them judged): see `drop_empty`.
    Raises `InvalidInput` for missing files, a damaged line (file and line are named), an id that comes twice, judged ids
    that have no text, and judged queries that are empty; `NoisewiseError` where the hub cannot be read.
    Source: Thakur et al., NeurIPS Datasets and Benchmarks 2021 (arXiv 2104.08663).
    """
    folder, judged = Path(source), None
    if not folder.exists() and isinstance(source, str) and _HUB_ID.fullmatch(source):
        folder, judged = _download(source)
    if not folder.is_dir():
        raise InvalidInput(
            f"{str(source)!r} is no folder here; give a folder of the BEIR layout, or a hub id like 'BeIR/scifact'"
        )
    splits = _judgement_files(folder) if judged is None else _files_by_split(judged)
    if not splits:
        raise InvalidInput(f"{folder} holds no judgements: qrels/<split>.tsv is missing")
    corpus, queries = read_corpus(folder), read_queries(folder)
    qrels = {split: _read_judgements(files) for split, files in splits.items()}
    for split, judgements in qrels.items():
        _check_judged(corpus, queries, judgements, f"split {split!r} of {source}")
    return corpus, queries, qrels


def read_corpus(folder: str | Path) -> Corpus:
    """The passages of a BEIR folder, id -> {"title", "text"}; the title is "" where there is none.

    Raises `InvalidInput` as `load_beir` does.
    """
    return _read_texts(
        Path(folder), "corpus", lambda place, row: {"title": _title(place, row), "text": _text(place, row)}
    )


def read_queries(folder: str | Path) -> Queries:
    """The queries of a BEIR folder, of all splits, id -> text. Raises `InvalidInput` as `load_beir` does."""
    return _read_texts(Path(folder), "queries", _text)


def text_of(document: Mapping[str, str]) -> str:
    """What is embedded of a passage: title and text joined by one space, as BEIR does; without a title the text as it is."""
    title = (document.get("title") or "").strip()
    # a text without a title is what its owner embeds elsewhere, white space included
    return f"{title} {document['text'].strip()}".strip() if title else document["text"]


def check_judgements(corpus: Corpus, queries: Queries, qrels: Qrels, name: str = "qrels") -> None:
    """Raise `InvalidInput`, quoting the first few, for judged ids that miss and for texts that are empty.

    Missing ids: judged queries without a text, judged documents outside the corpus. Empty: nothing but white space in a
    judged query, or in a passage of the corpus (title and text together). `name` says in messages whose judgements they are.
    """
    _check_judged(corpus, queries, qrels, name)
    _refuse("these passages are empty", [key for key, document in corpus.items() if not text_of(document).strip()])


def drop_empty(corpus: Corpus, queries: Queries, qrels: Qrels) -> tuple[Corpus, Queries, Qrels]:
    """The same without passages and queries of nothing but white space, and without what was judged of them.

    No search finds an empty passage, so leaving it judged would only lower what every system can reach.
    """
    kept = {key: document for key, document in corpus.items() if text_of(document).strip()}
    asked = {query: text for query, text in queries.items() if text.strip()}
    judged = {
        query: left
        for query, grades in qrels.items()
        if query in asked and (left := {document: grade for document, grade in grades.items() if document in kept})
    }
    return kept, asked, judged


def _check_judged(corpus: Corpus, queries: Queries, qrels: Qrels, name: str) -> None:
    if not corpus:
        raise InvalidInput("the corpus holds no passage")
    documents = {document for judged in qrels.values() for document in judged}
    _refuse(f"{name} judges queries that have no text", [query for query in qrels if query not in queries])
    _refuse(f"{name} judges documents that are not in the corpus", sorted(documents - corpus.keys()))
    _refuse("these queries are empty", [query for query in qrels if not queries[query].strip()])


def _refuse(what: str, ids: list[str]) -> None:
    if ids:
        more = f" and {len(ids) - 5} more" if len(ids) > 5 else ""
        raise InvalidInput(f"{what}: {', '.join(map(repr, ids[:5]))}{more}; leave them out, or mend the files")


def _read_texts(folder: Path, part: str, value: Callable[[str, dict[str, Any]], Any]) -> dict[str, Any]:
    texts: dict[str, Any] = {}
    for file in _text_files(folder, part):
        for place, row in _records(file):
            key = _identifier(place, row, "_id", "id")
            if key in texts:
                raise InvalidInput(f"{place}: the id {key!r} comes twice; ids must be distinct")
            texts[key] = value(place, row)
    return texts


def _text_files(folder: Path, part: str) -> list[Path]:
    for name in (f"{part}.jsonl", f"{part}.jsonl.gz"):
        if (folder / name).is_file():
            return [folder / name]
    shards = sorted(
        path for path in (folder / part).glob("*") if path.name.endswith((".jsonl", ".jsonl.gz", ".parquet"))
    )
    if not shards:
        raise InvalidInput(f"{folder} is no BEIR folder: {part}.jsonl (or {part}.jsonl.gz) is missing")
    return shards


def _judgement_files(folder: Path) -> dict[str, list[Path]]:
    return next((found for name in _QRELS_FOLDERS if (found := _files_by_split(folder / name))), {})


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    splits: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        stem, _, ending = path.name.partition(".")
        if stem and ending in ("tsv", "tsv.gz", "jsonl", "jsonl.gz", "parquet"):
            splits.setdefault(_SHARD.sub("", stem), []).append(path)
    return splits


def _read_judgements(files: list[Path]) -> Qrels:
    qrels: Qrels = {}
    for file in files:
        for place, row in _records(file):
            query, document = (_identifier(place, row, name) for name in _JUDGED[:2])
            grade = _grade(place, row.get(_JUDGED[2]))
            judged = qrels.setdefault(query, {})
            if judged.setdefault(document, grade) != grade:
                raise InvalidInput(
                    f"{place}: {query!r} and {document!r} were judged {judged[document]} before and are {grade} here; keep one"
                )
    return qrels


def _records(file: Path) -> Iterator[_Record]:
    if file.suffix == ".parquet":
        return _parquet_rows(file)
    return _tab_rows(file) if ".tsv" in file.suffixes else _json_rows(file)


def _json_rows(file: Path) -> Iterator[_Record]:
    for place, line in _lines(file):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidInput(f"{place}: not a line of JSON ({error}): {_excerpt(line)}") from error
        if not isinstance(row, dict):
            raise InvalidInput(f"{place}: expected a JSON object, found {_excerpt(line)}")
        yield place, row


def _tab_rows(file: Path) -> Iterator[_Record]:
    for number, (place, line) in enumerate(_lines(file)):
        # quoting as in the files of BEIR; an id that holds a tab is the only thing that needs it
        row = next(csv.reader([line], delimiter="\t"), [])
        if len(row) != 3:
            raise InvalidInput(f"{place}: expected query, document and grade with tabs between, found {_excerpt(line)}")
        if number == 0 and not _is_whole(row[2]):
            continue  # the header, whose words differ from set to set
        yield place, dict(zip(_JUDGED, row, strict=True))


def _parquet_rows(file: Path) -> Iterator[_Record]:
    parquet = require("pyarrow.parquet", "retrieval")
    try:
        rows = parquet.read_table(file).to_pylist()
    except Exception as error:
        raise InvalidInput(f"{file} cannot be read as Parquet: {error}") from error
    return ((f"{file}, row {number}", row) for number, row in enumerate(rows, 1))


def _lines(file: Path) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, each with its place, decoded one by one so that a damaged one can be named."""
    number = 0
    try:
        with _opened(file) as lines:
            for number, raw in enumerate(lines, 1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield f"{file}, line {number}", line
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{file}, line {number}: not UTF-8 ({error})") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InvalidInput(f"{file} is damaged after line {number}: {error}; fetch it again") from error


def _opened(file: Path) -> Any:
    return gzip.open(file) if file.suffix == ".gz" else file.open("rb")


def _identifier(place: str, row: dict[str, Any], *names: str) -> str:
    value = next((row[name] for name in names if row.get(name) is not None), None)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise InvalidInput(f"{place}: {names[0]} must be a text or a whole number, found {value!r}")
    return str(value)


def _text(place: str, row: dict[str, Any]) -> str:
    if not isinstance(text := row.get("text"), str):
        raise InvalidInput(f"{place}: text must be a string, found {text!r}")
    return text


def _title(place: str, row: dict[str, Any]) -> str:
    if not isinstance(title := row.get("title") or "", str):
        raise InvalidInput(f"{place}: title must be a string, found {title!r}")
    return title


def _grade(place: str, value: object) -> int:
    # Parquet files of the hub hold whole grades as floating-point numbers
    whole = int(value) if isinstance(value, str) and _is_whole(value) else value
    if isinstance(whole, bool) or not isinstance(whole, int | float) or whole != whole or whole != int(whole):
        raise InvalidInput(f"{place}: a grade is a whole number, found {value!r}")
    return int(whole)


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"\s*[+-]?\d+\s*", text) is not None


def _excerpt(line: str) -> str:
    return repr(line if len(line) <= 80 else line[:77] + "...")


def _download(name: str) -> tuple[Path, Path | None]:
    """Folder of the set `name` in the cache of the hub, and that of its judgements where they lie in a set of their own."""
    hub = require("huggingface_hub", "retrieval")
    wanted = [f"{part}{ending}" for part in ("corpus", "queries") for ending in (".jsonl", ".jsonl.gz", "/*")]
    wanted += [f"{folder}/*" for folder in _QRELS_FOLDERS]
    try:
        folder = Path(hub.snapshot_download(name, repo_type="dataset", allow_patterns=wanted))
        if _judgement_files(folder):
            return folder, None
        # BeIR/scifact keeps its judgements in BeIR/scifact-qrels
        judged = hub.snapshot_download(f"{name}-qrels", repo_type="dataset", allow_patterns=["*.tsv", "*.tsv.gz"])
    except Exception as error:
        raise NoisewiseError(
            f"{name!r} is no folder here, and the hub did not give it: {type(error).__name__}: {error}"
        ) from error
    return folder, Path(judged)
