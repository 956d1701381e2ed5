"""The rows of an output for a page. Memory holds a label and a score per row; names are read when they are shown.

The index of labels and scores takes 8 bytes per row, and each remembered filter 4 bytes per row that it chooses. Names
are read one row group at a time, and up to CACHE_BYTES of them are kept.
"""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.errors import OutputRefused
from pipeline.explore.serve.cache import Cache
from pipeline.explore.table import Output, Positions, RowGroup

CACHE_BYTES = 64 << 20
MAX_LABELS = 30_000
MAX_ERRORS = 100_000
MAX_EXACT = 1 << 53
"""JavaScript rounds larger whole numbers."""
FILTERS = 8
"""Results of filters that are remembered."""
LABEL, SCORE = "label", "score"
SORTS = ("archive", "lowest", "highest")
"""Orders of rows: that of the archive, and by score."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which rows are shown, and how they are sorted.

    label: a code of the index; None for all. low, high: bounds of the score. text: a part of the image_id, in any case.
    """

    label: int | None = None
    low: float | None = None
    high: float | None = None
    text: str = ""
    sort: str = SORTS[0]

    @property
    def is_empty(self) -> bool:
        return self == Filter()


@dataclass(frozen=True, slots=True)
class Index:
    """Label and score of all rows.

    names: the labels, most frequent first. codes: int32 [rows], places in `names`, -1 without a label. counts: rows of
    each label. scores: float32 [rows], NaN without a score; None if the output has none.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int32]
    counts: tuple[int, ...]
    scores: NDArray[np.float32] | None


class Rows:
    """The rows of one output as it was when it was opened. Thread-safe.

    column: of the labels; None for the first of `label` and those that end in `_label`. Raises OutputRefused.
    """

    def __init__(self, output: Output, column: str | None = None) -> None:
        self.output = output
        self.label_column = _label_column(output, column)
        self.score_column = _score_column(output, self.label_column)
        self._starts = np.cumsum([0, *(part.rows for part in output.parts)])
        self._groups: dict[int, list[RowGroup]] = {}
        self._names: Cache[tuple[str, int], pa.Table] = Cache(CACHE_BYTES)
        self._found: OrderedDict[Filter, NDArray[np.integer[Any]]] = OrderedDict()
        self._lock = threading.RLock()
        self._slow = threading.RLock()

    @cached_property
    def grid_columns(self) -> list[str]:
        """The columns that a grid of pictures needs."""
        names = ("image_id", "shard", "row", self.label_column, self.score_column)
        return [name for name in names if name in self.output.columns]

    @cached_property
    def shown_columns(self) -> list[str]:
        """All columns that can be shown as text: not vectors and not geometries."""
        return [
            each.name
            for each in self.output.schema
            if not (schema.is_vector(each.type) or pa.types.is_binary(each.type))
        ]

    @property
    def index(self) -> Index:
        """Labels and scores, which are read once. Raises OutputRefused."""
        with self._slow:
            return self._index

    @cached_property
    def _index(self) -> Index:
        columns = [name for name in (self.label_column, self.score_column) if name]
        total = self.output.rows
        codes = np.full(total, -1, np.int32)
        scores = np.full(total, np.nan, np.float32) if self.score_column else None
        known: dict[str, int] = {}
        start = 0
        for batch in self.output.batches(columns) if columns and total else ():
            stop = start + batch.num_rows
            if self.label_column:
                codes[start:stop] = _codes(batch.column(self.label_column), known, self.label_column)
            if scores is not None:
                scores[start:stop] = batch.column(self.score_column).cast(pa.float32()).to_numpy(zero_copy_only=False)
            start = stop
        return _by_frequency(known, codes, scores)

    def take(self, positions: Sequence[int]) -> pa.Table:
        """`grid_columns` of some rows, in the order of `positions`."""
        wanted = np.asarray(positions, np.int64)
        unique = np.unique(wanted)
        pieces = [self.output.schema.empty_table().select(self.grid_columns)]
        for group in self.groups_with(unique):
            start, stop = np.searchsorted(unique, [group.first, group.first + group.rows])
            pieces.append(self._names_of(group).take(pa.array(unique[start:stop] - group.first)))
        return pa.concat_tables(pieces).take(pa.array(np.searchsorted(unique, wanted)))

    def to_list(self, positions: Sequence[int]) -> list[dict[str, Any]]:
        """What a grid shows of some rows: row (position), id, label and score."""
        table = self.take(positions)
        ids = table["image_id"].to_pylist()
        missing = [None] * len(ids)
        labels = table[self.label_column].to_pylist() if self.label_column else missing
        scores = table[self.score_column].to_pylist() if self.score_column else missing
        return [
            {"row": int(row), "id": image_id, "label": None if label is None else str(label), "score": finite(score)}
            for row, image_id, label, score in zip(positions, ids, labels, scores, strict=True)
        ]

    def details(self, position: int) -> dict[str, Any]:
        """All columns of one row that can be shown, as JSON can hold them."""
        return {
            name: as_json(values[0])
            for name, values in self.output.take(np.array([position]), self.shown_columns).to_pydict().items()
        }

    def matching(self, wanted: Filter) -> NDArray[np.integer[Any]] | None:
        """Positions of the rows that a filter chooses, in its order; None for all rows as they are."""
        if wanted.is_empty:
            return None
        with self._slow:
            if wanted not in self._found:
                self._found[wanted] = self._match(wanted)
                while len(self._found) > FILTERS:
                    self._found.popitem(last=False)
            self._found.move_to_end(wanted)
            return self._found[wanted]

    def groups_with(self, positions: Positions) -> list[RowGroup]:
        """The row groups that have some sorted positions. Reads the footers of their parts once."""
        parts = np.unique(np.searchsorted(self._starts, positions, side="right") - 1)
        groups = [group for part in parts.tolist() for group in self.groups_of(part)]
        within = (np.searchsorted(positions, [group.first, group.first + group.rows]) for group in groups)
        return [group for group, (start, stop) in zip(groups, within, strict=True) if start < stop]

    def groups_of(self, part: int) -> list[RowGroup]:
        """The row groups of a part, by its number. Reads its footer once."""
        with self._lock:
            if part not in self._groups:
                self._groups[part] = list(self.output.row_groups(part))
            return self._groups[part]

    def _names_of(self, group: RowGroup) -> pa.Table:
        key = (group.path, group.index)
        with self._lock:
            table = self._names.get(key)
            if table is None:
                table = self.output.read(group, self.grid_columns).combine_chunks()
                self._names.add(key, table, table.nbytes)
            return table

    def _match(self, wanted: Filter) -> NDArray[np.integer[Any]]:
        mask = np.ones(self.output.rows, bool)
        if wanted.text:
            mask = self._has_text(wanted.text)
        if wanted.label is not None:
            mask &= self.index.codes == wanted.label
        scores = self.index.scores if (wanted.low, wanted.high, wanted.sort) != (None, None, SORTS[0]) else None
        if scores is not None:
            if wanted.low is not None:
                mask &= scores >= wanted.low
            if wanted.high is not None:
                mask &= scores <= wanted.high
        positions = np.flatnonzero(mask)
        if scores is not None and wanted.sort != SORTS[0]:
            values = scores[positions] if wanted.sort == "lowest" else -scores[positions]
            positions = positions[np.argsort(values, kind="stable")]  # NaN comes last
        return positions.astype(np.int32) if self.output.rows < 1 << 31 else positions

    def _has_text(self, text: str) -> NDArray[np.bool_]:
        mask = np.zeros(self.output.rows, bool)
        start = 0
        for batch in self.output.batches(["image_id"]):
            found = pc.match_substring(batch.column(0), text, ignore_case=True)
            mask[start : start + len(found)] = found.to_numpy(zero_copy_only=False)
            start += len(found)
        return mask


class Errors:
    """The rows of `_errors/`, the first MAX_ERRORS of them, read once. Thread-safe."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self._lock = threading.Lock()

    @property
    def table(self) -> pa.Table:
        """image_id, stage, error_type and message. Raises OutputRefused."""
        with self._lock:
            return self._table

    @cached_property
    def _table(self) -> pa.Table:
        names = ["image_id", "stage", "error_type", "message"]
        batches: list[pa.RecordBatch] = []
        rows = 0
        for batch in self.output.errors(names):
            batches.append(batch.slice(0, MAX_ERRORS - rows))
            rows += batches[-1].num_rows
            if rows >= MAX_ERRORS:
                break
        return pa.Table.from_batches(batches, pa.schema([(name, pa.string()) for name in names]))

    def types(self) -> list[dict[str, Any]]:
        """Each error_type with its number of rows, most frequent first."""
        counts = self.table["error_type"].value_counts().to_pylist()
        return [
            {"type": each["values"], "count": each["counts"]}
            for each in sorted(counts, key=lambda each: -each["counts"])
        ]

    def matching(self, error_type: str, text: str) -> pa.Table:
        """The rows of a type ("" for all) with a text in their name or message."""
        table = self.table
        if error_type:
            table = table.filter(pc.equal(table["error_type"], error_type))
        if text:
            found = [pc.match_substring(table[name], text, ignore_case=True) for name in ("image_id", "message")]
            table = table.filter(pc.or_kleene(*found))
        return table


