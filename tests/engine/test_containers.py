"""The deployment in containers, through its published ports. The tests run in this order on one deployment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import ssl
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
from conftest import ROOT
from ecapa_triton import KeyRefusedError, SpeakerClient, Tls, TrustError
from launcher import http_status

from tests.faults.judge import ClientSender, Clip, GrpcSender, HttpSender, Rejection, Tally, Traffic, grpc_outcome

from .conftest import SERVICES, USER, Deployment, give, output
from .stand_ins import of_triton

KEY = "a-key:of=more,than/16"
BACK = 60  # s, for a container that was killed
OURS = SERVICES[:2]


def eventually(holds: Callable[[], object], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if holds():
                return True
        time.sleep(0.3)
    return False


@contextlib.contextmanager
def changed(deployment: Deployment, **variables: str) -> Iterator[None]:
    """The gateway with other variables."""
    deployment.up("gateway", **variables)
    try:
        yield
    finally:
        deployment.up("gateway")


# --- export ---


def test_export_has_written_a_verified_model(deployment: Deployment, folder: Path) -> None:
    model = folder / "model_repository/ecapa/1/model.onnx"
    assert model.stat().st_size > 1e6 and f"{model.stat().st_uid}:{model.stat().st_gid}" == USER


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes folders of others")
def test_export_into_a_folder_of_another_user_fails_at_once(deployment: Deployment, folder: Path) -> None:
    """As in a checkout of root's; it says what to do."""
    other = Path(shutil.copytree(folder / "model_repository", folder / "of_root"))
    for path in other, *other.rglob("*"):
        os.chown(path, 0, 0)
    begin = time.monotonic()
    run = deployment("run", "--rm", "-T", "export", check=False, MODEL_REPOSITORY=str(other))
    assert run.returncode == 1 and time.monotonic() - begin < 20
    assert "RUN_AS" in run.stderr and "chown" in run.stderr, run.stderr


# --- in order ---


def test_every_service_is_healthy(deployment: Deployment) -> None:
    for service in SERVICES:
        assert deployment.is_healthy(service), deployment.logs(service)[-2000:]


def test_embeddings_are_those_of_speechbrain(deployment: Deployment, clips: list[Clip], tally: Tally) -> None:
    with GrpcSender(deployment.grpc) as grpc, HttpSender(deployment.http) as http:
        calls = [(clip, grpc.start(clip.waveform)) for clip in clips * 4]
        for clip in clips:
            assert tally.check(clip, http.ask(clip.waveform)) == "right"
        for clip, call in calls:
            assert tally.check(clip, grpc_outcome(call)) == "right"
    with SpeakerClient(deployment.grpc) as client:
        assert client.verify(ROOT / "samples/anna_1.flac", ROOT / "samples/anna_2.flac").same
        assert not client.verify(ROOT / "samples/anna_1.flac", ROOT / "samples/berta_1.flac").same


def test_locust_puts_load_on_the_gateway(deployment: Deployment) -> None:
    deployment("--profile=load", "up", "-d", "locust")
    url = f"http://127.0.0.1:{deployment.ports['LOCUST_PORT']}"
    assert eventually(lambda: urlopen(url, timeout=5).status == 200), deployment.logs("locust")
    form = urlencode({"user_count": 4, "spawn_rate": 4, "host": "grpc://gateway:8001"}).encode()
    urlopen(f"{url}/swarm", form, timeout=20).read()

    def total() -> dict[str, Any]:
        rows = json.load(urlopen(f"{url}/stats/requests", timeout=5))["stats"]
        return next(row for row in rows if row["name"] == "Aggregated")

    assert eventually(lambda: total()["num_requests"] >= 50), (total(), deployment.logs("locust"))
    assert total()["num_failures"] == 0
    deployment("--profile=load", "rm", "-sf", "locust")


# --- monitoring ---


def query(deployment: Deployment, path: str, **arguments: str) -> Any:
    url = f"http://127.0.0.1:{deployment.ports['PROMETHEUS_PORT']}/api/v1/{path}?{urlencode(arguments)}"
    with urlopen(url, timeout=10) as reply:
        return json.load(reply)["data"]


def test_every_target_is_up(deployment: Deployment) -> None:
    def targets() -> list[Any]:
        return query(deployment, "targets")["activeTargets"]

    assert eventually(lambda: [one["health"] for one in targets()] == ["up"] * 5, 90), targets()
    (triton,) = (one["labels"] for one in targets() if one["labels"]["job"] == "triton")
    assert triton["device"] == "cpu"
    probes = query(deployment, "query", query="probe_success")["result"]
    assert [one["value"][1] for one in probes] == ["1"] * 3


