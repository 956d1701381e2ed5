"""Every fault that is planted in an output is found by `verify` and repaired by `repair`."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import verify as job
from pipeline import schema
from pipeline.errors import InputRefused, OutputLocked, OutputRefused
from pipeline.output import ledger as ledgers
from pipeline.output import lock as locks
from pipeline.output.commit import Commit
from pipeline.output.lock import Lock
from pipeline.output.verify import Verification, repair, verify
from pipeline.planning import plan as plans
from pipeline.sources.shard import Shard
from pipeline.stages.write import Sink
from pipeline.storage import access

COLUMNS = pa.schema([("embedding", pa.list_(pa.float32(), 2))])
RESULT = schema.result(COLUMNS, {})
ROWS = 10


def rows(shard: int, start: int, stop: int, ends: bool = False) -> pa.Table:
    """Rows of a shard, of which row 3 is an error. ends: add the row that has the shard's number of rows."""
    records = [
        {
            "image_id": f"/data/{shard}#{row}", "source": f"/data/{shard}", "shard": shard, "row": row,
            "embedding": None if row == 3 else [1.0, 2.0], "error_type": "empty" if row == 3 else None,
            "stage": "decode" if row == 3 else None,
        }
        for row in range(start, stop)
    ]  # fmt: skip
    records += [{"shard": shard, "row": stop, schema.SHARD_ROWS: stop}] if ends else []
    return pa.Table.from_pylist(records, schema=schema.predicted(COLUMNS, {}))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A whole output in four parts, of two shards with ten images each; the plan knows the number of one."""
    text = str(tmp_path)
    access.write(f"{text}/_run.json", json.dumps({"fingerprint": "f", "settings": {}}).encode())
    plans.save(plans.make(text, [Shard(0, "tar", "/data/0", ROWS), Shard(1, "tar", "/data/1", None)], {}))
    ledgers.begin(text)
    sink = Sink(text, 1, RESULT, json.dumps({"fingerprint": "f"}))
    for shard in range(2):
        sink(rows(shard, 0, 6))
        sink(rows(shard, 6, ROWS, ends=True))
    access.write(f"{text}/_SUCCESS", b"")
    return tmp_path


def part(output: Path, number: int = 0) -> Path:
    return sorted(output.glob("results/part-*.parquet"))[number]


def commit(output: Path, number: int = 0) -> Path:
    return sorted(output.glob("_commits/*.json"))[number]


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = pq.read_table(path)
    changed = change(table)
    pq.write_table(changed.replace_schema_metadata(changed.schema.metadata or table.schema.metadata), path)


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip_a_bit(path: Path, column: str) -> None:
    """Flip a bit in the last bytes of the column's first page."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    chunk = next(each for each in map(group.column, range(group.num_columns)) if each.path_in_schema == column)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size - 3] ^= 4
    path.write_bytes(data)


def copy_commit(output: Path, name: str) -> None:
    path = output / f"_commits/{name}.json"
    path.write_text(commit(output).read_text())
    edit(path, name=name, part="none.parquet", errors_part=None)


def test_a_whole_output(output: Path) -> None:
    result = verify(str(output))
    assert result.is_whole, result.problems
    assert (result.planned, result.rows, result.errors, result.parts, result.commits) == (20, 18, 2, 4, 4)


