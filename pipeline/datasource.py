"""The plan as Ray reads it. Decode workers import this module: it must not import torch."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import pyarrow as pa
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline import plan as plans
from pipeline.coverage import Ranges
from pipeline.loader import Loader
from pipeline.plan import Plan

Unit = tuple[int, Ranges]
"""A piece of work: a shard's index and what is left of it."""

SignedKeys = Mapping[int, tuple[str, ...]]
"""The keys of a shard with the credentials that the plan leaves out."""


class ShardDatasource(Datasource):
    """Ray's view of the plan: one read task a group of units, each a stream of decoded tables."""

    def __init__(self, plan: Plan, tasks: list[list[Unit]], loader: Loader, signed_keys: SignedKeys) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.tasks, self.loader, self.signed_keys = plan, tasks, loader, signed_keys

    def get_name(self) -> str:
        return " and decode"  # Ray puts "Read" before it

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [
            ReadTask(
                _read_task(
                    [(self.plan.file(index), index, todo, self.signed_keys.get(index)) for index, todo in units],
                    self.loader,
                ),
                unknown,
            )
            for units in self.tasks
        ]


def _read_task(
    units: list[tuple[str, int, Ranges, tuple[str, ...] | None]], loader: Loader
) -> Callable[[], Iterator[pa.Table]]:
    """units: the file of the plan, the shard's index, what is left of it, and its keys where they are signed."""

    def read() -> Iterator[pa.Table]:
        for file, index, todo, keys in units:
            shard = plans.load_shard(file, index)
            yield from loader.load(replace(shard, keys=keys) if keys else shard, todo)

    return read
