"""What a worker process uses up: CPU time and the time of its GPU, each second counted once and handed on with rows."""

import threading
import time

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
        self.at_work = 0
        self.counted_until = 0.0

    def start(self) -> None:
        """One more thread is at work."""
        with self.lock:
            if not self.at_work:
                self.counted_until = time.perf_counter()
            self.at_work += 1

    def stop(self) -> float:
        """One thread less; the seconds that no `stop` has counted yet."""
        with self.lock:
            now = time.perf_counter()
            seconds, self.counted_until = now - self.counted_until, now
            self.at_work -= 1
            return seconds
