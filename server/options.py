"""Options that every module of the launcher shares, and the launcher's error. Imports nothing of the project."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "gpu"]
Precision = Literal["fp32", "fp16", "int8"]
Place = tuple[str, int]  # address and port
Keys = Mapping[str, Sequence[str]]  # those accepted, by group of GROUPS

# Triton's groups of APIs, by the names that tritonserver's options use. The ADMIN groups are for operators alone:
# shared memory, for example, would show the clips of one client to another.
ADMIN = "shared-memory", "model-repository", "trace", "logging"
GROUPS = ("health", "metadata", "inference", "model-config", "statistics", *ADMIN)
_KEY = re.compile(r"[\x21-\x7e]{16,1024}")

DEFAULT_REQUESTS = {"CPU": 128, "GPU": 1024}  # in flight


class ServerError(Exception):
    """The server did not start or did not stay up. The message is one line."""


@dataclass(frozen=True)
class Limits:
    """Limits of the gateway.

    Attributes:
        requests: Inference requests in flight over each API; one more is rejected at once. None: DEFAULT_REQUESTS.
        request_mb: Size of the largest request in units of 2^20 bytes.
        per_address: Requests in flight of one address, those included that have not arrived whole.
        connection_age: Seconds after which a connection ends once its requests are answered.
    """

    requests: int | None
    request_mb: int = 64
    per_address: int = 1024
    connection_age: int = 3600


@dataclass(frozen=True)
class Tls:
    """Encryption of both APIs.

    Attributes:
        certificate: The server's certificate followed by intermediate ones, PEM.
        key: Its private key, PEM.
        client_ca: Authorities of clients, PEM: clients without a certificate of one of them are rejected. None: clients
            need no certificate.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


def check_keys(keys: Keys) -> None:
    """Checks API keys by group.

    Raises:
        ServerError: Triton has no such group, or a key is too short, too long or not printable ASCII.
    """
    for group, accepted in keys.items():
        if group not in GROUPS:
            raise ServerError(f"unknown group of APIs {group!r}: expected one of {', '.join(GROUPS)}")
        for key in accepted:
            if not _KEY.fullmatch(key):
                raise ServerError(
                    f"key of {group} has {len(key)} characters: expected 16 to 1024, visible ASCII, no blanks"
                )


def url_of(place: Place) -> str:
    """Where a client on this machine reaches a server: one on all addresses, on the loopback one."""
    address, port = place
    return f"{'127.0.0.1' if address == '0.0.0.0' else address}:{port}"
