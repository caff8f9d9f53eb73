"""Processes that end with the one that started them, however that ends."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import IO

# Runs first in the child, then becomes the command. Not `preexec_fn`: that forks, and a fork stops the gRPC servers and
# clients of the process that forks. Signals that Python or the shell (nohup) ignores end the command as usual:
# it has a session of its own. Each request in work takes up to two open files, and many shells allow 1024.
_FIRST = """
import ctypes, os, resource, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG: end, in order, when the parent is killed
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


def start(command: Sequence[str], log: IO[bytes], environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Starts a command in a process group of its own.

    Args:
        command: What to run; the first is the path of the binary.
        log: Where it writes.
        environment: As `env` of `subprocess.Popen`.

    Raises:
        OSError: The binary is not there, or may not be run.
    """
    if shutil.which(command[0]) is None:
        code = errno.EACCES if os.path.exists(command[0]) else errno.ENOENT
        raise OSError(code, os.strerror(code), command[0])
    return subprocess.Popen(
        [sys.executable, "-ISc", _FIRST, str(os.getpid()), *command],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # a Ctrl-C in the terminal comes to us alone
    )
