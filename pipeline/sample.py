"""What one image of an archive costs: a few shards of it read, decoded and predicted here, stage after stage.

Nothing runs beside a stage, so that its CPU time is its own; the functions are those of the job itself.
"""

import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from statistics import median
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import plan as plans
from pipeline import schema, sources
from pipeline.coverage import END
from pipeline.errors import InputRefused
from pipeline.estimate import Costs
from pipeline.ledger import Commit
from pipeline.loader import Loader
from pipeline.machines import Machine
from pipeline.plan import Plan, Shard
from pipeline.predict import Predict
from pipeline.predictors import Predictor
from pipeline.sink import Sink
from pipeline.sources import ReadOptions, Record, ShardEnd, tar

SHARDS = 4
IMAGES_PER_SHARD = 256
SECONDS_PER_SHARD = 2.0
WARM_UP_IMAGES = 8
PREDICT_SECONDS = 10.0
LEAST_BATCHES, LANE_BATCHES = 2, 4
TABLES_BYTES = 256 << 20
ROWS_WRITTEN = 2_048
TAR_BYTES = 16 << 20

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sample:
    """images: of the whole archive, as far as the sample tells. sampled: images that were read, in so many shards.

    width, height: medians, in pixels. error_rate: share of the sampled images that could not be read or decoded.
    read_bytes_per_second: of one stream. network: how it ran.
    """

    images: int
    sampled: int
    shards: int
    width: int
    height: int
    error_rate: float
    read_bytes_per_second: float
    network: str
    costs: Costs


@dataclass(frozen=True, slots=True)
class _Read:
    """The first images of a shard. shard: cut to them. images_in_all: of the whole shard, about."""

    shard: Shard
    images: int
    images_in_all: float
    encoded_bytes: int
    seconds: float
    core_seconds: float


