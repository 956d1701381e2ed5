"""Servers for tests: Ray head nodes and workers, and the address of an S3 server."""

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True)
class S3Server:
    """A moto server with one bucket. environment: variables with which a process can use it."""

    endpoint: str
    environment: dict[str, str]

    def uri(self, key: str) -> str:
        return f"s3://archive/{key}"


@dataclass(frozen=True)
class RayCluster:
    """A head node with a dashboard that accepts jobs. environment: variables with which a process can use it."""

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
    """Run `ray start --head` in the foreground and wait until it is ready.

    python: for the head and its jobs. port: 0 for any free port. more: other flags.
    It has its own folder, because in the default folder every later `ray.init()` on this machine would find its
    address. It has its own ports, because with the default ports a second head would accept no jobs.
    """
    port, dashboard_port = port or free_port(), free_port()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, because Ray creates sockets in it
    command = [
        *(str(python), "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--port", str(port), "--dashboard-port", str(dashboard_port), "--num-cpus", str(cpus)),
        *("--num-gpus", str(gpus)),  # logical: Ray does not check that they exist
        *("--object-store-memory", str(512 << 20), "--include-dashboard", "true", "--node-ip-address", "127.0.0.1"),
        *("--dashboard-agent-listen-port", str(free_port()), "--ray-client-server-port", str(free_port())),
        *("--min-worker-port", "0", "--max-worker-port", "0"),  # any free port
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
            if error.code == 401:  # ready, but it requires a token
                return process, cluster
        except OSError:
            pass
        time.sleep(0.5)
    stop_ray_head(process)
    pytest.fail("ray start --head was not ready in 60 s")


def start_ray_worker(cluster: RayCluster, address: str, *resources: object) -> subprocess.Popen[bytes]:
    """Run `ray start` for a worker node with its own address. Its processes are one group, to be killed at once."""
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
    """Stop this head node, and no other Ray on this machine as `ray stop` would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(process.args[-1], ignore_errors=True)  # type: ignore[index]
