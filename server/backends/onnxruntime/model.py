"""Stand-in for Triton's C++ ONNX Runtime backend, for a tritonserver that comes without it.

A Python-based backend: Triton runs this file for every model whose config says `backend: "onnxruntime"`.
It knows no model. What a config means to the C++ backend it means here, so one repository serves on both:

- the requests of a batch are concatenated in their order; of ragged inputs the samples, end to end
- `batch_input` of kind BATCH_ITEM_SHAPE: one row per item, so a request of shape [2, L] gives two rows L
- the outputs are split by the number of items in each request
- the names, types and dimensions of inputs and outputs must be those of the model file
- `default_model_filename`, the instance's device, and the parameters `intra_op_thread_count`,
  `inter_op_thread_count`, `enable_mem_arena`, `enable_mem_pattern`, `memory.enable_memory_arena_shrinkage`,
  `gpu_mem_limit`, `arena_extend_strategy` and those of the `cuda` execution accelerator are obeyed

It differs in three things, so that nobody pays for another's request. When a batch fails, its requests run again one
by one, and only the culprit fails. Requests with an empty ragged input go behind the others of their batch. And where
the config has a parameter `required_guards`, the model file must be as it was exported and must name those guards in
its metadata, or it is not loaded: not at the start, and not when it is replaced under a running server.
"""

import ctypes
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from export import seal

_TYPES = {  # ONNX Runtime's names
    "TYPE_FP32": "tensor(float)",
    "TYPE_FP16": "tensor(float16)",
    "TYPE_FP64": "tensor(double)",
    "TYPE_INT32": "tensor(int32)",
    "TYPE_INT64": "tensor(int64)",
}
_ARENA_EXTEND_STRATEGY = {"0": "kNextPowerOfTwo", "1": "kSameAsRequested"}


