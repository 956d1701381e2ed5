"""GeoParquet 1.1 and 2.0, as their readers take them."""

import importlib
import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import geopandas
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import shapely

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.embedding_space import EmbeddingSpace
from pipeline.errors import SettingRefused
from pipeline.output import directory, geoparquet, parts
from pipeline.output import ledger as ledgers
from pipeline.output.geoparquet import BBOX, GEOMETRY, has_footprints
from pipeline.output.parts import column_options, encode
from pipeline.stages.write import Sink

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


def part(*shapes: shapely.Geometry | None, version: str = "1.1") -> bytes:
    return encode(table(*shapes), '{"fingerprint": "f"}', version, **column_options(SCHEMA, version))


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
@pytest.mark.parametrize("version", geoparquet.VERSIONS)
def test_geopandas_reads_it_and_finds_rows_by_their_box(
    box: tuple[float, ...], expected: list[str], version: str
) -> None:
    data = part(ONE, TWO, ACROSS, version=version)
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


def test_version_2_has_the_native_type_with_a_box_and_types_in_its_statistics() -> None:
    data = part(ONE, ACROSS, None, version="2.0")
    metadata = pq.read_metadata(io.BytesIO(data))
    column = metadata.schema.names.index("geometry")
    assert str(metadata.schema.column(column).logical_type) == "Geometry(crs=)", "Parquet's default is OGC:CRS84"
    statistics = metadata.row_group(0).column(column).geo_statistics
    assert sorted(statistics.geospatial_types) == [3, 6]
    bounds = (statistics.xmin, statistics.ymin, statistics.xmax, statistics.ymax)
    assert bounds == (-180, 0, 180, 21)
    assert geo(data)["version"] == "2.0.0"
    (first,), (second,) = (geo(each)["columns"].values() for each in (data, part(ONE, ACROSS, None)))  # type: ignore[attr-defined]
    assert first == second
    plain = pq.read_metadata(io.BytesIO(part(ONE))).schema.column(column)
    assert "Geometry" not in str(plain.logical_type)


def test_both_versions_are_the_same_rows() -> None:
    first, second = (pq.read_table(io.BytesIO(part(ONE, ACROSS, None, version=v))) for v in geoparquet.VERSIONS)
    assert first.schema.equals(second.schema), "the type is not registered, so that readers see binary"
    assert first.equals(second)
    assert [geoparquet.version_of(each.schema.metadata) for each in (first, second)] == ["1.1", "2.0"]
    assert geoparquet.version_of(None) == "1.1"


def test_duckdb_reads_the_native_type(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(part(ONE, TWO, version="2.0"))
    rows = duckdb.sql(f"SELECT typeof(geometry), image_id FROM '{tmp_path}/a.parquet' WHERE bbox.xmin > 0").fetchall()
    assert len(rows) == 1
    assert rows[0][0].startswith("GEOMETRY")


@pytest.mark.parametrize("version", geoparquet.VERSIONS)
def test_duckdb_spatial_measures_it(tmp_path: Path, version: str) -> None:
    connection = duckdb.connect()
    try:
        connection.load_extension("spatial")
    except duckdb.Error as error:
        pytest.skip(f"DuckDB {duckdb.__version__} has no spatial extension here: {str(error).splitlines()[0]}")
    (tmp_path / "a.parquet").write_bytes(part(ONE, TWO, version=version))
    box = "ST_MakeEnvelope(10.5, 20.5, 10.6, 20.6)"
    query = f"SELECT image_id, ST_Area(geometry) FROM '{tmp_path}/a.parquet' WHERE ST_Intersects(geometry, {box})"
    assert connection.sql(query).fetchall() == [("0", 1.0)]


@pytest.mark.parametrize("version", geoparquet.VERSIONS)
def test_gdal_reads_it(tmp_path: Path, version: str) -> None:
    if "Parquet" not in pyogrio.list_drivers():
        pytest.skip(f"the GDAL {pyogrio.__gdal_version_string__} of pyogrio has no driver for Parquet")
    (tmp_path / "a.parquet").write_bytes(part(ONE, TWO, version=version))
    assert list(pyogrio.read_dataframe(tmp_path / "a.parquet").geometry) == [ONE, TWO]


def rows(*shapes: shapely.Geometry) -> pa.Table:
    """Rows as the write stage takes them."""
    columns = schema.predicted(pa.schema([SCHEMA.field(GEOMETRY), SCHEMA.field(BBOX)]), {})
    places = [{**row, "shard": 0, "row": number} for number, row in enumerate(table(*shapes).to_pylist())]
    return pa.Table.from_pylist(places, columns)


def test_parts_keep_their_version_when_rows_are_dropped(tmp_path: Path) -> None:
    uri = str(tmp_path)
    result = schema.result(pa.schema([SCHEMA.field(GEOMETRY), SCHEMA.field(BBOX)]), {})
    Sink(uri, ledgers.begin(uri).attempt, result, '{"fingerprint": "f"}', "2.0")(rows(ONE, TWO, ACROSS))
    (commit,) = ledgers.valid_commits(uri, ledgers.last_attempt(uri))
    kept = parts.drop_rows(uri, {0: ((0, 1), (2, END))}, commit, 2)
    assert kept is not None
    assert kept.part is not None
    for name, count in ((commit.part, 3), (kept.part, 1)):
        metadata = pq.read_metadata(tmp_path / str(name))
        assert metadata.num_rows == count
        assert "Geometry" in str(metadata.schema)
        assert json.loads(metadata.metadata[b"geo"])["version"] == "2.0.0"
    assert list(geopandas.read_parquet(tmp_path / kept.part).geometry) == [TWO]


def test_a_pyarrow_without_the_type_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geoparquet, "_writes_native_type", lambda: False)
    config = RunConfig(input=(str(tmp_path),), output=f"{tmp_path}/out", geoparquet="2.0")
    archive: Any = SimpleNamespace(check=lambda: None)
    with pytest.raises(
        SettingRefused, match=r"--geoparquet 2.0 needs Parquet's type GEOMETRY, which pyarrow .* cannot"
    ):
        directory.check(config, archive)
    directory.check(RunConfig(input=(str(tmp_path),), output=f"{tmp_path}/out"), archive)


def test_what_older_packages_write_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow 20 stores an extension type as plain bytes, and without [geo] there is no such type."""
    monkeypatch.setattr(geoparquet, "native_type", pa.binary)
    assert not geoparquet._writes_native_type.__wrapped__()
    monkeypatch.setattr(geoparquet, "native_type", lambda: importlib.import_module("geoarrow.missing"))
    assert not geoparquet._writes_native_type.__wrapped__()
    monkeypatch.undo()
    assert geoparquet._writes_native_type.__wrapped__()


def test_the_version_is_part_of_the_fingerprint_and_not_of_the_vectors(tmp_path: Path) -> None:
    first, second = (
        RunConfig(input=(str(tmp_path),), output=f"{tmp_path}/out", geoparquet=version).result_settings()
        for version in geoparquet.VERSIONS
    )
    assert "geoparquet" not in first, "outputs of earlier versions can be continued"
    assert {**first, "geoparquet": "2.0"} == second
    network = {"model": "m", "weights": "w", "transform": {}}
    assert EmbeddingSpace.of(first | network) == EmbeddingSpace.of(second | network)
    with pytest.raises(SettingRefused, match="--geoparquet is '3': it must be one of"):
        RunConfig(input=(str(tmp_path),), output=f"{tmp_path}/out", geoparquet="3")
