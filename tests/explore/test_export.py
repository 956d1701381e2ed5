"""Exports: every row once, with its footprint, in files that other programs read."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pyogrio
import pytest
import scenes
import shapely
from affine import Affine
from pmtiles.reader import MmapSource, Reader
from scene_outputs import LABELS, VECTORS, Place, label, write_output

from pipeline import open_output, schema
from pipeline.errors import OutputRefused, SettingRefused
from pipeline.explore import geoparquet
from pipeline.explore.export import export
from pipeline.output import ledger as ledgers
from pipeline.output.commit import Commit
from pipeline.output.parts import column_options, encode
from pipeline.stages.write import Sink
from pipeline.storage import access

COLUMNS = pa.schema([*LABELS, ("top_labels", pa.list_(pa.string())), *VECTORS])


def result(place: Place) -> dict[str, Any]:
    number = (place.across + place.down) % 4
    vector = [float(place.across), float(place.down), 0.0, 1.0]
    return {**label(number, 0.5), "top_labels": ["water", "forest"], "embedding": vector}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of 35 and 12 windows; the second one is at the antimeridian."""
    folder = tmp_path_factory.mktemp("exports")
    first = scenes.write(folder / "in" / "a.tif", scenes.numbers(3, 130, 205))
    second = scenes.write(
        folder / "in" / "b.tif", scenes.numbers(3, 96, 128), Affine(0.01, 0, 179.5, 0, -0.01, 5), 4326
    )
    return write_output(folder / "out", [first, second], scenes.tiling(32), result, COLUMNS, rows_per_part=10)


def expected(output: Path) -> geopandas.GeoDataFrame:
    """The rows of an output, by image_id."""
    batches = open_output(str(output)).batches()
    table = pa.Table.from_batches(batches).to_pandas()
    geometry = geopandas.GeoSeries.from_wkb(table["geometry"], crs="OGC:CRS84")
    return geopandas.GeoDataFrame(table.drop(columns="geometry"), geometry=geometry).set_index("image_id").sort_index()


def check_same(found: geopandas.GeoDataFrame, output: Path, tolerance: float = 1e-12) -> None:
    rows = expected(output)
    found = found.set_index("image_id").sort_index()
    assert list(found.index) == list(rows.index)
    assert found["label"].tolist() == rows["label"].tolist()
    assert found["label_id"].tolist() == rows["label_id"].tolist()
    same = shapely.equals_exact(
        shapely.normalize(found.geometry.values), shapely.normalize(rows.geometry.values), tolerance=tolerance
    )
    assert same.all()


@pytest.mark.parametrize(("suffix", "tolerance"), [(".fgb", 1e-12), (".gpkg", 1e-12), (".geojson", 1e-7)])
def test_formats_of_a_gis(output: Path, tmp_path: Path, suffix: str, tolerance: float) -> None:
    made = export(str(output), tmp_path / f"w{suffix}")
    assert (made.rows, made.without_geometry) == (47, 0)
    assert made.describe().endswith(f"w{suffix}: 47 rows")
    found = geopandas.read_file(tmp_path / f"w{suffix}")
    check_same(found, output, tolerance)
    assert {"embedding", "bbox"}.isdisjoint(found.columns)
    assert {"scene", "window_col", "score", "valid_fraction", "crs"} <= set(found.columns)
    assert set(found.geometry.geom_type) == {"Polygon", "MultiPolygon"}
    info = pyogrio.read_info(tmp_path / f"w{suffix}")
    assert (info["layer_name"], "CRS84" in info["crs"] or info["crs"] == "EPSG:4326") == ("w", True)
    assert [path.name for path in tmp_path.iterdir()] == [f"w{suffix}"]


def test_geojson_is_that_of_the_rfc(output: Path, tmp_path: Path) -> None:
    export(str(output), tmp_path / "w.geojson", ["image_id", "top_labels", "embedding"])
    text = json.loads((tmp_path / "w.geojson").read_text())
    assert "crs" not in text, "RFC 7946 has one CRS"
    assert text["features"][0]["properties"].keys() == {"image_id", "top_labels", "embedding"}
    assert text["features"][0]["properties"]["top_labels"] == ["water", "forest"]
    assert text["features"][1]["properties"]["embedding"] == [1.0, 0.0, 0.0, 1.0]


