"""decode against Pillow + torchvision's own transform, over formats, sizes, filters, modes, EXIF and broken files."""

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

from pipeline.config import Transform
from pipeline.decode import decode
from pipeline.errors import DecodeError
from pipeline.resize import FILTERS

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = Path(__file__).resolve().parents[2] / "shared" / "data" / "photos"
SMALL = Transform(resize=48, crop=40)
SAME = Transform(resize=64, crop=64)
"""Neither resizes nor crops a 64 × 64 image: what comes out is what was decoded."""


def reference(rgb: Image.Image, transform: Transform) -> np.ndarray:
    """torchvision's evaluation transform, as an ImageFolder user has it."""
    size = [transform.resize] * (2 if transform.squash else 1)
    resized = resize(rgb, size, InterpolationMode(transform.interpolation))
    return np.asarray(center_crop(resized, transform.crop))


def pixels(data: bytes, transform: Transform = SAME, *, exif_rotate: bool = True) -> np.ndarray:
    found = decode(data, transform, exif_rotate=exif_rotate).pixels
    assert found.dtype == np.uint8
    assert found.shape == (transform.crop, transform.crop, 3)
    return found


def by_pillow(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"])
@pytest.mark.parametrize("interpolation", sorted(FILTERS))
def test_every_format_and_filter_gives_torchvisions_pixels(format: str, interpolation: str) -> None:
    data = images.encode(images.tile("urban", size=(131, 97)), format)
    transform = Transform(resize=48, crop=40, interpolation=interpolation)
    found = decode(data, transform)
    assert (found.width, found.height) == (131, 97)
    np.testing.assert_array_equal(found.pixels, reference(by_pillow(data), transform))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("size", [(131, 97), (60, 300), (1200, 500), (20, 31)])
def test_images_may_be_squashed_whole(format: str, size: tuple[int, int]) -> None:
    data = images.encode(images.tile("urban", size=size), format)
    for transform in (Transform(48, 48, "bicubic", squash=True), Transform(64, 60, squash=True)):
        expected = reference(by_pillow(data), transform)
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
@example(20, 400, (256, 224), "lanczos", "BMP", "RGB", 0)  # Pillow turns its two passes around
@example(301, 300, (255, 224), "bilinear", "BMP", "RGB", 0)  # half a pixel, rounded to even
@example(401, 7, (256, 224), "bilinear", "JPEG", "RGB", 0)  # wide, enlarged 37 times, no whole block high
def test_every_size_of_every_format_gives_torchvisions_pixels(
    width: int, height: int, sizes: tuple[int, int], interpolation: str, format: str, mode: str, seed: int
) -> None:
    noise = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))
    data = images.encode(noise.convert(mode), format)
    transform = Transform(resize=sizes[0], crop=sizes[1], interpolation=interpolation)
    np.testing.assert_array_equal(pixels(data, transform), reference(by_pillow(data), transform))


@pytest.mark.parametrize("size", [(1, 900), (900, 1), (2, 1900), (1900, 2)])
def test_a_strip_is_resized_only_where_the_crop_lies(size: tuple[int, int]) -> None:
    strip = images.tile("urban", size=(max(size), max(size))).crop((0, 0, *size))
    transform = Transform(resize=72, crop=64)
    difference = pixels(images.encode(strip, "PNG"), transform).astype(int) - reference(strip, transform)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1)])
def test_a_thin_strip_costs_no_memory(size: tuple[int, int]) -> None:
    data = images.encode(Image.new("RGB", size, (10, 200, 90)), "PNG")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = decode(data, Transform())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB; resized whole it is 5 GB"
    assert (found.width, found.height) == size
    assert (found.pixels == (10, 200, 90)).all()


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_have_pillows_pixels(mode: str, progressive: bool, subsampling: int) -> None:
    drawn = images.tile("field").convert(mode)
    data = images.encode(drawn, "JPEG", quality=80, progressive=progressive, subsampling=subsampling)
    np.testing.assert_array_equal(pixels(data), by_pillow(data))


def test_a_jpeg_of_rgb_components_has_pillows_pixels() -> None:
    data = images.encode(images.tile(), "JPEG", keep_rgb=True)
    np.testing.assert_array_equal(pixels(data), by_pillow(data))


def test_a_jpeg_that_pillow_forgives_is_decoded() -> None:
    data = bytearray(images.encode(images.tile("urban"), "JPEG"))
    data[-2:-2] = b"stray"
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(bytes(data))
    np.testing.assert_array_equal(pixels(bytes(data)), by_pillow(bytes(data)))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP", "GIF"])
