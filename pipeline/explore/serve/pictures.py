"""Pictures of rows, made when they are shown, and kept in memory up to CACHE_BYTES."""

import threading
from collections.abc import Callable, Sequence
from functools import cached_property

from pipeline.explore.pictures import SIDE, pictures_at
from pipeline.explore.serve.cache import Cache
from pipeline.explore.serve.rows import Rows
from pipeline.planning import plan as plans

CACHE_BYTES = 64 << 20
LARGE_SIDE = 384
"""Pixels of the picture of the row that is looked at."""
SIDES = (SIDE, LARGE_SIDE)
READERS = 2
"""Requests that read the archive at a time."""


class Pictures:
    """JPEGs by row. Thread-safe."""

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._cache: Cache[tuple[int, int], bytes] = Cache(CACHE_BYTES)
        self._readers = threading.Semaphore(READERS)
        self._lock = threading.Lock()

    @cached_property
    def _plan(self) -> plans.Plan | None:
        return plans.load(self.rows.output.uri)

    def get(
        self, positions: Sequence[int], side: int, is_wanted: Callable[[], bool] = lambda: True
    ) -> dict[int, bytes]:
        """JPEGs of side × side pixels by row; b"" for those that cannot be read.

        is_wanted: whether the answer still has a reader, which is asked after waiting for others.
        """
        known = {row: self._cache.get((row, side)) for row in positions}
        missing = [row for row, picture in known.items() if picture is None]
        if missing:
            with self._readers:
                if not is_wanted():
                    return {}
                known |= self._read(missing, side)
        return {row: picture or b"" for row, picture in known.items()}

    def _read(self, positions: Sequence[int], side: int) -> dict[int, bytes]:
        with self._lock:
            plan = self._plan
        names = self.rows.take(positions).select(["shard", "row", "image_id"]).to_pylist()
        places: dict[int, dict[int, str]] = {}
        for each in names:
            places.setdefault(each["shard"], {})[each["row"]] = each["image_id"]
        made = pictures_at(self.rows.output, plan, places, side) if plan else {}
        pictures = {row: made.get(each["image_id"], b"") for row, each in zip(positions, names, strict=True)}
        for row, picture in pictures.items():
            if picture:  # what cannot be read now is tried again
                self._cache.add((row, side), picture, len(picture))
        return pictures
