"""`nightshift export`: the rows of an output as a file for a GIS, for the web, or for programs that take vectors."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema as schemas
from pipeline.errors import NightshiftError, OutputRefused, SettingRefused, message_line
from pipeline.explore import pca as components
from pipeline.explore import vector_files
from pipeline.explore.choices import choices_of
from pipeline.explore.table import Output, open_output
from pipeline.explore.target import check_target, need_geo, replaced
from pipeline.explore.vectors import COLUMN, vector_type
from pipeline.explore.view import View
from pipeline.output.geoparquet import BBOX, GEOMETRY, VERSIONS, WKB_ONLY, check_version, has_footprints

DRIVERS = {".geojson": "GeoJSON", ".fgb": "FlatGeobuf", ".gpkg": "GPKG", ".pmtiles": "PMTiles"}
PARQUET = ".parquet"
WITH_GEOMETRY_ONLY = (".fgb", ".pmtiles")
"""Formats that leave out rows without a footprint. The index of a FlatGeobuf has no place for them."""
SUFFIXES = (*DRIVERS, PARQUET, *(suffix for suffix in vector_files.WRITERS if suffix != PARQUET))
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
    beside: files that belong to it. components: how vectors were reduced, in words.
    """

    path: Path
    rows: int
    without_geometry: int
    has_them: bool
    files: int
    is_finished: bool
    beside: tuple[Path, ...] = ()
    components: str = ""

    def describe(self) -> str:
        """One line: the file and its number of rows."""
        files = f" in {self.files:,} files" if self.files > 1 else ""
        how = "of them have no footprint" if self.has_them else "more, which have no footprint, are left out"
        missing = f"; {self.without_geometry:,} {how}" if self.without_geometry else ""
        state = "" if self.is_finished else "; the run has not finished"
        reduced = f"; {self.components}" if self.components else ""
        beside = f"; beside it {', '.join(path.name for path in self.beside)}" if self.beside else ""
        return f"{self.path}: {self.rows:,} rows{files}{reduced}{beside}{missing}{state}"


