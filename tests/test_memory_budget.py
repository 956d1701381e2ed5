"""The byte budget that threads share."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipeline.threads import MemoryBudget

ROOT = Path(__file__).resolve().parents[1]


class Gauge:
    """Counts the bytes that are held now, and their maximum so far."""

    def __init__(self) -> None:
        self.lock, self.held, self.peak = threading.Lock(), 0, 0

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        with self.lock:
            self.held += size
            self.peak = max(self.peak, self.held)
        yield
        with self.lock:
            self.held -= size


def run_threads(budget: MemoryBudget, sizes: list[int], gauge: Gauge) -> None:
    barrier = threading.Barrier(len(sizes))

    def work(size: int) -> None:
        barrier.wait()
        for _ in range(30):
            with budget.reserve(size), gauge.holding(size):
                pass

    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_threads_hold_no_more_than_the_budget() -> None:
    gauge = Gauge()
    run_threads(MemoryBudget(100), [70, 60, 50, 40, 30, 1, 100], gauge)
    assert 50 < gauge.peak <= 100
    assert gauge.held == 0


def test_two_reservations_that_fit_do_not_wait() -> None:
    budget = MemoryBudget(100)
    with budget.reserve(60), budget.reserve(40):
        assert budget.used_bytes == 100


def test_items_above_the_budget_run_one_at_a_time() -> None:
    gauge = Gauge()
    run_threads(MemoryBudget(10), [500, 600, 700], gauge)
    assert gauge.peak == 700


def test_an_exception_releases_the_bytes() -> None:
    budget = MemoryBudget(100)
    for size in (100, 200):
        with pytest.raises(ZeroDivisionError), budget.reserve(size):
            raise ZeroDivisionError
        with budget.reserve(size):
            pass
    assert budget.used_bytes == 0


def test_an_item_above_the_budget_waits_for_other_processes_until_they_end() -> None:
    code = """
import time
from pipeline.threads import MemoryBudget
with MemoryBudget(10).reserve(20):
    print("holding", flush=True)
    time.sleep(600)
"""
    other = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "holding\n"
    reserved = threading.Event()

    def take() -> None:
        with MemoryBudget(5).reserve(6):
            reserved.set()

    waiting = threading.Thread(target=take)
    waiting.start()
    assert not reserved.wait(0.5), "another process holds a large item"
    other.kill()
    other.wait()
    assert reserved.wait(30)
    waiting.join()
