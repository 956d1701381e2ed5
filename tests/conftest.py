"""Shared fixtures: one real Ray cluster and one real S3 server, which are stopped at the end."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from servers import ROOT, RayCluster, S3Server, free_port, start_ray_head, stop_ray_head
from whole import Jobs

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def start_s3_server() -> "tuple[subprocess.Popen[bytes], str]":
    """Start a moto server with the bucket `archive`. Another program may take a free port first: then try the next."""
    for _ in range(3):
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        request = urllib.request.Request(f"http://127.0.0.1:{port}/archive", method="PUT")
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            try:
                urllib.request.urlopen(request, timeout=5).close()
            except OSError:
                time.sleep(0.2)
            else:
                return process, f"http://127.0.0.1:{port}"
        process.kill()
        process.wait()
    pytest.fail("the S3 server did not start")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    process, endpoint = start_s3_server()
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing-key",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_REGION": "us-east-1",
    }
    try:
        yield S3Server(endpoint, environment)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, which this process uses during the test."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[RayCluster]:
    """One cluster for all tests of whole jobs. Its workers can use the S3 server."""
    environment = {
        **s3_server.environment,
        "RAY_AUTH_MODE": "disabled",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}",
    }
    process, cluster = start_ray_head(environment)
    try:
        yield RayCluster(cluster.address, cluster.dashboard, {**environment, "RAY_ADDRESS": cluster.address})
    finally:
        stop_ray_head(process)


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty folders for downloaded weights, for one test."""
    monkeypatch.setenv("NIGHTSHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("NIGHTSHIFT_WEIGHTS_MIRROR", raising=False)


@pytest.fixture
def jobs(ray_cluster: RayCluster) -> Jobs:
    return Jobs(ray_cluster.environment)
