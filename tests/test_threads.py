"""The ordered map and background calls: order, bounds and exceptions."""

import threading
from collections.abc import Iterator

import pytest

from pipeline.threads import GROUP_BYTES, in_background, ordered_map


def test_the_bytes_in_flight_are_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.threads.AHEAD_BYTES", 100)
    taken: list[int] = []

    def items() -> Iterator[int]:
        for size in [10, 20, 500, 30, 90, 10]:
            taken.append(size)
            yield size

    results = ordered_map(lambda size: size, items(), threads=2, ahead=100, size_bytes=lambda size: size)
    assert next(results) == 10
    assert taken == [10, 20, 500]
    assert list(results) == [20, 500, 30, 90, 10]


def test_small_items_are_grouped_and_large_items_are_not() -> None:
    sizes = [1] * 10 + [2 * GROUP_BYTES] * 3
    barrier = threading.Barrier(2)  # both threads must have a group at the same time

    def work(item: tuple[int, int]) -> tuple[int, int]:
        number, _ = item
        if number in (0, 4):
            barrier.wait(10)
        return number, threading.get_ident()

    results = list(ordered_map(work, enumerate(sizes), 2, 8, lambda item: item[1], group_items=4))
    assert [number for number, _ in results] == list(range(13))
    threads = [thread for _, thread in results]
    assert len(set(threads[:4])) == len(set(threads[4:8])) == 1
    assert threads[0] != threads[4]


def test_a_large_item_does_not_wait_for_a_group() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for size in [2 * GROUP_BYTES] * 4:
            taken.append(size)
            yield size

    next(ordered_map(lambda size: size, items(), 1, 2, lambda size: size, group_items=4))
    assert len(taken) == 2


@pytest.mark.parametrize("group_items", [1, 4])
def test_an_exception_is_raised_at_the_place_of_its_item(group_items: int) -> None:
    def work(number: int) -> int:
        if number == 6:
            raise ValueError(number)
        return number

    results = ordered_map(work, range(20), 2, 4, group_items=group_items)
    assert [next(results) for _ in range(6)] == list(range(6))
    with pytest.raises(ValueError, match="6"):
        next(results)


def test_a_background_call_returns_its_result_or_raises_its_exception() -> None:
    started, proceed = threading.Event(), threading.Event()

    def work() -> int:
        started.set()
        proceed.wait(10)
        return 7

    result = in_background(work)
    assert started.wait(10), "it runs before the result is asked for"
    proceed.set()
    assert result() == 7
    with pytest.raises(ZeroDivisionError):
        in_background(lambda: 1 // 0)()
