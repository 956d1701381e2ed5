"""Read a TIFF with tifffile and imagecodecs: the number types, layouts and compressions that Pillow misreads.

`needs_tifffile` names the short list that Pillow reads correctly, 8 bits per sample and less. `open_raster` checks the
first page that is a whole picture against the limits, and reads its strips or tiles one by one, so that a damaged or
malicious file costs no more than its header says. Format: TIFF 6.0; BigTIFF; GDAL's GeoTIFF driver for 42112 and 42113.
"""

import html
import io
import logging
import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, TiffImagePlugin

from pipeline.errors import DecodeError
from pipeline.images.raster import Colour, Raster

if TYPE_CHECKING:
    import tifffile

MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")

MAX_PAGES = 64
"""Pages to look through for the first that is not a thumbnail or a mask."""
MAX_PASSES = 8
"""Limit for the pixels of all tiles, as a multiple of the pixels of the image or of SMALL_PIXELS."""
SMALL_PIXELS = 1 << 20
MAX_PIXEL_BYTES = 16
"""Limit for the bytes of all samples, as a multiple of `max_pixels`."""
MAX_SCANS = 16 * 200
"""Limit for the scans of one JPEG tile."""

SUBFILE_TYPE, OLD_SUBFILE_TYPE, WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC = 254, 255, 256, 257, 258, 259, 262
FILL_ORDER, STRIP_OFFSETS, ORIENTATION, SAMPLES, STRIP_BYTES, PLANAR, COLOUR_MAP = 266, 273, 274, 277, 279, 284, 320
TILE_OFFSETS, TILE_BYTES, SUB_IFDS, INK_SET, EXTRA_SAMPLES, SAMPLE_FORMAT = 324, 325, 330, 332, 338, 339
SUBSAMPLING, IMAGE_DEPTH, GDAL_METADATA, GDAL_NODATA = 530, 32997, 42112, 42113
GEOREFERENCE = (33550, 33922, 34264, 34735, GDAL_METADATA, GDAL_NODATA)
"""ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory, and GDAL's own tags."""

NOT_THE_IMAGE = 0b101
"""Bits of NewSubfileType: a reduced version of another page, or a transparency mask of one."""

COMPRESSIONS = {
    1: "uncompressed", 2: "CCITT RLE", 3: "CCITT Group 3", 4: "CCITT Group 4", 5: "LZW", 6: "old-style JPEG", 7: "JPEG",
    8: "Deflate", 32773: "PackBits", 32946: "Deflate", 33003: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000",
    34887: "LERC", 34925: "LZMA", 50000: "Zstandard", 50001: "WebP", 50002: "JPEG XL", 34892: "lossy JPEG",
    34933: "PNG", 34934: "JPEG XR", 22610: "JPEG XR", 32809: "ThunderScan", 34676: "SGI LogLuv", 34677: "SGI LogLuv",
}  # fmt: skip
PILLOW_COMPRESSIONS = frozenset({1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946})
READABLE_COMPRESSIONS = frozenset(COMPRESSIONS) - {6, 50002, 34892, 34933, 34934, 22610, 32809, 34676, 34677}
JPEG, LERC = 7, 34887
PILLOW_SIZES = {JPEG: "JPEG", 33003: "JPEG2000", 33005: "JPEG2000", 34712: "JPEG2000", 50001: "WEBP"}
"""Compressions that store their own size → Pillow's format, which reads that size."""

PHOTOMETRICS = {
    0: "MinIsWhite", 1: "MinIsBlack", 2: "RGB", 3: "palette", 4: "transparency mask", 5: "CMYK", 6: "YCbCr",
    8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "CFA", 32844: "LogL", 32845: "LogLuv",
    34892: "LinearRaw", 51177: "depth map",
}  # fmt: skip
COLOURS: Mapping[int, Colour] = {0: "white is zero", 1: "grey", 2: "RGB", 3: "palette", 5: "CMYK", 6: "YCbCr"}
COLOUR_SAMPLES = {2: 3, 3: 1, 5: 4, 6: 3}

