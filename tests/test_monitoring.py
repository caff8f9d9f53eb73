"""Prometheus, its alerts and the dashboard's queries, on a real tritonserver behind the gateway."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import containers
import numpy as np
import pytest
import stand_in
import yaml
from conftest import ROOT
from containers import Process
from launcher import http_status
from tritonclient.grpc import InferenceServerClient
from tritonclient.utils import InferenceServerException

from server import Limits, TritonServer, gateway
from server.gateway_metrics import Counts, KeyWarnings

FOLDER = ROOT / "monitoring"
PROMETHEUS = FOLDER / "prometheus"
RULES = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"][0]["rules"]
ALERTS = [rule["alert"] for rule in RULES]
DASHBOARD = json.loads((FOLDER / "grafana/dashboards/ecapa-triton.json").read_text())
PANELS = DASHBOARD["panels"]
GPU = "nv_gpu_"  # only these series may have no data without a GPU

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool: apt install prometheus")
MISSING = [tool for tool in ("prometheus", "prometheus-blackbox-exporter") if shutil.which(tool) is None]
MISSING += [] if gateway.find() else ["nginx-light"]
needs_plant = pytest.mark.skipif(bool(MISSING), reason=f"apt install {' '.join(MISSING)}")

LIMIT = 2  # requests in flight
MEGABYTE = np.zeros((1, (1 << 20) // 4), np.float32)  # with its header, larger than the gateway accepts


def selectors(expression: str) -> dict[str, str]:
    """The series of an expression, by name, with their labels."""
    return {found[1]: found[0] for found in re.finditer(r"\b([a-z]+_[a-z_]+|up)\b(?:\{[^}]*\})?(?![\w(])", expression)}


# --- the files by themselves ---


@needs_promtool
@pytest.mark.parametrize(
    "command", ["check config prometheus.yml", "check rules --lint-fatal alerts.yml", "test rules alerts_test.yml"]
)
def test_promtool_accepts(command: str) -> None:
    run = subprocess.run(["promtool", *command.split()], cwd=PROMETHEUS, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_each_alert_has_a_test_in_which_it_fires() -> None:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    samples = [sample for test in tests for one in test["promql_expr_test"] for sample in one["exp_samples"]]
    assert {name for sample in samples for name in re.findall(r'alertname="(\w+)"', sample["labels"])} == set(ALERTS)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panel_has_the_unit_of_its_queries_and_the_provisioned_datasource(panel: dict[str, Any]) -> None:
    (source,) = yaml.safe_load((FOLDER / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    unit = panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert target["datasource"] == panel["datasource"] == {"type": "prometheus", "uid": source["uid"]}
        names = set(selectors(target["expr"]))
        units = {"µs" for name in names if name.endswith("_us")}
        units |= {"bytes" for name in names if name.startswith("nv_") and name.endswith("_bytes")}
        assert units <= {unit} and ("rate(" in target["expr"] or unit != "reqps")


# --- the log lines of nginx ---


@pytest.mark.parametrize(
    ("line", "api", "result"),
    [
        ('grpc "" 200 "-" "0"', "grpc", "ok"),
        ('grpc "" 200 "3" "-"', "grpc", "bad_request"),
        ('grpc "" 200 "13" "-"', "grpc", "failed"),
        ('grpc "" 200 "-" "-"', "grpc", "failed"),
        ('grpc "" 499 "-" "-"', "grpc", "gave_up"),
        ('grpc "busy" 200 "-" "-"', "grpc", "busy"),
        ('grpc "crowded" 200 "-" "-"', "grpc", "busy"),
        ('grpc "small" 200 "-" "-"', "grpc", "bad_request"),
        ('grpc "key" 200 "-" "-"', "grpc", "key"),
        ('http "" 200 "-" "-"', "http", "ok"),
        ('http "" 400 "-" "-"', "http", "bad_request"),
        ('http "" 500 "-" "-"', "http", "failed"),
        ('http "too_large" 413 "-" "-"', "http", "too_large"),
    ],
)
def test_a_line_of_nginx_is_counted_once(line: str, api: str, result: str) -> None:
    counts = Counts()
    key = counts.add(f"<190>Nov 23 07:00:00 nginx: {line} 64210 10.0.0.7 inference".encode())
    assert f'gateway_requests_total{{api="{api}",result="{result}"}} 1\n' in counts.text()
    assert sum(counts.requests.values()) == 1
    assert counts.answered_bytes[api] == (64210 if result == "ok" else 0)
    assert key == (("10.0.0.7", "inference") if result == "key" else None)


def test_other_datagrams_are_ignored() -> None:
    counts = Counts()
    for datagram in b"", b"\xff\xfe", b"grpc", b'smtp "-" 200 "-" "0" 1 10.0.0.7 inference', b"x" * 5000:
        counts.add(datagram)
    assert counts.text() == Counts().text()


def test_wrong_keys_of_an_address_are_told_once_a_minute() -> None:
    warnings = KeyWarnings()
    assert warnings.about("10.0.0.7", "inference", 100).startswith("1 request from 10.0.0.7 ")
    assert not any(warnings.about("10.0.0.7", "inference", 100 + n) for n in range(59))
    assert "10.0.0.8" in warnings.about("10.0.0.8", "admin", 150)
    assert warnings.about("10.0.0.7", "metadata", 161).startswith("60 requests from 10.0.0.7 ")
    told = [warnings.about(f"10.1.{n // 256}.{n % 256}", "inference", 170) for n in range(3000)]
    assert 900 < sum(map(bool, told)) <= 1000  # however many addresses there are
    assert warnings.about("10.0.0.9", "inference", 300)


# --- all of it, running ---


class Plant:
    """Triton with its gateway, the blackbox exporter and Prometheus, each on a free port."""

    def __init__(self, folder: Path, triton: TritonServer, stack: ExitStack) -> None:
        self.triton = triton
        self._folder = folder
        self._stack = stack
        ports = containers.free_ports(["blackbox", "prometheus"])
        self.grpc_url, self.http_url = triton.grpc_url, triton.http_url
        self.counter_url = triton.gateway_metrics_url
        places = {
            "gateway:8000": self.http_url,
            "gateway:8001": self.grpc_url,
            "gateway:8003": self.counter_url.split("/")[2],
            "blackbox:9115": f"127.0.0.1:{ports['blackbox']}",
        }
        self.url = f"127.0.0.1:{ports['prometheus']}"
        self._start("blackbox", shutil.which("prometheus-blackbox-exporter"), *self._blackbox(places["blackbox:9115"]))
        self._start("prometheus", shutil.which("prometheus"), *self._prometheus(places))

    def _start(self, name: str, *command: object) -> None:
        log = self._folder / f"{name}.log"
        self._stack.enter_context(Process([str(part) for part in command], {}, log))

    def _blackbox(self, address: str) -> list[str]:
        """With the two modules that we use of its image's configuration."""
        path = self._folder / "blackbox.yml"
        path.write_text("modules: {http_2xx: {prober: http}, tcp_connect: {prober: tcp}}")
        return [f"--config.file={path}", f"--web.listen-address={address}"]

    def _prometheus(self, places: dict[str, str]) -> list[str]:
        """With our configuration, but local targets, every second, and alerts that fire at once."""
        config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
        config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
        for job in config["scrape_configs"]:
            for found in job.pop("dns_sd_configs", []):
                # As the name of the compose service for GPUs would resolve.
                place = self.triton.metrics_url.removeprefix("http://").removesuffix("/metrics")
                job["static_configs"] = [{"targets": [place], "labels": {"__meta_dns_name": found["names"][0]}}]
        text = yaml.safe_dump(config)
        for name, place in places.items():
            text = text.replace(name, place)
        assert not re.search(r"(triton|gateway|blackbox):\d", text)
        (self._folder / "prometheus.yml").write_text(text)
        rules = (PROMETHEUS / "alerts.yml").read_text()
        (self._folder / "alerts.yml").write_text(re.sub(r"for: \d+m", "for: 0s", rules))
        flags = {"config.file": "prometheus.yml", "storage.tsdb.path": "data"}
        return [f"--{name}={self._folder / file}" for name, file in flags.items()] + [
            f"--web.listen-address={self.url}"
        ]

    def ask(self, path: str, **query: str) -> Any:
        with urlopen(f"http://{self.url}/api/v1/{path}?{urlencode(query)}", timeout=10) as response:
            return json.load(response)["data"]

    def values(self, expression: str) -> list[float]:
        """The current values of an expression that are numbers."""
        expression = expression.replace("$__rate_interval", "10s")
        found = [float(one["value"][1]) for one in self.ask("query", query=expression)["result"]]
        return [value for value in found if value == value]

    def results(self) -> dict[str, int]:
        """The number of requests by API and outcome."""
        with urlopen(self.counter_url, timeout=10) as response:
            text = response.read().decode()
        found = re.findall(r'^gateway_requests_total\{api="(\w+)",result="(\w+)"\} (\d+)$', text, re.MULTILINE)
        return {f"{api} {result}": int(count) for api, result, count in found if count != "0"}


