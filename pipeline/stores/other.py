"""Everything else (http, https, memory, hf, …), over fsspec."""

import contextlib
import functools
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, TypeVar, cast

import fsspec
import fsspec.asyn

from pipeline.stores.base import (
    BUFFER_BYTES,
    CONNECT_SECONDS,
    REQUEST_SECONDS,
    STALL_SECONDS,
    ObjectInfo,
    RawReader,
    check,
    check_size,
    whole,
)
from pipeline.stores.retry import retried

HTTP_RETRY_SECONDS = 10.0
STAMPS = ("ETag", "etag", "mtime", "created", "Content-MD5", "Digest")
"""What may stand for an etag, the best first."""
FRESH_SECONDS = 60.0
"""A web page that says it was modified just now is made anew for each request."""

T = TypeVar("T")


class FsspecStore:
    """Paths are whole URIs here. Creation is not atomic: fsspec has no such promise."""

    def __init__(self, scheme: str) -> None:
        self.limit_seconds: float | None = None
        options: dict[str, Any] = {}
        self.is_http = scheme in ("http", "https")
        if self.is_http:
            import aiohttp

            timeouts = {"total": REQUEST_SECONDS, "sock_connect": CONNECT_SECONDS, "sock_read": STALL_SECONDS}
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(**timeouts)}}
            # One dead web server among a million image URLs must not hold up its neighbours for minutes. A shard is
            # many images: `open_read` has the patience that there is with every store.
            self.limit_seconds = HTTP_RETRY_SECONDS
        self.filesystem = fsspec.filesystem(scheme, **options)

    def head(self, path: str) -> ObjectInfo:
        return self._head(path, self.limit_seconds)

    def read(self, path: str, etag: str) -> bytes:
        if etag:
            check(self.head(path), etag)
        if self.is_http:
            return self.retried(lambda: cast(bytes, fsspec.asyn.sync(self.filesystem.loop, self._body, path)))
        return cast(bytes, self.retried(lambda: self.filesystem.cat_file(path)))

    async def _body(self, url: str) -> bytes:
        """What a web server sends, unless it does not stop: nobody has said before how much that will be."""
        session = await self.filesystem.set_session()
        async with session.get(url) as answer:
            self.filesystem._raise_not_found_for_status(answer, url)
            body = bytearray()
            async for piece in answer.content.iter_any():
                body += piece
                check_size(url, len(body))
            return bytes(body)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        check(self._head(path, None), etag)

        def reopen() -> Any:
            # It reads ahead beyond what is asked for.
            return self._told(lambda: self.filesystem.open(path, "rb", block_size=BUFFER_BYTES // 8))

        file = retried(reopen)
        if getattr(file, "size", None) is None:
            file.close()
            return retried(lambda: self._copied(path))

        def read_range(start: int, stop: int) -> Any:
            def get() -> Any:
                nonlocal file
                if file is None:
                    file = reopen()
                opened, file = file, None
                opened.seek(start)
                data = whole(opened.read(stop - start), stop - start)
                file = opened
                return data

            return retried(get)

        return cast(BinaryIO, io.BufferedReader(RawReader(read_range, file.size), BUFFER_BYTES))

    def _copied(self, path: str) -> BinaryIO:
        """On this machine's disk: what is sent without a size cannot be read, nor taken up again, from the middle."""
        with contextlib.ExitStack() as stack:
            copy = stack.enter_context(tempfile.TemporaryFile(prefix="nightshift-"))
            with self._told(lambda: self.filesystem.open(path, "rb")) as file:
                shutil.copyfileobj(file, copy, BUFFER_BYTES)
            stack.pop_all()
        copy.seek(0)
        return cast(BinaryIO, copy)

    def write(self, path: str, data: bytes) -> None:
        self.retried(lambda: self.filesystem.makedirs(self.filesystem._parent(path), exist_ok=True))
        self.retried(lambda: self.filesystem.pipe_file(path, data))

    def create(self, path: str, data: bytes) -> None:
        if self.retried(lambda: self.filesystem.exists(path)):
            raise FileExistsError(path)
        self.write(path, data)

    def delete(self, path: str) -> None:
        self.retried(lambda: self.filesystem.rm_file(path))

    def list_objects(self, path: str) -> Iterator[ObjectInfo]:
        found = self.retried(lambda: self.filesystem.find(path, detail=True))
        base = str(self.filesystem._strip_protocol(path))
        for name in sorted(found):
            if "/." not in name[len(base) :]:
                yield self._info(path + name[len(base) :], found[name])

    def retried(self, action: Callable[[], T]) -> T:
        return retried(action, self.limit_seconds)

    def _head(self, path: str, limit_seconds: float | None) -> ObjectInfo:
        return self._info(path, retried(lambda: self._told(lambda: self.filesystem.info(path)), limit_seconds))

    def _told(self, action: Callable[[], T]) -> T:
        """Whatever kept fsspec from asking a web server for a size, it says that nothing is there."""
        try:
            return action()
        except FileNotFoundError as error:
            raise (error.__cause__ if self.is_http and error.__cause__ else error) from None

    def _info(self, uri: str, info: dict[str, Any]) -> ObjectInfo:
        size_bytes = info.get("size") or 0
        stamp = next((info[name] for name in STAMPS if info.get(name)), "")
        stamp = stamp.timestamp() if isinstance(stamp, datetime) else stamp  # one store may spell a time in two ways
        return ObjectInfo(uri, size_bytes, str(stamp or _date(info, size_bytes)))


def _date(info: dict[str, Any], size_bytes: int) -> str:
    """When a web server says that an object was modified, with its size; "" where that means nothing."""
    try:
        modified = parsedate_to_datetime(info.get("Last-Modified", ""))
    except ValueError:
        return ""
    return f"{modified.timestamp()}/{size_bytes}" if time.time() - modified.timestamp() > FRESH_SECONDS else ""


@functools.cache
def fsspec_store(scheme: str) -> FsspecStore:
    try:
        return FsspecStore(scheme)
    except (ValueError, TypeError, ImportError) as error:
        raise OSError(f"{scheme}:// is not a kind of storage that can be opened here: {error}") from error
