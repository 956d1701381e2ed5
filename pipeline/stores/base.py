"""What every kind of storage has in common."""

import io
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, Protocol

BUFFER_BYTES = 8 << 20
CONNECT_SECONDS = 5
STALL_SECONDS = 10.0
REQUEST_SECONDS = 600
MAX_OBJECT_BYTES = 1 << 30
"""What is read whole lies in memory. A list of URIs, or a web server, may name anything."""


class Changed(OSError):
    """The object is no longer the one that was planned: its etag differs."""


class TooLarge(OSError):
    """More than MAX_OBJECT_BYTES."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """etag: changes whenever the bytes do; "" where the store gives none."""

    uri: str
    size_bytes: int
    etag: str


_SECRET_QUERY = re.compile(
    r"\?(?:[^?]*&)?(?:x-amz-|x-goog-|sig=|signature=|token=|key=|secret=|password=)", re.IGNORECASE
)


def redact(uri: str) -> str:
    """The URI without what may be secret: user, password, query string.

    Of a bucket's object only what looks like a credential goes: there "?" and "#" are letters as any other, and
    `container@account` is an address.
    """
    scheme, _, rest = uri.partition("://")
    if not rest:
        return uri
    authority, slash, path = rest.partition("/")
    user, at, host = authority.rpartition("@")
    if scheme in ("http", "https"):
        authority, path = host.partition("?")[0], re.split(r"[?#]", path, maxsplit=1)[0]
    else:
        authority = host if ":" in user else user + at + host
        if secret := _SECRET_QUERY.search(path):
            path = path[: secret.start()]
    return f"{scheme}://{authority}{slash}{path}"


def escaped(name: str) -> str:
    r"""The name as text: bytes of a file's name that are not UTF-8 as `\xe9`. The file is not to be opened by that."""
    try:
        name.encode()
        return name
    except UnicodeEncodeError:
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


class Store(Protocol):
    def head(self, path: str) -> ObjectInfo: ...
    def read(self, path: str, etag: str) -> bytes: ...
    def open_read(self, path: str, etag: str) -> BinaryIO: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> None: ...
    def delete(self, path: str) -> None: ...
    def list_objects(self, path: str) -> Iterator[ObjectInfo]: ...


def check(info: ObjectInfo, etag: str) -> ObjectInfo:
    """Some servers (rclone) give an etag in quotes with the object, and without them in a list."""
    if etag and info.etag.strip('"') != etag.strip('"'):
        raise Changed(f"{redact(info.uri)} was replaced after it was planned")
    return info


def check_size(uri: str, size_bytes: int) -> None:
    """Raise TooLarge for what is not to be read whole."""
    if size_bytes > MAX_OBJECT_BYTES:
        raise TooLarge(f"{redact(uri)} has {size_bytes} bytes, the limit is {MAX_OBJECT_BYTES}")


def whole(data: Any, size_bytes: int) -> Any:
    if len(data) != size_bytes:
        raise OSError(f"the answer was cut short: {len(data)} of {size_bytes} bytes came")
    return data


class RawReader(io.RawIOBase):
    """An object of known size as a raw Python file, so that io.BufferedReader and tarfile take it.

    read_range: (start, stop) → exactly these bytes; it keeps no place, so that it can be tried again.
    """

    def __init__(self, read_range: Callable[[int, int], Any], size_bytes: int) -> None:
        self.read_range, self.size_bytes = read_range, size_bytes
        self.place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        stop = min(self.place + len(buffer), self.size_bytes)
        if stop <= self.place:
            return 0
        data = memoryview(self.read_range(self.place, stop))
        buffer[: len(data)] = data
        self.place = stop
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self.read(BUFFER_BYTES) or b"", b""))

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size_bytes}[whence]
        if base + offset < 0:
            raise ValueError(f"a place before the beginning of the file: {base + offset}")
        self.place = base + offset
        return self.place

    def tell(self) -> int:
        return self.place
