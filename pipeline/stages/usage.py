"""CPU and GPU seconds of this worker since the last call; attached to the rows that it emits."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_lock = threading.Lock()
_taken = 0.0


def take_core_seconds() -> float:
    """CPU time of all threads of this process since the last call; in the first call since the process began.

    Every stage attaches it to the rows that it emits. So the sums of a run include all that its workers used: their
    start, Ray's work in them, and threads that wait by spinning.
    """
    global _taken
    with _lock:
        now = time.process_time()
        seconds, _taken = now - _taken, now
        return seconds


class BusyClock:
    """Seconds in which at least one of several threads was at work."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers = 0
        self.counted_until = 0.0

    @contextmanager
    def at_work(self) -> "Iterator[Busy]":
        """Count one more thread as working. When the context ends, `seconds` has the time that is not counted yet."""
        busy = Busy()
        with self.lock:
            if not self.workers:
                self.counted_until = time.perf_counter()
            self.workers += 1
        try:
            yield busy
        finally:
            with self.lock:
                now = time.perf_counter()
                busy.seconds, self.counted_until = now - self.counted_until, now
                self.workers -= 1


@dataclass
class Busy:
    seconds: float = 0.0
