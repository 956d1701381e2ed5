"""Bands of an input specification in real GeoTIFFs: found by name, filled, or refused, never taken by chance."""

from typing import Any

import images
import numpy as np
import pytest
import tifffile
from satellite import SENTINEL2, draw_dn, geotiff

from pipeline.errors import DecodeError
from pipeline.geo.bands import Band
from pipeline.images.decode import decode, read_numbers
from pipeline.images.pixels import RGB8, PixelFormat
from pipeline.images.transform import Transform
from pipeline.images.values import Values

SAME = Transform(resize=0, crop=16)
RED_GREEN_BLUE = tuple(Band((name, name[0])) for name in ("red", "green", "blue"))
FOUR = (*RED_GREEN_BLUE, Band(("nir",)))
ALL = tuple(Band((name,)) for name in SENTINEL2)
WITHOUT_B10 = tuple(name for name in SENTINEL2 if name != "B10")


def wanted(which: tuple[Band, ...], dtype: str = "float32", **more: Any) -> Values:
    return Values(wanted=which, pixel_format=PixelFormat(dtype, len(which)), **more)


def pixels(data: bytes, values: Values, **settings: Any) -> np.ndarray:
    return decode(data, SAME, values=values, **settings).pixels


def error(data: bytes, values: Values, **settings: Any) -> str:
    with pytest.raises(DecodeError) as caught:
        decode(data, SAME, values=values, **settings)
    assert caught.value.error_type == "unsupported"
    return caught.value.message


def test_bands_are_found_by_name_in_any_order() -> None:
    array = draw_dn(side=16)
    order = np.random.default_rng(0).permutation(13)
    names = [f"B{name[1:].zfill(2)}" if name[1:].isdecimal() else name.lower() for name in SENTINEL2]
    data = geotiff(array[order], [names[place] for place in order])
    np.testing.assert_array_equal(pixels(data, wanted(ALL)), np.moveaxis(array, 0, 2))
    more = geotiff(np.concatenate([array, array[:2]]), [*SENTINEL2, "SCL", ""])
    np.testing.assert_array_equal(pixels(more, wanted(ALL)), np.moveaxis(array, 0, 2))


def test_a_missing_band_needs_a_declared_value() -> None:
    array = draw_dn(12, 16)
    data = geotiff(array, WITHOUT_B10)
    message = error(data, wanted(ALL))
    assert "lacks B10 of the input specification (its bands: B1, B2" in message
    assert "missing: {B10: 0}" in message
    declared = tuple(Band(band.names, 7.0) if band.names == ("B10",) else band for band in ALL)
    expected = np.insert(np.moveaxis(array, 0, 2).astype(np.float32), 10, 7, axis=2)
    np.testing.assert_array_equal(pixels(data, wanted(declared)), expected)
    np.testing.assert_array_equal(pixels(geotiff(draw_dn(side=16), SENTINEL2), wanted(declared))[..., 10],
                                  draw_dn(side=16)[10])  # fmt: skip
    unnamed = geotiff(array)
    assert "gives 12 bands, and the network takes 13" in error(unnamed, wanted(declared))
    numbers = tuple(str(number) for number in range(1, 13))
    np.testing.assert_array_equal(pixels(unnamed, wanted(declared, bands=numbers)), expected)


def test_unnamed_bands_are_taken_in_order_only_if_there_are_as_many() -> None:
    array = draw_dn(side=16)
    for names in ((), [f"Band {i}" for i in range(1, 14)]):
        np.testing.assert_array_equal(pixels(geotiff(array, names), wanted(ALL)), np.moveaxis(array, 0, 2))
    assert "gives 14 bands, and the network takes 13" in error(geotiff(draw_dn(14, 16)), wanted(ALL))
    assert "gives 4 bands" in error(geotiff(draw_dn(4, 16)), wanted(RED_GREEN_BLUE))


