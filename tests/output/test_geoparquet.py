"""GeoParquet 1.1, as its readers take it."""

import io
import json
from pathlib import Path

import duckdb
import geopandas
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely

from pipeline.output.geoparquet import BBOX, GEOMETRY, has_footprints
from pipeline.output.parts import column_options, encode

BOX = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("embedding", pa.list_(pa.float32(), 2)),
        (GEOMETRY, pa.binary()),
        (BBOX, BOX),
    ]
)


def table(*shapes: shapely.Geometry | None) -> pa.Table:
    rows = [
        {
            "image_id": str(number),
            "embedding": [1.0, 2.0],
            GEOMETRY: shape and shape.wkb,
            BBOX: shape and dict(zip(("xmin", "ymin", "xmax", "ymax"), shape.bounds, strict=True)),
        }
        for number, shape in enumerate(shapes)
    ]
    return pa.Table.from_pylist(rows, SCHEMA)


def part(*shapes: shapely.Geometry | None) -> bytes:
    return encode(table(*shapes), '{"fingerprint": "f"}', **column_options(SCHEMA))


def geo(data: bytes) -> dict[str, object]:
    metadata = pq.read_metadata(io.BytesIO(data)).metadata
    assert json.loads(metadata[b"nightshift"]) == {"fingerprint": "f"}
    return json.loads(metadata[b"geo"])  # type: ignore[no-any-return]


ONE, TWO = shapely.box(10, 20, 11, 21), shapely.box(-70, 40, -69, 41)
ACROSS = shapely.MultiPolygon([shapely.box(179, 0, 180, 1), shapely.box(-180, 0, -179, 1)])


def test_the_footer() -> None:
    assert geo(part(ONE, TWO, None)) == {
        "version": "1.1.0",
        "primary_column": "geometry",
        "columns": {
            "geometry": {
                "encoding": "WKB",
                "geometry_types": ["Polygon"],
                "edges": "planar",
                "orientation": "counterclockwise",
                "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
                "bbox": [-70.0, 20.0, 11.0, 41.0],
            }
        },
    }


def test_a_file_across_the_antimeridian_has_no_bbox_around_the_world() -> None:
    (column,) = geo(part(ONE, ACROSS))["columns"].values()  # type: ignore[attr-defined]
    assert column["geometry_types"] == ["Polygon", "MultiPolygon"]
    assert "bbox" not in column


def test_a_file_without_any_footprint() -> None:
    (column,) = geo(part(None))["columns"].values()  # type: ignore[attr-defined]
    assert (column["geometry_types"], "bbox" in column) == ([], False)


def test_other_tables_have_no_such_footer() -> None:
    plain = pa.table({"image_id": ["a"]})
    metadata = pq.read_metadata(io.BytesIO(encode(plain, "{}", **column_options(plain.schema)))).metadata
    assert b"geo" not in metadata
    assert not has_footprints(pa.schema([(GEOMETRY, pa.string()), (BBOX, BOX)]))
    assert not has_footprints(pa.schema([(GEOMETRY, pa.binary()), (BBOX, pa.list_(pa.float64()))]))


@pytest.mark.parametrize(
    ("box", "expected"),
    [((10.5, 20.5, 10.6, 20.6), ["0"]), ((179.5, 0.5, 179.6, 0.6), ["2"]), ((-179.6, 0.5, -179.5, 0.6), ["2"])],
)
def test_geopandas_reads_it_and_finds_rows_by_their_box(box: tuple[float, ...], expected: list[str]) -> None:
    data = part(ONE, TWO, ACROSS)
    frame = geopandas.read_parquet(io.BytesIO(data))
    assert frame.crs.to_string() == "OGC:CRS84"
    assert list(frame.geometry) == [ONE, TWO, ACROSS]
    near = geopandas.read_parquet(io.BytesIO(data), bbox=box)
    assert list(near[near.intersects(shapely.box(*box))]["image_id"]) == expected


def test_duckdb_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(part(ONE, TWO))
    rows = duckdb.sql(f"SELECT typeof(geometry), image_id FROM '{tmp_path}/a.parquet' WHERE bbox.xmin > 0").fetchall()
    assert rows in ([("GEOMETRY('OGC:CRS84')", "0")], [("BLOB", "0")])  # before version 2 without its extension


def test_pyogrio_writes_and_reads_what_geopandas_has_read(tmp_path: Path) -> None:
    frame = geopandas.read_parquet(io.BytesIO(part(ONE, TWO)))[["image_id", "geometry"]]
    frame.to_file(tmp_path / "a.gpkg", engine="pyogrio")
    again = pyogrio.read_dataframe(tmp_path / "a.gpkg")
    assert list(again.geometry) == [ONE, TWO]
    assert again.total_bounds.tolist() == [-70, 20, 11, 41]


def test_boxes_have_statistics_and_geometries_have_none() -> None:
    group = pq.read_metadata(io.BytesIO(part(ONE, TWO))).row_group(0)
    statistics = {group.column(i).path_in_schema: group.column(i).statistics for i in range(group.num_columns)}
    assert (statistics["bbox.xmin"].min, statistics["bbox.xmax"].max) == (-70, 11)
    assert statistics["geometry"] is None
