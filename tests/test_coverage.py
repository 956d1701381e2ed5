"""Interval sets against plain Python sets of rows."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.coverage import END, Coverage, Ranges, contains, count, from_rows, intersect, normalize, subtract, union

ranges = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))).map(normalize)


def rows(found: Ranges) -> set[int]:
    return {row for start, stop in found for row in range(start, stop)}


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
    for found in (union(a, b), intersect(a, b), subtract(a, b)):
        assert normalize(found) == found


def test_coverage_refuses_rows_twice() -> None:
    coverage = Coverage()
    coverage.add(3, ((0, 5), (9, 10)))
    with pytest.raises(ValueError, match="shard 3 are covered twice"):
        coverage.add(3, ((4, 6),))
    assert coverage.of(3) == ((0, 5), (9, 10))


def test_remaining_of_a_shard_with_and_without_a_known_end() -> None:
    coverage = Coverage()
    coverage.add(0, ((2, 4),))
    assert coverage.remaining(0, 6) == ((0, 2), (4, 6))
    assert coverage.remaining(0, None) == ((0, 2), (4, END))
    coverage.totals[0] = 4
    assert coverage.remaining(0, None) == ((0, 2),)
    assert coverage.remaining(1, 0) == ()
