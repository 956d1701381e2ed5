"""infra/bare/cluster.sh, on machines behind a real ssh, with a real `ray start` on each of them."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from servers import ROOT, free_port
from ssh_server import ssh_server

SCRIPT = ROOT / "infra" / "bare" / "cluster.sh"


def test_the_script_is_clean() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, SCRIPT], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


@dataclass(frozen=True)
class Machines:
    folder: Path
    environment: dict[str, str]
    dashboard_port: int
    hosts: Path

    def cluster(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SCRIPT, command, self.hosts], env=self.environment, capture_output=True, text=True, timeout=240
        )

    def processes(self) -> list[psutil.Process]:
        """All processes on the machines."""
        processes = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("HOME", "").startswith(f"{self.folder}/homes/"):
                    processes.append(process)
            except psutil.Error:
                continue
        return processes


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """`head` and `worker`. Both are this machine, so they must not share ports or folders."""
    if not shutil.which("ssh"):
        pytest.skip("ssh is not installed")
    sessions = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short, because Ray creates sockets below it
    dashboard_port = free_port()
    common = "--node-ip-address=127.0.0.1 --num-cpus=1 --object-store-memory=100000000"
    hosts = tmp_path / "hosts"
    hosts.write_text(
        "# the head first\n\n"
        f"head@127.0.0.1 {common} --dashboard-port={dashboard_port} --dashboard-agent-listen-port={free_port()}"
        f" --ray-client-server-port={free_port()} --temp-dir={sessions}/head\n"
        f"worker@127.0.0.1 {common} --dashboard-agent-listen-port={free_port()} --temp-dir={sessions}/worker"
    )
    with ssh_server(tmp_path) as ssh:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),
            "NIGHTSHIFT_SSH": ssh,
            "NIGHTSHIFT_VENV": sys.prefix,
            "NIGHTSHIFT_PORT": str(free_port()),
        }
        machines = Machines(tmp_path, environment, dashboard_port, hosts)
        try:
            yield machines
        finally:
            for process in machines.processes():
                process.kill()
            shutil.rmtree(sessions, ignore_errors=True)


def get(url: str, token: str = "") -> int:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.mark.slow
def test_a_cluster_starts_says_so_and_stops(machines: Machines) -> None:
    started = machines.cluster("start")
    assert started.returncode == 0, started.stderr
    assert started.stdout.startswith("head@127.0.0.1: started\nworker@127.0.0.1: started\nThe cluster runs.")

    token_file = machines.folder / ".ray" / "auth_token"
    token = token_file.read_text()
    assert (len(token), token_file.stat().st_mode & 0o77) == (64, 0)
    for name in ("head", "worker"):
        kept = machines.folder / "homes" / name / ".nightshift" / "token"
        assert (kept.read_text(), kept.stat().st_mode & 0o77) == (token, 0)
    assert not any(token in " ".join(process.cmdline()) for process in machines.processes())

    jobs = f"http://127.0.0.1:{machines.dashboard_port}/api/jobs/"
    assert (get(jobs), get(jobs, "f" * 64), get(jobs, token)) == (401, 403, 200)
    listening = {
        connection.laddr.ip
        for connection in psutil.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == machines.dashboard_port
    }
    assert listening == {"127.0.0.1"}

    before = {process.pid for process in machines.processes()}
    again = machines.cluster("start")
    assert again.stdout.startswith("head@127.0.0.1: already runs\nworker@127.0.0.1: already runs\n")
    assert {process.pid for process in machines.processes()} >= {pid for pid in before if psutil.pid_exists(pid)}

    status = machines.cluster("status")
    assert status.returncode == 0, status.stderr
    assert status.stdout.startswith("head@127.0.0.1: runs\nworker@127.0.0.1: runs\n")
    until = time.monotonic() + 60
    while (
        "2.0 CPU" not in status.stdout and time.monotonic() < until
    ):  # the head updates its resources every few seconds
        status = machines.cluster("status")
    assert "2.0 CPU" in status.stdout

    stopped = machines.cluster("stop")
    assert stopped.stdout == "worker@127.0.0.1: stopped\nhead@127.0.0.1: stopped\n", stopped.stderr
    assert machines.processes() == []
    assert machines.cluster("status").returncode == 1
    assert machines.cluster("stop").stdout == "worker@127.0.0.1: was not running\nhead@127.0.0.1: was not running\n"


@pytest.mark.long
def test_a_head_that_cannot_start_says_why(machines: Machines) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", int(machines.environment["NIGHTSHIFT_PORT"])))
        taken.listen()
        done = machines.cluster("start")
    assert done.returncode == 2
    assert "head@127.0.0.1: Ray did not start: " in done.stderr
    assert "the head did not start; nothing else was started" in done.stderr
    assert machines.processes() == []


@pytest.mark.parametrize(
    ("listed", "flags", "given"), [(True, "", True), (True, "--node-ip-address=10.9.9.9", False), (False, "", False)]
)
def test_a_head_has_the_address_that_it_is_listed_by(tmp_path: Path, listed: bool, flags: str, given: bool) -> None:
    """`ssh` is a local shell here, and `ray` records its flags. Behind NAT a head is listed by another address."""
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()
    if not addresses:
        pytest.skip("this machine has only a loopback address")
    for name, text in (
        ("ssh", 'shift 5\nexec "$@"'),
        ("venv/bin/ray", f'echo "$@" >{tmp_path}/started\necho Ray runtime started\nsleep 60'),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    hosts = tmp_path / "hosts"
    hosts.write_text(f"{addresses[0] if listed else 'far.example'} {flags}\n")
    own = {"HOME": str(tmp_path), "NIGHTSHIFT_SSH": str(tmp_path / "ssh"), "NIGHTSHIFT_VENV": str(tmp_path / "venv")}
    for command in ("start", "stop"):
        subprocess.run([SCRIPT, command, hosts], env={"PATH": os.environ["PATH"], **own}, check=True, timeout=60)
    started = (tmp_path / "started").read_text()
    assert (f"--node-ip-address={addresses[0]}" in started) is given


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no machine"),
        ("head --num-cpus=1; reboot", "has characters that no flag of ray start needs"),
        ("-oProxyCommand=reboot", "is not of the form [user@]address"),
        ("a$(reboot)", "is not of the form [user@]address"),
    ],
)
def test_a_bad_list_of_machines_is_refused(tmp_path: Path, text: str, said: str) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "NIGHTSHIFT_SSH": "false"}
    done = subprocess.run([SCRIPT, "start", hosts], env=environment, capture_output=True, text=True, timeout=30)
    assert (done.returncode, said in done.stderr) == (2, True), done.stderr


def test_usage_is_shown() -> None:
    for arguments in ([], ["begin"], ["start"]):
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True, timeout=30)
        assert (done.returncode, "usage: cluster.sh" in done.stderr) == (2, True)
