"""Checks that make a model file safe to serve: it is whole, and its metadata names its guards against bad input.

Standard library only, so that every process that loads a model can check it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

# Bad input that the graph answers with NaN, and its limit on the length of a clip: see PackedEcapa.forward.
GUARDS = ("empty", "short", "not-finite", "torn", "max-seconds")

# A file ends with its seal: a mark by the kind of file, then the digest of all bytes before the mark. ONNX is a
# protobuf message, and readers merge appended messages: the seal is one more entry of the metadata, field 14 of 74
# bytes, with the key "sha256". TorchScript is a zip archive, which may end with a comment.
_SEALS = {".onnx": b"\x72\x4a\x0a\x06sha256\x12\x40", ".pt": b"sha256 "}
_DIGITS = 64  # of a SHA-256, hexadecimal


class SealError(Exception):
    """A model file is damaged, was changed, or lacks a guard; the message says what to do."""


def seal(path: Path) -> None:
    """Append the seal to an ONNX or TorchScript file, which other readers ignore.

    Raises:
        SealError: the file cannot have a seal.
        OSError: it cannot be read or written.
    """
    mark = _mark(path)
    data = bytearray(path.read_bytes())
    if mark == _SEALS[".pt"]:
        if data[-2:] != b"\0\0":  # the length of the comment
            raise SealError(f"{path} does not end as a zip archive without a comment does")
        data[-2:] = (len(mark) + _DIGITS).to_bytes(2, "little")
    path.write_bytes(data + mark + hashlib.sha256(data).hexdigest().encode())


def check(path: Path) -> None:
    """Check that an exported file is whole and unchanged.

    Raises:
        SealError: it is not.
        OSError: it cannot be read.
    """
    mark = _mark(path)
    data = memoryview(path.read_bytes())
    size = max(0, len(data) - len(mark) - _DIGITS)
    content, end = data[:size], bytes(data[size:])
    if not end.startswith(mark):
        raise SealError(
            f"{path} ends without a checksum: it was cut off or written by another version: export it again"
        )
    if end != mark + hashlib.sha256(content).hexdigest().encode():
        raise SealError(f"{path} was changed after its export (its checksum differs): export it again")


def check_guards(path: Path, metadata: Mapping[str, str], required: Iterable[str] = GUARDS) -> None:
    """Check that the metadata of the model file at ``path`` names every guard that is required.

    Raises:
        SealError: one is missing.
    """
    missing = sorted(set(required) - set(metadata.get("guards", "").split(",")))
    if missing:
        raise SealError(f"{path} lacks the guards {', '.join(missing)} against bad input: run python -m export again")


def _mark(path: Path) -> bytes:
    # While it is written, a file has its name within another one: .model.onnx.123.partial
    for suffix in reversed(path.suffixes):
        if suffix in _SEALS:
            return _SEALS[suffix]
    raise SealError(f"{path} is neither an .onnx nor a .pt file")
