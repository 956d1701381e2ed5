"""Loose images. A virtual shard is a run of consecutive objects, or of consecutive lines of a list of URIs."""

import json
import os
import stat
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from pipeline.coverage import Ranges
from pipeline.errors import NightshiftError, ReadError
from pipeline.geo.tiles import footprint
from pipeline.sources.base import IMAGE_SUFFIXES, ReadOptions, Record, ShardEnd, Source
from pipeline.sources.shard import Shard
from pipeline.storage import access, base, uris
from pipeline.storage.credentials import hide_credentials
from pipeline.threads import GROUP_ITEMS, ordered_map

REMOTE_THREADS = 16
LOCAL_THREADS = 2


@dataclass(frozen=True, slots=True)
class LooseImages:
    """The payload of a virtual shard: its images, in row order.

    keys: relative to the shard's URI, or absolute.
    sizes: in bytes. sizes, etags: None for a list of URIs, which gives neither.
    kept: one JSON object per row with the `--keep` columns of a list; None if there are none.
    hides_credentials: credentials were removed from the keys.
    """

    keys: tuple[str, ...]
    sizes: tuple[int, ...] | None = None
    etags: tuple[str, ...] | None = None
    kept: tuple[str, ...] | None = None
    hides_credentials: bool = False

    def to_json(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "LooseImages":
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
        }
        return LooseImages(**fields)

    def first(self, rows: int) -> "LooseImages":
        columns = {name: getattr(self, name) for name in ("keys", "sizes", "etags", "kept")}
        return replace(self, **{name: column and column[:rows] for name, column in columns.items()})


def with_keys(shard: Shard, keys: tuple[str, ...]) -> Shard:
    """The shard with the URIs that include credentials. Those of another kind than loose images are remembered."""
    if not isinstance(shard.payload, LooseImages):
        for key in keys:
            hide_credentials(key)
        return shard
    return replace(shard, payload=replace(_payload(shard), keys=keys))


def _payload(shard: Shard) -> LooseImages:
    assert isinstance(shard.payload, LooseImages)
    return shard.payload


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the objects concurrently and yield them in order. The contract is in `pipeline.sources.base`."""
    images = _payload(shard)
    count = len(images.keys)
    rows = (row for start, stop in todo for row in range(start, min(stop, count)))
    local = uris.is_local(shard.uri or images.keys[0])
    threads, group_items = (LOCAL_THREADS, GROUP_ITEMS) if local else (REMOTE_THREADS, 1)
    expected_bytes = 0  # a list gives no sizes: expect the next images to be as large as the last ones

    def size_bytes(row: int) -> int:
        return images.sizes[row] if images.sizes else expected_bytes

    for record in ordered_map(lambda row: _fetch(shard, row), rows, threads, 2 * threads, size_bytes, group_items):
        expected_bytes = max(record.size_bytes, expected_bytes * 3 // 4)
        yield record
    yield ShardEnd(count)


def _fetch(shard: Shard, row: int) -> Record:
    images = _payload(shard)
    uri = uris.join(shard.uri, images.keys[row])
    # Only the lines of a list may contain credentials. A name that a store has listed is never redacted.
    plain = uri if images.etags else uris.redact(uri)
    etag = images.etags[row] if images.etags else ""
    started = time.perf_counter()
    data, error = None, None
    try:
        _check_object(images, row, uri, plain)
        data = access.read(uri, etag)
    except NightshiftError:  # a fault of the whole run, such as StorageRefused
        raise
    except ReadError as fault:
        error = fault
    except FileNotFoundError:
        if uris.is_escape(plain):
            error = ReadError("unreadable", f"{plain}: the name is not UTF-8; rename the file")
        else:
            error = ReadError("not_found", f"{plain} does not exist")
    except base.TooLarge as fault:
        error = ReadError("too_large", str(fault))
    except base.Changed as fault:
        error = ReadError("changed", str(fault))
    except Exception as fault:  # OSError, and any exception that a store raises for an invalid URI
        error = ReadError("unreadable", f"{plain}: {fault}")
    image_id, kept = plain, {}
    if images.kept:
        kept = json.loads(images.kept[row])
        image_id = kept.pop(IMAGE_ID, image_id)
        if "tile_z" in kept:  # of a folder of tiles; the plan is JSON, which holds no WKB
            kept |= footprint(kept["tile_z"], kept["tile_x"], kept["tile_y"])
    return Record(row, image_id, plain, None, data, error, kept, time.perf_counter() - started)


def _check_object(images: LooseImages, row: int, uri: str, plain: str) -> None:
    """Raise ReadError or TooLarge for an object that is no file (a pipe would block) or that does not fit in memory."""
    size_bytes = images.sizes[row] if images.sizes else 0
    if uris.is_local(uri):
        status = os.stat(uri)
        if not stat.S_ISREG(status.st_mode):
            raise ReadError("unreadable", f"{uri} is a folder, a pipe or a device, not a file")
        size_bytes = status.st_size
    base.check_size(plain, size_bytes)


IMAGE_ID = "#image_id"
"""Key in `LooseImages.kept` for the image_id of a URI that occurs more than once."""


def keep_json(kept: dict[str, Any]) -> str:
    """The JSON object of one row of `LooseImages.kept`."""
    return json.dumps(kept, separators=(",", ":"), default=str)


SOURCE = Source("objects", IMAGE_SUFFIXES, read, is_loose=True, payload=LooseImages)
