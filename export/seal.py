"""What makes a model file safe to serve: it is whole, and it says which bad input it guards against.

The standard library alone, so that every process that loads a model can check it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

# What the graph answers with NaN, and that it hears only a clip's first seconds.
GUARDS = ("empty", "short", "not-finite", "torn", "max-seconds")

# An ONNX file is a protobuf message, and messages that are appended are merged. So the seal is one more entry of the
# metadata: field 14 of 74 bytes, holding the key "sha256" and a value of 64 characters, the digest of all before it.
_SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"
_DIGITS = 64
_BLOCK = 1 << 20  # bytes read at a time


class SealError(Exception):
    """A model file is damaged, was changed, or lacks a guard; the message says what to do."""


def seal(path: Path) -> None:
    """Append the SHA-256 of an ONNX file to it, as the metadata entry ``sha256``."""
    digest = _digest(path, path.stat().st_size)
    with path.open("ab") as file:
        file.write(_SEAL + digest.encode())


def check(path: Path) -> None:
    """Check that an exported file is as it was written.

    Raises:
        SealError: it is not.
        OSError: it cannot be read.
    """
    size = path.stat().st_size - len(_SEAL) - _DIGITS
    end = b""
    if size > 0:
        with path.open("rb") as file:
            file.seek(size)
            end = file.read()
    if not end.startswith(_SEAL):
        raise SealError(
            f"{path} ends without a checksum: it was cut off, or not written by this version: run python -m export"
        )
    if end[len(_SEAL) :].decode(errors="replace") != _digest(path, size):
        raise SealError(f"{path} is not as it was written (its checksum differs): run python -m export again")


def check_guards(path: Path, metadata: Mapping[str, str], required: Iterable[str] = GUARDS) -> None:
    """Check that the metadata of the model file at ``path`` names every guard that is required.

    Raises:
        SealError: one is missing.
    """
    missing = sorted(set(required) - set(metadata.get("guards", "").split(",")))
    if missing:
        raise SealError(
            f"{path} does not guard against bad input of the kinds {', '.join(missing)}: run python -m export again"
        )


def _digest(path: Path, size: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while size > 0 and (block := file.read(min(size, _BLOCK))):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest()
