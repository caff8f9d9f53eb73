"""The files that a bulk run is given: by name, in folders, in lists."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

from .audio import describe
from .errors import AudioFileError, ManifestError

# Of files in folders; a file that is named itself may have any.
SUFFIXES = frozenset(".wav .flac .ogg .opus .mp3 .aiff .aif .au .caf .sph .w64 .rf64".split())
COLUMNS = "path", "file", "wav", "audio_filepath", "filename"  # the first that is there holds the paths
_STARTS = "offset", "start"  # of a segment, in NeMo's and SpeechBrain's manifests
_CHUNK = 1 << 16  # bytes of standard input read at a time

Unreadable = Callable[[str, AudioFileError], None]


def expand(
    inputs: Iterable[str],
    *,
    root: str | None = None,
    null: bool = False,
    in_order: Callable[[Iterable[str]], Iterable[str]],
    unreadable: Unreadable,
) -> Iterator[str]:
    """Yield the paths of all inputs, those of a folder in the order of their bytes.

    Args:
        inputs: Folders, audio files, manifests (`.txt`, `.lst`, `.csv`, `.tsv`, `.jsonl`, `.json`), `-` for paths on
            standard input.
        root: What relative paths of manifests are relative to; None: the manifest's own folder.
        null: Paths on standard input end in NUL, not in a line break.
        in_order: Sorts the paths of one folder by their bytes.
        unreadable: Told of each folder below an input that cannot be listed.

    Raises:
        ManifestError: Names the manifest and its line.
    """
    for given in inputs:
        suffix = os.path.splitext(given)[1].lower()
        if given == "-":
            yield from _standard_input(b"\0" if null else b"\n")
        elif os.path.isdir(given):
            yield from in_order(_folder(given, unreadable))
        elif suffix in _READERS:
            yield from _manifest(given, suffix, os.path.dirname(given) if root is None else root)
        else:
            yield given


def by_bytes(paths: Iterable[str]) -> list[str]:
    """Sort as file systems do, whatever the encoding of the names."""
    return sorted(paths, key=os.fsencode)


def _folder(top: str, unreadable: Unreadable) -> Iterator[str]:
    """Audio files below `top` in no order. Hidden ones are left out, links are followed, though not back up."""
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [(top, frozenset())]
    while waiting:
        folder, above = waiting.pop()
        try:
            status = os.stat(folder)
            identity = status.st_dev, status.st_ino
            if identity in above:
                continue
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir():
                        waiting.append((entry.path, above | {identity}))
                    elif os.path.splitext(entry.name)[1].lower() in SUFFIXES:
                        yield entry.path
        except OSError as exc:
            unreadable(
                folder,
                AudioFileError(
                    f"{describe(folder)}: cannot be listed ({exc.strerror}): get permission, or leave it out"
                ),
            )


def _standard_input(end: bytes) -> Iterator[str]:
    rest = b""
    stdin: Any = sys.stdin.buffer
    while chunk := stdin.read1(_CHUNK):  # what is there: the writer may be slow
        *paths, rest = (rest + chunk).split(end)
        yield from _decoded(paths, end)
    yield from _decoded([rest], end)


def _decoded(paths: Iterable[bytes], end: bytes) -> Iterator[str]:
    for path in paths:
        if path := path.rstrip(b"\r") if end == b"\n" else path:
            yield _checked(os.fsdecode(path), "standard input")


def _manifest(manifest: str, suffix: str, root: str) -> Iterator[str]:
    name = describe(manifest)
    try:
        with open(manifest, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            for line, path in _READERS[suffix](file, name):
                yield os.path.join(root, _checked(path, f"{name}:{line}"))
    except (OSError, csv.Error) as exc:
        raise ManifestError(
            f"{name}: cannot be read ({getattr(exc, 'strerror', None) or exc}): expected a list of files"
        ) from exc


def _lines(file: TextIO, name: str) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.rstrip("\r\n")


def _json_lines(file: TextIO, name: str) -> Iterator[tuple[int, str]]:
    for number, line in _lines(file, name):
        try:
            entry = json.loads(line)
        except ValueError as exc:
            raise ManifestError(f"{name}:{number}: is not JSON ({exc}): expected an object in each line") from exc
        if not isinstance(entry, dict):
            raise ManifestError(f"{name}:{number}: is a {type(entry).__name__}: expected an object in each line")
        path = entry.get(_column(entry, f"{name}:{number}"))
        if not isinstance(path, str):
            raise ManifestError(f"{name}:{number}: the path is {path!r}: expected a string")
        _whole_file(entry, f"{name}:{number}")
        yield number, path


def _table(file: TextIO, name: str, **dialect: object) -> Iterator[tuple[int, str]]:
    rows = csv.reader(file, **dialect)  # type: ignore[arg-type]
    header = [column.strip() for column in next(rows, [])]
    place = header.index(_column(header, f"{name}:1"))
    for row in rows:
        if not row:
            continue
        if len(row) != len(header):
            raise ManifestError(f"{name}:{rows.line_num}: has {len(row)} columns, expected {len(header)} as in line 1")
        _whole_file(dict(zip(header, row, strict=True)), f"{name}:{rows.line_num}")
        yield rows.line_num, row[place]


def _comma_separated(file: TextIO, name: str) -> Iterator[tuple[int, str]]:
    return _table(file, name, strict=True)


def _tab_separated(file: TextIO, name: str) -> Iterator[tuple[int, str]]:
    return _table(file, name, delimiter="\t", quoting=csv.QUOTE_NONE)  # quotes are text there, as in Common Voice


_READERS = {
    ".txt": _lines,
    ".lst": _lines,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".jsonl": _json_lines,
    ".json": _json_lines,  # as NeMo names them
}


def _column(names: Iterable[str], where: str) -> str:
    there = list(names)
    for column in COLUMNS:
        if column in there:
            return column
    raise ManifestError(f"{where}: has {', '.join(there) or 'nothing'}: expected one of {', '.join(COLUMNS)}")


def _whole_file(entry: dict[str, object], where: str) -> None:
    for name in _STARTS:
        if str(entry.get(name) or 0).strip("0. "):
            raise ManifestError(
                f"{where}: {name} is {entry[name]}, a segment of a file: only whole files are embedded, cut them first"
            )


def _checked(path: str, where: str) -> str:
    try:
        if path and b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise ManifestError(f"{where}: {path!r} is no path: expected that of an audio file")
