"""CPU and GPU seconds are counted once each."""

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from clocks import burn

from pipeline.stages import usage


def test_core_seconds_are_taken_once() -> None:
    usage.take_core_seconds()
    before = time.process_time()
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda _: burn(0.1, time.thread_time), range(2)))
    first, second = usage.take_core_seconds(), usage.take_core_seconds()
    assert first > 0.15, "of all threads"
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