def test_geoparquet(output: Path, tmp_path: Path) -> None:
    assert export(str(output), tmp_path / "w.parquet").rows == 47
    found = geopandas.read_parquet(tmp_path / "w.parquet")
    check_same(found, output)
    assert found.crs.to_string() == "OGC:CRS84"
    file = pq.ParquetFile(tmp_path / "w.parquet")
    geo = json.loads(file.schema_arrow.metadata[b"geo"])
    assert geo["columns"]["geometry"]["geometry_types"] == ["MultiPolygon", "Polygon"]
    assert "bbox" not in geo["columns"]["geometry"], "it would be 360° wide"
    assert json.loads(file.schema_arrow.metadata[b"nightshift"])["fingerprint"] == "f"
    assert "embedding" not in file.schema_arrow.names
    near = geopandas.read_parquet(tmp_path / "w.parquet", bbox=(-76, 40, -74, 41))
    assert len(near) == 35


@pytest.mark.parametrize(
    ("column", "formats"),
    [
        ("GEOMETRY", (".gpkg", ".fgb", ".geojson", ".pmtiles")),
        ("Label", (".gpkg", ".fgb", ".geojson", ".pmtiles")),
        ("fid", (".gpkg",)),
        ("GEOM", (".gpkg",)),
    ],
)
def test_columns_that_gdal_does_not_tell_apart_are_refused(
    tmp_path: Path, column: str, formats: tuple[str, ...]
) -> None:
    path = scenes.write(tmp_path / "a.tif", scenes.numbers(3, 32, 32))
    columns = pa.schema([*LABELS, (column, pa.string())])
    written = write_output(
        tmp_path / "out", [path], scenes.tiling(32), lambda place: {**label(1), column: "x"}, columns
    )
    for suffix in (".gpkg", ".fgb", ".geojson", ".pmtiles", ".parquet"):
        target = tmp_path / f"w{suffix}"
        if suffix in formats:
            with pytest.raises(SettingRefused, match=f"cannot have the column {column} beside its own column"):
                export(str(written), target, ["label", column])
        else:
            assert export(str(written), target, ["label", column]).rows == 1


def test_an_output_without_rows_is_refused(tmp_path: Path) -> None:
    path = scenes.write(tmp_path / "a.tif", scenes.numbers(3, 32, 32))
    written = write_output(tmp_path / "out", [path], scenes.tiling(32), lambda place: None)
    for suffix in (".gpkg", ".pmtiles", ".parquet"):
        with pytest.raises(OutputRefused, match="has no rows, so there is nothing to export"):
            export(str(written), tmp_path / f"w{suffix}")


def test_geoparquet_2_of_both_versions_and_back(output: Path, tmp_path: Path) -> None:
    export(str(output), tmp_path / "w.parquet", geoparquet="2.0")
    metadata = pq.read_metadata(tmp_path / "w.parquet")
    index = [metadata.row_group(0).column(i).path_in_schema for i in range(metadata.num_columns)].index("geometry")
    assert "Geometry" in str(metadata.schema.column(index).logical_type)
    assert metadata.row_group(0).column(index).geo_statistics.ymax > 40
    assert json.loads(metadata.metadata[b"geo"])["version"] == "2.0.0"
    check_same(geopandas.read_parquet(tmp_path / "w.parquet"), output)
    assert len(geopandas.read_parquet(tmp_path / "w.parquet", bbox=(-76, 40, -74, 41))) == 35
    with pytest.raises(SettingRefused, match="--geoparquet is for GeoParquet: write to a name that ends"):
        export(str(output), tmp_path / "w.fgb", geoparquet="2.0")


@pytest.mark.parametrize("suffix", [".parquet", ".fgb", ".geojson"])
def test_an_output_in_geoparquet_2_is_exported_as_any_other(output: Path, tmp_path: Path, suffix: str) -> None:
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    for path in (copy / "results").iterdir():
        table = pq.read_table(path)
        footer = table.schema.metadata[b"nightshift"].decode()
        path.write_bytes(encode(table, footer, "2.0", **column_options(table.schema, "2.0")))
    export(str(copy), tmp_path / f"w{suffix}")
    read = geopandas.read_parquet if suffix == ".parquet" else geopandas.read_file
    check_same(read(tmp_path / f"w{suffix}"), output, 1e-7)
    if suffix == ".parquet":
        assert "Geometry" not in str(pq.read_metadata(tmp_path / "w.parquet").schema)
        assert pq.read_schema(tmp_path / "w.parquet").field("geometry").metadata is None


