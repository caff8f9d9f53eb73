"""Rows of results in Parquet and npz, read and written a block at a time."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.lib import format as numpy_format
from numpy.typing import NDArray

from .audio import describe
from .errors import OutputError

BLOCK = 2048  # rows in memory at a time: 1.6 MB of embeddings; a row group of Parquet

Columns: TypeAlias = dict[str, NDArray[Any]]
"""Rows as columns of one length, under the names of `COLUMNS`; the paths are bytes in an array of objects."""

# Column of Parquet: array of npz, dtype, number of dimensions.
COLUMNS = {
    "path": ("files", "U", 1),
    "seconds": ("seconds", "f4", 1),
    "embedding": ("embeddings", "f4", 2),
    "size": ("sizes", "i8", 1),
    "stamp": ("stamps", "i8", 1),
}
FACTS = "model", "long", "folder"  # strings about the whole: arrays of npz, metadata of Parquet

_npy: Any = numpy_format  # not every numpy has types for it


# --- Parquet ---


def write_parquet(
    file: BinaryIO, blocks: Iterable[Columns], facts: Mapping[str, str], *, exact_paths: bool = False
) -> None:
    """Write at least one block of rows.

    Args:
        file: Open for writing.
        blocks: A row group each.
        facts: Those of `FACTS`, and others; they become the schema's metadata.
        exact_paths: Paths are bytes; else they are strings, with escapes in place of bytes that are not UTF-8.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    for block in blocks:
        paths, vectors = block["path"].tolist(), block["embedding"]
        columns = {
            "path": pa.array(paths if exact_paths else [path.decode(errors="backslashreplace") for path in paths]),
            "seconds": pa.array(block["seconds"], pa.float32()),
            "embedding": pa.FixedSizeListArray.from_arrays(vectors.ravel(), vectors.shape[1]),
            "model": pa.array([facts["model"]] * len(paths)),
            "size": pa.array(block["size"], pa.int64()),
            "stamp": pa.array(block["stamp"], pa.int64()),
        }
        table = pa.table(columns).replace_schema_metadata(facts)
        if writer is None:
            writer = pq.ParquetWriter(file, table.schema, use_dictionary=["model"], write_page_checksum=True)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def read_parquet(place: Path) -> tuple[dict[str, str], Iterator[Columns]]:
    """The facts of a file that `write_parquet` wrote, and its row groups; damaged pages are errors."""
    import pyarrow.parquet as pq

    def blocks() -> Iterator[Columns]:
        with _naming(place), file:
            for group in range(file.num_row_groups):
                yield _columns(file, group, COLUMNS)

    with _naming(place):
        file = pq.ParquetFile(place, page_checksum_verification=True)
        facts = {name.decode(): text.decode() for name, text in (file.schema_arrow.metadata or {}).items()}
        if missing := {*COLUMNS, *FACTS} - {*file.schema_arrow.names, *facts}:
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return facts, blocks()


def read_group(place: Path, group: int, names: Iterable[str]) -> Columns:
    """Some columns of one row group."""
    import pyarrow.parquet as pq

    with _naming(place), pq.ParquetFile(place, page_checksum_verification=True) as file:
        return _columns(file, group, names)


def _columns(file: Any, group: int, names: Iterable[str]) -> Columns:
    table = file.read_row_group(group, columns=[*names], use_threads=False)
    return _checked({name: _array(table.column(name).combine_chunks(), name) for name in names})


def _array(column: Any, name: str) -> NDArray[Any]:
    if name == "embedding":
        array: NDArray[Any] = column.flatten().to_numpy().reshape(len(column), -1)
    elif name == "path":
        array = np.empty(len(column), object)
        array[:] = [path if isinstance(path, bytes) else _unescaped(path) for path in column.to_pylist()]
    else:
        array = column.to_numpy()
    return array


def _unescaped(path: str) -> bytes:
    """The path of a file, where a string has escapes in place of bytes that are not UTF-8."""
    literal = path.encode()
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes([int(found[1], 16)]), literal)
    return literal if raw == literal or os.path.lexists(literal) else raw


