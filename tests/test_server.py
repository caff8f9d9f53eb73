"""`python -m server` and TritonServer: starting, refusing to start and stopping without a trace."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from urllib.request import urlopen

import numpy as np
import pytest
import stand_in
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from export import seal
from server import ServerError, TritonServer, child, gateway
from server.triton import (
    _cannot_use_cuda,
    assemble_wheel,
    check_repository,
    choose_device,
    choose_gpus,
    choose_ports,
    cuda_gpus,
    exposure_warning,
    failure_reason,
    find_installed,
    shm_warning,
)

ROOT = Path(__file__).parent.parent
FREE_PORTS = ["--http-port=0", "--grpc-port=0", "--metrics-port=0"]


@pytest.fixture
def stand_in_repository(tmp_path: Path) -> Path:
    # Each request waits for company, so that one can be caught in flight.
    stand_in.write(tmp_path / "repository" / "sums", delay=1_500_000)
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


def processes(folder: Path) -> dict[int, str]:
    """The processes that name the folder: tritonserver its repository, a stub its model and its backend."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
        if str(folder) in command:
            found[int(process.name)] = command
    return found


def unused_segments() -> set[str]:
    """Segments that no process maps: those of a server that runs beside this test are in use."""
    used = set()
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            used |= set(re.findall(r"/dev/shm/(ecapa-triton-\S+)", maps.read_text()))
        except OSError:
            continue
    return {path.name for path in Path("/dev/shm").glob("ecapa-triton-*")} - used


