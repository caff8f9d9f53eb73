"""`python -m loadtest model`: speed of the exported model; `python -m loadtest soak`: the server under mixed load."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from export.__main__ import ERRORS as EXPORT_ERRORS
from server.triton import ServerError

from . import model, soak


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        options.run(options)
    except (soak.SoakError, ServerError, OSError, *EXPORT_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    bench = commands.add_parser("model", help="speed of the model in process, on the CPU")
    bench.set_defaults(run=model.run)
    bench.add_argument("--rounds", type=int, default=15, help="interleaved repetitions (default: %(default)s)")
    bench.add_argument("--threads", type=int, default=0, help="of every contender (default: all cores)")

    load = commands.add_parser("soak", help="the server under mixed and hostile load: right embeddings, level memory")
    load.set_defaults(run=soak.run)
    load.add_argument("--minutes", type=_positive, default=10.0, help="of load (default: %(default)g)")
    load.add_argument("--clients", type=_count, default=8, help="that send at once (default: %(default)s)")
    load.add_argument("--hostile", type=_share, default=0.05, help="share of what they do (default: %(default)s)")
    load.add_argument("--device", choices=["auto", "cpu", "gpu"], default="cpu", help="default: %(default)s")
    load.add_argument("--repository", type=Path, metavar="DIR", help="serve what is exported there, not --source")
    load.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over time there, a PNG")

    for command, source in (bench, "random"), (load, "mini"):
        command.add_argument("--source", default=source, help="as for python -m export (default: %(default)s)")
        command.add_argument("--channels", type=int, default=1024, help="of --source random (default: %(default)s)")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


def _positive(text: str) -> float:
    return _between(text, lambda value: 0 < value < math.inf, "a number above 0")


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