FEW_BITS = frozenset({(1,), (2,), (4,), (8,)})
PROVEN_BITS = {0: FEW_BITS, 1: FEW_BITS, 2: {(8, 8, 8)}, 3: FEW_BITS, 5: {(8,) * 4}, 6: {(8, 8, 8)}, 8: {(8, 8, 8)}}
"""Photometric interpretation → bits per sample, without extra samples, that Pillow reads correctly."""
PROVEN_WITH_EXTRA = {(2, (8,) * 4, ()), (2, (8,) * 4, (0,)), (1, (8, 8), (2,))}
"""The same with an alpha or an unused sample, if the TIFF has no georeference. The alpha of GDAL's default for four
bands, 2, must be looked at, because it may be a band."""

DESCRIPTIONS = re.compile(r'<Item\s+name="DESCRIPTION"\s+sample="(\d{1,5})"[^>]*>([^<]*)</Item>')
"""Band names in GDAL_METADATA."""
ITEMS = re.compile(r'<Item\s+name="([^"]{1,64})"([^>]*)>([^<]*)</Item>')
"""Any item of GDAL_METADATA, with its other attributes. GDAL adds OFFSET and SCALE of a sample."""
START_OF_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")

logging.getLogger("tifffile").setLevel(logging.CRITICAL + 1)  # it logs what it raises, and what it ignores


def is_tiff(data: bytes) -> bool:
    return data.startswith(MAGIC)


def needs_tifffile(image: TiffImagePlugin.TiffImageFile, as_rgb: bool) -> bool:
    """True for every TIFF that is not on the short list that Pillow reads correctly.

    as_rgb: the network gets RGB. Otherwise its bands are read, if they are bands and no palette, inks or chroma.
    """
    tags = image.tag_v2
    photometric, compression = tags.get(PHOTOMETRIC, -1), tags.get(COMPRESSION, 1)
    samples, bits = tags.get(SAMPLES, 1), tuple(tags.get(BITS, (1,)))
    bits = bits * samples if len(bits) == 1 else bits
    extra = tuple(tags.get(EXTRA_SAMPLES, ()))
    is_plain = (
        compression in PILLOW_COMPRESSIONS
        and tags.get(PLANAR, 1) == 1
        and tags.get(FILL_ORDER, 1) == 1
        and set(tags.get(SAMPLE_FORMAT, (1,))) == {1}
        and not tags.get(SUBFILE_TYPE, 0) & NOT_THE_IMAGE
        and tags.get(OLD_SUBFILE_TYPE, 1) != 2
        and tags.get(INK_SET, 1) == 1
        and tags.get(IMAGE_DEPTH, 1) == 1
    )
    if not is_plain or (photometric == 6 and compression not in (6, JPEG) and not _is_full_ycbcr(image)):
        return True
    if not as_rgb and photometric in (0, 1, 2):
        return True
    if photometric == 3 and not has_16_bits(tags.get(COLOUR_MAP, ())):
        return True
    if not extra and bits in PROVEN_BITS.get(photometric, ()):
        return False
    return is_georeferenced(tags) or (photometric, bits, extra) not in PROVEN_WITH_EXTRA


def _is_full_ycbcr(image: TiffImagePlugin.TiffImageFile) -> bool:
    """True if chroma is not subsampled. Pillow reads subsampled chroma only within a JPEG."""
    subsampling = tuple(image.tag_v2.get(SUBSAMPLING, (2, 2)))
    return subsampling == (1, 1)


def is_georeferenced(tags: Any) -> bool:
    """True if the tags place the picture on the Earth, or GDAL wrote them: then no band is an alpha."""
    return any(tag in tags for tag in GEOREFERENCE)


