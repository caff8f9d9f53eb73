"""The scenarios single and mixed for NVIDIA's `perf_analyzer`: input data, and the commands that send it.

The clips are those of the load test. `perf_analyzer` sends them in order, again and again, and compares no embedding:
it measures speed alone. Its latencies count from the sending of a request, in the open loop too.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from .clips import Array, speech
from .scenarios import MIX, MIXED_USERS, MODEL, SINGLE, lengths

URL = "127.0.0.1:8001"  # gRPC
RATE = 5  # clips/s that arrive in the open loop
ROUNDS = 10  # of the mix in a measurement
COMMANDS = "commands.sh"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m loadtest payload`."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="for the files")


def run(options: argparse.Namespace) -> None:
    """Write the files into ``options.out`` and print the commands."""
    options.out.mkdir(parents=True, exist_ok=True)
    for name, seconds in files().items():
        (options.out / name).write_text(json.dumps(input_data(speech(seconds))) + "\n", encoding="utf-8")
        print(f"wrote {options.out / name}: {len(seconds)} clips, {sum(seconds):g} s")
    text = "\n".join(commands()) + "\n"
    (options.out / COMMANDS).write_text(text, encoding="utf-8")
    print(f"wrote {options.out / COMMANDS}; run it in {options.out}:\n\n{text}", end="")


def files() -> dict[str, Sequence[float]]:
    """Seconds of the clips in each file of input data; those of the mix in one random order."""
    mixed = lengths(None)
    mixed = random.Random(0).sample(mixed, len(mixed))
    return {_single(seconds): lengths(seconds) for seconds in SINGLE} | {"mixed.json": mixed}


def input_data(clips: Sequence[Array]) -> dict[str, list[dict[str, object]]]:
    """The JSON for `--input-data`: requests of one clip each, float32 little-endian in base64.

    Args:
        clips: float32 `[samples]` at 16 kHz.
    """
    return {
        "data": [
            {
                "waveform": {
                    "content": {"b64": base64.b64encode(clip.astype("<f4").tobytes()).decode()},
                    "shape": list(clip.shape),
                }
            }
            for clip in clips
        ]
    }


def commands(url: str = URL, rounds: int = ROUNDS) -> Iterator[str]:
    """Lines of a shell script to run beside the files.

    The number of requests is fixed: by default `perf_analyzer` repeats windows of time until three agree, each with
    another share of long clips of the mix, and reports nothing where they do not agree.

    Args:
        url: of the server's gRPC API.
        rounds: of the mix in a measurement, after one for warm-up.
    """
    always = f"perf_analyzer -m {MODEL} -i grpc -u {url}"
    count = f"--warmup-request-count={sum(MIX.values())} --request-count={rounds * sum(MIX.values())} --percentile=95"
    yield "# perf_analyzer is in NVIDIA's container tritonserver:YY.MM-py3-sdk, and where glibc is 2.38 or newer"
    yield "# (Ubuntu 24.04) it comes with: pip install perf-analyzer"
    for seconds in SINGLE:
        for clients in 1, MIXED_USERS:
            yield f"\n# Clips of {seconds:g} s, clients: {clients}"
            yield f"{always} --input-data={_single(seconds)} --concurrency-range={clients} {count}"
    for clients in 1, MIXED_USERS:
        yield f"\n# The mix, clients: {clients}"
        yield f"{always} --input-data=mixed.json --concurrency-range={clients} {count}"
    mean = statistics.fmean(lengths(None))
    yield f"\n# The mix at a constant rate: {RATE} clips a second, of {mean:.2f} s in the mean"
    yield f"{always} --input-data=mixed.json --request-rate-range={RATE} --async {count}"


def _single(seconds: float) -> str:
    return f"single_{seconds:g}s.json"
