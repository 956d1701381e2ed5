"""The plan on disk, and the memory that planning uses."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.coverage import END, Coverage
from pipeline.planning import plan as plans
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard


def shards(count: int) -> list[Shard]:
    return [
        Shard(i, "objects", f"/data/{i}", 2, 30, payload=LooseImages(("a.jpg", "ü.jpg"), (10, 20), ("x", "y")))
        if i % 3
        else Shard(i, "tar", f"/data/{i}.tar", None, 100, "etag")
        for i in range(count)
    ]


def test_a_plan_is_loaded_as_it_was_made(tmp_path: Path) -> None:
    expected = shards(1200)
    made = plans.make(str(tmp_path), iter(expected), {"label": pa.int64(), "tags": pa.list_(pa.string())})
    assert plans.load(str(tmp_path)) is None, "a plan has no effect before it is saved"
    plans.save(made)
    loaded = plans.load(str(tmp_path))
    assert loaded is not None
    assert (made.shards, made.rows, made.uncounted_shards) == (1200, 1600, 400)
    assert loaded.keep.field("tags").type == pa.list_(pa.string())
    assert [loaded.load(i) for i in range(1200)] == expected
    assert list(plans.read_shards(loaded)) == expected
    assert loaded.shard_rows.tolist() == [-1 if shard.rows is None else shard.rows for shard in expected]


def test_an_unfinished_plan_does_not_exist(tmp_path: Path) -> None:
    def broken() -> Iterator[Shard]:
        yield from shards(600)
        raise OSError("the bucket went away")

    with pytest.raises(OSError, match="went away"):
        plans.make(str(tmp_path), broken(), {})
    assert (tmp_path / "_plan").exists()
    assert plans.load(str(tmp_path)) is None


def test_memory_does_not_grow_with_the_archive(tmp_path: Path) -> None:
    """Plans 400 thousand keys in a separate process. To hold them would take far more memory."""
    code = f"""
import resource
from pipeline.planning import plan as plans
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
def shards():
    for i in range(800):
        keys = tuple(f"folder-{{i:05d}}/image-{{k:08d}}.jpg" for k in range(512))
        yield Shard(i, "objects", "s3://b", 512, 1, payload=LooseImages(keys, (1,) * 512, ("0" * 32,) * 512))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
plan = plans.make({str(tmp_path)!r}, shards(), {{}})
assert plan.rows == 800 * 512
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 400, "MiB"


def test_the_remaining_rows_of_a_plan(tmp_path: Path) -> None:
    plan = plans.make(str(tmp_path), [Shard(0, "tar", "a", 6), Shard(0, "tar", "b", None), Shard(0, "tar", "c", 0)], {})
    coverage = Coverage()
    assert list(plan.remaining(coverage)) == [(0, ((0, 6),)), (1, ((0, END),))]
    assert plan.images(coverage.totals) is None
    coverage.add(0, ((2, 4),))
    coverage.add(1, ((0, 3),))
    assert list(plan.remaining(coverage)) == [(0, ((0, 2), (4, 6))), (1, ((3, END),))]
    coverage.totals[1] = 3
    assert list(plan.remaining(coverage)) == [(0, ((0, 2), (4, 6)))]
    assert plan.images(coverage.totals) == 9


def test_an_extended_plan_keeps_its_shards_and_drops_rows(tmp_path: Path) -> None:
    old = plans.make(str(tmp_path), shards(3), {})
    plans.save(plans.extend(old, [Shard(0, "tar", "new", 5)], {}, {1: ((0, 1),), 0: ((0, END),)}))
    plan = plans.load(str(tmp_path))
    assert plan is not None
    assert [shard.uri for shard in plans.read_shards(plan)] == [*(shard.uri for shard in shards(3)), "new"]
    assert (plan.shards, plan.rows) == (4, 9)
    new = plans.SHARDS_PER_FILE
    assert list(plan.remaining(Coverage())) == [(1, ((1, 2),)), (2, ((0, 2),)), (new, ((0, 5),))]
    assert plan.load(new).uri == "new"
    assert plan.images({}) == 8


def test_two_drivers_that_plan_at_once_do_not_mix_their_plans(tmp_path: Path) -> None:
    first = plans.make(str(tmp_path), shards(5), {})
    second = plans.make(str(tmp_path), shards(3), {})
    plans.save(first, is_first=True)
    with pytest.raises(FileExistsError):
        plans.save(second, is_first=True)
    plan = plans.load(str(tmp_path))
    assert plan is not None
    assert list(plans.read_shards(plan)) == shards(5)
    assert plan.load(4) == shards(5)[4]
