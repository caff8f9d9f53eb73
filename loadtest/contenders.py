"""The implementations that `bench` compares: our model files and SpeechBrain.

Everything beyond torch and numpy is imported where it is used: a GPU host may have no more, and model files that were
exported elsewhere can still be measured there.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.flop_counter import FlopCounterMode

from .clips import Array
from .machine import ROOT, MeasureError, reason

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

Batch: TypeAlias = tuple[Tensor, Tensor]
Embed: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # a batch to float32 [B, E]
Files: TypeAlias = dict[tuple[str, str], Path]  # by format and precision

FORMATS = {"ONNX": ".onnx", "TorchScript": ".pt"}
SPEECHBRAIN, PADDED, ON_CPU = "SpeechBrain one by one", "SpeechBrain padded", "CPU"
CPU_CONFIG = ROOT / "model_repository/ecapa/configs/cpu.pbtxt"


def pack(clips: Sequence[Array]) -> Batch:
    """Clips end to end: waveform float32 `[S]` and lengths int32 `[B, 1]`."""
    lengths = torch.tensor([[len(clip)] for clip in clips], dtype=torch.int32)
    return torch.from_numpy(np.concatenate(clips)), lengths


def pad(clips: Sequence[Array]) -> Batch:
    """Clips with zeros behind them: float32 `[B, samples]`, and the share of each row that its clip fills, `[B]`."""
    rows = pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)
    return rows, torch.tensor([len(clip) / rows.shape[1] for clip in clips])


@dataclass(frozen=True, eq=False)
class Contender:
    """An implementation, loaded to a device.

    Attributes:
        name: in the report.
        precision: "fp32", "fp16" or "int8".
        device: torch's name.
        embed: one batch on `device` to float32 `[B, E]`.
        join: clips, float32 `[samples]`, to a batch; ours are packed.
        size: clips in a batch; None: all.
    """

    name: str
    precision: str
    device: str
    embed: Embed
    join: Callable[[Sequence[Array]], Batch] = pack
    size: int | None = None

    @property
    def ours(self) -> bool:
        """A packed model, not SpeechBrain."""
        return self.join is pack

    def batches(self, clips: Sequence[Array]) -> list[Batch]:
        """The clips in batches, on the device."""
        size = self.size or len(clips)
        joined = [self.join(clips[at : at + size]) for at in range(0, len(clips), size)]
        return [(first.to(self.device), second.to(self.device)) for first, second in joined]

    def run(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Embed batches, float32 `[B, E]` each."""
        return [self.embed(*batch) for batch in batches]


def ours(files: Files, kind: str, precision: str, device: str, threads: int) -> list[Contender]:
    """A model file; on a CPU in batches of the size that Triton prefers there, and in one batch of all clips.

    Raises:
        MeasureError: there is no such file, or ONNX Runtime cannot use the device.
    """
    if (kind, precision) not in files:
        raise MeasureError("there is no such file")
    path = files[kind, precision]
    embed = torchscript(path, device) if kind == "TorchScript" else onnx(path, device, threads)
    one = Contender(f"{kind} {precision.upper()}", precision, device, embed)
    if device != "cpu":
        return [one]
    return [replace(one, size=preferred_batch_size()), replace(one, name=f"{one.name}, one batch")]


def theirs(metadata: dict[str, str], device: str) -> list[Contender]:
    """SpeechBrain's `encode_batch` with the checkpoint that a model was made from."""
    classifier = made_from(metadata).classifier
    classifier.device = device
    for module in classifier.mods.values():  # some override `to`
        module.to(device)

    def embed(rows: Tensor, shares: Tensor) -> Tensor:
        with torch.inference_mode():
            return torch.as_tensor(classifier.encode_batch(rows, shares)[:, 0])

    return [
        Contender(SPEECHBRAIN, "fp32", device, embed, pad, size=1),
        Contender(PADDED, "fp32", device, embed, pad),
    ]


def torchscript(path: Path, device: str) -> Embed:
    """A TorchScript file."""
    module = torch.jit.load(str(path), map_location=device)

    def embed(waveform: Tensor, lengths: Tensor) -> Tensor:
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            embedding: Tensor = module(waveform, lengths)[0]
        return embedding

    return embed


