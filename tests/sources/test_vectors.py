"""Parts of an output as shards: vectors and errors keep their names, and a broken part is error rows."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from outputs import write_output

from pipeline import schema
from pipeline.config import RunConfig
from pipeline.coverage import END
from pipeline.errors import InputRefused, OutputRefused
from pipeline.explore.vector_archive import VectorArchive
from pipeline.images.pixels import PixelTable
from pipeline.images.transform import Transform
from pipeline.images.values import Values
from pipeline.planning import plan as plans
from pipeline.planning.update import Change
from pipeline.sources import ReadOptions, Record, ShardEnd, read
from pipeline.sources.shard import Shard
from pipeline.stages.load import Loader

IDS = [f"/photos/{number:03d}.jpg" for number in range(20)]
VECTORS = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
BAD = ["/photos/bad-a.jpg", "/photos/bad-b.jpg"]
KEPT = {"cls": [str(number % 3) for number in range(20)]}


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return write_output(tmp_path / "out", IDS, VECTORS, errors=BAD, kept=KEPT)


def archive(output: Path, **settings: object) -> VectorArchive:
    return VectorArchive(RunConfig(input=str(output), output=f"{output}-labels", vectors=True, **settings))  # type: ignore[arg-type]


def shards(output: Path, **settings: object) -> list[Shard]:
    return [replace(each, index=index) for index, each in enumerate(archive(output, **settings).shards())]


def records(shard: Shard, todo: object = ((0, END),), **options: object) -> list[Record]:
    *items, end = read(shard, todo, ReadOptions(**options))  # type: ignore[arg-type]
    assert isinstance(end, ShardEnd)
    assert end.rows == shard.rows
    return items  # type: ignore[return-value]


def loader(keep: tuple[str, ...] = ()) -> Loader:
    return Loader(
        Transform(resize=1, crop=1), ReadOptions(keep), {name: (name, pa.string()) for name in keep}, 10, True, False,
        False, 100, 1, values=Values(),
    )  # fmt: skip


def test_every_row_of_an_output_is_one_record(output: Path) -> None:
    found = [record for shard in shards(output) for record in records(shard, keep=("cls",))]
    by_id = {record.image_id: record for record in found}
    assert sorted(by_id) == sorted([*IDS, *BAD])
    assert len(found) == 22
    for number, image_id in enumerate(IDS):
        np.testing.assert_array_equal(by_id[image_id].data.reshape(-1), VECTORS[number])  # type: ignore[union-attr]
        assert by_id[image_id].kept == {"cls": KEPT["cls"][number]}
        assert by_id[image_id].source == image_id
    for image_id in BAD:
        error = by_id[image_id].error
        assert error is not None
        assert (error.stage, error.error_type, error.message) == ("decode", "truncated", f"{image_id} ends early")


def test_only_the_rows_in_todo_are_read(output: Path) -> None:
    shard = next(each for each in shards(output) if "/results/" in each.uri and each.rows == 7)
    whole = records(shard)
    assert [record.row for record in whole] == list(range(7))
    for todo in [((0, 2), (5, 6)), ((6, END),), ((3, 4),), ()]:
        rows = [row for row in range(7) if any(start <= row < stop for start, stop in todo)]
        assert [record.image_id for record in records(shard, todo)] == [whole[row].image_id for row in rows]


def test_tables_and_records_are_the_same_rows(output: Path) -> None:
    for shard in shards(output):
        tables = list(loader(("cls",)).load(shard, ((0, END),)))
        table = pa.concat_tables(tables)
        assert table.schema == schema.loaded({"cls": pa.string()})
        expected = records(shard, keep=("cls",))
        rows = table.filter(pa.compute.is_null(table[schema.SHARD_ROWS]))
        assert rows["image_id"].to_pylist() == [record.image_id for record in expected]
        assert rows["row"].to_pylist() == [record.row for record in expected]
        assert table[schema.SHARD_ROWS].to_pylist()[-1] == shard.rows
        assert rows["error_type"].to_pylist() == [record.error and record.error.error_type for record in expected]
        good = [record for record in expected if record.error is None]
        if good:
            ((_, pixels),) = PixelTable(table).groups()
            assert pixels.shape == (len(good), 1, 1, 6)
            np.testing.assert_array_equal(pixels.reshape(-1, 6), [record.data.reshape(-1) for record in good])  # type: ignore[union-attr]
            assert set(rows["width"].to_pylist()) == {64}
            assert rows["cls"].to_pylist() == [record.kept["cls"] for record in good]


def test_vectors_of_16_bits_become_32(tmp_path: Path) -> None:
    out = write_output(tmp_path / "half", IDS, VECTORS, dtype=pa.float16())
    found = {record.image_id: record.data for shard in shards(out) for record in records(shard)}
    for number, image_id in enumerate(IDS):
        assert found[image_id].dtype == np.float32  # type: ignore[union-attr]
        np.testing.assert_array_equal(found[image_id].reshape(-1), VECTORS[number].astype(np.float16))  # type: ignore[union-attr]


def test_vectors_of_8_bits_become_32(tmp_path: Path) -> None:
    out = write_output(tmp_path / "small", IDS, VECTORS, dtype=pa.int8(), errors=["/bad.jpg"])
    found = {record.image_id: record for shard in shards(out) for record in records(shard)}
    assert found["/bad.jpg"].error is not None
    for number, image_id in enumerate(IDS):
        data = found[image_id].data.reshape(-1)  # type: ignore[union-attr]
        assert data.dtype == np.float32
        np.testing.assert_allclose(data, VECTORS[number], atol=np.abs(VECTORS[number]).max() / 127 * 0.501)


def test_a_part_that_is_gone_or_changed_is_one_error_per_row(output: Path) -> None:
    first, second, *_ = [each for each in shards(output) if "/results/" in each.uri]
    Path(first.uri).unlink()
    Path(second.uri).write_bytes(Path(second.uri).read_bytes() + b"\0")
    for shard, kind in ((first, "not_found"), (second, "changed")):
        found = records(shard)
        assert [record.row for record in found] == list(range(shard.rows or 0))
        assert {record.error and record.error.error_type for record in found} == {kind}
        table = pa.concat_tables(loader().load(shard, ((0, END),)))
        assert table["error_type"].to_pylist() == [kind] * 7 + [None]


def test_a_broken_part_is_one_error_per_row(output: Path) -> None:
    shard = replace(next(each for each in shards(output) if "/results/" in each.uri), etag="")
    data = bytearray(Path(shard.uri).read_bytes())
    for broken in (data[:50], b"PAR1" + bytes(100), data[:4] + bytes(60) + data[64:]):
        Path(shard.uri).write_bytes(broken)
        found = records(shard)
        assert [record.row for record in found] == list(range(7))
        assert {record.error and record.error.error_type for record in found} == {"corrupt"}


def test_the_plan_has_a_shard_per_part_with_its_rows(output: Path) -> None:
    planned = shards(output, keep="cls")
    assert [each.uri for each in planned] == sorted(each.uri for each in planned)
    assert sum(each.rows or 0 for each in planned) == 22
    assert all(each.kind == "vectors" and each.etag and each.size_bytes for each in planned)
    assert sum(each.rows or 0 for each in shards(output, limit=9)) == 9
    with pytest.raises(OutputRefused, match="has no column other"):
        shards(output, keep="other")


def test_an_unfinished_output_and_a_folder_are_refused(output: Path, tmp_path: Path) -> None:
    (output / "_SUCCESS").unlink()
    with pytest.raises(InputRefused, match=r"--from .*: its run has not finished; run its command again first"):
        shards(output)
    with pytest.raises(InputRefused, match="is not an output of Nightshift"):
        shards(tmp_path)


def test_an_update_adds_new_parts_and_refuses_rewritten_ones(output: Path, tmp_path: Path) -> None:
    of_labels = str(tmp_path / "labels")
    plan = plans.make(of_labels, archive(output).shards(), {})
    more = tmp_path / "more"
    write_output(more, ["/photos/new.jpg"], VECTORS[:1])
    change = Change(plan)
    assert list(archive(output).new_shards(change)) == []
    assert change.unchanged == plan.shards
    first = next(iter(sorted((output / "results").iterdir())))
    other = archive(output)
    del other._parts[str(first)]
    with pytest.raises(InputRefused, match=r"--update: 1 parts of .* were rewritten, .* with --overwrite"):
        list(other.new_shards(Change(plan)))


def test_parquet_files_of_an_archive_are_never_vectors(tmp_path: Path) -> None:
    from pipeline.sources import source_of

    assert source_of("/x/results/part-0001-000000-00000000-0a.parquet").kind == "parquet"  # type: ignore[union-attr]
