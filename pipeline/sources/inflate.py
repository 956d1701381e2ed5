"""gzip and zstd decompression in bounded memory that returns every intact byte before it raises."""

import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

from pipeline.errors import ReadError

INPUT_BYTES = 8 << 10
"""Compressed bytes per call. zstd inflates by a factor of up to 32,768, so at most 256 MiB are held at once."""


class Inflated:
    """The decompressed bytes of a file of one or more gzip members or zstd frames.

    The standard readers drop their buffer if the stream is broken, or take a truncated stream for its end. This one
    first returns all bytes that it has decompressed; then each call raises ReadError "truncated" or "corrupt".
    """

    def __init__(self, file: BinaryIO, uri: str, new_decompressor: Callable[[], Any]) -> None:
        self.file, self.uri, self.new_decompressor = file, uri, new_decompressor
        self.decompressor: Any = None  # None between two members or frames
        self.compressed = b""
        self.pending = memoryview(b"")
        self.fault: ReadError | None = None

    def read(self, size: int) -> bytes:
        """Read at least one and at most `size` bytes; b"" at the end."""
        while not self.pending:
            chunk = self._inflate()
            if chunk is None:
                return b""
            self.pending = memoryview(chunk)
        data = bytes(self.pending[:size])
        self.pending = self.pending[size:]
        return data

    def _inflate(self) -> bytes | None:
        """Decompress the next INPUT_BYTES; None at the end, b"" if they give no output."""
        if self.fault:
            raise self.fault
        self.compressed = self.compressed or self.file.read(INPUT_BYTES)
        if self.decompressor is None:
            if not self.compressed:
                return None
            self.compressed = self.compressed.lstrip(b"\0")  # gzip files may be padded with zeros
            if not self.compressed:
                return b""
            self.decompressor = self.new_decompressor()
        if not self.compressed:
            self.fault = ReadError("truncated", f"{self.uri}: the compressed data ends early")
            raise self.fault
        return self._feed()

    def _feed(self) -> bytes:
        try:
            chunk: bytes = self.decompressor.decompress(self.compressed)
        except (zlib.error, zstandard.ZstdError) as error:
            self.fault = ReadError("corrupt", f"{self.uri}: the compressed data is broken: {error}")
            raise self.fault from error
        self.compressed = b""
        if self.decompressor.eof:
            self.compressed, self.decompressor = self.decompressor.unused_data, None
        return chunk


def new_gzip() -> Any:
    """Decompressor of one gzip member (RFC 1952)."""
    return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)


def new_zstd() -> Any:
    """Decompressor of one zstd frame (RFC 8878)."""
    return zstandard.ZstdDecompressor().decompressobj()
