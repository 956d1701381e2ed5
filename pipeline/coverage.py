"""Sets of rows as intervals: which rows of which shards are done. Pure Python, no I/O.

A `Range` is a half-open `(start, stop)` pair of rows. `Ranges` is a sorted tuple of disjoint, non-adjacent, non-empty
ranges, so equal sets are equal tuples.
"""

from collections.abc import Iterable, Iterator

Range = tuple[int, int]
Ranges = tuple[Range, ...]

END = 2**62
"""Stop of a range whose end is unknown until the shard has been read."""


def normalize(ranges: Iterable[Range]) -> Ranges:
    """Sort the ranges, drop empty ones, and merge those that touch or overlap."""
    merged: list[Range] = []
    for start, stop in sorted(ranges):
        if start >= stop:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return tuple(merged)


def from_rows(rows: Iterable[int]) -> Ranges:
    """The ranges of exactly these rows, which may be given in any order."""
    return normalize((row, row + 1) for row in rows)


def union(a: Ranges, b: Ranges) -> Ranges:
    return normalize((*a, *b))


def intersect(a: Ranges, b: Ranges) -> Ranges:
    common: list[Range] = []
    i = j = 0
    while i < len(a) and j < len(b):
        start, stop = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < stop:
            common.append((start, stop))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return tuple(common)


def subtract(a: Ranges, b: Ranges) -> Ranges:
    """The rows of `a` that are not in `b`."""
    left: list[Range] = []
    for start, stop in a:
        for taken_start, taken_stop in intersect(((start, stop),), b):
            if start < taken_start:
                left.append((start, taken_start))
            start = taken_stop
        if start < stop:
            left.append((start, stop))
    return tuple(left)


def count(ranges: Ranges) -> int:
    return sum(stop - start for start, stop in ranges)


def contains(ranges: Ranges, row: int) -> bool:
    return any(start <= row < stop for start, stop in ranges)


class Coverage:
    """The rows of a run that are done, by shard. Memory grows with the number of gaps, not of images.

    totals: number of rows of the shards whose end has been read, if the plan did not know it.
    """

    def __init__(self) -> None:
        self.ranges: dict[int, Ranges] = {}
        self.totals: dict[int, int] = {}

    def add(self, shard: int, ranges: Ranges) -> None:
        """Add rows of a shard. Raises ValueError if one of them is covered already."""
        overlap = intersect(self.of(shard), ranges)
        if overlap:
            raise ValueError(f"rows {overlap} of shard {shard} are covered twice")
        self.ranges[shard] = union(self.of(shard), ranges)

    def overlaps(self, shard: int, ranges: Ranges) -> Ranges:
        """Those of the rows that are covered already."""
        return intersect(self.of(shard), ranges)

    def of(self, shard: int) -> Ranges:
        return self.ranges.get(shard, ())

    def __iter__(self) -> Iterator[tuple[int, Ranges]]:
        return iter(sorted(self.ranges.items()))
