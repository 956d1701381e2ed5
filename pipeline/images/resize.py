"""Resize and crop upright RGB pixels as torchvision's evaluation transform does.

torchvision/transforms/functional.py: `resize` of the short side, then `center_crop`. `resize_exact` returns the same
pixels as torchvision on a Pillow image, bit for bit. `resize_fast` resizes only the part inside the crop, with the same
filters in SIMD code (Rust's fast_image_resize). It takes a third of the time. On photos, one byte in seven differs from
Pillow's by one level, and very few differ by two. Pillow does the work if the SIMD package has no build for this
machine. Imports neither Ray nor torch.
"""

import math

import numpy as np
from PIL import Image

from pipeline.errors import DecodeError
from pipeline.images.strips import resize_part
from pipeline.images.transform import Transform

try:
    import cykooz_resizer as simd
except ImportError:  # the package has no build for this machine
    simd = None

Box = tuple[float, float, float, float]
"""Left, top, right and bottom, in pixels."""
Part = tuple[int, int, int, int]
"""A box with whole numbers."""

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
SIMD_FILTERS = {"bilinear": ("bilinear", 1.0), "bicubic": ("catmull_rom", 2.0), "lanczos": ("lanczos3", 3.0)}
"""Interpolation → the name of the same filter in the SIMD package, and its support in pixels of the smaller image."""

MAX_WHOLE_RESIZE_PIXELS = 1 << 22
MIN_STRIP_RATIO = 32
"""If the resized image has more pixels than this, and its sides have at least this ratio, `resize_exact` computes only
the part inside the crop. A strip of 1 × 20,000 pixels would become 256 × 5,120,000."""

MAX_SIMD_PIXELS = 1 << 21
"""Limit for the source pixels of the SIMD code, because they are copied twice."""


def scaled_sizes(width: int, height: int, transform: Transform) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (width, height) of an image after the resize, and the (left, top) corner of the crop in it."""
    wide, high, short = width, height, min(width, height)
    if transform.squash:
        wide = high = short
    side = transform.resize or short
    scaled = int(side * wide / short), int(side * high / short)
    return scaled, (_offset(scaled[0], transform.crop), _offset(scaled[1], transform.crop))


def as_image(pixels: Image.Image | np.ndarray) -> Image.Image:
    """Return the pixels as a Pillow image."""
    return pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)


def resize_exact(
    pixels: Image.Image | np.ndarray, extent: Box, full_size: tuple[int, int], transform: Transform
) -> np.ndarray:
    """Resize and crop bit for bit as torchvision does. Parameters and result as in `resize_fast`."""
    scaled, (left, top) = scaled_sizes(*full_size, transform)
    right, bottom = left + transform.crop, top + transform.crop
    if scaled[0] * scaled[1] > MAX_WHOLE_RESIZE_PIXELS and max(scaled) >= MIN_STRIP_RATIO * min(scaled):
        return _resize_strip(np.asarray(pixels), scaled, (left, top), transform)
    resized = _resize_with_pillow(pixels, extent, (0, 0, *scaled), transform)
    return np.asarray(resized.crop((left, top, right, bottom)))


def resized_bytes(width: int, height: int, transform: Transform) -> int:
    """The memory that `resize_exact` takes for the resized image."""
    (wide, high), _ = scaled_sizes(width, height, transform)
    is_strip = wide * high > MAX_WHOLE_RESIZE_PIXELS and max(wide, high) >= MIN_STRIP_RATIO * min(wide, high)
    return 0 if is_strip else 4 * wide * high


def _resize_strip(
    pixels: np.ndarray, scaled: tuple[int, int], corner: tuple[int, int], transform: Transform
) -> np.ndarray:
    left, top, right, bottom = _visible_part(scaled, corner, transform.crop)
    part = resize_part(pixels, scaled, (left, right), (top, bottom), transform.interpolation)
    result = np.zeros((transform.crop, transform.crop, part.shape[2]), np.uint8)
    result[top - corner[1] :, left - corner[0] :][: part.shape[0], : part.shape[1]] = part
    return result


def resize_fast(
    pixels: Image.Image | np.ndarray, extent: Box, full_size: tuple[int, int], transform: Transform
) -> np.ndarray:
    """Resize and crop to uint8 [crop, crop, 3]. Pixels of the crop outside the resized image are 0.

    pixels: RGB; an array is uint8 [height, width, 3].
    extent: the box of `pixels` that the image covers. It is smaller than `pixels` if the last block of a reduced image
    stands for fewer pixels than the others.
    full_size: width and height of the image before it was reduced.
    """
    crop = transform.crop
    scaled, (left, top) = scaled_sizes(*full_size, transform)
    part = _visible_part(scaled, (left, top), crop)
    box = _source_box(part, extent, scaled)
    resized = _resize_with_simd(pixels, box, part, transform)
    if resized is None:
        resized = np.asarray(_resize_with_pillow(pixels, box, part, transform))
    if resized.shape[:2] == (crop, crop):
        return resized
    padded = np.zeros((crop, crop, 3), np.uint8)
    padded[part[1] - top :, part[0] - left :][: resized.shape[0], : resized.shape[1]] = resized
    return padded


TURNS = {
    Image.Transpose.FLIP_LEFT_RIGHT: (0, True),
    Image.Transpose.ROTATE_180: (2, False),
    Image.Transpose.FLIP_TOP_BOTTOM: (2, True),
    Image.Transpose.TRANSPOSE: (1, True),
    Image.Transpose.ROTATE_270: (3, False),
    Image.Transpose.TRANSVERSE: (3, True),
    Image.Transpose.ROTATE_90: (1, False),
}
"""Pillow's transpose → quarter turns against the clock after an optional flip of left and right."""