def as_json(value: Any) -> Any:
    """A value of a row as JSON in a browser can hold it.

    Numbers that are not finite are null. Whole numbers of more than 53 bits and other types are texts.
    """
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if value is None or isinstance(value, bool | str) or (isinstance(value, int) and abs(value) <= MAX_EXACT):
        return value
    if isinstance(value, list):
        return [as_json(each) for each in value]
    if isinstance(value, dict):
        return {str(name): as_json(each) for name, each in value.items()}
    return str(value)


def finite(value: Any) -> float | None:
    """A number for JSON, with at most 6 digits; None for null, NaN and infinity."""
    return None if value is None or not np.isfinite(value) else float(f"{value:.6g}")


def _label_column(output: Output, wanted: str | None) -> str | None:
    if wanted is not None:
        output.require([wanted])
        type_ = output.schema.field(wanted).type
        if not (pa.types.is_string(type_) or pa.types.is_integer(type_) or pa.types.is_boolean(type_)):
            raise OutputRefused(f"--column {wanted} is {type_}: it must be a column of texts or whole numbers")
        return wanted
    names = [name for name in output.columns if name == LABEL or name.endswith(f"_{LABEL}")]
    texts = [name for name in names if pa.types.is_string(output.schema.field(name).type)]
    return LABEL if LABEL in texts else texts[0] if texts else None