def open_raster(data: bytes, max_pixels: int, check_size: Callable[[int, int, int], None]) -> Raster:
    """Read the header of the first page that is not a thumbnail or a mask.

    Raises DecodeError (truncated, corrupt, too_large, unsupported), and any error of tifffile for a broken header.
    """
    page = _page(data)
    _check_tags(page)
    check_size(page.imagewidth, page.imagelength, max_pixels)
    description = _describe(page)
    photometric, samples = int(page.photometric), page.samplesperpixel
    _check_kind(page, photometric, description)
    _check_work(page, max_pixels)
    bits = page.bitspersample if page.sampleformat == 1 else 0
    extra = tuple(int(kind) for kind in page.extrasamples)
    if photometric == 2 and samples == 4 and not extra:
        extra = (2,)  # older writers leave the tag out for an alpha
    alpha = None
    if not is_georeferenced(page.tags):
        alpha = next((samples - len(extra) + i for i, kind in enumerate(extra[:samples]) if kind in (1, 2)), None)
    return Raster(
        width=page.imagewidth,
        height=page.imagelength,
        samples=samples,
        dtype=np.dtype(page.dtype),
        bits=bits,
        colour="RGB" if photometric == 6 and page.compression == JPEG else COLOURS[photometric],
        description=description,
        read=_Reader(page, data, description),
        alpha=alpha,
        alpha_may_be_band=photometric == 2 and alpha is not None and extra[alpha - samples + len(extra)] == 2,
        premultiplied=alpha is not None and extra[alpha - samples + len(extra)] == 1,
        nodata=_nodata(page),
        names=_band_names(page, samples),
        palette=_palette(page) if photometric == 3 else None,
        orientation=_number(page, ORIENTATION, 1),
        is_georeferenced=is_georeferenced(page.tags),
        metadata=_metadata(page),
        buffer_bytes=3 * _segment_samples(page) * np.dtype(page.dtype).itemsize,
    )


def _page(data: bytes) -> "tifffile.TiffPage":
    """The first page that is not a thumbnail or a mask; the first of all if there is no such page."""
    import tifffile

    try:
        file = tifffile.TiffFile(io.BytesIO(data))
        first = file.pages[0]
    except (tifffile.TiffFileError, struct.error, IndexError) as error:
        raise DecodeError("truncated", f"the TIFF's directory cannot be read: {error}") from error
    candidates = _pages_of(file, first)
    page = next((page for page in candidates if not int(page.subfiletype) & NOT_THE_IMAGE), first)
    assert isinstance(page, tifffile.TiffPage)
    return page


def _pages_of(file: "tifffile.TiffFile", first: Any) -> Any:
    """Yield the pages: first those of the file, then those below the first one, which DNGs use."""
    import tifffile

    yield first
    for number in range(1, MAX_PAGES):
        try:
            page = file.pages[number]
        except (IndexError, tifffile.TiffFileError):
            break
        yield page
    offsets = first.tags.valueof(SUB_IFDS) or ()
    for number, offset in enumerate(offsets[:MAX_PAGES] if isinstance(offsets, tuple) else (offsets,)):
        file.filehandle.seek(int(offset))
        try:
            yield tifffile.TiffPage(file, (0, number))
        except tifffile.TiffFileError:
            return


def _number(page: "tifffile.TiffPage", tag: int, default: int) -> int:
    value = page.tags.valueof(tag)
    return int(value) if isinstance(value, int) else default


def _check_tags(page: "tifffile.TiffPage") -> None:
    if not page.tags:
        raise DecodeError("corrupt", "the TIFF's first directory has no readable tag")
    required = {WIDTH: "ImageWidth", LENGTH: "ImageLength", PHOTOMETRIC: "PhotometricInterpretation"}
    missing = [name for tag, name in required.items() if tag not in page.tags]
    if STRIP_OFFSETS not in page.tags and TILE_OFFSETS not in page.tags:
        missing.append("StripOffsets or TileOffsets")
    if STRIP_BYTES not in page.tags and TILE_BYTES not in page.tags and page.compression != 1:
        missing.append("StripByteCounts or TileByteCounts")
    if missing:
        raise DecodeError(
            "unsupported", f"the TIFF has no tag {' and no tag '.join(missing)}; write it again with another program"
        )


