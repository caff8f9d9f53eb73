"""`ecapa-triton embed`: embeddings of many files in one npz or Parquet file.

A run writes its results as parts in `OUT.parts/`. At its end the output is made of what the output held before and of
the parts. A run that was interrupted, even killed, leaves its parts, and the next run resumes from them.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np
from numpy.typing import NDArray

from ._async_client import Long
from ._client import SpeakerClient
from ._commands import DONE, FAILED, TERMINATED, at_least, complain, named, raising_once
from ._files import check_output
from ._manifest import expand
from ._parts import KEY, MISSING, Parts, Stat, key, stat_of
from ._scoring import Utterance
from .audio import describe
from .errors import HOPELESS, AudioFileError, DeadlineError, EcapaError, ModelMismatchError, OutputError

if TYPE_CHECKING:
    import rich.progress

IN_FLIGHT = 16
MOST_UNANSWERED = 32  # requests in a row without a reply, after which the server counts as hung
REFRESH_EVERY, REPORT_EVERY = 0.1, 60.0  # s, between two updates of the progress bar; between two lines elsewhere
GONE = -2  # in place of a row's number: the file is gone, its row of an earlier run is kept


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `run`, except `--long` and `--json`, which other commands have too."""
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="audio files of any rate and channels, folders of them, lists of them (.txt, .lst: a path a line; .csv, "
        ".tsv, .jsonl: column path, file, wav, audio_filepath or filename), - for paths on standard input",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="OUT",
        help="write OUT, Parquet if it ends in .parquet, else npz; unchanged files in it are not embedded again; "
        "needs ecapa-triton[bulk]",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="where relative paths of lists start (default: the list's folder)"
    )
    parser.add_argument("--null", action="store_true", help="paths on standard input end in NUL (find -print0)")
    parser.add_argument("--replace", action="store_true", help="start anew: forget what OUT holds")
    parser.add_argument(
        "--in-flight", type=at_least(1), default=IN_FLIGHT, metavar="N", help="requests in flight (%(default)s)"
    )


