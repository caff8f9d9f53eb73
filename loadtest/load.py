"""One level of load: Locust in processes of its own, and the figures of its requests."""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from .infer import Sent
from .machine import MeasureError
from .scenarios import Level
from .servers import GAUGES, Server

LOCUST = [sys.executable, "-m", "locust", "-f", str(Path(__file__).parent / "locustfile.py"), "--headless"]
LOOK = 1.0  # s, between two readings of Triton's metrics
STARTING = 60.0  # s, at most, for Locust to start
DRAIN = 60  # s, at most, for requests in flight at the end
WINDOW = 2.0  # s, of a point of the ramp
LONG = 4  # factor of the seconds of a long level


@dataclass
class Round:
    """One measurement of a level."""

    begin: float  # of the measured time, s since the epoch
    end: float
    requests: list[Sent]  # all, from before the beginning to after the end
    counts: Counter[str] = field(default_factory=Counter)  # Triton's, of the whole round
    samples: Sequence[dict[str, float]] = ()  # Triton's gauges within the measured time
    busy: float | None = None  # share of a core that the busiest process of Locust used


def drive(
    level: Level,
    server: Server,
    model: str,
    clips: Path,
    *,
    seconds: float,
    warm_up: float,
    processes: int = 1,
    max_error: float = math.inf,
    rate: float = 0.0,
) -> Round:
    """Load a server with Locust.

    Args:
        level: the load.
        server: the server.
        model: the model to call.
        clips: NPZ of the clips to send.
        seconds: for which it is measured; a long level LONG times as many.
        warm_up: seconds before; a ramp has none.
        processes: of Locust.
        max_error: largest relative L2 distance of a right embedding.
        rate: clips per second of all processes, in an open loop.

    Raises:
        MeasureError: Locust failed or the server does not answer.
    """
    ramp = level.scenario == "ramp"
    seconds *= LONG if level.long else 1
    warm_up = 0.0 if ramp else warm_up
    users = level.users or processes
    words = ["--host", server.url, "--model", model, "--clips", clips, "--max-error", max_error]
    words += ["--scenario", level.scenario, "--batch", level.batch, "--rate", max(rate, 1e-9) / users]
    words += ["--users", users, "--spawn-rate", users / seconds if ramp else users]
    words += ["--processes", processes] if processes > 1 else []
    words += ["--seconds", level.seconds] if level.seconds else []
    before = server.statistics(model)
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        samples, stopped = _locust([*words, "--log", log], log, processes, warm_up + seconds, server.gauges)
        logs = [read_log(path) for path in log.parent.iterdir()]
    requests = sorted(sent for log in logs for sent in log)
    if not requests:
        raise MeasureError("Locust sent no request")
    counts = server.statistics(model)
    counts.subtract(before)
    begin = requests[0].start + warm_up
    end = min(begin + seconds, stopped)
    busy = [(log[-1].cpu - log[0].cpu) / (log[-1].end - log[0].end) for log in logs if len(log) > 1]
    inside = [gauges for at, gauges in samples if begin <= at < end]
    return Round(begin, end, requests, counts, inside, max(busy, default=None))


def _locust(
    words: Sequence[object], log: Path, processes: int, seconds: float, gauges: Callable[[], dict[str, float]]
) -> tuple[list[tuple[float, dict[str, float]]], float]:
    """Run Locust for some seconds after its start; the server's gauges over time, and when it was stopped."""
    limit = math.ceil(STARTING + seconds)  # it ends where this process was killed
    command = [*LOCUST, "--only-summary", "--loglevel=ERROR", "--exit-code-on-error=0", f"--run-time={limit}s"]
    command += [f"--stop-timeout={DRAIN}", *map(str, words)]
    samples = []
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        try:
            while process.poll() is None and len(list(log.parent.iterdir())) < processes:
                time.sleep(0.02)
            over = time.monotonic() + seconds
            while process.poll() is None and (left := over - time.monotonic()) > 0:
                samples.append((time.time(), gauges()))
                time.sleep(min(LOOK, left))
            stopped = time.time()
            process.terminate()
            process.wait(STARTING + DRAIN)
        except subprocess.TimeoutExpired as error:
            raise MeasureError("Locust did not stop in time") from error
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        if process.returncode != 0:
            errors = [line.strip() for line in output if "rror" in line]
            raise MeasureError(f"Locust: {errors[0] if errors else f'exit status {process.returncode}'}")
    return samples, stopped


