"""`python -m export`: a checkpoint into the model repository, verified; `python -m export verify`: verified again."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ecapa_triton.errors import EcapaError
from ecapa_triton.trials import read as read_trials

from . import artifacts, checkpoint, configs, packed, seal, trials, verify

ERRORS = (
    checkpoint.CheckpointError,
    packed.UnsupportedModel,
    artifacts.ExportError,
    seal.SealError,
    configs.ConfigError,
    configs.ModelFileError,
    verify.VerificationError,
    EcapaError,
)
LONGEST_MAX_SECONDS = 3600.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.source == "":
        _parser().error("--source is empty: expected mini, random, a folder or a hub id")
    if options.trials is not None and options.command != "verify":
        _parser().error("--trials goes with the command verify")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    command = run_verify if options.command == "verify" else run_export
    try:
        command(options)
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error.filename or options.repository}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was changed", file=sys.stderr)
        return 130
    return 0


def run_export(options: argparse.Namespace) -> None:
    """Export as the command line says."""
    export(
        options.repository,
        options.source or checkpoint.HUB_ID,
        options.revision,
        seed=options.seed,
        channels=options.channels,
        max_seconds=options.max_seconds,
        formats=list(configs.FORMATS) if options.format == "all" else [options.format],
        half=options.fp16,
    )


def export(
    repository: Path,
    source: str,
    revision: str | None = None,
    *,
    seed: int = 0,
    channels: int = 1024,
    max_seconds: float = 30.0,
    formats: Sequence[str] = ("onnx",),
    half: bool = True,
) -> list[Path]:
    """Load, check, write beside the old files, verify, put in their place; say what is done and how long it took.

    Args:
        repository: a copy of this project's ``model_repository``, with its configs.
        source: as for :func:`checkpoint.load`, and so are the next three.
        revision: of a hub id.
        seed: of random weights.
        channels: of random weights.
        max_seconds: the model hears only this much of a clip.
        formats: of :data:`configs.FORMATS`.
        half: write the float16 files for GPUs too.

    Returns:
        The paths of the model files. When anything is raised, one of :data:`ERRORS`, the old files of the format that
        was being written are still there.
    """
    kinds = [configs.FORMATS[name] for name in formats]
    for path in (path for kind in kinds for path in configs.config_files(repository / kind.folder)):
        if not path.is_file():
            raise configs.ConfigError(
                f"{path} is missing: --repository must be a copy of this project's model_repository with its configs"
            )
    with step(f"load {source}"):
        loaded = checkpoint.load(source, revision, seed=seed, channels=channels)
    return [path for kind in kinds for path in _export(repository / kind.folder, kind, loaded, max_seconds, half)]


def _export(
    folder: Path, kind: configs.Format, loaded: checkpoint.Checkpoint, max_seconds: float, half: bool
) -> list[Path]:
    (folder / "1").mkdir(exist_ok=True)
    partials: dict[Path, Path] = {}
    try:
        for name in (kind.file, kind.half_file) if half else (kind.file,):
            target = folder / "1" / name
            partial = partials[target] = target.with_name(f".{name}.{os.getpid()}.partial")
            with step(f"write {target}"):
                # What a GPU alone runs has no use for pieces that fit into a CPU's caches.
                model = packed.PackedEcapa(
                    loaded,
                    max_seconds,
                    group=None if name == kind.half_file else packed.GROUP,
                    half=name == kind.half_file,
                ).eval()
                write = artifacts.write_onnx if kind.backend == "onnxruntime" else artifacts.write_torchscript
                write(model, loaded, partial)
        configs.check_all(folder, {path.name: configs.ModelFile.read(file) for path, file in partials.items()})
        for path, file in partials.items():
            _verify(path, _open(kind, file), loaded)
        for path, file in partials.items():
            os.replace(file, path)
    finally:
        for file in partials.values():
            file.unlink(missing_ok=True)
    threshold = "none" if math.isnan(loaded.threshold) else f"{loaded.threshold:g}"
    for path in partials:
        print(
            f"{path}: {path.stat().st_size / 1e6:.1f} MB, {model.embedding_size}-dimensional embeddings, "
            f"clips of {model.min_samples / packed.SAMPLE_RATE:g} s to {max_seconds:g} s, threshold {threshold}"
        )
    return list(partials)


def _open(kind: configs.Format, path: Path) -> artifacts.ExportedModel:
    return artifacts.OnnxModel(path) if kind.backend == "onnxruntime" else artifacts.TorchScriptModel(path)


def run_verify(options: argparse.Namespace) -> None:
    """Verify the models that are in the repository against the source that their metadata names."""
    listed = None if options.trials is None else read_trials(options.trials, options.root or options.trials.parent)
    references: dict[str, verify.Reference] = {}
    loaded: dict[str, checkpoint.Checkpoint] = {}
    models = []
    for path, kind in _exported_files(options.repository):
        models.append((path, _open(kind, path)))
        configs.check_all(options.repository / kind.folder, {path.name: configs.ModelFile.read(path)})
    for path, model in models:
        chosen = options
        if options.source is None:
            origin = shlex.split(model.metadata["origin"])
            chosen = _parser().parse_args(["verify", "--repository", str(options.repository), *origin])
        if chosen.source not in loaded:
            with step(f"load {chosen.source}"):
                loaded[chosen.source] = checkpoint.load(
                    chosen.source, chosen.revision, seed=chosen.seed, channels=chosen.channels
                )
        source = loaded[chosen.source]
        made_from = model.metadata["weights_sha256"]
        if made_from != source.sha256:
            raise verify.VerificationError(
                f"{path} was made from weights {made_from[:12]} ({model.metadata['source']}), --source {chosen.source} "
                f"has {source.sha256[:12]}: name the one it was made from, or export again"
            )
        if listed is None:
            _verify(path, model, source)
            continue
        reference = references.setdefault(source.sha256, verify.Reference(source.classifier))
        with step(f"verify {path} against SpeechBrain on {options.trials}"):
            for line in trials.verify(model, reference, listed):
                print(f"  {line}", flush=True)


def _exported_files(repository: Path) -> list[tuple[Path, configs.Format]]:
    """The files of each format of which there is any, the float32 one in any case; where there is none, ONNX's."""
    found = []
    for kind in configs.FORMATS.values():
        file, half_file = (repository / kind.folder / "1" / name for name in (kind.file, kind.half_file))
        if file.is_file() or half_file.is_file():
            found.append((file, kind))
        if half_file.is_file():
            found.append((half_file, kind))
    kind = configs.FORMATS["onnx"]
    return found or [(repository / kind.folder / "1" / kind.file, kind)]


