"""Resident memory of the whole server: after load, and under clips of mixed lengths."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
from ecapa_triton import SpeakerClient

from export import checkpoint
from export.configs import MODEL
from export.onnx_file import write
from export.packed import SAMPLE_RATE, PackedEcapa
from server.triton import TritonServer

from . import machine

REPOSITORY = Path(__file__).parent.parent / "model_repository"
LONGEST = 10.0  # s, of the clips


def run(options: argparse.Namespace) -> None:
    """Serve the model, send it noise of 0.1 s to 10 s for a while, print resident memory every few seconds."""
    loaded = checkpoint.load(options.source, channels=options.channels)
    with tempfile.TemporaryDirectory() as folder:
        repository = Path(folder) / "repository"
        shutil.copytree(REPOSITORY, repository, ignore=shutil.ignore_patterns("*.onnx", "*.pt"))
        path = repository / MODEL / "1" / "model.onnx"
        path.parent.mkdir(exist_ok=True)
        write(PackedEcapa(loaded.classifier, loaded.threshold), loaded, path)
        size = path.stat().st_size
        report = machine.describe(
            ("onnxruntime", "nvidia-pytriton", "tritonclient"),
            command="python -m loadtest memory",
            model=loaded.source,
            model_bytes=size,
        )
        with TritonServer(repository, device="cpu", http_port=0, grpc_port=0, metrics_port=0) as server:
            print(f"{report['cpu']}, {report['cores']} cores; {loaded.source}, {size / 1e6:.0f} MB")
            report |= _load(server, options.seconds, options.clients)
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _load(server: TritonServer, seconds: float, clients: int) -> dict[str, Any]:
    samples = [(0.0, server.memory())]
    print(f"after load: {samples[0][1] / 1e6:.0f} MB", flush=True)
    stop = threading.Event()
    done = [0] * clients

    def client(number: int) -> None:
        random = np.random.default_rng(number)
        noise = random.standard_normal(round(LONGEST * SAMPLE_RATE)).astype(np.float32) * 0.1
        with SpeakerClient(server.grpc_url, timeout=60) as speaker:
            while not stop.is_set():
                speaker.embed(noise[: random.integers(SAMPLE_RATE // 10, len(noise))])
                done[number] += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    begun = time.monotonic()
    while (elapsed := time.monotonic() - begun) < seconds:
        stop.wait(min(5.0, seconds - elapsed))
        samples.append((time.monotonic() - begun, server.memory()))
        print(f"after {samples[-1][0]:3.0f} s: {samples[-1][1] / 1e6:.0f} MB, {sum(done)} clips", flush=True)
    stop.set()
    for thread in threads:
        thread.join()
    return {
        "clips": sum(done),
        "after_load_bytes": samples[0][1],
        "largest_bytes": max(size for _, size in samples),
        "samples": [{"seconds": round(at, 1), "bytes": size} for at, size in samples],
    }
