"""Decode the bytes of an image to uint8 pixels of the network's input size, or raise DecodeError.

The pixels are those of torchvision's evaluation transform on a Pillow image (torchvision/transforms/functional.py:
`resize` of the short side, then `center_crop`). With exact=True they are equal bit for bit. Otherwise only the part
inside the crop is resized, in SIMD code, and large images are reduced first: a JPEG while it is decoded, other formats
by averaging blocks of pixels. Imports neither Ray nor torch, so that decode workers start fast.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
from PIL import Image, ImageFile, TiffImagePlugin

from pipeline.errors import DecodeError
from pipeline.geo.bands import FILLED
from pipeline.images import deep, header, jxl, tiff
from pipeline.images.measure import Measure, measured
from pipeline.images.pixels import RGB8, Decoded, Encoded
from pipeline.images.png import is_text_too_large, without_large_text
from pipeline.images.raster import Raster
from pipeline.images.resize import (
    MAX_WHOLE_RESIZE_PIXELS,
    Box,
    as_image,
    check_crop,
    resize_bands,
    resize_exact,
    resize_fast,
    resized_bytes,
    turned,
)
from pipeline.images.transform import Transform
from pipeline.images.values import (
    DEFAULT,
    STRIP_VALUES,
    Values,
    filled,
    has_names,
    is_scaled,
    missing_values,
    native,
    pick,
    rgb_strips,
    select,
)

MIN_SCALED_RATIO = 2
"""A JPEG that is decoded at a smaller scale keeps at least this many times `Transform.resize` pixels on its short side.
A smaller ratio would change the results more than bfloat16 does."""

MIN_REDUCED_RATIO = 3
"""Blocks of pixels are averaged first if the short side keeps at least this many times `Transform.resize` pixels."""

STRIP_PIXELS = 1 << 18
"""Images that are not RGB are converted in strips of about this many pixels. A strip is small compared to a large image
and fits in the cache."""

TO_UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation (EXIF 2.32, tag 0x0112) → the transpose from the stored pixels to the upright ones."""
TO_STORED = TO_UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
"""EXIF orientation → the transpose from the upright pixels to the stored ones."""

SWAPS_SIDES = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
LAST_BLOCK_LEFT = {
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
}
LAST_BLOCK_TOP = {
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
}
"""Transposes that move the last stored column or row to the left, or to the top."""

OffsetOf = Callable[[Mapping[str, str]], float]
"""The metadata of a picture → the constant that its numbers contain."""

MAX_GPU_PIXELS = 1 << 26
"""A GPU does not decode larger JPEGs, because the resize takes twelve bytes of its memory per pixel. `decode` reduces
them while it decodes them."""


def decode(
    data: bytes,
    transform: Transform,
    *,
    max_pixels: int = 200_000_000,
    exif_rotate: bool = True,
    exact: bool = True,
    keep_tiles: bool = False,
    reserve: Callable[[int], AbstractContextManager[object]] = nullcontext,
    values: Values = DEFAULT,
    offset_of: OffsetOf | None = None,
    measures: Sequence[Measure] = (),
) -> Decoded:
    """Decode the first frame or page of an image, rotate it upright, and resize and crop it.

    The result is RGB, or what `values.pixel_format` asks for.

    exact: return the same pixels as Pillow and torchvision, bit for bit. This is slower.
    keep_tiles: do not resize square images of at most half the crop's side; the network's device enlarges them.
    reserve: called with the peak memory of this image in bytes, without its encoded bytes. The context manager that it
    returns is entered before the pixels are decoded.
    values: the bands that the network gets, and the range of values that becomes 0 to 255.
    offset_of: the metadata of a picture → the constant in its numbers that is subtracted, or DecodeError. Pictures of 8
    bits are then refused, because they hold no digital numbers of a sensor.
    measures: computed from the whole upright image; only of RGB.

    Transparent pixels are composited over white; an alpha that is 0 everywhere is ignored. Of 16-bit colours the high
    byte is taken, as Pillow does. The ICC profile is not applied, as in torchvision.

    Peak memory per pixel, without the encoded bytes: at most 8 bytes; progressive JPEG 10 (CMYK 12); WebP 16 (exact:
    20). For large images that are reduced: 4 bytes; grey and palettes 1; JPEG that is not progressive 0.5. A compressed
    TIFF takes the size of one strip or tile more, and a TIFF that is rotated 4 bytes per pixel more. A TIFF of other
    numbers than bytes takes the size of the bands that are read.

    Raises DecodeError if the bytes cannot be decoded: empty, not_an_image, unsupported (a format, a kind of pixels, or
    numbers whose range is not known), truncated, corrupt, too_large (more than `max_pixels`). Raises MemoryError if
    memory runs out.
    """
    if not data:
        raise DecodeError("empty", "the image has no bytes")
    settings = _Settings(transform, max_pixels, exif_rotate, exact, keep_tiles, reserve, values, offset_of, measures)
    try:
        return _decode(data, settings)
    except ValueError:  # of a PNG with more text than Pillow accepts; `_as_decode_errors` turns all others into ours
        return _decode(without_large_text(data), settings)


