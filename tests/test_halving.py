"""Halving a batch that fails: sizes, order, single items and the errors that end a run."""

import gc
import weakref
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import StorageRefused
from pipeline.halving import Failure, by_halves


def squares(bad: set[int], batches: list[list[int]] | None = None) -> Callable[[list[int]], list[int]]:
    """Squares a batch. Fails if the batch contains a bad item. `batches` receives each batch."""

    def run(batch: list[int]) -> list[int]:
        if batches is not None:
            batches.append(batch)
        if culprits := bad & set(batch):
            raise ValueError(f"cannot square {sorted(culprits)}")
        return [item * item for item in batch]

    return run


def replace_by_zero(error: Exception) -> list[int]:
    return [0]


def test_a_batch_that_works_runs_once() -> None:
    batches: list[list[int]] = []
    assert list(by_halves([1, 2, 3], squares(set(), batches), replace_by_zero)) == [(3, [1, 4, 9])]
    assert batches == [[1, 2, 3]]


@given(st.integers(1, 40), st.sets(st.integers(0, 39), max_size=5))
def test_results_are_complete_and_in_order(size: int, bad: set[int]) -> None:
    pieces = list(by_halves(list(range(size)), squares(bad), replace_by_zero))
    assert [len(squared) for _, squared in pieces] == [count for count, _ in pieces]
    assert sum(count for count, _ in pieces) == size
    assert [value for _, squared in pieces for value in squared] == [i * i * (i not in bad) for i in range(size)]


def test_only_the_half_with_the_culprit_is_halved() -> None:
    batches: list[list[int]] = []
    pieces = list(by_halves(list(range(8)), squares({2}, batches), replace_by_zero))
    assert [count for count, _ in pieces] == [2, 1, 1, 4]
    assert [len(batch) for batch in batches] == [8, 4, 2, 2, 1, 1, 4]


def test_the_first_half_is_the_larger_one() -> None:
    batches: list[list[int]] = []
    list(by_halves(list(range(5)), squares({0}, batches), replace_by_zero))
    assert batches[1:3] == [[0, 1, 2], [0, 1]]


@pytest.mark.parametrize("batch", [range(4), np.arange(4), "abcd"])
def test_anything_with_a_length_and_slices_is_a_batch(batch: object) -> None:
    def run(piece: object) -> str:
        if len(piece) > 1:  # type: ignore[arg-type]
            raise ValueError
        return str(next(iter(piece)))  # type: ignore[call-overload]

    pieces = list(by_halves(batch, run, lambda _: None))  # type: ignore[type-var]
    assert pieces == [(1, str(item)) for item in batch]  # type: ignore[attr-defined]


def test_a_single_item_is_run_again_if_it_has_no_result_yet() -> None:
    attempts: list[list[int]] = []
    failures: list[Failure] = []

    def run(batch: list[int]) -> str:
        attempts.append(batch)
        if len(attempts) < 3:
            raise MemoryError("out of memory")
        return "done"

    assert list(by_halves([7], run, lambda _: None, failures.append)) == [(1, "done")]
    assert attempts == [[7]] * 3
    assert failures == [Failure(1, "out of memory", True)] * 2


def test_retry_is_called_before_a_batch_is_halved_and_may_end_the_run() -> None:
    batches: list[list[int]] = []
    failures: list[Failure] = []

    def retry(failure: Failure) -> None:
        failures.append(failure)
        assert len(batches) == len(failures), "before the halves run"
        if failure.size == 2:
            raise RuntimeError("the GPU no longer answers")

    pieces = by_halves(list(range(4)), squares({0}, batches), replace_by_zero, retry)
    with pytest.raises(RuntimeError, match="no longer answers"):
        next(pieces)
    assert failures == [Failure(size, "cannot square [0]", False) for size in (4, 2)]
    assert [len(batch) for batch in batches] == [4, 2]


def test_errors_of_the_whole_run_are_not_caught() -> None:
    def run(batch: list[int]) -> None:
        batches.append(batch)
        raise StorageRefused("s3://b rejects the credentials")

    batches: list[list[int]] = []
    for batch in ([1, 2, 3], [1]):
        with pytest.raises(StorageRefused, match="credentials"):
            next(by_halves(batch, run, lambda _: None))
    assert batches == [[1, 2, 3], [1]]


def test_a_failed_batch_is_not_kept_in_memory() -> None:
    """The traceback of the exception holds the memory of the batch, and must be gone before its halves run."""
    references = []

    def run(batch: list[int]) -> int:
        buffer = np.zeros(10)
        if len(batch) > 1:
            references.append(weakref.ref(buffer))
            raise ValueError
        return len(batch)

    def retry(_: Failure) -> None:
        gc.collect()
        assert all(reference() is None for reference in references)

    assert list(by_halves([1, 2], run, lambda _: None, retry)) == [(1, 1), (1, 1)]
    assert references
