"""The implementations that `bench` compares: our model files and SpeechBrain; and matrix products.

Everything beyond torch and numpy is imported where it is used: a GPU host may have no more, and model files that were
exported elsewhere can still be measured there.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from .clips import Array
from .machine import ROOT, MeasureError, reason

if TYPE_CHECKING:
    from export.checkpoint import Checkpoint

Batch: TypeAlias = tuple[Tensor, Tensor]
Embed: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # a batch to float32 [B, E]
Files: TypeAlias = dict[tuple[str, str], Path]  # by format and precision

FORMATS = {"ONNX": ".onnx", "TorchScript": ".pt"}
PRECISIONS = {"cpu": ("fp32",), "cuda": ("fp32", "tf32", "fp16")}
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16}
SPEECHBRAIN, PADDED = "SpeechBrain one by one", "SpeechBrain padded"
CPU_CONFIG = ROOT / "model_repository/ecapa/configs/cpu.pbtxt"
MAX_SPEECH = 100  # files of a folder


@dataclass(frozen=True, eq=False)
class Contender:
    """An implementation, loaded to a device.

    Attributes:
        name: in the report.
        format: of `FORMATS`, or "SpeechBrain".
        precision: of `PRECISIONS`.
        device: torch's name.
        batches: splits clips, float32 `[samples]`, into batches on the CPU.
        embed: one batch on `device` to float32 `[B, E]`.
    """

    name: str
    format: str
    precision: str
    device: str
    batches: Callable[[Sequence[Array]], list[Batch]]
    embed: Embed

    @property
    def ours(self) -> bool:
        """A packed model, not SpeechBrain."""
        return self.format in FORMATS

    def run(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Embed batches, each copied to the device unless it is there."""
        return [self.embed(first.to(self.device), second.to(self.device)) for first, second in batches]


def in_batches(join: Callable[[Sequence[Array]], Batch], size: int | None) -> Callable[[Sequence[Array]], list[Batch]]:
    """A function that joins clips into batches of `size`; None: into one."""
    return lambda clips: [
        join(clips[at : at + (size or len(clips))]) for at in range(0, len(clips), size or len(clips))
    ]


def pack(clips: Sequence[Array]) -> Batch:
    """Clips end to end: waveform float32 `[S]` and lengths int32 `[B, 1]`."""
    lengths = torch.tensor([[len(clip)] for clip in clips], dtype=torch.int32)
    return torch.from_numpy(np.concatenate(clips)), lengths


def pad(clips: Sequence[Array]) -> Batch:
    """Clips with zeros behind them: float32 `[B, samples]`, and the share of each row that its clip fills, `[B]`."""
    rows = pad_sequence([torch.from_numpy(clip) for clip in clips], batch_first=True)
    return rows, torch.tensor([len(clip) / rows.shape[1] for clip in clips])


def preferred_batch_size() -> int:
    """The number of single clips that Triton joins in a batch at most, by the config for CPUs."""
    found = re.search(r"preferred_batch_size: *\[([\d, ]+)\]", CPU_CONFIG.read_text(encoding="utf-8"))
    if not found:
        raise MeasureError(f"{CPU_CONFIG} has no preferred_batch_size")
    return max(map(int, found[1].split(",")))


def loaders(
    files: Files, metadata: dict[str, str], device: str, precisions: Sequence[str], threads: int
) -> dict[str, Callable[[], list[Contender]]]:
    """What can be measured on a device: functions, by name, that load it and raise where it cannot be loaded.

    On a CPU ours runs in batches of the size that Triton prefers there, and in one batch of all clips.
    """

    def ours(name: str, kind: str, precision: str) -> list[Contender]:
        path = files.get((kind, "fp16" if precision == "fp16" else "fp32"))
        if path is None:
            raise MeasureError("there is no such file")
        tf32 = precision == "tf32"
        embed = torchscript(path, device, tf32) if kind == "TorchScript" else onnx(path, device, tf32, threads)
        one = Contender(name, kind, precision, device, in_batches(pack, None), embed)
        preferred = in_batches(pack, preferred_batch_size())
        return [replace(one, batches=preferred), replace(one, name=f"{name}, one batch")] if device == "cpu" else [one]

    def theirs() -> list[Contender]:
        one = Contender(SPEECHBRAIN, "SpeechBrain", "fp32", device, in_batches(pad, 1), speechbrain(metadata, device))
        return [one, replace(one, name=PADDED, batches=in_batches(pad, None))]

    found: dict[str, Callable[[], list[Contender]]] = {}
    for kind, precision in itertools.product(FORMATS, precisions):
        name = f"{kind} {precision.upper()}"
        found[name] = partial(ours, name, kind, precision)
    return found | {"SpeechBrain": theirs}


def find(repository: Path) -> Files:
    """The model files below a folder.

    Raises:
        MeasureError: there is no float32 TorchScript file among them.
    """
    files: Files = {}
    for kind, suffix in FORMATS.items():
        for path in sorted(repository.rglob(f"model*{suffix}")):
            files.setdefault((kind, "fp16" if path.stem.endswith("_fp16") else "fp32"), path.resolve())
    if ("TorchScript", "fp32") not in files:
        raise MeasureError(f"{repository} has no model.pt: write it with python -m export --format torchscript")
    return files


