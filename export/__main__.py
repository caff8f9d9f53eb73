"""`python -m export`: export a checkpoint into the model repository; `python -m export verify`: verify its models."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path

from ecapa_triton.trials import read as read_trials

from . import checkpoint, configs, packed, pipeline, trials

LONGEST_MAX_SECONDS = 3600.0  # s; MAX_EXPONENT in packed.py counts on it
# Of the options that `verify` rejects; the parser's own are None, so that an option that was given is known.
EXPORT_DEFAULTS = {"format": "onnx", "fp16": True, "int8": True, "calibration": None, "max_seconds": packed.MAX_SECONDS}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 1 after an error, 130 after Ctrl-C or SIGTERM."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "verify":
        if options.root and not options.trials:
            parser.error("--root goes with --trials")
        for name in EXPORT_DEFAULTS:
            if getattr(options, name) is not None:
                parser.error(f"--{name.replace('_', '-')} goes with the command export; verify checks every model file")
    elif options.trials or options.root:
        parser.error("--trials and --root go with the command verify")
    for name, value in EXPORT_DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 1 <= options.max_seconds <= LONGEST_MAX_SECONDS:
        parser.error(f"--max-seconds {options.max_seconds:g}: expected 1 to {LONGEST_MAX_SECONDS:.0f}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up as after Ctrl-C
    try:
        (_verify if options.command == "verify" else _export)(options)
    except (*pipeline.ERRORS, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: unfinished files were discarded", file=sys.stderr)
        return 130
    return 0


def _export(options: argparse.Namespace) -> None:
    pipeline.export(
        options.repository,
        options.source or checkpoint.HUB_ID,
        options.revision,
        seed=options.seed,
        channels=options.channels,
        max_seconds=options.max_seconds,
        formats=list(configs.FORMATS) if options.format == "all" else [options.format],
        half=options.fp16,
        int8=options.int8,
        calibration=options.calibration,
    )


def _verify(options: argparse.Namespace) -> None:
    listed = read_trials(options.trials, options.root or options.trials.parent) if options.trials else None
    loaded = None
    if options.source:
        with pipeline.step(f"load {options.source}"):
            loaded = checkpoint.load(options.source, options.revision, seed=options.seed, channels=options.channels)
    pipeline.verify_all(options.repository, loaded, listed)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m export",
        description="Export a SpeechBrain ECAPA-TDNN as packed models of the Triton model repository, verified.",
    )
    add = parser.add_argument
    add("command", nargs="?", choices=["export", "verify"], default="export", help="verify: check existing files only")
    add(
        "--repository",
        type=Path,
        default="model_repository",
        metavar="DIR",
        help="model repository (default: %(default)s)",
    )
    add(
        "--source",
        help=f"a hub id (default: {checkpoint.HUB_ID}; verify: the origin in the model's metadata), a folder with "
        f"{checkpoint.HYPERPARAMS} and {checkpoint.WEIGHTS}, mini (small, shipped), or random (weights)",
    )
    add("--revision", help="branch, tag or commit of a hub id (default: main; of the default source a pinned commit)")
    seed = "seed of the random weights, with --source random (default: %(default)s)"
    add("--seed", type=int, default=0, metavar="N", help=seed)
    channels = "channels of the convolutions, with --source random (default: %(default)s, the published size)"
    add("--channels", type=int, default=1024, metavar="N", help=channels)
    add(
        "--format",
        choices=[*configs.FORMATS, "all"],
        help="onnx for the model ecapa, torchscript for ecapa_torchscript, or all "
        f"(default: {EXPORT_DEFAULTS['format']})",
    )
    add(
        "--fp16",
        action=argparse.BooleanOptionalAction,
        help="write the float16 file for GPUs too (default: --fp16)",
    )
    add(
        "--int8",
        action=argparse.BooleanOptionalAction,
        help="write the int8 ONNX file for CPUs too, where it keeps its bounds (default: --int8)",
    )
    add(
        "--calibration",
        type=Path,
        metavar="DIR",
        help="folder of speech that the scales of the int8 file are found on (default: samples/)",
    )
    add(
        "--max-seconds",
        type=float,
        metavar="S",
        help="embed only the first S seconds of a clip, which bounds memory and time "
        f"(default: {EXPORT_DEFAULTS['max_seconds']:g})",
    )
    add(
        "--trials",
        type=Path,
        metavar="LIST",
        help="verify: compare on the clips of a trial list, `1 a.flac b.flac` a line, in place of the built-in clips, "
        f"and print EER and minDCF; exit status 1 if a score differs by more than {trials.MAX_DIFFERENCE:g} or an "
        f"embedding has a cosine below {trials.MIN_COSINE:g}",
    )
    add("--root", type=Path, metavar="DIR", help="folder that the list's paths start from (default: the list's own)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
