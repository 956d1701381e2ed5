"""Background threads: one call, an ordered map over many items, and a byte budget that threads share."""

import os
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from filelock import FileLock

AHEAD_BYTES = 256 << 20
"""Limit on the bytes of the items that `ordered_map` has submitted and not yet yielded."""

GROUP_ITEMS = 4
"""Small images per submit: two decode threads are 6 to 8 % faster than with one image per submit."""

GROUP_BYTES = 1 << 20
"""A group of items that is larger than this takes no further item."""

T = TypeVar("T")
R = TypeVar("R")
_Results = tuple[list[R], BaseException | None]


def in_background(function: Callable[[], R]) -> Callable[[], R]:
    """Start a function on a daemon thread, which does not delay the end of the process.

    Returns a function that waits for the result and returns it, or raises the function's exception.
    """
    future: Future[R] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result


def ordered_map(
    function: Callable[[T], R],
    items: Iterable[T],
    threads: int,
    ahead: int,
    size_bytes: Callable[[T], int] = lambda _: 0,
    group_items: int = 1,
) -> Iterator[R]:
    """Apply a function to items on `threads` threads; yield the results in the order of the items.

    Items are submitted in groups of up to `group_items`, fewer if they are large, because each submit costs GIL time.
    At most `ahead` groups, or AHEAD_BYTES of items, are submitted and not yet yielded, which bounds memory; a larger
    item is submitted alone. An exception of the function is raised at the place of its item. Closing the iterator early
    waits only for the groups that already run.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[Future[_Results[R]], int]] = deque()
    waiting_bytes = 0
    try:
        for group, size in _groups(items, size_bytes, group_items):
            waiting.append((pool.submit(_apply, function, group), size))
            waiting_bytes += size
            while len(waiting) >= ahead or waiting_bytes > AHEAD_BYTES:
                results, size = waiting.popleft()
                waiting_bytes -= size
                yield from _unpack(results)
        while waiting:
            yield from _unpack(waiting.popleft()[0])
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(items: Iterable[T], size_bytes: Callable[[T], int], max_items: int) -> Iterator[tuple[list[T], int]]:
    """Yield groups of consecutive items, each with its size in bytes."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_bytes(item)
        if len(group) == max_items or size > GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _apply(function: Callable[[T], R], items: list[T]) -> "_Results[R]":
    """The results up to the first exception, and that exception."""
    results: list[R] = []
    try:
        for item in items:
            results.append(function(item))
    except BaseException as error:
        return results, error
    return results, None


def _unpack(future: "Future[_Results[R]]") -> Iterator[R]:
    results, error = future.result()
    yield from results
    if error:
        raise error


class MemoryBudget:
    """A byte budget shared by the threads of a process.

    An item that is larger than the whole budget is reserved under a lock of the machine: one such item at a time. If
    each process has its share of the machine's memory as its budget, then all processes together use at most that
    memory and one large item.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.changed = threading.Condition()

    @contextmanager
    def reserve(self, size_bytes: int) -> Iterator[None]:
        """Wait until `size_bytes` are free, then hold them until the context ends."""
        if size_bytes > self.limit_bytes:
            with FileLock(_lock_file()):  # the operating system releases it if this process dies
                yield
            return
        with self.changed:
            self.changed.wait_for(lambda: self.used_bytes + size_bytes <= self.limit_bytes)
            self.used_bytes += size_bytes
        try:
            yield
        finally:
            with self.changed:
                self.used_bytes -= size_bytes
                self.changed.notify_all()


def _lock_file() -> Path:
    return Path(tempfile.gettempdir()) / f"nightshift-large-image-{os.getuid()}.lock"
