"""The whole server under minutes of mixed load: every reply judged, resident memory over time.

Clients over gRPC, over HTTP and with `SpeakerClient` send clips of hundreds of lengths, log-uniform over all that the
model takes, alone and as `[n, samples]`, so that the lengths in a batch are new nearly every time. A small share of the
requests is hostile. Every embedding is compared with SpeechBrain's of that clip alone.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from ecapa_triton.audio import SAMPLE_RATE
from matplotlib.figure import Figure

from export.configs import MODEL, ModelFile
from export.pipeline import export, step
from export.verify import Reference
from server import TritonServer
from tests.faults import hostile
from tests.faults.hostile import LONGEST, Hostile
from tests.faults.judge import ClientSender, Clip, GrpcSender, Sender, Tally, Urls, check_apart

from . import machine
from .arguments import count, positive, share
from .clips import speech
from .contenders import made_from
from .machine import MeasureError

REPOSITORY = Path(__file__).parent.parent / "model_repository"
LENGTHS = 200
EVERY = 5.0  # s, between samples of the memory
IDLE = 3.0  # s, without load before the last sample
MOST_CLIPS, MOST_SAMPLES = 8, 60 * SAMPLE_RATE  # of a request [n, samples]: 3.8 MB, and 200 MB in the model
SHORTEST_JUDGED = 180.0  # s; a shorter run may lack the largest batches
# Memory is level when its median grows by no more than the larger of these from the second third of the load to the
# last: room for random clips, and a leak of 6 MB a minute shows within ten minutes.
GROWTH, GROWTH_BYTES = 0.05, 20e6
# Codes of rejections that a good clip may get; any other is a fault.
EXPECTED = "NaN", "EmbeddingError", "OverloadedError", "DeadlineError", "DEADLINE_EXCEEDED", "TimeoutError"
BREAKS = "cancelled", "disconnected"  # hostile too: the client leaves while its request is in flight
PROCESSES = "tritonserver", "model"  # as TritonServer.memory names them; on a C++ backend the model has none
Row: TypeAlias = dict[str, Any]


def judge_memory(samples: Sequence[tuple[float, float]]) -> tuple[float, float, bool | None]:
    """Medians of the second and the last third of the load, bytes, and whether memory levels off.

    Args:
        samples: seconds since the load began, and bytes.

    Returns:
        None for the verdict on a load that is too short to judge.
    """
    end = samples[-1][0]
    thirds = [[size for at, size in samples if n * end / 3 <= at <= (n + 1) * end / 3] for n in (1, 2)]
    second, last = (statistics.median(third or [samples[-1][1]]) for third in thirds)
    level = last - second <= max(GROWTH * second, GROWTH_BYTES)
    return second, last, level if end >= SHORTEST_JUDGED else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m loadtest soak`."""
    parser.add_argument("--minutes", type=positive, default=10.0, help="minutes of load (default: %(default)g)")
    parser.add_argument("--clients", type=count, default=8, help="clients that send at once (default: %(default)s)")
    hostile = "share of hostile requests, 0 to 1 (default: %(default)s)"
    parser.add_argument("--hostile", type=share, default=0.05, help=hostile)
    device = "device to serve on (default: %(default)s)"
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="cpu", help=device)
    parser.add_argument("--repository", type=Path, metavar="DIR", help="serve the model exported there, not --source")
    parser.add_argument("--source", default="mini", help="checkpoint, as for python -m export (default: %(default)s)")
    channels = "channels of the convolutions, with --source random (default: %(default)s)"
    parser.add_argument("--channels", type=int, default=1024, metavar="N", help=channels)
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
    with tempfile.TemporaryDirectory() as folder:
        repository = options.repository
        if repository is None:
            ignored = shutil.ignore_patterns("*.onnx", "*.pt")
            repository = Path(shutil.copytree(REPOSITORY, Path(folder) / "repository", ignore=ignored))
            export(repository, options.source, channels=options.channels, half=False, int8=False)
        path = repository / MODEL / "1" / "model.onnx"
        metadata = ModelFile.read(path).metadata
        classifier = made_from(metadata).classifier
        longest = round(float(metadata["max_seconds"]) * SAMPLE_RATE)
        with step(f"SpeechBrain's embeddings of clips of {LENGTHS} lengths"):
            pool = make_clips(classifier, int(metadata["min_samples"]), longest)
        bad = hostile.requests(lambda clip: Reference(classifier)("", clip), longest) if options.hostile else {}
        with TritonServer(repository, device=options.device) as server:
            report = machine.describe(
                ("onnxruntime", "nvidia-pytriton", "tritonclient", "numpy"),
                command="python -m loadtest soak",
                device=server.device,
                model=metadata["source"],
                model_bytes=path.stat().st_size,
                clients=options.clients,
                hostile=options.hostile,
            )
            print(f"{report['cpu']}, {report['cores']} cores; {server.chosen}; {report['model']}")
            traffic = MixedTraffic(Urls.of(server), pool, bad, options.hostile)
            samples, figures = watch(server, traffic, 60 * options.minutes, options.clients)
    second, last, level = judge_memory([(sample["seconds"], sample["bytes"]) for sample in samples])
    report |= figures | {"second_third_bytes": second, "last_third_bytes": last, "levels_off": level}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(report, samples, options.plot)
    print(conclusion(report))
    if broken := faults(report):
        raise MeasureError("; ".join(broken))


