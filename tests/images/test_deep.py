"""JPEG 2000 and other formats of more than 8 bits, and formats that Pillow opens besides the usual ones."""

import io
import struct
import zlib
from typing import Any

import imagecodecs
import images
import numpy as np
import pytest
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.images.decode import TO_UPRIGHT, decode
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


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content) + 8, kind) + content


def jp2(array: np.ndarray, *definitions: tuple[int, int, int], space: int = 16) -> bytes:
    """A .jp2 file of [height, width, channels]. definitions: channel, type and colour of each."""
    height, width, channels = array.shape
    bits = 8 * array.dtype.itemsize
    code = bytes(imagecodecs.jpeg2k_encode(array, level=0, reversible=True, codecformat="j2k", mct=False))
    header = box(b"ihdr", struct.pack(">IIHBBBB", height, width, channels, bits - 1, 7, 0, 0))
    header += box(b"colr", struct.pack(">BBBI", 1, 0, 0, space))
    if definitions:
        entries = [struct.pack(">HHH", *entry) for entry in definitions]
        header += box(b"cdef", struct.pack(">H", len(entries)) + b"".join(entries))
    start = box(b"jP  ", b"\r\n\x87\n") + box(b"ftyp", b"jp2 \0\0\0\0jp2 ")
    return start + box(b"jp2h", header) + box(b"jp2c", code)


DRAWN = np.asarray(images.tile("urban"))
OPACITY = np.repeat(np.arange(64, dtype=np.uint8)[:, None, None] * 4, 64, axis=1)
OVER_WHITE = np.asarray(Image.alpha_composite(
    Image.new("RGBA", (64, 64), "white"), Image.fromarray(np.concatenate([DRAWN, OPACITY], axis=2))
).convert("RGB"))  # fmt: skip


@pytest.mark.parametrize("number", [np.uint8, np.uint16])
def test_channels_of_a_jpeg_2000_in_any_order(number: type) -> None:
    factor, values = (1, {}) if number is np.uint8 else (257, {"scale": (0.0, 65535.0)})
    argb = np.concatenate([OPACITY, DRAWN], axis=2).astype(number) * factor
    data = jp2(argb.astype(number), (0, 1, 0), (1, 0, 1), (2, 0, 2), (3, 0, 3))
    np.testing.assert_allclose(pixels(data, **values), OVER_WHITE, atol=1)
    bgr = DRAWN[..., ::-1].astype(number) * factor
    data = jp2(np.ascontiguousarray(bgr.astype(number)), (0, 0, 3), (1, 0, 2), (2, 0, 1))
    np.testing.assert_array_equal(pixels(data, **values), DRAWN)
    multiplied = (DRAWN.astype(int) * OPACITY // 255 * factor).astype(number)
    rgba = np.concatenate([multiplied, (OPACITY.astype(int) * factor).astype(number)], axis=2)
    data = jp2(rgba, (0, 0, 1), (1, 0, 2), (2, 0, 3), (3, 2, 0))
    np.testing.assert_allclose(pixels(data, **values), OVER_WHITE, atol=2)


@pytest.mark.parametrize("unnamed", [(3, 0, 65535), (3, 65535, 65535)])
def test_a_channel_of_no_colour_is_a_band(unnamed: tuple[int, int, int]) -> None:
    """As GDAL writes blue, green, red and near infrared."""
    bands = np.concatenate([DRAWN[..., ::-1], OPACITY], axis=2)
    data = jp2(bands, (0, 0, 3), (1, 0, 2), (2, 0, 1), unnamed)
    with pytest.raises(DecodeError, match="gives 4 bands, and the network takes 3"):
        pixels(data)
    np.testing.assert_array_equal(pixels(data, bands=("3", "2", "1")), DRAWN)
    np.testing.assert_array_equal(pixels(data, bands=("4", "3", "2"))[..., 0], OPACITY[..., 0])


@pytest.mark.parametrize(
    ("definitions", "space", "message"),
    [
        ((), 14, "in the colour space 14 is not supported; write it as one of .*sRGB, grey, sYCC"),
        (((0, 0, 1), (1, 0, 1), (2, 0, 2)), 16, "with the channels .* is not supported"),
        (((0, 0, 1), (1, 1, 0), (2, 1, 0)), 16, "with the channels .* is not supported"),
        (((0, 0, 3), (1, 0, 2), (2, 0, 1)), 18, "in sYCC with 8 bits"),
    ],
)
def test_a_jpeg_2000_with_colours_that_are_not_understood(
    definitions: tuple[tuple[int, int, int], ...], space: int, message: str
) -> None:
    with pytest.raises(DecodeError, match=message):
        pixels(jp2(DRAWN, *definitions, space=space))


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_a_jpeg_2000_of_few_bits_reaches_white(bits: int) -> None:
    stored = (GREY % 2**bits).astype(np.uint8)
    expected = np.rint(stored / (2**bits - 1) * 255)
    np.testing.assert_allclose(pixels(jpeg_2000(stored, bits))[..., 0], expected, atol=1)


@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_png_of_16_bits_is_turned_as_its_exif_says(samples: int, orientation: int) -> None:
    stored = np.repeat(GREY.astype(np.uint16)[..., None] * 16, samples, axis=2)
    if samples == 2:
        stored[..., 1] = 65535
    exif = Image.Exif()
    exif[274] = orientation
    encoded = bytes(imagecodecs.png_encode(stored[..., 0] if samples == 1 else stored))
    chunk = exif.tobytes().removeprefix(b"Exif\0\0")
    written = encoded[:-12] + struct.pack(">I", len(chunk)) + b"eXIf" + chunk
    written += struct.pack(">I", zlib.crc32(b"eXIf" + chunk)) + encoded[-12:]
    upright = pixels(encoded, scale=(0.0, 65535.0))
    turn = TO_UPRIGHT.get(orientation)
    expected = upright if turn is None else np.asarray(Image.fromarray(upright).transpose(turn))
    np.testing.assert_array_equal(pixels(written, scale=(0.0, 65535.0)), expected)


def test_the_transparent_colour_of_a_png_of_16_bits_is_compared_with_all_bits() -> None:
    stored = np.zeros((64, 64, 3), np.uint16)
    stored[32:, :, 2] = 1
    encoded = bytes(imagecodecs.png_encode(stored))
    chunk = b"tRNS" + bytes(6)
    place = encoded.index(b"IDAT") - 4
    data = encoded[:place] + struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk)) + encoded[place:]
    found = pixels(data)
    assert (found[:32] == 255).all()
    assert (found[32:] == 0).all()
