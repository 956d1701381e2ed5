"""What Ray costs an image and a task: whole jobs with a network that does nothing, on clusters of several nodes.

    python jobs/bench_nodes.py
    python jobs/bench_nodes.py --topology apart --nodes 4 --json nodes.json
    python jobs/bench_nodes.py --case tiles --small 10000 --large 40000 --topology together

The nodes are Ray's own, all on this machine and its cores: CPU time is what is measured, and images/s show no speed-up.
Topologies: cpu, two CPUs a node; together, two CPUs and a GPU a node; apart, half of the nodes with two CPUs, half with
a GPU and no CPU, so that every image's pixels go from node to node. GPUs are logical: the actors are where they would
be, and compute nothing. Photos of 110 KB, in tars, become 224 × 224 pixels; with `--case tiles` images of 64 × 64
pixels stay what they are, and so many come a second that the driver's work shows.

Core-milliseconds an image are marginal, (large − small archive) / images between them, so starting counts for nothing;
the driver's a task are those of the same images in more tars. Medians of the rounds. The stages alone, in one process,
are measured between the jobs.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil
from rich.table import Table

from jobs.bench import machine, show
from jobs.bench.archives import DISTINCT_PHOTOS, encoded_photo, encoded_tiles, write_tars
from jobs.bench.contest import marginal_rate
from jobs.bench.measure import TAIL_CHARACTERS, CommandFailed
from pipeline import Transform, cli
from pipeline.errors import SettingRefused
from pipeline.report import Report

CPU, BOTH, GPU = {"num_cpus": 2}, {"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 0, "num_gpus": 1}
TOPOLOGIES: dict[str, Any] = {
    "cpu": lambda nodes: [CPU] * nodes,
    "together": lambda nodes: [BOTH] * nodes,
    "apart": lambda nodes: [CPU] * (nodes - nodes // 2) + [GPU] * (nodes // 2),
}
CASES = {"photos": Transform(), "tiles": Transform(resize=64, crop=64)}
STORE_BYTES = 512 << 20
SETTLE_SECONDS = 10.0  # until the processes of a new cluster have started
ROWS_PER_PART = 2_048
SAMPLE_SECONDS = 0.2
ROLES = ("driver", "daemons", "agents", "decoders", "actors")
"""daemons: GCS and raylets. agents: everything else that Ray keeps running, as long as it runs."""


@dataclass
class Meter:
    """Core-seconds of the processes of a cluster that this process has started; of one that ended, as last seen."""

    core_seconds: dict[psutil.Process, float] = field(default_factory=dict)
    roles: dict[psutil.Process, str] = field(default_factory=dict)
    driver_bytes: int = 0

    def sample(self, driver: int) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.pid == driver:
                    self.driver_bytes = max(self.driver_bytes, process.memory_full_info().uss)
                    continue
                times, found = process.cpu_times(), role(process.name())
            except psutil.Error:
                continue
            self.core_seconds[process] = times.user + times.system
            if found:
                self.roles[process] = found

    def since(self, before: "Meter") -> dict[str, float]:
        """Core-seconds by role; a process that never took up any work is an agent."""
        found = dict.fromkeys(ROLES, 0.0)
        for process, seconds in self.core_seconds.items():
            found[self.roles.get(process, "agents")] += seconds - before.core_seconds.get(process, 0.0)
        return found


def role(title: str) -> str | None:
    """Of a process by its title, which Ray sets to what a worker does; None while it does nothing."""
    if title in ("gcs_server", "raylet"):
        return "daemons"
    if title.startswith("ray::MapWorker"):
        return "actors"
    if title.startswith(("ray::Read", "ray::Write")):
        return "decoders"
    return "agents" if title.startswith(("ray::_", "ray::Actor", "ray::Dash", "ray::Runtime")) else None


@dataclass(frozen=True)
class Spent:
    """One job. core_seconds: by role."""

    seconds: float
    core_seconds: Mapping[str, float]
    driver_bytes: int


@dataclass(frozen=True)
class Archives:
    """few, many: tars that the small archive's images are in; the large archive's are in few."""

    folder: Path
    case: str
    small: int
    large: int
    few: int
    many: int

    def write(self) -> None:
        photos = self.case == "photos"
        images = [encoded_photo(seed) for seed in range(DISTINCT_PHOTOS)] if photos else encoded_tiles()
        for name, count, tars in (
            ("small", self.small, self.few),
            ("large", self.large, self.few),
            ("many", self.small, self.many),
        ):
            (self.folder / name).mkdir()
            write_tars(self.folder / name, count, images, per_tar=count // tars)


@dataclass(frozen=True)
class Outcome:
    """A cluster's jobs, one of each a round. alone: core-seconds an image of the stages, before each job."""

    topology: str
    nodes: int
    sizes: tuple[int, int]
    tasks: tuple[int, int]
    small: list[Spent] = field(default_factory=list)
    large: list[Spent] = field(default_factory=list)
    many: list[Spent] = field(default_factory=list)
    alone: list[dict[str, float]] = field(default_factory=list)

    def per_image_ms(self, role: str) -> float:
        """Core-milliseconds."""
        return 1000 * self._more(self.large, role) / (self.sizes[1] - self.sizes[0])

    def alone_ms(self, *stages: str) -> float:
        """Core-milliseconds an image of these stages together."""
        return 1000 * median(sum(each[name] for name in stages) for each in self.alone)

    @property
    def per_task_ms(self) -> float:
        """Core-milliseconds of the driver."""
        return 1000 * self._more(self.many, "driver") / (self.tasks[1] - self.tasks[0])

    @property
    def rate(self) -> float | None:
        """Marginal images/s on the cores of this machine."""
        return marginal_rate(*self.sizes, *(median(each.seconds for each in runs) for runs in (self.small, self.large)))

    @property
    def agents_share(self) -> float:
        """Of a core, on all nodes together: what they take goes with the time, not with the images."""
        return median(each.core_seconds["agents"] / each.seconds for each in self.large)

    @property
    def driver_bytes(self) -> float:
        return median(each.driver_bytes for each in self.large)

    def as_json(self) -> dict[str, Any]:
        costs = {name: self.per_image_ms(name) for name in ROLES if name != "agents"}
        found = {"core_ms_per_image": costs, "driver_ms_per_task": self.per_task_ms, "agents_share": self.agents_share}
        return {**asdict(self), **found, "images_per_second": self.rate}

    def _more(self, runs: list[Spent], role: str) -> float:
        """Core-seconds than those of the small archive in few tars."""
        one, other = (median(each.core_seconds[role] for each in those) for those in (runs, self.small))
        return one - other