def run(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    """Embed the inputs and return the exit status: 0 for all of them, 2 if some or all failed.

    Args:
        client: With `max_in_flight=arguments.in_flight`.
        arguments: Those of `add_arguments`, `long` and `json`.

    Raises:
        EcapaError: Nothing was or could be done.
    """
    if arguments.output is None:
        return _print(client, arguments)
    try:
        with raising_once(signal.SIGTERM, signal.SIG_DFL, _Terminated):
            summary = _embed(client, arguments)
    except _Terminated:
        return TERMINATED
    print(json.dumps(vars(summary)) if arguments.json else summary)
    return FAILED if summary.failed else DONE


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


# --- with an output ---


@dataclass(frozen=True)
class _Summary:
    output: str
    files: int  # given, counted as often as they were named
    embedded: int  # of them, in the output
    failed: int  # files and folders in OUT.failed.tsv
    new: int  # embedded by this run
    kept: int  # rows of earlier runs for files that this run was not given
    audio: float  # s, embedded by this run
    elapsed: float  # s

    def __str__(self) -> str:
        parts = [f"{describe(self.output)}: {self.embedded:,} of {self.files:,} files embedded"]
        if self.failed:
            parts.append(f"{self.failed:,} failed ({describe(self.output)}.failed.tsv)")
        parts.append(f"{self.new:,} new")
        if self.kept:
            parts.append(f"{self.kept:,} kept of earlier runs")
        if self.new:
            speed = self.audio / max(self.elapsed, 1e-9)
            parts.append(f"{self.audio:,.1f} s of audio in {self.elapsed:,.1f} s ({speed:,.1f} times real time)")
        return ", ".join(parts)


def _embed(client: SpeakerClient, arguments: argparse.Namespace) -> _Summary:
    """Embed into one file, and resume from earlier runs.

    A file counts as done if it was not written, replaced or moved since it was embedded. The rows are in the order of
    the inputs, one for each time a file is named; rows of earlier runs for other files follow. Files that fail are
    reported on standard error and listed in `OUT.failed.tsv`; the next run tries them again.
    """
    start = time.monotonic()
    output = os.fspath(arguments.output)
    place = check_output(output)
    _check_pyarrow(describe(output))
    parts = Parts(place, output)
    agreed = False
    try:
        with _Failures(place.with_name(place.name + ".failed.tsv")) as failures:
            parts.load(arguments.replace)
            parts.agree("long", arguments.long)
            agreed = True
            paths = expand(arguments.inputs, failures.add, root=arguments.root, null=arguments.null)
            with tempfile.TemporaryFile("w+", dir=parts.folder) as file:
                wanted = _Wanted(paths, file, parts)
                if not wanted.files and not failures.count:
                    raise OutputError(f"{parts.name}: no audio files were given: expected some, or folders with some")
                wanted.check_earlier(failures)
                new, audio = _embed_missing(client, wanted, parts, failures, arguments.long)
                rows, embedded = wanted.all_rows()
        if len(rows):
            parts.write_output(rows)
        parts.remove()
    except BaseException as exc:
        left = parts.leave()
        if left and agreed and not isinstance(exc, ModelMismatchError):
            left += ", and the same command resumes" + " without --replace" * arguments.replace
        if left and isinstance(exc, KeyboardInterrupt):
            complain(f"interrupted: {left}")
        if isinstance(exc, OSError):
            exc = OutputError(f"{parts.name}: cannot be written ({exc.strerror}): make room, or choose another place")
        if isinstance(exc, EcapaError):
            raise type(exc)(f"{exc}{left and '; '}{left}") from exc
        raise
    elapsed = time.monotonic() - start
    return _Summary(output, wanted.files, embedded, failures.count, new, len(rows) - embedded, audio, elapsed)


class _Wanted:
    """The files that a run is given: their paths in a temporary file, and the row of each path in memory.

    Attributes:
        files: How many were given.
        rows: The row of each path, `MISSING` or `GONE`.
    """

    def __init__(self, paths: Iterable[str], file: TextIO, parts: Parts) -> None:
        self._file, self._parts = file, parts
        keys = bytearray()
        for path in paths:
            file.write(json.dumps(path) + "\n")
            keys += key(os.fsencode(path))
            if not os.path.isabs(path):
                parts.agree("folder", os.getcwd())
        found = np.frombuffer(keys, KEY) if keys else np.empty(0, KEY)
        self._keys, self._first, self._path_of = np.unique(found, return_index=True, return_inverse=True)
        self.files, self.rows = len(found), parts.find(self._keys)

    def paths(self) -> Iterator[tuple[int, str]]:
        """Yield each path once, in order, and its place in `rows`."""
        self._file.seek(0)
        for number, line in enumerate(self._file):
            place = self._path_of[number]
            if self._first[place] == number:
                yield int(place), json.loads(line)

    def check_earlier(self, failures: _Failures) -> None:
        """Set the rows of files that have changed to `MISSING`, those of files that are gone to `GONE`."""
        for place, path in self.paths():
            if self.rows[place] == MISSING:
                continue
            now = stat_of(path)
            if now is None:
                self.rows[place] = GONE
                failures.add(path, AudioFileError(f"{describe(path)}: is gone: its earlier embedding is kept"))
            elif now != self._parts.stat(self.rows[place]):
                self.rows[place] = MISSING

    def all_rows(self) -> tuple[NDArray[np.int64], int]:
        """The rows of the output in order, and how many of them are for the files given."""
        rows = self.rows[self._path_of]
        rows = rows[rows >= 0]
        return np.concatenate([rows, self._parts.others(self._keys[self.rows != GONE])]), len(rows)


def _embed_missing(
    client: SpeakerClient, wanted: _Wanted, parts: Parts, failures: _Failures, long: Long
) -> tuple[int, float]:
    """Embed the files that have no row. Returns their number and the seconds of audio embedded."""
    fed: deque[tuple[int, str, Stat | None]] = deque()

    def feed() -> Iterator[str]:
        for place, path in wanted.paths():
            if wanted.rows[place] == MISSING:
                fed.append((place, path, stat_of(path)))
                yield path

    new, audio, unanswered = 0, 0.0, 0
    done = int(np.count_nonzero(wanted.rows >= 0))
    with _Progress(parts.name, len(wanted.rows), done) as progress:
        failures.report = progress.print
        for outcome in client.utterances(feed(), long=long):
            place, path, before = fed.popleft()
            unanswered = unanswered + 1 if isinstance(outcome, DeadlineError) else 0
            if isinstance(outcome, EcapaError) and (isinstance(outcome, HOPELESS) or unanswered == MOST_UNANSWERED):
                raise outcome
            # A row records the file as it was before it was read. A record that is too old is seen by the next run.
            if isinstance(outcome, Utterance) and (before is None or stat_of(path) != before):
                outcome = AudioFileError(f"{describe(path)}: changed while it was embedded: run again when it is whole")
            if isinstance(outcome, EcapaError):
                failures.add(path, outcome)
            else:
                assert before is not None
                wanted.rows[place] = parts.add(path, before, outcome)
                new += 1
                audio += outcome.seconds
            progress.show(new, failures.count, audio)
    return new, audio


def _check_pyarrow(name: str) -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as exc:  # missing, or built for another NumPy
        raise OutputError(
            f"{name}: pyarrow is needed for an output and cannot be imported ({exc}): pip install 'ecapa-triton[bulk]'"
        ) from exc


# --- without an output: a line per file ---


def _print(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    failed = 0
    fed: deque[str] = deque()

    def fail(path: str, error: EcapaError) -> None:
        nonlocal failed
        failed += 1
        complain(str(named(path, error)))

    def feed() -> Iterator[str]:
        for path in expand(arguments.inputs, fail, root=arguments.root, null=arguments.null):
            fed.append(path)
            yield path

    for outcome in client.utterances(feed(), long=arguments.long):
        path = fed.popleft()
        if isinstance(outcome, Utterance):
            print(_line(path, outcome, arguments.json), flush=True)
        elif isinstance(outcome, HOPELESS):
            raise outcome
        else:
            fail(path, outcome)
    return FAILED if failed else DONE


def _line(path: str, one: Utterance, as_json: bool) -> str:
    if as_json:
        embedding = [float(str(x)) for x in one.embedding]
        return json.dumps({"file": path, "seconds": one.seconds, "model": one.model, "embedding": embedding})
    first = " ".join(f"{x:.3f}" for x in one.embedding[:4])
    norm = float(np.linalg.norm(one.embedding))
    return f"{describe(path)}  {one.seconds:.2f} s  {len(one.embedding)} dims  norm {norm:.2f}  [{first} ...]"


# --- failures and progress ---


class _Failures:
    """Reports files that fail and lists them in a file, which replaces that of an earlier run."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.report: Callable[[str], None] = complain
        self._path = path
        self._file: TextIO | None = None

    def __enter__(self) -> _Failures:
        try:
            self._path.unlink(missing_ok=True)
        except OSError as exc:
            raise OutputError(f"{describe(self._path)}: cannot be replaced ({exc.strerror}): move it away") from exc
        return self

    def __exit__(self, *exc: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, path: str, error: EcapaError) -> None:
        """Report and list a file."""
        self.count += 1
        error = named(path, error)
        self.report(str(error))
        try:
            if self._file is None:
                self._file = open(self._path, "w", encoding="utf-8", errors="surrogateescape")
                self._file.write("path\terror\treason\n")
            columns = path, type(error).__name__, str(error).removeprefix(f"{describe(path)}: ")
            self._file.write("\t".join(re.sub(r"[\t\n\r]", _escape, column) for column in columns) + "\n")
            self._file.flush()
        except OSError as exc:
            raise OutputError(f"{describe(self._path)}: cannot be written ({exc.strerror}): make room") from exc


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


class _Progress:
    """The progress of a run: a bar on a terminal, a line a minute elsewhere or without rich."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done = name, total, done
        self._start = self._shown = time.monotonic()
        self._bar = _rich_bar() if sys.stderr.isatty() else None
        if self._bar is not None:
            self._bar.add_task(name, total=total, completed=done, words="")

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, new: int, failed: int, audio: float) -> None:
        """Show how many files this run has finished, if an update is due."""
        now = time.monotonic()
        if now - self._shown < (REPORT_EVERY if self._bar is None else REFRESH_EVERY):
            return
        self._shown = now
        elapsed = max(now - self._start, 1e-9)
        done = min(self._done + new + failed, self._total)
        left = timedelta(seconds=round((self._total - done) * elapsed / max(new + failed, 1)))
        words = (
            f"{done:,} of {self._total:,} files, {failed:,} failed, {(new + failed) / elapsed:,.1f} files/s, "
            f"{audio / elapsed:,.1f} s of audio a second, {left} left"
        )
        if self._bar is None:
            complain(f"{self._name}: {words}")
        else:
            self._bar.update(self._bar.task_ids[0], completed=done, words=words)

    def print(self, message: str) -> None:
        """Print a line, above the bar if there is one."""
        if self._bar is None:
            complain(message)
        else:
            self._bar.console.print(
                f"ecapa-triton: {message}", markup=False, highlight=False, emoji=False, soft_wrap=True
            )


def _rich_bar() -> rich.progress.Progress | None:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn
    except ImportError:
        return None
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[words]}")
    return Progress(
        *columns, console=Console(file=sys.stderr), transient=True, redirect_stdout=False, redirect_stderr=False
    )
