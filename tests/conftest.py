"""What the tests share: one Ray cluster, one S3 server, both real and both stopped at the end."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from whole import Jobs

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class S3Server:
    """A moto server with one bucket; `environment` lets any process reach it."""

    endpoint: str
    environment: dict[str, str]

    def uri(self, key: str) -> str:
        return f"s3://archive/{key}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    endpoint = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "testing-key",
        "AWS_SECRET_ACCESS_KEY": "testing-secret",
        "AWS_REGION": "us-east-1",
    }
    try:
        for _ in range(100):
            try:
                request = urllib.request.Request(f"{endpoint}/archive", method="PUT")
                urllib.request.urlopen(request, timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail("the S3 server did not start in 20 s")
        yield S3Server(endpoint, environment)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Server:
    """The S3 server, with this process's environment pointing at it."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return s3_server


@dataclass(frozen=True)
class RayCluster:
    """A head node of its own, with the dashboard that takes jobs; `environment` points any process at it."""

    address: str
    dashboard: str
    environment: dict[str, str]


def start_ray_head(
    environment: dict[str, str],
    cpus: int = 2,
    gpus: int = 0,
    python: Path = Path(sys.executable),
    port: int = 0,
    more: Sequence[str] = (),
) -> tuple[subprocess.Popen[bytes], RayCluster]:
    """`ray start --head` of a Python in the foreground, ready to take work; `python` is that one for its jobs too.
    `port`: of its own choice, where it is 0. `more`: other flags.

    In a folder of its own: in the default one it would leave its address to every later `ray.init()` of this machine.
    On ports of its own: of two heads with the default ones the second takes no jobs.
    """
    port, dashboard_port = port or free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray puts sockets below it
    command = [
        *(str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--port", str(port), "--dashboard-port", str(dashboard_port), "--num-cpus", str(cpus)),
        *("--num-gpus", str(gpus)),  # of the cluster's word alone: Ray looks for none
        *("--object-store-memory", str(512 << 20), "--include-dashboard", "true", "--node-ip-address", "127.0.0.1"),
        *("--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())),
        *("--min-worker-port", "0", "--max-worker-port", "0"),  # any that is free
        *more,
        *("--temp-dir", folder),
    ]
    process = subprocess.Popen(
        command,
        env={**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}", **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    cluster = RayCluster(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}", environment)
    for _ in range(120):
        try:
            urllib.request.urlopen(f"{cluster.dashboard}/api/version", timeout=5).close()
            return process, cluster
        except urllib.error.HTTPError as error:
            if error.code == 401:  # up, and asking for a token
                return process, cluster
        except OSError:
            pass
        time.sleep(0.5)
    stop_ray_head(process)
    pytest.fail("ray start --head was not ready in 60 s")


def start_ray_worker(cluster: RayCluster, address: str, *resources: object) -> subprocess.Popen[bytes]:
    """`ray start` of a worker node with an address of its own; its processes are one group, to be killed as one."""
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats"),
        *("--address", cluster.address, "--node-ip-address", address, "--object-store-memory", str(128 << 20)),
        *("--dashboard-agent-listen-port", str(free_port()), "--min-worker-port", "0", "--max-worker-port", "0"),
        *map(str, resources),
    ]
    return subprocess.Popen(
        command,
        env={**os.environ, **cluster.environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def stop_ray_head(process: "subprocess.Popen[bytes]") -> None:
    """Stop this head and no other Ray of this machine (`ray stop` would)."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(process.args[-1], ignore_errors=True)  # type: ignore[index]


@pytest.fixture(scope="session")
def ray_cluster(s3_server: S3Server) -> Iterator[RayCluster]:
    """One cluster for all whole-job tests; its workers can reach the S3 server."""
    environment = {**s3_server.environment, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process, cluster = start_ray_head(environment)
    try:
        yield RayCluster(cluster.address, cluster.dashboard, {**environment, "RAY_ADDRESS": cluster.address})
    finally:
        stop_ray_head(process)


@pytest.fixture
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders for fetched weights of this test alone."""
    monkeypatch.setenv("NIGHTSHIFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.delenv("NIGHTSHIFT_WEIGHTS_MIRROR", raising=False)


@pytest.fixture
def jobs(ray_cluster: RayCluster) -> Jobs:
    return Jobs(ray_cluster.environment)