def test_opaque_modes_are_what_pillow_converts(mode: str, format: str) -> None:
    data = images.encode(images.tile("field").convert(mode), format)
    np.testing.assert_array_equal(pixels(data), by_pillow(data))


@pytest.mark.parametrize("mode", ["CMYK", "LAB", "YCbCr"])
def test_colour_spaces_of_tiff_are_what_pillow_converts(mode: str) -> None:
    from PIL import ImageCms

    drawn = images.tile("field")
    if mode == "LAB":
        drawn = ImageCms.profileToProfile(
            drawn, ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
        )
    data = images.encode(drawn.convert(mode) if drawn.mode != mode else drawn, "TIFF")
    found = pixels(data)
    np.testing.assert_array_equal(found, by_pillow(data))
    assert np.abs(found.astype(int) - np.asarray(images.tile("field"))).mean() < 4


def over_white(rgba: Image.Image) -> np.ndarray:
    values = np.asarray(rgba.convert("RGBA")).astype(float)
    share = values[..., 3:] / 255
    return values[..., :3] * share + 255 * (1 - share)


@pytest.mark.parametrize(("mode", "format"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "TIFF"), ("RGBA", "WEBP")])
def test_transparency_is_composited_over_white(mode: str, format: str) -> None:
    data = images.with_alpha(mode, format)
    found = pixels(data)
    np.testing.assert_allclose(found, over_white(Image.open(io.BytesIO(data))), atol=1)
    assert (found[:, 0] == 255).all(), "the clear side is white"


def test_premultiplied_grey_is_composited_over_white() -> None:
    """Pillow writes no such TIFF: ExtraSamples (338) is 2 in one of its own, and 1 means premultiplied."""
    drawn = Image.open(io.BytesIO(images.with_alpha("LA")))
    found = pixels(images.tiff_with_tag(drawn.convert("La").convert("LA"), 338, 1))
    assert (found[:, 0] == 255).all()
    np.testing.assert_allclose(found[:, -1], over_white(drawn)[:, -1], atol=1)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
def test_a_clear_palette_entry_is_white(format: str) -> None:
    drawn = images.tile("field").quantize(16)
    clear = int(np.asarray(drawn)[10, 10])
    found = pixels(images.encode(drawn, format, transparency=clear))
    mask = np.asarray(drawn) == clear
    assert (found[mask] == 255).all()
    np.testing.assert_array_equal(found[~mask], np.asarray(drawn.convert("RGB"))[~mask])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_clear_colour_is_white(mode: str) -> None:
    drawn = images.tile("urban").convert(mode)
    clear = drawn.getpixel((10, 10))
    found = pixels(images.encode(drawn, "PNG", transparency=clear))
    assert (found[10, 10] == 255).all()
    assert (found != 255).any()


@pytest.mark.parametrize(("depth", "value"), [(1, 1), (2, 1), (4, 5), (8, 5)])
def test_a_clear_grey_of_few_bits_is_white(depth: int, value: int) -> None:
    """Of 64 × 64 pixels, the lower half 0 and the upper half the clear value, which the file holds unscaled."""
    byte = sum(value << shift for shift in range(0, 8, depth))
    rows = images.zlib.compress((b"\0" + bytes([byte]) * (8 * depth)) * 32 + (b"\0" + bytes(8 * depth)) * 32)
    header = images.png_header(64, 64, depth=depth, colour=0)
    chunks = (b"IHDR", header), (b"tRNS", value.to_bytes(2, "big")), (b"IDAT", rows), (b"IEND", b"")
    found = pixels(images.png_of_chunks(*chunks))
    assert (found[:32] == 255).all()
    assert (found[32:] == 0).all()


def test_a_clear_colour_of_16_bits_is_white() -> None:
    values = np.full((64, 64, 3), 0x3400, ">u2")
    values[:32] = 0x1234
    rows = images.zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    chunks = (b"tRNS", values[0, 0].tobytes()), (b"IDAT", rows), (b"IEND", b"")
    found = pixels(images.png_of_chunks((b"IHDR", images.png_header(64, 64, depth=16)), *chunks))
    assert (found[:32] == 255).all()
    assert (found[32:] == 0x34).all()


