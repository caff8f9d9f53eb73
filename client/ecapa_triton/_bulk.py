"""`ecapa-triton embed`: embeddings of many files in one npz or Parquet file.

A run writes its results as parts in `OUT.parts/`. At its end the output is made of what the output held before and of
the parts. A run that was interrupted, even killed, leaves its parts, and the next run resumes from them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from ._async_client import Long
from ._client import SpeakerClient
from ._commands import DONE, FAILED, TERMINATED, at_least, complain, named, raising_once
from ._files import locked_folder
from ._manifest import expand
from ._parts import Parts, Stat, stat_of
from ._scoring import MIN_SPEECH, Utterance
from ._tables import shown
from .audio import counted, describe
from .errors import HOPELESS, AudioFileError, DeadlineError, EcapaError, OutputError

IN_FLIGHT = 16
MOST_UNANSWERED = 32  # requests in a row without a reply, after which the server counts as hung
REFRESH_EVERY, REPORT_EVERY = 0.1, 60.0  # s, between two updates of the progress bar; between two lines elsewhere


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
        help="write OUT, whose name ends in .npz or .parquet; unchanged files in it are not embedded again; needs "
        "ecapa-triton[bulk]",
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
            summary = _write(client, arguments)
    except _Terminated:
        return TERMINATED
    print(json.dumps(summary) if arguments.json else _sentence(summary))
    return FAILED if summary["failed"] else DONE


class _Terminated(KeyboardInterrupt):
    """SIGTERM."""


def _outcomes(
    client: SpeakerClient, paths: Iterable[str], long: Long
) -> Iterator[tuple[str, Stat, Utterance | EcapaError]]:
    """Embed files. Yields each path, what the file was before it was read, and the result.

    Raises:
        EcapaError: The server cannot be reached, or has not answered many requests in a row.
    """
    fed: deque[tuple[str, Stat | None]] = deque()

    def feed() -> Iterator[str]:
        for path in paths:
            fed.append((path, stat_of(path)))
            yield path

    unanswered = 0
    for outcome in client.utterances(feed(), long=long):
        path, before = fed.popleft()
        unanswered = unanswered + 1 if isinstance(outcome, DeadlineError) else 0
        if isinstance(outcome, EcapaError):
            if isinstance(outcome, HOPELESS) or unanswered == MOST_UNANSWERED:
                raise outcome
        elif before is None or stat_of(path) != before:
            outcome = AudioFileError(f"{describe(path)}: changed while it was embedded: run again when it is whole")
        yield path, before or (0, 0), outcome


# --- with an output ---


def _write(client: SpeakerClient, arguments: argparse.Namespace) -> dict[str, Any]:
    """Embed into one file, alone, and keep what was embedded if the run ends early."""
    try:
        import pyarrow.parquet  # noqa: F401
        import rich.progress  # noqa: F401
    except ImportError as exc:  # missing, or built for another NumPy
        raise OutputError(
            f"{describe(arguments.output)}: an output needs packages that cannot be imported ({exc}): "
            "pip install 'ecapa-triton[bulk]'"
        ) from exc
    parts = Parts(arguments.output)
    try:
        parts.folder.mkdir(exist_ok=True)
        with locked_folder(parts.folder, wait=False):
            try:
                return _embed(client, arguments, parts)
            except BaseException as exc:
                left = parts.leave()
                if left and isinstance(exc, KeyboardInterrupt):
                    complain(f"interrupted: {left}")
                if left and isinstance(exc, EcapaError):
                    raise type(exc)(f"{exc}; {left}") from exc
                raise
    except OSError as exc:
        place = describe(exc.filename or arguments.output)
        raise OutputError(f"{place}: cannot be written ({exc.strerror}): make room, or move it away") from exc


def _embed(client: SpeakerClient, arguments: argparse.Namespace, parts: Parts) -> dict[str, Any]:
    """Embed into one file, and resume from earlier runs.

    A file counts as done if it was not written, replaced or moved since it was embedded. A file has one row, however
    often it is named. The rows are in the order of the inputs; rows of earlier runs for other files follow. Files that
    fail are reported on standard error and listed in `OUT.failed.tsv`; the next run tries them again.
    """
    start = time.monotonic()
    with _Failures(arguments.output) as failures:
        parts.load(arguments.replace)
        parts.agree("long", arguments.long)
        given = list(expand(arguments.inputs, failures.add, root=arguments.root, null=arguments.null))
        paths = list(dict.fromkeys(given))
        if not paths and not failures.count:
            raise OutputError(f"{parts.name}: no audio files were given: expected some, or folders with some")
        if not all(map(os.path.isabs, paths)):
            parts.agree("folder", os.getcwd())

        rows: dict[str, int] = {}  # numbers of those that are embedded
        missing: list[str] = []
        for path in paths:
            row, now = parts.earlier.get(shown(path)), stat_of(path)
            if row is not None and now is None:  # its row is kept among those of earlier runs
                failures.add(path, AudioFileError(f"{describe(path)}: is gone: its earlier embedding is kept"))
                continue
            parts.earlier.pop(shown(path), None)
            if row is not None and now == parts.stat(row):
                rows[path] = row
            else:
                missing.append(path)

        new, little, audio = 0, 0, 0.0
        with _progress(parts.name, len(rows) + len(missing), len(rows)) as show:
            for path, stat, outcome in _outcomes(client, missing, arguments.long):
                if isinstance(outcome, EcapaError):
                    failures.add(path, outcome)
                else:
                    rows[path] = parts.add(path, stat, outcome)
                    new += 1
                    little += outcome.speech < MIN_SPEECH
                    audio += outcome.seconds
                show(new, failures.count, audio)
    done = [rows[path] for path in paths if path in rows]
    kept = sorted(parts.earlier.values())
    if done or kept:
        parts.write_output(done + kept)
    parts.remove()
    return {
        "output": os.fspath(arguments.output),
        "files": len(paths),
        "repeated": len(given) - len(paths),  # times that one of them was named again
        "embedded": len(done),  # of them, in the output
        "failed": failures.count,  # files and folders
        "new": new,  # embedded by this run
        "little_speech": little,  # of the new ones, with less speech than `enrol` and `identify` want
        "kept": len(kept),  # rows of earlier runs for files that this run was not given
        "audio": audio,  # s, embedded by this run
        "elapsed": time.monotonic() - start,  # s
    }


def _sentence(summary: dict[str, Any]) -> str:
    output = describe(summary["output"])
    parts = [f"{output}: {summary['embedded']:,} of {counted(summary['files'], 'file')} embedded"]
    if summary["repeated"]:
        parts.append(f"{summary['repeated']:,} named again")
    if summary["failed"]:
        parts.append(f"{summary['failed']:,} failed ({output}.failed.tsv)")
    parts.append(f"{summary['new']:,} new")
    if summary["kept"]:
        parts.append(f"{summary['kept']:,} kept of earlier runs")
    if summary["new"]:
        audio, elapsed = summary["audio"], summary["elapsed"]
        parts.append(f"{audio:,.1f} s of audio in {elapsed:,.1f} s ({audio / elapsed:,.1f} times real time)")
    if summary["little_speech"]:
        parts.append(f"{summary['little_speech']:,} of the new with less than {MIN_SPEECH:g} s of speech")
    return ", ".join(parts)


# --- without an output: a line per file ---


def _print(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    failed, printed = 0, False

    def fail(path: str, error: EcapaError) -> None:
        nonlocal failed
        failed += 1
        complain(str(named(path, error)))

    paths = expand(arguments.inputs, fail, root=arguments.root, null=arguments.null)
    for path, _, outcome in _outcomes(client, paths, arguments.long):
        if isinstance(outcome, EcapaError):
            fail(path, outcome)
        else:
            print(_line(path, outcome, arguments.json), flush=True)
            printed = True
    if not (printed or failed):
        raise OutputError("no audio files were given: expected some, or folders with some")
    return FAILED if failed else DONE


def _line(path: str, one: Utterance, as_json: bool) -> str:
    if as_json:
        embedding = [float(str(x)) for x in one.embedding]
        facts = {"file": path, "seconds": one.seconds, "speech": one.speech, "model": one.model}
        return json.dumps(facts | {"embedding": embedding})
    first = " ".join(f"{x:.3f}" for x in one.embedding[:4])
    norm = float(np.linalg.norm(one.embedding))
    lengths = f"{one.seconds:.2f} s, {one.speech:.2f} s of speech"
    return f"{describe(path)}  {lengths}  {len(one.embedding)} dims  norm {norm:.2f}  [{first} ...]"


# --- failures and progress ---


class _Failures:
    """Reports files that fail and lists them in `OUT.failed.tsv`, which replaces that of an earlier run."""

    def __init__(self, output: Path) -> None:
        self.count = 0
        self._path = output.with_name(output.name + ".failed.tsv")
        self._file: TextIO = open(self._path, "w", encoding="utf-8", errors="backslashreplace")
        self._file.write("path\terror\treason\n")

    def __enter__(self) -> _Failures:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()
        if not self.count:
            self._path.unlink()

    def add(self, path: str, error: EcapaError) -> None:
        """Report and list a file."""
        self.count += 1
        error = named(path, error)
        complain(str(error))
        columns = path, type(error).__name__, str(error).removeprefix(f"{describe(path)}: ")
        escapes = str.maketrans({"\t": r"\t", "\n": r"\n", "\r": r"\r"})
        self._file.write("\t".join(column.translate(escapes) for column in columns) + "\n")
        self._file.flush()


@contextmanager
def _progress(name: str, total: int, done: int) -> Iterator[Callable[[int, int, float], None]]:
    """Yield a function that shows how far a run is: a bar on a terminal, a line a minute elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[words]}")
    terminal = sys.stderr.isatty()
    bar = Progress(*columns, console=Console(file=sys.stderr), transient=True, redirect_stdout=False)
    task = bar.add_task(name, total=total, completed=done, words="")
    start = shown = time.monotonic()

    def show(new: int, failed: int, audio: float) -> None:
        nonlocal shown
        now = time.monotonic()
        if now - shown < (REFRESH_EVERY if terminal else REPORT_EVERY):
            return
        shown, elapsed, finished = now, now - start, min(done + new + failed, total)
        left = timedelta(seconds=round((total - finished) * elapsed / (new + failed)))
        words = (
            f"{finished:,} of {counted(total, 'file')}, {failed:,} failed, {(new + failed) / elapsed:,.1f} files/s, "
            f"{audio / elapsed:,.1f} s of audio a second, {left} left"
        )
        if terminal:
            bar.update(task, completed=finished, words=words)
        else:
            complain(f"{name}: {words}")

    with bar if terminal else nullcontext():
        yield show
