"""All other stores (http, https, memory, hf, …), through fsspec."""

import contextlib
import functools
import io
import os
import queue
import shutil
import tempfile
import threading
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
    visible,
)
from pipeline.storage.retry import with_retries
from pipeline.storage.uris import check_scheme

SHORT_RETRY_SECONDS = 10.0
VERSION_FIELDS = ("ETag", "etag", "mtime", "created", "Content-MD5", "Digest", "modify", "sha")
"""Fields of fsspec's `info` that serve as the etag, the best one first."""

FRESH_SECONDS = 60.0
"""A Last-Modified that is younger is ignored: the server probably generates the page for each request."""

MAX_CONNECTIONS = 4
"""Connections to one server for small objects. Many FTP servers accept only a few from one address."""

T = TypeVar("T")


class Connections:
    """File systems of fsspec that have one connection each, such as those of FTP. Threads use them in turn."""

    def __init__(self, new: Callable[[], Any]) -> None:
        self.new = new
        self._idle: queue.LifoQueue[Any] = queue.LifoQueue()
        for _ in range(MAX_CONNECTIONS):
            self._idle.put(None)

    @contextlib.contextmanager
    def borrow(self) -> Iterator[Any]:
        """Wait for a file system. After an error it is replaced, since its connection may be broken."""
        filesystem = self._idle.get()
        try:
            filesystem = filesystem or self.new()
            yield filesystem
        except FileNotFoundError:
            raise
        except BaseException:
            filesystem = None
            raise
        finally:
            self._idle.put(filesystem)


