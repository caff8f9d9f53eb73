"""`OUT.parts/`: the results of runs on an output, kept until the output is made of them."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ._commands import complain
from ._files import locked, replacing
from ._scoring import Utterance
from ._tables import (
    BLOCK,
    COLUMNS,
    FACTS,
    Columns,
    read_group,
    read_npz,
    read_parquet,
    write_npz,
    write_parquet,
)
from .audio import describe
from .errors import ModelMismatchError, OutputError

WRITE_EVERY = 3.0  # s between two parts: a kill loses the results of this time
PARTS = "[0-9]" * 8 + "-*.parquet"  # number of the part - its rows
MISSING = -1  # in place of a row's number
KEY = "S16"  # dtype of a path's hash: 16 bytes of memory a file, however long the paths

ANEW = "choose another output, or start anew with --replace"
FOLDER = "run the command there, pass absolute paths, or choose another output"
CONFLICTS = {  # of facts: what the output holds, and what to do
    "model": ("embeddings of model", ANEW),
    "dims": ("embeddings of dimension", ANEW),
    "long": ("long clips embedded with --long", ANEW),
    "folder": ("paths relative to", FOLDER),
}


@dataclass(frozen=True)
class Stat:
    """The facts by which a file is recognized as unchanged."""

    size: int  # bytes
    stamp: int  # hash of the times of writing and renaming and of the inode; utime cannot restore it


class Parts:
    """The rows of an output and of its parts, and those that this run adds.

    A part is a Parquet file with one row group, written every few seconds and renamed when it is whole. Rows have
    numbers: first those of the output, then those of the parts, then those of this run. The last row of a path counts.
    In memory are a hash and a `Stat` of each row, and the rows of the part to be written next.

    Attributes:
        name: The output's, for messages.
        folder: `OUT.parts`.
        facts: What all rows have in common, `FACTS`; empty while unknown.
    """

    def __init__(self, place: Path, name: str) -> None:
        self.name = describe(name)
        self.folder = place.with_name(place.name + ".parts")
        self.facts = dict.fromkeys(FACTS, "")
        self._place = place
        self._parquet = place.suffix.lower() == ".parquet"
        self._replaces = ""  # identity of an output whose rows do not count
        self._lock = self._locked()
        self._groups: list[tuple[Path, int]] = []  # files and numbers of their row groups
        self._starts: list[int] = []  # number of the first row of each group
        self._rows = 0  # in these groups
        self._next = 1  # number of the part to be written
        self._pending: list[tuple[bytes, float, NDArray[np.float32], int, int]] = []  # its rows
        self._written = time.monotonic()  # when the last part was
        self._sizes, self._stamps = array("q"), array("q")  # by row, of earlier runs
        self._keys: NDArray[np.bytes_] = np.empty(0, KEY)  # hashes of their paths, sorted
        self._order: NDArray[np.int64] = np.empty(0, np.int64)  # the row of each

    def _locked(self) -> BinaryIO:
        try:
            self.folder.mkdir(exist_ok=True)
            return locked(self.folder / "lock")
        except (BlockingIOError, FileNotFoundError) as exc:  # a run that ends removes the folder
            reason = "another run is writing it: wait for its end, or choose another output"
            raise OutputError(f"{self.name}: {reason}") from exc
        except OSError as exc:
            raise OutputError(f"{describe(self.folder)}: cannot be used ({exc.strerror}): move it away") from exc

    # --- rows of earlier runs ---

    def load(self, replace: bool) -> None:
        """Read what there is: the output, unless it is to be replaced, and the parts. Damaged parts are left out.

        Raises:
            OutputError: The output is not one of this command's, or is damaged; its rows do not go together.
            ModelMismatchError: Its rows are of two models.
        """
        self._unlink(".*.part")
        identity = self._identity()
        if replace:
            self._unlink(PARTS)
            self._replaces = identity
        for path in self._parts():
            with suppress(OutputError):
                self._replaces = read_parquet(path)[0].get("replaces", "")
                break
        keys = bytearray()
        if identity and identity != self._replaces:
            path = self._place
            if not self._parquet:
                path = self.folder / "earlier.parquet"
                facts, blocks = read_npz(self._place)
                with replacing(path) as file:
                    write_parquet(file, blocks, facts, exact_paths=True)
            facts, blocks = read_parquet(path)
            for group, columns in enumerate(blocks):
                self._index(path, group, facts, columns, keys)
        for path in self._parts():
            self._next = int(path.name[:8]) + 1
            try:
                facts, blocks = read_parquet(path)
                (columns,) = blocks
            except (OutputError, ValueError):
                complain(f"{describe(path)}: damaged, its files are embedded again")
            else:
                self._index(path, 0, facts, columns, keys)
        if keys:
            by_row = np.frombuffer(keys, KEY)
            self._order = np.argsort(by_row, kind="stable")
            self._keys = by_row[self._order]

    def _identity(self) -> str:
        """Tells the output from another one in its place; empty if there is none."""
        with suppress(FileNotFoundError):
            status = self._place.stat()
            return f"{status.st_size} {status.st_mtime_ns} {status.st_ino}"
        return ""

    def _index(self, path: Path, group: int, facts: Mapping[str, str], columns: Columns, keys: bytearray) -> None:
        for name in FACTS:  # "error" embeds no long clips, and so goes with each other way
            self.agree(name, "" if facts[name] == "error" else facts[name])
        self.agree("dims", str(columns["embedding"].shape[1]))
        for name in columns["path"]:
            keys += key(name)
        self._sizes.extend(columns["size"].tolist())
        self._stamps.extend(columns["stamp"].tolist())
        self._add_group(path, group, len(columns["path"]))

    def _add_group(self, path: Path, group: int, count: int) -> None:
        self._groups.append((path, group))
        self._starts.append(self._rows)
        self._rows += count

    def agree(self, name: str, value: str) -> None:
        """Check a fact of new rows against those there are; an empty one agrees with each."""
        known = self.facts.get(name)
        if known and value and value != known:
            held, remedy = CONFLICTS[name]
            error = ModelMismatchError if name == "model" else OutputError
            raise error(f"{self.name}: holds {held} {describe(known)}, not {describe(value)}: {remedy}")
        self.facts[name] = known or value

    def find(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Numbers of the rows of these paths, `MISSING` where there is none."""
        rows = np.full(len(keys), MISSING)
        if len(self._keys):
            place = np.searchsorted(self._keys, keys, "right") - 1
            found = (place >= 0) & (self._keys[place] == keys)
            rows[found] = self._order[place[found]]
        return rows

    def others(self, keys: NDArray[np.bytes_]) -> NDArray[np.int64]:
        """Numbers of the rows of earlier runs with other paths, in order."""
        last = np.ones(len(self._keys), bool)
        last[:-1] = self._keys[1:] != self._keys[:-1]
        return np.sort(self._order[last & ~np.isin(self._keys, keys)])

    def stat(self, row: int) -> Stat:
        """What the file was when its row was made."""
        return Stat(self._sizes[row], self._stamps[row])

    # --- rows of this run ---

    def add(self, path: str, stat: Stat, one: Utterance) -> int:
        """Add a row and return its number."""
        self.agree("model", one.model)
        self.agree("dims", str(len(one.embedding)))
        row = self._rows + len(self._pending)
        self._pending.append((os.fsencode(path), one.seconds, one.embedding, stat.size, stat.stamp))
        if len(self._pending) == BLOCK or time.monotonic() - self._written > WRITE_EVERY:
            self._write_part()
        return row

    def _write_part(self) -> None:
        self._written = time.monotonic()
        if not self._pending:
            return
        paths, seconds, vectors, sizes, stamps = zip(*self._pending, strict=True)
        columns = {
            "path": np.array(paths, object),
            "seconds": np.array(seconds, np.float32),
            "embedding": np.array(vectors, np.float32),
            "size": np.array(sizes, np.int64),
            "stamp": np.array(stamps, np.int64),
        }
        part = self.folder / f"{self._next:08}-{len(paths)}.parquet"
        with replacing(part) as file:
            write_parquet(file, [columns], self.facts | {"replaces": self._replaces}, exact_paths=True)
        self._next += 1
        self._add_group(part, 0, len(paths))
        self._pending.clear()

    # --- the end ---

    def write_output(self, rows: NDArray[np.int64]) -> None:
        """Write the output of these rows, whole or not at all."""
        self._write_part()
        facts = {name: self.facts[name] for name in FACTS}
        if self._parquet:
            with replacing(self._place) as file:
                write_parquet(file, self._blocks(rows), facts)
            return
        # An npz is written column by column, for which the rows must be in order: there can be thousands of parts.
        ordered = self.folder / "ordered.parquet"
        with replacing(ordered) as file:
            write_parquet(file, self._blocks(rows), facts, exact_paths=True)
        groups = range(-(-len(rows) // BLOCK))
        with replacing(self._place) as file:
            write_npz(file, lambda column: (read_group(ordered, group, [column]) for group in groups), facts)

    def _blocks(self, rows: NDArray[np.int64]) -> Iterator[Columns]:
        """Rows in this order, each row group that a block needs read once for it."""
        starts = np.array(self._starts)
        for begin in range(0, len(rows), BLOCK):
            some = rows[begin : begin + BLOCK]
            groups = np.searchsorted(starts, some, "right") - 1
            pieces = []
            for group in np.unique(groups):
                path, number = self._groups[group]
                columns = read_group(path, number, COLUMNS)
                wanted = some[groups == group] - starts[group]
                pieces.append({name: column[wanted] for name, column in columns.items()})
            in_order = np.argsort(np.argsort(groups, kind="stable"))
            yield {name: np.concatenate([piece[name] for piece in pieces])[in_order] for name in COLUMNS}

    def remove(self) -> None:
        """Remove the parts, and the folder unless others have put files there."""
        self._unlink("*.parquet")
        with suppress(OSError):
            (self.folder / "lock").unlink()
            self.folder.rmdir()
        self._lock.close()

    def leave(self) -> str:
        """The run ends early: keep the parts, and say so."""
        with suppress(OutputError):
            self._write_part()
        kept = sum(int(path.stem[9:]) for path in self._parts())
        if not kept:
            self.remove()
            return ""
        self._unlink("[a-z]*.parquet")
        self._lock.close()
        return f"{kept:,} embeddings are kept in {describe(self.folder)}"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(PARTS))

    def _unlink(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink()


def key(path: bytes) -> bytes:
    """Stands for a path."""
    return blake2b(path, digest_size=16).digest()


def stat_of(path: str) -> Stat | None:
    """The file as it is; None if it is gone."""
    with suppress(OSError, ValueError):
        status = os.stat(path)
        times = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}".encode()
        return Stat(status.st_size, int.from_bytes(blake2b(times, digest_size=8).digest(), "little", signed=True))
    return None
