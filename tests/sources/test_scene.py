"""Raster scenes: windows are rasterio's own reads, footprints are those of rasterio's transforms."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import scenes
import shapely
import tifffile
from affine import Affine
from pyproj import Transformer
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp, Resampling
from rasterio.warp import transform_bounds
from scenes import UTM, all_windows, numbers, shards_of, tiling, window_of, windows_of, write
from servers import S3Server

from pipeline import sources
from pipeline.errors import InputRefused, ReadError
from pipeline.sources import ReadOptions, Record, gdal, scene
from pipeline.sources.shard import Shard
from pipeline.storage import access

SATELLITE = Path(__file__).resolve().parents[3] / "shared" / "data" / "satellite"


def assert_are_rasterios(path: Path, records: list[Record], size: int = 64) -> None:
    """Pixels, masks, transforms and footprints of the windows are what rasterio gives for the same windows."""
    with rasterio.open(path) as file:
        to_map = Transformer.from_crs(file.crs, "OGC:CRS84", always_xy=True) if file.crs else None
        for record in records:
            assert record.error is None
            window = window_of(record)
            expected = file.read(window=window, masked=True).transpose(1, 2, 0)
            height, width, bands = expected.shape
            if record.data is not None:
                assert record.data.shape == (size, size, bands)
                mask = np.ma.getmaskarray(record.data)
                inside = np.ma.getdata(record.data)[:height, :width]
                np.testing.assert_array_equal(mask[:height, :width], np.ma.getmaskarray(expected))
                np.testing.assert_array_equal(inside, np.ma.getdata(expected))
                assert mask[height:].all()
                assert mask[:, width:].all()
            valid = 1 - np.ma.getmaskarray(expected).all(axis=2).mean()
            assert record.kept["valid_fraction"] == pytest.approx(valid)
            assert record.is_empty == (valid < 0.1)
            if file.transform.is_identity:
                assert "transform" not in record.kept
                continue
            assert record.kept["transform"] == list(file.window_transform(window))[:6]
            if to_map is not None:
                assert_is_placed(record, file, to_map)


def assert_is_placed(record: Record, file: Any, to_map: Transformer) -> None:
    polygon = shapely.from_wkb(record.kept["geometry"])
    window = window_of(record)
    corners = [
        to_map.transform(*(file.transform @ (window.col_off + x * window.width, window.row_off + y * window.height)))
        for x, y in ((0, 0), (1, 0), (0, 1), (1, 1))
    ]
    for longitude, latitude in corners:
        points = [shapely.Point(longitude + turn, latitude) for turn in (-360, 0, 360)]
        assert min(polygon.distance(point) for point in points) < 1e-9
    if polygon.geom_type == "Polygon" and file.transform.is_rectilinear:
        x, y = zip(*(file.transform @ point for point in _corners(window)), strict=True)
        bounds = transform_bounds(file.crs, "OGC:CRS84", min(x), min(y), max(x), max(y), densify_pts=101)
        if -180 <= bounds[0] < bounds[2] <= 180 and bounds[3] < 89.99:
            pixel = (bounds[2] - bounds[0]) / window.width
            assert polygon.bounds == pytest.approx(bounds, abs=0.1 * pixel)
    assert list(record.kept["bbox"].values()) == list(polygon.bounds)
    assert record.kept["crs"] == f"EPSG:{file.crs.to_epsg()}"


def _corners(window: Any) -> list[tuple[float, float]]:
    right, bottom = window.col_off + window.width, window.row_off + window.height
    return [(window.col_off, window.row_off), (right, window.row_off), (window.col_off, bottom), (right, bottom)]


LAYOUTS: list[dict[str, Any]] = [
    {},
    {"compress": "deflate", "predictor": 2, "blockysize": 7},
    {"tiled": True, "blockxsize": 32, "blockysize": 48},
    {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "zstd", "interleave": "band"},
    {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "lzw", "BIGTIFF": "YES"},
    {"driver": "COG", "blocksize": 128, "compress": "deflate"},
    {"driver": "JP2OpenJPEG", "QUALITY": "100", "REVERSIBLE": "YES"},
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout.values())) or "plain")
@pytest.mark.parametrize("edge", ["pad", "drop", "shift"])
def test_layouts_of_files(layout: dict[str, Any], edge: str, tmp_path: Path) -> None:
    suffix = ".jp2" if layout.get("driver") == "JP2OpenJPEG" else ".tif"
    path = write(tmp_path / f"a{suffix}", numbers(3, 200, 330), **layout)
    records = all_windows(path, tiling(edge=edge))
    assert len(records) == {"pad": 24, "drop": 15, "shift": 24}[edge]
    assert_are_rasterios(path, records)
    assert [record.image_id for record in records[:2]] == [f"{path}#0,0", f"{path}#64,0"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
def test_number_types_and_non_square_scenes(dtype: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(2, 150, 70, dtype))
    records = all_windows(path)
    assert_are_rasterios(path, records)
    assert {record.data.dtype for record in records if record.data is not None} == {np.dtype(dtype)}


def test_overlapping_windows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 128, 128))
    records = all_windows(path, tiling(stride=32))
    assert len(records) == 9
    assert_are_rasterios(path, records)


PLACES: list[tuple[str, Affine]] = [
    ("EPSG:32618", Affine(10, 0, 500_000, 0, 10, 4_500_000)),  # south-up
    ("EPSG:32618", Affine(7, 7, 500_000, 7, -7, 4_500_000)),  # rotated
    ("EPSG:32618", Affine(10, 3, 500_000, 0, -10, 4_500_000)),  # sheared
    ("EPSG:4326", Affine(0.01, 0, 179.0, 0, -0.01, 10)),  # across 180°
    ("EPSG:4326", Affine(0.01, 0, 10, 0, 0.01, 40)),  # latitudes from the south
    ("EPSG:3857", Affine(100, 0, 1e6, 0, -100, 6e6)),
    ("EPSG:3413", Affine(1000, 0, -100_000, 0, -1000, 100_000)),  # the North Pole
    ("EPSG:3031", Affine(1000, 0, -80_000, 0, -1000, 70_000)),  # the South Pole
    ("EPSG:32760", Affine(30, 0, 700_000, 0, -30, 8_000_000)),
]


@pytest.mark.parametrize(("crs", "transform"), PLACES)
def test_places(crs: str, transform: Affine, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 150, 220), transform, crs)
    assert_are_rasterios(path, all_windows(path))


def test_pixel_is_point_is_half_a_pixel_away(tmp_path: Path) -> None:
    area, point = tmp_path / "area.tif", tmp_path / "point.tif"
    write(area, numbers(1, 64, 64))
    write(point, numbers(1, 64, 64))
    with rasterio.open(point, "r+") as file:
        file.update_tags(AREA_OR_POINT="Point")
    with rasterio.open(point, "r+") as file:
        file.transform = UTM
    data = point.read_bytes()
    one, other = (all_windows(each)[0].kept["transform"] for each in (area, point))
    assert one == other == list(UTM)[:6]
    # The file's own tie point is the centre of its first pixel: 500,005 E, 4,499,995 N.
    assert np.float64(500_005).tobytes() in data
    assert np.float64(4_499_995).tobytes() in data
    assert_are_rasterios(point, all_windows(point))


def gcps() -> list[GroundControlPoint]:
    return [GroundControlPoint(row, col, -75 + col / 1e4, 40 - row / 1e4) for row in (0, 64) for col in (0, 64)]


def test_ground_control_points_alone_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 64, 64), None, None)
    with rasterio.open(path, "r+") as file:
        file.gcps = (gcps(), rasterio.CRS.from_epsg(4326))
    with pytest.raises(ReadError, match=r"ground control points alone, .* warp it with gdalwarp"):
        shards_of(path)


@pytest.mark.parametrize(("transform", "crs"), [(UTM, None), (None, None), (None, "EPSG:32618")])
def test_a_scene_without_georeferencing_has_rows_without_geometry(
    transform: Affine | None, crs: str | None, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 128, 64), transform, crs)
    notices = [each.notices for each in scene.shards(access.head(str(path)), ReadOptions(tiling=tiling()))]
    assert notices == [(scene.NO_GEOMETRY,)]
    records = all_windows(path)
    assert [record.kept.get("geometry") for record in records] == [None, None]
    assert [record.kept.get("crs") for record in records] == [None, None]
    assert [("transform" in record.kept) for record in records] == [transform is not None] * 2
    assert [record.kept["window_row"] for record in records] == [0, 64]


@pytest.mark.parametrize(("crs", "name"), [("IAU_2015:49910", "Mars"), ("IAU_2015:30100", "Moon")])
def test_other_bodies_are_refused_by_name(crs: str, name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 64, 64), UTM, crs)
    with pytest.raises(ReadError, match=rf"{name}.*another celestial body.*reproject it, or remove its CRS"):
        shards_of(path)


def test_a_world_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 64, 64), None, None)
    (tmp_path / "a.tfw").write_text("10\n0\n0\n-10\n500005\n4499995\n")
    assert all_windows(path)[0].kept["transform"] == list(UTM)[:6]


# No data


def cut_header(path: Path, height: int) -> Path:
    """Change the height in the header of a TIFF, and nothing else."""
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["ImageLength"].overwrite(height)  # type: ignore[union-attr]
    return path


@pytest.mark.parametrize(
    "layout",
    [
        {"blockysize": 100},
        {"blockysize": 100, "nodata": 0},
        {"blockysize": 50, "compress": "deflate"},
        {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "pixel"},
        {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "band", "compress": "lzw"},
    ],
)
def test_a_header_that_is_taller_than_its_blocks(layout: dict[str, Any], tmp_path: Path) -> None:
    path = cut_header(write(tmp_path / "a.tif", numbers(3, 100, 64), **layout), 300)
    records = all_windows(path)
    assert len(records) == 5
    for record in records:
        assert record.error is not None
        assert record.error.error_type == "corrupt"
        assert "its size of 64 × 300 pixels has" in record.error.message


@pytest.mark.parametrize("interleave", ["pixel", "band"])
def test_blocks_that_a_sparse_file_leaves_out_have_no_data(interleave: str, tmp_path: Path) -> None:
    array = numbers(2, 256, 128)
    array[:, 64:128] = array[:, 128:, 64:] = 0
    blocks = {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": interleave}
    path = write(tmp_path / "a.tif", array, **blocks, SPARSE_OK="TRUE")
    for more in ({}, {"resolution": 20.0, "size": 32, "stride": 32}):
        records = all_windows(path, tiling(**more))
        assert [record.is_empty for record in records] == [False, False, True, True, False, True, False, True]
        assert {record.kept["valid_fraction"] for record in records} == {0, 1}
    (half, *_) = all_windows(path, tiling(128))
    assert half.kept["valid_fraction"] == 0.5
    assert np.ma.getmaskarray(half.data)[64:].all()
    dense = write(tmp_path / "b.tif", array, **blocks)
    assert {record.kept["valid_fraction"] for record in all_windows(dense)} == {1}


def test_nodata_values(tmp_path: Path) -> None:
    array = numbers(3, 128, 192)
    array[:, :64, :64] = 0  # empty
    array[:, 64:, :60] = 0  # nearly empty
    array[0, :64, 64:128] = 0  # one band of three
    path = write(tmp_path / "a.tif", array, nodata=0)
    records = all_windows(path)
    assert_are_rasterios(path, records)
    assert [record.is_empty for record in records] == [True, False, False, True, False, False]
    assert [record.data is None for record in records] == [record.is_empty for record in records]
    assert records[1].kept["valid_fraction"] == 1
    assert [record.is_empty for record in all_windows(path, tiling(max_nodata=1.0))] == [True, *[False] * 5]


@pytest.mark.parametrize("nodata", [None, float("nan"), -9999.0])
def test_nan_is_no_data(nodata: float | None, tmp_path: Path) -> None:
    array = numbers(1, 64, 128, "float32")
    array[:, :, :32] = np.nan
    array[:, :, 64:] = np.nan
    records = all_windows(write(tmp_path / "a.tif", array, nodata=nodata))
    assert [record.kept["valid_fraction"] for record in records] == [0.5, 0.0]
    assert np.ma.getmaskarray(records[0].data)[:, :32].all()
    assert not np.ma.getmaskarray(records[0].data)[:, 32:].any()


@pytest.mark.parametrize("is_internal", [True, False])
def test_mask_bands(is_internal: bool, tmp_path: Path) -> None:
    mask = np.full((128, 128), 255, np.uint8)
    mask[:64, :64] = 0
    mask[64:, :32] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=is_internal):
        path = write(tmp_path / "a.tif", numbers(3, 128, 128), tiled=True, blockxsize=64, blockysize=64)
        with rasterio.open(path, "r+") as file:
            file.write_mask(mask)
    assert (tmp_path / "a.tif.msk").exists() != is_internal
    records = all_windows(path)
    assert_are_rasterios(path, records)
    assert [record.is_empty for record in records] == [True, False, False, False]
    assert records[2].kept["valid_fraction"] == 0.5


def test_alpha_is_a_mask_and_no_band(tmp_path: Path) -> None:
    array = numbers(4, 64, 128)
    array[3] = 255
    array[3, :, :64] = 0
    array[3, :32, 64:] = 0
    path = write(tmp_path / "a.tif", array, photometric="RGB", alpha="unspecified")
    with rasterio.open(path, "r+") as file:
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
    records = all_windows(path)
    assert [record.is_empty for record in records] == [True, False]
    assert records[1].data is not None
    assert records[1].data.shape == (64, 64, 3)
    assert records[1].kept["valid_fraction"] == 0.5
    np.testing.assert_array_equal(np.ma.getdata(records[1].data), array[:3, :, 64:].transpose(1, 2, 0))


def test_a_scene_without_one_valid_pixel(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.zeros((1, 128, 128), np.uint8), nodata=0)
    assert [record.is_empty for record in all_windows(path, tiling(max_nodata=1.0))] == [True] * 4


def test_a_scene_smaller_than_a_window(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(3, 10, 20))
    for edge in ("pad", "shift"):
        (record,) = all_windows(path, tiling(edge=edge))
        assert (record.kept["window_width"], record.kept["window_height"]) == (20, 10)
        assert record.kept["valid_fraction"] == 1
        assert_are_rasterios(path, [record])
    (shard,) = shards_of(path, tiling(edge="drop"))
    assert (shard.rows, windows_of(shard)) == (0, [])


# Bands


def test_bands_are_chosen_by_number_and_name(tmp_path: Path) -> None:
    array = numbers(5, 64, 64, "uint16")
    path = write(tmp_path / "a.tif", array, interleave="band")
    with rasterio.open(path, "r+") as file:
        file.descriptions = ("B02", "B03", "B04", "B08", "SCL")
    (record,) = all_windows(path, bands=("B04", "2", "B02"))
    np.testing.assert_array_equal(record.data, array[[2, 1, 0]].transpose(1, 2, 0))
    with pytest.raises(ReadError, match="has 5 bands and no band 'B05' for --bands; its names: B02, B03"):
        shards_of(path, bands=("B05",))
    with pytest.raises(ReadError, match="no band '6'"):
        shards_of(path, bands=("6",))


def test_the_first_three_bands_of_rgb_and_infrared(tmp_path: Path) -> None:
    array = numbers(4, 64, 64)
    path = write(tmp_path / "a.tif", array, photometric="RGB", alpha="no")
    (record,) = all_windows(path)
    np.testing.assert_array_equal(record.data, array[:3].transpose(1, 2, 0))
    assert all_windows(path, network_bands=4)[0].data.shape == (64, 64, 4)  # type: ignore[union-attr]


def test_scale_and_offset_are_noted_and_not_applied(tmp_path: Path) -> None:
    array = numbers(1, 64, 64, "uint16")
    path = write(tmp_path / "a.tif", array)
    with rasterio.open(path, "r+") as file:
        file.scales, file.offsets = (0.0001,), (-0.1,)
    (contents,) = scene.shards(access.head(str(path)), ReadOptions(tiling=tiling()))
    assert contents.notices == (scene.NOT_UNSCALED,)
    assert isinstance(contents.payload, scene.Scene)
    assert (contents.payload.bands[0].scale, contents.payload.bands[0].offset) == (0.0001, -0.1)
    np.testing.assert_array_equal(all_windows(path)[0].data, array.transpose(1, 2, 0))


@pytest.mark.parametrize(
    ("profile", "dtype", "reason"),
    [
        ({"photometric": "palette"}, "uint8", "table of colours"),
        ({"photometric": "miniswhite"}, "uint8", "white is zero"),
        ({"nbits": 4}, "uint8", "4 bits per number"),
        ({}, "complex64", "its numbers are complex64"),
    ],
)
def test_numbers_with_another_meaning_are_refused(
    profile: dict[str, Any], dtype: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "a.tif"
    with rasterio.open(path, "w", driver="GTiff", width=64, height=64, count=1, dtype=dtype, **profile) as file:
        if profile.get("photometric") == "palette":
            file.write_colormap(1, {0: (0, 0, 0, 255), 1: (255, 0, 0, 255)})
        file.write(np.ones((1, 64, 64), dtype))
    with pytest.raises(ReadError, match=f"not supported as a scene: .*{reason}"):
        shards_of(path)


def test_a_tiff_of_several_pages_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 64, 64))
    write(path, numbers(1, 64, 64), APPEND_SUBDATASET="YES")
    with pytest.raises(ReadError, match="it has 2 pages; write each to a file of its own"):
        shards_of(path)


# Resolution and overviews


@pytest.mark.parametrize("where", ["none", "internal", "external"])
def test_resolution_reads_overviews(where: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 512, 700), tiled=True, blockxsize=64, blockysize=64)
    if where != "none":
        with rasterio.Env(TIFF_USE_OVR=where == "external"), rasterio.open(path, "r+") as file:
            file.build_overviews([2, 4], Resampling.average)
    assert (tmp_path / "a.tif.ovr").exists() == (where == "external")
    with rasterio.open(path) as file:
        assert file.overviews(1) == ([] if where == "none" else [2, 4])
        records = all_windows(path, tiling(resolution=40.0))
        assert len(records) == 3 * 2
        for record in records:
            window = window_of(record)
            shape = (1, round(window.height / 4), round(window.width / 4))
            expected = file.read(window=window, out_shape=shape, resampling=Resampling.average)
            assert record.data is not None
            np.testing.assert_array_equal(np.ma.getdata(record.data)[: shape[1], : shape[2], 0], expected[0])
    assert window_of(records[0]).width == 256
    assert window_of(records[2]).width == 700 - 512
    assert records[0].kept["transform"] == list(UTM)[:6]


def test_external_overviews_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 256, 256))
    with rasterio.Env(TIFF_USE_OVR=True), rasterio.open(path, "r+") as file:
        file.build_overviews([4], Resampling.average)
    with rasterio.open(f"{path}.ovr", "r+") as file:
        file.write(np.full((1, 64, 64), 77, np.uint8))
    (record,) = all_windows(path, tiling(resolution=40.0))
    assert (np.ma.getdata(record.data) == 77).all()


def test_resolution_of_degrees_and_of_finer_pixels(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 100, 100), Affine(0.001, 0, 10, 0, -0.001, 60.05), "EPSG:4326")
    (payload,) = [shard.payload for shard in shards_of(path, tiling(resolution=111.4))]
    assert isinstance(payload, scene.Scene)
    assert payload.factors == (pytest.approx(2, abs=0.01), pytest.approx(1, abs=0.01))
    utm = write(tmp_path / "b.tif", numbers(1, 64, 64))
    finer = all_windows(utm, tiling(resolution=5.0))
    assert [window_of(record).width for record in finer] == [32] * 4
    with rasterio.open(utm) as file:
        expected = file.read(window=window_of(finer[1]), out_shape=(1, 64, 64), resampling=Resampling.bilinear)
    np.testing.assert_array_equal(finer[1].data, expected.transpose(1, 2, 0))


def test_windows_whose_edges_lie_between_pixels_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 100, 100))
    with pytest.raises(ReadError, match=r"a window of 7 pixels covers 2\.1 of its pixels; .* off by up to 48%"):
        shards_of(path, tiling(7, resolution=3.0))
    assert {window_of(record).width for record in all_windows(path, tiling(10, resolution=3.0))} == {3, 1}


def test_a_scene_with_tiny_pixels_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 64, 64), Affine(1e-310, 0, 500_000, 0, -1e-310, 4_500_000))
    with pytest.raises(ReadError, match=r"metres; is its transform right|invalid transform"):
        shards_of(path, tiling(resolution=10.0))


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_numbers_of_8_bits_are_no_digital_numbers_of_sentinel2(dtype: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", np.ones((1, 64, 64), dtype))
    with pytest.raises(ReadError, match="digital numbers of Sentinel-2"):
        shards_of(path, harmonize="on")


def test_metres_of_a_scene_beside_the_earth(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 64, 64), Affine(0.1, 0, 10, 0, -0.1, 120), "EPSG:4326")
    with pytest.raises(ReadError, match="is not on the Earth"):
        shards_of(path, tiling(resolution=20.0))
    assert {record.kept.get("geometry") for record in all_windows(path)} == {None}


def test_resolution_needs_georeferencing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 64, 64), UTM, None)
    with pytest.raises(ReadError, match="which --resolution needs"):
        shards_of(path, tiling(resolution=20.0))


# VRT


def test_a_vrt_of_files_in_folders(tmp_path: Path) -> None:
    array = numbers(3, 128, 192)
    write(tmp_path / "bands" / "a.tif", array)
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{index}"><SimpleSource><SourceFilename relativeToVRT="1">bands/a.tif'
        f"</SourceFilename><SourceBand>{4 - index}</SourceBand></SimpleSource></VRTRasterBand>"
        for index in (1, 2, 3)
    )
    transform = "500000, 10, 0, 4500000, 0, -10"
    header = f"<SRS>EPSG:32618</SRS><GeoTransform>{transform}</GeoTransform>"
    path = tmp_path / "a.vrt"
    path.write_text(f'<VRTDataset rasterXSize="192" rasterYSize="128">{header}{bands}</VRTDataset>')
    records = all_windows(path)
    assert len(records) == 6
    assert_are_rasterios(path, records)
    (tmp_path / "bands" / "a.tif").unlink()
    assert {record.error and record.error.error_type for record in all_windows(path)} == {"corrupt"}


def test_a_scene_needs_tile_size(tmp_path: Path) -> None:
    info = access.head(str(write(tmp_path / "a.tif", numbers(1, 9, 9))))
    with pytest.raises(InputRefused, match="give --tile-size"):
        list(scene.shards(info, ReadOptions()))


# Faults


def test_a_truncated_scene_gives_errors_for_the_windows_that_cannot_be_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(3, 256, 256), tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    whole = all_windows(path)
    os.truncate(path, path.stat().st_size * 2 // 3)
    records = all_windows(path)
    errors = [record.error and record.error.error_type for record in records]
    good = [record for record, error in zip(records, errors, strict=True) if not error]
    assert set(errors) == {None, "truncated"}
    assert 8 <= len(good) <= 12
    assert all(np.array_equal(a.data, b.data) for a, b in zip(good, whole, strict=False))


def test_broken_bytes_cost_their_windows(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 256, 256), tiled=True, blockxsize=64, blockysize=64, compress="deflate")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    path.write_bytes(data)
    errors = [record.error and record.error.error_type for record in all_windows(path)]
    assert errors.count("corrupt") in (1, 2)
    assert errors.count(None) >= 14


def test_a_broken_header_is_one_error(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(b"II*\0" + bytes(100))
    with pytest.raises(ReadError) as caught:
        shards_of(path)
    assert caught.value.error_type == "corrupt"
    *items, end = sources.read(Shard(0, "scene", str(path)), ((0, 1 << 62),), ReadOptions(tiling=tiling()))
    assert [item.error.error_type for item in items] == ["corrupt"]  # type: ignore[union-attr]
    assert end.rows == 1  # type: ignore[union-attr]


def test_a_missing_or_replaced_scene(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(1, 128, 64))
    (shard,) = shards_of(path)
    time.sleep(0.01)
    write(path, numbers(1, 128, 64, seed=1))
    assert [record.error.error_type for record in windows_of(shard) if record.error] == ["changed"] * 2
    path.unlink()
    assert [record.error.error_type for record in windows_of(shard) if record.error] == ["not_found"] * 2


def test_a_replaced_mask_is_a_changed_scene(tmp_path: Path) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        path = write(tmp_path / "a.tif", numbers(1, 64, 64))
        with rasterio.open(path, "r+") as file:
            file.write_mask(np.full((64, 64), 255, np.uint8))
    (shard,) = shards_of(path)
    mask = tmp_path / "a.tif.msk"
    time.sleep(0.01)
    mask.write_bytes(mask.read_bytes() + b"\0")
    assert [record.error and record.error.error_type for record in windows_of(shard)] == ["changed"]


def test_only_the_rows_in_todo_are_read(tmp_path: Path) -> None:
    (shard,) = shards_of(write(tmp_path / "a.tif", numbers(1, 256, 256)))
    whole = windows_of(shard)
    part = windows_of(shard, ((3, 5), (14, 99)))
    assert [record.row for record in part] == [3, 4, 14, 15]
    assert all(np.array_equal(record.data, whole[record.row].data) for record in part)
    assert len(windows_of(replace(shard, rows=5))) == 5


def test_a_read_that_is_closed_early_closes_its_files(tmp_path: Path) -> None:
    (shard,) = shards_of(write(tmp_path / "a.tif", numbers(1, 256, 256)))
    windows_of(shard)
    before = os.listdir("/proc/self/fd")
    reading = sources.read(shard, ((0, 99),), ReadOptions(network_bands=3))
    next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert os.listdir("/proc/self/fd") == before


# Stores


def test_http_fetches_each_block_once(tmp_path: Path) -> None:
    layout = {"tiled": True, "blockxsize": 128, "blockysize": 128, "compress": "deflate"}
    path = write(tmp_path / "a.tif", numbers(3, 900, 1100), **layout)
    with scenes.counting_server(tmp_path) as (url, server):
        shards = shards_of(f"{url}/a.tif", tiling(100))
        server.ranges.clear()
        records = [record for shard in shards for record in windows_of(shard)]
    assert_are_rasterios(path, [replace(each, image_id="") for each in records], 100)
    fetched = np.zeros(path.stat().st_size, int)
    for _, start, stop in server.ranges:
        fetched[start:stop] += 1
    assert fetched.min() == 1
    assert fetched.sum() <= path.stat().st_size + 2 * (1 << 16)  # small reads fetch 64 KiB: the header, the last tile


def test_strips_are_fetched_once_and_in_few_requests(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", numbers(3, 900, 1100), compress="deflate")
    with scenes.counting_server(tmp_path) as (url, server):
        shards = shards_of(f"{url}/a.tif", tiling(100))
        server.ranges.clear()
        assert not [record.error for shard in shards for record in windows_of(shard) if record.error]
    assert sum(stop - start for _, start, stop in server.ranges) <= path.stat().st_size + (1 << 16)
    assert len(server.ranges) < 16


def test_only_chosen_bands_are_fetched(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tif", numbers(10, 512, 512), tiled=True, blockxsize=128, blockysize=128, interleave="band"
    )
    with scenes.counting_server(tmp_path) as (url, server):
        all_windows(f"{url}/a.tif", bands=("1",))
        assert sum(stop - start for _, start, stop in server.ranges) < path.stat().st_size / 4


def test_s3(s3: S3Server, tmp_path: Path) -> None:
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        path = write(tmp_path / "a.tif", numbers(3, 200, 300))
        with rasterio.open(path, "r+") as file:
            file.write_mask(np.tri(200, 300, dtype=np.uint8) * 255)
    for name in ("a.tif", "a.tif.msk"):
        access.write(s3.uri(f"scenes/{name}"), (tmp_path / name).read_bytes())
    records = all_windows(s3.uri("scenes/a.tif"))
    assert_are_rasterios(path, records)
    assert [record.is_empty for record in records].count(True) > 2
    access.write(s3.uri("scenes/a.tif"), path.read_bytes() + b"\0")
    (shard,) = shards_of(path)
    planned = replace(shard, uri=s3.uri("scenes/a.tif"), etag='"other"')
    payload = shard.payload
    assert isinstance(payload, scene.Scene)
    file = replace(payload.files[0], uri=planned.uri, etag='"other"', siblings={})
    moved = replace(planned, payload=replace(payload, files=(file,)))
    assert {record.error and record.error.error_type for record in windows_of(moved)} == {"changed"}


def test_a_store_that_fails_is_unreadable_and_not_corrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.tif", numbers(3, 512, 512), tiled=True, blockxsize=128, blockysize=128)
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "0")
    monkeypatch.setattr(gdal, "AHEAD_BYTES", 100_000)  # otherwise the whole file is here before it is gone
    with scenes.counting_server(tmp_path) as (url, _):
        (shard,) = shards_of(f"{url}/a.tif")
        reading = sources.read(shard, ((0, 64),), ReadOptions(network_bands=3))
        first = next(reading)
        assert isinstance(first, Record)
        assert first.error is None
        path.rename(tmp_path / "gone.tif")
        rest = [item for item in reading if isinstance(item, Record)]
    types = [record.error and record.error.error_type for record in rest]
    assert set(types) - {None} <= {"not_found", "unreadable"}
    assert types[-1] in ("not_found", "unreadable")
    assert len(rest) == 63


# Size


def test_a_large_scene_is_cut_into_shards(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    layout = {"tiled": True, "blockxsize": 512, "blockysize": 512, "sparse_ok": True, "nodata": 0}
    shape = {"width": 30_000, "height": 40_000, "count": 3, "dtype": "uint8"}
    with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32618", transform=UTM, **shape, **layout):
        pass
    shards = shards_of(path, tiling(224))
    windows = [shard.payload.spans(row) for shard in shards for row in range(shard.rows or 0)]  # type: ignore[union-attr]
    assert len(shards) == 12
    assert len(windows) == len(set(windows)) == 134 * 179
    assert sum(shard.size_bytes for shard in shards) <= path.stat().st_size
    assert all(record.is_empty for record in windows_of(shards[3], ((0, 50),)))


@pytest.mark.parametrize(
    "layout", [pytest.param("tiled", marks=pytest.mark.slow), pytest.param("striped", marks=pytest.mark.long)]
)
def test_memory_of_a_scene_of_ten_gigapixels(layout: str, tmp_path: Path) -> None:
    """A shard of a sparse scene of 100,000 × 100,000 pixels is read within 500 MB."""
    code = f"""
