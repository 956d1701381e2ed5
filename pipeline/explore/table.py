"""The rows of an output, read again: batches of the committed parts, of results or of errors.

Every reader of outputs uses this module, so all of them see the same rows: those of the commits that count. It reads an
output in mid-run, and one of an earlier layout, because it finds parts by their commits and not by their names.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema as schemas
from pipeline.errors import InputRefused, OutputRefused, message_line
from pipeline.output import ledger as ledgers
from pipeline.output.directory import RUN, is_finished
from pipeline.storage import access, uris
from pipeline.storage.parquet import open_parquet
from pipeline.threads import ordered_map

BATCH_ROWS = 8192
THREADS = 4
"""Row groups that are read at a time. `ordered_map` bounds the bytes that wait: 256 MB, or one row group."""
BLOCKS_AHEAD = 2
"""Whole row groups of vectors that are read or wait. More would need more than 1 GB."""
INT8_GROWTH = 4
"""Bytes of a vector that is read, by those that are stored as int8."""
ERRORS_FOLDER = "_errors"

if TYPE_CHECKING:
    from pipeline.explore.analysis import Analysis
    from pipeline.explore.search import Hits

Positions = NDArray[np.int64]
"""Positions among all rows of an output."""


class OnStep(Protocol):
    """Called with what a command does, and how many of all units are done. total: 0 if it is unknown."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


def no_step(what: str, done: int, total: int) -> None:
    """The OnStep that shows nothing."""


class Choice(Protocol):
    """Chooses rows by some columns. Called on several threads."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns that it looks at."""

    def __call__(self, rows: pa.Table) -> NDArray[np.bool_]:
        """Whether each row is chosen."""


@dataclass(frozen=True, slots=True)
class Block:
    """The chosen rows of a row group: their positions in ascending order, and their columns."""

    positions: Positions
    table: pa.Table


@dataclass(frozen=True, slots=True)
class Part:
    """A committed file. path: in the output. rows: number of its rows."""

    path: str
    rows: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """A row group of a part. metadata: the part's footer. size_bytes: of the wanted columns, decompressed.

    first: position of its first row. rows: number of its rows.
    """

    path: str
    metadata: Any
    index: int
    size_bytes: int
    first: int
    rows: int


