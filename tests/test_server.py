"""The launcher and TritonServer: start, failures to start, supervision, and a stop without leftovers."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import stand_in
from launcher import launched, wait_until
from tritonclient.utils import InferenceServerException

from export import seal
from server import ServerError, TritonServer, __main__, child, gateway, preflight
from server.options import Limits, Tls
from server.preflight import check_repository, choose_device, choose_gpus, choose_ports, exposure_warning, resolve
from server.wheel import assemble_wheel, find_installed, package_without_cuda

CLIP = np.ones((1, 10), np.float32)
needs_nginx = pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed")
needs_wheel = pytest.mark.skipif(find_installed() is not None, reason="an installed tritonserver is used instead")


@pytest.fixture
def sums(tmp_path: Path) -> Path:
    """A repository with the stand-in model."""
    stand_in.write(tmp_path / "repository/sums")
    return tmp_path / "repository"


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No process, no temporary folder and no shared memory segment, whatever the test did."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = unused_segments()
    yield
    assert processes(tmp_path) == {}
    assert list(tmp_path.glob("ecapa-triton-*")) == []
    assert unused_segments() - before == set()


def processes(folder: Path) -> dict[str, int]:
    """The binary and id of each process that names the folder: launcher, tritonserver, stubs and nginx."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        arguments = process.info["cmdline"] or []
        if any(str(folder) in argument for argument in arguments):
            found[Path(arguments[0].split()[0].strip(":")).name] = process.pid
    return found


def unused_segments() -> set[str]:
    """Segments that no process maps; servers of other tests may run at the same time."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            used |= set(re.findall(r"/dev/shm/(ecapa-triton-\S+)", maps.read_text()))
        except OSError:
            continue
    return {path.name for path in Path("/dev/shm").glob("ecapa-triton-*")} - used


def refused(where: str, port: int) -> bool:
    try:
        socket.create_connection((where, port), timeout=5).close()
    except ConnectionRefusedError:
        return True
    return False


def assert_named_log(error: str) -> None:
    """The log that a message names exists, and nothing else was kept. Removes it."""
    match = re.search(r"its log: ([^;\n]+)", error)
    assert match, error
    log = Path(match[1])
    assert log.stat().st_size > 0
    log.unlink()
    log.parent.rmdir()


def replace(model: Path, old: str, new: str, name: str = "config.pbtxt") -> None:
    config = model / name
    config.write_text(config.read_text().replace(old, new))


# --- start ---


def test_in_code(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # nothing depends on the working directory
    log = tmp_path / "triton.log"
    with TritonServer(sums, device="cpu", log=log) as server:
        assert (server.device, server.models) == ("CPU", ["sums"])
        assert re.fullmatch(r"2\.\d+\.\d+", server.version)
        assert stand_in.ask(server.grpc_url, CLIP)[0, 0] == 10
        assert urlopen(f"http://{server.http_url}/v2/models/sums/ready").status == 200
        counted = re.compile(r'nv_inference_count\{model="sums",version="1"\} 1\n')  # counted just after the reply
        wait_until(lambda: counted.search(urlopen(server.metrics_url).read().decode()))
        assert "nv_inference_request_summary_us" in urlopen(server.metrics_url).read().decode()
        used = server.memory()
        assert used["tritonserver"] > 10e6 and (used["model"] > 10e6) == (used["shared"] > 0)
        assert sum(used.values()) < 500e6
        assert log.stat().st_size > 0
        assert server.stop()
    assert server.stop()  # once more does no harm


@needs_wheel
def test_in_a_container(sums: Path, tmp_path: Path) -> None:
    """NVIDIA's layout, with a script for a binary that notes its options and runs the wheel's; flags of compose."""
    stand_in.write(sums / "other")
    environment = dict(os.environ)
    (tmp_path / "wheel").mkdir()
    binary, backends = assemble_wheel(tmp_path / "wheel", environment)
    script = tmp_path / "opt/bin/tritonserver"
    script.parent.mkdir(parents=True)
    script.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$@" > {tmp_path}/options
export LD_LIBRARY_PATH={environment["LD_LIBRARY_PATH"]} PATH={environment["PATH"]}
exec {binary} "$@" --backend-directory={backends} --backend-config=python,shm-region-prefix-name={tmp_path.name}-
"""
    )
    script.chmod(0o755)
    marker = tmp_path / "opt/backends/onnxruntime/libtriton_onnxruntime.so"
    marker.parent.mkdir(parents=True)
    marker.touch()
    flags = [
        "--models=sums",
        "--threads=3",
        "--gateway=external",
        "--no-restart",
        "--log=-",
        "--metrics-address=0.0.0.0",
    ]
    flags += ["--address=0.0.0.0", "--key-env=inference,metadata=KEY", "--key-env=statistics,admin=NONE"]
    variables = {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "KEY": "k" * 16, "NONE": ""}
    with launched(sums, *flags, environment=variables) as launcher:
        options = (tmp_path / "options").read_text().splitlines()
        assert {"--model-config-name=cpu", f"--backend-directory={tmp_path}/opt/backends"} <= set(options)
        keys = dict(re.findall(r"--http-restricted-api=([\w-]+):api-key=(\S+)", "\n".join(options)))
        assert keys.pop("inference") == keys.pop("metadata") == "k" * 16
        assert keys.keys() == {"shared-memory", "model-repository", "trace", "logging"}
        assert all(len(key) >= 32 for key in keys.values())  # nobody knows it
        assert urlopen(f"http://{launcher.urls[1]}/v2/models/sums/ready").status == 200
        with pytest.raises(OSError, match="400"):
            urlopen(f"http://{launcher.urls[1]}/v2/models/other/ready")
        config = json.load(urlopen(f"http://{launcher.urls[1]}/v2/models/sums/config"))
        assert config["parameters"]["intra_op_thread_count"]["string_value"] == "3"
        assert len(launcher.output) > 10  # Triton's log
        os.kill(processes(tmp_path)["tritonserver"], signal.SIGKILL)
        assert launcher.process.wait(20) == 1  # the container's supervisor restarts it
        (error,) = launcher.errors()  # and no warning
        assert "SIGKILL" in error
    for segment in Path("/dev/shm").glob(f"{tmp_path.name}-*"):
        segment.unlink()