@dataclass(frozen=True, slots=True)
class _Settings:
    """The arguments of `decode`."""

    transform: Transform
    max_pixels: int
    exif_rotate: bool
    exact: bool
    keep_tiles: bool
    reserve: Callable[[int], AbstractContextManager[object]]
    values: Values
    offset_of: OffsetOf | None = None
    measures: Sequence[Measure] = ()

    def resized_bytes(self, size: tuple[int, int]) -> int:
        """Memory of a resized image that is larger than most."""
        resized = resized_bytes(*size, self.transform) if self.exact else 0
        return resized if resized > 4 * MAX_WHOLE_RESIZE_PIXELS else 0

    def reduction(self, size: tuple[int, int]) -> int:
        return 1 if self.exact else _reduction(size, self.transform)


def _decode(data: bytes, settings: _Settings) -> Decoded:
    with _as_decode_errors(data):
        image = _open(data, settings)
    if isinstance(image, Raster):
        decoded = _decode_raster(image, data, settings)
        if is_scaled(image, settings.values):
            return replace(decoded, is_constant=bool((decoded.pixels == decoded.pixels[:1, :1]).all()))
        return decoded
    return _decode_image(image, data, settings)


def _open(data: bytes, settings: _Settings) -> ImageFile.ImageFile | Raster:
    """Open an image, as a Raster if it holds other numbers than Pillow reads correctly."""
    max_pixels = settings.max_pixels
    if tiff.is_tiff(data):
        return _open_tiff(data, max_pixels, settings.values)
    try:
        with _reserved_to_open(data, settings):
            image = header.open_image(data)
    except Exception:
        raster = deep.jpeg_2000(data, settings.values) if header.is_jpeg_2000(data) else None
        if raster is None:
            raise
    else:
        if image.format in header.PLAIN_FORMATS:
            return image
        raster = deep.raster_of(image, data, settings.values)
        if raster is None:
            return image
        header.check_work(image, data, max_pixels)
    header.check_size(raster.width, raster.height, max_pixels)
    return raster


def _reserved_to_open(data: bytes, settings: _Settings) -> AbstractContextManager[object]:
    """Check the size of a JPEG XL, whose plugin decodes it on open, and reserve memory for that."""
    if not data.startswith(header.JXL_MAGIC):
        return nullcontext()
    header.import_plugin("JXL")
    width, height = jxl.size_of(data)
    header.check_size(width, height, settings.max_pixels)
    return settings.reserve(header.OTHER_BYTES["JXL"] * width * height)


def _open_tiff(data: bytes, max_pixels: int, values: Values) -> ImageFile.ImageFile | Raster:
    try:
        image = header.open_image(data)
        if isinstance(image, TiffImagePlugin.TiffImageFile) and not tiff.needs_tifffile(
            image, as_rgb=values.pixel_format == RGB8 and not values.bands and not values.wanted
        ):
            return image
    except MemoryError:
        raise
    except Exception:  # Pillow does not know this kind of TIFF, or it is damaged
        pass
    try:
        return tiff.open_raster(data, max_pixels, header.check_size)
    except DecodeError as error:
        if error.error_type == "too_large" or not header.is_truncated(data):
            raise
        raise DecodeError("truncated", f"the image is cut off after {len(data)} bytes: {error.message}") from error


