"""The hand-written Triton configs of a model, read back and checked against the exported file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as pb

from .onnx_file import OnnxModel

MODEL = "ecapa"
_TRITON_TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int32)": "TYPE_INT32"}


class ConfigError(Exception):
    """A config disagrees with the model; the message says which line to change."""


def config_files(folder: Path) -> list[Path]:
    """The configs of a model folder: the default one and one for each kind of device."""
    return [folder / "config.pbtxt", *sorted((folder / "configs").glob("*.pbtxt"))]


def check(folder: Path, model: OnnxModel) -> list[Path]:
    """Check every config of a model folder and return their paths.

    Raises:
        ConfigError: a config is missing, unreadable or disagrees with the model.
    """
    files = config_files(folder)
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{path} is missing: restore it from the project")
        text = path.read_text(encoding="utf-8", errors="replace")
        try:
            config = text_format.Parse(text, pb.ModelConfig())
        except text_format.ParseError as error:
            raise ConfigError(f"{path} is not a Triton model config: line {error}") from error
        for section, name, key, found, expected in _differences(config, model, folder.name):
            line = _line_of(text, section, name, key)
            where = f"line {line}" if line else "add a line"
            raise ConfigError(
                f"{path} {where}: {key} of {name} is {found}, the model in {folder.name}/1 needs {expected}"
            )
    return files


def _differences(config: Any, model: OnnxModel, name: str) -> list[tuple[str, str, str, str, str]]:
    """What differs: (section, block name, key, found, expected)."""
    wanted: list[tuple[str, str, str, Any, Any]] = [
        ("", name, "name", config.name or name, name),
        ("", name, "backend", config.backend, "onnxruntime"),
        ("", name, "max_batch_size", config.max_batch_size, max(1, config.max_batch_size)),
    ]
    waveform, lengths = model.session.get_inputs()
    inputs = {item.name: item for item in config.input}
    given = inputs.pop(waveform.name, pb.ModelInput())
    wanted += [
        ("input", waveform.name, "data_type", _type(given), _TRITON_TYPES[waveform.type]),
        ("input", waveform.name, "dims", list(given.dims), [-1]),
        ("input", waveform.name, "allow_ragged_batch", given.allow_ragged_batch, True),
        *(("input", extra, "name", extra, "no such input") for extra in inputs),
    ]
    batch = next((item for item in config.batch_input if lengths.name in item.target_name), pb.BatchInput())
    wanted += [
        ("batch_input", lengths.name, "target_name", list(batch.target_name), [lengths.name]),
        ("batch_input", lengths.name, "kind", pb.BatchInput.Kind.Name(batch.kind), "BATCH_ITEM_SHAPE"),
        ("batch_input", lengths.name, "data_type", _type(batch), _TRITON_TYPES[lengths.type]),
        ("batch_input", lengths.name, "source_input", list(batch.source_input), [waveform.name]),
    ]
    outputs = {item.name: item for item in config.output}
    for output in model.session.get_outputs():
        given_output = outputs.pop(output.name, pb.ModelOutput())
        wanted += [
            ("output", output.name, "data_type", _type(given_output), _TRITON_TYPES[output.type]),
            ("output", output.name, "dims", list(given_output.dims), output.shape[1:]),
        ]
    wanted += [("output", extra, "name", extra, "no such output") for extra in outputs]
    return [(s, n, k, str(found), str(expected)) for s, n, k, found, expected in wanted if found != expected]


def _type(item: Any) -> str:
    return str(pb.DataType.Name(item.data_type))


def _line_of(text: str, section: str, name: str, key: str) -> int | None:
    """The number of the line that sets ``key`` in the block of ``section`` that mentions ``name``."""
    code = re.sub(r"#[^\n]*", lambda comment: " " * len(comment[0]), text)  # same offsets, no comments
    begin, end = 0, len(code)
    if section:
        for match in re.finditer(rf"^\s*{section}\b\s*:?\s*\[?\s*\{{", code, re.MULTILINE):
            depth, stop = 1, match.end()
            while stop < len(code) and depth:
                depth += {"{": 1, "}": -1}.get(code[stop], 0)
                stop += 1
            if f'"{name}"' in code[match.end() : stop]:
                begin, end = match.start(), stop
                break
        else:
            return None
    found = re.compile(rf"\b{key}\b\s*:").search(code, begin, end)
    position = found.start() if found else begin + len(code[begin:end]) - len(code[begin:end].lstrip())
    return code.count("\n", 0, position) + 1 if found or section else None
