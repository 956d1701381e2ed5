"""The plan on disk, and planning at size."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import plan as plans
from pipeline.plan import Shard


def shards(count: int) -> list[Shard]:
    return [
        Shard(i, "objects", f"/data/{i}", 2, 30, keys=("a.jpg", "ü.jpg"), key_sizes=(10, 20), key_etags=("x", "y"))
        if i % 3
        else Shard(i, "tar", f"/data/{i}.tar", None, 100, "etag")
        for i in range(count)
    ]


def test_a_plan_reads_back_as_it_was(tmp_path: Path) -> None:
    wanted = shards(1200)
    made = plans.make(str(tmp_path), iter(wanted), {"label": pa.int64(), "tags": pa.list_(pa.string())})
    loaded = plans.load(str(tmp_path))
    assert loaded == made
    assert (made.shards, made.rows, made.uncounted_shards) == (1200, 1600, 400)
    assert loaded.keep.field("tags").type == pa.list_(pa.string())
    assert [loaded.load(i) for i in range(1200)] == wanted
    assert list(loaded.rows_by_shard()) == [shard.rows for shard in wanted]


def test_a_plan_that_was_cut_off_does_not_exist(tmp_path: Path) -> None:
    def broken() -> Iterator[Shard]:
        yield from shards(600)
        raise OSError("the bucket went away")

    with pytest.raises(OSError, match="went away"):
        plans.make(str(tmp_path), broken(), {})
    assert (tmp_path / "_plan").exists()
    assert plans.load(str(tmp_path)) is None


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """400 thousand keys in a process of its own: far below what holding them would take."""
    code = f"""
import resource
from pipeline import plan as plans
from pipeline.plan import Shard
def shards():
    for i in range(800):
        keys = tuple(f"folder-{{i:05d}}/image-{{k:08d}}.jpg" for k in range(512))
        yield Shard(i, "objects", "s3://b", 512, 1, keys=keys, key_sizes=(1,) * 512, key_etags=("0" * 32,) * 512)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = plans.make({str(tmp_path)!r}, shards(), {{}})
assert plan.rows == 800 * 512
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400, "MiB"