def read_log(path: Path) -> list[Sent]:
    """The requests that a process of the locustfile wrote."""
    return [Sent(*json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def throughput(level: Level, one: Round) -> tuple[float, float]:
    """Clips and seconds of audio per second.

    In a closed loop every right reply counts, over the time from the first request to the last reply: a server that is
    busy throughout is measured over whole batches, however long they take. In an open loop, replies within the measured
    time count.
    """
    right = [request for request in one.requests if request.right]
    if not right:
        return 0.0, 0.0
    if level.users is None:
        right = [request for request in right if one.begin <= request.end <= one.end]
        took = one.end - one.begin
    else:
        took = max(request.end for request in right) - min(request.start for request in one.requests)
    return sum(request.clips for request in right) / took, sum(request.audio for request in right) / took


def latencies(one: Round) -> list[float]:
    """Milliseconds of the right replies to requests of the measured time."""
    right = [request for request in one.requests if request.right]
    inside = [request for request in right if one.begin <= request.start < one.end]
    # Where requests take longer than the measured time, those in flight.
    return [1e3 * r.latency for r in inside or [r for r in right if r.end > one.begin and r.start < one.end]]


def measured(level: Level, rounds: Sequence[Round]) -> dict[str, Any]:
    """The figures of a level over all its rounds."""
    clips, audio = zip(*(throughput(level, one) for one in rounds), strict=True)
    milliseconds = [value for one in rounds for value in latencies(one)]
    counts = Counter[str]()
    outcomes = Counter[str]()
    for one in rounds:
        counts.update(one.counts)
        for sent in one.requests:
            if sent.result.startswith("WrongReply") or one.begin <= sent.start < one.end:  # a wrong one counts always
                outcomes[sent.result] += 1
    answered = [r for one in rounds for r in one.requests if r.right and one.begin <= r.end <= one.end]
    samples = {key: [s[key] for one in rounds for s in one.samples if key in s] for key, _ in GAUGES.values()}
    row = {
        "duration_s": sum(one.end - one.begin for one in rounds),
        "requests": len(answered),
        "clips": sum(r.clips for r in answered),
        "clips_per_s": statistics.median(clips),
        "audio_per_s": statistics.median(audio),
        "audio_per_round": list(audio),
        **_percentiles(milliseconds, 50, 90, 95, 99),
        "wrong": sum(number for result, number in outcomes.items() if result.startswith("WrongReply")),
        "rejected": sum(number for result, number in outcomes.items() if result.startswith("Rejected")),
        "errors": {r.partition(": ")[2]: number for r, number in outcomes.items() if r.startswith("CallFailed")},
        "worst_error": max((r.error for one in rounds for r in one.requests if r.right), default=0.0),
        "mean_batch": counts["inferences"] / counts["executions"] if counts["executions"] > 0 else None,
        "queue_ms": counts["queue_ns"] / counts["requests"] / 1e6 if counts["requests"] > 0 else None,
        "compute_ms": counts["compute_ns"] / counts["requests"] / 1e6 if counts["requests"] > 0 else None,
        "generator_cpu": max((one.busy for one in rounds if one.busy is not None), default=None),
        **{key: max(v) if key.endswith("_mb") else statistics.fmean(v) for key, v in samples.items() if v},
    }
    if level.scenario == "ramp":
        row["windows"] = _windows(rounds[0])
    return row


def _windows(one: Round) -> list[dict[str, Any]]:
    """A ramp over time, by the replies of each window."""
    windows = []
    for begin in np.arange(one.begin, one.end - WINDOW + 1e-9, WINDOW).tolist():
        replies = [r for r in one.requests if begin <= r.end < begin + WINDOW]
        right = [r for r in replies if r.right]
        windows.append(
            {
                "t": begin - one.begin + WINDOW / 2,
                "users": max((r.users for r in replies), default=None),
                "clips_per_s": sum(r.clips for r in right) / WINDOW,
                **_percentiles([1e3 * r.latency for r in right], 50, 95),
            }
        )
    return windows


def _percentiles(milliseconds: Sequence[float], *percent: int) -> dict[str, float | None]:
    found = np.percentile(milliseconds, percent).tolist() if milliseconds else [None] * len(percent)
    return {f"p{number}_ms": value for number, value in zip(percent, found, strict=True)}
