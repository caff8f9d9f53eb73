"""Checkpoints, the export command and its proof: what they take, what they refuse, and what a failure leaves behind."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import socket
from collections.abc import Callable
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

from export import artifacts, checkpoint, configs, seal, verify
from export.__main__ import main


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small SpeechBrain folder to break."""
    return make_folder(tmp_path / "source")


@pytest.fixture
def exported(repository: Path, tmp_path: Path) -> Path:
    """A copy of the exported repository to break."""
    return Path(shutil.copytree(repository, tmp_path / "model_repository"))


def change_weights(folder: Path, **changes: Any) -> None:
    state = torch.load(folder / "embedding_model.ckpt", weights_only=True)
    for key, value in changes.items():
        name = key.replace("__", ".")
        if value is None:
            del state[name]
        else:
            state[name] = value
    torch.save(state, folder / "embedding_model.ckpt")


# --- checkpoints ---


def test_a_folder_loads_without_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a local folder must not touch the network")

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


def test_the_threshold_is_the_checkpoints_own(mini: checkpoint.Checkpoint, folder: Path) -> None:
    assert mini.threshold == 0.45
    with (folder / "hyperparams.yaml").open("a") as file:
        file.write("verification_threshold: 45\n")
    with pytest.raises(checkpoint.CheckpointError, match="45, expected a cosine"):
        checkpoint.load(str(folder))


