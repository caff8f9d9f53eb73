"""`python -m export`: export a checkpoint into the model repository; `python -m export verify`: verify its models."""

from __future__ import annotations

import argparse
import math
import signal
import sys
from pathlib import Path

from ecapa_triton.trials import read as read_trials

from . import artifacts, checkpoint, configs, packed, pipeline, trials, verify
from .pipeline import ERRORS, export, step

__all__ = ["ERRORS", "export", "main", "step"]

LONGEST_MAX_SECONDS = 3600.0  # s; MAX_EXPONENT in packed.py counts on it


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 after an error, 130 after Ctrl-C or SIGTERM."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.source == "":
        parser.error("--source is empty: expected mini, random, a folder or a hub id")
    if options.trials is not None and options.command != "verify":
        parser.error("--trials goes with the command verify")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        (run_verify if options.command == "verify" else run_export)(options)
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


def run_verify(options: argparse.Namespace) -> None:
    """Verify the models of the repository against --source, else against the origin in their metadata."""
    listed = None if options.trials is None else read_trials(options.trials, options.root or options.trials.parent)
    references: dict[str, verify.Reference] = {}
    loaded: dict[str, checkpoint.Checkpoint] = {}
    models = {path: artifacts.read(path) for path in pipeline.exported_files(options.repository)}
    for path, model in models.items():
        configs.check_all(path.parents[1], {path.name: model.file})
    for path, model in models.items():
        origin = options.source or model.metadata["origin"]
        if origin not in loaded:
            with step(f"load {origin}"):
                if options.source:
                    arguments = {"seed": options.seed, "channels": options.channels}
                    loaded[origin] = checkpoint.load(options.source, options.revision, **arguments)
                else:
                    loaded[origin] = checkpoint.load_again(origin)
        if listed is None:
            pipeline.verify_file(path, model, loaded[origin])
            continue
        reference = references.setdefault(origin, verify.Reference(loaded[origin].classifier))
        pipeline.verify_file(path, model, loaded[origin], trials.verify(model, reference, listed))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a SpeechBrain ECAPA-TDNN as packed models of the Triton model repository, verified.",
    )
    parser.add_argument(
        "command", nargs="?", choices=["export", "verify"], default="export", help="verify: check existing files only"
    )
    parser.add_argument(
        "--repository", type=Path, default=Path("model_repository"), metavar="DIR", help="default: %(default)s"
    )
    parser.add_argument(
        "--source",
        help=f"a hub id (default: {checkpoint.HUB_ID}; verify: the origin in the model's metadata), a folder with "
        f"{checkpoint.HYPERPARAMS} and {checkpoint.WEIGHTS}, mini (small, shipped), or random (weights)",
    )
    parser.add_argument("--revision", help="of a hub id (default: main; of the default source a pinned one)")
    parser.add_argument("--seed", type=int, default=0, help="of --source random (default: %(default)s)")
    parser.add_argument(
        "--channels", type=int, default=1024, help="of --source random (default: %(default)s, the published size)"
    )
    parser.add_argument(
        "--format",
        choices=[*configs.FORMATS, "all"],
        default="onnx",
        help="onnx for the model ecapa, torchscript for ecapa_torchscript, or all (default: %(default)s)",
    )
    parser.add_argument(
        "--fp16",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write the float16 file for GPUs too (default: %(default)s)",
    )
    parser.add_argument(
        "--max-seconds",
        type=_max_seconds,
        default=packed.MAX_SECONDS,
        metavar="S",
        help="embed only the first S seconds of a clip, which bounds memory and time (default: %(default)s)",
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
