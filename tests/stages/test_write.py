"""Parts and their commits, also if a task runs twice."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import run_python

from pipeline import schema
from pipeline.coverage import END, normalize
from pipeline.errors import OutputRefused
from pipeline.output.commit import Commit, Tally
from pipeline.output.ledger import Ledger
from pipeline.output.parts import drop_rows, remove
from pipeline.stages.write import Sink

COLUMNS = pa.schema([("embedding", pa.list_(pa.float32(), 2))])
RESULT = schema.result(COLUMNS, {})


def rows(*keys: tuple[int, int], errors: tuple[int, ...] = (), ends: dict[int, int] | None = None) -> pa.Table:
    """Rows of (shard, row). errors: indices of the rows that failed. ends: number of rows by shard."""
    found = [
        {
            "image_id": f"{shard}/{row}", "source": "s", "shard": shard, "row": row, "width": 3, "height": 4,
            "embedding": None if place in errors else [float(shard), float(row)],
            "stage": "decode" if place in errors else None,
            "error_type": "empty" if place in errors else None,
            "read_seconds": 0.5, "size_bytes": 10, "core_seconds": 100.0, "gpu_seconds": 2.0,
        }
        for place, (shard, row) in enumerate(keys)
    ]  # fmt: skip
    found += [{"shard": shard, "row": total, schema.SHARD_ROWS: total} for shard, total in (ends or {}).items()]
    return pa.Table.from_pylist(found, schema=schema.predicted(COLUMNS, {}))


@pytest.fixture
def sink(tmp_path: Path) -> Sink:
    return Sink(str(tmp_path), 1, RESULT, json.dumps({"fingerprint": "f"}))


def written(sink: Sink, table: pa.Table) -> Commit:
    return Commit.from_json(sink(table) or "")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_part_is_read_on_one_thread(sink: Sink, tmp_path: Path) -> None:
    """A thread of Arrow could abort the process while the interpreter exits."""
    commit = written(sink, rows((0, 0), (0, 1)))
    code = (
        "import os\n"
        "from pipeline.output.parts import read_part\n"
        "before = os.listdir('/proc/self/task')\n"
        f"assert len(read_part({str(tmp_path / str(commit.part))!r})) == 2\n"
        "print(len(os.listdir('/proc/self/task')) - len(before))"
    )
    assert run_python("-c", code) == "0\n"


def test_a_part_its_errors_and_its_commit(sink: Sink, tmp_path: Path) -> None:
    commit = written(sink, rows((1, 3), (0, 8), (0, 9), (1, 2), (1, 5), errors=(3,), ends={1: 6}))
    assert commit.name == "part-0001-000000-00000008"
    assert commit.ranges == {0: ((8, 10),), 1: ((2, 4), (5, 6))}
    assert (commit.totals, commit.rows, commit.errors) == ({1: 6}, 4, 1)
    assert commit.errors_by_type == {"decode/empty": 1}
    assert (commit.seconds["read"], commit.bytes_read) == (2.5, 50)
    assert 500 < commit.core_seconds < 600, "five rows' and the writer's own"
    assert commit.gpu_seconds == 10
    part = pq.read_table(tmp_path / str(commit.part))
    assert part.schema.remove_metadata() == RESULT
    keys = list(zip(part["shard"].to_pylist(), part["row"].to_pylist(), strict=True))
    assert keys == [(0, 8), (0, 9), (1, 3), (1, 5)]
    assert json.loads(part.schema.metadata[b"nightshift"]) == {"fingerprint": "f"}
    errors = pq.read_table(tmp_path / str(commit.errors_part))
    assert errors.schema.remove_metadata() == schema.ERRORS
    sizes = [(tmp_path / name).stat().st_size for name in commit.files]
    assert commit.bytes_written == sum(sizes)
    assert errors["image_id"].to_pylist() == ["1/2"]


def test_vectors_have_no_dictionary_and_no_statistics(sink: Sink, tmp_path: Path) -> None:
    part = pq.ParquetFile(tmp_path / str(written(sink, rows((0, 0), (0, 1))).part))
    group = part.metadata.row_group(0)
    chunks = {group.column(i).path_in_schema: group.column(i) for i in range(group.num_columns)}
    vector = next(chunk for path, chunk in chunks.items() if path.startswith("embedding"))
    assert (vector.has_dictionary_page, vector.is_stats_set, vector.compression) == (False, False, "ZSTD")
    assert chunks["row"].is_stats_set


def test_the_end_of_an_empty_shard_alone(sink: Sink, tmp_path: Path) -> None:
    commit = written(sink, rows(ends={4: 0}))
    assert (commit.totals, commit.ranges, commit.part, commit.errors_part) == ({4: 0}, {}, None, None)
    assert files(tmp_path) == [f"_commits/{commit.name}.json"]


def test_a_retried_task_leaves_one_part(sink: Sink, tmp_path: Path) -> None:
    first = written(sink, rows((0, 0), (0, 1), errors=(1,)))
    second = written(sink, rows((0, 0), (0, 1), errors=(1,)))
    assert second == first
    assert files(tmp_path) == sorted([*first.files, f"_commits/{first.name}.json"])


def test_a_block_that_comes_twice_is_written_once(sink: Sink, tmp_path: Path) -> None:
    commit = written(sink, pa.concat_tables([rows((0, 0), (0, 1), ends={0: 2})] * 2))
    assert (commit.rows, commit.ranges) == (2, {0: ((0, 2),)})
    assert len(pq.read_table(tmp_path / str(commit.part))) == 2


def test_a_kill_between_part_and_commit_leaves_no_commit(
    sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("pipeline.stages.write.access.create", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sink(rows((0, 0)))
    assert [name.split("-")[0] for name in files(tmp_path)] == ["results/part"]
    commit = written(sink, rows((0, 0)))
    assert commit.part in files(tmp_path)


def test_remove(sink: Sink, tmp_path: Path) -> None:
    remove(str(tmp_path), written(sink, rows((0, 0), (0, 1), errors=(0,))))
    assert files(tmp_path) == []


def test_rows_are_dropped_and_the_others_stay(sink: Sink, tmp_path: Path) -> None:
    commit = written(sink, rows((0, 0), (0, 1), (0, 2), (0, 3), errors=(1,)))
    left = drop_rows(sink.output, {0: ((2, 9),)}, commit, 2)
    assert left is not None
    assert (left.ranges, left.rows, left.errors) == ({0: ((0, 2),)}, 1, 1)
    assert pq.read_table(tmp_path / str(left.part))["row"].to_pylist() == [0]
    assert drop_rows(sink.output, {0: ((0, 9),)}, commit, 2) is None
    assert drop_rows(sink.output, {1: ((0, 9),)}, commit, 2) is commit


def test_images_of_one_colour_after_scaling_are_counted_and_follow_their_rows(sink: Sink, tmp_path: Path) -> None:
    table = rows((0, 0), (0, 1), (0, 2), (1, 5), errors=(1,), ends={0: 3})
    flags = pa.array([True, True, True, True, None], pa.bool_())
    table = table.set_column(table.schema.get_field_index(schema.CONSTANT), schema.CONSTANT, flags)
    commit = written(sink, table)
    assert commit.constant == {0: ((0, 1), (2, 3)), 1: ((5, 6),)}, "an error is counted as such"
    tally = Tally()
    tally.add(commit)
    assert tally.constant == 3
    left = drop_rows(sink.output, {0: ((2, 9),), 1: ((0, 9),)}, commit, 2)
    assert left is not None
    assert left.constant == {0: ((0, 1),)}
    old = json.loads(commit.to_json())
    del old["constant"]
    assert Commit.from_json(json.dumps(old)).constant == {}, "a commit of an older version"


def test_members_that_are_not_read_are_counted_once_for_each_shard(sink: Sink) -> None:
    def part(first: int, *shards: int) -> Commit:
        table = rows(*((shard, first) for shard in shards), ends=dict.fromkeys(shards, 9))
        texts = pa.array([None] * len(shards) + [json.dumps({".npy": shard + 1}) for shard in shards], pa.string())
        name = schema.SHARD_LEFT_OUT
        return written(sink, table.set_column(table.schema.get_field_index(name), name, texts))

    commits = [part(0, 0, 1), part(1, 0), part(2, 1, 4)]  # the end of a shard is read again for its remaining rows
    assert [commit.left_out for commit in commits] == [
        {0: {".npy": 1}, 1: {".npy": 2}}, {0: {".npy": 1}}, {1: {".npy": 2}, 4: {".npy": 5}}
    ]  # fmt: skip
    ledger = Ledger(sink.output, 1)
    assert all(ledger.accept(commit) for commit in commits)
    assert ledger.left_out == {".npy": 1 + 2 + 5}
    replaced = {0: ((0, END),)}
    ledger = Ledger(sink.output, 2)
    for commit in commits:
        if left := drop_rows(sink.output, replaced, commit, 2):
            ledger.accept(left)
    assert ledger.left_out == {".npy": 2 + 5}, "a tar that was replaced counts with its new members only"
    empty = rows(ends={7: 0})
    alone = Commit.from_json(json.dumps({**json.loads(sink(empty) or ""), "left_out": {"7": {".npy": 3}}}))
    kept = drop_rows(sink.output, {7: ((0, END),)}, alone, 2)
    assert kept is not None
    assert kept.left_out == {}, "a commit without rows has nothing to rewrite"


def test_no_row_is_copied_from_a_damaged_part(sink: Sink, tmp_path: Path) -> None:
    commit = written(sink, rows((0, 0), (0, 1)))
    part = tmp_path / str(commit.part)
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(OutputRefused, match=rf"{commit.part} cannot be read: .*--repair, which removes it"):
        drop_rows(sink.output, {0: ((1, 2),)}, commit, 2)


# Rows that stand for several rows with the same bytes

KEEP = {"tile_x": pa.int32()}


def repeated(row: int, count: int, *, error: bool = False) -> dict[str, object]:
    """A row that stands for `count` rows from `row`."""
    places = [{"image_id": f"0/{row + i}", "member": f"m{row + i}", "tile_x": row + i} for i in range(count)]
    return {
        **places[0], "source": "s", "shard": 0, "row": row, "embedding": None if error else [float(row), 1.0],
        "error_type": "empty" if error else None, "stage": "decode" if error else None,
        schema.REPEATS: places[1:] or None, "read_seconds": 0.5, "size_bytes": 10,
    }  # fmt: skip


def table_of(*rows: dict[str, object]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=schema.predicted(COLUMNS, KEEP))


@pytest.fixture
def tile_sink(tmp_path: Path) -> Sink:
    return Sink(str(tmp_path), 1, schema.result(COLUMNS, KEEP), "{}")


def test_a_row_with_repeats_is_written_once_per_place(tile_sink: Sink, tmp_path: Path) -> None:
    end = {"shard": 0, "row": 9, schema.SHARD_ROWS: 9}
    table = table_of(repeated(6, 1), repeated(1, 3), repeated(0, 1), repeated(4, 2, error=True), end)
    commit = written(tile_sink, pa.concat_tables([table, table]))
    assert (commit.ranges, commit.totals, commit.rows, commit.errors) == ({0: ((0, 7),)}, {0: 9}, 5, 2)
    assert (commit.bytes_read, commit.seconds["read"]) == (40, 2.0)
    part = pq.read_table(tmp_path / str(commit.part))
    rows = part.select(["row", "image_id", "member", "tile_x"]).to_pylist()
    assert rows == [{"row": row, "image_id": f"0/{row}", "member": f"m{row}", "tile_x": row} for row in (0, 1, 2, 3, 6)]
    assert part["embedding"].to_pylist() == [[0.0, 1.0], *[[1.0, 1.0]] * 3, [6.0, 1.0]]
    errors = pq.read_table(tmp_path / str(commit.errors_part))
    assert errors.select(["row", "image_id", "member"]).to_pylist() == [
        {"row": row, "image_id": f"0/{row}", "member": f"m{row}"} for row in (4, 5)
    ]


def test_many_repeats_fill_several_parts(tile_sink: Sink, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = table_of(repeated(0, 1), repeated(1, 25), repeated(26, 1))
    monkeypatch.setattr("pipeline.stages.write.MAX_EXPANDED_BYTES", table.drop_columns([schema.REPEATS]).nbytes * 3)
    commits = [Commit.from_json(line) for line in str(tile_sink(table)).splitlines()]
    assert len(commits) > 2
    assert normalize(piece for commit in commits for piece in commit.ranges[0]) == ((0, 27),)
    assert sum(commit.rows for commit in commits) == 27
    assert sum(commit.bytes_read for commit in commits) == 30
    parts = [pq.read_table(tmp_path / str(commit.part)) for commit in commits]
    assert pa.concat_tables(parts)["row"].to_pylist() == list(range(27))
