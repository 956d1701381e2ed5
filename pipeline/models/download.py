"""Download weights: a URI → a file on this node and its sha256."""

import hashlib
import json
import os
import queue
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from pipeline.errors import SettingRefused, WeightsRefused, first_line, message_line
from pipeline.storage import access, uris

MAX_TRIES = 3
SOCKET_TIMEOUT_SECONDS = 20.0
OPEN_TIMEOUT_SECONDS = 25.0
LOCK_TIMEOUT_SECONDS = 1800.0

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")


def file_name(uri: str) -> str:
    """Last part of the URI's path, without secrets."""
    return re.sub(r"[^\w.\-]", "_", uris.redact(uri).rstrip("/").rpartition("/")[2])


def official_uri(url: str) -> str:
    """URI of one of torchvision's files: its address, or its name under NIGHTSHIFT_WEIGHTS_MIRROR if that is set."""
    mirror = os.environ.get("NIGHTSHIFT_WEIGHTS_MIRROR")
    return uris.join(uris.normalize(mirror), file_name(url)) if mirror else url


def fetch_weights(uri: str, official: bool = False) -> tuple[str, str]:
    """Return the path of the file on this node, and its sha256 in hex. Each node downloads a remote file once.

    Remote files are kept in ${NIGHTSHIFT_CACHE:-~/.cache/nightshift}/weights, one per URI and version. Local files are
    used in place.
    official: one of torchvision's files. Its sha256 must begin with the digits in its name. A copy in torch.hub's
    folder is used if there is one.
    Raises WeightsRefused if the file is missing, damaged or cannot be downloaded; after less than 30 s if an HTTP
    server does not respond.
    """
    if official:
        kept = Path(torch.hub.get_dir()) / "checkpoints" / file_name(uri)
        if kept.is_file() and (digest := file_sha256(kept)).startswith(named_hash(uri)):
            return str(kept), digest
    try:
        path = _local_copy(uris.normalize(uri), official)
    except (OSError, HTTPException) as error:
        raise WeightsRefused(_failure(uri, error, official)) from error
    digest = file_sha256(path)
    if official and not digest.startswith(named_hash(uri)):
        if path.parent == cache_folder():
            path.unlink(missing_ok=True)
        raise WeightsRefused(
            f"weights {uris.redact(uri)} are damaged: their sha256 is {digest[:10]}…, but must begin with "
            f"{named_hash(uri)}; replace the file"
        )
    return str(path), digest


def fetch_beside(uri: str, name: str) -> bytes | None:
    """The content of a small file in the folder of a file of weights; None if there is none.

    Raises WeightsRefused if the store does not say whether there is one.
    """
    folder, _, query = uris.normalize(uri).partition("?") if uri.startswith(("http://", "https://")) else (uri, "", "")
    beside = uris.join(folder.rpartition("/")[0], name) + (f"?{query}" if query else "")
    try:
        return _local_copy(uris.normalize(beside), official=False).read_bytes()
    except FileNotFoundError:
        return None
    except urllib.error.HTTPError as error:
        if error.code in (403, 404, 410):  # a signed address of the weights is not valid for the file beside them
            return None
        raise WeightsRefused(_beside_failure(beside, f"HTTP {error.code}")) from error
    except (OSError, HTTPException) as error:
        raise WeightsRefused(_beside_failure(beside, message_line(error))) from error


def _beside_failure(uri: str, reason: str) -> str:
    return (
        f"{uris.redact(uri)}, which may state the transform of the weights, cannot be read: {reason}; try again, or "
        "copy both files to a folder"
    )


def named_hash(uri: str) -> str:
    """First digits of the sha256 from a name like resnet50-11ad3fa6.pth; "" if the name has none."""
    match = _HASH_IN_NAME.search(file_name(uri))
    return match.group(1) if match else ""


def cache_folder(name: str = "weights") -> Path:
    """A folder under NIGHTSHIFT_CACHE; created if necessary. Raises WeightsRefused if that fails."""
    folder = Path(os.environ.get("NIGHTSHIFT_CACHE") or "~/.cache/nightshift").expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsRefused(
            f"the cache folder {folder} cannot be created: {error}; set NIGHTSHIFT_CACHE to another folder"
        ) from error
    return folder


def file_sha256(path: Path) -> str:
    """sha256 of a file in hex, cached until the file's size or modification time changes."""
    stat = path.stat()
    state = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    record = cache_folder() / f"{_short_hash(state[0])}.sha256"
    try:
        digest, *recorded = json.loads(record.read_text())
        if recorded == state:
            return str(digest)
    except (OSError, ValueError):
        pass
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    temporary = record.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
    temporary.write_text(json.dumps([digest, *state]))
    temporary.replace(record)
    return digest


def _short_hash(text: object) -> str:
    return hashlib.sha256(str(text).encode()).hexdigest()[:24]


