"""MBTiles: tiles in an SQLite database (github.com/mapbox/mbtiles-spec), with rows that count from the south.

SQLite reads local files, so an archive in an object store is copied to the disk of each node once (`_copied`). Planning
reads the index of the tiles, not the tiles. A shard is a run of tiles by zoom, column and row. A tile that the archive
stores once for many places, as the tables `map` and `images` do, is one content.
"""

import contextlib
import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
from filelock import FileLock

from pipeline.coverage import Ranges
from pipeline.errors import NightshiftError, ReadError
from pipeline.geo.tiles import MAX_ZOOM, Selection, flip
from pipeline.sources import tiles
from pipeline.sources.base import (
    MAGIC_BYTES,
    Contents,
    NoImages,
    ReadOptions,
    Record,
    ShardEnd,
    Source,
    starts_as_image,
)
from pipeline.sources.records import storage_fault
from pipeline.sources.shard import Shard
from pipeline.sources.tiles import TILES_PER_SHARD, Lost, NoTiles, Numbers, TileArchive, TileRun
from pipeline.storage import access, uris
from pipeline.storage.base import BUFFER_BYTES, ObjectInfo, check_etag

VECTOR_FORMATS = ("pbf", "mvt", "mlt", "geojson")
IMAGE_FORMATS = ("png", "jpg", "jpeg", "webp", "avif")
BITS = 29
"""Of the column and of the row in a key: zoom, column and row, as SQLite sorts them."""
FREE_BYTES = 1 << 30
"""Left on a disk after an archive was copied to it."""
KEEP_COPIES_SECONDS = 24 * 3600
"""A copy that was not used for so long is removed when the next one is made."""


class _Layout(NamedTuple):
    """Where a database has its tiles.

    rows: SQL of zoom_level, tile_column, tile_row and rowid of the data (NULL if only the tile itself identifies it).
    data: SQL of a tile's bytes, by that rowid, or by zoom, column and row.
    """

    rows: str
    data: str
    has_rowids: bool


ROWIDS = ("rowid", "_rowid_", "oid")
"""SQLite's names of a row's number. A column may have one of these names, and then it is that column."""
_VIEW = _Layout(
    "SELECT zoom_level, tile_column, tile_row, NULL FROM tiles",
    "SELECT tile_data FROM tiles WHERE zoom_level = ? AND tile_column = ? AND tile_row = ?",
    has_rowids=False,
)
TWO_TABLES = (("map", "images", "tile_id"), ("tiles_shallow", "tiles_data", "tile_data_id"))
"""Tables of places and of data, and the column that joins them, of archives whose `tiles` is a view."""


def _of_table(rowid: str) -> _Layout:
    return _Layout(
        f"SELECT zoom_level, tile_column, tile_row, {rowid} FROM tiles",
        f"SELECT tile_data FROM tiles WHERE {rowid} = ?",
        has_rowids=True,
    )


def _of_two_tables(places: str, data: str, key: str, rowid: str) -> _Layout:
    return _Layout(
        f"SELECT zoom_level, tile_column, tile_row, coalesce({data}.{rowid}, -1) "
        f"FROM {places} LEFT JOIN {data} ON {data}.{key} = {places}.{key}",
        f"SELECT tile_data FROM {data} WHERE {rowid} = ?",
        has_rowids=True,
    )


def shards(info: ObjectInfo, options: ReadOptions) -> Iterator[Contents]:
    """The shards of an archive, from its index. Raises ReadError and NoImages."""
    try:
        with _database(info.uri, info.etag) as database:
            layout = _layout(database, info.uri)
            _check_format(database, info.uri)
            is_first = True
            try:
                for contents in _contents(database, layout, options.selection, info.size_bytes):
                    is_first = False
                    yield contents
            except sqlite3.Error as error:
                if is_first:
                    raise
                yield Lost(f"its index is broken: {error}").contents()
            if is_first and options.selection.is_all:
                raise NoTiles(f"{info.uri} has no tiles")
    except sqlite3.Error as error:
        raise _broken(info.uri, error) from error
    except OSError as error:
        raise storage_fault(info.uri, error) from error


def _layout(database: sqlite3.Connection, uri: str) -> _Layout:
    objects = database.execute("SELECT lower(name), type, sql FROM sqlite_master WHERE type IN ('table', 'view')")
    kinds = {name: (kind, sql) for name, kind, sql in objects}
    if "tiles" not in kinds:
        raise ReadError("corrupt", f"{uri} is an SQLite database without `tiles`, and so no MBTiles")
    kind, sql = kinds["tiles"]
    if kind == "table":
        rowid = _rowid(database, "tiles")
        return _of_table(rowid) if rowid else _VIEW
    for tables in TWO_TABLES:
        if all(kinds.get(name, ("",))[0] == "table" for name in tables[:2]) and _is_join(sql, *tables):
            rowid = _rowid(database, tables[1])
            return _of_two_tables(*tables, rowid) if rowid else _VIEW
    return _VIEW


