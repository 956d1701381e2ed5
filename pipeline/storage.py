"""URI → bytes, and back. Every read and write of the project goes through here.

A URI is an absolute local path ("/data/a.jpg"), or `scheme://…`. s3, gs and az go through obstore, plain paths through
the operating system, everything else (http, https, memory, hf, …) through fsspec.

Errors are the builtin ones on every store: FileNotFoundError, PermissionError, FileExistsError, `Changed`, and OSError
for whatever could not be done after all retries.
"""

import contextlib
import functools
import io
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, Protocol, TypeVar, cast
from urllib.parse import urlsplit, urlunsplit

import fsspec
import fsspec.utils
import obstore
import obstore.exceptions
from obstore.store import from_url

OBSTORE_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "azure", "adl")
RETRY_LIMIT_SECONDS = 120.0
BUFFER_BYTES = 8 << 20

T = TypeVar("T")


class Changed(OSError):
    """The object is no longer the one that was planned: its etag differs."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """etag: changes whenever the bytes do; "" where the store gives none."""

    uri: str
    size_bytes: int
    etag: str


def normalize(uri: str) -> str:
    """The one spelling of a URI: an absolute path for local files, no trailing slash, s3a as s3."""
    scheme, _, rest = uri.partition("://")
    if not rest:
        return os.path.abspath(os.path.expanduser(uri))
    if scheme == "file":
        return os.path.abspath("/" + rest.lstrip("/"))
    return f"{'s3' if scheme == 's3a' else scheme}://{rest.rstrip('/')}"


def join(base: str, name: str) -> str:
    return f"{base.rstrip('/')}/{name}" if base else name


def is_local(uri: str) -> bool:
    return "://" not in uri


def redact(uri: str) -> str:
    """The URI without what may be secret: user, password, query string."""
    if is_local(uri):
        return uri
    parts = urlsplit(uri)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def head(uri: str) -> ObjectInfo:
    store, path = _locate(uri)
    return store.head(path)


def read(uri: str, etag: str = "") -> bytes:
    """The whole object. With an etag, `Changed` if the object is not that one any more."""
    store, path = _locate(uri)
    return store.read(path, etag)


def open_read(uri: str, etag: str = "") -> BinaryIO:
    """A seekable, buffered binary file."""
    store, path = _locate(uri)
    return store.open_read(path, etag)


def write(uri: str, data: bytes) -> None:
    """Write the whole object atomically: readers see the old one or the new one, never a part."""
    store, path = _locate(uri)
    store.write(path, data)


def create(uri: str, data: bytes) -> None:
    """Write the object atomically unless there is one; then FileExistsError."""
    store, path = _locate(uri)
    store.create(path, data)


def delete(uri: str) -> None:
    """Remove the object; nothing happens where there is none."""
    store, path = _locate(uri)
    with contextlib.suppress(FileNotFoundError):
        store.delete(path)


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    """Every object below a folder or prefix, sorted by URI, as a stream. Hidden names (`.x`) are left out."""
    store, path = _locate(uri)
    return store.list_objects(path)


def list_glob(pattern: str) -> Iterator[ObjectInfo]:
    """The objects that match a glob (`*`, `?`, `[…]` inside a folder, `**` across), sorted by URI."""
    regex = fsspec.utils.re.compile(fsspec.utils.glob_translate(pattern))
    fixed = pattern[: min(pattern.find(c) for c in "*?[" if c in pattern)]
    return (info for info in list_objects(fixed.rpartition("/")[0]) if regex.match(info.uri))


def is_glob(uri: str) -> bool:
    return any(c in uri for c in "*?[") and not (is_local(uri) and os.path.exists(uri))


class _Store(Protocol):
    def head(self, path: str) -> ObjectInfo: ...
    def read(self, path: str, etag: str) -> bytes: ...
    def open_read(self, path: str, etag: str) -> BinaryIO: ...
    def write(self, path: str, data: bytes) -> None: ...
    def create(self, path: str, data: bytes) -> None: ...
    def delete(self, path: str) -> None: ...
    def list_objects(self, path: str) -> Iterator[ObjectInfo]: ...


def _locate(uri: str) -> tuple[_Store, str]:
    scheme, _, rest = uri.partition("://")
    if not rest:
        return _LOCAL, uri
    if scheme in OBSTORE_SCHEMES:
        bucket, _, path = rest.partition("/")
        return _object_store(f"{scheme}://{bucket}"), path
    return _fsspec_store(scheme), uri


def _check(info: ObjectInfo, etag: str) -> ObjectInfo:
    if etag and info.etag != etag:
        raise Changed(f"{redact(info.uri)} was replaced after it was planned")
    return info


# Local files


class _LocalStore:
    def head(self, path: str) -> ObjectInfo:
        return self._info(path, os.stat(path))

    def read(self, path: str, etag: str) -> bytes:
        with self.open_read(path, etag) as file:
            return file.read()

    def open_read(self, path: str, etag: str) -> BinaryIO:
        file = open(path, "rb")  # noqa: SIM115  the caller closes it
        try:
            _check(self._info(path, os.fstat(file.fileno())), etag)
        except BaseException:
            file.close()
            raise
        return file

    def write(self, path: str, data: bytes) -> None:
        temporary = self._temporary(path, data)
        try:
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        self._sync_folder(path)

    def create(self, path: str, data: bytes) -> None:
        temporary = self._temporary(path, data)
        try:
            os.link(temporary, path)  # unlike rename, fails where the name is taken
        finally:
            os.unlink(temporary)
        self._sync_folder(path)

    def delete(self, path: str) -> None:
        os.unlink(path)

    def list_objects(self, path: str) -> Iterator[ObjectInfo]:
        yield from self._walk(path, frozenset())

    def _walk(self, folder: str, parents: frozenset[str]) -> Iterator[ObjectInfo]:
        real = os.path.realpath(folder)
        if real in parents:  # a link to a folder above
            return
        with os.scandir(folder) as entries:
            # A folder sorts as its name with a slash, so that whole paths come out in order, as object stores list.
            names = sorted(e.name + "/" * e.is_dir() for e in entries if not e.name.startswith("."))
        for name in names:
            path = f"{folder.rstrip('/')}/{name}"
            if name.endswith("/"):
                yield from self._walk(path[:-1], parents | {real})
            else:
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile, or a dangling link
                    yield self.head(path)

    @staticmethod
    def _info(path: str, stat: os.stat_result) -> ObjectInfo:
        return ObjectInfo(path, stat.st_size, f"{stat.st_mtime_ns:x}-{stat.st_size:x}")

    @staticmethod
    def _temporary(path: str, data: bytes) -> str:
        folder, name = os.path.split(path)
        os.makedirs(folder, exist_ok=True)
        temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        return temporary

    @staticmethod
    def _sync_folder(path: str) -> None:
        descriptor = os.open(os.path.dirname(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Object stores


class _ObjectStore:
    def __init__(self, root: str) -> None:
        self.root = root
        self.store = _open_bucket(root)

    def head(self, path: str) -> ObjectInfo:
        return self._info(_retried(lambda: obstore.head(self.store, path)))

    def read(self, path: str, etag: str) -> bytes:
        def get() -> bytes:
            result = obstore.get(self.store, path)
            _check(self._info(result.meta), etag)
            return bytes(result.bytes())

        return _retried(get)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        _check(self.head(path), etag)
        reader = obstore.open_reader(self.store, path, buffer_size=BUFFER_BYTES)
        return cast(BinaryIO, io.BufferedReader(_RawReader(reader), BUFFER_BYTES))

    def write(self, path: str, data: bytes) -> None:
        _retried(lambda: obstore.put(self.store, path, data))

    def create(self, path: str, data: bytes) -> None:
        _retried(lambda: obstore.put(self.store, path, data, mode="create", use_multipart=False))

    def delete(self, path: str) -> None:
        _retried(lambda: obstore.delete(self.store, path))

    def list_objects(self, path: str) -> Iterator[ObjectInfo]:
        chunks = iter(obstore.list(self.store, f"{path}/" if path else None, chunk_size=1000))
        while chunk := _retried(lambda: next(chunks, None)):
            for meta in chunk:
                info = self._info(meta)
                if "/." not in info.uri[len(self.root) + len(path) :]:
                    yield info

    def _info(self, meta: Any) -> ObjectInfo:
        return ObjectInfo(f"{self.root}/{meta['path']}", meta["size"], meta["e_tag"] or "")


class _RawReader(io.RawIOBase):
    """An obstore reader as a raw Python file, so that io.BufferedReader and tarfile take it."""

    def __init__(self, reader: Any) -> None:
        self.reader = reader

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = _retried(lambda: self.reader.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return cast(int, self.reader.seek(offset, whence))

    def tell(self) -> int:
        return cast(int, self.reader.tell())


@functools.cache
def _object_store(root: str) -> _ObjectStore:
    return _ObjectStore(root)


def _open_bucket(root: str) -> Any:
    options: dict[str, Any] = {"retry_config": {"retry_timeout": timedelta(seconds=RETRY_LIMIT_SECONDS)}}
    if root.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        config = {"endpoint": endpoint} if endpoint else {}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options["config"] = {**config, "region": region or "us-east-1"}
        options["client_options"] = {"allow_http": endpoint.startswith("http://")}
        if provider := _botocore_credentials():
            options["credential_provider"] = provider
    return from_url(root, **options)


def _botocore_credentials() -> Callable[[], dict[str, Any]] | None:
    """Credentials as the AWS tools find them (profiles, SSO), where the environment names no key.

    None leaves it to obstore: keys in the environment, web identity, ECS, EC2.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ:
        return None
    if not (os.environ.get("AWS_PROFILE") or Path("~/.aws/credentials").expanduser().exists()):
        return None
    import botocore.session  # slow to import, and only profiles need it

    credentials = botocore.session.get_session().get_credentials()
    if credentials is None:
        return None

    def provide() -> dict[str, Any]:
        frozen = credentials.get_frozen_credentials()
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": getattr(credentials, "_expiry_time", None),
        }

    return provide


