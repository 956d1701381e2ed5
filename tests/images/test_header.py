"""The header of an image: its format, the limits for the work of decoding it, its peak memory, and truncation."""

import sys

import images
import pytest
from corpus import ONE_CODE, bmp_of_runs, grey_jpeg, scan, tiff_of, tiff_of_strips

from pipeline.errors import DecodeError
from pipeline.images import header

MAX_PIXELS = 1 << 20
PIXELS = 64 * 64
RGB = images.tile()


@pytest.mark.parametrize("format", header.FORMATS)
def test_every_format_is_opened(format: str) -> None:
    image = header.open_image(images.encode(RGB, format))
    assert (image.format, image.size) == (format, (64, 64))


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (b"8BPS\0\1", "Photoshop"),
        (b"%PDF-1.7", "PDF"),
        (b"\0\0\0\x1cftypisom", "HEIF or video"),
    ],
)
def test_an_unsupported_format_is_named(data: bytes, name: str) -> None:
    with pytest.raises(DecodeError, match=f"{name} is not supported: convert it to one of JPEG, PNG") as caught:
        header.open_image(data)
    assert caught.value.error_type == "unsupported"


@pytest.mark.parametrize(
    ("name", "extra"), [("HEIC", "HEIF needs the package pillow_heif.*heic"), ("JPEG XL", "pillow_jxl.*jxl")]
)
def test_a_missing_extra_is_named(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    with pytest.raises(DecodeError, match=f"{extra}.*convert it to JPEG"):
        header.open_image(images.STRANGE[name][0])


def test_a_git_lfs_pointer_is_named() -> None:
    with pytest.raises(DecodeError, match=r"this is a Git LFS pointer.*git lfs pull"):
        header.open_image(images.STRANGE["Git LFS pointer"][0])


def test_text_that_begins_with_p_is_no_pnm() -> None:
    for text in (b"Python is no image", b"P9 1 1 255 x", b"P"):
        with pytest.raises(DecodeError) as caught:
            header.open_image(text)
        assert caught.value.error_type == "not_an_image"


def test_the_first_bytes_of_other_files_are_shown() -> None:
    with pytest.raises(DecodeError, match=r"b'<html><b', which match none of JPEG, PNG") as caught:
        header.open_image(images.text())
    assert caught.value.error_type == "not_an_image"


@pytest.mark.parametrize(
    ("size", "error_type", "message"),
    [
        ((1025, 1024), "too_large", f"1025 × 1024 = 1049600 pixels, more than the limit of {MAX_PIXELS}; raise --max-"),
        ((header.MAX_SIDE + 1, 0), "too_large", f"the limit for a side is {header.MAX_SIDE}"),
        ((0, 8), "corrupt", "0 × 8 pixels; each side must be at least 1"),
    ],
)
def test_sizes_are_limited(size: tuple[int, int], error_type: str, message: str) -> None:
    header.check_size(1024, 1024, MAX_PIXELS)
    with pytest.raises(DecodeError, match=message) as caught:
        header.check_size(*size, MAX_PIXELS)
    assert caught.value.error_type == error_type


@pytest.mark.parametrize(
    ("accepted", "refused", "message"),
    [
        (
            grey_jpeg(0xC2, ONE_CODE + scan(0, 0) * 16, 1024),
            grey_jpeg(0xC2, ONE_CODE + scan(0, 0) * 17, 1024),
            "a JPEG of 1048576 pixels has 17 scans; the limit is 16; raise --max-pixels",
        ),
        (
            tiff_of({322: 1024, 323: 1024, 324: 1, 325: 900}),
            tiff_of({322: 1025, 323: 1024, 324: 1, 325: 900}),
            f"a TIFF of 4096 pixels has tiles of 1049600 pixels; the limit is {MAX_PIXELS}; raise --max-pixels",
        ),
        (
            tiff_of_strips(4),
            tiff_of_strips(10_000),
            r"the strips of a TIFF of 4096 pixels cover \d{8} pixels; the limit is 8388608",
        ),
        (
            bmp_of_runs(1024, 128, b""),
            bmp_of_runs(1024, 129, b""),
            "a run-length encoded BMP has 132096 pixels; the limit is 131072; raise --max-pixels",
        ),
        (
            b"P3 128 128 255 ",
            b"P3 128 129 255 ",
            "a PNM of text or of an unusual range has 16512 pixels; the limit is 16384; raise --max-pixels",
        ),
    ],
    ids=["scans", "tiles", "strips", "runs", "text"],
)
def test_work_is_limited(accepted: bytes, refused: bytes, message: str) -> None:
    header.check_work(header.open_image(accepted), accepted, MAX_PIXELS)
    with pytest.raises(DecodeError, match=message) as caught:
        header.check_work(header.open_image(refused), refused, MAX_PIXELS)
    assert caught.value.error_type == "too_large"


@pytest.mark.parametrize(
    ("data", "min_side", "factor", "bytes_per_pixel"),
    [
        (images.encode(RGB, "PNG"), 0, 1, 8),
        (images.encode(RGB.convert("L"), "PNG"), 0, 4, 1.25),
        (images.encode(RGB, "PNG"), 0, 4, 4.25),
        (images.encode(RGB, "WEBP"), 0, 1, 20),
        (images.encode(RGB, "JPEG"), 0, 1, 8),
        (images.encode(RGB, "JPEG"), 17, 1, 2),
        (images.encode(RGB, "JPEG"), 16, 1, 0.5),
        (images.encode(RGB, "JPEG", progressive=True), 0, 1, 10),
        (images.encode(RGB.convert("CMYK"), "JPEG", progressive=True), 0, 1, 12),
        (images.encode(RGB, "TIFF"), 0, 1, 8),
        (images.oriented(6, "TIFF", (64, 64)), 0, 1, 12),
        (images.encode(RGB, "TIFF", compression="tiff_lzw"), 0, 1, 11),
    ],
)
def test_peak_memory_per_pixel(data: bytes, min_side: int, factor: int, bytes_per_pixel: float) -> None:
    assert header.peak_bytes(header.open_image(data), min_side, factor) == bytes_per_pixel * PIXELS


@pytest.mark.parametrize("format", [name for name in header.FORMATS if name != "PPM"])  # it has no end
def test_truncation_is_detected(format: str) -> None:
    data = images.encode(RGB, format)
    assert not header.is_truncated(data)
    assert header.is_truncated(data[:40])


def test_only_a_tiff_has_a_tiff_orientation() -> None:
    def orientation(data: bytes) -> int | None:
        return header.tiff_orientation(header.open_image(data))

    assert orientation(images.oriented(6, "TIFF")) == 6
    assert orientation(images.encode(RGB, "TIFF")) == 1
    assert orientation(images.oriented(6, "JPEG")) is None
