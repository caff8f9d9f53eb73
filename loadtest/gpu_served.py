"""The served model on a GPU under closed-loop load from processes of their own; every reply is compared."""

from __future__ import annotations

import asyncio
import itertools
import multiprocessing
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from . import machine
from .clips import Array, Clips
from .gpu_page import Row
from .machine import reason
from .target import gauges, link, statistics

Precision: TypeAlias = Literal["fp32", "fp16"]

SAMPLE_RATE = 16_000  # Hz
RAMP = 1.0  # s of load before it is measured
TIMEOUT = 60.0  # s, of a request
START = 120.0  # s, for the processes of the load generator
LOOK = 0.5  # s, from one look at Triton's metrics to the next
CHANNELS = 4  # gRPC connections of one process
PROCESSES = 8  # of the load generator, and no more than half the cores


@dataclass(frozen=True)
class Load:
    """What one process of the load generator sends: clips at random, from `clients` that each wait for their reply.

    Attributes:
        expected: the clips' embeddings `[n, E]`, and `bound` the relative L2 error of a right reply.
        begin: when replies begin to count, and `end` when no more requests are sent, by `time.monotonic`.
    """

    url: str
    model: str
    clips: list[Array]
    expected: Array
    bound: float
    clients: int
    begin: float
    end: float


@dataclass
class Outcome:
    """What came back to one process.

    Attributes:
        latencies: seconds, of the right replies that count, and `audio` the seconds of their clips.
        right: replies, counted or not, and `wrong` ones; `errors` by message.
        cpu: of one core, that the process was busy.
    """

    latencies: list[float] = field(default_factory=list)
    audio: float = 0.0
    right: int = 0
    wrong: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    cpu: float = 0.0


def drive(task: Load) -> Outcome:
    """Run the clients of one process."""
    outcome = Outcome()
    begun, busy = time.monotonic(), time.process_time()
    asyncio.run(_drive(task, outcome))
    outcome.cpu = (time.process_time() - busy) / (time.monotonic() - begun)
    return outcome


async def _drive(task: Load, outcome: Outcome) -> None:
    from tritonclient.grpc import InferInput
    from tritonclient.grpc.aio import InferenceServerClient
    from tritonclient.utils import InferenceServerException

    tensors = [InferInput("waveform", [1, len(clip)], "FP32") for clip in task.clips]
    for tensor, clip in zip(tensors, task.clips, strict=True):
        tensor.set_data_from_numpy(clip[None])
    own = [("grpc.use_local_subchannel_pool", 1)]  # else all share one connection
    channels = [InferenceServerClient(task.url, channel_args=own) for _ in range(min(CHANNELS, task.clients))]

    async def client(number: int) -> None:
        random = np.random.default_rng(number)
        while (sent := time.monotonic()) < task.end:
            which = int(random.integers(len(tensors)))
            try:
                reply = await channels[number % len(channels)].infer(
                    task.model, [tensors[which]], client_timeout=TIMEOUT
                )
            except InferenceServerException as error:
                outcome.errors[reason(error)] += 1
                await asyncio.sleep(0.01)
                continue
            came = time.monotonic()
            right = task.expected[which]
            if not np.linalg.norm(reply.as_numpy("embedding")[0] - right) <= task.bound * np.linalg.norm(right):  # NaN
                outcome.wrong += 1
                continue
            outcome.right += 1
            if task.begin <= came <= task.end:
                outcome.latencies.append(came - sent)
                outcome.audio += len(task.clips[which]) / SAMPLE_RATE

    try:
        await asyncio.gather(*(client(number) for number in range(task.clients)))
    finally:
        for channel in channels:
            await channel.close()


