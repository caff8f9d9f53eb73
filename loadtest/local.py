"""Servers that a load test starts on this machine: the models written, the baselines beside them, real tritonserver."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from export import checkpoint, configs
from export.__main__ import step
from export.packed import GROUP, PackedEcapa
from server import ServerError
from server.triton import choose_device, cuda_gpus

from .clips import Array
from .contenders import onnx_devices
from .soak import made_from
from .target import Device, Precision, Target, TargetError, add_baselines, link, serve

QUEUE = 1.0  # s of work that may wait in the open loop


class Local:
    """The servers of `--local`, from one checkpoint.

    Attributes:
        targets: those that were started.
        source: what they were made from, for people.
        not_measured: why there is nothing of the others.
        sha256: of the weights, by model.
        embed: the CPU's model in this process, from waveforms to embeddings; None if there is none.
        batch: clips that it takes at once, as the server would.
    """

    def __init__(self, options: argparse.Namespace, folder: Path, stack: contextlib.ExitStack) -> None:
        self.targets: list[Target] = []
        self.source: str | None = None
        self.not_measured: dict[str, str] = {}
        self.sha256: dict[str, str] = {}
        self.embed: Callable[[list[Array]], Array] | None = None
        self.batch = 1
        self._options, self._folder = options, folder
        devices = [device for device in dict.fromkeys(options.local) if self._is_there(device)]
        if not devices:
            return
        models = {device: options.model or _usual_model(device) for device in devices}
        kinds = {kind.folder: kind for kind in configs.FORMATS.values()}
        for model in models.values():
            if model not in kinds:
                raise TargetError(f"model is {model}, a local server has {', '.join(kinds)}")
        files = self._files({model: kinds[model] for model in models.values()})
        for device, model in models.items():
            self._start(device, model, files[model], stack)
        if any(target.name == "cpu" for target in self.targets) and models["cpu"] == configs.MODEL:
            from export.artifacts import OnnxModel

            self.embed = OnnxModel(next(file for file in files[configs.MODEL] if file.name == "model.onnx")).embed
            config = configs.read(folder / "cpu" / configs.MODEL / "configs" / "cpu.pbtxt")
            self.batch = max(config.dynamic_batching.preferred_batch_size, default=config.max_batch_size)

    def _is_there(self, device: Device) -> bool:
        try:
            choose_device(device, *cuda_gpus())
        except ServerError as error:
            self._miss(device, str(error))
            return False
        return True

    def _miss(self, what: str, why: str) -> None:
        self.not_measured[what] = why
        print(f"{what}: not measured: {why}", flush=True)

    def _files(self, kinds: dict[str, configs.Format]) -> dict[str, list[Path]]:
        """The files of each model: those of `--repository`, or new ones, unverified: every reply will be."""
        options = self._options
        files: dict[str, list[Path]] = {}
        if options.repository:
            for model in kinds:
                files[model] = model_files(options.repository / model)
                if not files[model]:
                    raise TargetError(
                        f"{options.repository / model / '1'} has no model: write it with python -m export"
                    )
            self._loaded = made_from(configs.ModelFile.read(files[model][0]).metadata)
        else:
            self._loaded = checkpoint.load(options.source, channels=options.channels)
            for model, kind in kinds.items():
                files[model] = [self._write(kind.file, half=False)]
                if options.precision == "fp16":
                    files[model].append(self._write(kind.half_file, half=True))
        self.source = self._loaded.source
        self.sha256 = dict.fromkeys(kinds, self._loaded.sha256)
        return files

    def _write(self, name: str, half: bool) -> Path:
        writer = importlib.import_module("export.artifacts" if name.endswith(".pt") else "export.artifacts")
        model = PackedEcapa(self._loaded, group=None if half else GROUP, half=half)
        with step(f"write {name}"):
            writer.write(model.eval(), self._loaded, self._folder / name)
        return self._folder / name

    def _start(self, device: Device, model: str, files: list[Path], stack: contextlib.ExitStack) -> None:
        link(self._folder / device, model, files)
        if self._options.baselines and (why := add_baselines(self._folder / device, self._loaded.origin)):
            self._miss(f"baselines on {device}", why)
        precision: Precision = self._options.precision if device == "gpu" else "fp32"
        try:
            with step(f"start the server on the {device.upper()}"):
                self.targets.append(stack.enter_context(serve(self._folder / device, device, model, precision)))
        except ServerError as error:
            self._miss(device, str(error))

    def reference(self, clips: list[Array]) -> Array:
        """SpeechBrain's embedding of each clip alone, float32 `[n, E]`."""
        import torch

        classifier = self._loaded.classifier
        with torch.inference_mode():
            return np.stack([classifier.encode_batch(torch.from_numpy(clip)[None])[0, 0].numpy() for clip in clips])

    def open_loop(self, target: Target, model: str, capacity: float, stack: contextlib.ExitStack) -> Target:
        """A server for the open loop: it refuses what would wait longer than QUEUE seconds, and has no baselines.

        Args:
            target: the server whose twin this is.
            model: of ours.
            capacity: its clips per second.
            stack: ends it.
        """
        if not target.local.limits:
            return target
        folder = self._folder / f"{target.name}-alone"
        if not folder.exists():
            link(folder, model, model_files(target.local.repository / model))
        device: Device = "gpu" if target.local.device == "GPU" else "cpu"
        precision: Precision = self._options.precision if device == "gpu" else "fp32"
        twin = serve(folder, device, model, precision, max(4, math.ceil(capacity * QUEUE)))
        try:
            return stack.enter_context(twin)
        except ServerError as error:
            raise TargetError(str(error)) from error


def model_files(model: Path) -> list[Path]:
    """Those in a model's folder, links followed, float32 before float16."""
    return sorted(path.resolve() for path in (model / "1").glob("model*") if path.suffix in (".onnx", ".pt"))


def _usual_model(device: str) -> str:
    """ONNX where ONNX Runtime can use the device."""
    can = device == "cpu" or "cuda" in onnx_devices()
    return configs.FORMATS["onnx" if can else "torchscript"].folder
