"""Exported model files, ONNX and TorchScript: write a packed model, open a file, embed clips with it."""

from __future__ import annotations

import json
import logging
import shlex
import warnings
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from ecapa_triton.audio import SAMPLE_RATE
from numpy.typing import NDArray

from . import configs, seal
from .checkpoint import HYPERPARAMS, MINI, WEIGHTS, Checkpoint
from .packed import PackedEcapa

OPSET = 18
MAX_IR_VERSION = 10  # the newest that ONNX Runtime 1.19 of the official container reads
PACKAGES = ("torch", "speechbrain", "onnx", "onnxscript", "onnxruntime", "numpy")  # named in the metadata


class ExportError(Exception):
    """A model file cannot be written; the message says what to do."""


def write(model: PackedEcapa, checkpoint: Checkpoint, path: Path) -> None:
    """Write a sealed file with metadata: ONNX, or TorchScript if a suffix of ``path`` is ``.pt``.

    Raises:
        ExportError: the exporter made a graph that could not be served.
        OSError: the file cannot be written.
    """
    (write_torchscript if ".pt" in path.suffixes else write_onnx)(model, checkpoint, path)


def read(path: Path) -> ExportedModel:
    """Open an exported file on the CPU.

    Raises:
        ModelFileError: it is missing, damaged or was not written by this project.
    """
    return TorchScriptModel(path) if ".pt" in path.suffixes else OnnxModel(path)


def up_to_date(path: Path, source: str | None = None) -> bool:
    """Whether an exported file is there and newer than the exporting code and the weights it was made from.

    Args:
        path: of the exported file.
        source: expected origin, as for :func:`export.checkpoint.load`; None for any.
    """
    try:
        metadata = configs.ModelFile.read(path).metadata
    except configs.ModelFileError:
        return False
    _, made_from, *_ = [*shlex.split(metadata.get("origin", "")), "", ""]  # --source NAME ...
    if source is not None and made_from not in (source, str(Path(source).resolve())):
        return False
    inputs = list(Path(__file__).parent.glob("*.py"))
    folder = MINI if made_from == "mini" else Path(made_from)
    inputs += [file for file in (folder / HYPERPARAMS, folder / WEIGHTS) if file.is_file()]
    return bool(made_from) and all(file.stat().st_mtime <= path.stat().st_mtime for file in inputs)


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch to export with: three clips of different lengths."""
    lengths = torch.tensor([[SAMPLE_RATE], [SAMPLE_RATE // 2], [3 * SAMPLE_RATE // 2]], dtype=torch.int32)
    return torch.zeros(3 * SAMPLE_RATE), lengths


def describe(model: PackedEcapa, checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata of a model file."""
    return {
        "source": checkpoint.source,
        "origin": checkpoint.origin,
        "revision": checkpoint.revision,
        "weights_sha256": checkpoint.sha256,
        "verification_threshold": repr(checkpoint.threshold),
        "max_seconds": repr(model.max_samples / SAMPLE_RATE),
        "min_samples": str(model.min_samples),
        "sample_rate": str(SAMPLE_RATE),
        "embedding_size": str(model.embedding_size),
        "precision": "fp16" if model.dtype == torch.float16 else "fp32",
        "guards": ",".join(seal.GUARDS),
        "packages": ",".join(f"{name}=={version(name)}" for name in PACKAGES),
    }


def write_onnx(model: PackedEcapa, checkpoint: Checkpoint, path: Path) -> None:
    """Write a sealed ONNX file; inputs and outputs are those of :meth:`PackedEcapa.forward`.

    Raises:
        ExportError: the exporter made a graph that the container's ONNX Runtime could not read.
        OSError: the file cannot be written.
    """
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            example(),
            dynamo=True,
            opset_version=OPSET,
            input_names=["waveform", "lengths"],
            output_names=["embedding", "model_info"],
            dynamic_shapes=dynamic,
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    opset = {item.domain: item.version for item in proto.opset_import}
    if proto.ir_version > MAX_IR_VERSION or opset != {"": OPSET}:
        raise ExportError(
            f"the exporter made IR version {proto.ir_version} with operator sets {opset}, expected IR version at most "
            f"{MAX_IR_VERSION} and only the standard operators of version {OPSET}: install torch and onnx as pinned"
        )
    proto.producer_name = "ecapa-triton"
    onnx.helper.set_model_props(proto, describe(model, checkpoint))
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))
    seal.seal(path)


