"""Outputs over real scenes for tests: the plan is made from the file, and the results come from a function."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import scenes

from pipeline import schema
from pipeline.geo.windows import Tiling
from pipeline.output import ledger as ledgers
from pipeline.planning import plan as plans
from pipeline.sources import scene as scene_source
from pipeline.stages.write import Sink
from pipeline.storage import access

KEEP = {field.name: field.type for field in scene_source.COLUMNS}
LABELS = pa.schema([("label", pa.string()), ("label_id", pa.int32()), ("score", pa.float32())])
VECTORS = pa.schema([("embedding", pa.list_(pa.float32(), 4))])
NAMES = ("water", "forest", "urban", "field", "desert", "snow", "rock", "swamp")


@dataclass(frozen=True)
class Place:
    """A window: its number across and down, and its columns in the plan."""

    across: int
    down: int
    columns: dict[str, Any]


def label(number: int, score: float = 1.0) -> dict[str, Any]:
    return {"label": NAMES[number % len(NAMES)], "label_id": number, "score": score}


def write_output(
    out: Path,
    paths: Sequence[Path],
    tiling: Tiling,
    result: Callable[[Place], dict[str, Any] | None],
    columns: pa.Schema = LABELS,
    rows_per_part: int = 1 << 30,
    **more: Any,
) -> Path:
    """Write the output of a finished run. result: the columns of a window; None if it has no data.

    more: of the Sink.
    """
    uri = str(out)
    access.write(f"{uri}/_run.json", json.dumps({"fingerprint": "f", "settings": {"model": "tiny"}}).encode())
    shards = [shard for path in paths for shard in scenes.shards_of(path, tiling)]
    plan = plans.make(uri, shards, KEEP)
    plans.save(plan)
    sink = Sink(uri, ledgers.begin(uri).attempt, schema.result(columns, KEEP), json.dumps({"fingerprint": "f"}), **more)
    for shard in plans.read_shards(plan):
        for start in range(0, shard.rows or 0, rows_per_part):
            numbers = range(start, min(start + rows_per_part, shard.rows or 0))
            rows = [_row(shard, number, result) for number in numbers]
            sink(pa.Table.from_pylist(rows, schema.predicted(columns, KEEP)))
    access.write(f"{uri}/_SUCCESS", b"")
    return out


def _row(shard: Any, number: int, result: Callable[[Place], dict[str, Any] | None]) -> dict[str, Any]:
    planned = scene_source.planned_columns(shard.payload, number)
    values = result(Place(*shard.payload.part.place(number), planned))
    member = f"{planned['window_col']},{planned['window_row']}"
    return {
        "image_id": f"{shard.uri}#{member}",
        "source": shard.uri,
        "member": member,
        "shard": shard.index,
        "row": number,
        "valid_fraction": 1.0,
        "is_empty": values is None,
        "network": "cpu",
        **planned,
        **(values or {}),
    }
