"""What a bulk run is to do and has done, in a file that outlives it."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ._scoring import Utterance
from ._tables import BATCH, FACTS, Earlier
from .audio import describe
from .errors import AudioFileError, ModelMismatchError, OutputError

T = TypeVar("T")

COMMIT_EVERY = 1.0  # s: what a kill can lose
CACHE = 8192  # KiB of the file that SQLite keeps in memory

_SCHEMA = """
CREATE TABLE IF NOT EXISTS facts (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS paths (id INTEGER PRIMARY KEY, path BLOB NOT NULL UNIQUE, asked INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS clips (
    id INTEGER PRIMARY KEY REFERENCES paths, size INTEGER NOT NULL, stamp INTEGER NOT NULL,
    seconds REAL NOT NULL, embedding BLOB NOT NULL, new INTEGER NOT NULL);
DROP TABLE IF EXISTS wanted;
CREATE TABLE wanted (position INTEGER PRIMARY KEY, id INTEGER NOT NULL REFERENCES paths);
DROP TABLE IF EXISTS rows;
CREATE TABLE rows (position INTEGER PRIMARY KEY, id INTEGER NOT NULL REFERENCES clips);
UPDATE paths SET asked = 0 WHERE asked;
CREATE TEMP TABLE listing (path BLOB PRIMARY KEY) WITHOUT ROWID;
"""


@dataclass(frozen=True)
class Stat:
    """By which a file is taken for unchanged."""

    size: int  # bytes
    stamp: int  # another one when the file was written, replaced, or moved, whatever its times are set to then


class WorkFile:
    """`OUT.partial`: what a run is to do, and what it has done.

    Tables: `facts` on the whole; `paths`, each once, and whether this run was `asked` for it; `clips`, embedded, `new`
    if the output does not have them yet; `wanted`, what this run was given in order; `rows` of the output in order.
    """

    def __init__(self, place: Path, name: str) -> None:
        self.name = describe(name)
        self.path = place.with_name(place.name + ".partial")
        self._output = place
        self._lock = threading.RLock()  # around the database, which two threads use
        self._added: list[tuple[object, ...]] = []
        self._db = self._open()
        self._model = self._fact("model")
        self._dims = 0

    def _open(self) -> sqlite3.Connection:
        for _ in range(2):  # a run that ends takes the file away
            try:
                db = sqlite3.connect(self.path, timeout=0, isolation_level=None, check_same_thread=False)
            except sqlite3.Error as exc:
                raise unusable(self.path, exc) from exc
            try:
                # The lock keeps other runs out. With it the log needs no shared memory, which network disks lack.
                db.execute("PRAGMA locking_mode = EXCLUSIVE")
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = NORMAL")
                db.execute(f"PRAGMA cache_size = -{CACHE}")
                db.executescript(_SCHEMA)
            except sqlite3.Error as exc:
                db.close()
                if "locked" in str(exc):
                    raise OutputError(
                        f"{self.name}: another run is at work on it: wait for that, or choose another output"
                    ) from exc
                raise unusable(self.path, exc) from exc
            if self.path.exists():
                return db
            db.close()
        raise OutputError(f"{self.name}: {describe(self.path.name)} does not stay: is another run at work on it?")

    # --- what there is already ---

    def forget(self) -> None:
        """Start anew; that the output has to be replaced survives an interruption."""
        with self._writing() as db:
            for table in "facts", "clips", "paths":
                db.execute(f"DELETE FROM {table}")
        self._model = None
        if earlier := self.earlier_output():
            self._record("earlier", earlier)

    def earlier_output(self) -> str | None:
        """What tells the output that is there from others; None if there is none, or its rows were taken over."""
        with suppress(FileNotFoundError):
            status = self._output.stat()
            earlier = f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
            return None if earlier == self._fact("earlier") else earlier
        return None

    def take_over(self, output: Earlier, identity: str) -> None:
        """Take over the rows of an output; what this file holds already is newer."""
        self._agree_on_model(output.model, "those of the output from")
        if (long := self._fact("long")) in (None, "error"):
            self._record("long", output.long)
        elif output.long not in ("error", long):
            raise self._other_long(output.long, str(long))
        if output.folder:
            self._agree_on_folder(output.folder)
        for rows in _batches(output.rows):
            for row in rows:
                self._check_embedding(row[-1])
            with self._writing() as db:
                db.executemany("INSERT OR IGNORE INTO paths (path, asked) VALUES (?, 0)", ((row[0],) for row in rows))
                db.executemany(
                    "INSERT OR IGNORE INTO clips SELECT id, ?, ?, ?, ?, 0 FROM paths WHERE path = ?",
                    ((*rest, path) for path, *rest in rows),
                )
        self._record("earlier", identity)

    def agree_on_long(self, long: str) -> None:
        """Refuse to mix ways of embedding long clips. With "error" there are none, which goes with the others."""
        earlier = self._fact("long")
        if earlier not in (None, "error", long):
            raise self._other_long(earlier, long)
        self._record("long", long)

    def _agree_on_folder(self, folder: str) -> None:
        """Relative paths mean other files elsewhere."""
        earlier = self._fact("folder")
        if earlier not in (None, folder):
            raise OutputError(
                f"{self.name}: the paths in it start from {describe(str(earlier))}, now they would from "
                f"{describe(folder)}: run this there, give absolute paths, or choose another output"
            )
        self._record("folder", folder)

    def _check_embedding(self, vector: bytes) -> None:
        self._dims = self._dims or len(vector)
        if not (0 < len(vector) == self._dims and np.isfinite(np.frombuffer(vector, "<f4")).all()):
            raise OutputError(
                f"{self.name}: is there, and has embeddings that are none, or of other sizes: choose another output, "
                "or start anew with --replace"
            )

    def _other_long(self, earlier: str, long: str) -> OutputError:
        return OutputError(
            f"{self.name}: long clips in it were embedded with long={earlier}, now it is {long}: choose another "
            "output, or start anew with --replace"
        )

    def _agree_on_model(self, model: str, whose: str) -> None:
        if self._model is None:
            self._model = model
            self._record("model", model)
        elif model != self._model:
            raise ModelMismatchError(
                f"{self.name}: the embeddings there are come from model {self._model}, {whose} {model}: choose another "
                "output, or start anew with --replace"
            )

    # --- what is wanted ---

    def in_order(self, paths: Iterable[str]) -> Iterator[str]:
        """Sort by bytes, on disk."""
        with self._lock:
            self._db.execute("DELETE FROM listing")
            for some in _batches(paths):
                self._db.execute("BEGIN")
                self._db.executemany("INSERT OR IGNORE INTO listing VALUES (?)", ((os.fsencode(p),) for p in some))
                self._db.execute("COMMIT")
        for (path,) in self._pages("SELECT path, path FROM listing WHERE path > ? ORDER BY path", b""):
            yield os.fsdecode(path)

    def want(self, paths: Iterable[str]) -> None:
        """Put down what this run is given."""
        for some in _batches(paths):
            if not all(map(os.path.isabs, some)):
                self._agree_on_folder(os.getcwd())
            keys = [(os.fsencode(path),) for path in some]
            with self._writing() as db:
                db.executemany(
                    "INSERT INTO paths (path, asked) VALUES (?, 1) ON CONFLICT (path) DO UPDATE SET asked = 1", keys
                )
                db.executemany("INSERT INTO wanted (id) SELECT id FROM paths WHERE path = ?", keys)

    def drop_changed(self) -> Iterator[tuple[str, AudioFileError]]:
        """Drop clips of wanted files that have changed. Files that are gone are told, and their clips kept."""
        pages = self._pages(
            "SELECT c.id, path, size, stamp FROM clips c JOIN paths p ON p.id = c.id WHERE asked AND c.id > ? "
            "ORDER BY c.id",
            0,
        )
        for path, size, stamp in pages:
            now = stat_of(os.fsdecode(path))
            if now == Stat(size, stamp):
                continue
            with self._lock:
                if now is None:
                    self._db.execute("UPDATE paths SET asked = 0 WHERE path = ?", (path,))
                else:
                    self._db.execute("DELETE FROM clips WHERE id = (SELECT id FROM paths WHERE path = ?)", (path,))
            if now is None:
                name = os.fsdecode(path)
                yield name, AudioFileError(f"{describe(name)}: is gone: the embedding of an earlier run is kept")

    def missing(self) -> Iterator[tuple[int, str]]:
        """Yield number and path of each file to embed."""
        pages = self._pages(
            "SELECT p.id, p.id, path FROM paths p LEFT JOIN clips c ON c.id = p.id WHERE asked AND c.id IS NULL "
            "AND p.id > ? ORDER BY p.id",
            0,
        )
        for number, path in pages:
            yield number, os.fsdecode(path)

    def progress(self) -> tuple[int, int]:
        """Files asked for, each once, and those of them that are done."""
        with self._lock:
            total, done = self._db.execute(
                "SELECT count(*), count(c.id) FROM paths p LEFT JOIN clips c ON c.id = p.id WHERE asked"
            ).fetchone()
        return int(total), int(done)

    # --- what is done ---

    def add(self, number: int, stat: Stat, one: Utterance) -> None:
        """Add a clip; it is in the file within `COMMIT_EVERY`."""
        self._agree_on_model(one.model, "the server now has")
        vector = one.embedding.astype("<f4").tobytes()
        self._check_embedding(vector)
        row = (number, stat.size, stat.stamp, one.seconds, vector)
        self._added.append(row)
        if len(self._added) >= BATCH:  # the disk does not keep up
            self._commit()

    @contextmanager
    def committing(self) -> Iterator[None]:
        """Commit every second, in a thread of its own: a slow disk does not hold up the server."""
        ended = threading.Event()

        def commit() -> None:
            while not ended.wait(COMMIT_EVERY):
                with suppress(sqlite3.Error):  # the next one, at the latest that of the end, meets it too
                    self._commit()

        thread = threading.Thread(target=commit, name="ecapa-triton-commit", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._commit()

    def _commit(self) -> None:
        with self._lock:
            added = self._added[:]
            with self._writing() as db:
                db.executemany("INSERT OR REPLACE INTO clips VALUES (?, ?, ?, ?, ?, 1)", added)
            del self._added[: len(added)]

    def arrange(self) -> tuple[int, int]:
        """Put the rows of the output in order. Returns how many were asked for, and how many others there are."""
        with self._writing() as db:
            asked = db.execute(
                "INSERT INTO rows (id) SELECT c.id FROM wanted w JOIN paths p ON p.id = w.id "
                "JOIN clips c ON c.id = w.id WHERE asked ORDER BY position"
            ).rowcount
            others = db.execute(
                "INSERT INTO rows (id) SELECT c.id FROM clips c JOIN paths p ON p.id = c.id "
                "WHERE NOT asked ORDER BY c.id"
            ).rowcount
        return asked, others

    def select(self, columns: str) -> Iterator[list[tuple[Any, ...]]]:
        """Yield `columns` of the output's rows, a batch at a time."""
        with self._lock:
            cursor = self._db.execute(
                f"SELECT {columns} FROM rows r JOIN clips c ON c.id = r.id JOIN paths p ON p.id = r.id "
                "ORDER BY r.position"
            )
            while rows := cursor.fetchmany(BATCH):
                yield rows

    def count(self, table: str) -> int:
        """How many rows a table has."""
        with self._lock:
            return int(self._db.execute(f"SELECT count(*) FROM {table}").fetchone()[0])

    def sizes(self) -> tuple[int, int, int]:
        """Of the output: rows, bytes of the longest path, dimensions of an embedding."""
        ((count, longest, size),) = next(self.select("count(*), max(length(path)), max(length(embedding))"))
        return count, longest, size // 4

    @property
    def facts(self) -> dict[str, str]:
        """On the whole: `FACTS`."""
        return {name: self._fact(name) or "" for name in FACTS}

    # --- the end ---

    def remove(self) -> None:
        """The output is written."""
        with self._lock:
            self._db.execute("PRAGMA journal_mode = DELETE")
            try:
                self.path.unlink()  # while it is locked: the next run has not begun with it
                self._db.close()
            except PermissionError:  # Windows does not remove open files
                self._db.close()
                self.path.unlink()

    def leave(self) -> str:
        """The run ends early: keep what is not in the output, and say so."""
        with self._lock, suppress(sqlite3.Error):
            (done,) = self._db.execute("SELECT count(*) FROM clips WHERE new").fetchone()
            if done:
                self._db.close()
                return f"{done:,} finished files are kept in {describe(self.path)}"
            self.remove()
        return ""

    def _fact(self, name: str) -> str | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM facts WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def _record(self, name: str, value: str) -> None:
        with self._writing() as db:
            db.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (name, value))

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):
                    self._db.execute("ROLLBACK")
                raise

    def _pages(self, query: str, start: object) -> Iterator[tuple[Any, ...]]:
        """Rows of a query that is ordered by its first column, without that; a page at a time: others may write."""
        while True:
            with self._lock:
                page = self._db.execute(f"{query} LIMIT {BATCH}", (start,)).fetchall()
            for _, *rest in page:
                yield tuple(rest)
            if not page:
                return
            start = page[-1][0]


def stat_of(path: str) -> Stat | None:
    with suppress(OSError, ValueError):
        status = os.stat(path)
        times = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}".encode()
        return Stat(status.st_size, int.from_bytes(blake2b(times, digest_size=8).digest(), "little", signed=True))
    return None


def unusable(path: Path, exc: sqlite3.Error, left: str = "") -> OutputError:
    remedy = "make room on the disk" if "full" in str(exc) else "make room on the disk, or remove it if it is damaged"
    return OutputError(f"{describe(path)}: cannot be used ({exc}): {remedy}{left and '; '}{left}")


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch
