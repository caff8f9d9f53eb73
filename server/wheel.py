"""Finds the tritonserver to run: an installed one with its own backends, or else the one in the wheel nvidia-pytriton.

The wheel lacks the C++ backends; the stand-in backends in `server/backends` take their place.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from export import seal
from server.options import ServerError
from server.preflight import read_config

BACKENDS = Path(__file__).parent / "backends"
_INSTALLED = "/opt/tritonserver/bin/tritonserver"
# The package that each stand-in backend runs on, and the library that a package built for CUDA has.
_PACKAGES = {"onnxruntime": "onnxruntime", "pytorch": "torch"}
_CUDA_LIBRARIES = {"onnxruntime": "capi/libonnxruntime_providers_cuda.so", "torch": "lib/libtorch_cuda.so"}


def find_installed() -> Path | None:
    """Finds a tritonserver with its own ONNX Runtime backend, as in NVIDIA's container image."""
    for binary in filter(None, (shutil.which("tritonserver"), _INSTALLED)):
        if (Path(binary).resolve().parents[1] / "backends/onnxruntime/libtriton_onnxruntime.so").exists():
            return Path(binary)
    return None


def assemble(folder: Path, environment: dict[str, str]) -> tuple[Path, Path]:
    """Makes a backend directory of the wheel's Python backend and the stand-in backends.

    Args:
        folder: Where to make it.
        environment: The server's environment variables, completed in place.

    Returns:
        The tritonserver binary and the backend directory.
    """
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise ServerError(
            "tritonserver is not installed: pip install -e '.[server]' with Python 3.10 to 3.12, or use NVIDIA's "
            "Triton container"
        )
    wheel = Path(spec.origin).parent / "tritonserver"
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = wheel / "python_backend_stubs" / python / "triton_python_backend_stub"
    if not stub.exists():
        versions = ", ".join(path.name for path in stub.parents[1].iterdir())
        raise ServerError(f"nvidia-pytriton has no stub for Python {python}: use one of {versions}")
    backends = folder / "backends"
    # Copies, since Triton rejects a library that links out of its backend directory.
    shutil.copytree(wheel / "backends", backends)
    shutil.copy2(stub, backends / "python")
    shutil.copytree(BACKENDS, backends, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    # Stubs ignore PYTHONPATH and import from here.
    modules = backends / "python" / "export"
    modules.mkdir()
    (modules / "__init__.py").touch()
    shutil.copy2(seal.__file__, modules)

    # The stub links to libpython, embeds it, and finds this environment by the first python3 on PATH.
    libraries = [str(wheel.parents[1] / "nvidia_pytriton.libs"), *_libpython_folder(python)]
    for variable, folders in ("LD_LIBRARY_PATH", libraries), ("PATH", [str(Path(sys.executable).parent)]):
        environment[variable] = os.pathsep.join(filter(None, [*folders, environment.get(variable)]))
    environment.setdefault("OPENBLAS_NUM_THREADS", "1")  # stubs do no linear algebra in numpy
    return wheel / "bin/tritonserver", backends


def check_packages(backends: Iterable[str]) -> None:
    """Raises ServerError when a stand-in backend's package is not installed."""
    for package in sorted(_PACKAGES[backend] for backend in set(backends) & set(_PACKAGES)):
        if importlib.util.find_spec(package) is None:
            raise ServerError(f"{package} is not installed: pip install {package}")


def package_without_cuda(models: Iterable[Path]) -> str:
    """The first installed package that one of these model folders needs and that has no CUDA; empty if all have."""
    for model in models:
        package = _PACKAGES.get(read_config(model / "config.pbtxt").backend)
        spec = importlib.util.find_spec(package) if package else None  # not imported: it would stay in memory
        if package and spec and spec.origin and not (Path(spec.origin).parent / _CUDA_LIBRARIES[package]).exists():
            return package
    return ""


def _libpython_folder(python: str) -> list[str]:
    name = f"libpython{python}.so.1.0"
    for folder in str(sysconfig.get_config_var("LIBDIR")), f"{sys.base_prefix}/lib":
        if Path(folder, name).exists():
            return [folder]
    if ctypes.util.find_library(f"python{python}"):  # the system's loader finds it
        return []
    raise ServerError(f"Triton's Python stub needs {name}, which is missing: apt install libpython{python}")
