"""tar, tar.gz, tgz and tar.zst, as WebDataset has them: image members in stored order, sidecars by their key."""

import contextlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, Self, cast

from pipeline import storage
from pipeline.coverage import Ranges
from pipeline.errors import ReadError
from pipeline.plan import Shard
from pipeline.sources.base import ReadOptions, Record, ShardEnd
from pipeline.sources.inflate import Inflated, new_gzip, new_zstd
from pipeline.sources.records import (
    MAX_MEMBER_BYTES,
    Rows,
    is_image_member,
    kept_texts,
    split_key,
    storage_fault,
    too_large,
)

COMPRESSED = {".gz": new_gzip, ".tgz": new_gzip, ".zst": new_zstd}
MAX_EXTENSION_BYTES = 1 << 16
"""Of a long name or PAX header. tarfile holds several hundred of them at once, and Python before 3.11.10, 3.12.6 and
3.13.0 searches them in quadratic time (CVE-2024-6232)."""
MAX_SPARSE_PIECES = 10_000  # tarfile joins them in quadratic time
EXTENSION_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
CHUNK_BYTES = 1 << 20
# Beside its own errors, tarfile lets these through where a header's numbers make no sense.
BAD_BYTES = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError)

Sidecars = dict[tuple[str, str], tuple[int, int]]
"""(key, extension) → offset and size in bytes."""


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the members from front to back, skipped ones by a seek. The contract is in `pipeline.sources.base`."""
    rows = Rows(shard, todo)
    fault = None
    try:
        with storage.open_read(shard.uri, shard.etag) as file, contextlib.ExitStack() as stack:
            archive = _open(file, rows.uri, options, stack)
            for member in archive.images():
                if shard.rows is not None and rows.row >= rows.stop:
                    break
                if rows.begin(member.name):
                    yield rows.record(archive.read(member), archive.kept(member, options.keep))
                else:
                    archive.skip(member)
                rows.advance()
    except ReadError as error:
        fault = _explained(error, rows)
    except OSError as error:
        fault = storage_fault(rows.uri, error)
    yield from rows.finish(fault)


def bytes_per_image(shard: Shard, most_bytes: int) -> float | None:
    """Stored bytes of an image with its header, padding and sidecars, over about the first `most_bytes` of a shard.

    None where there is no image to be found. Raises OSError.
    """
    images, taken = 0, 0
    with storage.open_read(shard.uri, shard.etag) as file, contextlib.ExitStack() as stack:
        archive = _open(file, shard.uri, ReadOptions(), stack)
        with contextlib.suppress(ReadError):
            for member in archive.images():
                images += 1
                assert archive.tar is not None
                taken = file.tell() if archive.size is None else archive.tar.offset
                if taken >= most_bytes:
                    break
                archive.skip(member)
    return taken / images if images else None


def _explained(fault: ReadError, rows: Rows) -> ReadError:
    where = f", in the middle of member {rows.member}" if rows.member else ""
    return ReadError(fault.error_type, f"{fault.message}{where}: {rows.row} images were read before")


class _Archive:
    """A tar, read forward. Raises ReadError where it breaks off and OSError where the storage fails.

    size: of a seekable file in bytes, None of a stream. fault: what ended the compressed stream that the file is from.
    """

    def __init__(self, file: Any, uri: str, size: int | None, fault: ReadError | None = None) -> None:
        self.file, self.uri, self.size, self.fault = file, uri, size, fault
        self.tar: tarfile.TarFile | None = None
        self.sidecars: Sidecars = {}

    def images(self) -> Iterator[tarfile.TarInfo]:
        return (member for member in self.members() if is_image_member(member.name) and not member.isdir())

    def members(self) -> Iterator[tarfile.TarInfo]:
        while (member := self._next()) is not None:
            yield member

    def read(self, member: tarfile.TarInfo) -> bytes | ReadError:
        if not member.isreg():
            return ReadError("unsupported", f"{self.uri}: {member.name} is a link or a device, not a file")
        if member.issparse() and self._sparse_end(member) is None:
            return ReadError("corrupt", f"{self.uri}: {member.name} is a sparse file whose map makes no sense")
        if member.size > MAX_MEMBER_BYTES:
            self.skip(member)
            return too_large(self.uri, member.name, member.size)
        return b"".join(self._chunks(member, CHUNK_BYTES if member.issparse() else member.size))

    def skip(self, member: tarfile.TarInfo) -> None:
        """Pass over an image; one that is cut must be noticed here as in `read`, for rows to have the same numbers."""
        if member.issparse():
            self._skip_sparse(member)
        elif member.isreg():
            for _ in () if self._is_plain(member) else self._chunks(member, CHUNK_BYTES):
                pass

    def _skip_sparse(self, member: tarfile.TarInfo) -> None:
        """Pass over what is stored: the holes between may be any number of bytes."""
        assert self.tar is not None
        end = self._sparse_end(member)
        if end is None:
            return
        if self.size is None:
            assert self.tar.fileobj is not None
            self.tar.fileobj.seek(end)
            held = self.tar.fileobj.tell()
        else:
            held = self.size
        if held < end:
            raise self._broken(tarfile.ReadError())

    def _sparse_end(self, member: tarfile.TarInfo) -> int | None:
        """Where a sparse member's stored bytes end; None if its map does not run forward inside them and its size."""
        assert self.tar is not None
        pieces = [(offset, size) for offset, size in cast(Any, member).sparse if size]
        place, stored_end = 0, member.offset_data
        for offset, size in pieces:
            if offset < place or size < 0:
                return None
            place, stored_end = offset + size, stored_end + size
        is_sound = place <= member.size and stored_end <= self.tar.offset and len(pieces) <= MAX_SPARSE_PIECES
        return stored_end if is_sound else None

    def holds(self, member: tarfile.TarInfo) -> bool:
        """True if a member of a seekable file is all there."""
        return self.size is not None and member.offset_data + member.size <= self.size

    def kept(self, member: tarfile.TarInfo, keep: tuple[str, ...]) -> dict[str, str]:
        return kept_texts(member.name, keep, self._sidecar)

    def _sidecar(self, key: str, extension: str) -> bytes | None:
        offset, size = self.sidecars.get((key, extension), (0, None))
        if size is None:
            return None
        self.file.seek(offset)
        return cast(bytes, self.file.read(size))

    def _next(self) -> tarfile.TarInfo | None:
        try:
            if self.tar is None:
                self.tar = _open_tar(self.file, is_stream=self.size is None)
            member = self.tar.next()
        except BAD_BYTES as error:
            raise self._broken(error) from error
        self.tar.members = []  # type: ignore[attr-defined]  # else tarfile remembers every one
        if member is None:
            self._check_end(self.tar)
        elif member.size < 0:
            raise self._broken(_GarbageError(f"{member.name} has {member.size} bytes"))
        return member

    def _check_end(self, tar: tarfile.TarFile) -> None:
        """Only zeros may follow the zeros that end a tar; else a hole or a second tar would hide images."""
        if self.fault and self.size is not None and tar.offset + tarfile.BLOCKSIZE > self.size:
            raise self.fault
        assert tar.fileobj is not None
        rest = b""
        with contextlib.suppress(ReadError):  # a compressed stream that is cut behind the end has lost nothing
            while (data := tar.fileobj.read(CHUNK_BYTES)) and not rest:
                rest = data.strip(b"\0")
        if rest:
            what = "has a hole, or is several tars joined end to end"
            raise ReadError("corrupt", f"{self.uri} goes on after its end mark at byte {tar.offset}: it {what}")

    def _is_plain(self, member: tarfile.TarInfo) -> bool:
        """True where the member's bytes lie in one piece in a seekable file; raises ReadError if not all of them."""
        if self.size is None or member.issparse():
            return False
        if not self.holds(member):
            raise self._broken(tarfile.ReadError())
        return True

    def _chunks(self, member: tarfile.TarInfo, chunk_bytes: int) -> Iterator[bytes]:
        if self._is_plain(member):
            self.file.seek(member.offset_data)
            yield self.file.read(member.size)
            return
        assert self.tar is not None
        try:
            with cast(IO[bytes], self.tar.extractfile(member)) as file:
                while data := file.read(chunk_bytes):
                    yield data
        except BAD_BYTES as error:
            raise self._broken(error) from error

    def _broken(self, error: Exception) -> ReadError:
        if self.fault:
            return self.fault
        if self.size == 0:
            return ReadError("empty", f"{self.uri} has no bytes")
        if self.tar is None:
            return ReadError("corrupt", f"{self.uri} is not a tar archive ({error})")
        if isinstance(error, tarfile.ReadError) and not isinstance(error, _GarbageError):
            return ReadError("truncated", f"{self.uri} ends early")
        return ReadError("corrupt", f"{self.uri} is broken ({error})")


