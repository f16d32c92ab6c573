"""Cached look-ups of the embedding cache: texts a second out of 10^5, from the file and through `CachedBlackBox`."""

import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from interleaved import environment

from noisewise.files import write_atomically
from noisewise.retrieval.blackbox import CachedBlackBox, as_black_box
from noisewise.retrieval.cache import EmbeddingCache

RESULTS = Path(__file__).parent / "results" / "retrieval-cache.json"
TEXTS, ROUNDS = 100_000, 3
GOAL = 20_000
# of all-MiniLM-L6-v2, and of text-embedding-3-small
DIMS = (384, 1536)

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def results(pytestconfig):
    found: dict[str, Any] = {}
    yield found
    if len(found) == len(DIMS):
        record = {"command": "make bench", "environment": environment(), "texts": TEXTS, "rounds": ROUNDS, **found}
        write_atomically(RESULTS, json.dumps(record, indent=2) + "\n")
    with pytestconfig.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        print("\n" + json.dumps(found, indent=2))


def a_second(run: Any) -> dict[str, float]:
    """Texts a second of wall time, and of CPU time, which a busy machine cannot fake."""
    wall, cpu = [], []
    for _ in range(ROUNDS):
        begun, used = time.perf_counter(), time.process_time()
        run()
        wall.append(TEXTS / (time.perf_counter() - begun))
        cpu.append(TEXTS / (time.process_time() - used))
    return {
        "median": statistics.median(wall),
        "min": min(wall),
        "max": max(wall),
        "of CPU time": statistics.median(cpu),
    }


@pytest.mark.parametrize("dim", DIMS)
def test_look_ups_a_second(results, tmp_path, dim):
    # about as long as a passage, so that hashing costs what it costs
    texts = [f"passage {i}: " + "some words of a passage that somebody asks about " * 10 for i in range(TEXTS)]
    generator = np.random.default_rng(0)
    random = as_black_box(lambda asked: generator.normal(size=(len(asked), dim)).astype(np.float32), name="random")
    path = tmp_path / "cache.sqlite"
    begun = time.perf_counter()
    expected = CachedBlackBox(random, path).vectors(texts, "document")
    filling = TEXTS / (time.perf_counter() - begun)
    fetched = CachedBlackBox(random, path)
    assert np.array_equal(fetched.vectors(texts, "document"), expected)
    order = generator.permutation(TEXTS).tolist()
    shuffled = [texts[i] for i in order]
    with EmbeddingCache(path) as cache:
        keys = fetched._keys(shuffled, "document")
        blocks = [keys[start : start + 1000] for start in range(0, TEXTS, 1000)]
        found = {
            "texts to rows, in order": a_second(lambda: fetched.vectors(texts, "document")),
            "texts to rows, at random": a_second(lambda: fetched.vectors(shuffled, "document")),
            "keys to vectors, 1000 at a time, at random": a_second(lambda: [cache.get(block) for block in blocks]),
            "stored a second": filling,
            "bytes a vector": cache.size / TEXTS,
        }
    assert fetched.calls == 0
    results[f"look-ups a second, {dim} numbers"] = found
    assert found["texts to rows, at random"]["of CPU time"] > GOAL
