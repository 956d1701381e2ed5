"""Ray Data runs the flow: read → decode → predict → write part + commit. The only module that schedules work."""

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.coverage import END, count
from pipeline.engine import cluster, metrics
from pipeline.engine.allocation import Allocation
from pipeline.engine.datasource import KeysWithCredentials, ShardDatasource, Unit
from pipeline.errors import NightshiftError, message_line
from pipeline.output import embedding_metadata
from pipeline.output.commit import Commit
from pipeline.output.run_record import RunRecord
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.predictors.base import Allotment, Predictor
from pipeline.stages.load import ENCODED_TABLE_BYTES, Loader
from pipeline.stages.predict import Predict
from pipeline.stages.write import Sink

MAX_READ_TASKS = 10_000
MIN_BLOCK_BYTES = 1 << 20
TABLE_SHARE = 0.7
"""Block target as a share of a full table's pixels. A table becomes one block if it is full, and also if up to 30 % of
its pixels are missing: errors have none, and tiles have fewer."""
BLOCKS_PER_READER, BLOCKS_PER_ACTOR = 8, 16
MIN_QUEUE_BYTES = 256 << 20
PART_BYTES = 128 << 20
MAX_PART_BYTES = 512 << 20
"""In memory. A part ends there even with few rows: the length of kept texts and lists is not known before."""
ASSUMED_IMAGE_BYTES = 50_000
ASSUMED_RESULT_BYTES = 200
"""Of a row of results, without vectors."""
ACTOR_INIT_DEATHS = 10  # nodes that may be lost in a row while they load a model
NO_PROGRESS_TIMEOUT_SECONDS = 6 * 3600  # it may take hours until a spot machine is available


