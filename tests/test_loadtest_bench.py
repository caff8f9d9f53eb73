"""`python -m loadtest bench`: all of it on a CPU, and for real where there is a GPU; no time is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import artifacts, checkpoint
from export.packed import PARTS, PackedEcapa
from export.verify import BOUNDS
from loadtest import bench, contenders
from loadtest.__main__ import main
from loadtest.machine import reason
from tests.conftest import ROOT

ROW = "1 s"
BARE = """
import sys
for name in sys.argv.pop(1).split(","):
    sys.modules[name] = None
from loadtest.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
NOT_THERE = (
    "speechbrain,onnx,onnxruntime,tritonclient,google,yaml,hyperpyyaml,torchaudio,soundfile,soxr,pytriton,jinja2,psutil"
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other cost float16 on a busy CPU minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def scripted(mini: checkpoint.Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small model's TorchScript files alone."""
    folder = tmp_path_factory.mktemp("scripted")
    for half, name in (False, "model.pt"), (True, "model_fp16.pt"):
        artifacts.write_torchscript(PackedEcapa(mini, half=half).eval(), mini, folder / name)
    return folder


def small(folder: Path, speech: list[np.ndarray], **changes: Any) -> bench.Bench:
    """A bench that measures on a CPU what is measured on a GPU, in a second or two."""
    plan: dict[str, Any] = {
        "rows": {ROW: [1.0], "2 mixed": [0.5, 0.8]},
        "precisions": ("fp32", "fp16"),
        "profiled": [[0.5]],
        "squares": (64,),
    }
    files = contenders.find(folder)
    metadata = contenders.read_metadata(files["TorchScript", "fp32"])
    return bench.Bench(bench.Plan("cpu", 1, **plan | changes), files, metadata, speech)


def clips(*seconds: float) -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [0.1 * random.standard_normal(round(s * 16000)).astype(np.float32) for s in seconds]


def test_everything_is_measured(scripted: Path, repository: Path, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for path in [*scripted.iterdir(), *(repository / "ecapa" / "1").glob("*.onnx")]:
        (folder / path.name).symlink_to(path)
    figures = tmp_path / "out" / "figures.json"
    data = bench.measure(small(folder, clips(0.3, 0.5, 1)), figures, "the command")
    assert data == json.loads(figures.read_text())
    rows = data["sections"]
    ours = [f"{kind} {precision}" for kind in ("ONNX", "TorchScript") for precision in ("FP32", "FP16")]
    assert [row["contender"] for row in rows["load"]] == [*ours, "SpeechBrain"]
    for row in rows["agreement"]:
        bounds = BOUNDS["fp16" if "FP16" in row["contender"] else "fp32"]
        if row["contender"] == contenders.PADDED and row["embedded"] == "together":  # why it is not the reference
            assert row["error"] > bounds.max_error
        else:
            assert row["error"] <= bounds.max_error and row["cosine"] >= bounds.min_cosine, row
        if "FP16" in row["contender"]:  # another file was run
            assert row["error"] > BOUNDS["fp32"].max_error
    for row in rows["speed"]:
        assert row["times_real_time"] == pytest.approx(sum(row["seconds"]) / row["ms"] * 1e3)
        (theirs,) = (r for r in rows["speed"] if (r["clips"], r["contender"]) == (row["clips"], contenders.SPEECHBRAIN))
        assert row["ratio_to_one_by_one"] == pytest.approx(theirs["ms"] / row["ms"])  # there is one round
        if row["contender"] in ours:
            best = next(p["tflops"] for p in rows["products"] if p["precision"] == row["contender"][-4:].lower())
            assert row["of_best_product"] == pytest.approx(row["tflops"] / best)
    assert [(row["clips"], row["contender"]) for row in rows["speed"]] == [
        *((ROW, name) for name in [*ours, contenders.SPEECHBRAIN]),
        *(("2 mixed", name) for name in [*ours, contenders.SPEECHBRAIN, contenders.PADDED]),
    ]
    assert len(rows["kernels"]) == 2
    for row in rows["kernels"]:
        assert row["kernels"] > 100 and 0 < sum(kernel["share"] for kernel in row["top"]) <= 1.0001
    for suffix in ".md", ".html":
        page = figures.with_suffix(suffix).read_text()
        assert "the command" in page and data["weights"][:24] in page
        assert all(f"{row['ms']:.2f}" in page for row in rows["speed"])


def test_torch_and_numpy_are_enough(scripted: Path, tmp_path: Path) -> None:
    figures = tmp_path / "out" / "figures.json"
    arguments = ["bench", "--rounds", "1", "--threads", "1", "--json", str(figures)]
    command = [sys.executable, "-c", BARE, NOT_THERE, *arguments]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--repository", str(scripted)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(figures.read_text())["sections"]
    assert {row["contender"].removesuffix(", one batch") for row in rows["speed"]} == {"TorchScript FP32"}
    assert {row["contender"] for row in rows["load"] if "failed" in row} == {"ONNX FP32", "ONNX INT8", "SpeechBrain"}
    assert "jinja2" in done.stdout and list(figures.parent.iterdir()) == [figures]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "--repository" in done.stderr and "Traceback" not in done.stderr


def test_an_interrupt_keeps_what_was_measured(scripted: Path, tmp_path: Path) -> None:
    class Interrupted(tuple[int, ...]):
        def __iter__(self) -> Iterator[int]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(small(scripted, clips(0.5), squares=Interrupted()), tmp_path / "figures.json")
    rows = json.loads((tmp_path / "figures.json").read_text())["sections"]
    assert rows["agreement"] and "speed" not in rows and (tmp_path / "figures.md").exists()


def ones(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    return torch.ones(len(lengths), 192)


def contender(name: str, embed: contenders.Embed) -> contenders.Contender:
    return contenders.Contender(name, "fp32", "cpu", embed)


@pytest.mark.parametrize("calls", [0, 2], ids=["at first", "in a round"])
def test_out_of_memory_ends_one_contender_alone(scripted: Path, calls: int) -> None:
    made = iter(range(100_000))

    def full(waveform: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        if len(lengths) > 1 and next(made) >= calls:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\n...")
        return ones(waveform, lengths)

    measured = small(scripted, [])
    measured.best["fp32"] = 1.0
    measured.contenders = [contender("full", full), contender("other", ones)]
    rows = {(row["clips"], row["contender"]): row.get("failed") for row in bench.speed(measured)}
    assert rows == {
        (ROW, "full"): None,
        (ROW, "other"): None,
        ("2 mixed", "full"): "out of memory",
        ("2 mixed", "other"): None,
    }


def test_wrong_embeddings_are_told_and_not_timed(scripted: Path) -> None:
    measured = small(scripted, clips(0.5, 0.6))
    right = contenders.torchscript(scripted / "model.pt", "cpu")
    measured.contenders = [
        contender("right", right),
        contender("wrong", ones),
        contender("swapped", lambda waveform, lengths: right(waveform, lengths).flip(0)),
        contender("NaN", lambda waveform, lengths: ones(waveform, lengths) * np.nan),
    ]
    wrong = {row["contender"] for row in bench.agreement(measured) if "wrong" in row}
    assert wrong == {"wrong", "swapped", "NaN"}
    assert [one.name for one in measured.contenders] == ["right"]


def test_the_clips_of_the_agreement_differ() -> None:
    speech = bench.speech(16000)
    assert len(speech) == bench.TOGETHER and len({len(clip) for clip in speech}) > 60
    assert all(np.isfinite(clip).all() and 0.01 < np.abs(clip).max() <= 1.1 for clip in speech)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("CUDA error: no kernel image\nCompile with ..."), "CUDA error: no kernel image"),
        (RuntimeError("The following operation failed in the TorchScript interpreter.\nTraceback\nE: bad"), "E: bad"),
        (RuntimeError("The ... TorchScript interpreter.\nRuntimeError: CUDA out of memory. Tried"), "out of memory"),
        (ModuleNotFoundError("No module named 'a.b'", name="a.b"), "a is not installed"),
        (ValueError(), "ValueError"),
    ],
)
def test_a_reason_is_one_line(error: Exception, expected: str) -> None:
    assert reason(error) == expected


def test_products_are_those_of_the_layers(scripted: Path, mini: checkpoint.Checkpoint) -> None:
    """Counted in another way: each linear layer, the Fourier transform and the mel filterbank."""
    packed, macs = PackedEcapa(mini).eval(), 0

    def count(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(layer, torch.nn.Linear)
        macs += inputs[0].shape[0] * layer.in_features * layer.out_features

    for layer in packed.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.register_forward_hook(count)
    with torch.inference_mode():
        packed(torch.zeros(16000), torch.tensor([[16000]], dtype=torch.int32))
    rows = (16000 // packed.hop // PARTS + 1) * PARTS
    macs += rows * (packed.features.basis.numel() + packed.features.mel.numel())
    assert contenders.count_macs(scripted / "model.pt", 16000) == pytest.approx(macs, rel=1e-2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "gpu", "--json", str(tmp_path / "out" / "figures.json")]) == 0
    assert "no GPU" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_a_folder_without_model_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--repository", str(tmp_path), "--json", str(tmp_path / "figures.json")]) == 1
    assert str(tmp_path) in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_is_measured(tmp_path: Path) -> None:
    assert main(["bench", "--device", "gpu", "--rounds", "3", "--json", str(tmp_path / "figures.json")]) == 0
    data = json.loads((tmp_path / "figures.json").read_text())
    rows = data["sections"]
    assert data["gpu"] and all(row["kernels"] > 0 for row in rows["kernels"])
    assert any(row["contender"] == "TorchScript FP16" and "failed" not in row for row in rows["agreement"])
    assert all("ratio_to_cpu" in row for row in rows["speed"] if row["clips"] == "5 s" and "failed" not in row)
