"""The plan: which shards a run reads, written once before any work and read again by every later attempt.

`_plan/shards-00000-<planning>.parquet`, `_plan/shards-00001-<planning>.parquet` … hold one row a shard, in order;
`_plan/plan.json`, written last, names them and holds the totals: what no plan.json names does not exist, so that two
drivers which plan at once cannot mix their plans. A virtual shard (a run of loose images) carries the keys of its
images in its own row. An update adds files and takes rows back whose images were replaced; it changes nothing else. No
URI in it bears a credential: `sources.uris` has those of lists, `storage.withhold` those of inputs.
"""

import base64
import io
import itertools
import json
import uuid
from array import array
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipeline import storage
from pipeline.coverage import END, Coverage, Ranges, count, intersect, normalize, subtract, union
from pipeline.parquet import open_parquet

OBJECTS_PER_SHARD = 512
SHARDS_PER_FILE = 512
SHARDS_PER_ROW_GROUP = 16
FOLDER = "_plan"
NAME = f"{FOLDER}/plan.json"
FILES = f"{FOLDER}/shards-"

SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("keys", pa.list_(pa.string())),
        ("key_sizes", pa.list_(pa.int64())),
        ("key_etags", pa.list_(pa.string())),
        ("kept", pa.list_(pa.string())),
        ("withheld", pa.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Shard:
    """One physical object of many images, or a run of consecutive loose images.

    index: place in the plan. `(index, row)` is an image's identity inside a run.
    kind: the reader in `pipeline.sources`: objects, tar, zip, parquet.
    uri: the object; of kind "objects" the folder or prefix that `keys` are relative to ("" for absolute keys).
    rows: number of images where it is known before reading; a shard with more is cut there, None reads to the end.
    size_bytes, etag: of the object when it was planned; of kind "objects" the sum, and "".
    keys, key_sizes, key_etags: the loose images, in row order; None for the other kinds.
    kept: a JSON object a row, the `--keep` columns of a list of URIs; None where there are none.
    withheld: credentials were taken out of the keys.
    """

    index: int
    kind: str
    uri: str
    rows: int | None = None
    size_bytes: int = 0
    etag: str = ""
    keys: tuple[str, ...] | None = None
    key_sizes: tuple[int, ...] | None = None
    key_etags: tuple[str, ...] | None = None
    kept: tuple[str, ...] | None = None
    withheld: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What the driver keeps of a plan: totals, and a number a shard.

    files: with the shards, by name. shards: how many. size_bytes: of all. keep: the `--keep` columns by their names in
    the shards, with their types.
    shard_rows: int64, by shard index: planned images, -1 where only reading tells, 0 for an index that is not in use.
    retired: rows that an update took back, since their image was replaced; by shard.
    withheld: the keys of some shard lack their credentials.
    """

    output: str
    files: tuple[str, ...]
    shards: int
    size_bytes: int
    keep: pa.Schema
    shard_rows: NDArray[np.int64]
    retired: Mapping[int, Ranges]
    withheld: bool = False

    @property
    def rows(self) -> int:
        """Images that were counted before reading."""
        return int(self.shard_rows[self.shard_rows > 0].sum())

    @property
    def uncounted_shards(self) -> int:
        """Shards whose images only reading can count, but for those that were taken back whole."""
        gone = sum(self.shard_rows[shard] < 0 and not self.planned(shard) for shard in self.retired)
        return int((self.shard_rows < 0).sum() - gone)

    def file(self, index: int) -> str:
        """URI of the file with the row of a shard."""
        return storage.join(self.output, self.files[index // SHARDS_PER_FILE])

    def load(self, index: int) -> Shard:
        return load_shard(self.file(index), index)

    def planned(self, shard: int) -> Ranges:
        """The rows of a shard that must end up somewhere; an unknown end is `END`."""
        rows = int(self.shard_rows[shard]) if shard < len(self.shard_rows) else 0
        return subtract(normalize([(0, END if rows < 0 else rows)]), self.retired.get(shard, ()))

    def remaining(self, coverage: Coverage) -> Iterator[tuple[int, Ranges]]:
        """Plan − coverage: what is left of each shard that is not done."""
        for shard in range(len(self.shard_rows)):
            total = coverage.totals.get(shard, END)
            todo = subtract(intersect(self.planned(shard), ((0, total),)), coverage.of(shard))
            if todo:
                yield shard, todo

    def images(self, totals: Mapping[int, int]) -> int | None:
        """All images of the plan, given the number of rows of the shards read so far; None while some are uncounted."""
        images = self.rows
        for shard in np.flatnonzero(self.shard_rows < 0).tolist():
            if shard not in totals and self.planned(shard):
                return None
            images += totals.get(shard, 0)
        retired = (
            (shard, intersect(ranges, ((0, self._rows(shard, totals)),))) for shard, ranges in self.retired.items()
        )
        return images - sum(count(ranges) for _, ranges in retired)

    def _rows(self, shard: int, totals: Mapping[int, int]) -> int:
        rows = int(self.shard_rows[shard])
        return totals.get(shard, 0) if rows < 0 else rows


def make(output: str, shards: Iterable[Shard], keep_types: Mapping[str, pa.DataType]) -> Plan:
    """The plan of these shards, which are read as a stream. Their `index` is given here.

    keep_types may be filled while `shards` is being read. Files are written, but no plan counts until `save`.
    """
    return extend(Plan(output, (), 0, 0, pa.schema([]), np.empty(0, np.int64), {}), shards, keep_types, {})


def extend(
    plan: Plan, shards: Iterable[Shard], keep_types: Mapping[str, pa.DataType], retired: Mapping[int, Ranges]
) -> Plan:
    """Add shards to a plan and take rows back; both mappings may be filled while `shards` is being read.

    Files are written, but the plan that counts is the old one until `save`.
    """
    planning = uuid.uuid4().hex[:12]
    files = list(plan.files)
    first = -(-len(plan.shard_rows) // SHARDS_PER_FILE) * SHARDS_PER_FILE  # written files are never written again
    rows = array("q", plan.shard_rows.tolist() + [0] * (first - len(plan.shard_rows)))
    size_bytes, withheld = plan.size_bytes, plan.withheld
    numbered = (replace(shard, index=first + place) for place, shard in enumerate(shards))
    while shard := next(numbered, None):
        file_shards = itertools.chain([shard], itertools.islice(numbered, SHARDS_PER_FILE - 1))
        files.append(f"{FILES}{len(files):05d}-{planning}.parquet")
        for each in _written(storage.join(plan.output, files[-1]), file_shards):
            rows.append(-1 if each.rows is None else each.rows)
            size_bytes += each.size_bytes
            withheld |= each.withheld
    keep = pa.schema(list(keep_types.items())) if keep_types else plan.keep
    merged = {
        shard: union(plan.retired.get(shard, ()), retired.get(shard, ())) for shard in sorted({*plan.retired, *retired})
    }
    shards_in_all = plan.shards + len(rows) - first
    return Plan(plan.output, tuple(files), shards_in_all, size_bytes, keep, np.array(rows, np.int64), merged, withheld)


def save(plan: Plan, *, is_first: bool = False) -> None:
    """From here on this plan counts. is_first: FileExistsError where there is one already."""
    record = {
        "files": plan.files,
        "shards": plan.shards,
        "images": plan.rows,
        "uncounted_shards": plan.uncounted_shards,
        "size_bytes": plan.size_bytes,
        "indices": len(plan.shard_rows),
        "keep": base64.b64encode(plan.keep.serialize()).decode(),
        "retired": plan.retired,
        "withheld": plan.withheld,
    }
    (storage.create if is_first else storage.write)(storage.join(plan.output, NAME), json.dumps(record).encode())


def load(output: str) -> Plan | None:
    """The plan of an output directory; None where planning was never finished."""
    try:
        record = storage.read_record(storage.join(output, NAME))
    except FileNotFoundError:
        return None
    keep = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record["keep"])))
    rows, files = np.zeros(record["indices"], np.int64), tuple(record["files"])
    for name in files:
        table = _read_file(storage.join(output, name), ["index", "rows"])
        rows[table["index"].to_numpy()] = table["rows"].fill_null(-1).to_numpy()
    retired = {int(shard): tuple((a, b) for a, b in ranges) for shard, ranges in record["retired"].items()}
    return Plan(output, files, record["shards"], record["size_bytes"], keep, rows, retired, record["withheld"])


def read_shards(plan: Plan) -> Iterator[Shard]:
    """Every shard, whole, in order, a file of the plan at a time."""
    for name in plan.files:
        table = _read_file(storage.join(plan.output, name), SCHEMA.names)
        for batch in table.to_batches(max_chunksize=SHARDS_PER_ROW_GROUP):
            yield from map(_to_shard, batch.to_pylist())


def load_shard(uri: str, index: int) -> Shard:
    """Read one shard's row from its file of the plan, and no more of that than its row group."""
    group, row = divmod(index % SHARDS_PER_FILE, SHARDS_PER_ROW_GROUP)
    with storage.open_read(uri) as file:
        table = open_parquet(file).read_row_group(group, use_threads=False)
    return _to_shard(table.slice(row, 1).to_pylist()[0])


def _written(uri: str, shards: Iterator[Shard]) -> Iterator[Shard]:
    """Write one file of the plan, a row group at a time, for memory's sake; give the shards on."""
    buffer = io.BytesIO()
    with pq.ParquetWriter(buffer, SCHEMA, compression="zstd", use_dictionary=False, write_statistics=False) as writer:
        while group := list(itertools.islice(shards, SHARDS_PER_ROW_GROUP)):
            columns = {name: [getattr(shard, name) for shard in group] for name in SCHEMA.names}
            writer.write_table(pa.table(columns, schema=SCHEMA))
            yield from group
    storage.write(uri, buffer.getvalue())


def _read_file(uri: str, columns: list[str]) -> pa.Table:
    with storage.open_read(uri) as file:
        return open_parquet(file).read(columns=columns, use_threads=False)


def _to_shard(row: dict[str, Any]) -> Shard:
    lists = ("keys", "key_sizes", "key_etags", "kept")
    fields: dict[str, Any] = {**row, **{name: tuple(row[name]) for name in lists if row[name] is not None}}
    return Shard(**fields)
