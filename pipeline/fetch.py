"""A URI of weights → a file on this node, and its sha256."""

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

from pipeline import storage
from pipeline.errors import SettingRefused, WeightsRefused, first_line

TRIES = 3
SOCKET_TIMEOUT_S = 20.0
OPEN_TIMEOUT_S = 25.0
LOCK_TIMEOUT_S = 1800.0

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")


def file_name(uri: str) -> str:
    """The last part of the URI's path, without what may be secret."""
    return re.sub(r"[^\w.\-]", "_", storage.redact(uri).rstrip("/").rpartition("/")[2])


def official_uri(url: str) -> str:
    """Where torchvision's own file is fetched: its address, or its name under NIGHTSHIFT_WEIGHTS_MIRROR."""
    mirror = os.environ.get("NIGHTSHIFT_WEIGHTS_MIRROR")
    return storage.join(storage.normalize(mirror), file_name(url)) if mirror else url


def fetch_weights(uri: str, official: bool = False) -> tuple[str, str]:
    """The file on this node and its sha256 in hex. A remote file is fetched once a node, a local one used in place.

    Remote files are kept in ${NIGHTSHIFT_CACHE:-~/.cache/nightshift}/weights, one for each URI and version.
    official: one of torchvision's own files. Its name bears the first digits of its sha256, which are checked, and
    torch.hub's folder is looked in first.
    Raises WeightsRefused for a file that is absent, out of reach (known in less than 30 s over HTTP) or damaged.
    """
    if official:
        kept = Path(torch.hub.get_dir()) / "checkpoints" / file_name(uri)
        if kept.is_file() and (digest := file_sha256(kept)).startswith(named_hash(uri)):
            return str(kept), digest
    try:
        path = _find(storage.normalize(uri), official)
    except (OSError, HTTPException) as error:
        raise WeightsRefused(_out_of_reach(uri, error, official)) from error
    digest = file_sha256(path)
    if official and not digest.startswith(named_hash(uri)):
        if path.parent == cache_folder():
            path.unlink(missing_ok=True)
        raise WeightsRefused(
            f"weights {storage.redact(uri)} are damaged: their sha256 is {digest[:10]}… and their name promises "
            "another; replace the file"
        )
    return str(path), digest


def named_hash(uri: str) -> str:
    """The first digits of the sha256 that a name like resnet50-11ad3fa6.pth bears; "" where it bears none."""
    found = _HASH_IN_NAME.search(file_name(uri))
    return found.group(1) if found else ""


def cache_folder(name: str = "weights") -> Path:
    folder = Path(os.environ.get("NIGHTSHIFT_CACHE") or "~/.cache/nightshift").expanduser() / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise WeightsRefused(
            f"the folder {folder} for weights cannot be made: {error}; set NIGHTSHIFT_CACHE"
        ) from error
    return folder


def file_sha256(path: Path) -> str:
    """Hex digest, remembered in the cache folder until the file's size or time of change differs."""
    stat = path.stat()
    state = [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
    record = cache_folder() / f"{_short_hash(state[0])}.sha256"
    try:
        digest, *known = json.loads(record.read_text())
        if known == state:
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


def _find(uri: str, official: bool) -> Path:
    if storage.is_local(uri):
        if not os.path.isfile(uri):
            raise FileNotFoundError(f"no such file on {os.uname().nodename}")
        return Path(uri)
    if uri.startswith("hf://"):
        return _fetch_from_hub(uri)
    version = "" if official else _version(uri)
    target = cache_folder() / f"{_short_hash([uri, version])}-{file_name(uri)}"
    try:
        with FileLock(f"{target}.lock", timeout=LOCK_TIMEOUT_S):
            if not target.exists():
                _download(uri, target)
    except Timeout as error:
        raise TimeoutError(f"another process has held {error.lock_file} for {LOCK_TIMEOUT_S:.0f} s") from error
    return target


def _version(uri: str) -> str:
    """What changes when the file behind the URI does: else an old copy in the cache would pass for it."""
    if not uri.startswith(("http://", "https://")):
        return storage.head(uri).etag
    with _open_http(uri) as response:
        return response.headers.get("ETag") or response.headers.get("Last-Modified") or ""


def _download(uri: str, target: Path) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            if uri.startswith(("http://", "https://")):
                _copy_http(uri, file)
            else:
                with storage.open_read(uri) as source:
                    shutil.copyfileobj(source, file, 1 << 20)
        os.replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _copy_http(uri: str, file: Any) -> None:
    for attempt in range(TRIES):
        with _open_http(uri) as response:
            file.seek(0)
            file.truncate()
            try:
                shutil.copyfileobj(response, file, 1 << 20)
                if response.length in (None, 0):  # bytes that are still to come
                    return
                raise OSError(f"the connection ended {response.length} bytes early")
            except (OSError, HTTPException):
                if attempt == TRIES - 1:
                    raise


def _open_http(uri: str) -> HTTPResponse:
    """Open, with tries, in OPEN_TIMEOUT_S: no socket timeout bounds name resolution or a host of many addresses."""
    ends = time.monotonic() + OPEN_TIMEOUT_S
    for attempt in range(TRIES):
        try:
            response: HTTPResponse = _within(
                max(0.0, ends - time.monotonic()), lambda: urllib.request.urlopen(uri, timeout=SOCKET_TIMEOUT_S)
            )
            return response
        except urllib.error.HTTPError as error:
            if (error.code < 500 and error.code != 429) or attempt == TRIES - 1:
                raise
        except (OSError, HTTPException):
            if attempt == TRIES - 1 or time.monotonic() > ends - 1:
                raise
        time.sleep(1)
    raise AssertionError


def _within(timeout_s: float, action: Callable[[], Any]) -> Any:
    """The action's result, or TimeoutError. A daemon thread: what hangs must not keep the process from ending."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def work() -> None:
        try:
            answers.put((action(), None))
        except BaseException as error:
            answers.put((None, error))

    threading.Thread(target=work, daemon=True).start()
    try:
        result, error = answers.get(timeout=timeout_s)
    except queue.Empty:
        raise TimeoutError("no answer") from None
    if error is not None:
        raise error
    return result


def _fetch_from_hub(uri: str) -> Path:
    """hf://<owner>/<repository>[@<revision>]/<file>, through the hub client's own cache, endpoint and credentials."""
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
        _within(OPEN_TIMEOUT_S, lambda: hub.get_hf_file_metadata(hub.hf_hub_url(repository, name, revision=version)))
        return Path(hub.hf_hub_download(repository, name, revision=version))
    except Exception as error:  # the client's errors share no base class over its versions
        raise OSError(f"{first_line(error)}") from error


def _out_of_reach(uri: str, error: Exception, official: bool) -> str:
    if isinstance(error, urllib.error.HTTPError):
        reason = f"HTTP {error.code}"
    else:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        reason = str(cause).replace(uri, storage.redact(uri)) or type(error).__name__
    if storage.is_local(uri) and not official:
        return f"weights {uri} cannot be read: {reason}; name a file or a URI that every node can read"
    name = file_name(uri)
    mirror = ", or set NIGHTSHIFT_WEIGHTS_MIRROR to a folder that holds it" if official else ""
    return (
        f"weights {storage.redact(uri)} cannot be had ({reason}): "
        f"bring {name} and pass --weights /path/to/{name}{mirror}"
    )
