"""Past one machine: deploy/kubernetes is valid and consistent, its containers' commands run, its sizes are computed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np
import pytest
import yaml
from conftest import ROOT, entry_point
from ecapa_triton import KeyRefusedError, SpeakerClient
from ecapa_triton.protocol import KEY_HEADER

from loadtest.__main__ import main as loadtest
from loadtest.capacity import Demand, replicas
from server import gateway
from server.options import ADMIN, GROUPS
from server.triton import assemble_wheel, check_repository

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = "cpu", "gpu"
KEYS = {"admin": "a" * 32, "inference": "i" * 32}  # of the Secret
VERSIONS = "1.29", "1.34"  # the oldest Kubernetes that has sidecars, and a new one
# No schema is at hand for this one; its fields are those of prometheus-operator's CRD, monitoring.coreos.com/v1.
WITHOUT_SCHEMA = "ServiceMonitor"

Object = dict[str, Any]


def kubectl() -> int:
    """Minor version of kubectl; 0 without one."""
    if shutil.which("kubectl") is None:
        return 0
    command = ["kubectl", "version", "--client", "--output=json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return int(re.match(r"\d+", found["clientVersion"]["minor"])[0])


needs_kubectl = pytest.mark.skipif(
    kubectl() < 27, reason="kubectl 1.27 or newer is not installed: https://kubernetes.io/docs/tasks/tools"
)


def nginx() -> tuple[int, ...]:
    """Version of nginx; of 0 without one."""
    binary = gateway.find()
    if binary is None:
        return (0,)
    found = subprocess.run([binary, "-v"], capture_output=True, text=True).stderr
    return tuple(map(int, re.findall(r"nginx/([\d.]+)", found)[0].split(".")))


needs_nginx = pytest.mark.skipif(
    nginx() < (1, 19, 10), reason="nginx 1.19.10 or newer is not installed: apt install nginx-light"
)


@pytest.fixture(scope="module")
def overlays() -> dict[str, dict[str, Object]]:
    """What `kubectl apply -k` would send, by overlay and kind, of which there is one each; ConfigMaps by their file."""
    built = {}
    for name in OVERLAYS:
        run = subprocess.run(["kubectl", "kustomize", FOLDER / name], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "")
        objects = list(yaml.safe_load_all(run.stdout))
        built[name] = {"".join(one["data"]) if one["kind"] == "ConfigMap" else one["kind"]: one for one in objects}
        assert len(built[name]) == len(objects)
    return built


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, overlays: dict[str, dict[str, Object]]) -> dict[str, Object]:
    return overlays[request.param]


def pod(objects: dict[str, Object]) -> Object:
    return objects["Deployment"]["spec"]["template"]["spec"]


def containers(objects: dict[str, Object]) -> dict[str, Object]:
    return {one["name"]: one for kind in ("initContainers", "containers") for one in pod(objects)[kind]}


@needs_kubectl
@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(objects: dict[str, Object], version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    for kind, one in objects.items():
        if kind != WITHOUT_SCHEMA:
            validate(one, version, strict=True)


@needs_kubectl
def test_objects_refer_to_what_is_there(objects: dict[str, Object]) -> None:
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["Deployment"]["spec"]["selector"]["matchLabels"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        *(one["labelSelector"]["matchLabels"] for one in pod(objects)["topologySpreadConstraints"]),
    ]
    for selector in selectors:
        assert selector and selector.items() <= labels.items()
    monitor = objects[WITHOUT_SCHEMA]["spec"]
    assert monitor["selector"]["matchLabels"].items() <= objects["Service"]["metadata"]["labels"].items()

    ports = {
        one["name"]: one["containerPort"] for each in containers(objects).values() for one in each.get("ports", [])
    }
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    served = {one["name"]: one for one in objects["Service"]["spec"]["ports"]}
    # By number: Services and NetworkPolicies know names of sidecars' ports only since Kubernetes 1.32.
    assert {name: one["targetPort"] for name, one in served.items()} == {
        "http": "http",
        "grpc": "grpc",
        "metrics": 8002,
    }
    assert {name: one["port"] for name, one in served.items()} == ports
    assert [set(one) - {"port", "interval"} for one in monitor["endpoints"]] == [set()]
    assert monitor["endpoints"][0]["port"] in served
    allowed = [one["port"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] for one in rule["ports"]]
    assert allowed == ["http", "grpc", 8002]

    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    target = objects["Deployment"]
    assert scaler["scaleTargetRef"] == {
        "apiVersion": target["apiVersion"],
        "kind": "Deployment",
        "name": target["metadata"]["name"],
    }
    assert "replicas" not in target["spec"]  # or each `kubectl apply` would undo what the autoscaler did
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]

    volumes = {one["name"]: one for one in pod(objects)["volumes"]}
    mounted = {one["name"] for each in containers(objects).values() for one in each["volumeMounts"]}
    assert mounted == set(volumes)
    folders = {one["name"]: one["mountPath"] for one in containers(objects)["gateway"]["volumeMounts"]}
    variables = {one["name"]: one["value"] for one in containers(objects)["gateway"]["env"]}
    for volume, file in ("templates", "nginx.conf.template"), ("connections", "connections.conf"):
        assert volumes[volume]["configMap"]["name"] == objects[file]["metadata"]["name"]
    assert (
        objects["nginx.conf.template"]["data"]["nginx.conf.template"]
        == (ROOT / "server/nginx.conf.template").read_text()
    )
    assert folders["templates"] == "/etc/nginx/templates"  # where the image's entry point looks
    assert folders["connections"] == variables["TLS_CONF"].removesuffix("/connections.conf")
    secrets = [
        one["valueFrom"]["secretKeyRef"]
        for one in containers(objects)["triton"]["env"]
        if "secretKeyRef" in one.get("valueFrom", {})
    ]
    assert {(one["name"], one["key"], one.get("optional", False)) for one in secrets} == {
        ("ecapa-triton-keys", key, False) for key in KEYS
    }
    # The one that the comment tells to make.
    (command,) = re.findall(r"kubectl create secret generic .*\n.*", (FOLDER / "base/kustomization.yaml").read_text())
    assert re.findall(r"generic (\S+)", command) == ["ecapa-triton-keys"]
    assert re.findall(r"--from-literal=(\w+)=", command) == list(KEYS)


@needs_kubectl
def test_pods_are_confined(objects: dict[str, Object]) -> None:
    """The "restricted" Pod Security Standard, and no more than that."""
    assert pod(objects)["automountServiceAccountToken"] is False
    assert pod(objects)["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for name, one in containers(objects).items():
        context = dict(one["securityContext"])
        assert context.pop("runAsUser") == (101 if name == "gateway" else 1000)
        assert context == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(one["resources"]["requests"]) and "memory" in one["resources"]["limits"]
    assert all(set(one) & {"emptyDir", "configMap"} for one in pod(objects)["volumes"])
    assert objects["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in objects["NetworkPolicy"]["spec"]  # nothing is allowed


@needs_kubectl
def test_there_is_time_to_stop(objects: dict[str, Object]) -> None:
    """nginx ends first, with the requests that it has, and then Triton, a sidecar for that; their times add up."""
    assert [one["name"] for one in pod(objects)["initContainers"]] == ["model", "triton"]
    triton, nginx = (containers(objects)[name] for name in ("triton", "gateway"))
    assert triton["restartPolicy"] == "Always" and "restartPolicy" not in nginx
    (sleep, seconds) = nginx["lifecycle"]["preStop"]["exec"]["command"]
    (drain,) = re.findall(
        r"worker_shutdown_timeout (\d+)s;", objects["nginx.conf.template"]["data"]["nginx.conf.template"]
    )
    (exit_timeout,) = re.findall(r"--exit-timeout-secs=(\d+)", " ".join(triton["args"]))
    assert sleep == "sleep"
    assert int(seconds) + int(drain) + int(exit_timeout) < pod(objects)["terminationGracePeriodSeconds"]


@needs_kubectl
def test_images_have_tags(objects: dict[str, Object]) -> None:
    images = {name: one["image"] for name, one in containers(objects).items()}
    assert images["triton"] == "nvcr.io/nvidia/tritonserver:24.10-py3"
    assert re.fullmatch(r"docker\.io/library/nginx:\d+\.\d+\.\d+-alpine", images["gateway"])
    assert images["model"] == "registry.example.com/ecapa-triton-model:1"


@needs_kubectl
def test_each_device_has_its_config(overlays: dict[str, dict[str, Object]], repository: Path) -> None:
    for overlay in OVERLAYS:
        objects = overlays[overlay]
        triton = containers(objects)["triton"]
        environment = {one["name"]: one.get("value") for one in triton["env"]}
        assert (environment["CONFIG"], environment["GPU_METRICS"]) == (overlay, str(overlay == "gpu").lower())
        assert ("nvidia.com/gpu" in triton["resources"]["limits"]) == (overlay == "gpu")
        check_repository(repository, environment["CONFIG"])


# --- the containers' commands ---


@dataclass
class Image:
    """The model's image, without Docker: a folder, and what its Dockerfile copies there and runs."""

    root: Path
    command: list[str]

    def run(self, *, threads: str = "2") -> subprocess.CompletedProcess[str]:
        """Runs its command on the folder in place of the root, with this Python."""
        command = [f"{self.root}{word}" if word.startswith("/") else word for word in self.command]
        assert command[0] == "python"
        environment = {"PATH": os.environ["PATH"], "THREADS": threads}
        return subprocess.run([sys.executable, *command[1:]], env=environment, capture_output=True, text=True)


