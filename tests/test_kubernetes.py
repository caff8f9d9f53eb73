"""deploy/kubernetes is valid and consistent, and the commands of its containers run."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import containers
import numpy as np
import pytest
import yaml
from conftest import ROOT
from containers import Process, free_ports, needs_curl, needs_nginx, replace, status, succeeds
from ecapa_triton import KeyRefusedError, SpeakerClient
from ecapa_triton.protocol import KEY_HEADER

from server.triton import ask

FOLDER = ROOT / "deploy/kubernetes"
OVERLAYS = "cpu", "gpu"
KEYS = {"admin": "a" * 32, "inference": "i" * 32}  # of the Secret
VERSIONS = "1.29", "1.34"  # the oldest Kubernetes with sidecars, and a new one
# kubernetes-validate has no schema for it; it is monitoring.coreos.com/v1 of the Prometheus operator.
WITHOUT_SCHEMA = "ServiceMonitor"

Object = dict[str, Any]


def kubectl() -> int:
    """Minor version of kubectl; 0 without one."""
    if shutil.which("kubectl") is None:
        return 0
    command = ["kubectl", "version", "--client", "--output=json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return int(re.match(r"\d+", found["clientVersion"]["minor"])[0])


pytestmark = pytest.mark.skipif(kubectl() < 27, reason="kubectl 1.27 or newer is missing: https://kubernetes.io/docs")


@pytest.fixture(scope="module")
def overlays() -> dict[str, dict[str, Object]]:
    """The objects of `kubectl apply -k` by overlay and kind, one of each."""
    built = {}
    for name in OVERLAYS:
        run = subprocess.run(["kubectl", "kustomize", FOLDER / name], capture_output=True, text=True)
        assert (run.returncode, run.stderr) == (0, "")
        objects = list(yaml.safe_load_all(run.stdout))
        built[name] = {one["kind"]: one for one in objects}
        assert len(built[name]) == len(objects)
    return built


@pytest.fixture(params=OVERLAYS)
def objects(request: pytest.FixtureRequest, overlays: dict[str, dict[str, Object]]) -> dict[str, Object]:
    return overlays[request.param]


def pod(objects: dict[str, Object]) -> Object:
    return objects["Deployment"]["spec"]["template"]["spec"]


def by_name(objects: dict[str, Object]) -> dict[str, Object]:
    return {one["name"]: one for kind in ("initContainers", "containers") for one in pod(objects)[kind]}


@pytest.mark.parametrize("version", VERSIONS)
def test_objects_are_valid(objects: dict[str, Object], version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    for kind, one in objects.items():
        if kind != WITHOUT_SCHEMA:
            validate(one, version, strict=True)


def test_references_have_targets(objects: dict[str, Object]) -> None:
    deployment, service = objects["Deployment"], objects["Service"]
    labels = deployment["spec"]["template"]["metadata"]["labels"].items()
    assert labels >= service["spec"]["selector"].items()
    for kind, field in (
        ("Deployment", "selector"),
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
    ):
        assert labels >= objects[kind]["spec"][field]["matchLabels"].items()
    monitor = objects[WITHOUT_SCHEMA]["spec"]
    assert service["metadata"]["labels"].items() >= monitor["selector"]["matchLabels"].items()

    ports = {one["name"]: one["containerPort"] for each in by_name(objects).values() for one in each["ports"]}
    assert {one["name"]: one["port"] for one in service["spec"]["ports"]} == ports
    # By number: Services and NetworkPolicies know the names of sidecars' ports only since Kubernetes 1.32.
    allowed = [one["port"] for rule in objects["NetworkPolicy"]["spec"]["ingress"] for one in rule["ports"]]
    targets = [one["targetPort"] for one in service["spec"]["ports"]]
    assert set(targets) == set(allowed) == {"http", "grpc", "gateway", ports["metrics"]}

    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert "replicas" not in deployment["spec"]  # `kubectl apply` would undo the autoscaler's choice
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    assert scaler["metrics"][0]["pods"]["metric"]["name"] == rule["name"]["as"]

    volumes = {one["name"]: one for one in pod(objects)["volumes"]}
    # The Secret is the one of the command in the comment.
    (command,) = re.findall(r"kubectl create secret generic .*\n.*", (FOLDER / "base/kustomization.yaml").read_text())
    assert re.findall(r"generic (\S+)", command) == [volumes["keys"]["secret"]["secretName"]]
    assert re.findall(r"--from-literal=(\w+)=", command) == list(KEYS)


def test_pods_keep_to_the_policy(objects: dict[str, Object]) -> None:
    """The "restricted" Pod Security Standard, and a read-only root; keys in the gateway's container alone."""
    assert pod(objects)["automountServiceAccountToken"] is False
    assert pod(objects)["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    for name, one in by_name(objects).items():
        context = dict(one["securityContext"])
        assert context.pop("runAsUser") >= 101
        assert context == {
            "readOnlyRootFilesystem": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
        }
        assert {"cpu", "memory"} <= set(one["resources"]["requests"]) and "memory" in one["resources"]["limits"]
        assert re.fullmatch(r"[\w./-]+:[\d.]+", one["image"])
        assert ("keys" in [mount["name"] for mount in one["volumeMounts"]]) == (name == "gateway")
        words = one.get("command", []) + one["args"]
        assert not {"sh", "/bin/sh"} & set(words) and "\n" not in "".join(words)
    assert objects["NetworkPolicy"]["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert "egress" not in objects["NetworkPolicy"]["spec"]  # nothing is allowed


def test_there_is_time_to_start_and_stop(objects: dict[str, Object]) -> None:
    """The gateway stops first, with its requests in flight, and then Triton, a sidecar for that; their times add up."""
    assert [one["name"] for one in pod(objects)["initContainers"]] == ["triton"]
    triton, nginx = (by_name(objects)[name] for name in ("triton", "gateway"))
    assert triton["restartPolicy"] == "Always" and "restartPolicy" not in nginx
    (sleep, seconds) = nginx["lifecycle"]["preStop"]["exec"]["command"]
    drain = 30  # the default of --exit-timeout, for each of the two
    assert "--exit-timeout" not in " ".join(triton["args"] + nginx["args"])
    assert sleep == "sleep" and int(seconds) + 2 * drain < pod(objects)["terminationGracePeriodSeconds"]
    (limit,) = re.findall(r"--start-timeout=(\d+)", " ".join(triton["args"]))
    probe = triton["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= int(limit)


# --- the containers' commands ---


class Pod:
    """The containers' commands as processes of this machine."""

    def __init__(self, objects: dict[str, Object], models: Path, folder: Path) -> None:
        self.ports = free_ports(["8000", "8001", "8002", "8003"])
        self._folder = folder
        (folder / "keys").mkdir()
        for name, key in KEYS.items():
            (folder / "keys" / name).write_text(key)
        self.sockets = Path(tempfile.mkdtemp(dir="/tmp"))  # a socket's path is short
        places = {"/models": str(models), "/keys": str(folder / "keys"), "/sockets": str(self.sockets)}
        self._containers = replace(by_name(objects), places | {"=0.0.0.0": "=127.0.0.1"})

    def _start(self, name: str, *ports: tuple[str, str]) -> Process:
        """With the image's entry point."""
        container = self._containers[name]
        limits = {"limits.cpu": container["resources"]["limits"].get("cpu", "")}
        environment = {
            one["name"]: one["value"] if "value" in one else limits[one["valueFrom"]["resourceFieldRef"]["resource"]]
            for one in container["env"]
        }
        (entry,) = map(json.loads, containers.instruction("server/Dockerfile", "ENTRYPOINT"))
        arguments = [re.sub(r"\$\((\w+)\)", lambda found: environment[found[1]], one) for one in container["args"]]
        arguments += [f"--{option}-port={self.ports[usual]}" for option, usual in ports]
        return Process([*entry, *arguments], environment, self._folder / f"{name}.log")

    def start_triton(self) -> Process:
        return self._start("triton", ("metrics", "8002"))

    def start_gateway(self) -> Process:
        return self._start("gateway", ("http", "8000"), ("grpc", "8001"), ("gateway-metrics", "8003"))

    def probe(self, name: str, kind: str) -> bool:
        """Whether the kubelet would find the container well."""
        probe = self._containers[name][kind]
        if "exec" in probe:
            return succeeds(probe["exec"]["command"])
        usual = {one["name"]: one["containerPort"] for one in self._containers[name]["ports"]}
        (target,) = {"tcpSocket", "httpGet"} & probe.keys()
        port = self.ports[str(usual[probe[target]["port"]])]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return target == "tcpSocket" or status(port, "GET", probe[target]["path"]) == 200
        return False


@needs_nginx
@needs_curl
def test_a_pod_runs(
    overlays: dict[str, dict[str, Object]],
    repository: Path,
    tmp_path: Path,
    reference: Callable[[np.ndarray], np.ndarray],
) -> None:
    """Its flags are the launcher's, its probes are right, closed APIs are closed, and it stops in order."""
    pod = Pod(overlays["cpu"], repository, tmp_path)
    with pod.start_triton() as triton, pod.start_gateway() as gateway:
        gateway.wait_until(lambda: pod.probe("gateway", "livenessProbe"))
        triton.wait_until(lambda: pod.probe("triton", "startupProbe"))
        gateway.wait_until(lambda: pod.probe("gateway", "readinessProbe"))
        assert pod.probe("triton", "livenessProbe")

        clip = (0.1 * np.random.default_rng(0).standard_normal(16_000)).astype(np.float32)
        grpc = f"127.0.0.1:{pod.ports['8001']}"
        with SpeakerClient(grpc, api_key=KEYS["inference"]) as client:
            np.testing.assert_allclose(client.embed(clip, 16_000), reference(clip), rtol=0, atol=1e-3)
        with SpeakerClient(grpc) as client, pytest.raises(KeyRefusedError):
            client.embed(clip, 16_000)
        for path, key, other in (
            ("/v2/repository/index", "admin", "inference"),
            ("/v2/models/ecapa/infer", "inference", "admin"),
        ):
            sent = [{KEY_HEADER: one} for one in ("", KEYS[other], KEYS[key])]
            found = [status(pod.ports["8000"], "POST", path, headers) for headers in sent]
            assert found[:2] == [403, 403] and found[2] != 403
        # As many threads as the limit of CPUs.
        config = json.loads(ask(pod.sockets / "http", "/v2/models/ecapa/config"))
        limit = by_name(overlays["cpu"])["triton"]["resources"]["limits"]["cpu"]
        assert config["parameters"]["intra_op_thread_count"]["string_value"] == limit
        with urlopen(f"http://127.0.0.1:{pod.ports['8002']}/metrics", timeout=10) as reply:
            page = reply.read().decode()
        for name in re.findall(r"\bnv_\w+", (FOLDER / "prometheus-adapter.yaml").read_text()):
            assert f"\n{name}{{" in page

        # The order in which a pod stops: the gateway first.
        assert gateway.stop() == 0
        assert pod.probe("triton", "livenessProbe") and not pod.probe("gateway", "readinessProbe")
        assert triton.stop() == 0, triton.text()


@needs_nginx
def test_an_empty_key_opens_nothing(overlays: dict[str, dict[str, Object]], repository: Path, tmp_path: Path) -> None:
    """The gateway does not start."""
    pod = Pod(overlays["cpu"], repository, tmp_path)
    (tmp_path / "keys/inference").write_text("\n")
    with pod.start_gateway() as gateway:
        assert gateway.process.wait(60) != 0
        assert "0 characters" in gateway.text()


def test_the_gateway_is_alive_and_not_ready_without_triton(
    overlays: dict[str, dict[str, Object]], repository: Path, tmp_path: Path
) -> None:
    pod = Pod(overlays["cpu"], repository, tmp_path)
    with pod.start_gateway() as gateway:
        gateway.wait_until(lambda: pod.probe("gateway", "livenessProbe"))
        assert not pod.probe("gateway", "readinessProbe")


# --- the autoscaler's metric ---

# Two replicas, scraped every 15 s: the first has 2 requests per second that wait 0.3 s each, the second none.
SERIES = {
    'nv_inference_queue_duration_us{pod="busy"}': "0+9000000x20",
    'nv_inference_request_success{pod="busy"}': "0+30x20",
    'nv_inference_queue_duration_us{pod="idle"}': "7+0x20",
    'nv_inference_request_success{pod="idle"}': "7+0x20",
}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt install prometheus")
def test_autoscaler_sees_the_mean_time_in_the_queue(tmp_path: Path) -> None:
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    query = rule["metricsQuery"].replace("<<.GroupBy>>", "pod").replace("<<.LabelMatchers>>", 'pod=~"busy|idle"')
    expected = [{"labels": f'{{pod="{name}"}}', "value": value} for name, value in (("busy", 0.3), ("idle", 0.0))]
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in SERIES.items()],
        "promql_expr_test": [{"expr": query, "eval_time": "4m", "exp_samples": expected}],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"evaluation_interval": "15s", "tests": [test]}))
    run = subprocess.run(["promtool", "test", "rules", file], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
