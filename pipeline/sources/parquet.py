"""Parquet: a row of the file is an image, in a column of bytes or in a Hugging Face struct {bytes, path}."""

import os
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.coverage import Ranges
from pipeline.errors import InputRefused, ReadError, message_line
from pipeline.parquet import open_parquet
from pipeline.plan import Shard
from pipeline.sources.base import ReadOptions, Record, ShardEnd
from pipeline.sources.records import Rows, only, rows_of, storage_fault, values_of

IMAGE_NAMES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp", "data", "content")
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20  # of a column chunk held at once, else whole row groups are

BAD_BYTES = (pa.ArrowException, OSError, ValueError)  # what pyarrow raises for them


def find_image_column(schema: pa.Schema, image_column: str | None, uri: str) -> str:
    """The column of image bytes: the one named, one with a usual name, or the only one. Raises InputRefused."""
    names: list[str] = [field.name for field in schema if _holds_bytes(field.type)]
    if image_column:
        if image_column in names:
            return image_column
        has = f"the columns {', '.join(schema.names)}"
        if image_column in schema.names:
            has = f"{schema.field(image_column).type} there, not binary or a struct of bytes and path"
        raise InputRefused(f"--image-column {image_column}: {uri} has {has}")
    usual = {name.lower(): name for name in reversed(names)}
    for name in IMAGE_NAMES:
        if name in usual:
            return usual[name]
    if len(names) == 1:
        return names[0]
    if not names:
        raise InputRefused(
            f"{uri} has no column of image bytes (binary, or a struct of bytes and path); "
            f"it has {', '.join(f'{field.name} ({field.type})' for field in schema)}"
        )
    raise InputRefused(f"{uri} has several columns of bytes: name one of {', '.join(names)} with --image-column")


def shard_rows(uri: str) -> tuple[int, pa.Schema]:
    """Number of rows and the schema, from the footer alone. Raises BAD_BYTES."""
    with storage.open_read(uri) as file:
        parquet = open_parquet(file)
        check_counts(parquet.metadata)
        schema = parquet.schema_arrow
        _ = schema.names  # only now are they decoded
        return parquet.metadata.num_rows, schema


def check_counts(metadata: pq.FileMetaData) -> None:
    """Raise pa.ArrowInvalid where a footer contradicts itself: its number of rows becomes as many rows of output.

    The row groups' columns say more, but pyarrow's `column()` ends the whole process on some broken footers.
    """
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or metadata.num_rows != sum(counts):
        raise pa.ArrowInvalid(f"the footer says {metadata.num_rows} rows, its row groups {sum(counts)}")


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the row groups that hold rows of `todo`. The contract is in `pipeline.sources.base`."""
    rows = Rows(shard, todo)
    fault = None
    try:
        with storage.open_read(shard.uri, shard.etag) as file:
            yield from _Reader(file, rows, options).records()
    except ReadError as error:
        fault = error
    except OSError as error:
        fault = storage_fault(rows.uri, error)
    yield from rows.finish(fault)


class _WatchedFile:
    """A file that remembers its own failure: pyarrow raises OSError for bad bytes and for a lost connection alike."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.fault: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def read(self, size: int = -1) -> bytes:
        try:
            return self.file.read(size)
        except OSError as error:
            self.fault = error
            raise

    def check(self) -> None:
        if self.fault:
            raise self.fault


class _Reader:
    """One pass over a file. Raises ReadError where the whole file is at fault, OSError where the storage is."""

    def __init__(self, file: BinaryIO, rows: Rows, options: ReadOptions) -> None:
        self.file = _WatchedFile(file)
        self.rows = rows
        try:
            if not file.seek(0, os.SEEK_END):
                raise ReadError("empty", f"{rows.uri} has no bytes")
            self.parquet = open_parquet(self.file, buffer_size=BUFFER_BYTES, page_checksum_verification=True)
            schema = self.parquet.schema_arrow
            check_counts(self.parquet.metadata)
        except BAD_BYTES as error:
            self.file.check()
            raise ReadError("corrupt", f"{rows.uri} cannot be read as Parquet: {message_line(error)}") from error
        rows.total = self.parquet.metadata.num_rows
        self.column = _column(schema, options.image_column, rows.uri)
        self.has_paths = pa.types.is_struct(schema.field(self.column).type)
        self.keep = [name for name in options.keep if schema.names.count(name) == 1]

    def records(self) -> Iterator[Record]:
        first = 0
        for group in range(self.parquet.num_row_groups):
            if self.rows.row >= self.rows.stop:
                return
            stop = first + self.parquet.metadata.row_group(group).num_rows
            yield from self._group(group, stop)
            first = stop

    def _group(self, group: int, stop: int) -> Iterator[Record]:
        """A row group's records; those that cannot be read are errors, the next row group is another matter."""
        try:
            if self.rows.wants(stop):
                for batch in self._batches(group, [self.column, *self.keep]):
                    yield from self._batch(batch.slice(0, stop - self.rows.row))
                if self.rows.row < stop:
                    raise pa.ArrowInvalid(f"it ends {stop - self.rows.row} rows early")
            else:
                self._skip(group, stop)
        except BAD_BYTES as error:
            self.file.check()
            yield from self._lost(group, stop, error)

    def _batches(self, group: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
        return self.parquet.iter_batches(BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False)  # type: ignore[no-any-return]

    def _batch(self, batch: pa.RecordBatch) -> Iterator[Record]:
        images, paths = batch.column(self.column), [None] * len(batch)
        if self.has_paths:
            paths = values_of(pc.struct_field(images, "path"))
            images = pc.struct_field(images, "bytes")
        wanted = self.rows.wants(self.rows.row + len(batch))
        kept = rows_of(batch, self.keep) if self.keep and wanted else [{}] * len(batch)
        for image, path, values in zip(images, paths, kept, strict=True):
            if self._begin(path):
                data = image.as_py()
                yield self.rows.record(self._null(path) if data is None else data, values)
            self.rows.advance()

    def _begin(self, path: str | None) -> bool:
        return self.rows.begin(str(self.rows.row if path is None else path), is_unique=not self.has_paths)

    def _null(self, path: str | None) -> ReadError:
        only = f" but the path {path}" if path else ""
        return ReadError("null", f"{self.rows.uri}: row {self.rows.row} has no bytes in {self.column}{only}")

    def _skip(self, group: int, stop: int) -> None:
        """Pass over a row group; its paths are read all the same, for image_ids depend on the paths before."""
        if self.has_paths:
            for batch in self._batches(group, [f"{self.column}.path"]):
                for path in values_of(pc.struct_field(batch.column(0), "path").slice(0, stop - self.rows.row)):
                    self._begin(path)
                    self.rows.advance()
        self.rows.advance(stop - self.rows.row)

    def _lost(self, group: int, stop: int, error: Exception) -> Iterator[Record]:
        message = f"{self.rows.uri}: row group {group} is broken: {message_line(error)}"
        while self.rows.row < stop:
            if self._begin(None):
                yield self.rows.record(ReadError("corrupt", message), {})
            self.rows.advance()


def _column(schema: pa.Schema, image_column: str | None, uri: str) -> str:
    try:
        column = find_image_column(schema, image_column, uri)
        only(schema, column, uri)
        return column
    except InputRefused as error:
        raise ReadError("unreadable", str(error)) from error


def _holds_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        return {"bytes", "path"} <= fields.keys() and _holds_bytes(fields["bytes"])
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))
