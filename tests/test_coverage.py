"""Interval sets compared with Python sets of rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.coverage import Coverage, Ranges, contains, count, from_rows, intersect, normalize, subtract, union

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))).map(normalize)


def rows(intervals: Ranges) -> set[int]:
    return {row for start, stop in intervals for row in range(start, stop)}


@given(ranges, ranges)
def test_operations_equal_those_of_sets(a: Ranges, b: Ranges) -> None:
    assert rows(union(a, b)) == rows(a) | rows(b)
    assert rows(intersect(a, b)) == rows(a) & rows(b)
    assert rows(subtract(a, b)) == rows(a) - rows(b)
    assert count(a) == len(rows(a))
    assert from_rows(rows(a)) == a
    assert all(contains(a, row) == (row in rows(a)) for row in range(45))


@given(ranges, ranges)
def test_results_are_canonical(a: Ranges, b: Ranges) -> None:
    for result in (union(a, b), intersect(a, b), subtract(a, b)):
        assert normalize(result) == result


def test_a_row_cannot_be_covered_twice() -> None:
    coverage = Coverage()
    coverage.add(3, ((0, 5), (9, 10)))
    with pytest.raises(ValueError, match="shard 3 are covered twice"):
        coverage.add(3, ((4, 6),))
    assert coverage.of(3) == ((0, 5), (9, 10))
