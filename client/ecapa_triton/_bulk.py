"""Embeddings of many files, in one npz or Parquet file: `ecapa-triton embed`.

What a run has done is in `OUT.partial` until the output is written, so that a run that ends early, however, is gone on
with by the next. That one file, an SQLite database, also keeps memory independent of the number of files.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sqlite3
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from ._base import Long, check_many
from ._client import SpeakerClient
from ._commands import DONE, FAILED, INTERRUPTED, TERMINATED, at_least, complain, named, raising_once
from ._files import check_output, replacing
from ._manifest import by_bytes, expand
from ._scoring import Utterance
from ._tables import check_pyarrow, read_npz, read_parquet, write_npz, write_parquet
from ._workfile import Stat, WorkFile, stat_of, unusable
from .audio import describe
from .errors import HOPELESS, AudioFileError, DeadlineError, EcapaError, ModelMismatchError, OutputError

if TYPE_CHECKING:
    import rich.progress

IN_FLIGHT = 16
MOST_UNANSWERED = 32  # requests in a row that end at their timeout, before the server counts as hung
REFRESH_EVERY, REPORT_EVERY = 0.1, 60.0  # s, between two signs of progress on a terminal, and elsewhere


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what `run` takes; `--long` and `--json` are the caller's."""
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
        help="write OUT, Parquet if it ends in .parquet, else npz; what is in it already is not embedded again",
    )
    parser.add_argument(
        "--root", metavar="DIR", help="where relative paths of lists start (default: the list's folder)"
    )
    parser.add_argument("--null", action="store_true", help="paths on standard input end in NUL (find -print0)")
    parser.add_argument("--replace", action="store_true", help="start anew: forget what OUT holds")
    parser.add_argument(
        "--in-flight",
        type=at_least(1),
        default=IN_FLIGHT,
        metavar="N",
        help="requests under way at a time (%(default)s)",
    )


