"""Stand-in for Triton's C++ PyTorch backend (LibTorch), for a tritonserver without it.

A Python-based backend: Triton runs this file for every model with `backend: "pytorch"` in its config. In addition to
`ragged_batch.py`, it matches inputs to the arguments of `forward` by name, takes outputs in the config's order, and
obeys the parameters `DISABLE_OPTIMIZED_EXECUTION`, `INFERENCE_MODE`, `INTRA_OP_THREAD_COUNT` and
`INTER_OP_THREAD_COUNT`. Metadata comes from the archive's extra file `metadata.json`.
"""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from ragged_batch import Array, Instance, RaggedBatchModel

_METADATA = "metadata.json"


class TritonPythonModel(RaggedBatchModel):
    """One instance of one model: a TorchScript module on the instance's device."""

    usual_file = "model.pt"

    def load(self, path: Path, instance: Instance) -> tuple[list[str], dict[str, str]]:
        """As RaggedBatchModel.load."""
        if threads := instance.threads("INTRA_OP_THREAD_COUNT"):
            torch.set_num_threads(threads)
        if threads := instance.threads("INTER_OP_THREAD_COUNT"):
            torch.set_num_interop_threads(threads)
        self._optimize = not instance.is_set("DISABLE_OPTIMIZED_EXECUTION", default=False)
        self._inference_mode = instance.is_set("INFERENCE_MODE")
        self._device = torch.device(instance.device)
        extra = {_METADATA: ""}
        self._module = torch.jit.load(path, map_location=self._device, _extra_files=extra)
        self._arguments = [argument.name for argument in self._module.forward.schema.arguments[1:]]
        return self._arguments, json.loads(extra[_METADATA] or "{}")

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
            return [result.cpu().numpy() for result in results[: len(outputs)]]