def run(*options: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "server", *map(str, options)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@contextmanager
def serving(repository: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command in the background, and its line that says ready."""
    command = [sys.executable, "-m", "server", f"--repository={repository}", "--device=cpu", *FREE_PORTS, *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            ready = next((line for line in process.stdout if line.startswith("ready")), "")
            assert ready, process.stderr and process.stderr.read()
            yield process, ready
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(20)  # while its standard output is open


def grpc_url(ready: str) -> str:
    match = re.search(r"grpc (\S+),", ready)
    assert match, ready
    return match[1]


def ask(url: str, clip: np.ndarray) -> float:
    inputs = [InferInput("clip", clip.shape, "FP32"), InferInput("scale", (1, 1), "FP32")]
    inputs[0].set_data_from_numpy(clip)
    inputs[1].set_data_from_numpy(np.ones((1, 1), np.float32))
    with InferenceServerClient(url) as client:
        return float(client.infer("sums", inputs, client_timeout=20).as_numpy("sum")[0, 0])


def test_in_code(stand_in_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # nothing of the server may hang on the working directory
    log = tmp_path / "triton.log"
    with TritonServer(stand_in_repository, device="cpu", log=log) as server:
        assert (server.device, server.models, server.chosen) == ("CPU", ["sums"], "CPU, as asked")
        assert re.fullmatch(r"2\.\d+\.\d+", server.version)
        assert ask(server.grpc_url, np.ones((1, 5), np.float32)) == 5
        assert urlopen(f"http://{server.http_url}/v2/models/sums/ready").status == 200
        metrics, deadline = "", time.monotonic() + 20
        while 'nv_inference_count{model="sums",version="1"} 1' not in metrics:  # Triton counts just after it replied
            assert time.monotonic() < deadline, metrics
            metrics = urlopen(server.metrics_url).read().decode()
        assert "nv_inference_request_summary_us" in metrics
        parts = server.memory()
        assert parts["tritonserver"] > 10e6 and (parts["model"] > 10e6) == (parts["shared"] > 0)
        assert sum(parts.values()) < 500e6
        assert f"{server.pid}" in log.read_text()
        assert server.stop()
    assert server.stop()  # once more does no harm


@pytest.mark.skipif(find_installed() is not None, reason="one is installed: the other tests use it")
def test_an_installed_server_is_used_with_its_own_backends(
    stand_in_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The container's layout, with a script for a binary that notes its options and calls the wheel's."""
    environment = dict(os.environ)
    (tmp_path / "wheel").mkdir()
    binary, backends = assemble_wheel(tmp_path / "wheel", environment)
    script = tmp_path / "opt/bin/tritonserver"
    script.parent.mkdir(parents=True)
    script.write_text(
        f"""#!/bin/sh
printf '%s\\n' "$@" > {tmp_path}/options
export LD_LIBRARY_PATH={environment["LD_LIBRARY_PATH"]} PATH={environment["PATH"]}
exec {binary} "$@" --backend-directory={backends}
"""
    )
    script.chmod(0o755)
    marker = tmp_path / "opt/backends/onnxruntime/libtriton_onnxruntime.so"
    marker.parent.mkdir(parents=True)
    marker.touch()
    monkeypatch.setenv("PATH", f"{script.parent}{os.pathsep}{os.environ['PATH']}")
    assert find_installed() == script
    with TritonServer(stand_in_repository, device="cpu") as server:
        assert ask(server.grpc_url, np.ones((1, 5), np.float32)) == 5
    options = (tmp_path / "options").read_text()
    assert "--model-config-name=cpu\n" in options
    assert f"--backend-directory={tmp_path}/opt/backends\n" in options


def test_listens_on_the_given_address_only(stand_in_repository: Path) -> None:
    places = {"address": "127.0.0.2", "metrics_address": "127.0.0.3"}
    with TritonServer(stand_in_repository, device="cpu", **places) as server:
        for url in server.http_url, server.grpc_url, server.metrics_url.split("/")[2]:
            host, port = url.split(":")
            assert host == places["metrics_address" if url in server.metrics_url else "address"]
            socket.create_connection((host, int(port)), timeout=5).close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", int(port)), timeout=5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_lets_requests_finish(stand_in_repository: Path, number: int) -> None:
    with serving(stand_in_repository) as (process, ready), ThreadPoolExecutor(3) as pool:
        assert re.match(r"ready in \d+\.\d s: Triton \S+ on CPU serves sums at grpc 127.0.0.1:\d+", ready)
        replies = [pool.submit(ask, grpc_url(ready), np.full((1, n), 2, np.float32)) for n in (3, 4, 5)]
        time.sleep(0.5)
        process.send_signal(number)
        assert [reply.result() for reply in replies] == [6, 8, 10]
        assert process.wait(20) == 0


def test_stops_although_nobody_reads_its_output(stand_in_repository: Path) -> None:
    with serving(stand_in_repository) as (process, _):
        assert process.stdout is not None
        process.stdout.close()
        process.terminate()
        process.wait(20)


def test_exit_timeout_ends_in_a_kill(stand_in_repository: Path) -> None:
    with serving(stand_in_repository, "--exit-timeout=0.1") as (process, _):
        process.terminate()
        assert process.wait(20) == 1
        assert process.stderr is not None
        error = process.stderr.read()
    assert "did not stop within 0.1 s and was killed" in error
    assert_named_log(error)


def test_killed_command_takes_its_server_along(stand_in_repository: Path, tmp_path: Path) -> None:
    with serving(stand_in_repository) as (process, _):
        process.kill()
    deadline = time.monotonic() + 20
    while processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    (stale,) = tmp_path.glob("ecapa-triton-*")  # nobody was left to remove it
    with serving(stand_in_repository):
        (running,) = set(tmp_path.glob("ecapa-triton-*")) - {stale}
        for folder in stale, running:
            os.utime(folder / "lock", (0, 0))
        with serving(stand_in_repository):  # the next server does
            assert running.exists() and not stale.exists()


def test_no_fork_of_a_process_with_threads(stand_in_repository: Path, tmp_path: Path) -> None:
    """At a fork gRPC stops its threads: a server or client of it in this process would hang."""
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))
    with TritonServer(stand_in_repository, device="cpu") as server:
        assert ask(server.grpc_url, np.ones((1, 10), np.float32)) == 10
    assert not forks