def _local_copy(uri: str, official: bool) -> Path:
    if uris.is_local(uri):
        if not os.path.isfile(uri):
            raise FileNotFoundError(f"no such file on {os.uname().nodename}")
        return Path(uri)
    if uri.startswith("hf://"):
        return _fetch_from_hub(uri)
    version = "" if official else _version(uri)
    target = cache_folder() / f"{_short_hash([uri, version])}-{file_name(uri)}"
    try:
        with FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_SECONDS):
            if not target.exists():
                _download(uri, target)
    except Timeout as error:
        seconds = f"{LOCK_TIMEOUT_SECONDS:.0f} s"
        raise TimeoutError(f"another process has held the lock {error.lock_file} for {seconds}") from error
    return target


def _version(uri: str) -> str:
    """Version of the remote file (etag or Last-Modified); part of the cache key."""
    if not uri.startswith(("http://", "https://")):
        return access.head(uri).etag
    with _open_http(uri) as response:
        return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _download(uri: str, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            if uri.startswith(("http://", "https://")):
                _copy_http(uri, file)
            else:
                with access.open_read(uri) as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _copy_http(uri: str, file: Any) -> None:
    for attempt in range(MAX_TRIES):
        with _open_http(uri) as response:
            file.seek(0)
            file.truncate()
            try:
                shutil.copyfileobj(response, file, 1 << 20)
                if response.length in (None, 0):  # number of bytes that are missing
                    return
                raise OSError(f"the connection ended {response.length} bytes early")
            except (OSError, HTTPException):
                if attempt == MAX_TRIES - 1:
                    raise


def _open_http(uri: str) -> HTTPResponse:
    """Open a URL within OPEN_TIMEOUT_SECONDS, with retries.

    A socket timeout alone bounds neither name resolution nor a host with many addresses.
    """
    deadline = time.monotonic() + OPEN_TIMEOUT_SECONDS
    for attempt in range(MAX_TRIES):
        try:
            remaining_seconds = max(0.0, deadline - time.monotonic())
            response: HTTPResponse = _with_timeout(
                remaining_seconds, lambda: urllib.request.urlopen(uri, timeout=SOCKET_TIMEOUT_SECONDS)
            )
            return response
        except urllib.error.HTTPError as error:
            if (error.code < 500 and error.code != 429) or attempt == MAX_TRIES - 1:
                raise
        except (OSError, HTTPException):
            if attempt == MAX_TRIES - 1 or time.monotonic() > deadline - 1:
                raise
        time.sleep(1)
    raise AssertionError


def _with_timeout(seconds: float, action: Callable[[], Any]) -> Any:
    """Return the action's result, or raise TimeoutError. A daemon thread does not keep the process from ending."""
    results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            results.put((action(), None))
        except BaseException as error:
            results.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = results.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError("no response") from None
    if error is not None:
        raise error
    return result


def _fetch_from_hub(uri: str) -> Path:
    """Get hf://<owner>/<repository>[@<revision>]/<file> with huggingface_hub: its cache, endpoint and credentials."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise SettingRefused(f"{uri} needs huggingface_hub: pip install 'nightshift[timm]'") from error
    owner, repository, name = (*uri.removeprefix("hf://").split("/", 2), "", "")[:3]
    repository, _, revision = f"{owner}/{repository}".partition("@")
    version = revision or None
    try:
        kept = hub.try_to_load_from_cache(repository, name, revision=version)
        if isinstance(kept, str):
            return Path(kept)
        url = hub.hf_hub_url(repository, name, revision=version)
        _with_timeout(OPEN_TIMEOUT_SECONDS, lambda: hub.get_hf_file_metadata(url))
        return Path(hub.hf_hub_download(repository, name, revision=version))
    except hub.errors.RemoteEntryNotFoundError as error:
        raise FileNotFoundError(first_line(error)) from error
    except Exception as error:  # the client's errors have no base class that all its versions share
        raise OSError(f"{first_line(error)}") from error


def _failure(uri: str, error: Exception, official: bool) -> str:
    """Message for weights that cannot be read: the reason, and where to put the file."""
    if isinstance(error, urllib.error.HTTPError):
        reason = f"HTTP {error.code}"
    else:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = str(cause).replace(uri, uris.redact(uri)) or type(error).__name__
    if uris.is_local(uri) and not official:
        return f"weights {uri} cannot be read: {reason}; use a path or URI that every node can read"
    name = file_name(uri)
    mirror = ", or set NIGHTSHIFT_WEIGHTS_MIRROR to a folder that contains it" if official else ""
    return (
        f"weights {uris.redact(uri)} cannot be downloaded ({reason}): copy {name} to every node and pass "
        f"--weights /path/to/{name}{mirror}; --weights random tries a job without them"
    )
