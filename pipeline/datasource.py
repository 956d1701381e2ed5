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
        return [ReadTask(_read_task(units, *self._of(units), self.loader), unknown) for units in self.tasks]

    def _of(self, units: list[Unit]) -> tuple[dict[int, str], dict[int, tuple[str, ...]]]:
        """The files of the plan that these units stand in, by number, and the keys that are signed, by shard."""
        files = {index // plans.SHARDS_PER_FILE: self.plan.file(index) for index, _ in units}
        return files, {index: self.signed_keys[index] for index, _ in units if index in self.signed_keys}


def _read_task(
    units: list[Unit], files: Mapping[int, str], signed_keys: SignedKeys, loader: Loader
) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for index, todo in units:
            shard = plans.load_shard(files[index // plans.SHARDS_PER_FILE], index)
            keys = signed_keys.get(index)
            yield from loader.load(replace(shard, keys=keys) if keys else shard, todo)

    return read
