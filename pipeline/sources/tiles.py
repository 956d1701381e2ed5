"""Shared by the readers of tile archives: the payload of a shard of tiles, and its records."""

import gzip
import hashlib
import io
import json
import time
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from dataclasses import fields as fields_of
from typing import Any

import numpy as np
import pyarrow as pa
import zstandard
from numpy.typing import NDArray

from pipeline import schema
from pipeline.coverage import Ranges, intersect
from pipeline.errors import InputRefused, ReadError
from pipeline.geo.tiles import footprint
from pipeline.sources.base import Contents, NoImages, Place, ReadOptions, Record, ShardEnd
from pipeline.sources.records import MAX_MEMBER_BYTES, Rows, storage_fault, too_large
from pipeline.sources.shard import Shard
from pipeline.storage import access
from pipeline.storage.base import ObjectInfo, check_etag

TILES_PER_SHARD = 16_384
PLACE = pa.schema([("tile_z", pa.int32()), ("tile_x", pa.int32()), ("tile_y", pa.int32())])
"""Columns of every tile: its place in the XYZ scheme."""
COLUMNS = pa.schema([*PLACE, *schema.FOOTPRINT, ("tile_hash", pa.int64())])
"""Columns of a tile in an archive. tile_hash: of its bytes, uncompressed."""

Numbers = NDArray[np.int64]
Tiles = tuple[Numbers, Numbers, Numbers]
"""z, x and y of some tiles, in the XYZ scheme."""


