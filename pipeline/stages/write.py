"""rows → a part, its errors, then the commit that makes them count."""

import json
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import coverage, schema
from pipeline.output import embedding_metadata
from pipeline.output.commit import ERRORS, RESULTS, Commit
from pipeline.output.geoparquet import WKB_ONLY
from pipeline.output.ledger import commit_uri
from pipeline.output.parts import column_options, count_errors, count_nulls, encode, encode_errors, write_part
from pipeline.stages import usage
from pipeline.stages.ground_resolution import metres_per_pixel
from pipeline.storage import access, uris

MAX_EXPANDED_BYTES = 256 << 20
"""In memory. Rows with repeats are expanded in pieces of this size, each of which is a part of its own."""


@dataclass(frozen=True, slots=True)
class Sink:
    """Writes the parts of one attempt. Called with the rows of one part at a time, in any worker.

    result_schema: of a part. footer: JSON that every part has under the key `nightshift`. geoparquet: version of parts
    with footprints. embeddings: fields of `output.embedding_metadata`.
    """

    output: str
    attempt: int
    result_schema: pa.Schema
    footer: str
    geoparquet: str = WKB_ONLY
    embeddings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, table: pa.Table) -> str | None:
        """Write the rows, commit them, and return the commits as lines of JSON; None if there are no rows.

        There is one commit, unless the repeats of the rows fill several parts.
        """
        commits = []
        started = time.perf_counter()
        for rows in _expanded(_sorted_once(table)) if len(table) else ():
            commits.append(self._write(rows, started).to_json())
            started = time.perf_counter()
        return "\n".join(commits) or None

    def _write(self, table: pa.Table, started: float) -> Commit:
        name = f"part-{self.attempt:04d}-{table['shard'][0].as_py():06d}-{table['row'][0].as_py():08d}"
        file_name = f"{name}-{uuid.uuid4().hex[:8]}.parquet"  # a retry never overwrites an earlier try
        is_image = pc.is_null(table[schema.SHARD_ROWS])
        is_error = pc.is_valid(table["error_type"])
        is_empty = pc.and_(is_image, pc.fill_null(table[schema.IS_EMPTY], False))
        rows = table.filter(pc.and_not(pc.and_not(is_image, is_error), is_empty))
        errors = table.filter(is_error)
        images, ends = table.filter(is_image), table.filter(pc.invert(is_image))
        files: dict[str, bytes] = {}
        if len(images):  # all of them may be errors: the results then are a table without rows
            files[f"{RESULTS}/{file_name}"] = self._part(rows)
        if len(errors):
            files[f"{ERRORS}/{file_name}"] = encode_errors(errors, self.footer)
        for path, data in files.items():
            write_part(self.output, path, data)
        commit = Commit(
            name=name,
            attempt=self.attempt,
            part=f"{RESULTS}/{file_name}" if len(images) else None,
            errors_part=f"{ERRORS}/{file_name}" if len(errors) else None,
            ranges=_ranges(images),
            totals=_totals(ends),
            left_out=_left_out(ends),
            rows=len(rows),
            errors=len(errors),
            errors_by_type=count_errors(errors),
            seconds={name.removesuffix("_seconds"): _sum(table[name]) for name in schema.SECONDS.names},
            bytes_read=int(_sum(table["size_bytes"])),
            networks=dict(Counter(rows["network"].to_pylist())),
            core_seconds=_sum(table["core_seconds"]) + usage.take_core_seconds(),
            gpu_seconds=_sum(table["gpu_seconds"]),
            bytes_written=sum(map(len, files.values())),
            nulls=count_nulls(rows.select(self.result_schema.names)),
            constant=_ranges(rows.filter(pc.fill_null(rows[schema.CONSTANT], False))),
            empty=pc.sum(is_empty).as_py() or 0,
        )
        commit.seconds["write"] = time.perf_counter() - started
        return self._commit(commit)

    def _commit(self, commit: Commit) -> Commit:
        """Create the commit. If an earlier try of the same task has committed this part, keep that commit."""
        try:
            access.create(commit_uri(self.output, commit.name), commit.to_json().encode())
            return commit
        except FileExistsError:
            earlier = Commit.from_json(access.read(commit_uri(self.output, commit.name)))
        if earlier.files != commit.files:
            for path in commit.files:
                access.delete(uris.join(self.output, path))
        return earlier

    def _part(self, rows: pa.Table) -> bytes:
        table = rows.select(self.result_schema.names).cast(self.result_schema)
        more = embedding_metadata.to_text(self._embeddings(table))
        return encode(table, self.footer, self.geoparquet, more, **column_options(self.result_schema, self.geoparquet))

    def _embeddings(self, rows: pa.Table) -> dict[str, Any]:
        """The fields of the run with those of these rows."""
        if not self.embeddings:
            return {}
        now = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
        metres = None if "gsd" in self.embeddings else metres_per_pixel(rows)
        return {**self.embeddings, **({"gsd": metres} if metres else {}), "processing:datetime": now}


