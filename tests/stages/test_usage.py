"""CPU and GPU seconds are counted once each."""

import threading
import time
from contextlib import suppress

from pipeline.stages import usage


def burn(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_core_seconds_are_taken_once() -> None:
    usage.take_core_seconds()
    before = time.process_time()
    threads = [threading.Thread(target=burn, args=(0.1,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, second = usage.take_core_seconds(), usage.take_core_seconds()
    assert first >= 0.2, "of all threads"
    assert first + second <= time.process_time() - before + 0.02, "nothing twice"


def test_a_busy_clock_counts_overlapping_work_once() -> None:
    clock = usage.BusyClock()
    time.sleep(0.05)  # idle: counts for nothing
    began = time.perf_counter()
    with clock.at_work() as long:
        with suppress(RuntimeError), clock.at_work() as short:
            time.sleep(0.05)
            raise RuntimeError
        time.sleep(0.05)
    assert 0.1 <= short.seconds + long.seconds <= time.perf_counter() - began
