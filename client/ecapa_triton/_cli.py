"""The command `ecapa-triton`."""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from http.client import HTTPException
from importlib.metadata import version
from pathlib import Path
from typing import TypeAlias, get_args
from urllib.request import ProxyHandler, build_opener

from . import EcapaError, Gallery, Long, SpeakerClient, Tls, TrustError, _bulk, _evaluate
from ._commands import BROKEN_PIPE, DIFFERENT, DONE, FAILED, INTERRUPTED, at_least, complain, named, raising_once
from ._files import check_output, locked_folder
from ._scoring import MIN_SPEECH, check_threshold
from .audio import counted, describe
from .errors import HOPELESS, ModelMismatchError, ThresholdError
from .protocol import Gpu, read_gpus

Command: TypeAlias = Callable[[SpeakerClient, argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    arguments = _parser().parse_args(argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not fit the terminal's encoding
    # A second Ctrl-C, while the connection closes, would make gRPC wait forever.
    with _quiet_libraries(), raising_once(signal.SIGINT, signal.default_int_handler, KeyboardInterrupt):
        try:
            with _client(arguments) as client:
                status: int = arguments.run(client, arguments)
                print(end="", flush=True)
                return status
        except EcapaError as exc:
            complain(str(exc))
        except KeyboardInterrupt:
            return INTERRUPTED
        except BrokenPipeError:
            _abandon_stdout()
            return BROKEN_PIPE
        except OSError as exc:
            _abandon_stdout()
            complain(f"{exc.strerror or exc}: the output cannot be written, choose another place")
        except Exception:
            traceback.print_exc()  # a bug; Python's own exit status, 1, would mean "different speakers"
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ecapa-triton", description="Speaker embeddings from a Triton server.")
    parser.add_argument("--version", action="version", version=version("ecapa-triton"), help="print it and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Command, help: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        # A run over many clips queues them at the server, and is worth more patience.
        timeout = 10.0 if name in ("verify", "status") else 60.0
        command = commands.add_parser(name, parents=[*parents, _common(timeout)], help=help)
        command.set_defaults(run=run)
        return command

    clips = argparse.ArgumentParser(add_help=False)
    limit = "clips above the model's limit: reject, embed the beginning, or average windows (%(default)s)"
    clips.add_argument("--long", choices=get_args(Long), default="error", help=limit)
    speech = argparse.ArgumentParser(add_help=False)
    least = "least seconds of speech in a clip, 0 for no check (%(default)g)"
    speech.add_argument("--min-speech", type=float, default=MIN_SPEECH, metavar="SECONDS", help=least)
    deciding = argparse.ArgumentParser(add_help=False)
    deciding.add_argument("--threshold", type=float, help="accept cosines above it (default: the model's own)")

    _bulk.add_arguments(add("embed", _bulk.run, "embed audio files, folders, lists", clips))

    verify = add("verify", _verify, "tell whether two files are of one speaker", clips, speech, deciding)
    verify.description = "Exit status: 0 same speaker, 1 different speakers, 2 error."
    verify.add_argument("a", metavar="A")
    verify.add_argument("b", metavar="B")

    enrol = add("enrol", _enrol, "add a voice, or more clips of one, to a gallery", clips, speech)
    enrol.add_argument("gallery", type=Path, metavar="GALLERY", help="an npz file; created if missing")
    enrol.add_argument("name", metavar="NAME")
    enrol.add_argument("files", nargs="+", metavar="FILE", help="clips of this voice")

    identify = add("identify", _identify, "find the voice of each file in a gallery", clips, speech, deciding)
    identify.add_argument("gallery", type=Path, metavar="GALLERY", help="an npz file written by `enrol`")
    identify.add_argument("files", nargs="+", metavar="FILE")
    identify.add_argument("--top", type=at_least(1), default=3, metavar="N", help="candidates to show (%(default)s)")

    _evaluate.add_arguments(add("evaluate", _evaluate.run, "EER and minDCF of a trial list", clips))

    status = add("status", _status, "show the server, the model and its statistics")
    status.add_argument(
        "--metrics", metavar="URL", help="page of Triton's metrics, for the GPUs (default: the url's host, port 8002)"
    )
    return parser


def _common(timeout: float) -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("--url", default="127.0.0.1:8001", help="HOST:PORT of Triton's gRPC endpoint (%(default)s)")
    add("--model", default="ecapa", help="name of the model (%(default)s)")
    add("--timeout", type=float, default=timeout, help="seconds for a request and its retries (%(default)s)")
    text = "most retries after transient failures (default: until the timeout)"
    add("--retries", type=at_least(0), metavar="N", help=text)
    add("--tls", action="store_true", help="encrypt; implied by the options below and by a url grpcs://...")
    add("--tls-ca", metavar="FILE", help="file with the authorities that sign the server's certificate, PEM")
    add("--tls-cert", metavar="FILE", help="file with this client's certificate, PEM; with --tls-key")
    add("--tls-key", metavar="FILE", help="file with its private key, PEM")
    add("--tls-name", metavar="NAME", help="name in the server's certificate, if not the url's host")
    add("--key-file", type=Path, metavar="FILE", help="file with the API key, where the server requires one")
    add("--json", action="store_true", help="print JSON, one object a line")
    return common


def _client(arguments: argparse.Namespace) -> SpeakerClient:
    tls = Tls(arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.tls_name)
    key = None
    if arguments.key_file is not None:
        try:
            key = arguments.key_file.read_text("utf-8-sig").strip()
        except (OSError, ValueError) as exc:
            raise TrustError(f"{arguments.key_file}: {getattr(exc, 'strerror', exc)}: expected a key file") from exc
        if not key:
            raise TrustError(f"{arguments.key_file}: is empty: expected a key file, as the server has it")
    try:
        return SpeakerClient(
            arguments.url,
            arguments.model,
            arguments.timeout,
            retries=arguments.retries,
            max_in_flight=getattr(arguments, "in_flight", 8),
            tls=tls if arguments.tls or tls != Tls() else None,
            api_key=key,
        )
    except ValueError as exc:
        raise EcapaError(str(exc)) from exc


def _verify(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    options = {"long": arguments.long, "min_speech": arguments.min_speech}
    verification = client.verify(arguments.a, arguments.b, arguments.threshold, **options)
    if arguments.json:
        print(json.dumps(asdict(verification)))
    else:
        verdict = "same speaker" if verification.same else "different speakers"
        print(f"{verdict}  score {verification.score:.4f}  threshold {verification.threshold:.4f}")
    return DONE if verification.same else DIFFERENT


def _enrol(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    place = check_output(arguments.gallery, ".npz")
    outcomes = list(client.utterances(arguments.files, long=arguments.long))
    with locked_folder(place.parent):  # one enrolment at a time
        gallery = Gallery.load(arguments.gallery) if arguments.gallery.exists() else Gallery()
        gallery.enrol(arguments.name, outcomes, min_speech=arguments.min_speech)
        gallery.save(arguments.gallery)
    facts = {"name": arguments.name, "clips": gallery.clips(arguments.name), "voices": len(gallery)}
    if arguments.json:
        print(json.dumps(facts))
    else:
        clips, voices = counted(gallery.clips(arguments.name), "clip"), counted(len(gallery), "voice")
        print(f"{describe(arguments.name)}: {clips}; {arguments.gallery}: {voices}")
    return DONE


def _identify(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    gallery = Gallery.load(arguments.gallery)
    check_threshold(arguments.threshold)
    status = DONE
    outcomes = client.utterances(arguments.files, long=arguments.long)
    results = gallery.identify_many(outcomes, arguments.top, arguments.threshold, min_speech=arguments.min_speech)
    for file, found in zip(arguments.files, results, strict=True):
        if isinstance(found, (*HOPELESS, ModelMismatchError, ThresholdError)):
            raise found
        if isinstance(found, EcapaError):
            complain(str(named(file, found)))
            status = FAILED
            continue
        if arguments.json:
            candidates = [candidate._asdict() for candidate in found.candidates]
            print(json.dumps({"file": file, **asdict(found), "candidates": candidates}), flush=True)
        else:
            nearest = ", ".join(f"{describe(name)} {score:.4f}" for name, score in found.candidates)
            print(f"{describe(file)}  {describe(found.name or 'unknown')}  ({nearest})", flush=True)
    return status


def _status(client: SpeakerClient, arguments: argparse.Namespace) -> int:
    status = client.status()
    gpus = _gpus(arguments)
    if arguments.json:
        facts = json.dumps(asdict(status) | {"gpus": [asdict(gpu) for gpu in gpus]})
        print(json.dumps(json.loads(facts, parse_constant=lambda _: None)))  # JSON has no NaN
        return DONE
    info, statistics, served = status.info, status.statistics, status.deployment
    state = "ready" if status.ready else "live, not ready" if status.live else "not live"
    print(f"server      Triton {status.server_version} at {status.url}, {state}")
    print(f"model       {status.model}, version {', '.join(status.model_versions) or 'none'}")
    if served is not None:
        file, precision = served.file or "its default file", f", {served.precision}" if served.precision else ""
        print(f"served      {file} by {served.backend}{precision}; instances: {', '.join(served.instances) or 'none'}")
        print(f"batch       up to {counted(served.max_batch, 'clip')}")
    if info is not None:
        shortest = info.min_samples / 16  # ms at 16 kHz
        print(f"weights     {info.id}")
        print(f"clips       {shortest:g} ms to {info.max_seconds:g} s")
        print(f"threshold   {'none: give one' if info.threshold is None else info.threshold}")
    if statistics is not None:
        print(
            f"requests    {statistics.requests:,} in {counted(statistics.executions, 'execution')}, "
            f"{statistics.failures:,} failed, mean batch {statistics.mean_batch:.2f}"
        )
        print(f"mean time   queue {statistics.queue_ms:.1f} ms, compute {statistics.compute_ms:.1f} ms")
    for gpu in gpus:
        used, total = gpu.memory_used / 1e9, gpu.memory_total / 1e9
        print(f"gpu         {gpu.uuid}: {used:.1f} of {total:.1f} GB in use, {gpu.utilization:.0%} busy")
    return DONE


def metrics_page(url: str) -> str:
    """Where Triton serves its metrics by default, from the url of its gRPC endpoint."""
    return f"http://{re.sub('^.*[:/]/+', '', url).rpartition(':')[0]}:8002/metrics"


def _gpus(arguments: argparse.Namespace) -> list[Gpu]:
    """The GPUs in the metrics. A page given by --metrics must exist, the default one need not."""
    given, timeout = arguments.metrics, arguments.timeout
    try:
        direct = build_opener(ProxyHandler({}))  # without a proxy, like the gRPC connection
        with direct.open(given or metrics_page(arguments.url), timeout=timeout if given else min(timeout, 1)) as reply:
            return read_gpus(reply.read().decode(errors="replace"))
    except (OSError, ValueError, HTTPException) as exc:
        if given is None:
            return []
        raise EcapaError(f"{given}: cannot be read ({exc}): expected such as http://127.0.0.1:8002/metrics") from exc


def _abandon_stdout() -> None:
    """Let Python's own flush at exit succeed; it would fail once more and change the exit status."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep messages of C libraries (gRPC's log, the MP3 decoder's) off the terminal; ours still get there."""
    stderr = sys.stderr
    try:
        descriptor = stderr.fileno()
    except (AttributeError, OSError, ValueError):  # no stream, or not a file
        yield
        return
    stderr.flush()
    terminal = os.dup(descriptor)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)
    sys.stderr = open(terminal, "w", buffering=1, errors="backslashreplace", closefd=False)
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = stderr
        os.dup2(terminal, descriptor)
        os.close(terminal)
