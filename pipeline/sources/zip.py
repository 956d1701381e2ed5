"""zip archives: image members in the order of the central directory (PKWARE APPNOTE, section 4.3)."""

import lzma
import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from typing import BinaryIO

from pipeline.coverage import Ranges
from pipeline.errors import ReadError
from pipeline.sources.base import ReadOptions, Record, ShardEnd, Source, sidecar_contents
from pipeline.sources.records import (
    MAX_MEMBER_BYTES,
    Rows,
    is_image_member,
    kept_texts,
    split_key,
    storage_fault,
    too_large,
)
from pipeline.sources.shard import Shard
from pipeline.storage import access

BAD_BYTES = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, struct.error, ValueError, IndexError)
"""Exceptions that zipfile raises for broken bytes."""

# A member that needs a newer zip version than Python supports is one error row. By default it is an error of the zip.
zipfile.MAX_EXTRACT_VERSION = 255  # type: ignore[misc]

Sidecars = dict[tuple[str, str], zipfile.ZipInfo]


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the members one by one, by their offsets. The contract is in `pipeline.sources.base`."""
    rows = Rows(shard, todo)
    fault = None
    try:
        with access.open_read(shard.uri, shard.etag) as file, _directory(file, rows.uri) as archive:
            members = archive.infolist()
            images = [info for info in members if is_image_member(info.filename)]
            sidecars = _sidecars(members) if options.keep else {}
            rows.total = len(images)
            for info in images:
                if rows.row >= rows.stop:
                    break
                if rows.begin(info.filename):
                    kept = _kept(archive, sidecars, info.filename, options.keep, rows.uri)
                    yield rows.record(_read_member(archive, info, rows.uri), kept)
                rows.advance()
    except ReadError as error:
        fault = error
    except OSError as error:
        fault = storage_fault(rows.uri, error)
    yield from rows.finish(fault)


def _directory(file: BinaryIO, uri: str) -> zipfile.ZipFile:
    """Read the central directory. Raises ReadError."""
    if not file.seek(0, os.SEEK_END):
        raise ReadError("empty", f"{uri} has no bytes")
    try:
        return zipfile.ZipFile(file)
    except BAD_BYTES as error:
        raise ReadError("corrupt", f"{uri} is not a zip archive, or its directory is broken: {error}") from error
    except NotImplementedError as error:
        raise ReadError("unsupported", f"{uri}: {error}") from error


def _sidecars(members: list[zipfile.ZipInfo]) -> Sidecars:
    return {split_key(info.filename): info for info in members if not is_image_member(info.filename)}


def _kept(archive: zipfile.ZipFile, sidecars: Sidecars, member: str, keep: tuple[str, ...], uri: str) -> dict[str, str]:
    def find(key: str, extension: str) -> bytes | None:
        info = sidecars.get((key, extension))
        data = _read_member(archive, info, uri) if info else None
        return data if isinstance(data, bytes) else None

    return kept_texts(member, keep, find)


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, uri: str) -> bytes | ReadError:
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
        return ReadError("corrupt", f"{name}: {error or type(error).__name__}")
    except RuntimeError as error:  # encrypted; NotImplementedError is a RuntimeError: an unknown compression
        return ReadError("unsupported", f"{name}: {error}")
    except OSError as error:
        if info.compress_type == zipfile.ZIP_BZIP2:  # bz2 raises OSError for bad data
            return ReadError("corrupt", f"{name}: {error}")
        raise


def _count(shard: Shard, options: ReadOptions) -> float | None:
    """Number of rows, from the central directory."""
    return next((item.rows for item in read(shard, (), options) if isinstance(item, ShardEnd)), None)


SOURCE = Source("zip", (".zip",), read, sidecar_contents, estimate_rows=_count)
