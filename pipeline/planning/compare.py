"""Compare the images of a replaced object with its planned rows, so that an update computes only those that differ.

For sources with a `content_column`. The results of a run have the hash of each image's bytes in that column; the new
object is read once, and its images are hashed. Both are compared shard by shard, by the keys of the payloads, so memory
grows with the number of changes, not of images.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from pipeline import sources
from pipeline.coverage import END, Ranges, from_rows, intersect, subtract, union
from pipeline.planning.plan import Plan
from pipeline.sources import SOURCES, ReadOptions, Record
from pipeline.sources.base import Contents
from pipeline.sources.shard import KeyedPayload, Shard
from pipeline.storage.base import ObjectInfo

CACHED_SHARDS = 8

Numbers = NDArray[np.int64]
Flags = NDArray[np.bool_]


class Results(Protocol):
    """What a run has written so far."""

    def covered(self, shard: int) -> Ranges:
        """The rows of a shard that are done, as results or as errors."""

    def hashes(self, shard: int, column: str) -> tuple[Numbers, Numbers]:
        """Rows of a shard that are results, and their values of a column of int64."""


@dataclass(frozen=True)
class _Old:
    """The rows of a planned shard that are done and stay in the plan.

    is_same: their object is still the same one. has_hash: their hash is known; it is not for errors.
    """

    keys: Numbers
    shards: Numbers
    rows: Numbers
    hashes: Numbers
    has_hash: Flags
    is_same: Flags

    def columns(self) -> tuple[NDArray[Any], ...]:
        return self.keys, self.shards, self.rows, self.hashes, self.has_hash, self.is_same


@dataclass
class Comparison:
    """The comparison of one object with its planned shards.

    failed: rows by shard that could not be read and are to be read again. dropped: planned rows by shard that differ or
    that the object has no more; complete when `changed` was read to its end.
    """

    plan: Plan
    info: ObjectInfo
    shards: tuple[int, ...]
    failed: Mapping[int, Ranges]
    results: Results
    options: ReadOptions
    dropped: dict[int, Ranges] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._old = lru_cache(CACHED_SHARDS)(self._load)
        self._kept: dict[int, Ranges] = {}

    def changed(self, contents: Iterable[Contents]) -> Iterator[Contents]:
        """Yield the object's shards with new and changed images, without the others.

        If there are none, yields a shard without rows, which records the etag of the object.
        """
        is_first = True
        last: Contents | None = None
        for last in contents:
            part = self._changed_part(last)
            if part.rows:
                is_first = False
                yield part
        if is_first and last is not None:
            yield replace(last, rows=0, payload=_keyed(last).select(()), size_bytes=0)
        self._drop()

    def _drop(self) -> None:
        """Drop the planned rows that no image of the object has kept."""
        for index in self.shards:
            kept = self._kept.get(index, ())
            if dropped := subtract(self.plan.planned(index), kept) if kept else ((0, END),):
                self.dropped[index] = dropped

    def _changed_part(self, contents: Contents) -> Contents:
        """The shard without the images that are unchanged. A shard that cannot be read has no keys, and stays whole."""
        keys = np.array(_keyed(contents).keys, np.int64)
        if not len(keys):
            return contents
        old = self._overlapping(int(keys.min()), int(keys.max()))
        if not len(old.keys):
            return contents
        place = np.minimum(np.searchsorted(old.keys, keys), len(old.keys) - 1)
        is_known = old.keys[place] == keys
        unchanged = is_known & old.is_same[place]
        rows = np.flatnonzero(is_known & ~unchanged & old.has_hash[place])
        hashes, was_read = self._hashes(contents, rows)
        unchanged |= was_read & is_known & (hashes == old.hashes[place])
        for index in np.unique(old.shards[place[unchanged]]).tolist():
            in_shard = place[unchanged][old.shards[place[unchanged]] == index]
            self._kept[index] = union(self._kept.get(index, ()), from_rows(old.rows[in_shard].tolist()))
        left = from_rows(np.flatnonzero(~unchanged).tolist())
        count = int((~unchanged).sum())
        return replace(contents, rows=count, payload=_keyed(contents).select(left))

    def _hashes(self, contents: Contents, rows: Numbers) -> tuple[Numbers, Flags]:
        """The hash of each row, and whether it was read. rows: to read."""
        hashes, was_read = np.zeros(contents.rows or 0, np.int64), np.zeros(contents.rows or 0, bool)
        shard = Shard(0, self._kind, self.info.uri, contents.rows, 0, self.info.etag, contents.payload)
        for item in sources.read(shard, from_rows(rows.tolist()), self.options) if len(rows) else ():
            if isinstance(item, Record) and self._column in item.kept:
                places = slice(item.row, item.row + 1 + len(item.repeats))
                hashes[places], was_read[places] = item.kept[self._column], True
        return hashes, was_read

    @cached_property
    def _kind(self) -> str:
        return self.plan.load(self.shards[0]).kind

    @property
    def _column(self) -> str:
        return SOURCES[self._kind].content_column

    @cached_property
    def _key_ranges(self) -> dict[int, tuple[int, int]]:
        """The first and the last key of each planned shard that has keys."""
        ranges = {}
        for index in self.shards:
            payload = cast(KeyedPayload | None, self.plan.load(index).payload)
            if payload is not None and len(payload.keys):
                ranges[index] = min(payload.keys), max(payload.keys)
        return ranges

    def _overlapping(self, first: int, last: int) -> _Old:
        """The rows of the planned shards whose keys may lie between two keys, sorted by key."""
        parts = [self._old(-1)]
        parts += [self._old(index) for index, (low, high) in self._key_ranges.items() if low <= last and high >= first]
        columns = [np.concatenate(each) for each in zip(*(part.columns() for part in parts), strict=True)]
        order = np.argsort(columns[0], kind="stable")
        return _Old(*(column[order] for column in columns))

    def _load(self, index: int) -> _Old:
        """The rows of a planned shard; none for -1."""
        if index < 0:
            none: Numbers = np.empty(0, np.int64)
            return _Old(none, none, none, none, none.astype(bool), none.astype(bool))
        shard = self.plan.load(index)
        keys = np.array(cast(KeyedPayload, shard.payload).keys, np.int64)
        hashes, has_hash = np.zeros(len(keys), np.int64), np.zeros(len(keys), bool)
        rows, values = self.results.hashes(index, self._column)
        hashes[rows], has_hash[rows] = values, True
        done = intersect(self.plan.planned(index), self.results.covered(index))
        stays = np.zeros(len(keys), bool)
        for start, stop in subtract(done, self.failed.get(index, ())):
            stays[start:stop] = True
        chosen = np.flatnonzero(stays)
        is_same = np.full(len(chosen), bool(shard.etag) and shard.etag == self.info.etag)
        return _Old(keys[chosen], np.full(len(chosen), index), chosen, hashes[chosen], has_hash[chosen], is_same)


def _keyed(contents: Contents) -> KeyedPayload:
    return cast(KeyedPayload, contents.payload)
