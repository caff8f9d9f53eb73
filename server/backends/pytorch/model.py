"""Stand-in for Triton's C++ PyTorch backend (LibTorch), for a tritonserver without it.

A Python-based backend: Triton runs this file for every model with `backend: "pytorch"` in its config. In addition to
`ragged_batch.py`, it matches inputs to the arguments of `forward` by name, or by `NAME__INDEX`; takes outputs in the
config's order, or by `NAME__INDEX`; and obeys the parameters `DISABLE_OPTIMIZED_EXECUTION`, `INFERENCE_MODE`,
`INTRA_OP_THREAD_COUNT` and `INTER_OP_THREAD_COUNT`. Metadata comes from the archive's extra file `metadata.json`.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils
from ragged_batch import Array, Instance, RaggedBatchModel, batch_inputs, is_true

_METADATA = "metadata.json"


class TritonPythonModel(RaggedBatchModel):
    """One instance of one model: a TorchScript module on the instance's device."""

    usual_file = "model.pt"

    def load(self, path: Path, instance: Instance) -> dict[str, str]:
        """As RaggedBatchModel.load."""
        parameters, config = instance.parameters, instance.config
        if instance.device != "cpu" and not torch.cuda.is_available():
            raise pb_utils.TritonModelException(
                f"the instance is KIND_GPU, but the installed torch {torch.__version__} has no CUDA"
            )
        for key, set_threads in (
            ("INTRA_OP_THREAD_COUNT", torch.set_num_threads),
            ("INTER_OP_THREAD_COUNT", torch.set_num_interop_threads),
        ):
            if int(parameters.get(key, "0")) > 0:
                set_threads(int(parameters[key]))
        self._optimize = not is_true(parameters.get("DISABLE_OPTIMIZED_EXECUTION", "false"))
        self._inference_mode = is_true(parameters.get("INFERENCE_MODE", "true"))
        self._device = torch.device(instance.device)
        extra = {_METADATA: ""}
        self._module = torch.jit.load(path, map_location=self._device, _extra_files=extra)
        names = [argument.name for argument in self._module.forward.schema.arguments[1:]]
        given = [tensor["name"] for tensor in [*config["input"], *batch_inputs(config)]]
        self._arguments = _in_order(given, names, "input")
        outputs = [tensor["name"] for tensor in config["output"]]
        indices = [_index(name) for name in outputs]
        self._order = [number if index is None else index for number, index in enumerate(indices)]
        return dict(json.loads(extra[_METADATA] or "{}"))

    def run(self, feed: dict[str, Array], outputs: list[str]) -> Sequence[Array]:
        """As RaggedBatchModel.run."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(self._inference_mode))
            stack.enter_context(torch.jit.optimized_execution(self._optimize))  # type: ignore[attr-defined]
            if self._device.type == "cuda":
                stack.enter_context(torch.cuda.device(self._device))
            results = self._module(*(torch.from_numpy(feed[name]).to(self._device) for name in self._arguments))
            if isinstance(results, torch.Tensor):
                results = (results,)
            if len(results) <= max(self._order):
                raise ValueError(f"the model returns {len(results)} tensors, the config has outputs {outputs}")
            return [results[index].cpu().numpy() for index in self._order]


def _in_order(given: list[str], names: list[str], what: str) -> list[str]:
    """The config's tensors in the order of the model's own."""
    places: dict[int, str] = {}
    for name in given:
        index = names.index(name) if name in names else _index(name)
        if index is None or index >= len(names):
            raise pb_utils.TritonModelException(f"the model has no {what} {name}, it has {', '.join(names)}")
        places[index] = name
    if missing := [name for number, name in enumerate(names) if number not in places]:
        raise pb_utils.TritonModelException(f"the config lacks the model's {what} {', '.join(missing)}")
    return [places[number] for number in range(len(names))]


def _index(name: str) -> int | None:
    match = re.fullmatch(r".+__(\d+)", name)
    return int(match[1]) if match else None
