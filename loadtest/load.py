"""One level of load: Locust in processes of its own, or the model in this one, and the figures of what came back."""

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

from .clips import SAMPLE_RATE, Clips, Deck
from .scenarios import OPEN_LOOP, Level
from .target import Target, gauges

LOCUSTFILE = Path(__file__).parent / "locustfile.py"
LOOK = 1.0  # s, from one look at Triton's metrics to the next
DRAIN = 60  # s, at most, for replies that are under way at the end
STARTING = 60.0  # s, at most, for Locust to start
FIRST = 0.6  # s of Locust's run time until its first request
WINDOW = 2.0  # s, of a point of the ramp
LONGER = {"arrivals": 4, "ramp": 4}  # times the seconds of another level


class LoadError(Exception):
    """There are no figures of a level. The message is one line."""


class Sent(NamedTuple):
    """A request of the load: its start (seconds since the epoch), seconds to the reply, and what came."""

    start: float
    latency: float
    clips: int
    audio: float
    users: int
    result: str
    error: float

    @property
    def end(self) -> float:
        """When the reply came."""
        return self.start + self.latency

    @property
    def right(self) -> bool:
        """Whether it is the embedding."""
        return self.result == "right"


@dataclass
class Round:
    """What came of one level, once.

    Attributes:
        begin: when measuring began, seconds since the epoch; `end` likewise.
        requests: all, from before the beginning to after the end.
        counts: Triton's, of the whole round; None without Triton.
        samples: Triton's gauges, with `t` in seconds from the beginning.
        busy: of one core, that the busiest process of the load generator was.
    """

    begin: float
    end: float
    requests: list[Sent]
    counts: Counter[str] | None = None
    samples: list[dict[str, float]] = field(default_factory=list)
    busy: float | None = None


@dataclass(frozen=True)
class Timing:
    """How long a level is measured, in seconds, after how much load that does not count; processes of Locust."""

    seconds: float
    warm_up: float
    processes: int = 1

    def of(self, level: Level) -> tuple[float, float]:
        """Seconds of a level, and of its warm-up: a ramp is one itself."""
        return self.seconds * LONGER.get(level.scenario, 1), 0.0 if level.scenario == "ramp" else self.warm_up


def command(
    level: Level, target: Target, model: str, max_error: float, clips: Path, requests: Path, timing: Timing, rate: float
) -> list[str]:
    """The command line of Locust for a level; `rate` is of all clips in an open loop."""
    seconds = sum(timing.of(level))
    users = timing.processes if level.users is None else level.users
    words = {
        "host": target.url,
        "scenario": level.scenario,
        "model": model,
        "batch": level.batch,
        "clips": clips,
        "requests": requests,
        "max-error": max_error,
        "users": users,
        "spawn-rate": users / seconds if level.scenario == "ramp" else users,
        "run-time": f"{math.ceil(seconds + FIRST)}s",
        "stop-timeout": DRAIN,
        "exit-code-on-error": 0,
        "loglevel": "ERROR",
    }
    if level.seconds is not None:
        words["seconds"] = level.seconds
    if level.users is None:
        words["rate"] = rate / users
    if timing.processes > 1:
        words["processes"] = timing.processes
    options = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE), "--headless", "--only-summary", *options]


def drive(
    level: Level,
    target: Target,
    model: str,
    max_error: float,
    clips: Path,
    timing: Timing,
    folder: Path,
    rate: float = 0.0,
) -> Round:
    """Load a server.

    Args:
        level: what to do.
        target: the server.
        model: that is asked.
        max_error: relative L2 distance at which an embedding is right.
        clips: NPZ of what to send.
        timing: for how long.
        folder: for the files of Locust.
        rate: clips per second, in an open loop.

    Raises:
        LoadError: Locust failed.
    """
    log = folder / "requests.csv"
    words = command(level, target, model, max_error, clips, log, timing, rate)
    before = target.statistics(model)
    samples: list[dict[str, float]] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(LOOK):
            if found := gauges(target.metrics_url):
                samples.append({"t": time.time(), **found})

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        said, _ = process.communicate(timeout=sum(timing.of(level)) + DRAIN + STARTING)
    except subprocess.TimeoutExpired as error:
        raise LoadError("Locust did not end in time") from error
    finally:
        over.set()
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
        watcher.join()
        files = sorted(folder.glob(f"{log.name}.*"))
        requests, busy = read_requests(files)
        for file in files:
            file.unlink()
    if process.returncode != 0 or not requests:
        lines = [line.strip() for line in said.splitlines() if "rror" in line]
        raise LoadError(f"Locust: {lines[0] if lines else f'exit status {process.returncode}, and no request'}")
    counts = target.statistics(model)
    counts.subtract(before)
    seconds, warm_up = timing.of(level)
    begin = min(request.start for request in requests) + warm_up
    end = begin + seconds
    for sample in samples:
        sample["t"] -= begin
    return Round(begin, end, requests, counts, [sample for sample in samples if sample["t"] >= 0], busy)


def read_requests(files: Iterable[Path]) -> tuple[list[Sent], float | None]:
    """What the locustfile wrote: the requests by start, and of the busiest process how busy it was."""
    requests: list[Sent] = []
    busy: list[float] = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if row["result"] == "generator":
                    busy.append(float(row["error"]))
                elif row["error"]:  # else the last line is not whole
                    requests.append(
                        Sent(
                            float(row["start"]),
                            float(row["latency_ms"]) / 1e3,
                            int(row["clips"]),
                            float(row["audio_s"]),
                            int(row["users"]),
                            row["result"],
                            float(row["error"]),
                        )
                    )
    return sorted(requests), max(busy, default=None)