def _decode_image(image: ImageFile.ImageFile, data: bytes, settings: _Settings) -> Decoded:
    """Decode with Pillow or libjpeg-turbo."""
    transform, exact = settings.transform, settings.exact
    if settings.offset_of:
        raise _not_digital_numbers(f"a {image.format} image of 8 bits")
    with _as_decode_errors(data):
        tiff_orientation = header.tiff_orientation(image)
        width, height = image.size[::-1] if tiff_orientation in (5, 6, 7, 8) else image.size
        header.check_size(width, height, settings.max_pixels)
        header.check_work(image, data, settings.max_pixels)
        check_crop(width, height, transform)
        full_size = image.size
        min_side = 0 if exact else MIN_SCALED_RATIO * transform.resize
        peak_bytes = header.peak_bytes(image, min_side, settings.reduction(full_size)) + settings.resized_bytes(
            full_size
        )
        bands = None if settings.values.is_default else _image_bands(image, settings.values)
    with settings.reserve(peak_bytes), _as_decode_errors(data):
        rgb, extent = _load_rgb(image, data, min_side, transform, exact)
        transpose = _transpose(image, tiff_orientation, settings.exif_rotate)
        del image  # frees its pixels
        upright = rgb if transpose is None else as_image(rgb).transpose(transpose)
        del rgb
        return _finished(upright, extent, full_size, (width, height), transpose, bands, settings)


def _image_bands(image: Image.Image, values: Values) -> list[int]:
    """The bands of an image's RGB that the network gets."""
    is_grey = image.mode in ("1", "L", "LA", "La")
    return pick(1 if is_grey else 3, values, f"a {image.format} image of mode {image.mode}")


def _finished(
    upright: Image.Image | np.ndarray,
    extent: tuple[float, float],
    full_size: tuple[int, int],
    stored_size: tuple[int, int],
    transpose: Image.Transpose | None,
    bands: list[int] | None,
    settings: _Settings,
) -> Decoded:
    """Resize, crop and choose the bands of upright RGB."""
    transform, format = settings.transform, settings.values.pixel_format
    values = measured(settings.measures, upright)
    if settings.keep_tiles and _is_tile(upright, transform):
        pixels = np.asarray(upright)
    else:
        pixels = _crop(upright, extent, full_size, transpose, transform, settings.exact)
    if bands is not None and bands != [0, 1, 2]:
        pixels = np.ascontiguousarray(pixels[..., bands])
    return Decoded(pixels if format == RGB8 else pixels.astype(format.dtype), *stored_size, measured=values)


def _decode_raster(raster: Raster, data: bytes, settings: _Settings) -> Decoded:
    """Read the numbers of a raster, and make the network's bands of them."""
    size, values = (raster.width, raster.height), settings.values
    is_colour = raster.colour in ("palette", "CMYK", "YCbCr")
    with _as_decode_errors(data):
        tiff.check_bytes(raster, settings.max_pixels)
        check_crop(*size, settings.transform)
        samples = select(raster, values)
        bands = pick(3, values, raster.description) if is_colour else None
        if settings.offset_of:
            if 0 < raster.bits <= 8:
                raise _not_digital_numbers(raster.description)
            values = replace(values, subtract=settings.offset_of(raster.metadata))
        as_rgb = values.pixel_format == RGB8 or is_colour
        with_alpha = as_rgb and raster.alpha is not None and not values.bands
        factor = settings.reduction(size) if as_rgb else 1
        samples += [raster.alpha] if with_alpha else []  # type: ignore[list-item]
        converted = header.RGB_BYTES * raster.width * raster.height // factor**2
        peak_bytes = raster.read_bytes(len(samples)) + 2 * converted + 3 * 8 * STRIP_VALUES
    transpose = TO_UPRIGHT.get(raster.orientation) if settings.exif_rotate else None
    with settings.reserve(peak_bytes), _as_decode_errors(data):
        if not as_rgb:
            stored = raster.read([sample for sample in samples if sample != FILLED])
            upright = turned(filled(native(raster, stored, values), samples, values.wanted), transpose)
            return Decoded(resize_bands(upright, settings.transform), *size)
        array = raster.read(samples)
        alpha = array[..., -1:] if with_alpha else None
        rgb = _raster_rgb(raster, array[..., : len(samples) - with_alpha], alpha, values, factor)
        del array, alpha
        extent = size[0] / factor, size[1] / factor
        turned_rgb = rgb if transpose is None else rgb.transpose(transpose)
        del rgb
        return _finished(turned_rgb, extent, size, size, transpose, bands, settings)


