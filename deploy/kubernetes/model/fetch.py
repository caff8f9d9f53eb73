"""Copies the model into the pod's volume, checks its seal there and gives it the threads that the pod has.

Triton's C++ backends check no seal, and would take every core of the node for one of the pod's.
"""

import os
import re
import shutil
import sys
from pathlib import Path

import seal  # of export/, beside this file in the image


def fetch(source: Path, target: Path, threads: int) -> list[Path]:
    """Copies a model's folder, and returns the model files in the copy.

    Raises:
        seal.SealError: There is no model file, or one is damaged.
    """
    shutil.copytree(source, target, dirs_exist_ok=True)
    files = sorted(path for path in target.glob("*/*") if path.suffix in (".onnx", ".pt"))
    if not files:
        raise seal.SealError(f"{source} has no model file: run python -m export, then build this image")
    for file in files:
        seal.check(file)
    config = target / "configs/cpu.pbtxt"
    line = r'(key: "intra_op_thread_count" value: \{ string_value: )"0"'
    config.write_text(re.sub(line, rf'\g<1>"{threads}"', config.read_text()))
    return files


if __name__ == "__main__":
    try:
        for path in fetch(Path(sys.argv[1]), Path(sys.argv[2]), int(os.environ["THREADS"])):
            print(f"{path} is as it was written")
    except (OSError, seal.SealError) as error:
        sys.exit(f"error: {error}")
