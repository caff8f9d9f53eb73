"""The packed model as a TorchScript file that runs on any device: written and opened."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from . import configs, seal
from .checkpoint import Checkpoint
from .exported import ExportedModel, ExportError, describe, example
from .packed import PackedEcapa


def write(model: PackedEcapa, checkpoint: Checkpoint, path: Path) -> None:
    """Write the packed model to ``path``, frozen, with metadata that says where it comes from, and sealed.

    ``forward(waveform, lengths)`` returns ``embedding`` and ``model_info``: see :meth:`PackedEcapa.forward`. It runs
    on the device that the file is loaded to (``map_location``).

    Raises:
        ExportError: something in the graph is tied to the device of the export.
        OSError: the file cannot be written.
    """
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # shapes that depend on the input's are traced as such: verification tells
        module = torch.jit.freeze(torch.jit.trace(model, example(), check_trace=False))
    _untie(module.graph)
    extra = {configs.METADATA_FILE: json.dumps(describe(model, checkpoint), indent=1)}
    try:
        torch.jit.save(module, str(path), _extra_files=extra)
    except RuntimeError as error:  # so it tells of a full disk
        raise OSError(f"cannot write {path}: {error}") from error
    seal.seal(path)


def _untie(graph: Any) -> None:
    """Make the graph create its tensors where its input is; tracing has noted the device that it ran on."""
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


class TorchScriptModel(ExportedModel):
    """An exported TorchScript model.

    Args:
        path: of the file.
        device: to run on, such as ``"cpu"`` or ``"cuda:0"``.

    Raises:
        ExportError: the file is missing, damaged or was not written by this project.
    """

    def __init__(self, path: Path, device: str = "cpu") -> None:
        if not path.is_file():
            raise ExportError(f"{path} is missing: write it with python -m export --format torchscript")
        try:
            super().__init__(path, configs.ModelFile.read(path).metadata)
            self.module = torch.jit.load(str(path), map_location=device)
        except (configs.ModelFileError, RuntimeError) as error:
            raise ExportError(f"{error}") from error
        self.device = torch.device(device)

    def run(self, waveform: NDArray[np.float32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """As :meth:`ExportedModel.run`."""
        inputs = (torch.from_numpy(array).to(self.device) for array in (waveform, lengths))
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            embedding, _ = self.module(*inputs)
        return np.asarray(embedding.cpu().numpy())