def test_the_shipped_model_is_the_one_of_its_card(mini: checkpoint.Checkpoint) -> None:
    assert mini.sha256 in (checkpoint.MINI / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fc__conv__bias": None}, r"missing fc\.conv\.bias \[192\]"),
        ({"extra": torch.zeros(3)}, r"unexpected extra \[3\]"),
        ({"fc__conv__bias": torch.zeros(5)}, r"fc\.conv\.bias has shape \[5\], expected \[192\]"),
        ({"fc__conv__bias": torch.full((192,), torch.nan)}, r"fc\.conv\.bias has values that are not finite"),
    ],
)
def test_weights_are_read_strictly(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_weights(folder, **changes)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(str(folder))


class Bomb:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("content", [b"", b"not weights", None])
def test_weights_that_are_none(
    folder: Path, content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last one is a pickle that runs code where it is read carelessly."""
    monkeypatch.setenv("BOMB", str(tmp_path / "went off"))
    (folder / "embedding_model.ckpt").write_bytes(pickle.dumps(Bomb(), protocol=2) if content is None else content)
    with pytest.raises(checkpoint.CheckpointError, match="not a readable weights file"):
        checkpoint.load(str(folder))
    assert not (tmp_path / "went off").exists()


@pytest.mark.parametrize(
    "tag",
    [
        "!apply:os.mkdir [{}]",
        "!new:subprocess.Popen [[touch, {}]]",
        "!name:os.system",
        "!new:speechbrain.utils.superpowers.subprocess.Popen [[touch, {}]]",
        "!name:speechbrain.core.os.system",
        "!include:{}",
        "!!python/object/apply:os.mkdir [{}]",
    ],
)
def test_a_yaml_that_runs_other_code_is_refused(folder: Path, tag: str, tmp_path: Path) -> None:
    with (folder / "hyperparams.yaml").open("a") as file:
        file.write(f"bomb: {tag.format(tmp_path / 'went_off')}\n")
    with pytest.raises(checkpoint.CheckpointError, match=r"line 25 asks for !.*a tag runs code"):
        checkpoint.load(str(folder))
    assert not (tmp_path / "went_off").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("%TAG ! !apply:shutil.\n---\nevil: !copy [/etc/hostname, {}]\n", "line 1 has a % directive"),
        ("a: 9\nb: !ref <a>**<a>**<a>\n", "line 2 computes"),
        ("modules: null\n", "has no modules: compute_features"),
        ("modules: [1]\n", "has no modules: compute_features"),
        ("modules: {{compute_features: hello}}\n", "has no modules: compute_features"),
        ("- 1\n", "cannot be read"),
        ("a: [\n", "cannot be read"),
        ("a: \udcff\n", "cannot be read"),
    ],
)
def test_yamls_that_are_none(folder: Path, text: str, message: str, tmp_path: Path) -> None:
    content = text.format(tmp_path / "went_off").encode(errors="surrogateescape")
    (folder / "hyperparams.yaml").write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=message):
        checkpoint.load(str(folder))
    assert not (tmp_path / "went_off").exists()


def test_tensors_that_are_not_plain(folder: Path) -> None:
    change_weights(folder, fc__conv__bias=torch.zeros(192).to_sparse())
    with pytest.raises(checkpoint.CheckpointError, match="no dictionary of plain tensors"):
        checkpoint.load(str(folder))


def test_an_embedding_of_zeros_is_refused() -> None:
    group = verify.Group("zeros", verify.BOUNDS["fp32"])
    group.add("zeros", np.zeros(3), np.zeros(3))
    group.add("good", np.ones(3), np.ones(3))
    assert not group.passed and group.worst == "zeros" and np.isnan(group.error)


def test_a_model_that_speechbrain_cannot_run(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "source", channels=[32, 48, 48, 64, 80])
    with pytest.raises(checkpoint.CheckpointError, match="SpeechBrain itself cannot embed with it"):
        checkpoint.load(str(folder))


def test_sources_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(checkpoint.CheckpointError, match=r"is not a folder: expected mini, random"):
        checkpoint.load(str(tmp_path / "nowhere"))
    with pytest.raises(checkpoint.CheckpointError, match=r"hyperparams\.yaml is missing"):
        checkpoint.load(str(tmp_path))
    (tmp_path / "hyperparams.yaml").write_text("modules: {}\n")
    (tmp_path / "embedding_model.ckpt").write_bytes(b"")
    with pytest.raises(checkpoint.CheckpointError, match="has no modules: compute_features"):
        checkpoint.load(str(tmp_path))
    for options in ({"channels": 12}, {"channels": 8 * 10**12}, {"seed": 10**30}, {"seed": -1}):
        with pytest.raises(checkpoint.CheckpointError, match="expected a"):
            checkpoint.load("random", **options)


def test_random_weights_are_the_seeds(mini: checkpoint.Checkpoint) -> None:
    one, same, other = (checkpoint.load("random", seed=seed, channels=16) for seed in (1, 1, 2))
    assert one.sha256 == same.sha256 != other.sha256
    assert np.isnan(one.threshold)


def hub_cache(folder: Path, cache: Path, revision: str) -> None:
    """What the hub's client leaves behind after a download."""
    entry = cache / "models--somebody--some-ecapa"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(revision)
    shutil.copytree(folder, entry / "snapshots" / revision)


def test_a_hub_model_comes_from_the_cache(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_cache(folder, tmp_path / "cache", "a" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    loaded = checkpoint.load("somebody/some-ecapa")
    assert loaded.origin == "--source somebody/some-ecapa --revision main"
    assert loaded.sha256 == checkpoint.load(str(folder)).sha256


def test_a_hub_out_of_reach_names_the_ways_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", refuse)
    assert main(["--repository", str(copy_configs(tmp_path))]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "no route to host" in message and "--source FOLDER" in message and "--source mini" in message
    assert checkpoint.HUB_REVISION[:12] in message


# --- the command ---


def test_the_file_says_what_it_is(repository: Path, mini: checkpoint.Checkpoint) -> None:
    proto = onnx.load(str(repository / "ecapa/1/model.onnx"))
    assert proto.ir_version <= 10
    assert [(item.domain, item.version) for item in proto.opset_import] == [("", 18)]
    metadata = {item.key: item.value for item in proto.metadata_props}
    assert metadata["weights_sha256"] == mini.sha256
    assert metadata["source"] == "mini"
    assert metadata["max_seconds"] == "30.0"
    assert metadata["verification_threshold"] == "0.45"
    assert f"torch=={torch.__version__.partition('+')[0]}" in metadata["packages"]
    assert not [node for node in proto.graph.node if node.op_type in {"Conv", "Loop", "If", "Scan"}]


def test_verify_command(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--repository", str(repository)]) == 0
    output = capsys.readouterr().out
    for group in ("samples/", "noise", "silence", "near-silence", "mixed lengths", "guards"):
        assert group in output
    assert "REFUSED" not in output


def test_verify_refuses_other_weights(repository: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--repository", str(repository), "--source", str(folder)]) == 1
    assert "made from weights ff14eec9332f (mini)" in capsys.readouterr().err


@pytest.mark.slow
def test_a_folder_is_exported_verified_and_up_to_date(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "a source, with a space")
    target = copy_configs(tmp_path)
    arguments = ["--repository", str(target), "--source", str(folder), "--max-seconds", "5", "--no-fp16"]
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
    assert "away from SpeechBrain" in capsys.readouterr().err
    assert path.read_bytes() == b"the old one"
    assert [item.name for item in path.parent.glob("*.partial")] == []


def tampered(path: Path, operator: str, to: str) -> None:
    """Replace the last node of a kind by another that takes the same inputs."""
    proto = onnx.load(str(path))
    node = [node for node in proto.graph.node if node.op_type == operator][-1]
    node.op_type = to
    onnx.save(proto, str(path))
    seal.seal(path)


@pytest.mark.parametrize(
    ("operator", "to", "message"),
    [
        ("Relu", "Abs", "away from SpeechBrain"),  # a layer
        ("Tanh", "Sin", "away from SpeechBrain"),  # the attention
        ("And", "Or", "expected NaN"),  # a guard
    ],
)
def test_verify_finds_a_changed_graph(
    exported: Path, operator: str, to: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered(exported / "ecapa/1/model.onnx", operator, to)
    assert main(["verify", "--repository", str(exported)]) == 1
    assert message in capsys.readouterr().err


def without_guards(path: Path) -> None:
    proto = onnx.load(str(path))
    for item in proto.metadata_props:
        if item.key == "guards":
            item.value = "short,max-seconds"
    onnx.save(proto, str(path))
    seal.seal(path)


def other_inputs(path: Path) -> None:
    proto = onnx.load(str(path))
    proto.graph.input[0].name = "audio"
    onnx.save(proto, str(path))
    seal.seal(path)


def changed(path: Path, change: Callable[[bytes], bytes]) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: changed(path, lambda data: data[:-1]), "ends without a checksum"),
        (lambda path: changed(path, lambda data: data[: len(data) // 2]), "ends without a checksum"),
        (lambda path: changed(path, lambda data: data[-80:]), "checksum differs"),
        (lambda path: changed(path, lambda data: b"\0" + data[1:]), "checksum differs"),
        (lambda path: changed(path, lambda data: data[:1000000] + b"\1" + data[1000001:]), "checksum differs"),
        (lambda path: path.write_bytes(b""), "ends without a checksum"),
        (without_guards, "does not guard against bad input of the kinds empty, not-finite, torn"),
        (other_inputs, "has inputs audio, lengths, expected waveform and lengths"),
        (Path.unlink, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_is_not_as_exported_is_not_served(
    exported: Path, damage: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported / "ecapa/1/model.onnx"
    damage(path)
    with pytest.raises(configs.ModelFileError, match=re.escape(message)) as info:
        configs.ModelFile.read(path)
    assert "python -m export" in str(info.value)
    assert not artifacts.up_to_date(path) or damage in (without_guards, other_inputs)
    assert main(["verify", "--repository", str(exported)]) == 1
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"not a model"])
def test_verify_without_a_model(exported: Path, content: bytes | None, capsys: pytest.CaptureFixture[str]) -> None:
    path = exported / "ecapa/1/model.onnx"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert main(["verify", "--repository", str(exported)]) == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "python -m export" in message
    assert not artifacts.up_to_date(path)


@pytest.mark.parametrize("seconds", ["0", "nan", "a", "1e9", "-3"])
def test_wrong_max_seconds(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--max-seconds", seconds])
    assert "expected 1 to 3600" in capsys.readouterr().err


def test_a_repository_without_configs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--repository", str(tmp_path), "--source", "mini"]) == 1
    assert "must be a copy of this project's model_repository" in capsys.readouterr().err


def test_a_disk_that_cannot_be_written(
    exported: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(proto: Any, path: str) -> None:
        Path(path).write_bytes(b"half a mo")
        raise OSError(28, "No space left on device", path)

    before = (exported / "ecapa/1/model.onnx").read_bytes()
    monkeypatch.setattr(onnx, "save", full)
    assert main(["--repository", str(exported), "--source", str(folder), "--no-fp16"]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (exported / "ecapa/1/model.onnx").read_bytes() == before
    assert not list((exported / "ecapa/1").glob("*.partial"))


# --- configs ---


def read_files(repository: Path) -> dict[str, configs.ModelFile]:
    return {path.name: configs.ModelFile.read(path) for path in (repository / "ecapa/1").glob("*.onnx")}


CHANGES = [
    ("dims: [ 192 ]", "dims: [ 256 ]", "dims of embedding is [256], the model in ecapa/1 needs [192]"),
    ("TYPE_INT32", "TYPE_INT64", "data_type of lengths is TYPE_INT64, the model in ecapa/1 needs TYPE_INT32"),
    ("BATCH_ITEM_SHAPE", "BATCH_ELEMENT_COUNT", "kind of lengths is BATCH_ELEMENT_COUNT"),
    ("allow_ragged_batch: true", "allow_ragged_batch: false", "allow_ragged_batch of waveform is False"),
    ('name: "model_info"', 'name: "info"', "data_type of model_info is TYPE_INVALID"),
    ('backend: "onnxruntime"', 'backend: "tensorrt"', "backend of ecapa is tensorrt"),
]


@pytest.mark.parametrize("name", ["config.pbtxt", "configs/cpu.pbtxt", "configs/gpu.pbtxt", "configs/gpu_fp16.pbtxt"])
@pytest.mark.parametrize(("old", "new", "message"), CHANGES)
def test_a_config_that_disagrees_is_named_with_its_line(
    exported: Path, name: str, old: str, new: str, message: str
) -> None:
    path = exported / "ecapa" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(configs.ConfigError) as info:
        configs.check_all(exported / "ecapa", read_files(exported))
    assert f"{path} " in str(info.value) and message in str(info.value)
    if "model_info" not in old:
        line = text[: text.index(old)].count("\n") + 1
        assert f" line {line}: " in str(info.value)


@pytest.mark.parametrize("path", sorted(ROOT.glob("model_repository/*/**/*.pbtxt")), ids=str)
def test_shipped_configs_have_no_queue_policy(path: Path) -> None:
    """With one Triton's batcher wakes late: eight clients got a quarter of the embeddings a second."""
    config = configs.read(path)
    assert config.HasField("dynamic_batching")
    assert not config.dynamic_batching.HasField("default_queue_policy")


def test_a_config_that_is_none(exported: Path) -> None:
    path = exported / "ecapa/configs/cpu.pbtxt"
    path.write_text("max_batch_size: 4\nbackend onnxruntime\n")
    with pytest.raises(configs.ConfigError, match=r"cpu\.pbtxt is not a Triton model config: line 2"):
        configs.check_all(exported / "ecapa", read_files(exported))


def test_the_projects_own_configs_agree(repository: Path) -> None:
    configs.check_all(repository / "ecapa", read_files(repository))
    assert [path.read_text() for path in configs.config_files(repository / "ecapa")] == [
        path.read_text() for path in configs.config_files(ROOT / "model_repository/ecapa")
    ]
