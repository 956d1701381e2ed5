"""Settings that only the predictor's columns and pixels can refuse."""

import pyarrow as pa
import pytest

from pipeline.config import RunConfig
from pipeline.errors import SettingRefused
from pipeline.images.pixels import PixelFormat
from pipeline.predictors.base import Predictor
from pipeline.stages.load import check_settings


class Labels(Predictor):
    columns = pa.schema([("label", pa.string())])


class Radiances(Labels):
    pixel_format = PixelFormat("uint16", 13)


def config(**settings: object) -> RunConfig:
    return RunConfig(input="a", output="o", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", ["label", "text:width", "a:x,b:x", "text:gpu_seconds"])
def test_a_kept_column_must_have_a_new_name(keep: str) -> None:
    with pytest.raises(SettingRefused, match=r"--keep \w+: there is already a column '\w+'; give it another name"):
        check_settings(config(keep=keep), Labels())
    check_settings(config(keep="label:truth,text"), Labels())


class Bytes13(Labels):
    pixel_format = PixelFormat("uint8", 13)


def test_bands_and_values_must_fit_the_network() -> None:
    for bands in ("1,2,3", "B04,B03,B02", "7"):
        check_settings(config(bands=bands, scale="0:3000", nodata_fill=0), Labels())
    check_settings(config(bands=",".join("1234567891234"), nodata_fill=0), Radiances())
    check_settings(config(scale="0:3000"), Bytes13())
    for settings, predictor, message in (
        ({"bands": "1,2"}, Labels(), "--bands is '1,2': the network takes 1 or 3 bands"),
        ({"bands": "1,2,3"}, Radiances(), "the network takes 13 bands"),
        ({"scale": "0:1"}, Radiances(), "--scale is '0:1': the network takes uint16"),
        ({"nodata_fill": 0.0}, Labels(), "--nodata-fill needs --scale"),
        ({"harmonize": "on"}, Labels(), "--harmonize is on: it needs an --input-spec"),
    ):
        with pytest.raises(SettingRefused, match=message):
            check_settings(config(**settings), predictor)


@pytest.mark.parametrize(("predictor", "max_batch"), [(Labels(), 14_266), (Radiances(), 1_646)])
def test_the_pixels_of_a_batch_fit_into_one_arrow_column(predictor: Predictor, max_batch: int) -> None:
    check_settings(config(batch_size=max_batch), predictor)
    said = f"--batch-size is {max_batch + 1}: with images of this size it can be at most {max_batch}"
    with pytest.raises(SettingRefused, match=said):
        check_settings(config(batch_size=max_batch + 1), predictor)


def test_a_load_without_an_allotment_is_named() -> None:
    class Old(Labels):
        def load(self) -> None:  # type: ignore[override]
            pass

    class Flexible(Labels):
        def load(self, *given: object) -> None:
            pass

    check_settings(config(), Flexible())
    with pytest.raises(SettingRefused, match=r"Old\.load\(\) must take one argument, .* write def load\(self, all"):
        check_settings(config(), Old())


def test_columns_of_an_archive_may_be_called_after_pixels() -> None:
    check_settings(config(keep="pixel_type,pixel_height,height_px"), Labels())


def test_a_pixel_format_of_another_type_is_refused() -> None:
    class Own(Labels):
        pixel_format = "uint8"  # type: ignore[assignment]

    with pytest.raises(SettingRefused, match=r"Own\.pixel_format is 'uint8': it must be a PixelFormat"):
        check_settings(config(), Own())


@pytest.mark.parametrize("name", ["threads", "batch_size", "images", "gpu_share"])
def test_an_attribute_that_moved_to_the_allotment_is_named(name: str) -> None:
    with pytest.raises(SettingRefused, match=rf"Labels.{name} does not exist: write load\(self, allotment\)"):
        getattr(Labels(), name)
    assert not hasattr(Labels(), "anything_else")


@pytest.mark.parametrize("value", [-1.0, 256.0, 0.5])
def test_a_fill_of_scenes_of_8_bits_is_one_of_their_numbers(value: float) -> None:
    with pytest.raises(SettingRefused, match="without --scale it must be a whole number from 0 to 255"):
        check_settings(config(tile_size=224, nodata_fill=value), Labels())


def test_a_perceptual_hash_needs_8_bit_pixels_on_the_cpu() -> None:
    check_settings(config(phash=True), Labels())
    for settings, predictor, message in (
        ({}, Radiances(), "--phash is computed from 8-bit pictures of 1 or 3 bands, and the network takes 13 × uint16"),
        ({"decoder": "gpu"}, Labels(), "--phash needs pixels on the CPU"),
        ({"vectors": True}, Labels(), "--phash is computed from images, and --from reads vectors"),
        ({"keep": "text:phash"}, Labels(), "--keep text: there is already a column 'phash'"),
    ):
        with pytest.raises(SettingRefused, match=message):
            check_settings(config(phash=True, **settings), predictor)
    check_settings(config(keep="phash"), Labels())


def test_quality_needs_8_bit_pixels_on_the_cpu() -> None:
    check_settings(config(quality=True), Labels())
    for settings, predictor, message in (
        (
            {},
            Radiances(),
            "--quality is computed from 8-bit pictures .* network takes 13 × uint16",
        ),
        ({"decoder": "gpu"}, Labels(), "--quality needs pixels on the CPU"),
        ({"vectors": True}, Labels(), "--quality is computed from images, and --from reads vectors"),
        ({"keep": "text:quality_contrast"}, Labels(), "already a column 'quality_contrast'"),
    ):
        with pytest.raises(SettingRefused, match=message):
            check_settings(config(quality=True, **settings), predictor)
