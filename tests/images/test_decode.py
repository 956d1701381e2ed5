"""Compare decode with Pillow and torchvision's transform, for formats, sizes, filters, modes, EXIF and broken files."""

import io
import resource
import subprocess
import sys
from pathlib import Path

import images
import numpy as np
import pytest
import simplejpeg
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize

from pipeline.errors import DecodeError
from pipeline.images.decode import decode
from pipeline.images.pixels import PixelFormat
from pipeline.images.resize import FILTERS, resized_bytes, scaled_sizes
from pipeline.images.transform import Transform
from pipeline.images.values import Values

ROOT = Path(__file__).resolve().parents[2]
PHOTOS = ROOT.parent / "shared" / "data" / "photos"
SMALL = Transform(resize=48, crop=40)
SAME = Transform(resize=64, crop=64)
"""Keeps a 64 × 64 image as it is, without resize or crop."""


def reference(rgb: Image.Image, transform: Transform) -> np.ndarray:
    """torchvision's evaluation transform on a Pillow image."""
    size = [transform.resize] * (2 if transform.squash else 1)
    resized = resize(rgb, size, InterpolationMode(transform.interpolation))
    return np.asarray(center_crop(resized, transform.crop))


def pixels(
    data: bytes, transform: Transform = SAME, *, exif_rotate: bool = True, scale: tuple[float, float] | None = None
) -> np.ndarray:
    decoded = decode(data, transform, exif_rotate=exif_rotate, values=Values(scale=scale)).pixels
    assert decoded.dtype == np.uint8
    assert decoded.shape == (transform.crop, transform.crop, 3)
    return decoded


def open_rgb(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM"])
@pytest.mark.parametrize("interpolation", sorted(FILTERS))
def test_every_format_and_filter_matches_torchvision(format: str, interpolation: str) -> None:
    data = images.encode(images.tile("urban", size=(131, 97)), format)
    transform = Transform(resize=48, crop=40, interpolation=interpolation)
    decoded = decode(data, transform)
    assert (decoded.width, decoded.height) == (131, 97)
    np.testing.assert_array_equal(decoded.pixels, reference(open_rgb(data), transform))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(131, 97), (60, 300), (1200, 500), (20, 31)])
def test_squash_matches_torchvision(format: str, size: tuple[int, int]) -> None:
    data = images.encode(images.tile("urban", size=size), format)
    for transform in (Transform(48, 48, "bicubic", squash=True), Transform(64, 60, squash=True)):
        expected = reference(open_rgb(data), transform)
        np.testing.assert_array_equal(decode(data, transform).pixels, expected)
        fast = decode(data, transform, exact=False).pixels.astype(int)
        assert np.abs(fast - expected).mean() < 3


@settings(max_examples=150, deadline=None)
@given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    sizes=st.sampled_from([(48, 40), (64, 64), (33, 32), (32, 47), (30, 75)]),
    interpolation=st.sampled_from(sorted(FILTERS)),
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"]),
    mode=st.sampled_from(["RGB", "L"]),
    seed=st.integers(0, 9),
)
@example(300, 48, (48, 40), "bicubic", "BMP", "RGB", 0)  # no resize in either axis
@example(20, 400, (256, 224), "lanczos", "BMP", "RGB", 0)  # Pillow reverses the order of its two passes
@example(301, 300, (255, 224), "bilinear", "BMP", "RGB", 0)  # the crop starts at half a pixel, which is rounded to even
@example(401, 7, (256, 224), "bilinear", "JPEG", "RGB", 0)  # enlarged 37 times; lower than one JPEG block
def test_every_size_of_every_format_matches_torchvision(
    width: int, height: int, sizes: tuple[int, int], interpolation: str, format: str, mode: str, seed: int
) -> None:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    data = images.encode(noise.convert(mode), format)
    transform = Transform(resize=sizes[0], crop=sizes[1], interpolation=interpolation)
    np.testing.assert_array_equal(pixels(data, transform), reference(open_rgb(data), transform))


