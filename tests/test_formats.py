"""TorchScript and float16: what the files are, what serves them, and what is not served."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from ecapa_triton import SpeakerClient
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from export import artifacts, configs, seal
from export.__main__ import main
from export.artifacts import ExportError, OnnxModel, TorchScriptModel, up_to_date
from export.verify import BOUNDS, difference
from server import ServerError, TritonServer
from server.triton import check_repository, find_installed

Reference = Callable[[np.ndarray], np.ndarray]
SPEECH = sorted(ROOT.glob("samples/*_[12].*"))
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
needs_stand_in = pytest.mark.skipif(find_installed() is not None, reason="this Triton has its own backend")


def speech() -> list[np.ndarray]:
    from ecapa_triton.audio import read

    return [read(path, max_samples=5 * 16000).waveform for path in SPEECH]


def test_float16_files_are_float16_and_close(both_formats: Path, reference: Reference) -> None:
    for path, kind in (
        (both_formats / "ecapa/1/model_fp16.onnx", OnnxModel),
        (both_formats / "ecapa_torchscript/1/model_fp16.pt", TorchScriptModel),
    ):
        model = kind(path)
        assert model.metadata["precision"] == "fp16"
        assert path.stat().st_size < 0.8 * path.with_name(path.name.replace("_fp16", "")).stat().st_size
        clips = speech()
        for clip, row in zip(clips, model.embed(clips), strict=True):
            error, cosine = difference(row, reference(clip))
            assert BOUNDS["fp32"].max_error < error < BOUNDS["fp16"].max_error
            assert cosine > BOUNDS["fp16"].min_cosine == 0.9999


def test_torchscript_is_tied_to_no_device(both_formats: Path) -> None:
    for name in "model.pt", "model_fp16.pt":
        module = torch.jit.load(both_formats / "ecapa_torchscript/1" / name)
        assert [argument.name for argument in module.forward.schema.arguments] == ["self", "waveform", "lengths"]
        kinds = [node.output().type().kind() for node in module.graph.findAllNodes("prim::Constant")]
        assert "DeviceObjType" not in kinds
        assert not module.graph.findAllNodes("prim::CallMethod"), "not frozen"


def test_a_graph_that_is_tied_is_refused() -> None:
    @torch.jit.script
    def tied(waveform: torch.Tensor) -> torch.Tensor:
        return torch.zeros(3, device=torch.device("cpu")) + waveform

    with pytest.raises((ExportError, IndexError)):
        artifacts._untie(tied.graph)


@needs_gpu
@pytest.mark.parametrize("name", ["model.pt", "model_fp16.pt"])
def test_cpu_and_gpu_agree(both_formats: Path, name: str) -> None:
    path = both_formats / "ecapa_torchscript/1" / name
    on_cpu, on_gpu = TorchScriptModel(path).embed(speech()), TorchScriptModel(path, "cuda:0").embed(speech())
    precision = "fp16" if "fp16" in name else "fp32"
    for one, other in zip(on_cpu, on_gpu, strict=True):
        error, cosine = difference(other, one)
        assert error < BOUNDS[precision].max_error and cosine > BOUNDS[precision].min_cosine


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_served_on_a_gpu(both_formats: Path, reference: Reference, precision: str, tmp_path: Path) -> None:
    repository = shutil.copytree(both_formats, tmp_path / "repository")
    for path in (repository / "ecapa/1").glob("*.onnx"):
        path.unlink()  # torch is there, the CUDA build of ONNX Runtime need not be
    with TritonServer(Path(repository), device="gpu", precision=precision) as server:  # type: ignore[arg-type]
        assert server.models == ["ecapa_torchscript"]
        with SpeakerClient(server.grpc_url, "ecapa_torchscript") as client:
            for clip, row in zip(speech(), client.embed_many(speech(), sample_rate=16000), strict=True):
                error, cosine = difference(row, reference(clip))
                assert error < BOUNDS[precision].max_error and cosine > BOUNDS[precision].min_cosine


# --- the files ---


@pytest.fixture
def repository_to_break(both_formats: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(both_formats, tmp_path / "model_repository"))


def not_ours(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"")
    seal.seal(path)


def without_guards(path: Path) -> None:
    members = {}
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            members[name] = archive.read(name)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data.replace(b'"empty,', b'"') if name.endswith(configs.METADATA_FILE) else data)
    seal.seal(path)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "ends without a checksum"),
        (lambda path: path.write_bytes(path.read_bytes()[: 10**6]), "ends without a checksum"),
        (lambda path: path.write_bytes(b"\0" + path.read_bytes()[1:]), "checksum differs"),
        (not_ours, "was not written by python -m export"),
        (without_guards, "does not guard against bad input of the kinds empty"),
    ],
)
def test_a_damaged_torchscript_file_is_not_served(
    repository_to_break: Path,
    damage: Callable[[Path], object],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = repository_to_break / "ecapa_torchscript/1/model.pt"
    damage(path)
    with pytest.raises(configs.ModelFileError, match=re.escape(message)):
        configs.ModelFile.read(path)
    with pytest.raises(ServerError, match=re.escape(message)):
        check_repository(repository_to_break, "cpu")
    with pytest.raises(ExportError, match=re.escape(message)):
        TorchScriptModel(path)
    assert not up_to_date(path)
    check_repository(repository_to_break, "gpu_fp16")  # which serves the other file
    assert main(["verify", "--repository", str(repository_to_break)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("folder", ["ecapa", "ecapa_torchscript"])
def test_a_config_that_disagrees_with_the_file_it_chooses(repository_to_break: Path, folder: str) -> None:
    path = repository_to_break / folder / "configs/gpu_fp16.pbtxt"
    text = path.read_text()
    for old, new, message in (
        ('string_value: "fp16"', 'string_value: "fp32"', "string_value of precision is fp32"),
        ('default_model_filename: "model_fp16', 'default_model_filename: "model', "string_value of precision is fp16"),
        ('default_model_filename: "model_fp16', 'default_model_filename: "other', "default_model_filename is other"),
        ('backend: "', 'backend: "un', "backend of"),
    ):
        assert old in text
        path.write_text(text.replace(old, new))
        files = (repository_to_break / folder / "1").glob("model*")
        with pytest.raises(configs.ConfigError, match=message):
            configs.check_all(repository_to_break / folder, {file.name: configs.ModelFile.read(file) for file in files})


def test_models_that_were_not_exported_are_passed_over(repository_to_break: Path, reference: Reference) -> None:
    for path in (repository_to_break / "ecapa/1").glob("*.onnx"):
        path.unlink()
    with TritonServer(repository_to_break, device="cpu") as server:
        assert server.models == ["ecapa_torchscript"]
        with SpeakerClient(server.grpc_url, "ecapa_torchscript") as client:
            clip = speech()[0]
            assert difference(client.embed(clip, sample_rate=16000), reference(clip))[0] < 1e-4
            served = client.status().deployment
            assert (served.backend, served.precision, served.instances) == ("pytorch", "fp32", ("1 on the CPU",))
    for path in (repository_to_break / "ecapa_torchscript/1").glob("*.pt"):
        path.unlink()
    with pytest.raises(ServerError, match=r"ecapa/1/model\.onnx is missing"):
        check_repository(repository_to_break, "cpu")


def test_float16_files_are_served(repository_to_break: Path, reference: Reference) -> None:
    """On a CPU, for want of a GPU: what the float16 configs say of the model, on the other device."""
    for folder in "ecapa", "ecapa_torchscript":
        config = repository_to_break / folder / "configs/gpu_fp16.pbtxt"
        (config.parent / "cpu.pbtxt").write_text(config.read_text().replace("KIND_GPU", "KIND_CPU"))
    with TritonServer(repository_to_break, device="cpu") as server:
        for folder in "ecapa", "ecapa_torchscript":
            with SpeakerClient(server.grpc_url, folder) as client:
                assert client.status().deployment.file.startswith("model_fp16.")
                for clip, row in zip(speech(), client.embed_many(speech(), sample_rate=16000), strict=True):
                    error, cosine = difference(row, reference(clip))
                    assert 1e-4 < error < BOUNDS["fp16"].max_error and cosine > BOUNDS["fp16"].min_cosine


# --- the stand-in for the PyTorch backend ---

CONFIG = """
backend: "pytorch"
max_batch_size: 8
input {{ name: "{clip}" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }}
batch_input {{ kind: BATCH_ITEM_SHAPE target_name: "{lengths}" data_type: TYPE_INT32 source_input: "{clip}" }}
output {{ name: "{total}" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "{count}" data_type: TYPE_FP32 dims: [ 1 ] }}
dynamic_batching {{ max_queue_delay_microseconds: 300000 }}
instance_group {{ count: 1 kind: KIND_CPU }}
version_policy {{ latest {{ num_versions: 1 }} }}
parameters {{ key: "INTRA_OP_THREAD_COUNT" value: {{ string_value: "1" }} }}
"""
NAMES = {"clip": "clip", "lengths": "lengths", "total": "total", "count": "count"}


class Sums(torch.nn.Module):
    """For each clip its sum and its length."""

    def forward(self, lengths: torch.Tensor, clip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if bool((lengths > 1000).any()):
            raise ValueError("too long for sums")
        ends = torch.cumsum(lengths[:, 0], 0)
        sums = torch.cat([torch.zeros(1), torch.cumsum(clip, 0)])
        return (sums[ends] - sums[ends - lengths[:, 0]])[:, None], lengths.float()


def write_sums(folder: Path, **names: str) -> None:
    (folder / "1").mkdir(parents=True)
    torch.jit.save(torch.jit.script(Sums()), folder / "1/model.pt")
    (folder / "config.pbtxt").write_text(f'name: "{folder.name}"' + CONFIG.format(**NAMES | names))


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Iterator[InferenceServerClient]:
    repository = tmp_path_factory.mktemp("sums")
    write_sums(repository / "by_name")
    write_sums(repository / "by_index", clip="A__1", lengths="B__0", total="C__0", count="D__1")
    write_sums(repository / "swapped", total="C__1", count="D__0")
    with TritonServer(repository, device="cpu") as server, InferenceServerClient(server.grpc_url) as client:
        yield client


def ask_sums(client: InferenceServerClient, model: str, clips: np.ndarray) -> np.ndarray:
    config = client.get_model_config(model).config
    tensor = InferInput(config.input[0].name, clips.shape, "FP32")
    tensor.set_data_from_numpy(clips)
    result = client.infer(model, [tensor], client_timeout=20)
    return np.hstack([result.as_numpy(output.name) for output in config.output])


@needs_stand_in
@pytest.mark.parametrize("model", ["by_name", "by_index", "swapped"])
def test_tensors_are_found_by_name_or_index(sums: InferenceServerClient, model: str) -> None:
    clips = [np.full((n, 5 + 7 * n), n, np.float32) for n in (1, 2, 3)]
    with ThreadPoolExecutor(3) as pool:
        replies = list(pool.map(lambda clip: ask_sums(sums, model, clip), clips))
    for clip, reply in zip(clips, replies, strict=True):
        rows = np.array([[row.sum(), len(row)] for row in clip], np.float32)
        np.testing.assert_array_equal(reply, rows[:, ::-1] if model == "swapped" else rows)


@needs_stand_in
def test_only_the_culprit_fails(sums: InferenceServerClient) -> None:
    clips = [np.ones((1, n), np.float32) for n in (3, 1001, 0, 8)]

    def call(clip: np.ndarray) -> np.ndarray | InferenceServerException:
        try:
            return ask_sums(sums, "by_name", clip)
        except InferenceServerException as error:
            return error

    with ThreadPoolExecutor(4) as pool:
        replies = list(pool.map(call, clips))
    assert isinstance(replies[1], InferenceServerException) and "too long for sums" in str(replies[1])
    for number in 0, 2, 3:
        length = clips[number].shape[1]
        np.testing.assert_array_equal(replies[number], [[length, length]])


@needs_stand_in
@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"clip": "audio"}, "the model has no input audio, it has lengths, clip"),
        ({"clip": "A__7"}, "the model has no input A__7"),
        ({"clip": "lengths", "lengths": "B__0"}, "the config lacks the model's input clip"),
    ],
)
def test_a_config_of_another_model_does_not_load(tmp_path: Path, names: dict[str, str], message: str) -> None:
    write_sums(tmp_path / "repository/sums", **names)
    with pytest.raises(ServerError, match=message):
        TritonServer(tmp_path / "repository", device="cpu", log=tmp_path / "log").start()
