"""The plan: the list of shards of a run, written once before any work and read by every later attempt.

The files `_plan/shards-00000-<id>.parquet`, `_plan/shards-00001-<id>.parquet` … hold one row per shard, in order.
`_plan/plan.json` is written last. It names these files and holds the totals. Files that it does not name are ignored,
so two drivers that plan at the same time cannot mix their plans. A virtual shard (a run of loose images) has the keys
of its images in its payload. An update adds files and drops the rows of replaced images; it changes nothing else. The
plan contains no credentials: `planning.lists` reads those of lists again, `storage.credentials` keeps those of inputs.
"""

import base64
import io
import itertools
import json
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline.coverage import END, Coverage, Ranges, count, intersect, normalize, subtract, union
from pipeline.sources import SOURCES
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.storage import access, uris
from pipeline.storage.parquet import open_parquet

OBJECTS_PER_SHARD = 512
SHARDS_PER_FILE = 512
SHARDS_PER_ROW_GROUP = 16
FOLDER = "_plan"
NAME = f"{FOLDER}/plan.json"
FILES = f"{FOLDER}/shards-"

COLUMNS_BEFORE_PAYLOAD = ("keys", "key_sizes", "key_etags", "kept", "withheld")
"""Columns of older plans, from before shards had a payload: the fields of LooseImages, in their order."""

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("payload", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """The part of a plan that the driver keeps in memory: totals, and one number per shard.

    files: names of the files with the shards. shards: number of shards. size_bytes: of all shards.
    keep: names and types of the `--keep` columns in the shards.
    shard_rows: int64, planned images by shard index; -1 if only reading can count them, 0 for an unused index.
    dropped: rows by shard that updates dropped because their image was replaced.
    hides_credentials: credentials were removed from the keys of a shard.
    left_out: numbers of files of the archive that are not read, by suffix.
    """

    output: str
    files: tuple[str, ...]
    shards: int
    size_bytes: int
    keep: pa.Schema
    shard_rows: NDArray[np.int64]
    dropped: Mapping[int, Ranges]
    hides_credentials: bool = False
    left_out: Mapping[str, int] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Number of images that are known before reading."""
        return int(self.shard_rows[self.shard_rows > 0].sum())

    @property
    def uncounted_shards(self) -> int:
        """Number of shards whose images only reading can count, without the shards that were dropped."""
        return self.uncounted({})

    def file(self, index: int) -> str:
        """URI of the file that holds a shard."""
        return uris.join(self.output, self.files[index // SHARDS_PER_FILE])

    def load(self, index: int) -> Shard:
        """Read one shard."""
        return load_shard(self.file(index), index)

    def planned(self, shard: int) -> Ranges:
        """The rows of a shard that the run must account for. An unknown end is `END`."""
        rows = int(self.shard_rows[shard]) if shard < len(self.shard_rows) else 0
        return subtract(normalize([(0, END if rows < 0 else rows)]), self.dropped.get(shard, ()))

    def remaining(self, coverage: Coverage) -> Iterator[tuple[int, Ranges]]:
        """Yield the remaining rows of each shard that is not done: the plan without the coverage."""
        for shard in range(len(self.shard_rows)):
            total = coverage.totals.get(shard, END)
            todo = subtract(intersect(self.planned(shard), ((0, total),)), coverage.of(shard))
            if todo:
                yield shard, todo

    def images(self, totals: Mapping[int, int]) -> int | None:
        """Number of images of the plan; None if a shard is uncounted. totals: rows of the shards that were read."""
        if self.uncounted(totals):
            return None
        images = self.rows + sum(totals.get(shard, 0) for shard in np.flatnonzero(self.shard_rows < 0).tolist())
        dropped = (
            (shard, intersect(ranges, ((0, self._rows(shard, totals)),))) for shard, ranges in self.dropped.items()
        )
        return images - sum(count(ranges) for _, ranges in dropped)

    def empty_shards(self, totals: Mapping[int, int]) -> int:
        """Number of shards that reading showed to have no image, without those that were dropped. totals: as above."""
        return sum(not rows and bool(self.planned(shard)) for shard, rows in totals.items())

    def uncounted(self, totals: Mapping[int, int]) -> int:
        """Number of planned shards without a number of images. totals: rows of the shards that were read."""
        unknown = np.flatnonzero(self.shard_rows < 0)
        others = [*totals, *(shard for shard in self.dropped if not self.planned(shard))]
        return int((~np.isin(unknown, np.array(others, np.int64))).sum())

    def _rows(self, shard: int, totals: Mapping[int, int]) -> int:
        rows = int(self.shard_rows[shard])
        return totals.get(shard, 0) if rows < 0 else rows


def make(
    output: str,
    shards: Iterable[Shard],
    keep_types: Mapping[str, pa.DataType],
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Write the files of a new plan and return it. It has no effect until `save`.

    shards: read as a stream, and numbered here. keep_types and left_out may be filled while `shards` is read.
    """
    empty = Plan(output, (), 0, 0, pa.schema([]), np.empty(0, np.int64), {})
    return extend(empty, shards, keep_types, {}, left_out)


def extend(
    plan: Plan,
    shards: Iterable[Shard],
    keep_types: Mapping[str, pa.DataType],
    dropped: Mapping[int, Ranges],
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Write files with further shards and return the extended plan. It has no effect until `save`.

    dropped: rows to drop, by shard. left_out: of the whole archive, as it is now. keep_types, dropped and left_out may
    be filled while `shards` is read.
    """
    plan_id = uuid.uuid4().hex[:12]
    files = list(plan.files)
    first = -(-len(plan.shard_rows) // SHARDS_PER_FILE) * SHARDS_PER_FILE  # files that exist are never changed
    rows = array("q", plan.shard_rows.tolist() + [0] * (first - len(plan.shard_rows)))
    size_bytes, hides_credentials = plan.size_bytes, plan.hides_credentials
    numbered = (replace(shard, index=first + number) for number, shard in enumerate(shards))
    while shard := next(numbered, None):
        file_shards = itertools.chain([shard], itertools.islice(numbered, SHARDS_PER_FILE - 1))
        files.append(f"{FILES}{len(files):05d}-{plan_id}.parquet")
        for written in _write_file(uris.join(plan.output, files[-1]), file_shards):
            rows.append(-1 if written.rows is None else written.rows)
            size_bytes += written.size_bytes
            hides_credentials |= getattr(written.payload, "hides_credentials", False)
    keep = pa.schema(list(keep_types.items())) if keep_types else plan.keep
    merged = {
        shard: union(plan.dropped.get(shard, ()), dropped.get(shard, ())) for shard in sorted({*plan.dropped, *dropped})
    }
    total = plan.shards + len(rows) - first
    return Plan(
        plan.output,
        tuple(files),
        total,
        size_bytes,
        keep,
        np.array(rows, np.int64),
        merged,
        hides_credentials,
        dict(left_out),
    )


def save(plan: Plan, *, is_first: bool = False) -> None:
    """Make this plan the plan of its output. is_first: raise FileExistsError if the output has a plan."""
    record = {
        "files": plan.files,
        "shards": plan.shards,
        "images": plan.rows,
        "uncounted_shards": plan.uncounted_shards,
        "size_bytes": plan.size_bytes,
        "indices": len(plan.shard_rows),
        "keep": base64.b64encode(plan.keep.serialize()).decode(),
        "retired": plan.dropped,
        "withheld": plan.hides_credentials,
        "left_out": plan.left_out,
    }
    (access.create if is_first else access.write)(uris.join(plan.output, NAME), json.dumps(record).encode())


def load(output: str) -> Plan | None:
    """Load the plan of an output directory; None if planning was never finished."""
    try:
        record = access.read_record(uris.join(output, NAME))
    except FileNotFoundError:
        return None
    keep = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["keep"])))
    rows, files = np.zeros(record["indices"], np.int64), tuple(record["files"])
    for name in files:
        table = _read_file(uris.join(output, name), ["index", "rows"])
        rows[table["index"].to_numpy()] = table["rows"].fill_null(-1).to_numpy()
    dropped = {int(shard): tuple((a, b) for a, b in ranges) for shard, ranges in record["retired"].items()}
    left_out = record.get("left_out", {})  # older plans do not have it
    return Plan(
        output, files, record["shards"], record["size_bytes"], keep, rows, dropped, record["withheld"], left_out
    )


def is_saved(output: str) -> bool:
    """Whether an output directory has a plan, damaged or not. Reads no file of it."""
    try:
        access.head(uris.join(output, NAME))
    except FileNotFoundError:
        return False
    return True


def read_shards(plan: Plan) -> Iterator[Shard]:
    """Yield every shard in order. Holds one file of the plan in memory."""
    for name in plan.files:
        table = _read_file(uris.join(plan.output, name))
        for batch in table.to_batches(max_chunksize=SHARDS_PER_ROW_GROUP):
            yield from map(_to_shard, batch.to_pylist())


def load_shard(uri: str, index: int) -> Shard:
    """Read one shard from its file of the plan. Reads only its row group."""
    group, row = divmod(index % SHARDS_PER_FILE, SHARDS_PER_ROW_GROUP)
    with access.open_read(uri) as file:
        table = open_parquet(file).read_row_group(group, use_threads=False)
    return _to_shard(table.slice(row, 1).to_pylist()[0])


def _write_file(uri: str, shards: Iterator[Shard]) -> Iterator[Shard]:
    """Write one file of the plan and yield its shards. Holds one row group in memory."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        while group := list(itertools.islice(shards, SHARDS_PER_ROW_GROUP)):
            writer.write_table(pa.Table.from_pylist(list(map(_to_row, group)), SCHEMA))
            yield from group
    access.write(uri, buffer.getvalue())


def _read_file(uri: str, columns: list[str] | None = None) -> pa.Table:
    with access.open_read(uri) as file:
        return open_parquet(file).read(columns=columns, use_threads=False)


def _to_row(shard: Shard) -> dict[str, Any]:
    row = {name: getattr(shard, name) for name in SCHEMA.names}
    return {**row, "payload": None if shard.payload is None else shard.payload.to_json()}


def _to_shard(row: dict[str, Any]) -> Shard:
    old = {name: row.pop(name) for name in COLUMNS_BEFORE_PAYLOAD if name in row}
    if old and old["keys"] is not None:
        fields: Any = (tuple(value) if isinstance(value, list) else value for value in old.values())
        return Shard(**row, payload=LooseImages(*fields))
    text = row.pop("payload", None)
    payload_type = SOURCES[row["kind"]].payload
    return Shard(**row, payload=None if payload_type is None or text is None else payload_type.from_json(text))