def export(
    output: str,
    to: Path,
    columns: Sequence[str] = (),
    sort: str | None = None,
    partition_by: str | None = None,
    *,
    geoparquet: str | None = None,
    vectors: bool = False,
    pca: int | None = None,
    where: str | None = None,
    bbox: str | None = None,
    exclude: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write the rows of an output. The suffix of `to` chooses the format.

    columns: names, () for those of the format; GIS formats always have `geometry`. sort: of GeoParquet, `hilbert`
    (default) or `none`. partition_by: of GeoParquet, which becomes a folder of files. geoparquet: its version, 1.1
    (default) or 2.0. vectors: write them to .csv and .parquet too. pca: numbers of a vector that is reduced to its
    principal components. where, bbox, exclude: as the flags of `search`; only such rows are written. Raises
    SettingRefused, InputRefused and OutputRefused.
    """
    suffix = to.suffix.lower()
    _check_target(to, suffix, overwrite)
    vector_files.check_packages(suffix)
    if suffix in DRIVERS:
        need_geo("nightshift export", "pyogrio")
    opened = open_output(output)
    _check_rows(opened)
    is_geo = suffix in DRIVERS or (suffix == PARQUET and has_footprints(opened.schema))
    _check_options(suffix, sort, partition_by, geoparquet, is_geo=is_geo)
    with_vectors = vectors or pca is not None
    if with_vectors and suffix in DRIVERS:
        flag = "--vectors" if vectors else "--pca"
        raise SettingRefused(f"{flag} is for files of vectors: write to .parquet, or name them with --columns {COLUMN}")
    if is_geo:
        need_geo("nightshift export", *["geopandas"] * (suffix == PARQUET))
        _check_footprints(opened)
    if with_vectors or suffix in vector_files.ALWAYS_VECTORS:
        opened.require(["image_id", COLUMN])
        vector_type(opened)
    opened.require(columns)
    choices = choices_of(opened, where, bbox, exclude)
    view = View(opened, choices, None if pca is None else components.fit(opened, pca, choices))
    wanted = [*columns, COLUMN] if columns and with_vectors else columns
    write = _write_places if is_geo else _write_vectors
    has_ids = suffix in vector_files.WITH_IDS
    beside = [vector_files.ids_of(to)] * has_ids + [vector_files.basis_of(to)] * (pca is not None)
    with replaced(*beside, to) as folder:
        names = _columns(view, wanted, suffix) if is_geo else _names(view, wanted, suffix)
        if with_vectors and not has_ids:
            names = [name for name in view.columns if name in {*names, COLUMN}]
        made = write(view, names, folder / to.name, sort, partition_by, geoparquet)
        if not made.rows:
            raise OutputRefused(f"{opened.uri} has no row that --where, --bbox and --exclude choose")
        if view.components:
            np.save(folder / beside[-1].name, view.components.basis)
        _make_way(to, folder)
    kept = view.components.describe() if view.components else ""
    return Export(to, made.rows, made.without, made.has_them, made.files, opened.is_finished, tuple(beside), kept)


@dataclass(frozen=True)
class _Made:
    rows: int
    without: int = 0
    has_them: bool = True
    files: int = 1


def _write_vectors(view: View, names: list[str], path: Path, *_: str | None) -> _Made:
    return _Made(vector_files.WRITERS[path.suffix.lower()](view, names, path))


def _write_places(
    view: View, names: list[str], path: Path, sort: str | None, partition_by: str | None, geoparquet: str | None
) -> _Made:
    suffix = path.suffix.lower()
    if suffix in DRIVERS:
        _check_names(names, DRIVERS[suffix])
    if suffix == PARQUET:
        from pipeline.explore.geoparquet import write_sorted

        made = write_sorted(view, names, path, sort or SORTS[0], partition_by, geoparquet or WKB_ONLY)
        rows, without, files = made.rows, made.without_geometry, made.files
    else:
        rows, without = _write_features(view, names, path, DRIVERS[suffix], path.stem)
        files = 1
    if rows and rows == without:
        raise OutputRefused(
            f"{view.uri} has no footprint in any row: its scenes have no CRS or no transform; assign them with "
            "gdal_edit.py -a_srs and -a_ullr, and run the job again"
        )
    has_them = suffix not in WITH_GEOMETRY_ONLY
    return _Made(rows if has_them else rows - without, without, has_them, files)


def _check_target(to: Path, suffix: str, overwrite: bool) -> None:
    is_replaced = overwrite and suffix in vector_files.FOLDERS and vector_files.is_of_export(to)
    check_target(to, "--to", SUFFIXES, overwrite, replaces_folder=is_replaced)
    for path in _beside(to):
        if path.exists() and not overwrite:
            raise SettingRefused(f"--to {to}: {path} exists, which belongs to it; remove it or add --overwrite")


def _beside(to: Path) -> list[Path]:
    """All files that an export may write beside its own."""
    return [vector_files.ids_of(to), vector_files.basis_of(to)] if to.suffix.lower() in vector_files.WRITERS else []


def _make_way(to: Path, folder: Path) -> None:
    """Remove the files of an earlier export, its own file first: what is beside it never belongs to another one."""
    if to.is_dir():
        to.rename(folder / "replaced")
    else:
        to.unlink(missing_ok=True)
    for path in _beside(to):
        path.unlink(missing_ok=True)


def _check_options(
    suffix: str, sort: str | None, partition_by: str | None, geoparquet: str | None, *, is_geo: bool
) -> None:
    options = (("--sort", sort, SORTS), ("--partition-by", partition_by, PARTITIONS))
    for flag, value, known in (*options, ("--geoparquet", geoparquet, VERSIONS)):
        if value is not None and value not in known:
            raise SettingRefused(f"{flag} is {value!r}: it must be one of {', '.join(known)}")
        if value is not None and suffix != PARQUET:
            raise SettingRefused(f"{flag} is for GeoParquet: write to a name that ends with {PARQUET}")
        if value is not None and not is_geo:
            raise SettingRefused(f"{flag} is for GeoParquet, and the output has no footprints: leave it out")
    check_version(geoparquet or WKB_ONLY)


def _check_rows(output: Output) -> None:
    output.require([])
    if not output.rows:
        raise OutputRefused(
            f"{output.uri} has no rows, so there is nothing to export: its images are errors, or windows without data"
        )


def _check_footprints(output: Output) -> None:
    if not has_footprints(output.schema):
        raise OutputRefused(
            f"{output.uri} has no footprints (columns {GEOMETRY} and {BBOX}): run the job over GeoTIFFs with "
            "--tile-size, or join its rows with your own geometry by image_id"
        )


def _names(view: View, wanted: Sequence[str], suffix: str) -> list[str]:
    """Names of the columns to write to a file without geometries, in the order of the output."""
    without_binary = suffix in (".csv", ".webdataset")
    binary = [field.name for field in view.schema if pa.types.is_binary(field.type)] if without_binary else []
    if given := [name for name in wanted if name in binary]:
        raise SettingRefused(f"--columns {given[0]} is binary: a {suffix} has no place for it; write .parquet")
    if wanted:
        chosen = set(wanted)
    elif suffix in vector_files.WITH_IDS:
        chosen = {"image_id"}
    else:
        chosen = {each.name for each in view.schema if not schemas.is_vector(each.type)} - {*binary}
    if suffix in vector_files.WITH_IDS:
        chosen = (chosen | {"image_id"}) - {COLUMN}
    elif suffix in vector_files.FOLDERS:
        chosen |= {COLUMN}
    return [name for name in view.columns if name in chosen]


def _columns(output: View, wanted: Sequence[str], suffix: str) -> list[str]:
    """Names of the columns to write, in the order of the output, with the geometry."""
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


def _write_features(output: View, names: list[str], path: Path, driver: str, layer: str) -> tuple[int, int]:
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

    def __init__(self, output: View, names: list[str], *, skips_null: bool) -> None:
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


def _tile_options(output: View) -> dict[str, str]:
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
