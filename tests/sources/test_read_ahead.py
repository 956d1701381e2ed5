"""Reading ahead: every range once, many at a time, and a bounded number of bytes."""

import itertools
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import scenes
from scenes import counting_server, shards_of, tiling, windows_of

from pipeline.sources import gdal, read_ahead
from pipeline.sources.read_ahead import Range, ReadAhead

DATA = bytes(range(256)) * 400


class Store:
    """Serves DATA slowly. requests: all of them. most: requests at the same time."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds, self.requests, self.running, self.most = seconds, list[Range](), 0, 0
        self.lock = threading.Lock()

    def __call__(self, start: int, stop: int) -> bytes:
        with self.lock:
            self.requests.append((start, stop))
            self.running += 1
            self.most = max(self.most, self.running)
        time.sleep(self.seconds)
        with self.lock:
            self.running -= 1
        return DATA[start:stop]


def test_ranges_are_fetched_once_and_many_at_a_time() -> None:
    store = Store(0.01)
    steps = [[(start, start + 100), (start + 200, start + 300)] for start in range(0, 8000, 200)]
    ahead = ReadAhead(store, steps, 4000)
    for number, step in enumerate(steps):
        ahead.advance(number)
        for start, stop in step if number == 0 else step[1:]:  # the first one was needed by the last step too
            assert ahead.find(start, stop) == DATA[start:stop]
            assert ahead.find(start + 7, stop - 1) == DATA[start + 7 : stop - 1], "a part of a range"
    ahead.close()
    assert ahead.find(100, 200) is None, "no reader waits for it"
    starts = [start for start, _ in store.requests]
    assert len(starts) == len(set(starts)) == 41
    assert 2 <= store.most <= read_ahead.THREADS


def test_neighbours_are_one_request_up_to_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "MAX_REQUEST_BYTES", 1000)
    store = Store()
    ahead = ReadAhead(store, [[(start, start + 292) for start in range(0, 3000, 300)]], 1 << 20)
    ahead.advance(0)
    assert all(ahead.find(start, start + 292) is not None for start in range(0, 3000, 300))
    ahead.close()
    assert sorted(store.requests) == [(0, 892), (900, 1792), (1800, 2692), (2700, 2992)]


def test_the_bytes_ahead_are_bounded() -> None:
    store = Store()
    steps = [[(start, start + 1000)] for start in range(0, 100_000, 1100)]
    ahead = ReadAhead(store, steps, 8000)
    for number in range(len(steps)):
        ahead.advance(number)
        held = sum(each.stop - each.start for each in ahead._held)
        assert held <= 8000 + 1000 + 8000 // read_ahead.BATCHES
        assert len(store.requests) - number <= 10
    ahead.close()


def test_a_step_beyond_the_limit_is_left_to_the_reader() -> None:
    store = Store()
    ahead = ReadAhead(store, [[(0, 5000)], [(6000, 6100)]], 1000)
    ahead.advance(0)
    assert ahead.find(0, 5000) is None
    ahead.advance(1)
    assert ahead.find(6000, 6100) == DATA[6000:6100]
    ahead.close()
    assert store.requests == [(6000, 6100)]


def test_an_error_is_raised_where_the_bytes_are_needed() -> None:
    def fetch(start: int, stop: int) -> bytes:
        if start == 500:
            raise OSError("no such range")
        return DATA[start:stop]

    ahead = ReadAhead(fetch, [[(0, 100)], [(500, 600)], [(900, 1000)]], 10_000)
    ahead.advance(0)
    assert ahead.find(0, 100) == DATA[:100]
    ahead.advance(1)
    with pytest.raises(OSError, match="no such range"):
        ahead.find(500, 600)
    ahead.advance(2)
    assert ahead.find(900, 1000) == DATA[900:1000]
    ahead.close()


KINDS = {
    "tiles": {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "pixel", "compress": "deflate"},
    "bands": {"tiled": True, "blockxsize": 64, "blockysize": 64, "interleave": "band"},
    "strips": {"blockysize": 8, "compress": "deflate"},
    "sparse": {"tiled": True, "blockxsize": 64, "blockysize": 64, "sparse_ok": True, "interleave": "band"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_remote_scene_is_read_by_many_requests_at_a_time(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "MAX_REQUEST_BYTES", 1 << 14)
    numbers = scenes.numbers(3, 500, 700)
    if kind == "sparse":
        numbers[1:, 128:, 256:] = 0
    path = scenes.write(tmp_path / "a.tif", numbers, **KINDS[kind])
    with counting_server(tmp_path) as (base, server):
        running: list[int] = [0, 0]
        lock, serve = threading.Lock(), server.do_GET

        def slow(handler: scenes.Counting) -> None:
            with lock:
                running[0] += 1
                running[1] = max(running)
            time.sleep(0.005)
            serve(handler)
            with lock:
                running[0] -= 1

        server.do_GET = slow  # type: ignore[method-assign]
        (shard,) = shards_of(f"{base}/a.tif", tiling(100))
        server.ranges.clear()
        remote = windows_of(shard)
        asked = sorted((start, stop) for name, start, stop in server.ranges if name == "a.tif")
    local = windows_of(shards_of(path, tiling(100))[0])
    for one, other in zip(remote, local, strict=True):
        assert np.array_equal(np.ma.getdata(one.data), np.ma.getdata(other.data))
    assert running[1] >= 3
    data = [each for each in asked if each[0] >= gdal.CHUNK_BYTES]
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(data)), "each block once"


def test_a_store_that_fails_in_the_middle_gives_error_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSHIFT_RETRY_SECONDS", "0")
    scenes.write(tmp_path / "a.tif", scenes.numbers(3, 1000, 700), **KINDS["bands"])
    size = (tmp_path / "a.tif").stat().st_size
    with counting_server(tmp_path) as (base, server):
        (shard,) = shards_of(f"{base}/a.tif", tiling(100))
        serve = server.do_GET

        def failing(handler: scenes.Counting) -> None:
            first = int(handler.headers["Range"].removeprefix("bytes=").partition("-")[0])
            if first > size // 2:
                handler.send_error(503)
            else:
                serve(handler)

        server.do_GET = failing  # type: ignore[method-assign]
        records = windows_of(shard)
    assert len(records) == shard.rows
    errors = [record for record in records if record.error]
    assert 0 < len(errors) < len(records)
    assert {record.error.error_type for record in errors if record.error} == {"unreadable"}


def test_local_files_are_not_read_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gdal, "ReadAhead", None)
    path = scenes.write(tmp_path / "a.tif", scenes.numbers(3, 200, 300), **KINDS["tiles"])
    assert all(record.error is None for record in windows_of(shards_of(path)[0]))
