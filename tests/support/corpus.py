"""A corpus of bad input: images, archives and lists that break readers, with the rows that each must give.

`cases()` generates all of them from fixed seeds; `write(folder)` writes them to disk. Hand-made bytes follow the
specifications of the formats: JPEG ITU T.81, PNG 1.2, GIF89a, TIFF 6.0, WebP RIFF, POSIX pax and GNU tar, PKWARE
APPNOTE, Parquet.
"""

import functools
import io
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import images
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from PIL import Image

OK = "ok"
MAX_PIXELS = 2_000_000
"""The pixel limit for this corpus. Its bombs are larger, but small enough to be harmless if one is decoded."""


@dataclass(frozen=True)
class Case:
    """One file and the rows that it gives.

    rows: OK or "<stage> <error_type>" of each row, in order. size: (width, height) of an image that is decoded.
    refused: part of the error message if the file as the only input is refused, else "".
    files: the images of a list, by path. keep: `--keep` columns.
    """

    name: str
    data: bytes
    rows: tuple[str, ...]
    size: tuple[int, int] | None = None
    refused: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    keep: tuple[str, ...] = ()

    @property
    def folder(self) -> str:
        suffix = self.name.rpartition(".")[2]
        kinds = {"zip": "zips", "parquet": "parquets"}
        if self.files:
            return "lists"
        return "archive/" + ("tars" if ".tar" in self.name or suffix == "tgz" else kinds.get(suffix, "images"))


def write(folder: Path) -> dict[str, Path]:
    """Write the corpus to a folder; return the paths by case. `{folder}` in a list becomes the folder of the list."""
    paths = {}
    for case in cases():
        path = paths[case.name] = folder / case.folder / case.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(case.data.replace(b"{folder}", str(path.parent).encode()) if case.files else case.data)
        for name, data in case.files.items():
            (path.parent / name).parent.mkdir(parents=True, exist_ok=True)
            (path.parent / name).write_bytes(data)
    return paths


@functools.cache
def cases() -> tuple[Case, ...]:
    makers = (cut_images, broken_images, jpegs, pngs, odd_images, bombs, tars, sparse_tars, zips, parquets, lists)
    every = tuple(case for maker in makers for case in maker())
    assert len({case.name for case in every}) == len(every)
    return every


def good(name: str, data: bytes, width: int = 64, height: int = 64) -> Case:
    return Case(name, data, (OK,), (width, height))


def bad(name: str, data: bytes, error_type: str) -> Case:
    return Case(name, data, (f"decode {error_type}",))


def from_scale(name: str, data: bytes) -> Case:
    """An image of numbers that need --scale."""
    return bad(name, data, "unsupported")


FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP", "tif": "TIFF", "bmp": "BMP", "gif": "GIF"}


@functools.cache
def plain(suffix: str = "png", seed: int = 0) -> bytes:
    return images.encode(images.tile("urban", seed), FORMATS[suffix])


# Images


