"""The stages of a run, each alone in one process, by the project's own functions.

    python -m jobs.bench.stages ARCHIVE --model resnet18 --rows-per-part 64 --networks

Prints JSON: CPU core-seconds an image of read, decode, predict and write, the median of several rounds, on the first
shard of the archive; and `gpus`, with which the network's work is no longer the CPU's. --networks adds the network in
other forms: compiled, and `plain`, as the peers run it; with images/s, and the operations that it takes for an image.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import pyarrow as pa
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from jobs.bench.roofline import Speed
from pipeline import cli, models, schema, sources
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.loader import Loader
from pipeline.machines import cpus_here
from pipeline.plan import Shard
from pipeline.predict import Predict
from pipeline.predictors import Embedder, Predictor
from pipeline.sink import Sink
from pipeline.sources import Record
from pipeline.sources.discover import Archive

SAMPLE = 512
BATCH_SIZE = 64
ROUNDS = 3
WHOLE = ((0, END),)

T = TypeVar("T")


@dataclass(frozen=True)
class Stages:
    """The stages of a run over one shard."""

    shard: Shard
    loader: Loader
    predict: Predict
    sink: Sink
    rows_per_part: int

    @staticmethod
    def of(config: RunConfig, predictor: Predictor, rows_per_part: int) -> "Stages":
        predictor.prepare()
        archive = Archive(config)
        shard = replace(next(archive.shards()), index=0)
        loader = Loader.of(config, predictor, archive.options(), rows_per_table=BATCH_SIZE)
        sink = Sink(config.output, 1, schema.result(predictor.columns, {}), "{}")
        return Stages(shard, loader, Predict(predictor, {}), sink, rows_per_part)

    def tables(self) -> list[pa.Table]:
        """Read and decode the shard; the tables of about SAMPLE images are kept."""
        kept: list[pa.Table] = []
        for table in self.loader.load(self.shard, WHOLE):
            if len(kept) * BATCH_SIZE < SAMPLE:
                kept.append(table)
        return kept

    def measure(self, round_number: int) -> dict[str, float]:
        """Core-seconds an image of each stage. A stage ends before the next begins: nothing runs beside it."""
        read, images = timed(self._read)
        load, tables = timed(self.tables)
        rows = images_of(tables)
        predicting, predicted = timed(lambda: [self.predict(table) for table in tables])
        parts = list(self._parts(pa.concat_tables(predicted)))
        sink = replace(self.sink, attempt=round_number)
        writing, _ = timed(lambda: [sink(part) for part in parts])
        return {
            "read": read.core / images,
            "decode": max(0.0, load.core - read.core) / images,
            "predict": predicting.core / rows,
            "write": writing.core / rows,
        }

    def _read(self) -> int:
        """Number of images."""
        return sum(isinstance(item, Record) for item in sources.read(self.shard, WHOLE, self.loader.options))

    def _parts(self, rows: pa.Table) -> Iterator[pa.Table]:
        return (rows.slice(start, self.rows_per_part) for start in range(0, len(rows), self.rows_per_part))


def alone(archive: Path, predictor: Predictor, rows_per_part: int) -> dict[str, float]:
    """Core-seconds an image of each stage, the median of ROUNDS."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        return medians(Stages.of(RunConfig(input=str(archive), output=folder), predictor, rows_per_part))


def medians(stages: Stages) -> dict[str, float]:
    stages.measure(0)  # the first round warms caches and allocators
    rounds = [stages.measure(number) for number in range(1, ROUNDS + 1)]
    return {name: median(each[name] for each in rounds) for name in rounds[0]}


@dataclass(frozen=True)
class Seconds:
    """core: of all threads of this process. wall: as a clock shows them."""

    core: float
    wall: float


def timed(work: Callable[[], T]) -> tuple[Seconds, T]:
    """How long it took, and what it returned."""
    core, wall = time.process_time(), time.perf_counter()
    found = work()
    return Seconds(time.process_time() - core, time.perf_counter() - wall), found


def images_of(tables: list[pa.Table]) -> int:
    return sum(len(table) - table["image_id"].null_count for table in tables)  # the shard's end is no image


def speed(work: Callable[[], object], images: int) -> Speed:
    """Medians of several rounds, after one that warms up."""
    work()
    rounds = [timed(work)[0] for _ in range(ROUNDS)]
    core, wall = median(each.core for each in rounds), median(each.wall for each in rounds)
    return Speed(core / images, images / wall)


def networks(predictor: Embedder, eager: Predict, tables: list[pa.Table]) -> dict[str, Any]:
    """The network in each form, as roofline.Networks holds them."""
    compiled = Predict(replace(predictor, compile="on"), {})
    rows, spec = images_of(tables), predictor.spec
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = models.build(spec).to(device)
    images = torch.randn(BATCH_SIZE, spec.in_channels, spec.transform.crop, spec.transform.crop)
    with torch.inference_mode():
        counter = FlopCounterMode(display=False)
        with counter:
            plain.features(images[:1].to(device))
        speeds = {
            "eager": speed(lambda: [eager(table) for table in tables], rows),
            "compiled": speed(lambda: [compiled(table) for table in tables], rows),
            "plain": speed(lambda: plain_pass(plain, images, device), BATCH_SIZE),
        }
    dtype = predictor.describe().split(", ")[1]
    return {
        "dtype": dtype,
        "flops_per_image": counter.get_total_flops(),
        "speeds": {form: asdict(each) for form, each in speeds.items()},
    }


def plain_pass(network: models.Network, images: Tensor, device: str) -> Tensor:
    """As the peers run it: float32, channels first, batch normalisation as it is, nothing compiled."""
    return network.features(images.to(device)).cpu()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", metavar="ARCHIVE")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rows-per-part", metavar="N", type=int, default=BATCH_SIZE)
    parser.add_argument("--networks", action="store_true", help="also measure the network in other forms")
    given = parser.parse_args()
    return cli.guarded(lambda: report(given))


def report(given: argparse.Namespace) -> int:
    predictor = Embedder(model=given.model, weights="random", threads=cpus_here(), compile="off")
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        stages = Stages.of(RunConfig(input=given.archive, output=folder), predictor, given.rows_per_part)
        found: dict[str, Any] = medians(stages)
        if given.networks:
            found["networks"] = networks(predictor, stages.predict, stages.tables())
    print(json.dumps({**found, "gpus": torch.cuda.device_count()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
