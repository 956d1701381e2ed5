"""What a worker process uses up: CPU time and the time of its GPU, each second counted once and handed on with rows."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

_lock = threading.Lock()
_taken = 0.0


def take_core_seconds() -> float:
    """CPU time of all threads of this process since the last call, of the first one since the process began.

    Whoever hands rows on takes it along with them, so that the sums of a run hold what its workers used in truth: their
    start, Ray's own work in them and threads that wait by spinning included.
    """
    global _taken
    with _lock:
        now = time.process_time()
        seconds, _taken = now - _taken, now
        return seconds


class BusyClock:
    """Seconds in which at least one of several threads was at work, however many they were."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.workers = 0
        self.counted_until = 0.0

    @contextmanager
    def at_work(self) -> "Iterator[Busy]":
        """One more thread is at work, until the context ends; then `seconds` are those that nobody has counted yet."""
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