def _describe(page: "tifffile.TiffPage") -> str:
    """Bands, number type, layout and compression."""
    kinds = {1: "unsigned integer", 2: "signed integer", 3: "float", 5: "complex integer", 6: "complex"}
    bits = page.bitspersample if isinstance(page.bitspersample, int) else "+".join(map(str, page.bitspersample))
    kind = kinds.get(int(page.sampleformat), f"sample format {int(page.sampleformat)}")
    photometric = PHOTOMETRICS.get(int(page.photometric), f"photometric interpretation {int(page.photometric)}")
    layout = "planar" if page.planarconfig == 2 and page.samplesperpixel > 1 else "interleaved"
    compression = COMPRESSIONS.get(int(page.compression), f"compression {int(page.compression)}")
    bands = f"{page.samplesperpixel} band{'s' * (page.samplesperpixel != 1)}"
    tiled = "tiles" if page.is_tiled else "strips"
    return f"a TIFF of {bands} of {bits}-bit {kind} ({photometric}, {layout}, {tiled}, {compression})"


def _unsupported(description: str, reason: str) -> DecodeError:
    return DecodeError(
        "unsupported", f"{description} is not supported: {reason}; convert it to a TIFF of plain bands, or to PNG"
    )


def _check_kind(page: "tifffile.TiffPage", photometric: int, description: str) -> None:
    """Raise DecodeError (unsupported) for a kind of picture whose samples would not be read as they are meant."""
    if page.samplesperpixel < 1 or page.planarconfig not in (1, 2):
        raise DecodeError("corrupt", f"{description} has an invalid layout")
    if photometric not in COLOURS:
        raise _unsupported(description, "this photometric interpretation has no meaning as bands or colours here")
    if page.compression not in READABLE_COMPRESSIONS:
        raise _unsupported(description, "there is no decoder for this compression")
    if page.dtype is None or np.dtype(page.dtype).kind not in "biuf":
        raise _unsupported(description, "there is no reader for this number type")
    if page.imagedepth != 1 or page.tiledepth not in (0, 1):
        raise _unsupported(description, "it is a volume")
    if page.samplesperpixel < COLOUR_SAMPLES.get(photometric, 1):
        raise _unsupported(description, "it has too few bands for its colours")
    if photometric == 5 and _number(page, INK_SET, 1) != 1:
        raise _unsupported(description, "its inks are not cyan, magenta, yellow and black")
    if photometric in (5, 6) and (page.sampleformat != 1 or page.bitspersample not in (8, 16)):
        raise _unsupported(description, "these colours are read from 8 and 16 bits only")
    if photometric == 3 and (
        page.sampleformat != 1 or page.tags.valueof(COLOUR_MAP) is None or page.bitspersample > 16
    ):
        raise _unsupported(description, "it has no colour map for these numbers")
    if photometric == 6 and not (page.compression == JPEG and page.planarconfig == 1 and page.samplesperpixel == 3):
        subsampling = page.tags.valueof(SUBSAMPLING, (2, 2))
        if page.compression == JPEG or tuple(subsampling) != (1, 1) or page.bitspersample != 8:
            raise _unsupported(description, "its chroma is subsampled")