def test_a_child_has_the_usual_signals_and_many_files(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with (tmp_path / "log").open("wb") as log:
            assert child.start(["/bin/cat", "/proc/self/status", "/proc/self/limits"], log).wait(20) == 0
    finally:
        signal.signal(signal.SIGHUP, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    told = (tmp_path / "log").read_text()
    ignored = re.search(r"SigIgn:\s(\w+)\n", told)
    assert ignored and int(ignored[1], 16) & ~(0b11 << 31) == 0  # 32 and 33 are glibc's own; make leaves one ignored
    assert re.search(rf"Max open files\s+{min(hard, 65536) if hard >= 0 else 65536}\s", told)


def test_who_serves_everybody_is_told(stand_in_repository: Path, tmp_path: Path) -> None:
    for everybody in "0.0.0.0", "192.0.2.1":
        assert exposure_warning(everybody, None, {}).startswith(f"all who reach {everybody} are served, unencrypted")
    assert exposure_warning("127.0.0.2", None, {}) == ""
    assert exposure_warning("0.0.0.0", None, {"inference": "x" * 20}) == ""
    assert exposure_warning("0.0.0.0", gateway.Tls(tmp_path / "cert", tmp_path / "key"), {}) == ""


@pytest.mark.parametrize("mode, reason", [(None, "No such file"), (0o644, "Permission denied")])
def test_a_child_that_cannot_run(mode: int | None, reason: str, tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    if mode is not None:
        binary.write_bytes(b"")
        binary.chmod(mode)
    with (tmp_path / "log").open("wb") as log, pytest.raises(OSError, match=reason):
        child.start([str(binary)], log)


def test_a_child_that_is_no_program_says_so(tmp_path: Path) -> None:
    binary = tmp_path / "binary"
    binary.write_bytes(b"")
    binary.chmod(0o755)
    with (tmp_path / "log").open("wb") as log:
        assert child.start([str(binary)], log).wait(20) == 1
    assert (tmp_path / "log").read_text() == f"cannot run {binary}: Exec format error\n"


def test_a_stub_that_dies_ends_the_server(stand_in_repository: Path) -> None:
    """Triton itself would go on, say that it is ready and fail every request."""
    with pytest.raises(ServerError, match=r"process \d+ of tritonserver, in which a model ran, ended"):
        with TritonServer(stand_in_repository, device="cpu") as server:
            (stub,) = server._session() - {server.pid}
            os.kill(stub, signal.SIGKILL)
            server.wait()
    assert_named_log(f"its log: {server.log_path}")


def test_the_command_starts_a_dead_server_again(stand_in_repository: Path, tmp_path: Path) -> None:
    with serving(stand_in_repository) as (process, ready):
        clip = np.ones((1, 10), np.float32)
        for victim in "tritonserver", "triton_python_backend_stub":
            (pid,) = [pid for pid, command in processes(tmp_path).items() if f"/{victim} " in command]
            os.kill(pid, signal.SIGKILL)
            assert process.stdout is not None
            again = next(line for line in process.stdout if line.startswith("ready"))
            assert re.sub(r"ready in \S+", "", again) == re.sub(r"ready in \S+", "", ready)  # on the same ports
            assert ask(grpc_url(ready), clip) == 10
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        errors = [line for line in process.stderr.read().splitlines() if line.startswith("error")]
    assert re.match(r"error: tritonserver was killed by SIGKILL while serving; .*; starting again in 0.5 s", errors[0])
    assert re.match(r"error: process \d+ of tritonserver, .*; starting again in 1 s", errors[1])
    for line in errors:
        assert_named_log(line)


needs_nginx = pytest.mark.skipif(gateway.find() is None, reason="nginx is not installed")


@needs_nginx
def test_gateway(stand_in_repository: Path, tmp_path: Path) -> None:
    """Both APIs are behind it, Triton listens on this machine only, and nothing of a killed nginx is left."""
    limits = gateway.Limits(requests=1, request_mb=1)
    with TritonServer(stand_in_repository, device="cpu", address="127.0.0.2", limits=limits) as server:
        for port in int(server.http_url.partition(":")[2]), int(server.grpc_url.partition(":")[2]):
            with socket.create_connection(("127.0.0.2", port)), pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port))
        assert ask(server.grpc_url, np.ones((1, 10), np.float32)) == 10
        with pytest.raises(InferenceServerException, match="The request is larger than 1 MB"):
            ask(server.grpc_url, np.ones((1, 1 << 18), np.float32))
        with urlopen(f"http://{server.http_url}/v2/models/sums/ready", timeout=20) as reply:
            assert reply.status == 200
        nginx = server._gateway.pid
        os.kill(nginx, signal.SIGKILL)
        with pytest.raises(ServerError, match="^nginx in front of tritonserver was killed by SIGKILL$"):
            server.wait()
    deadline = time.monotonic() + 20
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(nginx, 0)  # its group: the workers
            time.sleep(0.1)


def test_gateway_is_optional(stand_in_repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "PLACES", ["no-such-nginx"])
    limits = gateway.Limits(requests=1, request_mb=1)
    with pytest.raises(ServerError, match="^nginx is not installed: apt install nginx-light, or --gateway off"):
        TritonServer(stand_in_repository, device="cpu", limits=limits).start()
    command = [sys.executable, "-c", WITHOUT_NGINX, f"--repository={stand_in_repository}", "--device=cpu", *FREE_PORTS]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("warning: nginx is not installed, so requests have no limits")
        assert process.stderr.readline() == "warning: everybody is served\n"
        process.terminate()
        assert process.wait(20) == 0


WITHOUT_NGINX = """
import sys
from server import __main__, gateway, triton
gateway.PLACES = ["no-such-nginx"]
triton.exposure_warning = lambda *_: "everybody is served"
sys.exit(__main__.main(sys.argv[1:]))
"""


@needs_nginx
def test_gateway_that_does_not_start(
    stand_in_repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tls, nginx = gateway.TEMPLATES
    template = tmp_path / nginx.name
    template.write_text(nginx.read_text() + "nonsense;")
    monkeypatch.setattr(gateway, "TEMPLATES", [tls, template])
    with pytest.raises(ServerError, match='^nginx does not start: unknown directive "nonsense" in '):
        TritonServer(stand_in_repository, device="cpu", limits=gateway.Limits(1, 1)).start()


@pytest.mark.parametrize("limit", ["--max-requests=0", "--max-request-mb=x", "--gpus=0,", "--max-requests=²"])
def test_limits_are_checked(limit: str) -> None:
    result = run(limit)
    option, _, value = limit.partition("=")
    assert result.returncode == 2 and f"argument {option}: '{value}': expected " in result.stderr


def test_a_start_that_fails_is_tried_again(stand_in_repository: Path, tmp_path: Path) -> None:
    path = stand_in_repository / "sums/1/model.onnx"
    with serving(stand_in_repository) as (process, _):
        assert process.stdout is not None and process.stderr is not None
        moved = path.rename(path.with_name("moved"))
        (pid,) = [pid for pid, command in processes(tmp_path).items() if "/tritonserver " in command]
        os.kill(pid, signal.SIGKILL)
        death = process.stderr.readline()
        assert "model.onnx is missing" in process.stderr.readline()
        assert_named_log(death)
        moved.rename(path)
        assert any(line.startswith("ready") for line in process.stdout)


def test_a_hangup_that_is_ignored_stays_so(stand_in_repository: Path) -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with serving(stand_in_repository) as (process, ready):
            process.send_signal(signal.SIGHUP)
            assert ask(grpc_url(ready), np.ones((1, 10), np.float32)) == 10
            assert process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_command_may_leave_that_to_a_supervisor(stand_in_repository: Path, tmp_path: Path) -> None:
    with serving(stand_in_repository, "--no-restart") as (process, _):
        (pid,) = [pid for pid, command in processes(tmp_path).items() if "/tritonserver " in command]
        os.kill(pid, signal.SIGKILL)
        assert process.wait(20) == 1
        assert process.stderr is not None
        message = process.stderr.read()
    assert message.startswith("error: tritonserver was killed by SIGKILL while serving; its log: ")
    assert_named_log(message)


def test_names_stand_for_addresses(stand_in_repository: Path) -> None:
    with TritonServer(stand_in_repository, device="cpu", address="localhost") as server:
        assert server.grpc_url.startswith("127.0.0.1:")
    for address in "", "::1", "no.such.host.invalid":
        assert_refused(run("--repository", stand_in_repository, "--address", address), "cannot be used")


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "0", "1e300"])
def test_timeouts_are_checked(stand_in_repository: Path, seconds: str) -> None:
    assert_refused(run("--repository", stand_in_repository, f"--exit-timeout={seconds}"), "expected more than 0")


