"""The temporary folder of a server, which is removed even after its process was killed."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from server.options import ServerError
from server.preflight import SHM, config_path, read_config

_PREFIX = "ecapa-triton-"  # in the system's folder for temporary files
_LOCK = "lock"  # held by the process that owns the folder
# The parameter of each backend for the threads of an instance.
_THREADS = {"onnxruntime": "intra_op_thread_count", "pytorch": "INTRA_OP_THREAD_COUNT"}
_SETTING_UP = 60  # s, at most, from making a folder to locking it


class Workdir:
    """A folder that this process owns, and shared memory segments with the prefix `NAME-`.

    Attributes:
        path: The folder.
    """

    def __init__(self) -> None:
        """Makes a folder, and removes those of killed processes.

        Raises:
            ServerError: There is no place for it.
        """
        for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
            with contextlib.suppress(OSError), _locked(folder):  # in use, another user's, or just removed
                if time.time() - (folder / _LOCK).stat().st_mtime > _SETTING_UP:
                    _discard(folder)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=_PREFIX))
            (self.path / _LOCK).touch(0o600)
            self._lock = _locked(self.path)
        except OSError as error:
            raise ServerError(f"cannot make a temporary folder ({error}): set TMPDIR to a writable one") from error

    def link(self, models: Iterable[Path], threads: int | None = None) -> Path:
        """Makes a model repository of links to these model folders.

        Args:
            models: The folders.
            threads: Of each instance on the CPU, set in copies of the configs; None: unchanged.
        """
        repository = self.path / "models"
        repository.mkdir()
        for model in models:
            linked = repository / model.name
            config = config_path(model, "cpu")
            parameter = _THREADS.get(read_config(config).backend)
            if threads is None or parameter is None:
                linked.symlink_to(model.absolute())
                continue
            linked.mkdir()
            for entry in model.iterdir():
                if entry.name not in ("config.pbtxt", "configs"):
                    (linked / entry.name).symlink_to(entry.absolute())
            # Of two settings of a parameter, the last one counts.
            setting = f'parameters {{ key: "{parameter}" value: {{ string_value: "{threads}" }} }}'
            (linked / "config.pbtxt").write_text(f"{config.read_text()}\n{setting}\n")
        return repository

    def remove(self, keep: Path | None = None) -> None:
        """Removes everything except `keep`, a file in the folder."""
        (self.path / _LOCK).unlink(missing_ok=True)  # first: another server must not take the folder for a stale one
        self._lock.close()
        _discard(self.path, keep)


def _discard(folder: Path, keep: Path | None = None) -> None:
    for segment in SHM.glob(f"{folder.name}-*"):
        segment.unlink(missing_ok=True)
    if keep is None:
        return shutil.rmtree(folder, ignore_errors=True)
    for entry in folder.iterdir():
        if entry != keep:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _locked(folder: Path) -> IO[bytes]:
    """Locks a folder until the file is closed or this process ends; OSError if another process holds the lock."""
    lock = open(os.open(folder / _LOCK, os.O_RDONLY | os.O_NOFOLLOW), "rb")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise
    return lock
