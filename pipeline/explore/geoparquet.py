"""GeoParquet in the order of a Hilbert curve, or in partitions, so that a query by place reads few row groups.

This is an external sort: rows are counted by their place on the curve, written to temporary files that each hold a
stretch of it, and sorted file by file. Memory holds one such file. Needs the extra [geo].
"""

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from numpy.typing import NDArray

from pipeline.errors import SettingRefused
from pipeline.explore.view import View
from pipeline.output import embedding_metadata
from pipeline.output.geoparquet import BBOX, CORNERS, GEOMETRY, WKB_ONLY, geo_metadata, with_type
from pipeline.output.parts import column_options

GROUP_ROWS = 10_000
"""Rows of a row group, the unit that a reader skips."""
BUCKET_BYTES = 128 << 20
MAX_BUCKETS = 256
"""Temporary files that are open at the same time. Beyond BUCKET_BYTES times this many, memory grows with the output."""
BIN_BITS = 16
"""Rows are counted in bins of 2^BIN_BITS places on the curve."""
CODE = "__place__"
"""The column with a row's place in the order, in the temporary files."""
NO_VALUE = "__HIVE_DEFAULT_PARTITION__"

Codes = NDArray[np.uint64]


@dataclass
class Written:
    """rows, without_geometry: numbers of rows. files: number of files."""

    rows: int = 0
    without_geometry: int = 0
    files: int = 0


def write_sorted(
    output: View,
    names: Sequence[str],
    path: Path,
    sort: str,
    partition_by: str | None,
    version: str = WKB_ONLY,
) -> Written:
    """Write the columns `names`, with geometry and bbox, to a file, or to a folder if `partition_by` is given.

    sort: hilbert or none. partition_by: `grid` (cells of one degree), `zoom` (column tile_z) or `datetime` (month).
    version: of GeoParquet. Raises SettingRefused for a column that the output lacks.
    """
    key_columns = _key_columns(output, partition_by)
    order = _Order(output, sort, partition_by, key_columns, version)
    with tempfile.TemporaryDirectory(prefix="buckets-", dir=path.parent) as folder:
        buckets = _Buckets(Path(folder), order, output, names, key_columns)
        buckets.fill()
        return _write_buckets(buckets, path, order, output, is_partitioned=partition_by is not None)


def _key_columns(output: View, partition_by: str | None) -> list[str]:
    """The columns that partitions follow from, beside bbox."""
    column = {"zoom": "tile_z", "datetime": "datetime"}.get(partition_by or "")
    if column and column not in output.columns:
        raise SettingRefused(
            f"--partition-by {partition_by} needs the column {column}, which {output.uri} does not have; use "
            "--partition-by grid"
        )
    return [column] if column else []


@dataclass
class _Geo:
    """The metadata `geo` of a file, added up over its tables. version: of GeoParquet."""

    version: str = WKB_ONLY
    value: dict[str, Any] = field(default_factory=dict)
    has_bounds: bool = True

    def add(self, table: pa.Table) -> None:
        new = json.loads(geo_metadata(table, self.version))
        column = new["columns"][GEOMETRY]
        if not self.value:
            self.value = new
            self.has_bounds = "bbox" in column
            return
        old = self.value["columns"][GEOMETRY]
        old["geometry_types"] = sorted({*old["geometry_types"], *column["geometry_types"]})
        self.has_bounds &= "bbox" in column
        if self.has_bounds:
            (a, b, c, d), (e, f, g, h) = old["bbox"], column["bbox"]
            old["bbox"] = [min(a, e), min(b, f), max(c, g), max(d, h)]
        else:
            old.pop("bbox", None)