@dataclass(frozen=True, slots=True)
class TileRun:
    """The payload of a shard of tiles. Rows with the same bytes are neighbours.

    keys: one per row, as `Archive.tiles` of its kind understands them.
    counts: number of rows of each content, in row order. A content is what the archive stores once.
    places: where each content is, in the archive's own terms; () if its first key says so.
    sizes: stored bytes of each content; () if the archive does not say.
    compression: of the contents: "", gzip, zstd or brotli.
    lost: why none of the rows can be read; "" for rows that can. Such rows have no keys. lost_type: their error_type.
    """

    keys: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    sizes: tuple[int, ...] = ()
    compression: str = ""
    lost: str = ""
    lost_type: str = ""

    @staticmethod
    def of(keys: Numbers, contents: Numbers, places: Numbers | None, sizes: Numbers | None = None) -> "TileRun":
        """Group rows by content. contents: a number per row; places and sizes: by row, None if there are none."""
        _, first, group = np.unique(contents, return_index=True, return_inverse=True)
        rank = np.empty_like(first)
        rank[np.argsort(first)] = np.arange(len(first))  # contents in the order in which they first occur
        order = np.argsort(rank[group], kind="stable")
        first.sort()

        def chosen(values: Numbers | None) -> tuple[int, ...]:
            return () if values is None else tuple(values[first].tolist())

        counts = np.bincount(rank[group], minlength=len(first))
        return TileRun(tuple(keys[order].tolist()), tuple(counts.tolist()), chosen(places), chosen(sizes))

    def to_json(self) -> str:
        fields = {each.name: value for each in fields_of(self) if (value := getattr(self, each.name))}
        for name in ("keys", "places"):  # differences are short and compress well
            if name in fields:
                fields[name] = np.diff(np.array(fields[name], np.int64), prepend=0).tolist()
        return json.dumps(fields, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> "TileRun":
        fields: dict[str, Any] = json.loads(text)
        for name in ("keys", "places"):
            if name in fields:
                fields[name] = np.cumsum(np.array(fields[name], np.int64)).tolist()
        for name, value in fields.items():
            fields[name] = tuple(value) if isinstance(value, list) else value
        return TileRun(**fields)

    def first(self, rows: int) -> "TileRun":
        return self.select(((0, rows),))

    def select(self, rows: Ranges) -> "TileRun":
        """The payload of some of the rows."""
        if self.lost:
            return self
        wanted = np.zeros(len(self.keys), bool)
        for start, stop in rows:
            wanted[start:stop] = True
        contents = np.repeat(np.arange(len(self.counts)), self.counts)[wanted]
        counts = np.bincount(contents, minlength=len(self.counts))

        def kept(values: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(np.array(values, np.int64)[counts > 0].tolist()) if values else ()

        keys = tuple(np.array(self.keys, np.int64)[wanted].tolist())
        return replace(
            self,
            keys=keys,
            counts=tuple(counts[counts > 0].tolist()),
            places=kept(self.places),
            sizes=kept(self.sizes),
        )

    @property
    def first_keys(self) -> Numbers:
        """The key of the first row of each content."""
        starts = np.cumsum((0, *self.counts))[:-1]
        first: Numbers = np.array(self.keys, np.int64)[starts]
        return first

    def contents(self, todo: Ranges) -> list[tuple[int, Ranges]]:
        """The contents that have rows in `todo`, and these rows."""
        stops = np.cumsum(self.counts).tolist()
        bounds = tuple(zip([0, *stops], stops, strict=False))
        pieces: dict[int, Ranges] = {}
        for start, stop in intersect(todo, bounds):
            content = bisect_right(stops, start)
            pieces[content] = (*pieces.get(content, ()), (start, stop))
        return list(pieces.items())


@dataclass(frozen=True, slots=True)
class TileArchive:
    """How one kind of archive is read.

    shards: the hook of `Source`. tiles: keys → z, x and y.
    read: (shard, contents) → the bytes of these contents, in order, as they are stored. Raises ReadError or OSError if
    no further content can be read.
    """

    shards: Callable[[ObjectInfo, ReadOptions], Iterator[Contents]]
    tiles: Callable[[Numbers], Tiles]
    read: Callable[[Shard, list[int]], Iterator[bytes | ReadError]]


def read(archive: TileArchive, shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read the tiles of a shard. The contract is in `pipeline.sources.base`."""
    if shard.payload is None:
        yield from _read_whole(archive, shard, todo, options)
        return
    run, rows = shard.payload, shard.rows
    assert isinstance(run, TileRun)
    assert rows is not None
    todo = intersect(todo, ((0, rows),))
    yield from _lost(shard, run, todo) if run.lost else _records(archive, shard, run, todo)
    yield ShardEnd(rows)


def _records(archive: TileArchive, shard: Shard, run: TileRun, todo: Ranges) -> Iterator[Record]:
    """One record per content and range of `todo`. After a fault all further rows are errors."""
    names = _Names(shard.uri, archive.tiles(np.array(run.keys, np.int64)))
    wanted = run.contents(todo)
    stream = archive.read(shard, [content for content, _ in wanted])
    fault: ReadError | None = None
    try:
        for _, ranges in wanted:
            started = time.perf_counter()
            try:
                data = fault or _decompressed(next(stream), run.compression, shard.uri, names.member(ranges[0][0]))
            except ReadError as error:
                data = fault = error
            except OSError as error:
                data = fault = storage_fault(shard.uri, error)
            seconds = time.perf_counter() - started
            for rows in ranges:
                yield names.record(rows, data, seconds)
                seconds = 0.0
    finally:
        stream.close()  # type: ignore[attr-defined]


class _Names:
    """The image_ids and columns of a shard's rows."""

    def __init__(self, uri: str, tiles: Tiles) -> None:
        self.uri = uri
        self.tiles = list(zip(*(column.tolist() for column in tiles), strict=True))

    def member(self, row: int) -> str:
        return "{}/{}/{}".format(*self.tiles[row])

    def record(self, rows: tuple[int, int], data: bytes | ReadError, seconds: float) -> Record:
        """The record of neighbouring rows with the same bytes."""
        image, error = (None, data) if isinstance(data, ReadError) else (data, None)
        content_hash = {} if image is None else {"tile_hash": hash_of(image)}
        first, *others = (self._place(row, content_hash) for row in range(*rows))
        return Record(rows[0], first.image_id, self.uri, first.member, image, error, first.kept, seconds, tuple(others))

    def _place(self, row: int, content_hash: dict[str, int]) -> Place:
        z, x, y = self.tiles[row]
        member = self.member(row)
        return Place(f"{self.uri}#{member}", member, place_columns(z, x, y) | content_hash)


def place_columns(z: int, x: int, y: int) -> dict[str, Any]:
    """The columns of PLACE and the footprint of a tile."""
    return {"tile_z": z, "tile_x": x, "tile_y": y, **footprint(z, x, y)}


def planned_columns(tiles: Callable[[Numbers], Tiles], run: TileRun, row: int) -> dict[str, Any]:
    """The columns of a tile that follow from the plan. tiles: of `TileArchive`."""
    z, x, y = (int(column[0]) for column in tiles(np.array([run.keys[row]], np.int64)))
    return place_columns(z, x, y)


def hash_of(data: bytes) -> int:
    """A 64-bit hash of bytes, as a signed integer."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


class NoTiles(NoImages):
    """The archive holds no tiles at all."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Tiles that planning could not find. message: why, without the archive's name. rows: how many, at least."""

    message: str
    error_type: str = "corrupt"
    rows: int = 1

    def contents(self) -> Contents:
        """The shard that stands for them."""
        return Contents(self.rows, {}, TileRun(lost=self.message, lost_type=self.error_type), 0)


def _lost(shard: Shard, run: TileRun, todo: Ranges) -> Iterator[Record]:
    error = ReadError(run.lost_type, f"{shard.uri}: {run.lost}")
    for start, stop in todo:
        for row in range(start, stop):
            yield Record(row, f"{shard.uri}#shard={shard.index}&row={row}", shard.uri, None, None, error)


def _read_whole(archive: TileArchive, shard: Shard, todo: Ranges, options: ReadOptions) -> Iterator[Record | ShardEnd]:
    """Read a whole archive that planning could not inspect. Its shards follow one another."""
    rows = Rows(shard, todo)
    fault = None
    try:
        for contents in archive.shards(check_etag(access.head(shard.uri), shard.etag), options):
            part = replace(shard, rows=contents.rows, payload=contents.payload)
            first = rows.row
            inside = tuple((max(start - first, 0), stop - first) for start, stop in rows.todo if stop > first)
            for item in read(archive, part, inside, options):
                if isinstance(item, Record):
                    row = item.row + first
                    image_id = f"{shard.uri}#row={row}" if item.member is None else item.image_id
                    yield replace(item, row=row, image_id=image_id)
            rows.advance(contents.rows or 0)
            if rows.row >= rows.stop and shard.rows is not None:
                break
        rows.total = rows.row
    except NoTiles:
        rows.total = rows.row
    except InputRefused as error:  # such as vector tiles
        fault = ReadError("unsupported", str(error))
    except ReadError as error:
        fault = error
    except OSError as error:
        fault = storage_fault(shard.uri, error)
    yield from rows.finish(fault)


def _decompressed(data: bytes | ReadError, compression: str, uri: str, member: str) -> bytes | ReadError:
    """The bytes of a tile. Raster tiles with gzip or zstd around them are rare and valid."""
    if isinstance(data, ReadError):
        return data
    if data[:2] == b"\x1f\x8b":
        compression = "gzip"
    try:
        return decompress(data, compression) if compression else data
    except Oversized as error:
        return too_large(uri, member, error.size_bytes)
    except ValueError as error:
        return ReadError("corrupt", f"{uri}: {member}: {error}")


class Oversized(ValueError):
    """Decompressed bytes would exceed the limit."""

    def __init__(self, size_bytes: int, limit: int) -> None:
        super().__init__(f"it has more than {limit} bytes")
        self.size_bytes = size_bytes


def decompress(data: bytes, compression: str, limit: int | None = None) -> bytes:
    """Decompress gzip, zstd or brotli. Raises ValueError if the data is broken or cut short, Oversized if large.

    limit: bytes, MAX_MEMBER_BYTES by default.
    """
    limit = limit or MAX_MEMBER_BYTES
    try:
        decompressed = DECOMPRESSORS[compression](data, limit)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"its {compression} data is broken: {error}") from error
    if len(decompressed) > limit:
        raise Oversized(len(decompressed), limit)
    return decompressed


def _gzip(data: bytes, limit: int) -> bytes:
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        return file.read(limit + 1)


def _zstd(data: bytes, limit: int) -> bytes:
    return _pieces(data, zstandard.ZstdDecompressor().decompressobj(), limit)


def _pieces(data: bytes, decompressor: Any, limit: int) -> bytes:
    """Decompress in pieces of the input, which bounds the output."""
    output = bytearray()
    for start in range(0, len(data), 1 << 14):
        output += decompressor.decompress(data[start : start + (1 << 14)])
        if len(output) > limit:
            return bytes(output)
        if decompressor.eof:
            return bytes(output)
    raise EOFError("it ends too early")


def require_brotli() -> Any:
    """The package `brotli`. Raises InputRefused if it is missing."""
    try:
        import brotli
    except ImportError as error:
        raise InputRefused("PMTiles with brotli need pip install 'nightshift[geo]'") from error
    return brotli


def _brotli(data: bytes, limit: int) -> bytes:
    brotli = require_brotli()
    decompressor = brotli.Decompressor()
    try:
        output: bytes = decompressor.process(data, output_buffer_limit=limit + 1)
    except brotli.error as error:
        raise EOFError(str(error)) from error
    if not decompressor.is_finished() and len(output) <= limit:
        raise EOFError("it ends too early")
    return output


DECOMPRESSORS: dict[str, Callable[[bytes, int], bytes]] = {"gzip": _gzip, "zstd": _zstd, "brotli": _brotli}