def _check_work(page: "tifffile.TiffPage", max_pixels: int) -> None:
    """Raise DecodeError (too_large) if tiles or samples make a small picture as much work as a large one."""
    pixels, tile_pixels = page.imagewidth * page.imagelength, page.tilewidth * page.tilelength
    if page.is_tiled and not tile_pixels:
        raise DecodeError("corrupt", "the TIFF has tiles without pixels")
    if tile_pixels > max_pixels:
        raise DecodeError(
            "too_large",
            f"a TIFF of {pixels} pixels has tiles of {tile_pixels} pixels; the limit is {max_pixels}; "
            "raise --max-pixels to accept it",
        )
    covered = tile_pixels * math.prod(_grid(page)) if page.is_tiled else pixels
    max_covered = MAX_PASSES * max(pixels, SMALL_PIXELS)
    if covered > max_covered:
        raise DecodeError(
            "too_large", f"the tiles of a TIFF of {pixels} pixels cover {covered} pixels; the limit is {max_covered}"
        )


def check_bytes(raster: Raster, max_pixels: int) -> None:
    """Raise DecodeError (too_large) if the samples of a picture take more than those of an image of `max_pixels`."""
    size_bytes = raster.width * raster.height * raster.samples * raster.dtype.itemsize
    if size_bytes > MAX_PIXEL_BYTES * max_pixels:
        raise DecodeError(
            "too_large",
            f"{raster.description} takes {size_bytes} bytes; the limit is {MAX_PIXEL_BYTES * max_pixels}; "
            "raise --max-pixels to accept it",
        )


