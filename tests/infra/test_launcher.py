"""infra/launcher: `ray up` accepts the files, and the machines are closed to others."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
from pathlib import Path

import jsonschema
import pytest
import yaml
from kustomization import Object
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.autoscaler.sdk import get_docker_host_mount_location
from ray.dashboard.modules.reporter import reporter_head
from servers import ROOT, S3Server

LAUNCHER = ROOT / "infra" / "launcher"
OBSERVABILITY = ROOT / "infra" / "observability"


def launcher_config(name: str) -> Object:
    return dict(yaml.safe_load((LAUNCHER / f"{name}.yaml").read_text()))


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_ray_accepts_the_launcher_files(name: str) -> None:
    filled = prepare_config(launcher_config(name))
    validate_config(filled)
    assert {kind: filled["available_node_types"][kind]["max_workers"] for kind in ("head", "decode", "gpu")} == {
        "head": 0,
        "decode": 16,
        "gpu": 8,
    }
    commands = [line for key, lines in filled.items() if key.endswith("setup_commands") for line in lines]
    assert commands == [], "Ray's defaults would install another Ray"
    (head,) = (line for line in filled["head_start_ray_commands"] if "ray start" in line)
    assert "--num-cpus=0" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "--env RAY_AUTH_MODE=token" in filled["docker"]["run_options"]
    filled["max_wrkers"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_wrkers"):
        validate_config(filled)


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_the_line_for_a_private_registry_can_be_uncommented(name: str) -> None:
    text, count = re.subn(
        r"^( *)# (initialization_commands:|  - aws .*|- registry=.*)$",
        r"\1\2",
        (LAUNCHER / f"{name}.yaml").read_text(),
        flags=re.MULTILINE,
    )
    assert count == {"aws": 2, "gcp": 1}[name]
    uncommented = yaml.safe_load(text)
    validate_config(prepare_config(uncommented))
    *before, login = uncommented["initialization_commands"]
    assert before == launcher_config(name).get("initialization_commands", [])
    assert "REGISTRY" in login
    subprocess.run(["bash", "-n", "-c", login], check=True, timeout=60)


def on_a_fake_machine(folder: Path, commands: list[str], programs: set[str]) -> list[str]:
    """The commands called on a machine with these programs, with Ray's own quoting for ssh."""
    fakes = folder / "bin"
    fakes.mkdir()
    for name in programs:
        (fakes / name).write_text(f'#!/bin/sh\necho "{name} $*" >>"{folder}/called"\n')
        (fakes / name).chmod(0o755)
    for name in ("bash", "grep", "timeout"):
        (fakes / name).symlink_to(str(shutil.which(name)))
    (folder / ".bashrc").write_text(f"PATH={fakes}\n")
    for command in commands:
        done = subprocess.run(
            ["bash", "-c", " ".join(_with_interactive(command))],
            env={"HOME": str(folder), "USER": "ubuntu", "PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            start_new_session=True,  # an interactive bash would take over the terminal
        )
        assert done.returncode == 0, done.stderr
    return (folder / "called").read_text().splitlines()


@pytest.mark.parametrize("has_docker", [True, False])
@pytest.mark.parametrize("has_gpu", [True, False])
def test_google_machines_wait_for_their_driver_and_get_docker(tmp_path: Path, has_docker: bool, has_gpu: bool) -> None:
    vendor = tmp_path / "0000:00:04.0" / "vendor"
    vendor.parent.mkdir()
    vendor.write_text("0x10de\n" if has_gpu else "0x1af4\n")
    commands = [
        command.replace("/sys/bus/pci/devices", str(tmp_path))
        for command in launcher_config("gcp")["initialization_commands"]
    ]
    docker = {"docker"} if has_docker else set()
    called = on_a_fake_machine(tmp_path, commands, {"sudo", "nvidia-smi", "id", "sleep"} | docker)
    assert ("nvidia-smi " in called) == has_gpu
    as_root = [line.removeprefix("sudo ") for line in called if line.startswith("sudo ")]
    assert as_root[-1] == "usermod --append --groups docker ubuntu"
    assert as_root[:-1] == (
        []
        if has_docker
        else [
            "apt-get -o DPkg::Lock::Timeout=300 update",
            "apt-get -o DPkg::Lock::Timeout=300 install --yes docker.io",
            "nvidia-ctk runtime configure --runtime=docker",
            "systemctl restart docker",
        ]
    )
    assert called[-1] == "sleep 15", (
        "longer than Ray keeps a connection that was opened before the user joined the group"
    )


def test_workers_are_on_spot_and_heads_are_not() -> None:
    aws, gcp = (launcher_config(name)["available_node_types"] for name in ("aws", "gcp"))
    for kind in ("decode", "gpu"):
        assert aws[kind]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
        assert gcp[kind]["node_config"]["scheduling"]["provisioningModel"] == "SPOT"
        assert aws[kind]["min_workers"] == gcp[kind]["min_workers"] == 0
    assert "InstanceMarketOptions" not in aws["head"]["node_config"]
    assert "scheduling" not in gcp["head"]["node_config"]


LAUNCH = """
import json, sys, yaml, boto3
from ray.autoscaler._private.commands import _bootstrap_config
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

for role in ("nightshift-head", "nightshift-worker"):
    boto3.client("iam").create_instance_profile(InstanceProfileName=role)
config = _bootstrap_config(yaml.safe_load(open(sys.argv[1])), no_config_cache=True)
provider = AWSNodeProvider(config["provider"], config["cluster_name"])
for kind in ("head", "gpu"):
    node = config["available_node_types"][kind]["node_config"]
    provider.create_node(node, {"ray-node-type": kind, "ray-node-name": kind, "ray-node-status": "up"}, 1)
ec2 = boto3.resource("ec2")
machines = {
    instance.instance_type: {
        "lifecycle": instance.instance_lifecycle,
        "tokens": instance.metadata_options["HttpTokens"],
        "role": instance.iam_instance_profile["Arn"].rpartition("/")[2],
        "open": sorted(
            [rule["FromPort"], rule["ToPort"]]
            for group in instance.security_groups
            for rule in ec2.SecurityGroup(group["GroupId"]).ip_permissions
            if rule["IpRanges"]
        ),
    }
    for instance in ec2.instances.all()
}
print(json.dumps(machines))
"""


@pytest.mark.slow
def test_ray_launches_these_machines_on_a_simulated_ec2(s3_server: S3Server, tmp_path: Path) -> None:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    environment = {**os.environ, **s3_server.environment, "AWS_DEFAULT_REGION": "us-east-1", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, LAUNCHER / "aws.yaml"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    ssh_only = [[22, 22]]
    assert json.loads(done.stdout.splitlines()[-1]) == {
        "m7i.xlarge": {"lifecycle": None, "tokens": "required", "role": "nightshift-head", "open": ssh_only},
        "g6.4xlarge": {"lifecycle": "spot", "tokens": "required", "role": "nightshift-worker", "open": ssh_only},
    }


def test_prometheus_can_ask_the_dashboard_of_a_container() -> None:
    """The URL is a route of Ray, and the token file is the one that `cluster.sh` and `ray up` write."""
    text = (OBSERVABILITY / "README.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    (asked,) = yaml.safe_load(block)["http_sd_configs"]
    url = urllib.parse.urlsplit(asked["url"])
    assert (url.hostname, url.port) == ("127.0.0.1", 8265)
    assert f'@routes.get("{url.path}")' in inspect.getsource(reporter_head)
    assert asked["authorization"]["type"] == "Bearer", "Prometheus 2.42 has no default here"
    assert asked["authorization"]["credentials_file"].endswith("/.nightshift/token")
    assert '>"$here/token"' in (ROOT / "infra/bare/cluster.sh").read_text()
    for name in ("aws", "gcp"):
        config = launcher_config(name)
        (path,) = config["file_mounts"]
        assert f"`{get_docker_host_mount_location(config['cluster_name'])}{path}`" in text
