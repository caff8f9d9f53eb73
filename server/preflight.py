"""Checks before the start: the model repository, device and GPUs, addresses and ports, shared memory, exposure."""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export import configs
from server.options import Device, Keys, Place, Precision, ServerError, Tls

SHM = Path("/dev/shm")
# Bytes. Batches pass through shared memory on their way to a stub, and Triton limits no request. Where a batch does not
# fit, all its clips fail, and the leftover requests delay the server's stop.
ENOUGH_SHM = 1 << 30
SAFE_VERSION = (2, 71)  # release 26.07, which NVIDIA's newest bulletin on Triton asks for (5875 of 2026)


def models_to_serve(repository: Path, names: Sequence[str] | None = None) -> list[Path]:
    """The model folders to serve.

    Args:
        repository: The model repository.
        names: Of the models to serve; None: all that have a model file (or all, if none has one).

    Raises:
        ServerError: There is no such repository or model.
    """
    models = {model.name: model for model in all_models(repository)}
    if not models:
        raise ServerError(f"model repository {repository} has no models: expected a folder {repository}/ecapa")
    if names is None:
        return [model for model in models.values() if _is_exported(model)] or list(models.values())
    if unknown := set(names) - models.keys():
        raise ServerError(
            f"model repository {repository} has no model {', '.join(unknown)}: expected some of {', '.join(models)}"
        )
    return [models[name] for name in sorted(set(names))]


def check_repository(repository: Path, config_name: str, names: Sequence[str] | None = None) -> dict[str, str]:
    """Checks the files that the models' configs name.

    A model of this project is rejected when its file is damaged, was changed since the export, lacks a guard against
    bad input, or disagrees with its config.

    Args:
        repository: The model repository.
        config_name: Of the configs that replace `config.pbtxt` where a model has them: "cpu", for example.
        names: As for `models_to_serve`.

    Returns:
        The backend of each model to serve, by the model's name.
    """
    backends = {}
    for model in models_to_serve(repository, names):
        path = config_path(model, config_name)
        config = read_config(path)
        if config_name == "cpu_int8" and path.stem != config_name and configs.is_ours(config):
            raise ServerError(f"model {model.name} has no int8 file: leave it out with --models, or --precision int8")
        files = _served_files(model, config)
        try:
            for file in files if configs.is_ours(config) else []:
                configs.check(path, configs.ModelFile.read(file), model.name)
        except (configs.ConfigError, configs.ModelFileError) as error:
            raise ServerError(str(error)) from error
        backends[model.name] = str(config.backend)
    return backends


def config_path(model: Path, config_name: str) -> Path:
    """The config that Triton reads of a model folder, with the option `--model-config-name`."""
    for path in model / "configs" / f"{config_name}.pbtxt", model / "config.pbtxt":
        if path.is_file():
            return path
    raise ServerError(f"model {model} has no config: expected {path}")


def read_config(path: Path) -> Any:
    """The config as protobuf message; ServerError if it is none."""
    try:
        return configs.read(path)
    except configs.ConfigError as error:
        raise ServerError(str(error)) from error


def all_models(repository: Path) -> list[Path]:
    """The model folders of a repository."""
    if not repository.is_dir():
        raise ServerError(f"model repository {repository} is not a folder: give its path with --repository")
    return sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))


def _is_exported(model: Path) -> bool:
    """Whether it has a model file; models of other projects are not judged."""
    kind = next((kind for kind in configs.FORMATS.values() if kind.folder == model.name), None)
    return kind is None or any((model / "1" / name).exists() for name in kind.files.values())


def _served_files(model: Path, config: Any) -> list[Path]:
    """The model files that Triton would load, for the backends that are known here."""
    usual = "model.onnx" if configs.is_ours(config) else ""  # a model of this project is not served unchecked
    filename = config.default_model_filename or configs.USUAL_FILES.get(config.backend, usual)
    if not filename:
        return []
    versions = sorted(int(path.name) for path in model.iterdir() if re.fullmatch("[1-9][0-9]*", path.name))
    if config.version_policy.WhichOneof("policy_choice") in (None, "latest"):
        versions = versions[-(config.version_policy.latest.num_versions or 1) :]
    files = [file for version in versions if (file := model / str(version) / filename).exists()]
    if not files:
        missing = model / str(versions[-1] if versions else 1) / filename
        kinds = [name for name, kind in configs.FORMATS.items() if kind.backend == config.backend]
        raise ServerError(
            f"{missing} is missing: write it with `python -m export --format {kinds[0] if kinds else 'all'}`"
        )
    return files


