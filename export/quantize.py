"""The int8 file for CPUs: frame-wise layers of an exported ONNX file in eight bits, by ONNX Runtime's quantization.

The layers of the blocks and of the aggregation have int8 weights, a scale for each output channel, and read uint8 rows
with static scales, found on a few clips of speech. Gathers, splits and concatenations between them move uint8 rows.
Static scales keep a clip independent of its neighbours. Features, the first layer (whose input has the widest range and
a thirtieth of the work), gates, pooling, attention and the last layer stay float32.

Weights have seven bits: on CPUs without VNNI two products of eight bits would overflow the instruction that adds them.
"""

from __future__ import annotations

import hashlib
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from ecapa_triton.audio import SAMPLE_RATE, read
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from . import artifacts, seal
from .checkpoint import Checkpoint
from .packed import PackedEcapa
from .verify import AUDIO, SAMPLES

Array = NDArray[np.float32]
_LAYERS = re.compile(r"\.(tdnn[12]\.linear|res2net\.layers\.\d+\.linear|shortcut|groups\.\d+\.aggregate)\.weight$")
_MOVES = {"Gather", "Reshape", "Split", "Concat", "Relu"}
MAX_CALIBRATION = 60  # clips of a folder, spread over its files
SECONDS = 10.0  # of each clip


class Calibration:
    """Clips of speech that the scales are found on.

    Attributes:
        clips: float32 ``[samples]``, 16 kHz.
        note: for the metadata: number, seconds and SHA-256 of the samples.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """Reads those of a folder and its subfolders; of ``samples/`` if it is None.

        Raises:
            EcapaError: a file cannot be read.
            OSError: the folder has no audio files.
        """
        folder = folder or SAMPLES
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in AUDIO)
        if not files:
            raise OSError(f"{folder} has no audio files: name a folder of speech with --calibration")
        files = files[:: math.ceil(len(files) / MAX_CALIBRATION)]
        limit = round(SECONDS * SAMPLE_RATE)
        self.clips = [read(path, max_samples=limit).waveform[:limit] for path in files]
        digest = hashlib.sha256(b"".join(clip.tobytes() for clip in self.clips)).hexdigest()
        seconds = sum(map(len, self.clips)) / SAMPLE_RATE
        self.note = f"{len(self.clips)} clips, {seconds:.1f} s, sha256 {digest}"


def write(model: PackedEcapa, checkpoint: Checkpoint, path: Path, calibration: Calibration) -> None:
    """Write the sealed int8 ONNX file of an ``exact`` model, with metadata.

    Raises:
        ExportError: the exporter made a graph that could not be served.
        OSError: the file cannot be written.
    """
    in_float = path.with_name(f"{path.name}.onnx")
    try:
        artifacts.write_onnx(model, checkpoint, in_float)
        _quantize(onnx.load(str(in_float)), path, calibration)
    finally:
        in_float.unlink(missing_ok=True)
    seal.seal(path)


def _quantize(model: Any, target: Path, calibration: Calibration) -> None:
    metadata = {item.key: item.value for item in model.metadata_props if item.key != "sha256"}
    del model.graph.value_info[:]  # the exporter's shapes confuse the quantizer's
    with _quiet():
        quantize_static(
            model,
            str(target),
            _Batches(calibration.clips),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            reduce_range=True,
            nodes_to_quantize=_nodes(model.graph),
            op_types_to_quantize=["Gemm", *_MOVES],
        )
    quantized = onnx.load(str(target))
    quantized.producer_name = model.producer_name
    onnx.helper.set_model_props(quantized, metadata | {"precision": "int8", "calibration": calibration.note})
    onnx.checker.check_model(quantized)
    onnx.save(quantized, str(target))


class _Batches(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, clips: Sequence[Array]) -> None:
        self._clips: Iterator[Array] = iter(clips)

    def get_next(self) -> dict[str, Any] | None:
        clip = next(self._clips, None)
        return None if clip is None else {"waveform": clip, "lengths": np.array([[len(clip)]], np.int32)}


def _nodes(graph: Any) -> list[str]:
    """Names of the layers to quantize, and of what moves rows from one to the next."""
    makers = {output: node for node in graph.node for output in node.output}
    layers = [node for node in graph.node if node.op_type == "Gemm" and any(map(_LAYERS.search, node.input))]
    found = {node.name: node for node in layers}
    waiting = [node.input[0] for node in layers]
    while waiting:
        maker = makers.get(waiting.pop())
        if maker is not None and maker.op_type in _MOVES and maker.name not in found:
            found[maker.name] = maker
            waiting += maker.input if maker.op_type == "Concat" else maker.input[:1]
    return list(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """The quantizer recommends steps that this graph does without."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
