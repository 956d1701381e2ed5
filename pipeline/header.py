"""What the first bytes of an image tell before its pixels are decoded: its format, whether it may be decoded, and what
memory that takes. Imports neither Ray nor torch.
"""

import io
import re
import warnings
from typing import Literal

from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin  # noqa: F401

from pipeline.errors import DecodeError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # Pillow's JPEG opens MPO as well

SCANS_OF_LARGEST = 16
"""A JPEG may have this many scans if it is as large as `max_pixels` allows, more if it is smaller. Each passes over the
whole image, and ten bytes make one: 100 KB could keep a core busy for an hour. Encoders write up to about 15."""

MOST_SIDE = 1 << 20
"""Pixels. Pillow takes up to 24 bytes beside the pixels for each row, and of one row as much for each column."""

TIFF_PASSES = 8
"""How often the strips of a TIFF may cover it, which may be listed again and again; one of separate planes has a pass
for each. Of small images so often as one of SMALL_PIXELS may."""
SMALL_PIXELS = 1 << 20

RLE_COST = 8  # Pillow decodes these BMPs in Python, about as many times more slowly

STORED_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2}
"""Mode → bytes a pixel in Pillow's memory. Every other mode, RGB too, takes RGB_BYTES."""

RGB_BYTES = 4
WEBP_BYTES = 16  # libwebp's two canvases, what is copied from them, and Pillow's image
COEFFICIENT_BYTES = 2  # a progressive JPEG is held as coefficients, one a sample, until its last scan

OTHER_FORMATS = {b"\0\0\0\x0cjP  ": "JPEG 2000", b"\0\0\0\x0cJXL ": "JPEG XL", b"8BPS": "Photoshop", b"%PDF": "PDF"}

START_OF_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""Marker, length, number of components (T.81, B.2.3): bytes behind a JPEG have many a marker alone."""
SCAN_BYTES = 10

END_MARKERS = {b"\xff\xd8": b"\xff\xd9", b"\x89PNG": b"IEND", b"GIF8": b";"}
"""First bytes of a format → what its last 16 bytes hold."""

PNG_DEPTH = 24  # the place of the bits a sample in the file (PNG, 11.2.1)
ORIENTATION, TILE_WIDTH, TILE_LENGTH = 0x0112, 322, 323
BITS_PER_SAMPLE, COMPRESSION, ROWS_PER_STRIP, UNCOMPRESSED = 258, 259, 278, 1

Image.preinit()  # with the two imported above, all of FORMATS; otherwise Image.open() imports every plugin there is
# These are settings of the whole process. Pillow's own blocks are of 16 MiB, which glibc may keep for the thread that
# freed them; more than 32 MiB it gives back (mallopt(3), M_MMAP_THRESHOLD). The limit here is `max_pixels`, checked on
# the header; Pillow's own would warn or raise beside it.
Image.core.set_block_size(64 << 20)  # type: ignore[attr-defined]
Image.MAX_IMAGE_PIXELS = None
warnings.filterwarnings("ignore", module=r"PIL\.")


def open_image(data: bytes) -> ImageFile.ImageFile:
    """Read the header only.

    Raises DecodeError (not_an_image, unsupported), and what Pillow raises on a broken header.
    """
    try:
        return _corrected(Image.open(io.BytesIO(data), formats=FORMATS), data)
    except UnidentifiedImageError:
        pass
    for name in FORMATS:
        factory, accept = Image.OPEN[name]
        if accept is None or accept(data[:16]) is True:
            return _corrected(factory(io.BytesIO(data), ""), data)  # raises what Image.open() kept to itself
    other = next((name for magic, name in OTHER_FORMATS.items() if data.startswith(magic)), None)
    if data[4:8] == b"ftyp":
        other = "HEIF, AVIF or video"
    if other:
        raise DecodeError("unsupported", f"{other} is not read: convert it to one of {', '.join(FORMATS)}")
    raise DecodeError("not_an_image", f"the bytes begin with {data[:8]!r}, as none of {', '.join(FORMATS)} does")


def _corrected(image: ImageFile.ImageFile, data: bytes) -> ImageFile.ImageFile:
    """Where Pillow misreads a header."""
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        image.info.pop("xmp", None)  # it would turn the pixels by that, where no tag says so, and not swap the sizes
    clear = image.info.get("transparency")  # grey or a colour as a PNG holds it, while the pixels are scaled to 8 bits
    if image.format == "PNG" and isinstance(clear, int | tuple):
        depth = data[PNG_DEPTH]
        if image.mode == "L" and isinstance(clear, int):
            image.info["transparency"] = clear * 255 // (2**depth - 1)
        elif image.mode == "RGB" and isinstance(clear, tuple) and depth == 16:
            image.info["transparency"] = tuple(value >> 8 for value in clear)
    return image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises DecodeError: corrupt, too_large."""
    if width * height > max_pixels:
        sizes = f"{width} × {height} = {width * height} pixels, more than the limit of {max_pixels}"
        raise DecodeError("too_large", f"the image has {sizes}; raise --max-pixels if it is meant to")
    if max(width, height) > MOST_SIDE:
        raise DecodeError("too_large", f"the image is {width} × {height} pixels; a side may have {MOST_SIDE} at most")
    if width < 1 or height < 1:
        raise DecodeError("corrupt", f"the image is {width} × {height} pixels")