import sys
sys.path[:0] = ["tests/support"]
import rasterio, scenes
from pathlib import Path
from pipeline import sources
from pipeline.sources import ReadOptions
layout = dict(tiled=True, blockxsize=512, blockysize=512) if {layout == "tiled"} else dict(blockysize=1)
shape = dict(width=100_000, height=100_000, count=3, dtype="uint8", nodata=0, sparse_ok=True, compress="deflate")
path = r"{tmp_path}/a.tif"
with rasterio.open(path, "w", driver="GTiff", crs="EPSG:32618", transform=scenes.UTM, BIGTIFF="YES", **shape, **layout):
    pass
shards = scenes.shards_of(path, scenes.tiling(224))
assert sum(shard.rows for shard in shards) == 447 ** 2
rows = sum(1 for shard in shards[:2] for _ in sources.read(shard, ((0, 1 << 62),), ReadOptions(network_bands=3)))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(rows, peak.split()[1])  # ru_maxrss begins at the size of the process that forked this one
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    rows, kilobytes = map(int, done.stdout.split())
    assert rows > 1000
    assert kilobytes < 500_000


# Real scenes


@pytest.mark.parametrize(("name", "windows"), [("landsat_rgb_utm18n.tif", 16), ("scene_int16_utm21n.tif", 144)])
def test_real_scenes(name: str, windows: int) -> None:
    path = SATELLITE / name
    if not path.exists():
        pytest.skip(f"{path} is missing")
    records = all_windows(path, tiling(224))
    assert len(records) == windows
    assert_are_rasterios(path, records, 224)


