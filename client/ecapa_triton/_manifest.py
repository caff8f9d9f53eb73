"""The files that a bulk run is given: by name, in folders, in lists."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, TextIO

from .audio import describe
from .errors import AudioFileError, ManifestError

# Audio files in folders; a file that is named itself may have any suffix.
SUFFIXES = frozenset(".wav .flac .ogg .opus .mp3 .aiff .aif .au .caf .sph .w64 .rf64".split())
LISTS = ".txt", ".lst", ".csv", ".tsv", ".jsonl", ".json"  # NeMo names JSON lines .json
COLUMNS = "path", "file", "wav", "audio_filepath", "filename"  # the first one present holds the paths
# Of a segment of the file, in manifests of NeMo, SpeechBrain and others. A duration alone is that of the whole file.
SEGMENT = "offset", "start", "stop", "end", "start_time", "end_time"


def expand(
    inputs: Iterable[str],
    unreadable: Callable[[str, AudioFileError], None],
    *,
    root: str | None = None,
    null: bool = False,
) -> Iterator[str]:
    """Yield the paths of all inputs, `normalized`, those of a folder sorted by their bytes.

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
        paths: Iterable[str]
        if given == "-":
            stdin = sys.stdin.buffer
            lines = stdin.read().split(b"\0") if null else (line.rstrip(b"\r\n") for line in stdin)
            paths = (os.fsdecode(line) for line in lines if line)
        elif os.path.isdir(given):
            paths = _folder(given, unreadable, frozenset())
        elif _suffix(given) in LISTS:
            paths = _list(given, os.path.dirname(given) if root is None else root)
        else:
            paths = [given]
        yield from map(normalized, paths)


def normalized(path: str) -> str:
    """The path without `.`, doubled slashes and `..`; as it is where that would name another file, behind a link."""
    short = os.path.normpath(path) if path else path
    if short != path and ".." in path:
        with suppress(OSError, ValueError):
            return short if os.path.samefile(short, path) else path
    return short


def _suffix(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _folder(
    top: str, unreadable: Callable[[str, AudioFileError], None], above: frozenset[tuple[int, int]]
) -> Iterator[str]:
    """Audio files below `top`. Hidden ones are left out; links are followed, except back up."""
    try:
        status = os.stat(top)
        with os.scandir(top) as entries:  # with the slash of a folder, the order is that of the whole paths
            found = sorted((os.fsencode(entry.name) + b"/" * entry.is_dir(), entry.path) for entry in entries)
    except OSError as exc:
        reason = f"cannot be listed ({exc.strerror}): get permission, or leave it out"
        return unreadable(top, AudioFileError(f"{describe(top)}: {reason}"))
    identity = status.st_dev, status.st_ino
    if identity in above:
        return
    for name, path in found:
        if name.startswith(b"."):
            continue
        if name.endswith(b"/"):
            yield from _folder(path, unreadable, above | {identity})
        elif _suffix(path) in SUFFIXES:
            yield path


def _list(path: str, root: str) -> Iterator[str]:
    name = describe(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            if _suffix(path) in (".txt", ".lst"):
                yield from (os.path.join(root, line) for _, line in _lines(file))
                return
            for number, entry in _entries(file, name, _suffix(path)):
                yield os.path.join(root, _path(entry, f"{name}:{number}"))
    except (OSError, csv.Error) as exc:
        reason = getattr(exc, "strerror", None) or exc
        raise ManifestError(f"{name}: cannot be read ({reason}): expected a list of files") from exc


def _lines(file: TextIO) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if line.strip() and not line.startswith("#"):
            yield number, line.rstrip("\r\n")


def _entries(file: TextIO, name: str, suffix: str) -> Iterator[tuple[int, dict[Any, Any]]]:
    """The rows of a table, or the objects of JSON lines, with their lines' numbers."""
    if suffix in (".csv", ".tsv"):
        if suffix == ".csv":
            rows = csv.DictReader(file, strict=True, skipinitialspace=True)
        else:  # quotes are text, as in Common Voice
            rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for row in rows:
            if None in row or None in row.values():
                raise ManifestError(f"{name}:{rows.line_num}: expected {len(rows.fieldnames or ())} columns, as above")
            yield rows.line_num, row
        return
    for number, line in _lines(file):
        try:
            entry = json.loads(line)
        except ValueError as exc:
            raise ManifestError(f"{name}:{number}: is not JSON ({exc}): expected an object in each line") from exc
        if not isinstance(entry, dict):
            raise ManifestError(f"{name}:{number}: is a {type(entry).__name__}: expected an object in each line")
        yield number, entry


def _path(entry: dict[Any, Any], where: str) -> str:
    column = next((column for column in COLUMNS if column in entry), None)
    if column is None:
        raise ManifestError(f"{where}: has {', '.join(entry)}: expected one of {', '.join(COLUMNS)}")
    for name in SEGMENT:
        if entry.get(name) not in (None, ""):  # 0 too: with a duration it is the beginning of the file
            raise ManifestError(
                f"{where}: {name} is {entry[name]}: expected whole files, segments are not supported: cut them out, or "
                "remove the column where it stands for whole files"
            )
    path = entry[column]
    if not path or not isinstance(path, str):
        raise ManifestError(f"{where}: the {column} is {path!r}: expected the path of an audio file")
    return path
