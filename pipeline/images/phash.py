"""Perceptual hash of an image: 64 bits that resizing and compressing hardly change.

It is `imagehash.phash`: signs of the 8 × 8 lowest frequencies of the cosine transform of 32 × 32 grey pixels, against
their median. Two hashes are compared by their number of different bits.
"""

from importlib.util import find_spec

import numpy as np
import pyarrow as pa
from PIL import Image

from pipeline.errors import SettingRefused

COLUMN = "phash"
BITS = 64


class PHash:
    """The column `phash`, int64: the bits of the hash from the most significant one on, in two's complement."""

    columns = pa.schema([(COLUMN, pa.int64())])

    def __call__(self, pixels: Image.Image | np.ndarray) -> dict[str, int | None]:
        return {COLUMN: phash(pixels)}


def phash(pixels: Image.Image | np.ndarray) -> int | None:
    """Hash 8-bit RGB or grey pixels. None for an image of one grey value: it has no frequencies to compare."""
    import imagehash

    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    grey = image.convert("L")
    low, high = grey.getextrema()
    if low == high:
        return None
    return int(np.packbits(imagehash.phash(grey).hash).view(">i8")[0])


def need_imagehash(what: str) -> None:
    """Raise SettingRefused if the library is not installed."""
    if find_spec("imagehash") is None:
        raise SettingRefused(f"{what} needs imagehash: pip install 'nightshift[search]'")
