"""Everything else (http, https, memory, hf, …), over fsspec."""

import functools
import io
from collections.abc import Callable, Iterator
from datetime import datetime
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
    whole,
)
from pipeline.stores.retry import retried

HTTP_RETRY_SECONDS = 10.0
MAX_BODY_BYTES = 1 << 30

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
            # One dead web server among a million image URLs must not hold up its neighbours for minutes.
            self.limit_seconds = HTTP_RETRY_SECONDS
        self.filesystem = fsspec.filesystem(scheme, **options)

    def head(self, path: str) -> ObjectInfo:
        return self._info(path, self.retried(lambda: self.filesystem.info(path)))

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
                if len(body) > MAX_BODY_BYTES:
                    raise ValueError(f"the server sends more than {MAX_BODY_BYTES} bytes")
            return bytes(body)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        check(self.head(path), etag)

        def reopen() -> Any:
            return self.filesystem.open(path, "rb", block_size=BUFFER_BYTES // 8)  # read ahead beyond what is asked for

        file = self.retried(reopen)
        if getattr(file, "size", None) is None:  # a stream: it cannot be taken up again in the middle
            return cast(BinaryIO, file)

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

            return self.retried(get)

        return cast(BinaryIO, io.BufferedReader(RawReader(read_range, file.size), BUFFER_BYTES))

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

    def _info(self, uri: str, info: dict[str, Any]) -> ObjectInfo:
        etag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or ""
        etag = etag.timestamp() if isinstance(etag, datetime) else etag  # one store may spell a time in two ways
        return ObjectInfo(uri, info.get("size") or 0, str(etag))


@functools.cache
def fsspec_store(scheme: str) -> FsspecStore:
    try:
        return FsspecStore(scheme)
    except (ValueError, TypeError, ImportError) as error:
        raise OSError(f"{scheme}:// is not a kind of storage that can be opened here: {error}") from error
