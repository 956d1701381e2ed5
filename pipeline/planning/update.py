"""Diff of an archive against its plan: new, replaced, removed and failed objects.

Loose images are compared as two sorted streams, so memory grows with the number of changes, not of images. A shard such
as a tar is compared as a whole, by its etag: if it was replaced, all its images count as replaced. So is an object that
is cut into several shards, except for sources whose images can be compared one by one (`compare`).
"""

import heapq
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.coverage import END, Ranges, intersect, normalize, union
from pipeline.planning.compare import Comparison, Results
from pipeline.planning.plan import Plan, read_shards
from pipeline.sources import SOURCES, ReadOptions
from pipeline.sources.base import Contents
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.storage import access, uris
from pipeline.storage.base import ObjectInfo

REMOVED = "_plan/removed.parquet"
"""The URIs of the planned objects that the last update did not find."""


@dataclass
class Change:
    """A filter that passes the new, replaced and failed objects of a listing and counts the others.

    failed: rows by shard whose bytes could not be read; their objects are read again.
    dropped: planned rows by shard whose object passed; complete when `new()` has been read to its end.
    unchanged, removed: numbers of objects.
    left_out: numbers of files of the archive that are not read, by suffix, as they are now.
    results: of the run so far, to compare the images of a replaced object one by one; None if they are not known.
    """

    plan: Plan
    failed: Mapping[int, Ranges] = field(default_factory=dict)
    dropped: dict[int, Ranges] = field(default_factory=dict)
    unchanged: int = 0
    removed: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    results: Results | None = None
    _replaced: "dict[str, _Planned]" = field(default_factory=dict)

    def new(self, listing: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        """Yield the objects of a sorted listing that the plan does not contain, or contains with another etag."""
        planned = _planned(self.plan)
        old = next(planned, None)
        removed: list[str] = []
        for info in listing:
            while old is not None and old.uri < info.uri:
                removed.append(old.uri)
                old = next(planned, None)
            if old is None or old.uri != info.uri:
                yield info
                continue
            if old.etag == info.etag and not self._has_failed(old):
                self.unchanged += 1
            elif self.results and old.has_content:
                self._replaced[info.uri] = old
                yield info
            else:
                self._drop_rows(old)
                yield info
            old = next(planned, None)
        while old is not None:
            removed.append(old.uri)
            old = next(planned, None)
        self.removed = len(removed)
        self._write(removed)

    def contents(self, info: ObjectInfo, contents: Iterable[Contents], options: ReadOptions) -> Iterator[Contents]:
        """Of the shards of an object that passed, those with images that are new or differ."""
        if info.uri not in self._replaced or not self.results:
            yield from contents
            return
        shards = self._replaced[info.uri].shards
        comparison = Comparison(self.plan, info, shards, self.failed, self.results, options)
        yield from comparison.changed(contents)
        self.dropped.update(comparison.dropped)
        del self._replaced[info.uri]

    def drop_others(self) -> None:
        """Drop the rows of the objects that passed, but are no longer readable."""
        for old in self._replaced.values():
            self._drop_rows(old)

    def _has_failed(self, old: "_Planned") -> bool:
        return any(intersect(self.failed.get(shard, ()), old.rows) for shard in old.shards)

    def _drop_rows(self, old: "_Planned") -> None:
        for shard in old.shards:
            self.dropped[shard] = union(self.dropped.get(shard, ()), old.rows)

    def _write(self, removed: list[str]) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"uri": pa.array(removed, pa.string())}), buffer)
        access.write(uris.join(self.plan.output, REMOVED), buffer.getvalue())


@dataclass(frozen=True, slots=True, order=True)
class _Planned:
    """One planned object: all rows of one or several shards, or one row of a virtual shard.

    has_content: its images can be compared one by one.
    """

    uri: str
    etag: str
    shards: tuple[int, ...]
    rows: Ranges
    has_content: bool = False


def _planned(plan: Plan) -> Iterator[_Planned]:
    """The objects of a plan that were not dropped, sorted by URI.

    Each planning and each update listed its loose images in order, so the plan is a few sorted runs of them.
    """
    whole: dict[str, _Planned] = {}
    runs: list[list[int]] = []
    last = ""
    for shard in read_shards(plan):
        images = shard.payload
        if not isinstance(images, LooseImages):
            if (0, END) not in plan.dropped.get(shard.index, ()):  # a shard of no rows counts as well
                has_content = bool(SOURCES[shard.kind].content_column)
                earlier = whole[shard.uri].shards if shard.uri in whole else ()
                whole[shard.uri] = _Planned(shard.uri, shard.etag, (*earlier, shard.index), ((0, END),), has_content)
            continue
        if not runs or uris.join(shard.uri, images.keys[0]) < last:
            runs.append([])
        runs[-1].append(shard.index)
        last = uris.join(shard.uri, images.keys[-1])
    return heapq.merge(sorted(whole.values()), *(_loose(plan, run) for run in runs))


def _loose(plan: Plan, run: list[int]) -> Iterator[_Planned]:
    for index in run:
        shard: Shard = plan.load(index)
        images = shard.payload
        assert isinstance(images, LooseImages)
        for start, stop in plan.planned(index):
            for row in range(start, min(stop, len(images.keys))):
                etag = images.etags[row] if images.etags else ""
                yield _Planned(uris.join(shard.uri, images.keys[row]), etag, (index,), normalize([(row, row + 1)]))
