"""Pictures of more than 8 bits that are no TIFF: PNG, JPEG 2000, PGM, PPM and PFM, read with all their bits.

Pillow opens all of them, but keeps only the high byte of 16-bit colours, and stretches the values of a JPEG 2000 of
fewer than 16 bits and of a PGM.
"""

import io
import re
import struct
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageFile

from pipeline.errors import DecodeError
from pipeline.images import header
from pipeline.images.jp2_boxes import read_channels
from pipeline.images.png import is_text_too_large, without_pixels
from pipeline.images.raster import Colour, Raster
from pipeline.images.values import Values

PNG_DEPTH, PNG_COLOUR = 24, 25
"""Places of the bits per sample and of the colour type in a PNG."""
PNG_SAMPLES = {2: 3, 4: 2, 6: 4}
"""Colour type → samples, for those that Pillow reduces to 8 bits."""

CODESTREAM = re.compile(rb"\xff\x4f\xff\x51")
"""The start of a JPEG 2000 codestream (T.800, A.5.1: SOC, SIZ)."""
CODEC_BYTES = 12
"""Memory of OpenJPEG per sample: 4 bytes of coefficients, twice, and the result."""

Read = Callable[[Sequence[int]], np.ndarray]


def raster_of(image: ImageFile.ImageFile, data: bytes, values: Values) -> Raster | None:
    """The raster of an opened image, None if Pillow's 8 bits are all that it holds, or all that is needed."""
    if image.format == "PNG" and data[PNG_DEPTH] == 16 and data[PNG_COLOUR] in PNG_SAMPLES:
        needs_all_bits = values.reads_all_bits or data[PNG_COLOUR] == 4 or "transparency" in image.info
        return _png(image, data) if needs_all_bits else None
    if image.format == "JPEG2000":
        return jpeg_2000(data, values)
    if image.format == "PPM" and image.mode in ("I", "RGB"):
        return _ppm(image, data, values)
    if image.mode.startswith("I") or image.mode == "F":
        return _grey(image, data)
    return None


def _raster(
    image: ImageFile.ImageFile, data: bytes, samples: int, dtype: str, colour: Colour, read: Read, alpha: int | None
) -> Raster:
    number = np.dtype(dtype)
    kind = {"u": "unsigned integer", "i": "signed integer", "f": "float"}[number.kind]
    bands = f"{samples} band{'s' * (samples != 1)}"
    return Raster(
        width=image.width,
        height=image.height,
        samples=samples,
        dtype=number,
        bits=8 * number.itemsize if number.kind == "u" else 0,
        colour=colour,
        description=f"a {image.format} image of {bands} of {8 * number.itemsize}-bit {kind}",
        read=read,
        alpha=alpha,
        orientation=_orientation(image, data),
        sample_bytes=2 * number.itemsize,
    )


def _orientation(image: ImageFile.ImageFile, data: bytes) -> int:
    """The EXIF orientation. Pillow would decode all pixels of a PNG, to see what follows them."""
    if image.format != "PNG":
        return header.orientation(image)
    try:
        metadata = Image.open(io.BytesIO(without_pixels(data)), formats=("PNG",))
        return int(Image.Image.getexif(metadata).get(header.ORIENTATION, 1))
    except Exception as error:  # Pillow does not document the errors of broken metadata
        if is_text_too_large(error):
            raise
        return 1


def _grey(image: ImageFile.ImageFile, data: bytes) -> Raster:
    """One band that Pillow reads with all its bits, and the one grey of a PNG that is transparent."""
    dtype = "uint16" if image.mode.startswith("I;16") else "float32" if image.mode == "F" else "int32"
    transparent = image.info.get("transparency")

    def read(samples: Sequence[int]) -> np.ndarray:
        image.load()
        values = np.asarray(image).astype(dtype, copy=False)[..., None]
        if transparent is not None:
            values = np.concatenate([values, np.where(values == transparent, 0, 65535).astype(dtype)], axis=2)
        return values if len(samples) == values.shape[2] else values[..., list(samples)]

    has_alpha = transparent is not None
    return _raster(image, data, 1 + has_alpha, dtype, "grey", read, 1 if has_alpha else None)


def _png(image: ImageFile.ImageFile, data: bytes) -> Raster:
    samples = PNG_SAMPLES[data[PNG_COLOUR]]
    colour: Colour = "grey" if samples == 2 else "RGB"
    has_alpha = samples != 3 or "transparency" in image.info
    samples += samples == 3 and has_alpha

    def read(chosen: Sequence[int]) -> np.ndarray:
        import imagecodecs

        array = imagecodecs.png_decode(data)
        if array.shape != (image.height, image.width, samples) or array.dtype != np.uint16:
            raise DecodeError("unsupported", f"a PNG was read as {array.dtype} {list(array.shape)}")
        return array if list(chosen) == list(range(samples)) else array[..., list(chosen)]

    return _raster(image, data, samples, "uint16", colour, read, samples - 1 if has_alpha else None)


