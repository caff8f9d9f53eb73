"""The server under faults: seen from outside, held by a gate, or run by its command; the rest is in judge.py."""

from __future__ import annotations

import math
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pytest
from ecapa_triton.audio import SAMPLE_RATE

from server import wheel
from server.preflight import choose_ports
from server.wheel import find_installed
from tests.faults.judge import PATIENCE, Clip, Outcome, Rejection, Tally, Urls

ROOT = Path(__file__).parents[2]
SECOND = SAMPLE_RATE  # samples
INSTALLED = find_installed() is not None  # a tritonserver with backends of its own
PREFERRED_BATCH = 3  # of configs/cpu.pbtxt
LIMIT, LIMIT_MB = 128, 64  # requests in flight and megabytes of one through the gateway, as `python -m server` on a CPU


def code(outcome: Outcome) -> str:
    """The code of a rejection; empty for embeddings."""
    return outcome.code if isinstance(outcome, Rejection) else ""


def all_at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls that each have a thread of their own."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def pending(urls: Urls) -> float:
    """Requests that wait for execution, by Triton's metrics; NaN before there are any."""
    with urlopen(urls.metrics, timeout=PATIENCE) as page:
        lines = page.read().decode().splitlines()
    name = "nv_inference_pending_request_count{"
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(name)), math.nan)


def wait_until(condition: Callable[[], object], what: str) -> None:
    """Polls for something in another process, which has no event to wait on."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for: {what}"
        time.sleep(0.02)


def wait_until_queued(urls: Urls, number: int) -> None:
    """Waits until so many requests are in the queue of a held model, and no more arrive."""
    wait_until(lambda: pending(urls) >= number, f"{number} requests in the queue")
    seen = [-1.0]
    while seen[-5:] != [seen[-1]] * 5:
        time.sleep(0.05)
        seen.append(pending(urls))


def assert_right(urls: Urls, clips: Sequence[Clip], tally: Tally) -> None:
    """The queue drains, and senders of every kind get right replies."""
    wait_until(lambda: pending(urls) == 0, "an empty queue")
    for connect in urls.senders():
        with connect() as sender:
            for clip in clips:
                assert tally.check(clip, sender.ask(clip.waveform), recovered=True) == "right"


# --- stand-in backends ---

BACKENDS = "BACKENDS"  # the name in server.wheel of the folder of stand-in backends


def changed_backend(folder: Path, change: str) -> Path:
    """A copy of the server's backends, with code at the end that changes the model's class."""
    backends = Path(shutil.copytree(ROOT / "server/backends", folder / "server/backends"))
    with (backends / "onnxruntime/model.py").open("a") as model:
        model.write(change)
    return backends


@contextmanager
def serving_with(backends: Path) -> Iterator[None]:
    """Servers that start in the block use these backends."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheel, BACKENDS, backends)
        yield


class Gate:
    """Backends with which a model waits while `hold` lasts, so that requests stay in the queue or in execution."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "hold"
        self.backends = changed_backend(folder, HELD.format(file=self._file))

    @contextmanager
    def hold(self) -> Iterator[None]:
        self._file.touch()
        try:
            yield
        finally:
            self._file.unlink()


HELD = """
import time
_execute = TritonPythonModel.execute

def _execute_when_released(self, requests):
    while Path("{file}").exists():
        time.sleep(0.01)
    return _execute(self, requests)

TritonPythonModel.execute = _execute_when_released
"""


# --- the server's command ---

WITH_BACKENDS = f"""
import sys
from pathlib import Path
from server import __main__, wheel
wheel.{BACKENDS} = Path(sys.argv.pop(1))
sys.exit(__main__.main(sys.argv[1:]))
"""


class ServerCommand(AbstractContextManager["ServerCommand"]):
    """`python -m server` in a process of its own."""

    def __init__(self, repository: Path, backends: Path | None = None, *, gateway: bool = False) -> None:
        ports = {api: port for api, (_, port) in choose_ports(dict.fromkeys(PORTS, ("127.0.0.1", 0))).items()}
        grpc, http, metrics, _ = (f"127.0.0.1:{ports[api]}" for api in PORTS)
        self.urls = Urls(grpc, http, f"http://{metrics}/metrics")
        command = ["-m", "server"] if backends is None else ["-c", WITH_BACKENDS, str(backends)]
        self._command = [sys.executable, *command, f"--repository={repository}", "--device=cpu"]
        self._command += [f"--{api}-port={port}" for api, port in ports.items()]
        self._command.append(f"--gateway={'on' if gateway else 'off'}")
        self.restarted = False

    def __enter__(self) -> ServerCommand:
        self._output = tempfile.NamedTemporaryFile("a")
        self._start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._output.close()

    def _start(self) -> None:
        self.process = subprocess.Popen(self._command, cwd=ROOT, stdout=self._output, stderr=subprocess.STDOUT)
        wait_until(self._is_ready, "the server")

    @property
    def lines(self) -> list[str]:
        """Its output."""
        return Path(self._output.name).read_text().splitlines()

    def running(self, name: str) -> psutil.Process | None:
        """The tritonserver, the nginx or the stub, in which the model runs, that it has started."""
        try:
            parent = self.running("tritonserver") if name == "stub" else psutil.Process(self.process.pid)
            children = parent.children(recursive=name == "stub") if parent else []
            return next((child for child in children if name in child.name()), None)
        except psutil.NoSuchProcess:
            return None

    def kill(self, name: str) -> None:
        """Kills one of its processes, waits until another is in its place, and requests are answered."""
        victim = self.running(name)
        assert victim is not None
        victim.kill()
        self.wait_for_another(name, victim)

    def wait_for_another(self, name: str, ended: psutil.Process) -> None:
        wait_until(lambda: self.running(name) not in (None, ended) and self._is_ready(), f"another {name}")
        self.restarted = True

    def restart(self, how: signal.Signals) -> None:
        """Ends it by a signal, and starts it again on the same ports."""
        started = psutil.Process(self.process.pid).children(recursive=True)
        self.process.send_signal(how)
        self.process.wait()
        _, left = psutil.wait_procs(started, PATIENCE)  # those of a killed launcher end a little later
        assert not left
        self._start()

    def stop(self) -> int:
        """Stops it and returns its exit status."""
        self.process.terminate()
        return self.process.wait()

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, self.lines
        try:
            with urlopen(f"http://{self.urls.http}/v2/health/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except OSError:
            return False


PORTS = "grpc", "http", "metrics", "gateway-metrics"
