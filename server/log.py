"""Triton's log: opened for its process, and searched for the reason of a failure."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import IO

STDOUT = Path("/dev/stdout")


def open_log(path: Path) -> IO[bytes]:
    """Opens a log for appending; STDOUT is this process's standard output.

    Raises:
        OSError: It cannot be written.
    """
    if path == STDOUT:  # not opened by name: in a container it may belong to another user
        return open(os.dup(1), "ab")
    # With O_NONBLOCK a pipe without a reader is an error; else the open would hang.
    log = open(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644), "ab")
    os.set_blocking(log.fileno(), True)
    return log


def failure_reason(path: Path, start: int | None) -> str:
    """Finds the line of the log that says why the server did not start.

    Args:
        path: The log.
        start: Offset of the server's first line, in bytes; None: the log cannot be read back.

    Returns:
        The reason, empty where there is none.
    """
    if start is None:
        return ""
    with path.open("rb") as log:
        log.seek(start)
        text = log.read().decode(errors="replace")
    text = "\n".join(line for line in text.split("\n") if "CudaDriverHelper" not in line)  # printed on every CPU
    for pattern in (
        r"failed to load '(?P<model>[^']+)' version \d+: (?P<reason>.*)",
        r"Poll failed for model directory '(?P<model>[^']+)': (?P<reason>.*)",
        r"(?P<reason>(?:unrecognized|ambiguous) option.*|option .* requires an argument.*)",
        r"(?m)^E\d.*?\] (?P<reason>.*)",
        r"(?m)^[Ee]rror: (?P<reason>.*)",
        r"(?P<reason>[^\n]*\S)\s*\Z",
    ):
        if match := re.search(pattern, text):
            reason = match["reason"].partition(r"\n\nAt:")[0].strip(' ";')  # without the traceback
            model = match.groupdict().get("model")
            return f"model {model} does not load ({reason}): check its configs or export it again" if model else reason
    return ""