def _rowid(database: sqlite3.Connection, table: str) -> str | None:
    """The name of a row's number in a table; None if it has none."""
    columns = {name.lower() for _, name, *_ in database.execute(f"PRAGMA table_xinfo({table})")}
    for name in ROWIDS:
        if name not in columns:
            try:
                database.execute(f"SELECT {name} FROM {table} WHERE 0")
            except sqlite3.OperationalError:  # WITHOUT ROWID
                return None
            return name
    return None


def _is_join(sql: str, places: str, data: str, key: str) -> bool:
    """Whether a view is the join of two tables and nothing else, such as a filter or another order of the rows."""
    text = " ".join(re.sub(r"[\"`\[\]]", "", sql.lower()).rstrip("; \n").split())
    names = {"zoom_level": places, "tile_column": places, "tile_row": places, "tile_data": data}
    match = re.fullmatch(
        r"create view (?:if not exists )?(?:main\.)?tiles as select (?P<columns>[\w., ]+?) "
        rf"from {places} (?:inner |left |left outer )?join {data} "
        rf"(?:on ?\(? ?(?P<one>[\w.]+) ?={{1,2}} ?(?P<other>[\w.]+) ?\)?|using ?\( ?{key} ?\))",
        text,
    )
    if not match or (match["one"] and {match["one"], match["other"]} != {f"{places}.{key}", f"{data}.{key}"}):
        return False
    parsed = [re.fullmatch(r"(?:(\w+)\.)?(\w+)(?: as (\w+))?", each.strip()) for each in match["columns"].split(",")]
    found = {each[3] or each[2]: (each[1] or names.get(each[2]), each[2]) for each in parsed if each}
    return all(found.get(name) == (table, name) for name, table in names.items())


def _check_format(database: sqlite3.Connection, uri: str) -> None:
    """Raise NoImages for vector tiles, and for tiles of an unknown kind whose first one is no image."""
    try:
        row = database.execute("SELECT value FROM metadata WHERE name = 'format'").fetchone()
    except sqlite3.OperationalError:  # without metadata
        row = None
    name = str(row[0]).lower().rpartition("/")[2] if row else ""
    if name in VECTOR_FORMATS:
        raise NoImages(f"{uri} holds vector tiles ({name}): images are png, jpg, webp or avif")
    if name in IMAGE_FORMATS:
        return
    first = database.execute("SELECT tile_data FROM tiles LIMIT 1").fetchone()
    data = first[0] if first and isinstance(first[0], bytes) else b""
    if data[:2] == b"\x1f\x8b":
        with contextlib.suppress(ValueError):
            data = tiles.decompress(data, "gzip")
    if first and not starts_as_image(data[:MAGIC_BYTES]):
        what = f"of the format {name}" if name else "that do not begin as images, such as vector tiles"
        raise NoImages(f"{uri} holds tiles {what}: images are png, jpg, webp or avif")


def _contents(
    database: sqlite3.Connection, layout: _Layout, selection: Selection, size_bytes: int
) -> Iterator[Contents]:
    """One shard per TILES_PER_SHARD tiles, then those of rows that are no tiles. The first has the archive's size."""
    last_key = -1
    invalid = _Invalid()
    for rows in _rows(database, layout, selection):
        table = invalid.without(rows)
        keys = table[:, 0] << 2 * BITS | table[:, 1] << BITS | table[:, 2]
        is_new = np.diff(keys, prepend=last_key) > 0
        invalid.add(table[~is_new], "occur more than once")
        keys, places = keys[is_new], table[is_new, 3]
        if len(keys):
            last_key = int(keys[-1])
            run = TileRun.of(keys, places, places) if layout.has_rowids else TileRun.of(keys, keys, None)
            yield Contents(len(keys), {}, run, size_bytes)
            size_bytes = 0
    yield from invalid.contents()


