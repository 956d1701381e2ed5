"""GeoParquet 1.1: the footer key `geo` of parts that have footprints (https://geoparquet.org/releases/v1.1.0)."""

import json

import pyarrow as pa
import pyarrow.compute as pc

GEOMETRY, BBOX = "geometry", "bbox"
CORNERS = ("xmin", "ymin", "xmax", "ymax")
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


def geo_metadata(table: pa.Table) -> str:
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
    return json.dumps({"version": "1.1.0", "primary_column": GEOMETRY, "columns": {GEOMETRY: column}})


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
