"""The whole server under minutes of mixed load: every reply checked, resident memory over time.

Clients send clips of hundreds of lengths, log-uniform over all that the model takes, alone, as `[n, samples]` (up to 8
clips and a minute of audio) and many in flight, with raw gRPC and with `SpeakerClient`; the lengths that meet in a
batch are new nearly every time. A small share of the requests is hostile. Every embedding is compared with
SpeechBrain's of that clip alone, computed beforehand: one that is another clip's, or any where there is none, is wrong.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import shutil
import socket
import statistics
import struct
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from ecapa_triton import DeadlineError, EcapaError, EmbeddingError, OverloadedError, SpeakerClient
from ecapa_triton.audio import SAMPLE_RATE
from ecapa_triton.errors import from_grpc
from numpy.typing import NDArray
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from export import checkpoint
from export.__main__ import step
from export.artifacts import OnnxModel, write_onnx
from export.configs import MODEL
from export.packed import PackedEcapa
from export.verify import MAX_ERROR, Reference, VerificationError, clip_groups, difference
from server.triton import TritonServer

from . import machine

REPOSITORY = Path(__file__).parent.parent / "model_repository"
LENGTHS = 300
TIMEOUT = 60.0  # s, of a request
EVERY = 2.0  # s, from one look at the memory to the next
SAY = 10.0  # s, from one line of progress to the next
IDLE = 3.0  # s, without load before the last look
TEN_MINUTES = 600 * SAMPLE_RATE  # samples
# Of a request [n, samples], where the config takes as many: a minute is 3.8 MB, and a batch of 200 MB in the model.
MOST_CLIPS, MOST_SAMPLES = 8, 60 * SAMPLE_RATE
SHORTEST_JUDGED = 180.0  # s; in less the largest batches have not all come
# Memory is level when its median grows by no more than the larger of these from the second third of the load to the
# last: room for the clips that happen to come, and a leak of 6 MB a minute shows within ten minutes.
GROWTH, GROWTH_BYTES = 0.05, 20e6
HOSTILE = ("empty", "one sample", "NaN", "1e30", "ten minutes", "wrong type", "cancelled", "closed", "disconnected")
TO_BE_EXPECTED = (OverloadedError, DeadlineError, EmbeddingError)  # of a good clip: an error, and it says so

PROCESSES = "tritonserver", "model"  # as TritonServer.memory names them; on a C++ backend the model has none

Array = NDArray[np.float32]


class SoakError(Exception):
    """The server did not hold what it promises; the message says in what."""


@dataclass(frozen=True)
class Clips:
    """Waveforms of one length, float32 `[n, samples]` at 16 kHz, and SpeechBrain's embedding of each, `[n, E]`."""

    waveforms: Array
    embeddings: Array


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
        words = {True: "levels off", False: "GROWS", None: f"under {SHORTEST_JUDGED:.0f} s is too short to judge"}
        return (
            f"memory {words[self.levels_off]}: median of the last third {self.last_third / 1e6:.0f} MB, of the second "
            f"{self.second_third / 1e6:.0f} MB ({growth / 1e6:+.0f} MB; level is up to {GROWTH:.0%} or "
            f"{GROWTH_BYTES / 1e6:.0f} MB more)"
        )


def judge(samples: Sequence[tuple[float, float]]) -> Verdict:
    """Compare the last two thirds of the load; `samples` are (seconds since it began, bytes)."""
    end = samples[-1][0]
    thirds = [[size for at, size in samples if n * end / 3 <= at <= (n + 1) * end / 3] for n in (1, 2)]
    second, last = (statistics.median(third or [samples[-1][1]]) for third in thirds)
    return Verdict(end, second, last)


