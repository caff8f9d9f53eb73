"""What a server is asked for: device, limits, TLS, keys; and the error of all that is in the way. A leaf."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Device = Literal["auto", "cpu", "gpu"]
Precision = Literal["fp32", "fp16"]

# Groups of Triton's APIs, as its options for restricted ones name them. What only those who run the server have a use
# for (shared memory would show one client's clips to another), and what a client asks.
ADMIN = "shared-memory", "model-repository", "trace", "logging"
GROUPS = ("health", "metadata", "inference", "model-config", "statistics", *ADMIN)
_KEY = re.compile(r"[\x21-\x7e]{16,1024}")


class ServerError(Exception):
    """The server did not start or did not stay up. The message is one line."""


@dataclass(frozen=True)
class Limits:
    """What the gateway lets through.

    Attributes:
        requests: Inference requests in work at once, over both APIs; one more is refused at once, as Triton would.
            None: 128 on a CPU, 1024 on GPUs.
        request_mb: Megabytes (2^20 bytes) of the largest request.
    """

    requests: int | None
    request_mb: int = 64


@dataclass(frozen=True)
class Tls:
    """How both APIs are encrypted.

    Attributes:
        certificate: The server's certificate and those between it and its authority, PEM.
        key: Its private key, PEM.
        client_ca: Certificates of the authorities of clients, PEM: a client without a certificate by one of them is
            not let in. None: clients need none.
    """

    certificate: Path
    key: Path
    client_ca: Path | None = None


def check_keys(keys: Mapping[str, str]) -> None:
    """Refuses with ServerError what cannot be a key, and groups that Triton does not have."""
    for group, key in keys.items():
        if group not in GROUPS:
            raise ServerError(f"no group of APIs is called {group!r}: expected one of {', '.join(GROUPS)}")
        if not _KEY.fullmatch(key):
            raise ServerError(
                f"the key of {group} has {len(key)} characters: expected 16 to 1024, visible ASCII, no blanks"
            )