def onnx(path: Path, device: str, threads: int) -> Embed:
    """An ONNX file, with inputs and outputs bound on the device."""
    import onnxruntime

    if device not in onnx_devices():
        raise MeasureError("the installed onnxruntime has no CUDA")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # as the configs have it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    provider = ("CUDAExecutionProvider", {"use_tf32": "0"}) if device == "cuda" else "CPUExecutionProvider"
    session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise MeasureError("onnxruntime could not load its CUDA provider")
    size = int(session.get_modelmeta().custom_metadata_map["embedding_size"])

    def embed(waveform: Tensor, lengths: Tensor) -> Tensor:
        binding = session.io_binding()
        embedding = torch.empty(len(lengths), size, device=device)
        for name, tensor, kind in ("waveform", waveform, np.float32), ("lengths", lengths, np.int32):
            binding.bind_input(name, device, 0, kind, tuple(tensor.shape), tensor.data_ptr())
        binding.bind_output("embedding", device, 0, np.float32, tuple(embedding.shape), embedding.data_ptr())
        session.run_with_iobinding(binding)
        return embedding

    return embed


def onnx_devices() -> set[str]:
    """The devices, by torch's names, that the installed ONNX Runtime can use."""
    if importlib.util.find_spec("onnxruntime") is None:
        return set()
    import onnxruntime

    return {"cpu"} | ({"cuda"} if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else set())


def preferred_batch_size() -> int:
    """The number of single clips that Triton joins in a batch at most, by the config for CPUs."""
    sizes = re.findall(r"preferred_batch_size: *\[(.+)\]", CPU_CONFIG.read_text(encoding="utf-8"))
    return max(map(int, sizes[0].split(",")))


def find(repository: Path) -> Files:
    """The model files below a folder.

    Raises:
        MeasureError: there is no float32 TorchScript file among them.
    """
    files: Files = {}
    for kind, suffix in FORMATS.items():
        for path in sorted(repository.rglob(f"model*{suffix}")):
            precision = path.stem.partition("_")[2] or "fp32"
            files.setdefault((kind, precision), path.resolve())
    if ("TorchScript", "fp32") not in files:
        raise MeasureError(f"{repository} has no model.pt: write it with python -m export --format torchscript")
    return files


def write(folder: Path, source: str, channels: int, precisions: Sequence[str]) -> Files:
    """Export to a folder, without verification, since `bench` compares the embeddings.

    Raises:
        MeasureError: the packages that export are not installed.
    """
    try:
        from export import artifacts, checkpoint, quantize
        from export.packed import GROUP, PackedEcapa

        loaded = checkpoint.load(source, channels=channels)
    except ModuleNotFoundError as error:
        raise MeasureError(f"{reason(error)}: export elsewhere and name the folder with --repository") from error
    files: Files = {}
    for (kind, suffix), precision in itertools.product(FORMATS.items(), precisions):
        if precision == "int8" and kind != "ONNX":
            continue
        half = precision == "fp16"
        model = PackedEcapa(loaded, group=None if half else GROUP, half=half, exact=precision == "int8").eval()
        files[kind, precision] = path = folder / f"model_{precision}{suffix}"
        print(f"write {path.name} ...", flush=True)
        if precision == "int8":
            quantize.write(model, loaded, path, quantize.Calibration())
        else:
            artifacts.write(model, loaded, path)
    return files


def made_from(metadata: dict[str, str]) -> Checkpoint:
    """The checkpoint that an exported model, by its metadata, was made from.

    Raises:
        MeasureError: the origin has other weights now.
    """
    from export import checkpoint

    loaded = checkpoint.load_again(metadata["origin"])
    if loaded.sha256 != metadata["weights_sha256"]:
        raise MeasureError(
            f"the model was made from other weights ({metadata['source']}) than {metadata['origin']} has now: "
            "export it again"
        )
    return loaded


def read_metadata(path: Path) -> dict[str, str]:
    """Of a TorchScript file.

    Raises:
        MeasureError: it was not written by `python -m export`.
    """
    extra = {"metadata.json": ""}
    try:
        torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return dict(json.loads(extra["metadata.json"]))
    except (RuntimeError, ValueError) as error:
        raise MeasureError(f"{path} was not written by python -m export ({reason(error)}): write it again") from error


@cache
def count_macs(path: Path, samples: int) -> int:
    """The multiply-accumulates of the matrix products for one clip, by running a TorchScript file on the CPU.

    Zeros that pad the Fourier transform count, 0.2 % at the published size.
    """
    with FlopCounterMode(display=False) as counted:
        torchscript(path, "cpu")(*pack([np.zeros(samples, np.float32)]))
    return int(counted.get_total_flops()) // 2
