"""Types of command-line arguments."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def positive(text: str) -> float:
    """A finite number above 0."""
    return _number(text, lambda value: 0 < value < math.inf, "a number above 0")


def not_negative(text: str) -> float:
    """A finite number of 0 or more."""
    return _number(text, lambda value: 0 <= value < math.inf, "0 or more")


def share(text: str) -> float:
    """A number of 0 or more and less than 1."""
    return _number(text, lambda value: 0 <= value < 1, "0 or more and less than 1")


def count(text: str) -> int:
    """A whole number of 1 or more."""
    return int(_number(text, lambda value: value >= 1 and value == int(value), "a whole number of 1 or more"))


def _number(text: str, allowed: Callable[[float], bool], expected: str) -> float:
    try:
        value = float(text)
        if allowed(value):
            return value
    except (ValueError, OverflowError):
        pass
    raise argparse.ArgumentTypeError(f"{text}: expected {expected}")