class _Invalid:
    """Counts the rows that are no tiles, by reason, with an example of each."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.examples: dict[str, tuple[object, ...]] = {}

    def add(self, rows: Iterable[Sequence[object]], reason: str) -> None:
        for row in rows:
            self.counts[reason] = self.counts.get(reason, 0) + 1
            self.examples.setdefault(reason, tuple(row[:3]))

    def without(self, rows: list[tuple[object, ...]]) -> Numbers:
        """The rows that are tiles: zoom, column, row and rowid, int64 [N, 4]. Counts the others."""
        others = [row for row in rows if not all(type(value) is int for value in row[:3])]
        self.add(others, "are not numbers")
        numbers = [[z, x, y, rowid or 0] for z, x, y, rowid in rows if type(z) is type(x) is type(y) is int]
        table = np.array(numbers, np.int64).reshape(-1, 4)
        z, x, y = table[:, 0], table[:, 1], table[:, 2]
        side = 1 << z.clip(0, MAX_ZOOM)
        is_tile = (z >= 0) & (z <= MAX_ZOOM) & (x >= 0) & (x < side) & (y >= 0) & (y < side)
        self.add(table[~is_tile].tolist(), "do not exist at their zoom")
        return table[is_tile]

    def contents(self) -> Iterator[Contents]:
        """One shard per reason and TILES_PER_SHARD rows."""
        for reason, count in self.counts.items():
            z, x, y = self.examples[reason]
            message = f"{count} of its tiles {reason}, one has zoom {z}, column {x} and row {y}"
            for first in range(0, count, TILES_PER_SHARD):
                yield Lost(message, rows=min(TILES_PER_SHARD, count - first)).contents()


def _rows(database: sqlite3.Connection, layout: _Layout, selection: Selection) -> Iterator[list[tuple[object, ...]]]:
    """zoom, column, row and rowid of the selected tiles, sorted, TILES_PER_SHARD at a time."""
    for where, values in _conditions(database, layout, selection):
        cursor = database.execute(
            f"{layout.rows} WHERE {where} ORDER BY zoom_level, tile_column, tile_row", tuple(values)
        )
        rows: list[tuple[object, ...]] = []
        fault: sqlite3.Error | None = None
        try:
            for row in cursor:
                rows.append(row)
                if len(rows) == TILES_PER_SHARD:
                    yield rows
                    rows = []
        except sqlite3.Error as error:  # the rows before a broken page are good
            fault = error
        if rows:
            yield rows
        if fault:
            raise fault


def _conditions(database: sqlite3.Connection, layout: _Layout, selection: Selection) -> Iterator[tuple[str, list[int]]]:
    """SQL conditions whose tiles follow one another in the order of the keys.

    Rows whose numbers are of another type, such as text, are not compared with any selection: all of them are read.
    """
    if selection.is_all:
        yield "1", []
        return
    names = ("zoom_level",) if selection.box is None else ("zoom_level", "tile_column", "tile_row")
    are_numbers = " AND ".join(f"typeof({name}) = 'integer'" for name in names)
    yield f"NOT ({are_numbers})", []
    if selection.box is None:
        yield f"{are_numbers} AND zoom_level BETWEEN ? AND ?", [selection.min_zoom, selection.max_zoom]
        return
    zooms = database.execute(f"SELECT DISTINCT zoom_level FROM ({layout.rows})").fetchall()
    for z in sorted(z for (z,) in zooms if type(z) is int and 0 <= z <= MAX_ZOOM):
        for each in selection.rectangles(z):
            edges = [each.west, each.east, flip(z, each.south), flip(z, each.north)]
            yield (
                f"{are_numbers} AND zoom_level = ? AND tile_column BETWEEN ? AND ? AND tile_row BETWEEN ? AND ?",
                [z, *edges],
            )


def _read(shard: Shard, contents: list[int]) -> Iterator[bytes | ReadError]:
    """The stored bytes of contents. A broken page costs the tiles on it."""
    run = shard.payload
    assert isinstance(run, TileRun)
    zooms, columns, rows = (column.tolist() for column in _split(run.first_keys))
    try:
        with _database(shard.uri, shard.etag) as database:
            layout = _layout(database, shard.uri)
            for content in contents:
                z, x, y = zooms[content], columns[content], rows[content]
                place = (run.places[content],) if run.places else (z, x, y)
                yield _tile(database, layout, place, f"{shard.uri}: zoom {z}, column {x}, row {y}")
    except sqlite3.Error as error:
        raise _broken(shard.uri, error) from error


def _tile(database: sqlite3.Connection, layout: _Layout, place: tuple[int, ...], name: str) -> bytes | ReadError:
    """The bytes of one tile."""
    try:
        row = database.execute(layout.data, place).fetchone()
    except sqlite3.DatabaseError as error:
        return _broken(name, error)
    if row is None:
        return ReadError("not_found", f"{name} has no data in the archive")
    if row[0] is None:
        return ReadError("null", f"{name} is null")
    if not isinstance(row[0], bytes):
        return ReadError("corrupt", f"{name} is {type(row[0]).__name__}, not bytes")
    return row[0]


def _broken(name: str, error: sqlite3.Error) -> ReadError:
    """The ReadError for an error of SQLite. A lock or a failing disk may pass; broken bytes do not."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    is_passing = code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
    return ReadError("unreadable" if is_passing else "corrupt", f"{name}: {error}")