def test_another_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="is not an output of Nightshift"):
        verify(str(tmp_path))


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a part is missing": (lambda o: part(o).unlink(), "is missing"),
    "a part is truncated": (lambda o: part(o).write_bytes(part(o).read_bytes()[:-20]), "cannot be read"),
    "a part is empty": (lambda o: part(o).write_bytes(b""), "cannot be read"),
    "an errors part is missing": (lambda o: next(o.glob("_errors/*")).unlink(), "_errors/.* is missing"),
    "a part has no commit": (lambda o: commit(o).unlink(), "belongs to no commit"),
    "a commit covers rows of another": (
        lambda o: copy_commit(o, "part-0001-000001-00000009"),
        "another commit covers",
    ),
    "a commit has no part": (lambda o: [part(o, n).unlink() for n in (1, 2)], "is missing"),
    "a row is twice in a part": (
        lambda o: rewrite(part(o), lambda t: pa.concat_tables([t, t.slice(0, 1)])),
        "has 6 rows, but its commit says 5",
    ),
    "a row is missing in a part": (lambda o: rewrite(part(o), lambda t: t.slice(1)), "has 4 rows"),
    "a row has another number": (
        lambda o: rewrite(part(o), lambda t: t.set_column(4, "row", pa.array([0, 1, 2, 4, 9], pa.int64()))),
        "differ from those of its commit",
    ),
    "an image_id is in two rows": (
        lambda o: rewrite(part(o), lambda t: t.set_column(0, "image_id", pa.array(["x"] * len(t)))),
        "image_ids are in more than one row",
    ),
    "rows are missing": (lambda o: [commit(o, 1).unlink(), part(o, 1).unlink()], r"rows 6–10 are missing"),
    "the end of a shard was never read": (lambda o: edit(commit(o, 3), totals={}), r"rows 10–\? are missing"),
    "rows are not in the plan": (lambda o: edit(commit(o, 1), ranges={"0": [[6, 12]]}), "are not in the plan"),
    "a foreign Parquet file": (
        lambda o: (o / "results/part-9999-mine.parquet").write_bytes(part(o).read_bytes()),
        "part-9999-mine.parquet belongs to no commit",
    ),
    "a foreign file": (lambda o: (o / "mine.parquet").write_bytes(b"x"), "mine.parquet is not a file of this run"),
    "another model's part": (
        lambda o: rewrite(
            part(o), lambda t: t.replace_schema_metadata({b"nightshift": json.dumps({"fingerprint": "g"})})
        ),
        r"written by another run \(fingerprint g\)",
    ),
    "another schema": (
        lambda o: rewrite(part(o, 1), lambda t: t.append_column("more", pa.array([1] * len(t)))),
        "its schema differs",
    ),
    "NaN in an embedding": (
        lambda o: rewrite(
            part(o),
            lambda t: t.set_column(
                7, "embedding", pa.array([[1.0, float("nan")]] * len(t), COLUMNS.field("embedding").type)
            ),
        ),
        "embedding has NaN or infinity",
    ),
    "a bit of a part is flipped": (lambda o: flip_a_bit(part(o), "embedding.list.element"), "cannot be read"),
    "a commit is truncated": (
        lambda o: commit(o).write_bytes(commit(o).read_bytes()[:-9]),
        "commit part-.* is damaged",
    ),
    "a commit is empty": (lambda o: commit(o).write_bytes(b""), "commit part-.* is damaged"),
    "a commit is other JSON": (lambda o: commit(o).write_text('{"name": 1}'), "commit part-.* is damaged"),
    "a part lacks a column": (lambda o: rewrite(part(o), lambda t: t.drop_columns(["row"])), "are damaged: KeyError"),
    "_SUCCESS is missing": (lambda o: (o / "_SUCCESS").unlink(), "_SUCCESS is missing"),
    "the plan is missing": (lambda o: (o / "_plan/plan.json").unlink(), "the plan was never finished"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(output: Path, name: str) -> None:
    plant, message = PLANTED[name]
    plant(output)
    result = verify(str(output))
    assert not result.is_whole
    assert any(re.search(message, problem) for problem in result.problems), result.problems


@pytest.mark.parametrize("name", [name for name in PLANTED if name not in ("a foreign file", "the plan is missing")])
def test_a_repaired_output_can_be_completed(output: Path, name: str) -> None:
    """After a repair the next attempt finds only missing rows. With these the output is whole."""
    text = str(output)
    PLANTED[name][0](output)
    repair(text)
    plan = plans.load(text)
    assert plan is not None
    ledger = ledgers.begin(text)
    ledgers.sweep(ledger)
    sink = Sink(text, ledger.attempt, RESULT, json.dumps({"fingerprint": "f"}))
    for shard, todo in list(plan.remaining(ledger.coverage)):
        for start, stop in todo:
            sink(rows(shard, start, min(stop, ROWS), ends=stop >= ROWS))
    access.write(f"{text}/_SUCCESS", b"")
    result = verify(text)
    assert result.is_whole, result.problems
    assert (result.rows, result.errors) == (18, 2)


@pytest.mark.parametrize("vector", [None, [1.0, float("nan")], [None, 2.0]])
def test_kept_columns_may_have_nulls_and_nan(output: Path, vector: list[float | None] | None) -> None:
    column = pa.array([vector] * 5, pa.list_(pa.float32(), 2))
    for number in (0, 2):
        rewrite(part(output, number), lambda t: t.append_column("bbox", column))
    for number in (1, 3):
        rewrite(part(output, number), lambda t: t.append_column("bbox", column.slice(0, 4)))
    assert not verify(str(output)).is_whole
    edit(output / "_run.json", settings={"keep": ["box:bbox"]})
    assert verify(str(output)).problems == []


@pytest.mark.parametrize("record", ["_run.json", "_attempts/1.json", "_plan/plan.json"])
def test_a_damaged_record_is_refused(output: Path, record: str) -> None:
    (output / record).write_text("{")
    with pytest.raises(OutputRefused, match=rf"{record} is damaged \(.*add --overwrite"):
        verify(str(output))


def test_a_job_does_not_resume_from_a_damaged_commit(output: Path) -> None:
    commit(output).write_bytes(b"")
    with pytest.raises(OutputRefused, match=rf"is damaged .*jobs/verify.py {output} --repair, which removes it"):
        ledgers.begin(str(output))


def test_a_part_that_is_committed_during_verification_is_no_problem(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A driver writes a part between the listings of parts and of commits."""
    PLANTED["rows are missing"][0](output)
    list_commits = ledgers.valid_commits

    def list_and_commit(text: str, last_attempt: int, **more: Any) -> Iterator[Commit]:
        yield from list_commits(text, last_attempt, **more)
        Sink(text, 1, RESULT, json.dumps({"fingerprint": "f"}))(rows(0, 6, ROWS, ends=True))

    monkeypatch.setattr(ledgers, "valid_commits", list_and_commit)
    (problem,) = verify(str(output)).problems
    assert "rows 6–10 are missing" in problem
    monkeypatch.undo()
    assert verify(str(output)).is_whole


def test_repair_keeps_a_part_that_may_still_be_committed(output: Path) -> None:
    path, record = commit(output), commit(output).read_bytes()
    path.unlink()
    assert not repair(str(output)).is_whole
    path.write_bytes(record)
    assert verify(str(output)).problems == ["_SUCCESS is missing; run the same command again"]


def test_no_driver_can_start_during_a_repair(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    list_commits, refused = ledgers.valid_commits, []

    def list_and_start_a_driver(text: str, last_attempt: int, **more: Any) -> Iterator[Commit]:
        try:
            with Lock(text):
                pass
        except OutputLocked as error:
            refused.append(error)
        yield from list_commits(text, last_attempt, **more)

    monkeypatch.setattr(ledgers, "valid_commits", list_and_start_a_driver)
    assert repair(str(output)).is_whole
    assert len(refused) == 1
    with Lock(str(output)):
        assert job.main([str(output), "--repair"]) == 4
    assert job.main([str(output), "--repair"]) == 0


def test_the_job_prints_the_removed_commits(output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    PLANTED["a part is truncated"][0](output)
    assert job.main([str(output)]) == 5
    assert "removed" not in capsys.readouterr().out
    assert job.main([str(output), "--repair"]) == 5
    printed = capsys.readouterr().out
    assert "cannot be read" in printed
    assert "removed commit part-0001-000000-00000000\n" in printed
    assert not (output / "_SUCCESS").exists()


def test_repair_creates_no_directory(tmp_path: Path) -> None:
    with pytest.raises(InputRefused, match="is not an output of Nightshift"):
        repair(str(tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_an_unfinished_output_says_how_many_shards_are_uncounted() -> None:
    first = next(Verification("out", uncounted_shards=3, rows=5, parts=1).lines())
    assert first == "out: the images of 3 shards are not counted yet; so far 5 rows + 0 errors, in 1 part"
    assert next(Verification("out").lines()) == "out: not planned yet"
