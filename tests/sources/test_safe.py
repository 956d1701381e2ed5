"""Scenes of several files: bands of several resolutions on one grid, and Sentinel-2 products."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from items import METRES, band, grid, write_safe
from scenes import tiling, windows_of, write
from servers import S3Server

from pipeline.config import RunConfig
from pipeline.errors import InputRefused, ReadError
from pipeline.models import input_spec
from pipeline.planning.archive import Archive
from pipeline.sources import Record, gdal
from pipeline.sources.scene import Scene
from pipeline.sources.shard import Shard
from pipeline.sources.stack import stack
from pipeline.storage import access

SPEC = input_spec.load("sentinel2-all")


def planned(input: object, **settings: Any) -> tuple[list[Shard], Archive]:
    config = RunConfig(input=str(input), output="/none", **{"tile_size": 64, **settings})
    archive = Archive(config)
    archive.use_bands(SPEC.bands, config.harmonize)
    return list(archive.shards()), archive


def read(shard: Shard, **options: Any) -> list[Record]:
    more = {"network_bands": 13, "wanted": SPEC.bands, "harmonize": "auto", **options}
    return windows_of(shard, **more)


def expected(name: str, column: int, row: int, metres: int = 10, size: int = 64) -> np.ndarray:
    """The linear function of `items.band` at the pixels of a window."""
    x = (np.arange(column, column + size) + 0.5) * metres
    y = (np.arange(row, row + size) + 0.5) * metres
    return 100 * (1 + list(METRES).index(name)) + 0.5 * x[None, :] + 0.25 * y[:, None]


def assert_is_linear(records: list[Record], tolerance: float = 2.0, metres: int = 10) -> None:
    """Inside of a product every band is the same function of the place; at its edge bilinear has no neighbour."""
    order = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
    for record in records:
        assert record.error is None
        assert isinstance(record.data, np.ma.MaskedArray)
        column, row = record.kept["window_col"], record.kept["window_row"]
        assert not np.ma.getmaskarray(record.data).any()
        for place, name in enumerate(order):
            values = record.data.data[..., place].astype(float)
            error = np.abs(values - expected(name, column, row, metres))
            inside = error[4:-4, 4:-4] if min(column, row) == 0 or max(column, row) >= 128 else error
            assert inside.max() <= tolerance, (name, column, row, inside.max())


@pytest.mark.parametrize(("baseline", "offset"), [("02.04", 0), ("05.11", 1000)])
def test_bands_of_10_20_and_60_metres_are_one_scene(tmp_path: Path, baseline: str, offset: int) -> None:
    product = write_safe(tmp_path / "in", baseline=baseline, stored_offset=offset)
    shards, archive = planned(tmp_path / "in")
    (shard,) = shards
    assert (shard.kind, shard.uri, shard.rows) == ("safe", f"{product}/MTD_MSIL1C.xml", 9)
    assert isinstance(shard.payload, Scene)
    assert {file.factor for file in shard.payload.files} == {(1.0, 1.0), (2.0, 2.0), (6.0, 6.0)}
    assert shard.payload.offset == offset
    said = "the offset of 1000 is subtracted" if offset else "no offset is subtracted"
    assert [said in line for line in archive.notices.lines()] == [True]
    records = read(shard)
    assert records[0].image_id == f"{product}#0,0"
    assert records[0].source == str(product)
    assert_is_linear(records)


def test_resolution_of_20_metres_averages_10_and_enlarges_60(tmp_path: Path) -> None:
    write_safe(tmp_path / "in")
    (shard,) = planned(tmp_path / "in", resolution=20.0, tile_size=32)[0]
    assert shard.rows == 9
    for record in read(shard):
        column, row = record.kept["window_col"], record.kept["window_row"]
        assert (record.kept["window_width"], record.kept["window_height"]) == (64, 64)
        values = record.data.data[4:-4, 4:-4, 1].astype(float)  # type: ignore[union-attr]
        ideal = expected("B02", column // 2, row // 2, 20, 32)[4:-4, 4:-4]
        assert np.abs(values - ideal).max() <= 1


def test_zeros_of_a_large_window_are_averaged_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_safe(tmp_path / "in")
    (shard,) = planned(tmp_path / "in", resolution=60.0, tile_size=32)[0]
    (whole,) = read(shard)
    monkeypatch.setattr(gdal, "MAX_NATIVE_PIXELS", 2000)
    (in_strips,) = read(shard)
    np.testing.assert_array_equal(whole.data, in_strips.data)  # type: ignore[arg-type]
    ideal = expected("B02", 0, 0, 60, 32)
    np.testing.assert_allclose(whole.data.data[..., 1], ideal, atol=1)  # type: ignore[union-attr]


def test_the_resampling_can_be_chosen(tmp_path: Path) -> None:
    write_safe(tmp_path / "in")
    results = {}
    for name in ("auto", "nearest", "bilinear", "cubic"):
        (shard,) = planned(tmp_path / "in", resampling=name)[0]
        results[name] = read(shard)[4].data.data[..., 0]  # type: ignore[union-attr]
    np.testing.assert_array_equal(results["auto"], results["bilinear"])
    nearest = results["nearest"]
    np.testing.assert_array_equal(nearest[2:62:6, 2:62:6], nearest[3:63:6, 3:63:6])  # blocks of 6 × 6
    assert (results["bilinear"] != nearest).mean() > 0.5
    assert (results["cubic"] != nearest).mean() > 0.5


def test_l2a_takes_the_finest_file_of_a_band_and_has_no_b10(tmp_path: Path) -> None:
    product = write_safe(tmp_path / "in", level="2A")
    with pytest.raises(InputRefused, match=r"lacks B10 of the input specification \(its bands: B01, B02"):
        planned(tmp_path / "in")
    (shard,) = planned(tmp_path / "in", bands="B04,B03,B02")[0]
    assert isinstance(shard.payload, Scene)
    names = [file.uri.rpartition("_T")[2][-12:] for file in shard.payload.files]
    assert all(name.endswith("_10m.jp2") for name in names)
    assert len(names) == 3
    record = windows_of(shard, bands=("B04", "B03", "B02"))[4]
    for place, name in enumerate(("B04", "B03", "B02")):
        np.testing.assert_allclose(record.data.data[..., place], expected(name, 64, 64), atol=1)  # type: ignore[union-attr]
    assert str(product) == shard.payload.uri


def test_a_declared_value_stands_for_a_missing_band(tmp_path: Path) -> None:
    write_safe(tmp_path / "in", level="2A", baseline="05.11", stored_offset=1000)
    text = (input_spec.FOLDER / "sentinel2-all.yaml").read_text()
    (tmp_path / "own.yaml").write_text(text + "missing: {B10: 0.5}\n")
    wanted = input_spec.load(str(tmp_path / "own.yaml")).bands
    archive = Archive(RunConfig(input=str(tmp_path / "in"), output="/none", tile_size=64))
    archive.use_bands(wanted, "auto")
    (shard,) = archive.shards()
    numbers = read(shard, wanted=wanted)[4].data
    assert isinstance(numbers, np.ma.MaskedArray)
    assert set(numbers[..., 10].ravel().tolist()) == {0.5}
    np.testing.assert_allclose(numbers.data[..., 1], expected("B02", 64, 64), atol=1)
    np.testing.assert_allclose(numbers.data[..., 12], expected("B12", 64, 64), atol=2)


def test_zeros_are_no_data_and_are_not_mixed_into_other_numbers(tmp_path: Path) -> None:
    product = write_safe(tmp_path / "in")
    path = next(product.glob("GRANULE/*/IMG_DATA/*_B11.jp2"))
    array = band("B11")
    array[:, :48] = 0
    write(path, array, grid(20), "EPSG:32633", driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES")
    (shard,) = planned(tmp_path / "in")[0]
    record = read(shard)[4]  # rows 64 to 128 of 10 m: 32 rows of them have no data
    numbers = record.data
    assert isinstance(numbers, np.ma.MaskedArray)
    mask = np.ma.getmaskarray(numbers)[..., 11]
    assert mask[:31].all()
    assert not mask[33:].any()
    lowest = np.ma.getdata(numbers)[..., 11][~mask].min()
    assert lowest >= expected("B11", 64, 96).min() - 5
    assert record.kept["valid_fraction"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transform": grid(20, shift=5)}, r"_B05\.jp2 is not on the grid of .*: its pixels are shifted by 0.5 pixels"),
        ({"crs": "EPSG:32634"}, "_B05.jp2 is not on the grid of .*: its CRS is EPSG:32634, not EPSG:32633"),
        ({"transform": grid(21)}, "_B05.jp2 is not on the grid of .*: its 96 × 96 pixels cover another area"),
    ],
)
def test_files_on_other_grids_are_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    product = write_safe(tmp_path / "in")
    path = next(product.glob("GRANULE/*/IMG_DATA/*_B05.jp2"))
    place = {"transform": grid(20), "crs": "EPSG:32633", **change}
    write(path, band("B05"), driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES", **place)
    with pytest.raises(InputRefused, match=message):
        planned(tmp_path / "in")


def test_a_contradiction_about_the_offset_is_refused(tmp_path: Path) -> None:
    product = write_safe(tmp_path / "in", baseline="05.11", stored_offset=1000)
    text = (product / "MTD_MSIL1C.xml").read_text().replace("-1000", "0")
    (product / "MTD_MSIL1C.xml").write_text(text)
    with pytest.raises(InputRefused, match="contradicts itself about Sentinel-2's offset"):
        planned(tmp_path / "in")
    (shard,) = planned(tmp_path / "in", harmonize="on")[0]
    assert isinstance(shard.payload, Scene)
    assert shard.payload.offset == 1000


def test_a_truncated_band_gives_error_rows(tmp_path: Path) -> None:
    product = write_safe(tmp_path / "in")
    path = next(product.glob("GRANULE/*/IMG_DATA/*_B08.jp2"))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (shard,) = planned(tmp_path / "in")[0]
    records = read(shard)
    assert len(records) == 9
    assert all(record.error is None or record.error.error_type in ("corrupt", "truncated") for record in records)
    assert any(record.error and "_B08.jp2 cannot be read" in record.error.message for record in records)


def test_products_in_a_bucket_beside_other_objects(s3: S3Server, tmp_path: Path) -> None:
    product = write_safe(tmp_path / "in")
    prefix = f"safe-{tmp_path.name}"
    for path in product.rglob("*"):
        if path.is_file():
            access.write(s3.uri(f"{prefix}/{path.relative_to(tmp_path / 'in')}"), path.read_bytes())
    access.write(s3.uri(f"{prefix}/{product.name}.zip.txt"), b"x")
    shards, archive = planned(s3.uri(prefix))
    assert [shard.uri for shard in shards] == [s3.uri(f"{prefix}/{product.name}/MTD_MSIL1C.xml")]
    assert archive.left_out.counts == {".txt": 1}
    assert_is_linear(read(shards[0]))


def test_products_without_bands_or_metadata(tmp_path: Path) -> None:
    product = write_safe(tmp_path / "in")
    (product / "MTD_MSIL1C.xml").unlink()
    (shard,) = planned(tmp_path / "in")[0]  # the name has the baseline
    assert isinstance(shard.payload, Scene)
    assert shard.payload.reason == "processing baseline 02.04 of its name"
    archive = Archive(RunConfig(input=str(tmp_path / "in"), output="/none", tile_size=64), network_bands=3)
    with pytest.raises(InputRefused, match=r"has 13 bands, and the network takes 3; .* --bands B04,B03,B02"):
        list(archive.shards())


def test_stack_takes_the_finest_grid(tmp_path: Path) -> None:
    names = ("B08", "B05")
    scenes = []
    for name in names:
        path = write(tmp_path / f"{name}.tif", band(name), grid(METRES[name]), "EPSG:32633")
        scenes.append(gdal.inspect(access.head(str(path)), tiling())[0])
    for given in (scenes, scenes[::-1]):
        whole = stack(given, "x")
        assert (whole.width, whole.height, whole.uri) == (192, 192, "x")
    with pytest.raises(ReadError, match="has no CRS or no transform"):
        stack([scenes[0], replace(scenes[1], crs=None)], "x")