def test_names_in_flags_are_those_of_the_file_without_regard_to_zeros() -> None:
    array = draw_dn(4, 16)
    data = geotiff(array, ["B2", "b03", "B4, central wavelength 665 nm", "B8A"])
    found = pixels(data, wanted(RED_GREEN_BLUE, bands=("B04", "B3", "b2")))
    np.testing.assert_array_equal(found, np.moveaxis(array[[2, 1, 0]], 0, 2))
    assert "has no band named 'B8' for --bands" in error(data, wanted(RED_GREEN_BLUE, bands=("B4", "B3", "B8")))
    twice = geotiff(array, ["B2", "B02", "B4", "B8"])
    assert "has no band named 'b2'" in error(twice, wanted(RED_GREEN_BLUE, bands=("B4", "B8", "b2")))


def test_two_bands_of_one_name_are_refused() -> None:
    data = geotiff(draw_dn(5, 16), ["red", "green", "blue", "nir", "Red"])
    assert "has 2 bands that are called red" in error(data, wanted(FOUR))


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("georeference", [True, False])
def test_the_fourth_band_is_never_an_alpha(dtype: str, georeference: bool) -> None:
    array = draw_dn(4, 16, low=1, high=200).astype(dtype)
    named = geotiff(array, ["red", "green", "blue", "nir"], georeference=georeference, photometric="RGB")
    np.testing.assert_array_equal(pixels(named, wanted(FOUR)), np.moveaxis(array, 0, 2))
    colours = pixels(named, wanted(RED_GREEN_BLUE))
    np.testing.assert_array_equal(colours, np.moveaxis(array[:3], 0, 2))
    unnamed = geotiff(array, georeference=georeference, photometric="RGB", alpha="YES")
    if georeference:
        np.testing.assert_array_equal(pixels(unnamed, wanted(FOUR)), np.moveaxis(array, 0, 2))
    else:
        for bands in (FOUR, RED_GREEN_BLUE):
            assert "marks band 4 as an alpha, which may be a band of a sensor" in error(unnamed, wanted(bands))
        chosen = pixels(unnamed, wanted(FOUR, bands=("1", "2", "3", "4")))
        np.testing.assert_array_equal(chosen, np.moveaxis(array, 0, 2))


def test_an_rgb_network_never_takes_the_fourth_band_for_an_alpha() -> None:
    """GDAL marks the fourth of four bands of 8 bits as an alpha, also in a tile without a georeference."""
    array = draw_dn(4, 64, low=1, high=250).astype(np.uint8)
    for georeference in (True, False):
        data = geotiff(array, georeference=georeference)
        if georeference:
            np.testing.assert_array_equal(decode(data, Transform(64, 64)).pixels, np.moveaxis(array[:3], 0, 2))
        else:
            assert "its values are like those of a sensor; choose the bands with --bands" in error(data, Values())
        chosen = decode(data, Transform(64, 64), values=Values(bands=("1", "2", "3"))).pixels
        np.testing.assert_array_equal(chosen, np.moveaxis(array[:3], 0, 2))
    array[3] = 255
    array[3, :8] = 0
    data = geotiff(array, georeference=False)
    shown = decode(data, Transform(64, 64)).pixels
    assert (shown[:8] == 255).all()
    np.testing.assert_array_equal(shown[8:], np.moveaxis(array[:3], 0, 2)[8:])


def test_eight_bit_networks_take_the_named_colours_of_a_tile() -> None:
    array = draw_dn(4, 16, low=1, high=200).astype(np.uint8)
    data = geotiff(array[[3, 2, 1, 0]], ["nir", "b", "g", "R"])
    np.testing.assert_array_equal(pixels(data, wanted(RED_GREEN_BLUE, "uint8")), np.moveaxis(array[:3], 0, 2))
    picture = images.encode(images.tile("urban", 0, (16, 16)), "PNG")
    np.testing.assert_array_equal(
        pixels(picture, wanted(RED_GREEN_BLUE, "uint8")), np.asarray(images.tile("urban", 0, (16, 16)))
    )


