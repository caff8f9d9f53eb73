"""The steps of an export: load a checkpoint, write model files beside the old ones, verify them, replace the old."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from ecapa_triton.audio import SAMPLE_RATE
from ecapa_triton.errors import EcapaError
from ecapa_triton.trials import Trials

from . import artifacts, checkpoint, configs, packed, quantize, seal, trials, verify

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
    int8: bool = True,
    calibration: Path | None = None,
) -> None:
    """Export a checkpoint into a model repository, verified, and print each step.

    Args:
        repository: a copy of this project's ``model_repository``, with its configs.
        source: as for :func:`checkpoint.load`, and so are the next three.
        revision: of a hub id.
        seed: of random weights.
        channels: of random weights.
        max_seconds: a clip is embedded by its first ``max_seconds``.
        formats: of :data:`configs.FORMATS`.
        half: write the float16 files for GPUs too. One that differs from SpeechBrain by too much is left out with a
            warning. A file that is not written removes that of an earlier export.
        int8: write the int8 file of the ONNX format for CPUs too; the same holds.
        calibration: folder of speech that its scales are found on; None for ``samples/``.

    Raises:
        ERRORS: any of them. The old files of the format that failed are unchanged; the other formats are written.
        OSError: a file cannot be read or written; the same holds.
    """
    kinds = [configs.FORMATS[name] for name in formats]
    for kind in kinds:  # cheap checks before minutes of work
        folder = repository / kind.folder
        for path in configs.config_files(folder):
            configs.read(path)
        with suppress(PermissionError):
            (folder / "1").mkdir(exist_ok=True)
        if not os.access(folder / "1", os.W_OK):
            raise artifacts.ExportError(
                f"{folder / '1'} is not writable for user {os.geteuid()}: run as its owner {folder.stat().st_uid} "
                f"(with Compose: RUN_AS), or change the owner: chown -R {os.geteuid()}:{os.getegid()}"
            )
    clips = quantize.Calibration(calibration) if int8 else None
    with step(f"load {source}"):
        loaded = checkpoint.load(source, revision, seed=seed, channels=channels)
    failed: dict[str, Exception] = {}
    for kind in kinds:
        try:
            _export(repository / kind.folder, kind, loaded, max_seconds, half, clips)
        except (*ERRORS, OSError) as error:
            failed[kind.folder] = error
    if failed:
        written = [kind.folder for kind in kinds if kind.folder not in failed]
        note = f" ({', '.join(written)} passed and was written)" if written else ""
        raise artifacts.ExportError("; ".join(dict.fromkeys(map(str, failed.values()))) + note)


def verify_all(repository: Path, loaded: checkpoint.Checkpoint | None = None, listed: Trials | None = None) -> None:
    """Verify the model files of a repository and its configs, and print each step.

    Args:
        repository: with at least one model file.
        loaded: what the models should have been made from; None for the origin in each file's metadata.
        listed: trials to compare on, in place of the built-in clips.

    Raises:
        ERRORS: any of them.
    """

    @cache
    def origin(arguments: str) -> tuple[checkpoint.Checkpoint, verify.Reference]:
        with step(f"load {arguments}"):
            found = checkpoint.load_again(arguments)
        return found, verify.Reference(found.classifier)

    models = {path: artifacts.ExportedModel(path) for path in _exported_files(repository)}
    given = loaded and (loaded, verify.Reference(loaded.classifier))
    for path, model in models.items():
        configs.check_all(path.parents[1], {path.name: model.file})
    for path, model in models.items():
        source, reference = given or origin(model.metadata["origin"])
        _verify(path, model, source, trials.verify(model, reference, listed) if listed else None)


def _export(
    folder: Path,
    kind: configs.Format,
    loaded: checkpoint.Checkpoint,
    max_seconds: float,
    half: bool,
    calibration: quantize.Calibration | None,
) -> None:
    wanted = {"fp32": True, "fp16": half, "int8": calibration is not None}
    files = {folder / "1" / name: precision for precision, name in kind.files.items()}
    partials: dict[Path, Path] = {}
    try:
        for target, precision in files.items():
            if not wanted[precision]:
                continue
            partials[target] = target.with_name(f".{target.name}.{os.getpid()}.partial")
            with step(f"write {target}"):
                # Groups fit a CPU's caches; float16 files are for GPUs.
                group = None if precision == "fp16" else packed.GROUP
                model = packed.PackedEcapa(
                    loaded, max_seconds, group, half=precision == "fp16", exact=precision == "int8"
                ).eval()
                if precision == "int8" and calibration is not None:
                    quantize.write(model, loaded, partials[target], calibration)
                else:
                    artifacts.write(model, loaded, partials[target])
        models = {path: artifacts.ExportedModel(partial) for path, partial in partials.items()}
        configs.check_all(folder, {path.name: one.file for path, one in models.items()})
        for path, one in models.items():
            try:
                _verify(path, one, loaded)
            except verify.VerificationError as error:
                if files[path] == "fp32":
                    raise
                print(f"warning: {error}; --no-{files[path]} exports without it", file=sys.stderr)
                partials.pop(path).unlink()
        for path, partial in partials.items():
            os.replace(partial, path)
        for path in files:
            if path not in partials and path.exists():
                path.unlink()
                print(f"{path}: removed, it was of an earlier export")
    finally:
        for partial in partials.values():
            partial.unlink(missing_ok=True)
    threshold = "none" if math.isnan(loaded.threshold) else f"{loaded.threshold:g}"
    for path in partials:
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, {model.embedding_size}-dimensional embeddings, "
            f"clips of {model.min_samples / SAMPLE_RATE:g} s to {max_seconds:g} s, threshold {threshold}"
        )


def _exported_files(repository: Path) -> list[Path]:
    """The model files in a repository, always with a format's float32 file; the float32 ONNX file if there is none."""
    files = []
    for kind in configs.FORMATS.values():
        paths = [repository / kind.folder / "1" / name for name in kind.files.values()]
        found = [path for path in paths if path.is_file()]
        files += found and [paths[0], *(path for path in found if path != paths[0])]
    return files or [repository / configs.MODEL / "1" / configs.FORMATS["onnx"].file]


def _verify(
    path: Path,
    model: artifacts.ExportedModel,
    loaded: checkpoint.Checkpoint,
    comparison: Iterable[object] | None = None,
) -> None:
    """Verify one file against its checkpoint by a comparison that yields lines to print, or raises."""
    made_from, source = model.metadata["weights_sha256"], model.metadata["source"]
    if made_from != loaded.sha256:
        raise verify.VerificationError(
            f"{path} was made from weights {made_from[:12]} ({source}), the source {loaded.source} has "
            f"{loaded.sha256[:12]}: name the right one with --source, or export again"
        )
    with step(f"verify {path} against SpeechBrain"):
        try:
            for line in comparison or verify.verify(model, loaded.classifier):
                print(f"  {line}", flush=True)
        except verify.VerificationError as error:
            raise verify.VerificationError(f"{path}: {error}") from error
