"""Model files that are damaged, replaced under a running server, or do not fit on the disk."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from ecapa_triton.protocol import GRPC_KEY_HEADER
from onnx import numpy_helper
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from export import seal
from server import Limits, ServerError, TritonServer, gateway
from tests.faults.judge import PATIENCE, Clip, Outcome, Tally, Traffic, Urls

from .harness import ROOT

KEY = "for-those-who-replace-models"

# --- at the start ---


def model_file(repository: Path) -> Path:
    return repository / "ecapa/1/model.onnx"


def cut_to(size: Callable[[int], float]) -> Callable[[Path], object]:
    return lambda repository: os.truncate(path := model_file(repository), int(size(path.stat().st_size)))


def flip_a_bit_of_the_weights(repository: Path) -> None:
    path = model_file(repository)
    data = bytearray(path.read_bytes())
    weights = onnx.load(path).graph.initializer
    largest = max(weights, key=lambda tensor: len(tensor.raw_data)).raw_data
    data[data.index(largest) + len(largest) // 2] ^= 1
    path.write_bytes(data)


def without_guards(repository: Path) -> None:
    """A complete, sealed file without guards."""
    path = model_file(repository)
    model = onnx.load(path)
    kept = {item.key: item.value for item in model.metadata_props if item.key not in ("guards", "sha256")}
    write_sealed(model, kept, path)


def write_sealed(model: onnx.ModelProto, metadata: dict[str, str], path: Path) -> None:
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    onnx.save(model, str(path))
    seal.seal(path)


def another_size_in_the_config(repository: Path) -> None:
    path = repository / "ecapa/configs/cpu.pbtxt"
    text = path.read_text()
    assert "dims: [ 192 ]" in text
    path.write_text(text.replace("dims: [ 192 ]", "dims: [ 191 ]"))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "missing": lambda repository: model_file(repository).unlink(),
    "empty": cut_to(lambda size: 0),
    "cut off in its header": cut_to(lambda size: size / 1e5),
    "cut off at a third": cut_to(lambda size: size / 3),
    "cut off at nine tenths": cut_to(lambda size: size * 0.9),
    "without its last byte": cut_to(lambda size: size - 1),
    "without its seal": cut_to(lambda size: size - 77),
    "a bit of its weights flipped": flip_a_bit_of_the_weights,
    "something behind its end": lambda repository: model_file(repository).open("ab").write(b"\0"),
    "text": lambda repository: model_file(repository).write_text("<html>404 not found</html>"),
    "metadata without guards": without_guards,
    "a config with another output size": another_size_in_the_config,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_server_does_not_start_on(case: str, repository_copy: Path, tally: Tally) -> None:
    DAMAGE[case](repository_copy)
    tally.fault()
    with pytest.raises(ServerError) as raised:
        with TritonServer(repository_copy, device="cpu"):
            pass
    message = str(raised.value)
    assert "\n" not in message
    assert "model.onnx" in message or "cpu.pbtxt" in message


# --- under a running server ---


def other_model(path: Path) -> bytes:
    """The file of a model whose embeddings have their numbers in reverse order."""
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name in ("last.weight", "last.bias"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor)[::-1].copy(), tensor.name))
    metadata = {item.key: item.value for item in model.metadata_props if item.key != "sha256"}
    other = path.with_name("other.onnx")
    write_sealed(model, metadata, other)
    data = other.read_bytes()
    other.unlink()
    return data


def replace(path: Path, data: bytes) -> None:
    """Atomically, as the export does it."""
    partial = path.with_name(".model.onnx.partial")
    partial.write_bytes(data)
    os.replace(partial, path)


@pytest.mark.skipif(gateway.find() is None, reason="nginx, which checks keys, is not installed")
def test_a_model_replaced_under_load(repository_copy: Path, short: list[Clip], tally: Tally) -> None:
    """Replies are of the old or the new model; once that is loaded, of it alone. A bad file changes nothing."""
    path = model_file(repository_copy)
    reversed_ = {clip.name: Clip(clip.name, clip.waveform, clip.reference[::-1]) for clip in short}
    models = {"old": short, "new": list(reversed_.values())}
    files = {"old": path.read_bytes(), "new": other_model(path)}

    def of_either(clip: Clip, outcome: Outcome) -> str:
        other = reversed_[clip.name]
        is_other = isinstance(outcome, np.ndarray) and other.is_right(outcome[0])
        return tally.check(other if is_other else clip, outcome)

    explicit = ["--model-control-mode=explicit", "--load-model=ecapa"]
    # Triton waits at its stop for a model that did not load.
    options = {"limits": Limits(None), "keys": {"model-repository": [KEY]}}
    headers = {GRPC_KEY_HEADER: KEY}
    with TritonServer(repository_copy, device="cpu", extra=explicit, exit_timeout=2, **options) as server:
        urls = Urls.of(server)

        def all_are(model: str) -> None:
            for connect in urls.senders():
                with connect() as sender:
                    for clip in models[model][::3]:
                        assert tally.check(clip, sender.ask(clip.waveform), recovered=True) == "right"

        with InferenceServerClient(urls.grpc) as control, Traffic(urls.senders(), short, of_either) as load:
            all_are("old")
            for model in "new", "old", "new":
                replace(path, files[model])
                tally.fault()
                control.load_model("ecapa", headers=headers, client_timeout=PATIENCE)
                all_are(model)
            for bad in files["old"][: len(files["old"]) // 2], b"", files["old"][:-1] + b"?":
                replace(path, bad)
                tally.fault()
                with pytest.raises(InferenceServerException):
                    control.load_model("ecapa", headers=headers, client_timeout=PATIENCE)
                all_are("new")
            assert set(load.verdicts) == {"right"}


# --- on a full disk ---

# Tracing takes long and does not touch the disk, so the graph is read from a file; the rest is the export's own work.
EXPORT = """
import sys, types
from pathlib import Path
import onnx, torch
from export import __main__, seal
model = onnx.load(sys.argv[1])
torch.onnx.export = lambda *_, **__: types.SimpleNamespace(model_proto=model)
sys.exit(__main__.main(["--source", "mini", "--repository", sys.argv[2]]))
"""


def test_an_export_that_does_not_fit(repository: Path, repository_copy: Path, tally: Tally) -> None:
    """No file may grow beyond half the model: the old model stays, nothing is left beside it, and one line says why."""
    path, source = model_file(repository_copy), model_file(repository)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}
    limit = source.stat().st_size // 2
    tally.fault()
    run = subprocess.run(
        [sys.executable, "-c", EXPORT, str(source), str(repository_copy)],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert run.returncode == 1 and os.strerror(errno.EFBIG) in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
