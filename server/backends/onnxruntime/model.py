"""Stand-in for Triton's C++ ONNX Runtime backend, for a tritonserver without it.

A Python-based backend: Triton runs this file for every model with `backend: "onnxruntime"` in its config. In addition
to `ragged_batch.py`, it checks names, types and dimensions of inputs and outputs against the model file, and obeys the
parameters `intra_op_thread_count`, `inter_op_thread_count`, `enable_mem_arena`, `enable_mem_pattern`,
`memory.enable_memory_arena_shrinkage`, `gpu_mem_limit`, `arena_extend_strategy` and those of the `cuda` execution
accelerator.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from ragged_batch import Array, Instance, RaggedBatchModel, batch_inputs, is_true

_TYPES = {  # ONNX Runtime's names
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
}
_ARENA_EXTEND_STRATEGY = {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"}


class TritonPythonModel(RaggedBatchModel):
    """One instance of one model: an ONNX Runtime session."""

    usual_file = "model.onnx"

    def load(self, path: Path, instance: Instance) -> dict[str, str]:
        """As RaggedBatchModel.load."""
        parameters = instance.parameters
        self._session = ort.InferenceSession(path, _session_options(parameters), providers=_providers(instance))
        if instance.device != "cpu" and "CUDAExecutionProvider" not in self._session.get_providers():
            raise pb_utils.TritonModelException("the instance is KIND_GPU, but CUDA could not be initialised")
        _check_tensors(instance.config, self._session)
        self._run_options = ort.RunOptions()
        if shrink := parameters.get("memory.enable_memory_arena_shrinkage"):
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", shrink)
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, feed: dict[str, Array], outputs: list[str]) -> Sequence[Array]:
        """As RaggedBatchModel.run."""
        rows: Sequence[Array] = self._session.run(outputs, feed, self._run_options)
        return rows


def _check_tensors(config: dict[str, Any], session: Any) -> None:
    """Checks the config's inputs and outputs against the model's, whose first axis is Triton's batch axis."""
    for what, declared, found in (
        ("input", [*config["input"], *batch_inputs(config)], session.get_inputs()),
        ("output", config["output"], session.get_outputs()),
    ):
        tensors = {tensor.name: tensor for tensor in found}
        for entry in declared:
            tensor = tensors.get(entry["name"])
            if tensor is None:
                raise pb_utils.TritonModelException(
                    f"the model has no {what} {entry['name']}, it has {', '.join(tensors)}"
                )
            if _TYPES.get(entry["data_type"]) != tensor.type:
                raise pb_utils.TritonModelException(
                    f"{what} {entry['name']} is {entry['data_type']} in the config, {tensor.type} in the model"
                )
            dims, shape = [int(dim) for dim in entry.get("dims", [])], tensor.shape[1:]
            ragged = what == "input" and (entry.get("allow_ragged_batch") or "dims" not in entry)
            if not ragged and (
                len(dims) != len(shape) or any(a != b for a, b in zip(dims, shape, strict=True) if isinstance(b, int))
            ):
                raise pb_utils.TritonModelException(
                    f"{what} {entry['name']} has dims {dims} in the config, {shape} behind the batch axis in the model"
                )
        if what == "input" and (missing := set(tensors) - {entry["name"] for entry in declared}):
            raise pb_utils.TritonModelException(f"the config lacks the model's input {', '.join(sorted(missing))}")


def _session_options(parameters: dict[str, str]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", "0"))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", "0"))
    options.enable_cpu_mem_arena = is_true(parameters.get("enable_mem_arena", "1"))
    options.enable_mem_pattern = is_true(parameters.get("enable_mem_pattern", "1"))
    return options


def _providers(instance: Instance) -> list[Any]:
    if instance.device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise pb_utils.TritonModelException(
            "the instance is KIND_GPU, but the installed onnxruntime has no CUDA: install onnxruntime-gpu"
        )
    if hasattr(ort, "preload_dlls"):  # since 1.21
        ort.preload_dlls()  # CUDA and cuDNN as installed by pip
    cuda = {"device_id": instance.device.partition(":")[2]}
    accelerators = instance.config["optimization"].get("execution_accelerators", {})
    for accelerator in accelerators.get("gpu_execution_accelerator", []):
        if accelerator["name"] == "cuda":
            cuda |= accelerator["parameters"]
    if "gpu_mem_limit" in instance.parameters:
        cuda["gpu_mem_limit"] = instance.parameters["gpu_mem_limit"]
    if "arena_extend_strategy" in instance.parameters:
        cuda["arena_extend_strategy"] = _ARENA_EXTEND_STRATEGY[instance.parameters["arena_extend_strategy"]]
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]