def cut_images() -> Iterator[Case]:
    """Every format, truncated before, in and after its header, in the middle and near the end."""
    for suffix in FORMATS:
        data = plain(suffix)
        for length in (1, 7, 20, 40, len(data) // 4, len(data) // 2, len(data) * 9 // 10, len(data) - 60):
            is_known = length >= {"bmp": 2, "jpg": 3, "tif": 4, "gif": 6, "png": 8, "webp": 16}[suffix]
            yield bad(f"cut-{length:05d}.{suffix}", data[:length], "truncated" if is_known else "not_an_image")
    yield bad("no-end-marker.jpg", plain("jpg")[:-2], "truncated")
    yield bad("cut-progressive.jpg", images.encode(images.tile(), "JPEG", progressive=True)[:900], "truncated")
    yield bad("no-bytes.jpg", b"", "empty")


def broken_images() -> Iterator[Case]:
    """Every format with an invalid header, and files of other formats."""
    yield bad("no-table.jpg", plain("jpg").replace(b"\xff\xdb", b"\xff\xfe"), "corrupt")
    yield bad("zero-height.jpg", patched(plain("jpg"), b"\xff\xc0", 5, b"\0\0"), "corrupt")
    yield bad("checksum.png", images.broken_png_header(), "corrupt")
    yield bad("data.png", images.broken_png_data(), "corrupt")
    yield bad("depth-3.png", images.png_of_chunks((b"IHDR", images.png_header(8, 8, 3)), (b"IEND", b"")), "corrupt")
    yield bad("zero-size.png", images.png_of_chunks((b"IHDR", images.png_header(0, 8)), (b"IEND", b"")), "corrupt")
    yield bad("no-data.png", images.png_of_chunks((b"IHDR", images.png_header(8, 8)), (b"IEND", b"")), "corrupt")
    yield bad("frame.webp", patched(plain("webp"), b"VP8 ", 11, b"\0\0\0"), "corrupt")
    yield bad("directory-nowhere.tif", b"II*\0\xff\xff\xff\x7f" + plain("tif")[8:], "truncated")
    yield bad("no-directory.tif", b"II*\0\x08\0\0\0\0\0" + bytes(64), "corrupt")
    yield bad("compression.tif", images.tiff_with_tag(images.tile(), 259, 32809), "unsupported")
    yield bad("header-size.bmp", plain("bmp")[:14] + struct.pack("<I", 13) + plain("bmp")[18:], "unsupported")
    yield bad("depth-7.bmp", plain("bmp")[:28] + struct.pack("<H", 7) + plain("bmp")[30:], "unsupported")
    yield bad("no-frame.gif", b"GIF89a\x08\0\x08\0\0\0\0;", "corrupt")
    yield bad("code-size.gif", gif_of(b"\xff\x02\x4c\x01\0"), "corrupt")
    yield bad("text.jpg", images.text(), "not_an_image")
    yield bad("noise.png", np.random.default_rng(0).bytes(3000), "not_an_image")
    yield bad("zeros.jpg", bytes(4096), "not_an_image")
    yield bad("newline-before.jpg", b"\r\n" + plain("jpg"), "not_an_image")
    for name in ("AVIF", "HEIC", "JPEG XL", "JPEG 2000", "Git LFS pointer"):
        yield bad(f"{name.lower().replace(' ', '-')}.jpg", *images.STRANGE[name])
    yield bad("photoshop.tif", b"8BPS\0\1" + bytes(40), "unsupported")


def patched(data: bytes, after: bytes, offset: int, new: bytes) -> bytes:
    """Overwrite bytes with `new`, starting `offset` bytes after the start of `after`."""
    start = data.index(after) + offset
    return data[:start] + new + data[start + len(new) :]


def gif_of(frame: bytes, width: int = 8, height: int = 8) -> bytes:
    """A GIF of one frame. `frame` starts with the LZW minimum code size."""
    size = struct.pack("<HH", width, height)
    return b"GIF89a" + size + b"\x80\0\0" + b"\0\0\0\xff\xff\xff" + b",\0\0\0\0" + size + b"\0" + frame + b";"


def segment(marker: int, data: bytes) -> bytes:
    return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data


def grey_jpeg(sof: int, scans: bytes, side: int = 64, bits: int = 8) -> bytes:
    """A JPEG of one component: a quantization table of ones, a frame header of type `sof`, and the given scans."""
    frame = struct.pack(">BHHB", bits, side, side, 1) + b"\1\x11\0"
    return b"\xff\xd8" + segment(0xDB, b"\0" + b"\1" * 64) + segment(sof, frame) + scans + b"\xff\xd9"


def scan(first: int = 0, last: int = 63, approximation: int = 0) -> bytes:
    return segment(0xDA, bytes([1, 1, 0, first, last, approximation]))


ONE_CODE = segment(0xC4, b"\0\1" + bytes(15) + b"\0")  # a Huffman table with the one code 0: no difference


def jpegs() -> Iterator[Case]:
    photo = images.tile("field")
    yield good("progressive.jpg", images.encode(photo, "JPEG", progressive=True))
    yield good("cmyk.jpg", images.encode(photo.convert("CMYK"), "JPEG"))
    yield good("grey.jpg", images.encode(photo.convert("L"), "JPEG"))
    yield good("4-1-1.jpg", images.encode(photo, "JPEG", subsampling="4:1:1"))
    yield good("restarts.jpg", images.encode(photo, "JPEG", restart_marker_blocks=3))
    yield good("arithmetic.jpg", grey_jpeg(0xCA, scan(0, 0)))  # without data each decision is the likely one
    yield good("lossless.jpg", grey_jpeg(0xC3, ONE_CODE + scan(1, 0) + bytes(64 * 64 // 8)))
    yield bad("lossless-no-predictor.jpg", grey_jpeg(0xC3, ONE_CODE + scan(0, 0) + bytes(512)), "corrupt")
    yield bad("12-bit.jpg", grey_jpeg(0xC1, ONE_CODE + scan() + bytes(512), bits=12), "unsupported")
    yield bad("hierarchical.jpg", grey_jpeg(0xC5, ONE_CODE + scan() + bytes(512)), "corrupt")
    yield good("multi-picture.jpg", images.animated("MPO"))
    yield good("icc-broken.jpg", images.encode(photo, "JPEG", icc_profile=b"no profile"))
    yield good("icc-1-mb.jpg", images.encode(photo, "JPEG", icc_profile=bytes(1 << 20)))
    yield good("exif-broken.jpg", images.broken_exif())
    yield good("garbage-behind.jpg", plain("jpg") + b"garbage" * 99)
    yield good("stray-bytes.jpg", plain("jpg")[:-2] + b"stray\xff\xd9")
    yield good("markers-behind.jpg", plain("jpg") + b"\xff\xda" * 50_000)
    yield good("comment-64-kb.jpg", plain("jpg")[:2] + segment(0xFE, bytes(65533)) + plain("jpg")[2:])
    for orientation in range(1, 9):
        yield good(f"orientation-{orientation}.jpg", images.oriented(orientation), 80, 60)
    yield good("orientation-9.jpg", images.oriented(9), 80, 60)


def interlaced(pixels: np.ndarray) -> bytes:
    """An Adam7 PNG of uint8 or uint16 [height, width, 3]."""
    depth = pixels.dtype.itemsize * 8
    passes = ((0, 8, 0, 8), (0, 8, 4, 8), (4, 8, 0, 4), (0, 4, 2, 4), (2, 4, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1))
    lines = b"".join(
        b"\0" + line.astype(pixels.dtype.newbyteorder(">")).tobytes()
        for top, down, left, right in passes
        for line in pixels[top::down, left::right]
    )
    header = images.png_header(pixels.shape[1], pixels.shape[0], depth)[:-1] + b"\1"
    return images.png_of_chunks((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))


def png_with(*chunks: tuple[bytes, bytes], size: tuple[int, int] = (8, 8), depth: int = 8) -> bytes:
    """A black RGB PNG with the given chunks before its pixels."""
    lines = zlib.compress((b"\0" + bytes(size[0] * 3 * depth // 8)) * size[1], 9)
    header = (b"IHDR", images.png_header(*size, depth))
    return images.png_of_chunks(header, *chunks, (b"IDAT", lines), (b"IEND", b""))


def pngs() -> Iterator[Case]:
    pixels = np.asarray(images.tile("urban", size=(37, 21)))
    yield good("interlaced.png", interlaced(pixels), 37, 21)
    yield good("interlaced-16-bit.png", interlaced(pixels.astype(np.uint16) * 257), 37, 21)
    yield good("16-bit-rgb.png", png_with(depth=16), 8, 8)
    yield good("16-bit-rgb-of-a-photo.png", images.png_16(*[np.arange(4096).reshape(64, 64)] * 3))
    yield from_scale("16-bit-grey.png", images.grey_16(np.arange(4096).reshape(64, 64)))
    yield good("palette-alpha.png", images.palette_png())
    yield good("grey-alpha.png", images.with_alpha("LA"))
    yield good("one-bit.png", images.encode(images.tile().convert("1"), "PNG"))
    yield good("icc-broken.png", png_with((b"iCCP", b"x\0\0not deflated")), 8, 8)
    yield good("icc-3-mb.png", png_with((b"iCCP", b"x\0\0" + zlib.compress(bytes(3 << 20)))), 8, 8)
    yield good("exif-broken.png", images.broken_exif("PNG"))
    yield good("exif-empty.png", png_with((b"eXIf", b"")), 8, 8)
    yield good("garbage-behind.png", plain() + b"garbage" * 99)
    yield good("unknown-chunk.png", png_with((b"prVt", bytes(999))), 8, 8)
    yield bad("unknown-critical-chunk.png", png_with((b"PRVT", bytes(9)))[:-30], "truncated")
    yield bad("palette-missing.png", png_with().replace(b"\x08\x02", b"\x08\x03"), "corrupt")
    yield good("animated.png", images.animated("PNG"))


def odd_images() -> Iterator[Case]:
    """Unusual images that can be decoded, some with the suffix of another format."""
    yield good("one-pixel.jpg", images.encode(images.tile(size=(1, 1)), "JPEG"), 1, 1)
    yield good("one-pixel.gif", images.encode(Image.new("P", (1, 1)), "GIF"), 1, 1)
    for suffix in ("jpg", "png", "tif"):
        for size in ((1, 20_000), (20_000, 1)):
            yield good(
                f"strip-{size[0]}x{size[1]}.{suffix}", images.encode(Image.new("RGB", size), FORMATS[suffix]), *size
            )
    yield good("is-a-png.jpg", plain("png"))
    yield good("is-a-jpeg.tif", plain("jpg"))
    yield good("is-a-webp.bmp", plain("webp"))
    yield good("UPPER.PNG", plain("png"))
    yield good("name with # and % and ü.jpg", plain("jpg"))
    yield good("animated.webp", images.animated("WEBP"))
    yield good("animated.gif", images.animated("GIF"))
    yield good("pages.tif", images.animated("TIFF"))
    yield good("cut-last-frame.gif", images.animated("GIF")[:-400])
    yield good("alpha.webp", images.with_alpha("RGBA", "WEBP"))
    yield from_scale("float.tif", images.float_tiff(np.full((64, 64), np.nan)))
    yield good("strips-listed-twice.tif", tiff_of_strips(4))
    yield good("lzw.tif", images.encode(images.tile(), "TIFF", compression="tiff_lzw"))
    yield good("one-bit.bmp", images.encode(images.tile().convert("1"), "BMP"))
    yield good("runs.bmp", bmp_of_runs(64, 64, b"\x40\1\0\0" * 64))
    yield good("garbage-behind.gif", plain("gif") + b"garbage" * 99)
    yield good("garbage-behind.webp", plain("webp") + b"garbage" * 99)
    yield good("garbage-behind.bmp", plain("bmp") + b"garbage" * 99)


def webp_of(width: int, height: int) -> bytes:
    """The header of a lossless WebP (VP8L: width − 1 and height − 1 in 14 bits each) without valid data."""
    frame = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(91)
    return b"RIFF" + struct.pack("<I", len(frame) + 12) + b"WEBPVP8L" + struct.pack("<I", len(frame)) + frame


def tiff_of(tags: dict[int, int]) -> bytes:
    """A grey 64 × 64 LZW TIFF with the given tags and the usual ones, without valid data (TIFF 6.0, section 2)."""
    usual = {256: 64, 257: 64, 258: 8, 259: 5, 262: 1, 277: 1, 339: 1}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in sorted((usual | tags).items()))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries) // 12) + entries + bytes(1000)


def tiff_of_strips(count: int) -> bytes:
    """A grey 64 × 64 TIFF of two strips, of 63 rows and of one row, that lists `count` strip offsets."""
    tags = {256: 64, 257: 64, 258: 8, 259: 1, 262: 1, 277: 1, 278: 63}
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries = [struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items()]
    entries.insert(5, struct.pack("<HHII", 273, 4, count, start))
    offsets = struct.pack("<I", start + 4 * count) * count
    return (
        b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + offsets + bytes(64 * 64)
    )


def bmp_of_runs(width: int, height: int, runs: bytes) -> bytes:
    """A BMP of 8 bits per pixel, run-length encoded, with a black palette."""
    start = 14 + 40 + 4 * 256
    sizes = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, 1, len(runs), 0, 0, 256, 0)
    return b"BM" + struct.pack("<IHHI", start + len(runs), 0, 0, start) + sizes + bytes(4 * 256) + runs


def bombs() -> Iterator[Case]:
    """Few bytes that declare many pixels, that decompress to many bytes, or that take long to decode."""
    yield bad("bomb.png", images.bomb(), "too_large")
    yield bad("bomb.gif", gif_of(b"\2\0", 65_535, 65_535), "too_large")
    yield bad("bomb.jpg", grey_jpeg(0xC0, ONE_CODE + scan(), 65_000), "too_large")
    yield bad("bomb.bmp", plain("bmp")[:18] + struct.pack("<ii", 50_000, 50_000) + plain("bmp")[26:], "too_large")
    yield bad("bomb.tif", patched(plain("tif"), struct.pack("<HHI", 256, 4, 1), 8, b"\xff\xff\0\0"), "too_large")
    yield bad("bomb.webp", webp_of(16_383, 16_383), "too_large")
    yield bad("bomb-scans.jpg", grey_jpeg(0xC2, ONE_CODE + scan(0, 0) * 5000, 1024), "too_large")
    yield bad("bomb-tile.tif", tiff_of({322: 50_000, 323: 40_000, 324: 1, 325: 900}), "too_large")
    yield bad("bomb-strips.tif", tiff_of_strips(10_000), "too_large")
    yield bad("bomb-side.png", png_with(size=(1, (1 << 20) + 1)), "too_large")
    yield bad("bomb-runs.bmp", bmp_of_runs(100_000, 20, b"\1\0\0\0" * 20), "too_large")
    yield good("comment-4-mb.png", images.text_bomb(), 8, 8)
    yield bad("longer-than-it-says.bmp", plain("bmp")[:22] + struct.pack("<i", 20_000) + plain("bmp")[26:], "truncated")


# Containers


Member = tuple[str, bytes]
PNG, JPG = plain("png"), plain("jpg")


def tar_of(*members: Member | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                archive.addfile(member)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                archive.addfile(info, io.BytesIO(member[1]))
    return buffer.getvalue()


def special(
    name: str, type: bytes, link: str = "", size: int = 0, pax: dict[str, str] | None = None
) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size, info.pax_headers = type, link, size, pax or {}
    return info


THREE = tar_of(("a.png", PNG), ("b.jpg", JPG), ("c.png", PNG))
BLOCKS = len(tar_of(("a.png", PNG)).rstrip(b"\0")) // 512 * 512 + 512  # of the first member, with its header


def tars() -> Iterator[Case]:
    lost = "read truncated"
    for suffix, data in (
        ("tar", THREE),
        ("tar.gz", zlib.compress(THREE, wbits=31)),
        ("tar.zst", zstandard.compress(THREE)),
    ):
        yield Case(f"whole.{suffix}", data, (OK,) * 3)
    yield Case("cut-in-first.tar", THREE[:700], (lost,))
    yield Case("cut-in-header.tar", THREE[: BLOCKS + 100], (OK, lost))
    yield Case("cut-in-last.tar", THREE[: THREE.rindex(PNG[:32]) + 99], (OK, OK, lost))
    yield Case("no-end-blocks.tar", THREE.rstrip(b"\0") + bytes(512 - len(THREE.rstrip(b"\0")) % 512), (OK,) * 3)
    yield Case("cut.tar.gz", zlib.compress(THREE, 0, 31)[: BLOCKS + 2000], (OK, lost))
    yield Case("cut.tgz", zlib.compress(THREE, wbits=31)[:40], (lost,))
    yield Case("flipped.tar.zst", zstandard.compress(THREE)[:-60] + bytes(60), ("read corrupt",))
    yield Case("concatenated.tar", THREE + THREE, (OK, OK, OK, "read corrupt"))
    yield Case("hole-of-3-mb.tar", THREE + bytes(3 << 20) + THREE, (OK, OK, OK, "read corrupt"))
    yield Case("zeros-behind.tar", THREE + bytes(3 << 20), (OK,) * 3)
    yield Case(
        "joined-gzips.tar.gz", zlib.compress(THREE[:1024], wbits=31) + zlib.compress(THREE[1024:], wbits=31), (OK,) * 3
    )
    yield Case("checksum.tar", patched(THREE, b"b.jpg", 20, b"x"), (OK, "read corrupt"))
    yield Case("empty.tar", tar_of(), ())
    yield Case("no-images.tar", tar_of(("readme.txt", b"x"), ("a.json", b"{}")), ())
    yield Case("no-bytes.tar", b"", ("read empty",))
    yield Case("text.tar", images.text() * 40, ("read corrupt",))
    yield Case("is-a-jpeg.tar", JPG, ("read corrupt",))
    yield Case("not-compressed.tar.gz", THREE, ("read corrupt",))
    yield Case("gzip-as.tar", zlib.compress(THREE, wbits=31), ("read corrupt",))
    yield Case("duplicates.tar", tar_of(("a.png", PNG), ("a.png", JPG), ("a.png", b"")), (OK, OK, "decode empty"))
    names = ("/absolute/a.png", "../../outside.png", "a/../../b.png", "./c.png", "C:\\d.png", "e\n.png", ".png")
    yield Case("names.tar", tar_of(*((name, PNG) for name in names)), (OK,) * 7)
    for format, label in ((tarfile.GNU_FORMAT, "gnu"), (tarfile.PAX_FORMAT, "pax"), (tarfile.USTAR_FORMAT, "ustar")):
        parts = 3 if format == tarfile.USTAR_FORMAT else 40
        name = "long/" * 12 * parts + "a" * 60 + ".png"
        yield Case(f"long-names-{label}.tar", tar_of((name[-250:] if parts == 3 else name, PNG), format=format), (OK,))
    links = (special("soft.png", tarfile.SYMTYPE, "/etc/passwd"), special("hard.png", tarfile.LNKTYPE, "a.png"))
    pipe, folder = special("pipe.png", tarfile.FIFOTYPE), special("folder.png", tarfile.DIRTYPE)
    yield Case("links.tar", tar_of(("a.png", PNG), *links, pipe, folder), (OK, *("read unsupported",) * 3))
    loop = special("loop.png", tarfile.SYMTYPE, "loop.png"), special("up.png", tarfile.LNKTYPE, "../../up.png")
    yield Case("link-loop.tar", tar_of(*loop), ("read unsupported",) * 2)
    yield Case("bad-members.tar", tar_of(*((f"{i}.png", data) for i, data in enumerate((PNG, b"", b"no", PNG[:99])))),
               (OK, "decode empty", "decode not_an_image", "decode truncated"))  # fmt: skip
    sidecars = ("a.png", PNG), ("a.cls", b"\xff\xfe"), ("a.cls", b"7"), ("b.cls", b""), ("c.png", PNG)
    yield Case("sidecars.tar", tar_of(*sidecars), (OK, OK), keep=("cls",))
    yield Case(
        "pax-global.tar",
        special("", tarfile.XGLTYPE, size=20).tobuf() + b"20 comment=nothing.\n".ljust(512, b"\0") + THREE,
        (OK,) * 3,
    )
    yield Case(
        "pax-size-lies.tar", tar_of(special("a.png", tarfile.REGTYPE, pax={"size": "-5"})) + THREE, ("read corrupt",)
    )
    yield Case(
        "pax-garbage.tar",
        special("", tarfile.XHDTYPE, size=20).tobuf() + b"no length at all".ljust(512, b"\0") + THREE,
        (OK,) * 3,
    )
    yield Case(
        "size-of-a-terabyte.tar",
        special("a.png", tarfile.REGTYPE, size=1 << 40).tobuf(tarfile.GNU_FORMAT) + THREE,
        (lost,),
    )
    yield Case(
        "long-name-of-a-gigabyte.tar",
        special("x", tarfile.GNUTYPE_LONGNAME, size=1 << 30).tobuf() + THREE,
        ("read corrupt",),
    )
    headers = special("x", tarfile.XHDTYPE, size=0).tobuf() * 2000
    yield Case("2000-headers-in-a-row.tar", headers + THREE, ("read corrupt",))


def gnu_sparse(name: str, stored: bytes, pieces: list[tuple[int, int]], size_bytes: int) -> bytes:
    """A member in GNU tar's old sparse format: at byte 386 four pairs (offset, size), a flag and the real size."""
    header = bytearray(special(name, tarfile.GNUTYPE_SPARSE, size=len(stored)).tobuf(tarfile.GNU_FORMAT))
    numbers = [number for piece in (pieces + [(0, 0)] * 4)[:4] for number in piece]
    header[386:495] = b"".join(tarfile.itn(n, 12, tarfile.GNU_FORMAT) for n in numbers) + b"\0" + tarfile.itn(
        size_bytes, 12, tarfile.GNU_FORMAT
    )  # fmt: skip
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 8 * 32 + sum(header[156:]))
    return bytes(header) + stored + bytes(-len(stored) % 512)


def pax_sparse(name: str, stored: bytes, pieces: list[tuple[int, int]], size_bytes: int) -> bytes:
    """The same member in pax format 1.0: the map comes before the data."""
    text = f"{len(pieces)}\n" + "".join(f"{offset}\n{size}\n" for offset, size in pieces)
    sparse = {"major": "1", "minor": "0", "name": name, "realsize": str(size_bytes)}
    info = special(f"GNUSparseFile.0/{name}", tarfile.REGTYPE, pax={f"GNU.sparse.{k}": v for k, v in sparse.items()})
    body = text.encode() + bytes(-len(text) % 512) + stored
    info.size = len(body)
    return info.tobuf(tarfile.PAX_FORMAT) + body + bytes(-len(body) % 512)


def sparse_tars() -> Iterator[Case]:
    black = images.encode(Image.new("RGB", (64, 64)), "BMP")
    pieces, stored = [(0, 512), (8192, len(black) - 8192)], black[:512] + black[8192:]
    for label, make in (("gnu", gnu_sparse), ("pax", pax_sparse)):
        yield Case(f"sparse-{label}.tar", make("a.bmp", stored, pieces, len(black)) + THREE, (OK,) * 4)
        yield Case(
            f"sparse-{label}.tar.gz",
            zlib.compress(make("a.bmp", stored, pieces, len(black)) + THREE, wbits=31),
            (OK,) * 4,
        )
        huge = make("a.bmp", b"x" * 512, [(0, 512)], 1 << 50)
        yield Case(f"sparse-{label}-petabyte.tar", huge + THREE, ("read too_large", *(OK,) * 3))
        yield Case(
            f"sparse-{label}-petabyte.tar.gz", zlib.compress(huge + THREE, wbits=31), ("read too_large", *(OK,) * 3)
        )
        yield Case(f"sparse-{label}-cut.tar", make("a.bmp", stored, pieces, len(black))[:3000], ("read truncated",))
        wrong = make("a.bmp", stored, [(0, 512), (8192, -5000), (-9, 4)], len(black))
        yield Case(f"sparse-{label}-negative.tar", wrong + THREE, ("read corrupt", *(OK,) * 3))
        backwards = make("a.bmp", stored, [(8192, 900), (0, 512)], len(black))
        yield Case(f"sparse-{label}-backwards.tar", backwards + THREE, ("read corrupt", *(OK,) * 3))


def zip_of(*members: Member, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w", method) as archive:
        warnings.simplefilter("ignore")  # about repeated names
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            archive.writestr(info, data)
    return buffer.getvalue()


def with_entry(data: bytes, number: int, offset: int, new: bytes) -> bytes:
    """Overwrite bytes of an entry in the directory of a zip (APPNOTE 4.3.12), `offset` bytes after its signature."""
    start = -1
    for _ in range(number + 1):
        start = data.index(b"PK\1\2", start + 1)
    return data[: start + offset] + new + data[start + offset + len(new) :]


def with_zip64_offset(data: bytes, number: int, offset: int) -> bytes:
    """Replace the offset of a member, the last value in the extra field of its entry (APPNOTE 4.5.3)."""
    start = -1
    for _ in range(number + 1):
        start = data.index(b"PK\1\2", start + 1)
    end = start + 46 + sum(struct.unpack_from("<HH", data, start + 28))
    return data[: end - 8] + struct.pack("<Q", offset) + data[end:]


def zips() -> Iterator[Case]:
    three = zip_of(("a.png", PNG), ("b.jpg", JPG), ("c.png", PNG))
    bad_member = {name: (OK, f"read {name}", OK) for name in ("corrupt", "unsupported", "too_large")}
    yield Case("whole.zip", three, (OK,) * 3)
    for label, method in (("stored", zipfile.ZIP_STORED), ("bzip2", zipfile.ZIP_BZIP2), ("lzma", zipfile.ZIP_LZMA)):
        yield Case(f"{label}.zip", zip_of(("a.png", PNG), method=method), (OK,))
    yield Case("checksum.zip", with_entry(three, 1, 16, b"\1\2\3\4"), bad_member["corrupt"])
    yield Case("encrypted.zip", with_entry(three, 1, 8, b"\1"), bad_member["unsupported"])
    yield Case("strongly-encrypted.zip", with_entry(three, 1, 8, b"\x41"), bad_member["unsupported"])
    yield Case("method-99.zip", with_entry(three, 1, 10, b"\x63"), bad_member["unsupported"])
    yield Case("offset-nowhere.zip", with_entry(three, 1, 42, b"\xff\xff\xff\x7f"), bad_member["corrupt"])
    yield Case("offset-of-another.zip", with_entry(three, 1, 42, bytes(4)), bad_member["corrupt"])
    yield Case("size-too-small.zip", with_entry(three, 1, 24, b"\x10\0\0\0"), bad_member["corrupt"])
    yield Case("size-too-large.zip", with_entry(three, 1, 24, b"\xff\xff\0\0"), (OK,) * 3)
    yield Case("bomb-that-says-so.zip", with_entry(three, 1, 24, b"\xff\xff\xff\x7f"), bad_member["too_large"])
    zeros = zip_of(("a.png", PNG), ("b.png", bytes(8 << 20)), ("c.png", PNG))
    yield Case("bomb-of-8-mb.zip", zeros, (OK, "decode not_an_image", OK))
    yield Case("bomb-that-lies.zip", with_entry(zeros, 1, 24, b"\xff\0\0\0"), bad_member["corrupt"])
    with mock.patch.object(zipfile, "ZIP64_LIMIT", 100):
        large = zip_of(("a.png", PNG), ("b.jpg", JPG), ("c.png", PNG))
    assert b"PK\6\6" in large, "zip64's end of directory"
    yield Case("zip64.zip", large, (OK,) * 3)
    yield Case("zip64-offset-nowhere.zip", with_zip64_offset(large, 1, 1 << 62), bad_member["corrupt"])
    yield Case("version-later.zip", with_entry(three, 1, 6, b"\xff"), (OK,) * 3)
    yield Case("zip64-extra.zip", with_entry(large, 1, 30, b"\5\0"), ("read corrupt",))
    yield Case("zip64-disks.zip", patched(large, b"PK\6\7", 16, b"\xff\xff"), ("read corrupt",))
    yield Case("program-before.zip", b"#!/bin/sh\n" * 50 + three, (OK,) * 3)
    yield Case("garbage-behind.zip", three + b"garbage" * 99, (OK,) * 3)
    yield Case("cut.zip", three[:-30], ("read corrupt",))
    yield Case("cut-in-front.zip", three[900:], ("read corrupt", OK, OK))
    yield Case("directory-broken.zip", three.replace(b"PK\1\2", b"PK\1\3"), ("read corrupt",))
    yield Case("empty.zip", zip_of(), ())
    yield Case("no-images.zip", zip_of(("readme.txt", b"x"), ("__MACOSX/._a.png", b"x"), ("folder.png/", b"")), ())
    yield Case("no-bytes.zip", b"", ("read empty",))
    yield Case("text.zip", images.text() * 40, ("read corrupt",))
    yield Case("zip-in-a.zip", zip_of(("inner.zip", three), ("a.png", three)), ("decode not_an_image",))
    yield Case("duplicates.zip", zip_of(("a.png", PNG), ("a.png", JPG), ("a.png", b"")), (OK, OK, "decode empty"))
    names = ("/absolute/a.png", "../../outside.png", "a/../../b.png", "C:\\d.png", "e\n.png", ".png")
    yield Case("names.zip", zip_of(*((name, PNG) for name in names)), (OK,) * 6)
    yield Case("name-not-utf8.zip", zip_of(("ü.png", PNG)).replace("ü".encode(), b"\xff\xfe"), ("read corrupt",))
    link = with_entry(three, 1, 38, struct.pack("<I", 0o120777 << 16))
    yield Case("link.zip", link, bad_member["unsupported"])
    yield Case("bad-members.zip", zip_of(("a.png", b""), ("b.png", b"no"), ("c.png", PNG[:99]), ("d.png", PNG)),
               ("decode empty", "decode not_an_image", "decode truncated", OK))  # fmt: skip


def parquet_of(table: pa.Table, **settings: object) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **settings)
    return buffer.getvalue()


def images_table(count: int = 9) -> pa.Table:
    return pa.table({"image": pa.array([plain("png", seed % 3) for seed in range(count)], pa.binary())})


def in_pages(data: bytes, group: int, new: bytes, place: float) -> bytes:
    """Overwrite bytes of a row group's first column. place: 0 is the header of its first page, 1 is its end."""
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(group).column(0)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    first = start + int(place * chunk.total_compressed_size)
    return data[:first] + new + data[first + len(new) :]


STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def parquets() -> Iterator[Case]:
    simple = {"row_group_size": 3, "compression": "zstd", "use_dictionary": False}
    nine = parquet_of(images_table(), **simple)
    corrupt = "cannot be read as Parquet"
    yield Case("whole.parquet", nine, (OK,) * 9)
    nulls = pa.array([PNG, None, b"", b"no", PNG[:99]], pa.binary())
    errors = (OK, "read null", "decode empty", "decode not_an_image", "decode truncated")
    yield Case("nulls.parquet", parquet_of(pa.table({"image": nulls})), errors)
    structs = [{"bytes": PNG, "path": "a"}, None, {"bytes": None, "path": "../b"}, {"bytes": PNG, "path": "a"}]
    yield Case(
        "structs.parquet", parquet_of(pa.table({"image": pa.array(structs, STRUCT)})), (OK, *["read null"] * 2, OK)
    )
    yield Case("no-rows.parquet", parquet_of(images_table(0)), ())
    yield Case("many-nulls.parquet", parquet_of(pa.table({"image": pa.nulls(500, pa.binary())})), ("read null",) * 500)
    yield Case("large-binary.parquet", parquet_of(pa.table({"image": pa.array([PNG], pa.large_binary())})), (OK,))
    named = pa.table({"image": pa.array([{"bytes": PNG, "path": name} for name in ("ä", "ö", "b")], STRUCT)})
    text = parquet_of(named, compression="none", use_dictionary=False, write_statistics=False)
    yield Case("path-not-utf8.parquet", text.replace("ö".encode(), b"\xff\xfe"), (OK,) * 3)
    dates = pa.array([0, -(1 << 60), 1], pa.timestamp("us"))
    yield Case(
        "date-of-no-year.parquet", parquet_of(pa.table({"image": [PNG] * 3, "at": dates})), (OK,) * 3, keep=("at",)
    )
    unnamed = parquet_of(pa.table({"image": [PNG], "ö": [1]}), store_schema=False).replace("ö".encode(), b"\xff\xfe")
    yield Case("column-not-utf8.parquet", unnamed, ("read corrupt",), refused=corrupt)
    wrong = parquet_of(pa.table({"image": [1, 2], "label": [1.5, 2.5]}))
    yield Case("no-image-column.parquet", wrong, ("read unreadable",) * 2, refused="has no column of image bytes")
    two = parquet_of(pa.table({"left": [PNG], "right": [PNG]}))
    yield Case("two-columns.parquet", two, ("read unreadable",), refused="--image-column")
    other = pa.table({"id": [1, 2], "photo": [JPG, PNG]})
    yield Case("other-schema.parquet", parquet_of(other), (OK,) * 2)
    second_lost = (*[OK] * 3, *["read corrupt"] * 3, *[OK] * 3)
    yield Case("page-header.parquet", in_pages(nine, 1, b"\xff" * 40, 0.0), second_lost)
    checked = parquet_of(images_table(), **simple, write_page_checksum=True)
    yield Case("page-checksum.parquet", in_pages(checked, 1, b"\0", 0.5), second_lost)
    for label, data in {
        "footer-magic": nine[:-4] + b"RAP1",
        "footer-length": nine[:-8] + b"\xff\xff\xff\x7fPAR1",
        "footer-bytes": nine[:-60] + b"\xff" * 52 + nine[-8:],
        "encrypted": nine[:-4] + b"PARE",
        "cut": nine[:-500],
        "text": images.text() * 40,
        "head": b"PAR1",
    }.items():
        yield Case(f"{label}.parquet", data, ("read corrupt",), refused=corrupt)
    yield Case("no-bytes.parquet", b"", ("read empty",), refused=corrupt)


def lists() -> Iterator[Case]:
    """Lists of URIs. Their images are in a folder next to them."""
    listed = {"a.png": PNG, "b.jpg": JPG, "cut.png": PNG[:99], "folder/c.png": PNG}

    def case(name: str, data: bytes, rows: tuple[str, ...], **more: Any) -> Case:
        """Each list has its own copies of the images, since the lists of one job may not name the same images."""
        folder = f"listed-{name}"
        files = {f"{folder}/{file}": image for file, image in listed.items()}
        return Case(name, data.replace(b"listed", folder.encode()), rows, files=files, **more)

    missing, unread, cut = "read not_found", "read unreadable", "decode truncated"
    here = "{folder}/listed"
    strange = ["gopher://host/a.png", "s3x://b/a.png", "github://a.png", "https://[::1/a.png", "zip://a::b"]
    unopened = ["listed", "listed/folder/", "listed/a.png/b.png", "x" * 300 + ".png", "listed/a\0.png"]
    for name, lines, rows in [
        ("blanks", ["", "listed/a.png", "   ", "\t", " listed/b.jpg  ", ""], (OK, OK)),
        ("duplicates", ["listed/a.png"] * 3 + ["listed/none.png"] * 2, (OK,) * 3 + (missing,) * 2),
        ("absolute", [f"{here}/a.png", f"file://{here}/b.jpg", f"{here}/cut.png"], (OK, OK, cut)),
        ("dots", ["listed/folder/../a.png", "./listed/./b.jpg"], (OK, OK)),
        ("schemes", strange, (unread,) * 5),
        ("nowhere", ["://a.png", "http://", "s3://", "data:image/png,xx", "C:\\a.png", "#", "~/a.png"], (missing,) * 7),
        ("names", unopened, (unread,) * 5),
    ]:
        yield case(f"{name}.txt", "\n".join(lines).encode(), rows)
    yield case("windows.txt", b"\xef\xbb\xbflisted\\a.png\r\nlisted/a.png\r\n".replace(b"\\", b"/"), (OK, OK))
    yield case("latin-1.txt", b"listed/a.png\nlisted/\xe9.png\n", (OK, missing))
    yield case("blank.txt", b"\n \n\n", (), refused="contains no images")
    table = b"uri,label\nlisted/a.png,1\n,2\nlisted/none.png,\n listed/b.jpg ,4\nlisted/a.png,5\n"
    yield case("nulls.csv", table, (OK, missing, OK, OK), keep=("label",))
    yield case("ragged.csv", b"uri,label\nlisted/a.png,1\nlisted/b.jpg\n", (), refused="cannot be read as a list")
    late = b"uri,label\n" + b"listed/a.png,1\n" * 100_000 + b"listed/b.jpg\n"
    yield case("ragged-late.csv", late, (), refused="cannot be read as a list")
    yield case("numbers.csv", b"a,b\n1,2\n", (), refused="no column looks like image URIs")
    yield case("empty.csv", b"", (), refused="cannot be read as a list")