@pytest.mark.parametrize(
    ("dtype", "bands", "options", "message"),
    [
        ("uint8", 13, {"network_bands": 3}, "gives 13 bands, and the network takes 3; choose them with --bands"),
        ("uint8", 2, {"network_bands": 4}, "gives 2 bands, and the network takes 4"),
        ("int16", 3, {"needs_8_bits": True}, "holds numbers of type int16, .* --scale MIN:MAX"),
    ],
)
def test_scenes_that_the_network_cannot_take_are_refused_when_they_are_planned(
    dtype: str, bands: int, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.tif", numbers(bands, 64, 64, dtype))
    with pytest.raises(ReadError, match=message):
        shards_of(path, **options)
    assert shards_of(path)


def test_a_scene_that_needs_too_much_memory_is_refused(tmp_path: Path) -> None:
    """Strips of 1.2 GB, compressed: nothing less can be decoded."""
    path = tmp_path / "a.tif"
    shape = {"width": 20_000, "height": 20_000, "count": 3, "dtype": "uint8", "sparse_ok": True, "BIGTIFF": "YES"}
    with rasterio.open(path, "w", driver="GTiff", compress="deflate", blockysize=19_999, **shape):
        pass
    with pytest.raises(ReadError, match=r"blocks of 20000 × 19999 pixels, .* gdal_translate -of COG"):
        shards_of(path)


def test_a_scene_of_more_windows_than_any_real_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    layout = {"tiled": True, "blockxsize": 4096, "blockysize": 4096, "sparse_ok": True, "BIGTIFF": "YES"}
    with rasterio.open(path, "w", driver="GTiff", width=200_000, height=200_000, count=1, dtype="uint8", **layout):
        pass
    with pytest.raises(ReadError, match="would be 40000000000 windows"):
        shards_of(path, tiling(1))
