"""Triton configs and model files, read and checked against each other; neither torch nor ONNX Runtime is needed."""

from __future__ import annotations

import json
import re
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
    """A kind of model file: the model's folder, the backend that serves it, its files in float32 and in float16."""

    folder: str
    backend: str
    file: str
    half_file: str


FORMATS = {
    "onnx": Format("ecapa", "onnxruntime", "model.onnx", "model_fp16.onnx"),
    "torchscript": Format("ecapa_torchscript", "pytorch", "model.pt", "model_fp16.pt"),
}
MODEL = FORMATS["onnx"].folder  # the client's default
USUAL_FILES = {kind.backend: kind.file for kind in FORMATS.values()}  # loaded where the config names no file
_METADATA = {"source", "origin", "weights_sha256", "verification_threshold", "max_seconds", "min_samples", "precision"}
_TRITON_TYPES: dict[int, str] = {onnx.TensorProto.FLOAT: "TYPE_FP32", onnx.TensorProto.INT32: "TYPE_INT32"}


class ConfigError(Exception):
    """A config disagrees with the model; the message says which line to change."""


class ModelFileError(Exception):
    """A model file cannot be served; the message says what to do."""


class Tensor(NamedTuple):
    """An input or output of a model file, with Triton's name of its type; a variable dimension has a name or is 0."""

    name: str
    data_type: str
    shape: list[int | str]


@dataclass(frozen=True)
class ModelFile:
    """The tensors and metadata of an exported file, which is read, not run."""

    backend: str
    inputs: list[Tensor]
    outputs: list[Tensor]
    metadata: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> ModelFile:
        """Read a file, after checking its seal and its guards.

        Raises:
            ModelFileError: it is missing, damaged, changed, unguarded, or not one of ours.
        """
        try:
            seal.check(path)
            model = _read_torchscript(path) if ".pt" in path.suffixes else _read_onnx(path)
            seal.check_guards(path, model.metadata)
        except OSError as error:
            raise ModelFileError(f"{path} cannot be read ({error.strerror}): write it with python -m export") from error
        except seal.SealError as error:
            raise ModelFileError(str(error)) from error
        if [item.name for item in model.inputs] != ["waveform", "lengths"]:
            names = ", ".join(item.name for item in model.inputs)
            raise ModelFileError(f"{path} has inputs {names}, expected waveform and lengths: run python -m export")
        if missing := sorted(_METADATA - set(model.metadata)):
            raise ModelFileError(f"{path} has no metadata {', '.join(missing)}: run python -m export")
        return model


def _read_onnx(path: Path) -> ModelFile:
    try:
        proto = onnx.load(str(path), load_external_data=False)
    except message.DecodeError as error:
        raise ModelFileError(f"{path} was not written by python -m export: run it") from error
    metadata = {item.key: item.value for item in proto.metadata_props}
    inputs, outputs = ([_tensor(value) for value in values] for values in (proto.graph.input, proto.graph.output))
    return ModelFile("onnxruntime", inputs, outputs, metadata)


