"""A job over S3 on several raylets with their own addresses, some of which are lost."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from servers import ROOT, RayCluster, S3Server, start_ray_head, start_ray_worker, stop_ray_head
from whole import Jobs, jpeg, wait_for, write_tar

from pipeline.output.verify import verify
from pipeline.storage import access

pytestmark = pytest.mark.faults
IMAGES = 1000


@dataclass
class Nodes:
    cluster: RayCluster
    workers: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def add(self, address: str, *resources: object) -> None:
        self.workers[address] = start_ray_worker(self.cluster, address, *resources)
        wait_for(lambda: address in self.alive(), seconds=180)

    def kill(self, address: str) -> None:
        process = self.workers.pop(address)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def drain(self, address: str) -> None:
        """A pre-emption as a cloud's notice of it reaches Ray: no new work, and gone in a minute."""
        command = [
            *(sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", self.cluster.address),
            *("--node-id", self.alive()[address], "--reason", "DRAIN_NODE_REASON_PREEMPTION"),
            *("--reason-message", "spot", "--deadline-remaining-seconds", "60"),
        ]
        subprocess.run(command, check=True, capture_output=True)

    def alive(self) -> dict[str, str]:
        """Address → id of the nodes that the cluster takes for alive."""
        with urllib.request.urlopen(f"{self.cluster.dashboard}/api/v0/nodes", timeout=30) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        return {node["node_ip"]: node["node_id"] for node in nodes if node["state"] == "ALIVE"}


@contextmanager
def nodes(environment: dict[str, str], head_cpus: int) -> Iterator[Nodes]:
    process, cluster = start_ray_head(environment, head_cpus)
    found = Nodes(RayCluster(cluster.address, cluster.dashboard, environment))
    try:
        yield found
    finally:
        for address in list(found.workers):
            found.kill(address)
        stop_ray_head(process)


@pytest.fixture
def environment(s3: S3Server, tmp_path: Path) -> dict[str, str]:
    (tmp_path / "counted").touch()
    return {
        **s3.environment,
        "RAY_AUTH_MODE": "disabled",
        "RAY_raylet_start_wait_time_s": "180",  # several nodes that start on two cores
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}",
        "COUNTED_IMAGES": str(tmp_path / "counted"),
    }


def test_a_node_is_drained_and_lost_and_another_one_replaced(
    s3: S3Server, environment: dict[str, str], tmp_path: Path
) -> None:
    for number in range(4):
        members = {f"{number}-{i:04d}.jpg": jpeg(i) for i in range(IMAGES // 4)}
        access.write(s3.uri(f"nodes/{number}.tar"), write_tar(tmp_path / "x.tar", members).read_bytes())
    settings = "--model tiny:counted_network --weights random --precision float32 --batch-size 16 --rows-per-part 64"
    out = s3.uri("nodes-out")

    def commits() -> int:
        return sum(1 for _ in access.list_objects(f"{out}/_commits"))

    with nodes(environment, head_cpus=1) as cluster:
        cluster.add("127.0.0.2", "--num-cpus", 2)
        cluster.add("127.0.0.3", "--num-cpus", 1, "--num-gpus", 1)
        jobs = Jobs({**environment, "RAY_ADDRESS": cluster.cluster.address})
        job = jobs.start("embed", "--input", s3.uri("nodes/{0..3}.tar"), "--output", out, *settings.split())
        wait_for(lambda: commits() >= 2)
        cluster.drain("127.0.0.2")  # it reads and writes
        wait_for(lambda: commits() >= 4)
        cluster.kill("127.0.0.2")
        cluster.kill("127.0.0.3")  # the network was there, and nowhere else
        cluster.add("127.0.0.4", "--num-cpus", 1, "--num-gpus", 1)
        assert job.poll() is None, "it ended before the nodes were lost"
        printed, err = job.communicate(timeout=200)
    assert job.returncode == 0, printed + err
    found = verify(out)
    assert found.is_whole
    assert (found.rows, found.errors) == (IMAGES, 0)
    twice = (tmp_path / "counted").stat().st_size - IMAGES
    print(f"{twice} of {IMAGES} images were computed twice")
    assert 0 <= twice < IMAGES / 2
