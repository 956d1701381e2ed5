"""tar, tar.gz, tgz and tar.zst archives: image members in stored order, sidecar files by their WebDataset key.

Formats: POSIX.1-2001 pax and GNU tar.
"""

import contextlib
import os
import tarfile
import tempfile
from collections.abc import Iterator
from typing import IO, Any, BinaryIO, Self, cast

from pipeline.coverage import Ranges
from pipeline.errors import ReadError
from pipeline.sources.base import (
    MAGIC_BYTES,
    ReadOptions,
    Record,
    ShardEnd,
    Source,
    sidecar_contents,
    starts_as_image,
)
from pipeline.sources.inflate import Inflated, new_gzip, new_zstd
from pipeline.sources.records import (
    MAX_MEMBER_BYTES,
    Groups,
    LeftOutMembers,
    Rows,
    Sidecars,
    is_image_member,
    is_resource_fork,
    kept_texts,
    storage_fault,
    too_large,
)
from pipeline.sources.shard import Shard
from pipeline.storage import access, uris

COMPRESSED = {".gz": new_gzip, ".tgz": new_gzip, ".zst": new_zstd}
MAX_EXTENSION_BYTES = 1 << 16
"""Limit of a long name or pax header. tarfile holds several hundred of them at once, and Python before 3.11.10, 3.12.6
and 3.13.0 searches them in quadratic time (CVE-2024-6232)."""

MAX_SPARSE_PIECES = 10_000
"""Limit of the pieces of a sparse member, which tarfile joins in quadratic time."""

EXTENSION_TYPES = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)
CHUNK_BYTES = 1 << 20
ESTIMATE_BYTES = 16 << 20
"""Bytes to read from the beginning of a tar to estimate its number of rows."""

# tarfile raises the builtin errors for headers with impossible numbers.
BAD_BYTES = (tarfile.TarError, ValueError, OverflowError, IndexError, RecursionError)

