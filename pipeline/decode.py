"""decode: the bytes of an image → uint8 pixels of the network's size, or a DecodeError.

The pixels are those of torchvision's evaluation transform over Pillow (torchvision/transforms/functional.py: `resize`
of the short side, then `center_crop`), bit for bit where that is asked for. Else only what the crop shows is resized,
in SIMD, and large images are made smaller on the way: a JPEG as it is decoded, others by averaging whole pixels.
Imports neither Ray nor torch: decode workers start at once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageFile

from pipeline import header, resize
from pipeline.config import Transform
from pipeline.errors import DecodeError
from pipeline.resize import Box, as_image

SCALED_LEAST = 2
"""A JPEG decoded at a smaller scale keeps this many times the wanted size: less would cost more truth than bfloat16."""

REDUCED_LEAST = 3
"""Blocks of whole pixels are averaged first where that leaves this many times the wanted size."""

BAND_PIXELS = 1 << 18
"""What is not RGB is converted in bands of about so many pixels: small beside a large image, and they fit the cache."""

UPRIGHT: dict[int, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF 2.32, tag 0x0112 → what turns the stored pixels upright."""
SWAPS_SIDES = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
}
LEFT_WAS_LAST = {
    Image.Transpose.FLIP_LEFT_RIGHT,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_270,
    Image.Transpose.TRANSVERSE,
}
TOP_WAS_LAST = {
    Image.Transpose.FLIP_TOP_BOTTOM,
    Image.Transpose.ROTATE_180,
    Image.Transpose.ROTATE_90,
    Image.Transpose.TRANSVERSE,
}
"""What turns the last stored columns or rows to the left or to the top."""
BACK = UPRIGHT | {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}

MOST_PIXELS_LEFT = 1 << 26
"""Larger JPEGs are not left to a GPU: resizing takes twelve bytes of its memory a pixel; `decode` has them made smaller
as they are decoded."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A JPEG as it is stored, for a GPU to decode.

    width, height: as stored. orientation: EXIF's, 1 to 8; 1 where the image is not to be turned, whatever EXIF says.
    """

    data: bytes | memoryview
    width: int
    height: int
    orientation: int


@dataclass(frozen=True, slots=True)
class Decoded:
    """pixels: uint8 [crop, crop, 3], RGB; of a tile that keeps its size [side, side, 3].

    width, height: as stored, before EXIF rotation and any resize.
    """

    pixels: np.ndarray
    width: int
    height: int


def decode(
    data: bytes,
    transform: Transform,
    *,
    max_pixels: int = 200_000_000,
    exif_rotate: bool = True,
    exact: bool = True,
    keep_tiles: bool = False,
    reserve: Callable[[int], AbstractContextManager[object]] = nullcontext,
) -> Decoded:
    """The first frame or page of an image as RGB, upright, resized and cropped as `transform` says.

    exact: bit for bit as Pillow and torchvision do it, which takes longer.
    keep_tiles: square images of at most half the crop's side stay as they are, to be enlarged where the network runs.
    reserve: entered with the most bytes that this image will take beside its encoded ones, before it takes them.

    Transparency is composited over white. 16-bit grey is scaled to 8 bits; float is taken as [0, 1] where all of it
    lies there, else as [0, 255]. The ICC profile is not applied, as in torchvision.

    Memory beside the encoded bytes: at most 8 bytes a pixel, of a progressive JPEG 10 (12 of CMYK), of WebP 16 (exact:
    20). Where large images are reduced, 4 are enough (grey and palettes 1, 16-bit grey 2), and half a byte for a JPEG
    that is not progressive. A TIFF takes one of its strips or tiles more, if they are compressed, and 4 bytes a pixel
    more if it is to be turned.

    Raises DecodeError, whatever the bytes: empty, not_an_image, unsupported (a format or a kind of pixels that is not
    read), truncated, corrupt, too_large (more than `max_pixels`). MemoryError passes through.
    """
    if not data:
        raise DecodeError("empty", "the image has no bytes")
    with _faults_of(data):
        image = header.open_image(data)
        tiff_orientation = header.tiff_orientation(image)
        width, height = image.size[::-1] if tiff_orientation in (5, 6, 7, 8) else image.size
        header.check_size(width, height, max_pixels)
        header.check_work(image, data, max_pixels)
        full = image.size
        least = 0 if exact else SCALED_LEAST * transform.resize
        needed = header.peak_bytes(image, least, 1 if exact else _reduction(full, transform))
    with reserve(needed), _faults_of(data):
        rgb, shown = _rgb(image, data, least, transform, exact)
        turn = _turn(image, tiff_orientation, exif_rotate)
        del image  # it may be large
        upright = rgb if turn is None else as_image(rgb).transpose(turn)
        del rgb
        size = _size(upright)
        if keep_tiles and size[0] == size[1] <= transform.crop // 2:
            return Decoded(np.asarray(upright), width, height)
        if turn in SWAPS_SIDES:
            full, shown = full[::-1], shown[::-1]
        box = _place(size, shown, turn)
        resized = (resize.exactly if exact else resize.quickly)(upright, box, full, transform)
        return Decoded(resized, width, height)


