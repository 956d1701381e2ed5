"""Parquet files: each row is an image, in a column of bytes or of structs with bytes, as Hugging Face writes them."""

import os
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.coverage import Ranges
from pipeline.errors import InputRefused, ReadError, message_line
from pipeline.sources.base import Contents, NoImages, ReadOptions, Record, ShardEnd, Source
from pipeline.sources.records import Rows, WatchedFile, check_unique, rows_of, storage_fault, values_of
from pipeline.sources.shard import Shard
from pipeline.storage import access
from pipeline.storage.parquet import open_parquet

IMAGE_NAMES = ("image", "img", "bytes", "jpg", "jpeg", "png", "webp", "data", "content")
BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20
"""Read buffer per column chunk. Without a buffer pyarrow holds whole row groups in memory."""

BAD_BYTES = (pa.ArrowException, OSError, ValueError)
"""Exceptions that pyarrow raises for broken bytes."""


def find_image_column(schema: pa.Schema, image_column: str | None, uri: str) -> str:
    """The column of image bytes: `image_column`, or one with a usual name, or the only one.

    Raises NoImages if no column can hold images or if a run of Nightshift wrote the file, and otherwise InputRefused.
    """
    names: list[str] = [field.name for field in schema if _holds_bytes(field.type)]
    if b"nightshift" in (schema.metadata or {}) and not image_column:
        raise NoImages(f"{uri} was written by a run of Nightshift: it holds results, not images")
    lists = [field.name for field in schema if _holds_list(field.type)]
    if not names and not lists and image_column not in schema.names:
        raise NoImages(
            f"{uri} has no column of image bytes (binary, or a struct with bytes); "
            f"it has {', '.join(f'{field.name} ({field.type})' for field in schema)}"
        )
    if image_column:
        if image_column in names:
            return image_column
        if image_column in lists:
            raise _several_per_row(uri, image_column)
        reason = f"{uri} has only the columns {', '.join(schema.names)}"
        if image_column in schema.names:
            reason = f"it is {schema.field(image_column).type} in {uri}, not binary or a struct with bytes"
        raise InputRefused(f"--image-column {image_column}: {reason}")
    by_lower_name = {name.lower(): name for name in reversed(names)}
    for name in IMAGE_NAMES:
        if name in by_lower_name:
            return by_lower_name[name]
    if len(names) == 1:
        return names[0]
    if not names:
        raise _several_per_row(uri, lists[0])
    raise InputRefused(f"{uri} has several columns of bytes: choose one of {', '.join(names)} with --image-column")


def _several_per_row(uri: str, column: str) -> InputRefused:
    return InputRefused(
        f"{uri}: the column {column!r} holds a list of images per row; write one row per image, as UNNEST in SQL or "
        "explode in pandas does"
    )


def shard_rows(uri: str) -> tuple[int, pa.Schema]:
    """Number of rows and schema of a Parquet file. Reads only the footer. Raises BAD_BYTES."""
    with access.open_read(uri) as file:
        parquet = open_parquet(file)
        check_counts(parquet.metadata)
        schema = parquet.schema_arrow
        _ = schema.names  # decodes the names, which may fail
        return parquet.metadata.num_rows, schema


def check_counts(metadata: pq.FileMetaData) -> None:
    """Raise pa.ArrowInvalid if the footer's number of rows is not the sum over its row groups.

    A wrong number would become as many error rows. The column chunks hold further counts, but pyarrow's `column()` ends
    the whole process on some broken footers.
    """
    counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if min(counts, default=0) < 0 or metadata.num_rows != sum(counts):
        raise pa.ArrowInvalid(f"the footer says {metadata.num_rows} rows, its row groups {sum(counts)}")


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the row groups that contain rows of `todo`. The contract is in `pipeline.sources.base`."""
    rows = Rows(shard, todo)
    fault = None
    try:
        with access.open_read(shard.uri, shard.etag) as file:
            yield from _Reader(file, rows, options).records()
    except ReadError as error:
        fault = error
    except OSError as error:
        fault = storage_fault(rows.uri, error)
    yield from rows.finish(fault)


class _Reader:
    """One pass over a file. Raises ReadError if the whole file is broken, and OSError if the storage fails."""

    def __init__(self, file: BinaryIO, rows: Rows, options: ReadOptions) -> None:
        self.file = WatchedFile(file)
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
        type_ = schema.field(self.column).type
        self.is_struct = pa.types.is_struct(type_)
        self.has_paths = self.is_struct and type_.get_field_index("path") >= 0
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
        """The records of a row group. If it is broken, its remaining rows are errors and the next row group is read."""
        try:
            if self.rows.wants(stop):
                for batch in self._batches(group, [self.column, *self.keep]):
                    yield from self._batch(batch.slice(0, stop - self.rows.row))
                if self.rows.row < stop:
                    raise pa.ArrowInvalid(f"{stop - self.rows.row} rows are missing at its end")
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
        if self.is_struct:
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
        hint = f", only the path {path}" if path else ""
        return ReadError("null", f"{self.rows.uri}: row {self.rows.row} has no bytes in {self.column}{hint}")

    def _skip(self, group: int, stop: int) -> None:
        """Skip a row group. Its paths are read all the same, since later image_ids depend on them."""
        if self.has_paths:
            for batch in self._batches(group, [f"{self.column}.path"]):
                for path in values_of(pc.struct_field(batch.column(0), "path").slice(0, stop - self.rows.row)):
                    self._begin(path)
                    self.rows.advance()
        self.rows.advance(stop - self.rows.row)

    def _lost(self, group: int, stop: int, error: Exception) -> Iterator[Record]:
        """Errors for the remaining rows of a broken row group."""
        message = f"{self.rows.uri}: row group {group} is broken: {message_line(error)}"
        while self.rows.row < stop:
            if self._begin(None):
                yield self.rows.record(ReadError("corrupt", message), {})
            self.rows.advance()


def _column(schema: pa.Schema, image_column: str | None, uri: str) -> str:
    """The column of image bytes. Raises ReadError, since the file may have changed after it was planned."""
    try:
        column = find_image_column(schema, image_column, uri)
        check_unique(schema, column, uri)
        return column
    except InputRefused as error:
        raise ReadError("unreadable", str(error)) from error


def _holds_bytes(type_: pa.DataType) -> bool:
    if pa.types.is_struct(type_):
        fields = {field.name: field.type for field in type_}
        return "bytes" in fields and _holds_bytes(fields["bytes"]) and not pa.types.is_struct(fields["bytes"])
    if pa.types.is_dictionary(type_):
        return _holds_bytes(type_.value_type)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_) or pa.types.is_binary_view(type_))


def _holds_list(type_: pa.DataType) -> bool:
    is_list = pa.types.is_list(type_) or pa.types.is_large_list(type_) or pa.types.is_fixed_size_list(type_)
    return bool(is_list and _holds_bytes(type_.value_type))


def inspect(uri: str, options: ReadOptions) -> Contents:
    """Rows and types of kept columns, from the footer. Raises ReadError, NoImages and InputRefused."""
    try:
        rows, schema = shard_rows(uri)
    except BAD_BYTES as error:
        raise ReadError("corrupt", message_line(error)) from error
    check_unique(schema, find_image_column(schema, options.image_column, uri), uri)
    for name in options.keep:
        if name not in schema.names:
            raise InputRefused(f"--keep {name}: {uri} has only the columns {', '.join(schema.names)}")
        check_unique(schema, name, uri)
    return Contents(rows, {name: schema.field(name).type for name in options.keep})


SOURCE = Source("parquet", (".parquet",), read, inspect, reads_header=True)
