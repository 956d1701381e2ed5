"""Ranges of a remote file, fetched on threads before they are asked for. A store answers slowly, but many at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

THREADS = 8
MAX_GAP = 64
"""Bytes between two blocks that are fetched with them, such as the leader and trailer of blocks in a COG."""
MAX_REQUEST_BYTES = 1 << 20
BATCHES = 8
"""The bytes ahead are fetched in about this many batches, so that new ones begin before the last one ends."""

Range = tuple[int, int]
"""First byte, and the byte after the last one."""


@dataclass(frozen=True, slots=True)
class _Fetched:
    start: int
    stop: int
    step: int
    data: "Future[bytes]"


class ReadAhead:
    """The ranges that the next steps of a reader need. Each range of the file is fetched once, for its first step.

    Not thread-safe: one thread calls it, others fetch. At most `limit_bytes`, a batch and a step are held. A step that
    needs more than the limit is left to the reader.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], steps: Iterable[Sequence[Range]], limit_bytes: int) -> None:
        """fetch: (start, stop) → these bytes, from any thread. steps: in order, the ranges that each one needs."""
        self.fetch, self.limit_bytes = fetch, limit_bytes
        self.pool = ThreadPoolExecutor(THREADS, thread_name_prefix="read-ahead")
        self._steps: Iterator[Sequence[Range]] = iter(steps)
        self._taken = 0  # steps
        self._held: deque[_Fetched] = deque()
        self._seen: set[int] = set()

    def advance(self, step: int) -> None:
        """Begin with a step: drop what only earlier ones needed, and fetch ahead as far as the limit allows."""
        while self._held and self._held[0].step < step:
            self._held.popleft()
        held_bytes = sum(each.stop - each.start for each in self._held)
        while held_bytes < self.limit_bytes or self._taken <= step:
            added = self._take(max(1, self.limit_bytes // BATCHES))
            if added is None:
                break
            held_bytes += added

    def _take(self, batch_bytes: int) -> int | None:
        """Fetch the ranges of the next steps, about batch_bytes; None after the last step."""
        ranges: list[Range] = []
        size_bytes, first = 0, self._taken
        while size_bytes < batch_bytes:
            step = next(self._steps, None)
            if step is None:
                break
            new = [each for each in step if each[0] not in self._seen]
            self._seen.update(start for start, _ in new)
            new_bytes = sum(stop - start for start, stop in new)
            if new_bytes <= self.limit_bytes:
                ranges += new
                size_bytes += new_bytes
            self._taken += 1
        for start, stop in _merged(ranges):
            future = self.pool.submit(self.fetch, start, stop)
            self._held.append(_Fetched(start, stop, self._taken - 1, future))
        return size_bytes if self._taken > first else None

    def find(self, start: int, stop: int) -> bytes | None:
        """The bytes of a range if they were fetched or are on their way, else None. Raises what `fetch` raised."""
        for each in self._held:
            if each.start <= start and stop <= each.stop:
                return each.data.result()[start - each.start : stop - each.start]
        return None

    def close(self) -> None:
        """Stop. Waits for requests that already run."""
        self.pool.shutdown(cancel_futures=True)


def _merged(ranges: Iterable[Range]) -> Iterator[Range]:
    """Join neighbours to one request of MAX_REQUEST_BYTES at most; a larger range stays whole."""
    first, last = -1, -1
    for start, stop in sorted(ranges):
        if first >= 0 and start - last <= MAX_GAP and stop - first <= MAX_REQUEST_BYTES:
            last = max(last, stop)
            continue
        if first >= 0:
            yield first, last
        first, last = start, stop
    if first >= 0:
        yield first, last
