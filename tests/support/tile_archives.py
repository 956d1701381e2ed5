"""MBTiles and PMTiles for tests, in all the forms that their specifications allow."""

import gzip
import hashlib
import io
import sqlite3
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import brotli
import numpy as np
import zstandard
from PIL import Image
from pmtiles.tile import Compression, Entry, TileType, serialize_directory, serialize_header, zxy_to_tileid

Tile = tuple[int, int, int]
"""z, x and y in the XYZ scheme."""
Layout = Literal["table", "no index", "map", "shallow", "without rowid", "view"]

COMPRESS: dict[Compression, Callable[[bytes], bytes]] = {
    Compression.NONE: lambda data: data,
    Compression.GZIP: lambda data: gzip.compress(data, mtime=0),
    Compression.ZSTD: lambda data: zstandard.ZstdCompressor().compress(data),
    Compression.BROTLI: lambda data: bytes(brotli.compress(data)),
}


def tile_image(number: int, format: str = "PNG", side: int = 16) -> bytes:
    """A picture of noise; equal numbers give equal bytes."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 255, (side, side, 3), np.uint8)).save(buffer, format)
    return buffer.getvalue()


def square(z: int, count: int, first: int = 0) -> dict[Tile, bytes]:
    """The first tiles of a zoom, column by column, each with another picture."""
    side = 1 << z
    return {(z, number // side, number % side): tile_image(first + number) for number in range(count)}


def write_mbtiles(
    path: Path, tiles: Mapping[Tile, bytes | None], layout: Layout = "table", format: str | None = "png"
) -> Path:
    """Write a new database. A tile that is None has a place and no data, in a layout of two tables."""
    path.unlink(missing_ok=True)
    places = [(z, x, (1 << z) - 1 - y, data) for (z, x, y), data in tiles.items()]
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE metadata (name text, value text)")
        database.execute("INSERT INTO metadata VALUES ('name', 'test')")
        if format:
            database.execute("INSERT INTO metadata VALUES ('format', ?)", (format,))
        key = "zoom_level integer, tile_column integer, tile_row integer"
        if layout in ("table", "no index"):
            database.execute(f"CREATE TABLE tiles ({key}, tile_data blob)")
            database.executemany("INSERT INTO tiles VALUES (?, ?, ?, ?)", places)
            if layout == "table":
                database.execute("CREATE UNIQUE INDEX tile_index ON tiles (zoom_level, tile_column, tile_row)")
        elif layout == "without rowid":
            primary = "PRIMARY KEY (zoom_level, tile_column, tile_row)"
            database.execute(f"CREATE TABLE tiles ({key}, tile_data blob, {primary}) WITHOUT ROWID")
            database.executemany("INSERT INTO tiles VALUES (?, ?, ?, ?)", places)
        elif layout == "view":
            database.execute(f"CREATE TABLE other ({key}, tile_data blob)")
            database.executemany("INSERT INTO other VALUES (?, ?, ?, ?)", places)
            database.execute("CREATE UNIQUE INDEX other_index ON other (zoom_level, tile_column, tile_row)")
            database.execute("CREATE VIEW tiles AS SELECT * FROM other")
        else:
            names = ("map", "images", "tile_id text") if layout == "map" else SHALLOW
            _write_two_tables(database, places, *names, key)
    database.close()
    return path


SHALLOW = ("tiles_shallow", "tiles_data", "tile_data_id integer")


def _write_two_tables(
    database: sqlite3.Connection,
    places: list[tuple[int, int, int, bytes | None]],
    rows: str,
    data: str,
    id: str,
    key: str,
) -> None:
    name = id.split()[0]
    database.execute(f"CREATE TABLE {rows} ({key}, {id})")
    database.execute(f"CREATE UNIQUE INDEX {rows}_index ON {rows} (zoom_level, tile_column, tile_row)")
    database.execute(f"CREATE TABLE {data} ({id} PRIMARY KEY, tile_data blob)")
    for z, x, y, image in places:
        digest = hashlib.md5(image or b"missing").hexdigest()
        tile_id = digest if "text" in id else int(digest[:12], 16)
        database.execute(f"INSERT INTO {rows} VALUES (?, ?, ?, ?)", (z, x, y, tile_id))
        if image is not None:
            database.execute(f"INSERT OR IGNORE INTO {data} VALUES (?, ?)", (tile_id, image))
    columns = f"{rows}.zoom_level, {rows}.tile_column, {rows}.tile_row, {data}.tile_data"
    database.execute(f"CREATE VIEW tiles AS SELECT {columns} FROM {rows} JOIN {data} ON {rows}.{name} = {data}.{name}")


def write_pmtiles(
    path: Path,
    tiles: Mapping[Tile, bytes],
    *,
    leaf_size: int = 0,
    levels: int = 1,
    compression: Compression = Compression.GZIP,
    tile_compression: Compression = Compression.NONE,
    tile_type: TileType = TileType.PNG,
) -> Path:
    """Write an archive as `pmtiles.writer` does, but with any compression and any size of leaf directories.

    Equal tiles are stored once, as runs if their ids follow one another. leaf_size: entries per leaf directory, 0 for
    no leaves. levels: of leaf directories.
    """
    data = bytearray()
    offsets: dict[bytes, int] = {}
    entries: list[Entry] = []
    for tile_id, image in sorted((zxy_to_tileid(*tile), image) for tile, image in tiles.items()):
        stored = COMPRESS[tile_compression](image)
        if stored not in offsets:
            offsets[stored] = len(data)
            data += stored
        last = entries[-1] if entries else None
        if last and last.offset == offsets[stored] and tile_id == last.tile_id + last.run_length:
            last.run_length += 1
        else:
            entries.append(Entry(tile_id, offsets[stored], len(stored), 1))
    leaves = bytearray()
    for _ in range(levels if leaf_size else 0):
        entries = _leaves(entries, leaf_size, leaves, compression)
    root = _directory(entries, compression)
    metadata = COMPRESS[compression](b"{}")
    leaf_offset = 127 + len(root) + len(metadata)
    zooms = [z for z, _, _ in tiles] or [0]
    header = {
        "version": 3,
        "root_offset": 127,
        "root_length": len(root),
        "metadata_offset": 127 + len(root),
        "metadata_length": len(metadata),
        "leaf_directory_offset": leaf_offset,
        "leaf_directory_length": len(leaves),
        "tile_data_offset": leaf_offset + len(leaves),
        "tile_data_length": len(data),
        "addressed_tiles_count": len(tiles),
        "clustered": True,
        "internal_compression": compression,
        "tile_compression": tile_compression,
        "tile_type": tile_type,
        "min_zoom": min(zooms),
        "max_zoom": max(zooms),
    }
    path.write_bytes(serialize_header(header) + root + metadata + bytes(leaves) + bytes(data))  # type: ignore[arg-type]
    return path


def _leaves(entries: list[Entry], size: int, leaves: bytearray, compression: Compression) -> list[Entry]:
    """Write leaf directories of so many entries; return the entries that point to them."""
    pointers = []
    for first in range(0, len(entries), size):
        leaf = _directory(entries[first : first + size], compression)
        pointers.append(Entry(entries[first].tile_id, len(leaves), len(leaf), 0))
        leaves += leaf
    return pointers


def _directory(entries: list[Entry], compression: Compression) -> bytes:
    return COMPRESS[compression](gzip.decompress(serialize_directory(entries)))
