"""Commits that tasks return, some of them more than once."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline import schema
from pipeline.engine.attempt import Attempt
from pipeline.output import ledger as ledgers
from pipeline.output.commit import Commit
from pipeline.stages.write import Sink

COLUMNS = pa.schema([("embedding", pa.list_(pa.float32(), 2))])


def written(sink: Sink, *rows: int) -> Commit:
    """Write and commit these rows of shard 0."""
    table = [{"image_id": f"0/{row}", "source": "s", "shard": 0, "row": row, "embedding": [0.0, 1.0]} for row in rows]
    return Commit.from_json(sink(pa.Table.from_pylist(table, schema=schema.predicted(COLUMNS, {}))) or "")


def files(folder: Path) -> list[str]:
    return sorted(str(path) for path in folder.rglob("part-*"))


def test_a_retried_task_with_other_rows_changes_nothing(tmp_path: Path) -> None:
    sink = Sink(str(tmp_path), 1, schema.result(COLUMNS, {}), json.dumps({"fingerprint": "f"}))
    ledger = ledgers.begin(str(tmp_path))
    unused: dict[str, Any] = dict.fromkeys(("config", "predictor", "record", "archive", "plan", "lock"))
    attempt = Attempt(ledger=ledger, **unused)
    attempt._accept(written(sink, 0, 1, 2))
    before = files(tmp_path)
    assert len(before) == 2, "a part and its commit"
    attempt._accept(written(sink, 0, 1))
    assert files(tmp_path) == before, "the same name: the first try's commit stands"
    attempt._accept(written(sink, 1, 2, 3))
    assert files(tmp_path) == before, "it overlaps: the part and its commit are removed"
    assert ledger.rows == 3
