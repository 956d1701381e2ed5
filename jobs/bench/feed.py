"""Loader processes without Ray: one a core reads and decodes, its tables come to this process through shared memory.

Neither torch nor Ray is imported here: the processes start as decode workers do.
"""

import multiprocessing
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar

import pyarrow as pa

from pipeline.coverage import Ranges
from pipeline.loader import Loader
from pipeline.plan import Shard

SHARED_MEMORY = Path("/dev/shm")
AHEAD = 3  # tasks a process: one under way, one waiting, one on its way to the network

Task = tuple[Shard, Ranges]
T = TypeVar("T")


@dataclass(frozen=True)
class Feed:
    """Shards of loose images, a batch of rows a task."""

    loader: Loader
    shards: list[Shard]
    processes: int

    def tables(self) -> Iterator[pa.Table]:
        """A table a task, as they are done, in any order. Each lies in shared memory until it is let go."""
        with _shared_folder() as folder:
            yield from map(_take, self._results(_write, folder))

    def images(self) -> Iterator[int]:
        """How many images each task has decoded; the tables are let go where they were made."""
        yield from self._results(_count)

    def _results(self, work: Callable[..., T], *more: Path) -> Iterator[T]:
        """What `work` makes of each task's table, in the process that has loaded it."""
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.processes, context, _start, (self.loader,)) as pool:
            tasks = self._tasks()
            waiting: set[Future[T]] = set()
            try:
                while True:
                    for shard, todo in islice(tasks, AHEAD * self.processes - len(waiting)):
                        waiting.add(pool.submit(_load, shard, todo, work, *more))
                    if not waiting:
                        return
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    for each in done:
                        yield each.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _tasks(self) -> Iterator[Task]:
        for shard in self.shards:
            for start in range(0, shard.rows or 0, self.loader.rows_per_table):
                yield shard, ((start, min(start + self.loader.rows_per_table, shard.rows or 0)),)


_loader: Loader
"""Of a loader process."""


def _start(loader: Loader) -> None:
    global _loader
    _loader = loader


def _load(shard: Shard, todo: Ranges, work: Callable[..., T], *more: Path) -> T:
    return work(pa.concat_tables(_loader.load(shard, todo)), *more)


def _count(table: pa.Table) -> int:
    return len(table) - int(table["image_id"].null_count)


def _write(table: pa.Table, folder: Path) -> Path:
    path = folder / uuid.uuid4().hex
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    return path


def _take(path: Path) -> pa.Table:
    """The table over the file's own memory, which is free once nothing refers to it."""
    with pa.memory_map(str(path)) as file:
        table = pa.ipc.open_file(file).read_all()
    path.unlink()
    return table


@contextmanager
def _shared_folder() -> Iterator[Path]:
    folder = tempfile.mkdtemp(prefix="nightshift-", dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None)
    try:
        yield Path(folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
