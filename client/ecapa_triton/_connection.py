"""How a client reaches the server: checked once, the same for both clients."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from .errors import AddressError, TrustError
from .protocol import CHANNEL_ARGS, GRPC_KEY_HEADER, SCHEME, TLS_SCHEME

MAX_TIMEOUT = 1e6  # s; gRPC takes deadlines in the far future for ones in the past
MAX_DURATION = 86_400  # s
CLOSED = "the client is closed: make a new one"
FORKED = "this client was used before this process was forked off, and gRPC would hang in it: make one in each process"


class State(Enum):
    """What a client can do.

    Attributes:
        NEW: Nothing was asked of the server yet, and there is no connection.
        OPEN: It has a connection, or finds one again.
        CLOSED: It was closed, and takes no more requests.
    """

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True)
class Tls:
    """An encrypted connection.

    Attributes:
        ca: File with the certificates of the authorities that the server's is trusted by, PEM. None: those that
            gRPC brings along.
        certificate: File with this client's own certificate, PEM, where the server asks for one.
        key: File with its private key, PEM.
        name: What the server's certificate is for, where the url does not say: a list of addresses.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None
    name: str | None = None

    def _arguments(self) -> dict[str, Any]:
        if (self.certificate is None) != (self.key is None):
            raise TrustError("a client's certificate and its key go together: pass both or neither")
        named = {"root_certificates": self.ca, "certificate_chain": self.certificate, "private_key": self.key}
        paths = {name: str(path) for name, path in named.items() if path is not None}
        for path in paths.values():
            try:
                open(path, "rb").close()
            except OSError as exc:
                raise TrustError(f"{path}: {exc.strerror}: pass a file in PEM format") from exc
        return {"ssl": True} | paths


@dataclass(frozen=True)
class Connection:
    """The options of a client, checked. Those of `SpeakerClient` say what they mean."""

    url: str
    model: str
    timeout: float | None
    model_version: str
    retries: int
    max_in_flight: int
    max_duration: float
    tls: Tls | None
    api_key: str | None
    metadata: Mapping[str, str]

    def __post_init__(self) -> None:
        if self.timeout is not None and not 0 < self.timeout <= MAX_TIMEOUT:
            raise ValueError(
                f"timeout is {self.timeout}: expected seconds above 0 and up to {MAX_TIMEOUT:.0f}, "
                "or None to wait for ever"
            )
        if not 0 < self.max_duration <= MAX_DURATION:
            raise ValueError(f"max_duration is {self.max_duration}: expected seconds above 0 and up to {MAX_DURATION}")
        for name, least in ("max_in_flight", 1), ("retries", 0):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: expected {least} or more")
        for name, value in self.headers.items():
            # What gRPC would refuse with words of its own, at the first request.
            if not re.fullmatch(r"(?!grpc-)[a-z0-9_.-]+(?<!-bin)", name):
                raise ValueError(
                    f"metadata has the name {name!r}: expected small letters, digits, and _ . - (not grpc-..., ...-bin)"
                )
            if not (value.isascii() and value.isprintable()):
                what = "api_key" if name == GRPC_KEY_HEADER else f"metadata {name!r}"
                raise TrustError(f"{what} is not of visible ASCII characters alone: pass it as the server has it")

    @property
    def headers(self) -> dict[str, str]:
        """What goes with every request."""
        return dict(self.metadata) | ({} if self.api_key is None else {GRPC_KEY_HEADER: self.api_key})

    def arguments(self) -> dict[str, Any]:
        """Arguments of Triton's clients."""
        target = self.url.removeprefix(SCHEME).removeprefix(TLS_SCHEME).rstrip("/")
        # A name that gRPC would give another port, or that goes by a resolver of its own.
        plain = re.fullmatch(r"[\w.\-\[\]:]+:(\d+)", target, re.ASCII)
        if not (plain and 0 < int(plain[1]) < 65536 or re.fullmatch(r"(dns|ipv4|ipv6|unix|xds):[!-~]+", target)):
            raise AddressError(
                f"url is {self.url!r}: expected HOST:PORT of Triton's gRPC endpoint, such as 127.0.0.1:8001 "
                "(8000 is its HTTP port)"
            )
        tls = self.tls or (Tls() if self.url.startswith(TLS_SCHEME) else None)
        channel = list(CHANNEL_ARGS)
        if tls is not None and tls.name is not None:
            channel.append(("grpc.ssl_target_name_override", tls.name))
        return {"url": target, "channel_args": channel} | ({} if tls is None else tls._arguments())
