"""URI → bytes, and back. Every read of images, and every read and write of an output, goes through here.

A URI is an absolute local path ("/data/a.jpg"), or `scheme://…`. s3, gs and az go through obstore, plain paths through
the operating system, everything else (http, https, memory, hf, …) through fsspec.

Errors are the builtin ones on every store: FileNotFoundError, PermissionError, FileExistsError, `Changed`, and OSError
for whatever could not be done after all retries. They are about one object. What is wrong with a whole store
(credentials that it does not take, no such bucket, no answer to anybody) is `StorageRefused`, which no reader may take
for a bad image.

Faults that may pass are tried again with jittered exponential back-off for NIGHTSHIFT_RETRY_SECONDS (150); the last try
may end up to a minute later. Loose images of http and https are given up after 10 seconds. A request that stands
still, before its answer or within it, is broken off after STALL_SECONDS and tried again.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import fsspec
import fsspec.utils

from pipeline.errors import OutputRefused, message_line
from pipeline.stores.base import Changed, ObjectInfo, Store, TooLarge, check_size, escaped, redact
from pipeline.stores.bucket import bucket_store
from pipeline.stores.local import LocalStore
from pipeline.stores.other import fsspec_store

OBSTORE_SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "azure", "adl")

__all__ = [
    "Changed",
    "ObjectInfo",
    "TooLarge",
    "check_size",
    "create",
    "delete",
    "escaped",
    "head",
    "is_glob",
    "is_local",
    "join",
    "list_glob",
    "list_objects",
    "normalize",
    "open_read",
    "read",
    "read_record",
    "redact",
    "remove_broken_writes",
    "signed",
    "withhold",
    "write",
]

_SIGNED: dict[str, str] = {}


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


def withhold(uri: str) -> str:
    """The URI without its credentials. In this process it can be read by that, as if it still had them."""
    plain = redact(uri)
    if plain != uri:
        _SIGNED[plain] = uri
    return plain


def signed(uris: Iterable[str]) -> list[str]:
    """Those of the URIs that have credentials, with them: for `withhold` in another process."""
    return [_SIGNED[uri] for uri in uris if uri in _SIGNED]


def head(uri: str) -> ObjectInfo:
    store, path = _locate(uri)
    return replace(store.head(path), uri=uri)


def read(uri: str, etag: str = "") -> bytes:
    """The whole object. With an etag, `Changed` if the object is not that one any more."""
    store, path = _locate(uri)
    return store.read(path, etag)


def read_record(uri: str) -> dict[str, Any]:
    """What a run wrote there as JSON. Raises OutputRefused where it is not that any more."""
    try:
        return dict(json.loads(read(uri)))
    except (TypeError, ValueError) as error:
        raise OutputRefused(
            f"{uri} is damaged ({message_line(error)}): name another --output, or --overwrite it"
        ) from error


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


def remove_broken_writes(uri: str) -> None:
    """Remove what killed writers left below a folder. Only a local disk shows any of it: a put is whole or nothing."""
    if is_local(uri):
        _LOCAL.remove_broken_writes(uri)


def list_objects(uri: str) -> Iterator[ObjectInfo]:
    """Every object below a folder or prefix, sorted by URI, as a stream. Hidden names (`.x`) are left out."""
    store, path = _locate(uri)
    given = _as_given(uri)
    found = store.list_objects(path)
    return found if given == uri else (replace(info, uri=uri + info.uri[len(given) :]) for info in found)


def list_glob(pattern: str) -> Iterator[ObjectInfo]:
    """The objects that match a glob (`*`, `?`, `[…]` inside a folder, `**` across), sorted by URI."""
    regex = re.compile(fsspec.utils.glob_translate(pattern))
    fixed = pattern[: min(pattern.find(c) for c in "*?[" if c in pattern)]
    return (info for info in list_objects(fixed.rpartition("/")[0]) if regex.match(info.uri))


def is_glob(uri: str) -> bool:
    return any(c in uri for c in "*?[") and not (is_local(uri) and os.path.exists(uri))


def _locate(uri: str) -> tuple[Store, str]:
    uri = _as_given(uri)
    scheme, _, rest = uri.partition("://")
    if not rest:
        return _LOCAL, uri
    if scheme in OBSTORE_SCHEMES:
        bucket, _, path = rest.partition("/")
        return bucket_store(f"{scheme}://{bucket}"), path
    return fsspec_store(scheme), uri


def _as_given(uri: str) -> str:
    """With the credentials that were withheld from it, or the user and password from a folder above it."""
    if not _SIGNED or uri in _SIGNED or redact(uri) != uri:  # the last one has its own
        return _SIGNED.get(uri, uri)
    folder = uri
    while folder not in _SIGNED and "/" in folder.partition("://")[2]:
        folder = folder.rpartition("/")[0]
    given = _SIGNED.get(folder, folder)
    return uri if "?" in given else given + uri[len(folder) :]


_LOCAL = LocalStore()
