"""The stores s3, gs and az, through obstore."""

import functools
import io
import itertools
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast

import obstore
import obstore.exceptions
from obstore.store import from_url

from pipeline.errors import InputRefused, SettingRefused, StorageRefused, message_line
from pipeline.storage import odd_keys, uris
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
from pipeline.storage.cloud_settings import HINTS, azure_config, azure_sdk_config, endpoint_of, gcs_config, kind_of
from pipeline.storage.ranges import Ranges
from pipeline.storage.retry import Exhausted, permanent_error, refusal_of, status_of, with_retries

UPLOAD_STALL_SECONDS = 20.0
UPLOAD_BYTES = 5 << 20
"""Size of a part; larger objects are multipart uploads."""
UPLOAD_THREADS = 4

T = TypeVar("T")


class BucketStore:
    """One bucket.

    Multipart uploads use a second client, which retries single parts by itself and waits longer for a response, since
    the store responds only after it has received the whole part. All other requests are retried in this class.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.store = _open_bucket(root, STALL_SECONDS, {"max_retries": 0})
        retries = {"max_retries": 4, "retry_timeout": timedelta(seconds=30)}
        self.uploads = _open_bucket(root, UPLOAD_STALL_SECONDS, retries)

    def head(self, path: str) -> ObjectInfo:
        def get_meta() -> Any:
            try:
                return obstore.head(self.store, path)
            except Exception as error:
                if not 400 <= status_of(error) < 500:
                    raise
                return obstore.get(self.store, path).meta  # a response to HEAD has no body with the error

        return self._info(self.with_retries(get_meta))

    def read(self, path: str, etag: str) -> bytes:
        def get() -> bytes:
            result = obstore.get(self.store, path)
            info = check_etag(self._info(result.meta), etag)
            check_size(info.uri, info.size_bytes)
            return bytes(check_length(result.bytes(), info.size_bytes))

        return self.with_retries(get)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        info = check_etag(self.head(path), etag)
        return cast(
            BinaryIO, io.BufferedReader(RawReader(Ranges(self, path, info).read, info.size_bytes), BUFFER_BYTES)
        )

    def write(self, path: str, data: bytes) -> None:
        store = self.store if len(data) <= UPLOAD_BYTES else self.uploads

        def put() -> object:
            return obstore.put(store, path, data, chunk_size=UPLOAD_BYTES, max_concurrency=UPLOAD_THREADS)

        self.with_retries(lambda: _retry_not_found(put))

    def create(self, path: str, data: bytes) -> None:
        attempts = itertools.count()

        def put() -> None:
            is_retry = next(attempts) > 0
            try:
                _retry_not_found(lambda: obstore.put(self.store, path, data, mode="create", use_multipart=False))
            except obstore.exceptions.AlreadyExistsError:
                # The response to an earlier attempt may have been lost. No two writers create the same bytes.
                if not (is_retry and _retry_not_found(lambda: bytes(obstore.get(self.store, path).bytes())) == data):
                    raise

        self.with_retries(put)

    def delete(self, path: str) -> None:
        self.with_retries(lambda: obstore.delete(self.store, path))

    def list_objects(self, path: str, *, with_unread: bool = False) -> Iterator[ObjectInfo]:
        yield from visible(self._listed(path), len(uris.join(self.root, path).rstrip("/")), with_unread=with_unread)

    def _listed(self, path: str) -> Iterator[ObjectInfo]:
        """All objects below a prefix, hidden ones too."""
        prefix = f"{path}/" if path else None
        chunks: Any = None
        last: str | None = None
        odd_key: Exception | None = None

        def next_chunk() -> Any:
            nonlocal chunks, odd_key
            stream, chunks = chunks or obstore.list(self.store, prefix, offset=last, chunk_size=1000), None
            try:
                chunk = next(stream, None)
            except obstore.exceptions.InvalidPathError as error:
                odd_key = error
                return None
            chunks = stream  # a stream that failed is dropped: the next attempt begins after `last`
            return chunk

        while chunk := self.with_retries(next_chunk):
            yield from map(self._info, chunk)
            last = chunk[-1]["path"]
        if odd_key:
            yield from self._list_with_odd_keys(path, last or "", odd_key)

    def _list_with_odd_keys(self, path: str, last: str, odd_key: Exception) -> Iterator[ObjectInfo]:
        """List the objects after `last` without obstore, which rejects one of their keys."""
        uri, reason = uris.join(self.root, path).rstrip("/"), message_line(odd_key)
        kind = kind_of(self.root)
        prefix = f"{path}/" if path else ""
        try:
            head = self.head if kind == "gs" else None
            yield from odd_keys.objects(self.root, self._entries(kind, prefix, last), head)
        except Exception as error:  # of the SDKs, such as credentials that only obstore finds
            package = odd_keys.EXTRAS.get(kind, "botocore")
            remedy = "rename that object, or name folders without it"
            if isinstance(error, ImportError):
                remedy = f"install nightshift[{kind}], which lists such keys, or {remedy}"
            raise InputRefused(
                f"{uri} cannot be listed: {reason}; {package} cannot list it either: {message_line(error)}; {remedy}"
            ) from error

    def _entries(self, kind: str, prefix: str, last: str) -> Iterator[odd_keys.Entry]:
        bucket = self.root.partition("://")[2]
        if kind == "gs":
            return odd_keys.gs_entries(bucket, prefix, last, gcs_config().get("base_url", ""))
        if kind == "az":
            return odd_keys.az_entries(bucket, prefix, last, azure_sdk_config())
        session, config = _botocore(lambda session: session), _s3_config()
        return odd_keys.s3_entries(bucket, prefix, last, session, config.get("endpoint", ""), config["region"])

    def with_retries(self, action: Callable[[], T]) -> T:
        """Retry as `with_retries` does. Raises StorageRefused if the fault concerns the whole bucket."""

        def attempt() -> T:
            try:
                return action()
            except Exception as error:
                if refusal := refusal_of(self.root, error):
                    raise refusal from error
                raise

        try:
            return with_retries(attempt)
        except Exhausted as error:
            if self._is_up():
                raise
            raise StorageRefused(
                f"{self.root} gives no usable response: {error}; what was committed is kept, run the same command again"
            ) from error

    def _is_up(self) -> bool:
        """True if the store works although it failed for one object: it can tell that another object does not exist."""
        for _ in range(3):
            try:
                obstore.get(self.store, f"{uuid.uuid4().hex}.none")
            except Exception as error:
                if refusal := refusal_of(self.root, error):
                    raise refusal from error
                if not permanent_error(error):
                    time.sleep(random.uniform(0.1, 0.3))
                    continue
            return True
        return False

    def _info(self, meta: Any) -> ObjectInfo:
        return ObjectInfo(f"{self.root}/{meta['path']}", meta["size"], meta["e_tag"] or "")


def _retry_not_found(action: Callable[[], T]) -> T:
    """A 404 on a write may mean that an earlier attempt completed the upload; raise OSError so that it is retried."""
    try:
        return action()
    except FileNotFoundError as error:
        raise OSError(str(error)) from error


@functools.cache
def bucket_store(root: str) -> BucketStore:
    return BucketStore(root)


def _open_bucket(root: str, stall_seconds: float, retries: dict[str, Any]) -> Any:
    """An obstore client. Raises SettingRefused. obstore itself reads most settings of gs and az."""
    client = {"connect_timeout": CONNECT_SECONDS, "read_timeout": stall_seconds, "timeout": REQUEST_SECONDS}
    options: dict[str, Any] = {
        "retry_config": retries,
        "client_options": {name: timedelta(seconds=seconds) for name, seconds in client.items()},
    }
    kind = kind_of(root)
    config = azure_config() if kind == "az" else gcs_config() if kind == "gs" else _s3_config()
    options["config"] = config
    options["client_options"]["allow_http"] = endpoint_of(kind, config).startswith("http://")
    if kind == "s3" and (provider := _botocore_credentials()):
        options["credential_provider"] = provider
    try:
        return from_url(root, **options)
    except Exception as error:  # each kind of store has its own exceptions for settings that are missing or broken
        raise SettingRefused(f"{root} cannot be opened: {message_line(error)}; {HINTS[kind]}") from error


def _s3_config() -> dict[str, Any]:
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _profile_region()
    return {**({"endpoint": endpoint} if endpoint else {}), "region": region or "us-east-1"}


def _profile_region() -> str | None:
    if not (os.environ.get("AWS_PROFILE") or Path("~/.aws/config").expanduser().exists()):
        return None
    region = _botocore(lambda session: session.get_config_variable("region"))
    return str(region) if region else None


def _botocore(ask: Callable[[Any], Any]) -> Any:
    """Call `ask` with a botocore session. Raises SettingRefused if the AWS profile is not valid."""
    import botocore.exceptions  # slow to import, and needed only for profiles
    import botocore.session

    try:
        return ask(botocore.session.get_session())
    except botocore.exceptions.BotoCoreError as error:
        raise SettingRefused(f"the AWS profile (AWS_PROFILE, ~/.aws) is not valid: {message_line(error)}") from error


def _botocore_credentials() -> Callable[[], dict[str, Any]] | None:
    """Provider of credentials that only the AWS tools find (profiles, SSO); None if obstore finds them by itself.

    obstore knows keys in the environment, web identity, ECS and EC2.
    """
    if "AWS_ACCESS_KEY_ID" in os.environ or "AWS_WEB_IDENTITY_TOKEN_FILE" in os.environ:
        return None
    if not (os.environ.get("AWS_PROFILE") or Path("~/.aws/credentials").expanduser().exists()):
        return None
    credentials = _botocore(lambda session: session.get_credentials())
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