def test_vectors_on_request(output: Path, tmp_path: Path) -> None:
    export(str(output), tmp_path / "w.parquet", ["image_id", "embedding"])
    table = pq.read_table(tmp_path / "w.parquet")
    assert table.schema.names == ["image_id", "embedding", "geometry", "bbox"]
    given = {i: list(v) for i, v in expected(output)["embedding"].items()}
    assert dict(zip(table["image_id"].to_pylist(), table["embedding"].to_pylist(), strict=True)) == given


POINTS = pa.schema([("geometry", pa.binary()), ("bbox", scenes.scene.COLUMNS.field("bbox").type)])


def write_footprints(out: Path, boxes: Sequence[Any], **columns: Any) -> Path:
    """An output whose rows have these footprints (bounds, or None), in this order. columns: Arrow arrays by name."""
    extra = pa.schema([(name, values.type) for name, values in columns.items()])
    result_schema = schema.result(pa.schema([*POINTS, *extra]), {})
    access.write(f"{out}/_run.json", b'{"fingerprint": "f"}')
    sink = Sink(str(out), ledgers.begin(str(out)).attempt, result_schema, "{}")
    names = ("xmin", "ymin", "xmax", "ymax")
    rows = [
        {
            "image_id": f"{row:06d}", "shard": 0, "row": row, "is_empty": False, "network": "cpu",
            "geometry": None if box is None else shapely.to_wkb(shapely.box(*box)),
            "bbox": None if box is None else dict(zip(names, box, strict=True)),
            **{name: values[row].as_py() for name, values in columns.items()},
        }
        for row, box in enumerate(boxes)
    ]  # fmt: skip
    for start in range(0, len(rows), 3000):
        sink(pa.Table.from_pylist(rows[start : start + 3000], schema.predicted(pa.schema([*POINTS, *extra]), {})))
    return out


def scattered(count: int) -> list[tuple[float, float, float, float]]:
    """Footprints in an order that has nothing to do with their places."""
    corners = np.random.default_rng(0).uniform((0, 40), (9.9, 49.9), (count, 2))
    return [(x, y, x + 0.05, y + 0.05) for x, y in corners.tolist()]


