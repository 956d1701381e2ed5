"""The stages of a run, each alone in one process, by the project's own functions.

    python -m jobs.bench.stages ARCHIVE --model resnet18 --rows-per-part 64

Prints JSON: CPU core-seconds an image of read, decode, predict and write, the median of several rounds, on the first
shard of the archive; and `gpus`, with which the network's work is no longer the CPU's.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TypeVar

import pyarrow as pa
import torch

from pipeline import cli, schema, sources
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.loader import Loader
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
        reading = (config.max_pixels, config.exif_rotate, config.decoder == "exact", predictor.takes_tiles)
        loader = Loader(predictor.transform, archive.options(), {}, *reading, BATCH_SIZE, threads=1)
        sink = Sink(config.output, 1, schema.result(predictor.columns, {}), "{}")
        return Stages(shard, loader, Predict(predictor, {}), sink, rows_per_part)

    def measure(self, round_number: int) -> dict[str, float]:
        """Core-seconds an image of each stage. A stage ends before the next begins: nothing runs beside it."""
        read_seconds, images = timed(self._read)
        load_seconds, tables = timed(self._load)
        rows = sum(len(table) - table["image_id"].null_count for table in tables)  # the shard's end is no image
        predict_seconds, predicted = timed(lambda: [self.predict(table) for table in tables])
        parts = list(self._parts(pa.concat_tables(predicted)))
        sink = replace(self.sink, attempt=round_number)
        write_seconds, _ = timed(lambda: [sink(part) for part in parts])
        return {
            "read": read_seconds / images,
            "decode": max(0.0, load_seconds - read_seconds) / images,
            "predict": predict_seconds / rows,
            "write": write_seconds / rows,
        }

    def _read(self) -> int:
        """Number of images."""
        return sum(isinstance(item, Record) for item in sources.read(self.shard, WHOLE, self.loader.options))

    def _load(self) -> list[pa.Table]:
        """Read and decode the shard; the tables of about SAMPLE images are kept."""
        kept: list[pa.Table] = []
        for table in self.loader.load(self.shard, WHOLE):
            if len(kept) * BATCH_SIZE < SAMPLE:
                kept.append(table)
        return kept

    def _parts(self, rows: pa.Table) -> Iterator[pa.Table]:
        return (rows.slice(start, self.rows_per_part) for start in range(0, len(rows), self.rows_per_part))


def alone(archive: Path, predictor: Predictor, rows_per_part: int) -> dict[str, float]:
    """Core-seconds an image of each stage, the median of ROUNDS."""
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        stages = Stages.of(RunConfig(input=str(archive), output=folder), predictor, rows_per_part)
        stages.measure(0)  # the first round warms caches and allocators
        rounds = [stages.measure(number) for number in range(1, ROUNDS + 1)]
    return {name: median(each[name] for each in rounds) for name in rounds[0]}


def timed(work: Callable[[], T]) -> tuple[float, T]:
    """Core-seconds of all threads of this process, and what the work returned."""
    started = time.process_time()
    found = work()
    return time.process_time() - started, found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", metavar="ARCHIVE", type=Path)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--rows-per-part", metavar="N", type=int, default=BATCH_SIZE)
    given = parser.parse_args()
    return cli.guarded(lambda: report(given))


def report(given: argparse.Namespace) -> int:
    predictor = Embedder(model=given.model, weights="random", threads=os.cpu_count() or 1)
    found = alone(given.archive, predictor, given.rows_per_part)
    print(json.dumps({**found, "gpus": torch.cuda.device_count()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
