"""A small real output for the tests of the documentation: `jobs/demo.py`, run twice, once per test session."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
IMAGES = "120"
"""With fewer, the broken images of the archive would exceed the demo's error rate."""


@dataclass(frozen=True)
class SmallRun:
    """folder: has archive/, embeddings/ and labels/. first, again: output of the demo's first and second run."""

    folder: Path
    first: str
    again: str


def small_run(factory: pytest.TempPathFactory) -> SmallRun:
    """Run the demo twice on a small archive. The second time there is nothing left to do."""
    return _small_run(factory.getbasetemp() / "small-run")


@functools.cache
def _small_run(folder: Path) -> SmallRun:
    return SmallRun(folder, run_python("jobs/demo.py", folder, "--images", IMAGES), run_python("jobs/demo.py", folder))


def run_python(*arguments: object, cwd: Path = ROOT) -> str:
    """Run this Python; return its standard output. If it fails, fail the test with all its output."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},  # not a cluster that runs on this machine
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
