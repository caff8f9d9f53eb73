"""Checkpoints, the export command, its verification and the configs."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import re
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, copy_configs
from test_packed import make_folder

from export import artifacts, checkpoint, configs, quantize, seal, verify
from export.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small SpeechBrain folder to break."""
    return make_folder(tmp_path / "source")


@pytest.fixture
def exported(repository: Path, tmp_path: Path) -> Path:
    """A copy of the exported repository to break."""
    return Path(shutil.copytree(repository, tmp_path / "model_repository"))


# --- checkpoints ---


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("no route to host")


def test_a_folder_loads_without_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (folder / "hyperparams.yaml").read_text()
    text += """
pretrained_path: speechbrain/spkrec-ecapa-voxceleb
pretrainer: !new:speechbrain.utils.parameter_transfer.Pretrainer
    loadables:
        embedding_model: !ref <embedding_model>
    paths:
        embedding_model: !ref <pretrained_path>/embedding_model.ckpt
"""
    (folder / "hyperparams.yaml").write_text(text)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    loaded = checkpoint.load(str(folder))
    assert loaded.threshold == 0.25  # SpeechBrain's, since this yaml names none
    assert loaded.classifier.encode_batch(torch.zeros(1, 16000)).shape == (1, 1, 192)


def test_the_shipped_model_is_the_one_of_its_card(mini: checkpoint.Checkpoint) -> None:
    assert mini.sha256 in (checkpoint.MINI / "MODEL_CARD.md").read_text()
    assert mini.threshold == 0.45


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc.conv.bias": None}, r"fc\.conv\.bias"),
        ({"extra": torch.zeros(3)}, r"extra"),
        ({"fc.conv.bias": torch.zeros(5)}, r"fc\.conv\.bias.*5.*192"),
        ({"fc.conv.bias": torch.full((192,), torch.nan)}, r"fc\.conv\.bias .*finite"),
        ({"fc.conv.bias": torch.zeros(192).to_sparse()}, r"fc\.conv\.bias"),
    ],
)
def test_weights_are_read_strictly(folder: Path, changes: dict[str, Any], message: str) -> None:
    state = torch.load(folder / "embedding_model.ckpt", weights_only=True) | changes
    torch.save({name: value for name, value in state.items() if value is not None}, folder / "embedding_model.ckpt")
    with pytest.raises(checkpoint.CheckpointError, match=rf"embedding_model\.ckpt.*{message}"):
        checkpoint.load(str(folder))


