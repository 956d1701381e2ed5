"""The contest: the command of each contestant runs on a small and on a large archive, in turn, for several rounds."""

import importlib.util
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from jobs.bench.harness.archives import Archive
from jobs.bench.harness.measure import CommandFailed, Spent, spend
from jobs.bench.harness.programme import NULL

BENCH = Path(__file__).resolve().parents[1]
JOBS = BENCH.parent
OURS = "nightshift"
OUR_NULL = "jobs.bench.harness.null:network"
CHECKOUT = "checkout "
"""Beginning of the name of a contestant that is another checkout of Nightshift; its folder follows."""
PEER_NETWORKS = (NULL, "resnet", "resnext", "wide_resnet")  # the peers replace `network.fc`


@dataclass(frozen=True)
class Peer:
    """A script in jobs/bench/peers. package: what it needs. s3_package: what it also needs to read from S3."""

    title: str
    script: str
    package: str
    s3_package: str
    reads_tars: bool = True


PEERS = {
    "dataloader": Peer("PyTorch DataLoader", "dataloader.py", "torchvision", "boto3"),
    "ray": Peer("Ray Data", "ray_data.py", "ray", "pyarrow"),
    "daft": Peer("Daft", "daft_udf.py", "daft", "daft", reads_tars=False),
}


@dataclass(frozen=True)
class Run:
    """One run of a command. files: Parquet files with results. networks: how the network of ours ran → images."""

    spent: Spent
    files: int
    networks: dict[str, int]


@dataclass
class Result:
    """The runs of a contestant on each archive, one per round.

    large_files: Parquet files of its last run on the large archive. small_networks, large_networks: how the network of
    ours ran in the last round → images.
    """

    small_images: int
    large_images: int
    small: list[Spent] = field(default_factory=list)
    large: list[Spent] = field(default_factory=list)
    large_files: int = 0
    small_networks: dict[str, int] = field(default_factory=dict)
    large_networks: dict[str, int] = field(default_factory=dict)

    def add(self, small: Run, large: Run) -> None:
        """Add a round."""
        self.small.append(small.spent)
        self.large.append(large.spent)
        self.large_files, self.small_networks, self.large_networks = large.files, small.networks, large.networks

    @property
    def small_seconds(self) -> float:
        return median(spent.seconds for spent in self.small)

    @property
    def large_seconds(self) -> float:
        return median(spent.seconds for spent in self.large)

    @property
    def rate(self) -> float | None:
        """Marginal images/s."""
        return marginal_rate(self.small_images, self.large_images, self.small_seconds, self.large_seconds)

    @property
    def startup_seconds(self) -> float | None:
        return startup_seconds(self.small_images, self.small_seconds, self.rate)

    @property
    def core_seconds_per_image(self) -> float | None:
        """Marginal, of all processes; None if the large archive cost no more than the small one."""
        more = median(spent.core_seconds for spent in self.large) - median(spent.core_seconds for spent in self.small)
        return more / (self.large_images - self.small_images) if more > 0 else None

    @property
    def joules_per_image(self) -> float | None:
        """Marginal, of the CPU packages; None if the energy cannot be read, or was not larger."""
        small, large = (
            [spent.joules for spent in runs if spent.joules is not None] for runs in (self.small, self.large)
        )
        if not small or not large:
            return None
        more = median(large) - median(small)
        return more / (self.large_images - self.small_images) if more > 0 else None

    @property
    def by_role(self) -> dict[str, float]:
        """Marginal core-seconds per image by role of the processes, means over the rounds; the largest first."""
        more = self.large_images - self.small_images
        seconds_by_role: dict[str, float] = defaultdict(float)
        for sign, runs in ((1, self.large), (-1, self.small)):
            for spent in runs:
                for role, seconds in spent.by_role.items():
                    seconds_by_role[role] += sign * seconds / len(runs) / more
        return dict(sorted(seconds_by_role.items(), key=lambda item: -item[1]))

    @property
    def compiled_share(self) -> float:
        """Share of the marginal images whose network ran compiled; above 1 if the small run compiled late."""
        compiled = [
            sum(images for how, images in networks.items() if how.split(", ")[-1] == "compiled")
            for networks in (self.small_networks, self.large_networks)
        ]
        return (compiled[1] - compiled[0]) / (self.large_images - self.small_images)

    @property
    def small_memory_bytes(self) -> float:
        return median(spent.peak_memory_bytes for spent in self.small)

    @property
    def peak_memory_bytes(self) -> float:
        return median(spent.peak_memory_bytes for spent in self.large)