def run(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    """Embed the inputs and return the exit status: 0 all of them, 2 some or none.

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
            summary = embed_files(
                client,
                arguments.inputs,
                arguments.output,
                long=arguments.long,
                root=arguments.root,
                null=arguments.null,
                replace=arguments.replace,
            )
    except _Interrupted as exc:
        if str(exc):
            complain(f"interrupted: {exc}")
        return TERMINATED if isinstance(exc.__cause__, _Terminated) else INTERRUPTED
    print(summary.as_json() if arguments.json else summary)
    return FAILED if summary.failed else DONE


@dataclass(frozen=True)
class Summary:
    """What a run did.

    Attributes:
        output: The file that holds the embeddings.
        files: Asked for, counted as often as they were named.
        embedded: Those of them that the output holds.
        failed: Files and folders that are in `OUT.failed.tsv`.
        new: Files embedded by this run.
        kept: Rows of earlier runs that were not asked for.
        audio: Seconds of audio embedded by this run.
        elapsed: Seconds that the run took.
    """

    output: str
    files: int
    embedded: int
    failed: int
    new: int
    kept: int
    audio: float
    elapsed: float

    def as_json(self) -> str:
        """One line."""
        return json.dumps(vars(self))

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


def embed_files(
    client: SpeakerClient,
    inputs: Iterable[str],
    output: str | os.PathLike[str],
    *,
    long: Long = "error",
    root: str | None = None,
    null: bool = False,
    replace: bool = False,
) -> Summary:
    """Embed files into one npz or Parquet file, and go on with what an earlier run has done.

    A file of this name counts as done if it was not written, replaced or moved since it was embedded. The rows are in
    the order of the inputs, one each time a file is named, then come those of earlier runs that were not asked for.
    Files that fail are told on standard error and listed in `OUT.failed.tsv`; the next run tries them again.

    The arrays of an npz, and the columns of a Parquet file (singular: `path`, `embedding`, `size`):
        `files` str `[n]`; `seconds` float32 `[n]`, of audio; `embeddings` float32 `[n, 192]`, not of unit length;
        `sizes` int64 `[n]`, bytes; `stamps` int64 `[n]`, by which a change is seen; `model` str, as `Utterance.model`;
        `long` str, as below, and `folder` str, that relative paths start from (Parquet: in the schema's metadata).

    Args:
        client: Has `max_in_flight` files under way.
        inputs: As `expand` of `_manifest.py` takes them.
        output: Parquet if it ends in `.parquet`, else npz.
        long: What to do with clips above the model's limit, as for `SpeakerClient.embed`.
        root: What relative paths of manifests are relative to; None: the manifest's own folder.
        null: Paths on standard input end in NUL.
        replace: Forget what the output, and a run that ended early, hold.

    Raises:
        OutputError: The output cannot be written or added to; it holds embeddings of another model, or long clips
            embedded in another way; another run is at work on it.
        ManifestError: A list of files is wrong.
        ServerError: The server is away, or lacks the model. What is done is kept.
    """
    check_many(inputs, long)
    start = time.monotonic()
    place = check_output(output)
    parquet = place.suffix.lower() == ".parquet"
    if parquet:
        check_pyarrow(describe(output))
    work = WorkFile(place, os.fspath(output))
    try:
        failures = _Failures(place.with_name(place.name + ".failed.tsv"))
    except OSError as exc:
        work.leave()
        raise OutputError(f"{describe(output)}.failed.tsv: cannot be replaced ({exc.strerror}): put it away") from exc
    agreed = False
    try:
        if replace:
            work.forget()
        elif earlier := work.earlier_output():
            work.take_over(read_parquet(place) if parquet else read_npz(place), earlier)
        work.agree_on_long(long)
        agreed = True
        work.want(expand(inputs, root=root, null=null, in_order=work.in_order, unreadable=failures.add))
        if not work.count("wanted") and not failures.count:
            raise OutputError(f"{describe(output)}: no audio files were given: expected some, or folders with some")
        for path, error in work.drop_changed():
            failures.add(path, error)
        new, audio = _embed_missing(client, work, failures, long)
        embedded, kept = work.arrange()
        if embedded + kept:
            with replacing(place) as file:
                (write_parquet if parquet else write_npz)(file, work)
        files = work.count("wanted")
        work.remove()
    except BaseException as exc:
        left = work.leave()
        if left and agreed and not isinstance(exc, ModelMismatchError):
            left += ", and the same command goes on" + " without --replace" * replace
        if isinstance(exc, KeyboardInterrupt):
            raise _Interrupted(left) from exc
        if isinstance(exc, sqlite3.Error):
            raise unusable(work.path, exc, left) from exc
        if isinstance(exc, EcapaError) and left:
            raise type(exc)(f"{exc}; {left}") from exc
        raise
    finally:
        failures.close()
    elapsed = time.monotonic() - start
    return Summary(os.fspath(output), files, embedded, failures.count, new, kept, audio, elapsed)


def _embed_missing(client: SpeakerClient, work: WorkFile, failures: _Failures, long: Long) -> tuple[int, float]:
    """Embed what is wanted and not there. Returns how many files, and how many seconds of audio."""
    fed: deque[tuple[int, str, Stat | None]] = deque()

    def feed() -> Iterator[str]:
        for number, path in work.missing():
            fed.append((number, path, stat_of(path)))
            yield path

    new, audio, unanswered = 0, 0.0, 0
    with _Progress(work.name, *work.progress()) as progress, work.committing():
        failures.tell = progress.tell
        for outcome in client.utterances(feed(), long=long):
            number, path, before = fed.popleft()
            unanswered = unanswered + 1 if isinstance(outcome, DeadlineError) else 0
            if isinstance(outcome, EcapaError) and (isinstance(outcome, HOPELESS) or unanswered == MOST_UNANSWERED):
                raise outcome
            # What is recorded is how the file was before it was read: it can be older than what was embedded, which
            # the next run sees, never newer.
            if isinstance(outcome, Utterance) and (before is None or stat_of(path) != before):
                outcome = AudioFileError(f"{describe(path)}: changed while it was embedded: run again once it rests")
            if isinstance(outcome, EcapaError):
                failures.add(path, outcome)
            else:
                assert before is not None
                work.add(number, before, outcome)
                new += 1
                audio += outcome.seconds
            progress.show(new, failures.count, audio)
    return new, audio


# --- without an output: a line per file ---


def _print(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    failed = 0
    fed: deque[str] = deque()

    def unreadable(path: str, error: EcapaError) -> None:
        nonlocal failed
        failed += 1
        complain(str(error))

    def feed() -> Iterator[str]:
        paths = expand(
            arguments.inputs, root=arguments.root, null=arguments.null, in_order=by_bytes, unreadable=unreadable
        )
        for path in paths:
            fed.append(path)
            yield path

    for outcome in client.utterances(feed(), long=arguments.long):
        path = fed.popleft()
        if isinstance(outcome, Utterance):
            print(_line(path, outcome, arguments.json), flush=True)
            continue
        if isinstance(outcome, HOPELESS):
            raise outcome
        unreadable(path, named(path, outcome))
    return FAILED if failed else DONE


def _line(path: str, one: Utterance, as_json: bool) -> str:
    if as_json:
        embedding = [float(str(x)) for x in one.embedding]
        return json.dumps({"file": path, "seconds": one.seconds, "model": one.model, "embedding": embedding})
    first = " ".join(f"{x:.3f}" for x in one.embedding[:4])
    norm = float(np.linalg.norm(one.embedding))
    return f"{describe(path)}  {one.seconds:.2f} s  {len(one.embedding)} dims  norm {norm:.2f}  [{first} ...]"


# --- what the user sees ---


class _Failures:
    """Tells of files that fail and lists them; the list of an earlier run is removed."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self.tell: Callable[[str], None] = complain
        self._path = path
        self._file: TextIO | None = None
        path.unlink(missing_ok=True)

    def add(self, path: str, error: EcapaError) -> None:
        """Tell of one."""
        self.count += 1
        error = named(path, error)
        self.tell(str(error))
        try:
            if self._file is None:
                self._file = open(self._path, "w", encoding="utf-8", errors="surrogateescape")
                self._file.write("path\terror\treason\n")
            columns = path, type(error).__name__, str(error).removeprefix(f"{describe(path)}: ")
            self._file.write("\t".join(re.sub(r"[\t\n\r]", _escape, column) for column in columns) + "\n")
            self._file.flush()
        except OSError as exc:
            raise OutputError(f"{describe(self._path)}: cannot be written ({exc.strerror}): make room") from exc

    def close(self) -> None:
        """Close the list."""
        if self._file is not None:
            self._file.close()


def _escape(found: re.Match[str]) -> str:
    return repr(found[0])[1:-1]


class _Progress:
    """How far a run is: on a terminal a bar, without rich a line that counts; elsewhere a line a minute."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done = name, total, done
        self._start = self._shown = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._bar = _rich_bar() if self._terminal else None
        self._task = None if self._bar is None else self._bar.add_task(name, total=total, completed=done, words="")
        self._width = 0  # of the line that counts

    def __enter__(self) -> _Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._clear()

    def show(self, new: int, failed: int, audio: float) -> None:
        """Show it, if it is time."""
        now = time.monotonic()
        if now - self._shown < (REFRESH_EVERY if self._terminal else REPORT_EVERY):
            return
        self._shown = now
        elapsed = max(now - self._start, 1e-9)
        done = min(self._done + new + failed, self._total)
        left = timedelta(seconds=round((self._total - done) * elapsed / max(new + failed, 1)))
        words = (
            f"{done:,} of {self._total:,} files, {failed:,} failed, {(new + failed) / elapsed:,.1f} files/s, "
            f"{audio / elapsed:,.1f} s of audio a second, {left} left"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, words=words)
        elif self._terminal:
            line = f"{self._name}: {words}"
            print(f"\r{line:{self._width}}", end="", file=sys.stderr, flush=True)
            self._width = len(line)
        else:
            complain(f"{self._name}: {words}")

    def tell(self, message: str) -> None:
        """Print a line above."""
        self._clear()
        if self._bar is not None:
            self._bar.console.print(
                f"ecapa-triton: {message}", markup=False, highlight=False, emoji=False, soft_wrap=True
            )
        else:
            complain(message)

    def _clear(self) -> None:
        if self._width:
            print(f"\r{'':{self._width}}\r", end="", file=sys.stderr, flush=True)
            self._width = 0


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


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


class _Interrupted(KeyboardInterrupt):
    """A run was interrupted; the message says what is kept."""
