"""The packed model on ONNX Runtime against SpeechBrain and bare matrix products, in process, on the CPU.

Ours runs in batches of the size that `configs/cpu.pbtxt` prefers, as the server does with single clips; one batch of
all is reported too. All contenders run in turn within each round, on the same number of threads, each after a pause in
which the others' threads go to sleep and one call that is not timed. Reported are medians over the rounds; ratios are
medians of the ratios within a round.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from ecapa_triton.audio import SAMPLE_RATE
from google.protobuf import text_format
from numpy.typing import NDArray
from torch import nn
from tritonclient.grpc import model_config_pb2

from export import checkpoint
from export.artifacts import OPSET, OnnxModel, write_onnx
from export.configs import MODEL
from export.packed import PackedEcapa
from export.verify import difference

from . import machine

CPU_CONFIG = Path(__file__).parent.parent / "model_repository" / MODEL / "configs" / "cpu.pbtxt"
PAUSE = 0.03  # s, for spinning threads of the previous contender to give the cores back
SHORTEST = 0.05  # s, that a contender is timed for in a round, by repeating it
ROWS: dict[str, list[float]] = {  # seconds of the clips in a batch
    "1 s": [1],
    "5 s": [5],
    "10 s": [10],
    "8 x 3 s": [3] * 8,
    "8 mixed, 1 to 10 s": [1, 2.3, 3.1, 4.7, 5.9, 7.2, 8.4, 10],
    "32 x 1 s": [1] * 32,
}
HEADER = (
    "| clips | ours, ms | in one batch, ms | SpeechBrain one by one, ms | padded batch, ms | ratio to the better "
    "| ratio to padded | times real time | GMAC/s | of the best product | of its own products |\n"
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|"
)


def run(options: argparse.Namespace) -> None:
    """Measure all rows, print them as Markdown and write them to ``options.json``."""
    threads = options.threads or machine.cores()
    torch.set_num_threads(threads)
    loaded = checkpoint.load(options.source, channels=options.channels)
    packed = PackedEcapa(loaded).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        write_onnx(packed, loaded, path)
        ours = OnnxModel(path, threads)

    report = machine.describe(
        ("torch", "speechbrain", "onnxruntime", "numpy"),
        command="python -m loadtest model",
        model=loaded.source,
        threads=threads,
        rounds=options.rounds,
    )
    print(
        f"{report['cpu']}, {threads} threads; {loaded.source}; torch {report['packages']['torch']}, "
        f"onnxruntime {report['packages']['onnxruntime']}; batches of {preferred_batch_size()}; "
        f"medians of {options.rounds} interleaved rounds\n\n{HEADER}"
    )
    report["rows"] = []
    for name, seconds in ROWS.items():
        row = _measure(name, seconds, packed, ours, loaded.classifier, threads, options.rounds)
        report["rows"].append(row)
        print(
            f"| {name} | {row['ms']:.1f} | {row['one_batch_ms']:.1f} "
            f"| {row['speechbrain_alone_ms']:.1f} | {row['speechbrain_padded_ms']:.1f} "
            f"| {row['ratio']:.2f} | {row['ratio_padded']:.2f} | {row['times_real_time']:.0f} "
            f"| {row['gmac_per_s']:.0f} | {row['fraction']:.2f} | {row['fraction_of_own_products']:.2f} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _measure(
    name: str, seconds: list[float], packed: PackedEcapa, ours: OnnxModel, classifier: Any, threads: int, rounds: int
) -> dict[str, Any]:
    random = np.random.default_rng(0)
    clips = [random.standard_normal(round(s * SAMPLE_RATE)).astype(np.float32) * 0.1 for s in seconds]
    tensors = [torch.from_numpy(clip) for clip in clips]
    padded = nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    parts = torch.tensor([len(clip) / padded.shape[1] for clip in clips])

    @torch.inference_mode()
    def alone() -> list[NDArray[np.float32]]:
        return [classifier.encode_batch(clip[None])[0, 0].numpy() for clip in tensors]

    @torch.inference_mode()
    def batch() -> None:
        classifier.encode_batch(padded, parts)

    size = preferred_batch_size()
    batches = [clips[start : start + size] for start in range(0, len(clips), size)]

    def batched() -> list[NDArray[np.float32]]:
        return [row for some in batches for row in ours.embed(some)]

    for row, reference in zip([*batched(), *ours.embed(clips)], alone() * 2, strict=True):
        error, _ = difference(row, reference)
        if not error < 1e-4:
            raise RuntimeError(f"{name}: {error:.1e} away from SpeechBrain, a speed of wrong results means nothing")

    products = count_products(packed, clips, len(batches))
    contenders: dict[Any, Callable[[], object]] = {
        "ours": batched,
        "one batch": (lambda: ours.embed(clips)) if len(batches) > 1 else batched,
        "alone": alone,
        "padded": batch,
    }
    contenders |= {shape: _product(*shape, threads) for shape in products}
    times: dict[Any, list[float]] = {key: [] for key in contenders}
    order = list(contenders)
    for turn in range(rounds):
        first = turn % len(order)  # nobody always runs behind the same other
        for key in order[first:] + order[:first]:
            times[key].append(_time(contenders[key]))
    median = {key: statistics.median(values) for key, values in times.items()}

    gmac = sum(rows * k * n * count for (rows, k, n), count in products.items()) / 1e9
    own = sum(median[shape] * count for shape, count in products.items())
    rates = {(rows, k, n): rows * k * n / 1e9 / median[rows, k, n] for rows, k, n in products}
    best = max(rates, key=lambda shape: rates[shape])
    better = min(("alone", "padded"), key=lambda key: median[key])

    def ratio(key: Any) -> float:
        return statistics.median(theirs / mine for theirs, mine in zip(times[key], times["ours"], strict=True))

    return {
        "name": name,
        "seconds": seconds,
        "ms": median["ours"] * 1e3,
        "batch_size": size,
        "one_batch_ms": median["one batch"] * 1e3,
        "speechbrain_alone_ms": median["alone"] * 1e3,
        "speechbrain_padded_ms": median["padded"] * 1e3,
        "better": better,
        "ratio": ratio(better),
        "ratio_padded": ratio("padded"),
        "real_time_factor": median["ours"] / sum(seconds),
        "times_real_time": sum(seconds) / median["ours"],
        "gmac": gmac,
        "gmac_per_s": gmac / median["ours"],
        "best_product": list(best),
        "best_product_gmac_per_s": rates[best],
        "fraction": ratio(best) * gmac / (math.prod(best) / 1e9),
        "fraction_of_own_products": own / median["ours"],
        "all_ms": {str(key): [round(value * 1e3, 4) for value in values] for key, values in times.items()},
    }


def preferred_batch_size() -> int:
    """Up to how many single clips Triton joins in a batch, by the config for CPUs."""
    config = text_format.Parse(CPU_CONFIG.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    return int(max(config.dynamic_batching.preferred_batch_size, default=config.max_batch_size))


def count_products(
    packed: PackedEcapa, clips: list[NDArray[np.float32]], batches: int = 1
) -> dict[tuple[int, int, int], int]:
    """The model's matrix products over all frames: how often each shape (rows, inner, outer) occurs.

    Counted by running it: its linear layers, the Fourier transform and the mel filterbank. What belongs to the packing
    alone (sums over clips, gathers) is not counted, nor are the layers that see one row a clip. Several batches are
    counted as so many equal ones.
    """
    products: dict[tuple[int, int, int], int] = {}
    frames = sum(len(clip) // packed.hop + 1 for clip in clips)
    rows = round(frames / batches)

    def add(inner: int, outer: int) -> None:
        products[rows, inner, outer] = products.get((rows, inner, outer), 0) + batches

    def hook(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        if inputs[0].shape[0] >= frames:
            add(layer.in_features, layer.out_features)

    with _hooked([module for module in packed.modules() if isinstance(module, nn.Linear)], hook):
        lengths = torch.tensor([[len(clip)] for clip in clips], dtype=torch.int32)
        with torch.inference_mode():
            packed(torch.from_numpy(np.concatenate(clips)), lengths)
    add(packed.features.n_fft, packed.features.basis.shape[1])
    add(*packed.features.mel.shape)
    return products


@contextmanager
def _hooked(modules: list[nn.Linear], hook: Callable[..., None]) -> Iterator[None]:
    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _product(rows: int, inner: int, outer: int, threads: int) -> Callable[[], object]:
    """One float32 matrix product with a constant right side, as ONNX Runtime does it."""
    random = np.random.default_rng(0)
    weight = onnx.numpy_helper.from_array(random.standard_normal((inner, outer)).astype(np.float32), "weight")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "weight"], ["y"])],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [rows, inner])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [rows, outer])],
        [weight],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_cpu_input("x", random.standard_normal((rows, inner)).astype(np.float32))
    binding.bind_output("y", "cpu")
    return lambda: session.run_with_iobinding(binding)


def _time(call: Callable[[], object]) -> float:
    """Seconds for one call, after one that is not timed."""
    time.sleep(PAUSE)
    begun = time.perf_counter()
    call()
    repeats = max(1, round(SHORTEST / (time.perf_counter() - begun)))
    begun = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begun) / repeats
