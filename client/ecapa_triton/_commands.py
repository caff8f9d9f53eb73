"""Shared by the commands: exit statuses, signals, messages, option types."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import NoReturn

from .audio import describe
from .errors import EcapaError, ServerError

DONE, DIFFERENT, FAILED = 0, 1, 2  # exit statuses
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141  # as a shell reports the signals


@contextmanager
def raising_once(number: signal.Signals, usual: object, error: type[BaseException]) -> Iterator[None]:
    """Raise at the first signal and ignore later ones, provided that the signal's handler is the usual one."""

    def first(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        raise error

    usable = threading.current_thread() is threading.main_thread() and signal.getsignal(number) is usual
    before = signal.signal(number, first) if usable else None
    try:
        yield
    finally:
        if usable and signal.getsignal(number) is first:
            signal.signal(number, before)


def complain(message: str) -> None:
    """Print a message on standard error."""
    print(f"ecapa-triton: {message}", file=sys.stderr, flush=True)


def named(path: str, error: EcapaError) -> EcapaError:
    """The error with the name of its clip, which errors of the server lack."""
    return type(error)(f"{describe(path)}: {error}") if isinstance(error, ServerError) else error


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option whose value is a whole number."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")

    return number
