"""Which rows of an output count: by an expression, by a box on the Earth, and without those of a list of duplicates."""

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline import schema
from pipeline.config import parse_box
from pipeline.errors import InputRefused, OutputRefused, SettingRefused, message_line
from pipeline.explore.table import Choice, Output
from pipeline.geo.tiles import Bounds
from pipeline.output.geoparquet import BBOX, has_footprints
from pipeline.storage import access, uris
from pipeline.storage.parquet import open_parquet

SEARCH_EXTRA = "pip install 'nightshift[search]'"
ALIAS = "is_chosen"
NOT_OF_A_ROW = {"SUBQUERY": "a subquery", "WINDOW": "a window function"}
"""DuckDB's classes of expressions that look at more than one row."""


def need_search(what: str, *modules: str) -> None:
    """Raise SettingRefused if a module of the extra [search] is not installed."""
    for module in modules:
        if find_spec(module) is None:
            raise SettingRefused(f"{what} needs {module}: {SEARCH_EXTRA}")


def choices_of(output: Output, where: str | None, bbox: str | None, exclude: str | None) -> tuple[Choice, ...]:
    """The choices that the flags --where, --bbox and --exclude stand for. Raises Refused and its subclasses."""
    made: list[Choice] = []
    if where is not None:
        made.append(Where.of(output, where))
    if bbox is not None:
        made.append(Box.of(output, bbox))
    if exclude is not None:
        made.append(Without.of(exclude))
    return tuple(made)


@dataclass(frozen=True)
class Where:
    """Rows for which a SQL expression over their columns is true: `label = 'forest' AND score > 0.5`.

    DuckDB evaluates it in memory; it can neither read files nor load extensions. expression: checked by `of`.
    columns: those that it names.
    """

    expression: str
    columns: tuple[str, ...]
    _local: threading.local = field(default_factory=threading.local, repr=False, compare=False)

    @staticmethod
    def of(output: Output, expression: str) -> "Where":
        """Check an expression. Raises SettingRefused if it is none of a row, OutputRefused for unknown columns."""
        need_search("--where", "duckdb")
        output.require([])
        named = list(_names(_parse(expression)))
        known = {column.name.lower(): column.name for column in output.schema if not schema.is_vector(column.type)}
        if unknown := [name for name in dict.fromkeys(named) if name.lower() not in known]:
            raise OutputRefused(
                f"--where {expression!r}: {output.uri} has no column {', '.join(unknown)} that can be compared; there "
                f"are {', '.join(known.values())}; texts are in single quotes"
            )
        where = Where(expression, tuple(dict.fromkeys(known[name.lower()] for name in named)))
        nothing = pa.schema([output.schema.field(name) for name in where.columns]).empty_table()
        if len(where(nothing.append_column(ALIAS, pa.array([], pa.bool_())) if not where.columns else nothing)):
            raise SettingRefused(f"--where {expression!r} sums up rows: it must be true or false for each row")
        return where

    def __call__(self, rows: pa.Table) -> NDArray[np.bool_]:
        import duckdb

        if not hasattr(self._local, "connection"):
            self._local.connection = _connect()
        try:
            relation = self._local.connection.from_arrow(rows).project(f"({self.expression}\n) AS {ALIAS}")
            if (kind := str(relation.types[0])) != "BOOLEAN":
                raise SettingRefused(
                    f"--where {self.expression!r} is a {kind}: it must be true or false, as in score > 0.5"
                )
            values = relation.fetchnumpy()[ALIAS]
        except duckdb.Error as error:
            raise SettingRefused(f"--where {self.expression!r} cannot be evaluated: {message_line(error)}") from error
        return np.asarray(np.ma.filled(values, False), bool)


def _connect() -> Any:
    import duckdb

    connection = duckdb.connect(config={"enable_external_access": "false", "threads": "1"})
    connection.execute("SET lock_configuration = true").fetchall()
    return connection


