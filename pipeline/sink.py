"""The sink: rows → one part, its errors, then its commit. The commit is what makes them exist."""

import io
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import coverage, schema, storage, usage
from pipeline.errors import OutputRefused, message_line
from pipeline.ledger import Commit, commit_uri
from pipeline.parquet import open_parquet

ROW_GROUP_ROWS = 20_000


@dataclass(frozen=True, slots=True)
class Sink:
    """Writes the parts of one attempt; called with the rows of one part at a time, in any worker.

    result_schema: of a part. footer: JSON that every part bears under the key `nightshift`.
    """

    output: str
    attempt: int
    result_schema: pa.Schema
    footer: str

    def __call__(self, table: pa.Table) -> str | None:
        """Write the rows, commit them, and return the commit as JSON; None where there are no rows."""
        started = time.perf_counter()
        return self._write(_sorted_once(table), started).to_json() if len(table) else None

    def _write(self, table: pa.Table, started: float) -> Commit:
        name = f"part-{self.attempt:04d}-{table['shard'][0].as_py():06d}-{table['row'][0].as_py():08d}"
        file_name = f"{name}-{uuid.uuid4().hex[:8]}.parquet"  # a try again never writes over the try before it
        is_image = pc.is_null(table[schema.SHARD_ROWS])
        is_error = pc.is_valid(table["error_type"])
        rows = table.filter(pc.and_(is_image, pc.invert(is_error)))
        errors = table.filter(is_error)
        files: dict[str, bytes] = {}
        if len(rows):
            files[file_name] = self._part(rows)
        if len(errors):
            files[f"_errors/{file_name}"] = self._errors(errors)
        for file, data in files.items():
            storage.write(storage.join(self.output, file), data)
        images = table.filter(is_image)
        commit = Commit(
            name=name,
            attempt=self.attempt,
            part=file_name if len(rows) else None,
            errors_part=file_name if len(errors) else None,
            ranges=_ranges(images),
            totals=_totals(table.filter(pc.invert(is_image))),
            rows=len(rows),
            errors=len(errors),
            errors_by_type=_errors_by_type(errors),
            seconds={name.removesuffix("_seconds"): _sum(table[name]) for name in schema.SECONDS.names},
            bytes_read=int(_sum(table["size_bytes"])),
            networks=dict(Counter(rows["network"].to_pylist())),
            core_seconds=_sum(table["core_seconds"]) + usage.take_core_seconds(),
            gpu_seconds=_sum(table["gpu_seconds"]),
            bytes_written=sum(map(len, files.values())),
        )
        commit.seconds["write"] = time.perf_counter() - started
        return self._commit(commit)

    def _commit(self, commit: Commit) -> Commit:
        """Create the commit. If this part was committed before, by an earlier try of the same task, that one stands."""
        try:
            storage.create(commit_uri(self.output, commit.name), commit.to_json().encode())
            return commit
        except FileExistsError:
            standing = Commit.from_json(storage.read(commit_uri(self.output, commit.name)))
        if (standing.part, standing.errors_part) != (commit.part, commit.errors_part):
            if commit.part:
                storage.delete(storage.join(self.output, commit.part))
            if commit.errors_part:
                storage.delete(storage.join(self.output, f"_errors/{commit.errors_part}"))
        return standing

    def _part(self, rows: pa.Table) -> bytes:
        table = rows.select(self.result_schema.names).cast(self.result_schema)
        return _parquet(table, self.footer, **_options(self.result_schema))

    def _errors(self, errors: pa.Table) -> bytes:
        return _parquet(errors.select(schema.ERRORS.names).cast(schema.ERRORS), self.footer)


def retire(output: str, retired: Mapping[int, coverage.Ranges], commit: Commit, attempt: int) -> Commit | None:
    """A commit without the rows that were taken back: itself, a new one of this attempt, or None if nothing is left."""
    left = {shard: coverage.subtract(ranges, retired.get(shard, ())) for shard, ranges in commit.ranges.items()}
    left = {shard: ranges for shard, ranges in left.items() if ranges}
    if left == commit.ranges:
        return commit
    totals = {shard: rows for shard, rows in commit.totals.items() if shard in left}
    if not left:
        return None
    shard = min(left)
    name = f"part-{attempt:04d}-{shard:06d}-{left[shard][0][0]:08d}"
    file_name = f"{name}-{uuid.uuid4().hex[:8]}.parquet"
    part = _without(output, commit.part, file_name, left)
    errors = _without(output, commit.errors_part and f"_errors/{commit.errors_part}", f"_errors/{file_name}", left)
    made = replace(
        commit,
        name=name,
        attempt=attempt,
        part=file_name if part is not None else None,
        errors_part=file_name if errors is not None else None,
        ranges=left,
        totals=totals,
        rows=0 if part is None else len(part),
        errors=0 if errors is None else len(errors),
        errors_by_type={} if errors is None else _errors_by_type(errors),
    )
    # Of an attempt that never began there may be one of this name; nobody has counted it.
    storage.write(commit_uri(output, name), made.to_json().encode())
    return made