class Bomb:
    """Makes the folder `went_off` where its pickle is read carelessly."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "went_off"

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path: Path) -> Iterator[Bomb]:
    bomb = Bomb(tmp_path)
    yield bomb
    assert not bomb.path.exists()


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_unreadable_weights(folder: Path, content: bytes | None, bomb: Bomb) -> None:
    (folder / "embedding_model.ckpt").write_bytes(pickle.dumps(bomb, protocol=2) if content is None else content)
    with pytest.raises(checkpoint.CheckpointError, match="embedding_model.ckpt"):
        checkpoint.load(str(folder))


@pytest.mark.parametrize(
    "line",
    [
        "bomb: !apply:os.mkdir [{}]",
        "bomb: !new:subprocess.Popen [[touch, {}]]",
        "bomb: !name:os.system",
        "bomb: !new:speechbrain.utils.superpowers.subprocess.Popen [[touch, {}]]",
        "bomb: !name:speechbrain.core.os.system",
        "bomb: !include:{}",
        "bomb: !!python/object/apply:os.mkdir [{}]",
        "bomb: !ref <n_mels>**<n_mels>**<n_mels>",
        "bomb: !ref &anchor <n_mels>**<n_mels>**<n_mels>",
        "verification_threshold: 45",
    ],
)
def test_a_line_of_the_yaml_that_does_more_than_build_the_model(folder: Path, line: str, bomb: Bomb) -> None:
    with (folder / "hyperparams.yaml").open("a") as file:
        file.write(f"n_mels: 9\n{line.format(bomb.path)}\n")
    fact = "45" if "45" in line else r"line 26 "
    with pytest.raises(checkpoint.CheckpointError, match=rf"hyperparams\.yaml.*{fact}"):
        checkpoint.load(str(folder))


@pytest.mark.parametrize(
    "text",
    [
        "%TAG ! !apply:shutil.\n---\nevil: !copy [/etc/hostname, {}]\n",
        "modules: null\n",
        "modules: [1]\n",
        "modules: {{compute_features: hello}}\n",
        "- 1\n",
        "a: [\n",
        "a: \udcff\n",
    ],
)
def test_a_faulty_yaml(folder: Path, text: str, bomb: Bomb) -> None:
    (folder / "hyperparams.yaml").write_bytes(text.format(bomb.path).encode(errors="surrogateescape"))
    with pytest.raises(checkpoint.CheckpointError, match=r"hyperparams\.yaml"):
        checkpoint.load(str(folder))


@pytest.mark.parametrize(
    "repeat",
    [
        "[" + ", ".join(["*b{0}"] * 10) + "]",
        "{{<<: [" + ", ".join(["*b{0}"] * 10) + "]}}",
        "[" + ", ".join(["!copy <b{0}>"] * 10) + "]",
        "!ref " + "<b{0}>" * 10,
        "!ref " + "<b{0}[key]>" * 10,
        "!ref " + "<b1>" * 2,
    ],
)
def test_a_yaml_whose_references_multiply_is_refused_in_time(folder: Path, repeat: str) -> None:
    """Loading it would take more memory than there is."""
    lines = ["b0: &b0 {key: value}", *(f"b{n + 1}: &b{n + 1} {repeat.format(n)}" for n in range(12))]
    with (folder / "hyperparams.yaml").open("a") as file:
        file.write("\n".join(lines) + "\n")
    with pytest.raises(checkpoint.CheckpointError, match=r"hyperparams\.yaml.* characters .*50000"):
        checkpoint.load(str(folder))


def test_a_model_that_speechbrain_cannot_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", channels=[32, 48, 48, 64, 80])
    with pytest.raises(checkpoint.CheckpointError, match=str(folder)):
        checkpoint.load(str(folder))


def test_faulty_sources(tmp_path: Path) -> None:
    for source, message in (str(tmp_path / "nowhere"), "nowhere"), (str(tmp_path), r"hyperparams\.yaml is missing"):
        with pytest.raises(checkpoint.CheckpointError, match=message):
            checkpoint.load(source)
    for options in ({"channels": 12}, {"channels": 8 * 10**12}, {"seed": 10**30}, {"seed": -1}):
        with pytest.raises(checkpoint.CheckpointError, match=str(*options.values())):
            checkpoint.load("random", **options)


def test_random_weights_follow_the_seed() -> None:
    one, same, other = (checkpoint.load("random", seed=seed, channels=16) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    assert np.isnan(one.threshold)


def test_a_hub_model_comes_from_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = tmp_path / "cache/models--somebody--some-ecapa"  # as the hub's client leaves it after a download
    (entry / "refs").mkdir(parents=True)
    (entry / "refs/main").write_text("a" * 40)
    shutil.copytree(folder, entry / "snapshots" / ("a" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loaded = checkpoint.load("somebody/some-ecapa")
    assert loaded.origin == "--source somebody/some-ecapa --revision main"
    assert loaded.sha256 == checkpoint.load(str(folder)).sha256


def test_without_the_hub_the_message_names_other_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    assert main(["--repository", str(copy_configs(tmp_path))]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for fact in "no route to host", "--source FOLDER", "--source mini", checkpoint.HUB_REVISION[:12]:
        assert fact in message


# --- the command ---


def test_the_onnx_file_and_its_metadata(repository: Path, mini: checkpoint.Checkpoint) -> None:
    proto = onnx.load(str(repository / "ecapa/1/model.onnx"))
    assert proto.ir_version <= 10
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", 18)]
    metadata = {item.key: item.value for item in proto.metadata_props}
    assert metadata["weights_sha256"] == mini.sha256
    expected = {"source": "mini", "max_seconds": "30.0", "min_samples": "640", "verification_threshold": "0.45"}
    assert expected.items() <= metadata.items()
    assert f"torch=={torch.__version__.partition('+')[0]}" in metadata["packages"]
    assert not [node for node in proto.graph.node if node.op_type in {"Conv", "Loop", "If", "Scan"}]


def test_verify_command(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--repository", str(repository)]) == 0
    groups = [line for line in capsys.readouterr().out.splitlines() if " clips " in line]
    assert len(groups) == 3 * 7 and all(line.endswith("ok") for line in groups)


def test_verify_needs_the_same_weights(repository: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--repository", str(repository), "--source", str(folder)]) == 1
    assert "ff14eec9332f" in capsys.readouterr().err


def test_an_embedding_of_zeros_differs_from_any() -> None:
    group = verify.Group("zeros", verify.BOUNDS["fp32"])
    group.add("zeros", np.zeros(3), np.zeros(3))
    group.add("good", np.ones(3), np.ones(3))
    assert not group.passed and "zeros" in str(group)


@pytest.mark.slow
def test_a_folder_is_exported_verified_and_up_to_date(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a source, with a space")
    target = copy_configs(tmp_path)
    arguments = ["--repository", str(target), "--source", str(folder), "--max-seconds", "5", "--no-fp16", "--no-int8"]
    assert main(arguments) == 0
    path = target / "ecapa/1/model.onnx"
    assert sorted(item.name for item in path.parent.iterdir() if item.name != ".gitkeep") == ["model.onnx"]
    assert artifacts.up_to_date(path) and artifacts.up_to_date(path, str(folder))
    assert not artifacts.up_to_date(path, "mini")
    assert main(["verify", "--repository", str(target)]) == 0
    later = path.stat().st_mtime + 1
    os.utime(folder / "embedding_model.ckpt", (later, later))
    assert not artifacts.up_to_date(path)


def test_a_failed_verification_leaves_the_old_model(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported / "ecapa_torchscript/1/model.pt"
    path.write_bytes(b"the old one")
    monkeypatch.setitem(verify.BOUNDS, "fp32", verify.Bounds(0.0, 0.99999))
    assert main(["--repository", str(exported), "--source", str(folder), "--format", "torchscript", "--no-fp16"]) == 1
    assert "SpeechBrain" in capsys.readouterr().err
    assert path.read_bytes() == b"the old one"
    assert not list(path.parent.glob(".model*"))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "1").glob("*model*")}


def test_a_float16_file_that_fails_is_left_out(
    exported: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = torch.load(folder / "embedding_model.ckpt", weights_only=True)
    # The aggregated channels are of 2e-5, where float16 has few digits; the layers after them make up for it.
    for name, factor in (
        ("mfa.norm.norm.weight", 2e-5),
        ("mfa.norm.norm.bias", 2e-5),
        ("asp.tdnn.conv.conv.weight", 5e4),
        ("asp_bn.norm.running_mean", 2e-5),
        ("asp_bn.norm.weight", 5e4),
    ):
        state[name] *= factor
    torch.save(state, folder / "embedding_model.ckpt")
    older = exported / "ecapa_torchscript/1/model_fp16.pt"
    older.write_bytes(b"of another checkpoint")
    arguments = ["--repository", str(exported), "--source", str(folder), "--max-seconds", "1"]
    assert main([*arguments, "--format", "torchscript"]) == 0
    warning = capsys.readouterr().err
    assert re.fullmatch(rf"warning: {older}: .* \d\.\de-0\d away .* 5e-03 .*--no-fp16.*\n", warning)
    assert list(files(older.parents[1])) == ["model.pt"]
    made_from = configs.ModelFile.read(older.with_name("model.pt")).metadata["weights_sha256"]
    assert made_from == checkpoint.load(str(folder)).sha256


def test_an_int8_file_that_fails_is_left_out(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(verify.BOUNDS, "int8", verify.Bounds(0.1, 0.995, 0.99999))
    older = exported / "ecapa/1/model_int8.onnx"
    older.write_bytes(b"of another checkpoint")
    arguments = ["--repository", str(exported), "--source", str(folder), "--max-seconds", "1", "--no-fp16"]
    assert main(arguments) == 0
    warning = capsys.readouterr().err
    said = r"mean cosine to SpeechBrain 0\.99\d+ over samples/.* 0\.99999"
    assert re.fullmatch(rf"warning: {older}: {said}.*--no-int8.*\n", warning)
    assert list(files(older.parents[1])) == ["model.onnx"]


def test_calibration_is_of_a_folder_and_in_the_metadata(tmp_path: Path) -> None:
    for n in range(70):
        shutil.copy(ROOT / f"samples/anna_{1 + n % 2}.flac", tmp_path / f"{n}.flac")
    found = quantize.Calibration(tmp_path)
    assert 30 <= len(found.clips) <= quantize.MAX_CALIBRATION
    assert re.fullmatch(r"35 clips, \d+\.\d s, sha256 [0-9a-f]{64}", found.note)
    assert found.note == quantize.Calibration(tmp_path).note != quantize.Calibration().note
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="--calibration"):
        quantize.Calibration(tmp_path / "empty")


def test_a_format_that_fails_takes_no_other_with_it(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a float16 file that is not written leaves none of an earlier export beside the new file."""

    def full_disk(model: Any, loaded: Any, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(artifacts, "write_onnx", full_disk)
    old = files(exported / "ecapa")
    (exported / "ecapa_torchscript/1/model_fp16.pt").write_bytes(b"of another checkpoint")
    arguments = ["--repository", str(exported), "--source", str(folder), "--max-seconds", "1"]
    assert main([*arguments, "--format", "all", "--no-fp16"]) == 1
    assert re.fullmatch(r"error: .*No space.*model\.onnx.*ecapa_torchscript.*\n", capsys.readouterr().err)
    assert files(exported / "ecapa") == old
    assert list(files(exported / "ecapa_torchscript")) == ["model.pt"]


@pytest.mark.parametrize(
    ("operator", "place", "to", "message"),
    [
        ("Relu", -1, "Abs", "SpeechBrain"),  # a layer
        ("Tanh", -1, "Sin", "SpeechBrain"),  # the attention
        ("And", -1, "Or", "NaN"),  # the guard against lengths that do not fit
        ("And", -2, "Or", "NaN"),  # the other guards
    ],
)
def test_verify_finds_a_changed_graph(
    exported: Path, operator: str, place: int, to: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported / "ecapa/1/model.onnx"
    proto = onnx.load(str(path))
    [node for node in proto.graph.node if node.op_type == operator][place].op_type = to  # both take the same inputs
    onnx.save(proto, str(path))
    seal.seal(path)
    assert main(["verify", "--repository", str(exported)]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "nan", "1e9", "-3"])
def test_wrong_max_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--max-seconds", seconds])
    assert "3600" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["verify", "--format", "onnx"],
        ["verify", "--no-fp16"],
        ["verify", "--max-seconds", "30"],
        ["verify", "--root", "."],
        ["--root", "."],
        ["--trials", "trials.txt"],
    ],
)
def test_options_of_the_other_command_are_rejected(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(arguments)
    assert "goes with" in capsys.readouterr().err.replace("go with", "goes with")


def test_a_repository_without_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repository", str(tmp_path), "--source", "mini"]) == 1
    assert "config.pbtxt is missing" in capsys.readouterr().err


def test_a_repository_that_is_not_writable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)  # as root, all of a folder is writable
    assert main(["--repository", str(copy_configs(tmp_path)), "--source", "nowhere/nothing"]) == 1
    assert "ecapa/1 is not writable" in capsys.readouterr().err  # before the source is loaded


