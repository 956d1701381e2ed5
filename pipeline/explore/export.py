"""`nightshift export`: the footprints and results of an output as a file for a GIS or for the web."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import NightshiftError, OutputRefused, SettingRefused, message_line
from pipeline.explore.table import Output, open_output
from pipeline.explore.target import check_target, need_geo, replaced
from pipeline.output.geoparquet import BBOX, GEOMETRY, VERSIONS, WKB_ONLY, check_version, has_footprints

DRIVERS = {".geojson": "GeoJSON", ".fgb": "FlatGeobuf", ".gpkg": "GPKG", ".pmtiles": "PMTiles"}
PARQUET = ".parquet"
WITH_GEOMETRY_ONLY = (".fgb", ".pmtiles")
"""Formats that leave out rows without a footprint. The index of a FlatGeobuf has no place for them."""
SUFFIXES = (*DRIVERS, PARQUET)
OWN_NAMES = {"GPKG": ("fid", "geom")}
"""Columns that a format has beside those of the output."""
SORTS = ("hilbert", "none")
PARTITIONS = ("grid", "zoom", "datetime")
TILE_COLUMNS = ("image_id", "label", "label_id", "score")
"""Columns of vector tiles by default: each tile repeats the values of its features."""
TILE_SHARE = 1 / 16
"""Width of a footprint at the largest zoom, as a share of the tile's."""
ZOOMS = 6
"""Levels below the largest zoom. Footprints are too small to be seen farther out."""
MAX_ZOOM = 22


@dataclass(frozen=True)
class Export:
    """A file that was written.

    path: the file, or the folder of a partitioned one. rows: number of rows in it. without_geometry: rows of the output
    without a footprint. has_them: the format can hold such rows, so they are in the file. files: number of files.
    """

    path: Path
    rows: int
    without_geometry: int
    has_them: bool
    files: int
    is_finished: bool

    def describe(self) -> str:
        """One line: the file and its number of rows."""
        files = f" in {self.files:,} files" if self.files > 1 else ""
        how = "of them have no footprint" if self.has_them else "more, which have no footprint, are left out"
        missing = f"; {self.without_geometry:,} {how}" if self.without_geometry else ""
        state = "" if self.is_finished else "; the run has not finished"
        return f"{self.path}: {self.rows:,} rows{files}{missing}{state}"


