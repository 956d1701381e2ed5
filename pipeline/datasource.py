"""The plan as Ray reads it. Decode workers import this module: it must not import torch."""

from collections.abc import Callable, Iterator

import pyarrow as pa
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline import plan as plans
from pipeline.coverage import Ranges
from pipeline.loader import Loader

Unit = tuple[int, Ranges]
"""A piece of work: a shard's index and what is left of it."""


class ShardDatasource(Datasource):
    """Ray's view of the plan: one read task a group of units, each a stream of decoded tables."""

    def __init__(self, output: str, tasks: list[list[Unit]], loader: Loader) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.output, self.tasks, self.loader = output, tasks, loader

    def get_name(self) -> str:
        return "ReadDecode"

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        output, loader = self.output, self.loader
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_read_task(output, units, loader), unknown) for units in self.tasks]


def _read_task(output: str, units: list[Unit], loader: Loader) -> Callable[[], Iterator[pa.Table]]:
    def read() -> Iterator[pa.Table]:
        for index, todo in units:
            yield from loader.load(plans.load_shard(output, index), todo)

    return read
