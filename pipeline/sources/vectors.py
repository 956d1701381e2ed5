"""A part of another output: each row is an image's vector, or in `_errors/` its error. No image is read.

Planned only for `--from`; a Parquet file of an archive is never taken for one. Rows keep their image_id, source, member
and size. A row of `_errors/` stays the error that it is.
"""

from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.coverage import Ranges, intersect
from pipeline.errors import DecodeError, ImageError, PredictError, ReadError, message_line
from pipeline.sources.base import ReadOptions, Record, ShardEnd, Source
from pipeline.sources.parquet import BAD_BYTES, check_counts
from pipeline.sources.records import Rows, WatchedFile, storage_fault
from pipeline.sources.shard import Shard
from pipeline.storage import access
from pipeline.storage.parquet import open_parquet

KIND = "vectors"
COLUMN = "embedding"
TABLE_ROWS = 16_384
IDENTITY = ("image_id", "source", "member", "width", "height")
_ERRORS: dict[str, type[ImageError]] = {each.stage: each for each in (ReadError, DecodeError, PredictError)}


def tables(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[pa.Table | Record | ShardEnd]:
    """Yield the rows of `todo` as tables, then an error for each row that cannot be read, then the `ShardEnd`."""
    rows = Rows(shard, todo)
    fault = None
    try:
        with access.open_read(shard.uri, shard.etag) as file:
            yield from _Reader(file, rows, options).tables()
    except ReadError as error:
        fault = error
    except OSError as error:
        fault = storage_fault(rows.uri, error)
    yield from rows.finish(fault)


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """The same rows as records. The contract is in `pipeline.sources.base`."""
    for item in tables(shard, todo, options):
        if isinstance(item, pa.Table):
            yield from _records(item, options.keep)
        else:
            yield item


class _Reader:
    """One pass over a part. Raises ReadError if it is broken, and OSError if the storage fails."""

    def __init__(self, file: BinaryIO, rows: Rows, options: ReadOptions) -> None:
        self.file, self.rows = WatchedFile(file), rows
        with _as_read_errors(rows.uri, self.file):
            self.parquet = open_parquet(self.file, page_checksum_verification=True)
            check_counts(self.parquet.metadata)
            names = self.parquet.schema_arrow.names
        rows.total = self.parquet.metadata.num_rows
        self.is_error = "error_type" in names
        own = schema.FAULT.names if self.is_error else [COLUMN]
        if missing := [name for name in ("image_id", *own) if name not in names]:
            raise ReadError("unreadable", f"{rows.uri} has no column {', '.join(missing)}")
        self.keep = [name for name in options.keep if name in names]
        if not self.is_error and schema.has_scaled_vectors(self.parquet.schema_arrow):
            own = [*own, schema.EMBEDDING_SCALE]
        self.columns = list(dict.fromkeys([*(name for name in IDENTITY if name in names), *own, *self.keep]))

    def tables(self) -> Iterator[pa.Table]:
        for group in range(self.parquet.num_row_groups):
            stop = self.rows.row + self.parquet.metadata.row_group(group).num_rows
            if self.rows.row >= self.rows.stop:
                return
            if not self.rows.wants(stop):
                self.rows.advance(stop - self.rows.row)
                continue
            batches = self.parquet.iter_batches(TABLE_ROWS, row_groups=[group], columns=self.columns, use_threads=False)
            while (batch := self._next(batches)) is not None:
                for start, end in intersect(self.rows.todo, ((self.rows.row, self.rows.row + len(batch)),)):
                    yield self._table(batch.slice(start - self.rows.row, end - start), start)
                self.rows.advance(len(batch))

    def _next(self, batches: Iterator[pa.RecordBatch]) -> pa.RecordBatch | None:
        with _as_read_errors(self.rows.uri, self.file):
            return next(batches, None)

    def _table(self, batch: pa.RecordBatch, row: int) -> pa.Table:
        """The columns that `Source.tables` names."""
        count = len(batch)
        columns: dict[str, Any] = {"row": pa.array(np.arange(row, row + count, dtype=np.int64))}
        for name in IDENTITY:
            type_ = schema.IDENTITY.field(name).type
            columns[name] = batch.column(name).cast(type_) if name in batch.schema.names else pa.nulls(count, type_)
        columns |= {name: batch.column(name) for name in self.keep}
        if self.is_error:
            columns |= {name: batch.column(name).cast(pa.string()) for name in schema.FAULT.names}
        else:
            vectors = schema.with_float_vectors(pa.Table.from_batches([batch]))[COLUMN]
            columns[schema.VECTOR] = _as_float32(vectors.combine_chunks(), self.rows.uri)
        return pa.table(columns)


def _as_float32(column: pa.Array, uri: str) -> pa.FixedSizeListArray:
    if not schema.is_vector(column.type) or column.null_count:
        raise ReadError("unreadable", f"{uri}: the column {COLUMN} is {column.type}, not vectors of one length")
    return column.cast(schema.vector(pa.float32(), column.type.list_size))


class _as_read_errors:  # noqa: N801
    """Turns what pyarrow raises for broken bytes into a ReadError, unless the storage failed."""

    def __init__(self, uri: str, file: WatchedFile) -> None:
        self.uri, self.file = uri, file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, BAD_BYTES):
            self.file.check()
            raise ReadError("corrupt", f"{self.uri} cannot be read as Parquet: {message_line(error)}") from error


def _records(table: pa.Table, keep: tuple[str, ...]) -> Iterator[Record]:
    vectors = table[schema.VECTOR].combine_chunks() if schema.VECTOR in table.column_names else None
    for number, row in enumerate(table.drop_columns([schema.VECTOR] if vectors is not None else []).to_pylist()):
        data = error = None
        if vectors is None:
            error = _ERRORS.get(row["stage"], ReadError)(row["error_type"], row["message"])
        else:
            data = vectors[number].values.to_numpy(zero_copy_only=False).reshape(1, 1, -1)
        kept = {name: row[name] for name in keep if name in row}
        yield Record(row["row"], row["image_id"], row["source"], row["member"], data, error, kept)


SOURCE = Source(KIND, (), read, tables=tables)