def _parse(expression: str) -> Any:
    """DuckDB's syntax tree of one expression. Raises SettingRefused."""
    query = f"SELECT 1 FROM rows WHERE ({expression}\n)"
    parsed = json.loads(_connect().execute("SELECT json_serialize_sql(?)", [query]).fetchall()[0][0])
    if parsed["error"]:
        raise SettingRefused(
            f"--where {expression!r} is no SQL expression: {parsed['error_message']}; an example is "
            "\"label = 'forest' AND score > 0.5\""
        )
    statements = parsed["statements"]
    node = statements[0]["node"]
    if len(statements) != 1 or node["type"] != "SELECT_NODE" or node.get("group_expressions") or node.get("modifiers"):
        raise SettingRefused(f"--where {expression!r} must be one expression that is true or false for each row")
    return node["where_clause"]


def _names(tree: Any) -> Iterator[str]:
    """The columns that a syntax tree names. Raises SettingRefused for what looks at more than one row."""
    if isinstance(tree, list):
        for each in tree:
            yield from _names(each)
    elif isinstance(tree, dict):
        if (kind := tree.get("class")) in NOT_OF_A_ROW:
            raise SettingRefused(f"--where has {NOT_OF_A_ROW[kind]}: it may only look at the columns of one row")
        if kind == "COLUMN_REF":
            yield tree["column_names"][0]
        for each in tree.values():
            yield from _names(each)


@dataclass(frozen=True)
class Box:
    """Rows whose footprint's box overlaps a box in degrees; W > E crosses the antimeridian."""

    bounds: Bounds
    columns: tuple[str, ...] = (BBOX,)

    @staticmethod
    def of(output: Output, text: str) -> "Box":
        """Raises SettingRefused for another text than W,S,E,N, OutputRefused for an output without footprints."""
        bounds = parse_box(text)
        output.require([])
        if not has_footprints(output.schema):
            raise OutputRefused(f"--bbox: {output.uri} has no footprints; leave it out, or use --where")
        return Box(bounds)

    def __call__(self, rows: pa.Table) -> NDArray[np.bool_]:
        west, south, east, north = self.bounds
        box = rows[BBOX].combine_chunks()
        xmin, ymin, xmax, ymax = (
            pc.struct_field(box, name).to_numpy(zero_copy_only=False) for name in ("xmin", "ymin", "xmax", "ymax")
        )
        in_east, in_west = xmin <= east, xmax >= west  # comparisons with NaN, of a null, are false
        is_inside = (in_east | in_west) if west > east else (in_east & in_west)
        return np.asarray(is_inside & (ymin <= north) & (ymax >= south), bool)


@dataclass(frozen=True)
class Without:
    """Rows that a file of duplicates does not tell to drop: those of its image_ids whose `keep` is false."""

    image_ids: pa.Array
    columns: tuple[str, ...] = ("image_id",)

    @staticmethod
    def of(file: str) -> "Without":
        """Read a file of `nightshift duplicates`. Raises InputRefused."""
        return Without(duplicates_of(file))

    def __call__(self, rows: pa.Table) -> NDArray[np.bool_]:
        is_dropped = pc.is_in(rows["image_id"], value_set=self.image_ids)
        return ~np.asarray(is_dropped.to_numpy(), bool)


def duplicates_of(file: str) -> pa.Array:
    """The image_ids that a file of `nightshift duplicates` tells to drop. Raises InputRefused."""
    try:
        with access.open_read(uris.normalize(file)) as opened:
            table = open_parquet(opened).read(["image_id", "keep"], use_threads=False)
        dropped = table.filter(pc.invert(table["keep"]))["image_id"]
        return dropped.cast(pa.string()).combine_chunks()
    except FileNotFoundError as error:
        raise InputRefused(f"--exclude {uris.redact(file)} does not exist") from error
    except (OSError, KeyError, pa.ArrowException) as error:
        raise InputRefused(
            f"--exclude {uris.redact(file)} is no file of `nightshift duplicates`, which has the columns image_id and "
            f"keep: {message_line(error)}"
        ) from error


def as_mask(choices: Sequence[Choice], output: Output) -> NDArray[np.bool_] | None:
    """Whether each row of an output is chosen, bool [rows]; None if all are."""
    if not choices:
        return None
    mask = np.zeros(output.rows, bool)
    for block in output.blocks(["row"], choices):
        mask[block.positions] = True
    return mask
