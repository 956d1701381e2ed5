"""URI → bytes, and back. Every read and write of the project goes through here.

A URI is an absolute local path ("/data/a.jpg"), or `scheme://…`. s3, gs and az go through obstore, plain paths through
the operating system, everything else (http, https, memory, hf, …) through fsspec.

Errors are the builtin ones on every store: FileNotFoundError, PermissionError, FileExistsError, `Changed`, and OSError
for whatever could not be done after all retries. They are about one object. What is wrong with a whole store
(credentials that it does not take, no such bucket, no answer to anybody) is `StorageRefused`, which no reader may take
for a bad image.

Faults that may pass are tried again with jittered exponential back-off for NIGHTSHIFT_RETRY_SECONDS (150); the last try
may end up to a minute later. http and https give up after 10 seconds. A request that stands still, before its answer
or within it, is broken off after STALL_SECONDS and tried again.
"""

import contextlib
import functools
import io
import itertools
import os
import random
import re
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

from pipeline.errors import SettingRefused, StorageRefused

OBSTORE_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "azure", "adl")
RETRY_SECONDS = 150.0
HTTP_RETRY_SECONDS = 10.0
CONNECT_SECONDS = 5
STALL_SECONDS = 10.0
UPLOAD_STALL_SECONDS = 20.0
REQUEST_SECONDS = 600
FIRST_PAUSE_SECONDS = 0.2
MAX_PAUSE_SECONDS = 10.0
BUFFER_BYTES = 8 << 20
UPLOAD_BYTES = 5 << 20
UPLOAD_THREADS = 4

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
    """One bucket. Multipart uploads have a client of their own, which tries single pieces again and waits longer for an
    answer: it comes only after the piece has gone through. Everything else is tried again here."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.store = _open_bucket(root, STALL_SECONDS, {"max_retries": 0})
        retries = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}
        self.uploads = _open_bucket(root, UPLOAD_STALL_SECONDS, retries)

    def head(self, path: str) -> ObjectInfo:
        def ask() -> Any:
            try:
                return obstore.head(self.store, path)
            except Exception as error:
                if not 400 <= _status(error) < 500:
                    raise
                return obstore.get(self.store, path).meta  # an answer to HEAD has no body that says why

        return self._info(self.retried(ask))

    def read(self, path: str, etag: str) -> bytes:
        def get() -> bytes:
            result = obstore.get(self.store, path)
            info = _check(self._info(result.meta), etag)
            return bytes(_whole(result.bytes(), info.size_bytes))

        return self.retried(get)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        info = _check(self.head(path), etag)
        same: obstore.GetOptions = {"if_match": info.etag} if info.etag else {}

        def read_range(start: int, stop: int) -> Any:
            options: obstore.GetOptions = {"range": (start, stop), **same}
            return self.retried(lambda: _whole(obstore.get(self.store, path, options=options).bytes(), stop - start))

        return cast(BinaryIO, io.BufferedReader(_RawReader(read_range, info.size_bytes), BUFFER_BYTES))

    def write(self, path: str, data: bytes) -> None:
        store = self.store if len(data) <= UPLOAD_BYTES else self.uploads

        def put() -> object:
            return obstore.put(store, path, data, chunk_size=UPLOAD_BYTES, max_concurrency=UPLOAD_THREADS)

        self.retried(lambda: _sent(put))

    def create(self, path: str, data: bytes) -> None:
        tries = itertools.count()

        def put() -> None:
            is_again = next(tries) > 0
            try:
                _sent(lambda: obstore.put(self.store, path, data, mode="create", use_multipart=False))
            except obstore.exceptions.AlreadyExistsError:
                # The answer to the try before may be what was lost. No two writers have the same bytes to create.
                if not (is_again and _sent(lambda: bytes(obstore.get(self.store, path).bytes())) == data):
                    raise

        self.retried(put)

    def delete(self, path: str) -> None:
        self.retried(lambda: obstore.delete(self.store, path))

    def list_objects(self, path: str) -> Iterator[ObjectInfo]:
        prefix = f"{path}/" if path else None
        chunks: Any = None
        last: str | None = None

        def follow() -> Any:
            nonlocal chunks
            stream, chunks = chunks or obstore.list(self.store, prefix, offset=last, chunk_size=1000), None
            chunk = next(stream, None)
            chunks = stream  # one that failed is not asked again: the next try begins after what was given out
            return chunk

        while chunk := self.retried(follow):
            for meta in chunk:
                info = self._info(meta)
                if "/." not in info.uri[len(self.root) + len(path) :]:
                    yield info
            last = chunk[-1]["path"]

    def retried(self, action: Callable[[], T]) -> T:
        def tell_refusals() -> T:
            try:
                return action()
            except Exception as error:
                if refusal := _refusal(self.root, error):
                    raise refusal from error
                raise

        try:
            return _retried(tell_refusals)
        except _Exhausted as error:
            if self._answers():
                raise
            raise StorageRefused(
                f"{self.root} gives no usable answer: {error}; what was committed stays, run the same command again"
            ) from error

    def _answers(self) -> bool:
        """Whether the store is at work, though it failed one object for so long: it can say that there is no other."""
        for _ in range(3):
            try:
                obstore.get(self.store, f"{uuid.uuid4().hex}.none")
            except Exception as error:
                if refusal := _refusal(self.root, error):
                    raise refusal from error
                if not _lasting_fault(error):
                    time.sleep(random.uniform(0.1, 0.3))
                    continue
            return True
        return False

    def _info(self, meta: Any) -> ObjectInfo:
        return ObjectInfo(f"{self.root}/{meta['path']}", meta["size"], meta["e_tag"] or "")


def _whole(data: Any, size_bytes: int) -> Any:
    if len(data) != size_bytes:
        raise OSError(f"the answer was cut short: {len(data)} of {size_bytes} bytes came")
    return data


def _sent(action: Callable[[], T]) -> T:
    """Where something is written, "not found" is no answer to rest on: an upload that a lost answer had completed."""
    try:
        return action()
    except FileNotFoundError as error:
        raise OSError(str(error)) from error


class _RawReader(io.RawIOBase):
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


@functools.cache
def _object_store(root: str) -> _ObjectStore:
    return _ObjectStore(root)


def _open_bucket(root: str, stall_seconds: float, retries: dict[str, Any]) -> Any:
    client = {"connect_timeout": CONNECT_SECONDS, "read_timeout": stall_seconds, "timeout": REQUEST_SECONDS}
    options: dict[str, Any] = {
        "retry_config": retries,
        "client_options": {name: timedelta(seconds=seconds) for name, seconds in client.items()},
    }
    if root.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        config = {"endpoint": endpoint} if endpoint else {}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
        options["config"] = {**config, "region": region or "us-east-1"}
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
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
        self.limit_seconds: float | None = None
        options: dict[str, Any] = {}
        if scheme in ("http", "https"):
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
            _check(self.head(path), etag)
        return cast(bytes, self.retried(lambda: self.filesystem.cat_file(path)))

    def open_read(self, path: str, etag: str) -> BinaryIO:
        _check(self.head(path), etag)

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
                data = _whole(opened.read(stop - start), stop - start)
                file = opened
                return data

            return self.retried(get)

        return cast(BinaryIO, io.BufferedReader(_RawReader(read_range, file.size), BUFFER_BYTES))

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
        return _retried(action, self.limit_seconds)

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


# Error codes of S3, Google and Azure that are about the whole store. AccessDenied is not: it may be one object's.
_BUCKET_MISSING = {"ContainerNotFound", "InvalidBucketName", "NoSuchBucket"}
_CREDENTIALS_REFUSED = {
    "AccountIsDisabled",
    "AccountProblem",
    "AllAccessDisabled",
    "AuthenticationFailed",
    "AuthorizationHeaderMalformed",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidAuthenticationInfo",
    "InvalidSecurity",
    "InvalidToken",
    "NoAuthenticationInformation",
    "NotSignedUp",
    "RequestExpired",
    "RequestTimeTooSkewed",
    "SignatureDoesNotMatch",
    "TokenRefreshRequired",
}
# Those that come with a status of 4xx and may pass all the same.
_PASSING = {"BadDigest", "ConditionalRequestConflict", "IncompleteBody", "OperationAborted", "RequestTimeout"}


class _Exhausted(OSError):
    """A fault that may pass has not passed in time."""


def _retry_seconds() -> float:
    given = os.environ.get("NIGHTSHIFT_RETRY_SECONDS", "")
    with contextlib.suppress(ValueError):
        if 0 <= (seconds := float(given or RETRY_SECONDS)) < float("inf"):
            return seconds
    raise SettingRefused(f"NIGHTSHIFT_RETRY_SECONDS is {given!r}; it must be a number of seconds, 0 or more")


def _retried(action: Callable[[], T], limit_seconds: float | None = None) -> T:
    """Do it; after a fault that may pass again, at least once more, until `limit_seconds` are over."""
    limit_seconds = _retry_seconds() if limit_seconds is None else limit_seconds
    started, pause = time.monotonic(), FIRST_PAUSE_SECONDS
    for tries in itertools.count(1):
        try:
            return action()
        except Exception as error:  # every library has errors of its own; they are sorted here, once
            lasting = _lasting_fault(error)
            if lasting is error:
                raise
            if lasting:
                raise lasting from error
            waited = time.monotonic() - started
            if tries > 1 and waited + pause > limit_seconds:
                raise _Exhausted(f"{_one_line(error)} ({tries} tries in {waited:.0f} s)") from error
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(pause * 2, MAX_PAUSE_SECONDS)
    raise AssertionError


def _refusal(root: str, error: Exception) -> StorageRefused | None:
    """The end of the run, if a whole bucket is out of reach and a try again would hear the same."""
    code, message = _code(error)
    go_on = "then run the same command again, it goes on where it stopped"
    if code in _BUCKET_MISSING:
        return StorageRefused(f"{root} is not there ({code}): {message}; check its name, {go_on}")
    if code in _CREDENTIALS_REFUSED or isinstance(error, obstore.exceptions.UnauthenticatedError):
        said = f"{code}: {message}" if code else _one_line(error)
        return StorageRefused(f"{root} does not take the credentials ({said}); renew or correct them, {go_on}")
    return None


def _lasting_fault(error: Exception) -> Exception | None:
    """The error that says what a try again would say too; None for a fault that may pass."""
    if isinstance(error, FileNotFoundError) and "\n" in str(error):
        return FileNotFoundError(_one_line(error))
    lasting = (FileNotFoundError, PermissionError, FileExistsError, IsADirectoryError, Changed)
    if isinstance(error, (StorageRefused, *lasting)):
        return error
    if _code(error)[0] in _PASSING:
        return None
    if type(error) in _MEANING:
        return _MEANING[type(error)](_one_line(error))
    status = _status(error)
    if status in (401, 403):
        return PermissionError(_one_line(error))
    if status in (404, 410):
        return FileNotFoundError(_one_line(error))
    if 400 <= status < 500 and status not in (408, 429):
        return OSError(_one_line(error))
    if (
        isinstance(error, (socket.gaierror, ValueError, TypeError, NotImplementedError))
        or "DNS" in type(error).__name__
    ):
        return OSError(_one_line(error))
    return None


def _status(error: Exception) -> int:
    """Of the HTTP answer that the error is about; 0 if there was none."""
    status = getattr(error, "status", None)
    if isinstance(status, int):
        return status
    found = re.search(r"non-2xx status code: (\d+)", str(error))
    return int(found[1]) if found else 0


def _code(error: Exception) -> tuple[str, str]:
    """The store's own error code and message, as its XML gives them; empty where there is none."""
    found = re.search(r"<Code>(\w+)</Code>(?:\s*<Message>([^<]*))?", str(error))
    return (found[1], (found[2] or "").strip()) if found else ("", "")


def _one_line(error: Exception) -> str:
    """What went wrong, without markup, and without query strings, which may hold a signature."""
    text = str(error).partition("\n")[0].partition("<?xml")[0].rstrip(": ") or type(error).__name__
    text = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", text)
    code, message = _code(error)
    kind = re.search(r"HttpError \{\s*kind: (\w+)", str(error))  # an interruption or a timeout, else not told
    return f"{text}{f': {code}: {message}' if code else ''}{f' ({kind[1]})' if kind else ''}"
