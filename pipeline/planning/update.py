"""Diff of an archive against its plan: new, replaced, removed and failed objects.

Loose images are compared as two sorted streams, so memory grows with the number of changes, not of images. A shard such
as a tar is compared as a whole, by its etag: if it was replaced, all its images count as replaced.
"""

import heapq
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.coverage import END, Ranges, intersect, normalize, union
from pipeline.planning.plan import Plan, read_shards
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
    """

    plan: Plan
    failed: Mapping[int, Ranges] = field(default_factory=dict)
    dropped: dict[int, Ranges] = field(default_factory=dict)
    unchanged: int = 0
    removed: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)

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
            if old.etag == info.etag and not intersect(self.failed.get(old.shard, ()), old.rows):
                self.unchanged += 1
            else:
                self._drop_rows(old)
                yield info
            old = next(planned, None)
        while old is not None:
            removed.append(old.uri)
            old = next(planned, None)
        self.removed = len(removed)
        self._write(removed)

    def _drop_rows(self, old: "_Planned") -> None:
        self.dropped[old.shard] = union(self.dropped.get(old.shard, ()), old.rows)

    def _write(self, removed: list[str]) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"uri": pa.array(removed, pa.string())}), buffer)
        access.write(uris.join(self.plan.output, REMOVED), buffer.getvalue())


@dataclass(frozen=True, slots=True, order=True)
class _Planned:
    """One planned object: a shard, or one row of a virtual shard."""

    uri: str
    etag: str
    shard: int
    rows: Ranges


def _planned(plan: Plan) -> Iterator[_Planned]:
    """The objects of a plan that were not dropped, sorted by URI.

    Each planning and each update listed its loose images in order, so the plan is a few sorted runs of them.
    """
    whole: list[_Planned] = []
    runs: list[list[int]] = []
    last = ""
    for shard in read_shards(plan):
        images = shard.payload
        if not isinstance(images, LooseImages):
            if (0, END) not in plan.dropped.get(shard.index, ()):  # a shard of no rows counts as well
                whole.append(_Planned(shard.uri, shard.etag, shard.index, ((0, END),)))
            continue
        if not runs or uris.join(shard.uri, images.keys[0]) < last:
            runs.append([])
        runs[-1].append(shard.index)
        last = uris.join(shard.uri, images.keys[-1])
    return heapq.merge(sorted(whole), *(_loose(plan, run) for run in runs))


def _loose(plan: Plan, run: list[int]) -> Iterator[_Planned]:
    for index in run:
        shard: Shard = plan.load(index)
        images = shard.payload
        assert isinstance(images, LooseImages)
        for start, stop in plan.planned(index):
            for row in range(start, min(stop, len(images.keys))):
                etag = images.etags[row] if images.etags else ""
                yield _Planned(uris.join(shard.uri, images.keys[row]), etag, index, normalize([(row, row + 1)]))
