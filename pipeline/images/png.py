"""Copies of a PNG without some of its chunks.

Chunks with more text or a larger ICC profile than Pillow unpacks can be left out, since the pixels are intact.
"""

import zlib
from collections.abc import Iterator

SIGNATURE_BYTES = 8
TEXT_CHUNKS = (b"zTXt", b"iTXt", b"tEXt", b"iCCP")
MAX_KEPT_TEXT = 1 << 16
"""Bytes of a chunk that is kept, packed and unpacked: enough for EXIF in text."""
MAX_KEPT_CHUNKS = 64
EMPTY_IDAT = b"\0\0\0\0IDAT\x35\xaf\x06\x1e"


def is_text_too_large(error: Exception) -> bool:
    """True for Pillow's errors about MAX_TEXT_CHUNK and MAX_TEXT_MEMORY."""
    reason = str(error)
    return isinstance(error, ValueError) and ("MAX_TEXT_CHUNK" in reason or "MAX_TEXT_MEMORY" in reason)


def without_large_text(data: bytes) -> bytes:
    """Copy a PNG without the chunks of text that are large when they are unpacked."""
    pieces, kept = [data[:SIGNATURE_BYTES]], 0
    for kind, chunk in _chunks(data):
        if kind in TEXT_CHUNKS:
            if kept == MAX_KEPT_CHUNKS or not _is_small(kind, chunk[8:-4]):
                continue
            kept += 1
        pieces.append(chunk)
    return b"".join(pieces)


def without_pixels(data: bytes) -> bytes:
    """Copy the metadata of a PNG, also those after the pixels, for a header that Pillow opens and cannot load."""
    chunks = [chunk for kind, chunk in _chunks(data) if kind not in (b"IDAT", b"IEND")]
    return b"".join([data[:SIGNATURE_BYTES], *chunks, EMPTY_IDAT])


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (type, whole chunk): length, type, content, checksum (PNG, 5.3). The last one may be cut off."""
    start = SIGNATURE_BYTES
    while start < len(data):
        size = int.from_bytes(data[start : start + 4], "big") + 12
        yield data[start + 4 : start + 8], data[start : start + size]
        start += size


def _is_small(kind: bytes, content: bytes) -> bool:
    """True if the content is small, packed and unpacked."""
    if len(content) > MAX_KEPT_TEXT:
        return False
    try:
        return len(zlib.decompressobj().decompress(_packed(kind, content), MAX_KEPT_TEXT + 1)) <= MAX_KEPT_TEXT
    except zlib.error:  # damaged, which Pillow ignores
        return True


def _packed(kind: bytes, content: bytes) -> bytes:
    """The zlib stream of a chunk (PNG, 11.3.2.3 and 11.3.3), b"" if it has none."""
    _, _, rest = content.partition(b"\0")
    if kind in (b"zTXt", b"iCCP"):
        return rest[1:]
    return rest[2:].split(b"\0", 2)[-1] if kind == b"iTXt" and rest.startswith(b"\1") else b""
