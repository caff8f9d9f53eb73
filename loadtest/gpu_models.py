"""What is measured on a GPU: model files, the speech they hear, and ways to run them.

With model files from elsewhere, torch and numpy are all that the TorchScript ones need.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import wave
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .machine import reason

Array: TypeAlias = NDArray[np.float32]
Embed: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # waveform [S] and int32 lengths [B, 1] to float32 [B, E]
Files: TypeAlias = dict[tuple[str, str], Path]  # by format and precision

ROOT = Path(__file__).parent.parent
SAMPLE_RATE = 16_000  # Hz
# Folder and files as in export.configs, which cannot be imported where torch is all there is.
FORMATS = {
    "TorchScript": ("ecapa_torchscript", {"fp32": "model.pt", "fp16": "model_fp16.pt"}),
    "ONNX": ("ecapa", {"fp32": "model.onnx", "fp16": "model_fp16.onnx"}),
}
MAX_SPEECH = 100  # files of a folder


class GpuError(Exception):
    """Something cannot be measured; the message says what to do."""


def find(repository: Path) -> Files:
    """The model files of a model repository, or of a folder that holds them side by side."""
    files = {}
    for kind, (folder, names) in FORMATS.items():
        for precision, name in names.items():
            places = repository / folder / "1" / name, repository / name
            if path := next((place for place in places if place.is_file()), None):
                files[kind, precision] = path.resolve()
    if ("TorchScript", "fp32") not in files:
        raise GpuError(f"{repository} has no model.pt: write it with python -m export --format torchscript")
    return files


def write_models(folder: Path, source: str, channels: int, device: str) -> Files:
    """Write TorchScript files and, where ONNX Runtime can use the device, ONNX files."""
    try:
        from export import artifacts, checkpoint
        from export.packed import GROUP, PackedEcapa

        loaded = checkpoint.load(source, channels=channels)
    except ModuleNotFoundError as error:
        raise GpuError(f"{reason(error)}: export elsewhere and name the folder with --repository") from error
    writers: dict[str, Callable[..., None]] = {"TorchScript": artifacts.write_torchscript}
    if device in onnx_devices() and importlib.util.find_spec("onnxscript"):
        from export import artifacts

        writers["ONNX"] = artifacts.write_onnx
    files = {}
    for kind, writer in writers.items():
        for precision, name in FORMATS[kind][1].items():
            print(f"write {name} ...", flush=True)
            half = precision == "fp16"
            model = PackedEcapa(loaded, group=None if half else GROUP, half=half).eval()
            files[kind, precision] = folder / name
            writer(model, loaded, folder / name)
    return files


def read_metadata(path: Path) -> dict[str, str]:
    """Of a TorchScript file."""
    extra = {"metadata.json": ""}
    try:
        torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
        return dict(json.loads(extra["metadata.json"]))
    except (RuntimeError, ValueError) as error:
        raise GpuError(f"{path} was not written by python -m export ({reason(error)}): write it again") from error


def read_speech(folder: Path | None, longest: int) -> dict[str, Array]:
    """Clips by name: the files of `folder`, or those of `samples/` whole and cut in halves and quarters."""
    paths = sorted(path for path in (folder or ROOT / "samples").rglob("*") if path.suffix in {".wav", ".flac"})
    whole = {}
    for path in paths[:MAX_SPEECH]:
        try:
            from ecapa_triton.audio import read

            whole[path.name] = read(path, max_samples=longest).waveform
        except ModuleNotFoundError:  # without the client's packages
            if path.suffix == ".wav":
                whole[path.name] = _read_wav(path)[:longest]
    if not whole:
        raise GpuError(f"{folder or 'samples/'} has no speech that can be read: expected WAV, or FLAC with soundfile")
    if folder:
        return whole
    parts = {name: [part for n in (1, 2, 4) for part in np.array_split(clip, n)] for name, clip in whole.items()}
    return {f"{name} {number}": part for name, clips in parts.items() for number, part in enumerate(clips)}


def _read_wav(path: Path) -> Array:
    """A file of 16-bit samples with the standard library: its first channel, linearly resampled."""
    with wave.open(str(path)) as file:
        if file.getsampwidth() != 2:
            raise GpuError(
                f"{path} has {8 * file.getsampwidth()} bits a sample, expected 16: install soundfile and soxr"
            )
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")[:: file.getnchannels()] / 32768
        at = np.arange(len(samples) * SAMPLE_RATE // file.getframerate()) * file.getframerate() / SAMPLE_RATE
    return np.interp(at, np.arange(len(samples)), samples).astype(np.float32)


def packed(clips: list[Array], device: str) -> tuple[Tensor, Tensor]:
    """A batch: waveform float32 `[S]` and lengths int32 `[B, 1]`."""
    lengths = torch.tensor([[len(clip)] for clip in clips], dtype=torch.int32)
    return torch.from_numpy(np.concatenate(clips)).to(device), lengths.to(device)


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


def onnx(path: Path, device: str, tf32: bool = False) -> Embed:
    """An ONNX file, with inputs and outputs bound on the device."""
    import onnxruntime

    if device not in onnx_devices():
        raise GpuError("the installed onnxruntime is without CUDA")
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False  # as the configs have it
    options.add_session_config_entry("session.force_spinning_stop", "1")
    cuda = [("CUDAExecutionProvider", {"use_tf32": str(int(tf32))})]
    providers = cuda if device == "cuda" else ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise GpuError("onnxruntime could not load its CUDA provider")
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
    """SpeechBrain's `encode_batch` of the checkpoint that the model was made from: clips of one length."""
    from export import checkpoint

    words = shlex.split(metadata["origin"])
    origin = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    numbers = {name: int(origin[name]) for name in ("seed", "channels") if name in origin}
    loaded = checkpoint.load(origin["source"], origin.get("revision"), **numbers)
    if loaded.sha256 != metadata["weights_sha256"]:
        raise GpuError("the model was made from other weights than its origin now has")
    classifier = loaded.classifier
    classifier.device = device
    for module in classifier.mods.values():
        module.to(device)

    def embed(waveform: Tensor, lengths: Tensor) -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.inference_mode():
            return torch.as_tensor(classifier.encode_batch(waveform.view(len(lengths), -1))[:, 0])

    return embed


def noise(clips: int, seconds: float) -> list[Array]:
    """White noise: what is in a clip does not change its time."""
    random = np.random.default_rng(0)
    return [random.standard_normal(round(seconds * SAMPLE_RATE)).astype(np.float32) * 0.1 for _ in range(clips)]


class CountProducts(TorchDispatchMode):
    """Counts the multiply-accumulates of matrix products with more than one row."""

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

    Those of `model.count_products`, which needs more than torch, and the zeros that pad the Fourier transform: 0.2 % at
    the published size. What belongs to the packing, and the layers that see one row a clip, have one row here.
    """
    module = torch.jit.load(str(path), map_location="cpu")
    lengths = torch.tensor([[samples]], dtype=torch.int32)
    with torch.no_grad(), torch.jit.optimized_execution(False), CountProducts() as counted:  # type: ignore[attr-defined]
        module(torch.zeros(samples), lengths)
    return int(counted.macs)
