"""The cost of Ray per image and per task, from whole jobs with a null predictor on clusters of several nodes.

    python jobs/bench/nodes.py
    python jobs/bench/nodes.py --topology apart --nodes 4 --json nodes.json
    python jobs/bench/nodes.py --case tiles --small 10000 --large 40000 --topology together

All nodes run on this machine and share its cores. So CPU time is measured, and images/s show no speed-up. Topologies:
cpu, two CPUs per node; together, two CPUs and a GPU per node; apart, half of the nodes with two CPUs and half with a
GPU and no CPU, so that the pixels of every image cross nodes. GPUs are only numbers: actors are placed by them, and
compute nothing. Photos of 110 KB in tars become 224 × 224 pixels. With `--case tiles` images of 64 × 64 pixels keep
their size, and run at a rate at which the driver's work shows.

Core-milliseconds per image are marginal, (large − small archive) / (more images), so the start does not count. Those of
the driver per task come from the same images in more tars. Figures are medians of the rounds. The stages alone are
measured in one process between the jobs.
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

from jobs.bench.harness import machine, show
from jobs.bench.harness.archives import DISTINCT_PHOTOS, encoded_photo, encoded_tiles, write_tars
from jobs.bench.harness.contest import marginal_rate
from jobs.bench.harness.measure import TAIL_CHARACTERS, CommandFailed
from pipeline import Transform, cli
from pipeline.errors import SettingRefused
from pipeline.report.report import Report

CPU, BOTH, GPU = {"num_cpus": 2}, {"num_cpus": 2, "num_gpus": 1}, {"num_cpus": 0, "num_gpus": 1}
TOPOLOGIES: dict[str, Any] = {
    "cpu": lambda nodes: [CPU] * nodes,
    "together": lambda nodes: [BOTH] * nodes,
    "apart": lambda nodes: [CPU] * (nodes - nodes // 2) + [GPU] * (nodes // 2),
}
CASES = {"photos": Transform(), "tiles": Transform(resize=64, crop=64)}
STORE_BYTES = 512 << 20
SETTLE_SECONDS = 10.0  # the processes of a new cluster start in this time
ROWS_PER_PART = 2_048
SAMPLE_SECONDS = 0.2
ROLES = ("driver", "daemons", "agents", "decoders", "actors")
"""daemons: GCS and raylets. agents: Ray's other processes that run as long as the cluster."""


@dataclass
class Meter:
    """Core-seconds of the processes of a cluster that this process has started, at their last sample."""

    core_seconds: dict[psutil.Process, float] = field(default_factory=dict)
    roles: dict[psutil.Process, str] = field(default_factory=dict)
    driver_bytes: int = 0

    def sample(self, driver: int) -> None:
        for process in psutil.Process().children(recursive=True):
            try:
                if process.pid == driver:
                    self.driver_bytes = max(self.driver_bytes, process.memory_full_info().uss)
                    continue
                times, name = process.cpu_times(), role(process.name())
            except psutil.Error:
                continue
            self.core_seconds[process] = times.user + times.system
            if name:
                self.roles[process] = name

    def since(self, before: "Meter") -> dict[str, float]:
        """Core-seconds by role. A process that never did any work counts as an agent."""
        seconds_by_role = dict.fromkeys(ROLES, 0.0)
        for process, seconds in self.core_seconds.items():
            seconds_by_role[self.roles.get(process, "agents")] += seconds - before.core_seconds.get(process, 0.0)
        return seconds_by_role


def role(title: str) -> str | None:
    """The role of a process by its title, which Ray sets to the task of a worker; None for an idle worker."""
    if title in ("gcs_server", "raylet"):
        return "daemons"
    if title.startswith("ray::MapWorker"):
        return "actors"
    if title.startswith(("ray::Read", "ray::Write")):
        return "decoders"
    return "agents" if title.startswith(("ray::_", "ray::Actor", "ray::Dash", "ray::Runtime")) else None


@dataclass(frozen=True)
class Spent:
    """The cost of one job. core_seconds: by role."""

    seconds: float
    core_seconds: Mapping[str, float]
    driver_bytes: int


@dataclass(frozen=True)
class Archives:
    """few, many: numbers of tars. The small archive is made with each of them, the large one with few."""

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
    """The jobs of a cluster, each once per round. alone: core-seconds per image of the stages, before each job."""

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
        """Core-milliseconds per image of these stages together."""
        return 1000 * median(sum(each[name] for name in stages) for each in self.alone)

    @property
    def per_task_ms(self) -> float:
        """Core-milliseconds of the driver per task."""
        return 1000 * self._more(self.many, "driver") / (self.tasks[1] - self.tasks[0])

    @property
    def rate(self) -> float | None:
        """Marginal images/s on the cores of this machine."""
        return marginal_rate(*self.sizes, *(median(each.seconds for each in runs) for runs in (self.small, self.large)))

    @property
    def agents_share(self) -> float:
        """Share of a core that the agents of all nodes take; it depends on the time and not on the images."""
        return median(each.core_seconds["agents"] / each.seconds for each in self.large)

    @property
    def driver_bytes(self) -> float:
        return median(each.driver_bytes for each in self.large)

    def as_json(self) -> dict[str, Any]:
        costs = {name: self.per_image_ms(name) for name in ROLES if name != "agents"}
        figures = {
            "core_ms_per_image": costs,
            "driver_ms_per_task": self.per_task_ms,
            "agents_share": self.agents_share,
        }
        return {**asdict(self), **figures, "images_per_second": self.rate}

    def _more(self, runs: list[Spent], role: str) -> float:
        """Core-seconds more than those of the small archive in few tars."""
        one, other = (median(each.core_seconds[role] for each in those) for those in (runs, self.small))
        return one - other


