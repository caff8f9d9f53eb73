"""A tiny ONNX model with a ragged input: for each clip its sum, scaled, and its length."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from tritonclient.grpc import InferenceServerClient, InferInput

PATH = "/v2/models/sums/infer"
JSON = [
    {"name": "clip", "datatype": "FP32", "shape": [1, 5], "data": [1, 1, 1, 1, 1]},
    {"name": "scale", "datatype": "FP32", "shape": [1, 1], "data": [1]},
]
BODY = json.dumps({"inputs": JSON}).encode()  # of an HTTP request
LONGEST = 1000  # samples; a longer clip makes the model fail at run time


def write(folder: Path, *, version: int = 1, filename: str = "model.onnx", **config: object) -> None:
    """Writes the model folder with its config: `intra`, `delay` (microseconds), `rows` (a wrong model's)."""
    rows = config.get("rows")
    (folder / str(version)).mkdir(parents=True)
    onnx.save(_model(rows is not None), folder / str(version) / filename)
    (folder / "config.pbtxt").write_text(
        f"""
name: "{folder.name}"
backend: "onnxruntime"
default_model_filename: "{filename}"
max_batch_size: 8
input {{ name: "clip" data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true }}
input {{ name: "scale" data_type: TYPE_FP32 dims: [ 1 ] }}
batch_input {{ kind: BATCH_ITEM_SHAPE target_name: "samples" data_type: TYPE_INT32 source_input: "clip" }}
output {{ name: "sum" data_type: TYPE_FP32 dims: [ 1 ] }}
output {{ name: "length" data_type: TYPE_FP32 dims: [ 1 ] }}
dynamic_batching {{ max_queue_delay_microseconds: {config.get("delay", 0)} }}
instance_group {{ count: 1 kind: KIND_CPU }}
version_policy {{ latest {{ num_versions: 1 }} }}
parameters {{ key: "intra_op_thread_count" value: {{ string_value: "{config.get("intra", 1)}" }} }}
"""
    )


def inputs(clips: np.ndarray, scale: float = 1) -> list[InferInput]:
    """The tensors of a request of clips [items, samples]."""
    tensors = [InferInput("clip", clips.shape, "FP32"), InferInput("scale", (len(clips), 1), "FP32")]
    tensors[0].set_data_from_numpy(clips)
    tensors[1].set_data_from_numpy(np.full((len(clips), 1), scale, np.float32))
    return tensors


def ask(triton: InferenceServerClient | str, clips: np.ndarray, scale: float = 1, model: str = "sums") -> np.ndarray:
    """Sends clips [items, samples] to a client or an address; returns rows [items, 2] of sum and length."""
    if isinstance(triton, str):
        with InferenceServerClient(triton) as client:
            return ask(client, clips, scale, model)
    result = triton.infer(model, inputs(clips, scale), client_timeout=20)
    return np.hstack([result.as_numpy("sum"), result.as_numpy("length")])


def _model(one_row: bool) -> onnx.ModelProto:
    model = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["": 18]>
        stand_in (float[S] clip, float[B, 1] scale, int32[B, 1] samples) => (float[R, 1] sum, float[B, 1] length)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64 axis = {{0}}, float[1] silence = {{0}},
         float first = {{0}}, float end_of_table = {{{LONGEST + 1}}}, float step = {{1}}> {{
            n = Cast <to = 7> (samples)
            end = CumSum (n, axis)
            start = Sub (end, n)
            padded = Concat <axis = 0> (silence, clip)
            sums = CumSum (padded, axis)
            sum_to_end = Gather (sums, end)
            sum_to_start = Gather (sums, start)
            unscaled = Sub (sum_to_end, sum_to_start)
            sum_rows = Mul (unscaled, scale)
            first_row = Slice (sum_rows, zero, one)
            sum = Identity ({"first_row" if one_row else "sum_rows"})
            lengths = Range (first, end_of_table, step)
            length = Gather (lengths, n)
        }}
        """
    )
    onnx.checker.check_model(model)
    return model
