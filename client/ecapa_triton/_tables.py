"""The output of a bulk run, npz or Parquet, read and written a batch of rows at a time."""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeAlias

import numpy as np

from .audio import describe
from .errors import OutputError

if TYPE_CHECKING:
    from ._workfile import WorkFile

BATCH = 2048  # rows that are handled at a time: 2 MB; a row group of Parquet

FACTS = "model", "long", "folder"  # on the whole, single strings
# Kind of dtype and number of dimensions.
_ARRAYS = {
    "files": ("U", 1),
    "seconds": ("f4", 1),
    "embeddings": ("f4", 2),
    "sizes": ("i8", 1),
    "stamps": ("i8", 1),
}
_COLUMNS = "path", "size", "stamp", "seconds", "embedding"

Row: TypeAlias = tuple[bytes, int, int, float, bytes]  # path, size, stamp, seconds, embedding


@dataclass(frozen=True)
class Earlier:
    """An output of an earlier run."""

    model: str
    long: str
    folder: str  # that relative paths start from
    rows: Iterator[Row]


def write_npz(file: BinaryIO, work: WorkFile) -> None:
    """As `np.savez` does, a batch of rows at a time."""
    count, longest, dims = work.sizes()
    columns: dict[str, tuple[str, str, tuple[int, ...]]] = {
        "files": ("path", f"<U{longest}", (count,)),
        "seconds": ("seconds", "<f4", (count,)),
        "embeddings": ("embedding", "<f4", (count, dims)),
        "sizes": ("size", "<i8", (count,)),
        "stamps": ("stamp", "<i8", (count,)),
    }
    with zipfile.ZipFile(file, "w") as archive:
        for name, (column, dtype, shape) in columns.items():
            _write_array(archive, name, dtype, shape, (_block(column, dtype, rows) for rows in work.select(column)))
        for name, text in work.facts.items():
            _write_array(archive, name, f"<U{max(len(text), 1)}", (), [np.array(text or "\0").tobytes()])


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: str, shape: tuple[int, ...], data: Iterable[bytes]
) -> None:
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as stream:
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(stream, header)  # type: ignore[no-untyped-call]
        for block in data:
            stream.write(block)


def _block(column: str, dtype: str, rows: Sequence[tuple[Any]]) -> bytes:
    values = [value for (value,) in rows]
    if column == "embedding":
        return b"".join(values)
    return np.array([os.fsdecode(value) for value in values] if column == "path" else values, dtype).tobytes()


def read_npz(place: Path) -> Earlier:
    def rows() -> Iterator[Row]:
        with _refusing_foreign(place), zipfile.ZipFile(place) as archive:
            arrays = [_Array(archive, name, *expected) for name, expected in _ARRAYS.items()]
            if len({array.shape[0] for array in arrays}) != 1:
                raise ValueError("its arrays are of different lengths")
            for start in range(0, arrays[0].shape[0], BATCH):
                count = min(BATCH, arrays[0].shape[0] - start)
                for path, seconds, embedding, size, stamp in zip(*(a.read(count) for a in arrays), strict=True):
                    yield os.fsencode(path), int(size), int(stamp), float(seconds), embedding.tobytes()

    with _refusing_foreign(place), zipfile.ZipFile(place) as archive:
        model, long, folder = (str(_Array(archive, name, "U", 0).read(1)[0]) for name in FACTS)
        return Earlier(model, long, folder, rows())


class _Array:
    """An array of an npz, read a part at a time."""

    def __init__(self, archive: zipfile.ZipFile, name: str, kind: str, dimensions: int) -> None:
        self._stream = archive.open(f"{name}.npy")
        version = np.lib.format.read_magic(self._stream)  # type: ignore[no-untyped-call]
        if version != (1, 0):
            raise ValueError(f"its {name} are of version {version} of the format")
        read_header = np.lib.format.read_array_header_1_0
        self.shape, fortran, self._dtype = read_header(self._stream)  # type: ignore[no-untyped-call]
        if fortran or len(self.shape) != dimensions or kind not in (self._dtype.kind, self._dtype.str[1:]):
            raise ValueError(f"its {name} are {self._dtype} {list(self.shape)}")

    def read(self, count: int) -> np.ndarray[Any, Any]:
        """The next `count` rows."""
        shape = (count, *self.shape[1:])
        size = int(np.prod(shape)) * self._dtype.itemsize
        return np.frombuffer(self._stream.read(size), self._dtype).reshape(shape)


def write_parquet(file: BinaryIO, work: WorkFile) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    _, _, dims = work.sizes()
    fields = [("path", pa.string()), ("seconds", pa.float32()), ("embedding", pa.list_(pa.float32(), dims))]
    fields += [("model", pa.string()), ("size", pa.int64()), ("stamp", pa.int64())]
    schema = pa.schema(fields, metadata=work.facts)
    with pq.ParquetWriter(file, schema, use_dictionary=["model"]) as writer:
        for rows in work.select(", ".join(_COLUMNS)):
            paths, sizes, stamps, seconds, embeddings = zip(*rows, strict=True)
            columns = [
                [path.decode(errors="backslashreplace") for path in paths],
                seconds,
                pa.FixedSizeListArray.from_arrays(np.frombuffer(b"".join(embeddings), "<f4"), dims),
                [work.facts["model"]] * len(rows),
                sizes,
                stamps,
            ]
            arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def read_parquet(place: Path) -> Earlier:
    import pyarrow.parquet as pq

    def rows() -> Iterator[Row]:
        with _refusing_foreign(place), pq.ParquetFile(place) as file:
            for batch in file.iter_batches(BATCH, columns=_COLUMNS):
                paths, sizes, stamps, seconds, embeddings = (batch.column(name) for name in _COLUMNS)
                vectors = embeddings.flatten().to_numpy().reshape(len(paths), -1)
                facts = zip(paths.to_pylist(), sizes.to_pylist(), stamps.to_pylist(), seconds.to_pylist(), strict=True)
                for (path, *rest), vector in zip(facts, vectors, strict=True):
                    yield _unescaped(path), *rest, vector.astype("<f4").tobytes()

    with _refusing_foreign(place), pq.ParquetFile(place) as file:
        if missing := {*_COLUMNS} - {*file.schema_arrow.names}:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        metadata = file.schema_arrow.metadata or {}
        model, long, folder = (metadata[name.encode()].decode() for name in FACTS)
        return Earlier(model, long, folder, rows())


def _unescaped(path: str) -> bytes:
    """The path of a file, where Parquet has escapes in place of what is not UTF-8 in its name."""
    as_is = path.encode()
    raw = re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes([int(found[1], 16)]), as_is)
    return as_is if raw == as_is or os.path.lexists(as_is) else raw


@contextmanager
def _refusing_foreign(place: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error) as exc:
        raise OutputError(
            f"{describe(place)}: is there, and not what this command writes ({' '.join(str(exc).split())}): choose "
            "another output, or put it away with --replace"
        ) from exc


def check_pyarrow(name: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as exc:  # missing, or one for another NumPy
        raise OutputError(
            f"{name}: Parquet is written by pyarrow, which cannot be imported ({exc}): "
            "pip install 'ecapa-triton[bulk]', or choose an output that ends in .npz"
        ) from exc
