"""The start of Ray on this machine."""

import os
import subprocess
import sys


def test_ray_that_cannot_start_ends_in_a_sentence() -> None:
    code = "from pipeline import cli; from pipeline.engine import cluster; cli.guarded(cluster.connect)"
    environment = {**os.environ, "RAY_ADDRESS": "local", "RAY_TMPDIR": "/dev/null"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "Traceback" not in done.stderr
    assert "Ray did not start on this machine: [Errno 20] Not a directory: '/dev/null/ray" in done.stderr
    assert "run the same command again later" in done.stderr
