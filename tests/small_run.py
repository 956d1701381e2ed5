"""One small real output for the tests of what users read: `jobs/demo.py`, run once a session, then run again."""

import functools
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
IMAGES = "120"
"""Enough for the broken images of the archive to stay under the demo's error rate."""


@dataclass(frozen=True)
class SmallRun:
    """folder: archive/, embeddings/ and labels/. first, again: what the demo printed the first and the second time."""

    folder: Path
    first: str
    again: str


def small_run(factory: pytest.TempPathFactory) -> SmallRun:
    """The demo on a small archive, run twice: the second time there is nothing left to do."""
    return _small_run(factory.getbasetemp() / "small-run")


@functools.cache
def _small_run(folder: Path) -> SmallRun:
    return SmallRun(folder, run_python("jobs/demo.py", folder, "--images", IMAGES), run_python("jobs/demo.py", folder))


def run_python(*arguments: object, cwd: Path = ROOT) -> str:
    """Standard output of this Python with these arguments; fails the test with everything printed if it ends badly."""
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"},  # not a cluster that happens to be here
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, f"{arguments} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
    return done.stdout