# Everything else


class _FsspecStore:
    """Paths are whole URIs here. Creation is not atomic: fsspec has no such promise."""

    def __init__(self, scheme: str) -> None:
        self.filesystem = fsspec.filesystem(scheme)
        # One dead web server among a million image URLs must not hold up its neighbours for minutes.
        self.retried = functools.partial(_retried, limit_seconds=10.0) if scheme.startswith("http") else _retried

    def head(self, path: str) -> ObjectInfo:
        return self._info(path, self.retried(lambda: self.filesystem.info(path)))

    def read(self, path: str, etag: str) -> bytes:
        if etag:
            _check(self.head(path), etag)
        return cast(bytes, self.retried(lambda: self.filesystem.cat_file(path)))

    def open_read(self, path: str, etag: str) -> BinaryIO:
        _check(self.head(path), etag)
        return cast(BinaryIO, self.retried(lambda: self.filesystem.open(path, "rb", block_size=BUFFER_BYTES)))

    def write(self, path: str, data: bytes) -> None:
        self.filesystem.makedirs(self.filesystem._parent(path), exist_ok=True)
        self.retried(lambda: self.filesystem.pipe_file(path, data))

    def create(self, path: str, data: bytes) -> None:
        if self.filesystem.exists(path):
            raise FileExistsError(path)
        self.write(path, data)

    def delete(self, path: str) -> None:
        self.filesystem.rm_file(path)

    def list_objects(self, path: str) -> Iterator[ObjectInfo]:
        found = self.retried(lambda: self.filesystem.find(path, detail=True))
        base = str(self.filesystem._strip_protocol(path))
        for name in sorted(found):
            if "/." not in name[len(base) :]:
                yield self._info(path + name[len(base) :], found[name])

    def _info(self, uri: str, info: dict[str, Any]) -> ObjectInfo:
        etag = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("created") or ""
        etag = etag.timestamp() if isinstance(etag, datetime) else etag  # one store may spell a time in two ways
        return ObjectInfo(uri, info.get("size") or 0, str(etag))


