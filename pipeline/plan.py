"""The plan: which shards a run reads, written once before any work and read again by every later attempt.

`_plan/shards-00000.parquet`, `_plan/shards-00001.parquet` … hold one row a shard, in order; `_plan/plan.json`, written
last, holds the totals. A virtual shard (a run of loose images) carries the keys of its images in its own row.
"""

import base64
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage

OBJECTS_PER_SHARD = 512
SHARDS_PER_FILE = 512
SHARDS_PER_ROW_GROUP = 16
NAME = "_plan/plan.json"

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


@dataclass(frozen=True, slots=True)
class Plan:
    """What the driver keeps of a plan: totals and, by shard, the number of rows where it is known.

    shards: how many. rows: images known so far. uncounted_shards: shards whose images only reading can count.
    keep: the `--keep` columns by their names in the shards, with their types.
    """

    output: str
    shards: int
    rows: int
    uncounted_shards: int
    size_bytes: int
    keep: pa.Schema

    def rows_by_shard(self) -> Iterator[int | None]:
        """The planned number of rows of every shard, in order; None where only reading tells."""
        for number in range(-(-self.shards // SHARDS_PER_FILE)):
            yield from _read_file(_file(self.output, number), ["rows"])["rows"].to_pylist()

    def load(self, index: int) -> Shard:
        return load_shard(self.output, index)


def make(output: str, shards: Iterable[Shard], keep_types: Mapping[str, pa.DataType]) -> Plan:
    """Write the plan of these shards, as a stream, and return its totals. Their `index` is given here.

    keep_types may be filled while `shards` is being read.
    """
    rows = uncounted = size_bytes = count = 0
    batch: list[Shard] = []
    for shard in shards:
        batch.append(replace(shard, index=count))
        count += 1
        size_bytes += shard.size_bytes
        rows += shard.rows or 0
        uncounted += shard.rows is None
        if len(batch) == SHARDS_PER_FILE:
            _write_file(output, batch)
            batch = []
    if batch:
        _write_file(output, batch)
    plan = Plan(output, count, rows, uncounted, size_bytes, pa.schema(list(keep_types.items())))
    record = {
        "shards": count,
        "rows": rows,
        "uncounted_shards": uncounted,
        "size_bytes": size_bytes,
        "keep": base64.b64encode(plan.keep.serialize()).decode(),
    }
    storage.write(storage.join(output, NAME), json.dumps(record, indent=1).encode())
    return plan


def load(output: str) -> Plan | None:
    """The plan of an output directory; None where planning was never finished."""
    try:
        record = json.loads(storage.read(storage.join(output, NAME)))
    except FileNotFoundError:
        return None
    keep = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(record.pop("keep"))))
    return Plan(output=output, keep=keep, **record)


@lru_cache(maxsize=64)
def load_shard(output: str, index: int) -> Shard:
    """Read one shard's row, and no more of the plan than its row group."""
    number, place = divmod(index, SHARDS_PER_FILE)
    group, row = divmod(place, SHARDS_PER_ROW_GROUP)
    with storage.open_read(_file(output, number)) as file:
        table = pq.ParquetFile(file).read_row_group(group, use_threads=False)
    return _to_shard(table.slice(row, 1).to_pylist()[0])


def _file(output: str, number: int) -> str:
    return storage.join(output, f"_plan/shards-{number:05d}.parquet")


def _write_file(output: str, shards: list[Shard]) -> None:
    columns = {name: [getattr(shard, name) for shard in shards] for name in SCHEMA.names}
    buffer = io.BytesIO()
    pq.write_table(
        pa.table(columns, schema=SCHEMA),
        buffer,
        compression="zstd",
        row_group_size=SHARDS_PER_ROW_GROUP,
        use_dictionary=False,
        write_statistics=False,
    )
    storage.write(_file(output, shards[0].index // SHARDS_PER_FILE), buffer.getvalue())


def _read_file(uri: str, columns: list[str]) -> pa.Table:
    with storage.open_read(uri) as file:
        return pq.ParquetFile(file).read(columns=columns, use_threads=False)


def _to_shard(row: dict[str, Any]) -> Shard:
    lists = ("keys", "key_sizes", "key_etags", "kept")
    fields: dict[str, Any] = {**row, **{name: tuple(row[name]) for name in lists if row[name] is not None}}
    return Shard(**fields)