def test_16_bit_grey_is_rounded_to_8() -> None:
    values = np.arange(64 * 64).reshape(64, 64) * 16
    expected = np.rint(values / 257)
    for data in (images.grey_16(values), images.grey_16(values, "TIFF"), big_endian_tiff(values)):
        np.testing.assert_array_equal(pixels(data), np.repeat(expected[..., None], 3, 2))


def big_endian_tiff(values: np.ndarray) -> bytes:
    image = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
    return images.encode(image, "TIFF")


def test_32_bit_grey_is_clipped_to_16() -> None:
    values = np.full((64, 64), 70_000, np.int32)
    values[:32] = 257 * 9
    values[:8] = -5
    found = pixels(images.encode(Image.fromarray(values), "TIFF"))
    assert (found[8:32] == 9).all()
    assert (found[32:] == 255).all()
    assert (found[:8] == 0).all()


def test_16_bit_grey_with_a_clear_value_is_white_there() -> None:
    values = np.zeros((64, 64), np.uint16)
    values[:32] = 300
    header = images.png_header(64, 64, depth=16, colour=0)
    rows = images.zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    chunks = (b"IHDR", header), (b"tRNS", (300).to_bytes(2, "big")), (b"IDAT", rows), (b"IEND", b"")
    found = pixels(images.png_of_chunks(*chunks))
    assert (found[:32] == 255).all()
    assert (found[32:] == 0).all()


def test_float_of_0_to_1_is_scaled_and_nan_is_black() -> None:
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    values[5, 5] = np.nan
    found = pixels(images.float_tiff(values))
    np.testing.assert_array_equal(found[..., 0], np.rint(np.nan_to_num(values) * 255))


def test_float_beyond_1_is_clipped_to_0_to_255() -> None:
    values = np.linspace(-50, 400, 64 * 64, dtype=np.float32).reshape(64, 64)
    values[0, 0], values[0, 1] = np.inf, -np.inf
    found = pixels(images.float_tiff(values))
    np.testing.assert_array_equal(found[..., 0], np.rint(np.clip(values, 0, 255)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "MPO"])
def test_the_first_frame_counts(format: str) -> None:
    data = images.animated(format)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    difference = pixels(data).astype(int) - np.asarray(images.tile("forest"))
    assert np.abs(difference).mean() < 8, "water and urban are further away"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_as_pillow_does(format: str, orientation: int) -> None:
    data = images.oriented(orientation, format)
    found = decode(data, SMALL)
    assert (found.width, found.height) == (80, 60), "as stored"
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert upright.size == ((60, 80) if orientation >= 5 else (80, 60))
    np.testing.assert_array_equal(found.pixels, reference(upright, SMALL))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_can_be_left_alone(format: str) -> None:
    expected = pixels(images.oriented(1, format), SMALL)
    for orientation in range(2, 9):
        found = pixels(images.oriented(orientation, format), SMALL, exif_rotate=False)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("exif_rotate", [True, False])
def test_a_tiff_is_turned_by_its_tag_alone(exact: bool, exif_rotate: bool) -> None:
    drawn = images.tile("urban", size=(80, 60))
    xmp = {700: b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'}
    found = decode(images.encode(drawn, "TIFF", tiffinfo=xmp), SMALL, exif_rotate=exif_rotate, exact=exact)
    assert (found.width, found.height) == (80, 60)
    np.testing.assert_array_equal(found.pixels, decode(images.encode(drawn, "TIFF"), SMALL, exact=exact).pixels)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_broken_exif_is_ignored(format: str) -> None:
    data = images.broken_exif(format)
    np.testing.assert_array_equal(pixels(data), by_pillow(data))


@pytest.mark.parametrize("name", images.STRANGE)
def test_a_bad_image_says_why(name: str) -> None:
    data, error_type = images.STRANGE[name]
    with pytest.raises(DecodeError) as caught:
        decode(data, SMALL)
    assert caught.value.error_type == error_type
    assert caught.value.message


def test_too_large_gives_both_numbers_and_the_flag() -> None:
    data = images.encode(images.tile(size=(64, 50)), "PNG")
    assert decode(data, SMALL, max_pixels=3200).width == 64
    with pytest.raises(DecodeError, match=r"3200 pixels.*limit of 3199.*--max-pixels") as caught:
        decode(data, SMALL, max_pixels=3199)
    assert caught.value.error_type == "too_large"


@pytest.mark.parametrize(("tag", "value"), [(262, 9), (259, 34887)])  # an unknown photometric, LERC compression
def test_what_pillow_does_not_read_is_unsupported(tag: int, value: int) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(images.tiff_with_tag(images.tile(), tag, value), SMALL)
    assert caught.value.error_type == "unsupported"


def error_type(data: bytes) -> str | None:
    try:
        decode(data, SMALL, max_pixels=1_000_000)
    except DecodeError as error:
        return error.error_type
    return None


@settings(max_examples=300, deadline=None)
@given(
    format=st.sampled_from(["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF"]),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=4),
)
def test_damaged_bytes_raise_nothing_but_decode_error(
    format: str, cut: float, changes: list[tuple[float, int]]
) -> None:
    data = bytearray(images.encode(images.tile(size=(24, 24)), format))
    for place, value in changes:
        data[int(place**3 * len(data))] = value  # rather in the header
    kinds = {None, "empty", "not_an_image", "truncated", "corrupt", "too_large", "unsupported"}
    assert error_type(bytes(data[: round(cut * len(data))])) in kinds


