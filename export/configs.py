"""Triton configs and model files, read and checked against each other; neither torch nor ONNX Runtime is needed."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import onnx
from google.protobuf import message, text_format
from tritonclient.grpc import model_config_pb2 as pb

from . import seal

METADATA_FILE = "metadata.json"  # in a TorchScript archive


class Format(NamedTuple):
    """A kind of model file: the model's folder, the backend that serves it, its files by precision."""

    folder: str
    backend: str
    files: Mapping[str, str]

    @property
    def file(self) -> str:
        """The float32 file, without which there is no other."""
        return self.files["fp32"]


FORMATS = {
    "onnx": Format(
        "ecapa", "onnxruntime", {"fp32": "model.onnx", "fp16": "model_fp16.onnx", "int8": "model_int8.onnx"}
    ),
    "torchscript": Format("ecapa_torchscript", "pytorch", {"fp32": "model.pt", "fp16": "model_fp16.pt"}),
}
MODEL = FORMATS["onnx"].folder  # the client's default
USUAL_FILES = {kind.backend: kind.file for kind in FORMATS.values()}  # loaded where the config names no file
_METADATA = {"source", "origin", "weights_sha256", "verification_threshold", "max_seconds", "min_samples"}
_METADATA |= {"embedding_size", "precision"}
# The tensors of every exported model, as in its config: see PackedEcapa.forward.
_TENSORS = """
input {{ name: "waveform" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }}
batch_input {{
  kind: BATCH_ITEM_SHAPE target_name: "lengths" data_type: TYPE_INT32 source_input: "waveform"
}}
output {{ name: "embedding" data_type: TYPE_FP32 dims: [ {embedding_size} ] }}
output {{ name: "model_info" data_type: TYPE_FP32 dims: [ 7 ] }}
"""


class ConfigError(Exception):
    """A config disagrees with the model; the message says what to change."""


class ModelFileError(Exception):
    """A model file cannot be served; the message says what to do."""


@dataclass(frozen=True)
class ModelFile:
    """An exported file, which is read, not run: the backend that serves it, and its metadata."""

    backend: str
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> ModelFile:
        """Read a file, after checking its seal and its guards.

        Raises:
            ModelFileError: it is missing, damaged, changed, unguarded, or not one of ours.
        """
        kind = FORMATS["torchscript" if ".pt" in path.suffixes else "onnx"]
        try:
            seal.check(path)
            metadata = _read_torchscript(path) if ".pt" in path.suffixes else _read_onnx(path)
            seal.check_guards(path, metadata)
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read ({error.strerror}): write it with python -m export") from error
        except seal.SealError as error:
            raise ModelFileError(str(error)) from error
        except (message.DecodeError, zipfile.BadZipFile, ValueError, KeyError) as error:
            raise ModelFileError(f"{path} was not written by python -m export: run it") from error
        if missing := sorted(_METADATA - set(metadata)):
            raise ModelFileError(f"{path} has no metadata {', '.join(missing)}: run python -m export")
        return cls(kind.backend, metadata)


def config_files(folder: Path) -> list[Path]:
    """The configs of a model folder: the default one and those that the launcher chooses from."""
    return [folder / "config.pbtxt", *sorted((folder / "configs").glob("*.pbtxt"))]


def check_all(folder: Path, models: Mapping[str, ModelFile]) -> None:
    """Check every config of a model folder against the file that it chooses, if that is among the exported ones.

    Args:
        folder: of the model.
        models: the exported files by name.

    Raises:
        ConfigError: a config is missing, unreadable, chooses an unknown file or disagrees with its file.
    """
    (kind,) = (kind for kind in FORMATS.values() if kind.folder == folder.name)
    for path in config_files(folder):
        file = read(path).default_model_filename or kind.file
        if file not in kind.files.values():
            raise ConfigError(f"{path}: default_model_filename is {file}, expected {' or '.join(kind.files.values())}")
        if file in models:
            check(path, models[file], folder.name)


def check(path: Path, model: ModelFile, name: str) -> None:
    """Check one config of the model called ``name``.

    Raises:
        ConfigError: the config is missing, unreadable or disagrees with the model.
    """
    config = read(path)
    needed = text_format.Parse(_TENSORS.format_map(model.metadata), pb.ModelConfig())
    comparison = {
        "name": (config.name or name, name),
        "backend": (config.backend, model.backend),
        "max_batch_size": (config.max_batch_size, max(1, config.max_batch_size)),
        "input": (config.input, needed.input),
        "batch_input": (config.batch_input, needed.batch_input),
        "output": (config.output, needed.output),
        "parameter required_guards": (_parameter(config, "required_guards"), ",".join(seal.GUARDS)),
        "parameter precision": (_parameter(config, "precision"), model.metadata["precision"]),
    }
    for field, (found, expected) in comparison.items():
        if found != expected:
            found, expected = (" ".join(str(value).split()) for value in (found, expected))
            raise ConfigError(f"{path}: {field} is {found}, the model in {name}/1 needs {expected}")


def read(path: Path) -> Any:
    """Triton's ``ModelConfig`` of a config file. Fields that the installed tritonclient does not know are ignored.

    Raises:
        ConfigError: it is missing or is not a config.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing: restore it, or name a copy of the project's model_repository")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return text_format.Parse(text, pb.ModelConfig(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ConfigError(f"{path} is not a Triton model config: line {error}") from error


def is_ours(config: Any) -> bool:
    """Whether the config is of an exported model, which is served with its guards or not at all."""
    names = {item.name for item in [*config.input, *config.output]}
    return {"waveform", "embedding"} <= names and config.backend != "python"  # a program has no file to check


def _read_onnx(path: Path) -> dict[str, str]:
    proto = onnx.load(str(path), load_external_data=False)
    return {item.key: item.value for item in proto.metadata_props}


def _read_torchscript(path: Path) -> dict[str, str]:
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_FILE}"))
        return dict(json.loads(archive.read(name)))


def _parameter(config: Any, key: str) -> str:
    return str(config.parameters[key].string_value) if key in config.parameters else ""
