"""The whole system on a host with a GPU, in one command: agreement, speed, kernels, serving, judged by our goals.

Every row is written as soon as it is measured, so nothing that ends the run costs what was there before. What is not
installed is said to be so: torch and numpy are enough for model files that were exported elsewhere (`--repository`).
Model files that are written here are not verified as `python -m export` does; the section on agreement tells.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from . import gpu_page, gpu_served, machine
from .clips import Clips, compare
from .gpu_models import (
    FORMATS,
    SAMPLE_RATE,
    Array,
    Embed,
    Files,
    count_macs,
    find,
    noise,
    onnx,
    onnx_devices,
    packed,
    read_metadata,
    read_speech,
    speechbrain,
    torchscript,
    write_models,
)
from .gpu_page import Row
from .machine import reason

PRODUCT_TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
SPEECHBRAIN, CPU = "SpeechBrain", "CPU"
PACKED = 64  # clips in a batch of the agreement, as in configs/gpu.pbtxt
CPU_CLIPS, CPU_ROUNDS = 8, 3  # the largest batch and the rounds of the CPU
POOL = 32  # clips that the clients of the server choose from
EMBED = "embed"  # the profiled call


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        device: torch's; "cpu" in a rehearsal.
        rounds: interleaved, of all contenders.
        rows: clips in a batch and the seconds of each.
        products: sizes of square matrix products.
        profiled: as `rows`.
        clients: of the server.
        seconds: of load for each number of clients.
    """

    device: str = "cuda"
    rounds: int = 20
    rows: tuple[tuple[int, float], ...] = (
        *((1, 1.0), (1, 5.0), (1, 10.0)),
        *((clips, 2.02) for clips in (1, 8, 16, 32, 64, 128)),
        *((clips, 5.0) for clips in (8, 16, 32, 64, 128)),
    )
    products: tuple[int, ...] = (4096, 8192)
    profiled: tuple[tuple[int, float], ...] = ((1, 5.0), (32, 5.0))
    clients: tuple[int, ...] = (1, 32, 200, 400)
    seconds: float = 10.0

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def allocated(self) -> int:
        """Bytes that torch holds on the device; 0 in a rehearsal."""
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0


PLANS = {
    "full": Plan(),
    "quick": Plan(rounds=5, seconds=3.0),
    "rehearsal": Plan("cpu", 1, ((1, 1.0), (2, 0.5)), (128,), ((1, 0.5),), (2,), 1.0),
}


@dataclass(frozen=True)
class Contender:
    """A model loaded to a device: `format` is of `FORMATS`, `SPEECHBRAIN` or `CPU`, `model_mb` what it holds there."""

    name: str
    format: str
    precision: str
    device: str
    embed: Embed
    model_mb: float


@dataclass
class Bench:
    """What the sections measure, and with what.

    Attributes:
        files: model files by format and precision.
        metadata: of the float32 TorchScript file.
        speech: clips by name, float32 `[samples]`, 16 kHz.
        contenders: what could be loaded.
        best: TFLOP/s of the best square matrix product by precision.
    """

    plan: Plan
    files: Files
    metadata: dict[str, str]
    speech: dict[str, Array]
    contenders: list[Contender] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)

    @cached_property
    def cpu(self) -> Embed:
        """The reference: the float32 TorchScript file on the CPU."""
        return torchscript(self.files["TorchScript", "fp32"], "cpu")

    def reference(self, clips: Iterable[Array]) -> Array:
        """The reference's embedding of each clip alone, `[n, E]`."""
        return np.stack([self.cpu(*packed([clip], "cpu"))[0].numpy() for clip in clips])


def run(options: argparse.Namespace) -> None:
    """Measure section by section into `options.out`; exit status 1 if a section failed or a reply was wrong."""
    if not options.rehearse and not torch.cuda.is_available():
        print(f"no GPU was found that torch {torch.__version__} can use: nothing was measured")
        return
    plan = PLANS["rehearsal" if options.rehearse else "quick" if options.quick else "full"]
    with tempfile.TemporaryDirectory() as folder:
        if options.repository:
            files = find(options.repository)
        else:
            source = "mini" if options.rehearse else options.source
            files = write_models(Path(folder), source, options.channels, plan.device)
        metadata = read_metadata(files["TorchScript", "fp32"])
        longest = round(float(metadata["max_seconds"]) * SAMPLE_RATE)
        bench = Bench(plan, files, metadata, read_speech(options.speech, longest))
        report = Report(describe(options, bench), options.out)
        sections: dict[str, Callable[[], Iterator[Row]]] = {
            "contenders": lambda: load(bench),
            "agreement": lambda: agreement(bench),
            "products": lambda: products(bench),
            "model": lambda: speed(bench),
            "profile": lambda: profile(bench, Path(folder)),
            "served": lambda: served(bench, Path(folder)),
        }
        try:
            for name, rows in sections.items():
                report.section(name, rows())
        except KeyboardInterrupt:
            report.data["interrupted"] = True
            report.save()
            print(f"interrupted: what was measured before is in {report.path}.md")
            raise SystemExit(130) from None
    print(f"wrote {report.path}.json and .md")
    if gpu_page.faults(report.data):
        raise SystemExit(1)