def served(
    formats: Mapping[str, tuple[str, dict[Precision, Path]]],
    mixes: Mapping[str, Clips],
    device: Literal["gpu", "cpu"],
    clients: tuple[int, ...],
    seconds: float,
    folder: Path,
) -> Iterator[Row]:
    """Serve each format in each precision and load it with every mix and number of clients.

    Args:
        formats: the model's name and, by precision, its file, by format.
        mixes: the clips to send, by what they are called.
        device: "gpu", or "cpu" in a rehearsal.
        clients: that send at once.
        seconds: of load for each.
        folder: for the repositories that are served.
    """
    import tritonclient.grpc  # noqa: F401  # said first if it is not installed

    from export.verify import BOUNDS
    from server.triton import TritonServer

    processes = max(1, min(PROCESSES, machine.cores() // 2))
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    with ProcessPoolExecutor(processes, context, initializer=_ready, initargs=(barrier,)) as pool:
        wait([pool.submit(time.sleep, 0) for _ in range(processes)])
        for kind, (model, files) in formats.items():
            for precision, file in files.items():
                row: Row = {"model": model, "format": kind, "precision": precision}
                repository = folder / f"{kind}-{precision}"
                link(repository, model, [file])
                bound = BOUNDS[precision].max_error
                try:
                    with TritonServer(repository, device=device, precision=precision) as server:
                        for (name, mix), count in itertools.product(mixes.items(), clients):
                            if not mix.apart() > 2 * bound:
                                raise ValueError(f"clips of {name}: two embeddings are too close to tell apart")
                            yield (
                                row
                                | {"clips": name}
                                | _level(server, pool, processes, model, mix, bound, count, seconds)
                            )
                except Exception as error:
                    yield row | {"failed": reason(error)}


def _ready(barrier: Any) -> None:
    """Begin work when all processes of the load generator are there; Ctrl-C is their parent's matter."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    barrier.wait(START)


def _level(
    server: Any,
    pool: ProcessPoolExecutor,
    processes: int,
    model: str,
    mix: Clips,
    bound: float,
    clients: int,
    seconds: float,
) -> Row:
    """One number of clients."""
    from tritonclient.grpc import InferenceServerClient

    with InferenceServerClient(server.grpc_url) as triton:
        before = statistics(triton, model)
        begin = time.monotonic() + RAMP
        shares = [clients // processes + (number < clients % processes) for number in range(processes)]
        loads = [
            Load(server.grpc_url, model, mix.waveforms, mix.embeddings, bound, share, begin, begin + seconds)
            for share in shares
            if share
        ]
        futures = [pool.submit(drive, load) for load in loads]
        most: dict[str, float] = {}
        while wait(futures, LOOK).not_done:
            for name, value in gauges(server.metrics_url).items():
                most[name] = max(value, most.get(name, 0.0))
        outcomes = [future.result() for future in futures]
        after = statistics(triton, model)
    done = {name: after[name] - before[name] for name in after}
    latencies = np.concatenate([outcome.latencies for outcome in outcomes]) * 1e3
    p50, p95, p99 = np.percentile(latencies, (50, 95, 99)).tolist() if len(latencies) else [None] * 3
    busiest = max(outcome.cpu for outcome in outcomes)
    return {
        "clients": clients,
        "clips_per_s": len(latencies) / seconds,
        "audio_per_s": sum(outcome.audio for outcome in outcomes) / seconds,
        "p50_ms": p50,
        "p95_ms": p95,
        "p99_ms": p99,
        "mean_batch": done["inferences"] / max(1, done["executions"]),
        "queue_ms": done["queue_ns"] / max(1, done["inferences"]) / 1e6,
        "compute_ms": done["compute_ns"] / max(1, done["inferences"]) / 1e6,
        "right": sum(outcome.right for outcome in outcomes),
        "wrong": sum(outcome.wrong for outcome in outcomes),
        "errors": dict(sum((outcome.errors for outcome in outcomes), Counter())),
        "gpu_memory_mb": most.get("gpu_memory_mb") or None,
        "gpu_utilisation": most.get("gpu"),
        "server_mb": sum(server.memory().values()) / 1e6,
        "generator_processes": len(loads),
        "generator_cpu": busiest,
    }
