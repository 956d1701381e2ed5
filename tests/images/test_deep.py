"""JPEG 2000 and other formats of more than 8 bits, and formats that Pillow opens besides the usual ones."""

import io
import struct
from typing import Any

import imagecodecs
import images
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.images.decode import decode
from pipeline.images.pixels import PixelFormat
from pipeline.images.transform import Transform
from pipeline.images.values import Values

SAME = Transform(resize=64, crop=64)
GREY = np.arange(64 * 64).reshape(64, 64)


def pixels(data: bytes, **values: Any) -> np.ndarray:
    return decode(data, SAME, values=Values(**values)).pixels


def jpeg_2000(array: np.ndarray, bits: int) -> bytes:
    return bytes(imagecodecs.jpeg2k_encode(array, level=0, reversible=True, bitspersample=bits, mct=False))


@pytest.mark.parametrize("bits", [12, 15, 16])
def test_a_grey_jpeg_2000_has_the_values_of_the_file(bits: int) -> None:
    """Pillow stretches them to 16 bits."""
    data = jpeg_2000(GREY.astype(np.uint16), bits)
    with pytest.raises(DecodeError, match=f"1 band of {bits}-bit unsigned integer: its values go from 0 to 4095"):
        pixels(data)
    np.testing.assert_array_equal(pixels(data, scale=(0.0, 4095.0))[..., 1], np.rint(GREY / 4095 * 255))
    network = pixels(data, pixel_format=PixelFormat("uint16", 1))
    np.testing.assert_array_equal(network[..., 0], GREY)


def test_a_signed_jpeg_2000() -> None:
    values = (GREY - 2000).astype(np.int16)
    data = jpeg_2000(values, 16)
    np.testing.assert_array_equal(pixels(data, pixel_format=PixelFormat("float32", 1))[..., 0], values)


def test_colours_of_a_jpeg_2000() -> None:
    drawn = np.asarray(images.tile("urban"))
    np.testing.assert_array_equal(pixels(jpeg_2000(drawn, 8)), drawn)
    deep = drawn.astype(np.uint16) * 16 + 5
    np.testing.assert_allclose(pixels(jpeg_2000(deep, 12)), drawn, atol=1)
    np.testing.assert_array_equal(pixels(jpeg_2000(deep, 12), scale=(5.0, 4085.0)), drawn)


def test_a_fourth_band_of_a_jpeg_2000_is_an_alpha_only_if_the_file_says_so() -> None:
    drawn = np.asarray(images.tile("urban"))
    bands = np.concatenate([drawn, drawn[..., :1]], axis=2)
    data = jpeg_2000(bands, 8)
    if b"cdef" not in data:
        with pytest.raises(DecodeError, match=r"a JPEG 2000 of 4 bands of 8-bit .* --bands"):
            pixels(data)
    np.testing.assert_array_equal(pixels(data, bands=("1", "2", "3")), drawn)
    rgba = Image.fromarray(drawn).convert("RGBA")
    rgba.putalpha(0)
    rgba.putpixel((0, 0), (1, 2, 3, 255))
    transparent = images.encode(rgba, "JPEG2000")
    if b"cdef" in transparent:
        assert (pixels(transparent)[1:] == 255).all()


def test_many_bands_of_a_jpeg_2000() -> None:
    bands = np.random.default_rng(0).integers(0, 256, (64, 64, 6)).astype(np.uint8)
    data = jpeg_2000(bands, 8)
    np.testing.assert_array_equal(pixels(data, bands=("6", "1", "2")), bands[..., [5, 0, 1]])
    np.testing.assert_array_equal(pixels(data, pixel_format=PixelFormat("uint8", 6)), bands)
    with pytest.raises(DecodeError, match="6 bands") as caught:
        pixels(data)
    assert caught.value.error_type == "unsupported"


def test_a_large_size_in_a_header_is_refused_before_it_is_decoded() -> None:
    data = bytearray(jpeg_2000(GREY.astype(np.uint16), 16))
    start = data.index(b"\xff\x4f\xff\x51")
    data[start + 8 : start + 16] = struct.pack(">II", 60_000, 60_000)
    with pytest.raises(DecodeError) as caught:
        decode(bytes(data), SAME)
    assert caught.value.error_type == "too_large"


@pytest.mark.parametrize("format", ["AVIF", "PPM", "JPEG2000"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_more_formats_of_8_bits(format: str, mode: str) -> None:
    data = images.encode(images.tile("urban").convert(mode), format)
    np.testing.assert_array_equal(pixels(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("magic", [b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"])
def test_every_pnm(magic: bytes) -> None:
    samples = 3 if magic in (b"P3", b"P6") else 1
    values = np.random.default_rng(0).integers(0, 2 if magic in (b"P1", b"P4") else 256, (64, 64, samples))
    size = b" 64 64\n" if magic in (b"P1", b"P4") else b" 64 64 # comment\n255\n"
    if magic == b"P4":
        body = np.packbits(values.ravel()).tobytes()
    elif magic in (b"P5", b"P6"):
        body = values.astype(np.uint8).tobytes()
    else:
        body = " ".join(map(str, values.ravel())).encode()
    expected = 255 * (1 - values) if magic in (b"P1", b"P4") else values
    np.testing.assert_array_equal(pixels(magic + size + body), np.broadcast_to(expected, (64, 64, 3)))
    with pytest.raises(DecodeError) as caught:
        pixels((magic + size + body)[:-300])
    assert caught.value.error_type == "truncated"