def _not_digital_numbers(description: str) -> DecodeError:
    return DecodeError(
        "unsupported",
        f"{description} is a picture for a screen, and the input specification takes digital numbers of Sentinel-2; "
        "use a network for RGB, or a copy of the specification with harmonize: false and your divisor",
    )


@dataclass(frozen=True, slots=True)
class Numbers:
    """Numbers of a picture as the file stores them.

    array: float64 [pixels, bands], NaN where there is no data. is_8_bit: of a picture for a screen. description: of
    the picture. has_names: the file names its bands, or its format does, as colours. offset: the constant that was
    subtracted.
    """

    array: np.ndarray
    is_8_bit: bool
    description: str
    has_names: bool
    offset: float = 0.0


def read_numbers(
    data: bytes, values: Values, *, max_pixels: int, max_rows: int, offset_of: OffsetOf | None = None
) -> Numbers:
    """At most `max_rows` pixels of the bands that the network gets, evenly over the picture, before any scaling.

    offset_of: as in `decode`; the constant is subtracted. Raises DecodeError.
    """
    all_bits = values if values.reads_all_bits else replace(values, scale=(0.0, 1.0))
    settings = _Settings(Transform(), max_pixels, False, True, False, nullcontext, all_bits, offset_of)
    with _as_decode_errors(data):
        opened = _open(data, settings)
        if isinstance(opened, Raster):
            return _raster_numbers(opened, settings, max_rows)
        header.check_size(*opened.size, max_pixels)
        return _picture_numbers(opened, values, max_rows)


def _raster_numbers(raster: Raster, settings: _Settings, max_rows: int) -> Numbers:
    tiff.check_bytes(raster, settings.max_pixels)
    samples, offset_of = select(raster, settings.values), settings.offset_of
    offset = offset_of(raster.metadata) if offset_of else 0.0
    stored = _spread(raster.read([sample for sample in samples if sample != FILLED]), max_rows)
    numbers = stored.astype(np.float64)
    missing = missing_values(stored, raster.nodata)
    if missing is not None:
        numbers[missing] = np.nan
    if offset_of:
        numbers[stored == 0] = np.nan  # Sentinel-2: no data
        numbers = np.maximum(numbers - offset, 0.0)
    array = np.full((len(numbers), len(samples)), np.nan)
    array[:, [place for place, sample in enumerate(samples) if sample != FILLED]] = numbers
    is_8_bit = 0 < raster.bits <= 8 or raster.colour in ("palette", "CMYK", "YCbCr")
    return Numbers(array, is_8_bit, raster.description, has_names(raster), offset)


def _picture_numbers(image: ImageFile.ImageFile, values: Values, max_rows: int) -> Numbers:
    bands = _image_bands(image, values)
    array = _spread(np.asarray(image.convert("RGB")), max_rows)[:, bands].astype(np.float64)
    return Numbers(array, True, f"a {image.format} image of mode {image.mode}", True)


def _spread(array: np.ndarray, max_rows: int) -> np.ndarray:
    """[height, width, bands] → [pixels, bands], evenly over the picture."""
    step = max(1, math.ceil(math.sqrt(array.shape[0] * array.shape[1] / max_rows)))
    return array[::step, ::step].reshape(-1, array.shape[2])


