"""`EmbeddingCache`: vectors that were paid for, kept in one SQLite file that many processes may read and write at once."""

import hashlib
import json
import os
import sqlite3
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from noisewise.errors import InvalidInput, NoisewiseError, RunFolderError

try:
    import fcntl
except ImportError:  # Windows, where two processes may both fetch what neither has stored yet
    fcntl = None  # type: ignore[assignment]

__all__ = ["EmbeddingCache", "content_keys"]

# "nwEC" in ASCII: tells a cache from any other SQLite file
_APPLICATION, _SCHEMA = 0x6E774543, 1
# vectors of 1,536 numbers take one page, not a chain of them
_PAGE = 8192
# bound variables of one look-up; one statement is prepared for all of them
_LOOK_UP = 512
_POLL = 0.1
# handles of a parent process: SQLite forbids a child even to close them, so they are never collected
_inherited: list[sqlite3.Connection] = []


def content_keys(
    identity: Mapping[str, str | int | None], texts: Sequence[str], variants: Sequence[str]
) -> list[bytes]:
    """SHA-256 of provider, model and dimensions in `identity`, of each text, and of the variant (input type) it is sent as."""
    prefix = hashlib.sha256(json.dumps(dict(identity), sort_keys=True).encode())
    keys = []
    for text, variant in zip(texts, variants, strict=True):
        key = prefix.copy()
        # lengths in front, so that no two pairs of variant and text are one string of bytes
        head = variant.encode("utf-8", "surrogatepass")
        key.update(b"\0%d\0%b" % (len(head), head))
        key.update(text.encode("utf-8", "surrogatepass"))
        keys.append(key.digest())
    return keys


class EmbeddingCache:
    """Vectors by content key in the SQLite file `path` (write-ahead log), or in memory where `path` is None.

    A `put` is one transaction: after a crash it is there whole, or not at all. Any number of processes and threads may share
    the file; a writer waits up to `patience` seconds for the others. Raises `RunFolderError` for a damaged file, a file of
    something else and another schema, `NoisewiseError` where the file cannot be opened, written or locked.
    """

    def __init__(self, path: str | Path | None = None, patience: float | int = 60.0) -> None:
        self.path = None if path is None else Path(path)
        self.patience = float(patience)
        self._lock = threading.RLock()
        self._process = os.getpid()
        self._connection: sqlite3.Connection | None = self._open()

    def __repr__(self) -> str:
        return f"EmbeddingCache({None if self.path is None else str(self.path)!r})"

    def __enter__(self) -> "EmbeddingCache":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; a cache in memory is gone then."""
        with self._lock:
            if self._connection is not None and self._process == os.getpid():
                self._connection.close()
            self._connection = None

    def __len__(self) -> int:
        with self._using() as connection:
            return int(connection.execute("SELECT count(*) FROM vectors").fetchone()[0])

    @property
    def size(self) -> int:
        """Bytes on the disk, the log included, or in memory."""
        if self.path is not None:
            files = [self.path, Path(f"{self.path}-wal")]
            return sum(file.stat().st_size for file in files if file.exists())
        with self._using() as connection:
            (pages,), (page,) = (connection.execute(f"PRAGMA page_{what}").fetchone() for what in ("count", "size"))
            return int(pages) * int(page)

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Float[np.ndarray, " dim"]]:
        """Vectors, float32 and read-only, of those `keys` that are there. Raises `RunFolderError` for damaged ones."""
        found: dict[bytes, np.ndarray] = {}
        marks = ",".join("?" * _LOOK_UP)
        query = f"SELECT key, vector, crc FROM vectors WHERE key IN ({marks})"
        with self._using() as connection:
            for start in range(0, len(keys), _LOOK_UP):
                part: list[bytes | None] = list(keys[start : start + _LOOK_UP])
                part += [None] * (_LOOK_UP - len(part))
                for key, blob, crc in connection.execute(query, part):
                    if zlib.crc32(blob) != crc:
                        raise self._damaged(f"the vector of key {key.hex()[:16]} fails its checksum")
                    found[key] = np.frombuffer(blob, "<f4")
        return found

    def put(self, keys: Sequence[bytes], vectors: Float[np.ndarray, "text dim"]) -> None:
        """Store row i of `vectors` as float32 under key i, all in one transaction; what is there already stays.

        Raises `InvalidInput` for rows with NaN or infinite values, and for a number of keys that is not that of rows.
        """
        if len(keys) != len(vectors):
            raise InvalidInput(f"there are {len(keys)} keys for {len(vectors)} vectors")
        wrong = np.flatnonzero(~np.isfinite(vectors).all(1))
        if len(wrong):
            raise InvalidInput(f"vector {wrong[0]} has NaN or infinite values, and would be kept for good")
        blobs = [row.tobytes() for row in np.ascontiguousarray(vectors, "<f4")]
        self._insert([(key, blob, zlib.crc32(blob)) for key, blob in zip(keys, blobs, strict=True)])

    def import_from(self, path: str | Path) -> int:
        """Take over every vector of the cache file `path` that is not here; returns how many. Raises as opening it does."""
        if not Path(path).is_file():
            raise InvalidInput(f"{path} is no file, so there is no cache to import")
        with EmbeddingCache(path, self.patience) as other:
            return other._copy_to(self)

    def export_to(self, path: str | Path) -> int:
        """Add every vector here to the cache file `path`, which is made where it is missing; returns how many were new there."""
        with EmbeddingCache(path, self.patience) as other:
            return self._copy_to(other)

    @contextmanager
    def fetching(self, waiting: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Hold the right to fill this file: whoever else asks for it waits, calling `waiting` now and then, and looks again.

        So processes that want the same texts at the same time pay for them once. It ends with the process, even by kill -9.
        """
        if self.path is None or fcntl is None:
            yield
            return
        with open(f"{self.path}-lock", "a") as file:
            # file systems without locks give every process the right
            with suppress(OSError):
                while not _locked(file.fileno()):
                    waiting()
                    time.sleep(_POLL)
            yield

    def _copy_to(self, other: "EmbeddingCache") -> int:
        before, last = len(other), 0
        while True:
            with self._using() as connection:
                rows = connection.execute(
                    "SELECT rowid, key, vector, crc FROM vectors WHERE rowid > ? ORDER BY rowid LIMIT 1000", (last,)
                ).fetchall()
            if not rows:
                return len(other) - before
            other._insert([row[1:] for row in rows])
            last = rows[-1][0]

    def _insert(self, rows: list[tuple[bytes, bytes, int]]) -> None:
        with self._using() as connection, _transaction(connection):
            connection.executemany("INSERT OR IGNORE INTO vectors (key, vector, crc) VALUES (?, ?, ?)", rows)

    @contextmanager
    def _using(self) -> Iterator[sqlite3.Connection]:
        """The connection, for one thread at a time, with SQLite's errors in the house's words."""
        with self._lock:
            if self._connection is not None and self._process != os.getpid() and self.path is not None:
                _inherited.append(self._connection)
                self._process, self._connection = os.getpid(), self._open()
            if self._connection is None:
                raise NoisewiseError(f"{self!r} is closed")
            with self._in_words():
                yield self._connection

    @contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if _busy(error):
                raise NoisewiseError(
                    f"{self.path} has been locked by other processes for {self.patience:g} s: end them, or give more patience="
                ) from error
            raise NoisewiseError(f"{self.path} cannot be used as an embedding cache: {error}") from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, reason: str) -> RunFolderError:
        return RunFolderError(
            f"{self.path} is damaged or no embedding cache ({reason}): move it away, or give another file"
        )

    def _open(self) -> sqlite3.Connection:
        with self._in_words():
            if self.path is None:
                return _prepared(":memory:", self.patience)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise NoisewiseError(f"{self.path} cannot be used as an embedding cache: {error}") from error
            until = time.monotonic() + self.patience
            while True:
                try:
                    return _prepared(str(self.path), self.patience)
                except sqlite3.OperationalError as error:
                    # a change to the write-ahead log does not wait for others by itself
                    if not _busy(error) or time.monotonic() > until:
                        raise
                    time.sleep(_POLL)