@functools.cache
def _fsspec_store(scheme: str) -> _FsspecStore:
    try:
        return _FsspecStore(scheme)
    except (ValueError, ImportError) as error:
        raise OSError(f"{scheme}:// is not a kind of storage that can be opened here: {error}") from error


_LOCAL = _LocalStore()

_MEANING: dict[type[Exception], type[OSError]] = {
    obstore.exceptions.NotFoundError: FileNotFoundError,
    obstore.exceptions.PermissionDeniedError: PermissionError,
    obstore.exceptions.UnauthenticatedError: PermissionError,
    obstore.exceptions.AlreadyExistsError: FileExistsError,
    obstore.exceptions.PreconditionError: Changed,
    obstore.exceptions.InvalidPathError: FileNotFoundError,
}


def _retried(action: Callable[[], T], limit_seconds: float = RETRY_LIMIT_SECONDS) -> T:
    """Do it; after a passing fault again, with jittered exponential back-off, for `limit_seconds` at most.

    obstore retries single requests by itself; this also covers bodies cut short and the other stores.
    """
    started, pause = time.monotonic(), 0.2
    while True:
        try:
            return action()
        except Exception as error:  # every library has errors of its own; they are sorted here, once
            lasting = _lasting_fault(error)
            if lasting:
                raise lasting from error
            if time.monotonic() - started + pause > limit_seconds:
                raise OSError(_one_line(error)) from error
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause = min(pause * 2, 20.0)


def _lasting_fault(error: Exception) -> OSError | None:
    """The builtin error that says what a try again would say too; None for a fault that may pass."""
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, Changed)):
        return error
    if type(error) in _MEANING:
        return _MEANING[type(error)](_one_line(error))
    status = getattr(error, "status", None)  # of an HTTP response
    if status in (401, 403):
        return PermissionError(_one_line(error))
    if status in (404, 410):
        return FileNotFoundError(_one_line(error))
    if isinstance(status, int) and 400 <= status < 500 and status not in (408, 429):
        return OSError(_one_line(error))
    if (
        isinstance(error, (socket.gaierror, ValueError, TypeError, NotImplementedError))
        or "DNS" in type(error).__name__
    ):
        return OSError(_one_line(error))
    return None


def _one_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