def write(folder: Path, source: str, channels: int, precisions: Sequence[str]) -> Files:
    """Export to a folder, without verification: ONNX where ONNX Runtime and onnxscript are installed.

    Raises:
        MeasureError: the packages that export are not installed.
    """
    try:
        from export import artifacts, checkpoint
        from export.packed import GROUP, PackedEcapa

        loaded = checkpoint.load(source, channels=channels)
    except ModuleNotFoundError as error:
        raise MeasureError(f"{reason(error)}: export elsewhere and name the folder with --repository") from error
    writers = {"TorchScript": artifacts.write_torchscript, "ONNX": artifacts.write_onnx}
    if not (onnx_devices() and importlib.util.find_spec("onnxscript")):
        del writers["ONNX"]
    files: Files = {}
    for kind, writer in writers.items():
        for precision in {"fp32", "fp16"} & set(precisions):
            half = precision == "fp16"
            files[kind, precision] = path = folder / f"model{'_fp16' * half}{FORMATS[kind]}"
            print(f"write {path.name} ...", flush=True)
            writer(PackedEcapa(loaded, group=None if half else GROUP, half=half).eval(), loaded, path)
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


def read_speech(folder: Path | None, rate: int, longest: int) -> list[Array]:
    """Clips of at most `longest` samples at `rate` Hz: files of a folder, or `samples/` whole, halved and quartered.

    Raises:
        MeasureError: there is no file that can be read.
    """
    paths = sorted(path for path in (folder or ROOT / "samples").rglob("*") if path.suffix in {".wav", ".flac"})
    whole = []
    for path in paths[:MAX_SPEECH]:
        try:
            from ecapa_triton.audio import read

            whole.append(read(path, max_samples=longest).waveform)
        except ModuleNotFoundError:  # without the client's packages
            if path.suffix == ".wav":
                whole.append(_read_wav(path, rate)[:longest])
    if not whole:
        raise MeasureError(f"{folder or 'samples/'} has no audio that can be read: WAV, or FLAC with soundfile")
    return whole if folder else [part for clip in whole for n in (1, 2, 4) for part in np.array_split(clip, n)]


def _read_wav(path: Path, rate: int) -> Array:
    """A file of 16-bit samples with the standard library: its first channel, linearly resampled."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise MeasureError(f"{path} has {8 * file.getsampwidth()} bits per sample, expected 16: install soundfile")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")[:: file.getnchannels()] / 32768
        at = np.arange(len(samples) * rate // file.getframerate()) * file.getframerate() / rate
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def torchscript(path: Path, device: str, tf32: bool = False) -> Embed:
    """A TorchScript file."""
    module = torch.jit.load(str(path), map_location=device)

    def embed(waveform: Tensor, lengths: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
            embedding: Tensor = module(waveform, lengths)[0]
        return embedding

    return embed


def onnx_devices() -> set[str]:
    """The devices, by torch's names, that the installed ONNX Runtime can use."""
    if importlib.util.find_spec("onnxruntime") is None:
        return set()
    import onnxruntime

    return {"cpu"} | ({"cuda"} if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else set())


def onnx(path: Path, device: str, tf32: bool = False, threads: int = 0) -> Embed:
    """An ONNX file, with inputs and outputs bound on the device."""
    import onnxruntime

    if device not in onnx_devices():
        raise MeasureError("the installed onnxruntime has no CUDA")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.enable_mem_pattern = False  # as the configs have it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    cuda = [("CUDAExecutionProvider", {"use_tf32": str(int(tf32))})]
    providers = cuda if device == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
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


def speechbrain(metadata: dict[str, str], device: str) -> Embed:
    """SpeechBrain's `encode_batch` with the checkpoint that a model was made from."""
    classifier = made_from(metadata).classifier
    classifier.device = device
    for module in classifier.mods.values():
        module.to(device)

    def embed(rows: Tensor, shares: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.inference_mode():
            return torch.as_tensor(classifier.encode_batch(rows, shares)[:, 0])

    return embed


def product(size: int, device: str, precision: str) -> Callable[[], object]:
    """A product of square matrices by torch."""
    a, b = (torch.randn(size, size).to(device, TYPES[precision]) for _ in range(2))

    def multiply() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        return a @ b

    return multiply


class _Products(TorchDispatchMode):
    """Counts multiply-accumulates of matrix products with more than one row: of frames, where there is one clip."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            rows, inner = map(int, args[-2].shape)
            self.macs += rows * inner * int(result.shape[1]) if rows > 1 else 0
        return result


@cache
def count_macs(path: Path, samples: int) -> int:
    """The multiply-accumulates of one clip's frames, by running a TorchScript file on the CPU.

    Zeros that pad the Fourier transform count, 0.2 % at the published size. Work of the packing and layers that see one
    row per clip do not.
    """
    module = torch.jit.load(str(path), map_location="cpu")
    lengths = torch.tensor([[samples]], dtype=torch.int32)
    with torch.no_grad(), torch.jit.optimized_execution(False), _Products() as counted:  # type: ignore[attr-defined]
        module(torch.zeros(samples), lengths)
    return int(counted.macs)