def turned(pixels: np.ndarray, transpose: Image.Transpose | None) -> np.ndarray:
    """Transpose [height, width, bands] as Pillow transposes an image."""
    if transpose is None:
        return pixels
    quarters, is_flipped = TURNS[transpose]
    return np.rot90(pixels[:, ::-1] if is_flipped else pixels, quarters)


def resize_bands(pixels: np.ndarray, transform: Transform) -> np.ndarray:
    """Resize and crop [height, width, bands] of uint8, uint16 or float32, each band with Pillow's filters.

    Pillow rounds uint8 after each of its two passes; the other types are computed in float32 and rounded once. Raises
    DecodeError (unsupported) for an image smaller than the crop if the transform keeps its size.
    """
    height, width, bands = pixels.shape
    check_crop(width, height, transform)
    scaled, (left, top) = scaled_sizes(width, height, transform)
    part = _visible_part(scaled, (left, top), transform.crop)
    box = _source_box(part, (0.0, 0.0, float(width), float(height)), scaled)
    result = np.zeros((transform.crop, transform.crop, bands), pixels.dtype)
    target = result[part[1] - top :, part[0] - left :][: part[3] - part[1], : part[2] - part[0]]
    number = np.uint8 if pixels.dtype == np.uint8 else np.float32
    for band in range(bands):
        image = Image.fromarray(np.ascontiguousarray(pixels[..., band], number))
        resized = np.asarray(_resize_with_pillow(image, box, part, transform))
        if pixels.dtype == np.uint16:
            resized = np.rint(resized).clip(0, 65535)
        target[..., band] = resized
    return result


def check_crop(width: int, height: int, transform: Transform) -> None:
    """Raise DecodeError (unsupported) for an image smaller than the crop, if the transform keeps its size."""
    if not transform.resize and min(width, height) < transform.crop:
        raise DecodeError(
            "unsupported",
            f"the image has {width} × {height} pixels, and the input specification crops {transform.crop} × "
            f"{transform.crop} without a resize; set --resize {transform.crop}, or a smaller --crop",
        )


def _visible_part(scaled: tuple[int, int], corner: tuple[int, int], crop: int) -> Part:
    """The part of the resized image inside the crop. The resized image may be smaller than the crop."""
    (width, height), (left, top) = scaled, corner
    return max(left, 0), max(top, 0), min(left + crop, width), min(top + crop, height)


def _source_box(part: Part, extent: Box, scaled: tuple[int, int]) -> Box:
    """Map a part of the resized image to the source image."""
    x, y = (extent[2] - extent[0]) / scaled[0], (extent[3] - extent[1]) / scaled[1]
    return extent[0] + part[0] * x, extent[1] + part[1] * y, extent[0] + part[2] * x, extent[1] + part[3] * y


def _resize_with_pillow(pixels: Image.Image | np.ndarray, box: Box, part: Part, transform: Transform) -> Image.Image:
    size = part[2] - part[0], part[3] - part[1]
    return as_image(pixels).resize(size, FILTERS[transform.interpolation], box)


def _resize_with_simd(
    pixels: Image.Image | np.ndarray, box: Box, part: Part, transform: Transform
) -> np.ndarray | None:
    """Return None if the SIMD package cannot do it, or the source is too large."""
    if simd is None or transform.interpolation not in SIMD_FILTERS:
        return None
    array = np.asarray(pixels)
    name, support = SIMD_FILTERS[transform.interpolation]
    size = part[2] - part[0], part[3] - part[1]
    # Copy only the pixels that the filter reads.
    x0, x1 = _filter_range(box[0], box[2], size[0], support, array.shape[1])
    y0, y1 = _filter_range(box[1], box[3], size[1], support, array.shape[0])
    if (x1 - x0) * (y1 - y0) > MAX_SIMD_PIXELS:
        return None
    source = simd.ImageData(x1 - x0, y1 - y0, simd.PixelType.U8x3, array[y0:y1, x0:x1].tobytes())
    target = simd.ImageData(*size, simd.PixelType.U8x3)
    width, height = min(box[2], x1) - box[0], min(box[3], y1) - box[1]  # by rounding, box may end after the last pixel
    options = simd.ResizeOptions(
        resize_alg=simd.ResizeAlg.convolution(simd.FilterType[name]),
        crop_box=simd.CropBox(box[0] - x0, box[1] - y0, width, height),
    )
    simd.Resizer().resize(source, target, options)
    return np.frombuffer(target.get_buffer(), np.uint8).reshape(size[1], size[0], 3)


def _filter_range(start: float, stop: float, size: int, support: float, length: int) -> tuple[int, int]:
    """The source pixels of one axis, of `length` pixels, that the filter reads to turn [start, stop) into `size`."""
    margin = support * max(1.0, (stop - start) / size) + 1
    return max(0, math.floor(start - margin)), min(length, math.ceil(stop + margin))


def _offset(size: int, crop: int) -> int:
    """The offset of torchvision's centre crop on one axis; negative if torchvision pads the image."""
    return round((size - crop) / 2) if size >= crop else -((crop - size) // 2)