def test_decode_starts_without_torch_and_keeps_quiet() -> None:
    code = """
import sys
sys.path.insert(0, "tests")
from pipeline.config import Transform
from pipeline.decode import decode
from pipeline.errors import DecodeError
assert not {"torch", "torchvision", "ray"} & set(sys.modules)
import images
for data in [images.broken_exif(), *(data for data, _ in images.STRANGE.values())]:
    try:
        decode(data, Transform())
    except DecodeError:
        pass
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_photos_have_torchvisions_pixels() -> None:
    if not PHOTOS.is_dir():
        pytest.skip(f"no photos in {PHOTOS}")
    for path in sorted(PHOTOS.iterdir())[::6]:
        data = path.read_bytes()
        np.testing.assert_array_equal(pixels(data, Transform()), reference(by_pillow(data), Transform()), path.name)


# Fast decoding: not to the bit, and near it


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
@pytest.mark.parametrize("size", [(64, 80), (131, 97), (600, 433), (2003, 1499), (40, 3000)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_fast_pixels_are_near_the_exact_ones(format: str, size: tuple[int, int], orientation: int) -> None:
    data = images.oriented(orientation, format, size, "urban")
    exact, fast = (decode(data, SMALL, exact=each) for each in (True, False))
    assert (fast.width, fast.height) == (exact.width, exact.height) == size
    difference = np.abs(fast.pixels.astype(int) - exact.pixels)
    assert difference.mean() < 3
    if size[0] < 2 * 2 * SMALL.resize:
        assert difference.max() <= 8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_blocks_at_the_edge_stay_in_their_place_when_turned(orientation: int) -> None:
    """601 and 433 pixels are no whole number of blocks: the last block lies at another edge after a turn."""
    data = images.oriented(orientation, "PNG", (601, 433), "urban")
    exact, fast = (decode(data, SMALL, exact=each).pixels.astype(int) for each in (True, False))
    assert np.abs(fast - exact).mean() < 1.5


def of_every_mode(size: tuple[int, int]) -> dict[str, bytes]:
    drawn = images.tile("urban", size=size)
    grey = np.asarray(drawn.convert("L"))
    rgba = drawn.copy()
    rgba.putalpha(drawn.convert("L"))
    return {
        "1": images.encode(drawn.convert("1"), "PNG"),
        "L": images.encode(drawn.convert("L"), "PNG"),
        "P": images.encode(drawn.quantize(32), "PNG"),
        "P, one colour clear": images.encode(drawn.quantize(8), "PNG", transparency=1),
        "RGB, one colour clear": images.encode(drawn, "PNG", transparency=drawn.getpixel((4, 4))),
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


@pytest.mark.parametrize("mode", of_every_mode((8, 8)))
def test_a_mode_that_is_converted_in_bands_shows_no_seam(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = of_every_mode((131, 97))[mode]
    whole = decode(data, SMALL).pixels
    monkeypatch.setattr("pipeline.decode.BAND_PIXELS", 131 * 10)
    np.testing.assert_array_equal(decode(data, SMALL).pixels, whole)


@pytest.mark.parametrize("mode", of_every_mode((8, 8)))
def test_fast_pixels_of_every_mode_are_near_the_exact_ones(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = of_every_mode((601, 433))[mode]
    monkeypatch.setattr("pipeline.decode.BAND_PIXELS", 601 * 10)
    exact, fast = (decode(data, SMALL, exact=each).pixels.astype(int) for each in (True, False))
    assert np.abs(fast - exact).mean() < (4 if "JPEG" in mode else 2)
