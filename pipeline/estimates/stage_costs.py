"""The cost of each stage per image: read, decode, predict and write, by the functions of a run.

One stage runs at a time, so all CPU time of this process belongs to it.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema, sources
from pipeline.coverage import END
from pipeline.output.commit import Commit
from pipeline.sources import ReadOptions, ShardEnd
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict
from pipeline.stages.write import Sink

MIN_BATCHES = 2
BATCHES_PER_LANE = 4
MAX_TABLE_BYTES = 256 << 20
MAX_RESULT_ROWS = 2_048

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Seconds:
    """core: CPU time of all threads of this process. wall: elapsed time."""

    core: float
    wall: float

    def per(self, images: int) -> "Seconds":
        return Seconds(self.core / images, self.wall / images)


@dataclass(frozen=True, slots=True)
class StageCosts:
    """Seconds per image. load: reading and decoding together."""

    read: Seconds
    load: Seconds
    predict: Seconds
    write: Seconds

    @property
    def core_seconds(self) -> dict[str, float]:
        """By stage. decode is the CPU time of load without that of read."""
        decode = max(0.0, self.load.core - self.read.core)
        return {"read": self.read.core, "decode": decode, "predict": self.predict.core, "write": self.write.core}


@dataclass(frozen=True, slots=True)
class Read:
    """The first images of a shard, which were read and dropped.

    is_whole: the shard holds no others. seconds, encoded_bytes: of all these images.
    """

    shard: Shard
    images: int
    is_whole: bool
    encoded_bytes: int
    seconds: Seconds


@dataclass(frozen=True, slots=True)
class Loaded:
    """seconds: per image. images: the decoded ones, at most about MAX_TABLE_BYTES. error_rate: share of the others."""

    seconds: Seconds
    images: pa.Table
    error_rate: float


def timed(work: Callable[[], T]) -> tuple[Seconds, T]:
    """Run a function; return its cost and its result."""
    core, wall = time.process_time(), time.perf_counter()
    result = work()
    return Seconds(time.process_time() - core, time.perf_counter() - wall), result


def read(shard: Shard, options: ReadOptions, max_images: int, max_seconds: float = float("inf")) -> Read:
    """Read the shard from the front until one of the limits is reached."""
    seconds, (images, encoded_bytes, is_whole) = timed(partial(_read, shard, options, max_images, max_seconds))
    return Read(shard, images, is_whole, encoded_bytes, seconds)


def _read(shard: Shard, options: ReadOptions, max_images: int, max_seconds: float) -> tuple[int, int, bool]:
    """Number of images, their bytes, and whether they are all of the shard."""
    deadline = time.perf_counter() + max_seconds
    images = encoded_bytes = 0
    for item in sources.read(shard, ((0, END if shard.rows is None else shard.rows),), options):
        if isinstance(item, ShardEnd):
            return images, encoded_bytes, True
        if images == max_images or time.perf_counter() > deadline:
            break
        images += 1
        encoded_bytes += item.size_bytes
    return images, encoded_bytes, False


def load_first(loader: Loader, shard: Shard, images: int) -> Iterator[pa.Table]:
    """Read and decode this many images from the front of a shard."""
    cut = shard.cut(images if shard.rows is None else min(shard.rows, images))
    return loader.load(cut, ((0, images),))


def load(loader: Loader, reads: Sequence[Read]) -> Loaded:
    """Read and decode these images again."""
    seconds, tables = timed(lambda: [table for each in reads for table in load_first(loader, each.shard, each.images)])
    step = -(-sum(table.nbytes for table in tables) // MAX_TABLE_BYTES)
    rows = pa.concat_tables(tables[:: max(step, 1)])
    records = rows.filter(pc.and_not(pc.is_null(rows[schema.SHARD_ROWS]), pc.fill_null(rows[schema.IS_EMPTY], False)))
    images = records.filter(pc.is_valid(records[schema.PIXELS]))
    count = max(sum(each.images for each in reads), 1)
    return Loaded(seconds.per(count), images, 1 - len(images) / max(len(records), 1))


def predict(stage: Predict, images: pa.Table, min_seconds: float) -> tuple[Seconds, pa.Table]:
    """Predict whole batches for at least this long; return the cost per image and up to MAX_RESULT_ROWS results.

    images: rows with pixels, one or more; they repeat. Batches that warm up or compile the network do not count. On a
    GPU as many batches are in progress as in a run; on a CPU one at a time.
    """
    predictor, size = stage.predictor, stage.allotment.batch_size
    repeated = pa.concat_tables([images] * (-(-size // len(images)) + 1))
    batches = [repeated.slice(start, size) for start in range(0, len(repeated) - size + 1, size)]
    lanes = predictor.max_concurrency if stage.allotment.gpu_share else 1
    at_once = 1 if lanes == 1 else BATCHES_PER_LANE * lanes
    warm_ups, state, deadline = 0, "", 0.0
    costs: list[Seconds] = []
    results: list[pa.Table] = []
    with ThreadPoolExecutor(lanes) as pool:

        def run(batch: pa.Table) -> list[pa.Table]:
            return list(pool.map(stage, [batch] * at_once))

        while len(costs) < MIN_BATCHES or time.perf_counter() < deadline:
            seconds, tables = timed(partial(run, batches[(warm_ups + len(costs)) % len(batches)]))
            results = [*results, *tables][: -(-MAX_RESULT_ROWS // size)]
            costs.append(seconds)
            if warm_ups <= lanes or predictor.describe() != state:
                warm_ups += len(costs)
                state, costs, deadline = predictor.describe(), [], time.perf_counter() + min_seconds
    total = Seconds(sum(each.core for each in costs), sum(each.wall for each in costs))
    return total.per(len(costs) * at_once * size), pa.concat_tables(results)


def write(sink: Sink, results: pa.Table, rows: int) -> tuple[Seconds, float]:
    """Write one part of so many rows to the local disk; return the cost and the bytes per image.

    results: rows of `predict`, one or more; they repeat, each with another row number.
    """
    part = pa.concat_tables([results] * -(-rows // len(results))).slice(0, rows)
    part = part.set_column(part.schema.get_field_index("row"), "row", pa.array(np.arange(rows)))
    repeats = pa.nulls(rows, part.schema.field(schema.REPEATS).type)  # the cost is that of one written row
    part = part.set_column(part.schema.get_field_index(schema.REPEATS), schema.REPEATS, repeats)
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        replace(sink, output=folder)(part)  # warms up
        seconds, commit = timed(lambda: replace(sink, output=folder, attempt=2)(part))
    return seconds.per(rows), Commit.from_json(commit or "").bytes_written / rows
