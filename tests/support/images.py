"""Drawn images, and unusual and broken ones, as bytes."""

import io
import struct
import zlib

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from jobs.demo_archive import KINDS, break_checksum, draw_tile

__all__ = ["KINDS", "STRANGE", "encode", "tile"]


def tile(kind: str = "forest", seed: int = 0, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Draw an RGB tile of one of KINDS. size: (width, height)."""
    return draw_tile(kind, np.random.default_rng(seed), size)


def encode(image: Image.Image, format: str = "JPEG", **settings: object) -> bytes:
    """Encode an image. settings: options of Pillow's save()."""
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def zero_bytes() -> bytes:
    return b""


def text() -> bytes:
    return b"<html><body>404 not found</body></html>\n"


def truncated(format: str = "JPEG", keep: float = 0.6) -> bytes:
    data = encode(tile("urban"), format)
    return data[: int(len(data) * keep)]


def broken_png_header() -> bytes:
    return break_checksum(encode(tile(), "PNG"))


def broken_png_data() -> bytes:
    """Valid chunks around an invalid zlib stream."""
    return png_of_chunks((b"IHDR", png_header(8, 8)), (b"IDAT", b"not a zlib stream"), (b"IEND", b""))


def png_header(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    return struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)


def png_of_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG file of (type, data) chunks with correct checksums."""
    file = b"\x89PNG\r\n\x1a\n"
    for kind, data in chunks:
        file += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return file


def bomb(side: int = 60_000) -> bytes:
    """A PNG of a few bytes whose header says side × side pixels."""
    return png_of_chunks((b"IHDR", png_header(side, side)), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b""))


def text_bomb(size: int = 4 << 20) -> bytes:
    """A PNG with a compressed comment that takes `size` bytes when it is unpacked."""
    comment = b"Comment\0\0" + zlib.compress(b" " * size, 9)
    rows = zlib.compress((b"\0" + b"\0" * 24) * 8)
    return png_of_chunks((b"IHDR", png_header(8, 8)), (b"zTXt", comment), (b"IDAT", rows), (b"IEND", b""))


def grey_16(values: np.ndarray, format: str = "PNG") -> bytes:
    return encode(Image.fromarray(values.astype(np.uint16)), format)


def png_16(*bands: np.ndarray) -> bytes:
    """A 16-bit PNG of 2 bands (grey and alpha), 3 (RGB) or 4 (RGBA)."""
    values = np.stack(bands, axis=2).astype(">u2")
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in values))
    header = png_header(values.shape[1], values.shape[0], depth=16, colour={2: 4, 3: 2, 4: 6}[len(bands)])
    return png_of_chunks((b"IHDR", header), (b"IDAT", rows), (b"IEND", b""))


def float_tiff(values: np.ndarray) -> bytes:
    return encode(Image.fromarray(values.astype(np.float32)), "TIFF")


def palette_png(kind: str = "field", clear: int | None = 0) -> bytes:
    """A PNG with a palette. clear: the transparent entry of the palette, or None."""
    settings = {} if clear is None else {"transparency": clear}
    return encode(tile(kind).quantize(16), "PNG", **settings)


def with_alpha(mode: str = "RGBA", format: str = "PNG") -> bytes:
    """A tile that is transparent on the left and opaque on the right, with a soft edge of a third of its width."""
    image = tile("urban").convert(mode)
    levels = np.linspace(-255, 510, image.width).clip(0, 255).astype(np.uint8)
    fade = np.broadcast_to(levels, image.size[::-1])
    image.putalpha(Image.fromarray(np.ascontiguousarray(fade)))
    return encode(image, format, **({"lossless": True} if format == "WEBP" else {}))


def animated(format: str = "GIF") -> bytes:
    """Three frames: forest, water, urban."""
    frames = [tile(kind) for kind in ("forest", "water", "urban")]
    settings = {"lossless": True} if format == "WEBP" else {}
    return encode(frames[0], format, save_all=True, append_images=frames[1:], **settings)


def oriented(orientation: int, format: str = "JPEG", size: tuple[int, int] = (80, 60), kind: str = "water") -> bytes:
    """A tile with an EXIF orientation; the pixels are stored as they were drawn."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    settings = {"quality": 100, "subsampling": 0} if format == "JPEG" else {}
    return encode(tile(kind, size=size), format, exif=exif, **settings)


def broken_exif(format: str = "JPEG") -> bytes:
    """EXIF with an invalid offset of its directory (JPEG), or that is not hexadecimal (PNG, in a text chunk)."""
    if format == "JPEG":
        return encode(tile(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7fgarbage")
    text = PngImagePlugin.PngInfo()
    text.add_text("Raw profile type exif", "\nexif\n8\nnot hexadecimal")
    return encode(tile(), "PNG", pnginfo=text)


def tiff_with_tag(image: Image.Image, tag: int, value: int) -> bytes:
    """A TIFF with another value of a 16-bit tag, which must be one that Pillow writes (TIFF 6.0, section 2: IFD)."""
    data = bytearray(encode(image, "TIFF"))
    entry = data.index(struct.pack("<HHI", tag, 3, 1))
    data[entry + 8 : entry + 10] = struct.pack("<H", value)
    return bytes(data)


STRANGE: dict[str, tuple[bytes, str]] = {
    "zero bytes": (zero_bytes(), "empty"),
    "text": (text(), "not_an_image"),
    "random bytes": (np.random.default_rng(1).bytes(5000), "not_an_image"),
    "truncated JPEG": (truncated("JPEG"), "truncated"),
    "JPEG cut in its header": (truncated("JPEG", 0.01), "truncated"),
    "truncated PNG": (truncated("PNG"), "truncated"),
    "truncated WebP": (truncated("WEBP"), "truncated"),
    "truncated TIFF": (truncated("TIFF"), "truncated"),
    "truncated BMP": (truncated("BMP"), "truncated"),
    "truncated GIF": (truncated("GIF"), "truncated"),
    "PNG with a broken header checksum": (broken_png_header(), "corrupt"),
    "PNG with broken data": (broken_png_data(), "corrupt"),
    "bomb": (bomb(), "too_large"),
    "AVIF": (b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(100), "corrupt"),
    "HEIC": (b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(100), "corrupt"),
    "JPEG XL": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(100), "corrupt"),
    "JPEG 2000": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(100), "truncated"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1\n", "not_an_image"),
}
"""Name → bytes, and the error_type of decode."""
