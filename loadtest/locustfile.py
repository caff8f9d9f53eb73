"""Clients of the server, for Locust: `locust -f loadtest/locustfile.py --host grpc://127.0.0.1:8001`.

The scenario and its details are options, on the command line and in Locust's web page. Without `--clips` the load is
speech of `samples/`, and the expected embeddings are the server's replies to each clip alone, before the load.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # Locust adds the folder of this file alone

import gevent.pool  # noqa: E402
from locust import events, task  # noqa: E402
from locust.exception import StopUser  # noqa: E402
from locust.runners import LocalRunner, MasterRunner  # noqa: E402

from loadtest.clips import MAX_ERROR, Clips, Deck, speech  # noqa: E402
from loadtest.infer import Rejected, Request, Sent, first_replies, make_requests  # noqa: E402
from loadtest.machine import MeasureError  # noqa: E402
from loadtest.scenarios import SCENARIOS, Level, lengths  # noqa: E402
from loadtest.servers import reach  # noqa: E402
from loadtest.triton_user import TritonUser  # noqa: E402

CONNECTIONS = 8  # of a user in the open loop, whose requests do not wait for each other
REJECTED_PAUSE = 0.5  # s, before a client in the closed loop sends again after a rejection


@events.init_command_line_parser.add_listener  # type: ignore[untyped-decorator]
def add_options(parser: Any) -> None:
    """Options of the command line and of the web page."""
    parser.add_argument("--scenario", choices=list(SCENARIOS), default="mixed", help="what clients do")
    parser.add_argument("--model", default="ecapa", help="the model to call")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of each clip in single, batch and clients")
    parser.add_argument("--batch", type=int, default=8, help="clips per request in batch")
    parser.add_argument("--rate", type=float, default=5.0, help="clips per second of each user in arrivals")
    bound = f"largest relative L2 error of a right reply; float16 models need {MAX_ERROR['fp16']:g}"
    parser.add_argument("--max-error", type=float, default=MAX_ERROR["fp32"], help=bound)
    hidden = {"default": "", "include_in_web_ui": False}
    parser.add_argument("--clips", help="NPZ of clips and their embeddings to send in place of speech", **hidden)
    parser.add_argument("--log", help="write each request to FILE.PID, as loadtest.infer.Sent in JSON", **hidden)


class Speaker(TritonUser):
    """Sends the clips of the scenario: the next after each reply, or at a constant rate."""

    deck: Deck[Request]

    def on_start(self) -> None:
        """Connect; the first clip of an open loop is due now."""
        self._options = self.environment.parsed_options
        self._open_loop = SCENARIOS[self._options.scenario].levels[0].users is None
        self.connections = CONNECTIONS if self._open_loop else 1
        super().on_start()
        self._due = time.perf_counter()
        self._in_flight = gevent.pool.Group()

    @task
    def speak(self) -> None:
        """One request."""
        if not self.deck:
            raise StopUser
        if self._open_loop:
            gevent.sleep(max(0.0, self._due - time.perf_counter()))
            self._in_flight.spawn(self.send, self.deck.draw(), self._due)
            self._due += 1 / self._options.rate
        elif isinstance(self.send(self.deck.draw()), Rejected):
            gevent.sleep(REJECTED_PAUSE)

    def on_stop(self) -> None:
        """Wait for the requests in flight, and disconnect."""
        self._in_flight.join()
        super().on_stop()


@events.init.add_listener  # type: ignore[untyped-decorator]
def check_host(environment: Any, runner: Any, web_ui: Any, **_: Any) -> None:
    """Exit at once if the host does not answer, except with a web page, where it can be corrected."""
    if isinstance(runner, LocalRunner) and not web_ui:
        try:
            _reach(environment)
        except MeasureError as error:
            sys.exit(f"error: {error}")


@events.test_start.add_listener  # type: ignore[untyped-decorator]
def prepare(environment: Any, **_: Any) -> None:
    """Make the requests of the scenario and open the log."""
    options = environment.parsed_options
    try:
        _reach(environment)
        if isinstance(environment.runner, MasterRunner):  # its workers send
            return
        Speaker.deck = Deck(_requests(environment.host, options))
    except (MeasureError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        failed = {"request_type": "gRPC", "name": "start", "response_time": 0, "response_length": 0}
        environment.events.request.fire(**failed, exception=error, context={})  # for the web page and the master
        environment.process_exit_code = 1
        Speaker.deck = Deck([])  # its users stop at once
        gevent.spawn_later(0.1, environment.runner.stop if environment.web_ui else environment.runner.quit)
    else:
        if options.log:
            _write_log(environment, f"{options.log}.{os.getpid()}")


def _reach(environment: Any) -> None:
    """Require the server, except where `--clips` come from a load test that did."""
    options = environment.parsed_options
    if not options.clips:
        reach("host", environment.host or "", options.model)


def _requests(host: str, options: Any) -> list[Request]:
    usual = SCENARIOS[options.scenario].levels[0]
    seconds = usual.seconds and options.seconds
    batch = options.batch if options.scenario == "batch" else 1
    if options.clips:
        clips = Clips.load(Path(options.clips))
    else:
        waveforms = speech(lengths(seconds, batch))
        clips = Clips(waveforms, first_replies(host, options.model, waveforms))
    name = str(Level(options.scenario, seconds, batch)).rpartition(",")[0]
    return make_requests(
        options.model, clips.waveforms, clips.embeddings, batch=batch, max_error=options.max_error, name=name
    )


def _write_log(environment: Any, path: str) -> None:
    """Write a line for each request from now on; the file shows that the users start."""
    file = open(path, "w", buffering=1, encoding="utf-8")

    def write(start_time: float, response_time: float, exception: Any, context: Any, **_: Any) -> None:
        result = f"{type(exception).__name__}: {exception}" if exception else "right"
        size, users = (context["clips"], context["seconds"]), environment.runner.user_count
        sent = Sent(start_time, response_time / 1e3, *size, users, result, context["error"], time.process_time())
        file.write(json.dumps(sent) + "\n")

    environment.events.request.add_listener(write)