def _grid(page: "tifffile.TiffPage") -> tuple[int, int]:
    """The number of strips or tiles (down, across) of one plane."""
    if page.is_tiled:
        return -(-page.imagelength // page.tilelength), -(-page.imagewidth // page.tilewidth)
    return -(-page.imagelength // max(page.rowsperstrip, 1)), 1


def _segment_samples(page: "tifffile.TiffPage") -> int:
    """The number of samples of one strip or tile."""
    pixels = page.tilewidth * page.tilelength if page.is_tiled else page.imagewidth * max(page.rowsperstrip, 1)
    return int(pixels * (page.samplesperpixel if page.planarconfig == 1 else 1))


def _nodata(page: "tifffile.TiffPage") -> float | None:
    text = page.tags.valueof(GDAL_NODATA)
    try:
        return float(str(text).strip("\0 ").replace(",", ".")) if text is not None else None
    except ValueError:
        return None


def _band_names(page: "tifffile.TiffPage", samples: int) -> tuple[str, ...]:
    text = page.tags.valueof(GDAL_METADATA)
    found = {int(sample): html.unescape(name).strip() for sample, name in DESCRIPTIONS.findall(str(text or ""))}
    return tuple(found.get(sample, "") for sample in range(samples)) if found else ()


def _metadata(page: "tifffile.TiffPage") -> dict[str, str]:
    """The items of GDAL_METADATA by name; that of a sample as name:sample."""
    items = {}
    for name, attributes, value in ITEMS.findall(str(page.tags.valueof(GDAL_METADATA) or "")):
        sample = re.search(r'sample="(\d{1,5})"', attributes)
        items[f"{name}:{sample[1]}" if sample else name] = html.unescape(value).strip()
    return items


def _palette(page: "tifffile.TiffPage") -> np.ndarray:
    """uint8 [colours, 3] of a colour map of 16-bit values: all reds, all greens, all blues (TIFF 6.0, section 5)."""
    values = np.asarray(page.tags.valueof(COLOUR_MAP)).reshape(3, -1)
    if values.shape[1] != 1 << page.bitspersample:
        raise DecodeError("corrupt", f"the TIFF's colour map has {values.shape[1]} colours")
    return (values.T >> (8 if has_16_bits(values) else 0)).astype(np.uint8)


def has_16_bits(colour_map: Any) -> bool:
    """Whether a colour map has values of 16 bits, as it should. Old writers write 8 bits, so that all are below 256."""
    return int(np.max(colour_map, initial=0)) > 255


class _Reader:
    """Reads samples of one page. Each strip or tile is decoded once, and checked before it is decoded."""

    def __init__(self, page: "tifffile.TiffPage", data: bytes, description: str) -> None:
        self.page, self.data, self.description = page, data, description

    def __call__(self, samples: Sequence[int]) -> np.ndarray:
        whole = self._uncompressed()
        if whole is not None:
            return whole if list(samples) == list(range(whole.shape[2])) else whole[..., list(samples)]
        page, is_planar = self.page, self.page.planarconfig == 2 and self.page.samplesperpixel > 1
        array = np.empty((page.imagelength, page.imagewidth, len(samples)), page.dtype)
        per_plane, is_in_order = math.prod(_grid(page)), list(samples) == list(range(page.samplesperpixel))
        planes = samples if is_planar else [0]
        self._check_count(per_plane * (page.samplesperpixel if is_planar else 1))
        decoded: dict[int, int] = {}  # a band that is asked for twice is decoded once
        for place, plane in enumerate(planes):
            if plane in decoded:
                array[..., place] = array[..., decoded[plane]]
                continue
            decoded[plane] = place
            for number in range(plane * per_plane, (plane + 1) * per_plane):
                segment, top, left = self._segment(number)
                part = array[top : top + segment.shape[0], left : left + segment.shape[1]]
                segment = segment[: part.shape[0], : part.shape[1]]
                if is_planar:
                    part[..., place] = segment[..., 0]
                else:
                    part[...] = segment if is_in_order else segment[..., list(samples)]
        return array

    def _uncompressed(self) -> np.ndarray | None:
        """A view of the bytes if they are one uncompressed block of whole bytes, otherwise None."""
        page = self.page
        if (
            page.compression != 1
            or page.is_tiled
            or page.fillorder != 1
            or page.predictor != 1
            or page.bitspersample not in (8, 16, 32, 64)
        ):
            return None
        offsets, counts = list(page.dataoffsets), list(page.databytecounts)
        is_planar = page.planarconfig == 2 and page.samplesperpixel > 1
        needed = _grid(page)[0] * (page.samplesperpixel if is_planar else 1)
        if len(offsets) != needed or len(counts) != needed:
            return None
        if any(a + size != b for a, size, b in zip(offsets, counts, offsets[1:], strict=False)):
            return None
        if any(size != self._strip_bytes(number) for number, size in enumerate(counts)):
            return None
        shape = page.imagelength, page.imagewidth, page.samplesperpixel
        dtype = np.dtype(page.dtype).newbyteorder(page.parent.byteorder)
        size = math.prod(shape) * dtype.itemsize
        if offsets[0] <= 0:
            return None
        if offsets[0] + size > len(self.data):
            raise self._truncated()
        flat = np.frombuffer(self.data, dtype, math.prod(shape), offsets[0]).astype(page.dtype, copy=False)
        if not is_planar:
            return flat.reshape(shape)
        return flat.reshape(shape[2], *shape[:2]).transpose(1, 2, 0)

    def _strip_bytes(self, number: int) -> int:
        """Bytes of an uncompressed strip."""
        page = self.page
        is_planar = page.planarconfig == 2 and page.samplesperpixel > 1
        row_bits = page.imagewidth * page.bitspersample * (1 if is_planar else page.samplesperpixel)
        first = number % _grid(page)[0] * page.rowsperstrip
        return min(page.rowsperstrip, page.imagelength - first) * -(-row_bits // 8)

    def _check_count(self, needed: int) -> None:
        for name, values in (("places", self.page.dataoffsets), ("sizes", self.page.databytecounts)):
            if len(values) < needed:
                raise DecodeError(
                    "corrupt", f"{self.description} lists the {name} of {len(values)} strips or tiles, and has {needed}"
                )

    def _truncated(self) -> DecodeError:
        return DecodeError("truncated", f"{self.description} is cut off after {len(self.data)} bytes")

    def _segment(self, number: int) -> tuple[np.ndarray, int, int]:
        """A strip or tile [rows, columns, samples], and its first row and column."""
        page = self.page
        offset, size = int(page.dataoffsets[number]), int(page.databytecounts[number])
        if offset and not size:  # with neither, the segment is left out
            if page.compression != 1 or page.is_tiled:
                raise DecodeError("corrupt", f"{self.description} says that strip or tile {number} has no bytes")
            size = self._strip_bytes(number)  # old writers leave it to the reader
        if offset + size > len(self.data):
            raise self._truncated()
        encoded = self.data[offset : offset + size] if size and offset else None
        if encoded is not None:
            self._check_segment(encoded)
        tables: dict[str, Any] = {}
        if page.compression == JPEG:
            tables = {"jpegtables": page.jpegtables, "jpegheader": page.jpegheader}
        try:
            array, (_, _, top, left, _), shape = page.decode(encoded, number, **tables)
        except (MemoryError, DecodeError):
            raise
        except NotImplementedError as error:
            raise _unsupported(self.description, str(error)) from error
        except Exception as error:  # imagecodecs has an exception class per codec
            if "not supported" in str(error):
                raise _unsupported(self.description, str(error)) from error
            raise DecodeError("corrupt", f"{self.description} is damaged: {error}") from error
        if array is None:  # GDAL leaves out strips and tiles without data
            fill = _nodata(page)
            array = np.zeros(shape, page.dtype) if fill is None else np.full(shape, fill).astype(page.dtype)
        if page.dtype == np.bool_:
            array = array.astype(np.bool_, copy=False)
        if not np.can_cast(array.dtype, np.dtype(page.dtype)):
            raise DecodeError("corrupt", f"{self.description} holds numbers of type {array.dtype}")
        return array[0], top, left

    def _check_segment(self, encoded: bytes) -> None:
        """Raise DecodeError (corrupt) if the encoded data would unpack to more than the strip or tile holds."""
        page = self.page
        name, allowed = PILLOW_SIZES.get(int(page.compression)), _segment_samples(page)
        if page.compression == LERC:
            self._check_lerc(encoded, allowed)
        elif name is not None:
            try:
                width, height = Image.open(io.BytesIO(encoded), formats=[name]).size
            except Exception as error:  # Pillow does not document the errors of its plugins
                raise DecodeError("corrupt", f"{self.description} is damaged: {error}") from error
            self._check_pixels(width * height, allowed)
            if name == "JPEG" and sum(1 for _ in START_OF_SCAN.finditer(encoded)) > MAX_SCANS:
                raise DecodeError("too_large", f"{self.description} has a tile of more than {MAX_SCANS} JPEG scans")

    def _check_lerc(self, encoded: bytes, allowed: int) -> None:
        """Lerc2's header: 6 bytes of magic, version, checksum from version 3, rows, columns."""
        inner, start = _lerc_compression(self.page), encoded
        if inner == 1:
            start = zlib.decompressobj().decompress(encoded, 64)
        elif inner == 2:
            import imagecodecs

            limit = allowed * np.dtype(self.page.dtype).itemsize * 2 + (1 << 16)
            start = bytes(imagecodecs.zstd_decode(encoded, out=limit)[:64])
        if not start.startswith(b"Lerc2 ") or len(start) < 22:
            raise _unsupported(self.description, "it is not LERC of version 2")
        (version,) = struct.unpack("<i", start[6:10])
        rows, columns = struct.unpack("<ii", start[14:22] if version >= 3 else start[10:18])
        self._check_pixels(max(rows, 0) * max(columns, 0), allowed)

    def _check_pixels(self, pixels: int, allowed: int) -> None:
        if pixels > allowed:
            raise DecodeError(
                "corrupt", f"{self.description} has a strip or tile of {pixels} pixels; it must have at most {allowed}"
            )


def _lerc_compression(page: "tifffile.TiffPage") -> int:
    """The compression inside of LERC: 0 none, 1 Deflate, 2 Zstandard (LercParameters, tag 50674)."""
    value = page.tags.valueof(50674)
    return int(value[1]) if isinstance(value, tuple) and len(value) > 1 else 0
