"""Clients of the server, for Locust: `locust -f loadtest/locustfile.py --host grpc://127.0.0.1:8001`.

The scenario and its details are options, on the command line and in Locust's web page. Without `--clips` the load is
speech of `samples/`, and the expected embeddings are the server's replies to each clip alone, before the load.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

sys.path.insert(0, str(Path(__file__).parent.parent))  # Locust adds the folder of this file alone

import gevent.pool  # noqa: E402
from ecapa_triton.protocol import SCHEME  # noqa: E402
from locust import events, task  # noqa: E402
from locust.exception import StopUser  # noqa: E402
from locust.runners import MasterRunner  # noqa: E402

from loadtest import scenarios  # noqa: E402
from loadtest.clips import MAX_ERROR, Clips, Deck, speech  # noqa: E402
from loadtest.infer import CallFailed, Rejected, Request, WrongReply, first_replies, make_requests  # noqa: E402
from loadtest.machine import MeasureError  # noqa: E402
from loadtest.triton_user import TritonUser  # noqa: E402

CONNECTIONS = 8  # of a user in the open loop, whose requests do not wait for each other
REJECTED_PAUSE = 0.5  # s, before a client in the closed loop sends again after a rejection
COLUMNS = ["start", "latency_ms", "clips", "audio_s", "users", "result", "error"]


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    """Options of the command line and of the web page."""
    parser.add_argument("--scenario", choices=list(scenarios.SCENARIOS), default="mixed", help="what clients do")
    parser.add_argument("--model", default="ecapa", help="the model to call")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each clip in single, batch and clients")
    parser.add_argument("--batch", type=int, default=8, help="clips per request in batch")
    parser.add_argument("--rate", type=float, default=5.0, help="clips per second of each user in arrivals")
    bound = f"largest relative L2 error of a right reply; float16 models need {MAX_ERROR['fp16']:g}"
    parser.add_argument("--max-error", type=float, default=MAX_ERROR["fp32"], help=bound)
    hidden = {"default": "", "include_in_web_ui": False}
    parser.add_argument("--clips", help="NPZ of clips and their embeddings to send in place of speech", **hidden)
    parser.add_argument("--requests", help="write a row of CSV for each request into FILE.PID", **hidden)


class Speaker(TritonUser):
    """Sends the clips of the scenario: the next after each reply, or at a constant rate."""

    deck: Deck[Request]

    def on_start(self) -> None:
        """Connect; the first clip of an open loop is due now."""
        self.connections = CONNECTIONS if self.environment.parsed_options.scenario in scenarios.OPEN_LOOP else 1
        super().on_start()
        self._due = time.perf_counter()
        self._in_flight = gevent.pool.Group()

    @task
    def speak(self) -> None:
        """One request."""
        if not self.deck:
            raise StopUser
        options = self.environment.parsed_options
        if options.scenario not in scenarios.OPEN_LOOP:
            if isinstance(self.send(self.deck.draw()), Rejected):
                gevent.sleep(REJECTED_PAUSE)
            return
        gevent.sleep(max(0.0, self._due - time.perf_counter()))
        self._in_flight.spawn(self.send, self.deck.draw(), self._due)
        self._due += 1 / options.rate

    def on_stop(self) -> None:
        """Wait for the requests in flight, and disconnect."""
        self._in_flight.join()
        super().on_stop()


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def prepare(environment: Any, **_: Any) -> None:
    """Make the requests of the scenario."""
    if isinstance(environment.runner, MasterRunner):  # its workers send
        return
    try:
        Speaker.deck = Deck(_requests(environment.host or "", environment.parsed_options))
    except (MeasureError, CallFailed, Rejected, WrongReply, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        environment.process_exit_code = 1
        Speaker.deck = Deck([])  # its users stop at once
        gevent.spawn_later(0.1, environment.runner.stop if environment.web_ui else environment.runner.quit)


def _requests(host: str, options: Any) -> list[Request]:
    if not host.startswith(SCHEME):
        raise ValueError(f"host is {host!r}, expected {SCHEME}HOST:PORT, such as {SCHEME}127.0.0.1:8001")
    for name in "seconds", "batch", "rate":
        if not getattr(options, name) > 0:
            raise ValueError(f"{name} is {getattr(options, name):g}, expected more than 0")
    seconds = None if options.scenario in scenarios.MIXED else options.seconds
    batch = options.batch if options.scenario == "batch" else 1
    if options.clips:
        clips = Clips.load(Path(options.clips))
    else:
        waveforms = speech(scenarios.lengths(seconds, batch))
        clips = Clips(waveforms, first_replies(host, options.model, waveforms))
    name = str(scenarios.Level(options.scenario, seconds, batch)).rpartition(",")[0]
    requests = make_requests(
        options.model, clips.waveforms, clips.embeddings, batch=batch, max_error=options.max_error, name=name
    )
    if not requests:
        raise ValueError(f"batch is {batch}, {options.clips} has {len(clips.waveforms)} clips")
    return requests


class RequestLog:
    """A row of CSV for each request; each process of Locust has a file of its own: FILE.PID."""

    def __init__(self, environment: Any, path: str) -> None:
        self._environment = environment
        self._file: TextIO = open(f"{path}.{os.getpid()}", "w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)
        self.begin()

    def begin(self, **_: Any) -> None:
        """The load begins."""
        self._begun, self._busy = time.monotonic(), time.process_time()

    def write(
        self, start_time: float, response_time: float, exception: Exception | None, context: Any, **_: Any
    ) -> None:
        """Add a request."""
        result = "right" if exception is None else f"{type(exception).__name__}: {exception}"
        row = f"{start_time:.6f}", f"{response_time:.3f}", context["clips"], f"{context['seconds']:.3f}"
        self._rows.writerow([*row, self._environment.runner.user_count, result, f"{context['error']:.2e}"])

    def end(self, **_: Any) -> None:
        """The load has ended: the last row has the share of a core that this process used."""
        busy = (time.process_time() - self._busy) / (time.monotonic() - self._begun)
        self._rows.writerow([f"{time.time():.6f}", "", "", "", "", "generator", f"{busy:.3f}"])
        self._file.flush()


@events.init.add_listener  # type: ignore[untyped-decorator]
def log_requests(environment: Any, **_: Any) -> None:
    """Write the requests of this process to the file of `--requests`."""
    path = environment.parsed_options.requests if environment.parsed_options else ""
    if path and not isinstance(environment.runner, MasterRunner):
        log = RequestLog(environment, path)
        environment.events.test_start.add_listener(log.begin)
        environment.events.request.add_listener(log.write)
        environment.events.test_stop.add_listener(log.end)
