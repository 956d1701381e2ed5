"""--update processes only new and replaced images, and the output keeps one row per image."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole import TINY, Jobs, embeddings, jpeg, same, write_folder, write_tar

from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.errors import OutputRefused
from pipeline.output import directory
from pipeline.output import ledger as ledgers
from pipeline.output.commit import Commit
from pipeline.output.verify import verify
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.planning.update import Change
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.storage import access
from pipeline.storage.base import ObjectInfo


def planned(folder: Path, output: Path, before: Plan | None = None) -> tuple[Plan, Change | None]:
    archive = Archive(RunConfig(input=str(folder), output=str(output)))
    if before is None:
        return plans.make(str(output), archive.shards(), {}), None
    change = Change(before)
    shards = list(archive.new_shards(change))
    return plans.extend(before, shards, {}, change.dropped), change


def names(shards: Iterator[Shard] | list[Shard]) -> list[str]:
    return [
        key for shard in shards for key in (shard.payload and shard.payload.keys) or (shard.uri.rpartition("/")[2],)
    ]


def test_new_replaced_and_removed_objects(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 8)
    write_tar(folder / "a.tar", {"x.jpg": b"1"})
    write_tar(folder / "b.tar", {"x.jpg": b"1"})
    plan, _ = planned(folder, tmp_path / "out")
    (folder / "0003.jpg").write_bytes(b"replaced")
    (folder / "0005.jpg").unlink()
    (folder / "0001b.jpg").write_bytes(b"new")
    write_tar(folder / "a.tar", {"x.jpg": b"1", "y.jpg": b"2"})
    plan, change = planned(folder, tmp_path / "out", plan)
    assert change is not None
    assert names(list(plans.read_shards(plan))[3:]) == ["a.tar", "0001b.jpg", "0003.jpg"]
    assert (change.unchanged, change.removed) == (7, 1)
    removed = pq.read_table(tmp_path / "out/_plan/removed.parquet")["uri"].to_pylist()
    assert removed == [f"{folder}/0005.jpg"]
    assert sorted(change.dropped.values()) == sorted([((3, 4),), ((0, END),)])
    again, change = planned(folder, tmp_path / "out", plan)
    assert change is not None
    assert (again.shards, change.unchanged, change.dropped) == (plan.shards, 10, {})


def test_names_that_are_not_utf_8_are_compared_as_they_are_planned(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 2)
    for name in (b"caf\xe9.jpg", b"cafa.jpg", b"cafz.jpg"):
        with open(bytes(folder) + b"/" + name, "wb") as file:
            file.write(name)
    plan, _ = planned(folder, tmp_path / "out")
    again, change = planned(folder, tmp_path / "out", plan)
    assert change is not None
    assert (again.shards, change.unchanged, change.removed, change.dropped) == (plan.shards, 5, 0, {})


def test_objects_that_could_not_be_read_are_read_again(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "in", 4)
    write_tar(folder / "a.tar", {"x.jpg": b"1"})
    plan, _ = planned(folder, tmp_path / "out")
    loose, tar = (shard.index for shard in sorted(plans.read_shards(plan), key=lambda shard: shard.kind))
    change = Change(plan, {loose: ((2, 3),), tar: ((7, 8),)})
    shards = Archive(RunConfig(input=str(folder), output=str(tmp_path / "out"))).new_shards(change)
    assert sorted(names(shards)) == ["0002.jpg", "a.tar"]
    assert change.dropped == {loose: ((2, 3),), tar: ((0, END),)}


def test_only_transient_read_errors_are_read_again(tmp_path: Path) -> None:
    output = str(tmp_path)
    ledgers.begin(output)
    errors = [("read", "unreadable"), ("read", "truncated"), ("decode", "corrupt"), ("read", "not_found")]
    stages, kinds = zip(*errors, strict=True)
    (tmp_path / "_errors").mkdir()
    table = pa.table({"shard": [3] * 4, "row": range(4), "stage": stages, "error_type": kinds})
    name = "part-0001-000003-00000000"
    file = f"{name}-0a1b2c3d.parquet"
    pq.write_table(table, tmp_path / "_errors" / file)
    counts = {f"{stage}/{kind}": 1 for stage, kind in errors}
    commit = Commit(name, 1, None, file, {3: ((0, 4),)}, {}, 0, 4, counts)
    access.create(ledgers.commit_uri(output, commit.name), commit.to_json().encode())
    access.create(ledgers.commit_uri(output, "part-0001-000004-00000000"), b"without errors: never read")
    assert directory._failed_reads(output) == {3: ((0, 1), (3, 4))}
    (tmp_path / "_errors" / file).write_bytes(b"PAR1")
    with pytest.raises(OutputRefused, match=rf"_errors/{file} cannot be read: .* --repair, which removes it"):
        directory._failed_reads(output)


def test_a_hundred_thousand_unchanged_images_take_seconds(tmp_path: Path) -> None:
    infos = [ObjectInfo(f"s3://bucket/image-{i:08d}.jpg", 1, f"etag-{i}") for i in range(100_000)]
    step = plans.OBJECTS_PER_SHARD
    runs = [infos[i : i + step] for i in range(0, len(infos), step)]
    payloads = [LooseImages(tuple(i.uri[12:] for i in run), etags=tuple(i.etag for i in run)) for run in runs]
    shards = [Shard(0, "objects", "s3://bucket", len(each.keys), payload=each) for each in payloads]
    plan = plans.make(str(tmp_path), shards, {})
    started = time.monotonic()
    change = Change(plan)
    assert list(change.new(iter([*infos, ObjectInfo("s3://bucket/z.jpg", 1, "e")]))) == [
        ObjectInfo("s3://bucket/z.jpg", 1, "e")
    ]
    assert (change.unchanged, change.removed) == (100_000, 0)
    assert time.monotonic() - started < 60


@pytest.mark.slow
def test_an_update_equals_a_new_run(jobs: Jobs, tmp_path: Path) -> None:
    folder, out = write_folder(tmp_path / "in", 30), tmp_path / "out"
    write_tar(folder / "a.tar", {f"{i}.jpg": jpeg(50 + i) for i in range(6)})
    settings = ("--input", folder, *TINY, "--rows-per-part", 8, "--batch-size", 8, "--max-error-rate", 0.5)
    jobs.run("embed", *settings, "--output", out)
    first = embeddings(out)

    done = jobs.run("embed", *settings, "--output", out, "--update")
    assert "31 images or shards are unchanged" in done.stdout
    assert len(os.listdir(out / "_attempts")) == 1

    (folder / "0003.jpg").write_bytes(jpeg(90))
    (folder / "0004.jpg").write_bytes(b"broken now")
    (folder / "0010b.jpg").write_bytes(jpeg(91))
    (folder / "0020.jpg").unlink()
    write_tar(folder / "a.tar", {f"{i}.jpg": jpeg(60 + i) for i in range(4)})
    done = jobs.run("embed", *settings, "--output", out, "--update")
    assert "27 images or shards are unchanged; 1 are no longer in the archive" in done.stdout
    assert verify(str(out)).is_whole, verify(str(out)).problems
    report = json.loads((out / "_report.json").read_text())
    assert (report["planned"], report["rows"], report["errors"]) == (35, 34, 1)
    assert report["resumed_images"] == 28

    jobs.run("embed", *settings, "--output", tmp_path / "new")
    updated, new = embeddings(out), embeddings(tmp_path / "new")
    removed = f"{folder}/0020.jpg"
    assert np.array_equal(updated.pop(removed), first[removed])
    assert same(updated, new)
    assert pd.read_parquet(out / "_errors")["image_id"].tolist() == [f"{folder}/0004.jpg"]
