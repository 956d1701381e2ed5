"""resize: upright RGB pixels → the crop of the network's size, as torchvision's evaluation transform has it.

torchvision/transforms/functional.py: `resize` of the short side, then `center_crop`. `exactly` gives its pixels over
Pillow bit for bit. `quickly` resizes only what the crop shows, with the same filters in SIMD (Rust's
fast_image_resize), in a third of the time; on photos a seventh of its bytes differ from Pillow's, by one level, seldom
two. Where that package has no build, Pillow does it. Imports neither Ray nor torch.
"""

import math

import numpy as np
from PIL import Image

from pipeline.config import Transform

try:
    import cykooz_resizer as simd
except ImportError:  # the package has no build for this machine
    simd = None

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SIMD_FILTERS = {"bilinear": ("bilinear", 1.0), "bicubic": ("catmull_rom", 2.0), "lanczos": ("lanczos3", 3.0)}
"""Interpolation → the same filter's name there, and how far it reaches, in pixels of the smaller of the two images."""

WHOLE_RESIZE_PIXELS = 1 << 22
"""Up to here an image is resized whole, then cropped. A longer strip is resized where the crop lies, no further:
1 × 20,000 pixels would be 256 × 5,120,000. Pillow holds the region in float32 and picks the order of its two passes by
sizes, so that a strip may differ from torchvision by rounding; whole images cannot."""

MOST_SIMD_PIXELS = 1 << 21
"""Of the source: the SIMD code is given two copies of what it reads."""


def scaled_sizes(width: int, height: int, transform: Transform) -> tuple[tuple[int, int], tuple[int, int]]:
    """Width and height of an image that was resized, and where the crop begins in it (left, top)."""
    wide, high, short = width, height, min(width, height)
    if transform.squash:
        wide = high = short
    scaled = int(transform.resize * wide / short), int(transform.resize * high / short)
    return scaled, (_offset(scaled[0], transform.crop), _offset(scaled[1], transform.crop))


def as_image(pixels: Image.Image | np.ndarray) -> Image.Image:
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def exactly(pixels: Image.Image | np.ndarray, shown: Box, full: tuple[int, int], transform: Transform) -> np.ndarray:
    """uint8 [crop, crop, 3], as `quickly`, bit for bit as torchvision."""
    scaled, (left, top) = scaled_sizes(*full, transform)
    whole = 0, 0, *scaled
    part = whole if scaled[0] * scaled[1] <= WHOLE_RESIZE_PIXELS else _shown_part(scaled, (left, top), transform.crop)
    resized = _by_pillow(pixels, _source(part, shown, scaled), part, transform)
    right, bottom = left + transform.crop, top + transform.crop
    return np.asarray(resized.crop((left - part[0], top - part[1], right - part[0], bottom - part[1])))


def quickly(pixels: Image.Image | np.ndarray, shown: Box, full: tuple[int, int], transform: Transform) -> np.ndarray:
    """uint8 [crop, crop, 3]; zeros where the resized image does not reach.

    pixels: RGB, uint8 [height, width, 3] if an array. shown: the part of them that counts. full: width and height of
    that part before it was made smaller.
    """
    crop = transform.crop
    scaled, (left, top) = scaled_sizes(*full, transform)
    part = _shown_part(scaled, (left, top), crop)
    box = _source(part, shown, scaled)
    found = _by_simd(pixels, box, part, transform)
    if found is None:
        found = np.asarray(_by_pillow(pixels, box, part, transform))
    if found.shape[:2] == (crop, crop):
        return found
    padded = np.zeros((crop, crop, 3), np.uint8)
    padded[part[1] - top :, part[0] - left :][: found.shape[0], : found.shape[1]] = found
    return padded


def _shown_part(scaled: tuple[int, int], start: tuple[int, int], crop: int) -> tuple[int, int, int, int]:
    """What the crop shows of the resized image, which may be smaller."""
    (width, height), (left, top) = scaled, start
    return max(left, 0), max(top, 0), min(left + crop, width), min(top + crop, height)


def _source(part: tuple[int, int, int, int], shown: Box, scaled: tuple[int, int]) -> Box:
    """Where a part of the resized image lies in the image that it is made of."""
    x, y = (shown[2] - shown[0]) / scaled[0], (shown[3] - shown[1]) / scaled[1]
    return shown[0] + part[0] * x, shown[1] + part[1] * y, shown[0] + part[2] * x, shown[1] + part[3] * y


def _by_pillow(
    pixels: Image.Image | np.ndarray, box: Box, part: tuple[int, int, int, int], transform: Transform
) -> Image.Image:
    size = part[2] - part[0], part[3] - part[1]
    return as_image(pixels).resize(size, FILTERS[transform.interpolation], box)


def _by_simd(
    pixels: Image.Image | np.ndarray, box: Box, part: tuple[int, int, int, int], transform: Transform
) -> np.ndarray | None:
    """None where Pillow has to do it."""
    if simd is None or transform.interpolation not in SIMD_FILTERS:
        return None
    array = np.asarray(pixels)
    name, reach = SIMD_FILTERS[transform.interpolation]
    size = part[2] - part[0], part[3] - part[1]
    # Only what the filter reaches is handed over: a copy.
    x0, x1 = _reached(box[0], box[2], size[0], reach, array.shape[1])
    y0, y1 = _reached(box[1], box[3], size[1], reach, array.shape[0])
    if (x1 - x0) * (y1 - y0) > MOST_SIMD_PIXELS:
        return None
    source = simd.ImageData(x1 - x0, y1 - y0, simd.PixelType.U8x3, array[y0:y1, x0:x1].tobytes())
    target = simd.ImageData(*size, simd.PixelType.U8x3)
    width, height = min(box[2], x1) - box[0], min(box[3], y1) - box[1]  # rounding may lead beyond the last pixel
    options = simd.ResizeOptions(
        resize_alg=simd.ResizeAlg.convolution(simd.FilterType[name]),
        crop_box=simd.CropBox(box[0] - x0, box[1] - y0, width, height),
    )
    simd.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size[1], size[0], 3)


def _reached(first: float, last: float, size: int, reach: float, end: int) -> tuple[int, int]:
    """Of one side: from where to where a filter reaches that makes `size` pixels of [first, last)."""
    margin = reach * max(1.0, (last - first) / size) + 1
    return max(0, math.floor(first - margin)), min(end, math.ceil(last + margin))


def _offset(size: int, crop: int) -> int:
    """Where torchvision's centre crop begins; negative where it pads."""
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)