def check_work(image: ImageFile.ImageFile, data: bytes, max_pixels: int) -> None:
    """Raise DecodeError (too_large) for few pixels that cost as much as far more than `max_pixels` would."""
    pixels = image.width * image.height
    most_scans = SCANS_OF_LARGEST * max_pixels // pixels
    if image.format in ("JPEG", "MPO") and len(data) > most_scans * SCAN_BYTES:
        scans = sum(1 for _ in START_OF_SCAN.finditer(data))
        if scans > most_scans:
            raise DecodeError("too_large", f"a JPEG of {pixels} pixels has {scans} scans; the limit is {most_scans}")
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tile = image.tag_v2.get(TILE_WIDTH, 1) * image.tag_v2.get(TILE_LENGTH, 1)
        if tile > max_pixels:
            raise DecodeError("too_large", f"a TIFF of {pixels} pixels has tiles of {tile}; the limit is {max_pixels}")
        boxes = [tile.extents for tile in image.tile if tile.extents]
        covered = sum((right - left) * (bottom - top) for left, top, right, bottom in boxes)
        if covered > TIFF_PASSES * max(pixels, SMALL_PIXELS):
            raise DecodeError(
                "too_large", f"the strips of a TIFF of {pixels} pixels cover {covered // pixels} times as many"
            )
    if any(tile.codec_name == "bmp_rle" for tile in image.tile) and pixels > max_pixels // RLE_COST:
        limit = max_pixels // RLE_COST
        raise DecodeError("too_large", f"a run-length encoded BMP has {pixels} pixels; the limit is {limit}")


def peak_bytes(image: ImageFile.ImageFile, least: int, factor: int) -> int:
    """The most bytes that pixels of this image will take at once, from its header.

    least: pixels of a JPEG's short side that are enough, 0 for all: it may be made smaller as it is decoded.
    factor: how many pixels of other formats are averaged into one along each side.
    """
    pixels = image.width * image.height
    if image.format in ("JPEG", "MPO"):
        scale = next((each for each in (8, 4, 2) if least and min(image.size) >= each * least), 1)
        scaled = RGB_BYTES * pixels // scale**2
        is_progressive = "progressive" in image.info
        return max(2 * scaled, scaled + COEFFICIENT_BYTES * pixels * len(image.getbands()) * is_progressive)
    stored = pixels * (WEBP_BYTES if image.format == "WEBP" else STORED_BYTES.get(image.mode, RGB_BYTES))
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        stored = stored * (1 + (tiff_orientation(image) != 1)) + _tiff_buffer_bytes(image)
    converted = RGB_BYTES * pixels // factor**2
    return max(stored + converted, 2 * converted)  # while it is converted; while that is turned


def _tiff_buffer_bytes(image: TiffImagePlugin.TiffImageFile) -> int:
    """What libtiff unpacks at a time: a strip or a tile (TIFF 6.0, sections 3 and 15)."""
    tags = image.tag_v2
    if tags.get(COMPRESSION, UNCOMPRESSED) == UNCOMPRESSED:
        return 0
    strip = image.width * min(image.height, tags.get(ROWS_PER_STRIP, image.height))
    area = tags[TILE_WIDTH] * tags[TILE_LENGTH] if TILE_WIDTH in tags else strip
    return int(area * sum(tags.get(BITS_PER_SAMPLE, (1,))) // 8)


def tiff_orientation(image: Image.Image) -> int | None:
    """The orientation tag of a TIFF: Pillow turns those by itself, swaps their sizes at once and drops the tag."""
    return image.tag_v2.get(ORIENTATION, 1) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def is_cut(data: bytes) -> bool:
    """True where a format's last bytes are missing, or its header tells of more bytes than there are."""
    if data.startswith((b"RIFF", b"BM")):
        size, rest = (data[4:8], 8) if data.startswith(b"RIFF") else (data[2:6], 0)
        return int.from_bytes(size, "little") + rest > len(data)
    if data.startswith((b"II", b"MM")):
        return _tiff_is_cut(data, "little" if data.startswith(b"II") else "big")
    return any(data.startswith(first) and last not in data[-16:] for first, last in END_MARKERS.items())


def _tiff_is_cut(data: bytes, order: Literal["little", "big"]) -> bool:
    """True where the first directory, 12 bytes an entry, does not lie inside the file (TIFF 6.0, section 2)."""
    start = int.from_bytes(data[4:8], order)
    entries = int.from_bytes(data[start : start + 2], order)
    return start + 2 + 12 * entries > len(data)
