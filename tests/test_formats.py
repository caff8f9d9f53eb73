"""ONNX and TorchScript files, float32 and float16: their content, which are served and which are rejected."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT
from ecapa_triton import SpeakerClient
from ecapa_triton.audio import read

from export import configs, seal
from export.__main__ import main
from export.artifacts import ExportedModel, up_to_date
from export.verify import BOUNDS, difference
from server import ServerError, TritonServer
from server.preflight import check_repository

Reference = Callable[[np.ndarray], np.ndarray]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
FILES = "ecapa/1/model.onnx", "ecapa_torchscript/1/model.pt"


@pytest.fixture(scope="module")
def speech() -> list[np.ndarray]:
    return [read(path, max_samples=5 * 16000).waveform for path in sorted(ROOT.glob("samples/*_[12].*"))]


@pytest.fixture
def repository(both_formats: Path, tmp_path: Path) -> Path:
    """A copy of the exported repository to change."""
    return Path(shutil.copytree(both_formats, tmp_path / "model_repository"))


def check(rows: np.ndarray, expected: list[np.ndarray], precision: str) -> None:
    """Each row is within the bounds of its precision, and float16 is not as close as float32."""
    for row, one in zip(rows, expected, strict=True):
        error, cosine = difference(row, one)
        assert error < BOUNDS[precision].max_error and cosine > BOUNDS[precision].min_cosine
        assert precision == "fp32" or error > BOUNDS["fp32"].max_error


@pytest.mark.parametrize("file", FILES)
def test_float16_files_are_smaller_and_close(
    both_formats: Path, file: str, speech: list[np.ndarray], reference: Reference
) -> None:
    path = both_formats / file.replace("model.", "model_fp16.")
    assert path.stat().st_size < 0.8 * (both_formats / file).stat().st_size
    model = ExportedModel(path)
    assert model.metadata["precision"] == "fp16"
    check(model.embed(speech), [reference(clip) for clip in speech], "fp16")


def test_the_int8_file_is_smaller_and_close(both_formats: Path, speech: list[np.ndarray], reference: Reference) -> None:
    path = both_formats / "ecapa/1/model_int8.onnx"
    assert path.stat().st_size < 0.8 * (both_formats / "ecapa/1/model.onnx").stat().st_size
    model = ExportedModel(path)
    assert model.metadata["precision"] == "int8" and "sha256" in model.metadata["calibration"]
    layers = [node.op_type for node in onnx.load(path).graph.node]
    assert layers.count("QuantizeLinear") > 20 and set(onnx.load(path).opset_import[0].domain) == set()
    check(model.embed(speech), [reference(clip) for clip in speech], "int8")


def test_torchscript_is_tied_to_no_device(both_formats: Path) -> None:
    for name in "model.pt", "model_fp16.pt":
        module = torch.jit.load(both_formats / "ecapa_torchscript/1" / name)
        assert [argument.name for argument in module.forward.schema.arguments] == ["self", "waveform", "lengths"]
        kinds = [node.output().type().kind() for node in module.graph.findAllNodes("prim::Constant")]
        assert "DeviceObjType" not in kinds
        assert not module.graph.findAllNodes("prim::CallMethod"), "not frozen"


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_on_a_gpu(repository: Path, speech: list[np.ndarray], reference: Reference, precision: str) -> None:
    expected = [reference(clip) for clip in speech]
    file = repository / "ecapa_torchscript/1" / {"fp32": "model.pt", "fp16": "model_fp16.pt"}[precision]
    check(ExportedModel(file, "cuda:0").embed(speech), expected, precision)
    for path in (repository / "ecapa/1").glob("*.onnx"):
        path.unlink()  # torch is installed, the CUDA build of ONNX Runtime need not be
    with TritonServer(repository, device="gpu", precision=precision) as server:  # type: ignore[arg-type]
        assert server.models == ["ecapa_torchscript"]
        with SpeakerClient(server.grpc_url, "ecapa_torchscript") as client:
            check(client.embed_many(speech, sample_rate=16000), expected, precision)


# --- damaged and foreign files ---


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


def with_metadata(change: Callable[[dict[str, str]], object]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        metadata = configs.ModelFile.read(path).metadata
        change(metadata)
        if path.suffix == ".onnx":
            proto = onnx.load(str(path))
            del proto.metadata_props[:]
            onnx.helper.set_model_props(proto, metadata)
            onnx.save(proto, str(path))
        else:
            extra = {configs.METADATA_FILE: json.dumps(metadata)}
            torch.jit.save(torch.jit.load(path), path, _extra_files=extra)
        seal.seal(path)

    return write


def garbage(path: Path) -> None:
    path.write_bytes(b"not a model\0\0")
    seal.seal(path)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("damage", "fact"),
    [
        (changed(lambda data: data[:-1]), "without a checksum"),
        (changed(lambda data: data[: len(data) // 2]), "without a checksum"),
        (changed(lambda data: b""), "without a checksum"),
        (changed(lambda data: data[-80:]), "checksum"),
        (changed(lambda data: b"\0" + data[1:]), "checksum differs"),
        (changed(lambda data: data[:1000000] + bytes([data[1000000] ^ 1]) + data[1000001:]), "checksum differs"),
        (with_metadata(lambda metadata: metadata.update(guards="short,not-finite,torn,max-seconds")), "empty"),
        (with_metadata(lambda metadata: metadata.pop("origin")), "origin"),
        (garbage, ""),
        (Path.unlink, ""),
    ],
)
def test_a_damaged_or_foreign_file_is_rejected(
    repository: Path, file: str, damage: Callable[[Path], object], fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = repository / file
    damage(path)
    facts = re.compile(f"{re.escape(str(path))} .*{fact}")
    for read_it in configs.ModelFile.read, ExportedModel:
        with pytest.raises(configs.ModelFileError, match=facts):
            read_it(path)
    with pytest.raises(ServerError, match=facts):
        check_repository(repository, "cpu")
    check_repository(repository, "gpu_fp16")  # it serves the other file
    assert not up_to_date(path)
    assert main(["verify", "--repository", str(repository)]) == 1
    assert re.fullmatch(f"error: .*{fact}.*\n", capsys.readouterr().err)


def test_verify_without_a_model(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in repository.glob("*/1/model*"):
        path.unlink()
    assert main(["verify", "--repository", str(repository)]) == 1
    assert re.fullmatch("error: .*model.onnx.*python -m export.*\n", capsys.readouterr().err)
    with pytest.raises(ServerError, match=r"ecapa/1/model\.onnx is missing"):
        check_repository(repository, "cpu")


# --- served ---


def test_a_model_that_was_not_exported_is_not_served(
    repository: Path, speech: list[np.ndarray], reference: Reference
) -> None:
    for path in (repository / "ecapa/1").glob("*.onnx"):
        path.unlink()
    with TritonServer(repository, device="cpu") as server:
        assert server.models == ["ecapa_torchscript"]
        with SpeakerClient(server.grpc_url, "ecapa_torchscript") as client:
            check(client.embed_many(speech, sample_rate=16000), [reference(clip) for clip in speech], "fp32")
            served = client.status().deployment
            assert (served.backend, served.precision, served.instances) == ("pytorch", "fp32", ("1 on the CPU",))


def test_the_int8_file_is_served(repository: Path, speech: list[np.ndarray], reference: Reference) -> None:
    """Beside the float32 file its model has the same identity: scores across the two differ little."""
    with pytest.raises(ServerError, match="ecapa_torchscript has no int8 file.*--models"):
        TritonServer(repository, device="cpu", precision="int8").start()
    with TritonServer(repository, device="cpu", precision="int8", models=["ecapa"]) as server:
        assert server.chosen.endswith("in int8")
        with SpeakerClient(server.grpc_url) as client:
            served = client.status().deployment
            assert (served.file, served.precision) == ("model_int8.onnx", "int8")
            check(client.embed_many(speech, sample_rate=16000), [reference(clip) for clip in speech], "int8")


def test_float16_files_are_served(repository: Path, speech: list[np.ndarray], reference: Reference) -> None:
    """On the CPU: the float16 configs with only the device changed."""
    for folder in "ecapa", "ecapa_torchscript":
        config = repository / folder / "configs/gpu_fp16.pbtxt"
        (config.parent / "cpu.pbtxt").write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))
    with TritonServer(repository, device="cpu") as server:
        for folder in "ecapa", "ecapa_torchscript":
            with SpeakerClient(server.grpc_url, folder) as client:
                assert client.status().deployment.file.startswith("model_fp16.")
                check(client.embed_many(speech, sample_rate=16000), [reference(clip) for clip in speech], "fp16")