def _ppm(image: ImageFile.ImageFile, data: bytes, values: Values) -> Raster | None:
    """PGM and PPM of more than 8 bits, with the values of the file. Pillow stretches them to 65535."""
    tile, samples = image.tile[0], 1 if image.mode == "I" else 3
    args = tile.args if isinstance(tile.args, tuple) else (tile.args, 65535 if image.mode == "I" else 255)
    largest = int(args[1])
    if samples == 3 and (largest <= 255 or not values.reads_all_bits):
        return None

    def read(chosen: Sequence[int]) -> np.ndarray:
        count = image.width * image.height * samples
        if tile.codec_name == "ppm_plain":
            if samples == 3:
                raise DecodeError("unsupported", "a PPM of text with more than 8 bits is not supported; write it as P6")
            image.load()
            array = np.rint(np.asarray(image) * (largest / 65535)).astype(np.uint16)
        elif tile.offset + 2 * count > len(data):
            raise DecodeError("truncated", f"the image is cut off after {len(data)} bytes")
        else:
            array = np.frombuffer(data, ">u2", count, tile.offset).astype(np.uint16)
        return array.reshape(image.height, image.width, samples)[..., list(chosen)]

    return _raster(image, data, samples, "uint16", "grey" if samples == 1 else "RGB", read, None)


def jpeg_2000(data: bytes, values: Values) -> Raster | None:
    """The components of a JPEG 2000, None if Pillow reads it right: a picture of 8 bits with its channels in order.

    The bands of a picture are its colours, red first; those of other files are in the order of the file.
    """
    start = CODESTREAM.search(data)
    if start is None:
        return None
    main_header = data[start.start() + 4 :]
    _, _, right, bottom, left, top = struct.unpack(">HHIIII", main_header[:20])
    (samples,) = struct.unpack(">H", main_header[36:38])
    depths = main_header[38 : 38 + 3 * samples : 3]
    if len(depths) < samples or not samples:
        raise DecodeError("truncated", f"the image is cut off after {len(data)} bytes")
    bits, is_signed = (depths[0] & 0x7F) + 1, bool(depths[0] & 0x80)
    channels = read_channels(data, samples)
    is_picture = len(channels.colours) in (1, 3) and not channels.others
    is_read_by_pillow = is_picture and channels.are_in_order and not is_signed
    is_enough = bits == 8 or (channels.is_palette if bits < 8 else samples > 2 and not values.reads_all_bits)
    if is_read_by_pillow and is_enough:
        return None
    sizes = {main_header[i : i + 2] for i in range(39, 39 + 3 * samples, 3)}
    if len(set(depths)) > 1 or len(sizes) > 1 or bits > 32:
        raise DecodeError(
            "unsupported", f"a JPEG 2000 of {samples} bands of different number types or sizes is not supported"
        )
    if channels.is_ycc and (bits < 8 or not channels.are_in_order):
        raise DecodeError("unsupported", f"a JPEG 2000 in sYCC with {bits} bits per band is not supported")
    size = 1 if bits <= 8 else 2 if bits <= 16 else 4
    dtype = np.dtype(f"{'i' if is_signed else 'u'}{size}")
    width, height = right - left, bottom - top
    alpha = () if channels.alpha is None else (channels.alpha,)
    order = (*channels.colours, *alpha) if is_picture else tuple(range(samples))
    encoded = data if channels.are_in_order else data[start.start() :]  # OpenJPEG would sort the channels of a file

    def read(chosen: Sequence[int]) -> np.ndarray:
        import imagecodecs

        array = imagecodecs.jpeg2k_decode(encoded)
        array = array if array.ndim == 3 else array[..., None]
        if array.shape != (height, width, samples):
            raise DecodeError("unsupported", f"a JPEG 2000 was read as {array.dtype} {list(array.shape)}")
        return array.astype(dtype, copy=False)[..., [order[sample] for sample in chosen]]

    return Raster(
        width=width,
        height=height,
        samples=samples,
        dtype=dtype,
        bits=0 if is_signed else bits,
        colour="RGB" if is_picture and len(channels.colours) == 3 else "grey",
        description=f"a JPEG 2000 of {samples} band{'s' * (samples != 1)} of {bits}-bit "
        f"{'signed' if is_signed else 'unsigned'} integer",
        read=read,
        alpha=order.index(channels.alpha) if channels.alpha is not None else None,
        premultiplied=channels.premultiplied,
        sample_bytes=CODEC_BYTES,
        buffer_bytes=width * height * samples * CODEC_BYTES,
    )