@contextmanager
def cluster(topology: str, nodes: int) -> Iterator[str]:
    """Nodes on this machine, reached at the address that is yielded."""
    from ray.cluster_utils import Cluster

    head, *others = TOPOLOGIES[topology](nodes)
    made = Cluster(
        initialize_head=True, head_node_args={**head, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    )
    try:
        for other in others:
            made.add_node(**other, object_store_memory=STORE_BYTES)
        yield made.address
    finally:
        made.shutdown()


def spend(address: str, archive: Path, images: int, transform: Transform) -> Spent:
    """Run the job on a cluster of this process. Raises CommandFailed."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder, tempfile.TemporaryFile("w+b") as said:
        output = Path(folder) / "output"
        command = [sys.executable, "-m", "jobs.bench.null", str(archive), str(output)]
        command += ["--resize", str(transform.resize), "--crop", str(transform.crop)]
        started = time.perf_counter()
        job = subprocess.Popen(
            [*command, "--rows-per-part", str(ROWS_PER_PART)],
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=said,
            stderr=said,
        )
        before, meter = Meter(), Meter()
        before.sample(job.pid)
        while not (ended := os.wait4(job.pid, os.WNOHANG))[0]:
            meter.sample(job.pid)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        job.returncode = os.waitstatus_to_exitcode(ended[1])
        if job.returncode or Report.load(str(output)).rows != images:
            said.seek(0)
            raise CommandFailed(f"the job over {archive} ended badly", said.read()[-TAIL_CHARACTERS:].decode())
    driver = {"driver": ended[2].ru_utime + ended[2].ru_stime}
    return Spent(seconds, meter.since(before) | driver, meter.driver_bytes)


def measure(topology: str, nodes: int, archives: Archives, rounds: int) -> Outcome:
    """A cluster of its own for each round."""
    from jobs.bench import null, stages  # torch, which --help can do without

    small, large, transform = archives.small, archives.large, CASES[archives.case]
    outcome = Outcome(topology, nodes, (small, large), (archives.few, archives.many))
    for _ in range(rounds):
        with cluster(topology, nodes) as address:
            time.sleep(SETTLE_SECONDS)
            for name, images in (("small", small), ("large", large), ("many", small)):
                alone = stages.alone(archives.folder / "small", null.Null(transform), ROWS_PER_PART)
                outcome.alone.append(alone)
                getattr(outcome, name).append(spend(address, archives.folder / name, images, transform))
    return outcome


def table(outcomes: list[Outcome]) -> Table:
    made = Table(title="core-ms an image, and the driver's a task", title_justify="left")
    made.add_column("cluster")
    for header in ("driver", "GCS and\nraylets", "decoders", "their work\nalone", "actors", "images/s"):
        made.add_column(header, justify="right")
    for header in ("driver,\na task", "driver's\nMiB", "agents,\nof a core"):
        made.add_column(header, justify="right")
    for each in outcomes:
        made.add_row(
            f"{each.topology}, {each.nodes} node{'s'[: each.nodes > 1]}",
            *(f"{each.per_image_ms(name):.3f}" for name in ("driver", "daemons", "decoders")),
            f"{each.alone_ms('read', 'decode', 'write'):.3f}",
            f"{each.per_image_ms('actors'):.3f}",
            show.number(each.rate, ",.0f"),
            f"{each.per_task_ms:.1f}",
            f"{each.driver_bytes / 2**20:,.0f}",
            f"{each.agents_share:.0%}",
        )
    return made


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--topology", choices=list(TOPOLOGIES), action="append", help="give several (default: all)")
    made.add_argument("--nodes", metavar="N", type=int, action="append", help="give several (default: 1, 2, 4)")
    made.add_argument("--case", choices=list(CASES), default="photos", help="default: photos")
    made.add_argument("--small", metavar="N", type=int, default=2_000, help="images (default: 2000)")
    made.add_argument("--large", metavar="N", type=int, default=10_000, help="images (default: 10000)")
    made.add_argument("--few", metavar="N", type=int, default=16, help="tars of both (default: 16)")
    made.add_argument("--many", metavar="N", type=int, default=1_000, help="tars of the small one (default: 1000)")
    made.add_argument("--rounds", metavar="N", type=int, default=2, help="default: 2")
    made.add_argument("--json", metavar="FILE", type=Path, help="write every figure")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    return cli.guarded(lambda: report(given))


def report(given: argparse.Namespace) -> int:
    nodes, topologies = given.nodes or [1, 2, 4], given.topology or list(TOPOLOGIES)
    if min(nodes) < 1 or given.rounds < 1:
        raise SettingRefused(f"--nodes {min(nodes)} and --rounds {given.rounds} must both be at least 1")
    clusters = [(name, count) for name in topologies for count in nodes if name != "apart" or count > 1]
    if not clusters:
        raise SettingRefused("--topology apart needs --nodes of 2 or more: one that decodes and one with a GPU")
    if not 0 < given.few < given.many <= given.small < given.large:
        raise SettingRefused(
            f"--few {given.few}, --many {given.many}, --small {given.small}, --large {given.large}: each must be "
            "larger than the one before, and a tar holds at least one image"
        )
    if given.small % given.few or given.large % given.few or given.small % given.many:
        raise SettingRefused(
            f"--small {given.small} and --large {given.large} must be multiples of --few {given.few}, and --small of "
            f"--many {given.many}, so that all tars hold as many images"
        )
    os.environ["RAY_AUTH_MODE"] = "disabled"  # the clusters are this process's own
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        archives = Archives(Path(folder), given.case, given.small, given.large, given.few, given.many)
        archives.write()
        outcomes = [measure(name, count, archives, given.rounds) for name, count in clusters]
    show.console().print(table(outcomes))
    print("every node is on this machine: compare core-ms, not images/s")
    if given.json:
        found = [each.as_json() for each in outcomes]
        record = {"case": given.case, "machine": machine.describe(), "clusters": found}
        given.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
