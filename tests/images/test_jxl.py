"""JPEG XL and HEIF through their plugins: sizes, bits, transparency and orientation."""

import io

import imagecodecs
import numpy as np
import pillow_heif
import pytest
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.images import jxl
from pipeline.images.decode import decode
from pipeline.images.transform import Transform
from pipeline.images.values import Values

pytest.importorskip("pillow_jxl")
pillow_heif.register_heif_opener(thumbnails=False)

TRANSFORM = Transform(resize=48, crop=48)
DRAWN = np.kron(np.random.default_rng(0).integers(0, 256, (3, 4, 3), np.uint8), np.ones((16, 16, 1), np.uint8))


def encoded(array: np.ndarray, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize("use_container", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (8, 256), (256, 8), (9, 7), (300, 200), (600, 513), (160, 90), (2, 9000)])
def test_the_size_of_a_jxl_is_that_of_its_header(size: tuple[int, int], use_container: bool) -> None:
    data = encoded(np.zeros((size[1], size[0]), np.uint8), "JXL", use_container=use_container, effort=1)
    assert jxl.size_of(data) == size


def test_a_large_jxl_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(np.zeros((300, 400), np.uint8), "JXL")
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(DecodeError, match="400 × 300 = 120000 pixels, more than the limit of 100000") as caught:
        decode(data, TRANSFORM, max_pixels=100_000)
    assert caught.value.error_type == "too_large"


@pytest.mark.parametrize("format", ["JXL", "HEIF"])
@pytest.mark.parametrize("exact", [False, True])
def test_colours_of_8_bits(format: str, exact: bool) -> None:
    options = {"lossless": True} if format == "JXL" else {"quality": -1, "chroma": 444}
    data = encoded(DRAWN, format, **options)
    pixels = decode(data, TRANSFORM, exact=exact).pixels.astype(int)
    expected = decode(encoded(DRAWN, "PNG"), TRANSFORM, exact=exact).pixels
    assert abs(pixels - expected).max() <= (0 if format == "JXL" else 3)  # HEIF stores YCbCr


@pytest.mark.parametrize("format", ["JXL", "HEIF"])
def test_transparency_over_white(format: str) -> None:
    clear = np.dstack([DRAWN, np.zeros(DRAWN.shape[:2], np.uint8)])
    clear[:, :32, 3] = 255
    options = {"lossless": True} if format == "JXL" else {"quality": -1, "chroma": 444}
    pixels = decode(encoded(clear, format, **options), TRANSFORM).pixels
    assert (pixels[:, -12:] == 255).all()
    assert (pixels[:, :12] < 255).any()


def test_the_orientation_of_a_heif_is_applied_once() -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    decoded = decode(encoded(DRAWN, "HEIF", exif=exif.tobytes(), quality=-1, chroma=444), TRANSFORM)
    expected = decode(encoded(np.rot90(DRAWN, -1), "PNG"), TRANSFORM)
    assert (decoded.width, decoded.height) == (48, 64)
    assert abs(decoded.pixels.astype(int) - expected.pixels).max() <= 3


@pytest.mark.parametrize("dtype", ["uint16", "float32"])
def test_grey_jxl_of_more_than_8_bits_needs_a_range(dtype: str) -> None:
    """The plugin gives the modes I;16 and F, which Pillow clips at 255 when it converts them."""
    grey = (DRAWN[..., 0] / 255 * (60_000 if dtype == "uint16" else 1)).astype(dtype)
    data = encoded(grey, "JXL", lossless=True)
    with pytest.raises(DecodeError, match="set one range for the whole run, --scale MIN:MAX"):
        decode(data, TRANSFORM)
    top = 60_000 if dtype == "uint16" else 1
    pixels = decode(data, TRANSFORM, values=Values(scale=(0, top))).pixels.astype(int)
    expected = decode(encoded(DRAWN[..., 0], "PNG"), TRANSFORM).pixels
    assert abs(pixels - expected).max() <= 1


@pytest.mark.parametrize("data", [b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), b"\0\0\0\x18ftypheic" + bytes(100)])
def test_damaged_files_are_corrupt(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(data, TRANSFORM)
    assert caught.value.error_type in ("corrupt", "truncated")


def test_an_animated_jxl_is_refused() -> None:
    """The plugin would decode its last frame."""
    frames = np.stack([DRAWN, 255 - DRAWN])
    data = bytes(imagecodecs.jpegxl_encode(frames, lossless=True, photometric="rgb"))
    with pytest.raises(DecodeError, match="several frames"):
        decode(data, TRANSFORM)
