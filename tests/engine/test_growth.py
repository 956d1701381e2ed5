"""Clusters that start with a head only. An autoscaler (version 2) adds the machines that the stages request."""

import json
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider
from servers import ROOT, RayCluster, free_port, start_ray_head, stop_ray_head
from whole import Jobs, wait_for, write_folder

from pipeline.output.verify import verify

pytestmark = pytest.mark.timeout(400)
IMAGES = 300
STORE_BYTES = 128 << 20
SETTINGS = ("--model", "tiny:slow_network", "--weights", "random", "--precision", "float32", "--batch-size", "16")


def autoscaling(port: int, **groups: dict[str, int]) -> dict[str, object]:
    """The configuration that `ray up` would write: a head without CPUs, up to two machines of each kind."""
    workers = {
        name: {"resources": {**resources, "object_store_memory": STORE_BYTES}, "min_workers": 0, "max_workers": 2}
        for name, resources in groups.items()
    }
    head = {"ray.head.default": {"resources": {"CPU": 0}, "max_workers": 0}}
    lists = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    commands = (*lists, "head_start_ray_commands", "worker_start_ray_commands", "rsync_exclude", "rsync_filter")
    return {
        "cluster_name": "growth",
        "max_workers": 4,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.2,
        "provider": {
            "type": "external",
            "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
            "launch_multiple": True,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "disable_node_updaters": True,
            "gcs_address": f"127.0.0.1:{port}",
        },
        "auth": {},
        "available_node_types": {name: {"node_config": {}, **kind} for name, kind in (head | workers).items()},
        "head_node_type": "ray.head.default",
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        **{name: [] for name in commands},
    }


@dataclass(frozen=True)
class Growing:
    """A cluster that grows."""

    cluster: RayCluster

    def machines(self) -> list[str]:
        """The kinds of those that are there beside the head: by what they bring, "CPU" or "GPU"."""
        with urllib.request.urlopen(f"{self.cluster.dashboard}/api/v0/nodes?detail=true", timeout=30) as answer:
            nodes = json.load(answer)["data"]["result"]["result"]
        resources = [node["resources_total"] for node in nodes if node["state"] == "ALIVE" and not node["is_head_node"]]
        return sorted("+".join(name for name in ("CPU", "GPU") if each.get(name)) for each in resources)


@contextmanager
def head_alone(folder: Path, **groups: dict[str, int]) -> Iterator[Growing]:
    config, port = folder / "autoscaling.json", free_port()
    config.write_text(json.dumps(autoscaling(port, **groups)))
    environment = {
        "RAY_AUTH_MODE": "disabled",
        "RAY_raylet_start_wait_time_s": "180",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/support'}",
    }
    of_the_head = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    flags = (f"--autoscaling-config={config}",)
    process, cluster = start_ray_head(environment | of_the_head, cpus=0, port=port, more=flags)
    try:
        yield Growing(RayCluster(cluster.address, cluster.dashboard, {**environment, "RAY_ADDRESS": cluster.address}))
    finally:
        stop_ray_head(process)


@pytest.mark.long
def test_machines_for_decoding_and_for_the_network_come_and_go(tmp_path: Path) -> None:
    archive, output = write_folder(tmp_path / "images", IMAGES), tmp_path / "out"
    with head_alone(tmp_path, decode={"CPU": 1}, gpu={"GPU": 1}) as growing:
        jobs, arguments = Jobs(growing.cluster.environment), ("--input", archive, "--output", output, *SETTINGS)
        refused = jobs.run("embed", *arguments, code=2)
        assert "the cluster has 0 CPUs; set --actors MIN:MAX" in refused.stderr
        job = jobs.start("embed", *arguments, "--gpus-per-actor", "1", "--actors", "1:2")
        seen: list[list[str]] = []
        while job.poll() is None:
            seen.append(growing.machines())
            time.sleep(1)
        printed, err = job.communicate()
        assert job.returncode == 0, printed + err
        wait_for(lambda: not growing.machines(), seconds=120)
    assert max(kinds.count("CPU") for kinds in seen) >= 1, seen
    assert max(kinds.count("GPU") for kinds in seen) >= 1, seen
    found = verify(str(output))
    assert found.is_whole
    assert (found.rows, found.errors) == (IMAGES, 0)


@pytest.mark.faults
def test_a_network_on_cpus_grows_as_well(tmp_path: Path) -> None:
    archive, output = write_folder(tmp_path / "images", IMAGES), tmp_path / "out"
    with head_alone(tmp_path, worker={"CPU": 2}) as growing:
        arguments = ("--input", archive, "--output", output, *SETTINGS)
        Jobs(growing.cluster.environment).run("embed", *arguments, "--actors", "1:2")
    found = verify(str(output))
    assert found.is_whole
    assert (found.rows, found.errors) == (IMAGES, 0)
