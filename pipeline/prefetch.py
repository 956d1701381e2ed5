"""Work ahead on threads, results in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD_BYTES = 256 << 20
TOGETHER = 4
"""Small images that a thread is best given at once: two decode threads are 6 to 8 % faster than with single ones."""
GROUP_BYTES = 1 << 20
"""With so much, a thread is given no more items at once."""

T = TypeVar("T")
R = TypeVar("R")
_Results = tuple[list[R], BaseException | None]


def beside(function: Callable[[], R]) -> Callable[[], R]:
    """Start a function on a thread of its own, which never holds up the end of the process.

    What is returned waits for it, and gives its result or raises its exception.
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
    together: int = 1,
) -> Iterator[R]:
    """Apply a function to items on `threads` threads; yield the results in the items' order.

    A thread is given up to `together` items at once, fewer if they are large: where threads compete for the
    interpreter, each hand-over costs. At most `ahead` hand-overs are under way or waiting, or AHEAD_BYTES of items,
    which bounds memory; a larger item goes alone. An exception of the function is raised at its item's place. Closing
    the iterator early waits only for what runs already.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[Future[_Results[R]], int]] = deque()
    waiting_bytes = 0
    try:
        for group, size in _groups(items, size_bytes, together):
            waiting.append((pool.submit(_apply, function, group), size))
            waiting_bytes += size
            while len(waiting) >= ahead or waiting_bytes > AHEAD_BYTES:
                results, size = waiting.popleft()
                waiting_bytes -= size
                yield from _of(results)
        while waiting:
            yield from _of(waiting.popleft()[0])
    finally:
        pool.shutdown(cancel_futures=True)


def _groups(items: Iterable[T], size_bytes: Callable[[T], int], most: int) -> Iterator[tuple[list[T], int]]:
    """Neighbours, with their bytes together."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_bytes(item)
        if len(group) == most or size > GROUP_BYTES:
            yield group, size
            group, size = [], 0
    if group:
        yield group, size


def _apply(function: Callable[[T], R], items: list[T]) -> "_Results[R]":
    """The results, up to the first exception, and that."""
    results: list[R] = []
    try:
        for item in items:
            results.append(function(item))
    except BaseException as error:
        return results, error
    return results, None


def _of(future: "Future[_Results[R]]") -> Iterator[R]:
    results, error = future.result()
    yield from results
    if error:
        raise error
