"""Pairs of similar images → groups, and which image of each to keep."""

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.errors import SettingRefused
from pipeline.explore.pairs import Pairs
from pipeline.explore.table import Output

KEEPS = ("first", "largest")
COLUMN_PREFIX = "column:"
MAX_SHOWN = 3
SCHEMA = pa.schema(
    [("group", pa.int64()), ("image_id", pa.string()), ("keep", pa.bool_()), ("similarity", pa.float32())]
)


class Limit(Protocol):
    """What pairs must have to be duplicates. is_estimate: it was not given."""

    @property
    def is_estimate(self) -> bool: ...

    def describe(self) -> str:
        """In words, for the user."""

    def to_json(self) -> dict[str, Any]:
        """For the metadata of the file."""


@dataclass(frozen=True)
class Duplicates:
    """The groups of duplicates of an output.

    table: group, image_id, keep, similarity to the image of the group that is kept. Sorted by group, the kept image
    first. limit: what pairs had to have. rows: of the output. how: how the pairs were found.
    """

    table: pa.Table
    limit: Limit
    rows: int
    how: str

    @cached_property
    def groups(self) -> int:
        """Number of groups."""
        return int(np.sum(self.table["keep"].to_numpy()))

    def describe(self) -> str:
        """Two lines: the groups, and how they were found; a third one if their least similar pairs should be seen."""
        dropped = len(self.table) - self.groups
        lines = [
            f"{self.groups:,} groups with {len(self.table):,} of {self.rows:,} images; {dropped:,} need not be kept",
            f"{self.limit.describe()}; {self.how}",
        ]
        if dropped and self.limit.is_estimate:
            lines.append(f"the least similar: {self._least_similar()}; if they are no copies, raise --threshold")
        return "\n".join(lines)

    def _least_similar(self) -> str:
        rows = self.table.filter(pc.invert(self.table["keep"])).sort_by("similarity").slice(0, MAX_SHOWN).to_pylist()
        kept = self.table.filter(self.table["keep"])
        names = dict(zip(kept["group"].to_pylist(), kept["image_id"].to_pylist(), strict=True))
        return ", ".join(f"{row['image_id']} and {names[row['group']]} ({row['similarity']:.3f})" for row in rows)


def check_keep(output: Output, keep: str) -> None:
    """Raise SettingRefused for another --keep than there is, OutputRefused for an unknown column."""
    if keep not in KEEPS and not keep.startswith(COLUMN_PREFIX):
        raise SettingRefused(f"--keep is {keep!r}: it must be first, largest or column:NAME")
    if keep.startswith(COLUMN_PREFIX):
        output.require([keep.removeprefix(COLUMN_PREFIX)])


def table(
    output: Output, keeper: Mapping[int, int], similarity: Mapping[int, float], record: Mapping[str, Any]
) -> pa.Table:
    """The rows of `SCHEMA`. keeper, similarity: as `groups` returns them. record: for the metadata of the file."""
    rows = np.array(sorted(keeper, key=lambda row: (keeper[row], row != keeper[row], row)), np.int64)
    of_group = np.array([keeper[row] for row in rows], np.int64)
    columns = {
        "group": np.unique(of_group, return_inverse=True)[1].astype(np.int64),
        "image_id": output.take(rows, ["image_id"])["image_id"],
        "keep": rows == of_group,
        "similarity": np.array([similarity[row] for row in rows], np.float32),
    }
    known = {"output": output.uri, "rows": output.rows, **record}
    return pa.table(columns, schema=SCHEMA.with_metadata({"nightshift": json.dumps(known)}))


def order(output: Output, rows: NDArray[np.int64], keep: str) -> NDArray[np.int64]:
    """Some rows of an output, those that are rather kept first. rows: in ascending order."""
    if keep == KEEPS[0] or not len(rows):
        return rows
    if keep == KEEPS[1]:
        sides = output.take(rows, ["width", "height"])
        values = sides["width"].to_numpy().astype(np.int64) * sides["height"].to_numpy()
        return np.asarray(rows[np.lexsort((rows, -values))], np.int64)
    name = keep.removeprefix(COLUMN_PREFIX)
    column = pa.table({"value": _as_numbers(output.take(rows, [name])[name]), "place": pa.array(np.arange(len(rows)))})
    places = column.sort_by([("value", "descending"), ("place", "ascending")])["place"].to_numpy()
    return np.asarray(rows[places], np.int64)


def _as_numbers(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts as numbers if all of them are, such as those of a CSV. Empty ones become null. Other values stay."""
    if not pa.types.is_string(values.type):
        return values
    texts = pc.if_else(pc.equal(values, ""), None, values)
    for type_ in (pa.int64(), pa.float64()):
        with contextlib.suppress(pa.ArrowInvalid):
            return texts.cast(type_)
    return values


def groups(pairs: Pairs, order: NDArray[np.int64]) -> tuple[dict[int, int], dict[int, float]]:
    """Row → the row that is kept of its group, and → its similarity to that one.

    In the order of preference, each row that is free keeps itself and takes its free neighbours. So no chain of
    neighbours joins images that differ.
    """
    first = np.concatenate([pairs.first, pairs.second])
    second = np.concatenate([pairs.second, pairs.first])
    values = np.concatenate([pairs.similarity, pairs.similarity])
    by_first = np.argsort(first, kind="stable")
    first, second, values = first[by_first], second[by_first], values[by_first]
    keeper: dict[int, int] = {}
    similarity: dict[int, float] = {}
    for row in order.tolist():
        if row in keeper:
            continue
        start, stop = np.searchsorted(first, [row, row + 1])
        members = [
            (other, value)
            for other, value in zip(second[start:stop].tolist(), values[start:stop].tolist(), strict=True)
            if other not in keeper
        ]
        if members:
            keeper[row], similarity[row] = row, 1.0
            keeper |= dict.fromkeys((other for other, _ in members), row)
            similarity |= dict(members)
    return keeper, similarity
