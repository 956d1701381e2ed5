"""Parts: Parquet files of results and of errors. Encode, read, rewrite without some rows, and remove them."""

import io
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import coverage, schema
from pipeline.errors import OutputRefused, message_line
from pipeline.output import embedding_metadata
from pipeline.output.commit import ERRORS, RESULTS, Commit
from pipeline.output.geoparquet import GEOMETRY, NATIVE, WKB_ONLY, geo_metadata, has_footprints, version_of, with_type
from pipeline.output.ledger import commit_uri
from pipeline.storage import access, uris
from pipeline.storage.parquet import open_parquet

MAX_ROW_GROUP_BYTES = 128 << 20
"""Limit of a row group in memory. Readers hold whole row groups. Vectors of int8 count as the float32 they become."""


def write_part(output: str, path: str, data: bytes) -> None:
    """Write a part. Some readers of its folder, such as Daft, would open a temporary file there."""
    access.write(uris.join(output, path), data, temporary_folder=output)


def read_part(uri: str, columns: list[str] | None = None) -> pa.Table:
    """Read a file of results or errors, and check the checksum of every page.

    Raises FileNotFoundError, and OSError or pa.ArrowException if the file is damaged.
    """
    file = io.BytesIO(access.read(uri))
    return open_parquet(file, page_checksum_verification=True).read(columns, use_threads=False)