def marginal_rate(small: int, large: int, small_seconds: float, large_seconds: float) -> float | None:
    """images/s between two sizes, as in a long run; None if the larger archive took no longer."""
    return (large - small) / (large_seconds - small_seconds) if large_seconds > small_seconds else None


def startup_seconds(images: int, seconds: float, rate: float | None) -> float | None:
    """Seconds of a run without those of its images."""
    return None if rate is None else seconds - images / rate


def why_left_out(peer: str, model: str, in_tars: bool = False, on_s3: bool = False) -> str | None:
    """Why a peer cannot take part, as a sentence; None if it can."""
    if peer.startswith(CHECKOUT):
        return f"The {peer} is left out of {model}: its null network may be another one" if model == NULL else None
    contestant = PEERS[peer]
    for package in (contestant.package, *([contestant.s3_package] if on_s3 else [])):
        if importlib.util.find_spec(package) is None:
            return f"{contestant.title} is left out: {package} is not installed (pip install -e '.[bench]')"
    if in_tars and not contestant.reads_tars:
        return f"{contestant.title} is left out of tars: it has no reader for them"
    if not model.startswith(PEER_NETWORKS):
        return f"{contestant.title} is left out of {model}: its recipe is for torchvision's ResNets"
    return None


def command(name: str, model: str, archive: Archive, output: Path, peer_batch_size: int | None) -> list[str]:
    """The command line of Nightshift or another checkout of it, with default settings, or of a peer."""
    job = ["--input", archive.uri, "--output", str(output), "--model", our_name(model), "--weights", "random"]
    if name == OURS:
        return [sys.executable, str(JOBS / "embed.py"), *job]
    if name.startswith(CHECKOUT):
        folder = Path(name.removeprefix(CHECKOUT))
        own_python = folder / ".venv" / "bin" / "python"
        return [str(own_python) if own_python.exists() else sys.executable, str(folder / "jobs" / "embed.py"), *job]
    script = str(BENCH / "peers" / PEERS[name].script)
    batch_size = [] if peer_batch_size is None else ["--batch-size", str(peer_batch_size)]
    return [sys.executable, script, archive.uri, str(output), "--model", model, *batch_size]


def our_name(model: str) -> str:
    """The network as a value for --model of our jobs."""
    return OUR_NULL if model == NULL else model


def contest(
    names: Sequence[str],
    model: str,
    small: Archive,
    large: Archive,
    rounds: int,
    peer_batch_size: int | None,
    say: Callable[[str], None],
) -> dict[str, Result]:
    """Run all contestants. Each round begins with another one. Raises CommandFailed."""
    results = {name: Result(small.images, large.images) for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            runs = []
            for archive in (small, large):
                say(f"round {number + 1} of {rounds}: {name}, {archive.images:,} images")
                runs.append(_run(name, model, archive, peer_batch_size))
            results[name].add(*runs)
    return results


def one_gpu(environment: Mapping[str, str]) -> dict[str, str]:
    """A variable that limits a command to one GPU, the first one allowed here, since no peer uses more."""
    return {"CUDA_VISIBLE_DEVICES": environment.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]}


def _run(name: str, model: str, archive: Archive, peer_batch_size: int | None) -> Run:
    """Run one command. Raises CommandFailed if it fails or does not write one row per image."""
    quiet = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        output = Path(folder) / "output"
        line = command(name, model, archive, output, peer_batch_size)
        environment = {**os.environ, **quiet, **one_gpu(os.environ), **archive.environment}
        checkout = Path(name.removeprefix(CHECKOUT)) if name.startswith(CHECKOUT) else None
        if checkout:  # Ray's workers import from the working directory first
            environment["PYTHONPATH"] = str(checkout)
        spent = spend(line, environment, checkout)
        results = [*output.glob("*.parquet"), *output.glob("results/*.parquet")]  # of a peer, of ours
        rows = sum(pq.read_metadata(path).num_rows for path in [*results, *output.glob("_errors/*.parquet")])
        if rows != archive.images:
            raise CommandFailed(f"{name} wrote {rows} rows for {archive.images} images of {archive.uri}")
        report = output / "_report.json"
        return Run(spent, len(results), json.loads(report.read_text())["networks"] if report.is_file() else {})