@dataclass(frozen=True, slots=True)
class Flow:
    """One pass of the four stages over units of work."""

    plan: Plan
    units: list[Unit]
    keys: KeysWithCredentials
    loader: Loader
    predictor: Predictor
    sink: Sink
    allocation: Allocation
    allotment: Allotment
    rows_per_part: int
    labels: Mapping[str, str]

    @staticmethod
    def of(
        config: RunConfig,
        predictor: Predictor,
        record: RunRecord,
        archive: Archive,
        plan: Plan,
        attempt: int,
        units: list[Unit],
    ) -> "Flow":
        """Size the stages for the work and for the cluster that Ray is connected to."""
        allocation = cluster.allocate(config)
        allotment = allocation.assign(config.batch_size or predictor.best_batch_size, _expected_images(plan, units))
        loader = Loader.of(
            config,
            predictor,
            archive.options(),
            rows_per_table=allotment.batch_size,
            threads=allocation.read_tasks(len(units))[1],
            keep=plan.keep,
            decode_bytes=cluster.decode_bytes(allocation.read_cpus),
        )
        result = schema.result(predictor.columns, loader.kept)
        embeddings = embedding_metadata.describe(record.settings, record.provenance, result)
        sink = Sink(config.output, attempt, result, record.footer, config.geoparquet, embeddings)
        rows_per_part = config.rows_per_part or _rows_per_part(plan, result, allotment.batch_size)
        keys = archive.keys_with_credentials(plan)
        return Flow(plan, units, keys, loader, predictor, sink, allocation, allotment, rows_per_part, record.labels)

    def commits(self) -> Iterator[Commit]:
        """Run the flow; yield each commit as it is made."""
        self._set_context()
        tasks, keep = self._tasks(), self.loader.kept
        stage = None
        if self.predictor.runs_in_readers:
            stage = partial(_stage_of_reader, ray.put((self.predictor, keep, replace(self.allotment, cores=1))))
        dataset = ray.data.read_datasource(
            ShardDatasource(self.plan, tasks, self.loader, self.keys, stage),
            override_num_blocks=len(tasks),
            num_cpus=self.allocation.read_cpus,
        )
        if stage is None:
            dataset = dataset.map_batches(
                _named(ModelActor, self.predictor),
                fn_constructor_args=(self.predictor, keep, self.allotment, self.labels),
                batch_size=self.allotment.batch_size,
                batch_format="pyarrow",
                compute=self._actors(),
                num_cpus=self.allocation.actor_cpus,
                num_gpus=self.allocation.actor_gpus,
            )
        dataset.set_name(self.labels["run"])
        with unwrap_ray_errors():
            yield from self._written(_cut(dataset.iter_internal_ref_bundles(), self.rows_per_part))

    def _actors(self) -> ActorPoolStrategy:
        """Actors that take several batches at a time, so that neither a GPU waits for copies and Arrow, nor CPU threads
        for the last images of a batch."""
        least, most = self.allocation.actors
        if self.predictor.max_concurrency == 1:
            return ActorPoolStrategy(min_size=least, max_size=most)
        return ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_concurrent_calls_per_actor=self.predictor.max_concurrency,
            enable_true_multi_threading=True,
        )

    def _written(self, parts: "Iterator[list[ray.ObjectRef[pa.Table]]]") -> Iterator[Commit]:
        """Write each part in its own task; yield the commits as they are done."""
        sink, write_part = ray.put(self.sink), write.options(name="Write part")
        writing: list[ray.ObjectRef[str | None]] = []
        for blocks in parts:
            writing.append(write_part.remote(sink, *blocks))
            done, writing = ray.wait(writing, timeout=None if len(writing) >= self.allocation.writers else 0)
            yield from _commits(done)
        while writing:
            done, writing = ray.wait(writing)
            yield from _commits(done)

    def _tasks(self) -> list[list[Unit]]:
        """Groups of neighbouring units, at most MAX_READ_TASKS of them, to bound the driver's work."""
        per_task = -(-len(self.units) // MAX_READ_TASKS)
        return [self.units[i : i + per_task] for i in range(0, len(self.units), per_task)]

    def _block_bytes(self) -> int:
        if self.predictor.runs_in_readers:  # a block has results and no pixels
            return max(MIN_BLOCK_BYTES, self.rows_per_part * ASSUMED_RESULT_BYTES)
        return block_bytes(self.loader, self.rows_per_part)

    def _set_context(self) -> None:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True  # otherwise the cause of an error is only text
        context.max_consecutive_actor_init_deaths = ACTOR_INIT_DEATHS
        context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_SECONDS
        context.target_max_block_size = self._block_bytes()
        readers, actors = self.allocation.read_tasks(len(self.units))[0], self.allocation.actors[1]
        on_cpus = queue_bytes(context.target_max_block_size, readers, actors)
        limit = None if self.allocation.actor_gpus else on_cpus  # None is set too: the context outlives a run
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=limit)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised once; Ray's log files have more


def block_bytes(loader: Loader, rows_per_part: int) -> int:
    """Ray's target size of a block, chosen so that one block is one batch.

    Ray joins tables until they exceed the target, and cuts a block of 1.5 times the target; one row more than a batch
    would give the network two batches. A block of tiny images is more than a batch but never more than a part; a block
    of JPEGs that stay encoded is several tables.
    """
    if loader.leave_jpegs:
        return 2 * ENCODED_TABLE_BYTES
    image_bytes = loader.pixel_format.image_bytes(loader.transform)
    return max(
        int(TABLE_SHARE * loader.rows_per_table * image_bytes), min(rows_per_part * image_bytes, MIN_BLOCK_BYTES)
    )


def queue_bytes(block: int, readers: int, actors: int) -> int:
    """Limit of the queue in Ray's object store if the network runs on CPUs. block: size of a block in bytes.

    A decoder that is faster than the network fills the queue; Ray's own limit is half of the object store. Ray gives
    the readers a quarter to three quarters of a limit, and each of them works on two blocks. With GPUs Ray's limit
    stays: a GPU computes in a fraction of a second what takes a CPU ten seconds.
    """
    return max(MIN_QUEUE_BYTES, block * (BLOCKS_PER_READER * readers + BLOCKS_PER_ACTOR * actors))


