"""Reading and decoding alone: how many images/s all cores do, with one process per core, as the read tasks of a run.

    python -m jobs.bench.harness.decoding ARCHIVE --model resnet50 --decoder fast --batch-size 256

Prints JSON. Processes and not threads: threads of one process would also compete for the interpreter, which read tasks
on many cores do not. ARCHIVE is a folder of loose images. The pixels are dropped.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from jobs.bench.harness.measure import json_of
from pipeline import cli
from pipeline.config import RunConfig
from pipeline.coverage import Ranges
from pipeline.estimates.machines import cpus_here
from pipeline.planning.archive import Archive
from pipeline.predictors.embed import Embedder
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader

WARM_UP_SHARE = 0.2
"""Share of the images before the clock starts, while processes start."""


@dataclass
class Progress:
    """times: when each batch was done, in seconds. counts: its images."""

    times: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, images: int) -> None:
        self.times.append(time.perf_counter())
        self.counts.append(images)

    @property
    def images_per_second(self) -> float | None:
        """From the end of the warm-up to the last batch; None if that is no time."""
        warm = int(np.searchsorted(np.cumsum(self.counts), WARM_UP_SHARE * sum(self.counts)))
        seconds = self.times[-1] - self.times[warm]
        return sum(self.counts[warm + 1 :]) / seconds if seconds > 0 else None


def run(loader: Loader, shards: Iterator[Shard], processes: int) -> Progress:
    """Load all rows of the shards, a table of the loader at a time."""
    progress = Progress()
    context = multiprocessing.get_context("spawn")  # as Ray starts its workers
    with ProcessPoolExecutor(processes, context) as pool:
        for images in pool.map(partial(_load, loader), *zip(*_pieces(loader, shards), strict=True)):
            progress.add(images)
    return progress


def _pieces(loader: Loader, shards: Iterator[Shard]) -> Iterator[tuple[Shard, Ranges]]:
    for shard in shards:
        rows = shard.rows or 0
        for start in range(0, rows, loader.rows_per_table):
            yield shard, ((start, min(start + loader.rows_per_table, rows)),)


def _load(loader: Loader, shard: Shard, todo: Ranges) -> int:
    """Number of images."""
    return sum(len(table) - table["image_id"].null_count for table in loader.load(shard, todo))


def measure(archive: Path, model: str, decoder: str, batch_size: int) -> float | None:
    """images/s, measured by another process; None if there are too few images. Raises CommandFailed."""
    command = ["-m", "jobs.bench.harness.decoding", str(archive), "--model", model, "--decoder", decoder]
    rate: float | None = json_of([*command, "--batch-size", str(batch_size)])["images_per_second"]
    return rate


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--decoder", default="fast", choices=("fast", "exact", "gpu"))
    parser.add_argument("--batch-size", metavar="N", type=int, default=64)
    options = parser.parse_args()
    return cli.guarded(lambda: report(options))


def report(options: argparse.Namespace) -> int:
    predictor = Embedder(model=options.model, weights="random")
    predictor.prepare()
    archive = Archive(RunConfig(input=options.archive, output="none", decoder=options.decoder))
    loader = Loader.of(archive.config, predictor, archive.options(), rows_per_table=options.batch_size)
    progress = run(loader, archive.shards(), cpus_here())
    print(json.dumps({"images_per_second": progress.images_per_second}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
