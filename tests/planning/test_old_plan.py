"""A plan that was written before shards had a payload is loaded, resumed and updated."""

import base64
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from whole import jpeg, write_folder, write_tar

from pipeline import sources
from pipeline.config import RunConfig
from pipeline.coverage import Coverage
from pipeline.planning import plan as plans
from pipeline.planning.archive import Archive
from pipeline.planning.plan import Plan
from pipeline.planning.update import Change
from pipeline.sources import ReadOptions, Record
from pipeline.sources.objects import LooseImages
from pipeline.sources.shard import Shard
from pipeline.storage import access

OLD_SCHEMA = pa.schema(
    [
        ("index", pa.int32()),
        ("kind", pa.string()),
        ("uri", pa.string()),
        ("rows", pa.int64()),
        ("size_bytes", pa.int64()),
        ("etag", pa.string()),
        ("keys", pa.list_(pa.string())),
        ("key_sizes", pa.list_(pa.int64())),
        ("key_etags", pa.list_(pa.string())),
        ("kept", pa.list_(pa.string())),
        ("withheld", pa.bool_()),
    ]
)
IMAGES_PER_SHARD = 2
IMAGES = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = write_folder(tmp_path / "in", IMAGES)
    write_tar(folder / "a.tar", {f"{i}.jpg": jpeg(i) for i in range(3)})
    return folder


def old_row(shard: Shard) -> dict[str, object]:
    row = {name: getattr(shard, name) for name in OLD_SCHEMA.names[:6]}
    images = shard.payload or LooseImages(())
    assert isinstance(images, LooseImages)
    columns = (images.keys or None, images.sizes, images.etags, images.kept, images.hides_credentials)
    return {**row, **dict(zip(OLD_SCHEMA.names[6:], columns, strict=True))}


def write_old_plan(output: Path, shards: list[Shard]) -> None:
    """Write the files as the code did before: one row per shard, in row groups of 16."""
    (output / "_plan").mkdir(parents=True)
    name = "_plan/shards-00000-0123456789ab.parquet"
    table = pa.Table.from_pylist([old_row(shard) for shard in shards], OLD_SCHEMA)
    pq.write_table(table, output / name, row_group_size=16, compression="zstd", use_dictionary=False)
    record = {
        "files": [name],
        "shards": len(shards),
        "images": sum(shard.rows or 0 for shard in shards),
        "uncounted_shards": sum(shard.rows is None for shard in shards),
        "size_bytes": sum(shard.size_bytes for shard in shards),
        "indices": len(shards),
        "keep": base64.b64encode(pa.schema([("label", pa.int64())]).serialize()).decode(),
        "retired": {"1": [[0, 1]]},
        "withheld": any(old_row(shard)["withheld"] for shard in shards),
    }
    (output / "_plan" / "plan.json").write_text(json.dumps(record))


def loose_shards(folder: Path) -> list[Shard]:
    infos = [info for info in access.list_objects(str(folder)) if info.uri.endswith(".jpg")]
    runs = [infos[i : i + IMAGES_PER_SHARD] for i in range(0, len(infos), IMAGES_PER_SHARD)]
    payloads = [
        LooseImages(
            tuple(info.uri[len(str(folder)) + 1 :] for info in run),
            tuple(info.size_bytes for info in run),
            tuple(info.etag for info in run),
        )
        for run in runs
    ]
    return [
        Shard(index, "objects", str(folder), len(images.keys), sum(images.sizes or ()), payload=images)
        for index, images in enumerate(payloads)
    ]


def tar_shard(folder: Path, index: int) -> Shard:
    info = access.head(f"{folder}/a.tar")
    return Shard(index, "tar", info.uri, None, info.size_bytes, info.etag)


def old_plan(folder: Path, output: Path) -> tuple[Plan, list[Shard]]:
    shards = loose_shards(folder)
    shards.append(tar_shard(folder, len(shards)))
    write_old_plan(output, shards)
    plan = plans.load(str(output))
    assert plan is not None
    return plan, shards


def test_it_is_loaded(folder: Path, tmp_path: Path) -> None:
    plan, shards = old_plan(folder, tmp_path / "out")
    assert len(shards) == IMAGES // IMAGES_PER_SHARD + 1 > 16
    assert list(plans.read_shards(plan)) == shards
    assert [plan.load(shard.index) for shard in shards] == shards
    assert (plan.shards, plan.rows, plan.uncounted_shards) == (len(shards), IMAGES, 1)
    assert (plan.dropped, plan.hides_credentials) == ({1: ((0, 1),)}, False)
    assert plan.keep == pa.schema([("label", pa.int64())])


def test_the_shards_of_a_list_are_loaded(tmp_path: Path) -> None:
    images = LooseImages(("https://host/a.jpg",), kept=('{"label":1}',), hides_credentials=True)
    write_old_plan(tmp_path, [Shard(0, "objects", "", 1, payload=images)])
    plan = plans.load(str(tmp_path))
    assert plan is not None
    assert plan.hides_credentials
    assert plan.load(0).payload == images


def test_it_is_resumed(folder: Path, tmp_path: Path) -> None:
    plan, shards = old_plan(folder, tmp_path / "out")
    done = Coverage()
    for shard in range(2, IMAGES // IMAGES_PER_SHARD):
        done.add(shard, ((0, IMAGES_PER_SHARD),))
    done.add(len(shards) - 1, ((0, 1),))
    items = [
        item for shard, todo in plan.remaining(done) for item in sources.read(plan.load(shard), todo, ReadOptions())
    ]
    records = [item for item in items if isinstance(item, Record)]
    names = ["0000.jpg", "0001.jpg", "0003.jpg", "a.tar#1.jpg", "a.tar#2.jpg"]
    assert [record.image_id for record in records] == [f"{folder}/{name}" for name in names], "0002.jpg was dropped"
    assert [record.data for record in records] == [jpeg(i) for i in (0, 1, 3, 1, 2)]


def test_it_is_updated(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    plan, shards = old_plan(folder, output)
    (old_file,) = (output / "_plan").glob("*.parquet")
    old_bytes = old_file.read_bytes()
    (folder / "0009.jpg").write_bytes(b"replaced")
    (folder / "0040.jpg").write_bytes(b"new")

    archive = Archive(RunConfig(input=str(folder), output=str(output)))
    change = Change(plan)
    added = list(archive.new_shards(change))
    plans.save(plans.extend(plan, added, archive.keep_types, change.dropped))
    assert change.unchanged == IMAGES - 2 + 1, "all but 0002.jpg, which was dropped, and 0009.jpg; and the tar"

    updated = plans.load(str(output))
    assert updated is not None
    assert old_file.read_bytes() == old_bytes
    *before, after = plans.read_shards(updated)
    assert before == shards
    assert isinstance(after.payload, LooseImages)
    assert after.payload.keys == ("0002.jpg", "0009.jpg", "0040.jpg")
    assert updated.load(after.index) == after
    assert updated.load(4) == shards[4]
    assert updated.dropped == {1: ((0, 1),), 4: ((1, 2),)}

    unchanged = Change(updated)
    assert list(archive.new_shards(unchanged)) == []
    assert unchanged.unchanged == IMAGES + 1 + 1