@pytest.fixture
def image(repository: Path, tmp_path: Path) -> Image:
    root = tmp_path / "image"
    (root / "models").mkdir(parents=True)  # where the pod's volume is mounted
    context = tmp_path / "context"  # as far as the build sees it
    everything, *names = (FOLDER / "model/Dockerfile.dockerignore").read_text().split()
    assert everything == "*"
    for name in (name.removeprefix("!") for name in names):
        source = repository / "ecapa" if name == "model_repository/ecapa" else ROOT / name
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, context / name)
    dockerfile = (FOLDER / "model/Dockerfile").read_text()
    for sources, target in re.findall(r"^COPY --chown=1000:1000 (.+) (\S+)$", dockerfile, re.MULTILINE):
        for source in sources.split():
            if (context / source).is_dir():
                shutil.copytree(context / source, root / target[1:])
            else:
                shutil.copy(context / source, root / target[1:])
    (command,) = re.findall(r"^CMD (.+)$", dockerfile, re.MULTILINE)
    return Image(root, json.loads(command))


def test_model_is_fetched_whole(image: Image, repository: Path) -> None:
    """The files are those that were exported, but for the threads; the second run, after a restart, does no harm."""
    for threads in "2", "3":
        run = image.run(threads=threads)
        assert run.returncode == 0, run.stderr
    fetched = image.root / "models/ecapa"
    differing = [
        str(path.relative_to(repository / "ecapa"))
        for path in sorted((repository / "ecapa").rglob("*"))
        if path.is_file() and path.read_bytes() != (fetched / path.relative_to(repository / "ecapa")).read_bytes()
    ]
    assert differing in (["configs/cpu.pbtxt"], [])
    config = (fetched / "configs/cpu.pbtxt").read_text()
    assert 'parameters { key: "intra_op_thread_count" value: { string_value: "3" } }' in config
    check_repository(image.root / "models", "cpu")


