"""A BEIR folder means the same plain, compressed, sharded and from the hub; what is damaged is named with its line."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from noisewise.errors import InvalidInput, NoisewiseError
from noisewise.retrieval.beir import check_judgements, drop_empty, load_beir, read_corpus, text_of

CORPUS = [
    {"_id": "d1", "title": "Herons", "text": "Herons wait by the water."},
    {"_id": "d2", "title": "", "text": "Bridges are painted.\u2028Every seven years."},
    {"_id": "d3", "text": "Rivers run to the sea.", "metadata": {"source": "x"}},
    {"_id": 4, "title": None, "text": "Four."},
]
QUERIES = [{"_id": "q1", "text": "where do herons wait"}, {"_id": 2, "text": "who paints"}]
TRAIN = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td3\t0\n"
TEST = "2\td2\t1\n2\t4\t1\n"

EXPECTED = (
    {
        "d1": {"title": "Herons", "text": "Herons wait by the water."},
        "d2": {"title": "", "text": "Bridges are painted.\u2028Every seven years."},
        "d3": {"title": "", "text": "Rivers run to the sea."},
        "4": {"title": "", "text": "Four."},
    },
    {"q1": "where do herons wait", "2": "who paints"},
    {"train": {"q1": {"d1": 2, "d3": 0}}, "test": {"2": {"d2": 1, "4": 1}}},
)


def lines(rows, ending="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + ending for row in rows)


def write(folder, files):
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


FILES = {
    "corpus.jsonl": lines(CORPUS),
    "queries.jsonl": lines(QUERIES),
    "qrels/train.tsv": TRAIN,
    "qrels/test.tsv": TEST,
}


@pytest.mark.parametrize(
    "files",
    [
        FILES,
        {f"{name}.gz" if name.endswith("jsonl") else name: text for name, text in FILES.items()},
        # a byte order mark, Windows line ends, blank lines, other words in the header, no end of the last line
        {
            "corpus.jsonl": "\ufeff" + lines(CORPUS, "\r\n\r\n"),
            "queries.jsonl": lines(QUERIES).rstrip("\n"),
            "qrels/train.tsv": "\ufeffquery\tpassage\tlabel\r\nq1\td1\t2\r\nq1\td3\t0\r\n\r\n",
            "qrels/test.tsv": TEST.rstrip("\n"),
        },
        {
            "corpus/a.jsonl": lines(CORPUS[:2]),
            "corpus/b.jsonl.gz": lines(CORPUS[2:]),
            "queries/queries.jsonl": lines(QUERIES),
            "qrels/train.tsv.gz": TRAIN,
            "qrels/test.jsonl": lines({"query-id": 2, "corpus-id": document, "score": 1.0} for document in ("d2", "4")),
        },
    ],
    ids=["plain", "gzip", "windows", "sharded"],
)
def test_every_layout_holds_the_same(tmp_path, files):
    corpus, queries, qrels = load_beir(write(tmp_path, files))
    assert (corpus, queries, qrels) == EXPECTED
    assert list(corpus) == ["d1", "d2", "d3", "4"]


def test_parquet_files_hold_the_same(tmp_path):
    parquet, table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    for part, rows in (("corpus", CORPUS[:3]), ("queries", QUERIES[:1])):
        (tmp_path / part).mkdir()
        rows = [{"title": None, **row} | {"metadata": None} for row in rows]
        parquet.write_table(table.from_pylist(rows), tmp_path / part / f"{part}-00000-of-00001.parquet")
    (tmp_path / "data").mkdir()
    judged = [{"query-id": "q1", "corpus-id": name, "score": grade} for name, grade in (("d1", 2.0), ("d3", 0.0))]
    for i, row in enumerate(judged):
        parquet.write_table(table.from_pylist([row]), tmp_path / "data" / f"train-0000{i}-of-00002.parquet")
    corpus, queries, qrels = load_beir(tmp_path)
    assert corpus == {key: EXPECTED[0][key] for key in ("d1", "d2", "d3")}
    assert queries == {"q1": EXPECTED[1]["q1"]}
    assert qrels == {"train": EXPECTED[2]["train"]}
    (tmp_path / "data" / "test.parquet").write_bytes(b"PAR1 not at all")
    with pytest.raises(InvalidInput, match=r"test\.parquet cannot be read as Parquet"):
        load_beir(tmp_path)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"corpus.jsonl": None}, r"no BEIR folder: corpus\.jsonl \(or corpus\.jsonl\.gz\) is missing"),
        ({"queries.jsonl": None}, r"queries\.jsonl \(or"),
        ({"qrels/train.tsv": None, "qrels/test.tsv": None}, r"no judgements: qrels/<split>\.tsv is missing"),
        (
            {"corpus.jsonl": lines(CORPUS) + '{"_id": "d5", "text": "cut'},
            r"corpus\.jsonl, line 5: not a line of JSON.*cut",
        ),
        ({"corpus.jsonl": "[1]\n"}, r"corpus\.jsonl, line 1: expected a JSON object, found '\[1\]'"),
        ({"corpus.jsonl": lines(CORPUS).encode() + b'{"_id": "\xff"}'}, r"corpus\.jsonl, line 5: not UTF-8"),
        ({"corpus.jsonl": lines([*CORPUS, CORPUS[0]])}, r"corpus\.jsonl, line 5: the id 'd1' comes twice"),
        ({"queries.jsonl": lines([*QUERIES, {"_id": "2", "text": "x"}])}, r"line 3: the id '2' comes twice"),
        ({"corpus.jsonl": lines([{"text": "x"}])}, "line 1: _id must be a text or a whole number, found None"),
        ({"corpus.jsonl": lines([{"_id": "x", "text": None}])}, "line 1: text must be a string, found None"),
        ({"corpus.jsonl": lines([{"_id": "x", "text": "", "title": 3}])}, "line 1: title must be a string, found 3"),
        ({"corpus.jsonl": ""}, "the corpus holds no passage"),
        ({"corpus.jsonl": lines(CORPUS[1:])}, r"split 'train' of .* not in the corpus: 'd1'; leave them out"),
        ({"queries.jsonl": lines(QUERIES[1:])}, r"split 'train' of .* queries that have no text: 'q1'"),
        ({"queries.jsonl": lines([QUERIES[0], {"_id": 2, "text": " \n"}])}, "these queries are empty: '2'"),
        ({"qrels/test.tsv": "2\td2\n"}, r"test\.tsv, line 1: expected query, document and grade"),
        ({"qrels/test.tsv": TEST + "2\td1\tyes\n"}, r"test\.tsv, line 3: a grade is a whole number, found 'yes'"),
        ({"qrels/test.tsv": TEST + "2\td1\t0.5\n"}, r"line 3: a grade is a whole number, found '0\.5'"),
        ({"qrels/test.tsv": TEST + "\td1\t1\n"}, "line 3: query-id must be a text"),
        ({"qrels/test.tsv": TEST + "2\t4\t2\n"}, "line 3: '2' and '4' were judged 1 before and are 2 here"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, changed, message):
    files = {name: text for name, text in (FILES | changed).items() if text is not None}
    with pytest.raises(InvalidInput, match=message):
        load_beir(write(tmp_path, files))


@pytest.mark.parametrize("cut", ["short", "garbled", "not gzip"])
def test_a_damaged_archive_is_named(tmp_path, cut):
    write(tmp_path, FILES)
    (tmp_path / "corpus.jsonl").unlink()
    whole = bytearray(gzip.compress(lines(CORPUS * 500).encode()))
    if cut == "garbled":
        whole[len(whole) // 2] ^= 255
    data = {"short": whole[: len(whole) // 2], "garbled": whole, "not gzip": b"plain text\n"}[cut]
    (tmp_path / "corpus.jsonl.gz").write_bytes(data)
    with pytest.raises(InvalidInput, match=r"corpus\.jsonl\.gz"):
        load_beir(tmp_path)


def test_the_first_few_of_many_are_quoted():
    corpus = {f"d{i}": {"title": "", "text": "x"} for i in range(3)}
    with pytest.raises(InvalidInput, match="'e0', 'e1', 'e2', 'e3', 'e4' and 3 more; leave them out"):
        check_judgements(corpus, {"q": "x"}, {"q": {f"e{i}": 1 for i in range(8)}})


def test_empty_passages_are_loaded_refused_and_dropped(tmp_path):
    files = FILES | {"corpus.jsonl": lines([*CORPUS[:1], {"_id": "d2", "text": " "}, *CORPUS[2:]])}
    corpus, queries, qrels = load_beir(write(tmp_path, files))
    assert len(corpus) == 4
    with pytest.raises(InvalidInput, match="these passages are empty: 'd2'"):
        check_judgements(corpus, queries, qrels["test"])
    kept = drop_empty(corpus, queries, qrels["test"])
    check_judgements(*kept)
    assert list(kept[0]) == ["d1", "d3", "4"]
    assert kept[2] == {"2": {"4": 1}}
    assert drop_empty(corpus, queries, {"2": {"d2": 1}})[2] == {}


def test_a_corpus_is_read_without_judgements(tmp_path):
    assert read_corpus(write(tmp_path, {"corpus.jsonl": lines(CORPUS)})) == EXPECTED[0]


@pytest.mark.parametrize(
    ("document", "text"),
    [
        ({"title": "Herons", "text": "wait"}, "Herons wait"),
        ({"title": "", "text": "wait"}, "wait"),
        ({"title": "Herons ", "text": " wait\n"}, "Herons wait"),
        ({"title": " ", "text": " wait\n"}, " wait\n"),
        ({"title": "Herons", "text": ""}, "Herons"),
        ({"text": "wait"}, "wait"),
    ],
)
def test_title_and_text_are_joined_by_one_space(document, text):
    assert text_of(document) == text


@pytest.mark.parametrize("source", ["no such folder", "a/b/c", "./here"])
def test_a_source_that_is_no_folder_and_no_hub_id_is_refused(source):
    with pytest.raises(InvalidInput, match="is no folder here; give a folder of the BEIR layout, or a hub id"):
        load_beir(source)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub on loopback that serves data sets from a dict: name -> file -> bytes."""
    sets = {}

    class Hub(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, status, data, **headers):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def do_GET(self):
            path = self.path.partition("?")[0]
            api = path.startswith("/api/datasets/")
            name = "/".join(path.removeprefix("/api").split("/")[2:4])
            if name not in sets:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")
            elif api and "/tree/" in path:
                rows = [{"type": "file", "path": f, "size": len(d), "oid": "0" * 40} for f, d in sets[name].items()]
                self.answer(200, json.dumps(rows).encode(), Content_Type="application/json")
            elif api:
                files = [{"rfilename": file} for file in sets[name]]
                info = {"id": name, "sha": "a" * 40, "siblings": files, "private": False, "tags": [], "downloads": 0}
                self.answer(200, json.dumps(info).encode(), Content_Type="application/json")
            else:
                data = sets[name][path.split("/resolve/")[1].partition("/")[2]]
                self.answer(200, data, ETag=f'"{hash(data)}"', X_Repo_Commit="a" * 40)

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = pytest.importorskip("huggingface_hub.constants")
    address = f"http://127.0.0.1:{server.server_port}"
    # the library reads the variable once, at import
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield sets
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_hub_id_is_downloaded_once(hub):
    hub["mteb/herons"] = {name: text.encode() for name, text in FILES.items()} | {"README.md": b"", "other.bin": b"x"}
    assert load_beir("mteb/herons") == EXPECTED


def test_judgements_of_a_set_of_their_own_are_found(hub):
    hub["BeIR/herons"] = {
        "corpus.jsonl.gz": gzip.compress(FILES["corpus.jsonl"].encode()),
        "queries.jsonl.gz": gzip.compress(FILES["queries.jsonl"].encode()),
    }
    hub["BeIR/herons-qrels"] = {"train.tsv": TRAIN.encode(), "test.tsv": TEST.encode(), "README.md": b""}
    assert load_beir("BeIR/herons") == EXPECTED


def test_a_set_that_the_hub_does_not_know_is_named(hub):
    with pytest.raises(NoisewiseError, match="'BeIR/newts' is no folder here, and the hub did not give it"):
        load_beir("BeIR/newts")
