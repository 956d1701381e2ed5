"""Sample of an archive: how many images it holds, and what one of them costs to process on this machine."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from pipeline import schema
from pipeline.errors import InputRefused, counted
from pipeline.estimates import stage_costs
from pipeline.estimates.costs import Costs
from pipeline.estimates.machines import Machine
from pipeline.estimates.stage_costs import Read, Seconds
from pipeline.images import pixels
from pipeline.planning import plan as plans
from pipeline.planning.plan import Plan
from pipeline.predictors.base import Allotment, Predictor
from pipeline.sources import SOURCES, ReadOptions
from pipeline.stages.load import Loader
from pipeline.stages.predict import Predict
from pipeline.stages.write import Sink

SHARDS = 4
IMAGES_PER_SHARD = 256
SECONDS_PER_SHARD = 2.0
WARM_UP_IMAGES = 8
PREDICT_SECONDS = 10.0
ROWS_PER_PART = 2_048


@dataclass(frozen=True, slots=True)
class Sample:
    """images: estimated for the whole archive. sampled: images that were read, from this many shards.

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


def measure(
    plan: Plan,
    loader: Loader,
    predictor: Predictor,
    allotment: Allotment,
    machine: Machine,
    actors: int,
    say: Callable[[str], None],
) -> Sample:
    """Sample the archive of a plan on this machine.

    allotment: of one of so many actors on it, except for the number of images. say: called with each step.
    Raises InputRefused if no image of the sampled shards can be decoded.
    """
    chosen = [plan.load(index) for index in _spread(plan)]
    if not chosen:
        raise InputRefused(f"there is no image in {counted(plan.shards, 'shard')}: nothing to estimate")
    say(f"reading and decoding the first images of {len(chosen)} of {counted(plan.shards, 'shard')}")
    deque(stage_costs.load_first(loader, chosen[0], WARM_UP_IMAGES), maxlen=0)  # imports, connections and caches
    reads = [stage_costs.read(shard, loader.options, IMAGES_PER_SHARD, SECONDS_PER_SHARD) for shard in chosen]
    load = stage_costs.load(loader, reads)
    if not len(load.images):
        names = ", ".join(shard.uri for shard in chosen)
        raise InputRefused(f"no image could be decoded in {names}: embed a few of its images, and see their _errors/")

    total = _count(plan, reads, loader.options)
    say(f"running the network for about {PREDICT_SECONDS:g} seconds")
    keep = loader.kept
    stage = Predict(predictor, keep, replace(allotment, images=total // actors))
    predict, results = stage_costs.predict(stage, load.images, PREDICT_SECONDS)
    sink = Sink("", 1, schema.result(predictor.columns, keep), "{}")
    write, result_bytes = stage_costs.write(sink, results, ROWS_PER_PART)

    sampled = sum(each.images for each in reads)
    encoded_bytes = sum(each.encoded_bytes for each in reads)
    read = Seconds(sum(each.seconds.core for each in reads), sum(each.seconds.wall for each in reads)).per(sampled)
    core_seconds = stage_costs.StageCosts(read, load.seconds, predict, write).core_seconds
    threads = allotment.cores or 1
    predict_cores = min(threads, machine.cores)
    costs = Costs(
        read=core_seconds["read"],
        decode=core_seconds["decode"],
        write=core_seconds["write"],
        predict=core_seconds["predict"] * predict_cores / threads,
        read_seconds=read.wall,
        load_seconds=load.seconds.wall,
        predict_seconds=predict.wall,
        predict_cores=predict_cores,
        encoded_bytes=encoded_bytes / sampled,
        pixel_bytes=pixels.mean_image_bytes(load.images),
        result_bytes=result_bytes,
        flops=None,
        gpu_seconds={machine.gpu: predict.wall} if machine.gpus else {},
    )
    width, height = (int(median(load.images[side].to_pylist())) for side in ("width", "height"))
    return Sample(
        images=total,
        sampled=sampled,
        shards=len(reads),
        width=width,
        height=height,
        error_rate=load.error_rate,
        read_bytes_per_second=encoded_bytes / sampled / read.wall,
        network=predictor.describe(),
        costs=costs,
    )


def _spread(plan: Plan) -> list[int]:
    """Indices of shards, evenly over the plan."""
    indices = np.flatnonzero(plan.shard_rows)
    count = min(SHARDS, len(indices))
    return [int(indices[(2 * i + 1) * len(indices) // (2 * count)]) for i in range(count)]


def _count(plan: Plan, reads: list[Read], options: ReadOptions) -> int:
    """Estimate the images of the plan. Uncounted shards hold as many per byte as the sampled ones."""
    if not plan.uncounted_shards:
        return plan.rows
    sizes = {shard.index: shard.size_bytes for shard in plans.read_shards(plan) if shard.rows is None}
    uncounted = {each.shard.index: _count_shard(each, options) for each in reads if each.shard.index in sizes}
    if not uncounted:
        counted_bytes = max(plan.size_bytes - sum(sizes.values()), 1)
        return plan.rows + round(sum(sizes.values()) / counted_bytes * plan.rows)
    per_byte = sum(uncounted.values()) / max(sum(sizes[index] for index in uncounted), 1)
    return plan.rows + round(per_byte * sum(sizes.values()))


def _count_shard(read: Read, options: ReadOptions) -> float:
    """Count the images of a shard that was read to its end; else estimate them, by their encoded bytes if need be."""
    if read.is_whole:
        return read.images
    estimate_rows = SOURCES[read.shard.kind].estimate_rows
    rows = estimate_rows(read.shard, options) if estimate_rows else None
    return rows or read.shard.size_bytes * read.images / max(read.encoded_bytes, 1)
