"""Contestants and their contest: each one's command on a small and on a large archive, in turn, several rounds."""

import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from jobs.bench.archives import Archive
from jobs.bench.measure import CommandFailed, Spent, spend

JOBS = Path(__file__).resolve().parents[1]
OURS = "nightshift"
PEER_NETWORKS = ("resnet", "resnext", "wide_resnet")  # the recipes replace `network.fc`


@dataclass(frozen=True)
class Peer:
    """A recipe below jobs/peers, and the package that it needs."""

    title: str
    script: str
    package: str
    reads_tars: bool = True


PEERS = {
    "dataloader": Peer("PyTorch DataLoader", "dataloader.py", "torchvision"),
    "ray": Peer("Ray Data", "ray_data.py", "ray"),
    "daft": Peer("Daft", "daft_udf.py", "daft", reads_tars=False),
}


@dataclass
class Result:
    """What a contestant took on each archive, a run a round.

    large_files: Parquet files that its last run on the large archive left.
    """

    small_images: int
    large_images: int
    small: list[Spent] = field(default_factory=list)
    large: list[Spent] = field(default_factory=list)
    large_files: int = 0

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
        """Marginal, of all processes; None where the large archive took no more than the small one."""
        more = median(spent.core_seconds for spent in self.large) - median(spent.core_seconds for spent in self.small)
        return more / (self.large_images - self.small_images) if more > 0 else None

    @property
    def peak_memory_bytes(self) -> float:
        return median(spent.peak_memory_bytes for spent in self.large)


def marginal_rate(small: int, large: int, small_seconds: float, large_seconds: float) -> float | None:
    """images/s between two sizes, which is what a long run sees; None where the larger took no longer."""
    return (large - small) / (large_seconds - small_seconds) if large_seconds > small_seconds else None


def startup_seconds(images: int, seconds: float, rate: float | None) -> float | None:
    """The seconds of a run that its images do not account for."""
    return None if rate is None else seconds - images / rate


def left_out(peer: str, model: str, in_tars: bool) -> str | None:
    """Why a peer cannot take part, as a sentence; None where it can."""
    found = PEERS[peer]
    if importlib.util.find_spec(found.package) is None:
        return f"{found.title} is left out: it is not installed (pip install -e '.[bench]')"
    if in_tars and not found.reads_tars:
        return f"{found.title} is left out of tars: it has no reader for them"
    if not model.startswith(PEER_NETWORKS):
        return f"{found.title} is left out of {model}: its recipe is for torchvision's ResNets"
    return None


def command(name: str, model: str, archive: Archive, output: Path, peer_batch_size: int) -> list[str]:
    """The command line of Nightshift, with its default settings, or of a peer."""
    if name == OURS:
        paths = ["--input", str(archive.folder), "--output", str(output)]
        return [sys.executable, str(JOBS / "embed.py"), *paths, "--model", model, "--weights", "random"]
    script = str(JOBS / "peers" / PEERS[name].script)
    settings = ["--model", model, "--batch-size", str(peer_batch_size)]
    return [sys.executable, script, str(archive.folder), str(output), *settings]


def contest(
    names: Sequence[str],
    model: str,
    small: Archive,
    large: Archive,
    rounds: int,
    peer_batch_size: int,
    say: Callable[[str], None],
) -> dict[str, Result]:
    """Run everyone, each round beginning with the next one. Raises CommandFailed."""
    results = {name: Result(small.images, large.images) for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in [*names[first:], *names[:first]]:
            for archive, spent in ((small, results[name].small), (large, results[name].large)):
                say(f"round {number + 1} of {rounds}: {name}, {archive.images:,} images")
                took, files = _run(name, model, archive, peer_batch_size)
                spent.append(took)
            results[name].large_files = files
    return results


def _run(name: str, model: str, archive: Archive, peer_batch_size: int) -> tuple[Spent, int]:
    """Also the number of Parquet files with results."""
    quiet = {"RAY_ADDRESS": "local", "RAY_USAGE_STATS_ENABLED": "0", "DAFT_ANALYTICS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        output = Path(folder) / "output"
        line = command(name, model, archive, output, peer_batch_size)
        spent = spend(line, {**os.environ, **quiet})
        results = list(output.glob("*.parquet"))
        rows = sum(pq.read_metadata(path).num_rows for path in [*results, *output.glob("_errors/*.parquet")])
        if rows != archive.images:
            raise CommandFailed(f"{name} wrote {rows} rows for {archive.images} images of {archive.folder}")
        return spent, len(results)
