"""Exported model files, ONNX and TorchScript: write a packed model, open a file, embed clips with it."""

from __future__ import annotations

import json
import logging
import shlex
import warnings
from collections.abc import Callable
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
Array = NDArray[np.float32]
Run = Callable[[Array, NDArray[np.int32]], tuple[Array, Array]]


class ExportError(Exception):
    """A model file cannot be written; the message says what to do."""


class ExportedModel:
    """An exported file, opened on a ``device`` such as ``"cpu"`` or ``"cuda:0"``; ONNX on the CPU alone.

    Attributes:
        file: its metadata and the backend that serves it.
        metadata: those of :func:`describe`.
        max_samples: samples of a clip that are embedded.
        min_samples: fewest samples of a clip that has an embedding.
        run: :meth:`PackedEcapa.forward` on arrays; lengths that do not fit the samples give rows of NaN.

    Raises:
        ModelFileError: the file is missing, damaged or was not written by this project.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        self.file = configs.ModelFile.read(path)
        self.metadata = self.file.metadata
        self.max_samples = round(float(self.metadata["max_seconds"]) * SAMPLE_RATE)
        self.min_samples = int(self.metadata["min_samples"])
        try:
            self.run: Run = _open_torchscript(path, device) if ".pt" in path.suffixes else _open_onnx(path)
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise configs.ModelFileError(f"{path} cannot be loaded ({error}): run python -m export again") from error

    def embed(self, clips: list[Array]) -> Array:
        """Embed float32 16 kHz clips ``[samples]`` as one packed batch: float32 ``[len(clips), E]``."""
        lengths = np.array([[len(clip)] for clip in clips], dtype=np.int32)
        return self.run(np.concatenate(clips).astype(np.float32, copy=False), lengths)[0]


def write(model: PackedEcapa, checkpoint: Checkpoint, path: Path) -> None:
    """Write a sealed file with metadata: ONNX, or TorchScript if a suffix of ``path`` is ``.pt``.

    Inputs and outputs are those of :meth:`PackedEcapa.forward`.

    Raises:
        ExportError: the exporter made a graph that could not be served.
        OSError: the file cannot be written.
    """
    (write_torchscript if ".pt" in path.suffixes else write_onnx)(model, checkpoint, path)


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
    _, made_from, *_ = shlex.split(metadata["origin"])  # --source NAME ...
    if source is not None and made_from not in (source, str(Path(source).resolve())):
        return False
    folder = MINI if made_from == "mini" else Path(made_from)
    inputs = [*Path(__file__).parent.glob("*.py"), folder / HYPERPARAMS, folder / WEIGHTS]
    return all(file.stat().st_mtime <= path.stat().st_mtime for file in inputs if file.is_file())


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
    """Write an ONNX file, as :func:`write`."""
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            _example(),
            dynamo=True,
            opset_version=OPSET,
            input_names=["waveform", "lengths"],
            output_names=["embedding", "model_info"],
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},) * 2,
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
    """Write a frozen TorchScript file for any device (``map_location``), as :func:`write`."""
    with warnings.catch_warnings(), torch.no_grad():
        # The tracer warns of shapes that depend on the input; verification over many shapes shows that they do.
        warnings.simplefilter("ignore")
        module = torch.jit.freeze(torch.jit.trace(model, _example(), check_trace=False))
    _untie(module.graph)
    extra = {configs.METADATA_FILE: json.dumps(describe(model, checkpoint), indent=1)}
    try:
        torch.jit.save(module, str(path), _extra_files=extra)
    except RuntimeError as error:  # also of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    seal.seal(path)


def _example() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch to export with: three clips of different lengths."""
    lengths = torch.tensor([[SAMPLE_RATE], [SAMPLE_RATE // 2], [3 * SAMPLE_RATE // 2]], dtype=torch.int32)
    return torch.zeros(3 * SAMPLE_RATE), lengths


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


def _open_onnx(path: Path) -> Run:
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False  # shapes change with every call
    options.log_severity_level = 3
    # Idle threads sleep at once instead of taking cores from the next process.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(waveform: Array, lengths: NDArray[np.int32]) -> tuple[Array, Array]:
        embedding, info = session.run(["embedding", "model_info"], {"waveform": waveform, "lengths": lengths})
        return embedding, info

    return run


def _open_torchscript(path: Path, device: str) -> Run:
    module = torch.jit.load(str(path), map_location=device)

    def run(waveform: Array, lengths: NDArray[np.int32]) -> tuple[Array, Array]:
        inputs = (torch.from_numpy(array).to(device) for array in (waveform, lengths))
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            embedding, info = module(*inputs)
        return embedding.cpu().numpy(), info.cpu().numpy()

    return run