def groups_that_a_query_reads(path: Path, box: tuple[float, float, float, float]) -> tuple[int, int]:
    """Row groups whose bbox statistics meet a box, and all."""
    hits = total = 0
    for file in sorted(path.rglob("*.parquet")) if path.is_dir() else [path]:
        metadata = pq.read_metadata(file)
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            chunks = {group.column(i).path_in_schema: group.column(i).statistics for i in range(group.num_columns)}
            total += 1
            hits += (
                chunks["bbox.xmin"].min <= box[2]
                and chunks["bbox.xmax"].max >= box[0]
                and chunks["bbox.ymin"].min <= box[3]
                and chunks["bbox.ymax"].max >= box[1]
            )
    return hits, total


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many row groups and many temporary files from few rows."""
    monkeypatch.setattr(geoparquet, "GROUP_ROWS", 100)
    monkeypatch.setattr(geoparquet, "BUCKET_BYTES", 100_000)


BOX = (4.0, 44.0, 4.5, 44.5)


def test_a_query_by_place_reads_few_row_groups(tmp_path: Path, small_groups: None) -> None:
    boxes = scattered(6000)
    out = write_footprints(tmp_path / "out", boxes)
    export(str(out), tmp_path / "none.parquet", sort="none")
    export(str(out), tmp_path / "sorted.parquet")
    assert groups_that_a_query_reads(tmp_path / "none.parquet", BOX) == (60, 60)
    hits, total = groups_that_a_query_reads(tmp_path / "sorted.parquet", BOX)
    assert total == 60
    assert hits <= 4
    for name in ("none", "sorted"):
        found = pq.read_table(tmp_path / f"{name}.parquet", columns=["image_id", "bbox"])
        ids = found["image_id"].to_pylist()
        assert sorted(ids) == [f"{row:06d}" for row in range(6000)]
        assert [tuple(box.values()) for box in found["bbox"].to_pylist()] == [boxes[int(i)] for i in ids]
    assert pq.read_table(tmp_path / "none.parquet")["row"].to_pylist() == list(range(6000))
    geo = json.loads(pq.read_metadata(tmp_path / "sorted.parquet").metadata[b"geo"])
    low, high = np.min(boxes, axis=0), np.max(boxes, axis=0)
    assert geo["columns"]["geometry"]["bbox"] == [low[0], low[1], high[2], high[3]]


def test_partitions_by_cells_of_a_degree(tmp_path: Path, small_groups: None) -> None:
    boxes = [*scattered(2000), (-0.3, -0.2, -0.1, -0.1), None]
    out = write_footprints(tmp_path / "out", boxes)
    made = export(str(out), tmp_path / "w.parquet", partition_by="grid")
    folders = {path.name for path in (tmp_path / "w.parquet").iterdir()}
    assert {"grid=N44E004", "grid=S01W001", f"grid={geoparquet.NO_VALUE}"} <= folders
    assert (made.rows, made.without_geometry, made.files) == (2002, 1, len(folders))
    cell = geopandas.read_parquet(tmp_path / "w.parquet" / "grid=N44E004")
    assert (cell.bounds[["minx", "miny"]] + 0.025 >= (4, 44)).all(axis=None)
    assert (cell.bounds[["maxx", "maxy"]] - 0.025 <= (5, 45)).all(axis=None)
    assert pq.read_table(tmp_path / "w.parquet").num_rows == 2002
    hits, total = groups_that_a_query_reads(tmp_path / "w.parquet" / "grid=N44E004", BOX)
    assert (hits, total) == (1, 1)


def test_partitions_by_zoom_and_by_month(tmp_path: Path) -> None:
    times = pa.array(pd.to_datetime(["2024-05-01", "2024-05-31", "2023-12-01", None], utc=True))
    columns = {"tile_z": pa.array([3, 10, 3, 3], pa.int32()), "datetime": times}
    out = str(write_footprints(tmp_path / "out", scattered(4), **columns))
    assert export(out, tmp_path / "z.parquet", partition_by="zoom").files == 2
    assert export(out, tmp_path / "t.parquet", partition_by="datetime").files == 3
    zoom = pq.read_table(tmp_path / "z.parquet" / "zoom=3")
    assert sorted(zoom["image_id"].to_pylist()) == ["000000", "000002", "000003"]
    months = sorted(path.name for path in (tmp_path / "t.parquet").iterdir())
    assert months == ["month=2023-12", "month=2024-05", f"month={geoparquet.NO_VALUE}"]
    assert pq.read_table(tmp_path / "t.parquet" / "month=2024-05").num_rows == 2


def test_vector_tiles(output: Path, tmp_path: Path) -> None:
    export(str(output), tmp_path / "w.pmtiles")
    info = pyogrio.read_info(tmp_path / "w.pmtiles")
    assert {"image_id", "label", "label_id", "score"} <= set(info["fields"])
    assert info["layer_name"] == "w"
    found = geopandas.read_file(tmp_path / "w.pmtiles").to_crs(4326)
    rows = expected(output)
    assert set(found["image_id"]) == set(rows.index)
    whole = found.dissolve("image_id").geometry
    west = rows[rows["scene"].str.endswith("a.tif")].geometry
    with (tmp_path / "w.pmtiles").open("rb") as file:
        header = Reader(MmapSource(file)).header()
    assert (header["min_zoom"], header["max_zoom"]) == (7, 13), "a footprint of 320 m is a sixteenth of a tile there"
    unit = 360 / 2 ** header["max_zoom"] / 4096
    for name, polygon in west.items():
        assert shapely.hausdorff_distance(whole.loc[name].convex_hull, polygon) < 2 * unit, "whole numbers in a tile"


def test_rows_without_a_footprint(tmp_path: Path) -> None:
    out = str(write_footprints(tmp_path / "out", [*scattered(3), None]))
    made = export(out, tmp_path / "w.fgb")
    left_out = "3 rows; 1 more, which have no footprint, are left out; the run has not finished"
    assert made.describe().endswith(left_out)
    assert len(geopandas.read_file(tmp_path / "w.fgb")) == 3
    assert export(out, tmp_path / "w.pmtiles").describe().endswith(left_out)
    for name, reader in (("w.parquet", geopandas.read_parquet), ("w.geojson", geopandas.read_file)):
        made = export(out, tmp_path / name)
        assert made.describe().endswith("4 rows; 1 of them have no footprint; the run has not finished")
        assert reader(tmp_path / name).geometry.isna().sum() == 1
    nowhere = str(write_footprints(tmp_path / "nowhere", [None, None]))
    for name in ("n.fgb", "n.parquet"):
        with pytest.raises(OutputRefused, match="no footprint in any row: its scenes have no CRS"):
            export(nowhere, tmp_path / name)
        assert not (tmp_path / name).exists()


def test_refused(output: Path, tmp_path: Path) -> None:
    out = str(output)
    with pytest.raises(SettingRefused, match=r"must end with \.geojson or \.fgb or \.gpkg or \.pmtiles or \.parquet"):
        export(out, tmp_path / "w.shp")
    with pytest.raises(SettingRefused, match="--sort is for GeoParquet"):
        export(out, tmp_path / "w.fgb", sort="hilbert")
    with pytest.raises(SettingRefused, match="--partition-by is 'x'"):
        export(out, tmp_path / "w.parquet", partition_by="x")
    with pytest.raises(SettingRefused, match="--partition-by zoom needs the column tile_z"):
        export(out, tmp_path / "w.parquet", partition_by="zoom")
    with pytest.raises(OutputRefused, match="has no column colour"):
        export(out, tmp_path / "w.fgb", ["colour"])
    (tmp_path / "w.parquet").mkdir()
    with pytest.raises(SettingRefused, match="is a folder"):
        export(out, tmp_path / "w.parquet", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["w.parquet"]


def test_an_output_without_footprints(tmp_path: Path) -> None:
    access.write(f"{tmp_path}/out/_run.json", b"{}")
    result_schema = schema.result(LABELS, {})
    sink = Sink(f"{tmp_path}/out", ledgers.begin(f"{tmp_path}/out").attempt, result_schema, "{}")
    row = {"image_id": "a", "shard": 0, "row": 0, "is_empty": False, **label(1)}
    sink(pa.Table.from_pylist([row], schema.predicted(LABELS, {})))
    with pytest.raises(OutputRefused, match=r"has no footprints .*: run the job over GeoTIFFs with --tile-size"):
        export(f"{tmp_path}/out", tmp_path / "w.fgb")


@pytest.mark.parametrize("name", ["w.fgb", "w.geojson", "w.parquet"])
def test_a_broken_part_ends_the_export_and_leaves_the_old_file(output: Path, tmp_path: Path, name: str) -> None:
    """GDAL must not take a part that cannot be read for the end of the rows."""
    out = Path(shutil.copytree(output, tmp_path / "out"))
    (tmp_path / name).write_text("old")
    commits = [Commit.from_json(path.read_text()) for path in sorted((out / "_commits").iterdir())]
    last = out / str(commits[-1].part)
    data = bytearray(last.read_bytes())
    data[: len(data) // 2] = bytes(len(data) // 2)
    last.write_bytes(data)
    with pytest.raises(OutputRefused, match="cannot be read"):
        export(str(out), tmp_path / name, overwrite=True)
    assert (tmp_path / name).read_text() == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", name]


def test_chosen_rows_and_reduced_vectors(output: Path, tmp_path: Path) -> None:
    made = export(str(output), tmp_path / "w.parquet", ["label"], pca=2, bbox="-76,40,-74,41", where="score > 0")
    assert made.rows == 35
    found = geopandas.read_parquet(tmp_path / "w.parquet")
    assert len(found) == 35
    assert {len(vector) for vector in found["embedding"]} == {2}
    assert "emb" not in {key.decode() for key in pq.read_metadata(tmp_path / "w.parquet").metadata}, "no such space"
    assert np.load(tmp_path / "w.parquet.pca.npy").shape == (4, 2)
    assert export(str(output), tmp_path / "w.fgb", where="label_id = 1").rows < 47
    assert set(geopandas.read_file(tmp_path / "w.fgb")["label_id"]) == {1}