def measure(
    plan: Plan,
    loader: Loader,
    predictor: Predictor,
    machine: Machine,
    batch_size: int,
    actors: int,
    say: Callable[[str], None],
) -> Sample:
    """Sample the archive of a plan on the machine at hand. The predictor must be set up as one of `actors` on it.

    Raises InputRefused where the sampled shards have no image that can be decoded.
    """
    chosen = [plan.load(index) for index in _spread(plan)]
    if not chosen:
        raise InputRefused(f"there is no image in any of the {plan.shards:,} shards: nothing to plan for")
    say(f"reading and decoding the first images of {len(chosen)} of {plan.shards:,} shards")
    _exhaust(loader.load(_cut(chosen[0], WARM_UP_IMAGES), ((0, WARM_UP_IMAGES),)))
    reads = [_read(shard, loader.options) for shard in chosen]
    load_core_seconds, load_seconds, tables = _timed(
        lambda: [table for read in reads for table in loader.load(read.shard, ((0, read.images),))]
    )
    rows = pa.concat_tables(tables[:: -(-sum(table.nbytes for table in tables) // TABLES_BYTES)])
    records = rows.filter(pc.is_null(rows[schema.SHARD_ROWS]))
    images = records.filter(pc.is_valid(records[schema.PIXELS]))
    if not len(images):
        names = ", ".join(shard.uri for shard in chosen)
        raise InputRefused(f"no image could be decoded in {names}: embed a few of its images, and see their _errors/")

    in_all = _images(plan, reads)
    say(f"running the network for about {PREDICT_SECONDS:g} seconds")
    predictor.images = in_all // actors
    predict = Predict(predictor, dict(loader.keep.values()))
    core_seconds, seconds, predicted = _predict(predict, images, batch_size)
    sink = Sink("", 1, schema.result(predictor.columns, dict(loader.keep.values())), "{}")
    write, result_bytes = _write(sink, predicted)

    sampled = sum(read.images for read in reads)
    read_core_seconds, read_seconds = (
        sum(each) for each in zip(*((read.core_seconds, read.seconds) for read in reads), strict=True)
    )
    encoded_bytes = sum(read.encoded_bytes for read in reads)
    threads = predictor.threads or 1
    predict_cores = min(threads, machine.cores)
    costs = Costs(
        read=read_core_seconds / sampled,
        decode=max(0.0, load_core_seconds - read_core_seconds) / sampled,
        write=write,
        predict=core_seconds * predict_cores / threads,
        read_seconds=read_seconds / sampled,
        load_seconds=load_seconds / sampled,
        predict_seconds=seconds,
        predict_cores=predict_cores,
        encoded_bytes=encoded_bytes / sampled,
        pixel_bytes=pc.mean(pc.binary_length(images[schema.PIXELS])).as_py(),
        result_bytes=result_bytes,
        flops=None,
        gpu_seconds={machine.gpu: seconds} if machine.gpus else {},
    )
    width, height = (int(median(images[side].to_pylist())) for side in ("width", "height"))
    return Sample(
        images=in_all,
        sampled=sampled,
        shards=len(reads),
        width=width,
        height=height,
        error_rate=1 - len(images) / len(records),
        read_bytes_per_second=encoded_bytes / read_seconds,
        network=predictor.describe(),
        costs=costs,
    )


def _spread(plan: Plan) -> list[int]:
    """Indices of shards, evenly over the plan."""
    indices = np.flatnonzero(plan.shard_rows)
    count = min(SHARDS, len(indices))
    return [int(indices[(2 * i + 1) * len(indices) // (2 * count)]) for i in range(count)]


def _cut(shard: Shard, images: int) -> Shard:
    return replace(shard, rows=images if shard.rows is None else min(shard.rows, images))


def _exhaust(items: object) -> None:
    deque(items, maxlen=0)  # type: ignore[call-overload]


def _timed(work: Callable[[], T]) -> tuple[float, float, T]:
    """Core-seconds of all threads of this process, seconds, and what the work returned."""
    core, wall = time.process_time(), time.perf_counter()
    found = work()
    return time.process_time() - core, time.perf_counter() - wall, found


def _read(shard: Shard, options: ReadOptions) -> _Read:
    core_seconds, seconds, (records, is_whole) = _timed(lambda: _first_records(shard, options))
    encoded_bytes = sum(len(record.data or b"") for record in records)
    images = len(records)
    in_all = images if is_whole else _images_of(shard, options, encoded_bytes / max(images, 1))
    return _Read(_cut(shard, images), images, in_all, encoded_bytes, seconds, core_seconds)


def _first_records(shard: Shard, options: ReadOptions) -> tuple[list[Record], bool]:
    """Records from the front until there are enough or it takes too long; True if they are all of the shard."""
    until = time.perf_counter() + SECONDS_PER_SHARD
    found: list[Record] = []
    for item in sources.read(shard, ((0, END if shard.rows is None else shard.rows),), options):
        if isinstance(item, ShardEnd):
            return found, True
        if len(found) == IMAGES_PER_SHARD or time.perf_counter() > until:
            break
        found.append(item)
    return found, False


def _images_of(shard: Shard, options: ReadOptions, encoded_bytes: float) -> float:
    """Images of a whole shard: as planned, as its directory says, or by the bytes that one takes in it."""
    if shard.rows is not None:
        return shard.rows
    if shard.kind == "zip":
        return next(item.rows for item in sources.read(shard, (), options) if isinstance(item, ShardEnd))
    return shard.size_bytes / (tar.bytes_per_image(shard, TAR_BYTES) or encoded_bytes)


def _images(plan: Plan, reads: list[_Read]) -> int:
    """Of the whole plan: shards that nobody has counted hold as many for their bytes as the sampled ones do."""
    uncounted = {read.shard.index: read.images_in_all for read in reads if plan.shard_rows[read.shard.index] < 0}
    if not plan.uncounted_shards:
        return plan.rows
    sizes = {shard.index: shard.size_bytes for shard in plans.read_shards(plan) if shard.rows is None}
    if not uncounted:
        return plan.rows + round(sum(sizes.values()) / max(plan.size_bytes - sum(sizes.values()), 1) * plan.rows)
    per_byte = sum(uncounted.values()) / max(sum(sizes[index] for index in uncounted), 1)
    return plan.rows + round(per_byte * sum(sizes.values()))


def _predict(predict: Predict, images: pa.Table, batch_size: int) -> tuple[float, float, pa.Table]:
    """Core-seconds and seconds of an image in whole batches, and results. What warms up or compiles is left out."""
    many = pa.concat_tables([images] * (-(-batch_size // len(images)) + 1))
    batches = [many.slice(start, batch_size) for start in range(0, len(many) - batch_size + 1, batch_size)]
    predictor = predict.predictor
    lanes = predictor.max_concurrency if predictor.gpu_share else 1
    threads = ThreadPoolExecutor(
        lanes
    )  # as in a run on a GPU; a CPU, slow as it may be, is given one batch at a time here

    def run(batch: pa.Table) -> list[pa.Table]:
        return list(threads.map(predict, [batch] * (1 if lanes == 1 else LANE_BATCHES * lanes)))

    warming, state, until = 0, "", 0.0
    spent: list[tuple[float, float]] = []
    results: list[pa.Table] = []
    while len(spent) < LEAST_BATCHES or time.perf_counter() < until:
        batch = batches[(warming + len(spent)) % len(batches)]
        core_seconds, seconds, found = _timed(partial(run, batch))
        results = [*results, *found][: -(-ROWS_WRITTEN // batch_size)]
        spent.append((core_seconds, seconds))
        if warming <= lanes or predictor.describe() != state:
            warming += len(spent)
            state, spent, until = predictor.describe(), [], time.perf_counter() + PREDICT_SECONDS
    threads.shutdown()
    count = len(spent) * len(found) * batch_size
    return sum(core for core, _ in spent) / count, sum(wall for _, wall in spent) / count, pa.concat_tables(results)


def _write(sink: Sink, rows: pa.Table) -> tuple[float, float]:
    """Core-seconds and bytes of an image's results, in a part on a disk of this machine."""
    numbers = pa.array(np.arange(len(rows)))  # images that were repeated must not be taken for one
    rows = rows.set_column(rows.schema.get_field_index("row"), "row", numbers)
    with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
        replace(sink, output=folder)(rows)
        core_seconds, _, commit = _timed(lambda: replace(sink, output=folder, attempt=2)(rows))
    return core_seconds / len(rows), Commit.from_json(commit or "").bytes_written / len(rows)