def run(options: argparse.Namespace) -> None:
    """Serve the model, load it, print a line now and then, write `options.json` and `options.plot`, judge.

    Raises:
        SoakError: an embedding was wrong, a good clip failed, a process ended, or memory grows.
    """
    for path in filter(None, [options.json, options.plot]):  # a bad path costs nobody minutes of load
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise SoakError("--plot needs matplotlib: pip install -e '.[loadtest]'")
    with tempfile.TemporaryDirectory() as folder:
        repository = options.repository or Path(folder) / "repository"
        if options.repository:
            loaded = made_from(OnnxModel(_path(repository)).metadata)
        else:
            loaded = checkpoint.load(options.source, channels=options.channels)
            shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("*.onnx", "*.pt"))
            _path(repository).parent.mkdir(exist_ok=True)
            with step("write ONNX"):
                write_onnx(PackedEcapa(loaded), loaded, _path(repository))
        model = OnnxModel(_path(repository))
        with step(f"SpeechBrain's embeddings of clips of {LENGTHS} lengths"):
            clips = make_clips(loaded.classifier, model.min_samples, model.max_samples, LENGTHS)
        del model
        with TritonServer(repository, device=options.device) as server:
            report = machine.describe(
                ("onnxruntime", "nvidia-pytriton", "tritonclient", "numpy"),
                command="python -m loadtest soak",
                device=server.device,
                model=loaded.source,
                model_bytes=_path(repository).stat().st_size,
                clients=options.clients,
                hostile=options.hostile,
            )
            print(
                f"{report['cpu']}, {report['cores']} cores; {server.chosen}; {loaded.source}, "
                f"{report['model_bytes'] / 1e6:.0f} MB; {options.clients} clients"
            )
            load = Load(server, clips, options.hostile)
            report |= _watch(server, load, 60 * options.minutes, options.clients)
    verdict = judge([(sample["seconds"], sample["bytes"]) for sample in report["samples"]])
    report |= {"second_third_bytes": verdict.second_third, "last_third_bytes": verdict.last_third}
    report["levels_off"] = verdict.levels_off
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.plot:
        plot(report, options.plot)
    _conclude(report, verdict, [path for path in (options.json, options.plot) if path])


def _path(repository: Path) -> Path:
    return repository / MODEL / "1" / "model.onnx"


def made_from(metadata: dict[str, str]) -> checkpoint.Checkpoint:
    """The checkpoint that an exported model, by its metadata, was made from."""
    loaded = checkpoint.load_again(metadata["origin"])
    if loaded.sha256 != metadata["weights_sha256"]:
        raise VerificationError(
            f"the model was made from other weights ({metadata['source']}) than {metadata['origin']} now has: "
            "export it again"
        )
    return loaded


def make_clips(classifier: Any, shortest: int, longest: int, lengths: int) -> list[Clips]:
    """Speech of `samples/`, cut anywhere, under noise: ascending lengths in samples, two clips of every fourth.

    Raises:
        SoakError: two clips have so much the same embedding that an exchange would not be seen.
    """
    random = np.random.default_rng(0)
    speech = np.concatenate(list(clip_groups(shortest, longest, seed=0)["samples/"].values()))
    reference = Reference(classifier)

    def clip(samples: int) -> Array:
        cut: Array = np.take(speech, np.arange(samples) + random.integers(len(speech)), mode="wrap")
        return cut + random.standard_normal(samples).astype(np.float32) * 10 ** random.uniform(-4, -1)

    pool = []
    for number, samples in enumerate(np.geomspace(shortest, longest, lengths).round().astype(int)):
        waveforms = np.stack([clip(samples) for _ in range(2 if number % 4 == 3 else 1)])
        rows = [reference(f"{number} {row}", waveform) for row, waveform in enumerate(waveforms)]
        pool.append(Clips(waveforms, np.stack(rows)))
    every = np.concatenate([clips.embeddings for clips in pool]).astype(np.float64)
    norms = np.linalg.norm(every, axis=1)
    apart = np.sqrt(np.maximum(norms[:, None] ** 2 + norms**2 - 2 * every @ every.T, 0)) / norms
    if (nearest := float(np.min(apart + np.diag(np.full(len(every), np.inf))))) < 10 * MAX_ERROR:
        raise SoakError(f"two clips are {nearest:.1e} apart, so an exchange would not be seen: make them differ more")
    return pool