@contextmanager
def _faults_of(data: bytes) -> Iterator[None]:
    """What is raised inside is the fault of these bytes: a DecodeError."""
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except Exception as error:  # Pillow lists nowhere what its readers raise on broken data
        raise _decode_error(error, data) from error


def leave_encoded(
    data: bytes, transform: Transform, *, max_pixels: int = 200_000_000, exif_rotate: bool = True
) -> Encoded | None:
    """A JPEG of which a GPU makes nearly the pixels that `decode` does; None for any other image.

    Told by the header alone. Images that would be enlarged are left out: they cost `decode` little, and enlarging shows
    how a GPU makes up the chroma that a JPEG leaves out. What `decode` refuses is None as well: it says why.
    """
    if not data.startswith(b"\xff\xd8") or header.is_cut(data):
        return None
    try:
        image = header.open_image(data)
        header.check_size(*image.size, min(max_pixels, MOST_PIXELS_LEFT))
        header.check_work(image, data, max_pixels)
        orientation = image.getexif().get(header.ORIENTATION, 1) if exif_rotate else 1
    except MemoryError:
        raise
    except Exception:  # of what kind, `decode` says
        return None
    if not _is_plain(image) or min(image.size) < transform.resize:
        return None
    return Encoded(data, *image.size, orientation if orientation in UPRIGHT else 1)


def _is_plain(image: Image.Image) -> bool:
    """True for grey and for YCbCr, as JFIF has it; a JPEG may also hold RGB as it is, or CMYK (T.872, 6.5.3)."""
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return False
    holds_rgb = image.info.get("adobe_transform") == 0 or [layer[0] for layer in image.layer] == [*b"RGB"]  # type: ignore[attr-defined]
    return image.mode == "L" or not holds_rgb


def _turn(image: Image.Image, tiff_orientation: int | None, exif_rotate: bool) -> Image.Transpose | None:
    """What brings the loaded pixels upright or, of a TIFF that shall stay as it is stored, back."""
    if tiff_orientation is not None:
        return None if exif_rotate else BACK.get(tiff_orientation)
    try:
        return UPRIGHT.get(image.getexif().get(header.ORIENTATION, 1)) if exif_rotate else None
    except Exception:  # broken EXIF says nothing of the pixels
        return None


def _rgb(
    image: ImageFile.ImageFile, data: bytes, least: int, transform: Transform, exact: bool
) -> tuple[Image.Image | np.ndarray, tuple[float, float]]:
    """The image as it is stored, in RGB, large ones made smaller; and the width and height of it that count."""
    jpeg = _jpeg_rgb(image, data, least)
    if jpeg is None:
        _load(image, least)
    size = _size(image if jpeg is None else jpeg)
    factor = 1 if exact else _reduction(size, transform)
    shown = size[0] / factor, size[1] / factor
    if jpeg is not None and factor == 1:
        return jpeg, shown
    return _to_rgb(image if jpeg is None else as_image(jpeg), factor), shown


def _size(pixels: Image.Image | np.ndarray) -> tuple[int, int]:
    """Width and height."""
    return pixels.size if isinstance(pixels, Image.Image) else (pixels.shape[1], pixels.shape[0])