@contextlib.contextmanager
def _database(uri: str, etag: str) -> Iterator[sqlite3.Connection]:
    """Open an archive for reading. Raises ReadError, OSError and sqlite3.Error."""
    with _local_path(uri, etag) as path:
        if not os.path.getsize(path):
            raise ReadError("empty", f"{uri} has no bytes")
        if os.path.exists(path + "-wal") and os.path.getsize(path + "-wal"):
            raise ReadError(
                "unreadable",
                f"{uri} has changes in {uri}-wal, which its date and size do not show: close the program that writes "
                "it, or run PRAGMA wal_checkpoint(TRUNCATE) in SQLite",
            )
        # Without a journal nobody writes. `immutable` then also works on disks that are mounted read-only.
        has_journal = any(os.path.exists(path + suffix) for suffix in ("-wal", "-journal"))
        options = "mode=ro" if has_journal else "mode=ro&immutable=1"
        database = sqlite3.connect(f"file:{quote(path)}?{options}", uri=True, check_same_thread=False)
        try:
            # Otherwise SQLite refuses a file that was cut short as a whole. It is open for reading only all the same.
            database.execute("PRAGMA writable_schema = ON")
            yield database
        finally:
            database.close()


@contextlib.contextmanager
def _local_path(uri: str, etag: str) -> Iterator[str]:
    """A local file with the archive's bytes. Raises OSError."""
    info = check_etag(access.head(uri), etag)
    if uris.is_local(uri):
        if not os.path.isfile(uri):
            raise OSError(f"{uri} is not a file")
        yield uri
    elif info.etag:
        yield str(_copied(info))
    else:  # the next bytes of this name could not be told from these
        with tempfile.TemporaryDirectory(prefix="nightshift-") as folder:
            _copy(info, Path(folder, "tiles.mbtiles"))
            yield str(Path(folder, "tiles.mbtiles"))


def _copied(info: ObjectInfo) -> Path:
    """The copy of an archive on this node, made by the first process that needs it."""
    folder = Path(os.environ.get("NIGHTSHIFT_CACHE") or "~/.cache/nightshift").expanduser() / "mbtiles"
    folder.mkdir(parents=True, exist_ok=True)
    version = hashlib.sha256(f"{info.uri} {info.etag}".encode()).hexdigest()[:24]
    path = folder / f"{version}.mbtiles"
    with FileLock(folder / f"{version}.lock"):
        if not path.exists():
            _remove_old(folder)
            partial = folder / f"{version}.part"
            _copy(info, partial)
            partial.rename(path)
        os.utime(path)
    return path


def _copy(info: ObjectInfo, path: Path) -> None:
    """Copy an archive to a file. Raises NightshiftError if the disk is too small, and OSError."""
    free = shutil.disk_usage(path.parent).free
    if free < info.size_bytes + FREE_BYTES:
        raise NightshiftError(
            f"{info.uri} has {info.size_bytes} bytes and must be copied to {path.parent}, where {free} are free: set "
            "NIGHTSHIFT_CACHE to a folder on a larger disk, or convert the archive to PMTiles, which is read by ranges"
        )
    with access.open_read(info.uri, info.etag) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target, BUFFER_BYTES)
        if info.size_bytes and target.tell() != info.size_bytes:
            raise OSError(f"the response was cut short: {target.tell()} of {info.size_bytes} bytes arrived")


def _remove_old(folder: Path) -> None:
    """Remove the copies that were not used for KEEP_COPIES_SECONDS. A process that reads one keeps reading it."""
    for path in folder.glob("*.*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > KEEP_COPIES_SECONDS and path.suffix != ".lock":
                path.unlink()


def _split(keys: Numbers) -> tiles.Tiles:
    """Zoom, column and row of keys."""
    side = (1 << BITS) - 1
    return keys >> 2 * BITS, keys >> BITS & side, keys & side


def _tiles(keys: Numbers) -> tiles.Tiles:
    zooms, columns, rows = _split(keys)
    return zooms, columns, (1 << zooms) - 1 - rows


ARCHIVE = TileArchive(shards, _tiles, _read)


def read(shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the tiles from the database. The contract is in `pipeline.sources.base`."""
    return tiles.read(ARCHIVE, shard, todo, options)


SOURCE = Source(
    "mbtiles",
    (".mbtiles",),
    read,
    shards=shards,
    reads_header=True,
    payload=TileRun,
    columns=tiles.COLUMNS,
    planned_columns=partial(tiles.planned_columns, ARCHIVE.tiles),
    selects=("zoom", "bbox"),
    content_column="tile_hash",
    own_title="MBTiles",
)
