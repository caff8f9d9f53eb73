"""What users of the server do, for Locust: `locust -f loadtest/locustfile.py --host grpc://127.0.0.1:8001`.

The scenario and its details are options, on the command line and in Locust's web page. Without `--clips`, speech of
`samples/` is sent, and the reply to a clip that travelled alone, before the load, is what it must come back as.
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
import numpy as np  # noqa: E402
from locust import events, task  # noqa: E402
from locust.exception import StopUser  # noqa: E402
from locust.runners import MasterRunner  # noqa: E402

from loadtest import scenarios  # noqa: E402
from loadtest.clips import MAX_ERROR, Array, Clips, ClipsError, Deck, speech  # noqa: E402
from loadtest.target import SCHEME  # noqa: E402
from loadtest.triton_user import (  # noqa: E402
    REFUSED_PAUSE,
    CallFailed,
    Connection,
    Refused,
    Request,
    TritonUser,
    WrongReply,
    make_requests,
)

CONNECTIONS = 8  # of a user in the open loop, whose requests do not wait for each other
COLUMNS = ["start", "latency_ms", "clips", "audio_s", "users", "result", "error"]


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    """Options of the command line and of the web page."""
    parser.add_argument("--scenario", choices=list(scenarios.SCENARIOS), default="mixed", help="what users do")
    parser.add_argument("--model", default="ecapa", help="that is asked")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each clip, in single, batch and clients")
    parser.add_argument("--batch", type=int, default=8, help="clips in a request, in batch")
    parser.add_argument("--rate", type=float, default=5.0, help="clips per second of each user, in arrivals")
    told = f"relative L2 distance of a right reply; a float16 model needs {MAX_ERROR['fp16']:g}"
    parser.add_argument("--max-error", type=float, default=MAX_ERROR["fp32"], help=told)
    unseen = {"default": "", "include_in_web_ui": False}
    parser.add_argument("--clips", help="NPZ of clips to send and their embeddings, in place of speech", **unseen)
    parser.add_argument("--requests", help="write a row of CSV for each request into FILE.PID", **unseen)


class Speaker(TritonUser):
    """Sends the scenario's clips, each when the last reply has come, or at a constant rate whatever comes."""

    deck: Deck[Request]

    def on_start(self) -> None:
        """Connect; the first clip of an open loop is due now."""
        options = self.environment.parsed_options
        self.connections = CONNECTIONS if options.scenario in scenarios.OPEN_LOOP else 1
        super().on_start()
        self._due = time.perf_counter()
        self._under_way = gevent.pool.Group()

    @task
    def speak(self) -> None:
        """One request."""
        if not self.deck:
            raise StopUser
        options = self.environment.parsed_options
        if options.scenario not in scenarios.OPEN_LOOP:
            if isinstance(self.send(self.deck.draw()), Refused):
                gevent.sleep(REFUSED_PAUSE)
            return
        gevent.sleep(max(0.0, self._due - time.perf_counter()))
        self._under_way.spawn(self.send, self.deck.draw(), self._due)
        self._due += 1 / options.rate

    def on_stop(self) -> None:
        """Wait for what is under way, and disconnect."""
        self._under_way.join()
        super().on_stop()


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def prepare(environment: Any, **_: Any) -> None:
    """Make the requests that the scenario sends."""
    if isinstance(environment.runner, MasterRunner):  # its workers send
        return
    options = environment.parsed_options
    try:
        Speaker.deck = _deck(environment.host or "", options)
    except (ClipsError, CallFailed, Refused, WrongReply, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        environment.process_exit_code = 1
        Speaker.deck = Deck([])  # its users end at once
        gevent.spawn_later(0.1, environment.runner.stop if environment.web_ui else environment.runner.quit)


def _deck(host: str, options: Any) -> Deck[Request]:
    if not host.startswith(SCHEME):
        raise ValueError(f"host is {host!r}, expected {SCHEME}HOST:PORT, such as {SCHEME}127.0.0.1:8001")
    for name, value in ("seconds", options.seconds), ("batch", options.batch), ("rate", options.rate):
        if not value > 0:
            raise ValueError(f"{name} is {value:g}, expected more than 0")
    mixed = options.scenario in ("mixed", "arrivals", "ramp")
    seconds, batch = None if mixed else options.seconds, options.batch if options.scenario == "batch" else 1
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
    return Deck(requests)


def first_replies(host: str, model: str, waveforms: list[Array]) -> Array:
    """The embedding of each clip alone, float32 `[n, E]`."""
    connection = Connection(host)
    try:
        return np.concatenate([connection.embed(one.body) for one in make_requests(model, waveforms, None)])
    finally:
        connection.close()


class RequestLog:
    """A row of CSV for each request; each process of Locust has a file of its own: FILE.PID."""

    def __init__(self, environment: Any, path: str) -> None:
        self._environment = environment
        self._file: TextIO = open(f"{path}.{os.getpid()}", "w", newline="", encoding="utf-8")
        self._rows = csv.writer(self._file)
        self._rows.writerow(COLUMNS)
        self._begun, self._busy = time.monotonic(), time.process_time()

    def write(
        self, start_time: float, response_time: float, exception: Exception | None, context: Any, **_: Any
    ) -> None:
        """Add a request."""
        result = "right" if exception is None else f"{type(exception).__name__}: {exception}"
        row = f"{start_time:.6f}", f"{response_time:.3f}", context["clips"], f"{context['seconds']:.3f}"
        users = self._environment.runner.user_count
        self._rows.writerow([*row, users, result, f"{context['error']:.2e}"])

    def begin(self, **_: Any) -> None:
        """The load begins."""
        self._begun, self._busy = time.monotonic(), time.process_time()

    def end(self, **_: Any) -> None:
        """The load has ended: the last row says for how much of the time this process was busy."""
        busy = (time.process_time() - self._busy) / (time.monotonic() - self._begun)
        self._rows.writerow([f"{time.time():.6f}", "", "", "", "", "generator", f"{busy:.3f}"])
        self._file.flush()


@events.init.add_listener  # type: ignore[untyped-decorator]
def log_requests(environment: Any, **_: Any) -> None:
    """Write the requests of this process where `--requests` says."""
    path = environment.parsed_options.requests if environment.parsed_options else ""
    if path and not isinstance(environment.runner, MasterRunner):
        log = RequestLog(environment, path)
        environment.events.test_start.add_listener(log.begin)
        environment.events.request.add_listener(log.write)
        environment.events.test_stop.add_listener(log.end)
