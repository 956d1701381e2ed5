"""Helpers of whole-job tests: start jobs, write small archives, and read outputs."""

import io
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import images
import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--model", "tiny:network", "--weights", "random", "--precision", "float32")
SLOW = ("--model", "tiny:slow_network", "--weights", "random", "--precision", "float32")


class Jobs:
    """Runs jobs with one environment, usually that of the tests' cluster."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = {**os.environ, **environment}

    def start(self, job: str, *arguments: object) -> "subprocess.Popen[str]":
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, env=self.environment, **pipes)  # type: ignore[call-overload, no-any-return]

    def run(self, job: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        process = self.start(job, *arguments)
        out, err = process.communicate(timeout=200)
        assert process.returncode == code, f"ended with {process.returncode}:\n{out}\n{err}"
        if code:
            assert "Traceback" not in err
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def jpeg(seed: int) -> bytes:
    return images.encode(images.tile(["forest", "water", "urban", "field"][seed % 4], seed, (40 + seed % 9, 48)))


def write_folder(folder: Path, count: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        (folder / f"{i:04d}.jpg").write_bytes(jpeg(i))
    return folder


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def embeddings(output: object) -> dict[str, np.ndarray]:
    table = pd.read_parquet(str(output))
    return dict(zip(table["image_id"], table["embedding"], strict=True))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def wait_for(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"the condition was not met within {seconds:g} seconds"
        time.sleep(0.05)


def count_commits(output: Path) -> int:
    return len(list(output.glob("_commits/part-*.json")))
