"""gzip and zstd streams, read forward in bounded memory, that give all there is before they complain."""

import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

from pipeline.errors import ReadError

INPUT_BYTES = 8 << 10  # zstd inflates by up to 32,768: 256 MiB at worst are held at once


class Inflated:
    """The inflated bytes of a compressed file, of one or many gzip members or zstd frames.

    The standard readers lose what they hold when the stream breaks, or take a cut stream for its end; here all that was
    inflated before comes out, then ReadError "truncated" or "corrupt" is raised, at each further call.
    """

    def __init__(self, file: BinaryIO, uri: str, new_decompressor: Callable[[], Any]) -> None:
        self.file, self.uri, self.new_decompressor = file, uri, new_decompressor
        self.decompressor: Any = None  # None between two frames
        self.compressed = b""
        self.pending = memoryview(b"")
        self.fault: ReadError | None = None

    def read(self, size: int) -> bytes:
        """At most `size` bytes, at least one, b"" at the end."""
        while not self.pending:
            piece = self._inflate()
            if piece is None:
                return b""
            self.pending = memoryview(piece)
        data = bytes(self.pending[:size])
        self.pending = self.pending[size:]
        return data

    def _inflate(self) -> bytes | None:
        """What the next few compressed bytes hold, None at the end."""
        if self.fault:
            raise self.fault
        self.compressed = self.compressed or self.file.read(INPUT_BYTES)
        if self.decompressor is None:
            if not self.compressed:
                return None
            self.compressed = self.compressed.lstrip(b"\0")  # padding, as gzip allows
            if not self.compressed:
                return b""
            self.decompressor = self.new_decompressor()
        if not self.compressed:
            self.fault = ReadError("truncated", f"{self.uri}: its compressed data ends early")
            raise self.fault
        return self._feed()

    def _feed(self) -> bytes:
        try:
            piece: bytes = self.decompressor.decompress(self.compressed)
        except (zlib.error, zstandard.ZstdError) as error:
            self.fault = ReadError("corrupt", f"{self.uri}: its compressed data is broken: {error}")
            raise self.fault from error
        self.compressed = b""
        if self.decompressor.eof:
            self.compressed, self.decompressor = self.decompressor.unused_data, None
        return piece


def new_gzip() -> Any:
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def new_zstd() -> Any:
    return zstandard.ZstdDecompressor().decompressobj()
