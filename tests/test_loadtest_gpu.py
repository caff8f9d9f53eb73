"""`python -m loadtest gpu`: rehearsed on a CPU, and for real where there is a GPU; no time is asserted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import artifacts, checkpoint, configs
from export.packed import PackedEcapa
from export.verify import BOUNDS
from loadtest import gpu, gpu_models, gpu_page, gpu_served, machine, model
from loadtest.__main__ import main
from server.triton import TritonServer
from tests.conftest import ROOT

SECTIONS = "contenders", "agreement", "products", "model", "profile", "served"
BARE = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from loadtest.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
NOT_THERE = "speechbrain,onnx,onnxruntime,tritonclient,google,yaml,hyperpyyaml,torchaudio,soundfile,soxr,pytriton"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost float16 on a busy CPU minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some of the samples."""
    folder = tmp_path_factory.mktemp("speech")
    for name in ("anna_1.flac", "berta_1.flac", "carl_2.wav"):
        (folder / name).symlink_to(ROOT / "samples" / name)
    return folder


@pytest.fixture(scope="module")
def scripted(mini: checkpoint.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model's TorchScript files alone."""
    folder = tmp_path_factory.mktemp("scripted")
    for half, name in (False, "model.pt"), (True, "model_fp16.pt"):
        artifacts.write_torchscript(PackedEcapa(mini, half=half).eval(), mini, folder / name)
    return folder


@pytest.fixture(scope="module")
def files(scripted: Path, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in both formats."""
    folder: Path = shutil.copytree(scripted, tmp_path_factory.mktemp("files") / "all")
    for path in (repository / "ecapa" / "1").glob("*.onnx"):
        (folder / path.name).symlink_to(path)
    return folder


def report_in(folder: Path) -> tuple[dict[str, Any], str]:
    (figures,) = folder.glob("*.json")
    assert sorted(folder.iterdir()) == [figures, figures.with_suffix(".md")]
    return json.loads(figures.read_text()), figures.with_suffix(".md").read_text()


@pytest.mark.slow
def test_a_rehearsal_measures_everything(files: Path, speech: Path, tmp_path: Path) -> None:
    given = ["--repository", str(files), "--speech", str(speech)]
    assert main(["gpu", "--rehearse", *given, "--out", str(tmp_path)]) == 0
    report, page = report_in(tmp_path)
    assert tuple(report["sections"]) == SECTIONS
    assert not any("failed" in section for section in report["sections"].values())
    assert report["rehearsal"] and gpu_page.REHEARSAL in page
    rows = {name: section["rows"] for name, section in report["sections"].items()}
    names = [f"{kind} {precision}" for kind in gpu.FORMATS for precision in ("FP32", "TF32", "FP16")]
    assert [row["contender"] for row in rows["contenders"]] == [*names, "SpeechBrain", "CPU"]

    for row in rows["agreement"]:
        bounds = BOUNDS["fp16" if row["precision"] == "fp16" else "fp32"]
        assert row["error"] <= bounds.max_error and row["cosine"] >= bounds.min_cosine, row
        if row["precision"] == "fp16":  # it is another file that was run
            assert row["error"] > BOUNDS["fp32"].max_error
    assert {(row["contender"], row["how"]) for row in rows["agreement"]} == {
        *((name, how) for name in names for how in ("alone", "packed")),
        ("SpeechBrain", "alone"),
    }
    for row in rows["model"]:
        assert row["times_real_time"] == pytest.approx(row["clips"] * row["seconds"] / row["ms"] * 1e3)
        if row["contender"] in ("SpeechBrain", "CPU"):
            assert row[f"ratio_{row['contender'].lower()}"] == 1
    assert len(rows["model"]) == 2 * 8
    for row in rows["profile"]:
        assert row["kernels"] > 100 and sum(kernel["share"] for kernel in row["top"]) <= 1.0001
    good = [row for row in rows["served"] if "failed" not in row]
    assert [(row["model"], row["clips"]) for row in good] == [
        (name, clips) for name in ("ecapa_torchscript", "ecapa") for clips in ("2.02 s", "1 to 10 s")
    ]
    for row in good:
        assert row["right"] > 0 and row["wrong"] == 0 and row["errors"] == {} and row["clips_per_s"] > 0
        assert row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] and row["mean_batch"] >= 1
    assert sum("fp16 is for GPUs" in row.get("failed", "") for row in rows["served"]) == 2
    for word in ("## Goals", "not measured", "2,647 to 2,726", "What this does not show", "| reached |"):
        assert word in page


def test_torch_and_numpy_are_enough(scripted: Path, tmp_path: Path) -> None:
    arguments = ["gpu", "--rehearse", "--repository", str(scripted), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", BARE, NOT_THERE, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    report, page = report_in(tmp_path / "out")
    assert tuple(report["sections"]) == SECTIONS
    assert {row["contender"] for row in report["sections"]["model"]["rows"]} == {
        *("TorchScript FP32", "TorchScript TF32", "TorchScript FP16", "CPU")
    }
    assert "Served by Triton: not measured: tritonclient is not installed" in page
    done = subprocess.run([*command[:4], "gpu", "--rehearse"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "not installed: export elsewhere and name the folder" in done.stderr


def test_a_section_that_fails_stops_no_other(
    scripted: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(bench: gpu.Bench) -> Iterator[dict[str, Any]]:
        yield {"precision": "fp32", "size": 1, "tflops": 1.0}
        raise RuntimeError("CUDA error: too hot\nand more lines")

    monkeypatch.setattr(gpu, "products", fails)
    monkeypatch.setattr(gpu, "served", lambda bench, folder: iter(()))
    with pytest.raises(SystemExit) as status:
        given = ["--repository", str(scripted), "--speech", str(speech)]
        main(["gpu", "--rehearse", *given, "--out", str(tmp_path)])
    assert status.value.code == 1
    report, page = report_in(tmp_path)
    assert tuple(report["sections"]) == SECTIONS
    assert report["sections"]["products"]["failed"] == "CUDA error: too hot"
    assert len(report["sections"]["products"]["rows"]) == 1 and report["sections"]["model"]["rows"]
    assert "the section ended early: CUDA error: too hot" in page


def test_an_interrupt_keeps_what_was_measured(
    scripted: Path, speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(bench: gpu.Bench) -> Iterator[dict[str, Any]]:
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(gpu, "products", interrupted)
    with pytest.raises(SystemExit) as status:
        given = ["--repository", str(scripted), "--speech", str(speech)]
        main(["gpu", "--rehearse", *given, "--out", str(tmp_path)])
    assert status.value.code == 130
    report, page = report_in(tmp_path)
    assert report["interrupted"] and report["sections"]["agreement"]["rows"] and "Interrupted" in page
    assert "interrupted: what was measured before is in" in capsys.readouterr().out


def test_what_runs_out_of_memory_is_told_and_the_rest_measured(scripted: Path) -> None:
    def full(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if len(lengths) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\n...")
        return torch.zeros(len(lengths), 192)

    files = gpu_models.find(scripted)
    bench = gpu.Bench(gpu.PLANS["rehearsal"], files, gpu_models.read_metadata(files["TorchScript", "fp32"]), {})
    for name, embed in ("full", full), ("other", lambda w, n: torch.zeros(len(n), 192)):
        bench.contenders.append(gpu.Contender(name, "TorchScript", "fp32", "cpu", embed, 0.0))
    rows = {(row["clips"], row["contender"]): row.get("failed") for row in gpu.speed(bench)}
    assert rows == {(1, "full"): None, (1, "other"): None, (2, "full"): "out of memory", (2, "other"): None}


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("CUDA error: no kernel image\nCompile with ..."), "CUDA error: no kernel image"),
        (RuntimeError("The following operation failed in the TorchScript interpreter.\nTraceback\nE: bad"), "E: bad"),
        (RuntimeError("The ... TorchScript interpreter.\nRuntimeError: CUDA out of memory. Tried"), "out of memory"),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "a is not installed"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_reason_is_one_line(error: Exception, told: str) -> None:
    assert machine.reason(error) == told


def test_products_are_counted_as_by_the_benchmark(scripted: Path, mini: checkpoint.Checkpoint) -> None:
    packed = PackedEcapa(mini).eval()
    products = model.count_products(packed, [np.zeros(16000, np.float32)])
    macs = sum(rows * inner * outer * count for (rows, inner, outer), count in products.items())
    padding = packed.features.basis.shape[0] - packed.features.n_fft
    assert gpu_models.count_macs(scripted / "model.pt", 16000) == macs + 101 * padding * packed.features.basis.shape[1]


def test_another_clips_embedding_is_wrong(server: TritonServer, scripted: Path) -> None:
    clips = [0.1 * np.random.default_rng(n).standard_normal(8000 + 4000 * n).astype(np.float32) for n in range(4)]
    embed = artifacts.TorchScriptModel(scripted / "model.pt").embed
    right = np.stack([embed([clip])[0] for clip in clips])

    def drive(expected: np.ndarray) -> gpu_served.Outcome:
        now = time.monotonic()
        return gpu_served.drive(gpu_served.Load(server.grpc_url, "ecapa", clips, expected, 1e-4, 2, now, now + 0.5))

    outcome = drive(right)
    assert outcome.right >= len(outcome.latencies) > 0 and outcome.wrong == 0 and not outcome.errors
    outcome = drive(np.roll(right, 1, axis=0))
    assert outcome.wrong > 0 and outcome.right == 0 and outcome.latencies == []
    assert gpu_page.faults({"sections": {"served": {"rows": [{"wrong": outcome.wrong}]}}})


def test_kernels_are_told_from_a_trace() -> None:
    def event(cat: str, name: str, ts: float, dur: float) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("user_annotation", "embed", 10, 100),
        event("gpu_user_annotation", "embed", 15, 200),
        event("cuda_runtime", "cudaLaunchKernel", 20, 1),
        event("cuda_driver", "cuLaunchKernelEx", 30, 1),
        event("cuda_runtime", "cudaMemcpyAsync", 40, 1),
        event("cuda_runtime", "cudaDeviceSynchronize", 120, 80),  # ours, behind the call
        event("kernel", "gemm", 50, 30),
        event("kernel", "gemm", 90, 30),
        event("kernel", "relu", 130, 20),
        event("gpu_memcpy", "Memcpy DtoH", 85, 2),
        {"ph": "M", "name": "process_name"},
    ]
    found = gpu.summary(events)
    assert (found["kernels"], found["launches"], found["gpu_ms"]) == (3, 2, 0.08)
    assert found["top"] == [
        {"kernel": "gemm", "ms": 0.06, "share": 0.75},
        {"kernel": "relu", "ms": 0.02, "share": 0.25},
    ]
    assert found["waits"] == {"cudaMemcpyAsync": 1} and found["copies"] == {"Memcpy DtoH": 1}


@pytest.mark.parametrize(
    ("cosines", "verdict"),
    [([1.0, 0.99995], "reached"), ([1.0, 0.9998], "not reached"), ([1.0, np.nan], "not reached")],
)
def test_goals_are_judged_by_the_worst(cosines: list[float], verdict: str) -> None:
    rows = [{"contender": "ONNX FP32", "precision": "fp32", "cosine": cosine} for cosine in cosines]
    judged = {name: word for name, _, word in gpu_page.goals({"sections": {"agreement": {"rows": rows}}})}
    assert judged.pop("cosine of CPU and GPU >= 0.9999") == verdict
    assert set(judged.values()) == {"not measured"}


def test_the_files_are_those_of_the_export() -> None:
    theirs = {kind.folder: {"fp32": kind.file, "fp16": kind.half_file} for kind in configs.FORMATS.values()}
    assert dict(gpu_models.FORMATS.values()) == theirs


def test_without_a_gpu_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["gpu", "--out", str(tmp_path / "out")]) == 0
    assert "no GPU was found" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["gpu", "--rehearse", "--repository", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert "has no model.pt: write it with" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    assert main(["gpu", "--quick", "--out", str(tmp_path)]) == 0
    report, page = report_in(tmp_path)
    assert not report["rehearsal"] and not any("failed" in section for section in report["sections"].values())
    agreed = [row for row in report["sections"]["agreement"]["rows"] if row["contender"].startswith("TorchScript")]
    assert agreed and all(row["cosine"] >= BOUNDS["fp16"].min_cosine for row in agreed)
    assert all(row["kernels"] > 0 for row in report["sections"]["profile"]["rows"])
    assert "| not measured |" not in page.partition("## Goals")[2].partition("##")[0]
