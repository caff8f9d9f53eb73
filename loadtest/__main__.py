"""`python -m loadtest model`: the exported model against SpeechBrain and the machine's matrix products."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from export.__main__ import ERRORS as EXPORT_ERRORS
from server.triton import ServerError

from . import memory, model


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (ServerError, OSError, *EXPORT_ERRORS) as error:
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

    resident = commands.add_parser("memory", help="resident memory of the whole server under mixed clips")
    resident.set_defaults(run=memory.run)
    resident.add_argument("--seconds", type=float, default=60.0, help="of load (default: %(default)s)")
    resident.add_argument("--clients", type=int, default=8, help="clips in flight (default: %(default)s)")

    for command in (bench, resident):
        command.add_argument("--source", default="random", help="as for python -m export (default: %(default)s)")
        command.add_argument("--channels", type=int, default=1024, help="of --source random (default: %(default)s)")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    return parser


if __name__ == "__main__":
    sys.exit(main())