def in_process(embed: Callable[[list[Any]], Any], clips: Clips, batch: int, timing: Timing) -> Round:
    """Call a model that is loaded here, over and over, with `batch` clips at a time.

    Args:
        embed: from waveforms, float32 `[samples]` each, to embeddings, float32 `[n, E]`.
        clips: to draw from.
        batch: clips of a call.
        timing: for how long.
    """
    deck = Deck(range(len(clips.waveforms)), seed=0)
    requests: list[Sent] = []
    begin = time.time() + timing.warm_up
    end = begin + timing.seconds
    while (start := time.time()) < end:
        drawn = [deck.draw() for _ in range(batch)]
        rows = embed([clips.waveforms[number] for number in drawn])
        took = time.time() - start
        for number, row in zip(drawn, rows, strict=True):
            right = clips.embeddings[number]
            error = float(np.linalg.norm(row - right) / np.linalg.norm(right))
            audio = len(clips.waveforms[number]) / SAMPLE_RATE
            requests.append(Sent(start, took, 1, audio, 1, "right", error))
    return Round(begin, end, requests)


def rates(level: Level, one: Round) -> tuple[float, float]:
    """Clips and seconds of audio per second.

    In a closed loop all that was answered counts, over the time from the first request to the last reply: a server that
    has work all along is measured over whole batches, however long they take. In an open loop, what came between
    beginning and end.
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
    """Milliseconds of the right replies to what was sent between beginning and end."""
    right = [request for request in one.requests if request.right]
    inside = [request for request in right if one.begin <= request.start < one.end]
    # Where requests take longer than is measured, those that were under way.
    return [1e3 * r.latency for r in inside or [r for r in right if r.end > one.begin and r.start < one.end]]


def figures(level: Level, rounds: list[Round]) -> dict[str, Any]:
    """The figures of a level, over all its rounds, as `python -m loadtest report` reads them."""
    speeds, per_round = [], []
    every: list[float] = []
    samples: list[dict[str, float]] = []
    outcomes: Counter[str] = Counter()
    clips = requests = 0
    audio = worst = 0.0  # over what was answered rightly
    counts: Counter[str] = Counter()
    elapsed = 0.0
    for one in rounds:
        clips_per_s, audio_per_s = rates(level, one)
        took = latencies(one)
        every += took
        p50, p95 = np.percentile(took, (50, 95)).tolist() if took else (None, None)
        speeds.append((clips_per_s, audio_per_s))
        per_round.append({"clips_per_s": clips_per_s, "audio_per_s": audio_per_s, "p50_ms": p50, "p95_ms": p95})
        for request in one.requests:
            if request.right:
                worst = max(worst, request.error)
            elif not request.result.startswith("WrongReply") and not one.begin <= request.start < one.end:
                continue
            if request.right and one.begin <= request.end <= one.end:
                requests, clips, audio = requests + 1, clips + request.clips, audio + request.audio
            outcomes[request.result] += 1
        if one.counts is not None:
            counts.update(one.counts)
        samples += [{**sample, "t": round(elapsed + sample["t"], 2)} for sample in one.samples]
        elapsed += one.end - one.begin
    percentiles = np.percentile(every, (50, 90, 95, 99, 100)).tolist() if every else [None] * 5
    wrong = sum(count for name, count in outcomes.items() if name.startswith("WrongReply"))
    refused = sum(count for name, count in outcomes.items() if name.startswith("Refused"))
    failed = {name: count for name, count in outcomes.items() if name.startswith("CallFailed")}
    row = {
        "loop": "open" if level.scenario in OPEN_LOOP else "closed",
        "duration_s": elapsed,
        "requests": requests,
        "clips": clips,
        "audio_s": audio,
        "clips_per_s": statistics.median(speed for speed, _ in speeds),
        "audio_per_s": statistics.median(speed for _, speed in speeds),
        **dict(zip(("p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms"), percentiles, strict=True)),
        "wrong": wrong,
        "refused": refused,
        "errors": {name.partition(": ")[2]: count for name, count in failed.items()},
        "worst_error": worst,
        "mean_batch": counts["inferences"] / counts["executions"] if counts["executions"] > 0 else None,
        "queue_ms": counts["queue_ns"] / counts["requests"] / 1e6 if counts["requests"] > 0 else None,
        "compute_ms": counts["compute_ns"] / counts["requests"] / 1e6 if counts["requests"] > 0 else None,
        "generator_cpu": max((one.busy for one in rounds if one.busy is not None), default=None),
        "per_round": per_round,
        "samples": samples,
    }
    if level.scenario == "ramp":
        row["windows"] = windows(rounds[0])
    return row


def windows(one: Round) -> list[dict[str, Any]]:
    """A ramp over time, by the replies that came in each window."""
    found = []
    for number in range(int((one.end - one.begin) / WINDOW)):
        begin = one.begin + number * WINDOW
        came = [r for r in one.requests if begin <= r.end < begin + WINDOW]
        right = [r for r in came if r.right]
        p50, p95 = np.percentile([1e3 * r.latency for r in right], (50, 95)).tolist() if right else (None, None)
        found.append(
            {
                "t": (number + 0.5) * WINDOW,
                "users": max((r.users for r in came), default=None),
                "clips_per_s": sum(r.clips for r in right) / WINDOW,
                "p50_ms": p50,
                "p95_ms": p95,
            }
        )
    return found