class Report:
    """The results, written to a JSON and a Markdown file after every row."""

    def __init__(self, data: Row, folder: Path) -> None:
        self.data: Row = {**data, "sections": {}}
        name = re.sub(r"[^a-z0-9]+", "-", data["gpu"]["name"].lower()).strip("-")
        self.path = folder / f"{data['date'][:10]}-{name}"
        folder.mkdir(parents=True, exist_ok=True)

    def section(self, name: str, rows: Iterator[Row]) -> None:
        """Take in the rows of a section as they come; what ends it early is noted, and the rows before it stay."""
        section: Row = {"rows": []}
        self.data["sections"][name] = section
        self.save()
        print(f"{gpu_page.TITLES[name]} ...", flush=True)
        try:
            for row in rows:
                section["rows"].append(row)
                self.save()
        except ModuleNotFoundError as error:
            section["rows"].append({"contender": gpu_page.TITLES[name], "failed": reason(error)})
            self.save()
        except Exception as error:
            section["failed"] = reason(error)
            self.save()
        print(gpu_page.section(name, section), flush=True)

    def save(self) -> None:
        """Write both files anew."""
        for suffix, text in (".json", json.dumps(self.data, indent=1) + "\n"), (".md", gpu_page.page(self.data)):
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text(text, encoding="utf-8")
            partial.replace(self.path.with_name(self.path.name + suffix))


def describe(options: argparse.Namespace, bench: Bench) -> Row:
    """The machine, the versions, the model and the command."""
    installed = machine.installed(
        "torch", "onnxruntime-gpu", "onnxruntime", "speechbrain", "nvidia-pytriton", "tritonclient", "numpy"
    )
    gpu: Row = {"name": "rehearsal"}
    if bench.plan.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "processors": properties.multi_processor_count,
            "driver": machine.output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
            "power_limit": machine.output("nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader", "--id=0"),
        }
    words = [f"--{word}" for word in ("quick", "rehearse") if getattr(options, word)]
    words += [] if options.repository else [f"--source {Path(options.source).name}"]
    words += [f"--{word} FOLDER" for word in ("repository", "speech") if getattr(options, word)]
    return machine.describe(
        installed,
        rehearsal=bench.plan.device == "cpu",
        gpu=gpu,
        cuda=torch.version.cuda,
        threads=torch.get_num_threads(),
        commit=machine.commit(),
        command=" ".join(["python -m loadtest gpu", *words]),
        model=bench.metadata,
        rounds=bench.plan.rounds,
        clips_of_speech=len(bench.speech),
    )


def load(bench: Bench) -> Iterator[Row]:
    """Load every contender that can be, and tell of each."""
    device, files = bench.plan.device, bench.files
    loaders: dict[tuple[str, str], tuple[str, Callable[[], Embed]]] = {}
    for (kind, open_file), precision in itertools.product(
        (("TorchScript", torchscript), ("ONNX", onnx)), ("fp32", "tf32", "fp16")
    ):
        if path := files.get((kind, "fp16" if precision == "fp16" else "fp32")):
            tf32 = precision == "tf32"
            loaders[kind, precision] = device, lambda o=open_file, p=path, t=tf32: o(p, device, t)  # type: ignore[misc]
    loaders[SPEECHBRAIN, "fp32"] = device, lambda: speechbrain(bench.metadata, device)
    on_cpu = files.get(("ONNX", "fp32")) if "cpu" in onnx_devices() else None
    loaders[CPU, "fp32"] = "cpu", (lambda: onnx(on_cpu, "cpu")) if on_cpu else (lambda: bench.cpu)
    for (kind, precision), (place, loader) in loaders.items():
        name = f"{kind} {precision.upper()}" if kind in FORMATS else kind
        before = bench.plan.allocated()
        try:
            embed = loader()
        except Exception as error:
            yield {"contender": name, "failed": reason(error)}
            continue
        held = (bench.plan.allocated() - before) / 1e6
        bench.contenders.append(Contender(name, kind, precision, place, embed, held))
        told = (
            held if kind in ("TorchScript", SPEECHBRAIN) and held else None
        )  # what ONNX Runtime holds torch cannot see
        yield {"contender": name, "format": kind, "precision": precision, "model_mb": told}
    for kind in FORMATS:
        if (kind, "fp32") not in files:
            yield {"contender": kind, "failed": "no file: not written here without an onnxruntime that has CUDA"}


