"""zip archives: image members in the order of the central directory (PKWARE APPNOTE, section 4.3)."""

import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

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
from pipeline.sources.records import (
    MAX_MEMBER_BYTES,
    Groups,
    LeftOutMembers,
    Rows,
    Sidecars,
    WatchedFile,
    is_image_member,
    is_resource_fork,
    kept_texts,
    storage_fault,
    too_large,
)
from pipeline.sources.shard import Shard
from pipeline.storage import access

BAD_BYTES = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, ValueError, IndexError)
"""Exceptions that zipfile raises for broken bytes."""

FIRST_ENTRY, END_OF_DIRECTORY = b"PK\3\4", b"PK\5\6"
MAX_END_BYTES = 22 + 0xFFFF
"""Size of the end of a directory with the longest comment."""

# A member that needs a newer zip version than Python supports is one error row. By default it is an error of the zip.
zipfile.MAX_EXTRACT_VERSION = 255  # type: ignore[misc]


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the members one by one, by their offsets. The contract is in `pipeline.sources.base`."""
    rows = Rows(shard, todo)
    fault, left_out = None, LeftOutMembers(options.keep)
    try:
        with (
            access.open_read(shard.uri, shard.etag) as opened,
            _directory(file := WatchedFile(opened), rows.uri) as archive,
        ):
            members = archive.infolist()
            _check_start(archive, file, members, rows.uri)
            images = []
            for info in members:
                if _is_row(archive, file, info, options):
                    images.append(info)
                elif not _is_folder(info):
                    left_out.add(info.filename)
            groups = _groups(members) if options.keep else {}
            sidecars = _sidecars(members, groups, options.keep)
            rows.total = len(images)
            if shard.rows is not None and shard.rows < len(images):
                left_out = LeftOutMembers(())  # --limit: the others are not known
            for info in images:
                if rows.row >= rows.stop:
                    break
                if rows.begin(info.filename):
                    kept = _kept(archive, file, sidecars, info, groups, options.keep, rows.uri)
                    yield rows.record(_read_member(archive, file, info, rows.uri), kept)
                rows.advance()
    except ReadError as error:
        fault = error
    except OSError as error:
        fault = storage_fault(rows.uri, error)
    yield from rows.finish(fault, left_out.counts)


def _directory(file: WatchedFile, uri: str) -> zipfile.ZipFile:
    """Read the central directory. Raises ReadError, and OSError if the storage fails."""
    if not file.seek(0, os.SEEK_END):
        raise ReadError("empty", f"{uri} has no bytes")
    try:
        return zipfile.ZipFile(cast(BinaryIO, file))
    except BAD_BYTES as error:
        file.check()
        raise ReadError("corrupt", f"{uri} is not a zip archive, or its directory is broken: {error}") from error
    except NotImplementedError as error:
        raise ReadError("unsupported", f"{uri}: {error}") from error


def _check_start(archive: zipfile.ZipFile, file: WatchedFile, members: list[zipfile.ZipInfo], uri: str) -> None:
    """Raise ReadError if another zip is before this one. Only the directory of the last one is read.

    Other bytes before it are the program of a self-extracting archive.
    """
    start = min((info.header_offset for info in members), default=archive.start_dir)
    if start <= 0:
        return
    file.seek(0)
    if file.read(len(FIRST_ENTRY)) != FIRST_ENTRY:
        return
    file.seek(max(0, start - MAX_END_BYTES))
    if END_OF_DIRECTORY in file.read(min(start, MAX_END_BYTES)):
        raise ReadError("corrupt", f"{uri} is several zips joined end to end: another one ends at byte {start}")


def _is_row(archive: zipfile.ZipFile, file: WatchedFile, info: zipfile.ZipInfo, options: ReadOptions) -> bool:
    """True for an image by its name, and with `any_suffix` by its first bytes. Raises OSError if the storage fails."""
    if is_image_member(info.filename):
        return True
    is_link = stat.S_ISLNK(info.external_attr >> 16)
    if not options.any_suffix or _is_folder(info) or is_link or is_resource_fork(info.filename):
        return False
    try:
        with archive.open(info) as member:
            return starts_as_image(member.read(MAGIC_BYTES))
    except (*BAD_BYTES, RuntimeError):  # no image that could be read
        file.check()
        return False
    except OSError:
        file.check()
        if info.compress_type == zipfile.ZIP_BZIP2:  # bz2 raises OSError for bad data
            return False
        raise


def _is_folder(info: zipfile.ZipInfo) -> bool:
    """Like `info.is_dir()`, which raises IndexError for a member without a name in Python 3.11."""
    return info.filename.endswith("/")


def _groups(members: list[zipfile.ZipInfo]) -> dict[int, int]:
    """The number of each member's sample, by the offset of the member."""
    groups = Groups()
    return {info.header_offset: groups.add(info.filename) for info in members}


def _sidecars(
    members: list[zipfile.ZipInfo], groups: dict[int, int], keep: tuple[str, ...]
) -> Sidecars[zipfile.ZipInfo]:
    sidecars: Sidecars[zipfile.ZipInfo] = Sidecars(keep)
    for info in members if keep else ():
        if not is_image_member(info.filename):
            sidecars.add(info.filename, groups[info.header_offset], info)
    return sidecars


def _kept(
    archive: zipfile.ZipFile,
    file: WatchedFile,
    sidecars: Sidecars[zipfile.ZipInfo],
    image: zipfile.ZipInfo,
    groups: dict[int, int],
    keep: tuple[str, ...],
    uri: str,
) -> dict[str, str]:
    def read(extension: str) -> bytes | None:
        info = sidecars.find(image.filename, groups[image.header_offset], extension)
        data = _read_member(archive, file, info, uri) if info else None
        return data if isinstance(data, bytes) else None

    return kept_texts(keep, read)


def _read_member(archive: zipfile.ZipFile, file: WatchedFile, info: zipfile.ZipInfo, uri: str) -> bytes | ReadError:
    """Read a member and check its CRC. Raises OSError only if the storage fails."""
    name = f"{uri}: {info.filename}"
    if info.file_size > MAX_MEMBER_BYTES:
        return too_large(uri, info.filename, info.file_size)
    if stat.S_ISLNK(info.external_attr >> 16):
        return ReadError("unsupported", f"{name} is a link; links are not followed")
    if not 0 <= info.header_offset < archive.start_dir:
        return ReadError("corrupt", f"{name}: its offset in the archive is {info.header_offset}")
    try:
        with archive.open(info) as member:
            return member.read(info.file_size)  # at most the size in the directory
    except BAD_BYTES as error:
        file.check()
        return ReadError("corrupt", f"{name}: {error or type(error).__name__}")
    except RuntimeError as error:  # encrypted; NotImplementedError is a RuntimeError: an unknown compression
        return ReadError("unsupported", f"{name}: {error}")
    except OSError as error:
        if info.compress_type == zipfile.ZIP_BZIP2 and not file.fault:  # bz2 raises OSError for bad data
            return ReadError("corrupt", f"{name}: {error}")
        raise


def _count(shard: Shard, options: ReadOptions) -> float | None:
    """Number of rows, from the central directory."""
    return next((item.rows for item in read(shard, (), options) if isinstance(item, ShardEnd)), None)


SOURCE = Source("zip", (".zip",), read, sidecar_contents, estimate_rows=_count)