# --- npz ---


def write_npz(file: BinaryIO, blocks: Callable[[str], Iterable[Columns]], facts: Mapping[str, str]) -> None:
    """Write what `np.savez` would.

    Args:
        file: Open for writing.
        blocks: Yields the rows with one column, in the same order each time.
        facts: Those of `FACTS`, and others, which are left out.
    """
    count = longest = 0
    for block in blocks("path"):
        count += len(block["path"])
        longest = max([longest, *(len(os.fsdecode(path)) for path in block["path"])])
    with zipfile.ZipFile(file, "w") as archive:
        for column, (name, dtype, _) in COLUMNS.items():
            dtype = f"<{dtype}{longest if column == 'path' else ''}"
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
                for number, block in enumerate(blocks(column)):
                    values = block[column]
                    if not number:
                        header = {"descr": dtype, "fortran_order": False, "shape": (count, *values.shape[1:])}
                        _npy.write_array_header_1_0(stream, header)
                    if column == "path":
                        values = np.array([os.fsdecode(path) for path in values], dtype)
                    stream.write(values.astype(dtype, copy=False).tobytes())
        for name in FACTS:
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as stream:
                _npy.write_array(stream, np.array(facts[name]), (1, 0))


def read_npz(place: Path) -> tuple[dict[str, str], Iterator[Columns]]:
    """The facts of a file that `write_npz` wrote, and its rows a block at a time."""

    def blocks() -> Iterator[Columns]:
        with _naming(place), zipfile.ZipFile(place) as archive:
            arrays = {column: _Array(archive, *expected) for column, expected in COLUMNS.items()}
            length, *others = {array.shape[0] for array in arrays.values()}
            if others or not length:
                raise ValueError("its arrays are empty or of different lengths")
            for start in range(0, length, BLOCK):
                columns = {name: array.read(min(BLOCK, length - start)) for name, array in arrays.items()}
                columns["path"] = np.array([os.fsencode(path) for path in columns["path"]], object)
                yield _checked(columns)

    with _naming(place), zipfile.ZipFile(place) as archive:
        return {name: str(_Array(archive, name, "U", 0).read(1)[0]) for name in FACTS}, blocks()


class _Array:
    """An array of an npz, read a block at a time."""

    def __init__(self, archive: zipfile.ZipFile, name: str, dtype: str, dimensions: int) -> None:
        self._stream = archive.open(f"{name}.npy")
        version = _npy.read_magic(self._stream)
        if version != (1, 0):
            raise ValueError(f"{name} is of version {version} of npy")
        self.shape, fortran, self._dtype = _npy.read_array_header_1_0(self._stream)
        if fortran or len(self.shape) != dimensions or dtype not in (self._dtype.kind, self._dtype.str[1:]):
            raise ValueError(f"{name} is {self._dtype} {list(self.shape)}")

    def read(self, count: int) -> NDArray[Any]:
        """The next `count` rows."""
        shape = (count, *self.shape[1:])
        size = int(np.prod(shape)) * self._dtype.itemsize
        return np.frombuffer(self._stream.read(size), self._dtype).reshape(shape)


# --- both ---


def _checked(columns: Columns) -> Columns:
    for name, array in columns.items():
        _, dtype, dimensions = COLUMNS[name]
        if name != "path" and (array.dtype.str[1:] != dtype or array.ndim != dimensions):
            raise ValueError(f"its {name} is {array.dtype} of {array.ndim} dimensions")
    if "embedding" in columns and not (columns["embedding"].size and np.isfinite(columns["embedding"]).all()):
        raise ValueError("with embeddings that are empty or not finite")
    return columns


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Turn whatever NumPy, zipfile and pyarrow raise for a foreign or damaged file into one error."""
    try:
        yield
    except Exception as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise OutputError(
            f"{describe(place)}: not written by this command, or damaged ({reason}): choose another output, or replace "
            "this one with --replace"
        ) from exc
