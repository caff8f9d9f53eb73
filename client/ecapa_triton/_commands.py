"""What the commands have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import suppress

from ._audio import describe
from ._errors import EcapaError, ServerError

DONE, FAILED = 0, 2  # exit statuses; 1 is a command's own: different speakers, another result than SpeechBrain's
INTERRUPTED, TERMINATED, BROKEN_PIPE = 130, 143, 141  # as a shell reports the signals


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
