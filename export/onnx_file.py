"""The packed model as an ONNX file: written and opened."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from . import seal
from .checkpoint import Checkpoint
from .exported import ExportedModel, ExportError, describe, example
from .packed import PackedEcapa

OPSET = 18
MAX_IR_VERSION = 10  # the newest that ONNX Runtime 1.19 of the official container reads


def write(model: PackedEcapa, checkpoint: Checkpoint, path: Path) -> None:
    """Write the packed model to ``path``, with metadata that says where it comes from, and sealed.

    Inputs ``waveform`` float32 ``[S]`` and ``lengths`` int32 ``[B, 1]``, outputs ``embedding`` float32 ``[B, E]`` and
    ``model_info`` float32 ``[B, 7]``: see :meth:`PackedEcapa.forward`.

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


class OnnxModel(ExportedModel):
    """An exported ONNX model opened on the CPU.

    Args:
        path: of the ONNX file.
        threads: of ONNX Runtime; 0 for all cores.

    Raises:
        ExportError: the file is missing, damaged or was not written by this project.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        if not path.is_file():
            raise ExportError(f"{path} is missing: write it with python -m export")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # shapes change with every call
        options.log_severity_level = 3
        # Idle threads sleep at once instead of taking cores from whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise ExportError(f"{path} is not a readable ONNX model ({error}): run python -m export again") from error
        super().__init__(path, dict(self.session.get_modelmeta().custom_metadata_map))

    def run(self, waveform: NDArray[np.float32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """As :meth:`ExportedModel.run`."""
        (embedding,) = self.session.run(["embedding"], {"waveform": waveform, "lengths": lengths})
        return np.asarray(embedding)