def read_part(uri: str, columns: list[str] | None = None) -> pa.Table:
    """A part, or a part of `_errors/`. Raises OSError and pa.ArrowException where a page is not what was written."""
    file = io.BytesIO(storage.read(uri))
    return open_parquet(file, page_checksum_verification=True).read(columns, use_threads=False)


def read_back(output: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """A part of finished work that a run needs again. Raises OutputRefused where it cannot be read."""
    uri = storage.join(output, name)
    try:
        return read_part(uri, columns)
    except (OSError, pa.ArrowException) as error:
        raise OutputRefused(
            f"{uri} cannot be read: {message_line(error)}; jobs/verify.py {output} --repair takes it back, and the "
            "same command without --update makes it anew"
        ) from error


def _without(output: str, old: str | None, new: str, left: Mapping[int, coverage.Ranges]) -> pa.Table | None:
    """Copy the rows that are left of a file into a new one; None, and no file, if there are none."""
    if old is None:
        return None
    table = read_back(output, old)
    keys = zip(table["shard"].to_pylist(), table["row"].to_pylist(), strict=True)
    kept = table.filter(pa.array([coverage.contains(left.get(shard, ()), row) for shard, row in keys], pa.bool_()))
    if not len(kept):
        return None
    footer = table.schema.metadata[b"nightshift"].decode()
    storage.write(storage.join(output, new), _parquet(kept, footer, **_options(kept.schema)))
    return kept


def remove(output: str, commit: Commit) -> None:
    """Take a commit back: first the record, then its files."""
    storage.delete(commit_uri(output, commit.name))
    if commit.part:
        storage.delete(storage.join(output, commit.part))
    if commit.errors_part:
        storage.delete(storage.join(output, f"_errors/{commit.errors_part}"))


def _options(result: pa.Schema) -> dict[str, Any]:
    """No dictionary and no statistics on vectors: they would cost much and tell nothing."""
    plain = [f.name for f in result if not _is_vector(f.type)]
    words = [name for name in plain if pa.types.is_string(result.field(name).type)]
    return {"use_dictionary": words, "write_statistics": plain}


def _parquet(table: pa.Table, footer: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    table = table.replace_schema_metadata({"nightshift": footer})
    pq.write_table(
        table,
        buffer,
        compression="zstd",
        row_group_size=ROW_GROUP_ROWS,
        store_schema=True,
        write_page_checksum=True,
        **options,
    )
    return buffer.getvalue()


def _sorted_once(table: pa.Table) -> pa.Table:
    """By (shard, row), each image once: a lost block that was made again may come twice."""
    table = table.sort_by([("shard", "ascending"), ("row", "ascending"), (schema.SHARD_ROWS, "ascending")])
    keys = np.stack([_int64(table[name]) for name in ("shard", "row", schema.SHARD_ROWS)])
    is_new = np.ones(len(table), bool)
    is_new[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    return table if is_new.all() else table.filter(pa.array(is_new))


def _int64(column: pa.ChunkedArray) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.asarray(pc.fill_null(column.cast(pa.int64()), -1).to_numpy())


def _ranges(images: pa.Table) -> dict[int, coverage.Ranges]:
    shards, rows = _int64(images["shard"]), _int64(images["row"])
    cuts = np.flatnonzero((np.diff(shards) != 0) | (np.diff(rows) != 1)) + 1
    found: dict[int, coverage.Ranges] = {}
    for first, last in zip([0, *cuts], [*(cuts - 1), len(rows) - 1], strict=True):
        if last >= first:
            found[int(shards[first])] = (*found.get(int(shards[first]), ()), (int(rows[first]), int(rows[last]) + 1))
    return found


def _totals(ends: pa.Table) -> dict[int, int]:
    return dict(zip(ends["shard"].to_pylist(), ends[schema.SHARD_ROWS].to_pylist(), strict=True))


def _errors_by_type(errors: pa.Table) -> dict[str, int]:
    kinds = zip(errors["stage"].to_pylist(), errors["error_type"].to_pylist(), strict=True)
    return dict(Counter(f"{stage}/{error_type}" for stage, error_type in kinds))


def _sum(column: pa.ChunkedArray) -> float:
    return float(pc.sum(column.cast(pa.float64())).as_py() or 0.0)


def _is_vector(type_: pa.DataType) -> bool:
    return bool(pa.types.is_fixed_size_list(type_))
