"""The crop of a very long image after Pillow's resize, bit for bit, without resizing the rest of it.

Pillow (src/libImaging/Resample.c) resizes one axis, rounds to 8 bits, then resizes the other one. Each output pixel of
a pass depends only on its own source pixels, so a part of the output can be computed alone, with the same coefficients
in fixed-point arithmetic. A box for Pillow itself would not be exact: it is stored in float32.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PRECISION_BITS = 32 - 8 - 2
"""Of Pillow's coefficients."""


def _triangle(x: Floats) -> Floats:
    x = np.abs(x)
    return np.where(x < 1, 1 - x, 0.0)


def _cubic(x: Floats) -> Floats:
    x, a = np.abs(x), -0.5
    return np.where(x < 1, ((a + 2) * x - (a + 3)) * x * x + 1, np.where(x < 2, (((x - 5) * x + 8) * x - 4) * a, 0.0))


def _sinc(x: Floats) -> Floats:
    x = x * math.pi
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(x == 0, 1.0, np.sin(x) / x)


def _lanczos(x: Floats) -> Floats:
    return np.where((x >= -3) & (x < 3), _sinc(x) * _sinc(x / 3), 0.0)


KERNELS: dict[str, tuple[Callable[[Floats], Floats], float]] = {
    "bilinear": (_triangle, 1.0),
    "bicubic": (_cubic, 2.0),
    "lanczos": (_lanczos, 3.0),
}
"""Interpolation → kernel, and its support."""

Range = tuple[int, int]


def resize_part(
    pixels: np.ndarray, size: tuple[int, int], columns: Range, rows: Range, interpolation: str
) -> np.ndarray:
    """uint8 [height, width, bands] of an image 32 times as long as wide, or more → the given part of its resize.

    size: (width, height) of the whole resized image. columns, rows: [first, last) of the part.
    """
    height, width, _ = pixels.shape
    shrinks_down = height > width and size[1] < height
    if shrinks_down:  # Pillow resizes the axis first that leaves fewer pixels for the second pass
        return _columns(_rows(pixels, size[1], rows, interpolation), size[0], columns, interpolation)
    first, last = _used(height, size[1], rows, interpolation)
    part = _columns(pixels[first:last], size[0], columns, interpolation)
    return _rows(part, size[1], rows, interpolation, first, height)


def _columns(pixels: np.ndarray, size: int, part: Range, interpolation: str) -> np.ndarray:
    return _rows(pixels.transpose(1, 0, 2), size, part, interpolation).transpose(1, 0, 2)


def _used(length: int, size: int, part: Range, interpolation: str) -> Range:
    """The source pixels that a part of the resized axis needs, with a margin."""
    scale = length / size
    margin = 3 * max(scale, 1.0) + 2
    return max(0, int(part[0] * scale - margin)), min(length, int(part[1] * scale + margin) + 1)


def _rows(
    pixels: np.ndarray, size: int, part: Range, interpolation: str, offset: int = 0, length: int | None = None
) -> np.ndarray:
    """Resize the first axis to `size`, and return [part[0], part[1]) of it.

    pixels: the source from `offset` on. length: of the whole source, if it is longer.
    """
    length = len(pixels) if length is None else length
    if length == size:
        return pixels[part[0] - offset : part[1] - offset]
    if interpolation == "nearest":
        return pixels[_nearest(length, size)[part[0] : part[1]] - offset]
    kernel, support = KERNELS[interpolation]
    scale = length / size
    support, narrow = support * max(scale, 1.0), 1 / max(scale, 1.0)
    centers = (np.arange(*part) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), length)
    taps = [first + tap for tap in range(int((last - first).max()))]
    weights = [np.where(tap < last, kernel((tap - centers + 0.5) * narrow), 0.0) for tap in taps]
    total = sum(weights[1:], weights[0])
    result = np.full((len(centers), *pixels.shape[1:]), 1 << (PRECISION_BITS - 1), np.int64)
    for tap, weight in zip(taps, weights, strict=True):
        share = weight / total * (1 << PRECISION_BITS)
        rounded = np.trunc(share + np.where(share < 0, -0.5, 0.5)).astype(np.int64)
        source = pixels[np.minimum(tap, length - 1) - offset]
        result += source.astype(np.int64) * rounded[:, None, None]
    rounded_down: np.ndarray = result >> PRECISION_BITS
    return rounded_down.clip(0, 255).astype(np.uint8)


def _nearest(length: int, size: int) -> NDArray[np.int64]:
    """The source pixel of each output pixel. Pillow adds the step up, with its rounding errors."""
    step = length / size
    return np.minimum(np.cumsum(np.concatenate([[step * 0.5], np.full(size - 1, step)])).astype(np.int64), length - 1)
