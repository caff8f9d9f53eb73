"""Base images for the tests of containers: those of a registry, or stand-ins made from Debian packages."""

from __future__ import annotations

import json
import os
import shutil
import ssl
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LABEL = "ecapa-triton.stand-in"
DEBIAN = "ecapa-stand-in/debian"
# By image name without its tag, the target of the Dockerfile beside this file. Grafana is in no Debian package.
TARGETS = {
    "nvcr.io/nvidia/tritonserver": "tritonserver",
    "python": "python",
    "prom/prometheus": "prometheus",
    "prom/blackbox-exporter": "blackbox",
}
PULL_TIMEOUT = 1800  # s


def provide(images: list[str]) -> dict[str, str]:
    """Sees to it that the engine has each of these base images.

    Returns:
        How, by image: "pulled", "stand-in" or "missing".
    """
    found = {}
    for image in images:
        if labels := _labels(image):
            found[image] = "stand-in" if LABEL in labels[0] else "pulled"
            continue
        print(f"pull {image} ...", file=sys.stderr, flush=True)
        if subprocess.run(["docker", "pull", "-q", image], capture_output=True, timeout=PULL_TIMEOUT).returncode == 0:
            found[image] = "pulled"
        elif image.rpartition(":")[0] in TARGETS:
            print(f"make a stand-in for {image} ...", file=sys.stderr, flush=True)
            _make(image)
            found[image] = "stand-in"
        else:
            found[image] = "missing"
    return found


def of_triton(images: dict[str, str]) -> bool:
    """Whether that of Triton is a stand-in."""
    return any(how == "stand-in" and "tritonserver" in image for image, how in images.items())


def _labels(image: str) -> list[dict[str, str]]:
    run = subprocess.run(["docker", "image", "inspect", image], capture_output=True, text=True)
    return [one["Config"]["Labels"] or {} for one in json.loads(run.stdout)] if run.returncode == 0 else []


def _make(image: str) -> None:
    if not _labels(DEBIAN):
        _make_debian()
    with tempfile.TemporaryDirectory() as folder:
        context = Path(folder)
        for name in "tests/engine/Dockerfile", "constraints.txt":
            shutil.copy(ROOT / name, context)
        authorities = os.environ.get("SSL_CERT_FILE") or ssl.get_default_verify_paths().cafile
        shutil.copy(authorities or "/etc/ssl/certs/ca-certificates.crt", context / "ca-certificates.crt")
        (context / "pip.conf").write_text(
            "[global]\ncert = /etc/ssl/certs/ca-certificates.crt\nfind-links = /wheels\ndisable-pip-version-check = 1\n"
        )
        (context / "wheels").mkdir()
        for wheel in _local_wheels():  # the host's pip prefers these: torch for CPUs, for example
            shutil.copy(wheel, context / "wheels")
        target = TARGETS[image.rpartition(":")[0]]
        _run(["docker", "build", "-q", f"--target={target}", f"--label={LABEL}=1", f"--tag={image}", folder])


def _local_wheels() -> list[Path]:
    run = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.find-links"], capture_output=True, text=True
    )
    return [
        wheel for folder in run.stdout.split() if Path(folder).is_dir() for wheel in Path(folder).glob("torch-*.whl")
    ]


def _make_debian() -> None:
    with tempfile.TemporaryDirectory() as folder:
        _run(["debootstrap", "--variant=minbase", "--include=ca-certificates", "bookworm", folder])
        tar = subprocess.Popen(["tar", "-C", folder, "-c", "."], stdout=subprocess.PIPE)
        _run(["docker", "import", f"--change=LABEL {LABEL}=1", "-", DEBIAN], stdin=tar.stdout)
        tar.wait()


def _run(command: list[str], **options: object) -> None:
    run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    if run.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} ended with {run.returncode}: {run.stdout[-3000:]}")