@dataclass(frozen=True)
class Output:
    """The committed rows of an output, as they were when it was opened.

    uri: the output. record: the content of `_run.json`, with `settings`, `provenance` and `versions`. parts,
    error_parts: the files of results and of errors, in the order of their shards. is_finished: the run has ended, and
    every planned image is accounted for.
    """

    uri: str
    record: Mapping[str, Any]
    parts: tuple[Part, ...] = field(repr=False)
    error_parts: tuple[Part, ...] = field(repr=False)
    is_finished: bool

    @property
    def rows(self) -> int:
        """Number of committed rows of results."""
        return sum(part.rows for part in self.parts)

    @property
    def error_rows(self) -> int:
        """Number of committed rows of `_errors/`."""
        return sum(part.rows for part in self.error_parts)

    @property
    def settings(self) -> Mapping[str, Any]:
        """The settings that changed results: network, weights, transform, and others."""
        return self.record.get("settings") or {}

    @cached_property
    def schema(self) -> pa.Schema:
        """Schema of the results, read from the first part; empty if there is none yet. Raises OutputRefused.

        Embeddings that are stored as int8 are read as float32, and have no column of scales here.
        """
        if not self.parts:
            return pa.schema([])
        fields = _open(self.uri, self.parts[0].path).schema
        fields = pa.schema([each.remove_metadata() for each in fields])  # that of geometries in GeoParquet 2.0
        return schemas.as_float_vectors(fields)

    @property
    def columns(self) -> list[str]:
        """Names of the columns of the results."""
        return list(self.schema.names)

    def describe(self) -> str:
        """One line: `OUT: 12,000 rows + 3 errors`, and whether the run has ended."""
        state = "" if self.is_finished else " committed so far; the run has not finished"
        return f"{self.uri}: {self.rows:,} rows + {self.error_rows:,} errors{state}"

    def require(self, columns: Sequence[str]) -> None:
        """Raise OutputRefused if the output has no rows, or lacks one of these columns."""
        if not self.parts:
            raise OutputRefused(f"{self.uri} has no rows yet: run its job, or wait for its first part")
        if missing := [name for name in columns if name not in self.columns]:
            raise OutputRefused(
                f"{self.uri} has no column {', '.join(missing)}; its columns are {', '.join(self.columns)}"
            )

    def batches(
        self,
        columns: Sequence[str] | None = None,
        batch_rows: int = BATCH_ROWS,
        *,
        equal: Mapping[str, Any] | None = None,
    ) -> Iterator[pa.RecordBatch]:
        """Yield the rows of the results in the order of parts, at most `batch_rows` at a time.

        columns: names, in the order of the batches; None for all. equal: only rows whose columns have these values;
        row groups that have none, by their statistics, are not read. Memory does not grow with the output. Raises
        OutputRefused for an unknown column, and if a part is gone or damaged.
        """
        names = self.columns if columns is None else list(columns)
        if self.parts or names:
            self.require([*names, *(equal or {})])
            wanted = pa.schema([self.schema.field(name) for name in names])
            yield from _batches(self.uri, self.parts, wanted, batch_rows, equal or {})

    def blocks(
        self, columns: Sequence[str], choices: Sequence[Choice] = (), parts: Sequence[Part] | None = None
    ) -> Iterator[Block]:
        """Yield the chosen rows, one row group at a time, in the order of parts.

        A row group is read only if `choices` choose one of its rows by their own columns, which are read first.
        parts: some of the output's parts (default: all of them). Raises OutputRefused as `batches` does, and for a part
        whose footer names another embedding space than `_run.json`.
        """
        looked_at = list(dict.fromkeys(name for choice in choices for name in choice.columns))
        self.require([*columns, *looked_at])
        wanted, first = (pa.schema([self.schema.field(name) for name in names]) for names in (columns, looked_at))
        paths = {part.path for part in (self.parts if parts is None else parts)}
        chosen = [each for each in self._firsts() if each[0].path in paths]
        space = (self.record.get("embedding_space") or {}).get("id")
        groups = _row_groups(self.uri, chosen, {*columns, *looked_at}, {}, space)
        read = partial(_read_block, self.uri, wanted, first, tuple(choices))
        for block in ordered_map(read, groups, BLOCKS_AHEAD, BLOCKS_AHEAD, lambda group: group.size_bytes):
            if len(block.positions):
                yield block

    def take(self, positions: Positions, columns: Sequence[str]) -> pa.Table:
        """The columns of some rows, in the order of `positions`. Reads only the row groups that have them."""
        self.require(columns)
        wanted, unique = pa.schema([self.schema.field(name) for name in columns]), np.unique(positions)
        parts = [(part, first) for part, first in self._firsts() if _within(unique, first, part.rows)]
        groups = _row_groups(self.uri, parts, {*columns}, {})
        groups = (group for group in groups if _within(unique, group.first, group.rows))
        read = partial(_read, self.uri, wanted, {})
        tables = []
        for group in groups:
            start, stop = np.searchsorted(unique, [group.first, group.first + group.rows])
            tables.append(read(group).take(pa.array(unique[start:stop] - group.first)))
        table = pa.concat_tables([wanted.empty_table(), *tables])
        return table.take(pa.array(np.searchsorted(unique, positions)))

    def row_groups(self, part: int) -> Iterator[RowGroup]:
        """Yield the row groups of one part, by its number. Reads only its footer."""
        return _row_groups(self.uri, [list(self._firsts())[part]], set(self.columns), {})

    def read(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        """Some columns of one row group."""
        return _read(self.uri, pa.schema([self.schema.field(name) for name in columns]), {}, group)

    def search(self, **query: Any) -> "Hits":
        """The images most similar to some images, ids or vectors; see `explore.search.search` for the arguments."""
        from pipeline.explore.search import search

        return search(self, **query)

    def analyze(self, **settings: Any) -> "Analysis":
        """Clusters, outliers, classes and changes; see `explore.analysis.analyze` for the arguments."""
        from pipeline.explore.analysis import analyze

        return analyze(self, **settings)

    def _firsts(self) -> Iterator[tuple[Part, int]]:
        """Each part, and the position of its first row."""
        first = 0
        for part in self.parts:
            yield part, first
            first += part.rows

    def errors(self, columns: Sequence[str] | None = None, batch_rows: int = BATCH_ROWS) -> Iterator[pa.RecordBatch]:
        """Yield the rows of `_errors/`, with the columns of `schema.ERRORS`, as `batches` does."""
        names = schemas.ERRORS.names if columns is None else list(columns)
        if unknown := [name for name in names if name not in schemas.ERRORS.names]:
            raise OutputRefused(
                f"errors have no column {', '.join(unknown)}; their columns are {', '.join(schemas.ERRORS.names)}"
            )
        wanted = pa.schema([schemas.ERRORS.field(name) for name in names])
        yield from _batches(self.uri, self.error_parts, wanted, batch_rows, {})


def ends_of(name: str) -> tuple[str, ...]:
    """The ends of the image_ids that a name means: what follows a `/` or `#`, which the name may begin with."""
    return (name,) if name.startswith(("/", "#")) else (f"/{name}", f"#{name}")


def open_output(uri: str) -> Output:
    """Open an output, local or in a bucket, for reading: its record and the list of its committed parts.

    Neither locks nor changes it; a run may go on at the same time. Raises InputRefused if the directory is no output of
    Nightshift, and OutputRefused if one of its records is damaged.
    """
    if problem := uris.check_uri(uri):
        raise InputRefused(f"{uri} {problem}")
    output = uris.normalize(uri)
    try:
        record = access.read_record(uris.join(output, RUN))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputRefused(
            f"{output} is not an output of Nightshift: it has no {RUN}; give the directory that a job wrote with "
            "--output"
        ) from error
    finished = is_finished(output)  # before the commits: a run that has ended writes no more
    last = ledgers.last_attempt(output)
    ledger = ledgers.Ledger(output, last)
    parts: list[Part] = []
    errors: list[Part] = []
    for commit in ledgers.valid_commits(output, last):
        if not ledger.accept(commit):
            continue  # its rows are those of another commit
        if commit.part:
            parts.append(Part(commit.part, commit.rows))
        if commit.errors_part:  # earlier versions stored the name without its folder
            name = commit.errors_part.removeprefix(f"{ERRORS_FOLDER}/")
            errors.append(Part(f"{ERRORS_FOLDER}/{name}", commit.errors))
    return Output(output, record, tuple(parts), tuple(errors), finished)


def _batches(
    output: str, parts: Sequence[Part], wanted: pa.Schema, batch_rows: int, equal: Mapping[str, Any]
) -> Iterator[pa.RecordBatch]:
    read = partial(_read, output, wanted, equal)
    groups = _row_groups(output, [(part, 0) for part in parts], {*wanted.names, *equal}, equal)
    for table in ordered_map(read, groups, THREADS, 2 * THREADS, lambda group: group.size_bytes):
        yield from table.to_batches(max_chunksize=batch_rows)


def _within(positions: Positions, first: int, rows: int) -> bool:
    """Whether one of the sorted positions is one of `rows` rows from `first` on."""
    start, stop = np.searchsorted(positions, [first, first + rows])
    return bool(start < stop)


def _row_groups(
    output: str,
    parts: Sequence[tuple[Part, int]],
    names: set[str],
    equal: Mapping[str, Any],
    space: str | None = None,
) -> Iterator[RowGroup]:
    """The row groups that may have rows with the values of `equal`. Footers are read ahead.

    parts: each with the position of its first row. space: id of the embedding space that no footer may contradict.
    """
    footers = ordered_map(lambda part: _open(output, part[0].path).metadata, parts, THREADS, 2 * THREADS)
    for (part, first), metadata in zip(parts, footers, strict=True):
        if metadata.num_rows != part.rows:
            raise _damaged(output, part.path, f"it has {metadata.num_rows} rows and its commit says {part.rows}")
        if space and _space_of(metadata) not in (None, space):
            raise OutputRefused(
                f"{uris.join(output, part.path)} has vectors of embedding space {_space_of(metadata)}, but {RUN} says "
                f"{space}: it was copied from another output; remove its commit, or restore {RUN}"
            )
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            columns = [group.column(number) for number in range(group.num_columns)]
            if all(_may_have(columns, name, value) for name, value in equal.items()):
                chosen = [column for column in columns if column.path_in_schema.partition(".")[0] in names]
                size = sum(column.total_uncompressed_size for column in chosen)
                is_int8 = any(column.path_in_schema == schemas.EMBEDDING_SCALE for column in columns)
                size *= INT8_GROWTH if is_int8 and schemas.EMBEDDING in names else 1
                yield RowGroup(part.path, metadata, index, size, first, group.num_rows)
            first += group.num_rows


def _space_of(metadata: Any) -> str | None:
    """The id of the embedding space in a part's footer; None if it has none."""
    footer = json.loads((metadata.metadata or {}).get(b"nightshift", b"{}"))
    return (footer.get("embedding_space") or {}).get("id")


def _may_have(columns: Sequence[Any], name: str, value: Any) -> bool:
    """Whether a row group may have a value in a column: False only if its statistics exclude it."""
    statistics = next((column.statistics for column in columns if column.path_in_schema == name), None)
    if statistics is None or not statistics.has_min_max:
        return True
    return bool(statistics.min <= value <= statistics.max)


def _read_block(
    output: str, wanted: pa.Schema, looked_at: pa.Schema, choices: Sequence[Choice], group: RowGroup
) -> Block:
    """The rows of a row group that all choices choose. looked_at: the columns that the choices need."""
    positions = np.arange(group.first, group.first + group.rows)
    if not choices:
        return Block(positions, _read(output, wanted, {}, group))
    rows = _read(output, looked_at, {}, group)
    is_chosen = np.logical_and.reduce([choice(rows) for choice in choices])
    if not is_chosen.any():
        return Block(positions[:0], wanted.empty_table())
    return Block(positions[is_chosen], _read(output, wanted, {}, group).filter(pa.array(is_chosen)))


def _read(output: str, wanted: pa.Schema, equal: Mapping[str, Any], group: RowGroup) -> pa.Table:
    """The wanted columns of a row group, and of it the rows with the values of `equal`."""
    names = list(dict.fromkeys([*wanted.names, *equal]))
    try:
        with access.open_read(uris.join(output, group.path)) as file:
            options = {"metadata": group.metadata, "page_checksum_verification": True}
            parquet = open_parquet(file, **options)
            if schemas.EMBEDDING in names and schemas.has_scaled_vectors(parquet.schema_arrow):
                names.append(schemas.EMBEDDING_SCALE)
            table = schemas.with_float_vectors(parquet.read_row_group(group.index, names, use_threads=False))
        for name, value in equal.items():
            table = table.filter(pc.equal(table[name], value))
        return table.select(wanted.names).cast(wanted)
    except FileNotFoundError as error:
        raise _gone(output, group.path) from error
    except (KeyError, OSError, pa.ArrowException) as error:
        raise _damaged(output, group.path, message_line(error)) from error


@dataclass(frozen=True, slots=True)
class _Footer:
    schema: pa.Schema
    metadata: Any


def _open(output: str, path: str) -> _Footer:
    """The footer of a part. Raises OutputRefused."""
    try:
        with access.open_read(uris.join(output, path)) as file:
            parquet = open_parquet(file)
            return _Footer(parquet.schema_arrow, parquet.metadata)
    except FileNotFoundError as error:
        raise _gone(output, path) from error
    except (OSError, pa.ArrowException) as error:
        raise _damaged(output, path, message_line(error)) from error


def _gone(output: str, path: str) -> OutputRefused:
    return OutputRefused(
        f"{uris.join(output, path)} is gone: if a run has changed the output, read it again; otherwise run "
        f"jobs/verify.py {output}"
    )


def _damaged(output: str, path: str, reason: str) -> OutputRefused:
    return OutputRefused(
        f"{uris.join(output, path)} cannot be read: {reason}; run jobs/verify.py {output} --repair, which removes it, "
        "and then the job's command, which computes it again"
    )