def agreement(bench: Bench) -> Iterator[Row]:
    """Embeddings of speech on the device against those of the CPU, clips alone and packed."""
    clips = [clip for clip in bench.speech.values() if len(clip) >= int(bench.metadata["min_samples"])]
    expected = bench.reference(clips)
    for contender in bench.contenders:
        if contender.format == CPU:
            continue
        for how, size in (("alone", 1), ("packed", PACKED)):
            if contender.format == SPEECHBRAIN and size > 1:
                continue  # it would have to pad
            row = {"contender": contender.name, "precision": contender.precision, "how": how, "clips": len(clips)}
            try:
                batches = [packed(clips[at : at + size], contender.device) for at in range(0, len(clips), size)]
                got = np.concatenate([contender.embed(*batch).cpu().numpy() for batch in batches])
                yield row | compare(got, expected)
            except Exception as error:
                yield row | {"failed": reason(error)}


def products(bench: Bench) -> Iterator[Row]:
    """Square matrix products, the best of which is what a model's work is held against."""
    for (precision, kind), size in itertools.product(PRODUCT_TYPES.items(), bench.plan.products):
        a = torch.randn(size, size, device=bench.plan.device).to(kind)
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        times = [_time(bench.plan, lambda a=a: a @ a) for _ in range(10)]  # type: ignore[misc]
        tflops = 2 * size**3 / statistics.median(times[2:]) / 1e12
        bench.best[precision] = max(tflops, bench.best.get(precision, 0))
        yield {"precision": precision, "size": size, "tflops": tflops}


def _time(plan: Plan, call: Callable[[], object]) -> float:
    plan.synchronize()
    begun = time.perf_counter()
    call()
    plan.synchronize()
    return time.perf_counter() - begun


def speed(bench: Bench) -> Iterator[Row]:
    """Every contender on every row."""
    for clips, seconds in bench.plan.rows:
        macs = clips * count_macs(bench.files["TorchScript", "fp32"], round(seconds * SAMPLE_RATE))
        yield from _speed(bench, clips, seconds, 2 * macs / 1e12)


