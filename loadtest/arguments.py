"""Types of command-line arguments; argparse turns a ValueError into its message."""

from __future__ import annotations

import math


def positive(text: str) -> float:
    """A finite number above 0."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def share(text: str) -> float:
    """A number of 0 or more and less than 1."""
    if not 0 <= (value := float(text)) < 1:
        raise ValueError
    return value


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if (value := int(text)) < 1:
        raise ValueError
    return value
