"""The cache gives back what was put in, to any number of processes, after any crash, and refuses what it cannot trust."""

import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError
from noisewise.retrieval.cache import EmbeddingCache, content_keys

IDENTITY = {"provider": "host", "model": "m", "dimensions": None}


def rows(n, dim=8, seed=0):
    return np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)


def keys_of(texts):
    return content_keys(IDENTITY, texts, [""] * len(texts))


def numbered(n, start=0):
    return keys_of([f"text {i}" for i in range(start, start + n)])


@pytest.fixture(params=["file", "memory"])
def cache(request, tmp_path):
    with EmbeddingCache(tmp_path / "c.sqlite" if request.param == "file" else None) as opened:
        yield opened


def test_vectors_come_back_bit_for_bit(cache):
    keys, vectors = numbered(2000), rows(2000)
    cache.put(keys, vectors)
    found = cache.get([*numbered(3, 5000), *keys, keys[0]])
    assert set(found) == set(keys)
    assert all(np.array_equal(found[key], row) for key, row in zip(keys, vectors, strict=True))
    assert found[keys[0]].dtype == np.float32
    assert len(cache) == 2000
    assert cache.size > vectors.nbytes


def test_vectors_of_any_lengths_lie_side_by_side(cache):
    for dim in (1, 384, 3072):
        cache.put([bytes([dim % 251])], rows(1, dim))
    assert sorted(len(vector) for vector in cache.get([bytes([dim % 251]) for dim in (1, 384, 3072)]).values()) == [
        1,
        384,
        3072,
    ]


def test_what_is_there_stays(cache):
    keys, first = numbered(3), rows(3)
    cache.put(keys[:2], first[:2])
    cache.put(keys, rows(3, seed=1))
    assert np.array_equal(cache.get(keys)[keys[1]], first[1])
    assert np.array_equal(cache.get(keys)[keys[2]], rows(3, seed=1)[2])


def test_nothing_is_a_valid_request(cache):
    assert cache.get([]) == {}
    cache.put([], np.empty((0, 8), np.float32))
    assert len(cache) == 0


@pytest.mark.parametrize(
    ("change", "value"), [("provider", "other"), ("model", "n"), ("dimensions", 8), ("dimensions", 0)]
)
def test_a_key_depends_on_every_part_of_the_identity(change, value):
    assert content_keys({**IDENTITY, change: value}, ["x"], [""]) != keys_of(["x"])


@settings(deadline=None, max_examples=200)
@given(st.tuples(st.text(), st.text()), st.tuples(st.text(), st.text()))
def test_two_pairs_of_variant_and_text_share_a_key_only_when_equal(a, b):
    one, other = (content_keys(IDENTITY, [text], [variant]) for variant, text in (a, b))
    assert (one == other) == (a == b)


def test_half_a_surrogate_pair_has_a_key():
    assert keys_of(["\ud800"]) != keys_of(["\ud801"])


# ---- what cannot be trusted


def test_nan_is_not_kept(cache):
    vectors = rows(3)
    vectors[1, 2] = np.nan
    with pytest.raises(InvalidInput, match="vector 1 has NaN"):
        cache.put(numbered(3), vectors)
    assert len(cache) == 0
    with pytest.raises(InvalidInput, match="2 keys for 3 vectors"):
        cache.put(numbered(2), rows(3))


def filled(path, n=500, dim=64):
    with EmbeddingCache(path) as cache:
        cache.put(numbered(n), rows(n, dim))
    return path


