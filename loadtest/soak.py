"""The whole server under minutes of mixed load: every reply judged, resident memory over time.

Clients over gRPC, over HTTP and with `SpeakerClient` send clips of hundreds of lengths, log-uniform over all that the
model takes: alone, as `[n, samples]` and several in flight, so that the lengths in a batch are new nearly every time. A
small share of the requests is hostile. Every embedding is compared with SpeechBrain's of that clip alone.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import itertools
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from ecapa_triton.audio import SAMPLE_RATE
from tritonclient.grpc import InferenceServerClient

from export import checkpoint
from export.artifacts import ExportedModel, write_onnx
from export.configs import MODEL
from export.packed import PackedEcapa
from export.pipeline import step
from export.verify import Reference, clip_groups
from server import TritonServer

from . import hostile, machine
from .arguments import count, positive, share
from .clips import Array
from .contenders import made_from
from .hostile import LONGEST, Hostile
from .judge import ClientSender, Clip, GrpcSender, Outcome, Rejection, Sender, Tally, Urls, check_apart
from .machine import MeasureError

REPOSITORY = Path(__file__).parent.parent / "model_repository"
LENGTHS = 300
EVERY = 2.0  # s, between samples of the memory
PROGRESS = 10.0  # s, between lines of progress
IDLE = 3.0  # s, without load before the last sample
# Of a request [n, samples], where the config takes as many: a minute is 3.8 MB, and a batch of 200 MB in the model.
MOST_CLIPS, MOST_SAMPLES = 8, 60 * SAMPLE_RATE
SHORTEST_JUDGED = 180.0  # s; a shorter run may lack the largest batches
# Memory is level when its median grows by no more than the larger of these from the second third of the load to the
# last: room for random clips, and a leak of 6 MB a minute shows within ten minutes.
GROWTH, GROWTH_BYTES = 0.05, 20e6
# Codes of rejections that a good clip may get; any other is a fault.
EXPECTED = "NaN", "EmbeddingError", "OverloadedError", "DeadlineError", "DEADLINE_EXCEEDED", "TimeoutError"
BREAKS = "cancelled", "closed", "disconnected"  # hostile too: the client leaves while its request is in flight
Row: TypeAlias = dict[str, Any]

PROCESSES = "tritonserver", "model"  # as TritonServer.memory names them; on a C++ backend the model has none


@dataclass(frozen=True)
class Verdict:
    """Whether memory levels off: the medians of the second and the last third of the load, bytes."""

    seconds: float
    second_third: float
    last_third: float

    @property
    def levels_off(self) -> bool | None:
        """None: too short to judge."""
        if self.seconds < SHORTEST_JUDGED:
            return None
        return self.last_third - self.second_third <= max(GROWTH * self.second_third, GROWTH_BYTES)

    def __str__(self) -> str:
        growth = self.last_third - self.second_third
        words = {True: "levels off", False: "GROWS", None: f"not judged in less than {SHORTEST_JUDGED:.0f} s"}
        return (
            f"memory {words[self.levels_off]}: median of the last third {self.last_third / 1e6:.0f} MB, of the second "
            f"{self.second_third / 1e6:.0f} MB ({growth / 1e6:+.0f} MB; level is up to {GROWTH:.0%} or "
            f"{GROWTH_BYTES / 1e6:.0f} MB more)"
        )


def judge_memory(samples: Sequence[tuple[float, float]]) -> Verdict:
    """Compare the last two thirds of the load; `samples` are (seconds since it began, bytes)."""
    end = samples[-1][0]
    thirds = [[size for at, size in samples if n * end / 3 <= at <= (n + 1) * end / 3] for n in (1, 2)]
    second, last = (statistics.median(third or [samples[-1][1]]) for third in thirds)
    return Verdict(end, second, last)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m loadtest soak`."""
    parser.add_argument("--minutes", type=positive, default=10.0, help="of load (default: %(default)g)")
    parser.add_argument("--clients", type=count, default=8, help="that send at once (default: %(default)s)")
    parser.add_argument("--hostile", type=share, default=0.05, help="share of the requests (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="cpu", help="default: %(default)s")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="serve the model exported there, not --source")
    parser.add_argument("--source", default="mini", help="as for python -m export (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=1024, help="of --source random (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw memory over time there, a PNG")


def run(options: argparse.Namespace) -> None:
    """Serve the model, load it, print progress, write `options.json` and `options.plot`, judge.

    Raises:
        MeasureError: an embedding was wrong, a good clip failed, a process ended, or memory grows.
    """
    for path in filter(None, [options.json, options.plot]):  # a bad path must not cost minutes of load
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise MeasureError("--plot needs matplotlib: pip install -e '.[loadtest]'")
    with tempfile.TemporaryDirectory() as folder:
        repository = options.repository or Path(folder) / "repository"
        path = repository / MODEL / "1" / "model.onnx"
        if options.repository:
            loaded = made_from(ExportedModel(path).metadata)
        else:
            loaded = checkpoint.load(options.source, channels=options.channels)
            shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("*.onnx", "*.pt"))
            path.parent.mkdir(exist_ok=True)
            with step("write ONNX"):
                write_onnx(PackedEcapa(loaded), loaded, path)
        model = ExportedModel(path)
        shortest, longest = model.min_samples, model.max_samples
        del model
        with step(f"SpeechBrain's embeddings of clips of {LENGTHS} lengths"):
            pool = make_clips(loaded.classifier, shortest, longest, LENGTHS)
        bad = hostile.requests(lambda clip: Reference(loaded.classifier)("", clip), longest) if options.hostile else {}
        with TritonServer(repository, device=options.device) as server:
            report = machine.describe(
                ("onnxruntime", "nvidia-pytriton", "tritonclient", "numpy"),
                command="python -m loadtest soak",
                device=server.device,
                model=loaded.source,
                model_bytes=path.stat().st_size,
                clients=options.clients,
                hostile=options.hostile,
            )
            print(
                f"{report['cpu']}, {report['cores']} cores; {server.chosen}; {loaded.source}, "
                f"{report['model_bytes'] / 1e6:.0f} MB; {report['clients']} clients"
            )
            traffic = MixedTraffic(Urls.of(server), pool, bad, options.hostile)
            samples, figures = watch(server, traffic, 60 * options.minutes, report["clients"])
    verdict = judge_memory([(sample["seconds"], sample["bytes"]) for sample in samples])
    report |= figures | {
        "second_third_bytes": verdict.second_third,
        "last_third_bytes": verdict.last_third,
        "levels_off": verdict.levels_off,
        "minutes": by_minute(samples),
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(report, samples, options.plot)
    _conclude(report, verdict)
    for written in filter(None, [options.json, options.plot]):
        print(f"wrote {written}")
    if faults := _faults(report, verdict):
        raise MeasureError("; ".join(faults))


def make_clips(classifier: Any, shortest: int, longest: int, lengths: int) -> list[list[Clip]]:
    """Speech of `samples/`, cut anywhere, under noise: ascending lengths in samples, two clips of every fourth.

    Raises:
        MeasureError: two clips have embeddings so much alike that an exchange would not be seen.
    """
    random = np.random.default_rng(0)
    speech = np.concatenate(list(clip_groups(shortest, longest, seed=0)["samples/"].values()))
    reference = Reference(classifier)

    def clip(name: str, samples: int) -> Clip:
        cut: Array = np.take(speech, np.arange(samples) + random.integers(len(speech)), mode="wrap")
        waveform = cut + random.standard_normal(samples).astype(np.float32) * 10 ** random.uniform(-4, -1)
        return Clip(name, waveform, reference(name, waveform))

    sizes = np.geomspace(shortest, longest, lengths).round().astype(int)
    pool = [
        [clip(f"clip {n}.{row} of {size} samples", size) for row in range(2 if n % 4 == 3 else 1)]
        for n, size in enumerate(sizes)
    ]
    check_apart(list(itertools.chain(*pool)))
    return pool


class MixedTraffic:
    """Clients of every kind, and tallies of their good and hostile requests.

    Args:
        urls: of the server.
        pool: clips by length.
        bad: hostile requests by name.
        share: of the requests that are hostile.
    """

    def __init__(self, urls: Urls, pool: list[list[Clip]], bad: dict[str, Hostile], share: float) -> None:
        self.urls, self.pool, self.bad, self.share = urls, pool, bad, share
        every = list(itertools.chain(*pool))
        self.good, self.hostile = Tally(every), Tally(every)
        self.errors: Counter[str] = Counter()  # messages that a good clip must not get
        self.stop = threading.Event()
        # Else chance decides how many of the longest are in flight at once, and so the memory they take.
        self._one_long, self._lock = threading.Lock(), threading.Lock()
        with InferenceServerClient(urls.grpc) as triton:
            self._max_batch: int = triton.get_model_config(MODEL).config.max_batch_size

    @property
    def requests(self) -> int:
        """That have a reply."""
        return self.good.counts["requests"] + self.hostile.counts["requests"]

    def client(self, number: int) -> None:
        """Send requests until the stop: by its number over gRPC, over HTTP or with `SpeakerClient`.

        Hostile kinds take turns; the longest clip comes at once, so that its memory is there from the beginning.
        """
        random = np.random.default_rng(number)
        kinds = [*self.bad, *BREAKS]
        first = kinds.index(LONGEST) + 7 * number if self.bad else 0
        turns = itertools.cycle(kinds[first % len(kinds) :] + kinds[: first % len(kinds)])
        connect = self.urls.senders()[number % 3]
        with connect() as sender:
            if self.bad:
                self._send_hostile(next(turns), random)
            while not self.stop.is_set():
                if random.random() < self.share:
                    self._send_hostile(next(turns), random)
                else:
                    self._send_good(sender, random)

    def _send_good(self, sender: Sender, random: np.random.Generator) -> None:
        """One to four clips in flight together, or a request of one length with as many clips as the limits allow."""
        if isinstance(sender, ClientSender):
            chosen = [self._any(random)[0] for _ in range(random.integers(1, 4, endpoint=True))]
            for clip, outcome in zip(chosen, sender.ask_many([clip.waveform for clip in chosen]), strict=True):
                self._check([clip], outcome)
            return
        clips = self._any(random)
        most = min(self._max_batch, MOST_CLIPS, max(1, MOST_SAMPLES // len(clips[0].waveform)))
        count = 1 if len(clips) == 1 else random.integers(1, most, endpoint=True)
        chosen = [clips[n] for n in random.integers(len(clips), size=count)]
        self._check(chosen, sender.ask(np.stack([clip.waveform for clip in chosen])))

    def _check(self, clips: Sequence[Clip], outcome: Outcome) -> None:
        self.good.check_batch(clips, outcome)
        if isinstance(outcome, Rejection) and outcome.code not in EXPECTED:
            with self._lock:
                self.errors[f"{outcome.code} {outcome.message}"[:200]] += 1

    def _send_hostile(self, kind: str, random: np.random.Generator) -> None:
        self.hostile.fault()
        if kind not in BREAKS:
            with self._one_long if kind == LONGEST else contextlib.nullcontext():
                outcome = self.bad[kind].send(self.urls)
            self.hostile.check_batch(self.bad[kind].clips, outcome)
            return
        waveform = self._any(random)[0].waveform
        if kind == "disconnected":
            with contextlib.suppress(OSError):
                hostile.send_part(self.urls, waveform, waveform.nbytes // 2, reset=True)
            return
        with GrpcSender(self.urls.grpc) as sender:  # which closes the connection
            call = sender.start(waveform)
            if kind == "cancelled":
                time.sleep(random.uniform(0, 0.1))
                call.cancel()

    def _any(self, random: np.random.Generator) -> list[Clip]:
        return self.pool[random.integers(len(self.pool))]


def watch(server: TritonServer, traffic: MixedTraffic, seconds: float, clients: int) -> tuple[list[Row], Row]:
    """Run the clients and sample the memory; Ctrl-C ends the load early. Returns the samples and figures."""
    begun = time.monotonic()
    samples: list[Row] = []

    def look() -> Row:
        parts = server.memory()
        at = round(time.monotonic() - begun, 2)
        return {"seconds": at, "requests": traffic.requests, "bytes": sum(parts.values()), **parts}

    loaded = look()
    print(f"ready: {loaded['bytes'] / 1e6:.0f} MB", flush=True)
    shown = 0.0
    with ThreadPoolExecutor(clients) as pool:
        begun = time.monotonic()
        futures = [pool.submit(traffic.client, number) for number in range(clients)]
        try:
            while (elapsed := time.monotonic() - begun) < seconds and not any(future.done() for future in futures):
                time.sleep(min(EVERY, seconds - elapsed))
                samples.append(look())
                if elapsed - shown > PROGRESS:
                    shown = elapsed
                    _print_progress(samples[-1], traffic)
                if not all(samples[-1][part] for part in PROCESSES if loaded[part]):
                    break
        except KeyboardInterrupt:
            print("interrupted: no more load")
        finally:
            traffic.stop.set()
    for future in futures:
        future.result()
    time.sleep(IDLE)
    last = look()
    return [loaded | {"seconds": 0.0}, *samples], {
        "ready_bytes": loaded["bytes"],
        "largest_bytes": max(sample["bytes"] for sample in [loaded, *samples]),
        "idle_bytes": last["bytes"],
        "process_ended": not all(last[part] for part in PROCESSES if loaded[part]),
        "good_requests": dict(traffic.good.counts),
        "hostile_requests": dict(traffic.hostile.counts),
        "rejections": {"good": dict(traffic.good.rejections), "hostile": dict(traffic.hostile.rejections)},
        "wrong": traffic.good.wrong + traffic.hostile.wrong,
        "errors": dict(traffic.errors),
    }


def by_minute(samples: Sequence[Row]) -> list[Row]:
    """Replies and median bytes of each minute."""
    minutes, replies = [], 0
    for minute, group in itertools.groupby(samples, key=lambda sample: int(sample["seconds"] // 60)):
        *_, last = found = list(group)
        middle = statistics.median(sample["bytes"] for sample in found)
        minutes.append({"minute": minute, "requests": last["requests"] - replies, "bytes": round(middle)})
        replies = last["requests"]
    return minutes


def _print_progress(sample: Row, traffic: MixedTraffic) -> None:
    minutes, seconds = divmod(round(sample["seconds"]), 60)
    wrong = len(traffic.good.wrong) + len(traffic.hostile.wrong)
    print(
        f"{minutes:3d}:{seconds:02d}  {sample['requests']:6d} requests, {wrong} wrong, {sample['bytes'] / 1e6:.0f} MB",
        flush=True,
    )


def _conclude(report: Row, verdict: Verdict) -> None:
    good: Counter[str] = Counter(report["good_requests"])
    bad: Counter[str] = Counter(report["hostile_requests"])
    print(
        f"in {verdict.seconds:.0f} s {good['requests']} good requests: {good['right']} right, {good['wrong']} wrong, "
        f"{good['rejected']} rejected ({', '.join(report['rejections']['good']) or 'none'}); {bad['faults']} hostile "
        f"ones: {bad['right']} right, {bad['rejected']} rejected, {bad['wrong']} wrong\n"
        f"memory: {report['ready_bytes'] / 1e6:.0f} MB when ready, at most {report['largest_bytes'] / 1e6:.0f} MB "
        f"under load, {report['idle_bytes'] / 1e6:.0f} MB {IDLE:g} s after it\n{verdict}"
    )


def _faults(report: Row, verdict: Verdict) -> list[str]:
    """The promises that were broken."""
    wrong, errors = report["wrong"], report["errors"]
    faults = [
        (bool(wrong), f"{len(wrong)} embeddings were wrong ({'; '.join(wrong[:3])})"),
        (bool(errors), f"{sum(errors.values())} good requests failed ({'; '.join([*errors][:3])})"),
        (report["process_ended"], "tritonserver or the process of a model ended"),
        (not report["good_requests"].get("right"), "no request got an embedding"),
        (verdict.levels_off is False, "memory grows"),
    ]
    return [message for broken, message in faults if broken]


def plot(report: Row, samples: list[Row], path: Path) -> None:
    """Draw memory over time by what holds it and, below, requests per second."""
    from matplotlib.figure import Figure  # an extra of its own

    minutes = [sample["seconds"] / 60 for sample in samples]
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    figure.suptitle(
        f"{report['model']}, {report['clients']} clients on {report['device']}, {report['date'][:10]}\n"
        f"{report['cpu']}, {report['cores']} cores; onnxruntime {report['packages']['onnxruntime']}"
    )
    names = {
        "bytes": "all",
        "model": "process of the model",
        "tritonserver": "tritonserver",
        "shared": "shared memory (/dev/shm)",
    }
    for name, label in names.items():
        if name in samples[0]:
            sizes = [sample.get(name, 0) / 1e6 for sample in samples]
            above.plot(minutes, sizes, label=label, linewidth=1.8 if name == "bytes" else 1)
    for n, name in (1, "second_third_bytes"), (2, "last_third_bytes"):
        ends = [n * minutes[-1] / 3, (n + 1) * minutes[-1] / 3]
        above.plot(ends, [report[name] / 1e6] * 2, "k--", linewidth=1, label="median of a third" if n == 1 else None)
    above.set(ylabel="resident memory, MB", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=5)
    spans = [(a, b) for a, b in zip(samples, samples[1:], strict=False) if b["seconds"] > a["seconds"]]
    rates = [(b["requests"] - a["requests"]) / (b["seconds"] - a["seconds"]) for a, b in spans]
    below.stairs(rates, [minutes[0], *(b["seconds"] / 60 for _, b in spans)], baseline=None)
    below.set(xlabel="minutes of load", ylabel="requests / s", ylim=(0, None), xlim=(0, minutes[-1]))
    for axes in above, below:
        axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
