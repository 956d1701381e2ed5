"""Ranges of one object in a bucket, also of servers that answer with the status 200 or have no ranges."""

import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from datetime import timedelta
from typing import Any, BinaryIO, Protocol, TypeVar

import obstore

from pipeline.errors import StorageRefused
from pipeline.storage.base import STALL_SECONDS, Changed, ObjectInfo, check_etag, check_length

SIGNED = timedelta(hours=1)
"""How long a signed URL is valid. Each request has its own."""

T = TypeVar("T")


class Bucket(Protocol):
    """What `Ranges` needs of a BucketStore."""

    root: str
    store: Any

    def with_retries(self, action: Callable[[], T]) -> T: ...


class Ranges:
    """Reads ranges of one object.

    obstore rejects a range that arrives with the status 200 (`rclone serve s3`, lakeFS, gofakes3). Then the requests go
    through signed URLs: the range is accepted if its Content-Range is the one asked for. If there is none, the object
    is copied to disk. Raises StorageRefused for another range.
    """

    def __init__(self, bucket: Bucket, path: str, info: ObjectInfo) -> None:
        self.bucket, self.path, self.info = bucket, path, info
        self._read: Callable[[int, int], Any] = self._from_bucket

    def read(self, start: int, stop: int) -> Any:
        """The bytes from `start` to `stop`, with retries."""
        return self.bucket.with_retries(lambda: check_length(self._read(start, stop), stop - start))

    def _from_bucket(self, start: int, stop: int) -> Any:
        options: obstore.GetOptions = {"range": (start, stop)}
        if self.info.etag:
            options["if_match"] = self.info.etag
        try:
            return obstore.get(self.bucket.store, self.path, options=options).bytes()
        except Exception as error:
            if "source: NotPartial" not in str(error):
                raise
        data = self._signed(start, stop)
        if data is None:
            copy = self._copy_to_disk()
            self._read = lambda start, stop: _part(copy, start, stop)
            return self._read(start, stop)
        self._read = self._signed
        return data

    def _signed(self, start: int, stop: int) -> bytes | None:
        """Request a range by a signed URL; None if the server sends the whole object."""
        headers = {"Range": f"bytes={start}-{stop - 1}", **({"If-Match": self.info.etag} if self.info.etag else {})}
        try:
            url = obstore.sign(self.bucket.store, "GET", self.path, SIGNED)
        except Exception:  # without credentials there is nothing to sign with
            return None
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url, headers=headers), timeout=STALL_SECONDS
            ) as response:
                received = response.headers.get("Content-Range")
                if received is None:
                    return None
                if not re.match(rf"bytes {start}-{stop - 1}/", received):
                    raise StorageRefused(
                        f"{self.bucket.root} was asked for bytes {start}-{stop - 1} of {self.path} and sent "
                        f"{received}: its server does not support ranges correctly; update it, or copy the archive"
                    )
                self._check(response.headers.get("ETag"))
                return bytes(response.read())
        except urllib.error.HTTPError as error:
            if error.code == 412:
                raise Changed(f"{self.info.uri} was replaced after it was planned") from error
            raise

    def _check(self, etag: str | None) -> None:
        check_etag(ObjectInfo(self.info.uri, 0, etag or self.info.etag), self.info.etag)

    def _copy_to_disk(self) -> BinaryIO:
        copy: Any = tempfile.TemporaryFile(prefix="nightshift-")  # noqa: SIM115  lives as long as this object
        try:
            result = obstore.get(self.bucket.store, self.path)
            self._check(result.meta["e_tag"])
            for chunk in result.stream():
                copy.write(chunk)
            if copy.tell() != self.info.size_bytes:
                raise OSError(f"the response was cut short: {copy.tell()} of {self.info.size_bytes} bytes arrived")
        except BaseException:
            copy.close()
            raise
        return copy  # type: ignore[no-any-return]


def _part(file: BinaryIO, start: int, stop: int) -> bytes:
    return os.pread(file.fileno(), stop - start, start)  # has no position that threads would share