def _sorted_once(table: pa.Table) -> pa.Table:
    """Sort by (shard, row), and keep each image once: a lost block that Ray computes again may come twice."""
    table = table.sort_by([("shard", "ascending"), ("row", "ascending"), (schema.SHARD_ROWS, "ascending")])
    keys = np.stack([_int64(table[name]) for name in ("shard", "row", schema.SHARD_ROWS)])
    is_new = np.ones(len(table), bool)
    is_new[1:] = (keys[:, 1:] != keys[:, :-1]).any(axis=0)
    return table if is_new.all() else table.filter(pa.array(is_new))


def _expanded(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows with their repeats as rows of their own, in pieces of about MAX_EXPANDED_BYTES."""
    repeats = table[schema.REPEATS].combine_chunks()
    counts = 1 + np.asarray(pc.fill_null(pc.list_value_length(repeats), 0).to_numpy(zero_copy_only=False), np.int64)
    table = table.drop_columns([schema.REPEATS])
    if counts.max() == 1:
        yield table
        return
    origins = np.repeat(np.arange(len(table)), counts)
    numbers = np.arange(len(origins)) - np.repeat(np.cumsum(counts) - counts, counts)  # 0 for the row itself
    places = np.cumsum(numbers > 0) - 1  # in the flat list of all repeats
    flat = repeats.flatten()
    size = max(1, MAX_EXPANDED_BYTES * len(table) // table.nbytes)
    for start in range(0, len(origins), size):
        piece = slice(start, start + size)
        yield _with_repeats(table.take(origins[piece]), numbers[piece], flat.take(places[piece].clip(0)))


def _with_repeats(rows: pa.Table, numbers: "np.ndarray[Any, np.dtype[np.int64]]", repeats: pa.StructArray) -> pa.Table:
    """Rows that are copies of an original become its repeats. numbers: 0 for an original, then 1, 2 …

    The original has the time and the bytes of all of them.
    """
    is_repeat = pa.array(numbers > 0)
    columns = {name: rows[name] for name in rows.column_names}
    for each in repeats.type:
        columns[each.name] = pc.if_else(is_repeat, repeats.field(each.name), columns[each.name])
    for name in (*schema.SECONDS.names, *schema.USAGE.names, "size_bytes"):
        columns[name] = pc.if_else(is_repeat, pa.scalar(0, columns[name].type), columns[name])
    columns["row"] = pc.add(columns["row"], pa.array(numbers))
    return pa.table(columns, schema=rows.schema)


def _int64(column: pa.ChunkedArray) -> "np.ndarray[Any, np.dtype[np.int64]]":
    return np.asarray(pc.fill_null(column.cast(pa.int64()), -1).to_numpy())


def _ranges(images: pa.Table) -> dict[int, coverage.Ranges]:
    shards, rows = _int64(images["shard"]), _int64(images["row"])
    cuts = np.flatnonzero((np.diff(shards) != 0) | (np.diff(rows) != 1)) + 1
    ranges: dict[int, coverage.Ranges] = {}
    for first, last in zip([0, *cuts], [*(cuts - 1), len(rows) - 1], strict=True):
        if last >= first:
            shard = int(shards[first])
            ranges[shard] = (*ranges.get(shard, ()), (int(rows[first]), int(rows[last]) + 1))
    return ranges


def _totals(ends: pa.Table) -> dict[int, int]:
    return dict(zip(ends["shard"].to_pylist(), ends[schema.SHARD_ROWS].to_pylist(), strict=True))


def _left_out(ends: pa.Table) -> dict[int, dict[str, int]]:
    texts = zip(ends["shard"].to_pylist(), ends[schema.SHARD_LEFT_OUT].to_pylist(), strict=True)
    return {shard: json.loads(text) for shard, text in texts if text}


def _sum(column: pa.ChunkedArray) -> float:
    return float(pc.sum(column.cast(pa.float64())).as_py() or 0.0)