def eventually(holds: Callable[[], bool], seconds: float = 90) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError):  # it has not started yet
            if holds():
                return True
        time.sleep(0.3)
    return False


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Plant]:
    stand_in.write(tmp_path / "repository/sums", delay=20_000)
    stand_in.write(tmp_path / "repository/slow", delay=5_000_000)
    limits = Limits(LIMIT, 1)
    with (
        TritonServer(tmp_path / "repository", device="cpu", limits=limits, exit_timeout=2) as triton,
        ExitStack() as stack,
    ):
        plant = Plant(tmp_path, triton, stack)
        assert eventually(lambda: bool(plant.values('probe_success{job="reachable"} == 1'))), plant.ask("targets")
        yield plant


@pytest.fixture
def load(plant: Plant) -> Iterator[None]:
    """Clients, one above the limit, whose requests succeed, fail, are given up and are rejected."""
    over = threading.Event()

    def work() -> None:
        clip = np.ones((1, 5), np.float32)
        too_long = np.ones((1, stand_in.LONGEST + 1), np.float32)
        with InferenceServerClient(plant.grpc_url) as client:
            while not over.is_set():
                for one, seconds in (clip, 5.0), (clip, 5.0), (too_long, 5.0), (clip, 0.005):
                    with suppress(InferenceServerException):
                        client.infer("sums", stand_in.inputs(one), client_timeout=seconds)
                    time.sleep(0.01)

    threads = [threading.Thread(target=work) for _ in range(LIMIT + 1)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    for thread in threads:
        thread.join()


@needs_plant
def test_requests_at_the_gateway_are_counted_by_outcome(plant: Plant) -> None:
    clip = np.ones((1, 5), np.float32)
    with InferenceServerClient(plant.grpc_url) as client:
        for _ in range(3):
            client.infer("sums", stand_in.inputs(clip))
        too_long = np.ones((1, stand_in.LONGEST + 1), np.float32)
        for bad in stand_in.inputs(clip)[:1], stand_in.inputs(MEGABYTE), stand_in.inputs(too_long):
            with pytest.raises(InferenceServerException):
                client.infer("sums", bad)
        with pytest.raises(InferenceServerException):
            client.infer("slow", stand_in.inputs(clip), client_timeout=1)
        client.is_server_ready()  # not an inference
    half = json.dumps({"inputs": stand_in.JSON[:1]}).encode()
    # 500 is Triton's reply to a body that is not JSON, so it counts as failed.
    for body, status in (stand_in.BODY, 200), (half, 400), (b"no JSON", 500), (b" " * (2 << 20), 413):
        assert http_status(plant.http_url, "POST", stand_in.PATH, body) == status
    expected = {"grpc ok": 3, "http ok": 1}
    expected |= {f"grpc {result}": 1 for result in ("bad_request", "too_large", "failed", "gave_up")}
    expected |= {f"http {result}": 1 for result in ("bad_request", "too_large", "failed")}
    assert eventually(lambda: plant.results() == expected), plant.results()


@needs_plant
def test_every_query_has_data(plant: Plant, load: None) -> None:
    asked = {target["expr"] for panel in PANELS for target in panel["targets"]}
    for rule in RULES:  # a rule has a value only when it fires, so its series are checked
        asked |= {selector for name, selector in selectors(rule["expr"]).items()}
    assert eventually(lambda: "ALERTS" in str(plant.ask("label/__name__/values")))  # for the panel of firing alerts
    missing = {one for one in asked if GPU not in one}
    assert len(missing) > 30

    def found() -> bool:
        missing.difference_update([one for one in missing if plant.values(one)])
        return not missing

    assert eventually(found), missing
    for one in asked:
        plant.values(one)  # Prometheus accepts the query


@needs_plant
def test_alerts_fire(plant: Plant, load: None) -> None:
    def firing() -> set[str]:
        return {alert["labels"]["alertname"] for alert in plant.ask("alerts")["alerts"]}

    # The target has the name of the service for GPUs, and this server has none.
    assert eventually(lambda: firing() >= {"CpuInsteadOfGpu", "RequestsFail", "RequestsRejected"}), firing()
    assert not firing() & {"TritonDown", "TritonNotReady", "GatewayDown", "MonitoringBlind"}
    os.kill(plant.triton.pid, signal.SIGKILL)
    assert eventually(lambda: "TritonDown" in firing()), firing()
    assert eventually(lambda: plant.results().get("grpc away", 0) > 0), plant.results()
    # Every template of the annotations was filled in: Prometheus puts "error expanding" where one fails.
    assert "<error" not in json.dumps([alert["annotations"] for alert in plant.ask("alerts")["alerts"]])
