"""`python -m server` as a process on free ports, and what a server has counted."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT
from tritonclient.grpc import InferenceServerClient

FREE_PORTS = ["--http-port=0", "--grpc-port=0", "--metrics-port=0", "--gateway-metrics-port=0"]
SOON = 30  # s


@dataclass
class Launcher:
    """A launcher whose server is ready.

    Attributes:
        process: The launcher.
        output: Lines of standard output until the server was ready.
    """

    process: subprocess.Popen[str]
    output: list[str] = field(default_factory=list)

    def wait_until_ready(self) -> None:
        assert self.process.stdout is not None and self.process.stderr is not None
        self.output = []
        for line in self.process.stdout:
            self.output.append(line)
            if line.startswith("ready"):
                return
        raise AssertionError(self.process.stderr.read())

    @property
    def urls(self) -> list[str]:
        """Those of gRPC, HTTP and metrics in the ready line."""
        return re.findall(r"(?:grpc|http|metrics) ([^\s,]+)", self.output[-1])[:3]

    def errors(self) -> list[str]:
        """Lines of standard error, after the end."""
        assert self.process.stderr is not None
        return self.process.stderr.read().splitlines()


@contextmanager
def launched(
    repository: Path,
    *options: str,
    program: Sequence[str] = ("-m", "server"),
    environment: Mapping[str, str] | None = None,
) -> Iterator[Launcher]:
    """A launcher whose server is ready, stopped after the block."""
    with subprocess.Popen(
        [sys.executable, *program, f"--repository={repository}", "--device=cpu", *FREE_PORTS, *options],
        cwd=ROOT,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            launcher = Launcher(process)
            launcher.wait_until_ready()
            yield launcher
        finally:
            if process.poll() is None:
                process.terminate()
            process.wait(SOON)  # while its standard output is open


def wait_until(condition: Callable[[], object], seconds: float = SOON) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def batches(triton: InferenceServerClient, model: str) -> Counter[int]:
    """The number of batches of each size that the server has counted."""
    (statistics,) = triton.get_inference_statistics(model).model_stats
    return Counter({batch.batch_size: batch.compute_infer.count for batch in statistics.batch_stats})


def new_batches(triton: InferenceServerClient, model: str, before: Counter[int], items: int) -> Counter[int]:
    """The batches since `before`, as soon as they have so many items: Triton counts just after it replied."""
    wait_until(lambda: sum(size * count for size, count in (batches(triton, model) - before).items()) == items)
    return batches(triton, model) - before


def http_status(
    url: str,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    context: ssl.SSLContext | None = None,
) -> int:
    """The status of the reply to one request, over TLS with `context`."""
    connection = http.client.HTTPConnection(url, timeout=20)
    if context:
        connection = http.client.HTTPSConnection(url, timeout=20, context=context)
    with contextlib.closing(connection):
        connection.request(method, path, body, dict(headers or {}))
        return connection.getresponse().status
