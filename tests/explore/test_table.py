"""Outputs, read again: the rows that count, in mid-run, of earlier layouts, and of broken files."""

import json
import shutil
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import S3Server

from pipeline import open_output, schema
from pipeline.errors import InputRefused, OutputRefused
from pipeline.explore import table as tables
from pipeline.output import ledger as ledgers
from pipeline.output.commit import Commit
from pipeline.stages.write import Sink
from pipeline.storage import access

COLUMNS = pa.schema([("label", pa.string()), ("embedding", pa.list_(pa.float32(), 2))])
RESULT = schema.result(COLUMNS, {})


def rows(shard: int, start: int, stop: int) -> pa.Table:
    """Rows of a shard, of which row 3 is an error."""
    records = [
        {
            "image_id": f"{shard}#{row}", "source": f"/data/{shard}", "shard": shard, "row": row,
            "label": f"class {shard}", "embedding": None if row == 3 else [float(shard), float(row)],
            "error_type": "empty" if row == 3 else None, "stage": "decode" if row == 3 else None,
            "is_empty": False,
        }
        for row in range(start, stop)
    ]  # fmt: skip
    return pa.Table.from_pylist(records, schema=schema.predicted(COLUMNS, {}))


def write_output(uri: str) -> Sink:
    """An output in mid-run: four parts, of two shards with nine rows and one error each."""
    access.write(f"{uri}/_run.json", json.dumps({"fingerprint": "f", "settings": {"model": "tiny"}}).encode())
    sink = attempt(uri)
    for shard in range(2):
        sink(rows(shard, 0, 6))
        sink(rows(shard, 6, 10))
    return sink


def attempt(uri: str) -> Sink:
    return Sink(uri, ledgers.begin(uri).attempt, RESULT, json.dumps({"fingerprint": "f"}))


@pytest.fixture
def output(tmp_path: Path) -> Path:
    write_output(str(tmp_path / "out"))
    return tmp_path / "out"


def ids(uri: object) -> list[str]:
    return [i for batch in open_output(str(uri)).batches(["image_id"]) for i in batch["image_id"].to_pylist()]


def parts(output: Path) -> list[Path]:
    commits = [Commit.from_json(path.read_text()) for path in sorted((output / "_commits").iterdir())]
    return [output / str(commit.part) for commit in commits]


EXPECTED = [f"{shard}#{row}" for shard in range(2) for row in range(10) if row != 3]


def test_every_committed_row_once_and_in_order(output: Path) -> None:
    opened = open_output(str(output))
    assert ids(output) == EXPECTED
    assert (opened.rows, opened.error_rows, opened.is_finished) == (18, 2, False)
    assert opened.schema == RESULT
    assert opened.settings == {"model": "tiny"}
    assert opened.describe().endswith("18 rows + 2 errors committed so far; the run has not finished")
    access.write(f"{output}/_SUCCESS", b"")
    assert open_output(str(output)).describe().endswith("out: 18 rows + 2 errors")


def test_columns_come_in_the_order_asked_for_and_batches_are_small(output: Path) -> None:
    batches = list(open_output(str(output)).batches(["embedding", "shard"], batch_rows=2))
    assert all(batch.schema.names == ["embedding", "shard"] for batch in batches)
    assert max(batch.num_rows for batch in batches) == 2
    whole = pa.Table.from_batches(batches)
    assert whole["embedding"].to_pylist() == [[float(s), float(r)] for s in range(2) for r in range(10) if r != 3]
    assert next(open_output(str(output)).batches()).schema == RESULT


def test_errors(output: Path) -> None:
    (first, second) = open_output(str(output)).errors()
    assert first.schema == schema.ERRORS
    assert [*first["image_id"].to_pylist(), *second["image_id"].to_pylist()] == ["0#3", "1#3"]
    assert next(open_output(str(output)).errors(["error_type"])).to_pylist() == [{"error_type": "empty"}]
    with pytest.raises(OutputRefused, match="errors have no column label"):
        next(open_output(str(output)).errors(["label"]))


