"""Perceptual hashes: those of imagehash, of the pixels that the decoder has."""

import io

import imagehash
import numpy as np
import pytest
from PIL import Image, ImageOps

from pipeline.images.decode import decode
from pipeline.images.phash import COLUMN, PHash, phash
from pipeline.images.transform import Transform

TRANSFORM = Transform(resize=36, crop=32)


def picture(number: int, width: int = 240, height: int = 160) -> Image.Image:
    coarse = np.random.default_rng(number).integers(0, 256, (5, 7, 3), np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def as_imagehash(value: int | None) -> imagehash.ImageHash:
    assert value is not None
    return imagehash.hex_to_hash(f"{value & (1 << 64) - 1:016x}")


@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"format": "JPEG"}), ("RGB", {"format": "PNG"}), ("L", {"format": "PNG"}), ("RGB", {"format": "WEBP"})],
)
def test_exact_pixels_give_the_hash_of_imagehash(mode: str, options: dict) -> None:
    for number in range(8):
        data = encoded(picture(number).convert(mode), **options)
        decoded = decode(data, TRANSFORM, exact=True, measures=[PHash()])
        assert as_imagehash(decoded.measured[COLUMN]) == imagehash.phash(Image.open(io.BytesIO(data)))


def test_the_hash_is_that_of_the_upright_image() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(1), format="JPEG", exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert as_imagehash(decode(data, TRANSFORM, measures=[PHash()]).measured[COLUMN]) == imagehash.phash(upright)


def test_copies_differ_in_few_bits_and_others_in_many() -> None:
    def hashed(data: bytes) -> imagehash.ImageHash:
        return as_imagehash(decode(data, TRANSFORM, exact=False, measures=[PHash()]).measured[COLUMN])

    originals = [hashed(encoded(picture(number), format="PNG")) for number in range(10)]
    for number, original in enumerate(originals):
        small = encoded(picture(number).resize((180, 120)), format="JPEG", quality=70)
        assert original - hashed(small) <= 4
        assert min(original - other for other in originals if other is not original) > 10


def test_an_image_of_one_colour_has_no_hash() -> None:
    assert phash(np.full((40, 50, 3), 77, np.uint8)) is None


def test_no_measure_costs_nothing() -> None:
    assert decode(encoded(picture(0), format="PNG"), TRANSFORM).measured == {}
