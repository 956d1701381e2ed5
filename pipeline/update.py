"""What an archive has become since it was planned: new objects, replaced ones, those that are gone, and those that
could not be read.

Loose images are compared as two sorted streams, so memory grows with the changes and not with the archive. Shards are
compared as wholes by their etag: of a tar that was replaced, every image counts as replaced.
"""

import heapq
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.coverage import END, Ranges, intersect, normalize, union
from pipeline.plan import Plan, Shard, read_shards
from pipeline.storage import ObjectInfo

REMOVED = "_plan/removed.parquet"


@dataclass
class Change:
    """A filter over a new listing: lets through what is new or replaced or could not be read, notes the rest.

    failed: rows in `_errors/` whose bytes could not be had, by shard: their objects are tried again.
    retired: planned rows whose object is let through, by shard; complete once `new()` has been read to its end.
    unchanged, removed: number of objects.
    """

    plan: Plan
    failed: Mapping[int, Ranges] = field(default_factory=dict)
    retired: dict[int, Ranges] = field(default_factory=dict)
    unchanged: int = 0
    removed: int = 0

    def new(self, listing: Iterator[ObjectInfo]) -> Iterator[ObjectInfo]:
        """The objects of a sorted listing that the plan does not hold as they are now."""
        planned = _planned(self.plan)
        old = next(planned, None)
        gone: list[str] = []
        for info in listing:
            while old is not None and old.uri < info.uri:
                gone.append(old.uri)
                old = next(planned, None)
            if old is None or old.uri != info.uri:
                yield info
                continue
            if old.etag == info.etag and not intersect(self.failed.get(old.shard, ()), old.rows):
                self.unchanged += 1
            else:
                self._retire(old)
                yield info
            old = next(planned, None)
        while old is not None:
            gone.append(old.uri)
            old = next(planned, None)
        self.removed = len(gone)
        self._write(gone)

    def _retire(self, old: "_Planned") -> None:
        self.retired[old.shard] = union(self.retired.get(old.shard, ()), old.rows)

    def _write(self, gone: list[str]) -> None:
        buffer = io.BytesIO()
        pq.write_table(pa.table({"uri": pa.array(gone, pa.string())}), buffer)
        storage.write(storage.join(self.plan.output, REMOVED), buffer.getvalue())


@dataclass(frozen=True, slots=True, order=True)
class _Planned:
    uri: str
    etag: str
    shard: int
    rows: Ranges


def _planned(plan: Plan) -> Iterator[_Planned]:
    """The objects of a plan that still stand, sorted by URI. Each planning listed its loose images in order."""
    whole: list[_Planned] = []
    runs: list[list[int]] = []
    last = ""
    for shard in read_shards(plan):
        if shard.keys is None:
            if (0, END) not in plan.retired.get(shard.index, ()):  # one without images stands as well
                whole.append(_Planned(shard.uri, shard.etag, shard.index, ((0, END),)))
            continue
        if not runs or storage.join(shard.uri, shard.keys[0]) < last:
            runs.append([])
        runs[-1].append(shard.index)
        last = storage.join(shard.uri, shard.keys[-1])
    return heapq.merge(sorted(whole), *(_loose(plan, run) for run in runs))


def _loose(plan: Plan, run: list[int]) -> Iterator[_Planned]:
    for index in run:
        shard: Shard = plan.load(index)
        standing = plan.planned(index)
        assert shard.keys is not None
        for start, stop in standing:
            for row in range(start, min(stop, len(shard.keys))):
                etag = shard.key_etags[row] if shard.key_etags else ""
                yield _Planned(storage.join(shard.uri, shard.keys[row]), etag, index, normalize([(row, row + 1)]))
