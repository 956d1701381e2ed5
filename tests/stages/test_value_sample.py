"""The sample of an archive before a run: the range of percentiles, and values that a specification does not expect."""

from pathlib import Path
from typing import Any

import images
import numpy as np
import pytest
from satellite import OLD_PRODUCT, PRODUCT, SENTINEL2, draw_dn, geotiff
from whole import write_tar

from pipeline.config import RunConfig
from pipeline.errors import SettingRefused
from pipeline.images.pixels import RGB8
from pipeline.models import input_spec
from pipeline.output import directory
from pipeline.planning.archive import Archive
from pipeline.predictors.base import Predictor
from pipeline.stages import value_sample


class Spec(Predictor):
    """The parts of an Embedder that a sample needs."""

    def __init__(self, name: str = "") -> None:
        self.specification = input_spec.load(name) if name else None
        self.pixel_format = self.specification.pixel_format if self.specification else RGB8


def settled(folder: Path, predictor: Predictor, **settings: Any) -> tuple[RunConfig, list[str]]:
    config = RunConfig(input=[str(folder)], output=str(folder.parent / "out"), **settings)
    archive = Archive(config)
    with directory.draft(archive) as plan:
        return value_sample.settle(config, predictor, archive.options(), plan)


def archive_of(folder: Path, arrays: list[np.ndarray], name: str = "", names: tuple[str, ...] = SENTINEL2) -> Path:
    (folder / name).mkdir(parents=True)
    for i, array in enumerate(arrays):
        (folder / name / f"{i:03d}.tif").write_bytes(geotiff(array, names))
    return folder


def drawn(count: int = 3, **settings: Any) -> list[np.ndarray]:
    return [draw_dn(seed=i, **settings) for i in range(count)]


# Percentiles


def test_percentiles_are_those_of_numpy_over_all_images(tmp_path: Path) -> None:
    arrays = drawn(10, bands=3)
    folder = archive_of(tmp_path / "in", arrays, names=())
    config, notes = settled(folder, Spec(), scale="percentile:2:98")
    low, high = np.percentile(np.stack(arrays), [2, 98])
    assert config.scale_range() == (low, high)
    assert config.value_settings() == {"scale": [low, high], "scale_percentiles": [2.0, 98.0]}
    assert notes == [f"--scale percentile:2:98 is {low:g} to {high:g}, measured on 10 images drawn from the archive"]
    assert settled(folder, Spec(), scale="percentile:2:98")[0] == config


def test_8_bit_images_and_pixels_without_data_do_not_count(tmp_path: Path) -> None:
    array = draw_dn(3).astype(np.float32)
    array[:, :30], array[:, 30:34] = np.nan, -9999
    tiles = {"a.tif": geotiff(array, nodata=-9999), "b.png": images.encode(images.tile(), "PNG")}
    write_tar(tmp_path / "in.tar", tiles)
    config, _ = settled(tmp_path / "in.tar", Spec(), scale="percentile:0:100")
    there = array[:, 34:]
    assert config.scale_range() == (there.min(), there.max())


def test_the_sample_is_small_and_the_same_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = archive_of(tmp_path / "in", [draw_dn(3, 16, seed=i) for i in range(90)], names=())
    read: list[int] = []
    numbers = value_sample.read_numbers
    monkeypatch.setattr(
        value_sample,
        "read_numbers",
        lambda data, *args, **more: read.append(hash(data)) or numbers(data, *args, **more),
    )
    ranges = [settled(folder, Spec(), scale="percentile:2:98")[0].scale for _ in range(2)]
    assert ranges[0] == ranges[1]
    assert read[:64] == read[64:]
    assert len(set(read)) == 64


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images.encode(images.tile(), "PNG"), "none of 1 images .* has numbers of more than 8 bits; leave out --scale"),
        (geotiff(np.full((3, 32, 32), 7, np.uint16)), "both percentiles of 1 images .* are 7; give --scale MIN:MAX"),
        (geotiff(draw_dn(5, 32)), "none of 1 images .* more than 8 bits: .* gives 5 bands, and the network takes 3"),
    ],
)
def test_percentiles_without_a_range_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tif").write_bytes(data)
    with pytest.raises(SettingRefused, match=message):
        settled(tmp_path / "in", Spec(), scale="percentile:2:98")


@pytest.mark.parametrize("scale", ["percentile", "percentile:2", "percentile:98:2", "percentile:-1:98", "a=0:1"])
def test_bad_percentiles_are_refused(scale: str) -> None:
    with pytest.raises(SettingRefused, match=f"--scale is '{scale}': it must be"):
        RunConfig(input="a", output="o", scale=scale)


# Values that a specification does not expect


def test_values_as_expected_are_accepted_and_said(tmp_path: Path) -> None:
    folder = archive_of(tmp_path / "in", drawn(), f"{OLD_PRODUCT}.SAFE")
    config, notes = settled(folder, Spec("sentinel2-all"))
    assert config.scale is None
    assert notes == [
        "--harmonize auto: Sentinel-2's offset of 1000 is subtracted from 0 of 3 images drawn from the archive "
        "(3 by processing baseline 02.04 of its name)"
    ]


def test_the_order_of_unnamed_bands_is_said(tmp_path: Path) -> None:
    folder = archive_of(tmp_path / "in", drawn(1, bands=2, high=2000), names=())
    (tmp_path / "own.yaml").write_text("bands: [red, nir]\ncrop: 32\ndivisor: 10000\nexpected: [0, 1]\n")
    _, notes = settled(folder, Spec(str(tmp_path / "own.yaml")))
    assert notes[0].endswith("does not name its bands, so they are taken in this order: 1 is red, 2 is nir")
    assert settled(folder, Spec(str(tmp_path / "own.yaml")), bands="2,1")[1] == []


