"""The model in process, without a server: agreement, speed, memory and kernels, on the CPU or on a GPU.

Our model files (ONNX Runtime and TorchScript; on a GPU in float32 and float16) take turns with SpeechBrain, and square
matrix products are the yardstick. A row says why something was not measured; torch and numpy are enough for files
exported elsewhere (--repository).
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import tempfile
import time
import wave
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

from . import bench_page, contenders, machine
from .bench_page import Row
from .clips import MAX_ERROR, SAMPLES, Array, compare
from .contenders import FORMATS, ON_CPU, PADDED, SPEECHBRAIN, Contender
from .machine import MeasureError, reason

MIXED = {"8 mixed, 1 to 10 s": [1, 2.3, 3.1, 4.7, 5.9, 7.2, 8.4, 10]}
ALONE = {f"{seconds} s": [float(seconds)] for seconds in (1, 5, 10)}
TYPES = {"fp32": torch.float32, "fp16": torch.float16}
TOGETHER = 64  # clips in the batch of the agreement, as in configs/gpu.pbtxt
CPU_CLIPS = 8  # the largest row of the contender on the CPU beside those on a GPU
PAUSE = {"cpu": 0.03, "cuda": 0.0}  # s, in which spinning threads of the previous contender go to sleep
SHORTEST = 0.03  # s, that a contender is timed for in a round, by repetition


@dataclass(frozen=True)
class Plan:
    """What is measured on a device.

    Attributes:
        device: torch's name.
        rounds: in each of which all contenders take turns.
        rows: seconds of the clips in a call, by name.
        precisions: of our model files.
        profiled: seconds of the clips in a profiled call.
        squares: sizes of square matrix products.
    """

    device: str
    rounds: int
    rows: Mapping[str, Sequence[float]]
    precisions: Sequence[str]
    profiled: Sequence[Sequence[float]]
    squares: Sequence[int]


PLANS = {
    "cpu": Plan(
        "cpu",
        rounds=15,
        rows=ALONE | {"8 x 3 s": [3.0] * 8} | MIXED | {"32 x 1 s": [1.0] * 32},
        precisions=["fp32", "int8"],
        profiled=[],
        squares=[1024, 2048],
    ),
    "gpu": Plan(
        "cuda",
        rounds=20,
        rows=ALONE | {f"{n} x {s:g} s": [s] * n for s in (2.02, 5.0) for n in (8, 16, 32, 64, 128)} | MIXED,
        precisions=["fp32", "fp16"],
        profiled=[[5.0], [5.0] * 32],
        squares=[4096, 8192],
    ),
}


@dataclass
class Bench:
    """What the sections measure.

    Attributes:
        plan: of the device.
        files: model files by format and precision.
        metadata: of the float32 TorchScript file.
        speech: clips, float32 `[samples]`.
        threads: of every contender on the CPU.
        contenders: those that were loaded, and agree with the CPU as far as that was measured.
        best: multiply-accumulates per second of the best square product, by precision.
    """

    plan: Plan
    files: contenders.Files
    metadata: dict[str, str]
    speech: list[Array]
    threads: int = 1
    contenders: list[Contender] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)

    def noise(self, seconds: Sequence[float]) -> list[Array]:
        """White noise, since the time does not depend on what is in a clip."""
        random = np.random.default_rng(0)
        rate = int(self.metadata["sample_rate"])
        return [0.1 * random.standard_normal(round(s * rate), np.float32) for s in seconds]

    def reference(self) -> Contender:
        """The float32 TorchScript file on the CPU."""
        return Contender(ON_CPU, "fp32", "cpu", contenders.torchscript(self.files["TorchScript", "fp32"], "cpu"))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.plan.device == "cuda":
            torch.cuda.synchronize()

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call, after one that is not timed."""
        time.sleep(PAUSE[self.plan.device])
        call()
        self.synchronize()
        begun, calls, passed = time.perf_counter(), 0, 0.0
        while passed < SHORTEST:
            call()
            self.synchronize()
            calls, passed = calls + 1, time.perf_counter() - begun
        return passed / calls


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m loadtest bench`."""
    parser.add_argument("--device", choices=PLANS, default="cpu", help="device to measure (default: %(default)s)")
    parser.add_argument("--source", default="random", help="checkpoint, as for python -m export (default: %(default)s)")
    channels = "channels of the convolutions, with --source random (default: %(default)s)"
    parser.add_argument("--channels", type=int, default=1024, metavar="N", help=channels)
    parser.add_argument("--repository", type=Path, metavar="DIR", help="model files exported there, not --source")
    rounds = "rounds, in each of which all contenders take their turn (default: 15 on a CPU, 20 on a GPU)"
    parser.add_argument("--rounds", type=int, metavar="N", help=rounds)
    threads = "threads of each contender on the CPU (default: as many as cores)"
    parser.add_argument("--threads", type=int, default=0, metavar="N", help=threads)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, and a page beside it")


def run(options: argparse.Namespace) -> None:
    """Measure section by section, print the rows, and write them to `options.json` and to a page beside it.

    Raises:
        MeasureError: the model cannot be had, or a contender differs from the CPU.
    """
    if options.device == "gpu" and not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use was found: nothing is measured")
        return
    plan = PLANS[options.device]
    threads = options.threads or machine.cores()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.repository:
            files, origin = contenders.find(options.repository), ""
        else:
            files = contenders.write(Path(folder), options.source, options.channels, plan.precisions)
            origin = f" --source {Path(options.source).name}"
        metadata = contenders.read_metadata(files["TorchScript", "fp32"])
        plan = replace(plan, rounds=options.rounds or plan.rounds)
        bench = Bench(plan, files, metadata, speech(int(metadata["sample_rate"])), threads)
        measure(bench, options.json, f"python -m loadtest bench --device {options.device}{origin}")


def speech(rate: int) -> list[Array]:
    """Clips of 0.2 to 5 s at `rate` Hz, cut anywhere from `samples/carl_2.wav` under faint noise: no two equal."""
    with wave.open(str(SAMPLES / "carl_2.wav")) as file:  # 16 bits, one channel
        voice = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
        step = file.getframerate() / rate
    random = np.random.default_rng(0)
    lengths = np.geomspace(0.2 * rate, 5 * rate, TOGETHER).astype(int)
    places = [np.arange(length) * step + random.integers(len(voice)) for length in lengths]
    cuts = [np.interp(place, np.arange(len(voice)), voice, period=len(voice)) for place in places]
    return [(cut + 1e-3 * random.standard_normal(len(cut))).astype(np.float32) for cut in cuts]


def measure(bench: Bench, path: Path | None = None, command: str = "") -> Row:
    """Measure all sections and return their figures, which are in the file and page of `path` too.

    Raises:
        MeasureError: as `run`.
    """
    data = _describe(bench, command)
    print(f"{data['cpu']}, {data['threads']} threads; {data.get('gpu', 'no GPU')}; {data['model']}")
    try:
        for section in load, agreement, products, speed, kernels:
            name = section.__name__
            print(f"\n{bench_page.TITLES[name]}", flush=True)
            rows = data["sections"][name] = []
            for row in section(bench):
                rows.append(row)
                print("  " + bench_page.line(name, row), flush=True)
    finally:  # what was measured before an interrupt or an error, too
        if path:
            _write(data, path)
    if wrong := [row["wrong"] for row in data["sections"]["agreement"] if "wrong" in row]:
        raise MeasureError("; ".join(wrong))
    return data


def _describe(bench: Bench, command: str) -> Row:
    data = machine.describe(
        ("torch", "onnxruntime-gpu", "onnxruntime", "speechbrain", "numpy"),
        command=command,
        threads=bench.threads,
        commit=machine.commit(),
        model=bench.metadata["source"],
        weights=bench.metadata["weights_sha256"],
        rounds=bench.plan.rounds,
        sections={},
    )
    if bench.plan.device == "cuda":
        query = "--query-gpu=name,memory.total,driver_version,power.limit"
        data["gpu"] = machine.output("nvidia-smi", query, "--format=csv,noheader", "--id=0")
    return data


def _write(data: Row, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}")
    try:
        from . import report

        print("\n".join(f"wrote {page}" for page in report.write(bench_page.page(data), path.with_suffix(""))))
    except ModuleNotFoundError as error:
        print(f"no page: {reason(error)}")


def load(bench: Bench) -> Iterator[Row]:
    """Load every contender that can be loaded; one that cannot has a row that says why."""
    device = bench.plan.device
    loaders: dict[str, Callable[[], list[Contender]]] = {
        f"{kind} {precision.upper()}": partial(contenders.ours, bench.files, kind, precision, device, bench.threads)
        for kind, precision in itertools.product(FORMATS, bench.plan.precisions)
        if precision != "int8" or kind == "ONNX"
    }
    loaders["SpeechBrain"] = partial(contenders.theirs, bench.metadata, device)
    for name, loader in loaders.items():
        row: Row = {"contender": name}
        before = torch.cuda.memory_allocated()
        try:
            bench.contenders += loader()
            if device == "cuda" and not name.startswith("ONNX"):  # torch does not see ONNX Runtime's memory
                row["model_mb"] = (torch.cuda.memory_allocated() - before) / 1e6
        except Exception as error:
            row["failed"] = reason(error)
        yield row


def agreement(bench: Bench) -> Iterator[Row]:
    """Embeddings of speech, each clip alone and in batches, against those of the float32 TorchScript file on the CPU.

    Contenders beyond the bound of the export's verification are measured no further. SpeechBrain one by one is judged
    on the CPU, and so is the file; on a GPU its convolutions may use TF32.
    """
    alone = [[clip] for clip in bench.speech]
    expected = _embed(bench.reference(), alone)
    for contender in list(bench.contenders):
        exact = contender.ours or (contender.name, contender.device) == (SPEECHBRAIN, "cpu")
        bound = MAX_ERROR[contender.precision] if exact else np.inf
        for how, parts in ("alone", alone), ("together", [bench.speech]):
            row: Row = {"contender": contender.name, "embedded": how, "clips": len(bench.speech)}
            try:
                row |= compare(_embed(contender, parts), expected)
            except Exception as error:
                row["failed"] = reason(error)
            else:
                if not row["error"] <= bound:
                    row["wrong"] = f"{contender.name} on {contender.device}, clips {how}: error {row['error']:.1e}"
                    bench.contenders = [other for other in bench.contenders if other.embed is not contender.embed]
            yield row


def _embed(contender: Contender, parts: Sequence[Sequence[Array]]) -> Array:
    """The embeddings `[n, E]` of all clips, of one part after the other."""
    rows = [rows.cpu() for clips in parts for rows in contender.run(contender.batches(clips))]
    embeddings: Array = torch.cat(rows).numpy()
    return embeddings


def products(bench: Bench) -> Iterator[Row]:
    """Square matrix products, the best of which is the measure of a model's work."""
    precisions = [precision for precision in bench.plan.precisions if precision in TYPES]
    for precision, size in itertools.product(precisions, bench.plan.squares):
        square = torch.randn(size, size).to(bench.plan.device, TYPES[precision])
        rate = size**3 / statistics.median(bench.time(partial(torch.mm, square, square)) for _ in range(5))
        bench.best[precision] = max(rate, bench.best.get(precision, 0.0))
        yield {"precision": precision, "size": size, "tflops": 2 * rate / 1e12}


def speed(bench: Bench) -> Iterator[Row]:
    """Every row of the plan: all contenders in turn within each round. One that fails takes no more turns."""
    for name, seconds in bench.plan.rows.items():
        clips = bench.noise(seconds)
        chosen: dict[object, Contender] = {}
        for contender in bench.contenders:
            batches = math.ceil(len(clips) / (contender.size or len(clips)))
            chosen.setdefault((contender.embed, batches), contender)  # two that do the same are measured once
        if bench.plan.device == "cuda" and len(clips) <= CPU_CLIPS:
            chosen[ON_CPU] = bench.reference()
        order = list(chosen.values())
        times: dict[str, list[float]] = {contender.name: [] for contender in order}
        failed: dict[str, str] = {}
        for _ in range(bench.plan.rounds):
            for contender in order:
                if contender.name not in failed:
                    try:
                        resident = contender.batches(clips)
                        times[contender.name].append(bench.time(partial(contender.run, resident)))
                    except Exception as error:
                        failed[contender.name] = reason(error)
                        torch.cuda.empty_cache()
            order.append(order.pop(0))  # the order differs between rounds
        macs = sum(contenders.count_macs(bench.files["TorchScript", "fp32"], len(clip)) for clip in clips)
        for contender in chosen.values():
            row: Row = {"clips": name, "seconds": list(seconds), "contender": contender.name}
            if contender.name in failed:
                yield row | {"failed": failed[contender.name]}
                continue
            row |= _figures(times, contender.name, sum(seconds)) | _work_memory(contender, clips)
            if contender.ours:
                row["tflops"] = 2 * macs / row["ms"] / 1e9
                if contender.device == bench.plan.device and contender.precision in bench.best:
                    row["of_best_product"] = macs / row["ms"] * 1e3 / bench.best[contender.precision]
            yield row


def _figures(times: Mapping[str, list[float]], name: str, audio: float) -> Row:
    """Medians, and medians of the ratios within a round."""
    mine = times[name]
    median = statistics.median(mine)
    row = {"ms": median * 1e3, "fastest_ms": min(mine) * 1e3, "slowest_ms": max(mine) * 1e3}
    row["times_real_time"] = audio / median
    one_by_one = times.get(SPEECHBRAIN, [])
    others = {"one_by_one": one_by_one, "padded": times.get(PADDED, one_by_one), "cpu": times.get(ON_CPU, [])}
    for other, theirs in others.items():
        if len(theirs) == len(mine):
            row[f"ratio_to_{other}"] = statistics.median(b / a for a, b in zip(mine, theirs, strict=True))
    return row


def _work_memory(contender: Contender, clips: Sequence[Array]) -> Row:
    """The memory that torch allocates on a GPU for a call, beyond model and inputs; it does not see ONNX Runtime's."""
    if contender.device == "cpu" or contender.name.startswith("ONNX"):
        return {}
    resident = contender.batches(clips)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.run(resident)
    torch.cuda.synchronize()
    return {"work_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}


def kernels(bench: Bench) -> Iterator[Row]:
    """The kernels and copies of a call of TorchScript on a GPU, by torch's profiler; on a CPU its operators."""
    on_gpu = bench.plan.device == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    found = [one for one in bench.contenders if one.name.startswith("TorchScript") and not one.size]
    for contender, seconds in itertools.product(found, bench.plan.profiled):
        batches = contender.batches(bench.noise(seconds))
        contender.run(batches)
        bench.synchronize()
        with profile(activities=activities) as profiler:
            contender.run(batches)
            bench.synchronize()
        events = [event for event in profiler.events() if (event.device_type.name != "CPU") is on_gpu]
        copies = [event.name for event in events if event.name.startswith(("Memcpy", "Memset"))]
        times: Counter[str] = Counter()
        for event in events:
            if event.name not in copies:
                times[event.name] += event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        total = sum(times.values())
        yield {
            "contender": contender.name,
            "clips": f"{len(seconds)} x {seconds[0]:g} s",
            "kernels": len(events) - len(copies),
            "kernel_ms": total / 1e3,
            "copies": dict(Counter(copies)),
            "top": [{"kernel": name, "share": us / total} for name, us in times.most_common(10)],
        }
