"""GeoParquet: the footer key `geo` of parts that have footprints, and the type of their column `geometry`.

Version 1.1 (https://geoparquet.org/releases/v1.1.0) stores WKB as plain bytes, which every reader knows. Version 2.0
gives them Parquet's own type GEOMETRY, with a box and the types of geometry in the statistics of each row group
(https://github.com/apache/parquet-format/blob/master/Geospatial.md).
"""

import io
import json
from collections.abc import Mapping
from functools import cache

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import SettingRefused

GEOMETRY, BBOX = "geometry", "bbox"
CORNERS = ("xmin", "ymin", "xmax", "ymax")
WKB_ONLY, NATIVE = "1.1", "2.0"
VERSIONS = (WKB_ONLY, NATIVE)
POLYGON, MULTI_POLYGON = 3, 6
GEOMETRY_NAMES = {POLYGON: "Polygon", MULTI_POLYGON: "MultiPolygon"}
"""WKB's numbers of geometry types."""


def has_footprints(schema: pa.Schema) -> bool:
    """True for a schema with the columns `geometry` (WKB) and `bbox` (a struct of CORNERS)."""
    names = schema.names
    if GEOMETRY not in names or BBOX not in names:
        return False
    box = schema.field(BBOX).type
    is_box = pa.types.is_struct(box) and [field.name for field in box] == list(CORNERS)
    return is_box and bool(pa.types.is_binary(schema.field(GEOMETRY).type))


def check_version(version: str) -> None:
    """Raise SettingRefused for a version of GeoParquet that the installed packages cannot write."""
    if version == NATIVE and not _writes_native_type():
        raise SettingRefused(
            f"--geoparquet {version} needs Parquet's type GEOMETRY, which pyarrow {pa.__version__} cannot write here: "
            "pip install 'nightshift[geo]' 'pyarrow>=21', or leave it out for GeoParquet 1.1"
        )


@cache
def _writes_native_type() -> bool:
    """Write an empty table and look at its type: pyarrow 20 and older store plain bytes without a word."""
    try:
        table = pa.table({GEOMETRY: pa.array([], native_type())})
    except ImportError:
        return False
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return "Geometry" in str(pq.read_metadata(buffer).schema.column(0).logical_type)


def native_type() -> pa.DataType:
    """The Arrow type that pyarrow stores as GEOMETRY: `geoarrow.wkb` in OGC:CRS84. Raises ImportError without [geo].

    The type is not registered, so that tables read again have plain binary columns, as those of version 1.1.
    """
    from geoarrow import types  # of the extra [geo]

    return types.wkb(crs=types.OGC_CRS84).to_pyarrow()


def with_type(table: pa.Table, version: str) -> pa.Table:
    """The table with `geometry` in the type of a version, if it has footprints."""
    if version != NATIVE or not has_footprints(table.schema):
        return table
    index = table.schema.get_field_index(GEOMETRY)
    return table.set_column(index, pa.field(GEOMETRY, native_type()), table[GEOMETRY].cast(native_type()))


def version_of(metadata: Mapping[bytes, bytes] | None) -> str:
    """The version of GeoParquet in a footer, WKB_ONLY if it has none."""
    text = (metadata or {}).get(b"geo")
    return NATIVE if text and json.loads(text)["version"].startswith("2.") else WKB_ONLY


def geo_metadata(table: pa.Table, version: str = WKB_ONLY) -> str:
    """The value of `geo` for a table with footprints in OGC:CRS84, the CRS of GeoParquet if none is named.

    A row's `bbox` is the range of its coordinates. Across the antimeridian it is therefore -180 to 180: readers skip
    row groups by the minimum and maximum of these numbers, and would lose a row whose xmin is larger than its xmax.
    The file's own bbox is left out there, since it has no such excuse (RFC 7946, section 5.2).
    """
    column = {
        "encoding": "WKB",
        "geometry_types": _geometry_types(table[GEOMETRY]),
        "edges": "planar",
        "orientation": "counterclockwise",
        "covering": {"bbox": {corner: [BBOX, corner] for corner in CORNERS}},
        **_bounds(table[BBOX]),
    }
    return json.dumps({"version": f"{version}.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}})


def _geometry_types(wkb: pa.ChunkedArray) -> list[str]:
    """Names of the types in a column of little-endian WKB."""
    kinds = pc.unique(pc.binary_slice(wkb, 1, 5)).drop_null()
    numbers = sorted(int.from_bytes(kind.as_py(), "little") for kind in kinds)
    return [GEOMETRY_NAMES[number] for number in numbers]


def _bounds(boxes: pa.ChunkedArray) -> dict[str, list[float]]:
    corners = {corner: pc.struct_field(boxes, corner) for corner in CORNERS}
    low = [pc.min(corners[corner]).as_py() for corner in ("xmin", "ymin")]
    high = [pc.max(corners[corner]).as_py() for corner in ("xmax", "ymax")]
    if low[0] is None or (low[0] <= -180 and high[0] >= 180):
        return {}
    return {"bbox": low + high}