Place = tuple[int, int]
"""Offset and size in bytes of a sidecar file."""


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the members from beginning to end and seek over skipped ones. The contract is in `pipeline.sources.base`."""
    rows = Rows(shard, todo)
    fault, left_out = None, LeftOutMembers(options.keep)
    try:
        with access.open_read(shard.uri, shard.etag) as file, contextlib.ExitStack() as stack:
            archive = _open(file, rows.uri, options, stack)
            archive.left_out = left_out
            for member in archive.images():
                if shard.rows is not None and rows.row >= rows.stop:
                    left_out = LeftOutMembers(())  # the others are not known
                    break
                if rows.begin(member.name):
                    yield rows.record(archive.read(member), archive.kept(member, options.keep))
                else:
                    archive.skip(member)
                rows.advance()
            if not archive.has_end_mark:
                left_out.note_missing_end()
    except ReadError as error:
        fault = _with_position(error, rows)
    except OSError as error:
        fault = storage_fault(rows.uri, error)
    yield from rows.finish(fault, left_out.counts)


def bytes_per_image(shard: Shard, max_bytes: int) -> float | None:
    """Stored bytes per image, with header, padding and sidecar files, in about the first `max_bytes` of a shard.

    None if there is no image. Raises OSError.
    """
    images, read_bytes = 0, 0
    with access.open_read(shard.uri, shard.etag) as file, contextlib.ExitStack() as stack:
        archive = _open(file, shard.uri, ReadOptions(), stack)
        with contextlib.suppress(ReadError):
            for member in archive.images():
                images += 1
                assert archive.tar is not None
                read_bytes = file.tell() if archive.size is None else archive.tar.offset
                if read_bytes >= max_bytes:
                    break
                archive.skip(member)
    return read_bytes / images if images else None


def _with_position(fault: ReadError, rows: Rows) -> ReadError:
    """Add the current member and row to the message."""
    position = f", in the middle of member {rows.member}" if rows.member else ""
    return ReadError(fault.error_type, f"{fault.message}{position}: {rows.row} images were read before")


class _Archive:
    """A tar that is read forward. Raises ReadError if it ends early or is broken, and OSError if the storage fails.

    size: in bytes of a seekable file, None for a stream. fault: the error of the compressed stream that was copied to
    `file`. any_suffix: members of any name are images if they begin as one. looked_at: the bytes of the current member
    if they were read for that. group: the number of the current member's sample. left_out: the members that `images`
    passed over. has_end_mark: False after the last member of a tar that ends without a block of zeros.
    """

    def __init__(
        self, file: Any, uri: str, size: int | None, fault: ReadError | None = None, *, any_suffix: bool = False
    ) -> None:
        self.any_suffix = any_suffix
        self.file, self.uri, self.size, self.fault = file, uri, size, fault
        self.tar: tarfile.TarFile | None = None
        self.sidecars: Sidecars[Place] = Sidecars(())
        self.groups = Groups()
        self.group = 0
        self.left_out = LeftOutMembers(())
        self.looked_at: bytes | None = None
        self.has_end_mark = True

    def images(self) -> Iterator[tarfile.TarInfo]:
        """The members that are rows, links and devices included."""
        for member in self.members():
            self.looked_at = None
            if is_image_member(member.name):
                if not member.isdir():
                    yield member
            elif self.any_suffix and self._starts_as_image(member):
                yield member
            elif member.isreg():
                self.left_out.add(member.name)

    def _starts_as_image(self, member: tarfile.TarInfo) -> bool:
        """Look at the first bytes of a member. Keeps an image of a stream, which cannot be read again."""
        is_too_large = self.size is None and member.size > MAX_MEMBER_BYTES
        if not member.isreg() or member.issparse() or is_too_large or is_resource_fork(member.name):
            return False
        if self._is_plain(member):
            self.file.seek(member.offset_data)
            return starts_as_image(self.file.read(min(member.size, MAGIC_BYTES)))
        assert self.tar is not None
        try:
            with cast(IO[bytes], self.tar.extractfile(member)) as file:
                head = file.read(MAGIC_BYTES)
                if is_image := starts_as_image(head):
                    self.looked_at = head + file.read()
                return is_image
        except BAD_BYTES as error:
            raise self._broken(error) from error

    def members(self) -> Iterator[tarfile.TarInfo]:
        while (member := self._next()) is not None:
            self.group = self.groups.add(member.name)
            yield member

    def read(self, member: tarfile.TarInfo) -> bytes | ReadError:
        """The bytes of the current member, or its error. Raises ReadError if the archive ends within the member."""
        if self.looked_at is not None:
            return self.looked_at
        if not member.isreg():
            return ReadError("unsupported", f"{self.uri}: {member.name} is a link or a device, not a file")
        if member.issparse() and self._sparse_end(member) is None:
            return ReadError("corrupt", f"{self.uri}: {member.name} is a sparse file with an invalid map")
        if member.size > MAX_MEMBER_BYTES:
            self.skip(member)
            return too_large(self.uri, member.name, member.size)
        return b"".join(self._chunks(member, CHUNK_BYTES if member.issparse() else member.size))

    def skip(self, member: tarfile.TarInfo) -> None:
        """Skip a member. Raises ReadError if it is truncated, as `read` does, so that rows have the same numbers."""
        if self.looked_at is not None:
            return
        if member.issparse():
            self._skip_sparse(member)
        elif member.isreg():
            for _ in () if self._is_plain(member) else self._chunks(member, CHUNK_BYTES):
                pass

    def _skip_sparse(self, member: tarfile.TarInfo) -> None:
        """Seek over the stored bytes only: the holes between them may have any size."""
        assert self.tar is not None
        end = self._sparse_end(member)
        if end is None:
            return
        if self.size is None:
            assert self.tar.fileobj is not None
            self.tar.fileobj.seek(end)
            available = self.tar.fileobj.tell()
        else:
            available = self.size
        if available < end:
            raise self._broken(tarfile.ReadError())

    def _sparse_end(self, member: tarfile.TarInfo) -> int | None:
        """Offset of the end of a sparse member's stored bytes; None if its map is not ascending or exceeds its size."""
        assert self.tar is not None
        pieces = [(offset, size) for offset, size in cast(Any, member).sparse if size]
        position, stored_end = 0, member.offset_data
        for offset, size in pieces:
            if offset < position or size < 0:
                return None
            position, stored_end = offset + size, stored_end + size
        is_valid = position <= member.size and stored_end <= self.tar.offset and len(pieces) <= MAX_SPARSE_PIECES
        return stored_end if is_valid else None

    def contains(self, member: tarfile.TarInfo) -> bool:
        """True if all bytes of the member are in the file. Always False for a stream."""
        return self.size is not None and member.offset_data + member.size <= self.size

    def kept(self, member: tarfile.TarInfo, keep: tuple[str, ...]) -> dict[str, str]:
        """The values of the current member's sidecars."""

        def read(extension: str) -> bytes | None:
            place = self.sidecars.find(member.name, self.group, extension)
            if place is None:
                return None
            self.file.seek(place[0])
            return cast(bytes, self.file.read(place[1]))

        return kept_texts(keep, read)

    def _next(self) -> tarfile.TarInfo | None:
        try:
            if self.tar is None:
                self.tar = _open_tar(self.file, is_stream=self.size is None)
            member = self.tar.next()
        except BAD_BYTES as error:
            raise self._broken(error) from error
        self.tar.members = []  # type: ignore[attr-defined]  # by default tarfile keeps every member in memory
        if member is None:
            assert self.tar.fileobj is not None
            self.has_end_mark = self.tar.fileobj.tell() > self.tar.offset
            self._check_end(self.tar)
        elif member.size < 0:
            raise self._broken(_GarbageError(f"{member.name} has {member.size} bytes"))
        return member

    def _check_end(self, tar: tarfile.TarFile) -> None:
        """Raise ReadError if anything but zeros follows the end mark: images after it would be lost silently."""
        if self.fault and self.size is not None and tar.offset + tarfile.BLOCKSIZE > self.size:
            raise self.fault
        assert tar.fileobj is not None
        rest = b""
        with contextlib.suppress(ReadError):  # a compressed stream that is cut after the end mark is complete
            while (data := tar.fileobj.read(CHUNK_BYTES)) and not rest:
                rest = data.strip(b"\0")
        if rest:
            reason = "it has a hole, or it is several tars joined end to end"
            raise ReadError("corrupt", f"{self.uri} continues after its end mark at byte {tar.offset}: {reason}")

    def _is_plain(self, member: tarfile.TarInfo) -> bool:
        """True if the member is one piece of a seekable file. Raises ReadError if the piece is truncated."""
        if self.size is None or member.issparse():
            return False
        if not self.contains(member):
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
    """Open a tar, and with `keep` find its sidecar files first.

    That takes two passes, so a compressed or remote shard is copied to a temporary file.
    """
    decompressors = [new for suffix, new in COMPRESSED.items() if uri.lower().endswith(suffix)]
    is_seekable = not decompressors and file.seekable()
    stream = Inflated(file, uri, decompressors[0]) if decompressors else file
    if options.keep and not (is_seekable and uris.is_local(uri)):
        spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        fault = _copy(stream, spool)
        archive = _Archive(spool, uri, spool.tell(), fault, any_suffix=options.any_suffix)
    else:
        size = file.seek(0, os.SEEK_END) if is_seekable else None
        archive = _Archive(stream, uri, size, any_suffix=options.any_suffix)
    if options.keep:
        archive.sidecars = _find_sidecars(archive, options.keep)
    if archive.size is not None:
        archive.file.seek(0)
    return archive


