"""Read the header of an image: check its format and size, and compute the memory that decoding takes.

Decodes no pixels. Imports neither Ray nor torch.
"""

import importlib
import io
import logging
import re
import warnings
from typing import Literal

from PIL import (
    AvifImagePlugin,  # noqa: F401
    Image,
    ImageFile,
    Jpeg2KImagePlugin,  # noqa: F401
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
)

from pipeline.errors import DecodeError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "JPEG2000", "AVIF", "PPM")  # the JPEG plugin also opens MPO
PLAIN_FORMATS = ("JPEG", "MPO", "WEBP", "BMP", "GIF", "AVIF", "HEIF")
"""Formats whose pixels Pillow gives as they are meant: always colours or grey of 8 bits."""

MAX_SCANS_OF_LARGEST = 16
"""Limit for the scans of a JPEG of `max_pixels` pixels. It grows in proportion as the image gets smaller. Each scan
passes over the whole image but takes only ten bytes, so 100 KB could occupy a core for an hour. Encoders write up to
about 15 scans."""

MAX_SIDE = 1 << 20
"""Pixels. In addition to the pixels, Pillow takes up to 24 bytes for each row, and 24 for each column of one row."""

MAX_TIFF_PASSES = 8
"""Limit for the number of times that the strips of a TIFF cover the image. A TIFF can list the same strip many times.
Each plane of a TIFF with separate planes is one pass. Images below SMALL_PIXELS have the limit of an image of that
size."""
SMALL_PIXELS = 1 << 20

PYTHON_COST = 64  # Pillow decodes PNMs of text, and of other ranges than 8 and 16 bits, in Python
RLE_COST = 8  # Pillow decodes run-length encoded BMPs in Python, about this many times slower

STORED_BYTES = {"1": 1, "L": 1, "P": 1}
"""Mode → bytes per pixel in Pillow's memory. All other modes, RGB included, take RGB_BYTES."""

RGB_BYTES = 4
OTHER_BYTES = {"JPEG2000": 24, "AVIF": 16, "HEIF": 16, "JXL": 32}
"""Format → bytes per pixel that its decoder takes with Pillow's image."""
WEBP_BYTES = 16  # two canvases of libwebp, a copy of one, and Pillow's image
COEFFICIENT_BYTES = 2  # per sample: libjpeg keeps the coefficients of a progressive JPEG until its last scan

OTHER_FORMATS = {b"8BPS": "Photoshop", b"%PDF": "PDF"}
"""First bytes → the name of a format that is not supported."""