def test_listens_on_the_given_address_only(sums: Path) -> None:
    with TritonServer(sums, device="cpu", address="127.0.0.2", metrics_address="127.0.0.3") as server:
        metrics = server.metrics_url.split("/")[2]
        for url in server.http_url, server.grpc_url, metrics:
            host, port = url.split(":")
            assert host == ("127.0.0.3" if url == metrics else "127.0.0.2")
            assert not refused(host, int(port)) and refused("127.0.0.1", int(port))


def test_another_servers_reply_is_not_mistaken_for_ours(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that start at once both find the ports free."""
    with TritonServer(sums, device="cpu") as first:
        ports = {"http": first.http_url, "grpc": first.grpc_url, "metrics": first.metrics_url.split("/")[2]}
        taken = {api: ("127.0.0.1", int(url.rpartition(":")[2])) for api, url in ports.items()}
        chosen = [taken, taken, taken]
        monkeypatch.setattr("server.triton.choose_ports", lambda wanted: chosen.pop(0))
        with pytest.raises(ServerError) as info:
            TritonServer(sums, device="cpu").start()
        assert not chosen
        assert_named_log(str(info.value))
        chosen = [taken, choose_ports(dict.fromkeys(ports, ("127.0.0.1", 0)))]
        with TritonServer(sums, device="cpu") as second:
            assert second.grpc_url not in ("", first.grpc_url)


def test_options_for_tritonserver(sums: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with TritonServer(sums, device="cpu", log=log, extra=["--id=from-a-test"]):
        assert "from-a-test" in log.read_text()
    with pytest.raises(ServerError, match=f"'--no-such-option'; its log: {log}"):
        TritonServer(sums, device="cpu", log=log, extra=["--no-such-option"]).start()
    os.mkfifo(tmp_path / "fifo")
    for path in tmp_path / "nowhere/log", tmp_path / "fifo":  # a pipe without a reader
        with pytest.raises(ServerError, match=str(path)):
            TritonServer(sums, device="cpu", log=path).start()


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1, 0, 1e300])
def test_timeouts_are_checked(sums: Path, seconds: float) -> None:
    for name in "start_timeout", "exit_timeout":
        with pytest.raises(ServerError, match="86400"):
            TritonServer(sums, device="cpu", **{name: seconds}).start()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "option", ["--max-requests=0", "--max-request-mb=x", "--gpus=0,", "--max-requests=²", "--models=a,,b"]
)
def test_options_are_checked(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        __main__.main([option])
    message = capsys.readouterr().err
    assert all(part in message for part in option.split("="))


# --- stop and supervision ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_requests_finish(tmp_path: Path, number: int) -> None:
    stand_in.write(tmp_path / "repository/sums", delay=4_000_000)  # each request waits in the queue
    with launched(tmp_path / "repository") as launcher, ThreadPoolExecutor(3) as pool:
        grpc, _, metrics = launcher.urls
        replies = [pool.submit(stand_in.ask, grpc, np.full((1, n), 2, np.float32)) for n in (3, 4, 5)]
        pending = re.compile(r'nv_inference_pending_request_count\{model="sums",version="1"\} 3\n')
        wait_until(lambda: pending.search(urlopen(metrics).read().decode()))
        launcher.process.send_signal(number)
        assert [reply.result()[0, 0] for reply in replies] == [6, 8, 10]
        assert launcher.process.wait(20) == 0


def test_stops_without_a_reader_of_its_output(sums: Path) -> None:
    with launched(sums) as launcher:
        assert launcher.process.stdout is not None
        launcher.process.stdout.close()
        launcher.process.terminate()
        launcher.process.wait(20)


def test_exit_timeout_ends_in_a_kill(sums: Path) -> None:
    with launched(sums, "--exit-timeout=0.1") as launcher:
        launcher.process.terminate()
        assert launcher.process.wait(20) == 1
        assert_named_log(launcher.errors()[-1])


def test_a_killed_launcher_takes_its_server_along(sums: Path, tmp_path: Path) -> None:
    with launched(sums) as launcher:
        launcher.process.kill()
    wait_until(lambda: not processes(tmp_path))
    (stale,) = tmp_path.glob("ecapa-triton-*")
    with launched(sums):
        (running,) = set(tmp_path.glob("ecapa-triton-*")) - {stale}
        for folder in stale, running:
            os.utime(folder / "lock", (0, 0))
        with launched(sums):  # the next server removes the folder
            assert running.exists() and not stale.exists()


def test_a_hangup_that_is_ignored_stays_so(sums: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launched(sums) as launcher:
            launcher.process.send_signal(signal.SIGHUP)
            assert stand_in.ask(launcher.urls[0], CLIP)[0, 0] == 10
            assert launcher.process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


@needs_wheel
def test_a_dead_server_is_restarted(sums: Path, tmp_path: Path) -> None:
    model = sums / "sums/1/model.onnx"
    with launched(sums) as launcher:
        urls = launcher.urls

        def kill(binary: str) -> str:
            os.kill(processes(tmp_path)[binary], signal.SIGKILL)
            assert launcher.process.stderr is not None
            error = launcher.process.stderr.readline()
            assert_named_log(error)
            return error

        def assert_restarted() -> None:
            launcher.wait_until_ready()
            assert launcher.urls == urls  # on the same ports
            assert stand_in.ask(urls[0], CLIP)[0, 0] == 10

        assert "SIGKILL" in kill("tritonserver")
        assert_restarted()
        assert re.search(r"process \d+", kill("triton_python_backend_stub"))
        assert_restarted()
        moved = model.rename(model.with_name("moved"))
        kill("tritonserver")
        assert launcher.process.stderr is not None and str(model) in launcher.process.stderr.readline()
        moved.rename(model)  # a start that fails is tried again
        assert_restarted()
        launcher.process.terminate()
        assert launcher.process.wait(20) == 0


def test_no_fork_of_a_process_with_threads(sums: Path) -> None:
    """A fork stops gRPC's threads: a server or client of it in this process would hang."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    with TritonServer(sums, device="cpu") as server:
        assert stand_in.ask(server.grpc_url, CLIP)[0, 0] == 10
    assert not forks


def test_a_child_has_default_signals_and_many_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with (tmp_path / "log").open("wb") as log:
            assert child.start(["/bin/cat", "/proc/self/status", "/proc/self/limits"], log).wait(20) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    text = (tmp_path / "log").read_text()
    ignored = re.search(r"SigIgn:\s(\w+)\n", text)
    assert ignored and int(ignored[1], 16) & ~(0b11 << 31) == 0  # 32 and 33 are glibc's own
    assert re.search(rf"Max open files\s+{min(hard, 65536) if hard >= 0 else 65536}\s", text)


@pytest.mark.parametrize("mode, error", [(None, FileNotFoundError), (0o644, PermissionError), (0o755, None)])
def test_a_child_that_cannot_run(mode: int | None, error: type[OSError] | None, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    if mode is not None:
        binary.write_bytes(b"")
        binary.chmod(mode)
    with (tmp_path / "log").open("wb") as log:
        if error is not None:
            with pytest.raises(error):
                child.start([str(binary)], log)
        else:  # not a program
            assert child.start([str(binary)], log).wait(20) == 1
            assert str(binary) in (tmp_path / "log").read_text()


# --- gateway ---


@needs_nginx
def test_gateway(sums: Path, tmp_path: Path) -> None:
    """Both APIs are behind it, Triton listens on the loopback address, and nothing of a killed nginx is left."""
    with TritonServer(sums, device="cpu", address="127.0.0.2", limits=Limits(requests=1, request_mb=1)) as server:
        for url in server.http_url, server.grpc_url:
            port = int(url.partition(":")[2])
            assert not refused("127.0.0.2", port) and refused("127.0.0.1", port)
        assert stand_in.ask(server.grpc_url, CLIP)[0, 0] == 10
        with pytest.raises(InferenceServerException, match="RESOURCE_EXHAUSTED.* 1 MB"):
            stand_in.ask(server.grpc_url, np.ones((1, 1 << 18), np.float32))
        assert urlopen(f"http://{server.http_url}/v2/models/sums/ready").status == 200
        nginx = processes(tmp_path)["nginx"]
        workers = psutil.Process(nginx).children()
        os.kill(nginx, signal.SIGKILL)
        with pytest.raises(ServerError, match="nginx.*SIGKILL"):
            server.wait()
    assert workers and not psutil.wait_procs(workers, 20)[1]


def test_gateway_is_optional(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with launched(sums, program=["-c", WITHOUT_NGINX]) as launcher:
        assert stand_in.ask(launcher.urls[0], CLIP)[0, 0] == 10
        launcher.process.terminate()
        assert launcher.process.wait(20) == 0
        assert any(line.startswith("warning") and "nginx" in line for line in launcher.errors())
    monkeypatch.setattr(gateway, "PLACES", ["no-such-nginx"])
    with pytest.raises(ServerError, match="nginx-light"):
        TritonServer(sums, device="cpu", limits=Limits(1, 1)).start()


WITHOUT_NGINX = """
import sys
from server import __main__, gateway
gateway.PLACES = ["no-such-nginx"]
sys.exit(__main__.main(sys.argv[1:]))
"""


@needs_nginx
def test_gateway_that_does_not_start(sums: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tls, nginx = gateway.TEMPLATES
    template = tmp_path / nginx.name
    template.write_text(nginx.read_text() + "nonsense;")
    monkeypatch.setattr(gateway, "TEMPLATES", [tls, template])
    with pytest.raises(ServerError, match='"nonsense"'):
        TritonServer(sums, device="cpu", limits=Limits(1, 1)).start()


# --- checks before the start ---


def test_exposure_is_reported(tmp_path: Path) -> None:
    tls = Tls(tmp_path / "cert", tmp_path / "key")
    for address in "0.0.0.0", "192.0.2.1":
        assert address in exposure_warning(address, None, {})
        assert not exposure_warning(address, None, {"inference": "x" * 20}) and not exposure_warning(address, tls, {})
    assert not exposure_warning("127.0.0.2", None, {})


def test_little_shared_memory_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ENOUGH_SHM", 0)
    assert preflight.shm_warning() == ""
    monkeypatch.setattr(preflight, "ENOUGH_SHM", 1 << 60)
    assert re.search(r"/dev/shm has \d+ MB", preflight.shm_warning())
    monkeypatch.setattr(preflight, "SHM", Path("/dev/nowhere"))
    assert "/dev/nowhere" in preflight.shm_warning()


def test_names_stand_for_addresses() -> None:
    assert resolve("localhost").startswith("127.")
    for address in "", "::1", "no.such.host.invalid":
        with pytest.raises(ServerError, match=repr(address)):
            resolve(address)


def test_choice_of_ports() -> None:
    chosen = choose_ports(dict.fromkeys(["http", "grpc", "metrics"], ("127.0.0.1", 0)))
    assert len(set(chosen.values())) == 3
    assert choose_ports(chosen) == chosen
    with socket.create_server(("127.0.0.1", 0)) as other:
        for place in ("127.0.0.1", 70000), ("no.such.host.invalid", 0), other.getsockname():
            with pytest.raises(ServerError, match=f"{place[0]} port {place[1]} for http"):
                choose_ports({"http": place})


@pytest.mark.parametrize(
    ("device", "precision", "gpus", "chosen", "configs"),
    [
        ("auto", "fp32", ["NVIDIA L4"], "GPU", "gpu"),
        ("auto", "fp16", ["NVIDIA L4"], "GPU", "gpu_fp16"),
        ("auto", "fp32", [], "CPU", "cpu"),
        ("auto", "fp16", [], "CPU", "cpu"),
        ("cpu", "fp32", ["NVIDIA L4"], "CPU", "cpu"),
        ("gpu", "fp32", ["A", "B"], "GPU", "gpu"),
        ("gpu", "fp32", [], None, ""),
        ("cpu", "fp16", [], None, ""),
    ],
)
def test_choice_of_device(device: str, precision: str, gpus: list[str], chosen: str | None, configs: str) -> None:
    if chosen is None:
        with pytest.raises(ServerError, match=precision if device == "cpu" else "no driver"):
            choose_device(device, gpus, "no driver", precision)  # type: ignore[arg-type]
        return
    found, words, name = choose_device(device, gpus, "no driver", precision)  # type: ignore[arg-type]
    assert (found, name) == (chosen, configs)
    assert all(gpu in words for gpu in gpus) or chosen == "CPU"


def test_choice_of_gpus() -> None:
    assert choose_gpus(["A", "B", "C"], [2, 0]) == ["C", "A"]
    for wrong in [3], [-1], [1, 1]:
        with pytest.raises(ServerError, match=r"0 \(A\), 1 \(B\), 2 \(C\)"):
            choose_gpus(["A", "B", "C"], wrong)


@pytest.mark.parametrize(("visible", "expected"), [("", "1,0"), ("4,GPU-abc", "GPU-abc,4")])
def test_gpus_are_those_that_are_visible(
    sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str, expected: str
) -> None:
    """Environment and options of a tritonserver on two GPUs; a script stands in for it."""
    seen = tmp_path / "seen"
    binary = tmp_path / "tritonserver/bin/tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $NVIDIA_TF32_OVERRIDE $@" > {seen}\nexit 1\n')
    binary.chmod(0o755)
    monkeypatch.setattr("server.triton.find_installed", lambda: binary)
    monkeypatch.setattr("server.triton.cuda_gpus", lambda: (["A", "B"], ""))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    server = TritonServer(sums, device="gpu", gpus=[1, 0], precision="fp16", log=tmp_path / "log")
    with pytest.raises(ServerError):
        server.start()
    assert "B, A" in server.chosen
    assert seen.read_text().startswith(f"{expected} 0 --") and "--model-config-name=gpu_fp16 " in seen.read_text()


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
    flip_a_bit(model / "9/model.onnx")
    assert check_repository(tmp_path, "cpu") == {"ecapa": "onnxruntime"}
    replace(model, "latest { num_versions: 1 }", "latest { num_versions: 2 }", "configs/cpu.pbtxt")
    with pytest.raises(ServerError, match=r"ecapa/9/model\.onnx"):
        check_repository(tmp_path, "cpu")
    shutil.rmtree(model / "9")
    replace(model, "dims: [ 192 ]", "dims: [ 191 ]", "configs/cpu.pbtxt")
    with pytest.raises(ServerError, match=r"cpu\.pbtxt line \d+: .*191"):
        check_repository(tmp_path, "cpu")
    assert check_repository(tmp_path, "gpu") == {"ecapa": "onnxruntime"}
    replace(model, 'backend: "onnxruntime"', 'platform: "onnxruntime_onnx"')
    (model / "configs/cpu.pbtxt").unlink()
    with pytest.raises(ServerError, match=r"config\.pbtxt .*backend"):
        check_repository(tmp_path, "cpu")
    replace(model, "torn,", "", "configs/gpu.pbtxt")
    with pytest.raises(ServerError, match=r"gpu\.pbtxt line \d+: .*required_guards"):
        check_repository(tmp_path, "gpu")


def guarded(model: Path) -> None:
    with (model / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "required_guards" value: { string_value: "torn,empty" } }')


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def sealed(model: Path) -> Path:
    guarded(model)
    seal.seal(model / "1/model.onnx")
    return model / "1/model.onnx"


@needs_wheel
@pytest.mark.parametrize(
    ("damage", "facts"),
    [
        (lambda model: (model / "1/model.onnx").write_bytes(b"no model"), "1/model.onnx"),
        (lambda model: replace(model, "dims", "dimensions"), "config.pbtxt"),
        (lambda model: replace(model, "ITEM_SHAPE", "ELEMENT_COUNT"), "BATCH_ITEM_SHAPE"),
        (
            lambda model: replace(
                model, '"length" data_type: TYPE_FP32 dims: [ 1', '"length" data_type: TYPE_FP32 dims: [ 2'
            ),
            "length [2] [1]",
        ),
        (
            lambda model: replace(model, '"sum" data_type: TYPE_FP32', '"sum" data_type: TYPE_FP64'),
            "sum TYPE_FP64 tensor(float)",
        ),
        (lambda model: replace(model, '"scale"', '"gain"'), "gain clip, scale, samples"),
        (lambda model: replace(model, 'input { name: "scale" data_type: TYPE_FP32 dims: [ 1 ] }', ""), "scale"),
        (guarded, "1/model.onnx checksum"),
        (sealed, "1/model.onnx empty, torn"),
        (lambda model: flip_a_bit(sealed(model)), "1/model.onnx checksum"),
    ],
)
def test_model_that_does_not_load(sums: Path, damage: object, facts: str) -> None:
    assert callable(damage)
    damage(sums / "sums")
    with pytest.raises(ServerError) as info:
        TritonServer(sums, device="cpu").start()
    message = str(info.value)
    assert_named_log(message)
    assert "\n" not in message and "model sums" in message
    assert all(fact in message for fact in facts.split(" ")), message
