"""Loose images: a virtual shard is a run of consecutive objects, or of lines of a list of URIs."""

import json
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.coverage import Ranges
from pipeline.errors import NightshiftError, ReadError
from pipeline.plan import Shard
from pipeline.prefetch import TOGETHER, ordered_map
from pipeline.sources.base import ReadOptions, Record, ShardEnd

REMOTE_THREADS = 16
LOCAL_THREADS = 2


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Fetch the objects side by side, yield them in order. The contract is in `pipeline.sources.base`."""
    assert shard.keys is not None
    count = len(shard.keys)
    rows = (row for start, stop in todo for row in range(start, min(stop, count)))
    local = storage.is_local(shard.uri or shard.keys[0])
    threads, together = (LOCAL_THREADS, TOGETHER) if local else (REMOTE_THREADS, 1)
    expected = 0

    def size_bytes(row: int) -> int:
        return shard.key_sizes[row] if shard.key_sizes else expected

    for record in ordered_map(lambda row: _fetch(shard, row), rows, threads, 2 * threads, size_bytes, together):
        # A list names no sizes: the next ones are taken to be about as large as the last ones were.
        expected = max(len(record.data or b""), expected * 3 // 4)
        yield record
    yield ShardEnd(count)


def _fetch(shard: Shard, row: int) -> Record:
    assert shard.keys is not None
    uri = storage.join(shard.uri, shard.keys[row])
    # Only a list's lines may bear credentials; what a store has listed is a name, whatever it looks like.
    plain = uri if shard.key_etags else storage.redact(uri)
    etag = shard.key_etags[row] if shard.key_etags else ""
    started = time.perf_counter()
    data, error = None, None
    try:
        _check(shard, row, uri, plain)
        data = storage.read(uri, etag)
    except NightshiftError:  # a fault of the run, such as StorageRefused
        raise
    except ReadError as fault:
        error = fault
    except FileNotFoundError:
        error = ReadError("not_found", f"there is no {plain}")
    except storage.TooLarge as fault:
        error = ReadError("too_large", str(fault))
    except storage.Changed as fault:
        error = ReadError("changed", str(fault))
    except Exception as fault:  # beside OSError, what the stores raise for URIs that make no sense
        error = ReadError("unreadable", f"{plain}: {fault}")
    image_id, kept = plain, {}
    if shard.kept:
        kept = json.loads(shard.kept[row])
        image_id = kept.pop(IMAGE_ID, image_id)
    return Record(row, image_id, plain, None, data, error, kept, time.perf_counter() - started)


def _check(shard: Shard, row: int, uri: str, plain: str) -> None:
    """Nothing that would fill the memory, or that could be waited for without end."""
    size_bytes = shard.key_sizes[row] if shard.key_sizes else 0
    if storage.is_local(uri):
        found = os.stat(uri)
        if not stat.S_ISREG(found.st_mode):
            raise ReadError("unreadable", f"{uri} is a folder, a pipe or a device, not a file")
        size_bytes = found.st_size
    storage.check_size(plain, size_bytes)


IMAGE_ID = "#image_id"  # in `Shard.kept`: the image_id of a URI that its list names more than once


def keep_json(kept: dict[str, Any]) -> str:
    return json.dumps(kept, separators=(",", ":"), default=str)