def _copy(stream: BinaryIO | Inflated, target: IO[bytes]) -> ReadError | None:
    """Copy a stream; return the error that ended it early."""
    try:
        while data := stream.read(CHUNK_BYTES):
            target.write(data)
    except ReadError as fault:
        return fault
    return None


def _find_sidecars(archive: _Archive, keep: tuple[str, ...]) -> Sidecars[Place]:
    sidecars: Sidecars[Place] = Sidecars(keep)
    archive.file.seek(0)
    with contextlib.suppress(ReadError):  # the second pass raises it again
        first_pass = _Archive(archive.file, archive.uri, archive.size, archive.fault)
        for member in first_pass.members():
            if member.isreg() and not member.issparse() and archive.contains(member):
                sidecars.add(member.name, first_pass.group, (member.offset_data, member.size))
    return sidecars


def _open_tar(file: Any, *, is_stream: bool) -> tarfile.TarFile:
    """Names are decoded with errors="replace", since Arrow needs valid UTF-8."""
    if is_stream:
        return tarfile.open(fileobj=file, mode="r|", tarinfo=_Header, errors="replace", bufsize=CHUNK_BYTES)
    return tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, errors="replace")


class _GarbageError(tarfile.ReadError):
    """The bytes are no tar header: the archive is corrupt, not truncated."""


class _Header(tarfile.TarInfo):
    """Raises an error for garbage and truncated headers, which tarfile takes for the end of the archive."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            header = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) in (0, tarfile.BLOCKSIZE) and not any(buf):
                raise  # the end of the archive
            is_whole = len(buf) == tarfile.BLOCKSIZE
            raise (_GarbageError if is_whole else tarfile.ReadError)(str(error)) from error
        if header.size < 0 or (header.type in EXTENSION_TYPES and header.size > MAX_EXTENSION_BYTES):
            raise _GarbageError(f"a header says {header.size} bytes")
        return header


def _estimate_rows(shard: Shard, options: ReadOptions) -> float | None:
    bytes_each = bytes_per_image(shard, ESTIMATE_BYTES)
    return shard.size_bytes / bytes_each if bytes_each else None


SOURCE = Source(
    "tar",
    (".tar", ".tar.gz", ".tgz", ".tar.zst"),
    read,
    sidecar_contents,
    estimate_rows=_estimate_rows,
)