def _jpeg_rgb(image: Image.Image, data: bytes, least: int) -> np.ndarray | None:
    """A JPEG, uint8 [height, width, 3], with the libjpeg-turbo settings that Pillow uses; None leaves it to Pillow.

    least: pixels of the short side that are enough, 0 for all. Whole blocks of 8 × 8 pixels then become n × n as they
    are decoded (libjpeg's scaled DCT), if that makes each side half as long or shorter.
    """
    if image.format not in ("JPEG", "MPO") or image.mode not in ("RGB", "L"):
        return None
    try:
        pixels = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, min_height=least, min_width=least, min_factor=2
        )
    except ValueError:  # it is strict; Pillow forgives what a viewer would
        return None
    is_whole = pixels.shape[:2] == image.size[::-1]
    return pixels if is_whole or (least and min(pixels.shape[:2]) >= least) else None


def _load(image: ImageFile.ImageFile, least: int) -> None:
    """Have Pillow decode it, in its own mode. least: pixels of a JPEG's short side that are enough, 0 for all."""
    if least:
        image.draft(None, (least, least))  # only JPEGs know how
    image.load()


def _reduction(size: tuple[int, int], transform: Transform) -> int:
    """How many pixels are averaged into one along each side before the image is resized."""
    return max(1, min(size) // (REDUCED_LEAST * transform.resize)) if transform.interpolation != "nearest" else 1


def _to_rgb(image: Image.Image, factor: int) -> Image.Image:
    """RGB, `factor` times smaller along each side: blocks of pixels are averaged, the last ones over what there is."""
    if image.mode in ("RGB", "L") and not image.has_transparency_data:
        reduced = image.reduce(factor) if factor > 1 else image
        return reduced if image.mode == "RGB" else reduced.convert("RGB")
    full_scale = _full_scale(image) if image.mode == "F" else 1.0
    rgb = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top, band in _bands(image, factor):
        converted = _band_to_rgb(band, full_scale)
        rgb.paste(converted.reduce(factor) if factor > 1 else converted, (0, top // factor))
    return rgb


def _bands(image: Image.Image, multiple: int) -> Iterator[tuple[int, Image.Image]]:
    """(first row, a band of the image below it), a multiple of so many rows high but for the last."""
    rows = multiple * max(1, BAND_PIXELS // (image.width * multiple))
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _band_to_rgb(image: Image.Image, full_scale: float) -> Image.Image:
    if image.mode.startswith("I"):
        return _grey_16(image).convert("RGB")
    if image.mode == "F":
        return _grey_float(image, full_scale).convert("RGB")
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _grey_16(image: Image.Image) -> Image.Image:
    values = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
    grey = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:  # a PNG's tRNS: one value of grey that is clear
        grey[values == image.info["transparency"]] = 255
    return Image.fromarray(grey)


def _full_scale(image: Image.Image) -> float:
    """What a float image has to be multiplied with to lie in [0, 255]; NaN counts as 0."""
    bands = (np.nan_to_num(np.asarray(band), nan=0.0) for _, band in _bands(image, 1))
    return 255.0 if all(values.min() >= 0 and values.max() <= 1 for values in bands) else 1.0


def _grey_float(image: Image.Image, full_scale: float) -> Image.Image:
    values = np.nan_to_num(np.asarray(image), nan=0.0).clip(0, 255) * np.float32(full_scale)
    return Image.fromarray(np.rint(values).astype(np.uint8))


def _place(size: tuple[int, int], shown: tuple[float, float], turn: Image.Transpose | None) -> Box:
    """Where what is shown lies in a turned image: its last blocks, as stored, may stand for fewer pixels."""
    left = size[0] - shown[0] if turn in LEFT_WAS_LAST else 0.0
    top = size[1] - shown[1] if turn in TOP_WAS_LAST else 0.0
    return left, top, left + shown[0], top + shown[1]


def _decode_error(error: Exception, data: bytes) -> DecodeError:
    reason = str(error) or type(error).__name__
    kinds = ("unknown pixel mode", "cannot handle", "unsupported", "not supported")
    if isinstance(error.__cause__, KeyError) or any(words in reason.lower() for words in kinds):
        return DecodeError("unsupported", f"Pillow does not read pixels or compression of this kind: {reason}")
    if "truncated" in reason.lower() or header.is_cut(data):
        return DecodeError("truncated", f"the end is missing, {len(data)} bytes are there: {reason}")
    return DecodeError("corrupt", f"the bytes are damaged: {reason}")