def _open(file: BinaryIO, uri: str, options: ReadOptions, stack: contextlib.ExitStack) -> _Archive:
    """With `keep` the sidecars are found first: a shard that cannot be read twice is copied to a temporary file."""
    decompressors = [new for suffix, new in COMPRESSED.items() if uri.lower().endswith(suffix)]
    is_seekable = not decompressors and file.seekable()
    stream = Inflated(file, uri, decompressors[0]) if decompressors else file
    if options.keep and not (is_seekable and storage.is_local(uri)):
        spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        fault = _copy(stream, spool)
        archive = _Archive(spool, uri, spool.tell(), fault)
    else:
        archive = _Archive(stream, uri, file.seek(0, os.SEEK_END) if is_seekable else None)
    if options.keep:
        archive.sidecars = _find_sidecars(archive, options.keep)
    if archive.size is not None:
        archive.file.seek(0)
    return archive


def _copy(stream: BinaryIO | Inflated, target: IO[bytes]) -> ReadError | None:
    try:
        while data := stream.read(CHUNK_BYTES):
            target.write(data)
    except ReadError as fault:
        return fault
    return None


def _find_sidecars(archive: _Archive, keep: tuple[str, ...]) -> Sidecars:
    extensions = {name.lower() for name in keep}
    found = {}
    archive.file.seek(0)
    with contextlib.suppress(ReadError):  # the second pass meets it again
        for member in _Archive(archive.file, archive.uri, archive.size, archive.fault).members():
            key, extension = split_key(member.name)
            if extension in extensions and member.isreg() and not member.issparse() and archive.holds(member):
                found[key, extension] = (member.offset_data, member.size)
    return found


def _open_tar(file: Any, *, is_stream: bool) -> tarfile.TarFile:
    """errors: a name that is not UTF-8 must still be valid text in Arrow."""
    if is_stream:
        return tarfile.open(fileobj=file, mode="r|", tarinfo=_Header, errors="replace", bufsize=CHUNK_BYTES)
    return tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, errors="replace")


class _GarbageError(tarfile.ReadError):
    pass


class _Header(tarfile.TarInfo):
    """A header that does not end an archive quietly: tarfile takes garbage and cut headers for the end of it."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) in (0, tarfile.BLOCKSIZE) and not any(buf):
                raise  # the end
            is_whole = len(buf) == tarfile.BLOCKSIZE
            raise (_GarbageError if is_whole else tarfile.ReadError)(str(error)) from error
        if header.size < 0 or (header.type in EXTENSION_TYPES and header.size > MAX_EXTENSION_BYTES):
            raise _GarbageError(f"a header of {header.size} bytes")
        return header