def _raster_rgb(
    raster: Raster, array: np.ndarray, alpha: np.ndarray | None, values: Values, factor: int
) -> Image.Image:
    """Convert samples to RGB, and average blocks of `factor` × `factor` pixels."""
    rgb = Image.new("RGB", (-(-raster.width // factor), -(-raster.height // factor)))
    for top, strip in rgb_strips(raster, array, alpha, values, factor):
        converted = _strip_to_rgb(strip)
        rgb.paste(converted.reduce(factor) if factor > 1 else converted, (0, top // factor))
    return rgb


@contextmanager
def _as_decode_errors(data: bytes) -> Iterator[None]:
    """Turn every error except MemoryError into a DecodeError."""
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except ValueError as error:
        if is_text_too_large(error):
            raise
        raise _decode_error(error, data) from error
    except Exception as error:  # Pillow does not document the errors that its plugins raise for broken data
        raise _decode_error(error, data) from error


def leave_encoded(
    data: bytes,
    transform: Transform,
    *,
    max_pixels: int = 200_000_000,
    exif_rotate: bool = True,
    values: Values = DEFAULT,
) -> Encoded | None:
    """Return a JPEG that a GPU decodes to nearly the same pixels as `decode`, or None for any other image.

    Reads the header only. Returns None for images that the transform enlarges: `decode` is fast for them, and
    enlarging makes the GPU's different chroma upsampling visible. Returns None for images that `decode` refuses, so
    that `decode` raises the error.
    """
    if not data.startswith(b"\xff\xd8") or header.is_truncated(data) or values.bands:
        return None
    try:
        image = header.open_image(data)
        header.check_size(*image.size, min(max_pixels, MAX_GPU_PIXELS))
        header.check_work(image, data, max_pixels)
        orientation = image.getexif().get(header.ORIENTATION, 1) if exif_rotate else 1
    except MemoryError:
        raise
    except Exception:  # `decode` raises it again
        return None
    if not _is_grey_or_ycbcr(image) or min(image.size) < transform.resize:
        return None
    return Encoded(data, *image.size, orientation if orientation in TO_UPRIGHT else 1)


def _is_grey_or_ycbcr(image: Image.Image) -> bool:
    """True for a JPEG with the colours of JFIF. A JPEG can also hold RGB or CMYK (T.872, 6.5.3)."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return False
    holds_rgb = image.info.get("adobe_transform") == 0 or [layer[0] for layer in image.layer] == [*b"RGB"]  # type: ignore[attr-defined]
    return image.mode == "L" or not holds_rgb


def _transpose(image: Image.Image, tiff_orientation: int | None, exif_rotate: bool) -> Image.Transpose | None:
    """The transpose that the loaded pixels need: to upright, or for a TIFF, which Pillow rotates, to as stored."""
    if tiff_orientation is not None:
        return None if exif_rotate else TO_STORED.get(tiff_orientation)
    return TO_UPRIGHT.get(header.orientation(image)) if exif_rotate else None


def _load_rgb(
    image: ImageFile.ImageFile, data: bytes, min_side: int, transform: Transform, exact: bool
) -> tuple[Image.Image | np.ndarray, tuple[float, float]]:
    """Decode to RGB, as stored, and reduce large images. Also return the width and height that the image covers.

    They are not whole numbers if the last block of a reduced image stands for fewer pixels than the others.
    """
    jpeg, frame = _jpeg_rgb(image, data, min_side), _small_frame(image)
    if jpeg is None:
        _load(image, min_side)
    size = _size(image if jpeg is None else jpeg)
    factor = 1 if exact else _reduction(size, transform)
    extent = size[0] / factor, size[1] / factor
    if jpeg is not None and factor == 1:
        return jpeg, extent
    if frame is not None:
        return _on_white(image, frame, factor), extent
    return _to_rgb(image if jpeg is None else as_image(jpeg), factor), extent


def _small_frame(image: ImageFile.ImageFile) -> tuple[int, int, int, int] | None:
    """The box of the first frame of a GIF if it does not cover the canvas, otherwise None."""
    if image.format != "GIF" or not image.tile:
        return None
    box = image.tile[0].extents
    return box if box is not None and box != (0, 0, *image.size) else None


def _on_white(image: Image.Image, box: tuple[int, int, int, int], factor: int) -> Image.Image:
    """Paint a frame on a white canvas. Pillow fills the canvas with the first colour of the palette."""
    rgb = Image.new("RGB", image.size, (255, 255, 255))
    rgb.paste(_to_rgb(image.crop(box), 1), box)
    return rgb.reduce(factor) if factor > 1 else rgb


def _size(pixels: Image.Image | np.ndarray) -> tuple[int, int]:
    """Width and height."""
    return pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])


def _jpeg_rgb(image: Image.Image, data: bytes, min_side: int) -> np.ndarray | None:
    """Decode a JPEG to uint8 [height, width, 3] with the libjpeg-turbo settings of Pillow. None: Pillow must decode it.

    min_side: the short side may be reduced to this many pixels; 0: full size. libjpeg's scaled DCT then decodes each
    block of 8 × 8 pixels to n × n pixels, if n is 4 or less.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, min_height=min_side, min_width=min_side, min_factor=2
        )
    except ValueError:  # simplejpeg is strict; Pillow accepts some of these files
        return None
    is_full_size = pixels.shape[:2] == image.size[::-1]
    return pixels if is_full_size or (min_side and min(pixels.shape[:2]) >= min_side) else None


def _load(image: ImageFile.ImageFile, min_side: int) -> None:
    """Decode with Pillow, in the image's own mode. min_side: as in `_jpeg_rgb`; ignored for other formats."""
    if min_side:
        image.draft(None, (min_side, min_side))
    image.load()


def _reduction(size: tuple[int, int], transform: Transform) -> int:
    """The number of pixels along each side that are averaged into one before the resize."""
    if transform.interpolation == "nearest" or not transform.resize:
        return 1
    return max(1, min(size) // (MIN_REDUCED_RATIO * transform.resize))


def _to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """Convert to RGB and average blocks of `factor` × `factor` pixels; the blocks at the edge may be smaller."""
    if image.mode in ("RGB", "L") and not image.has_transparency_data:
        reduced = image.reduce(factor) if factor > 1 else image
        return reduced if image.mode == "RGB" else reduced.convert("RGB")
    is_hidden = _is_hidden(image)
    rgb = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top, strip in _strips(image, factor):
        converted = _without_alpha(strip) if is_hidden else _strip_to_rgb(strip)
        rgb.paste(converted.reduce(factor) if factor > 1 else converted, (0, top // factor))
    return rgb


def _is_hidden(image: Image.Image) -> bool:
    """True if the alpha is 0 everywhere, so that it cannot be meant."""
    if image.mode not in ("RGBA", "LA", "RGBa", "La"):
        return False
    return all(strip.getchannel(strip.getbands()[-1]).getextrema() == (0, 0) for _, strip in _strips(image, 1))


def _without_alpha(image: Image.Image) -> Image.Image:
    bands = image.split()[:-1]
    return Image.merge("RGB", bands if len(bands) == 3 else bands * 3)


def _strips(image: Image.Image, multiple: int) -> Iterator[tuple[int, Image.Image]]:
    """Cut the image into strips: (first row, strip). All heights but the last are multiples of `multiple`."""
    rows = multiple * max(1, STRIP_PIXELS // (image.width * multiple))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _is_tile(upright: Image.Image | np.ndarray, transform: Transform) -> bool:
    width, height = _size(upright)
    return width == height <= transform.crop // 2


def _crop(
    upright: Image.Image | np.ndarray,
    extent: tuple[float, float],
    full_size: tuple[int, int],
    transpose: Image.Transpose | None,
    transform: Transform,
    exact: bool,
) -> np.ndarray:
    """Resize and crop. extent, full_size: before the transpose, which `upright` has already had."""
    if transpose in SWAPS_SIDES:
        full_size, extent = full_size[::-1], extent[::-1]
    resize = resize_exact if exact else resize_fast
    return resize(upright, _extent_box(_size(upright), extent, transpose), full_size, transform)


def _extent_box(size: tuple[int, int], extent: tuple[float, float], transpose: Image.Transpose | None) -> Box:
    """The box that the image covers in pixels of this size, after the transpose."""
    left = size[0] - extent[0] if transpose in LAST_BLOCK_LEFT else 0.0
    top = size[1] - extent[1] if transpose in LAST_BLOCK_TOP else 0.0
    return left, top, left + extent[0], top + extent[1]


def _decode_error(error: Exception, data: bytes) -> DecodeError:
    """Classify an error that a decoder raised."""
    reason = " ".join(str(error).split()) or type(error).__name__
    kinds = ("unknown pixel mode", "cannot handle", "unsupported", "not supported")
    if isinstance(error.__cause__, KeyError) or any(words in reason.lower() for words in kinds):
        return DecodeError("unsupported", f"Pillow does not support this kind of pixels or compression: {reason}")
    if any(words in reason.lower() for words in ("truncated", "not enough image data")) or header.is_truncated(data):
        return DecodeError("truncated", f"the image is cut off after {len(data)} bytes: {reason}")
    return DecodeError("corrupt", f"the image is damaged: {reason}")
