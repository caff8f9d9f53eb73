"""Measurements: servers under load, the model in process, memory under mixed load."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import signal
import sys

from .machine import MeasureError

COMMANDS = {  # to the module with its `add_arguments` and `run`, and its help
    "run": ("run", "servers under load, with Locust: our model and SpeechBrain, on CPU and GPU"),
    "report": ("figures", "the page of one or several runs, from their JSON"),
    "bench": ("bench", "the model in process, on CPU or GPU: agreement, speed, memory"),
    "soak": ("soak", "a server under mixed and hostile load: every reply compared, memory over time"),
    "payload": ("payload", "the same requests for NVIDIA's perf_analyzer, and its command lines"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m loadtest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name in words[:1]:  # the modules of the others may need packages that are not installed
            importlib.import_module(f"loadtest.{module}").add_arguments(command)
    options = parser.parse_args(words)
    options.words = words
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        importlib.import_module(f"loadtest.{COMMANDS[options.command][0]}").run(options)
    except _errors() as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def _errors() -> tuple[type[Exception], ...]:
    """Errors whose message is for the user, of the packages that are installed."""
    errors: list[type[Exception]] = [MeasureError, OSError, ModuleNotFoundError]
    with contextlib.suppress(ImportError):
        errors += importlib.import_module("export.pipeline").ERRORS
    with contextlib.suppress(ImportError):
        errors.append(importlib.import_module("server").ServerError)
    return tuple(errors)


if __name__ == "__main__":
    sys.exit(main())
