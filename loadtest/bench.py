"""The model in process, without a server: agreement, speed, memory and kernels, on the CPU and on a GPU.

Our model files (ONNX Runtime and TorchScript; on a GPU in float32, TF32 and float16) take turns with SpeechBrain, and
square matrix products are the yardstick. Rows are written as they are measured, so an interrupted run keeps them. A row
says why something was left out; torch and numpy are enough for files exported elsewhere (--repository).
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from . import bench_page, contenders, machine
from .bench_page import TITLES, Row
from .clips import MAX_ERROR, Array, compare
from .contenders import PADDED, PRECISIONS, SPEECHBRAIN, Batch, Contender
from .machine import MeasureError, reason

DEVICES = {"cpu": ["cpu"], "gpu": ["cuda"], "all": ["cpu", "cuda"]}  # torch's names
MIXED = [1, 2.3, 3.1, 4.7, 5.9, 7.2, 8.4, 10]
ROWS: dict[str, dict[str, list[float]]] = {  # seconds of the clips in a call
    "cpu": {
        **{f"{s} s": [s] for s in (1, 5, 10)},
        "8 x 3 s": [3] * 8,
        "8 mixed, 1 to 10 s": MIXED,
        "32 x 1 s": [1] * 32,
    },
    "cuda": {
        **{f"{s} s": [s] for s in (1, 5, 10)},
        **{f"{n} x 2.02 s": [2.02] * n for n in (1, 8, 16, 32, 64, 128)},
        **{f"{n} x 5 s": [5] * n for n in (8, 16, 32, 64, 128)},
        "8 mixed, 1 to 10 s": MIXED,
    },
}
PROFILED: dict[str, list[list[float]]] = {"cpu": [], "cuda": [[5.0], [5.0] * 32]}
SQUARES = {"cpu": (1024, 2048), "cuda": (4096, 8192)}
ROUNDS = {"cpu": 15, "cuda": 20}
TOGETHER = 64  # clips in a batch of the agreement, as in configs/gpu.pbtxt
REFERENCE = "CPU"  # a contender on the CPU beside those on the GPU, for the ratio
CPU_CLIPS, CPU_ROUNDS = 8, 3  # the largest row and the rounds of that contender
PAUSE = {"cpu": 0.03, "cuda": 0.0}  # s, in which spinning threads of the previous contender go to sleep
SHORTEST = {"cpu": 0.05, "cuda": 0.0}  # s, that a contender is timed for in a round, by repetition
CALL = "embed"  # the profiled call


@dataclass(frozen=True)
class Plan:
    """What is measured on one device.

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
    rows: dict[str, list[float]]
    precisions: Sequence[str]
    profiled: Sequence[Sequence[float]]
    squares: Sequence[int]

    @classmethod
    def of(cls, device: str, rounds: int | None = None, names: Sequence[str] | None = None) -> Plan:
        """The usual plan of a device, or that with fewer rounds or rows."""
        rows = {name: row for name, row in ROWS[device].items() if names is None or name in names}
        return cls(device, rounds or ROUNDS[device], rows, PRECISIONS[device], PROFILED[device], SQUARES[device])

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes that torch holds on a GPU; 0 on a CPU."""
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def time(self, call: Callable[[], object]) -> float:
        """Seconds of one call, after one that is not timed."""
        time.sleep(PAUSE[self.device])
        begun = time.perf_counter()
        call()
        self.synchronize()
        repeats = max(1, round(SHORTEST[self.device] / (time.perf_counter() - begun)))
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        self.synchronize()
        return (time.perf_counter() - begun) / repeats


@dataclass
class Bench:
    """What the sections measure.

    Attributes:
        plans: one for each device.
        files: model files by format and precision.
        metadata: of the float32 TorchScript file.
        speech: clips, float32 `[samples]`.
        threads: of every contender on the CPU.
        contenders: those that were loaded, and agree with the CPU as far as that was measured.
        best: multiply-accumulates per second of the best square product, by device and precision.
    """

    plans: Sequence[Plan]
    files: contenders.Files
    metadata: dict[str, str]
    speech: list[Array]
    threads: int = 1
    contenders: list[Contender] = field(default_factory=list)
    best: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def rate(self) -> int:
        """Samples per second that the model takes."""
        return int(self.metadata["sample_rate"])

    def noise(self, seconds: Sequence[float]) -> list[Array]:
        """White noise, since the time does not depend on what is in a clip."""
        random = np.random.default_rng(0)
        return [random.standard_normal(round(s * self.rate)).astype(np.float32) * 0.1 for s in seconds]

    def on(self, plan: Plan) -> list[Contender]:
        """The contenders on a device."""
        return [contender for contender in self.contenders if contender.device == plan.device]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `python -m loadtest bench`."""
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="default: %(default)s")
    parser.add_argument("--source", default="random", help="as for python -m export (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=1024, help="of --source random (default: %(default)s)")
    parser.add_argument("--repository", type=Path, metavar="DIR", help="model files exported there, not --source")
    parser.add_argument("--speech", type=Path, metavar="DIR", help="of WAV and FLAC, up to 100 (default: samples/)")
    parser.add_argument("--rounds", type=int, metavar="N", help="interleaved (default: 15 on a CPU, 20 on a GPU)")
    parser.add_argument(
        "--rows", type=lambda text: text.split(";"), metavar="NAMES", help='such as "1 s;8 x 5 s" (all)'
    )
    parser.add_argument("--threads", type=int, default=0, help="of every contender on the CPU (default: all cores)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, and a page beside it")


def run(options: argparse.Namespace) -> None:
    """Measure section by section, print the rows, and write them to `options.json` and to a page beside it.

    Raises:
        MeasureError: the model cannot be had, a section ended early, or a contender of ours differs from the CPU.
    """
    devices = DEVICES[options.device]
    if "cuda" in devices and not torch.cuda.is_available():
        print(f"no GPU that torch {torch.__version__} can use was found: nothing is measured there")
        devices = [device for device in devices if device == "cpu"]
    if not devices:
        return
    plans = [Plan.of(device, options.rounds, options.rows) for device in devices]
    if not any(plan.rows for plan in plans):
        raise MeasureError(f"--rows {';'.join(options.rows)}: expected some of {'; '.join(ROWS[devices[0]])}")
    threads = options.threads or machine.cores()
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        precisions = {precision for plan in plans for precision in plan.precisions}
        files = (
            contenders.find(options.repository)
            if options.repository
            else contenders.write(Path(folder), options.source, options.channels, sorted(precisions))
        )
        metadata = contenders.read_metadata(files["TorchScript", "fp32"])
        rate = int(metadata["sample_rate"])
        speech = contenders.read_speech(options.speech, rate, round(float(metadata["max_seconds"]) * rate))
        words = f"--device {options.device}" + ("" if options.repository else f" --source {Path(options.source).name}")
        measure(Bench(plans, files, metadata, speech, threads), options.json, f"python -m loadtest bench {words}")


def measure(bench: Bench, path: Path | None = None, command: str = "") -> Row:
    """Measure all sections and return their figures, which are in the file and page of `path` too.

    Raises:
        MeasureError: as `run`.
    """
    data = _describe(bench, command)
    sections: dict[str, Callable[[Bench], Iterator[Row]]] = {
        "contenders": load,
        "agreement": agreement,
        "products": products,
        "speed": speed,
        "kernels": kernels,
    }
    print(f"{data['cpu']}, {data['threads']} threads; {data.get('gpu', {}).get('name', 'no GPU')}; {data['model']}")
    try:
        for name, rows in sections.items():
            section: Row = {"rows": []}
            data["sections"][name] = section
            print(f"\n{TITLES[name]}", flush=True)
            try:
                for row in rows(bench):
                    section["rows"].append(row)
                    print("  " + bench_page.line(name, row), flush=True)
                    _save(data, path)
            except Exception as error:
                section["failed"] = reason(error)
                print(f"  ended early: {section['failed']}", flush=True)
    except KeyboardInterrupt:
        data["interrupted"] = True
        raise
    finally:
        _save(data, path)
        if path:
            _write_page(data, path)
    faults = [f"{TITLES[name]}: {part['failed']}" for name, part in data["sections"].items() if "failed" in part]
    faults += [row["wrong"] for row in data["sections"]["agreement"]["rows"] if "wrong" in row]
    if faults:
        raise MeasureError("; ".join(faults))
    return data


def _describe(bench: Bench, command: str) -> Row:
    packages = "torch", "onnxruntime-gpu", "onnxruntime", "speechbrain", "numpy"
    data = machine.describe(
        packages,
        command=command,
        threads=bench.threads,
        commit=machine.commit(),
        model=bench.metadata["source"],
        weights=bench.metadata["weights_sha256"],
        rounds={plan.device: plan.rounds for plan in bench.plans},
        clips_of_speech=len(bench.speech),
        sections={},
    )
    if any(plan.device == "cuda" for plan in bench.plans):
        properties = torch.cuda.get_device_properties(0)
        data["gpu"] = {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "driver": machine.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "power_limit": machine.output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader", "--id=0"),
            "cuda": torch.version.cuda,
        }
    return data


def load(bench: Bench) -> Iterator[Row]:
    """Load every contender that can be loaded; one that cannot has a row that says why."""
    for plan in bench.plans:
        loaders = contenders.loaders(bench.files, bench.metadata, plan.device, plan.precisions, bench.threads)
        for name, loader in loaders.items():
            before = plan.allocated()
            row: Row = {"device": plan.device, "contender": name}
            try:
                found = loader()
            except Exception as error:
                yield row | {"failed": reason(error)}
                continue
            bench.contenders += found
            if found[0].format != "ONNX" and plan.device == "cuda":  # torch does not see ONNX Runtime's memory
                row["model_mb"] = (plan.allocated() - before) / 1e6
            yield row


def agreement(bench: Bench) -> Iterator[Row]:
    """Embeddings of speech, each clip alone and among others, against those of the float32 TorchScript file on the CPU.

    Ours beyond the bound of the export's verification is measured no further. SpeechBrain one by one is judged on the
    CPU, and so is the file; on a GPU its convolutions may use TF32.
    """
    clips = [clip for clip in bench.speech if len(clip) >= int(bench.metadata["min_samples"])]
    reference = contenders.torchscript(bench.files["TorchScript", "fp32"], "cpu")
    expected = np.stack([reference(*contenders.pack([clip]))[0].numpy() for clip in clips])
    seen = set()
    for contender in list(bench.contenders):
        exact = contender.ours or (contender.name, contender.device) == (SPEECHBRAIN, "cpu")
        bound = MAX_ERROR.get(contender.precision) if exact else None
        for how, size in ("alone", 1), ("together", TOGETHER):
            parts = [contender.batches(clips[at : at + size]) for at in range(0, len(clips), size)]
            same = contender.embed, tuple(map(len, parts))
            if same in seen or (how == "together" and len(parts[0]) == min(size, len(clips))):
                continue
            seen.add(same)
            row: Row = {"device": contender.device, "contender": contender.name, "embedded": how, "clips": len(clips)}
            try:
                got = torch.cat([rows.cpu() for batches in parts for rows in contender.run(batches)]).numpy()
            except Exception as error:
                yield row | {"failed": reason(error)}
                continue
            row |= compare(got, expected)
            if bound and not row["error"] <= bound:
                row["wrong"] = f"{contender.name} on {contender.device}, clips {how}: error {row['error']:.1e}"
                bench.contenders = [other for other in bench.contenders if other.embed is not contender.embed]
            yield row


def products(bench: Bench) -> Iterator[Row]:
    """Square matrix products, the best of which is the measure of a model's work."""
    for plan in bench.plans:
        for precision, size in itertools.product(plan.precisions, plan.squares):
            call = contenders.product(size, plan.device, precision)
            rate = size**3 / statistics.median(plan.time(call) for _ in range(5))
            key = plan.device, precision
            bench.best[key] = max(rate, bench.best.get(key, 0.0))
            yield {"device": plan.device, "precision": precision, "size": size, "tflops": 2 * rate / 1e12}


def speed(bench: Bench) -> Iterator[Row]:
    """Every contender on every row of its device."""
    for plan in bench.plans:
        for name, seconds in plan.rows.items():
            yield from _Turns(bench, plan, name, seconds).measure()


class _Turns:
    """One row: all contenders in turn within each round."""

    def __init__(self, bench: Bench, plan: Plan, name: str, seconds: Sequence[float]) -> None:
        self._bench, self._plan, self._seconds, self._name = bench, plan, seconds, name
        self._clips = bench.noise(seconds)
        self._path = bench.files["TorchScript", "fp32"]
        self._calls: dict[tuple[str, str], Callable[[], object]] = {}
        self._times: dict[tuple[str, str], list[float]] = {}
        self._rows: dict[str, Row] = {}

    def measure(self) -> Iterator[Row]:
        """A row for every contender."""
        chosen: dict[str, tuple[Contender, list[Batch]]] = {}
        for contender in self._bench.on(self._plan):
            batches = contender.batches(self._clips)
            like = [(one.embed, len(other)) for one, other in chosen.values()]
            if (contender.embed, len(batches)) not in like:  # else it would do the same
                chosen[contender.name] = contender, batches
        if self._plan.device == "cuda" and len(self._clips) <= CPU_CLIPS:
            embed = contenders.torchscript(self._path, "cpu")
            batches = [contenders.pack(self._clips)]
            join = contenders.in_batches(contenders.pack, None)
            chosen[REFERENCE] = Contender(REFERENCE, REFERENCE, "fp32", "cpu", join, embed), batches
        for name, (contender, batches) in chosen.items():
            row = {"device": contender.device, "clips": self._name, "seconds": list(self._seconds), "contender": name}
            self._rows[name] = row
            self._attempt(name, lambda c=contender, b=batches: self._warm_up(c, b))  # type: ignore[misc]
        for turn in range(self._plan.rounds):
            order = [key for key in self._calls if turn < CPU_ROUNDS or key[0] != REFERENCE]
            first = turn % max(1, len(order))  # the order of contenders differs between rounds
            for key in order[first:] + order[:first]:
                self._attempt(key[0], lambda k=key: self._time(k))  # type: ignore[misc]
        for name, (contender, _) in chosen.items():
            if "failed" not in self._rows[name]:
                self._rows[name] |= self._figures(contender)
            yield self._rows[name]

    def _attempt(self, name: str, action: Callable[[], None]) -> None:
        """Do something for a contender; one that fails takes no more turns."""
        try:
            action()
        except Exception as error:
            self._rows[name]["failed"] = reason(error)
            self._calls = {key: call for key, call in self._calls.items() if key[0] != name}
            if self._plan.device == "cuda":
                torch.cuda.empty_cache()

    def _warm_up(self, contender: Contender, batches: list[Batch]) -> None:
        resident = [(one.to(contender.device), other.to(contender.device)) for one, other in batches]
        on_gpu = contender.device == "cuda"
        for _ in range(2):  # libraries allocate for themselves at their first call
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            before = self._plan.allocated()
            contender.run(resident)
            self._plan.synchronize()
        if on_gpu and contender.format != "ONNX":
            self._rows[contender.name]["work_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
        self._calls[contender.name, "resident"] = lambda: contender.run(resident)
        if on_gpu:
            self._calls[contender.name, "copied"] = lambda: contender.run(batches)

    def _time(self, key: tuple[str, str]) -> None:
        self._times.setdefault(key, []).append(self._plan.time(self._calls[key]))

    def _figures(self, contender: Contender) -> Row:
        """Medians, and medians of the ratios within a round."""
        mine = self._times[contender.name, "resident"]
        median = statistics.median(mine)
        audio = sum(self._seconds)
        macs = sum(contenders.count_macs(self._path, len(clip)) for clip in self._clips)
        figures: Row = {
            "ms": median * 1e3,
            "fastest_ms": min(mine) * 1e3,
            "slowest_ms": max(mine) * 1e3,
            "times_real_time": audio / median,
        }
        if copied := self._times.get((contender.name, "copied")):
            figures["with_copy_ms"] = statistics.median(copied) * 1e3
        for key, name in ("ratio_to_one_by_one", SPEECHBRAIN), ("ratio_to_padded", PADDED), ("ratio_to_cpu", REFERENCE):
            name = name if (name, "resident") in self._times else SPEECHBRAIN if key == "ratio_to_padded" else name
            theirs = self._times.get((name, "resident"), [])
            if ratios := [other / one for other, one in zip(theirs, mine, strict=False)]:
                figures[key] = statistics.median(ratios)
        if contender.ours:
            figures["tflops"] = 2 * macs / median / 1e12
            if best := self._bench.best.get((contender.device, contender.precision)):
                figures["of_best_product"] = macs / median / best
        return figures


def kernels(bench: Bench) -> Iterator[Row]:
    """The kernels of TorchScript in float32 and float16, by torch's profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    for plan in bench.plans:
        for name in [f"TorchScript {precision.upper()}" for precision in plan.precisions if precision != "tf32"]:
            for contender, seconds in itertools.product([c for c in bench.on(plan) if c.name == name], plan.profiled):
                batches = contenders.in_batches(contenders.pack, None)(bench.noise(seconds))
                resident = [(one.to(plan.device), other.to(plan.device)) for one, other in batches]
                contender.run(resident)
                plan.synchronize()
                with torch.profiler.profile(activities=activities) as profiler:
                    with torch.profiler.record_function(CALL):
                        contender.run(resident)
                    plan.synchronize()
                with tempfile.NamedTemporaryFile(suffix=".json") as trace:
                    profiler.export_chrome_trace(trace.name)
                    events = json.loads(Path(trace.name).read_text(encoding="utf-8"))["traceEvents"]
                row = {"device": plan.device, "contender": name, "clips": f"{len(seconds)} x {seconds[0]:g} s"}
                yield row | summary(events, "kernel" if plan.device == "cuda" else "cpu_op")


def summary(events: list[Row], category: str = "kernel") -> Row:
    """Of a Chrome trace with one call named `CALL`: its kernels, and the copies and waits between start and end."""
    events = [event for event in events if event.get("ph") == "X"]
    (call,) = (event for event in events if event.get("cat") == "user_annotation" and event["name"] == CALL)
    of_host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    inside = Counter(e["name"] for e in of_host if call["ts"] <= e["ts"] <= call["ts"] + call["dur"])
    times: Counter[str] = Counter()
    found = [event for event in events if event.get("cat") == category]
    for kernel in found:
        times[kernel["name"]] += kernel["dur"]
    total = sum(times.values())
    return {
        "kernels": len(found),
        "launches": sum(count for name, count in inside.items() if "Launch" in name),
        "kernel_ms": total / 1e3,
        "call_ms": call["dur"] / 1e3,
        "top": [{"kernel": name, "ms": us / 1e3, "share": us / total} for name, us in times.most_common(10)],
        "waits": {name: count for name, count in inside.items() if "Synchronize" in name or "Memcpy" in name},
        "copies": dict(Counter(e["name"] for e in events if e.get("cat") in ("gpu_memcpy", "gpu_memset"))),
    }


def _save(data: Row, path: Path | None) -> None:
    """Write the figures anew."""
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def _write_page(data: Row, path: Path) -> None:
    try:
        from . import report

        written = report.write(bench_page.page(data), path.with_suffix(""))
    except ModuleNotFoundError as error:
        print(f"no page: {reason(error)}")
        written = []
    print("\n".join(f"wrote {name}" for name in [path, *written]))
