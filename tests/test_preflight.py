"""Checks before the start: addresses, ports, device and GPUs, shared memory, the model repository."""

from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import stand_in

from server import ServerError, preflight
from server.options import Device, Tls
from server.preflight import (
    check_repository,
    choose_device,
    choose_gpus,
    choose_ports,
    exposure_warning,
    release_warning,
    resolve,
)
from server.wheel import package_without_cuda


def replace(model: Path, old: str, new: str, name: str = "config.pbtxt") -> None:
    config = model / name
    config.write_text(config.read_text().replace(old, new))


def test_exposure_is_reported(tmp_path: Path) -> None:
    tls = Tls(tmp_path / "cert", tmp_path / "key")
    for address in "0.0.0.0", "192.0.2.1":
        assert address in exposure_warning(address, None, {})
        assert address in exposure_warning(address, None, {"admin": "x" * 20})
        assert address in exposure_warning(address, tls, {})
        assert not exposure_warning(address, None, {"inference": "x" * 20})
        assert not exposure_warning(address, Tls(tls.certificate, tls.key, tmp_path / "clients"), {})
    assert not exposure_warning("127.0.0.2", None, {})


def test_old_releases_are_reported() -> None:
    """NVIDIA's bulletins ask for release 26.07, Triton 2.71."""
    for version in "2.9.0", "2.51.0", "2.70.1":
        assert version in release_warning(version)
    for version in "2.71.0", "2.74.0dev", "3.0.0":
        assert release_warning(version) == ""


def test_little_shared_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ENOUGH_SHM", 0)
    assert preflight.shm_warning() == ""
    monkeypatch.setattr(preflight, "ENOUGH_SHM", 1 << 60)
    assert re.search(r"/dev/shm has \d+ MB", preflight.shm_warning())


def test_names_stand_for_addresses() -> None:
    assert resolve("localhost").startswith("127.")
    for address in "", "::1", "no.such.host.invalid":
        with pytest.raises(ServerError, match=repr(address)):
            resolve(address)


def test_choice_of_ports() -> None:
    chosen = choose_ports(dict.fromkeys(["http", "grpc", "metrics"], ("127.0.0.1", 0)))
    assert len(set(chosen.values())) == 3
    assert choose_ports(chosen) == chosen
    same = ("127.0.0.1", 8000)
    with pytest.raises(ServerError, match="--http-port and --gateway-metrics-port are both 8000"):
        choose_ports({"http": same, "grpc": ("127.0.0.1", 8001), "gateway metrics": same})
    with socket.create_server(("127.0.0.1", 0)) as other:
        for place in ("127.0.0.1", 70000), ("no.such.host.invalid", 0), other.getsockname():
            with pytest.raises(ServerError, match=f"{place[0]} port {place[1]} for http"):
                choose_ports({"http": place})


def test_choice_of_device() -> None:
    devices: tuple[Device, ...] = ("auto", "gpu")
    for device in devices:
        assert choose_device(device, ["A"], "")[::2] == ("GPU", "gpu")
        assert choose_device(device, ["A"], "", "fp16")[::2] == ("GPU", "gpu_fp16")
    assert choose_device("auto", [], "no driver", "fp16")[::2] == choose_device("cpu", ["A"], "")[::2] == ("CPU", "cpu")
    for device in "auto", "cpu":
        assert choose_device(device, ["A"], "", "int8")[::2] == ("CPU", "cpu_int8")
    with pytest.raises(ServerError, match="int8"):
        choose_device("gpu", ["A"], "", "int8")
    with pytest.raises(ServerError, match="no driver"):
        choose_device("gpu", [], "no driver")
    with pytest.raises(ServerError, match="fp16"):
        choose_device("cpu", [], "", "fp16")


