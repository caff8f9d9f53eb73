"""`python -m export`: a checkpoint into the model repository, verified; `python -m export verify`: verified again."""

from __future__ import annotations

import argparse
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import checkpoint, configs, onnx_file, packed, verify

ERRORS = (
    checkpoint.CheckpointError,
    packed.UnsupportedModel,
    onnx_file.OnnxFileError,
    configs.ConfigError,
    configs.ModelFileError,
    verify.VerificationError,
)
LONGEST_MAX_SECONDS = 3600.0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    options = _parser().parse_args(arguments)
    if options.source == "":
        _parser().error("--source is empty: expected mini, random, a folder or a hub id")
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
    )


def export(
    repository: Path,
    source: str,
    revision: str | None = None,
    *,
    seed: int = 0,
    channels: int = 1024,
    max_seconds: float = 30.0,
) -> Path:
    """Load, check, write beside the old model, verify, put in its place; say what is done and how long it took.

    Args:
        repository: a copy of this project's ``model_repository``, with its configs.
        source: as for :func:`checkpoint.load`, and so are the next three.
        revision: of a hub id.
        seed: of random weights.
        channels: of random weights.
        max_seconds: the model hears only this much of a clip.

    Returns:
        The path of the model file. When anything is raised, one of :data:`ERRORS`, the old file is still there.
    """
    folder = repository / configs.MODEL
    for path in configs.config_files(folder):
        if not path.is_file():
            raise configs.ConfigError(
                f"{path} is missing: --repository must be a copy of this project's model_repository with its configs"
            )
    with step(f"load {source}"):
        loaded = checkpoint.load(source, revision, seed=seed, channels=channels)
        model = packed.PackedEcapa(loaded.classifier, loaded.threshold, max_seconds).eval()
    target = folder / "1" / "model.onnx"
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".model.onnx.{os.getpid()}.partial")
    try:
        with step("write ONNX"):
            onnx_file.write(model, loaded, partial)
        exported = onnx_file.OnnxModel(partial)
        configs.check_all(folder, configs.ModelFile.read(partial))
        _verify(exported, loaded)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    threshold = "none" if math.isnan(loaded.threshold) else f"{loaded.threshold:g}"
    print(
        f"{target}: {target.stat().st_size / 1e6:.1f} MB, {model.embedding_size}-dimensional embeddings, "
        f"clips of {model.min_samples / packed.SAMPLE_RATE:g} s to {max_seconds:g} s, threshold {threshold}"
    )
    return target


def run_verify(options: argparse.Namespace) -> None:
    """Verify the model that is in the repository against the source that its metadata names."""
    folder = options.repository / configs.MODEL
    path = folder / "1" / "model.onnx"
    exported = onnx_file.OnnxModel(path)
    configs.check_all(folder, configs.ModelFile.read(path))
    if options.source is None:
        origin = shlex.split(exported.metadata["origin"])
        options = _parser().parse_args(["verify", "--repository", str(options.repository), *origin])
    with step(f"load {options.source}"):
        loaded = checkpoint.load(options.source, options.revision, seed=options.seed, channels=options.channels)
    made_from = exported.metadata["weights_sha256"]
    if made_from != loaded.sha256:
        raise verify.VerificationError(
            f"the model was made from weights {made_from[:12]} ({exported.metadata['source']}), "
            f"--source {options.source} has {loaded.sha256[:12]}: name the one it was made from, or export again"
        )
    _verify(exported, loaded)


def _verify(exported: onnx_file.OnnxModel, loaded: checkpoint.Checkpoint) -> None:
    with step("verify against SpeechBrain, clip by clip alone"):
        for group in verify.verify(exported, loaded.classifier):
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
        description="Turn a SpeechBrain ECAPA-TDNN into the packed ONNX model of the Triton repository, verified.",
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
        "--max-seconds",
        type=_max_seconds,
        default=30.0,
        metavar="S",
        help="the model hears only the first S seconds of a clip, which bounds its memory (default: %(default)s)",
    )
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
