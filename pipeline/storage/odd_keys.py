"""Lists S3 buckets with botocore, for keys that obstore rejects: with `//`, `.`, `..` or control characters in them.

One such key fails a whole page of obstore's list. The objects with these keys are listed, and cannot be read.
"""

import os
from collections.abc import Iterator
from typing import Any

from pipeline.storage.base import CONNECT_SECONDS, STALL_SECONDS, ObjectInfo


def list_after(root: str, prefix: str, last: str, session: Any, endpoint: str, region: str) -> Iterator[ObjectInfo]:
    """Yield the objects after the key `last`, in order, without markers of folders (`a/`) and hidden names (`.x`).

    root: `s3://bucket`. session: a botocore session. endpoint: "" for that of AWS. Raises the errors of botocore.
    """
    client = _client(session, endpoint, region)
    pages = client.get_paginator("list_objects_v2").paginate(
        Bucket=root.removeprefix("s3://"), Prefix=prefix, StartAfter=last
    )
    for page in pages:
        for entry in page.get("Contents", ()):
            key = entry["Key"]
            is_marker = key.endswith("/") and not entry["Size"]
            if not is_marker and not _is_hidden(key[len(prefix) :]):
                yield ObjectInfo(f"{root}/{key}", entry["Size"], entry.get("ETag", ""))


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _client(session: Any, endpoint: str, region: str) -> Any:
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