class ModelActor(Predict):
    """The predict stage as a Ray actor. Exports how full its batches are and how much GPU memory it holds."""

    def __init__(
        self, predictor: Predictor, keep: Mapping[str, pa.DataType], allotment: Allotment, labels: Mapping[str, str]
    ) -> None:
        super().__init__(predictor, keep, allotment)
        self.metrics = metrics.ActorMetrics(labels)

    def __call__(self, table: pa.Table) -> pa.Table:
        rows = super().__call__(table)
        images = len(table) - table[schema.PIXELS].null_count
        self.metrics.add(images, self.allotment.batch_size, self.predictor.gpu_memory_bytes())
        return rows


@cache
def _stage_of_reader(settings: "ray.ObjectRef[Any]") -> Predict:
    """The predict stage in a read task, made once per process from the arguments of Predict."""
    return Predict(*ray.get(settings))


def _named(actor: type[ModelActor], predictor: Predictor) -> type[ModelActor]:
    """The class with the name that Ray shows for the stage: "Embedder resnet50". In ASCII, since Ray takes no other."""
    name = f"{type(predictor).__name__} {predictor.settings().get('model', '')}".rstrip()
    return type(ascii(name)[1:-1], (actor,), {})


@ray.remote(num_cpus=0, max_retries=-1)  # writing frees memory, so it must not queue behind the readers
def write(sink: Sink, *tables: pa.Table) -> str | None:
    """Write and commit one part. Return its commits as lines of JSON, None if there are no rows."""
    return sink(pa.concat_tables(tables))


def _cut(bundles: Iterator[Any], rows: int) -> "Iterator[list[ray.ObjectRef[pa.Table]]]":
    """Group references to blocks: `rows` rows or MAX_PART_BYTES each. The blocks never come to the driver."""
    blocks: list[ray.ObjectRef[pa.Table]] = []
    held_rows = held_bytes = 0
    for bundle in bundles:
        for block in bundle.blocks:
            blocks.append(block.ref)
            held_rows += block.metadata.num_rows
            held_bytes += block.metadata.size_bytes or 0
            if held_rows >= rows or held_bytes >= MAX_PART_BYTES:
                yield blocks
                blocks, held_rows, held_bytes = [], 0, 0
    if blocks:
        yield blocks


def _commits(done: "list[ray.ObjectRef[str | None]]") -> Iterator[Commit]:
    return (Commit.from_json(line) for text in ray.get(done) if text for line in text.splitlines())


@contextmanager
def unwrap_ray_errors() -> Iterator[None]:
    """Re-raise a worker's NightshiftError unwrapped; turn its OSError into one sentence."""
    try:
        yield
    except ray.exceptions.RayError as error:
        causes = [cause for cause in _causes(error) if not isinstance(cause, ray.exceptions.RayError)]
        for cause in causes:
            if isinstance(cause, NightshiftError):
                cause.args = (message_line(cause),)  # Ray adds lines
                raise cause from error
        for cause in causes:
            if isinstance(cause, OSError):
                reason = os.strerror(cause.errno) if cause.errno else message_line(cause)
                raise NightshiftError(f"{reason}; what was committed is kept, run the same command again") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _rows_per_part(plan: Plan, result: pa.Schema, batch_size: int) -> int:
    """Rows of a part of PART_BYTES; fewer in a small archive, so that a stop costs at most a fiftieth of it."""
    row_bytes = ASSUMED_RESULT_BYTES + sum(
        f.type.list_size * f.type.value_type.bit_width // 8 for f in result if schema.is_vector(f.type)
    )
    images = plan.rows + _uncounted(plan)
    return int(max(batch_size, min(PART_BYTES // row_bytes, images // 50)))


def _expected_images(plan: Plan, units: list[Unit]) -> int:
    """Estimated number of images in units of work."""
    known = sum(count(ranges) for _, ranges in units if ranges[-1][1] < END)
    return known + _uncounted(plan) * sum(ranges[-1][1] == END for _, ranges in units) // max(plan.uncounted_shards, 1)


def _uncounted(plan: Plan) -> int:
    """Estimated number of images in the shards that only reading can count."""
    return plan.size_bytes // ASSUMED_IMAGE_BYTES * (plan.uncounted_shards > 0)
