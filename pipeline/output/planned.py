"""Compare the columns of results that follow from the plan alone, such as footprints, with those computed again."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import ImageError
from pipeline.output.geoparquet import GEOMETRY
from pipeline.planning.plan import Plan
from pipeline.sources import SOURCES

TOLERANCE = 1e-9
"""Relative, and in degrees: another version of PROJ may round differently."""
MAX_DIFFERENCES = 5


def differences(plan: Plan, table: pa.Table) -> Iterator[str]:
    """Describe the rows of a part whose planned columns are not those of the plan; MAX_DIFFERENCES at most."""
    if not any(set(source.columns.names) & set(table.schema.names) for source in SOURCES.values()):
        return
    found = 0
    for index in sorted(set(table["shard"].to_pylist())):
        shard = plan.load(index)
        source = SOURCES[shard.kind]
        if source.planned_columns is None or shard.payload is None:
            continue
        names = [name for name in source.columns.names if name in table.schema.names]
        rows = table.filter(pc.equal(table["shard"], index)).select(["row", *names])
        for row in rows.to_pylist():
            try:
                planned = source.planned_columns(shard.payload, row["row"])
            except ImageError as error:
                planned = {"error": error.message}
            wrong = [name for name in planned if not _is_same(name, row.get(name), planned[name])]
            if wrong and found < MAX_DIFFERENCES:
                found += 1
                yield f"row {row['row']} of shard {index}: {', '.join(wrong)} differ from those of the plan"


def _is_same(name: str, written: Any, planned: Any) -> bool:
    if written is None or planned is None:
        return written is planned
    if name == GEOMETRY:
        return _is_same_shape(written, planned)
    if isinstance(planned, Mapping):
        return all(_is_same("", written[key], value) for key, value in planned.items())
    if isinstance(planned, list):
        return len(written) == len(planned) and all(_is_same("", *pair) for pair in zip(written, planned, strict=True))
    if isinstance(planned, float):
        return math.isclose(written, planned, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    return bool(written == planned)


def _is_same_shape(written: bytes, planned: bytes) -> bool:
    if written == planned:
        return True
    import shapely  # of the extra [geo], which an output without footprints does not need

    try:
        return bool(shapely.equals_exact(shapely.from_wkb(written), shapely.from_wkb(planned), tolerance=TOLERANCE))
    except shapely.errors.GEOSException:
        return False
