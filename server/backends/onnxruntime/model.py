"""Stand-in for Triton's C++ ONNX Runtime backend, for a tritonserver without it.

A Python-based backend: Triton runs this file for every model with `backend: "onnxruntime"` in its config. In addition
to `ragged_batch.py`, it obeys the parameters `intra_op_thread_count`, `inter_op_thread_count`, `enable_mem_arena`,
`enable_mem_pattern` and those of the `cuda` execution accelerator.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from ragged_batch import Array, Instance, RaggedBatchModel


class TritonPythonModel(RaggedBatchModel):
    """One instance of one model: an ONNX Runtime session."""

    usual_file = "model.onnx"

    def load(self, path: Path, instance: Instance) -> tuple[list[str], dict[str, str]]:
        """As RaggedBatchModel.load."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = instance.threads("intra_op_thread_count")
        options.inter_op_num_threads = instance.threads("inter_op_thread_count")
        options.enable_cpu_mem_arena = instance.is_set("enable_mem_arena")
        options.enable_mem_pattern = instance.is_set("enable_mem_pattern")
        on_gpu = instance.device != "cpu"
        providers = [_cuda(instance)] if on_gpu else []
        self._session = ort.InferenceSession(path, options, providers=[*providers, "CPUExecutionProvider"])
        if on_gpu and "CUDAExecutionProvider" not in self._session.get_providers():
            raise pb_utils.TritonModelException(
                "the instance is KIND_GPU, but the installed onnxruntime cannot use CUDA: install onnxruntime-gpu"
            )
        names = [tensor.name for tensor in self._session.get_inputs()]
        return names, dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feed: dict[str, Array], outputs: list[str]) -> Sequence[Array]:
        """As RaggedBatchModel.run."""
        rows: Sequence[Array] = self._session.run(outputs, feed)
        return rows


def _cuda(instance: Instance) -> tuple[str, dict[str, Any]]:
    ort.preload_dlls()  # CUDA and cuDNN as installed by pip
    options = {"device_id": instance.device.partition(":")[2]}
    accelerators = instance.config["optimization"].get("execution_accelerators", {})
    for accelerator in accelerators.get("gpu_execution_accelerator", []):
        if accelerator["name"] == "cuda":
            options |= accelerator["parameters"]
    return "CUDAExecutionProvider", options