PLUGINS = {"HEIF": ("heic", "pillow_heif"), "JXL": ("jxl", "pillow_jxl")}
"""Pillow's name of a format → the extra of Nightshift that reads it, and the extra's module."""
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
JXL_MAGIC = (b"\0\0\0\x0cJXL ", b"\xff\x0a")
JPEG_2000_MAGIC = (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51")
LFS_POINTER = b"version https://git-lfs"
PNM = re.compile(rb"P[1-6f][\s#]")

START_OF_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""Marker, length and number of components (T.81, B.2.3). Data after the end of a JPEG often holds the marker alone."""
SCAN_BYTES = 10
"""Size of the shortest scan."""

END_MARKERS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b";"}
"""First bytes of a format → bytes that must be among its last 16."""

PNG_DEPTH_OFFSET = 24  # of the bits per sample in the file (PNG, 11.2.1)
ORIENTATION, TILE_WIDTH, TILE_LENGTH = 0x0112, 322, 323
BITS_PER_SAMPLE, COMPRESSION, ROWS_PER_STRIP, UNCOMPRESSED = 258, 259, 278, 1

TIFF_TYPE_BYTES = {
    1: 1,
    2: 1,
    3: 2,
    4: 4,
    5: 8,
    6: 1,
    7: 1,
    8: 2,
    9: 4,
    10: 8,
    11: 4,
    12: 8,
    13: 4,
    16: 8,
    17: 8,
    18: 8,
}

# Together with the plugins imported above, this registers all of FORMATS. Without it, Image.open() imports every
# plugin of Pillow.
Image.preinit()
# The following settings apply to the whole process. Pillow allocates blocks of 16 MiB by default. glibc may keep freed
# blocks of up to 32 MiB for the thread that freed them, and returns larger ones (mallopt(3), M_MMAP_THRESHOLD).
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]
# `check_size` enforces `max_pixels` on the header. Pillow's own limit would warn or raise as well.
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL.TiffImagePlugin").setLevel(logging.CRITICAL + 1)  # it logs what it raises


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Open an image and read its header only.

    Raises DecodeError (not_an_image, unsupported), and any error of Pillow for a broken header.
    """
    formats = _formats(data)
    try:
        return _fix_metadata(Image.open(io.BytesIO(data), formats=formats), data)
    except UnidentifiedImageError:
        pass
    for name in formats:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is True:
            return _fix_metadata(factory(io.BytesIO(data), ""), data)  # raises the error that Image.open() suppresses
    other = next((name for magic, name in OTHER_FORMATS.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        other = "HEIF or video"
    if other:
        raise DecodeError("unsupported", f"{other} is not supported: convert it to one of {', '.join(FORMATS)}")
    if data.startswith(LFS_POINTER):
        raise DecodeError(
            "not_an_image", "this is a Git LFS pointer, not the image: fetch the images with `git lfs pull`"
        )
    raise DecodeError("not_an_image", f"the first bytes are {data[:8]!r}, which match none of {', '.join(FORMATS)}")


def _formats(data: bytes) -> tuple[str, ...]:
    """The formats to try. Raises DecodeError (unsupported) if the data need an extra that is not installed."""
    if data.startswith(b"P"):
        return FORMATS if PNM.match(data) else tuple(name for name in FORMATS if name != "PPM")
    is_heif = data[4:8] == b"ftyp" and data[8:12] in HEIF_BRANDS and b"avif" not in data[:64]
    name = "HEIF" if is_heif else "JXL" if data.startswith(JXL_MAGIC) else None
    if name is None:
        return FORMATS
    import_plugin(name)
    return (name,)


def import_plugin(name: str) -> None:
    """Import the plugin of HEIF or JXL for Pillow. Raises DecodeError (unsupported) if it is not installed."""
    extra, module = PLUGINS[name]
    try:
        plugin = importlib.import_module(module)
        if name == "HEIF":
            plugin.register_heif_opener(thumbnails=False)
    except ImportError as error:
        raise DecodeError(
            "unsupported", f"{name} needs the package {module}: install nightshift[{extra}], or convert it to JPEG"
        ) from error


def is_jpeg_2000(data: bytes) -> bool:
    return data.startswith(JPEG_2000_MAGIC)


def _fix_metadata(image: ImageFile.ImageFile, data: bytes) -> ImageFile.ImageFile:
    """Correct the metadata that Pillow misreads."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        # If the orientation tag is missing, Pillow rotates the pixels by XMP, but does not swap width and height.
        image.info.pop("xmp", None)
    transparent = image.info.get("transparency")
    if image.format == "PNG" and isinstance(transparent, int | tuple):
        # Pillow scales the pixels to 8 bits, but not this grey or colour.
        depth = data[PNG_DEPTH_OFFSET]
        if image.mode == "L" and isinstance(transparent, int):
            image.info["transparency"] = transparent * 255 // (2**depth - 1)
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raise DecodeError: too_large for too many pixels or a side above MAX_SIDE, corrupt for no pixels."""
    if width * height > max_pixels:
        sizes = f"{width} × {height} = {width * height} pixels, more than the limit of {max_pixels}"
        raise DecodeError("too_large", f"the image has {sizes}; raise --max-pixels to accept it")
    if max(width, height) > MAX_SIDE:
        raise DecodeError("too_large", f"the image is {width} × {height} pixels; the limit for a side is {MAX_SIDE}")
    if width < 1 or height < 1:
        raise DecodeError("corrupt", f"the image is {width} × {height} pixels; each side must be at least 1")


def check_work(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> None:
    """Raise DecodeError (too_large) if an image of few pixels takes as much work as one far above `max_pixels`."""
    if image.format in ("JPEG", "MPO"):
        _check_scans(image, data, max_pixels)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        _check_tiff(image, max_pixels)
    pixels, max_rle_pixels = image.width * image.height, max_pixels // RLE_COST
    if any(tile.codec_name in ("ppm", "ppm_plain") for tile in image.tile) and pixels > max_pixels // PYTHON_COST:
        raise DecodeError(
            "too_large",
            f"a PNM of text or of an unusual range has {pixels} pixels; the limit is {max_pixels // PYTHON_COST}; "
            "raise --max-pixels to accept it, or write it as P5 or P6 of 8 bits",
        )
    if any(tile.codec_name == "bmp_rle" for tile in image.tile) and pixels > max_rle_pixels:
        raise DecodeError(
            "too_large",
            f"a run-length encoded BMP has {pixels} pixels; the limit is {max_rle_pixels}; "
            "raise --max-pixels to accept it",
        )


def _check_scans(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> None:
    pixels = image.width * image.height
    max_scans = MAX_SCANS_OF_LARGEST * max_pixels // pixels
    if len(data) <= max_scans * SCAN_BYTES:
        return
    scans = sum(1 for _ in START_OF_SCAN.finditer(data))
    if scans > max_scans:
        raise DecodeError(
            "too_large",
            f"a JPEG of {pixels} pixels has {scans} scans; the limit is {max_scans}; raise --max-pixels to accept it",
        )


def _check_tiff(image: TiffImagePlugin.TiffImageFile, max_pixels: int) -> None:
    pixels = image.width * image.height
    tile_pixels = image.tag_v2.get(TILE_WIDTH, 1) * image.tag_v2.get(TILE_LENGTH, 1)
    if tile_pixels > max_pixels:
        raise DecodeError(
            "too_large",
            f"a TIFF of {pixels} pixels has tiles of {tile_pixels} pixels; the limit is {max_pixels}; "
            "raise --max-pixels to accept it",
        )
    boxes = [tile.extents for tile in image.tile if tile.extents]
    covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
    max_covered = MAX_TIFF_PASSES * max(pixels, SMALL_PIXELS)
    if covered > max_covered:
        raise DecodeError(
            "too_large", f"the strips of a TIFF of {pixels} pixels cover {covered} pixels; the limit is {max_covered}"
        )


def peak_bytes(image: ImageFile.ImageFile, min_side: int, factor: int) -> int:
    """Compute the peak memory of the pixels, in bytes, from the header of the image.

    min_side: a JPEG may be decoded at a smaller scale, as long as its short side keeps this many pixels; 0: full size.
    factor: for other formats, the number of pixels along each side that are averaged into one.
    """
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        scale = next((scale for scale in (8, 4, 2) if min_side and min(image.size) >= scale * min_side), 1)
        scaled = RGB_BYTES * pixels // scale**2
        is_progressive = "progressive" in image.info
        return max(2 * scaled, scaled + COEFFICIENT_BYTES * pixels * len(image.getbands()) * is_progressive)
    stored = pixels * (WEBP_BYTES if image.format == "WEBP" else STORED_BYTES.get(image.mode, RGB_BYTES))
    stored = pixels * OTHER_BYTES[str(image.format)] if image.format in OTHER_BYTES else stored
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stored = stored * (1 + (tiff_orientation(image) != 1)) + _tiff_buffer_bytes(image)
    converted = RGB_BYTES * pixels // factor**2
    return max(stored + converted, 2 * converted)  # during the conversion to RGB, during the rotation


def _tiff_buffer_bytes(image: TiffImagePlugin.TiffImageFile) -> int:
    """The size of libtiff's buffer: one strip or tile, uncompressed (TIFF 6.0, sections 3 and 15)."""
    tags = image.tag_v2
    if tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED:
        return 0
    strip = image.width * min(image.height, tags.get(ROWS_PER_STRIP, image.height))
    area = tags[TILE_WIDTH] * tags[TILE_LENGTH] if TILE_WIDTH in tags else strip
    return int(area * sum(tags.get(BITS_PER_SAMPLE, (1,))) // 8)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 if there is none. The pixels may be intact although the EXIF is broken: then 1 too."""
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow does not document the errors of broken EXIF
        return 1
    return value if isinstance(value, int) else 1


def tiff_orientation(image: Image.Image) -> int | None:
    """Return the orientation tag of a TIFF, 1 if it has none. Return None for other formats.

    Pillow rotates TIFFs itself. It swaps width and height on open. It rotates the pixels and drops the tag on load.
    """
    return image.tag_v2.get(ORIENTATION, 1) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def is_truncated(data: bytes) -> bool:
    """True if the end marker is missing, or the header gives a larger size than there are bytes.

    For a TIFF, only the first directory is checked.
    """
    if data.startswith((b"RIFF", b"BM")):
        size, rest = (data[4:8], 8) if data.startswith(b"RIFF") else (data[2:6], 0)
        return int.from_bytes(size, "little") + rest > len(data)
    if data.startswith((b"II", b"MM")):
        return _tiff_is_truncated(data, "little" if data.startswith(b"II") else "big")
    if is_jpeg_2000(data):
        return b"\xff\x4f\xff\x51" not in data or b"\xff\xd9" not in data[-16:]
    if data[4:8] == b"ftyp":
        return _boxes_are_truncated(data)
    return any(data.startswith(first) and last not in data[-16:] for first, last in END_MARKERS.items())


def _boxes_are_truncated(data: bytes) -> bool:
    """True if a box of an ISO media file ends after the last byte (ISO/IEC 14496-12, 4.2); size 0: to the end."""
    start = 0
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big")
        if size == 1:
            size = int.from_bytes(data[start + 8 : start + 16], "big")
        if size == 0:
            return False
        start += max(size, 8)
    return start > len(data)


def _tiff_is_truncated(data: bytes, order: Literal["little", "big"]) -> bool:
    """True if the first directory, or a value in it, ends after the last byte (TIFF 6.0, section 2; BigTIFF)."""
    is_big = int.from_bytes(data[2:4], order) == 43
    word, entry_bytes, count_bytes = (8, 20, 8) if is_big else (4, 12, 2)

    def number(place: int, size: int) -> int:
        return int.from_bytes(data[place : place + size], order)

    start = number(8 if is_big else 4, word)
    entries = start + count_bytes
    end = entries + entry_bytes * number(start, count_bytes)
    if end > len(data):
        return True
    for entry in range(entries, end, entry_bytes):
        size = TIFF_TYPE_BYTES.get(number(entry + 2, 2), 1) * number(entry + 4, word)
        if size > word and number(entry + 4 + word, word) + size > len(data):
            return True
    return False