@pytest.mark.parametrize(
    ("name", "arrays", "message"),
    [
        (
            "sentinel2-all",
            drawn(high=255, low=0),
            r"99 % of the values are below 0\.0\d+, so .* expects 0 to 1\.2 after its divisor, and the minimum, median "
            r"and maximum are B1 0\S* 0\.0\d+ 0\.0\d+, B2 .*--any-values runs nevertheless",
        ),
        ("sentinel2-all", drawn(low=30_000, high=60_000), "the median of 13 of 13 bands lies outside"),
        ("sentinel2-all-softcon", [array / 10_000 for array in drawn()], "99 % of the values are below 0.5"),
        ("landsat-tm-toa", [array[:7] for array in drawn(low=7000, high=40_000)], "the median of 7 of 7 bands lies"),
        ("sentinel1-grd", [array[:2] / 10_000 for array in drawn()], "the median of 2 of 2 bands lies outside"),
    ],
)
def test_values_far_from_the_expected_are_refused_with_figures(
    tmp_path: Path, name: str, arrays: list[np.ndarray], message: str
) -> None:
    predictor = Spec(name)
    assert predictor.specification
    folder = archive_of(tmp_path / "in", arrays, OLD_PRODUCT, predictor.specification.band_names)
    with pytest.raises(SettingRefused, match=message):
        settled(folder, predictor)
    settled(folder, predictor, any_values=True)


def test_the_offset_is_subtracted_by_the_names(tmp_path: Path) -> None:
    folder = archive_of(tmp_path / "in", drawn(low=1050), PRODUCT)
    archive_of(folder, drawn(2), OLD_PRODUCT)
    _, notes = settled(folder, Spec("sentinel2-all"))
    assert "is subtracted from 3 of 5 images" in notes[0]
    assert "(3 by processing baseline 05.11 of its name, 2 by processing baseline 02.04 of its name)" in notes[0]


def test_an_offset_that_the_numbers_do_not_contain_is_refused(tmp_path: Path) -> None:
    arrays = drawn()
    for array in arrays:
        array[10] = 22  # B10
    folder = archive_of(tmp_path / "in", arrays, PRODUCT)
    with pytest.raises(SettingRefused, match="100% of B10 are at most the offset of 1000 that --harmonize subtracts"):
        settled(folder, Spec("sentinel2-all"))
    settled(folder, Spec("sentinel2-all"), harmonize="off")


def test_images_of_which_nothing_says_the_offset_are_refused(tmp_path: Path) -> None:
    folder = archive_of(tmp_path / "in", drawn())
    with pytest.raises(SettingRefused, match=r"none of 3 images .* nothing says whether .* --harmonize on"):
        settled(folder, Spec("sentinel2-all"))


def test_archives_without_the_bands_are_refused_and_single_images_are_said(tmp_path: Path) -> None:
    folder = archive_of(tmp_path / "in", [draw_dn(12)], OLD_PRODUCT, tuple(n for n in SENTINEL2 if n != "B10"))
    with pytest.raises(SettingRefused, match=r"none of 1 images .* lacks B10 of the input specification"):
        settled(folder, Spec("sentinel2-all"))
    archive_of(folder, drawn(2), PRODUCT.replace("N0511", "N0301"))
    _, notes = settled(folder, Spec("sentinel2-all"))
    assert "1 of 3 images drawn from the archive fail: " in notes[1]


# Windows of scenes


def settled_scene(folder: Path, **settings: Any) -> list[str]:
    predictor = Spec("sentinel2-all")
    assert predictor.specification
    config = RunConfig(input=[str(folder)], output=str(folder.parent / "out"), tile_size=32, **settings)
    archive = Archive(config)
    archive.use_bands(predictor.specification.bands, config.harmonize)
    with directory.draft(archive) as plan:
        return value_sample.settle(config, predictor, archive.options(), plan)[1]


def test_numbers_of_scenes_are_those_after_the_offset_without_masked_pixels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = draw_dn(side=64) + 1000
    array[:, :32, :48] = 0
    folder = archive_of(tmp_path / "in", [array], PRODUCT)
    drawn: list[np.ndarray] = []
    check = value_sample.check
    monkeypatch.setattr(
        value_sample,
        "check",
        lambda sample, specification: (
            drawn.extend(each.array for each in sample.numbers),
            check(sample, specification),
        ),
    )
    (note,) = settled_scene(folder)
    assert "offset of 1000 is subtracted from 3 of 3 images" in note
    numbers = np.concatenate(drawn)
    expected = array[:, array.any(axis=0)].astype(float).T - 1000
    found = numbers[~np.isnan(numbers).any(axis=1)]
    np.testing.assert_array_equal(np.sort(found, axis=0), np.sort(expected, axis=0))
    assert np.isnan(numbers).any(axis=1).sum() == 32 * 16


def test_scenes_of_8_bit_reflectance_are_refused_with_figures(tmp_path: Path) -> None:
    folder = archive_of(tmp_path / "in", drawn(high=255, low=0), OLD_PRODUCT)
    with pytest.raises(SettingRefused, match="99 % of the values are below 0"):
        settled_scene(folder)


def test_unnamed_bands_of_a_scene_are_said(tmp_path: Path) -> None:
    folder = archive_of(tmp_path / "in", drawn(1), OLD_PRODUCT, names=())
    assert any(
        "does not name its bands, so they are taken in this order: 1 is B1" in each for each in settled_scene(folder)
    )