class _Order:
    """The order of rows: by partition, then by place on the curve. Reads the output twice to count.

    keys: names of the partitions, sorted. geo: the metadata of each, which a file must have before its rows. bins: the
    occupied bins, sorted. rows: the number of rows of each.
    """

    def __init__(self, output: View, sort: str, partition_by: str | None, key_columns: list[str], version: str) -> None:
        self.is_curve, self.partition_by, self.version = sort == "hilbert", partition_by, version
        self.bounds = _bounds(output) if self.is_curve else (0.0, 0.0, 1.0, 1.0)
        counts: Counter[tuple[str, int]] = Counter()
        self.geo: dict[str, _Geo] = {}
        seen = 0
        for batch in output.batches([GEOMETRY, BBOX, *key_columns]):
            names = self.names(batch)
            bins = self.places(batch, seen) >> BIN_BITS
            counts.update(zip(names, bins.tolist(), strict=True))
            seen += batch.num_rows
            self._add_geo(batch, names)
        self.keys = sorted({name for name, _ in counts})
        ranks = {name: rank for rank, name in enumerate(self.keys)}
        pairs = sorted((ranks[name] << 32 - BIN_BITS | number, rows) for (name, number), rows in counts.items())
        self.bins = np.array([number for number, _ in pairs], np.uint64)
        self.rows = np.array([rows for _, rows in pairs], np.int64)
        self.ranks: Mapping[str, int] = ranks

    def _add_geo(self, batch: Any, names: list[str]) -> None:
        table = pa.Table.from_batches([batch]).select([GEOMETRY, BBOX])
        each = np.array(names)
        for name in set(names):
            part = table if len(set(names)) == 1 else table.filter(pa.array(each == name))
            self.geo.setdefault(name, _Geo(self.version)).add(part)

    def codes(self, batch: Any, seen: int) -> Codes:
        """The place of each row: the number of its partition, then 32 bits on the curve. seen: rows before these."""
        ranks = np.array([self.ranks[name] for name in self.names(batch)], np.uint64)
        return ranks << np.uint64(32) | self.places(batch, seen).astype(np.uint64)

    def places(self, batch: Any, seen: int) -> NDArray[np.int64]:
        """32 bits: the place on the curve, or the number of the row."""
        if not self.is_curve:
            return (np.arange(seen, seen + batch.num_rows) & 0xFFFFFFFF).astype(np.int64)
        x, y = _centres(batch)
        points = geopandas.GeoSeries(shapely.points(np.nan_to_num(x, nan=self.bounds[0]), np.nan_to_num(y, nan=0.0)))
        return np.asarray(points.hilbert_distance(total_bounds=self.bounds, level=16)).astype(np.int64)

    def names(self, batch: Any) -> list[str]:
        """The partition of each row, as the name of its folder; "" without partitions."""
        if self.partition_by == "grid":
            return [_cell(x, y) for x, y in zip(*_centres(batch), strict=True)]
        if self.partition_by == "zoom":
            return [f"zoom={NO_VALUE if zoom is None else zoom}" for zoom in batch["tile_z"].to_pylist()]
        if self.partition_by == "datetime":
            return [f"month={NO_VALUE if value is None else str(value)[:7]}" for value in batch["datetime"].to_pylist()]
        return [""] * batch.num_rows


def _cell(x: float, y: float) -> str:
    """A cell of one degree, by its south-west corner: `grid=N46E007`."""
    if np.isnan(x):
        return f"grid={NO_VALUE}"
    south, west = min(89, int(np.floor(y))), min(179, int(np.floor(x)))
    return f"grid={'NS'[south < 0]}{abs(south):02d}{'EW'[west < 0]}{abs(west):03d}"


