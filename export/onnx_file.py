"""The packed model as an ONNX file: written, opened, and described by its own metadata."""

from __future__ import annotations

import logging
import shlex
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray

from . import seal
from .checkpoint import HYPERPARAMS, MINI, WEIGHTS, Checkpoint
from .packed import SAMPLE_RATE, PackedEcapa

OPSET = 18
MAX_IR_VERSION = 10  # the newest that ONNX Runtime 1.19 of the official container reads
METADATA = {"source", "origin", "weights_sha256", "verification_threshold", "max_seconds", "min_samples", "guards"}
PACKAGES = ("torch", "speechbrain", "onnx", "onnxscript", "onnxruntime", "numpy")


class OnnxFileError(Exception):
    """An ONNX file cannot be made or is not one of ours; the message says what to do."""


def write(model: PackedEcapa, checkpoint: Checkpoint, path: Path) -> None:
    """Write the packed model to ``path``, with metadata that says where it comes from, and sealed.

    Inputs ``waveform`` float32 ``[S]`` and ``lengths`` int32 ``[B, 1]``, outputs ``embedding`` float32 ``[B, E]`` and
    ``model_info`` float32 ``[B, 3]``: see :meth:`PackedEcapa.forward`.

    Raises:
        OnnxFileError: the exporter made a graph that the container's ONNX Runtime could not read.
        OSError: the file cannot be written.
    """
    dynamic = ({0: torch.export.Dim.DYNAMIC}, {0: torch.export.Dim.DYNAMIC})
    example = (torch.zeros(3 * SAMPLE_RATE), torch.tensor([[SAMPLE_RATE], [SAMPLE_RATE // 2], [3 * SAMPLE_RATE // 2]]))
    for name in ("torch.onnx", "onnxscript"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            model,
            (example[0], example[1].to(torch.int32)),
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
        raise OnnxFileError(
            f"the exporter made IR version {proto.ir_version} with operator sets {opset}, expected IR version at most "
            f"{MAX_IR_VERSION} and only the standard operators of version {OPSET}: install torch and onnx as pinned"
        )
    proto.producer_name = "ecapa-triton"
    onnx.helper.set_model_props(proto, _metadata(model, checkpoint))
    onnx.checker.check_model(proto)
    onnx.save(proto, str(path))
    seal.seal(path)


def up_to_date(path: Path, source: str | None = None) -> bool:
    """Whether an exported file is there and newer than the exporting code and the weights it was made from.

    Args:
        path: of the exported file.
        source: what it should have been made from, as for :func:`export.checkpoint.load`; None: whatever it was.
    """
    if not path.is_file():
        return False
    try:
        seal.check(path)
        metadata = {item.key: item.value for item in onnx.load(str(path)).metadata_props}
    except Exception:  # whatever is wrong with the file, it is not up to date
        return False
    _, made_from, *_ = [*shlex.split(metadata.get("origin", "")), "", ""]  # --source NAME ...
    if source is not None and made_from not in (source, str(Path(source).resolve())):
        return False
    inputs = list(Path(__file__).parent.glob("*.py"))
    folder = MINI if made_from == "mini" else Path(made_from)
    inputs += [file for file in (folder / HYPERPARAMS, folder / WEIGHTS) if file.is_file()]
    return bool(made_from) and all(file.stat().st_mtime <= path.stat().st_mtime for file in inputs)


def _metadata(model: PackedEcapa, checkpoint: Checkpoint) -> dict[str, str]:
    return {
        "source": checkpoint.source,
        "origin": checkpoint.origin,
        "revision": checkpoint.revision,
        "weights_sha256": checkpoint.sha256,
        "verification_threshold": repr(checkpoint.threshold),
        "max_seconds": repr(model.max_samples / SAMPLE_RATE),
        "min_samples": str(model.min_samples),
        "sample_rate": str(SAMPLE_RATE),
        "guards": ",".join(seal.GUARDS),
        "packages": ",".join(f"{name}=={version(name)}" for name in PACKAGES),
    }


class OnnxModel:
    """An exported model opened on the CPU.

    Args:
        path: of the ONNX file.
        threads: of ONNX Runtime; 0 for all cores.

    Raises:
        OnnxFileError: the file is missing, damaged or was not written by this project.
    """

    def __init__(self, path: Path, threads: int = 0) -> None:
        if not path.is_file():
            raise OnnxFileError(f"{path} is missing: write it with python -m export")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = False  # shapes change with every call
        options.log_severity_level = 3
        # Idle threads sleep at once instead of taking cores from whatever runs next.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's exceptions have no common base of their own
            raise OnnxFileError(f"{path} is not a readable ONNX model ({error}): run python -m export again") from error
        self.metadata: dict[str, str] = dict(self.session.get_modelmeta().custom_metadata_map)
        missing = METADATA - set(self.metadata)
        if missing:
            raise OnnxFileError(
                f"{path} has no metadata {', '.join(sorted(missing))}: it was not written by python -m export"
            )
        try:
            seal.check(path)
            seal.check_guards(path, self.metadata)
        except seal.SealError as error:
            raise OnnxFileError(str(error)) from error
        self.max_samples = round(float(self.metadata["max_seconds"]) * SAMPLE_RATE)
        self.min_samples = int(self.metadata["min_samples"])

    def embed(self, clips: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Embed float32 16 kHz clips ``[samples]`` as one packed batch: float32 ``[len(clips), E]``."""
        waveform = np.concatenate(clips).astype(np.float32, copy=False)
        lengths = np.array([[len(clip)] for clip in clips], dtype=np.int32)
        return self.run(waveform, lengths)

    def run(self, waveform: NDArray[np.float32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """Embed samples ``[S]`` that are said to be clips of ``lengths`` ``[B, 1]``: float32 ``[B, E]``."""
        (embedding,) = self.session.run(["embedding"], {"waveform": waveform, "lengths": lengths})
        return np.asarray(embedding)
