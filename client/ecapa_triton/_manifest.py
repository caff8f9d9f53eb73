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

# Audio files in folders; a file that is named itself may have any suffix.
SUFFIXES = frozenset(".wav .flac .ogg .opus .mp3 .aiff .aif .au .caf .sph .w64 .rf64".split())
COLUMNS = "path", "file", "wav", "audio_filepath", "filename"  # the first one present holds the paths
_STARTS = "offset", "start"  # of a segment, in manifests of NeMo and SpeechBrain
_CHUNK = 1 << 16  # bytes of standard input read at a time


def expand(
    inputs: Iterable[str],
    unreadable: Callable[[str, AudioFileError], None],
    *,
    root: str | None = None,
    null: bool = False,
) -> Iterator[str]:
    """Yield the paths of all inputs, those of a folder sorted by their bytes.

    Args:
        inputs: Folders, audio files, lists (`.txt`, `.lst`, `.csv`, `.tsv`, `.jsonl`, `.json`), `-` for paths on
            standard input.
        unreadable: Called for each folder that cannot be listed.
        root: Where relative paths of lists start; None: in the list's own folder.
        null: Paths on standard input end in NUL, not in a line break.

    Raises:
        ManifestError: Names the list and its line.
    """
    for given in inputs:
        suffix = os.path.splitext(given)[1].lower()
        if given == "-":
            yield from _standard_input(b"\0" if null else b"\n")
        elif os.path.isdir(given):
            yield from _folder(given, unreadable)
        elif suffix in _READERS:
            yield from _manifest(given, suffix, os.path.dirname(given) if root is None else root)
        else:
            yield given


def _folder(top: str, unreadable: Callable[[str, AudioFileError], None]) -> Iterator[str]:
    """Audio files below `top`. Hidden ones are left out; links are followed, except back up."""
    waiting: list[tuple[str, bool, frozenset[tuple[int, int]]]] = [(top, True, frozenset())]
    while waiting:
        path, is_folder, above = waiting.pop()
        if not is_folder:
            yield path
            continue
        try:
            status = os.stat(path)
            identity = status.st_dev, status.st_ino
            if identity in above:
                continue
            with os.scandir(path) as entries:
                found = [
                    (entry.path, is_folder, above | {identity} if is_folder else above)
                    for entry in entries
                    if not entry.name.startswith(".")
                    and ((is_folder := entry.is_dir()) or os.path.splitext(entry.name)[1].lower() in SUFFIXES)
                ]
        except OSError as exc:
            reason = f"cannot be listed ({exc.strerror}): get permission, or leave it out"
            unreadable(path, AudioFileError(f"{describe(path)}: {reason}"))
        else:  # with the slash of a folder, siblings are in the order of the whole paths below them
            waiting += sorted(found, key=lambda one: os.fsencode(one[0]) + b"/" * one[1], reverse=True)


def _standard_input(end: bytes) -> Iterator[str]:
    rest = b""
    stdin: Any = sys.stdin.buffer
    while chunk := stdin.read1(_CHUNK):  # as much as there is: the writer may be slow
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
    return _table(file, name, delimiter="\t", quoting=csv.QUOTE_NONE)  # quotes are text, as in Common Voice


_READERS = {
    ".txt": _lines,
    ".lst": _lines,
    ".csv": _comma_separated,
    ".tsv": _tab_separated,
    ".jsonl": _json_lines,
    ".json": _json_lines,  # as NeMo names them
}


def _column(names: Iterable[str], where: str) -> str:
    found = list(names)
    for column in COLUMNS:
        if column in found:
            return column
    raise ManifestError(f"{where}: has {', '.join(found) or 'no columns'}: expected one of {', '.join(COLUMNS)}")


def _whole_file(entry: dict[str, object], where: str) -> None:
    for name in _STARTS:
        if str(entry.get(name) or 0).strip("0. "):
            raise ManifestError(
                f"{where}: {name} is {entry[name]}, a segment of a file: expected whole files, cut it out first"
            )


def _checked(path: str, where: str) -> str:
    try:
        if path and b"\0" not in os.fsencode(path):
            return path
    except UnicodeEncodeError:
        pass
    raise ManifestError(f"{where}: {path!r} is not a path: expected the path of an audio file")
