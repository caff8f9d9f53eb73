"""`make demo`: export the model if need be, serve it on Triton, verify each pair of clips in `samples/`."""

from __future__ import annotations

import argparse
import math
import sys
from itertools import combinations
from pathlib import Path

from ecapa_triton import EcapaError, SpeakerClient, score

from export import checkpoint
from export.artifacts import ExportedModel, up_to_date
from export.configs import MODEL
from export.pipeline import ERRORS as EXPORT_ERRORS
from export.pipeline import export, step
from server import ServerError, TritonServer

ROOT = Path(__file__).parent.parent
MINI_NOTE = "NOTE: this is the small model that the project ships, for trials and not for access control"


def main(arguments: list[str] | None = None) -> int:
    """Run the demonstration; the exit status is 0 when every verdict is right, 1 when one is wrong, 2 on an error."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--repository", type=Path, default=ROOT / "model_repository", metavar="DIR")
    parser.add_argument("--source", help="as for python -m export (default: the hub, else mini)")
    parser.add_argument("--device", choices=["auto", "cpu", "gpu"], default="auto")
    options = parser.parse_args(arguments)
    try:
        return _demo(options.repository, options.source, options.device)
    except (ServerError, EcapaError, OSError, *EXPORT_ERRORS) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _demo(repository: Path, source: str | None, device: str) -> int:
    model = _model(repository, source)
    threshold = float(model.metadata["verification_threshold"])
    if math.isnan(threshold):
        print(f"error: {model.metadata['source']} has no threshold, so there is no verdict", file=sys.stderr)
        return 2

    clips = sorted(path for path in (ROOT / "samples").iterdir() if path.suffix in {".flac", ".wav"})
    server = TritonServer(repository, device=device)  # type: ignore[arg-type]
    with step("start tritonserver"):
        server.start()
    try:
        print(f"  version {server.version}, device {server.chosen}")
        with SpeakerClient(server.grpc_url, timeout=60) as client:
            with step(f"embed the {len(clips)} clips of samples/, all at once"):
                embeddings = client.embed_many(clips)
    finally:
        with step("stop the server"):
            server.stop()

    names = [path.stem for path in clips]
    scores = {(a, b): score(embeddings[i], embeddings[j]) for (i, a), (j, b) in combinations(enumerate(names), 2)}
    print(f"\ncosine of each pair; above {threshold:g} the verdict is `same speaker`, marked *\n")
    print(" " * 10 + "".join(f"{name:>10}" for name in names))
    for b in names:
        cells = (scores.get((a, b)) for a in names)
        row = ("" if score is None else f"{score:.2f}{'*' if score > threshold else ' '}" for score in cells)
        print(f"{b:<10}" + "".join(f"{cell:>10}" for cell in row).rstrip())
    wrong = [pair for pair, score in scores.items() if (score > threshold) != (_speaker(pair[0]) == _speaker(pair[1]))]
    print(f"\nverdicts: {len(scores) - len(wrong)} of {len(scores)} right")
    for a, b in wrong:
        print(f"  WRONG: {a} and {b} are {'one speaker' if _speaker(a) == _speaker(b) else 'two speakers'}")
    if model.metadata["origin"] == "--source mini":
        print(MINI_NOTE)
    return 1 if wrong else 0


def _model(repository: Path, source: str | None) -> ExportedModel:
    """The model of the repository, exported first if it is missing or out of date."""
    path = repository / MODEL / "1" / "model.onnx"
    if up_to_date(path, source):
        model = ExportedModel(path)
        print(f"{path} is up to date: {model.metadata['source']}")
        return model
    try:
        export(repository, source or checkpoint.HUB_ID, half=False, int8=False)
    except checkpoint.CheckpointError as error:
        if source is not None:
            raise
        print(f"\n{error}\n")
        export(repository, "mini", half=False, int8=False)
    return ExportedModel(path)


def _speaker(name: str) -> str:
    return name.partition("_")[0]


if __name__ == "__main__":
    sys.exit(main())