def test_another_servers_answer_is_not_taken_for_ours(
    stand_in_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that start at once both find the ports free."""
    with TritonServer(stand_in_repository, device="cpu") as first:
        ports = {"http": first.http_url, "grpc": first.grpc_url, "metrics": first.metrics_url.split("/")[2]}
        taken = {api: ("127.0.0.1", int(url.rpartition(":")[2])) for api, url in ports.items()}
        answers = [taken, taken, taken]
        monkeypatch.setattr("server.triton.choose_ports", lambda wanted: answers.pop(0))
        with pytest.raises(ServerError, match="did not start: .*already in use") as info:
            TritonServer(stand_in_repository, device="cpu").start()
        assert not answers
        answers = [taken, choose_ports(dict.fromkeys(ports, ("127.0.0.1", 0)))]
        with TritonServer(stand_in_repository, device="cpu") as second:
            assert second.grpc_url not in ("", first.grpc_url)
    assert_named_log(str(info.value))


def test_a_log_that_is_no_file(stand_in_repository: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    assert_refused(run("--repository", stand_in_repository, "--log", tmp_path / "fifo"), "No such device or address")
    command = [sys.executable, "-m", "server", f"--repository={stand_in_repository}", "--device=cpu", *FREE_PORTS]
    process = subprocess.Popen([*command, "--log=/dev/stdout"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("ready in"):
            process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 0
    assert any("Started GRPCInferenceService" in line for line in lines)


def test_server_that_dies_is_reported(stand_in_repository: Path) -> None:
    with pytest.raises(ServerError, match="was killed by SIGKILL while serving"):
        with TritonServer(stand_in_repository, device="cpu") as server:
            os.kill(server.pid, signal.SIGKILL)
            server.wait()
    assert_named_log(f"its log: {server.log_path}")


def test_repository_without_its_model(tmp_path: Path) -> None:
    stand_in.write(tmp_path / "sums")
    (tmp_path / "sums/1/model.onnx").unlink()
    assert_refused(run("--repository", tmp_path), f"{tmp_path}/sums/1/model.onnx is missing: write it with")
    assert_refused(run("--repository", tmp_path / "nowhere"), "nowhere is not a folder: give its path")


def test_port_in_use(stand_in_repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        result = run("--repository", stand_in_repository, *FREE_PORTS, f"--grpc-port={port}")
    assert_refused(result, f"cannot listen on 127.0.0.1 port {port} for grpc: Address already in use")


def test_gpu_without_a_gpu(stand_in_repository: Path) -> None:
    if cuda_gpus()[0]:
        pytest.skip("this machine has a GPU")
    result = run("--repository", stand_in_repository, "--device=gpu", *FREE_PORTS)
    assert_refused(result, "error: device gpu: no NVIDIA driver")


def guarded(model: Path) -> None:
    with (model / "config.pbtxt").open("a") as config:
        config.write('parameters { key: "required_guards" value: { string_value: "torn,empty" } }')


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.skipif(find_installed() is not None, reason="the messages are those of our backend")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda model: (model / "1/model.onnx").write_bytes(b"no model"), "Protobuf parsing failed"),
        (lambda model: replace(model, "dims", "dimensions"), "failed to read text proto"),
        (lambda model: replace(model, "ITEM_SHAPE", "ELEMENT_COUNT"), "not supported: use BATCH_ITEM_SHAPE"),
        (
            lambda model: replace(
                model, '"length" data_type: TYPE_FP32 dims: [ 1', '"length" data_type: TYPE_FP32 dims: [ 2'
            ),
            "output length has dims [2] in the config, [1] behind the batch axis in the model",
        ),
        (
            lambda model: replace(model, '"sum" data_type: TYPE_FP32', '"sum" data_type: TYPE_FP64'),
            "output sum is TYPE_FP64 in the config, tensor(float) in the model",
        ),
        (lambda model: replace(model, '"scale"', '"gain"'), "the model has no input gain, it has clip, scale, samples"),
        (
            lambda model: replace(model, 'input { name: "scale" data_type: TYPE_FP32 dims: [ 1 ] }', ""),
            "the config lacks the model's input scale",
        ),
        (guarded, "model.onnx ends without a checksum: it was cut off, or not written by this version"),
        (
            lambda model: (guarded(model), seal.seal(model / "1/model.onnx")),
            "model.onnx does not guard against bad input of the kinds empty, torn: run python -m export again",
        ),
        (
            lambda model: (guarded(model), seal.seal(model / "1/model.onnx"), flip_a_bit(model / "1/model.onnx")),
            "model.onnx is not as it was written (its checksum differs): run python -m export again",
        ),
    ],
)
def test_model_that_does_not_load(stand_in_repository: Path, damage: object, message: str) -> None:
    assert callable(damage)
    damage(stand_in_repository / "sums")
    result = run("--repository", stand_in_repository, "--device=cpu", *FREE_PORTS)
    assert_refused(result, "error: tritonserver did not start: model sums does not load (")
    assert message in result.stderr
    assert_named_log(result.stderr)


def test_options_for_tritonserver(stand_in_repository: Path, tmp_path: Path) -> None:
    log = tmp_path / "triton.log"
    result = run("--repository", stand_in_repository, *FREE_PORTS, "--log", log, "--", "--no-such-option")
    assert_refused(result, f"unrecognized option '--no-such-option'; its log: {log}")
    assert "no-such-option" in log.read_text()
    with serving(stand_in_repository, f"--log={log}", "--", "--id=from-a-test"):
        assert "from-a-test" in log.read_text()
    result = run("--repository", stand_in_repository, *FREE_PORTS, "--log", tmp_path / "nowhere/log")
    assert_refused(result, f"cannot write the log {tmp_path}/nowhere/log: No such file or directory")


def replace(model: Path, old: str, new: str, name: str = "config.pbtxt") -> None:
    config = model / name
    config.write_text(config.read_text().replace(old, new))


def assert_refused(result: subprocess.CompletedProcess[str], message: str) -> None:
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"error: [^\n]+\n", result.stderr), result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def assert_named_log(error: str) -> None:
    """The log that a message names is there. Removes it."""
    match = re.search(r"its log: ([^;\n]+)", error)
    assert match
    log = Path(match[1])
    assert log.stat().st_size > 0
    log.unlink()
    log.parent.rmdir()  # nothing else was kept


@pytest.mark.parametrize(
    ("device", "precision", "gpus", "chosen"),
    [
        ("auto", "fp32", ["NVIDIA L4"], ("GPU", "GPU: NVIDIA L4", "gpu")),
        ("auto", "fp16", ["NVIDIA L4"], ("GPU", "GPU: NVIDIA L4, in float16", "gpu_fp16")),
        ("auto", "fp32", [], ("CPU", "CPU: no driver", "cpu")),
        ("auto", "fp16", [], ("CPU", "CPU, in float32: no driver", "cpu")),
        ("cpu", "fp32", ["NVIDIA L4"], ("CPU", "CPU, as asked", "cpu")),
        ("gpu", "fp32", ["A", "B"], ("GPU", "GPU, as asked: A, B", "gpu")),
    ],
)
def test_choice_of_device(device: str, precision: str, gpus: list[str], chosen: tuple[str, str, str]) -> None:
    assert choose_device(device, gpus, "no driver", precision) == chosen  # type: ignore[arg-type]


def test_a_package_without_cuda_is_named(both_formats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> SimpleNamespace:
        return SimpleNamespace(origin=str(tmp_path / name / "__init__.py"))

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    for package, library in ("onnxruntime", "capi/libonnxruntime_providers_cuda.so"), ("torch", "lib/libtorch_cuda.so"):
        assert _cannot_use_cuda(both_formats) == f"the installed {package}"
        (tmp_path / package / library).parent.mkdir(parents=True)
        (tmp_path / package / library).touch()
    assert _cannot_use_cuda(both_formats) == ""


def test_float16_on_a_cpu() -> None:
    with pytest.raises(ServerError, match="precision fp16 is for GPUs"):
        choose_device("cpu", [], "", "fp16")


def test_choice_of_gpus() -> None:
    assert choose_gpus(["A", "B", "C"], [2, 0]) == ["C", "A"]
    for wrong in [3], [-1], [1, 1]:
        with pytest.raises(ServerError, match=r"expected different numbers of 0 \(A\), 1 \(B\), 2 \(C\)"):
            choose_gpus(["A", "B", "C"], wrong)


@pytest.mark.parametrize(("visible", "expected"), [(None, "1,0"), ("4,GPU-abc", "GPU-abc,4")])
def test_gpus_are_those_that_are_visible(
    stand_in_repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, visible: str | None, expected: str
) -> None:
    """What a tritonserver on two GPUs is started with; a script stands in its place."""
    seen = tmp_path / "seen"
    binary = tmp_path / "tritonserver/bin/tritonserver"
    binary.parent.mkdir(parents=True)
    binary.write_text(f'#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES $NVIDIA_TF32_OVERRIDE $@" > {seen}\nexit 1\n')
    binary.chmod(0o755)
    monkeypatch.setattr("server.triton.find_installed", lambda: binary)
    monkeypatch.setattr("server.triton.cuda_gpus", lambda: (["A", "B"], ""))
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    server = TritonServer(stand_in_repository, device="gpu", gpus=[1, 0], precision="fp16", log=tmp_path / "log")
    with pytest.raises(ServerError):
        server.start()
    assert server.chosen == "GPU, as asked: B, A, in float16"
    assert seen.read_text().startswith(f"{expected} 0 --") and "--model-config-name=gpu_fp16 " in seen.read_text()


def test_choice_of_ports() -> None:
    chosen = choose_ports(dict.fromkeys(["http", "grpc", "metrics"], ("127.0.0.1", 0)))
    assert len(set(chosen.values())) == 3
    assert choose_ports(chosen) == chosen
    with pytest.raises(ServerError, match="port 70000 for http: a port is 0 to 65535"):
        choose_ports({"http": ("127.0.0.1", 70000)})
    with pytest.raises(ServerError, match=r"cannot listen on no\.such\.host\.invalid port 0 for http"):
        choose_ports({"http": ("no.such.host.invalid", 0)})


def test_little_shared_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.triton._ENOUGH_SHM", 0)
    assert shm_warning() == ""
    monkeypatch.setattr("server.triton._ENOUGH_SHM", 1 << 60)
    assert re.match(r"/dev/shm has \d+ MB free: large requests will fail", shm_warning())
    monkeypatch.setattr("server.triton._SHM", Path("/dev/nowhere"))
    assert "cannot be used (No such file" in shm_warning()


def test_repository_is_checked_for_the_device(tmp_path: Path) -> None:
    with pytest.raises(ServerError, match="has no models"):
        check_repository(tmp_path, "cpu")
    stand_in.write(tmp_path / "sums")
    (tmp_path / ".git").mkdir()
    assert check_repository(tmp_path, "cpu") == {"sums": "onnxruntime"}
    (tmp_path / "sums/configs").mkdir()
    (tmp_path / "sums/configs/gpu.pbtxt").write_text('# model.onnx\nbackend: "pytorch"\n')
    assert check_repository(tmp_path, "cpu") == {"sums": "onnxruntime"}
    with pytest.raises(ServerError, match=r"sums/1/model\.pt is missing"):
        check_repository(tmp_path, "gpu")
    (tmp_path / "sums/config.pbtxt").unlink()
    with pytest.raises(ServerError, match=r"expected .*sums/config\.pbtxt"):
        check_repository(tmp_path, "cpu")


def test_the_version_that_is_served_is_checked(repository: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(repository / "ecapa", tmp_path / "ecapa"))
    shutil.copytree(model / "1", model / "10")
    shutil.copytree(model / "1", model / "9")
    (model / "\N{SUPERSCRIPT TWO}").mkdir()  # a digit, but no version
    flip_a_bit(model / "9/model.onnx")
    assert check_repository(tmp_path, "cpu") == {"ecapa": "onnxruntime"}
    replace(model, "latest { num_versions: 1 }", "latest { num_versions: 2 }", "configs/cpu.pbtxt")
    with pytest.raises(ServerError, match=r"ecapa/9/model\.onnx is not as it was written"):
        check_repository(tmp_path, "cpu")
    shutil.rmtree(model / "9")
    replace(model, "dims: [ 192 ]", "dims: [ 191 ]", "configs/cpu.pbtxt")
    with pytest.raises(ServerError, match=r"cpu\.pbtxt line \d+: dims of embedding is \[191\]"):
        check_repository(tmp_path, "cpu")
    assert check_repository(tmp_path, "gpu") == {"ecapa": "onnxruntime"}
    replace(model, 'backend: "onnxruntime"', 'platform: "onnxruntime_onnx"')
    (model / "configs/cpu.pbtxt").unlink()
    with pytest.raises(ServerError, match=r"config\.pbtxt .*: backend of ecapa is , the model in ecapa/1 needs onnxr"):
        check_repository(tmp_path, "cpu")
    replace(model, "torn,", "", "configs/gpu.pbtxt")
    with pytest.raises(ServerError, match=r"gpu\.pbtxt line \d+: string_value of required_guards is empty,short,not-f"):
        check_repository(tmp_path, "gpu")


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        (
            'I1122 08:48:14 1 a.cc:1] "loading"\nE1122 08:48:14 1 b.cc:2] "failed to load \'ecapa\' version 1: '
            'Internal: Bad: thing\\n\\nAt:\\n  model.py(3): initialize\\n"\nerror: creating server: Internal\n',
            "model ecapa does not load (Internal: Bad: thing): check its configs or export it again",
        ),
        ('E1122 08:48:14 1 c.cc:3] "no space left"\nerror: creating server\n', "no space left"),
        ("error: creating server: Internal - no\n", "creating server: Internal - no"),
        ("something else\n\n", "something else"),
        ("", "it ended without a word"),
    ],
)
def test_reason_for_a_failure_is_one_line(log: str, reason: str) -> None:
    assert failure_reason(log) == reason
