"""Child processes that end with their parent, even when it is killed; whether they live, listen and use memory."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil  # type: ignore[import-untyped]

# Runs first in the child, then becomes the command. Not `preexec_fn`: that forks, and a fork stops gRPC's threads in
# the parent. The command gets a session of its own and default signals, also those that a shell (nohup) ignores. A
# request in flight takes up to two open files, and many shells and container engines allow 1024.
_FIRST = """
import ctypes, os, resource, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: stop in order when the parent is killed
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most if 0 <= most < 65536 else 65536, most))
for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
    signal.signal(number, signal.SIG_DFL)
try:
    os.execv(sys.argv[2], sys.argv[2:])
except OSError as error:
    sys.exit(f"cannot run {sys.argv[2]}: {error.strerror}")
"""


def start(
    command: Sequence[str], log: IO[bytes] | None, environment: dict[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Starts a command in a process group of its own; one that cannot run says so in its log and ends at once.

    Args:
        command: The path of the binary and its arguments.
        log: Receives standard output and error; None: the parent's standard output.
        environment: As `env` of `subprocess.Popen`.
    """
    return subprocess.Popen(
        [sys.executable, "-ISc", _FIRST, str(os.getpid()), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal reaches the parent alone
    )


def ending(code: int) -> str:
    """How a process with this return code ended, in words."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def is_alive(process: psutil.Process) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def listens(pid: int, port: int) -> bool:
    """Whether this process holds the listening socket of the port: another one may have taken it."""
    try:
        sockets = psutil.Process(pid).net_connections("tcp4")
    except psutil.Error:  # it has just ended
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in sockets)


def out_of_memory_kills() -> int:
    """How many processes of this container the kernel has killed for want of memory; 0 where it does not say."""
    try:
        return int(dict(line.split() for line in Path("/sys/fs/cgroup/memory.events").open())["oom_kill"])
    except (OSError, KeyError, ValueError):
        return 0


def memory(groups: Mapping[int, str]) -> dict[str, int]:
    """Resident bytes of the processes of each group (its name by process id); see `TritonServer.memory`."""
    used = dict.fromkeys([*groups.values(), "shared"], 0)
    segments = set()
    for pid, group in groups.items():
        with contextlib.suppress(psutil.Error):
            maps = psutil.Process(pid).memory_maps()
            segments |= {mapped.path for mapped in maps if mapped.path.startswith("/dev/shm/")}
            used[group] += sum(mapped.pss for mapped in maps if not mapped.path.startswith("/dev/shm/"))
    for segment in segments:
        with contextlib.suppress(OSError):
            used["shared"] += 512 * os.stat(segment).st_blocks
    return used