@pytest.mark.parametrize("damage", ["garbage", "torn", "overwritten", "header"])
def test_a_damaged_file_is_refused_by_name(tmp_path, damage):
    path = filled(tmp_path / "c.sqlite")
    data = bytearray(path.read_bytes())
    if damage == "garbage":
        data = bytearray(b"this is no database, it is a text " * 50)
    elif damage == "torn":
        data = data[: len(data) // 2]
    elif damage == "overwritten":
        noise = np.random.default_rng(0).bytes(len(data) // 2)
        data[len(data) // 4 : len(data) // 4 + len(noise)] = noise
    else:
        data[:16] = b"x" * 16
    path.write_bytes(data)
    with (
        pytest.raises(RunFolderError, match=r"c\.sqlite.*(damaged|something else).*give another file"),
        EmbeddingCache(path) as cache,
    ):
        cache.get(numbered(500))


def test_one_flipped_bit_of_a_vector_is_noticed(tmp_path):
    path = filled(tmp_path / "c.sqlite", n=3)
    data = bytearray(path.read_bytes())
    at = data.find(rows(3, 64)[1].tobytes())
    data[at + 100] ^= 1
    path.write_bytes(data)
    with EmbeddingCache(path) as cache, pytest.raises(RunFolderError, match="fails its checksum"):
        cache.get(numbered(3))


def test_a_database_of_something_else_is_left_as_it_is(tmp_path):
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bills (amount)")
    connection.commit()
    connection.close()
    before = path.read_bytes()
    with pytest.raises(RunFolderError, match="SQLite file of something else"):
        EmbeddingCache(path)
    assert path.read_bytes() == before


def test_another_schema_is_refused(tmp_path):
    path = filled(tmp_path / "c.sqlite")
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(RunFolderError, match="has schema 7, this version reads 1"):
        EmbeddingCache(path)


def test_a_folder_and_a_file_in_the_way_are_named(tmp_path):
    with pytest.raises(NoisewiseError, match="cannot be used as an embedding cache"):
        EmbeddingCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(NoisewiseError, match="cannot be used as an embedding cache"):
        EmbeddingCache(tmp_path / "file" / "c.sqlite")


def test_a_closed_cache_says_so(cache):
    cache.close()
    cache.close()
    with pytest.raises(NoisewiseError, match="is closed"):
        cache.get(numbered(1))


def test_a_lock_that_never_ends_is_named(tmp_path):
    path = filled(tmp_path / "c.sqlite", n=1)
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    with pytest.raises(NoisewiseError, match=r"locked by other processes for 0\.2 s"):
        EmbeddingCache(path, patience=0.2).put(numbered(2), rows(2, 64))
    holder.execute("ROLLBACK")
    holder.close()


# ---- several at once


def write_share(path, share, shares, n):
    with EmbeddingCache(path) as cache:
        for start in range(share * 10, n, 10 * shares):
            keys = numbered(10, start)
            cache.put(keys, rows(10, seed=start))
            assert len(cache.get(keys)) == 10


def test_many_processes_write_and_read_one_new_file(tmp_path):
    path, n = tmp_path / "c.sqlite", 800
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=write_share, args=(path, share, 4, n)) for share in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    with EmbeddingCache(path) as cache:
        assert len(cache) == n
        for start in range(0, n, 10):
            keys = numbered(10, start)
            assert np.array_equal(np.stack([cache.get(keys)[key] for key in keys]), rows(10, seed=start))


def test_many_threads_share_one_object(cache):
    errors = []

    def work(share):
        try:
            for start in range(share * 10, 400, 40):
                cache.put(numbered(10, start), rows(10, seed=start))
                assert len(cache.get(numbered(10, start))) == 10
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(share,)) for share in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(cache) == 400


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_has_a_connection_of_its_own(tmp_path):
    with EmbeddingCache(tmp_path / "c.sqlite") as cache:
        cache.put(numbered(5), rows(5))
        with warnings.catch_warnings():
            # threads of other libraries exist, and the child touches none of them
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if child == 0:
            try:
                cache.put(numbered(5, 5), rows(5, seed=1))
                os._exit(0 if len(cache.get(numbered(10))) == 10 else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        assert len(cache.get(numbered(10))) == 10


def test_the_right_to_fetch_is_held_by_one_and_ends_with_its_process(tmp_path):
    path = tmp_path / "c.sqlite"
    code = f"""
        import time
        from noisewise.retrieval.cache import EmbeddingCache
        with EmbeddingCache({str(path)!r}).fetching():
            print("held", flush=True)
            time.sleep(60)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    waited = []

    def waiting():
        waited.append(time.monotonic())
        if len(waited) == 3:
            child.send_signal(signal.SIGKILL)

    with EmbeddingCache(path) as cache, cache.fetching(waiting):
        assert len(waited) >= 3
    child.wait()
    child.stdout.close()


def test_kill_9_loses_nothing_that_was_committed(tmp_path):
    path = tmp_path / "c.sqlite"
    code = f"""
        import itertools, numpy as np
        from noisewise.retrieval.cache import EmbeddingCache, content_keys
        cache = EmbeddingCache({str(path)!r})
        for n in itertools.count():
            keys = content_keys({IDENTITY!r}, [f"text {{i}}" for i in range(10 * n, 10 * n + 10)], [""] * 10)
            cache.put(keys, np.full((10, 8), n, np.float32))
            print(n, flush=True)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    for line in child.stdout:
        if int(line) == 30:
            child.kill()
            break
    last = int(([line, *child.stdout.read().split()])[-1])
    child.wait()
    child.stdout.close()
    with EmbeddingCache(path) as cache:
        count = len(cache)
        # the batch whose number was not printed yet is there whole or not at all
        assert count in (10 * last + 10, 10 * last + 20)
        assert len(cache.get(numbered(count))) == count


# ---- from file to file


def test_import_and_export_add_what_is_new(tmp_path):
    mine, theirs = filled(tmp_path / "a.sqlite", n=2500), tmp_path / "b" / "b.sqlite"
    with EmbeddingCache(mine) as a, EmbeddingCache() as memory:
        assert a.export_to(theirs) == 2500
        assert a.export_to(theirs) == 0
        memory.put(numbered(10, 2495), rows(10, 64, seed=1))
        assert memory.import_from(theirs) == 2495
        assert len(memory) == 2505
        # what was there stays
        assert np.array_equal(memory.get(numbered(1, 2495))[numbered(1, 2495)[0]], rows(10, 64, seed=1)[0])
        with pytest.raises(InvalidInput, match="is no file"):
            a.import_from(tmp_path / "none.sqlite")
        (tmp_path / "x.sqlite").write_bytes(b"nonsense" * 1000)
        with pytest.raises(RunFolderError, match=r"x\.sqlite is damaged"):
            a.import_from(tmp_path / "x.sqlite")
