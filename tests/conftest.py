"""Shared by the tests: the small trained model, exported once and served once, and SpeechBrain as its reference."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from fake_triton import FakeTriton, fake_triton
from hypothesis import HealthCheck, settings

from export import checkpoint
from export.pipeline import export
from export.verify import Reference
from server import TritonServer

ROOT = Path(__file__).parent.parent
pytest_plugins = ["clients", "bulk", "galleries"]  # their fixtures serve several files
SOURCES = ".py", ".pbtxt", ".yaml", ".ckpt"

# The same examples every time; pytest --hypothesis-profile=more draws many new ones.
QUICK = settings(derandomize=True, deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("repeatable", QUICK)
settings.register_profile("more", QUICK, derandomize=False, max_examples=2000, print_blob=True)
settings.load_profile("repeatable")

# In the background it is ignored, and child processes would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def copy_configs(folder: Path) -> Path:
    """A model repository in `folder` with the project's configs and no model files."""
    ignored = shutil.ignore_patterns("model*.onnx", "model*.pt", ".*")
    return Path(shutil.copytree(ROOT / "model_repository", folder / "model_repository", ignore=ignored))


@pytest.fixture(autouse=True)
def lazy_modules_stay_lazy() -> None:
    """Hypothesis reads `__file__` of each module; SpeechBrain's lazy ones would then import missing packages."""
    for name, module in list(sys.modules.items()):
        if name.startswith("speechbrain"):
            vars(module).setdefault("__file__", None)


@pytest.fixture
def fake() -> Iterator[FakeTriton]:
    with fake_triton() as fake:
        yield fake


@pytest.fixture(scope="session")
def mini() -> checkpoint.Checkpoint:
    return checkpoint.load("mini")


@pytest.fixture(scope="session")
def both_formats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the small trained model, exported by the code under test. Read only."""
    exported = _exported_once()
    folder = copy_configs(tmp_path_factory.mktemp("both"))
    for model in "ecapa", "ecapa_torchscript":
        shutil.copytree(exported / model / "1", folder / model / "1", dirs_exist_ok=True)
    return folder


def _exported_once() -> Path:
    """All test processes share one export, which takes most of a minute, until its sources change."""
    sources = [path for name in ("export", "model_repository") for path in sorted((ROOT / name).rglob("*"))]
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in sources if path.suffix in SOURCES]
    versions = [version(package) for package in ("torch", "onnx", "onnxscript", "onnxruntime", "speechbrain")]
    key = hashlib.sha256("".join([*sums, *versions, sys.version]).encode()).hexdigest()[:16]
    folder = ROOT / "build/tests" / key
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
                export(copy_configs(Path(unfinished)), "mini", formats=["onnx", "torchscript"])
                (Path(unfinished) / "model_repository").rename(folder)
    return folder


@pytest.fixture(scope="session")
def repository(both_formats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the ONNX model alone. Read only."""
    folder = copy_configs(tmp_path_factory.mktemp("repository"))
    shutil.copytree(both_formats / "ecapa/1", folder / "ecapa/1", dirs_exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def server(both_formats: Path) -> Iterator[TritonServer]:
    with TritonServer(both_formats, device="auto") as running:
        yield running


@pytest.fixture(scope="session")
def reference(mini: checkpoint.Checkpoint) -> Callable[[np.ndarray], np.ndarray]:
    """SpeechBrain's embedding [192] of one float32 16 kHz clip alone."""
    compute = Reference(mini.classifier)
    return lambda clip: compute(f"{hash(clip.tobytes())}", np.ascontiguousarray(clip, np.float32))