def export(
    output: str,
    to: Path,
    columns: Sequence[str] = (),
    sort: str | None = None,
    partition_by: str | None = None,
    *,
    geoparquet: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the rows of an output with their footprints. The suffix of `to` chooses the format.

    columns: names, () for all without vectors; `geometry` is always there. sort: of GeoParquet, `hilbert` (default) or
    `none`. partition_by: of GeoParquet, which becomes a folder of files. geoparquet: its version,
    1.1 (default) or 2.0. Raises SettingRefused and OutputRefused.
    """
    suffix = to.suffix.lower()
    check_target(to, "--to", SUFFIXES, overwrite)
    _check_options(suffix, sort, partition_by, geoparquet)
    need_geo("nightshift export", "geopandas" if suffix == PARQUET else "pyogrio")
    opened = open_output(output)
    _check_footprints(opened)
    names = _columns(opened, columns, suffix)
    if suffix in DRIVERS:
        _check_names(names, DRIVERS[suffix])
    with replaced(to) as folder:
        if suffix == PARQUET:
            from pipeline.explore.geoparquet import write_sorted

            version = geoparquet or WKB_ONLY
            made = write_sorted(opened, names, folder / to.name, sort or SORTS[0], partition_by, version)
            rows, without, files = made.rows, made.without_geometry, made.files
        else:
            rows, without = _write_features(opened, names, folder / to.name, DRIVERS[suffix], to.stem)
            files = 1
        if rows == without:
            raise OutputRefused(
                f"{opened.uri} has no footprint in any row: its scenes have no CRS or no transform; assign them with "
                "gdal_edit.py -a_srs and -a_ullr, and run the job again"
            )
    has_them = suffix not in WITH_GEOMETRY_ONLY
    return Export(to, rows if has_them else rows - without, without, has_them, files, opened.is_finished)


def _check_options(suffix: str, sort: str | None, partition_by: str | None, geoparquet: str | None) -> None:
    options = (("--sort", sort, SORTS), ("--partition-by", partition_by, PARTITIONS))
    for flag, value, known in (*options, ("--geoparquet", geoparquet, VERSIONS)):
        if value is not None and value not in known:
            raise SettingRefused(f"{flag} is {value!r}: it must be one of {', '.join(known)}")
        if value is not None and suffix != PARQUET:
            raise SettingRefused(f"{flag} is for GeoParquet: write to a name that ends with {PARQUET}")
    check_version(geoparquet or WKB_ONLY)


def _check_footprints(output: Output) -> None:
    output.require([])
    if not output.rows:
        raise OutputRefused(
            f"{output.uri} has no rows, so there is nothing to export: its images are errors, or windows without data"
        )
    if not has_footprints(output.schema):
        raise OutputRefused(
            f"{output.uri} has no footprints (columns {GEOMETRY} and {BBOX}): run the job over GeoTIFFs with "
            "--tile-size, or join its rows with your own geometry by image_id"
        )


def _columns(output: Output, wanted: Sequence[str], suffix: str) -> list[str]:
    """Names of the columns to write, in the order of the output, with the geometry."""
    output.require(wanted)
    if wanted:
        chosen = set(wanted)
    elif suffix == ".pmtiles":
        chosen = set(TILE_COLUMNS)
    else:
        chosen = {field.name for field in output.schema if not pa.types.is_fixed_size_list(field.type)}
    chosen = chosen | {GEOMETRY, BBOX} if suffix == PARQUET else (chosen | {GEOMETRY}) - {BBOX}
    return [name for name in output.columns if name in chosen]


def _check_names(names: Sequence[str], driver: str) -> None:
    """Raise SettingRefused for columns that GDAL does not tell apart: it loses one of them, or crashes."""
    others = {name: name for name in OWN_NAMES.get(driver, ())}
    for name in sorted(names, key=lambda name: name != GEOMETRY):
        if other := others.get(name.lower()):
            raise SettingRefused(
                f"--to: a file of {driver} cannot have the column {name} beside its own column {other}; choose columns "
                f"with --columns, as in --columns image_id,label, or write to a name that ends with {PARQUET}"
            )
        others[name.lower()] = name


def _write_features(output: Output, names: list[str], path: Path, driver: str, layer: str) -> tuple[int, int]:
    """Write a file with one of GDAL's drivers. Returns the numbers of rows and of rows without geometry."""
    import pyogrio
    import pyogrio.errors

    if driver not in pyogrio.list_drivers(write=True):
        raise SettingRefused(
            f"--to {path.name}: the installed GDAL {pyogrio.__gdal_version_string__} cannot write {driver}; install a "
            "pyogrio wheel of 0.11 or later from PyPI"
        )
    stream = _Stream(output, names, skips_null=path.suffix.lower() in WITH_GEOMETRY_ONLY)
    options: dict[str, Any] = {"dataset_options": _tile_options(output)} if driver == "PMTiles" else {}
    if driver == "GeoJSON":
        options = {"layer_options": {"RFC7946": "YES", "WRITE_BBOX": "NO"}}
    try:
        pyogrio.write_arrow(
            stream.reader(),
            path,
            layer=layer,
            driver=driver,
            geometry_name=GEOMETRY,
            geometry_type="Unknown",  # polygons, and multipolygons at the antimeridian
            crs="OGC:CRS84",
            **options,
        )
    except Exception as error:  # GDAL's, or a consequence of the stream's own
        if stream.error:
            raise stream.error from error
        if isinstance(error, (OSError, NightshiftError)):
            raise
        raise NightshiftError(f"GDAL could not write {path.name}: {message_line(error)}") from error
    if stream.error:  # GDAL took the end of a broken stream for its end
        raise stream.error
    return stream.rows, stream.without_geometry


class _Stream:
    """The rows of an output as GDAL reads them: one batch in memory. Counts them, and keeps an error of the reader."""

    def __init__(self, output: Output, names: list[str], *, skips_null: bool) -> None:
        self.output, self.names, self.skips_null = output, names, skips_null
        self.rows = self.without_geometry = 0
        self.error: Exception | None = None

    def reader(self) -> pa.RecordBatchReader:
        fields = [self.output.schema.field(name) for name in self.names]
        schema = pa.schema([field.with_type(_plain(field.type)) for field in fields])
        return pa.RecordBatchReader.from_batches(schema, self._batches(schema))

    def _batches(self, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
        try:
            for batch in self.output.batches(self.names):
                self.rows += batch.num_rows
                self.without_geometry += batch[GEOMETRY].null_count
                if self.skips_null:
                    batch = batch.filter(batch[GEOMETRY].is_valid())
                yield batch.cast(schema)
        except Exception as error:
            self.error = error
            raise


def _plain(type_: pa.DataType) -> pa.DataType:
    """A type that GDAL has: lists of any length, and float32 for float16."""
    if pa.types.is_fixed_size_list(type_) or pa.types.is_list(type_):
        return pa.list_(_plain(type_.value_type))
    return pa.float32() if pa.types.is_float16(type_) else type_


def _tile_options(output: Output) -> dict[str, str]:
    """The zooms of vector tiles: at the largest one a footprint fills TILE_SHARE of a tile's width."""
    for batch in output.batches([BBOX]):
        box = batch[BBOX]
        widths = pc.subtract(pc.struct_field(box, "xmax"), pc.struct_field(box, "xmin")).drop_null().to_numpy()
        widths = widths[(widths > 0) & (widths < 180)]
        if len(widths):
            largest = math.ceil(math.log2(360 / float(np.median(widths)) * TILE_SHARE))
            largest = min(MAX_ZOOM, max(0, largest))
            return {"MINZOOM": str(max(0, largest - ZOOMS)), "MAXZOOM": str(largest)}
    return {"MINZOOM": "0", "MAXZOOM": "0"}
