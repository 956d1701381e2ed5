"""Windows of scenes get the rules of image files: bands, range of values, no data, size."""

from typing import Any

import numpy as np
import pytest

from pipeline.errors import DecodeError
from pipeline.images.pixels import PixelFormat
from pipeline.images.transform import IMAGENET_MEAN, Transform
from pipeline.images.values import Values
from pipeline.images.windows import to_pixels

TRANSFORM = Transform(resize=36, crop=32)
MEAN = [round(255 * value) for value in IMAGENET_MEAN]


def window(bands: int, dtype: str = "uint8", size: int = 32) -> np.ma.MaskedArray:
    return np.ma.MaskedArray(np.random.default_rng(0).integers(1, 200, (size, size, bands)).astype(dtype))


def masked(array: np.ndarray, rows: int = 8) -> np.ma.MaskedArray:
    mask = np.zeros(array.shape, bool)
    mask[:rows] = True
    return np.ma.MaskedArray(array, mask)


def test_a_window_of_the_networks_size_is_not_resized() -> None:
    array = window(3)
    np.testing.assert_array_equal(to_pixels(array, TRANSFORM, Values()), array)


def test_another_size_is_resized_as_a_whole() -> None:
    """No crop: what the network sees is the window's whole footprint."""
    array = np.ma.MaskedArray(np.zeros((64, 64, 3), np.uint8))
    array[:2] = array[-2:] = array[:, :2] = array[:, -2:] = 255
    pixels = to_pixels(array, TRANSFORM, Values())
    assert pixels.shape == (32, 32, 3)
    assert (pixels[0] > 200).all()
    assert (pixels[-1] > 200).all()
    assert (pixels[8:-8, 8:-8] == 0).all()


def test_one_band_becomes_three() -> None:
    array = window(1)
    np.testing.assert_array_equal(to_pixels(array, TRANSFORM, Values()), array.repeat(3, axis=2))


@pytest.mark.parametrize("bands", [1, 3])
def test_no_data_becomes_the_networks_mean(bands: int) -> None:
    array = window(bands)
    pixels = to_pixels(masked(array), TRANSFORM, Values())
    assert pixels.dtype == np.uint8
    assert (pixels[:8] == MEAN).all()
    np.testing.assert_array_equal(pixels[8:], np.broadcast_to(array, (32, 32, 3))[8:])


def test_no_data_of_one_band_is_filled_alone() -> None:
    array = window(3)
    mask = np.zeros(array.shape, bool)
    mask[:8, :, 1] = True
    pixels = to_pixels(np.ma.MaskedArray(array, mask), TRANSFORM, Values())
    assert (pixels[:8, :, 1] == MEAN[1]).all()
    np.testing.assert_array_equal(pixels[..., [0, 2]], array[..., [0, 2]])


@pytest.mark.parametrize(("fill", "scale", "dtype", "expected"), [
    (7.0, None, "uint8", 7),
    (7.0, (0.0, 70.0), "uint8", 7),  # 8 bits have their range
    (1000.0, (0.0, 3000.0), "uint8", 255),
    (7.0, (0.0, 70.0), "int16", 26),
    (0.0, (0.0, 70.0), "float64", 0),
])  # fmt: skip
def test_nodata_fill(fill: float, scale: Any, dtype: str, expected: int) -> None:
    pixels = to_pixels(masked(window(3, dtype)), TRANSFORM, Values(scale=scale, nodata_fill=fill))
    assert (pixels[:8] == expected).all()
    assert not (pixels[8:] == expected).all()


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64", "uint32", "int8"])
def test_other_numbers_need_a_scale(dtype: str) -> None:
    array = window(3, dtype) // 2
    with pytest.raises(DecodeError, match=r"its values go from \S+ to \S+, .* --scale MIN:MAX"):
        to_pixels(array, TRANSFORM, Values())
    pixels = to_pixels(array, TRANSFORM, Values(scale=(0.0, 102.0)))
    np.testing.assert_array_equal(pixels, np.rint(array.astype(float) * 2.5).clip(0, 255).astype(np.uint8))


def test_the_range_in_the_refusal_is_that_of_the_data() -> None:
    array = window(1, "int16")
    array[:8] = -32768
    with pytest.raises(DecodeError, match=r"its values go from \d+ to \d+,"):
        to_pixels(masked(array), TRANSFORM, Values())


def test_nan_is_no_data() -> None:
    array = window(1, "float32")
    array[:8] = np.nan
    pixels = to_pixels(array, TRANSFORM, Values(scale=(0.0, 200.0)))
    assert (pixels[:8] == MEAN).all()


@pytest.mark.parametrize("bands", [2, 4, 13])
def test_another_number_of_bands_is_refused(bands: int) -> None:
    with pytest.raises(DecodeError, match=rf"gives {bands} bands, and the network takes 3; choose them with --bands"):
        to_pixels(window(bands), TRANSFORM, Values())


def test_networks_of_other_numbers() -> None:
    values = Values(pixel_format=PixelFormat("float32", 4))
    array = window(4, "uint16")
    np.testing.assert_array_equal(to_pixels(array, TRANSFORM, values), array.astype(np.float32))
    with pytest.raises(
        DecodeError, match=r"has pixels without data, and the network takes 4 × float32, .*--nodata-fill"
    ):
        to_pixels(masked(array), TRANSFORM, values)
    with pytest.raises(DecodeError, match="of which no mean is known"):
        to_pixels(masked(window(4)), TRANSFORM, Values(pixel_format=PixelFormat("uint8", 4)))
    filled = to_pixels(masked(array), TRANSFORM, Values(nodata_fill=-1.0, pixel_format=PixelFormat("float32", 4)))
    assert (filled[:8] == -1).all()
    np.testing.assert_array_equal(filled[8:], array[8:])
    with pytest.raises(DecodeError, match="does not fit without loss"):
        to_pixels(window(4, "float64"), TRANSFORM, values)