class FsspecStore:
    """Paths are whole URIs. `create` is not atomic, since fsspec has no conditional write."""

    def __init__(self, scheme: str, given: dict[str, Any]) -> None:
        """given: arguments of the file system that its URIs contain, such as host, user and password."""
        self.has_host, self.has_answered = "host" in given, False
        options: dict[str, Any] = dict(given)
        self.is_http = scheme in ("http", "https")
        if self.is_http:
            import aiohttp

            timeouts = {"total": REQUEST_SECONDS, "sock_connect": CONNECT_SECONDS, "sock_read": STALL_SECONDS}
            options = {"client_kwargs": {"timeout": aiohttp.ClientTimeout(**timeouts)}}
        kind = fsspec.get_filesystem_class(scheme)
        self._connections: Connections | None = None
        if not kind.async_impl and (given or not kind.cachable):
            self._connections = Connections(lambda: kind(**options, skip_instance_cache=True))
            self._shared: Any = kind
        else:
            self._shared = fsspec.filesystem(scheme, **options)

    @property
    def image_seconds(self) -> float | None:
        """Seconds to retry the read of a loose image, None for the usual ones.

        One dead server among those of a million URLs must not delay the other images for minutes. A shard holds many
        images, so `open_read` retries as long as on every other store. So does a server that has answered before.
        """
        return SHORT_RETRY_SECONDS if self.is_http or (self.has_host and not self.has_answered) else None

    def _call(self, action: Callable[[Any], T]) -> T:
        """Call `action` with a file system that no other thread uses at the moment, or that all threads may share.

        fsspec reports every failed request as FileNotFoundError over http and ftp; this raises its cause.
        """
        with self._connections.borrow() if self._connections else contextlib.nullcontext(self._shared) as filesystem:
            try:
                result = action(filesystem)
                self.has_answered = True
                return result
            except FileNotFoundError as error:
                has_cause = (self.is_http or self._connections) and isinstance(error.__cause__, Exception)
                raise (error.__cause__ if has_cause and error.__cause__ else error) from None

    def _path(self, uri: str) -> str:
        """The path by which the file system knows an object; some accept no URIs."""
        return str(self._shared._strip_protocol(uri)) if self._connections else uri

    def head(self, path: str) -> ObjectInfo:
        return self._head(path, self.image_seconds)

    def read(self, path: str, etag: str) -> bytes:
        if etag:
            check_etag(self.head(path), etag)
        if self.is_http:
            return self._read(lambda _: cast(bytes, fsspec.asyn.sync(self._shared.loop, self._body, path)))
        return self._read(lambda filesystem: cast(bytes, filesystem.cat_file(self._path(path))))

    def _read(self, action: Callable[[Any], bytes]) -> bytes:
        return with_retries(lambda: self._call(action), self.image_seconds)

    async def _body(self, url: str) -> bytes:
        """Body of a response. Raises TooLarge on the way, since a web server may send any number of bytes."""
        session = await self._shared.set_session()
        async with session.get(url) as response:
            self._shared._raise_not_found_for_status(response, url)
            body = bytearray()
            async for chunk in response.content.iter_any():
                body += chunk
                check_size(url, len(body))
            return bytes(body)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        check_etag(self._head(path, None), etag)
        file = with_retries(lambda: self._open(path))
        if getattr(file, "size", None) is None:
            file.close()
            return with_retries(lambda: self._copy_to_disk(path))
        return cast(BinaryIO, io.BufferedReader(RawReader(_Ranges(self, path, file).read, file.size), BUFFER_BYTES))

    def _open(self, path: str) -> Any:
        """Open a file. It has a connection of its own where connections cannot be shared."""
        # The block size is small because fsspec reads ahead of each request.
        return self._open_file(path, BUFFER_BYTES // 8)

    def _open_file(self, path: str, block_size: int | None) -> Any:
        options: dict[str, Any] = {} if block_size is None else {"block_size": block_size}
        if self.is_http and block_size:
            options["cache_type"] = "none"  # a reader asks for the bytes that it needs

        def open_with(filesystem: Any) -> Any:
            return filesystem.open(self._path(path), "rb", **options)

        return open_with(self._connections.new()) if self._connections else self._call(open_with)

    def _copy_to_disk(self, path: str, size_bytes: int | None = None) -> BinaryIO:
        """Copy an object to a temporary file: a response without a length cannot be read from the middle or resumed."""
        with contextlib.ExitStack() as stack:
            copy = stack.enter_context(tempfile.TemporaryFile(prefix="nightshift-"))
            # A block size of 0 is fsspec's name for one request from beginning to end.
            with self._open_file(path, 0 if self.is_http else None) as file:
                shutil.copyfileobj(file, copy, BUFFER_BYTES)
            if size_bytes not in (None, copy.tell()):
                raise OSError(f"the response was cut short: {copy.tell()} of {size_bytes} bytes arrived")
            stack.pop_all()
        copy.seek(0)
        return cast(BinaryIO, copy)

    def write(self, path: str, data: bytes) -> None:
        self._with_retries(lambda filesystem: filesystem.makedirs(filesystem._parent(self._path(path)), exist_ok=True))
        self._with_retries(lambda filesystem: filesystem.pipe_file(self._path(path), data))

    def create(self, path: str, data: bytes) -> None:
        if self._with_retries(lambda filesystem: filesystem.exists(self._path(path))):
            raise FileExistsError(path)
        self.write(path, data)

    def delete(self, path: str) -> None:
        self._with_retries(lambda filesystem: filesystem.rm_file(self._path(path)))

    def list_objects(self, path: str, *, with_unread: bool = False) -> Iterator[ObjectInfo]:
        infos = self._with_retries(lambda filesystem: filesystem.find(self._path(path), detail=True))
        base = str(self._shared._strip_protocol(path)).rstrip("/")
        listed = (self._info(path + name[len(base) :], infos[name]) for name in sorted(infos))
        yield from visible(listed, len(path), with_unread=with_unread)

    def _with_retries(self, action: Callable[[Any], T]) -> T:
        return with_retries(lambda: self._call(action), SHORT_RETRY_SECONDS if self.is_http else None)

    def _head(self, path: str, limit_seconds: float | None) -> ObjectInfo:
        info = with_retries(lambda: self._call(lambda filesystem: filesystem.info(self._path(path))), limit_seconds)
        return self._info(path, cast(dict[str, Any], info))

    def _info(self, uri: str, info: dict[str, Any]) -> ObjectInfo:
        size_bytes = info.get("size") or 0
        version = next((info[name] for name in VERSION_FIELDS if info.get(name)), "")
        if isinstance(version, datetime):  # a store may give the same time in two time zones
            version = version.timestamp()
        return ObjectInfo(uri, size_bytes, str(version or _date(info, size_bytes)))


class _Ranges:
    """Ranges of an open file. After a failed request it is opened again; without ranges it is copied to disk.

    Each of several threads has a file of its own.
    """

    def __init__(self, store: FsspecStore, path: str, file: Any) -> None:
        self.store, self.path, self.size_bytes = store, path, file.size
        self.idle: list[Any] = [file]
        self.copy: BinaryIO | None = None
        self.lock = threading.Lock()

    def read(self, start: int, stop: int) -> Any:
        """The bytes from `start` to `stop`, with retries."""
        return with_retries(lambda: self._read(start, stop))

    def _read(self, start: int, stop: int) -> Any:
        if self.copy is None:
            try:
                return self._from_server(start, stop)
            except ValueError as error:
                if "range requests" not in str(error):
                    raise
            with self.lock:  # one copy, also for several threads
                self.copy = self.copy or self.store._copy_to_disk(self.path, self.size_bytes)
        return check_length(os.pread(self.copy.fileno(), stop - start, start), stop - start)

    def _from_server(self, start: int, stop: int) -> Any:
        try:
            file = self.idle.pop()
        except IndexError:
            file = self.store._open(self.path)
        file.seek(start)
        data = check_length(file.read(stop - start), stop - start)
        self.idle.append(file)
        return data


def _date(info: dict[str, Any], size_bytes: int) -> str:
    """Last-Modified of a web server's object with its size, as an etag; "" if the server gives none or a fresh one."""
    try:
        modified = parsedate_to_datetime(info.get("Last-Modified", ""))
    except ValueError:
        return ""
    return f"{modified.timestamp()}/{size_bytes}" if time.time() - modified.timestamp() > FRESH_SECONDS else ""


def store_of(uri: str) -> FsspecStore:
    """The store of a URI. Raises OSError for an unknown scheme."""
    scheme = uri.partition("://")[0]
    if problem := check_scheme(scheme):
        raise OSError(f"{scheme}:// {problem}")
    try:
        given = {} if scheme in ("http", "https") else fsspec.get_filesystem_class(scheme)._get_kwargs_from_urls(uri)
        return fsspec_store(scheme, tuple(sorted(given.items())))
    except (ValueError, TypeError, ImportError) as error:
        raise OSError(f"{scheme}:// is not a supported kind of storage: {error}") from error


@functools.cache
def fsspec_store(scheme: str, given: tuple[tuple[str, Any], ...] = ()) -> FsspecStore:
    return FsspecStore(scheme, dict(given))
