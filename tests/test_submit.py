"""`ray job submit` against a real head node, with its exit status, with and without tokens."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import images
import pytest
from conftest import ROOT, RayCluster, start_ray_head, stop_ray_head
from whole import SLOW, count_commits, wait_for, write_folder

from pipeline.verify import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def token_cluster() -> Iterator[RayCluster]:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef0123456789abcdef",
        "PYTHONPATH": str(ROOT / "tests"),
    }
    process, cluster = start_ray_head(environment)
    yield cluster
    stop_ray_head(process)


def submit(
    cluster: RayCluster, *entrypoint: object, options: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    command = [
        *(str(Path(sys.executable).with_name("ray")), "job", "submit", "--address", cluster.dashboard),
        *("--working-dir", str(ROOT), "--runtime-env-json", '{"excludes": [".git", ".venv", "demo"]}', *options, "--"),
        *map(str, entrypoint),
    ]
    merged = {**os.environ, **cluster.environment, **environment}
    for _ in range(30):
        done = subprocess.run(command, env=merged, capture_output=True, text=True, timeout=240)
        if "No available agent" not in done.stderr:  # a head node that has only just started
            break
        time.sleep(1)
    return done


def test_a_submitted_job_runs_and_its_status_comes_back(token_cluster: RayCluster, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(12):
        (folder / f"{i}.jpg").write_bytes(images.encode(images.tile("forest", i)))
    job = (sys.executable, "jobs/embed.py", "--input", folder, "--model", "tiny:network", "--weights", "random")
    good = submit(token_cluster, *job, "--output", tmp_path / "out")
    assert good.returncode == 0, good.stdout + good.stderr
    assert "12 of 12 planned: 12 rows, 0 errors" in good.stdout
    assert verify(str(tmp_path / "out")).is_whole
    bad = submit(token_cluster, *job, "--output", tmp_path / "other", "--batch-size", 0)
    assert bad.returncode == 1
    assert "--batch-size is 0: it must be at least 1" in bad.stdout
    assert "exit code 2" in bad.stdout + bad.stderr


def test_a_job_that_is_stopped_reports_and_goes_on(token_cluster: RayCluster, tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "images", 200), tmp_path / "out"
    job = (sys.executable, "jobs/embed.py", "--input", folder, "--output", out, *SLOW, "--rows-per-part", "16")
    started = submit(token_cluster, *job, options=("--no-wait", "--submission-id", "to-be-stopped"))
    assert started.returncode == 0, started.stderr
    wait_for(lambda: count_commits(out) >= 2)
    stop = [Path(sys.executable).with_name("ray"), "job", "stop", "--address", token_cluster.dashboard, "to-be-stopped"]
    subprocess.run(stop, env={**os.environ, **token_cluster.environment}, check=True, capture_output=True, timeout=60)
    report = json.loads((out / "_report.json").read_text())
    assert report["status"] == "Interrupted"
    assert 32 <= report["rows"] < 200
    again = submit(token_cluster, *job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "images were done before, by 1 earlier attempt" in again.stdout
    assert verify(str(out)).is_whole


def test_without_the_token_the_cluster_refuses(token_cluster: RayCluster) -> None:
    started = time.monotonic()
    done = submit(token_cluster, "true", RAY_AUTH_TOKEN="f" * 32)
    assert done.returncode != 0
    assert time.monotonic() - started < 60
