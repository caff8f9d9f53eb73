"""The steps of an export: load a checkpoint, write model files beside the old ones, verify them, replace the old."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ecapa_triton.audio import SAMPLE_RATE
from ecapa_triton.errors import EcapaError

from . import artifacts, checkpoint, configs, packed, seal, verify

ERRORS = (
    checkpoint.CheckpointError,
    packed.UnsupportedModel,
    artifacts.ExportError,
    seal.SealError,
    configs.ConfigError,
    configs.ModelFileError,
    verify.VerificationError,
    EcapaError,  # an audio file cannot be read
)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Print what is being done, then how long it took."""
    print(f"{what} ...", flush=True)
    begun = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begun:.1f} s", flush=True)


def export(
    repository: Path,
    source: str,
    revision: str | None = None,
    *,
    seed: int = 0,
    channels: int = 1024,
    max_seconds: float = packed.MAX_SECONDS,
    formats: Sequence[str] = ("onnx",),
    half: bool = True,
) -> list[Path]:
    """Export a checkpoint into a model repository, verified, and print each step.

    Args:
        repository: a copy of this project's ``model_repository``, with its configs.
        source: as for :func:`checkpoint.load`, and so are the next three.
        revision: of a hub id.
        seed: of random weights.
        channels: of random weights.
        max_seconds: a clip is embedded by its first ``max_seconds``.
        formats: of :data:`configs.FORMATS`.
        half: write the float16 files for GPUs too.

    Returns:
        The paths of the model files.

    Raises:
        ERRORS: any of them. The old files of the format that was being written are unchanged.
        OSError: a file cannot be read or written; the same holds.
    """
    kinds = [configs.FORMATS[name] for name in formats]
    for kind in kinds:
        folder = repository / kind.folder
        if missing := [path for path in configs.config_files(folder) if not path.is_file()]:
            raise configs.ConfigError(
                f"{missing[0]} is missing: --repository must be a copy of this project's model_repository"
            )
        (folder / "1").mkdir(exist_ok=True)
        if not os.access(folder / "1", os.W_OK):
            raise artifacts.ExportError(f"{folder / '1'} is not writable: mend its owner or mode, or name another copy")
    with step(f"load {source}"):
        loaded = checkpoint.load(source, revision, seed=seed, channels=channels)
    return [path for kind in kinds for path in _export(repository / kind.folder, kind, loaded, max_seconds, half)]


def _export(
    folder: Path, kind: configs.Format, loaded: checkpoint.Checkpoint, max_seconds: float, half: bool
) -> list[Path]:
    partials: dict[Path, Path] = {}
    try:
        for name in (kind.file, kind.half_file) if half else (kind.file,):
            target = folder / "1" / name
            partial = partials[target] = target.with_name(f".{name}.{os.getpid()}.partial")
            is_half = name == kind.half_file
            with step(f"write {target}"):
                # Groups fit a CPU's caches; float16 files are for GPUs.
                group = None if is_half else packed.GROUP
                model = packed.PackedEcapa(loaded, max_seconds, group, is_half).eval()
                artifacts.write(model, loaded, partial)
        models = {path: artifacts.read(file) for path, file in partials.items()}
        configs.check_all(folder, {path.name: one.file for path, one in models.items()})
        for path, one in models.items():
            verify_file(path, one, loaded)
        for path, file in partials.items():
            os.replace(file, path)
    finally:
        for file in partials.values():
            file.unlink(missing_ok=True)
    threshold = "none" if math.isnan(loaded.threshold) else f"{loaded.threshold:g}"
    for path in partials:
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, {model.embedding_size}-dimensional embeddings, "
            f"clips of {model.min_samples / SAMPLE_RATE:g} s to {max_seconds:g} s, threshold {threshold}"
        )
    return list(partials)


def exported_files(repository: Path) -> list[Path]:
    """The model files in a repository, always with a format's float32 file; the float32 ONNX file if there is none."""
    files = []
    for kind in configs.FORMATS.values():
        file, half_file = (repository / kind.folder / "1" / name for name in (kind.file, kind.half_file))
        if file.is_file() or half_file.is_file():
            files += [file, half_file] if half_file.is_file() else [file]
    kind = configs.FORMATS["onnx"]
    return files or [repository / kind.folder / "1" / kind.file]


def verify_file(
    path: Path,
    model: artifacts.ExportedModel,
    loaded: checkpoint.Checkpoint,
    comparison: Iterator[object] | None = None,
) -> None:
    """Verify one opened model file against its checkpoint, and print each step of the comparison.

    Args:
        path: of the file.
        model: the file, opened.
        loaded: what it should have been made from.
        comparison: yields lines to print; :func:`verify.verify` by default.

    Raises:
        VerificationError: the model was made from other weights, differs from SpeechBrain, or lacks a guard.
    """
    made_from, source = model.metadata["weights_sha256"], model.metadata["source"]
    if made_from != loaded.sha256:
        raise verify.VerificationError(
            f"{path} was made from weights {made_from[:12]} ({source}), the source {loaded.source} has "
            f"{loaded.sha256[:12]}: name the right one with --source, or export again"
        )
    with step(f"verify {path} against SpeechBrain"):
        for line in comparison or verify.verify(model, loaded.classifier):
            print(f"  {line}", flush=True)
