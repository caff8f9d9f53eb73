"""What the commands have in common."""

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

DONE, FAILED = 0, 2  # exit statuses; 1 is a command's own: different speakers, another result than SpeechBrain's
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141  # as a shell reports the signals


@contextmanager
def raising_once(number: signal.Signals, usual: object, error: type[BaseException]) -> Iterator[None]:
    """The first signal of this kind raises, those after it are ignored; only where its handler is the usual one."""

    def first(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(number, signal.SIG_IGN)
        raise error

    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(number) is not usual:
        yield
        return
    before = signal.signal(number, first)
    try:
        yield
    finally:
        if signal.getsignal(number) is first:
            signal.signal(number, before)


def complain(message: str) -> None:
    """Tell the user of something on standard error."""
    print(f"ecapa-triton: {message}", file=sys.stderr, flush=True)


def named(path: str, error: EcapaError) -> EcapaError:
    """The error with its clip's name; the server's errors lack it."""
    return type(error)(f"{describe(path)}: {error}") if isinstance(error, ServerError) else error


def at_least(least: int) -> Callable[[str], int]:
    """What makes an option's value a whole number."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, {least} or more")

    return number