def write_torchscript(model: PackedEcapa, checkpoint: Checkpoint, path: Path) -> None:
    """Write a sealed, frozen TorchScript file of :meth:`PackedEcapa.forward` for any device (``map_location``).

    Raises:
        ExportError: an operation of the graph is tied to the device of the export.
        OSError: the file cannot be written.
    """
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns of shapes that depend on the input; verification over many shapes shows that they do.
        warnings.simplefilter("ignore")
        module = torch.jit.freeze(torch.jit.trace(model, example(), check_trace=False))
    _untie(module.graph)
    extra = {configs.METADATA_FILE: json.dumps(describe(model, checkpoint), indent=1)}
    try:
        torch.jit.save(module, str(path), _extra_files=extra)
    except RuntimeError as error:  # also of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    seal.seal(path)


def _untie(graph: Any) -> None:
    """Make the graph create its tensors on the device of its input; tracing recorded the device it ran on."""
    waveform = list(graph.inputs())[1]
    device = graph.create("prim::device", [waveform])
    device.output().setType(torch._C.DeviceObjType.get())
    graph.prependNode(device)
    for node in graph.findAllNodes("prim::Constant"):
        if node.output().type().kind() == "DeviceObjType":
            node.output().replaceAllUsesWith(device.output())
    torch._C._jit_pass_dce(graph)
    if any(node.output().type().kind() == "DeviceObjType" for node in graph.findAllNodes("prim::Constant")):
        raise ExportError("the traced graph is tied to a device: install torch as pinned")


class ExportedModel(ABC):
    """An exported model that has been opened.

    Attributes:
        file: its tensors and metadata.
        metadata: those of :func:`describe`.
        max_samples: samples of a clip that are embedded.
        min_samples: fewest samples of a clip that has an embedding.

    Raises:
        ModelFileError: the file is missing, damaged or was not written by this project.
    """

    def __init__(self, path: Path) -> None:
        self.file = configs.ModelFile.read(path)
        self.metadata = self.file.metadata
        self.max_samples = round(float(self.metadata["max_seconds"]) * SAMPLE_RATE)
        self.min_samples = int(self.metadata["min_samples"])

    def embed(self, clips: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Embed float32 16 kHz clips ``[samples]`` as one packed batch: float32 ``[len(clips), E]``."""
        waveform = np.concatenate(clips).astype(np.float32, copy=False)
        lengths = np.array([[len(clip)] for clip in clips], dtype=np.int32)
        return self.run(waveform, lengths)

    @abstractmethod
    def run(self, waveform: NDArray[np.float32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """Embed samples ``[S]`` with any lengths ``[B, 1]``, fitting or not: float32 ``[B, E]``."""


class OnnxModel(ExportedModel):
    """An exported ONNX model on the CPU, with ``threads`` of ONNX Runtime, 0 for all cores."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        super().__init__(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # shapes change with every call
        options.log_severity_level = 3
        # Idle threads sleep at once instead of taking cores from the next process.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise configs.ModelFileError(f"{path} cannot be loaded ({error}): run python -m export again") from error

    def run(self, waveform: NDArray[np.float32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """As :meth:`ExportedModel.run`."""
        (embedding,) = self.session.run(["embedding"], {"waveform": waveform, "lengths": lengths})
        return np.asarray(embedding)


class TorchScriptModel(ExportedModel):
    """An exported TorchScript model on a ``device`` such as ``"cpu"`` or ``"cuda:0"``."""

    def __init__(self, path: Path, device: str = "cpu") -> None:
        super().__init__(path)
        try:
            self.module = torch.jit.load(str(path), map_location=device)
        except RuntimeError as error:
            raise configs.ModelFileError(f"{path} cannot be loaded ({error}): run python -m export again") from error
        self.device = torch.device(device)

    def run(self, waveform: NDArray[np.float32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """As :meth:`ExportedModel.run`."""
        inputs = (torch.from_numpy(array).to(self.device) for array in (waveform, lengths))
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            embedding, _ = self.module(*inputs)
        return np.asarray(embedding.cpu().numpy())
