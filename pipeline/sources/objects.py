"""Loose images: a virtual shard is a run of consecutive objects, or of lines of a list of URIs."""

import json
import time
from collections.abc import Iterator
from typing import Any

from pipeline import storage
from pipeline.coverage import Ranges
from pipeline.errors import ReadError
from pipeline.plan import Shard
from pipeline.prefetch import ordered_map
from pipeline.sources.base import ReadOptions, Record, ShardEnd

REMOTE_THREADS = 16
LOCAL_THREADS = 2


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Fetch the objects side by side, yield them in order. The contract is in `pipeline.sources.base`."""
    assert shard.keys is not None
    count = len(shard.keys)
    rows = (row for start, stop in todo for row in range(start, min(stop, count)))
    threads = LOCAL_THREADS if storage.is_local(shard.uri or shard.keys[0]) else REMOTE_THREADS
    yield from ordered_map(lambda row: _fetch(shard, row), rows, threads, ahead=2 * threads)
    yield ShardEnd(count)


def _fetch(shard: Shard, row: int) -> Record:
    assert shard.keys is not None
    uri = storage.join(shard.uri, shard.keys[row])
    etag = shard.key_etags[row] if shard.key_etags else ""
    started = time.perf_counter()
    data, error = None, None
    try:
        data = storage.read(uri, etag)
    except FileNotFoundError:
        error = ReadError("not_found", f"there is no {storage.redact(uri)}")
    except storage.Changed as fault:
        error = ReadError("changed", str(fault))
    except OSError as fault:
        error = ReadError("unreadable", f"{storage.redact(uri)}: {fault}")
    image_id, kept = storage.redact(uri), {}
    if shard.kept:
        kept = json.loads(shard.kept[row])
        image_id = kept.pop(IMAGE_ID, image_id)
    return Record(row, image_id, storage.redact(uri), None, data, error, kept, time.perf_counter() - started)


IMAGE_ID = "#image_id"  # in `Shard.kept`: the image_id of a URI that its list names more than once


def keep_json(kept: dict[str, Any]) -> str:
    return json.dumps(kept, separators=(",", ":"), default=str)
