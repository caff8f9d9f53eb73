"""One level of load: Locust in processes of its own, and the figures of its requests."""

from __future__ import annotations

import csv
import math
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .machine import MeasureError
from .scenarios import OPEN_LOOP, Level
from .servers import Server

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
LOOK = 1.0  # s, between two readings of Triton's metrics
DRAIN = 60  # s, at most, for requests in flight at the end
STARTING = 60.0  # s, at most, for Locust to start
FIRST = 0.6  # s of Locust's run time until its first request, on an idle machine
LATE = 0.05  # of the measured time, at most, that may lie after the last reply; else the level is measured again
ATTEMPTS = 3
WINDOW = 2.0  # s, of a point of the ramp
LONGER = {"arrivals": 4, "ramp": 4}  # factor of the seconds of a level
# From samples of a gauge to the figure of a row: the mean load, the largest use of memory.
REDUCE: dict[str, Callable[[list[float]], float]] = {
    "cpu": statistics.fmean,
    "memory_mb": max,
    "gpu": statistics.fmean,
    "gpu_memory_mb": max,
}


class Sent(NamedTuple):
    """A request: its start (seconds since the epoch), latency (s), clips, seconds of audio, clients, result, error."""

    start: float
    latency: float
    clips: int
    audio: float
    users: int
    result: str
    error: float

    @property
    def end(self) -> float:
        """Time of the reply."""
        return self.start + self.latency

    @property
    def right(self) -> bool:
        """Whether the reply holds the expected embeddings."""
        return self.result == "right"


@dataclass
class Round:
    """One measurement of a level.

    Attributes:
        begin: of the measured time, seconds since the epoch; `end` likewise.
        requests: all, from before the beginning to after the end.
        counts: Triton's, of the whole round.
        samples: Triton's gauges within the measured time.
        busy: share of a core that the busiest process of the load generator used.
    """

    begin: float
    end: float
    requests: list[Sent]
    counts: Counter[str] = field(default_factory=Counter)
    samples: list[dict[str, float]] = field(default_factory=list)
    busy: float | None = None


def throughput(level: Level, one: Round) -> tuple[float, float]:
    """Clips and seconds of audio per second.

    In a closed loop every right reply counts, over the time from the first request to the last reply: a server that is
    busy throughout is measured over whole batches, however long they take. In an open loop, replies within the measured
    time count.
    """
    right = [request for request in one.requests if request.right]
    if not right:
        return 0.0, 0.0
    if level.scenario in OPEN_LOOP:
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


def measured(level: Level, rounds: list[Round]) -> dict[str, Any]:
    """The figures of a level over all its rounds."""
    speeds = [throughput(level, one) for one in rounds]
    every = [value for one in rounds for value in latencies(one)]
    percentiles = np.percentile(every, (50, 90, 95, 99)).tolist() if every else [None] * 4
    counts: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    requests = clips = 0
    for one in rounds:
        counts.update(one.counts)
        for sent in one.requests:
            if sent.right and one.begin <= sent.end <= one.end:
                requests, clips = requests + 1, clips + sent.clips
            # A wrong reply counts whenever it came.
            if sent.result.startswith("WrongReply") or one.begin <= sent.start < one.end:
                outcomes[sent.result] += 1
    samples = [sample for one in rounds for sample in one.samples]
    gauges = {key: [sample[key] for sample in samples if key in sample] for key in REDUCE}
    row = {
        "duration_s": sum(one.end - one.begin for one in rounds),
        "requests": requests,
        "clips": clips,
        "clips_per_s": statistics.median(speed for speed, _ in speeds),
        "audio_per_s": statistics.median(speed for _, speed in speeds),
        "audio_per_round": [speed for _, speed in speeds],
        **dict(zip(("p50_ms", "p90_ms", "p95_ms", "p99_ms"), percentiles, strict=True)),
        "wrong": sum(count for name, count in outcomes.items() if name.startswith("WrongReply")),
        "rejected": sum(count for name, count in outcomes.items() if name.startswith("Rejected")),
        "errors": {n.partition(": ")[2]: count for n, count in outcomes.items() if n.startswith("CallFailed")},
        "worst_error": max((sent.error for one in rounds for sent in one.requests if sent.right), default=0.0),
        "mean_batch": counts["inferences"] / counts["executions"] if counts["executions"] > 0 else None,
        "queue_ms": counts["queue_ns"] / counts["requests"] / 1e6 if counts["requests"] > 0 else None,
        "compute_ms": counts["compute_ns"] / counts["requests"] / 1e6 if counts["requests"] > 0 else None,
        "generator_cpu": max((one.busy for one in rounds if one.busy is not None), default=None),
        **{key: REDUCE[key](values) for key, values in gauges.items() if values},
    }
    if level.scenario == "ramp":
        row["windows"] = windows(rounds[0])
    return row


