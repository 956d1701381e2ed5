"""Weights: a URI → a file on this node and its sha256; a file → a state dict, fitted to a network or refused."""

import argparse
import hashlib
import json
import os
import pickle
import queue
import re
import shutil
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import SettingRefused, WeightsRefused, first_line

SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")
TRIES = 3
SOCKET_TIMEOUT_S = 20.0
OPEN_TIMEOUT_S = 25.0
LOCK_TIMEOUT_S = 1800.0

_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.pth$")
_NESTED = ("state_dict", "model", "model_state_dict", "net")
_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")  # heads of Inception and GoogLeNet that only training executes
_OLD_DENSENET = re.compile(r"(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\.\w+)")


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
    """hf://<owner>/<repository>/<file>, through the hub client's own cache, endpoint and credentials."""
    try:
        import huggingface_hub as hub
    except ImportError as error:
        raise SettingRefused(f"{uri} needs huggingface_hub: pip install 'nightshift[timm]'") from error
    repository, _, name = uri.removeprefix("hf://").rpartition("/")
    kept = hub.try_to_load_from_cache(repository, name)
    if isinstance(kept, str):
        return Path(kept)
    try:
        _within(OPEN_TIMEOUT_S, lambda: hub.get_hf_file_metadata(hub.hf_hub_url(repository, name)))
        return Path(hub.hf_hub_download(repository, name))
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


def read_state(path: str) -> "OrderedDict[str, Tensor]":
    """The tensors of a checkpoint by name, on the CPU, mapped from the file where its format allows.

    safetensors, or torch.save() of a state dict, bare or under state_dict, model, model_state_dict or net. Pickled code
    is never executed. Raises WeightsRefused.
    """
    with open(path, "rb") as file:
        is_safetensors = file.read(9)[8:] == b"{"
    try:
        if is_safetensors:
            from safetensors.torch import load_file

            return OrderedDict(load_file(path))
        with torch.serialization.safe_globals([argparse.Namespace]):  # a training script's flags, data only
            # Files from before PyTorch 1.6 are no zip archives and cannot be mapped.
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise WeightsRefused(
            f"weights {path} hold more than tensors and were not executed ({_blocked_global(error)}); "
            "save the network's state_dict() instead, with torch.save or as .safetensors"
        ) from error
    except Exception as error:  # what a damaged file raises depends on where the damage is
        raise WeightsRefused(f"weights {path} cannot be read as a checkpoint: {first_line(error)}") from error
    return _find_state(found, path)


def _find_state(found: Any, path: str) -> "OrderedDict[str, Tensor]":
    nested = [found[name] for name in _NESTED if isinstance(found, Mapping) and name in found]
    for state in [*nested, found]:
        tensors = (
            OrderedDict((k, v) for k, v in state.items() if isinstance(v, Tensor)) if isinstance(state, Mapping) else {}
        )
        if isinstance(tensors, OrderedDict) and tensors:
            tensors._metadata = dict(getattr(state, "_metadata", None) or {})  # type: ignore[attr-defined]
            return tensors
    holds = (
        f"its keys are {_some(map(str, found))}" if isinstance(found, Mapping) else f"it is a {type(found).__name__}"
    )
    raise WeightsRefused(f"weights {path} hold no state dict: {holds}; save the network's state_dict()")


def _blocked_global(error: Exception) -> str:
    found = re.search(r"GLOBAL (\S+)", str(error))
    return f"they want {found.group(1)}" if found else first_line(error)


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:5]) + (", …" if len(listed) > 5 else "")


def align(state: "OrderedDict[str, Tensor]", wanted: Iterable[str]) -> "OrderedDict[str, Tensor]":
    """The state under the network's own names: what a wrapper put before them is stripped, of all names that have it.

    The prefix is the one that makes most names match: module., backbone., model., encoder., _orig_mod., or any other.
    """
    names = set(wanted)
    renamed = {key: _OLD_DENSENET.sub(r"\1\2", key) for key in state}
    fits: Counter[str] = Counter()
    for key in renamed.values():
        parts = key.split(".")
        for i in range(len(parts)):
            if ".".join(parts[i:]) in names:
                fits[".".join(parts[:i]) + "." if i else ""] += 1
    prefix = max(fits, key=lambda found: (fits[found], -len(found)), default="")
    aligned = OrderedDict((name.removeprefix(prefix), state[key]) for key, name in renamed.items())
    for name in list(aligned):
        if name.startswith(_AUXILIARY) and name not in names:
            del aligned[name]
    metadata: Mapping[str, Any] = getattr(state, "_metadata", {})
    aligned._metadata = {  # type: ignore[attr-defined]
        name.removeprefix(prefix) if name != prefix[:-1] else "": versions
        for name, versions in metadata.items()
        if f"{name}.".startswith(prefix)
    }
    return aligned


def fit(network: nn.Module, state: "OrderedDict[str, Tensor]", what: str, head: str = "") -> bool:
    """Load an aligned state into the network, which may be weightless. Returns whether the head came with it.

    head: name of a classifier that may be missing as a whole. Raises WeightsRefused, naming what is missing, surplus or
    misshapen.
    """
    state._metadata = state._metadata or network.state_dict()._metadata  # type: ignore[attr-defined]
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    try:
        missing, surplus = network.load_state_dict(state, strict=False, assign=True)
        misshapen = []
    except RuntimeError:
        missing, surplus = (
            [name for name in shapes if name not in state],
            [name for name in state if name not in shapes],
        )
        misshapen = [
            f"{name} {list(tensor.shape)} for {list(shapes[name])}"
            for name, tensor in state.items()
            if name in shapes and tuple(tensor.shape) != shapes[name]
        ]
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    of_head = {name for name in shapes if head and name.startswith(f"{head}.")}
    headless = bool(of_head) and of_head <= set(missing)
    if headless:
        missing = [name for name in missing if name not in of_head]
    faults = {"missing": missing, "surplus": surplus, "of another shape": misshapen}
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault} ({_some(names)})" for fault, names in faults.items() if names)
        raise WeightsRefused(
            f"{what} do not fit together: {found}; name the --model that these weights were trained for"
        )
    network.float()
    return not headless