def _centres(batch: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Longitude and latitude of the middle of each bbox, NaN without one; 180° for those across the antimeridian."""
    xmin, ymin, xmax, ymax = (
        np.asarray(pc.struct_field(batch[BBOX], corner).to_numpy(zero_copy_only=False), np.float64)
        for corner in CORNERS
    )
    return np.where(xmax - xmin > 180, 180.0, (xmin + xmax) / 2), (ymin + ymax) / 2


def _bounds(output: View) -> tuple[float, float, float, float]:
    """The range of all footprints."""
    low, high = np.full(2, np.inf), np.full(2, -np.inf)
    for batch in output.batches([BBOX]):
        centres = np.column_stack(_centres(batch))
        centres = centres[~np.isnan(centres).any(axis=1)]
        if len(centres):
            low, high = np.minimum(low, centres.min(axis=0)), np.maximum(high, centres.max(axis=0))
    if not np.isfinite(low).all():
        return 0.0, 0.0, 1.0, 1.0
    high = np.maximum(high, low + 1e-9)
    return float(low[0]), float(low[1]), float(high[0]), float(high[1])


class _Buckets:
    """Temporary files, each with a stretch of the order."""

    def __init__(
        self, folder: Path, order: _Order, output: View, names: Sequence[str], key_columns: Sequence[str]
    ) -> None:
        self.folder, self.order, self.output = folder, order, output
        self.names, self.read_names = list(names), list(dict.fromkeys([*names, BBOX, *key_columns]))
        self.bucket_of_bin = self._assign()

    def _assign(self) -> NDArray[np.int64]:
        """The bucket of each bin: neighbours share one until it is full."""
        first = next(self.output.batches(self.read_names), None)
        row_bytes = max(1, first.nbytes // max(1, first.num_rows)) if first is not None else 1
        total = int(self.order.rows.sum())
        limit = max(BUCKET_BYTES // row_bytes, -(-total // MAX_BUCKETS), 1)
        return (np.cumsum(self.order.rows) - self.order.rows) // limit

    def fill(self) -> None:
        """Read the output, and write each row to the file of its bucket with its place as the column CODE."""
        schema = pa.schema([*(self.output.schema.field(name) for name in self.names), (CODE, pa.uint64())])
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        writers: dict[int, Any] = {}
        seen = 0
        try:
            for batch in self.output.batches(self.read_names):
                codes = self.order.codes(batch, seen)
                seen += batch.num_rows
                bins = np.searchsorted(self.order.bins, codes >> np.uint64(BIN_BITS))
                buckets = self.bucket_of_bin[bins]
                whole = pa.RecordBatch.from_arrays([*(batch[name] for name in self.names), codes], schema=schema)
                for bucket in np.unique(buckets).tolist():
                    if bucket not in writers:
                        writers[bucket] = pa.ipc.new_file(str(self._path(bucket)), schema, options=options)
                    writers[bucket].write_batch(whole.filter(pa.array(buckets == bucket)))
        finally:
            for writer in writers.values():
                writer.close()

    def sorted_tables(self) -> Iterator[pa.Table]:
        """The rows of each bucket in order, with CODE. Removes a bucket when it was read."""
        for bucket in np.unique(self.bucket_of_bin).tolist():
            path = self._path(bucket)
            with pa.OSFile(str(path)) as file:
                table = pa.ipc.open_file(file).read_all()
            path.unlink()
            yield table.take(np.argsort(table[CODE].to_numpy(), kind="stable"))

    def _path(self, bucket: int) -> Path:
        return self.folder / f"{bucket}.arrow"


def _write_buckets(buckets: _Buckets, path: Path, order: _Order, output: View, *, is_partitioned: bool) -> Written:
    written = Written()
    file: _File | None = None
    rank = -1
    for table in buckets.sorted_tables():
        ranks = table[CODE].to_numpy() >> np.uint64(32)
        written.rows += len(table)
        written.without_geometry += table[GEOMETRY].null_count
        rows = table.drop_columns([CODE])
        for each in np.unique(ranks).tolist():
            if each != rank or file is None:
                if file is not None:
                    file.close()
                name = path / order.keys[each] / "part-0.parquet" if is_partitioned else path
                file, rank = _File(name, rows.schema, order.geo[order.keys[each]], output), each
                written.files += 1
            start, stop = np.searchsorted(ranks, [each, each + 1]).tolist()
            file.write(rows[start:stop])
    if file is not None:
        file.close()
    return written


class _File:
    """One GeoParquet file, written in row groups of GROUP_ROWS."""

    def __init__(self, path: Path, schema: pa.Schema, geo: _Geo, output: View) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        provenance = output.record.get("provenance") or {}
        footer = json.dumps({"fingerprint": output.record.get("fingerprint"), **provenance})
        self.version = geo.version
        typed = with_type(schema.empty_table(), self.version).schema
        has_vectors = embedding_metadata.COLUMN in schema.names
        embeddings = embedding_metadata.describe(output.settings, provenance, output.schema) if has_vectors else {}
        keys = {"nightshift": footer, "geo": json.dumps(geo.value), **embedding_metadata.to_text(embeddings)}
        described = typed.with_metadata(keys)
        options = {"compression": "zstd", "write_page_index": True, "write_page_checksum": True}
        self.writer = pq.ParquetWriter(path, described, **options, **column_options(schema, self.version))
        self.schema = described
        self.waiting = schema.empty_table()

    def write(self, table: pa.Table) -> None:
        self.waiting = pa.concat_tables([self.waiting, table])
        while len(self.waiting) >= GROUP_ROWS:
            self._write(self.waiting[:GROUP_ROWS])
            self.waiting = self.waiting[GROUP_ROWS:]

    def _write(self, table: pa.Table) -> None:
        typed = with_type(table, self.version).replace_schema_metadata(self.schema.metadata)
        self.writer.write_table(typed, row_group_size=GROUP_ROWS)

    def close(self) -> None:
        if len(self.waiting):
            self._write(self.waiting)
        self.writer.close()
