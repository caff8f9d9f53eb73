"""Batching for the stand-in backends: packs requests into one batch and gives each request its own rows back.

It works with any model, and reads a config as Triton's C++ backends do, so one repository serves on both:

- a batch is the concatenation of its requests in order; ragged inputs are concatenated along the samples
- `batch_input` of kind BATCH_ITEM_SHAPE gives one row per item: a request of shape [2, L] gives two rows L
- the outputs are split by the number of items in each request
- `default_model_filename` and the instance's device are obeyed

It differs from them in three ways, so that no request harms another. When a batch fails, its requests run again one by
one, and only those at fault fail. Requests with an empty ragged input go last in their batch. And where the config has
a parameter `required_guards`, a model file is loaded, at the start or later, only if its seal is intact and its
metadata names those guards.

Triton's Python stubs import this file from their own folder.
"""

import ctypes
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import triton_python_backend_utils as pb_utils
from numpy.typing import NDArray

from export import seal

Array = NDArray[Any]


class Instance(NamedTuple):
    """An instance of a model: its device (`cuda:0`, for example), the config and the config's parameters."""

    device: str
    config: dict[str, Any]
    parameters: dict[str, str]

    def is_set(self, parameter: str, default: bool = True) -> bool:
        """Reads a parameter as Triton's C++ backends do."""
        return self.parameters.get(parameter, str(default)).lower() in ("1", "true")

    def threads(self, parameter: str) -> int:
        """Reads a number of threads; 0: the library's default."""
        return int(self.parameters.get(parameter, "0"))


class RaggedBatchModel(ABC):
    """One instance of one model. A backend implements how its kind of file is loaded and run."""

    usual_file: str  # loaded where the config names no file

    @abstractmethod
    def load(self, path: Path, instance: Instance) -> tuple[list[str], dict[str, str]]:
        """Loads the model file onto the instance's device; returns the names of its inputs, and its metadata."""

    @abstractmethod
    def run(self, feed: dict[str, Array], outputs: list[str]) -> Sequence[Array]:
        """Runs one batch: arrays by input name, to arrays in the order of the outputs' names."""

    def initialize(self, args: dict[str, str]) -> None:
        """Loads the version's model file.

        Args:
            args: Triton's description of the instance; `model_config` is the config as JSON.
        """
        config = json.loads(args["model_config"])
        if config["max_batch_size"] < 1:
            raise pb_utils.TritonModelException("max_batch_size is 0: this backend needs a batched model")
        self._inputs: list[str] = [tensor["name"] for tensor in config["input"]]
        self._ragged = {tensor["name"] for tensor in config["input"] if tensor["allow_ragged_batch"]}
        self._outputs: list[str] = [tensor["name"] for tensor in config["output"]]
        self._item_shapes: dict[str, tuple[str, Any]] = {}  # by the added input: its source and dtype
        for entry in config["batch_input"]:
            if entry["kind"] != "BATCH_ITEM_SHAPE":
                message = f"batch_input kind {entry['kind']} is not supported: use BATCH_ITEM_SHAPE"
                raise pb_utils.TritonModelException(message)
            dtype = pb_utils.triton_string_to_numpy(entry["data_type"])
            self._item_shapes |= dict.fromkeys(entry["target_name"], (entry["source_input"][0], dtype))
        parameters = {key: value["string_value"] for key, value in config["parameters"].items()}
        on_gpu = args["model_instance_kind"] == "GPU"
        device = f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu"
        filename = config["default_model_filename"] or self.usual_file
        path = Path(args["model_repository"], args["model_version"], filename)
        guards = parameters.get("required_guards")
        try:
            if guards is not None:
                seal.check(path)
            names, metadata = self.load(path, Instance(device, config, parameters))
            if guards is not None:
                seal.check_guards(path, metadata, guards.split(","))
        except seal.SealError as error:
            raise pb_utils.TritonModelException(str(error)) from error
        if sorted(names) != sorted(given := [*self._inputs, *self._item_shapes]):
            raise pb_utils.TritonModelException(
                f"the model has inputs {', '.join(names)}, the config has {', '.join(given)}"
            )
        # Loading frees as much heap as the weights take, and glibc would keep it.
        ctypes.CDLL(None).malloc_trim(0)

    def execute(self, requests: list[Any]) -> list[Any]:
        """Replies to the requests of one batch, each with its own rows or its own error."""
        # An empty clip goes last: a model may fail on the clips behind one.
        order = sorted(range(len(requests)), key=lambda number: self._is_empty(requests[number]))
        replies = dict(zip(order, self._reply([requests[number] for number in order]), strict=True))
        return [replies[number] for number in range(len(requests))]

    def _is_empty(self, request: Any) -> bool:
        return any(0 in pb_utils.get_input_tensor_by_name(request, name).shape() for name in self._ragged)

    def _reply(self, requests: list[Any]) -> list[Any]:
        try:
            return self._run(requests)
        except Exception as error:
            if len(requests) > 1:
                return [response for request in requests for response in self._reply([request])]
            return [_failure(str(error))]

    def _run(self, requests: list[Any]) -> list[Any]:
        parts: dict[str, list[Array]] = {
            name: [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for request in requests]
            for name in self._inputs
        }
        items = [len(array) for array in parts[self._inputs[0]]]  # the first axis is Triton's batch axis
        feed = {
            name: np.concatenate([array.reshape(-1) for array in arrays] if name in self._ragged else arrays)
            for name, arrays in parts.items()
        }
        for target, (source, dtype) in self._item_shapes.items():
            rows = [np.tile(np.array(array.shape[1:], dtype), (len(array), 1)) for array in parts[source]]
            feed[target] = np.concatenate(rows)

        outputs = self.run(feed, self._outputs)
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


def _failure(message: str) -> Any:
    pb_utils.Logger.log_error(message)
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message))
