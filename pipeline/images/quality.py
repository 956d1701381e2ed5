"""Quality of an image: numbers computed from its pixels, and the flags that they stand for."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from PIL import Image

BRIGHTNESS, CONTRAST, SHARPNESS = "quality_brightness", "quality_contrast", "quality_sharpness"
COLUMNS = pa.schema([(BRIGHTNESS, pa.float32()), (CONTRAST, pa.float32()), (SHARPNESS, pa.float32())])
"""Of the grey image with values from 0 to 1: mean, standard deviation, and variance of the Laplacian."""

SIDE = 224
"""Pixels of the short side at which an image is measured, so that numbers of images of all sizes can be compared. Most
networks see no finer detail."""

TINY_SIDE = 64
"""Pixels. A network of 224 pixels sees such an image enlarged 3.5 times, mostly interpolated."""
DARK, BRIGHT = 0.1, 0.9
"""Mean brightness. Beyond them, most of the image is black or white."""
LOW_CONTRAST = 0.05
"""Standard deviation: of 256 grey levels, two thirds of the pixels are within 13 of the mean. Fog, lens caps, blank
pages."""
BLURRED = 0.0005
"""Variance of the Laplacian. Of 200 sharp photos none is below it. Blurred by a Gaussian with a standard deviation of 2
pixels at SIDE, 98 % are; by one of 1 pixel, which hardly shows, 18 %."""
LEVELS = np.arange(256) / 255
FLAGS = ("tiny", "dark", "bright", "low_contrast", "blurred")


class Quality:
    """The columns of COLUMNS, from the pixels of an image."""

    columns = COLUMNS

    def __call__(self, pixels: Image.Image | np.ndarray) -> dict[str, Any]:
        return dict(zip(COLUMNS.names, measure(pixels), strict=True))


def measure(pixels: Image.Image | np.ndarray) -> tuple[float, float, float]:
    """Brightness, contrast and sharpness of 8-bit RGB or grey pixels, uint8 [H, W, 3] or [H, W]."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if (factor := min(image.size) // SIDE) > 1:
        image = image.reduce(factor)
    grey, short = image.convert("L"), min(image.size)
    if short > SIDE:
        width, height = (max(1, round(side * SIDE / short)) for side in image.size)
        grey = grey.resize((width, height), Image.Resampling.BOX)
    counts = np.asarray(grey.histogram(), float)
    mean = float(counts @ LEVELS / counts.sum())
    variance = float(counts @ (LEVELS - mean) ** 2 / counts.sum())
    return mean, math.sqrt(variance), _laplacian_variance(np.asarray(grey))


def _laplacian_variance(grey: NDArray[np.uint8]) -> float:
    if min(grey.shape) < 3:
        return 0.0
    wide = grey.astype(np.int16)
    laplacian = wide[1:-1, :-2] + wide[1:-1, 2:]
    laplacian += wide[:-2, 1:-1]
    laplacian += wide[2:, 1:-1]
    laplacian -= wide[1:-1, 1:-1] << 2
    values = laplacian.astype(np.float32).reshape(-1)
    mean = float(values.mean())
    return max(float(values @ values) / values.size - mean**2, 0.0) / 255**2


def is_measured(names: Sequence[str]) -> bool:
    """Whether these columns have the numbers."""
    return set(COLUMNS.names) <= set(names)


def flags(rows: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """Flag → whether each row has it. Those whose columns are missing are left out, and nulls have no flag."""
    found: dict[str, NDArray[np.bool_]] = {}
    if {"width", "height"} <= set(rows.column_names):
        sides = pc.min_element_wise(rows["width"], rows["height"])
        found["tiny"] = _is(pc.less(sides, TINY_SIDE))
    if is_measured(rows.column_names):
        found["dark"] = _is(pc.less(rows[BRIGHTNESS], DARK))
        found["bright"] = _is(pc.greater(rows[BRIGHTNESS], BRIGHT))
        found["low_contrast"] = _is(pc.less(rows[CONTRAST], LOW_CONTRAST))
        found["blurred"] = _is(pc.less(rows[SHARPNESS], BLURRED))
    return found


def _is(values: pa.ChunkedArray) -> NDArray[np.bool_]:
    return np.asarray(pc.fill_null(values, False).to_numpy(), bool)
