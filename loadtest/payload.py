"""The scenarios single and mixed for NVIDIA's `perf_analyzer`: input data, and the commands that send it.

The clips are those of the load test. `perf_analyzer` sends them in order, again and again, and compares no embedding:
it measures speed alone.
"""

from __future__ import annotations

import argparse
import base64
import json
import random
from collections.abc import Sequence
from pathlib import Path

from .clips import Array, speech
from .scenarios import MIX, MIXED_USERS, MODEL, SCENARIOS, lengths

WINDOWS = 3  # that perf_analyzer joins into one measurement
SECONDS = 30  # of a measurement
HEADER = """\
# perf_analyzer is in NVIDIA's container tritonserver:YY.MM-py3-sdk, and where glibc is 2.38 or newer
# (Ubuntu 24.04) it comes with: pip install perf-analyzer==2.60.0
# Below glibc 2.38, pip falls back to version 0.1.0, which has no program: use the container.
# A measurement is three windows of time. They are joined however much they differ, since each has another share of the
# mix's long clips. With --request-count the throughput is too low: the time is rounded up to whole seconds.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m loadtest payload`."""
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write the files to")


def run(options: argparse.Namespace) -> None:
    """Write the input data and a script with the commands into `options.out`, and print the script."""
    options.out.mkdir(parents=True, exist_ok=True)
    mix = lengths(None)
    files = {"mixed.json": random.Random(0).sample(mix, len(mix))}
    for level in SCENARIOS["single"].levels:
        files[f"single_{level.seconds:g}s.json"] = list(lengths(level.seconds))
    for name, seconds in files.items():
        (options.out / name).write_text(json.dumps(input_data(speech(seconds))) + "\n", encoding="utf-8")
    script = HEADER + "".join(f"{command(name, users)}\n" for name in files for users in (1, MIXED_USERS))
    (options.out / "commands.sh").write_text(script, encoding="utf-8")
    print(f"wrote {', '.join(files)} and commands.sh into {options.out}; run it there:\n\n{script}", end="")


def input_data(clips: Sequence[Array]) -> dict[str, list[dict[str, object]]]:
    """The JSON for `--input-data`: requests of one clip each, float32 `[samples]` at 16 kHz."""
    contents = [base64.b64encode(clip.astype("<f4").tobytes()).decode() for clip in clips]
    return {
        "data": [
            {"waveform": {"content": {"b64": content}, "shape": [len(clip)]}}
            for clip, content in zip(clips, contents, strict=True)
        ]
    }


def command(file: str, users: int, url: str = "127.0.0.1:8001", seconds: int = SECONDS) -> str:
    """The command that sends a file of input data to the gRPC API at `url` from some clients at once."""
    window = f"--measurement-interval={seconds * 1000 // WINDOWS} --stability-percentage=999"
    counts = f"--warmup-request-count={sum(MIX.values())} {window} --percentile=95"
    return f"perf_analyzer -m {MODEL} -i grpc -u {url} --input-data={file} --concurrency-range={users} {counts}"