def test_every_query_of_the_dashboard_is_answered(deployment: Deployment, clips: list[Clip], tally: Tally) -> None:
    dashboard = json.loads((ROOT / "monitoring/grafana/dashboards/ecapa-triton.json").read_text())
    asked = {target["expr"] for panel in dashboard["panels"] for target in panel["targets"]}
    # Those of alerts have data only while one fires.
    missing = {one for one in asked if "nv_gpu_" not in one and "ALERTS" not in one}
    assert len(missing) > 10

    def found() -> bool:
        for one in list(missing):
            result = query(deployment, "query", query=one.replace("$__rate_interval", "1m"))["result"]
            if any(value["value"][1] != "NaN" for value in result):
                missing.remove(one)
        return not missing

    with Traffic([lambda: GrpcSender(deployment.grpc), lambda: HttpSender(deployment.http)], clips, tally.check):
        assert eventually(found, 120), missing


# --- limits, keys, TLS ---


def test_limits(deployment: Deployment, tally: Tally) -> None:
    large = np.zeros((1, (2 << 20) // 4), np.float32)
    with changed(deployment, MAX_REQUEST_MB="1", MAX_REQUESTS="1", MAX_REQUESTS_PER_ADDRESS="4"):
        with GrpcSender(deployment.grpc) as grpc, HttpSender(deployment.http) as http:
            outcome = grpc.ask(large)
            assert isinstance(outcome, Rejection) and outcome.code == "RESOURCE_EXHAUSTED"
            outcome = http.ask(large)
            assert isinstance(outcome, Rejection) and outcome.code == "413"
            clip = np.zeros((1, 10 * 16000), np.float32)
            outcomes = [grpc_outcome(call) for call in [grpc.start(clip) for _ in range(20)]]
            codes = {one.code for one in outcomes if isinstance(one, Rejection)}
            assert codes == {"UNAVAILABLE"} and sum(not isinstance(one, Rejection) for one in outcomes) >= 1


def test_keys(deployment: Deployment) -> None:
    clip = ROOT / "samples/anna_1.flac"
    with changed(deployment, INFERENCE_KEY=f'"{KEY}\\nanother-key-of-16"'):
        for key in KEY, "another-key-of-16":
            with SpeakerClient(deployment.grpc, api_key=key) as client:
                assert client.embed(clip).shape == (192,)
        for key in None, KEY[:-1]:
            with SpeakerClient(deployment.grpc, api_key=key) as client, pytest.raises(KeyRefusedError):
                client.embed(clip)
        for name in None, KEY:
            headers = {"api-key": name} if name else {}
            assert http_status(deployment.http, "POST", "/v2/repository/index", b"{}", headers) == 403
        assert "without the right key" in deployment.logs("gateway")
        process = psutil.Process(deployment.inspect("gateway")["State"]["Pid"])
        commands = [" ".join(one.cmdline()) for one in [process, *process.children(recursive=True)]]
        assert any("nginx" in one for one in commands) and KEY not in "".join(commands)


@pytest.mark.parametrize("mutual", [False, True], ids=["TLS", "mutual TLS"])
def test_tls(mutual: bool, deployment: Deployment, folder: Path) -> None:
    tls = folder / "tls"
    variables = {"TLS_FOLDER": str(tls)} | ({"CLIENT_CA": "clients.pem"} if mutual else {})
    ours = Tls(tls / "clients.pem", tls / "client.pem", tls / "client_key.pem")
    with changed(deployment, **variables):
        url = f"grpcs://{deployment.grpc}"
        with SpeakerClient(url, tls=ours) as client:
            assert client.embed(ROOT / "samples/anna_1.flac").shape == (192,)
        with SpeakerClient(url, tls=Tls(tls / "clients.pem")) as client:
            if mutual:
                with pytest.raises(TrustError):
                    client.embed(ROOT / "samples/anna_1.flac")
            else:
                assert client.embed(ROOT / "samples/anna_1.flac").shape == (192,)
        context = ssl.create_default_context(cafile=tls / "clients.pem")
        assert http_status(deployment.http, "GET", "/v2/health/ready", context=context) == (403 if mutual else 200)


# --- confinement ---


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_confined(service: str, deployment: Deployment) -> None:
    facts = deployment.inspect(service)
    assert facts["HostConfig"]["ReadonlyRootfs"] and facts["HostConfig"]["Memory"] > 0
    status = Path(f"/proc/{facts['State']['Pid']}/status").read_text()
    assert re.search(r"CapEff:\s+0+\n", status) and re.search(r"NoNewPrivs:\s+1\n", status)
    user = USER.split(":")[0] if service in OURS else "65534"
    assert re.search(rf"Uid:\s+{user}\s", status)
    assert facts["State"]["OOMKilled"] is False
    if service in OURS:
        for path in "/app/x", "/models/x", "/etc/x":
            assert deployment.execute(service, "touch", path).returncode != 0
        assert deployment.execute(service, "touch", "/tmp/x").returncode == 0
    limits = Path(f"/proc/{facts['State']['Pid']}/limits").read_text()
    assert re.search(rf"Max open files +{deployment.variables['NOFILE']} ", limits)


def test_triton_has_no_port_and_no_way_out(deployment: Deployment) -> None:
    facts = deployment.inspect("triton")
    assert not any(facts["NetworkSettings"]["Ports"].values())
    (network,) = facts["NetworkSettings"]["Networks"]
    assert output("docker", "network", "inspect", "--format={{.Internal}}", network) == "true"


# --- crashes and stops ---


def kill(deployment: Deployment, service: str) -> None:
    """Ends a container's first process as a crash would; `docker kill` would count as a manual stop."""
    pid = deployment.inspect(service)["State"]["Pid"]
    os.kill(pid, signal.SIGKILL)
    assert eventually(lambda: deployment.inspect(service)["State"]["Pid"] not in (0, pid), BACK)


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_that_crashes_is_back(
    service: str, deployment: Deployment, clips: list[Clip], tally: Tally
) -> None:
    """Within seconds; clients with the default settings get right replies or, where that takes too long, errors."""
    with Traffic([lambda: ClientSender(deployment.grpc)] * 2, clips, tally.check) as load:
        load.wait_for_more(5)
        kill(deployment, service)
        assert eventually(lambda: deployment.is_healthy(service), BACK), deployment.logs(service)[-2000:]
        load.wait_for_more(5)
    if service not in OURS:
        assert set(load.verdicts) == {"right"}


def test_a_tritonserver_that_hangs_is_replaced(deployment: Deployment, clips: list[Clip], tally: Tally) -> None:
    launcher = psutil.Process(deployment.inspect("triton")["State"]["Pid"])
    (triton,) = (one for one in launcher.children(recursive=True) if one.name() == "tritonserver")
    triton.suspend()
    assert eventually(lambda: not launcher.is_running(), 90)
    assert eventually(lambda: deployment.is_healthy("triton"), BACK)
    assert "did not answer" in deployment.logs("triton")
    with ClientSender(deployment.grpc) as sender:
        assert tally.check(clips[0], sender.ask(clips[0].waveform)) == "right"


def test_a_stop_answers_requests_in_flight(deployment: Deployment, clips: list[Clip], tally: Tally) -> None:
    with GrpcSender(deployment.grpc) as sender, ThreadPoolExecutor(1) as pool:
        calls = [(clip, sender.start(clip.waveform)) for clip in clips * 8]
        calls[0][1].result()
        stopping = pool.submit(deployment, "stop", "gateway", "triton")
        verdicts = [tally.check(clip, grpc_outcome(call)) for clip, call in calls]
        stopping.result()
    # A request that had not arrived before the stop is rejected.
    assert verdicts.count("right") > len(clips)
    for service in OURS:
        assert deployment.inspect(service)["State"]["ExitCode"] == 0
        assert "stopped" in deployment.logs(service)
    deployment.up()
    with ClientSender(deployment.grpc) as client:
        assert tally.check(clips[0], client.ask(clips[0].waveform)) == "right"


def test_a_damaged_model_is_not_served(deployment: Deployment, folder: Path) -> None:
    damaged = Path(shutil.copytree(folder / "model_repository", folder / "damaged"))
    model = damaged / "ecapa/1/model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    give(damaged)
    run = deployment("run", "--rm", "-T", "--no-deps", "triton", check=False, MODEL_REPOSITORY=str(damaged))
    assert run.returncode == 1 and "model.onnx" in run.stderr, run.stderr


def test_the_image_with_models_serves_alone(
    deployment: Deployment, images: dict[str, str], folder: Path, clips: list[Clip]
) -> None:
    """Triton and its gateway in one container, as for hosts without a checkout; a damaged model does not build."""
    context = folder / "context"
    for name in "README.md", "constraints.txt", "pyproject.toml", "client", "export", "server", ".dockerignore":
        source = ROOT / name
        target = context / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    tag = f"{deployment.name}-with-models"
    build = ["docker", "build", "-q", "--force-rm", "-t", tag, "-f", str(context / "server/Dockerfile"), str(context)]
    shutil.copytree(folder / "damaged", context / "model_repository")
    assert not output(*build)
    shutil.rmtree(context / "model_repository")
    shutil.copytree(folder / "model_repository", context / "model_repository")
    assert output(*build)
    options = [
        "--read-only",
        f"--tmpfs=/tmp{':exec' if of_triton(images) else ''}",
        "--cap-drop=ALL",
        "--shm-size=1g",
        "-p",
        "127.0.0.1::8001",
    ]
    container = output("docker", "run", "-d", *options, tag)
    try:
        port = output("docker", "port", container, "8001").rpartition(":")[2]
        with ClientSender(f"127.0.0.1:{port}", timeout=60) as sender:
            assert clips[3].is_right(sender.ask(clips[3].waveform)[0])  # type: ignore[index]
    finally:
        output("docker", "rm", "-f", container)
        output("docker", "image", "rm", tag)


def test_down_leaves_nothing(deployment: Deployment) -> None:
    deployment("--profile=load", "up", "-d", "locust")
    deployment("--profile=*", "down", "-v")
    label = f"--filter=label=com.docker.compose.project={deployment.name}"
    for kind in ["ps", "-a"], ["network", "ls"], ["volume", "ls"]:
        assert output("docker", *kind, "-q", label) == ""