@dataclass
class Load:
    """What the clients send, and what came back.

    Attributes:
        counts: Requests, and clips by what became of them.
        errors: Messages of errors that a good clip should not have met.
        wrong: What each wrong reply was the reply to.
    """

    server: TritonServer
    clips: list[Clips]
    hostile: float  # share of what the clients do
    stop: threading.Event = field(default_factory=threading.Event)
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        # How many of the longest are with the server at once would else be chance, and so the memory they take.
        self._one_long = threading.Lock()
        with InferenceServerClient(self.server.grpc_url) as triton:
            self._max_batch: int = triton.get_model_config(MODEL).config.max_batch_size

    def client(self, number: int) -> None:
        """Send requests until told to stop; every second client is a `SpeakerClient`.

        The hostile kinds come in turn, a first one at once: what the longest clip takes is taken from the beginning.
        """
        random = np.random.default_rng(number)
        first = HOSTILE.index("ten minutes") + number
        kinds = itertools.cycle(HOSTILE[(first + turn) % len(HOSTILE)] for turn in range(len(HOSTILE)))
        with (
            InferenceServerClient(self.server.grpc_url) as triton,
            SpeakerClient(self.server.grpc_url, timeout=TIMEOUT, retries=0) as speaker,
        ):
            if self.hostile:
                self._send_hostile(triton, next(kinds), random)
            while not self.stop.is_set():
                if random.random() < self.hostile:
                    self._send_hostile(triton, next(kinds), random)
                elif number % 2:
                    self._send_many(speaker, random)
                else:
                    self._send_rows(triton, random)

    def _send_rows(self, triton: InferenceServerClient, random: np.random.Generator) -> None:
        """One request of one clip, or, where the length has two, of as many as MOST_CLIPS and MOST_SAMPLES allow."""
        clips = self._any(random)
        most = min(self._max_batch, MOST_CLIPS, max(1, MOST_SAMPLES // clips.waveforms.shape[1]))
        count = 1 if len(clips.waveforms) == 1 else random.integers(1, most, endpoint=True)
        rows = random.integers(len(clips.waveforms), size=count)
        with self._errors(f"{count} of {clips.waveforms.shape[1]} samples"):
            self._compare("in a request", _infer(triton, clips.waveforms[rows]), clips.embeddings[rows])

    def _send_many(self, speaker: SpeakerClient, random: np.random.Generator) -> None:
        """One to four clips in flight together."""
        chosen = [self._any(random) for _ in range(random.integers(1, 4, endpoint=True))]
        replies = speaker.embed_many([clips.waveforms[0] for clips in chosen], return_exceptions=True)
        for clips, reply in zip(chosen, replies, strict=True):
            with self._errors(f"{clips.waveforms.shape[1]} samples"):
                if isinstance(reply, EcapaError):
                    raise reply
                self._compare("from SpeakerClient", reply[None], clips.embeddings[:1])

    def _send_hostile(self, triton: InferenceServerClient, kind: str, random: np.random.Generator) -> None:
        good = self._any(random).waveforms[:1]
        with self._errors(kind, hostile=True):
            match kind:
                case "empty":
                    self._compare(kind, _infer(triton, good[:, :0]))
                case "one sample":
                    self._compare(kind, _infer(triton, good[:, :1]))
                case "NaN" | "1e30":
                    bad = good.copy()
                    bad[0, random.integers(bad.size)] = float(kind)
                    self._compare(kind, _infer(triton, bad))
                case "ten minutes":  # the model hears its first 30 s
                    longest = self.clips[-1]
                    silence = np.zeros((1, TEN_MINUTES - random.integers(SAMPLE_RATE) - longest.waveforms.shape[1]))
                    with self._one_long:
                        rows = _infer(triton, np.hstack([longest.waveforms[:1], silence]).astype(np.float32))
                    self._compare(kind, rows, longest.embeddings[:1])
                case "wrong type":
                    self._compare(kind, _infer(triton, np.zeros(good.shape, np.int32), "INT32"))
                case "cancelled":
                    call = triton.async_infer(MODEL, [_tensor(good)], lambda result, error: None)
                    time.sleep(random.uniform(0, 0.1))
                    call.cancel()
                case "closed":
                    with InferenceServerClient(self.server.grpc_url) as other:
                        other.async_infer(MODEL, [_tensor(good)], lambda result, error: None)
                case "disconnected":
                    self._send_half(good)

    def _send_half(self, waveform: Array) -> None:
        """Half of an HTTP request, then a reset of the connection."""
        host, _, port = self.server.http_url.rpartition(":")
        head = f"POST /v2/models/{MODEL}/infer HTTP/1.1\r\nHost: {host}\r\nContent-Length: {waveform.nbytes}\r\n\r\n"
        with socket.create_connection((host, int(port)), TIMEOUT) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(head.encode() + waveform.tobytes()[: waveform.nbytes // 2])

    def _any(self, random: np.random.Generator) -> Clips:
        return self.clips[random.integers(len(self.clips))]

    def _compare(self, what: str, rows: Array, expected: Array | None = None) -> None:
        """Count embeddings `[n, E]` as right or wrong; where none is expected, none must be there."""
        with self._lock:
            for number, row in enumerate(rows):
                if np.isnan(row).all():
                    self.counts["without" if expected is not None else "rightly without"] += 1
                elif expected is not None and difference(row, expected[number])[0] <= MAX_ERROR:
                    self.counts["right"] += 1
                else:
                    self.counts["wrong"] += 1
                    self.wrong.append(what)

    @contextmanager
    def _errors(self, what: str, hostile: bool = False) -> Iterator[None]:
        """Count one request and what became of it, if that was an error."""
        caught: EcapaError | None = None
        try:
            yield
        except EcapaError as error:
            caught = error
        except InferenceServerException as error:
            status = (error.status() or "").removeprefix("StatusCode.")
            url = self.server.grpc_url
            caught = from_grpc(status, error.message() or "", url=url, model=MODEL, timeout=TIMEOUT)
        except OSError as error:
            caught = EcapaError(str(error))
        with self._lock:
            self.counts["requests"] += 1
            self.counts["hostile"] += hostile
            if caught is not None and not hostile:
                self.counts[type(caught).__name__] += 1
                if not isinstance(caught, TO_BE_EXPECTED):
                    self.errors[f"{what}: {caught}"] += 1


def _tensor(waveform: NDArray[Any], kind: str = "FP32") -> InferInput:
    tensor = InferInput("waveform", list(waveform.shape), kind)
    tensor.set_data_from_numpy(waveform)
    return tensor


def _infer(triton: InferenceServerClient, waveform: NDArray[Any], kind: str = "FP32") -> Array:
    """The raw protocol: waveform `[n, samples]` to embedding `[n, E]`."""
    reply = triton.infer(MODEL, [_tensor(waveform, kind)], client_timeout=TIMEOUT)
    return np.asarray(reply.as_numpy("embedding"), np.float32)


def _watch(server: TritonServer, load: Load, seconds: float, clients: int) -> dict[str, Any]:
    """Run the clients and look at the memory; Ctrl-C ends the load early."""
    begun = time.monotonic()
    samples: list[dict[str, Any]] = []

    def look() -> dict[str, Any]:
        parts = server.memory()
        at = round(time.monotonic() - begun, 2)
        return {"seconds": at, "requests": load.counts["requests"], "bytes": sum(parts.values()), **parts}

    loaded = look()
    print(f"ready: {loaded['bytes'] / 1e6:.0f} MB", flush=True)
    said = 0.0
    with ThreadPoolExecutor(clients) as pool:
        begun = time.monotonic()
        futures = [pool.submit(load.client, number) for number in range(clients)]
        try:
            while (elapsed := time.monotonic() - begun) < seconds and not any(future.done() for future in futures):
                time.sleep(min(EVERY, seconds - elapsed))
                samples.append(look())
                if elapsed - said > SAY:
                    said = elapsed
                    _say(samples[-1], load)
                if not all(samples[-1][part] for part in PROCESSES if loaded[part]):
                    break
        except KeyboardInterrupt:
            print("interrupted: no more load")
        finally:
            load.stop.set()
    for future in futures:
        future.result()
    time.sleep(IDLE)
    return {
        "ready_bytes": loaded["bytes"],
        "largest_bytes": max(sample["bytes"] for sample in [loaded, *samples]),
        "idle_bytes": look()["bytes"],
        "process_ended": not all(look()[part] for part in PROCESSES if loaded[part]),
        "counts": dict(load.counts),
        "wrong": load.wrong,
        "errors": dict(load.errors),
        "samples": [loaded | {"seconds": 0.0}, *samples],
    }


def _say(sample: dict[str, Any], load: Load) -> None:
    minutes, seconds = divmod(round(sample["seconds"]), 60)
    print(
        f"{minutes:3d}:{seconds:02d}  {sample['requests']:6d} requests, {load.counts['wrong']} wrong, "
        f"{sample['bytes'] / 1e6:.0f} MB",
        flush=True,
    )


def _conclude(report: dict[str, Any], verdict: Verdict, written: list[Path]) -> None:
    """Print what came out and raise SoakError if it is not what was promised."""
    counts = Counter(report["counts"])
    print(
        f"{counts['requests']} requests in {verdict.seconds:.0f} s, {counts['hostile']} of them hostile: "
        f"{counts['right']} embeddings right, {counts['wrong']} wrong; of good clips {counts['OverloadedError']} "
        f"refused, {counts['DeadlineError']} late, {counts['without'] + counts['EmbeddingError']} without one, "
        f"{sum(report['errors'].values())} failed"
    )
    print(
        f"memory: {report['ready_bytes'] / 1e6:.0f} MB when ready, at most "
        f"{report['largest_bytes'] / 1e6:.0f} MB under load, {report['idle_bytes'] / 1e6:.0f} MB {IDLE:g} s after it\n"
        f"{verdict}"
    )
    for path in written:
        print(f"wrote {path}")
    faults = [
        (counts["wrong"] > 0, f"{counts['wrong']} embeddings were wrong ({', '.join(sorted(set(report['wrong'])))})"),
        (bool(report["errors"]), f"good clips failed ({'; '.join([*report['errors']][:3])})"),
        (report["process_ended"], "tritonserver or the process of a model ended"),
        (not counts["right"], "no embedding came"),
        (verdict.levels_off is False, "memory grows"),
    ]
    if found := [message for present, message in faults if present]:
        raise SoakError("; ".join(found))


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw memory over time by what holds it and, below, requests per second."""
    from matplotlib.figure import Figure  # an extra of its own, needed nowhere else

    samples = report["samples"]
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