class TritonPythonModel:
    """One instance of one model: an ONNX Runtime session and the names the config gives its tensors."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the version's model file.

        Args:
            args: Triton's description of the instance; `model_config` is the config as JSON.
        """
        config = json.loads(args["model_config"])
        if config["max_batch_size"] < 1:
            raise pb_utils.TritonModelException("max_batch_size is 0: this backend needs a batched model")
        for entry in config["batch_input"]:
            if entry["kind"] != "BATCH_ITEM_SHAPE":
                raise pb_utils.TritonModelException(
                    f"batch_input kind {entry['kind']} is not supported: use BATCH_ITEM_SHAPE"
                )
        self._inputs: list[str] = [tensor["name"] for tensor in config["input"]]
        self._ragged = {tensor["name"] for tensor in config["input"] if tensor["allow_ragged_batch"]}
        self._outputs: list[str] = [tensor["name"] for tensor in config["output"]]
        # (target, source, dtype) of each batch input
        self._item_shapes = [
            (target, entry["source_input"][0], pb_utils.triton_string_to_numpy(entry["data_type"]))
            for entry in config["batch_input"]
            for target in entry["target_name"]
        ]
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        filename = config["default_model_filename"] or "model.onnx"
        path = Path(args["model_repository"], args["model_version"], filename)
        guards = parameters.get("required_guards")
        if guards is not None:
            _checked(seal.check, path)
        self._session = ort.InferenceSession(
            path, _session_options(parameters), providers=_providers(args, config, parameters)
        )
        if guards is not None:
            metadata = self._session.get_modelmeta().custom_metadata_map
            _checked(seal.check_guards, path, metadata, guards.split(","))
        _check_tensors(config, self._session)
        wants_cuda = args["model_instance_kind"] == "GPU"
        if wants_cuda and "CUDAExecutionProvider" not in self._session.get_providers():
            raise pb_utils.TritonModelException("the instance is KIND_GPU and CUDA could not be initialised")
        self._run_options = ort.RunOptions()
        if shrink := parameters.get("memory.enable_memory_arena_shrinkage"):
            self._run_options.add_run_config_entry("memory.enable_memory_arena_shrinkage", shrink)
        # Reading and repacking the weights leaves as much again in freed heap, which glibc would keep.
        ctypes.CDLL(None).malloc_trim(0)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answers the requests of one batch, each with its own rows or its own error."""
        # An empty clip goes last: a model may have no answer for what lies behind one.
        order = sorted(range(len(requests)), key=lambda number: self._is_empty(requests[number]))
        answers = dict(zip(order, self._answer([requests[number] for number in order]), strict=True))
        return [answers[number] for number in range(len(requests))]

    def _is_empty(self, request: Any) -> bool:
        return any(0 in pb_utils.get_input_tensor_by_name(request, name).shape() for name in self._ragged)

    def _answer(self, requests: list[Any]) -> list[Any]:
        try:
            return self._run(requests)
        except Exception as error:
            if len(requests) > 1:
                return [response for request in requests for response in self._answer([request])]
            return [_failure(str(error))]

    def _run(self, requests: list[Any]) -> list[Any]:
        parts: dict[str, list[NDArray[Any]]] = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self._inputs
        }
        items = [len(array) for array in parts[self._inputs[0]]]  # the first axis is Triton's batch axis
        feed = {name: _pack(arrays, name in self._ragged) for name, arrays in parts.items()}
        for target, source, dtype in self._item_shapes:
            rows = [np.tile(np.array(array.shape[1:], dtype), (len(array), 1)) for array in parts[source]]
            feed[target] = np.concatenate(rows)

        outputs = self._session.run(self._outputs, feed, self._run_options)
        for name, output in zip(self._outputs, outputs, strict=True):
            if output.ndim == 0 or len(output) != sum(items):
                message = f"output {name} has shape {list(output.shape)}, expected {sum(items)} rows"
                return [_failure(message) for _ in requests]
        ends = np.cumsum(items)[:-1]
        split = [np.split(output, ends) for output in outputs]
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, rows) for name, rows in zip(self._outputs, row_sets, strict=True)]
            )
            for row_sets in zip(*split, strict=True)
        ]


def _pack(arrays: list[NDArray[Any]], ragged: bool) -> NDArray[Any]:
    if ragged:
        arrays = [array.reshape(-1) for array in arrays]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _failure(message: str) -> Any:
    pb_utils.Logger.log_error(message)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))


def _checked(check: Callable[..., None], *arguments: Any) -> None:
    try:
        check(*arguments)
    except seal.SealError as error:
        raise pb_utils.TritonModelException(str(error)) from error


def _check_tensors(config: dict[str, Any], session: Any) -> None:
    """The config must speak of the model's own inputs and outputs; their first axis is Triton's batch axis."""
    for what, declared, found in (
        ("input", [*config["input"], *_batch_inputs(config)], session.get_inputs()),
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


def _batch_inputs(config: dict[str, Any]) -> list[dict[str, Any]]:
    entries = config["batch_input"]
    return [{"name": name, "data_type": entry["data_type"]} for entry in entries for name in entry["target_name"]]


def _session_options(parameters: dict[str, str]) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = int(parameters.get("intra_op_thread_count", "0"))
    options.inter_op_num_threads = int(parameters.get("inter_op_thread_count", "0"))
    options.enable_cpu_mem_arena = _is_true(parameters.get("enable_mem_arena", "1"))
    options.enable_mem_pattern = _is_true(parameters.get("enable_mem_pattern", "1"))
    return options


def _providers(args: dict[str, str], config: dict[str, Any], parameters: dict[str, str]) -> list[Any]:
    if args["model_instance_kind"] != "GPU":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise pb_utils.TritonModelException(
            "the instance is KIND_GPU and the installed onnxruntime has no CUDA: install onnxruntime-gpu"
        )
    if hasattr(ort, "preload_dlls"):  # since 1.21
        ort.preload_dlls()  # CUDA and cuDNN as installed by pip
    cuda = {"device_id": args["model_instance_device_id"]}
    accelerators = config["optimization"].get("execution_accelerators", {})
    for accelerator in accelerators.get("gpu_execution_accelerator", []):
        if accelerator["name"] == "cuda":
            cuda |= accelerator["parameters"]
    if "gpu_mem_limit" in parameters:
        cuda["gpu_mem_limit"] = parameters["gpu_mem_limit"]
    if "arena_extend_strategy" in parameters:
        cuda["arena_extend_strategy"] = _ARENA_EXTEND_STRATEGY[parameters["arena_extend_strategy"]]
    return [("CUDAExecutionProvider", cuda), "CPUExecutionProvider"]


def _is_true(value: str) -> bool:
    return value.lower() in ("1", "true")
