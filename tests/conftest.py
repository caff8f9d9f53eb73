"""What the tests share: the small trained model, exported once, served once, and SpeechBrain's word on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from export import checkpoint
from export.__main__ import export
from export.verify import Reference
from server.triton import TritonServer

ROOT = Path(__file__).parent.parent


def copy_configs(folder: Path) -> Path:
    """A model repository in `folder` with the project's configs and no model files."""
    ignored = shutil.ignore_patterns("model.onnx", "model*.pt", ".*")
    return Path(shutil.copytree(ROOT / "model_repository", folder / "model_repository", ignore=ignored))


@pytest.fixture(scope="session")
def mini() -> checkpoint.Checkpoint:
    return checkpoint.load("mini")


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository with the small trained model, exported by the code under test. Not to be changed."""
    folder = copy_configs(tmp_path_factory.mktemp("repository"))
    export(folder, "mini")
    return folder


@pytest.fixture(scope="session")
def server(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository, device="auto") as running:
        yield running


@pytest.fixture(scope="session")
def reference(mini: checkpoint.Checkpoint) -> Callable[[np.ndarray], np.ndarray]:
    """SpeechBrain's embedding [192] of one float32 16 kHz clip alone."""
    compute = Reference(mini.classifier)
    return lambda clip: compute(f"{hash(clip.tobytes())}", np.ascontiguousarray(clip, np.float32))
