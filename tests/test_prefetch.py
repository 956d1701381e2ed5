"""Work ahead on threads: order, bounds, exceptions."""

import threading
from collections.abc import Iterator

import pytest

from pipeline.prefetch import GROUP_BYTES, ordered_map


def test_work_ahead_is_bounded_by_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.prefetch.AHEAD_BYTES", 100)
    taken: list[int] = []

    def items() -> Iterator[int]:
        for size in [10, 20, 500, 30, 90, 10]:
            taken.append(size)
            yield size

    results = ordered_map(lambda size: size, items(), threads=2, ahead=100, size_bytes=lambda size: size)
    assert next(results) == 10
    assert taken == [10, 20, 500]
    assert list(results) == [20, 500, 30, 90, 10]


def test_small_items_go_to_a_thread_together_and_large_ones_alone() -> None:
    sizes = [1] * 10 + [2 * GROUP_BYTES] * 3
    turn = threading.Barrier(2)  # both threads take part in it, so each has something at a time

    def work(item: tuple[int, int]) -> tuple[int, int]:
        number, _ = item
        if number in (0, 4):
            turn.wait(10)
        return number, threading.get_ident()

    found = list(ordered_map(work, enumerate(sizes), 2, 8, lambda item: item[1], together=4))
    assert [number for number, _ in found] == list(range(13))
    threads = [thread for _, thread in found]
    assert len(set(threads[:4])) == len(set(threads[4:8])) == 1
    assert threads[0] != threads[4]


def test_large_items_are_not_kept_back_for_others() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for size in [2 * GROUP_BYTES] * 4:
            taken.append(size)
            yield size

    next(ordered_map(lambda size: size, items(), 1, 2, lambda size: size, together=4))
    assert len(taken) == 2


@pytest.mark.parametrize("together", [1, 4])
def test_an_exception_is_raised_at_its_place(together: int) -> None:
    def work(number: int) -> int:
        if number == 6:
            raise ValueError(number)
        return number

    found = ordered_map(work, range(20), 2, 4, together=together)
    assert [next(found) for _ in range(6)] == list(range(6))
    with pytest.raises(ValueError, match="6"):
        next(found)
