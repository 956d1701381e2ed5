"""The plan as a Ray datasource. Decode workers import this module, so it must not import torch."""

from collections.abc import Callable, Iterator, Mapping

import pyarrow as pa
from ray.data import DataContext, Datasource, ReadTask
from ray.data.block import BlockMetadata

from pipeline.coverage import Ranges
from pipeline.planning import plan as plans
from pipeline.planning.plan import Plan
from pipeline.sources.objects import with_keys
from pipeline.stages.load import Loader

Unit = tuple[int, Ranges]
"""A piece of work: the index of a shard, and its rows that are left."""

KeysWithCredentials = Mapping[int, tuple[str, ...]]
"""By shard, its keys with the credentials that the plan leaves out."""


Stage = Callable[[pa.Table], pa.Table]


class ShardDatasource(Datasource):
    """One read task per group of units; each yields decoded tables, or what a further stage makes of them.

    stage: makes that stage, in each read task.
    """

    def __init__(
        self,
        plan: Plan,
        tasks: list[list[Unit]],
        loader: Loader,
        credentials: KeysWithCredentials,
        stage: Callable[[], Stage] | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.tasks, self.loader, self.credentials, self.stage = plan, tasks, loader, credentials, stage

    def get_name(self) -> str:
        return " and decode"  # Ray puts "Read" before it

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: DataContext | None = None
    ) -> list[ReadTask]:
        unknown = BlockMetadata(num_rows=None, size_bytes=None, input_files=None, exec_stats=None)
        return [ReadTask(_read_task(units, *self._of(units), self.loader, self.stage), unknown) for units in self.tasks]

    def _of(self, units: list[Unit]) -> tuple[dict[int, str], dict[int, tuple[str, ...]]]:
        """Files of the plan that hold these units, by number, and keys with credentials, by shard."""
        files = {index // plans.SHARDS_PER_FILE: self.plan.file(index) for index, _ in units}
        return files, {index: self.credentials[index] for index, _ in units if index in self.credentials}


def _read_task(
    units: list[Unit],
    files: Mapping[int, str],
    credentials: KeysWithCredentials,
    loader: Loader,
    stage: Callable[[], Stage] | None,
) -> Callable[[], Iterator[pa.Table]]:
    def load() -> Iterator[pa.Table]:
        for index, todo in units:
            shard = plans.load_shard(files[index // plans.SHARDS_PER_FILE], index)
            keys = credentials.get(index)
            yield from loader.load(with_keys(shard, keys) if keys else shard, todo)

    def read() -> Iterator[pa.Table]:
        return map(stage(), load()) if stage else load()

    return read