def test_choice_of_gpus() -> None:
    assert choose_gpus(["A", "B", "C"], [2, 0]) == ["C", "A"]
    for wrong in [3], [-1], [1, 1]:
        with pytest.raises(ServerError, match=r"0 \(A\), 1 \(B\), 2 \(C\)"):
            choose_gpus(["A", "B", "C"], wrong)


def test_a_package_without_cuda_is_named(both_formats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> SimpleNamespace:
        return SimpleNamespace(origin=str(tmp_path / name / "__init__.py"))

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    models = [both_formats / "ecapa", both_formats / "ecapa_torchscript"]
    for package, library in ("onnxruntime", "capi/libonnxruntime_providers_cuda.so"), ("torch", "lib/libtorch_cuda.so"):
        assert package_without_cuda(models) == package
        (tmp_path / package / library).parent.mkdir(parents=True)
        (tmp_path / package / library).touch()
    assert package_without_cuda(models) == ""


# --- the model repository ---


def test_repository_is_checked_for_the_device(tmp_path: Path) -> None:
    for missing in tmp_path, tmp_path / "nowhere":
        with pytest.raises(ServerError, match=str(missing)):
            check_repository(missing, "cpu")
    stand_in.write(tmp_path / "sums")
    (tmp_path / ".git").mkdir()
    assert check_repository(tmp_path, "cpu") == {"sums": "onnxruntime"}
    (tmp_path / "sums/configs").mkdir()
    (tmp_path / "sums/configs/gpu.pbtxt").write_text('# model.onnx\nbackend: "pytorch"\n')
    assert check_repository(tmp_path, "cpu") == {"sums": "onnxruntime"}
    with pytest.raises(ServerError, match=r"sums/1/model\.pt"):
        check_repository(tmp_path, "gpu")
    (tmp_path / "sums/config.pbtxt").unlink()
    with pytest.raises(ServerError, match=r"sums/config\.pbtxt"):
        check_repository(tmp_path, "cpu")


def test_models_are_those_that_are_named_or_exported(repository: Path) -> None:
    """In this repository the ONNX model alone was exported."""
    assert check_repository(repository, "cpu") == check_repository(repository, "cpu", ["ecapa"])
    for name, fact in ("ecapa_torchscript", r"1/model\.pt"), ("another", "ecapa, ecapa_torchscript"):
        with pytest.raises(ServerError, match=fact):
            check_repository(repository, "cpu", ["ecapa", name])


def test_the_version_that_is_served_is_checked(repository: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(repository / "ecapa", tmp_path / "ecapa"))
    shutil.copytree(model / "1", model / "10")
    shutil.copytree(model / "1", model / "9")
    (model / "\N{SUPERSCRIPT TWO}").mkdir()  # a digit, but no version
    data = bytearray((model / "9/model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (model / "9/model.onnx").write_bytes(data)
    assert check_repository(tmp_path, "cpu") == {"ecapa": "onnxruntime"}
    replace(model, "latest { num_versions: 1 }", "latest { num_versions: 2 }", "configs/cpu.pbtxt")
    with pytest.raises(ServerError, match=r"ecapa/9/model\.onnx"):
        check_repository(tmp_path, "cpu")
    shutil.rmtree(model / "9")
    replace(model, "dims: [ 192 ]", "dims: [ 191 ]", "configs/cpu.pbtxt")
    with pytest.raises(ServerError, match=r"cpu\.pbtxt.*191"):
        check_repository(tmp_path, "cpu")
    assert check_repository(tmp_path, "gpu") == {"ecapa": "onnxruntime"}
    replace(model, 'backend: "onnxruntime"', 'platform: "onnxruntime_onnx"')
    (model / "configs/cpu.pbtxt").unlink()
    with pytest.raises(ServerError, match=r"config\.pbtxt.*backend"):
        check_repository(tmp_path, "cpu")
    replace(model, "torn,", "", "configs/gpu.pbtxt")
    with pytest.raises(ServerError, match=r"gpu\.pbtxt.*required_guards"):
        check_repository(tmp_path, "gpu")
