"""The interface of a store, and what all stores share: limits, errors, checks and a seekable file."""

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

from pipeline.storage.uris import redact

BUFFER_BYTES = 8 << 20
CONNECT_SECONDS = 5
STALL_SECONDS = 10.0
REQUEST_SECONDS = 600
MAX_OBJECT_BYTES = 1 << 30
"""Limit of an object that is read into memory as a whole: a list of URIs may name objects of any size."""


HIDDEN = re.compile(r"/\.(?!\.?(?:/|$))[^/]*/?")


class Changed(OSError):
    """The object was replaced after it was planned: its etag differs."""


class TooLarge(OSError):
    """The object is larger than MAX_OBJECT_BYTES."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object of a store. etag: changes whenever the bytes change; "" if the store gives none."""

    uri: str
    size_bytes: int
    etag: str


class Unread(ObjectInfo):
    """A name in a list that is not read: `Hidden` or `BrokenLink`."""

    __slots__ = ()


class Hidden(Unread):
    """A name that begins with a dot. That of a folder ends in a slash, and stands for all that is below."""

    __slots__ = ()


class BrokenLink(Unread):
    """A symbolic link whose target does not exist."""

    __slots__ = ()


class Store(Protocol):
    """One kind of storage. `path` is an absolute path, a key in a bucket, or a whole URI: see `access`.

    See the functions of the same names in `access`.
    """

    def head(self, path: str) -> ObjectInfo: ...
    def read(self, path: str, etag: str) -> bytes: ...
    def open_read(self, path: str, etag: str) -> BinaryIO: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> None: ...
    def delete(self, path: str) -> None: ...
    def list_objects(self, path: str, *, with_unread: bool = False) -> Iterator[ObjectInfo]: ...


def visible(objects: Iterable[ObjectInfo], start: int, *, with_unread: bool) -> Iterator[ObjectInfo]:
    """The objects without hidden names behind the character `start` of their URIs. `.` and `..` are not hidden.

    with_unread: yield each hidden file and each outermost hidden folder too, as Hidden.
    """
    last = ""
    for info in objects:
        name = HIDDEN.search(info.uri, start) if "/." in info.uri else None
        if name is None:
            yield info
        elif with_unread and last != (last := info.uri[: name.end()]):
            yield Hidden(last, 0, "")


def check_etag(info: ObjectInfo, etag: str) -> ObjectInfo:
    """Return `info`, or raise Changed if its etag is another one. An empty `etag` matches every object."""
    # Some servers (rclone) quote an etag in the header of an object and not in a list.
    if etag and info.etag.strip('"') != etag.strip('"'):
        raise Changed(f"{redact(info.uri)} was replaced after it was planned")
    return info


def check_size(uri: str, size_bytes: int) -> None:
    """Raise TooLarge if an object of this size must not be read into memory as a whole."""
    if size_bytes > MAX_OBJECT_BYTES:
        raise TooLarge(f"{redact(uri)} has {size_bytes} bytes, the limit is {MAX_OBJECT_BYTES}")


def check_length(data: Any, size_bytes: int) -> Any:
    """Return `data`, or raise OSError if it is not `size_bytes` long."""
    if len(data) != size_bytes:
        raise OSError(f"the response was cut short: {len(data)} of {size_bytes} bytes arrived")
    return data


class RawReader(io.RawIOBase):
    """An object of known size as a raw Python file, for io.BufferedReader and tarfile.

    read_range: (start, stop) → exactly these bytes. It has no position, so that it can be retried.
    """

    def __init__(self, read_range: Callable[[int, int], Any], size_bytes: int) -> None:
        self.read_range, self.size_bytes = read_range, size_bytes
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self.position + len(buffer), self.size_bytes)
        if stop <= self.position:
            return 0
        data = memoryview(self.read_range(self.position, stop))
        buffer[: len(data)] = data
        self.position = stop
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(BUFFER_BYTES) or b"", b""))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"position {base + offset} is before the beginning of the file")
        self.position = base + offset
        return self.position

    def tell(self) -> int:
        return self.position
