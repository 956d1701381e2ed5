"""The first exception of a predictor on the screen."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline import schema
from pipeline.output import ledger as ledgers
from pipeline.output.commit import Commit
from pipeline.report.failures import show_first_failure
from pipeline.stages.predict import _reason
from pipeline.stages.write import Sink

COLUMNS = pa.schema([("score", pa.float32())])


def test_an_exception_is_shown_once_with_its_type_line_and_message(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    try:
        raise ValueError("bad weights")
    except ValueError as error:
        error_type, message = _reason(error)
    ledgers.begin(str(tmp_path))
    sink = Sink(str(tmp_path), 1, schema.result(COLUMNS, {}), json.dumps({"fingerprint": "f"}))
    see = show_first_failure(str(tmp_path))
    for row in range(3):
        bad = {"image_id": f"a/{row}", "source": "s", "shard": 0, "row": row}
        bad |= {"stage": "predict", "error_type": error_type, "message": message}
        see(Commit.from_json(sink(pa.Table.from_pylist([bad], schema=schema.predicted(COLUMNS, {}))) or ""))
    shown = capsys.readouterr().err.splitlines()
    line = test_an_exception_is_shown_once_with_its_type_line_and_message.__code__.co_firstlineno + 4
    cause = f"ValueError: bad weights ({__file__}:{line})"
    assert shown == [f"nightshift: predict() failed for a/0: {cause}; see _errors/ for all failures"]
