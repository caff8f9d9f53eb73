"""What every exported model file has in common: metadata that says what it is, and how it is asked for embeddings."""

from __future__ import annotations

import shlex
from abc import ABC, abstractmethod
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from . import configs, seal
from .checkpoint import HYPERPARAMS, MINI, WEIGHTS, Checkpoint
from .packed import SAMPLE_RATE, PackedEcapa

METADATA = {
    "source",
    "origin",
    "weights_sha256",
    "verification_threshold",
    "max_seconds",
    "min_samples",
    "precision",
    "guards",
}
PACKAGES = ("torch", "speechbrain", "onnx", "onnxscript", "onnxruntime", "numpy")


class ExportError(Exception):
    """A model file cannot be made or is not one of ours; the message says what to do."""


class ExportedModel(ABC):
    """An exported model opened on the CPU.

    Args:
        path: of the file.
        metadata: of the file.

    Raises:
        ExportError: the file is damaged or was not written by this project.
    """

    def __init__(self, path: Path, metadata: dict[str, str]) -> None:
        missing = METADATA - set(metadata)
        if missing:
            raise ExportError(
                f"{path} has no metadata {', '.join(sorted(missing))}: it was not written by python -m export"
            )
        try:
            seal.check(path)
            seal.check_guards(path, metadata)
        except seal.SealError as error:
            raise ExportError(str(error)) from error
        self.metadata = metadata
        self.max_samples = round(float(metadata["max_seconds"]) * SAMPLE_RATE)
        self.min_samples = int(metadata["min_samples"])

    def embed(self, clips: list[NDArray[np.float32]]) -> NDArray[np.float32]:
        """Embed float32 16 kHz clips ``[samples]`` as one packed batch: float32 ``[len(clips), E]``."""
        waveform = np.concatenate(clips).astype(np.float32, copy=False)
        lengths = np.array([[len(clip)] for clip in clips], dtype=np.int32)
        return self.run(waveform, lengths)

    @abstractmethod
    def run(self, waveform: NDArray[np.float32], lengths: NDArray[np.int32]) -> NDArray[np.float32]:
        """Embed samples ``[S]`` that are said to be clips of ``lengths`` ``[B, 1]``: float32 ``[B, E]``."""


def example() -> tuple[torch.Tensor, torch.Tensor]:
    """A batch to export with: three clips of different lengths."""
    lengths = torch.tensor([[SAMPLE_RATE], [SAMPLE_RATE // 2], [3 * SAMPLE_RATE // 2]], dtype=torch.int32)
    return torch.zeros(3 * SAMPLE_RATE), lengths


def describe(model: PackedEcapa, checkpoint: Checkpoint) -> dict[str, str]:
    """The metadata that goes into a model file."""
    return {
        "source": checkpoint.source,
        "origin": checkpoint.origin,
        "revision": checkpoint.revision,
        "weights_sha256": checkpoint.sha256,
        "verification_threshold": repr(checkpoint.threshold),
        "max_seconds": repr(model.max_samples / SAMPLE_RATE),
        "min_samples": str(model.min_samples),
        "sample_rate": str(SAMPLE_RATE),
        "embedding_size": str(model.embedding_size),
        "precision": "fp16" if model.dtype == torch.float16 else "fp32",
        "guards": ",".join(seal.GUARDS),
        "packages": ",".join(f"{name}=={version(name)}" for name in PACKAGES),
    }


def up_to_date(path: Path, source: str | None = None) -> bool:
    """Whether an exported file is there and newer than the exporting code and the weights it was made from.

    Args:
        path: of the exported file.
        source: what it should have been made from, as for :func:`export.checkpoint.load`; None: whatever it was.
    """
    try:
        metadata = configs.ModelFile.read(path).metadata
    except configs.ModelFileError:  # whatever is wrong with the file, it is not up to date
        return False
    _, made_from, *_ = [*shlex.split(metadata.get("origin", "")), "", ""]  # --source NAME ...
    if source is not None and made_from not in (source, str(Path(source).resolve())):
        return False
    inputs = list(Path(__file__).parent.glob("*.py"))
    folder = MINI if made_from == "mini" else Path(made_from)
    inputs += [file for file in (folder / HYPERPARAMS, folder / WEIGHTS) if file.is_file()]
    return bool(made_from) and all(file.stat().st_mtime <= path.stat().st_mtime for file in inputs)