def _score_column(output: Output, label: str | None) -> str | None:
    """The score that belongs to a label: `animals_score` to `animals_label`; otherwise `score`."""
    own = f"{label.removesuffix(LABEL)}{SCORE}" if label and label.endswith(LABEL) else SCORE
    is_number = own in output.columns and pa.types.is_floating(output.schema.field(own).type)
    return own if is_number else None


def _codes(column: pa.Array, known: dict[str, int], name: str) -> NDArray[np.int32]:
    """The code of each value; new values get the next ones."""
    encoded = column.cast(pa.string()).dictionary_encode()
    own = np.array([known.setdefault(value, len(known)) for value in encoded.dictionary.to_pylist()] + [-1], np.int32)
    if len(known) > MAX_LABELS:
        raise OutputRefused(
            f"the column {name} has more than {MAX_LABELS:,} values, too many to choose from: start again with another "
            "--column, and filter by text"
        )
    indices = pc.fill_null(encoded.indices, len(own) - 1).to_numpy(zero_copy_only=False)
    return np.asarray(own[indices], np.int32)


def _by_frequency(known: dict[str, int], codes: NDArray[np.int32], scores: NDArray[np.float32] | None) -> Index:
    names = list(known)
    counts = np.bincount(codes[codes >= 0], minlength=len(names))
    order = sorted(range(len(names)), key=lambda code: (-counts[code], names[code]))
    place = np.empty(len(names) + 1, np.int32)
    place[order], place[-1] = np.arange(len(names)), -1
    return Index(tuple(names[code] for code in order), place[codes], tuple(int(counts[code]) for code in order), scores)
