"""Raster: a picture whose numbers are read as the file stores them, before they become pixels for a network."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Colour = Literal["grey", "white is zero", "RGB", "palette", "CMYK", "YCbCr"]
"""The meaning of the samples. "grey" with several bands means bands without a colour, as a sensor gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raster:
    """The header of a picture, and a function that reads its samples.

    width, height: as stored. samples: numbers per pixel, with the alpha.
    dtype: of the array that `read` returns. bits: significant bits of unsigned integers, 0 for other numbers.
    alpha: the sample that is the opacity; None without one. premultiplied: the colours are multiplied by it.
    alpha_may_be_band: writers mark a fourth band as an alpha by default, as GDAL does.
    nodata: the value of pixels without data; None if the file names none. names: of the samples, if it has them.
    palette: uint8 [colours, 3], for the colour "palette".
    orientation: EXIF orientation of the stored pixels, 1 to 8.
    is_georeferenced: the picture lies on the Earth, so its numbers are those of a sensor, and not of a screen.
    description: bands, number type, layout and compression, for messages.
    metadata: GDAL's metadata items of the whole picture, by name.
    sample_bytes: peak memory of `read` per pixel and sample. buffer_bytes: memory that it takes in addition.
    read: samples (from 0) → [height, width, samples] of `dtype`, in that order.
    """

    width: int
    height: int
    samples: int
    dtype: np.dtype
    bits: int
    colour: Colour
    description: str
    read: Callable[[Sequence[int]], np.ndarray]
    alpha: int | None = None
    premultiplied: bool = False
    alpha_may_be_band: bool = False
    nodata: float | None = None
    names: Sequence[str] = ()
    palette: np.ndarray | None = None
    orientation: int = 1
    sample_bytes: int = field(default=0)
    buffer_bytes: int = 0
    is_georeferenced: bool = False
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def bands(self) -> list[int]:
        """The samples without the alpha."""
        return [sample for sample in range(self.samples) if sample != self.alpha]

    def read_bytes(self, samples: int) -> int:
        """Peak memory of reading this many samples per pixel."""
        each = self.sample_bytes or self.dtype.itemsize
        return self.width * self.height * samples * each + self.buffer_bytes
