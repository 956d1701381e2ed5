"""Ray Data runs the flow: read → decode → predict → write part + commit. The only module that schedules work."""

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.data import ActorPoolStrategy, DataContext, ExecutionResources

from pipeline import metrics, output, schema
from pipeline.config import RunConfig
from pipeline.coverage import END, count
from pipeline.datasource import ShardDatasource, SignedKeys, Unit
from pipeline.errors import NightshiftError, SettingRefused, message_line
from pipeline.layout import Layout
from pipeline.ledger import Commit
from pipeline.loader import LEAST_DECODE_BYTES, LEFT_TABLE_BYTES, Loader
from pipeline.plan import Plan
from pipeline.predict import Predict
from pipeline.predictors import Predictor
from pipeline.sink import Sink
from pipeline.sources.discover import Archive

MAX_READ_TASKS = 10_000
MIN_BLOCK_BYTES = 1 << 20
TABLE_SHARE = 0.7
"""A table of 1 / 0.7 targets is a block, whole, and so is one in which up to 0.3 of the pixels are missing: errors have
none, and tiles fewer."""
BLOCKS_PER_READER, BLOCKS_PER_ACTOR = 8, 16
LEAST_WAITING_BYTES = 256 << 20
PART_BYTES = 128 << 20
MOST_PART_BYTES = 512 << 20
"""In memory. A part is cut there, however few its rows: how long kept texts and lists are shows only then."""
ASSUMED_IMAGE_BYTES = 50_000
DECODE_SHARE = 0.5  # of a node's memory for pixels that are being decoded, shared between its read tasks
CONNECT_TIMEOUT_SECONDS = 10
ACTOR_INIT_DEATHS = 10  # nodes that may vanish in a row while a model is being loaded on them
NO_PROGRESS_TIMEOUT_SECONDS = 6 * 3600  # spot machines may be long in coming


def connect() -> None:
    """Join the cluster that RAY_ADDRESS names (as `ray job submit` does), else start one on this machine. Quietly.

    Never `ray.init()`'s own guess: it would join, and end with, whatever other job runs on the same machine.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Beyond one a core, Ray ends a worker that was idle for a second; the next part would wait for a new one to start.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "600000")
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    address = os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        ray.init(address=address, include_dashboard=False, **quiet)
        return
    try:
        host, _, port = address.rpartition(":")
        if port.isdigit() and "://" not in address:
            socket.create_connection((host, int(port)), CONNECT_TIMEOUT_SECONDS).close()  # Ray would wait for ever
        ray.init(address=address, **quiet)
    except OSError as error:  # ConnectionError among them
        raise SettingRefused(f"no Ray cluster answers at RAY_ADDRESS={address}: {error}") from error
    except ValueError as error:
        raise SettingRefused(
            f"RAY_ADDRESS is {address!r}: it is HOST:PORT of a cluster's GCS, auto, or local"
        ) from error
    except RuntimeError as error:  # another version of Ray or of Python, in several lines
        raise SettingRefused(f"RAY_ADDRESS={address}: {' '.join(str(error).split())}") from error


def layout_here(config: RunConfig) -> Layout:
    """For the cluster that Ray is connected to. Raises SettingRefused for what does not fit."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus = sum(each.get("CPU", 0.0) for each in resources)
    return Layout.of(config, cpus, [each.get("GPU", 0.0) for each in resources], cluster_grows())