def test_damaged_model_is_not_served(image: Image) -> None:
    model = image.root / "model_repository/ecapa/1/model.onnx"
    data = bytearray(model.read_bytes())
    data[len(data) // 2] ^= 1
    model.write_bytes(data)
    run = image.run()
    assert run.returncode == 1 and "is not as it was written" in run.stderr
    for file in model.parent.glob("model*.onnx"):
        file.unlink()
    run = image.run()
    assert run.returncode == 1
    shutil.rmtree(image.root / "models/ecapa")
    run = image.run()
    assert run.returncode == 1 and "has no model file: run python -m export" in run.stderr


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Pod:
    """The containers' commands as processes of this machine, with other ports and folders and the wheel's Triton."""

    def __init__(self, objects: dict[str, Object], models: Path, folder: Path) -> None:
        self.containers = containers(objects)
        self.ports = {port: free_port() for port in (8000, 8001, 8002, 8010, 8011)}
        self._folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        connections = folder / "connections"
        connections.mkdir()
        (connections / "connections.conf").write_text(objects["connections.conf"]["data"]["connections.conf"])
        self._paths = {"/models": models, "/run/gateway": folder / "gateway", "/etc/nginx/connections": connections}
        self._template = objects["nginx.conf.template"]["data"]["nginx.conf.template"]

    def here(self, text: str) -> str:
        """A value of the manifest with this machine's ports and folders."""
        text = text.replace("0.0.0.0", "127.0.0.1")
        text = re.sub(r"\b80[01]\d\b", lambda found: str(self.ports[int(found[0])]), text)
        for path, folder in self._paths.items():
            text = re.sub(f"(^|=){path}\\b", rf"\g<1>{folder}", text)
        return text

    def environment(self, name: str) -> dict[str, str]:
        values = {}
        for one in self.containers[name]["env"]:
            secret = one.get("valueFrom", {}).get("secretKeyRef")
            values[one["name"]] = KEYS[secret["key"]] if secret else self.here(one["value"])
        return values

    def start_triton(self) -> None:
        """With the manifest's options, and those that tell the wheel where it is."""
        own = self.environment("triton")
        triton = self.containers["triton"]
        *shell, tritonserver = triton["command"]
        assert tritonserver == "/opt/tritonserver/bin/tritonserver"
        arguments = [
            re.sub(r"\$\((\w+)\)", lambda found: own[found[1]], self.here(option)) for option in triton["args"]
        ]
        environment = dict(os.environ) | own
        binary, backends = assemble_wheel(self._folder, environment)
        command = [*shell, str(binary), *arguments, f"--backend-directory={backends}"]
        self._start("triton", command, environment)

    def start_gateway(self) -> None:
        environment = self.environment("gateway")
        folder = self._paths["/run/gateway"]
        folder.mkdir()
        (folder / "nginx.conf").write_text(entry_point(self._template, environment))
        nginx, *options = self.containers["gateway"]["args"]
        assert nginx == "nginx" and environment["NGINX_ENVSUBST_OUTPUT_DIR"] == str(folder)
        self._start("gateway", [gateway.find() or "", *map(self.here, options)], dict(os.environ))

    def _start(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        with (self._folder / f"{name}.log").open("wb") as log:
            self.processes[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def probe(self, name: str, kind: str) -> bool:
        """Whether the kubelet would find the container well."""
        probe = self.containers[name][kind]
        if "exec" in probe:
            command = list(map(self.here, probe["exec"]["command"]))
            return subprocess.run(command, capture_output=True).returncode == 0
        ports = {one["name"]: one["containerPort"] for one in self.containers[name]["ports"]}
        try:
            if "tcpSocket" in probe:
                port = self.ports[ports[probe["tcpSocket"]["port"]]]
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                return True
            port = self.ports[ports[probe["httpGet"]["port"]]]
            with urlopen(f"http://127.0.0.1:{port}{probe['httpGet']['path']}", timeout=5) as reply:
                return reply.status == 200
        except OSError:  # HTTPError is one
            return False

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text(errors="replace")


@contextmanager
def running(one: Pod) -> Iterator[Pod]:
    try:
        yield one
    finally:
        for process in one.processes.values():
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()


def wait_for(one: Pod, name: str, kind: str, well: bool = True) -> None:
    deadline = time.monotonic() + 60
    while one.probe(name, kind) != well:
        assert one.processes[name].poll() is None or not well, one.log(name)
        assert time.monotonic() < deadline, one.log(name)
        time.sleep(0.1)


def status(url: str, method: str = "GET", key: str = "") -> int:
    try:
        with urlopen(Request(url, method=method, headers={KEY_HEADER: key} if key else {}), timeout=10) as reply:
            return reply.status
    except HTTPError as error:
        return error.code


@needs_kubectl
@needs_nginx
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed: apt install curl")
def test_a_pod_runs(
    overlays: dict[str, dict[str, Object]],
    image: Image,
    tmp_path: Path,
    reference: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Its options are tritonserver's, its probes tell the truth, what is closed is closed, and it stops in order."""
    assert image.run().returncode == 0
    objects = overlays["cpu"]
    with running(Pod(objects, image.root / "models", tmp_path)) as one:
        one.start_triton()
        wait_for(one, "triton", "startupProbe")
        assert one.probe("triton", "livenessProbe")
        assert not one.probe("gateway", "readinessProbe") and not one.probe("gateway", "livenessProbe")
        one.start_gateway()
        wait_for(one, "gateway", "readinessProbe")
        assert one.probe("gateway", "livenessProbe")

        http, grpc, metrics = (f"127.0.0.1:{one.ports[port]}" for port in (8000, 8001, 8002))
        clip = (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)
        with SpeakerClient(grpc, api_key=KEYS["inference"]) as client:
            np.testing.assert_allclose(client.embed(clip, 16_000), reference(clip), rtol=0, atol=1e-3)
            assert client.status().deployment.instances == ("1 on the CPU",)
        with SpeakerClient(grpc) as client, pytest.raises(KeyRefusedError):
            client.embed(clip, 16_000)
        paths = {"model-repository": ("/v2/repository/index", "POST"), "logging": ("/v2/logging", "GET")}
        paths |= {"inference": ("/v2/models/ecapa/infer", "POST"), "metadata": ("/v2/models/ecapa", "GET")}
        for group, (path, method) in paths.items():
            key, other = ("admin", "inference") if group in ADMIN else ("inference", "admin")
            assert status(f"http://{http}{path}", method) == 403
            assert status(f"http://{http}{path}", method, KEYS[other]) == 403
            assert status(f"http://{http}{path}", method, KEYS[key]) != 403
        with urlopen(f"http://{metrics}/metrics", timeout=10) as reply:
            page = reply.read().decode()
        assert re.search(r'nv_inference_request_success\{model="ecapa",version="1"\} [1-9]', page)
        rule = (FOLDER / "prometheus-adapter.yaml").read_text()
        for name in re.findall(r"\bnv_\w+", rule):
            assert f"\n{name}{{" in page
        assert "nv_inference_request_summary_us{" in page

        # The order in which a pod ends: the gateway first, with SIGQUIT.
        one.processes["gateway"].send_signal(signal.SIGQUIT)
        assert one.processes["gateway"].wait(20) == 0
        assert one.probe("triton", "livenessProbe")
        one.processes["triton"].terminate()
        assert one.processes["triton"].wait(40) == 0, one.log("triton")
        assert not one.probe("triton", "livenessProbe")


@needs_kubectl
@needs_nginx
def test_a_gateway_without_triton_is_alive_and_not_ready(
    overlays: dict[str, dict[str, Object]], tmp_path: Path
) -> None:
    objects = overlays["cpu"]
    with running(Pod(objects, tmp_path / "models", tmp_path)) as one:
        one.start_gateway()
        wait_for(one, "gateway", "livenessProbe")
        assert not one.probe("gateway", "readinessProbe")


@needs_kubectl
def test_every_variable_of_the_gateway_is_set(objects: dict[str, Object]) -> None:
    names = {one["name"] for one in containers(objects)["gateway"]["env"]} - {"NGINX_ENVSUBST_OUTPUT_DIR"}
    assert set(re.findall(r"\$\{(\w+)\}", objects["nginx.conf.template"]["data"]["nginx.conf.template"])) == names


@needs_kubectl
def test_options_are_those_of_our_server(objects: dict[str, Object]) -> None:
    """What `python -m server` gives to tritonserver, the manifest does, or this test says why not."""
    triton = containers(objects)["triton"]
    names = {option.partition("=")[0][2:] for option in triton["args"]}
    launch = (ROOT / "server/triton.py").read_text()
    ours = set(re.findall(r'^ {12}"([a-z-]+)": ', launch, re.MULTILINE))
    assert len(ours) > 5
    assert ours - names == set()
    assert names - ours == {
        *(f"{api}-{what}" for api in ("http", "grpc", "metrics") for what in ("address", "port")),
        "disable-auto-complete-config",
        "grpc-restricted-protocol",
        "http-restricted-api",
    }
    for option in "grpc-restricted-protocol", "http-restricted-api":
        groups = re.findall(rf"--{option}=([\w,-]+):{KEY_HEADER}=", "\n".join(triton["args"]))
        assert {*",".join(groups).split(",")} == set(GROUPS) - {"health"}


# --- the autoscaler's metric ---

# Two replicas, scraped every 15 s: the first has 2 requests a second that wait 0.3 s each, the second none.
SERIES = {
    'nv_inference_queue_duration_us{pod="busy"}': "0+9000000x20",
    'nv_inference_request_success{pod="busy"}': "0+30x20",
    'nv_inference_queue_duration_us{pod="idle"}': "7+0x20",
    'nv_inference_request_success{pod="idle"}': "7+0x20",
}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed: apt install prometheus")
def test_autoscaler_sees_the_mean_time_in_the_queue(tmp_path: Path) -> None:
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'pod=~"busy|idle"')
    expected = [{"labels": f'{{pod="{name}"}}', "value": value} for name, value in (("busy", 0.3), ("idle", 0.0))]
    test = {
        "evaluation_interval": "15s",
        "tests": [
            {
                "interval": "15s",
                "input_series": [{"series": name, "values": values} for name, values in SERIES.items()],
                "promql_expr_test": [{"expr": query, "eval_time": "4m", "exp_samples": expected}],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump(test))
    run = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


# --- docs/capacity.md ---


def test_capacity_page_is_what_the_measurement_gives(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs/capacity.md").read_text()
    (command,) = re.findall(r"```sh\npython -m loadtest (.+)\n```", page)
    (output,) = re.findall(r"```text\n(.+?)```", page, re.DOTALL)
    words = [str(ROOT / word) if word.startswith("loadtest/results/") else word for word in command.split()]
    assert loadtest(words) == 0
    assert capsys.readouterr().out == output
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,.]+) \| ([\d,.]+) \| ([\d,]+) \| ([\d,]+) \| not measured \|$", page, re.M)
    assert len(rows) == 4
    for row in rows:
        clips, *figures = (float(cell.replace(",", "")) for cell in row)
        words[words.index("--clips-per-day") + 1] = str(clips)
        assert loadtest(words) == 0
        printed = capsys.readouterr().out
        demand = Demand(clips, seconds=5, peak=3)
        (count,) = re.findall(r"and 1 to spare: (\d+)\.", printed)
        expected = [demand.audio_per_s, demand.audio_per_s * 0.064, int(count), 2 * int(count)]
        assert figures == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize(
    "clips, speed, utilization, expected",
    [(86_400, 10, 1.0, 1), (86_401, 10, 1.0, 2), (86_400, 10, 0.5, 2), (864_000, 3, 0.9, 38)],
)
def test_replicas(clips: int, speed: float, utilization: float, expected: int) -> None:
    """864,000 clips of 10 s a day are 100 s of audio a second; 2.7 of them for each replica."""
    assert replicas(Demand(clips, seconds=10, peak=1), speed, utilization) == expected


@pytest.mark.parametrize(
    "speeds, reason",
    [
        ([], "the scenario mixed was not measured"),
        ([0.0], "cpu embedded nothing in the scenario mixed"),
        ([math.nan], "cpu embedded nothing in the scenario mixed"),
    ],
)
def test_capacity_needs_the_measurement(
    speeds: list[float], reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"target": "cpu", "contender": "ours", "scenario": "mixed", "audio_per_s": speed} for speed in speeds]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"kind": "load", "rows": rows}))
    assert loadtest(["capacity", str(result), "--clips-per-day", "1"]) == 1
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--clips-per-day=1e308", "--mean-seconds=0", "--peak-factor=0.5", "--utilization=2"]
)
def test_capacity_of_nonsense(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        loadtest(["capacity", "result.json", "--clips-per-day=1", option])
    assert f"argument {option.partition('=')[0]}" in capsys.readouterr().err