@pytest.mark.parametrize("interpolation", sorted(FILTERS))
@pytest.mark.parametrize("size", [(1, 900), (2, 1900), (100, 6500), (90, 6500), (71, 5000), (72, 9000), (73, 9000)])
@pytest.mark.parametrize("is_wide", [False, True])
def test_only_the_crop_of_a_strip_is_resized(size: tuple[int, int], is_wide: bool, interpolation: str) -> None:
    size = size[::-1] if is_wide else size
    strip = images.tile("urban", size=(max(size), 100)).resize(size)
    transform = Transform(resize=72, crop=64, interpolation=interpolation)
    scaled, _ = scaled_sizes(*size, transform)
    assert resized_bytes(*size, transform) == 0 or scaled[0] * scaled[1] < 1 << 22
    np.testing.assert_array_equal(pixels(images.encode(strip, "PNG"), transform), reference(strip, transform))


@pytest.mark.parametrize("size", [(10, 700), (700, 10), (300, 19_300)])
def test_a_strip_matches_torchvision_with_usual_sizes(size: tuple[int, int]) -> None:
    strip = images.tile("urban", size=(700, 100)).resize(size)
    np.testing.assert_array_equal(pixels(images.encode(strip, "PNG"), Transform()), reference(strip, Transform()))


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_thin_strip_takes_little_memory(size: tuple[int, int]) -> None:
    data = images.encode(Image.new("RGB", size, (10, 200, 90)), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    decoded = decode(data, Transform())
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 200_000, "the whole strip takes 5 GB after the resize"
    assert (decoded.width, decoded.height) == size
    assert (decoded.pixels == (10, 200, 90)).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_match_pillow(mode: str, progressive: bool, subsampling: int) -> None:
    drawn = images.tile("field").convert(mode)
    data = images.encode(drawn, "JPEG", quality=80, progressive=progressive, subsampling=subsampling)
    np.testing.assert_array_equal(pixels(data), open_rgb(data))


def test_a_jpeg_with_rgb_components_matches_pillow() -> None:
    data = images.encode(images.tile(), "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(pixels(data), open_rgb(data))


def test_a_jpeg_with_stray_bytes_is_decoded_by_pillow() -> None:
    data = bytearray(images.encode(images.tile("urban"), "JPEG"))
    data[-2:-2] = b"stray"
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(bytes(data))
    np.testing.assert_array_equal(pixels(bytes(data)), open_rgb(bytes(data)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_opaque_modes_match_pillow(mode: str, format: str) -> None:
    data = images.encode(images.tile("field").convert(mode), format)
    np.testing.assert_array_equal(pixels(data), open_rgb(data))


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_tiff_colour_spaces_match_pillow(mode: str) -> None:
    from PIL import ImageCms

    drawn = images.tile("field")
    if mode == "LAB":
        drawn = ImageCms.profileToProfile(
            drawn, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    data = images.encode(drawn.convert(mode) if drawn.mode != mode else drawn, "TIFF")
    decoded = pixels(data)
    np.testing.assert_array_equal(decoded, open_rgb(data))
    assert np.abs(decoded.astype(int) - np.asarray(images.tile("field"))).mean() < 4


def over_white(rgba: Image.Image) -> np.ndarray:
    values = np.asarray(rgba.convert("RGBA")).astype(float)
    alpha = values[..., 3:] / 255
    return values[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP")])
def test_transparency_is_composited_over_white(mode: str, format: str) -> None:
    data = images.with_alpha(mode, format)
    decoded = pixels(data)
    np.testing.assert_allclose(decoded, over_white(Image.open(io.BytesIO(data))), atol=1)
    assert (decoded[:, 0] == 255).all(), "the left column is fully transparent"


def test_premultiplied_grey_is_composited_over_white() -> None:
    """Pillow cannot write such a TIFF, so the test sets ExtraSamples (338) of another one to 1, premultiplied."""
    drawn = Image.open(io.BytesIO(images.with_alpha("LA")))
    decoded = pixels(images.tiff_with_tag(drawn.convert("La").convert("LA"), 338, 1))
    assert (decoded[:, 0] == 255).all()
    np.testing.assert_allclose(decoded[:, -1], over_white(drawn)[:, -1], atol=1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_transparent_palette_entry_becomes_white(format: str) -> None:
    drawn = images.tile("field").quantize(16)
    transparent = int(np.asarray(drawn)[10, 10])
    decoded = pixels(images.encode(drawn, format, transparency=transparent))
    mask = np.asarray(drawn) == transparent
    assert (decoded[mask] == 255).all()
    np.testing.assert_array_equal(decoded[~mask], np.asarray(drawn.convert("RGB"))[~mask])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_becomes_white(mode: str) -> None:
    drawn = images.tile("urban").convert(mode)
    transparent = drawn.getpixel((10, 10))
    decoded = pixels(images.encode(drawn, "PNG", transparency=transparent))
    assert (decoded[10, 10] == 255).all()
    assert (decoded != 255).any()


@pytest.mark.parametrize(("depth", "value"), [(1, 1), (2, 1), (4, 5), (8, 5)])
def test_a_transparent_grey_of_few_bits_becomes_white(depth: int, value: int) -> None:
    """The upper half of the 64 × 64 pixels has the transparent value, which the file stores unscaled. The rest is 0."""
    byte = sum(value << shift for shift in range(0, 8, depth))
    rows = images.zlib.compress((b"\0" + bytes([byte]) * (8 * depth)) * 32 + (b"\0" + bytes(8 * depth)) * 32)
    header = images.png_header(64, 64, depth=depth, colour=0)
    chunks = (b"IHDR", header), (b"tRNS", value.to_bytes(2, "big")), (b"IDAT", rows), (b"IEND", b"")
    decoded = pixels(images.png_of_chunks(*chunks))
    assert (decoded[:32] == 255).all()
    assert (decoded[32:] == 0).all()


def test_a_transparent_16_bit_colour_becomes_white() -> None:
    values = np.full((64, 64, 3), 0x3400, ">u2")
    values[:32] = 0x1234
    rows = images.zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    chunks = (b"tRNS", values[0, 0].tobytes()), (b"IDAT", rows), (b"IEND", b"")
    decoded = pixels(images.png_of_chunks((b"IHDR", images.png_header(64, 64, depth=16)), *chunks))
    assert (decoded[:32] == 255).all()
    assert (decoded[32:] == 0x34).all()


def test_16_bit_grey_is_rounded_to_8_bits() -> None:
    values = np.arange(64 * 64).reshape(64, 64) * 16
    expected = np.rint(values / 257)
    for data in (images.grey_16(values), images.grey_16(values, "TIFF"), big_endian_tiff(values)):
        np.testing.assert_array_equal(pixels(data, scale=(0, 65535)), np.repeat(expected[..., None], 3, 2))


def big_endian_tiff(values: np.ndarray) -> bytes:
    image = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    return images.encode(image, "TIFF")


def test_32_bit_grey_is_clipped_to_16_bits() -> None:
    values = np.full((64, 64), 70_000, np.int32)
    values[:32] = 257 * 9
    values[:8] = -5
    decoded = pixels(images.encode(Image.fromarray(values), "TIFF"), scale=(0, 65535))
    assert (decoded[8:32] == 9).all()
    assert (decoded[32:] == 255).all()
    assert (decoded[:8] == 0).all()


def test_a_transparent_16_bit_grey_becomes_white() -> None:
    values = np.zeros((64, 64), np.uint16)
    values[:32] = 300
    header = images.png_header(64, 64, depth=16, colour=0)
    rows = images.zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    chunks = (b"IHDR", header), (b"tRNS", (300).to_bytes(2, "big")), (b"IDAT", rows), (b"IEND", b"")
    decoded = pixels(images.png_of_chunks(*chunks), scale=(0, 65535))
    assert (decoded[:32] == 255).all()
    assert (decoded[32:] == 0).all()


def test_float_is_scaled_and_nan_becomes_the_middle_or_the_fill() -> None:
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    values[5, 5] = np.nan
    data = images.float_tiff(values)
    expected = np.rint(np.nan_to_num(values, nan=0.5) * 255)
    np.testing.assert_array_equal(pixels(data, scale=(0, 1))[..., 0], expected)
    filled = decode(data, SAME, values=Values(scale=(0, 1), nodata_fill=1.0)).pixels
    assert (filled[5, 5] == 255).all()


def test_float_outside_the_scale_is_clipped() -> None:
    values = np.linspace(-50, 400, 64 * 64, dtype=np.float32).reshape(64, 64)
    values[0, 0], values[0, 1] = np.inf, -np.inf
    decoded = pixels(images.float_tiff(values), scale=(0, 255))
    np.testing.assert_array_equal(decoded[..., 0], np.rint(np.clip(values, 0, 255)))


GREY_64 = np.arange(64 * 64).reshape(64, 64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (images.grey_16(GREY_64), "a PNG image of 1 band of 16-bit unsigned integer: its values go from 0 to 4095"),
        (images.grey_16(GREY_64, "TIFF"), "1 band of 16-bit unsigned integer .*: its values go from 0 to 4095"),
        (images.float_tiff(GREY_64 / 1000 - 1), "1 band of 32-bit float .*: its values go from -1 to 3.095"),
        (images.float_tiff(GREY_64 * np.nan), "it holds no values"),
        (b"P5 64 64 4095\n" + GREY_64.astype(">u2").tobytes(), "a PPM image of 1 band .* from 0 to 4095"),
        (b"Pf 64 64 -1\n" + GREY_64.astype("<f4").tobytes(), "a PPM image of 1 band of 32-bit float.* from 0 to 4095"),
        (images.png_16(GREY_64, GREY_64), "a PNG image of 2 bands of 16-bit .* from 0 to 4095"),
    ],
)
def test_values_of_an_unknown_range_are_refused_with_the_range_of_the_image(data: bytes, message: str) -> None:
    with pytest.raises(DecodeError, match=message + ".*--scale MIN:MAX") as caught:
        decode(data, SAME)
    assert caught.value.error_type == "unsupported"


def test_the_values_of_a_pgm_are_those_of_the_file() -> None:
    expected = np.rint(GREY_64 / 4095 * 255)
    binary = b"P5 64 64 4095\n" + GREY_64.astype(">u2").tobytes()
    text = b"P2 64 64 4095\n" + b" ".join(b"%d" % value for value in GREY_64.ravel())
    whole = b"P5 64 64 65535\n" + GREY_64.astype(">u2").tobytes()
    for data in (binary, text, whole):
        np.testing.assert_array_equal(pixels(data, scale=(0, 4095))[..., 2], expected)


def test_16_bit_colours_are_scaled_with_all_their_bits() -> None:
    colours = np.stack([GREY_64, GREY_64[::-1], GREY_64.T], axis=2)
    expected = np.rint(colours / 4095 * 255)
    ppm = b"P6 64 64 65535\n" + colours.astype(">u2").tobytes()
    for data in (images.png_16(*np.moveaxis(colours, 2, 0)), ppm):
        np.testing.assert_array_equal(pixels(data, scale=(0, 4095)), expected)
        np.testing.assert_array_equal(pixels(data), open_rgb(data), "without a scale as Pillow has it")
    opaque = images.png_16(*np.moveaxis(colours, 2, 0), np.full((64, 64), 65535))
    np.testing.assert_array_equal(pixels(opaque, scale=(0, 4095)), expected)
    half = images.png_16(GREY_64, np.where(GREY_64 < 2048, 0, 65535))
    assert (pixels(half, scale=(0, 4095))[:32] == 255).all()
    np.testing.assert_array_equal(pixels(half, scale=(0, 4095))[32:, :, 1], np.rint(GREY_64 / 4095 * 255)[32:])


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_an_alpha_that_hides_everything_is_ignored(mode: str, format: str) -> None:
    if (mode, format) == ("LA", "WEBP"):
        pytest.skip("a WebP has no grey")
    drawn = images.tile("urban").convert(mode)
    drawn.putalpha(0)
    settings = {"lossless": True, "exact": True} if format == "WEBP" else {}
    decoded = pixels(images.encode(drawn, format, **settings))
    np.testing.assert_array_equal(decoded, np.asarray(images.tile("urban").convert(mode[:-1]).convert("RGB")))
    drawn.putpixel((63, 63), (9, 9, 9, 1)[-len(mode) :])
    assert (pixels(images.encode(drawn, format, **settings))[:60] == 255).all()


@pytest.mark.parametrize("exact", [True, False])
def test_a_first_frame_smaller_than_its_gif_is_painted_on_white(exact: bool) -> None:
    frame = Image.new("P", (10, 20), 1)
    frame.putpalette([0, 0, 255, 200, 0, 0])
    data = bytearray(images.encode(frame, "GIF"))
    data[6:10] = (64).to_bytes(2, "little") * 2  # the canvas
    place = data.index(b",\0\0\0\0\x0a\0\x14\0")
    data[place + 1 : place + 5] = b"\x05\0\x07\0"
    expected = np.full((64, 64, 3), 255)
    expected[7:27, 5:15] = (200, 0, 0)
    np.testing.assert_array_equal(decode(bytes(data), SAME, exact=exact).pixels, expected)


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP", "tEXt"])
def test_large_text_of_a_png_is_ignored(kind: str) -> None:
    packed = images.zlib.compress(b" " * (2 << 20))
    large = {
        "zTXt": b"Comment\0\0" + packed,
        "iTXt": b"Comment\0\1\0\0\0" + packed,
        "iCCP": b"profile\0\0" + packed,
        "tEXt": b"Comment\0" + b" " * (65 << 20),
    }[kind]
    small = b"Raw profile type exif\0\nexif\n8\nnot hexadecimal"
    data = images.encode(images.tile("urban"), "PNG")
    for place in (33, len(data) - 12):  # before and after the pixels
        chunk = images.png_of_chunks((kind.encode(), large), (b"tEXt", small))[8:]
        np.testing.assert_array_equal(pixels(data[:place] + chunk + data[place:]), open_rgb(data))


def test_a_text_bomb_takes_little_memory_and_is_decoded() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert decode(images.text_bomb(64 << 20), SMALL).width == 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


@pytest.mark.parametrize(
    ("bands", "order"), [(("3", "2", "1"), [2, 1, 0]), (("1", "2", "3"), [0, 1, 2]), (("2",), [1, 1, 1])]
)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "GIF"])
def test_bands_of_a_photo_are_its_colours(bands: tuple[str, ...], order: list[int], format: str) -> None:
    data = images.encode(images.tile("urban"), format)
    decoded = decode(data, SAME, values=Values(bands=bands)).pixels
    np.testing.assert_array_equal(decoded, np.asarray(open_rgb(data))[..., order])


def test_bands_that_a_photo_does_not_have_are_refused() -> None:
    for data, name in ((images.encode(images.tile(), "JPEG"), "4"), (images.encode(images.tile().convert("L")), "2")):
        with pytest.raises(DecodeError, match=f"JPEG image .* has no band {name}"):
            decode(data, SAME, values=Values(bands=("1", "1", name)))


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_other_networks_get_a_photo_without_loss(dtype: str) -> None:
    data = images.encode(images.tile("urban"), "PNG")
    decoded = decode(data, SAME, values=Values(pixel_format=PixelFormat(dtype, 3))).pixels
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, open_rgb(data))
    grey = images.encode(images.tile("urban").convert("L"), "PNG")
    decoded = decode(grey, SAME, values=Values(pixel_format=PixelFormat(dtype, 1))).pixels
    np.testing.assert_array_equal(decoded[..., 0], Image.open(io.BytesIO(grey)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_is_decoded(format: str) -> None:
    data = images.animated(format)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    difference = pixels(data).astype(int) - np.asarray(images.tile("forest"))
    assert np.abs(difference).mean() < 8, "the other two frames differ more"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_rotation_matches_pillow(format: str, orientation: int) -> None:
    data = images.oriented(orientation, format)
    decoded = decode(data, SMALL)
    assert (decoded.width, decoded.height) == (80, 60), "as stored"
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == ((60, 80) if orientation >= 5 else (80, 60))
    np.testing.assert_array_equal(decoded.pixels, reference(upright, SMALL))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_without_exif_rotate_images_stay_as_stored(format: str) -> None:
    expected = pixels(images.oriented(1, format), SMALL)
    for orientation in range(2, 9):
        decoded = pixels(images.oriented(orientation, format), SMALL, exif_rotate=False)
        np.testing.assert_array_equal(decoded, expected)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("exif_rotate", [True, False])
def test_only_the_tag_of_a_tiff_rotates_it_not_xmp(exact: bool, exif_rotate: bool) -> None:
    drawn = images.tile("urban", size=(80, 60))
    xmp = {700: b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'}
    decoded = decode(images.encode(drawn, "TIFF", tiffinfo=xmp), SMALL, exif_rotate=exif_rotate, exact=exact)
    assert (decoded.width, decoded.height) == (80, 60)
    np.testing.assert_array_equal(decoded.pixels, decode(images.encode(drawn, "TIFF"), SMALL, exact=exact).pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_broken_exif_is_ignored(format: str) -> None:
    data = images.broken_exif(format)
    np.testing.assert_array_equal(pixels(data), open_rgb(data))


@pytest.mark.parametrize("name", images.STRANGE)
def test_a_bad_image_raises_an_error_of_its_type(name: str) -> None:
    data, error_type = images.STRANGE[name]
    with pytest.raises(DecodeError) as caught:
        decode(data, SMALL)
    assert caught.value.error_type == error_type
    assert caught.value.message


def test_too_many_pixels_name_the_size_the_limit_and_the_flag() -> None:
    data = images.encode(images.tile(size=(64, 50)), "PNG")
    assert decode(data, SMALL, max_pixels=3200).width == 64
    with pytest.raises(DecodeError, match=r"3200 pixels.*limit of 3199.*--max-pixels") as caught:
        decode(data, SMALL, max_pixels=3199)
    assert caught.value.error_type == "too_large"


@pytest.mark.parametrize(("tag", "value"), [(262, 9), (259, 32809)])
def test_tags_that_nothing_supports_are_unsupported(tag: int, value: int) -> None:
    """ICCLab, and ThunderScan compression."""
    with pytest.raises(DecodeError, match=r"a TIFF of 1 band of .*(MinIsBlack|ICCLab)") as caught:
        decode(images.tiff_with_tag(images.tile().convert("L"), tag, value), SMALL)
    assert caught.value.error_type == "unsupported"


def error_type(data: bytes) -> str | None:
    try:
        decode(data, SMALL, max_pixels=1_000_000)
    except DecodeError as error:
        return error.error_type
    return None


@settings(max_examples=300, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM"]),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_damaged_bytes_raise_decode_error_only(format: str, cut: float, changes: list[tuple[float, int]]) -> None:
    data = bytearray(images.encode(images.tile(size=(24, 24)), format))
    for place, value in changes:
        data[int(place**3 * len(data))] = value  # more often near the start, where the header is
    kinds = {None, "empty", "not_an_image", "truncated", "corrupt", "too_large", "unsupported"}
    assert error_type(bytes(data[: round(cut * len(data))])) in kinds


def test_decode_imports_neither_torch_nor_ray_and_prints_nothing() -> None:
    code = """
import sys
sys.path.insert(0, "tests/support")
from pipeline.images.transform import Transform
from pipeline.images.values import Values
from pipeline.images.decode import decode
from pipeline.images.pixels import PixelFormat
from pipeline.errors import DecodeError
assert not {"torch", "torchvision", "ray"} & set(sys.modules)
import images
for data in [images.broken_exif(), *(data for data, _ in images.STRANGE.values())]:
    try:
        decode(data, Transform())
    except DecodeError:
        pass
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (process.returncode, process.stdout, process.stderr) == (0, "", "")


def test_photos_match_torchvision() -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS}")
    for path in sorted(PHOTOS.iterdir())[::6]:
        data = path.read_bytes()
        np.testing.assert_array_equal(pixels(data, Transform()), reference(open_rgb(data), Transform()), path.name)


# exact=False: close to the exact pixels, not equal to them


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("size", [(64, 80), (131, 97), (600, 433), (2003, 1499), (40, 3000)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_pixels_are_close_to_the_exact_ones(format: str, size: tuple[int, int], orientation: int) -> None:
    data = images.oriented(orientation, format, size, "urban")
    exact, fast = (decode(data, SMALL, exact=is_exact) for is_exact in (True, False))
    assert (fast.width, fast.height) == (exact.width, exact.height) == size
    difference = np.abs(fast.pixels.astype(int) - exact.pixels)
    assert difference.mean() < 3
    if size[0] < 2 * 2 * SMALL.resize:
        assert difference.max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_blocks_at_the_edge_keep_their_place_after_the_rotation(orientation: int) -> None:
    """601 and 433 pixels are not whole numbers of blocks, and the rotation moves the last block to another edge."""
    data = images.oriented(orientation, "PNG", (601, 433), "urban")
    exact, fast = (decode(data, SMALL, exact=is_exact).pixels.astype(int) for is_exact in (True, False))
    assert np.abs(fast - exact).mean() < 1.5


def image_of_each_mode(size: tuple[int, int]) -> dict[str, bytes]:
    drawn = images.tile("urban", size=size)
    grey = np.asarray(drawn.convert("L"))
    rgba = drawn.copy()
    rgba.putalpha(drawn.convert("L"))
    return {
        "1": images.encode(drawn.convert("1"), "PNG"),
        "L": images.encode(drawn.convert("L"), "PNG"),
        "P": images.encode(drawn.quantize(32), "PNG"),
        "P, one colour transparent": images.encode(drawn.quantize(8), "PNG", transparency=1),
        "RGB, one colour transparent": images.encode(drawn, "PNG", transparency=drawn.getpixel((4, 4))),
        "LA": images.encode(rgba.convert("LA"), "PNG"),
        "RGBA": images.encode(rgba, "PNG"),
        "CMYK": images.encode(drawn.convert("CMYK"), "TIFF"),
        "CMYK JPEG": images.encode(drawn.convert("CMYK"), "JPEG", quality=100, subsampling=0),
        "YCbCr": images.encode(drawn.convert("YCbCr"), "TIFF"),
        "I;16": images.grey_16(grey.astype(np.uint16) * 257),
        "I;16B": big_endian_tiff(grey.astype(np.uint16) * 257),
        "I": images.encode(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
        "F to 1": images.float_tiff(grey / 255),
        "F to 255": images.float_tiff(grey.astype(np.float32)),
    }


SCALES = {
    "I;16": (0.0, 65535.0),
    "I;16B": (0.0, 65535.0),
    "I": (0.0, 65535.0),
    "F to 1": (0.0, 1.0),
    "F to 255": (0.0, 255.0),
}


@pytest.mark.parametrize("mode", image_of_each_mode((8, 8)))
def test_a_mode_that_is_converted_in_strips_has_no_seam(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, scale = image_of_each_mode((131, 97))[mode], SCALES.get(mode)
    whole = pixels(data, SMALL, scale=scale)
    monkeypatch.setattr("pipeline.images.decode.STRIP_PIXELS", 131 * 10)
    monkeypatch.setattr("pipeline.images.values.STRIP_VALUES", 131 * 10)
    np.testing.assert_array_equal(pixels(data, SMALL, scale=scale), whole)


@pytest.mark.parametrize("mode", image_of_each_mode((8, 8)))
def test_fast_pixels_of_every_mode_are_close_to_the_exact_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, values = image_of_each_mode((601, 433))[mode], Values(scale=SCALES.get(mode))
    monkeypatch.setattr("pipeline.images.decode.STRIP_PIXELS", 601 * 10)
    monkeypatch.setattr("pipeline.images.values.STRIP_VALUES", 601 * 10)
    exact, fast = (decode(data, SMALL, exact=is_exact, values=values).pixels.astype(int) for is_exact in (True, False))
    assert np.abs(fast - exact).mean() < (4 if "JPEG" in mode else 2)