def make_clips(classifier: Any, shortest: int, longest: int) -> list[list[Clip]]:
    """Two clips of speech of each of LENGTHS lengths, from `shortest` to `longest` samples.

    Raises:
        MeasureError: two clips have embeddings so much alike that an exchange would not be seen.
    """
    reference = Reference(classifier)
    seconds = np.geomspace(shortest, longest, LENGTHS).round() / SAMPLE_RATE
    waveforms = {f"clip {n} of {len(clip)} samples": clip for n, clip in enumerate(speech(list(seconds.repeat(2))))}
    clips = [Clip(name, waveform, reference(name, waveform)) for name, waveform in waveforms.items()]
    check_apart(clips)
    return [clips[n : n + 2] for n in range(0, len(clips), 2)]


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
        self.stop = threading.Event()
        # Else chance decides how many of the longest are in flight at once, and so the memory they take.
        self._one_long = threading.Lock()

    @property
    def requests(self) -> int:
        """That have a reply."""
        return self.good.counts["requests"] + self.hostile.counts["requests"]

    def client(self, number: int) -> None:
        """Send requests until the stop: by its number over gRPC, over HTTP or with `SpeakerClient`.

        Hostile kinds take turns. The longest clip is sent at once, so that its memory is there from the beginning.
        """
        random = np.random.default_rng(number)
        turns = itertools.cycle(random.permutation([*self.bad, *BREAKS]))
        if self.bad and number == 0:
            self._send_hostile(LONGEST, random)
        with self.urls.senders()[number % 3]() as sender:
            while not self.stop.is_set():
                if random.random() < self.share:
                    self._send_hostile(next(turns), random)
                else:
                    self._send_good(sender, random)

    def _send_good(self, sender: Sender, random: np.random.Generator) -> None:
        """A clip, or half the time `[n, samples]` where the client can send that."""
        clips = self._any(random)
        count = 1
        if not isinstance(sender, ClientSender) and random.random() < 0.5:
            count = random.integers(1, min(MOST_CLIPS, max(1, MOST_SAMPLES // len(clips[0].waveform))), endpoint=True)
        chosen = [clips[n] for n in random.integers(len(clips), size=count)]
        rows = np.stack([clip.waveform for clip in chosen])
        self.good.check_batch(chosen, sender.ask(rows if count > 1 else rows[0]))

    def _send_hostile(self, kind: str, random: np.random.Generator) -> None:
        self.hostile.fault()
        waveform = self._any(random)[0].waveform
        if kind == "disconnected":
            with contextlib.suppress(OSError):
                hostile.send_part(self.urls, waveform, waveform.nbytes // 2, reset=True)
        elif kind == "cancelled":
            with GrpcSender(self.urls.grpc) as sender:
                call = sender.start(waveform)
                time.sleep(random.uniform(0, 0.1))
                call.cancel()
        else:
            with self._one_long if kind == LONGEST else contextlib.nullcontext():
                self.hostile.check_batch(self.bad[kind].clips, self.bad[kind].send(self.urls))

    def _any(self, random: np.random.Generator) -> list[Clip]:
        return self.pool[random.integers(len(self.pool))]


def watch(server: TritonServer, traffic: MixedTraffic, seconds: float, clients: int) -> tuple[list[Row], Row]:
    """Run the clients and sample the memory; Ctrl-C ends the load early. Returns the samples and figures."""
    begun = time.monotonic()

    def look() -> Row:
        parts = server.memory()
        at = round(time.monotonic() - begun, 2)
        return {"seconds": at, "requests": traffic.requests, "bytes": sum(parts.values()), **parts}

    samples = [look() | {"seconds": 0.0}]
    ready = samples[0]
    print(f"ready: {ready['bytes'] / 1e6:.0f} MB", flush=True)

    def all_run(sample: Row) -> bool:
        return all(sample[part] for part in PROCESSES if ready[part])

    with ThreadPoolExecutor(clients) as pool:
        begun = time.monotonic()
        futures = [pool.submit(traffic.client, number) for number in range(clients)]
        try:
            while (left := begun + seconds - time.monotonic()) > 0 and not any(future.done() for future in futures):
                time.sleep(min(EVERY, left))
                samples.append(look())
                print("{seconds:5.0f} s  {requests:6d} requests, {bytes:,} bytes".format(**samples[-1]), flush=True)
                if not all_run(samples[-1]):
                    break
        except KeyboardInterrupt:
            print("interrupted: no more load")
        finally:
            traffic.stop.set()
    for future in futures:
        future.result()
    time.sleep(IDLE)
    last = look()
    good, bad = traffic.good, traffic.hostile
    return samples, {
        "ready_bytes": ready["bytes"],
        "largest_bytes": max(sample["bytes"] for sample in samples),
        "idle_bytes": last["bytes"],
        "process_ended": not all_run(last),
        "good_requests": dict(good.counts),
        "hostile_requests": dict(bad.counts),
        "rejections": {"good": dict(good.rejections), "hostile": dict(bad.rejections)},
        "wrong": good.wrong + bad.wrong,
    }


def conclusion(report: Row) -> str:
    """The figures in words."""
    lines = []
    for kind in "good", "hostile":
        counts = ", ".join(f"{number} {name}" for name, number in report[f"{kind}_requests"].items())
        lines.append(f"{kind} requests: {counts or 'none'}; rejected with {report['rejections'][kind]}")
    names = {"ready": "when ready", "largest": "at most", "idle": "after the load"}
    names |= {"second_third": "median of the second third", "last_third": "of the last"}
    sizes = ", ".join(f"{text} {report[f'{name}_bytes'] / 1e6:.0f} MB" for name, text in names.items())
    verdict = {True: "levels off", False: "GROWS", None: f"is not judged in less than {SHORTEST_JUDGED:.0f} s"}
    return "\n".join([*lines, f"memory {verdict[report['levels_off']]}: {sizes}"])


def faults(report: Row) -> list[str]:
    """The promises that were broken."""
    wrong = report["wrong"]
    failed = {code: number for code, number in report["rejections"]["good"].items() if code not in EXPECTED}
    found = [
        (wrong, f"{len(wrong)} embeddings were wrong ({'; '.join(wrong[:3])})"),
        (failed, f"good requests failed: {failed}"),
        (report["process_ended"], "tritonserver or the process of a model ended"),
        (not report["good_requests"].get("right"), "no request got an embedding"),
        (report["levels_off"] is False, "memory grows"),
    ]
    return [message for broken, message in found if broken]


def plot(report: Row, samples: list[Row], path: Path) -> None:
    """Draw memory over time by what holds it and, below, requests per second."""
    minutes = [sample["seconds"] / 60 for sample in samples]
    figure = Figure(figsize=(10, 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    figure.suptitle(
        f"{report['model']}, {report['clients']} clients on {report['device']}, {report['date'][:10]}\n"
        f"{report['cpu']}, {report['cores']} cores; onnxruntime {report['packages']['onnxruntime']}"
    )
    names = {"bytes": "all", "model": "process of the model", "tritonserver": "tritonserver", "shared": "/dev/shm"}
    for name, label in names.items():
        above.plot(minutes, [sample.get(name, 0) / 1e6 for sample in samples], label=label)
    for n, name in (1, "second_third_bytes"), (2, "last_third_bytes"):
        ends = [n * minutes[-1] / 3, (n + 1) * minutes[-1] / 3]
        above.plot(ends, [report[name] / 1e6] * 2, "k--", linewidth=1)
    above.set(ylabel="resident memory, MB; dashed: median of a third", ylim=(0, None))
    above.legend()
    rates = np.diff([sample["requests"] for sample in samples]) / np.diff([sample["seconds"] for sample in samples])
    below.stairs(rates, minutes, baseline=None)
    below.set(xlabel="minutes of load", ylabel="requests / s", ylim=(0, None))
    figure.savefig(path, format="png", dpi=120)
