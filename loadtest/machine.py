"""The machine, the versions and the commit that a figure was measured with, and why one could not be measured.

Nothing but the standard library is imported: a GPU host may have little more than torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class MeasureError(Exception):
    """Something cannot be measured, or a server broke a promise. The message is one line that says what to do."""


def reason(error: BaseException) -> str:
    """What went wrong, in one line of at most 200 characters."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name.partition('.')[0]} is not installed"
    if any(words in str(error).lower() for words in ("out of memory", "failed to allocate memory")):
        return "out of memory"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if "TorchScript interpreter" in lines[0] else 0][:200]  # TorchScript's traceback comes first


def describe(packages: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """CPU, versions of the installed ones of `packages` and time, for a report; and `more`."""
    names = re.findall(r"^model name\s*: (.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    versions = {name: importlib.metadata.version(name) for name in installed(*packages)}
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "cpu": names[0] if names else platform.machine(),
        "cores": cores(),
        "python": platform.python_version(),
        "packages": versions,
        **more,
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def installed(*packages: str) -> tuple[str, ...]:
    """Those of the packages that are installed."""
    return tuple(name for name in packages if any(importlib.metadata.distributions(name=name)))


def commit() -> str | None:
    """Of the checkout; it ends in -dirty where files were changed since."""
    return output("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def output(*command: str) -> str | None:
    """What a command prints; None if it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
