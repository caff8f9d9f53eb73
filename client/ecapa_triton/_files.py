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


def check_output(path: str | os.PathLike[str]) -> Path:
    """Refuse an impossible output before the work, not after it.

    Args:
        path: Where a file is to be written; a link to a file stays one.

    Returns:
        The absolute path of the file itself, behind links.

    Raises:
        OutputError: The path is not that of a file, or its folder is missing or not writable.
    """
    place = Path(os.path.realpath(path))
    if place.exists() and not place.is_file():  # renaming over /dev/null would be a pity
        reason = "is there and not a regular file"
    elif not place.parent.is_dir():
        reason = f"there is no directory {describe(place.parent)}"
    elif not os.access(place.parent, os.W_OK):
        reason = f"no permission to write in {describe(place.parent)}"
    else:
        return place
    raise OutputError(f"{describe(path)}: {reason}: expected the path of a file to write")


@contextmanager
def locked_folder(path: str | os.PathLike[str]) -> Iterator[None]:
    """Read a file and replace it while nobody else does, who does so in here too."""
    import fcntl  # not on Windows

    folder = os.open(Path(os.path.realpath(path)).parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Write a file under another name beside it and rename, so that a reader sees all of it or the file before.

    A file that is replaced leaves its permissions to the new one. What is written is on the disk before it gets the
    name, so that it is whole after a power failure too.

    Args:
        path: Of the file to write, there or not.

    Raises:
        OutputError: It cannot be written; also for an `OSError` in the body of the `with`.
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