def _prepared(path: str, patience: float) -> sqlite3.Connection:
    """An open cache, made where the file is empty. Raises `RunFolderError` before it changes a file of something else."""
    connection = sqlite3.connect(path, timeout=patience, isolation_level=None, check_same_thread=False)
    try:
        made = _check_schema(connection, path)
        # before the first table, or it has no effect
        connection.execute(f"PRAGMA page_size = {_PAGE}")
        connection.execute("PRAGMA journal_mode = WAL")
        # a vector costs money and a sync costs a millisecond
        connection.execute("PRAGMA synchronous = FULL")
        if not made:
            _make(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _make(connection: sqlite3.Connection, path: str) -> None:
    with _transaction(connection):
        # another process may have made it meanwhile
        if _check_schema(connection, path):
            return
        connection.execute(f"PRAGMA application_id = {_APPLICATION}")
        connection.execute(f"PRAGMA user_version = {_SCHEMA}")
        connection.execute(
            "CREATE TABLE vectors (key BLOB PRIMARY KEY NOT NULL, vector BLOB NOT NULL, crc INTEGER NOT NULL)"
        )


def _check_schema(connection: sqlite3.Connection, path: str) -> bool:
    """Whether the file is a cache; False for one that is empty."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (schema,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if not tables and not application:
        return False
    if application != _APPLICATION:
        raise RunFolderError(f"{path} is an SQLite file of something else, not an embedding cache; give another file")
    if schema != _SCHEMA:
        raise RunFolderError(f"{path} has schema {schema}, this version reads {_SCHEMA}; give another file")
    return True


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    # immediate: a reader that turns writer in the middle would fail at once instead of waiting
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
    except BaseException:
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")


def _busy(error: sqlite3.OperationalError) -> bool:
    return "locked" in str(error) or "busy" in str(error)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
