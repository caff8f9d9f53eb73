"""Rows of results as Parquet, and npz made from and turned into it, a block at a time."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

import numpy as np
from numpy.lib import format as numpy_format
from numpy.typing import NDArray

from .audio import describe
from .errors import OutputError

if TYPE_CHECKING:
    import pyarrow as pa

BLOCK = 2048  # rows in memory at a time, 1.6 MB of embeddings; a row group of Parquet
FACTS = "model", "long", "folder"  # strings about all rows: metadata of Parquet, arrays of npz
ARRAYS = {  # of npz: column of Parquet and dtype
    "files": ("path", "<U"),
    "seconds": ("seconds", "<f4"),
    "embeddings": ("embedding", "<f4"),
    "sizes": ("size", "<i8"),
    "stamps": ("stamp", "<i8"),
}

_npy: Any = numpy_format  # not every numpy has types for it


def schema(dims: int, facts: dict[str, str]) -> pa.Schema:
    """Of all Parquet files; the stamp is a hash of times and inode, by which a file is recognized as unchanged."""
    import pyarrow as pa

    columns = {
        "path": pa.string(),
        "seconds": pa.float32(),
        "embedding": pa.list_(pa.float32(), dims),
        "model": pa.string(),
        "size": pa.int64(),
        "stamp": pa.int64(),
    }
    return pa.schema(columns, facts)


def shown(path: str) -> str:
    """The path as it is stored: with escapes in place of bytes that are not UTF-8."""
    return path.encode(errors="backslashreplace").decode()


def write_parquet(file: BinaryIO, tables: Iterable[pa.Table], dims: int, facts: dict[str, str]) -> None:
    """Write tables of `schema`, a row group each, with checksums."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(
        file, schema(dims, facts), use_dictionary=["model"], write_page_checksum=True, store_schema=True
    ) as writer:
        for table in tables:
            writer.write_table(table)


@contextmanager
def open_parquet(place: Path) -> Iterator[Any]:
    """Open a file that `write_parquet` wrote; whatever is raised for a foreign or damaged one becomes one error."""
    import pyarrow.parquet as pq

    with _naming(place), pq.ParquetFile(place, page_checksum_verification=True) as file:
        yield file


def read_facts(file: Any) -> tuple[dict[str, str], int]:
    """The facts of an open Parquet file and the size of its embeddings."""
    found = file.schema_arrow
    facts = {name: found.metadata[name.encode()].decode() for name in FACTS}
    dims = found.field("embedding").type.list_size
    if not found.equals(schema(dims, {})):
        raise ValueError(f"with the columns {found.names}")
    return facts, dims


def npz_from_parquet(source: Path, file: BinaryIO) -> None:
    """Write the rows of a Parquet file as npz, column by column."""
    import pyarrow.compute as pc

    with open_parquet(source) as rows, zipfile.ZipFile(file, "w") as archive:
        facts, dims = read_facts(rows)

        def blocks(column: str) -> Iterator[Any]:
            return (batch.column(0) for batch in rows.iter_batches(BLOCK, columns=[column], use_threads=False))

        for name, (column, dtype) in ARRAYS.items():
            if column == "path":
                dtype += str(max(pc.max(pc.utf8_length(block)).as_py() for block in blocks(column)))
            shape = (rows.metadata.num_rows, dims) if column == "embedding" else (rows.metadata.num_rows,)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                _npy.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
                for block in blocks(column):
                    values = block.flatten() if column == "embedding" else block
                    stream.write(values.to_numpy(zero_copy_only=False).astype(dtype, copy=False).tobytes())
        for name, value in facts.items():
            with archive.open(f"{name}.npy", "w") as stream:
                _npy.write_array(stream, np.array(value), (1, 0))


def parquet_from_npz(source: Path, file: BinaryIO) -> None:
    """Write the rows of an npz that `npz_from_parquet` wrote as Parquet."""
    import pyarrow as pa

    with _naming(source), zipfile.ZipFile(source) as archive:
        facts = {name: str(_npy.read_array(archive.open(f"{name}.npy"))) for name in FACTS}
        dims = next(_blocks(archive.open("embeddings.npy"))).shape[1]

        def tables() -> Iterator[pa.Table]:
            columns = [_blocks(archive.open(f"{name}.npy")) for name in ARRAYS]
            for paths, seconds, embeddings, sizes, stamps in zip(*columns, strict=True):
                values = {
                    "path": [shown(path) for path in paths.tolist()],
                    "seconds": seconds,
                    "embedding": pa.FixedSizeListArray.from_arrays(embeddings.ravel(), dims),
                    "model": [facts["model"]] * len(paths),
                    "size": sizes,
                    "stamp": stamps,
                }
                yield pa.table(values, schema(dims, facts))

        write_parquet(file, tables(), dims, facts)


def _blocks(stream: IO[bytes]) -> Iterator[NDArray[Any]]:
    """An array of an npz in blocks of rows."""
    _npy.read_magic(stream)
    (_, *row), _, dtype = _npy.read_array_header_1_0(stream)
    while data := stream.read(BLOCK * math.prod(row) * dtype.itemsize):
        yield np.frombuffer(data, dtype).reshape(-1, *row)


@contextmanager
def _naming(place: Path) -> Iterator[None]:
    """Turn what NumPy, zipfile and pyarrow raise for a foreign or damaged file into one error."""
    try:
        yield
    except OutputError:
        raise
    except Exception as exc:
        reason = " ".join(str(exc).split()) or type(exc).__name__
        raise OutputError(
            f"{describe(place)}: not written by this command, or damaged ({reason}): choose another output, or replace "
            "this one with --replace"
        ) from exc