def test_rows_with_a_value_and_row_groups_that_are_not_read(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = tables._read
    monkeypatch.setattr(tables, "_read", lambda *a: read.append(a[3].path) or original(*a))
    batches = list(open_output(str(output)).batches(["row"], equal={"label": "class 1", "row": 7}))
    assert [row for batch in batches for row in batch["row"].to_pylist()] == [7]
    assert len(read) == 1, "three of four parts have no such row by their statistics"


def test_rows_that_do_not_count_are_not_read(output: Path) -> None:
    """A part without a commit, and commits of a driver that has been replaced."""
    late = Sink(str(output), 1, RESULT, "{}")
    shutil.copy(parts(output)[0], output / "part-0001-000009-00000000-00000000.parquet")
    attempt(str(output))
    late(rows(5, 0, 2))
    assert ids(output) == EXPECTED


def test_an_earlier_layout(output: Path, tmp_path: Path) -> None:
    """Parts in a folder of their own or beside `_run.json`, errors named with or without their folder."""
    for path in sorted((output / "_commits").iterdir()):
        record = json.loads(path.read_text())
        old = str(record["part"])
        record["part"] = old.removeprefix("results/") if "/" in old else f"results/{old}"
        (output / record["part"]).parent.mkdir(exist_ok=True)
        (output / old).rename(output / record["part"])
        if record["errors_part"]:
            name = record["errors_part"]
            record["errors_part"] = name.removeprefix("_errors/") if "/" in name else f"_errors/{name}"
        path.write_text(json.dumps(record))
    assert ids(output) == EXPECTED
    assert sum(batch.num_rows for batch in open_output(str(output)).errors()) == 2


def test_vectors_of_an_earlier_version_are_cast(output: Path) -> None:
    """Parts of one output may name the elements of a vector differently."""
    last = parts(output)[-1]
    old = pq.read_table(last)
    vector = pa.list_(pa.field("x", pa.float32(), nullable=False), 2)
    names = old.schema.names
    pq.write_table(old.set_column(names.index("embedding"), "embedding", old["embedding"].cast(vector)), last)
    whole = pa.Table.from_batches(open_output(str(output)).batches())
    assert whole["embedding"].to_pylist()[-1] == [1.0, 9.0]


@pytest.mark.slow
def test_an_output_in_a_bucket(s3: S3Server) -> None:
    write_output(s3.uri("explore-table"))
    opened = open_output(s3.uri("explore-table"))
    assert [i for batch in opened.batches(["image_id"]) for i in batch["image_id"].to_pylist()] == EXPECTED
    assert sum(batch.num_rows for batch in opened.errors()) == 2
    with pytest.raises(InputRefused, match="is not an output"):
        open_output(s3.uri("elsewhere"))


def test_what_is_no_output(tmp_path: Path) -> None:
    for uri in (str(tmp_path), str(tmp_path / "missing")):
        with pytest.raises(InputRefused, match=r"is not an output of Nightshift: it has no _run\.json"):
            open_output(uri)
    with pytest.raises(InputRefused, match="names no bucket"):
        open_output("s3://")
    access.write(f"{tmp_path}/_run.json", b"[")
    with pytest.raises(OutputRefused, match="is damaged"):
        open_output(str(tmp_path))


def test_an_output_without_rows(tmp_path: Path) -> None:
    access.write(f"{tmp_path}/_run.json", b"{}")
    opened = open_output(str(tmp_path))
    assert (opened.rows, opened.columns, list(opened.batches()), list(opened.errors())) == (0, [], [], [])
    with pytest.raises(OutputRefused, match="has no rows yet"):
        next(opened.batches(["image_id"]))


def test_unknown_columns_and_broken_parts(output: Path) -> None:
    with pytest.raises(OutputRefused, match="has no column score; its columns are image_id"):
        next(open_output(str(output)).batches(["score"]))
    opened = open_output(str(output))
    last = parts(output)[-1]
    chunk = pq.read_metadata(last).row_group(0).column(0)
    data = bytearray(last.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 0xFF
    last.write_bytes(data)
    with pytest.raises(OutputRefused, match=r"cannot be read: .*; run jobs/verify.py .* --repair"):
        list(opened.batches())
    shutil.copy(parts(output)[0], last)
    with pytest.raises(OutputRefused, match="its commit says 4"):
        list(opened.batches())
    last.unlink()
    with pytest.raises(OutputRefused, match="is gone"):
        list(opened.batches())


def test_a_reader_that_stops_early_leaves_no_thread(output: Path) -> None:
    before = threading.active_count()
    batches = open_output(str(output)).batches(batch_rows=1)
    next(batches)
    batches.close()
    assert threading.active_count() == before
