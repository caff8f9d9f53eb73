"""`OUT.parts/`: the results of runs on an output, kept until the output is made of them."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Iterator
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from ._commands import complain
from ._files import check_output, replacing
from ._manifest import normalized
from ._scoring import Utterance
from ._tables import (
    BLOCK,
    npz_from_parquet,
    open_parquet,
    parquet_from_npz,
    read_facts,
    schema,
    shown,
    write_parquet,
)
from .audio import counted, describe
from .errors import ModelMismatchError, OutputError

if TYPE_CHECKING:
    import pyarrow as pa

WRITE_EVERY = 3.0  # s between two parts: a kill loses the results of this time
PARTS = "[0-9]" * 8 + "-*.parquet"  # number of the part - its rows
LABELS = {"model": "model", "long": "--long", "folder": "folder of relative paths", "dims": "size of embeddings"}

Stat: TypeAlias = tuple[int, int]
"""Size and stamp of a file, by which it is recognized as unchanged."""


class Parts:
    """The rows of an output and of its parts, and those that this run adds.

    A part is a Parquet file with one row group, written every few seconds and renamed when it is whole. Rows have
    numbers: first those of the output, then those of the parts, then those of this run. The embeddings stay on disk,
    except those of the part to be written next.

    Attributes:
        name: The output's, for messages.
        folder: `OUT.parts`.
        earlier: Number of the last row of each path, as stored, that earlier runs embedded.
    """

    def __init__(self, output: Path) -> None:
        self.name = describe(output)
        self.earlier: dict[str, int] = {}
        self._place = check_output(output, ".npz", ".parquet")
        self.folder = self._place.with_name(self._place.name + ".parts")
        self._replacing = self.folder / "replacing"  # marks that the rows of the output do not count
        self._parquet = output.suffix.lower() == ".parquet"
        self._facts = dict.fromkeys(LABELS, "")  # that all rows share; empty while unknown
        self._groups: list[tuple[Path, int]] = []  # files and numbers of their row groups
        self._starts: list[int] = []  # number of the first row of each group
        self._rows = 0  # in these groups
        self._sizes, self._stamps = array("q"), array("q")  # by row, of earlier runs
        self._next = 1  # number of the part to be written
        self._pending: list[dict[str, Any]] = []  # its rows
        self._written = time.monotonic()  # when the last part was

    def load(self, replace: bool) -> None:
        """Index what there is: the output, unless it is to be replaced, and the parts. Damaged parts are left out.

        Raises:
            OutputError: The output is not one of this command's, or is damaged; its rows do not go together.
            ModelMismatchError: Its rows are of two models.
        """
        self._unlink(".*.part")
        if replace:
            self._unlink("*.parquet")
            self._replacing.touch()
        if self._place.exists() and not self._replacing.exists():
            path = self._place
            if not self._parquet:
                path = self.folder / "earlier.parquet"
                with replacing(path) as file:
                    parquet_from_npz(self._place, file)
            self._index(path, *_read(path))
        for path in self._parts():
            self._next = int(path.name[:8]) + 1
            try:
                found = _read(path)
            except OutputError:
                complain(f"{describe(path)}: damaged, its files are embedded again")
            else:
                self._index(path, *found)

    def _index(self, path: Path, facts: dict[str, str], groups: list[pa.Table]) -> None:
        for name, value in facts.items():  # "error" embeds no long clips, and so agrees with each other way
            self.agree(name, "" if value == "error" else value)
        for number, group in enumerate(groups):
            paths = map(normalized, group["path"].to_pylist())  # earlier versions stored them as given
            self.earlier.update(zip(paths, range(self._rows, self._rows + len(group)), strict=True))
            self._sizes.extend(group["size"].to_pylist())
            self._stamps.extend(group["stamp"].to_pylist())
            self._add_group(path, number, len(group))

    def _add_group(self, path: Path, number: int, rows: int) -> None:
        self._groups.append((path, number))
        self._starts.append(self._rows)
        self._rows += rows

    def agree(self, name: str, value: str) -> None:
        """Check a fact of new rows against those there are; an empty one agrees with each."""
        known = self._facts[name]
        if known and value and value != known:
            raise (ModelMismatchError if name == "model" else OutputError)(
                f"{self.name}: its {LABELS[name]} is {describe(known)}, this run's {describe(value)}: "
                "choose another output, or start anew with --replace"
            )
        self._facts[name] = known or value

    def stat(self, row: int) -> Stat:
        """The file's size and stamp when its row was made."""
        return self._sizes[row], self._stamps[row]

    def add(self, path: str, stat: Stat, one: Utterance) -> int:
        """Add a row and return its number."""
        self.agree("model", one.model)
        self.agree("dims", str(len(one.embedding)))
        facts = {"path": shown(path), "size": stat[0], "stamp": stat[1]}
        self._pending.append(facts | {"seconds": one.seconds, "embedding": one.embedding, "model": one.model})
        row = self._rows + len(self._pending) - 1
        if len(self._pending) == BLOCK or time.monotonic() - self._written > WRITE_EVERY:
            self._write_part()
        return row

    def _write_part(self) -> None:
        import pyarrow as pa

        if self._pending:
            path = self.folder / f"{self._next:08}-{len(self._pending)}.parquet"
            self._write(path, iter([pa.Table.from_pylist(self._pending, schema(int(self._facts["dims"]), {}))]))
            self._add_group(path, 0, len(self._pending))
            self._pending.clear()
            self._next += 1
        self._written = time.monotonic()

    def write_output(self, rows: list[int]) -> None:
        """Write the output of these rows, whole or not at all."""
        self._write_part()
        if self._parquet:
            self._write(self._place, self._blocks(np.array(rows)))
        else:  # an npz is written column by column, for which the rows must be in order
            ordered = self.folder / "ordered.parquet"
            self._write(ordered, self._blocks(np.array(rows)))
            with replacing(self._place) as file:
                npz_from_parquet(ordered, file)

    def _write(self, path: Path, tables: Iterator[pa.Table]) -> None:
        facts = {name: value for name, value in self._facts.items() if name != "dims"}
        with replacing(path) as file:
            write_parquet(file, tables, int(self._facts["dims"]), facts)

    def _blocks(self, rows: np.ndarray[Any, np.dtype[np.int64]]) -> Iterator[pa.Table]:
        """Rows in this order; each row group that a block needs is read once for it."""
        import pyarrow as pa

        starts = np.array(self._starts)
        for begin in range(0, len(rows), BLOCK):
            block = rows[begin : begin + BLOCK]
            groups = np.searchsorted(starts, block, "right") - 1
            pieces = []
            for group in np.unique(groups):
                path, number = self._groups[group]
                with open_parquet(path) as file:
                    table = file.read_row_group(number, use_threads=False).replace_schema_metadata()
                pieces.append(table.take(block[groups == group] - starts[group]))
            yield pa.concat_tables(pieces).take(np.argsort(np.argsort(groups, kind="stable")))

    def remove(self) -> None:
        """Remove the parts, and the folder unless others have put files there."""
        self._unlink("*.parquet")
        self._replacing.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    def leave(self) -> str:
        """The run ends early: keep the parts, and say so."""
        with suppress(OutputError):
            self._write_part()
        kept = sum(int(path.stem[9:]) for path in self._parts())
        if not kept:
            self.remove()
            return ""
        self._unlink("[a-z]*.parquet")
        return f"{counted(kept, 'embedding')} kept in {describe(self.folder)}: run again, without --replace, to resume"

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(PARTS))

    def _unlink(self, pattern: str) -> None:
        for path in self.folder.glob(pattern):
            path.unlink()


def stat_of(path: str) -> Stat | None:
    """The file as it is; None if it is gone."""
    with suppress(OSError, ValueError):
        status = os.stat(path)
        # utime cannot restore the time of the last change, nor a move the inode.
        times = f"{status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}".encode()
        return status.st_size, int.from_bytes(blake2b(times, digest_size=8).digest(), "little", signed=True)
    return None


def _read(path: Path) -> tuple[dict[str, str], list[pa.Table]]:
    """The facts of a Parquet file and its row groups without the embeddings, which are checked for damage."""
    with open_parquet(path) as file:
        facts, dims = read_facts(file)
        groups = (file.read_row_group(group, use_threads=False) for group in range(file.num_row_groups))
        return facts | {"dims": str(dims)}, [group.select(["path", "size", "stamp"]) for group in groups]
