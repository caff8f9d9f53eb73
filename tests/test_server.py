"""The launcher and TritonServer: start, failures to start, supervision, and a stop without leftovers."""

from __future__ import annotations

import contextlib
import errno
import json
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
from http.client import HTTPException
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import stand_in
from conftest import ROOT
from containers import needs_nginx
from launcher import launched, wait_until
from tritonclient.utils import InferenceServerException

from server import Limits, ServerError, TritonServer, gateway, wheel
from server.__main__ import main
from server.preflight import choose_ports
from server.triton import ask

CLIP = np.ones((1, 10), np.float32)
needs_wheel = pytest.mark.skipif(wheel.find_installed() is not None, reason="an installed tritonserver is used instead")


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
    wait_until(lambda: unused_segments() <= before)  # a server of another test process may be dying


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
    with socket.socket() as client:
        return client.connect_ex((where, port)) == errno.ECONNREFUSED


def assert_named_log(error: str) -> None:
    """The log that a message names exists, and nothing else was kept. Removes it."""
    match = re.search(r"its log: ([^;\n]+)", error)
    assert match, error
    log = Path(match[1])
    assert log.stat().st_size > 0
    log.unlink()
    log.parent.rmdir()


# --- start ---


def test_in_code(sums: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir("/")  # nothing depends on the working directory
    forks: list[int] = []
    os.register_at_fork(before=lambda: forks.append(1))  # a fork stops gRPC's threads in this process
    log = tmp_path / "triton.log"
    with TritonServer(sums, device="cpu", address="127.0.0.2", metrics_address="127.0.0.3", log=log) as server:
        metrics = server.metrics_url.split("/")[2]
        for url in server.http_url, server.grpc_url, metrics:
            host, port = url.split(":")
            assert host == ("127.0.0.3" if url == metrics else "127.0.0.2")
            assert not refused(host, int(port)) and refused("127.0.0.1", int(port))
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
    assert not forks


@needs_wheel
def test_in_a_container(sums: Path, tmp_path: Path) -> None:
    """NVIDIA's layout, with a script for a binary that notes its options and runs the wheel's; flags of compose."""
    stand_in.write(sums / "other")
    environment = dict(os.environ)
    (tmp_path / "wheel").mkdir()
    binary, backends = wheel.assemble(tmp_path / "wheel", environment)
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
    flags = "--models=sums --threads=3 --gateway=off --no-restart --log=- --metrics-address=0.0.0.0".split()
    sockets = tmp_path / "sockets"
    variables = {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}"}
    with launched(sums, *flags, f"--sockets={sockets}", environment=variables) as launcher:
        options = (tmp_path / "options").read_text().splitlines()
        assert {"--model-config-name=cpu", f"--backend-directory={tmp_path}/opt/backends"} <= set(options)
        assert launcher.urls[:2] == [f"unix:{sockets}/grpc:1", f"unix:{sockets}/http"]
        assert {path.name: path.is_socket() for path in sockets.iterdir()} == {"grpc:1": True, "http": True}
        assert stand_in.ask(launcher.urls[0], CLIP)[0, 0] == 10
        with pytest.raises(HTTPException, match="400"):
            ask(sockets / "http", "/v2/models/other/ready")
        config = json.loads(ask(sockets / "http", "/v2/models/sums/config"))
        assert config["parameters"]["intra_op_thread_count"]["string_value"] == "3"
        assert len(launcher.output) > 10  # Triton's log
        os.kill(processes(tmp_path)["tritonserver"], signal.SIGKILL)
        assert launcher.process.wait(20) == 1  # the container's supervisor restarts it
        old, error = launcher.errors()  # and no other warning
        assert "2.51.0" in old
        assert "SIGKILL" in error
    for segment in Path("/dev/shm").glob(f"{tmp_path.name}-*"):
        segment.unlink()


def test_another_servers_reply_is_not_mistaken_for_ours(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two that start at once both find the ports free."""
    with TritonServer(sums, device="cpu") as first:
        ports = {"http": first.http_url, "grpc": first.grpc_url, "metrics": first.metrics_url.split("/")[2]}
        taken = {api: ("127.0.0.1", int(url.rpartition(":")[2])) for api, url in ports.items()}
        chosen = [taken, taken, taken]
        monkeypatch.setattr("server.preflight.choose_ports", lambda wanted: chosen.pop(0))
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
    with pytest.raises(ServerError, match=str(tmp_path / "nowhere/log")):
        TritonServer(sums, device="cpu", log=tmp_path / "nowhere/log").start()
    for seconds in float("nan"), float("inf"), 0:
        with pytest.raises(ServerError, match="86400"):
            TritonServer(sums, device="cpu", exit_timeout=seconds).start()


@needs_wheel
def test_models_run_on_the_threads_of_their_config(sums: Path) -> None:
    stand_in.write(sums / "other", intra=5)
    with TritonServer(sums, device="cpu") as server:
        stubs = psutil.Process(server.pid).children()
        threads = {"/sums/" in " ".join(stub.cmdline()): stub.num_threads() for stub in stubs}
    assert threads[False] - threads[True] == 5 - 1


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
    monkeypatch.setattr("server.wheel.find_installed", lambda: binary)
    monkeypatch.setattr("server.preflight.cuda_gpus", lambda: (["A", "B"], ""))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    server = TritonServer(sums, device="gpu", gpus=[1, 0], precision="fp16", log=tmp_path / "log")
    with pytest.raises(ServerError):
        server.start()
    assert "B, A" in server.chosen
    assert seen.read_text().startswith(f"{expected} 0 --") and "--model-config-name=gpu_fp16 " in seen.read_text()


@needs_wheel
@pytest.mark.parametrize(
    ("old", "new", "facts"),
    [
        ("dims", "dimensions", "config.pbtxt"),
        ("ITEM_SHAPE", "ELEMENT_COUNT", "BATCH_ITEM_SHAPE"),
        ('"scale"', '"gain"', "gain scale"),
        ('input { name: "scale" data_type: TYPE_FP32 dims: [ 1 ] }', "", "scale"),
    ],
)
def test_a_config_that_does_not_fit_its_model(sums: Path, old: str, new: str, facts: str) -> None:
    config = sums / "sums/config.pbtxt"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ServerError) as info:
        TritonServer(sums, device="cpu").start()
    message = str(info.value)
    assert_named_log(message)
    assert "\n" not in message and "model sums" in message
    assert all(fact in message for fact in facts.split(" ")), message


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


def test_a_hangup_that_is_ignored_stays_so(sums: Path, tmp_path: Path) -> None:
    """As under nohup, and in a shell that allows few open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with launched(sums) as launcher:
            launcher.process.send_signal(signal.SIGHUP)
            assert stand_in.ask(launcher.urls[0], CLIP)[0, 0] == 10
            assert launcher.process.poll() is None
            server = psutil.Process(processes(tmp_path)["tritonserver"])
            assert server.rlimit(psutil.RLIMIT_NOFILE)[0] == min(hard % (1 << 64), 65536)  # two for each request
    finally:
        signal.signal(signal.SIGHUP, before)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


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
        for _ in range(3):  # at once, however often
            assert kill("tritonserver").endswith("; starting again\n")
            assert_restarted()
        moved = model.rename(model.with_name("moved"))
        kill("tritonserver")
        assert launcher.process.stderr is not None
        for pause in 0.5, 1:  # a start that fails is tried again, after a while
            line = launcher.process.stderr.readline()
            assert str(model) in line and f"in {pause:g} s" in line
        moved.rename(model)
        assert_restarted()
        launcher.process.terminate()
        assert launcher.process.wait(20) == 0


@needs_wheel
@pytest.mark.parametrize("options", [[], ["--sockets={}/s", "--gateway=off", "--no-restart"]], ids=["ports", "sockets"])
def test_a_server_that_hangs_is_ended(options: list[str], sums: Path, tmp_path: Path) -> None:
    """Not one that is busy: a request takes longer than the watchdog waits."""
    stand_in.write(tmp_path / "repository/slow", delay=4_000_000)
    options = [option.format(tmp_path) for option in options]
    with launched(sums, *options, program=["-c", WATCHFUL]) as launcher:
        assert stand_in.ask(launcher.urls[0], CLIP, model="slow")[0, 0] == 10
        os.kill(processes(tmp_path)["tritonserver"], signal.SIGSTOP)
        assert launcher.process.stderr is not None
        line = next(line for line in launcher.process.stderr if line.startswith("error"))
        assert "did not answer" in line
        if options:
            assert launcher.process.wait(20) == 1
        else:
            launcher.wait_until_ready()
            assert stand_in.ask(launcher.urls[0], CLIP)[0, 0] == 10
        assert_named_log(line)


WATCHFUL = """
import sys
from server import __main__, triton
triton.WATCH, triton.UNANSWERED = 0.2, 5
sys.exit(__main__.main(sys.argv[1:]))
"""


def test_a_restart_that_keeps_failing_ends(sums: Path, tmp_path: Path) -> None:
    with launched(sums, program=["-c", HASTY]) as launcher:
        (sums / "sums/1/model.onnx").unlink()
        os.kill(processes(tmp_path)["tritonserver"], signal.SIGKILL)
        assert launcher.process.wait(20) == 1
        first, *others = launcher.errors()
        assert_named_log(first)
        assert len(others) == 10 and "model.onnx" in others[-1] and "again" not in others[-1]


HASTY = """
import sys
from server import __main__
__main__.LAST_PAUSE = 0.01
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(tmp_path: Path, number: int) -> None:
    stand_in.write(tmp_path / "repository/sums", delay=60_000_000)
    with launched(tmp_path / "repository") as launcher, ThreadPoolExecutor(1) as pool:
        grpc, _, metrics = launcher.urls
        reply = pool.submit(stand_in.ask, grpc, CLIP)
        pending = re.compile(r'nv_inference_pending_request_count\{model="sums",version="1"\} 1\n')
        wait_until(lambda: pending.search(urlopen(metrics).read().decode()))
        launcher.process.send_signal(number)
        assert launcher.process.stdout is not None and "second signal" in launcher.process.stdout.readline()
        launcher.process.send_signal(number)
        assert launcher.process.wait(20) == 1
        with pytest.raises(InferenceServerException):
            reply.result()
        assert "second signal" in launcher.errors()[-1]
    for log in tmp_path.glob("ecapa-triton-*/tritonserver.log"):
        log.unlink()
        log.parent.rmdir()


@needs_nginx
def test_the_ready_line_says_that_all_addresses_are_served(sums: Path) -> None:
    with launched(sums, "--address=0.0.0.0") as launcher:
        assert launcher.output[-1].endswith("on all addresses of this host\n")
        assert stand_in.ask(launcher.urls[0], CLIP)[0, 0] == 10


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    text = (ROOT / "deploy/ecapa-triton.service").read_text()
    (command,) = re.findall(r"^ExecStart=\S+ -m server (.*)", text, re.MULTILINE)
    with pytest.raises(SystemExit, match="0"):
        main([*command.split(), "--help"])
    unit = tmp_path / "ecapa-triton.service"
    unit.write_text(text.replace("/opt/ecapa-triton/.venv/bin/python", sys.executable))
    run = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


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


@needs_nginx
def test_a_dead_counter_is_replaced(sums: Path, tmp_path: Path) -> None:
    """And Triton runs on."""

    def counter() -> psutil.Process | None:
        found = [one for one in psutil.process_iter(["cmdline"]) if one.info["cmdline"]]
        words = f"--socket={tmp_path}", "gateway_metrics.py"
        return next((one for one in found if all(word in " ".join(one.info["cmdline"]) for word in words)), None)

    with launched(sums) as launcher:
        triton, first = processes(tmp_path)["tritonserver"], counter()
        assert first is not None
        wait_until(lambda: time.time() - first.create_time() > 3)
        first.kill()
        wait_until(lambda: counter() not in (None, first))
        (url,) = re.findall(r"gateway metrics ([^\s,]+)", launcher.output[-1])

        def counts() -> bool:
            with contextlib.suppress(OSError):
                stand_in.ask(launcher.urls[0], CLIP)
                return 'api="grpc",result="ok"} 0' not in urlopen(url).read().decode()
            return False

        wait_until(counts)
        assert processes(tmp_path)["tritonserver"] == triton


@needs_wheel
def test_gateway_is_optional(sums: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with launched(sums, program=["-c", WITHOUT_NGINX]) as launcher:
        assert stand_in.ask(launcher.urls[0], CLIP)[0, 0] == 10
        launcher.process.terminate()
        assert launcher.process.wait(20) == 0
        (warning,) = [line for line in launcher.errors() if "/dev/shm" not in line]
        assert "nginx" in warning
    monkeypatch.setattr(gateway, "PLACES", ["no-such-nginx"])
    with pytest.raises(ServerError, match="nginx-light"):
        TritonServer(sums, device="cpu", limits=Limits(1, 1)).start()


@needs_wheel
def test_only_a_gateway_exposes_the_wheel(sums: Path) -> None:
    with pytest.raises(ServerError, match=r"0\.0\.0\.0.*vulnerabilities.*nginx-light"):
        TritonServer(sums, device="cpu", address="0.0.0.0").start()
    with TritonServer(sums, device="cpu", address="127.0.0.2") as server:
        assert not [warning for warning in server.warnings if server.version in warning]
    with TritonServer(sums, device="cpu", metrics_address="0.0.0.0") as server:
        assert [warning for warning in server.warnings if server.version in warning]


WITHOUT_NGINX = """
import sys
from server import __main__, gateway
gateway.PLACES = ["no-such-nginx"]
sys.exit(__main__.main(sys.argv[1:]))
"""
