"""All other stores (http, https, memory, hf, …), through fsspec."""

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

from pipeline.storage.base import (
    BUFFER_BYTES,
    CONNECT_SECONDS,
    REQUEST_SECONDS,
    STALL_SECONDS,
    ObjectInfo,
    RawReader,
    check_etag,
    check_length,
    check_size,
)
from pipeline.storage.retry import with_retries

HTTP_RETRY_SECONDS = 10.0
VERSION_FIELDS = ("ETag", "etag", "mtime", "created", "Content-MD5", "Digest")
"""Fields of fsspec's `info` that serve as the etag, the best one first."""

FRESH_SECONDS = 60.0
"""A Last-Modified that is younger is ignored: the server probably generates the page for each request."""

T = TypeVar("T")


class FsspecStore:
    """Paths are whole URIs. `create` is not atomic, since fsspec has no conditional write."""

    def __init__(self, scheme: str) -> None:
        self.limit_seconds: float | None = None
        options: dict[str, Any] = {}
        self.is_http = scheme in ("http", "https")
        if self.is_http:
            import aiohttp

            timeouts = {"total": REQUEST_SECONDS, "sock_connect": CONNECT_SECONDS, "sock_read": STALL_SECONDS}
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(**timeouts)}}
            # One dead web server among a million image URLs must not delay the other images for minutes. A shard holds
            # many images, so `open_read` retries as long as on every other store.
            self.limit_seconds = HTTP_RETRY_SECONDS
        self.filesystem = fsspec.filesystem(scheme, **options)

    def head(self, path: str) -> ObjectInfo:
        return self._head(path, self.limit_seconds)

    def read(self, path: str, etag: str) -> bytes:
        if etag:
            check_etag(self.head(path), etag)
        if self.is_http:
            return self._with_retries(lambda: cast(bytes, fsspec.asyn.sync(self.filesystem.loop, self._body, path)))
        return cast(bytes, self._with_retries(lambda: self.filesystem.cat_file(path)))

    async def _body(self, url: str) -> bytes:
        """Body of a response. Raises TooLarge on the way, since a web server may send any number of bytes."""
        session = await self.filesystem.set_session()
        async with session.get(url) as response:
            self.filesystem._raise_not_found_for_status(response, url)
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                check_size(url, len(body))
            return bytes(body)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        check_etag(self._head(path, None), etag)

        def reopen() -> Any:
            # The block size is small because fsspec reads ahead of each request.
            return self._with_cause(lambda: self.filesystem.open(path, "rb", block_size=BUFFER_BYTES // 8))

        file = with_retries(reopen)
        if getattr(file, "size", None) is None:
            file.close()
            return with_retries(lambda: self._copy_to_disk(path))

        def read_range(start: int, stop: int) -> Any:
            def get() -> Any:
                nonlocal file
                if file is None:
                    file = reopen()
                opened, file = file, None
                opened.seek(start)
                data = check_length(opened.read(stop - start), stop - start)
                file = opened
                return data

            return with_retries(get)

        return cast(BinaryIO, io.BufferedReader(RawReader(read_range, file.size), BUFFER_BYTES))

    def _copy_to_disk(self, path: str) -> BinaryIO:
        """Copy an object to a temporary file: a response without a length cannot be read from the middle or resumed."""
        with contextlib.ExitStack() as stack:
            copy = stack.enter_context(tempfile.TemporaryFile(prefix="nightshift-"))
            with self._with_cause(lambda: self.filesystem.open(path, "rb")) as file:
                shutil.copyfileobj(file, copy, BUFFER_BYTES)
            stack.pop_all()
        copy.seek(0)
        return cast(BinaryIO, copy)

    def write(self, path: str, data: bytes) -> None:
        self._with_retries(lambda: self.filesystem.makedirs(self.filesystem._parent(path), exist_ok=True))
        self._with_retries(lambda: self.filesystem.pipe_file(path, data))

    def create(self, path: str, data: bytes) -> None:
        if self._with_retries(lambda: self.filesystem.exists(path)):
            raise FileExistsError(path)
        self.write(path, data)

    def delete(self, path: str) -> None:
        self._with_retries(lambda: self.filesystem.rm_file(path))

    def list_objects(self, path: str) -> Iterator[ObjectInfo]:
        infos = self._with_retries(lambda: self.filesystem.find(path, detail=True))
        base = str(self.filesystem._strip_protocol(path))
        for name in sorted(infos):
            if "/." not in name[len(base) :]:
                yield self._info(path + name[len(base) :], infos[name])

    def _with_retries(self, action: Callable[[], T]) -> T:
        return with_retries(action, self.limit_seconds)

    def _head(self, path: str, limit_seconds: float | None) -> ObjectInfo:
        def get_info() -> dict[str, Any]:
            return cast(dict[str, Any], self._with_cause(lambda: self.filesystem.info(path)))

        return self._info(path, with_retries(get_info, limit_seconds))

    def _with_cause(self, action: Callable[[], T]) -> T:
        """fsspec reports every failed request for a size as FileNotFoundError; raise its cause."""
        try:
            return action()
        except FileNotFoundError as error:
            raise (error.__cause__ if self.is_http and error.__cause__ else error) from None

    def _info(self, uri: str, info: dict[str, Any]) -> ObjectInfo:
        size_bytes = info.get("size") or 0
        version = next((info[name] for name in VERSION_FIELDS if info.get(name)), "")
        if isinstance(version, datetime):  # a store may give the same time in two time zones
            version = version.timestamp()
        return ObjectInfo(uri, size_bytes, str(version or _date(info, size_bytes)))


def _date(info: dict[str, Any], size_bytes: int) -> str:
    """Last-Modified of a web server's object with its size, as an etag; "" if the server gives none or a fresh one."""
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
        raise OSError(f"{scheme}:// is not a supported kind of storage: {error}") from error