def test_16_bits_are_never_scaled_by_chance() -> None:
    array = draw_dn(3, 16)
    data = geotiff(array, ["red", "green", "blue"], photometric="RGB")
    for values in (wanted(RED_GREEN_BLUE, "uint8"), Values()):
        assert "nothing says which of them are black and white; set one range" in error(data, values)
    scaled = pixels(data, wanted(RED_GREEN_BLUE, "uint8", scale=(0.0, 2550.0)))
    np.testing.assert_array_equal(scaled, np.rint((np.moveaxis(array, 0, 2) / 10).clip(0, 255)))
    np.testing.assert_array_equal(pixels(data, wanted(RED_GREEN_BLUE)), np.moveaxis(array, 0, 2))


def test_negative_numbers_and_numbers_of_more_bits_stay() -> None:
    array = draw_dn(4, 16).astype(np.int32) - 3000
    for dtype in ("int16", "int32", "float64"):
        data = geotiff(array.astype(dtype), ["red", "green", "blue", "nir"])
        np.testing.assert_array_equal(pixels(data, wanted(FOUR)), np.moveaxis(array, 0, 2))
    odd = geotiff(array + (1 << 24) + 1, ["red", "green", "blue", "nir"])
    assert "does not fit without loss into the float32" in error(odd, wanted(FOUR))


def test_no_data_becomes_the_number_of_the_specification() -> None:
    array = draw_dn(4, 16).astype(np.float32)
    array[0, :4], array[1, :4] = np.nan, -9999
    data = geotiff(array, ["red", "green", "blue", "nir"], nodata=-9999)
    found = pixels(data, wanted(FOUR, nodata_fill=3.0))
    assert (found[:4, :, :2] == 3).all()
    np.testing.assert_array_equal(found[4:], np.moveaxis(array, 0, 2)[4:])


def test_the_offset_leaves_no_data_and_nothing_below_zero() -> None:
    array = np.full((13, 16, 16), 1500, np.uint16)
    array[:, 0], array[:, 1] = 0, 900
    data = geotiff(array, SENTINEL2)
    found = pixels(data, wanted(ALL), offset_of=lambda metadata: 1000.0)
    assert (found[:2] == 0).all()
    assert (found[2:] == 500).all()
    numbers = read_numbers(data, wanted(ALL), max_pixels=10**6, max_rows=10**4, offset_of=lambda metadata: 1000.0)
    assert np.isnan(numbers.array[:16]).all()
    assert numbers.array[16:32].max() == 0
    assert numbers.offset == 1000


def test_pictures_for_a_screen_hold_no_digital_numbers() -> None:
    rgb = wanted(RED_GREEN_BLUE)
    tile = geotiff(draw_dn(3, 16, low=1, high=200).astype(np.uint8), ["red", "green", "blue"])
    for data in (images.encode(images.tile("urban", 0, (16, 16))), tile):
        message = error(data, rgb, offset_of=lambda metadata: 0.0)
        assert "the input specification takes digital numbers of Sentinel-2" in message


def test_an_image_smaller_than_the_crop_is_refused_if_its_size_is_kept(tmp_path: Any) -> None:
    small = geotiff(draw_dn(4, 15), ["red", "green", "blue", "nir"])
    assert "15 × 15 pixels, and the input specification crops 16 × 16" in error(small, wanted(FOUR))
    picture = images.encode(images.tile("urban", 0, (40, 15)), "PNG")
    assert "40 × 15 pixels" in error(picture, wanted(RED_GREEN_BLUE, "uint8"))
    path = tmp_path / "plain.tif"
    tifffile.imwrite(path, np.zeros((15, 16, 3), np.uint8), photometric="rgb")
    assert "16 × 15 pixels" in error(path.read_bytes(), Values(pixel_format=RGB8))
