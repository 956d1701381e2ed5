"""s3, gs and az, over obstore."""

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
from pipeline.stores.base import (
    BUFFER_BYTES,
    CONNECT_SECONDS,
    REQUEST_SECONDS,
    STALL_SECONDS,
    ObjectInfo,
    RawReader,
    check,
    check_size,
    whole,
)
from pipeline.stores.retry import Exhausted, lasting_fault, refusal_of, retried, status_of

UPLOAD_STALL_SECONDS = 20.0
UPLOAD_BYTES = 5 << 20
UPLOAD_THREADS = 4

T = TypeVar("T")


class BucketStore:
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
                if not 400 <= status_of(error) < 500:
                    raise
                return obstore.get(self.store, path).meta  # an answer to HEAD has no body that says why

        return self._info(self.retried(ask))

    def read(self, path: str, etag: str) -> bytes:
        def get() -> bytes:
            result = obstore.get(self.store, path)
            info = check(self._info(result.meta), etag)
            check_size(info.uri, info.size_bytes)
            return bytes(whole(result.bytes(), info.size_bytes))

        return self.retried(get)

    def open_read(self, path: str, etag: str) -> BinaryIO:
        info = check(self.head(path), etag)
        same: obstore.GetOptions = {"if_match": info.etag} if info.etag else {}

        def read_range(start: int, stop: int) -> Any:
            options: obstore.GetOptions = {"range": (start, stop), **same}
            return self.retried(lambda: whole(obstore.get(self.store, path, options=options).bytes(), stop - start))

        return cast(BinaryIO, io.BufferedReader(RawReader(read_range, info.size_bytes), BUFFER_BYTES))

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
            try:
                chunk = next(stream, None)
            except obstore.exceptions.InvalidPathError as error:
                raise InputRefused(
                    f"{self.root}{path and f'/{path}'} cannot be listed: {message_line(error)}; give that object "
                    "another name, or name folders without it"
                ) from error
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
                if refusal := refusal_of(self.root, error):
                    raise refusal from error
                raise

        try:
            return retried(tell_refusals)
        except Exhausted as error:
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
                if refusal := refusal_of(self.root, error):
                    raise refusal from error
                if not lasting_fault(error):
                    time.sleep(random.uniform(0.1, 0.3))
                    continue
            return True
        return False

    def _info(self, meta: Any) -> ObjectInfo:
        return ObjectInfo(f"{self.root}/{meta['path']}", meta["size"], meta["e_tag"] or "")


def _sent(action: Callable[[], T]) -> T:
    """Where something is written, "not found" is no answer to rest on: an upload that a lost answer had completed."""
    try:
        return action()
    except FileNotFoundError as error:
        raise OSError(str(error)) from error


@functools.cache
def bucket_store(root: str) -> BucketStore:
    return BucketStore(root)


def _open_bucket(root: str, stall_seconds: float, retries: dict[str, Any]) -> Any:
    client = {"connect_timeout": CONNECT_SECONDS, "read_timeout": stall_seconds, "timeout": REQUEST_SECONDS}
    options: dict[str, Any] = {
        "retry_config": retries,
        "client_options": {name: timedelta(seconds=seconds) for name, seconds in client.items()},
    }
    if root.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL", "")
        config = {"endpoint": endpoint} if endpoint else {}
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or _profile_region()
        options["config"] = {**config, "region": region or "us-east-1"}
        options["client_options"]["allow_http"] = endpoint.startswith("http://")
        if provider := _botocore_credentials():
            options["credential_provider"] = provider
    return from_url(root, **options)


def _profile_region() -> str | None:
    if not (os.environ.get("AWS_PROFILE") or Path("~/.aws/config").expanduser().exists()):
        return None
    region = _botocore(lambda session: session.get_config_variable("region"))
    return str(region) if region else None


def _botocore(ask: Callable[[Any], Any]) -> Any:
    import botocore.exceptions  # slow to import, and only profiles need it
    import botocore.session

    try:
        return ask(botocore.session.get_session())
    except botocore.exceptions.BotoCoreError as error:
        raise SettingRefused(f"AWS_PROFILE and ~/.aws make no sense: {message_line(error)}") from error


def _botocore_credentials() -> Callable[[], dict[str, Any]] | None:
    """Credentials as the AWS tools find them (profiles, SSO), where the environment names no key.

    None leaves it to obstore: keys in the environment, web identity, ECS, EC2.
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