def _read_torchscript(path: Path) -> ModelFile:
    """Its tensors are those of every model of this project: the archive does not name their types."""
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(f"/extra/{METADATA_FILE}"))
            metadata = json.loads(archive.read(name))
        size = int(metadata["embedding_size"])
    except (zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ModelFileError(f"{path} was not written by python -m export: run it") from error
    inputs = [Tensor("waveform", "TYPE_FP32", ["S"]), Tensor("lengths", "TYPE_INT32", ["B", 1])]
    outputs = [Tensor("embedding", "TYPE_FP32", ["B", size]), Tensor("model_info", "TYPE_FP32", ["B", 7])]
    return ModelFile("pytorch", inputs, outputs, metadata)


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
        if file not in (kind.file, kind.half_file):
            raise ConfigError(f"{path}: default_model_filename is {file}, expected {kind.file} or {kind.half_file}")
        if file in models:
            check(path, models[file], folder.name)


def check(path: Path, model: ModelFile, name: str) -> None:
    """Check one config of the model called ``name``.

    Raises:
        ConfigError: the config is missing, unreadable or disagrees with the model.
    """
    config = read(path)
    for section, block, key, found, expected in _differences(config, model, name):
        line = _line_of(path.read_text(encoding="utf-8", errors="replace"), section, block, key)
        where = f"line {line}" if line else "add a line"
        raise ConfigError(f"{path} {where}: {key} of {block} is {found}, the model in {name}/1 needs {expected}")


def read(path: Path) -> Any:
    """Triton's ``ModelConfig`` of a config file. Fields that the installed tritonclient does not know are ignored.

    Raises:
        ConfigError: it is missing or is not a config.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing: restore it from the project")
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
        return text_format.Parse(text, pb.ModelConfig(), allow_unknown_field=True)
    except text_format.ParseError as error:
        raise ConfigError(f"{path} is not a Triton model config: line {error}") from error


def is_ours(config: Any) -> bool:
    """Whether the config is of an exported model, which is served with its guards or not at all."""
    names = {item.name for item in [*config.input, *config.output]}
    return {"waveform", "embedding"} <= names and config.backend != "python"  # a program has no file to check


def _differences(config: Any, model: ModelFile, name: str) -> list[tuple[str, str, str, str, str]]:
    """Differences as (section, block name, key, found, expected)."""
    wanted: list[tuple[str, str, str, Any, Any]] = [
        ("", name, "name", config.name or name, name),
        ("", name, "backend", config.backend, model.backend),
        ("", name, "max_batch_size", config.max_batch_size, max(1, config.max_batch_size)),
    ]
    waveform, lengths = model.inputs
    inputs = {item.name: item for item in config.input}
    given = inputs.pop(waveform.name, pb.ModelInput())
    wanted += [
        ("input", waveform.name, "data_type", _type(given), waveform.data_type),
        ("input", waveform.name, "dims", list(given.dims), [-1]),
        ("input", waveform.name, "allow_ragged_batch", given.allow_ragged_batch, True),
        *(("input", extra, "name", extra, "no such input") for extra in inputs),
    ]
    batch = next((item for item in config.batch_input if lengths.name in item.target_name), pb.BatchInput())
    wanted += [
        ("batch_input", lengths.name, "target_name", list(batch.target_name), [lengths.name]),
        ("batch_input", lengths.name, "kind", pb.BatchInput.Kind.Name(batch.kind), "BATCH_ITEM_SHAPE"),
        ("batch_input", lengths.name, "data_type", _type(batch), lengths.data_type),
        ("batch_input", lengths.name, "source_input", list(batch.source_input), [waveform.name]),
    ]
    outputs = {item.name: item for item in config.output}
    for output in model.outputs:
        given_output = outputs.pop(output.name, pb.ModelOutput())
        wanted += [
            ("output", output.name, "data_type", _type(given_output), output.data_type),
            ("output", output.name, "dims", list(given_output.dims), output.shape[1:]),
        ]
    wanted += [("output", extra, "name", extra, "no such output") for extra in outputs]
    for key, value in ("required_guards", ",".join(seal.GUARDS)), ("precision", model.metadata.get("precision")):
        given_value = config.parameters[key].string_value if key in config.parameters else ""
        wanted += [("parameters", key, "string_value", given_value, value)]
    return [(s, n, k, str(found), str(expected)) for s, n, k, found, expected in wanted if found != expected]


def _type(item: Any) -> str:
    return str(pb.DataType.Name(item.data_type))


def _tensor(value: onnx.ValueInfoProto) -> Tensor:
    kind = value.type.tensor_type
    shape: list[int | str] = [dim.dim_param or dim.dim_value for dim in kind.shape.dim]
    return Tensor(value.name, _TRITON_TYPES.get(kind.elem_type, "another type"), shape)


def _line_of(text: str, section: str, name: str, key: str) -> int | None:
    """The line of ``key`` in the block of ``section`` that mentions ``name``, else the line of the block, if any."""
    code = re.sub(r"#[^\n]*", lambda comment: " " * len(comment[0]), text)  # same offsets, no comments
    block = rf"^[ \t]*{section}\b[\s:\[]*\{{(?:[^{{}}]|\{{[^{{}}]*\}})*\}}" if section else r"[\s\S]+"
    found = (match for match in re.finditer(block, code, re.MULTILINE) if not section or f'"{name}"' in match[0])
    match = next(found, None)
    if match is None:
        return None
    line = re.compile(rf"\b{key}\b\s*:").search(code, *match.span()) or (match if section else None)
    return code.count("\n", 0, line.start()) + 1 if line else None
