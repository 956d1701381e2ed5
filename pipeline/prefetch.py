"""Work ahead on threads, results in order."""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

AHEAD_BYTES = 256 << 20

T = TypeVar("T")
R = TypeVar("R")


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
) -> Iterator[R]:
    """Apply a function to items on `threads` threads; yield the results in the items' order.

    At most `ahead` results are under way or waiting, or AHEAD_BYTES of them, which bounds memory; a larger item goes
    alone. An exception of the function is raised at its item's place. Closing the iterator early waits only for what
    runs already.
    """
    pool = ThreadPoolExecutor(threads)
    waiting: deque[tuple[Future[R], int]] = deque()
    waiting_bytes = 0
    try:
        for item in items:
            waiting.append((pool.submit(function, item), size_bytes(item)))
            waiting_bytes += waiting[-1][1]
            while len(waiting) >= ahead or waiting_bytes > AHEAD_BYTES:
                result, size = waiting.popleft()
                waiting_bytes -= size
                yield result.result()
        while waiting:
            yield waiting.popleft()[0].result()
    finally:
        pool.shutdown(cancel_futures=True)