def _verify(path: Path, model: artifacts.ExportedModel, loaded: checkpoint.Checkpoint) -> None:
    with step(f"verify {path} against SpeechBrain, clip by clip alone"):
        for group in verify.verify(model, loaded.classifier):
            print(f"  {group}", flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Say what is being done, then how long it took."""
    print(f"{what} ...", flush=True)
    begun = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begun:.1f} s", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Turn a SpeechBrain ECAPA-TDNN into the packed models of the Triton repository, verified.",
    )
    parser.add_argument(
        "command", nargs="?", choices=["export", "verify"], default="export", help="verify: only check what is there"
    )
    parser.add_argument(
        "--repository", type=Path, default=Path("model_repository"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--source",
        help=f"a hub id (default: {checkpoint.HUB_ID}; verify: what the model was made from), a folder with "
        "hyperparams.yaml and embedding_model.ckpt, mini (shipped, small), or random",
    )
    parser.add_argument("--revision", help="of a hub id (default: the pinned one of the default source)")
    parser.add_argument("--seed", type=int, default=0, help="of --source random (default: %(default)s)")
    parser.add_argument(
        "--channels", type=int, default=1024, help="of --source random (default: %(default)s, the published size)"
    )
    parser.add_argument(
        "--format",
        choices=[*configs.FORMATS, "all"],
        default="onnx",
        help="onnx is the model ecapa, torchscript the model ecapa_torchscript (default: %(default)s)",
    )
    parser.add_argument(
        "--fp16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write a float16 file for GPUs too, beside the float32 one (default: %(default)s)",
    )
    parser.add_argument(
        "--max-seconds",
        type=_max_seconds,
        default=30.0,
        metavar="S",
        help="the model hears only the first S seconds of a clip, which bounds its memory (default: %(default)s)",
    )
    parser.add_argument(
        "--trials",
        type=Path,
        metavar="LIST",
        help="verify: compare on the clips of a trial list, `1 a.flac b.flac` a line, in place of the built-in clips, "
        f"and print EER and minDCF; exit status 1 if a score differs by more than {trials.MAX_DIFFERENCE:g} or an "
        f"embedding has a cosine below {trials.MIN_COSINE:g}",
    )
    parser.add_argument("--root", type=Path, metavar="DIR", help="folder its paths start from (default: the list's)")
    return parser


def _max_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value <= LONGEST_MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"{text} seconds: expected 1 to {LONGEST_MAX_SECONDS:.0f}")
    return value


if __name__ == "__main__":
    sys.exit(main())