@contextmanager
def cluster(topology: str, nodes: int) -> Iterator[str]:
    """Start nodes on this machine. Yields the address of the cluster."""
    from ray.cluster_utils import Cluster

    head, *others = TOPOLOGIES[topology](nodes)
    ray_cluster = Cluster(
        initialize_head=True, head_node_args={**head, "object_store_memory": STORE_BYTES, "include_dashboard": False}
    )
    try:
        for other in others:
            ray_cluster.add_node(**other, object_store_memory=STORE_BYTES)
        yield ray_cluster.address
    finally:
        ray_cluster.shutdown()


def spend(address: str, archive: Path, images: int, transform: Transform) -> Spent:
    """Run the job on a cluster that this process has started. Raises CommandFailed."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder, tempfile.TemporaryFile("w+b") as printed:
        output = Path(folder) / "output"
        command = [sys.executable, "-m", "jobs.bench.harness.null", str(archive), str(output)]
        command += ["--resize", str(transform.resize), "--crop", str(transform.crop)]
        started = time.perf_counter()
        job = subprocess.Popen(
            [*command, "--rows-per-part", str(ROWS_PER_PART)],
            env={**os.environ, "RAY_ADDRESS": address},
            stdout=printed,
            stderr=printed,
        )
        before, meter = Meter(), Meter()
        before.sample(job.pid)
        while not (ended := os.wait4(job.pid, os.WNOHANG))[0]:
            meter.sample(job.pid)
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        job.returncode = os.waitstatus_to_exitcode(ended[1])
        if job.returncode or Report.load(str(output)).rows != images:
            printed.seek(0)
            raise CommandFailed(f"the job over {archive} failed", printed.read()[-TAIL_CHARACTERS:].decode())
    driver = {"driver": ended[2].ru_utime + ended[2].ru_stime}
    return Spent(seconds, meter.since(before) | driver, meter.driver_bytes)


def measure(topology: str, nodes: int, archives: Archives, rounds: int) -> Outcome:
    """Start a new cluster for each round."""
    from jobs.bench.harness import null, stages  # stages imports torch, which --help does not need

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
    rows = Table(title="core-ms per image, and per task for the driver", title_justify="left")
    rows.add_column("cluster")
    for header in ("driver", "GCS and\nraylets", "decoders", "same work\nalone", "actors", "images/s"):
        rows.add_column(header, justify="right")
    for header in ("driver,\nper task", "driver's\nMiB", "agents,\nshare of a core"):
        rows.add_column(header, justify="right")
    for each in outcomes:
        rows.add_row(
            f"{each.topology}, {each.nodes} node{'s'[: each.nodes > 1]}",
            *(f"{each.per_image_ms(name):.3f}" for name in ("driver", "daemons", "decoders")),
            f"{each.alone_ms('read', 'decode', 'write'):.3f}",
            f"{each.per_image_ms('actors'):.3f}",
            show.number(each.rate, ",.0f"),
            f"{each.per_task_ms:.1f}",
            f"{each.driver_bytes / 2**20:,.0f}",
            f"{each.agents_share:.0%}",
        )
    return rows


def parser() -> argparse.ArgumentParser:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument(
        "--topology", choices=list(TOPOLOGIES), action="append", help="may be given again (default: all)"
    )
    flags.add_argument("--nodes", metavar="N", type=int, action="append", help="may be given again (default: 1, 2, 4)")
    flags.add_argument("--case", choices=list(CASES), default="photos", help="default: photos")
    flags.add_argument("--small", metavar="N", type=int, default=2_000, help="images (default: 2000)")
    flags.add_argument("--large", metavar="N", type=int, default=10_000, help="images (default: 10000)")
    flags.add_argument("--few", metavar="N", type=int, default=16, help="tars of both archives (default: 16)")
    flags.add_argument(
        "--many",
        metavar="N",
        type=int,
        default=1_000,
        help="tars of the small archive, to cost the tasks (default: 1000)",
    )
    flags.add_argument("--rounds", metavar="N", type=int, default=2, help="default: 2")
    flags.add_argument("--json", metavar="FILE", type=Path, help="write all figures")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    return cli.guarded(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    nodes, topologies = options.nodes or [1, 2, 4], options.topology or list(TOPOLOGIES)
    if min(nodes) < 1 or options.rounds < 1:
        raise SettingRefused(f"--nodes {min(nodes)} and --rounds {options.rounds} must be at least 1")
    clusters = [(name, count) for name in topologies for count in nodes if name != "apart" or count > 1]
    if not clusters:
        raise SettingRefused("--topology apart needs --nodes of at least 2: one that decodes and one with a GPU")
    if not 0 < options.few < options.many <= options.small < options.large:
        raise SettingRefused(
            f"--few {options.few}, --many {options.many}, --small {options.small}, --large {options.large}: each must "
            "be larger than the one before, and a tar holds at least one image"
        )
    if options.small % options.few or options.large % options.few or options.small % options.many:
        raise SettingRefused(
            f"--small {options.small} and --large {options.large} must be multiples of --few {options.few}, and "
            f"--small of --many {options.many}, so that all tars hold the same number of images"
        )
    os.environ["RAY_AUTH_MODE"] = "disabled"  # for the clusters of this process
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        archives = Archives(Path(folder), options.case, options.small, options.large, options.few, options.many)
        archives.write()
        outcomes = [measure(name, count, archives, options.rounds) for name, count in clusters]
    show.console().print(table(outcomes))
    print("all nodes are on this machine: compare core-ms, not images/s")
    if options.json:
        clusters_json = [each.as_json() for each in outcomes]
        record = {"case": options.case, "machine": machine.describe(), "clusters": clusters_json}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