def decode_bytes(read_cpus: float) -> int:
    """What one read task may decode at once, on the node with the least memory a CPU."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    per_cpu = [node["memory"] / node["CPU"] for node in nodes if node.get("CPU") and "memory" in node]
    return max(LEAST_DECODE_BYTES, int(DECODE_SHARE * read_cpus * min(per_cpu, default=0)))


def cluster_grows() -> bool:
    """Whether an autoscaler adds nodes to this cluster: version 2, which `ray up` and infra/kuberay/ start."""
    return bool(is_autoscaler_v2(fetch_from_server=True))


@dataclass(frozen=True, slots=True)
class Flow:
    """One pass of the four stages over units of work."""

    plan: Plan
    units: list[Unit]
    signed_keys: SignedKeys
    loader: Loader
    predictor: Predictor
    sink: Sink
    layout: Layout
    batch_size: int
    rows_per_part: int
    labels: Mapping[str, str]

    @staticmethod
    def of(
        config: RunConfig, predictor: Predictor, archive: Archive, plan: Plan, attempt: int, units: list[Unit]
    ) -> "Flow":
        """Size the stages for the work and for the cluster that Ray is connected to."""
        layout = layout_here(config)
        batch_size = layout.fit(predictor, config.batch_size)
        predictor.images = _expected(plan, units) // layout.actors[1]
        loader = Loader.of(
            config,
            predictor,
            archive.options(),
            rows_per_table=batch_size,
            threads=layout.read_tasks(len(units))[1],
            keep=plan.keep,
            decode_bytes=decode_bytes(layout.read_cpus),
        )
        result = schema.result(predictor.columns, dict(loader.keep.values()))
        sink = Sink(config.output, attempt, result, output.footer(config, predictor))
        rows_per_part = config.rows_per_part or _rows_per_part(plan, result, batch_size)
        signed_keys = archive.signed_keys(plan)
        labels = metrics.labels(config, predictor)
        return Flow(plan, units, signed_keys, loader, predictor, sink, layout, batch_size, rows_per_part, labels)

    def commits(self) -> Iterator[Commit]:
        """Run the flow; yield each commit as it is made."""
        self._set_context()
        tasks = self._tasks()
        dataset = ray.data.read_datasource(
            ShardDatasource(self.plan, tasks, self.loader, self.signed_keys),
            override_num_blocks=len(tasks),
            num_cpus=self.layout.read_cpus,
        )
        dataset = dataset.map_batches(
            _named(ModelActor, self.predictor),
            fn_constructor_args=(self.predictor, dict(self.loader.keep.values()), self.labels),
            batch_size=self.batch_size,
            batch_format="pyarrow",
            compute=self._actors(),
            num_cpus=self.layout.actor_cpus,
            num_gpus=self.layout.actor_gpus,
        )
        dataset.set_name(self.labels["run"])
        with _told_plainly():
            yield from self._written(_cut(dataset.iter_internal_ref_bundles(), self.rows_per_part))

    def _actors(self) -> ActorPoolStrategy:
        """An actor has several batches under way: a GPU need not wait for copies and for Arrow, nor a CPU's threads for
        the one that has a batch's last images."""
        least, most = self.layout.actors
        if self.predictor.max_concurrency == 1:
            return ActorPoolStrategy(min_size=least, max_size=most)
        return ActorPoolStrategy(
            min_size=least,
            max_size=most,
            max_concurrent_calls_per_actor=self.predictor.max_concurrency,
            enable_true_multi_threading=True,
        )

    def _written(self, parts: "Iterator[list[ray.ObjectRef[pa.Table]]]") -> Iterator[Commit]:
        """Write each part in a task of its own; yield the commits as they are done."""
        sink, write_part = ray.put(self.sink), write.options(name="Write part")
        writing: list[ray.ObjectRef[str | None]] = []
        for blocks in parts:
            writing.append(write_part.remote(sink, *blocks))
            done, writing = ray.wait(writing, timeout=None if len(writing) >= self.layout.writers else 0)
            yield from _commits(done)
        while writing:
            done, writing = ray.wait(writing)
            yield from _commits(done)

    def _tasks(self) -> list[list[Unit]]:
        """Neighbouring units in at most MAX_READ_TASKS tasks, to bound the driver's work."""
        per_task = -(-len(self.units) // MAX_READ_TASKS)
        return [self.units[i : i + per_task] for i in range(0, len(self.units), per_task)]

    def _set_context(self) -> None:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.raise_original_map_exception = True  # else the cause of an error comes back as text only
        context.max_consecutive_actor_init_deaths = ACTOR_INIT_DEATHS
        context.execution_no_progress_timeout_s = NO_PROGRESS_TIMEOUT_SECONDS
        context.target_max_block_size = block_bytes(self.loader, self.rows_per_part)
        readers, actors = self.layout.read_tasks(len(self.units))[0], self.layout.actors[1]
        on_cpus = waiting_bytes(context.target_max_block_size, readers, actors)
        most = None if self.layout.actor_gpus else on_cpus  # None is set too: the context outlives a run
        context.execution_options.resource_limits = ExecutionResources.for_limits(object_store_memory=most)
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # errors are raised, once; Ray's own files have more


def block_bytes(loader: Loader, rows_per_part: int) -> int:
    """Ray's target for a block, so that a block is a batch: what waits between the stages is counted in batches.

    Ray puts tables together until they exceed the target, and cuts what is 1.5 times as large; a batch and one row more
    would be two batches to the network. Of tiny images a block is more than a batch, but never more than a part; of
    JPEGs that stay encoded it is several tables.
    """
    if loader.leave_jpegs:
        return 2 * LEFT_TABLE_BYTES
    image_bytes = loader.transform.crop**2 * 3
    return max(
        int(TABLE_SHARE * loader.rows_per_table * image_bytes), min(rows_per_part * image_bytes, MIN_BLOCK_BYTES)
    )


def waiting_bytes(block: int, readers: int, actors: int) -> int:
    """What may lie in Ray's object store at once, of blocks of so many bytes, where the network runs on CPUs.

    A decoder that is faster than the network fills what it may; Ray's own limit is half of the store. Of a limit Ray
    leaves the readers a quarter to three quarters, and each has two blocks under way. A GPU computes in a fraction of a
    second what a CPU computes in ten, so what lies ready for it has Ray's limit.
    """
    return max(LEAST_WAITING_BYTES, block * (BLOCKS_PER_READER * readers + BLOCKS_PER_ACTOR * actors))


class ModelActor(Predict):
    """The predict stage in its actor, which tells how full its batches are and what it holds of its GPU."""

    def __init__(self, predictor: Predictor, keep: Mapping[str, pa.DataType], labels: Mapping[str, str]) -> None:
        super().__init__(predictor, keep)
        self.metrics = metrics.ActorMetrics(labels)

    def __call__(self, table: pa.Table) -> pa.Table:
        found = super().__call__(table)
        images = len(table) - table[schema.PIXELS].null_count
        self.metrics.add(images, self.predictor.batch_size or images, self.predictor.gpu_memory_bytes())
        return found


def _named(actor: type[ModelActor], predictor: Predictor) -> type[ModelActor]:
    """The class under the name that Ray shows the stage by: "Embedder resnet50". In ASCII, since Ray takes no other."""
    name = f"{type(predictor).__name__} {predictor.settings().get('model', '')}".rstrip()
    return type(ascii(name)[1:-1], (actor,), {})


@ray.remote(num_cpus=0, max_retries=-1)  # it must never wait for a CPU that readers hold: it is what frees memory
def write(sink: Sink, *tables: pa.Table) -> str | None:
    """Write and commit one part; its commit as JSON, None where there was no row."""
    return sink(pa.concat_tables(tables))


def _cut(bundles: Iterator[Any], rows: int) -> "Iterator[list[ray.ObjectRef[pa.Table]]]":
    """References to blocks of so many rows together, or of MOST_PART_BYTES; the blocks never come to the driver."""
    blocks: list[ray.ObjectRef[pa.Table]] = []
    waiting = waiting_bytes = 0
    for bundle in bundles:
        for block in bundle.blocks:
            blocks.append(block.ref)
            waiting += block.metadata.num_rows
            waiting_bytes += block.metadata.size_bytes or 0
            if waiting >= rows or waiting_bytes >= MOST_PART_BYTES:
                yield blocks
                blocks, waiting, waiting_bytes = [], 0, 0
    if blocks:
        yield blocks


def _commits(done: "list[ray.ObjectRef[str | None]]") -> Iterator[Commit]:
    return (Commit.from_json(text) for text in ray.get(done) if text)


@contextmanager
def _told_plainly() -> Iterator[None]:
    """A worker's error as the driver's own: what was raised on purpose as it is, faults of storage in a sentence."""
    try:
        yield
    except ray.exceptions.RayError as error:
        causes = [cause for cause in _causes(error) if not isinstance(cause, ray.exceptions.RayError)]
        for cause in causes:
            if isinstance(cause, NightshiftError):
                cause.args = (message_line(cause),)  # Ray adds lines of its own
                raise cause from error
        for cause in causes:
            if isinstance(cause, OSError):
                what = os.strerror(cause.errno) if cause.errno else message_line(cause)
                raise NightshiftError(f"{what}; what was committed stays, run the same command again") from error
        raise


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def _rows_per_part(plan: Plan, result: pa.Schema, batch_size: int) -> int:
    """Parts of PART_BYTES; smaller ones in a small archive, so that a stop costs a fiftieth of it at most."""
    row_bytes = 200 + sum(
        f.type.list_size * f.type.value_type.bit_width // 8
        for f in result
        if pa.types.is_fixed_size_list(f.type) and pa.types.is_primitive(f.type.value_type)
    )
    images = plan.rows + _uncounted(plan)
    return int(max(batch_size, min(PART_BYTES // row_bytes, images // 50)))


def _expected(plan: Plan, units: list[Unit]) -> int:
    """About how many images there are in units of work."""
    known = sum(count(ranges) for _, ranges in units if ranges[-1][1] < END)
    return known + _uncounted(plan) * sum(ranges[-1][1] == END for _, ranges in units) // max(plan.uncounted_shards, 1)


def _uncounted(plan: Plan) -> int:
    """About how many images there are in the shards that only reading can count."""
    return plan.size_bytes // ASSUMED_IMAGE_BYTES * (plan.uncounted_shards > 0)