def _speed(bench: Bench, clips: int, seconds: float, teraflop: float) -> Iterator[Row]:
    """A row for every contender, timed in turn within each round, each after a call that is not timed."""
    plan = bench.plan
    batch = packed(noise(clips, seconds), "cpu")
    rows: dict[str, Row] = {}
    ready: dict[str, tuple[Contender, tuple[Tensor, Tensor]]] = {}

    def attempt(contender: Contender, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            rows[contender.name]["failed"] = reason(error)
            ready.pop(contender.name, None)
            if plan.device == "cuda":
                torch.cuda.empty_cache()

    def warm_up(contender: Contender) -> None:
        inputs = batch[0].to(contender.device), batch[1].to(contender.device)
        for _ in range(2):  # the second one's memory: without what libraries set up at their first call
            if plan.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            held = plan.allocated()
            contender.embed(*inputs)
            plan.synchronize()
        if plan.device == contender.device == "cuda" and contender.format != "ONNX":
            rows[contender.name]["work_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
        ready[contender.name] = contender, inputs

    def measure(contender: Contender, inputs: tuple[Tensor, Tensor]) -> None:
        contender.embed(*inputs)
        resident = _time(plan, lambda: contender.embed(*inputs))
        copied = _time(plan, lambda: contender.embed(*(tensor.to(contender.device) for tensor in batch)))
        rows[contender.name]["all_ms"].append(resident * 1e3)
        rows[contender.name]["all_with_copy_ms"].append(copied * 1e3)

    for contender in bench.contenders:
        if contender.format == CPU and clips > CPU_CLIPS:
            continue
        rows[contender.name] = {"clips": clips, "seconds": seconds, "contender": contender.name}
        rows[contender.name] |= {"format": contender.format, "precision": contender.precision}
        rows[contender.name] |= {"all_ms": [], "all_with_copy_ms": []}
        attempt(contender, lambda c=contender: warm_up(c))  # type: ignore[misc]
    for turn in range(plan.rounds):
        order = [name for name in ready if turn < CPU_ROUNDS or ready[name][0].format != CPU]
        first = turn % max(1, len(order))  # nobody always runs behind the same other
        for name in order[first:] + order[:first]:
            attempt(ready[name][0], lambda r=ready[name]: measure(*r))  # type: ignore[misc]
    for row in rows.values():
        if "failed" not in row:
            row |= _figures(row, rows, clips * seconds, teraflop, bench.best.get(row["precision"]))
        yield row


def _figures(row: Row, rows: dict[str, Row], audio: float, teraflop: float, best: float | None) -> Row:
    """Medians, and medians of the ratios within a round, from the times of all contenders."""
    ms = statistics.median(row["all_ms"])
    tflops = teraflop / ms * 1e3
    figures = {
        "ms": ms,
        "with_copy_ms": statistics.median(row["all_with_copy_ms"]),
        "times_real_time": audio / ms * 1e3,
        "tflops": tflops,
        "fraction": tflops / best if best and row["format"] in FORMATS else None,
    }
    for key, other in ("ratio_speechbrain", SPEECHBRAIN), ("ratio_cpu", CPU):
        ratios = [a / b for a, b in zip(rows.get(other, {}).get("all_ms", []), row["all_ms"], strict=False)]
        figures[key] = statistics.median(ratios) if ratios else None
    return figures


def profile(bench: Bench, folder: Path) -> Iterator[Row]:
    """The kernels of TorchScript, in float32 and float16."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if bench.plan.device == "cuda" else []
    for contender in bench.contenders:
        if contender.format != "TorchScript" or contender.precision == "tf32":
            continue
        for clips, seconds in bench.plan.profiled:
            inputs = packed(noise(clips, seconds), contender.device)
            contender.embed(*inputs)
            bench.plan.synchronize()
            with torch.profiler.profile(activities=activities) as profiler:
                with torch.profiler.record_function(EMBED):
                    contender.embed(*inputs)
                bench.plan.synchronize()
            profiler.export_chrome_trace(str(folder / "trace.json"))
            events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
            row = {"contender": contender.name, "clips": clips, "seconds": seconds}
            yield row | summary(events, "kernel" if bench.plan.device == "cuda" else "cpu_op")


def summary(events: list[Row], category: str = "kernel") -> Row:
    """Of a Chrome trace with one call named `EMBED`: its kernels, and what copies or waits between start and end."""
    events = [event for event in events if event.get("ph") == "X"]
    (call,) = (event for event in events if event.get("cat") == "user_annotation" and event["name"] == EMBED)
    of_host = [event for event in events if event.get("cat") in ("cuda_runtime", "cuda_driver")]
    inside = Counter(e["name"] for e in of_host if call["ts"] <= e["ts"] <= call["ts"] + call["dur"])
    times: Counter[str] = Counter()
    kernels = [event for event in events if event.get("cat") == category]
    for kernel in kernels:
        times[kernel["name"]] += kernel["dur"]
    total = sum(times.values())
    return {
        "kernels": len(kernels),
        "launches": sum(count for name, count in inside.items() if "Launch" in name),
        "gpu_ms": total / 1e3,
        "call_ms": call["dur"] / 1e3,
        "top": [{"kernel": name, "ms": us / 1e3, "share": us / total} for name, us in times.most_common(10)],
        "waits": {name: count for name, count in inside.items() if "Synchronize" in name or "Memcpy" in name},
        "copies": dict(Counter(e["name"] for e in events if e.get("cat") in ("gpu_memcpy", "gpu_memset"))),
    }


def served(bench: Bench, folder: Path) -> Iterator[Row]:
    """Serve what can run on the device, under clips of speech that are cut anywhere and lie under noise."""
    device: Literal["gpu", "cpu"] = "gpu" if bench.plan.device == "cuda" else "cpu"
    formats: dict[str, tuple[str, dict[gpu_served.Precision, Path]]] = {}
    for kind, (model, _) in FORMATS.items():
        if kind == "ONNX" and bench.plan.device not in onnx_devices():
            yield {"model": model, "format": kind, "failed": "onnxruntime is not installed, or without CUDA"}
            continue
        precisions: tuple[gpu_served.Precision, ...] = ("fp32", "fp16")
        files = {name: bench.files[kind, name] for name in precisions if (kind, name) in bench.files}
        formats[kind] = model, files
    random = np.random.default_rng(0)
    speech = np.concatenate(list(bench.speech.values()))

    def clips(seconds: Iterable[float]) -> Clips:
        waveforms = []
        for samples in (round(s * SAMPLE_RATE) for s in seconds):
            clip = np.take(speech, np.arange(samples) + random.integers(len(speech)), mode="wrap")
            hiss = random.standard_normal(samples) * 10 ** random.uniform(-4, -1)
            waveforms.append((clip + hiss).astype(np.float32))
        return Clips(waveforms, bench.reference(waveforms))

    mixes = {"2.02 s": clips([2.02] * POOL), "1 to 10 s": clips(np.linspace(1, 10, POOL))}
    bench.contenders.clear()  # the server has the device to itself
    if device == "gpu":
        torch.cuda.empty_cache()
    yield from gpu_served.served(formats, mixes, device, bench.plan.clients, bench.plan.seconds, folder)
