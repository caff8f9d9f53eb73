"""How a client reaches the server: its options, checked once, and the channel that carries its calls."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import grpc
from tritonclient.grpc import service_pb2_grpc

from .errors import AddressError, ClosedError, TrustError, from_grpc
from .protocol import CHANNEL_ARGS, GRPC_KEY_HEADER, SCHEME, TLS_SCHEME

MAX_TIMEOUT = 1e6  # s; gRPC takes deadlines in the far future for ones in the past
MAX_DURATION = 86_400  # s
CLOSED = "the client is closed: make a new one"


class State(Enum):
    """Life of a client.

    Attributes:
        NEW: Not used yet; there is no connection.
        OPEN: Connected, or reconnecting after a lost connection.
        CLOSED: Closed; takes no more requests.
    """

    NEW = "new"
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True)
class Tls:
    """Options of an encrypted connection; files are in PEM format.

    Attributes:
        ca: File with the authorities that sign the server's certificate. None: the public ones that gRPC ships.
        certificate: File with the client's own certificate, where the server requires one.
        key: File with the private key of `certificate`.
        name: Host name in the server's certificate, where the url has none: a list of addresses.
    """

    ca: Path | str | None = None
    certificate: Path | str | None = None
    key: Path | str | None = None
    name: str | None = None

    def _credentials(self) -> grpc.ChannelCredentials:
        """GRPC's credentials, with the content of the files."""
        if (self.certificate is None) != (self.key is None):
            raise TrustError("a client's certificate and its key go together: pass both or neither")
        return grpc.ssl_channel_credentials(_content(self.ca), _content(self.key), _content(self.certificate))


def _content(path: Path | str | None) -> bytes | None:
    try:
        return None if path is None else Path(path).read_bytes()
    except OSError as exc:
        raise TrustError(f"{path}: {exc.strerror}: pass a file in PEM format") from exc


@dataclass(frozen=True, eq=False, repr=False)
class Options:
    """The options of a client, checked; `SpeakerClient` documents them."""

    url: str = "127.0.0.1:8001"
    model: str = "ecapa"
    timeout: float | None = 10.0
    _: KW_ONLY
    model_version: str = ""
    retries: int | None = None
    max_in_flight: int = 8
    max_duration: float = 3600.0
    tls: Tls | None = None
    api_key: str | None = None
    metadata: Mapping[str, str] | None = None

    def __post_init__(self) -> None:
        for name, valid, expected in (
            (
                "timeout",
                self.timeout is None or 0 < self.timeout <= MAX_TIMEOUT,
                f"more than 0 and at most {MAX_TIMEOUT:.0f} s, or None",
            ),
            ("max_duration", 0 < self.max_duration <= MAX_DURATION, f"more than 0 and at most {MAX_DURATION} s"),
            ("max_in_flight", self.max_in_flight >= 1, "1 or more"),
            ("retries", self.retries is None or self.retries >= 0, "0 or more, or None"),
        ):
            if not valid:
                raise ValueError(f"{name} is {getattr(self, name)}: expected {expected}")
        for name, value in self._headers.items():  # gRPC would reject them only at the first request
            if not re.fullmatch(r"(?!grpc-)[a-z0-9_.-]+(?<!-bin)", name):
                raise ValueError(f"metadata has the name {name!r}: expected a-z 0-9 _ . - (not grpc-..., not ...-bin)")
            if not (value.isascii() and value.isprintable()):
                what = "api_key" if name == GRPC_KEY_HEADER else f"metadata {name!r}"
                raise TrustError(f"{what} has characters other than printable ASCII: pass it as the server has it")

    @property
    def _headers(self) -> dict[str, str]:
        """GRPC metadata of every request."""
        return dict(self.metadata or {}) | ({} if self.api_key is None else {GRPC_KEY_HEADER: self.api_key})


class Connection:
    """A gRPC channel to the server whose calls are awaited.

    The channel is gRPC's threaded one, not its asyncio one, which hangs in a process that is forked off, even where
    that process makes a client of its own. It connects when first used.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self._target = _target(options.url)
        self._metadata = tuple(options._headers.items())
        tls = options.tls or (Tls() if options.url.startswith(TLS_SCHEME) else None)
        self._credentials = None if tls is None else tls._credentials()
        self._name = [] if tls is None or tls.name is None else [("grpc.ssl_target_name_override", tls.name)]
        self._channel: grpc.Channel | None = None
        self.closed = False

    def open(self) -> None:
        """Make the channel."""
        arguments = [*CHANNEL_ARGS, *self._name]
        if self._credentials is None:
            self._channel = grpc.insecure_channel(self._target, arguments)
        else:
            self._channel = grpc.secure_channel(self._target, self._credentials, arguments)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    def close(self) -> None:
        """Close the channel; calls in flight raise `ClosedError`. Any thread may close it."""
        self.closed = True
        if self._channel is not None:
            self._channel.close()

    async def call(self, method: str, request: Any, timeout: float | None) -> Any:
        """The reply to a method of Triton's GRPCInferenceService within `timeout` seconds (None: waits for ever)."""
        if self.closed:
            raise ClosedError(CLOSED)
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def notify(_: grpc.Future) -> None:  # in a thread of gRPC's
            with suppress(RuntimeError):  # the event loop is closed, nothing waits in it
                loop.call_soon_threadsafe(ended.set)

        try:
            call = getattr(self._stub, method).future(request, timeout=timeout, metadata=self._metadata)
        except ValueError as exc:  # another thread has just closed the channel
            raise ClosedError(CLOSED) from exc
        call.add_done_callback(notify)
        try:
            await ended.wait()
        except asyncio.CancelledError:
            call.cancel()
            raise
        if call.code() is grpc.StatusCode.OK:
            return call.result()
        if self.closed:
            raise ClosedError(CLOSED) from call
        url, model, seconds = self._options.url, self._options.model, self._options.timeout
        raise from_grpc(call.code().name, call.details() or "", url=url, model=model, timeout=seconds) from call


def _target(url: str) -> str:
    target = url.removeprefix(SCHEME).removeprefix(TLS_SCHEME).rstrip("/")
    # gRPC would complete a HOST without a port, and resolve other schemes in ways of its own.
    plain = re.fullmatch(r"[\w.\-\[\]:]+:(\d+)", target, re.ASCII)
    if plain and 0 < int(plain[1]) < 65536 or re.fullmatch(r"(dns|ipv4|ipv6|unix|xds):[!-~]+", target):
        return target
    raise AddressError(
        f"url is {url!r}: expected HOST:PORT of Triton's gRPC endpoint, such as 127.0.0.1:8001 (8000 is its HTTP port)"
    )
