"""Measurements: servers under load, the model in process, memory under mixed load, everything on a GPU host."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from . import bench
from .scenarios import SCENARIOS


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    options.words = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        name = {"report": "load_report"}.get(options.command, options.command)
        importlib.import_module(f"loadtest.{name}").run(options)
    except _errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _errors() -> tuple[type[Exception], ...]:
    """What the measurements raise, as far as it can be imported: a GPU host may have little more than torch."""
    names = {
        "export.__main__": "ERRORS",
        "server.gateway": "GatewayError",
        "server.triton": "ServerError",
        "loadtest.clips": "ClipsError",
        "loadtest.machine": "MeasureError",
        "loadtest.load": "LoadError",
        "loadtest.load_report": "ReportError",
        "loadtest.target": "TargetError",
    }
    errors: list[type[Exception]] = [OSError]
    for module, name in names.items():
        try:
            found = getattr(importlib.import_module(module), name)
        except ImportError:
            continue
        errors += found if isinstance(found, tuple) else [found]
    return tuple(errors)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    _add_run(commands.add_parser("run", help="servers under load, with Locust: ours, SpeechBrain's, on CPU and GPU"))

    report = commands.add_parser("report", help="the page of one run or of several, from their JSON")
    report.add_argument("results", type=Path, nargs="+", metavar="RESULT.json", help="written by run")
    report.add_argument("--out", type=Path, metavar="FOLDER", help="default: that of the first result")

    payload = commands.add_parser("payload", help="the same requests for NVIDIA's perf_analyzer, and its command lines")
    payload.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the files")

    capacity = commands.add_parser("capacity", help="how many replicas a number of clips a day needs")
    capacity.add_argument("result", type=Path, metavar="RESULT.json", help="of run, with the scenario mixed")
    capacity.add_argument("--clips-per-day", type=_sane, required=True, metavar="N")
    capacity.add_argument(
        "--mean-seconds", type=_sane, default=5.0, metavar="S", help="of a clip (default: %(default)g)"
    )
    capacity.add_argument(
        "--peak-factor", type=_peak, default=3.0, metavar="P", help="of the peak over the mean (default: %(default)g)"
    )
    capacity.add_argument(
        "--utilization", type=_utilization, default=0.65, metavar="U", help="at the peak (default: %(default)g)"
    )

    _add_client(commands.add_parser("client", help="the bulk command beside a load generator, and ways to Triton"))

    bench.add_arguments(
        commands.add_parser("bench", help="the model in process: agreement, speed, memory, kernels; CPU and GPU")
    )

    with contextlib.suppress(ModuleNotFoundError):  # not installed on a GPU host
        soak = importlib.import_module("loadtest.soak")
        soak.add_arguments(commands.add_parser("soak", help="the server under mixed and hostile load, its memory"))
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument(
        "--local", action="append", choices=["cpu", "gpu"], default=[], help="start a server here, with the baselines"
    )
    run.add_argument(
        "--target", action="append", type=_pair, default=[], metavar="NAME=URL", help="a server: cpu=grpc://HOST:8001"
    )
    run.add_argument(
        "--metrics",
        action="append",
        type=_pair,
        default=[],
        metavar="NAME=URL",
        help="default: http://HOST:8002/metrics",
    )
    run.add_argument(
        "--scenario", type=_scenarios, default=list(SCENARIOS), metavar="NAMES", help=f"of {','.join(SCENARIOS)} (all)"
    )
    run.add_argument(
        "--model", help="of ours (default: ecapa; ecapa_torchscript on a GPU that ONNX Runtime cannot use)"
    )
    run.add_argument("--source", default="random", help="of --local, as for python -m export (default: %(default)s)")
    run.add_argument("--channels", type=int, default=1024, help="of --source random (default: %(default)s)")
    run.add_argument(
        "--repository", type=Path, metavar="DIR", help="--local serves what is exported there, not --source"
    )
    run.add_argument(
        "--precision", choices=["fp32", "fp16"], default="fp32", help="of --local gpu (default: %(default)s)"
    )
    run.add_argument("--no-baselines", dest="baselines", action="store_false", help="ours alone")
    run.add_argument(
        "--seconds", type=_positive, default=3.0, help="of each level, arrivals and ramp longer (default: %(default)g)"
    )
    run.add_argument(
        "--warm-up", type=_seconds, default=0.4, help="seconds whose latencies do not count (default: %(default)g)"
    )
    run.add_argument(
        "--rounds",
        type=_count,
        default=1,
        help="of each level, those of the goals three at least (default: %(default)s)",
    )
    run.add_argument(
        "--max-clients", type=_count, default=200, help="leave out levels with more (default: %(default)s)"
    )
    run.add_argument("--capacity", type=_positive, help="clips/s that arrivals are shares of (default: as in mixed)")
    run.add_argument("--processes", type=_count, default=1, help="of Locust (default: %(default)s)")
    run.add_argument(
        "--out", type=Path, default=Path("loadtest/results"), metavar="FOLDER", help="default: %(default)s"
    )
    run.add_argument("--name", type=_name, help="of the files (default: date and targets)")


def _add_client(client: argparse.ArgumentParser) -> None:
    where = client.add_mutually_exclusive_group()
    where.add_argument("--local", nargs=1, choices=["cpu"], default=["cpu"], help="start a server here (default)")
    where.add_argument("--target", metavar="URL", help="a server, grpc://HOST:8001, for the bulk command alone")
    client.add_argument("--model", help="of ours (default: ecapa)")
    client.add_argument("--source", default="mini", help="of --local, as for python -m export (default: %(default)s)")
    client.add_argument("--channels", type=int, default=1024, help="of --source random (default: %(default)s)")
    client.add_argument(
        "--repository", type=Path, metavar="DIR", help="--local serves what is exported there, not --source"
    )
    client.add_argument("--audio", type=Path, metavar="FOLDER", help="of audio files (default: samples/)")
    client.add_argument(
        "--clips", type=_count, help="of the bulk command, files over and over (default: 500; 120 of a large model)"
    )
    client.add_argument(
        "--in-flight", type=_count, default=16, metavar="N", help="requests under way (default: %(default)s)"
    )
    client.add_argument("--rounds", type=_count, default=5, help="in which all take turns (default: %(default)s)")
    client.add_argument(
        "--seconds", type=_positive, default=2.5, help="of each way to the model in a round (default: %(default)g)"
    )
    client.add_argument(
        "--out", type=Path, default=Path("loadtest/results"), metavar="FOLDER", help="default: %(default)s"
    )
    client.set_defaults(baselines=False, precision="fp32")


def _pair(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not value:
        raise argparse.ArgumentTypeError(f"{text}: expected NAME=URL, such as cpu=grpc://127.0.0.1:8001")
    return name, value


def _name(text: str) -> str:
    if not re.fullmatch(r"\w[\w. -]*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: expected letters, digits, '.', '-' and '_'")
    return text


def _scenarios(text: str) -> list[str]:
    names = list(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in SCENARIOS:
            raise argparse.ArgumentTypeError(f"{name!r}: expected {', '.join(SCENARIOS)}, with commas between")
    return names


def _seconds(text: str) -> float:
    return _between(text, lambda value: 0 <= value < math.inf, "0 or more")


def _positive(text: str) -> float:
    return _between(text, lambda value: 0 < value < math.inf, "a number above 0")


def _sane(text: str) -> float:
    return _between(text, lambda value: 0 < value <= 1e15, "a number above 0 and up to 1e15")


def _peak(text: str) -> float:
    return _between(text, lambda value: 1 <= value <= 1e6, "a number of 1 or more")


def _utilization(text: str) -> float:
    return _between(text, lambda value: 0 < value <= 1, "more than 0 and at most 1")


def _share(text: str) -> float:
    return _between(text, lambda value: 0 <= value < 1, "0 or more and less than 1")


def _count(text: str) -> int:
    return int(_between(text, lambda value: value >= 1 and value == int(value), "a whole number of 1 or more"))


def _between(text: str, allowed: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
        if allowed(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected {expected}")


if __name__ == "__main__":
    sys.exit(main())