def read_committed(output: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """Read a file that a commit names. Raises OutputRefused if it cannot be read."""
    uri = uris.join(output, name)
    try:
        return read_part(uri, columns)
    except (OSError, pa.ArrowException) as error:
        raise OutputRefused(
            f"{uri} cannot be read: {message_line(error)}; run jobs/verify.py {output} --repair, which removes it, and "
            "then the same command without --update, which computes it again"
        ) from error


def drop_rows(output: str, dropped: Mapping[int, coverage.Ranges], commit: Commit, attempt: int) -> Commit | None:
    """Drop rows from a commit and from its files.

    Returns the commit itself if it has none of the rows, a new commit of this attempt with the other rows, or None if
    no other rows exist. The old files stay until the next sweep. Raises OutputRefused if a file cannot be read.
    """
    if gone := [shard for shard in commit.left_out if (0, coverage.END) in dropped.get(shard, ())]:
        left_out = {shard: counts for shard, counts in commit.left_out.items() if shard not in gone}
        commit = replace(commit, left_out=left_out)
    left = {shard: coverage.subtract(ranges, dropped.get(shard, ())) for shard, ranges in commit.ranges.items()}
    left = {shard: ranges for shard, ranges in left.items() if ranges}
    if left == commit.ranges:
        return commit
    totals = {shard: rows for shard, rows in commit.totals.items() if shard in left}
    if not left:
        return None
    shard = min(left)
    name = f"part-{attempt:04d}-{shard:06d}-{left[shard][0][0]:08d}"
    file_name = f"{name}-{uuid.uuid4().hex[:8]}.parquet"
    part = _without(output, commit.part, f"{RESULTS}/{file_name}", left)
    errors = _without(output, commit.errors_part, f"{ERRORS}/{file_name}", left)
    rewritten = replace(
        commit,
        name=name,
        attempt=attempt,
        part=f"{RESULTS}/{file_name}" if part is not None else None,
        errors_part=f"{ERRORS}/{file_name}" if errors is not None else None,
        ranges=left,
        totals=totals,
        left_out={shard: counts for shard, counts in commit.left_out.items() if shard in totals},
        rows=0 if part is None else len(part),
        errors=0 if errors is None else len(errors),
        errors_by_type={} if errors is None else count_errors(errors),
        nulls={} if part is None else count_nulls(part),
        constant={
            shard: kept
            for shard, ranges in commit.constant.items()
            if (kept := coverage.intersect(ranges, left.get(shard, ())))
        },
        empty=sum(map(coverage.count, left.values()))
        - sum(len(table) for table in (part, errors) if table is not None),
    )
    # An attempt that never began may have left a commit of this name, which does not count.
    access.write(commit_uri(output, name), rewritten.to_json().encode())
    return rewritten


def _without(output: str, old: str | None, new: str, left: Mapping[int, coverage.Ranges]) -> pa.Table | None:
    """Copy the rows that are left in a file to a new file, and return them; None, without a file, if none are left."""
    if old is None:
        return None
    table = read_committed(output, old)
    keys = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
    kept = table.filter(pa.array([coverage.contains(left.get(shard, ()), row) for shard, row in keys], pa.bool_()))
    if not len(kept):
        return None
    footer = table.schema.metadata[b"nightshift"].decode()
    version = version_of(table.schema.metadata)
    more = embedding_metadata.text_of(table.schema.metadata)
    write_part(output, new, encode(kept, footer, version, more, **column_options(kept.schema, version)))
    return kept


def remove(output: str, commit: Commit) -> None:
    """Remove a commit: first the record, then its files."""
    access.delete(commit_uri(output, commit.name))
    for path in commit.files:
        access.delete(uris.join(output, path))


def column_options(result: pa.Schema, geoparquet: str = WKB_ONLY) -> dict[str, Any]:
    """Options of `encode` for results: no dictionary and no statistics for vectors, because they only cost time.

    The bytes of WKB have no useful minimum; the native type has a box instead. Parquet stores int8 in 4 bytes; with a
    dictionary of its 256 values it is 1.
    """
    without = () if geoparquet == NATIVE else (GEOMETRY,)
    plain = [name for f in result if not schema.is_vector(f.type) and f.name not in without for name in _leaves(f)]
    strings = [f.name for f in result if pa.types.is_string(f.type)]
    small = [f"{f.name}.list.{f.type.value_field.name}" for f in result if _is_int8_vector(f.type)]
    return {"use_dictionary": [*strings, *small], "write_statistics": plain}


def _is_int8_vector(type_: pa.DataType) -> bool:
    return schema.is_vector(type_) and type_.value_type == pa.int8()


def _leaves(field: pa.Field) -> list[str]:
    """Paths of the columns that Parquet stores for a field: those of a struct are its fields."""
    if not pa.types.is_struct(field.type):
        return [field.name]
    return [f"{field.name}.{each}" for inner in field.type for each in _leaves(inner)]


def encode(
    table: pa.Table,
    footer: str,
    geoparquet: str = WKB_ONLY,
    more: Mapping[str, str] = MappingProxyType({}),
    **options: Any,
) -> bytes:
    """Encode a table as Parquet with page checksums.

    footer: JSON for the file's metadata, under the key `nightshift`. A table with footprints gets the key `geo` too,
    and its geometry the type of this version of GeoParquet. more: further keys.
    options: of `pyarrow.parquet.write_table`.
    """
    buffer = io.BytesIO()
    geo = {"geo": geo_metadata(table, geoparquet)} if has_footprints(table.schema) else {}
    table = with_type(table, geoparquet).replace_schema_metadata({"nightshift": footer, **geo, **more})
    with pq.ParquetWriter(
        buffer,
        table.schema,
        compression="zstd",
        store_schema=True,
        write_page_index=True,
        write_page_checksum=True,
        **options,
    ) as writer:
        for rows in _row_groups(table):
            writer.write_table(rows, row_group_size=len(rows))
    return buffer.getvalue()


def encode_errors(errors: pa.Table, footer: str) -> bytes:
    """Encode the columns of `schema.ERRORS` as a part of `_errors/`."""
    return encode(errors.select(schema.ERRORS.names).cast(schema.ERRORS), footer)


def _row_groups(table: pa.Table) -> Iterator[pa.Table]:
    """Halve a table until each piece is at most MAX_ROW_GROUP_BYTES or one row."""
    if _bytes_when_read(table) <= MAX_ROW_GROUP_BYTES or len(table) == 1:
        if len(table):  # Hugging Face datasets cannot read a row group without rows
            yield table
    else:
        half = len(table) // 2
        yield from _row_groups(table[:half])
        yield from _row_groups(table[half:])


def _bytes_when_read(table: pa.Table) -> int:
    growth = 3 * table[schema.EMBEDDING].nbytes if schema.has_scaled_vectors(table.schema) else 0
    return int(table.nbytes + growth)


def count_nulls(rows: pa.Table) -> dict[str, int]:
    """Count the null values by column. Leaves out the columns that have none."""
    counts = {name: rows[name].null_count for name in rows.schema.names}
    return {name: count for name, count in counts.items() if count}


def count_errors(errors: pa.Table) -> dict[str, int]:
    """Count the rows of an errors table by `<stage>/<error_type>`."""
    kinds = zip(errors["stage"].to_pylist(), errors["error_type"].to_pylist(), strict=True)
    return dict(Counter(f"{stage}/{error_type}" for stage, error_type in kinds))