def cuda_gpus() -> tuple[list[str], str]:
    """Asks the CUDA driver, which also obeys CUDA_VISIBLE_DEVICES.

    Returns:
        The names of the usable GPUs and, if there are none, the reason.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return [], "no NVIDIA driver (libcuda.so.1) was found"
    if code := cuda.cuInit(0):
        return [], f"the NVIDIA driver finds no usable GPU (cuInit returned {code})"
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    names = []
    for index in range(count.value):
        name = ctypes.create_string_buffer(100)
        cuda.cuDeviceGetName(name, len(name), index)
        names.append(name.value.decode())
    return names, "" if names else "the NVIDIA driver shows no GPU"


def choose_gpus(names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    """The names of the GPUs with these numbers.

    Raises:
        ServerError: A number is not that of a GPU, or is given twice.
    """
    if not set(numbers) <= set(range(len(names))) or len(set(numbers)) < len(numbers):
        available = ", ".join(f"{number} ({name})" for number, name in enumerate(names))
        raise ServerError(f"gpus {','.join(map(str, numbers))}: expected different numbers of {available}")
    return [names[number] for number in numbers]


def choose_device(
    device: Device, gpus: Sequence[str], no_gpu: str, precision: Precision = "fp32"
) -> tuple[str, str, str]:
    """Chooses between the configs for CPU and GPU.

    Args:
        device: The option.
        gpus: Names of the usable GPUs.
        no_gpu: Why there are none.
        precision: Of the models: fp16 on a GPU, int8 on a CPU, fp32 on both.

    Returns:
        "CPU" or "GPU", the choice and its reason in words, and the name of the configs.
    """
    if device == "cpu" and precision == "fp16":
        raise ServerError("precision fp16 is for GPUs, on a CPU it only costs accuracy: use --precision fp32")
    if device == "gpu" and precision == "int8":
        raise ServerError("precision int8 is for CPUs: use --precision fp16 or fp32")
    in_int8 = ", in int8" if precision == "int8" else ""
    config = "cpu_int8" if in_int8 else "cpu"
    if device == "cpu":
        return "CPU", f"CPU, as requested{in_int8}", config
    if gpus and precision == "int8":
        return "CPU", "CPU, since precision int8 is for CPUs, in int8", config
    if gpus:
        half = precision == "fp16"
        chosen = f"GPU{', as requested' if device == 'gpu' else ''}: {', '.join(gpus)}{', in float16' if half else ''}"
        return "GPU", chosen, "gpu_fp16" if half else "gpu"
    if device == "gpu":
        raise ServerError(f"device gpu: {no_gpu}; use --device cpu, or auto for a GPU where there is one")
    return "CPU", f"CPU{', in float32' if precision == 'fp16' else in_int8}: {no_gpu}", config


def gpu_environment(device: str, gpus: Sequence[int] | None) -> dict[str, str]:
    """Environment variables that give a process its GPUs, by number among the visible ones; None: all of them."""
    if device == "CPU":
        return {"CUDA_VISIBLE_DEVICES": ""}  # else Triton takes some memory of every GPU
    # For backends without a setting in the config: TF32 keeps 10 of 23 bits, too few for the promised accuracy.
    variables = {"NVIDIA_TF32_OVERRIDE": os.environ.get("NVIDIA_TF32_OVERRIDE", "0")}
    if gpus is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        names = visible.split(",") if visible else list(map(str, range(max(gpus) + 1)))
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(names[number] for number in gpus)
    return variables


def resolve(address: str) -> str:
    """Finds the IPv4 address of a name; Triton's HTTP server accepts no names."""
    try:
        return str(socket.getaddrinfo(address or "(none)", None, socket.AF_INET)[0][4][0])
    except (OSError, UnicodeError) as error:
        raise ServerError(
            f"address {address!r} cannot be used ({error}): "
            "give an IPv4 address of this machine, such as 127.0.0.1, or 0.0.0.0 for all"
        ) from error


def option(api: str) -> str:
    """Name of the launcher's option for the port of an API."""
    return f"{api.replace(' ', '-')}-port"


def choose_ports(wanted: Mapping[str, Place]) -> dict[str, Place]:
    """Checks that a server can listen on each address and port, and finds a free port for each that is 0."""
    chosen: dict[str, Place] = {}
    for place in wanted.values():
        if place[1] and (same := [f"--{option(other)}" for other in wanted if wanted[other] == place])[1:]:
            raise ServerError(f"{' and '.join(same)} are both {place[1]}: choose different ports")
    with contextlib.ExitStack() as stack:  # all stay open until the end, so that no port is chosen twice
        for api, place in wanted.items():
            try:
                listener = stack.enter_context(socket.create_server(place))
            except (OSError, OverflowError) as error:
                raise ServerError(
                    f"cannot listen on {place[0]} port {place[1]} for {api}: {error}; "
                    f"choose another with --{option(api)} (0: any free port) or --address"
                ) from error
            chosen[api] = (place[0], listener.getsockname()[1])
    return chosen


def shm_warning() -> str:
    """A warning where shared memory is short; empty where there is enough."""
    free = shutil.disk_usage(SHM).free
    if free >= ENOUGH_SHM:
        return ""
    return (
        f"{SHM} has {free / 1e6:.0f} MB free, so large requests and the clips in their batches will fail: "
        f"give it {ENOUGH_SHM >> 30} GB or more (docker run --shm-size={ENOUGH_SHM >> 30}g)"
    )


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches the IPv4 address."""
    return ipaddress.IPv4Address(address).is_loopback


def check_unguarded(address: str) -> None:
    """Raises ServerError when the wheel's tritonserver, with no gateway in front, would serve other machines."""
    if not is_loopback(address):
        raise ServerError(
            f"address {address} without the gateway: the Triton of nvidia-pytriton has known vulnerabilities, so it "
            "serves 127.0.0.1 only; install nginx (apt install nginx-light), leave out --gateway off, or use NVIDIA's "
            "image"
        )


def release_warning(version: str) -> str:
    """A warning where this version of Triton is older than NVIDIA asks for; else empty."""
    if tuple(map(int, version.split(".")[:2])) >= SAFE_VERSION:
        return ""
    return (
        f"Triton {version} has known vulnerabilities, fixed in {SAFE_VERSION[0]}.{SAFE_VERSION[1]} (release 26.07): "
        "use NVIDIA's image of that release or a newer one (TRITON_TAG)"
    )


def exposure_warning(address: str, tls: Tls | None, keys: Keys) -> str:
    """A warning where other machines get embeddings without a key or a certificate; else empty."""
    if "inference" in keys or (tls and tls.client_ca) or is_loopback(address):
        return ""
    return (
        f"every host that reaches {address} is served{'' if tls else ', unencrypted'}: require a key "
        "(--key-file inference=FILE) or client certificates (--tls-client-ca)"
    )
