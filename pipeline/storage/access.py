"""Read, write and list objects by URI. All reads of images and all reads and writes of an output use this module.

A URI is an absolute local path ("/data/a.jpg") or `scheme://…`. obstore serves s3, gs and az, the operating system
serves local paths, and fsspec serves all other schemes (http, https, memory, hf, …).

All stores raise the builtin exceptions FileNotFoundError, PermissionError, FileExistsError, and OSError if an action
still fails after all retries; `Changed` and `TooLarge` are OSErrors. They concern one object. A fault of a whole store
(it rejects the credentials, has no such bucket, or answers no request) raises StorageRefused, which ends the run and
must never be recorded as a bad image.

Transient faults are retried with jittered exponential backoff for NIGHTSHIFT_RETRY_SECONDS (default 150); the last
attempt may end up to a minute later. Single images over http and https, and on an FTP, SFTP or SMB server that
never answered, are retried for 10 seconds. A request that
receives no data for STALL_SECONDS is cancelled and retried.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import fsspec
import fsspec.utils

from pipeline.errors import OutputRefused, SettingRefused, message_line
from pipeline.storage.base import ObjectInfo, Store
from pipeline.storage.bucket import bucket_store
from pipeline.storage.credentials import full_uri
from pipeline.storage.fsspec_store import store_of
from pipeline.storage.local import LocalStore
from pipeline.storage.uris import BUCKET_SCHEMES, is_local, with_lower_scheme


def head(uri: str) -> ObjectInfo:
    """Size and etag of an object. Raises FileNotFoundError."""
    store, path = _locate(uri)
    return replace(store.head(path), uri=uri)


def read(uri: str, etag: str = "") -> bytes:
    """Read a whole object. Raises Changed if an etag is given and the object has another one."""
    store, path = _locate(uri)
    return store.read(path, etag)


def read_record(uri: str) -> dict[str, Any]:
    """Read a JSON object that a run wrote. Raises OutputRefused if it is damaged."""
    try:
        return dict(json.loads(read(uri)))
    except (TypeError, ValueError) as error:
        raise OutputRefused(
            f"{uri} is damaged ({message_line(error)}): use another --output or add --overwrite"
        ) from error


def open_read(uri: str, etag: str = "") -> BinaryIO:
    """Open an object as a seekable, buffered binary file. Raises Changed as `read` does."""
    store, path = _locate(uri)
    return store.open_read(path, etag)


def write(uri: str, data: bytes, temporary_folder: str | None = None) -> None:
    """Write a whole object atomically: readers see the old one or the new one, never a part.

    temporary_folder: where a local write keeps its temporary file, on the same file system (default: beside the
    target).
    """
    store, path = _locate(uri)
    if isinstance(store, LocalStore):
        store.write(path, data, temporary_folder)
    else:
        store.write(path, data)


def create(uri: str, data: bytes) -> None:
    """Write a new object atomically. Raises FileExistsError if it exists."""
    store, path = _locate(uri)
    store.create(path, data)


def delete(uri: str) -> None:
    """Remove an object. Does nothing if it does not exist."""
    store, path = _locate(uri)
    with contextlib.suppress(FileNotFoundError):
        store.delete(path)


def remove_broken_writes(uri: str) -> None:
    """Remove the temporary files of killed writers below a folder. Object stores have none: a put is all or nothing."""
    if is_local(uri):
        _LOCAL.remove_broken_writes(uri)


def list_objects(uri: str, *, with_unread: bool = False) -> Iterator[ObjectInfo]:
    """Yield every object below a folder or prefix, sorted by URI, without hidden names (`.x`) and broken links.

    with_unread: yield those too, as `Hidden` and `BrokenLink`. A hidden folder is one object.
    """
    store, path = _locate(uri)
    full = full_uri(uri)
    infos = store.list_objects(path, with_unread=with_unread)
    return infos if full == uri else (replace(info, uri=uri + info.uri[len(full) :]) for info in infos)


def list_glob(pattern: str, *, with_unread: bool = False) -> Iterator[ObjectInfo]:
    """Yield the objects that match a glob, sorted by URI: `*`, `?` and `[…]` within a folder, `**` across folders.

    with_unread: see `list_objects`.
    """
    regex = re.compile(fsspec.utils.glob_translate(pattern))
    fixed = pattern[: min(pattern.find(c) for c in "*?[" if c in pattern)]
    objects = list_objects(fixed.rpartition("/")[0], with_unread=with_unread)
    return (info for info in objects if regex.match(info.uri))


def _locate(uri: str) -> tuple[Store, str]:
    """The store of a URI, and the path by which that store knows the object."""
    uri = with_lower_scheme(full_uri(uri))
    scheme, _, rest = uri.partition("://")
    if not rest:
        return _LOCAL, uri
    if scheme in BUCKET_SCHEMES:
        bucket, _, path = rest.partition("/")
        if not bucket:
            raise SettingRefused(f"{uri} names no bucket: write {scheme}://bucket/path")
        return bucket_store(f"{scheme}://{bucket}"), path
    return store_of(uri), uri


_LOCAL = LocalStore()