# --- configs ---

# Fields that may differ between the configs of a model, for their device and precision, and between the two models.
FOR_DEVICE = {"default_model_filename", "max_batch_size", "optimization"}
PARAMETERS_FOR_DEVICE = {"precision", "intra_op_thread_count", "enable_mem_arena"}
FOR_MODEL = {"name", "backend", "default_model_filename", "optimization", "parameters"}
FOLDERS = [ROOT / "model_repository/ecapa", ROOT / "model_repository/ecapa_torchscript"]


def common(path: Path) -> Any:
    """The fields that all configs of a model have in common."""
    config = configs.read(path)
    for field in FOR_DEVICE:
        config.ClearField(field)
    config.dynamic_batching.ClearField("preferred_batch_size")
    for group in config.instance_group:
        group.ClearField("kind")
    for key in PARAMETERS_FOR_DEVICE & set(config.parameters):
        del config.parameters[key]
    return config


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_configs_of_a_model_agree(folder: Path) -> None:
    paths = configs.config_files(folder)
    int8 = ["cpu_int8"] if folder.name == "ecapa" else []
    assert [path.stem for path in paths] == ["config", "cpu", *int8, "gpu", "gpu_fp16"]
    assert all(common(path) == common(paths[0]) for path in paths)
    # With a queue policy Triton's batcher wakes late: eight clients got a quarter of the embeddings a second.
    assert not configs.read(paths[0]).dynamic_batching.HasField("default_queue_policy")


