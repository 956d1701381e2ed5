"""Lists buckets with the SDKs of their clouds, for keys that obstore rejects: with `//`, `.`, `..` or a tab in them.

One such key fails a whole page of obstore's list. The objects with these keys are listed, and cannot be read.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from pipeline.storage.base import CONNECT_SECONDS, STALL_SECONDS, ObjectInfo
from pipeline.threads import ordered_map

EXTRAS = {"gs": "google-cloud-storage", "az": "azure-storage-blob"}
"""The package that lists a kind of bucket, which is also an extra of Nightshift. botocore is always installed."""

HEAD_THREADS, HEADS_AHEAD = 16, 1000


class Entry(NamedTuple):
    """An object in a list. etag: "" if the list has none that obstore would give."""

    key: str
    size_bytes: int
    etag: str


def s3_entries(bucket: str, prefix: str, last: str, session: Any, endpoint: str, region: str) -> Iterator[Entry]:
    """Entries after the key `last`, in order. session: of botocore. endpoint: "" for that of AWS."""
    pages = (
        _s3_client(session, endpoint, region)
        .get_paginator("list_objects_v2")
        .paginate(Bucket=bucket, Prefix=prefix, StartAfter=last)
    )
    for page in pages:
        for entry in page.get("Contents", ()):
            yield Entry(entry["Key"], entry["Size"], entry.get("ETag", ""))


def gs_entries(bucket: str, prefix: str, last: str, emulator: str) -> Iterator[Entry]:
    """Entries after the key `last`, in order. The etags of this API are not those that obstore gets from another.

    emulator: its URL, or "".
    """
    from google.auth.credentials import AnonymousCredentials
    from google.cloud.storage import Client

    there = {"credentials": AnonymousCredentials(), "client_options": {"api_endpoint": emulator}} if emulator else {}
    for blob in Client(project="-", **there).list_blobs(bucket, prefix=prefix, start_offset=last):
        if blob.name != last:
            yield Entry(blob.name, blob.size, "")


def az_entries(container: str, prefix: str, last: str, config: dict[str, Any]) -> Iterator[Entry]:
    """Entries after the key `last`, in order. config: `account_url` and `credential` of the SDK."""
    from azure.storage.blob import ContainerClient

    for blob in ContainerClient(container_name=container, **config).list_blobs(name_starts_with=prefix):
        if blob.name > last:
            yield Entry(blob.name, blob.size, blob.etag)


def objects(root: str, entries: Iterable[Entry], head: Callable[[str], ObjectInfo] | None) -> Iterator[ObjectInfo]:
    """The objects of a list, without markers of folders (`a/`).

    head: asks the store for an object by its key, 16 at a time; None if the list has the etags.
    """

    def listed(entry: Entry) -> ObjectInfo:
        return ObjectInfo(f"{root}/{entry.key}", entry.size_bytes, entry.etag)

    def asked(entry: Entry) -> ObjectInfo:
        try:
            return head(entry.key) if head else listed(entry)
        except Exception:  # the key that obstore rejects; reading the object tells why
            return listed(entry)

    files = (entry for entry in entries if not _is_marker(entry))
    yield from ordered_map(asked, files, HEAD_THREADS, HEADS_AHEAD) if head else map(listed, files)


def _is_marker(entry: Entry) -> bool:
    return entry.key.endswith("/") and not entry.size_bytes


def _s3_client(session: Any, endpoint: str, region: str) -> Any:
    from botocore import UNSIGNED  # slow to import, and rarely needed
    from botocore.config import Config

    skips_signature = os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true", "t", "yes", "y", "on")
    config = Config(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=STALL_SECONDS,
        retries={"total_max_attempts": 8, "mode": "standard"},
        s3={"addressing_style": "path"},
        **({"signature_version": UNSIGNED} if skips_signature else {}),
    )
    return session.create_client("s3", region_name=region, endpoint_url=endpoint or None, config=config)