def windows(one: Round) -> list[dict[str, Any]]:
    """A ramp over time, by the replies of each window."""
    found = []
    for number in range(int((one.end - one.begin) / WINDOW)):
        begin = one.begin + number * WINDOW
        came = [sent for sent in one.requests if begin <= sent.end < begin + WINDOW]
        right = [sent for sent in came if sent.right]
        p50, p95 = np.percentile([1e3 * r.latency for r in right], (50, 95)).tolist() if right else (None, None)
        users = max((sent.users for sent in came), default=None)
        speed = sum(sent.clips for sent in right) / WINDOW
        found.append({"t": (number + 0.5) * WINDOW, "users": users, "clips_per_s": speed, "p50_ms": p50, "p95_ms": p95})
    return found


@dataclass(frozen=True)
class Timing:
    """Seconds for which a level is measured and of the warm-up before it; processes of Locust."""

    seconds: float
    warm_up: float
    processes: int = 1

    def of(self, level: Level) -> tuple[float, float]:
        """Seconds of a level and of its warm-up; a ramp has none."""
        return self.seconds * LONGER.get(level.scenario, 1), 0.0 if level.scenario == "ramp" else self.warm_up


def drive(
    level: Level, server: Server, model: str, max_error: float, clips: Path, timing: Timing, rate: float = 0.0
) -> Round:
    """Load a server with Locust.

    Args:
        level: the load.
        server: the server.
        model: the model to call.
        max_error: largest relative L2 distance of a right embedding.
        clips: NPZ of the clips to send; its folder takes the files of Locust.
        timing: duration.
        rate: clips per second, in an open loop.

    Raises:
        MeasureError: Locust failed or the server does not answer.
    """
    log = clips.parent / "requests.csv"
    seconds, warm_up = timing.of(level)
    command = _command(level, server, model, max_error, clips, log, timing, rate)
    run_time = seconds + warm_up + FIRST
    for _ in range(ATTEMPTS):
        before = server.statistics(model)
        requests, busy, samples = _locust(command, run_time, log, server)
        counts = server.statistics(model)
        counts.subtract(before)
        begin = min((request.start for request in requests), default=0.0) + warm_up
        end = begin + seconds
        missing = end - max((request.end for request in requests), default=0.0)
        if missing <= LATE * seconds:
            break
        run_time += missing + 1  # Locust started late, on a busy machine
    if not requests:
        raise MeasureError(f"Locust sent no request in {run_time:.0f} s")
    return Round(begin, end, requests, counts, [gauges for at, gauges in samples if begin <= at < end], busy)


def _locust(
    command: list[str], run_time: float, log: Path, server: Server
) -> tuple[list[Sent], float | None, list[tuple[float, dict[str, float]]]]:
    """Run Locust: its requests, the share of a core of its busiest process, and the server's gauges over time."""
    samples: list[tuple[float, dict[str, float]]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK):
            samples.append((time.time(), server.gauges()))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    words = [*command, "--run-time", f"{math.ceil(run_time)}s"]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=run_time + DRAIN + STARTING)
    except subprocess.TimeoutExpired as error:
        raise MeasureError("Locust did not stop in time") from error
    finally:
        over.set()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        watcher.join()
        files = sorted(log.parent.glob(f"{log.name}.*"))
        requests, busy = read_requests(files)
        for file in files:
            file.unlink()
    if process.returncode != 0:
        errors = [line.strip() for line in output.splitlines() if "rror" in line]
        raise MeasureError(f"Locust: {errors[0] if errors else f'exit status {process.returncode}'}")
    return requests, busy, samples


def _command(
    level: Level, server: Server, model: str, max_error: float, clips: Path, log: Path, timing: Timing, rate: float
) -> list[str]:
    """The command line of Locust without its run time; `rate` is of all clips in an open loop."""
    seconds = sum(timing.of(level))
    users = timing.processes if level.users is None else level.users
    options: dict[str, object] = {
        "host": server.url,
        "scenario": level.scenario,
        "model": model,
        "batch": level.batch,
        "clips": clips,
        "requests": log,
        "max-error": max_error,
        "users": users,
        "spawn-rate": users / seconds if level.scenario == "ramp" else users,
        "stop-timeout": DRAIN,
        "exit-code-on-error": 0,
        "loglevel": "ERROR",
    }
    if level.seconds is not None:
        options["seconds"] = level.seconds
    if level.users is None:
        options["rate"] = rate / users
    if timing.processes > 1:
        options["processes"] = timing.processes
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *words]


def read_requests(files: Iterable[Path]) -> tuple[list[Sent], float | None]:
    """The requests in the files of the locustfile, by start, and the share of a core of its busiest process."""
    requests: list[Sent] = []
    busy: list[float] = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if row["result"] == "generator":
                    busy.append(float(row["error"]))
                elif row["error"]:  # else the last line is incomplete
                    start, latency = float(row["start"]), float(row["latency_ms"]) / 1e3
                    clips, audio, users = int(row["clips"]), float(row["audio_s"]), int(row["users"])
                    requests.append(Sent(start, latency, clips, audio, users, row["result"], float(row["error"])))
    return sorted(requests), max(busy, default=None)