def test_the_configs_of_both_models_agree() -> None:
    found = [[path for path in configs.config_files(folder) if path.stem != "cpu_int8"] for folder in FOLDERS]
    for paths in zip(*found, strict=True):
        one, other = map(configs.read, paths)
        for config, field in itertools.product((one, other), FOR_MODEL):
            config.ClearField(field)
        assert one == other, paths[0].name


EVERY_CONFIG = "config", "configs/cpu", "configs/cpu_int8", "configs/gpu", "configs/gpu_fp16"


@pytest.mark.parametrize(
    ("name", "old", "new", "found", "needed"),
    [
        ("config", "dims: [ 192 ]", "dims: [ 256 ]", "dims: 256", "dims: 192"),
        ("config", "TYPE_INT32", "TYPE_INT64", "TYPE_INT64", "TYPE_INT32"),
        (
            "config",
            "BATCH_ITEM_SHAPE",
            "BATCH_ITEM_SHAPE_FLATTEN",
            "BATCH_ITEM_SHAPE_FLATTEN",
            "BATCH_ITEM_SHAPE",
        ),
        ("config", "allow_ragged_batch: true", "", "input", "allow_ragged_batch: true"),
        ("config", 'name: "model_info"', 'name: "info"', "info", "model_info"),
        ("config", "max_batch_size: 16", "", "max_batch_size is 0", "1"),
        ("config", 'name: "ecapa"', 'name: "other"', "other", "ecapa"),
        ("configs/cpu", 'backend: "onnxruntime"', 'backend: "tensorrt"', "tensorrt", "onnxruntime"),
        *((name, "empty,short,", "empty,", "empty,not-finite,", "short") for name in EVERY_CONFIG),
        ("configs/gpu_fp16", 'string_value: "fp16"', 'string_value: "fp32"', "precision is fp32", "fp16"),
        ("configs/gpu_fp16", '"model_fp16.onnx"', '"model.onnx"', "precision is fp16", "fp32"),
        ("configs/gpu_fp16", '"model_fp16.onnx"', '"other.onnx"', "other.onnx", "model.onnx"),
        ("configs/gpu_fp16", "max_batch_size: 64", "max_batch_size 64", "max_batch_size", ":"),
    ],
)
def test_a_config_that_disagrees_with_its_file(
    exported: Path, name: str, old: str, new: str, found: str, needed: str
) -> None:
    path = exported / "ecapa" / f"{name}.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    files = {path.name: configs.ModelFile.read(path) for path in (exported / "ecapa/1").glob("model*")}
    with pytest.raises(configs.ConfigError) as info:
        configs.check_all(exported / "ecapa", files)
    for fact in str(path), found, needed:
        assert fact in str(info.value)
