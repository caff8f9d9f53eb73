"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .audio import describe
from .errors import OutputError


def check_output(path: str | os.PathLike[str], *endings: str) -> Path:
    """Check that a file can be written before the work starts.

    Args:
        path: Of the file; a link to a file stays one.
        endings: Of names that stand for a format that can be written; none: any.

    Returns:
        The absolute path of the file itself, behind links.

    Raises:
        OutputError: The path is not that of a file, has another ending, or its folder is missing or not writable.
    """
    if endings and Path(path).suffix.lower() not in endings:
        raise OutputError(f"{describe(path)}: expected a name that ends in {' or '.join(endings)}: choose another")
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():  # /dev/null must not be replaced by a file
        reason = "is there and not a regular file"
    elif not place.parent.is_dir():
        reason = f"there is no directory {describe(place.parent)}"
    elif not os.access(place.parent, os.W_OK):
        reason = f"no permission to write in {describe(place.parent)}"
    else:
        return place
    raise OutputError(f"{describe(path)}: {reason}: expected the path of a file to write")


@contextmanager
def locked_folder(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Lock a folder, so that two programs that read a file in it and replace it take turns.

    Raises:
        OutputError: Another program holds the lock and `wait` is false.
    """
    import fcntl  # not on Windows

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if not os.path.samestat(os.fstat(descriptor), os.stat(folder)):
            raise BlockingIOError  # the program that held the lock has removed the folder
        yield
    except BlockingIOError as exc:
        reason = "another run is writing it: wait for its end, or choose another output"
        raise OutputError(f"{describe(folder)}: {reason}") from exc
    finally:
        os.close(descriptor)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file beside its place and rename it, so that readers see either the old file or the whole new one.

    The new file gets the permissions of the one it replaces. It is synchronized to disk before the rename, so that it
    is whole after a power failure too.

    Args:
        path: Of the file to write; it need not exist.

    Raises:
        OutputError: It cannot be written; also in place of an `OSError` in the body of the `with`.
    """
    place = check_output(path)
    part = place.with_name(f".{place.name[:48]}.{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            try:
                with suppress(FileNotFoundError):
                    os.chmod(part, stat.S_IMODE(place.stat().st_mode))
                yield file
                file.flush()
                os.fsync(file.fileno())
                os.replace(part, place)
            except BaseException:
                with suppress(OSError):
                    os.unlink(part)
                raise
    except OSError as exc:
        raise OutputError(f"{describe(path)}: cannot be written ({exc.strerror or exc}): choose another place") from exc
    with suppress(OSError):  # not every system lets a folder be opened
        folder = os.open(place.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
