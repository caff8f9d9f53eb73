"""A Locust user of a Triton server: gRPC under gevent, only the call is timed, every reply is checked.

Import this from a locustfile: Locust has prepared the process for gevent then.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import gevent
import grpc.experimental.gevent
from locust import User, events

from .infer import Connection, Failure, Request, check

IN_FLIGHT = 5000  # requests of one process, at most


class TritonUser(User):
    """Sends requests to the Triton server at `--host grpc://HOST:PORT` and reports their replies to Locust.

    The context of Locust's `request` event has the number of `clips`, the `seconds` of audio and, of a right reply, the
    `error`: its relative L2 distance from the expected one.
    """

    abstract = True
    connections = 1  # of each user

    def on_start(self) -> None:
        """Connect."""
        assert self.host is not None
        self._connections = deque(Connection(self.host) for _ in range(self.connections))

    def on_stop(self) -> None:
        """Disconnect."""
        for connection in self._connections:
            connection.close()

    def send(self, request: Request, due: float | None = None) -> Exception | None:
        """Send a request and report its reply, with its latency since the request was `due` (default: since now).

        Returns:
            The failure, if any.
        """
        connection = self._connections[0]
        self._connections.rotate()
        begun = due or time.perf_counter()
        start = time.time() - (time.perf_counter() - begun)
        failure: Exception | None = None
        error, took, size = 0.0, 0.0, 0
        try:
            reply = connection.embed(request.body)
            took, size = time.perf_counter() - begun, reply.nbytes
            error = check(reply, request)
        except Failure as exc:
            took, failure = took or time.perf_counter() - begun, exc
        self.environment.events.request.fire(
            request_type="gRPC",
            name=request.name,
            start_time=start,
            response_time=took * 1e3,
            response_length=size,
            exception=failure,
            context={"clips": request.clips, "seconds": request.seconds, "error": error},
        )
        return failure


@events.init.add_listener  # type: ignore[untyped-decorator]
def _use_gevent(**_: Any) -> None:
    """Let gRPC wait in gevent's loop; called after the forks of `--processes`, before which gRPC must not start."""
    # gRPC waits for each reply in a thread of this pool, whose usual size is ten.
    gevent.get_hub().threadpool.maxsize = IN_FLIGHT
    grpc.experimental.gevent.init_gevent()
