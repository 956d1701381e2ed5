"""Archives of satellite imagery for the benchmarks: the same tiles in a tar, MBTiles and PMTiles, and a drawn scene."""

import functools
import math
import sqlite3
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from jobs.bench.harness.archives import encoded
from jobs.demo_archive import KINDS, add_member, draw_tile

ZOOM = 14
TILE = (256, 256)
DISTINCT_TILES = 500
BLOCK = 512
DISTINCT_BLOCKS = 40
CRS, RESOLUTION = "EPSG:32633", 10.0

Tile = tuple[int, int, bytes]
"""x, y and JPEG of a tile at ZOOM."""


def tiles(count: int) -> Iterator[Tile]:
    """A square area of drawn tiles, row by row."""
    for number, (x, y) in enumerate(places(count)):
        yield x, y, jpeg(number)


def places(count: int) -> Iterator[tuple[int, int]]:
    """x and y of the tiles."""
    side = math.isqrt(count - 1) + 1
    for number in range(count):
        yield 8_000 + number % side, 5_000 + number // side


def jpeg(number: int) -> bytes:
    """The bytes of a tile. No two tiles have the same, since archives store equal tiles once."""
    return _with_comment(_picture(number % DISTINCT_TILES), number)


def write_tar(path: Path, count: int) -> None:
    """Members `14/x/y.jpg`, all in one tar."""
    with tarfile.open(path, "w") as tar:
        for x, y, data in tiles(count):
            add_member(tar, f"{ZOOM}/{x}/{y}.jpg", data)
            tar.members = []  # type: ignore[attr-defined]  # otherwise tarfile remembers every one


def write_mbtiles(path: Path, count: int) -> None:
    """The plain schema of MBTiles 1.3, with rows that count from the south."""
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE metadata (name TEXT, value TEXT)")
        database.executemany("INSERT INTO metadata VALUES (?, ?)", {"name": "drawn", "format": "jpg"}.items())
        database.execute(
            "CREATE TABLE tiles (zoom_level INTEGER, tile_column INTEGER, tile_row INTEGER, tile_data BLOB)"
        )
        rows = ((ZOOM, x, (1 << ZOOM) - 1 - y, data) for x, y, data in tiles(count))
        database.executemany("INSERT INTO tiles VALUES (?, ?, ?, ?)", rows)
        database.execute("CREATE UNIQUE INDEX tile_index ON tiles (zoom_level, tile_column, tile_row)")


def write_pmtiles(path: Path, count: int) -> None:
    """PMTiles v3, clustered, with gzip directories."""
    from pmtiles.tile import Compression, TileType, zxy_to_tileid
    from pmtiles.writer import write

    with write(str(path)) as writer:
        ids = [zxy_to_tileid(ZOOM, x, y) for x, y in places(count)]
        for tile_id, number in sorted(zip(ids, range(count), strict=True)):
            writer.write_tile(tile_id, jpeg(number))
        header = {"tile_type": TileType.JPEG, "tile_compression": Compression.NONE}
        writer.finalize({**header, "min_zoom": ZOOM, "max_zoom": ZOOM}, {})


def write_scene(path: Path, side: int) -> None:
    """A square cloud-optimized GeoTIFF of 3 bands: internal tiles of BLOCK pixels, JPEG, 10 m per pixel in UTM."""
    import rasterio.shutil

    plain = path.with_suffix(".plain.tif")
    _write_plain(plain, side)
    rasterio.shutil.copy(plain, path, driver="COG", blocksize=BLOCK, compress="JPEG", num_threads="ALL_CPUS")
    plain.unlink()


def _write_plain(path: Path, side: int) -> None:
    """The scene without the order of bytes and the overviews that make it cloud-optimized."""
    import rasterio
    from rasterio.transform import from_origin
    from rasterio.windows import Window

    shape = {"width": side, "height": side, "count": 3, "dtype": "uint8"}
    layout = {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "JPEG", "photometric": "YCBCR"}
    place = {"crs": CRS, "transform": from_origin(300_000, 5_600_000, RESOLUTION, RESOLUTION)}
    with rasterio.open(path, "w", driver="GTiff", BIGTIFF="YES", **shape, **layout, **place) as file:
        for number, (row, column) in enumerate(np.ndindex(*2 * (-(-side // BLOCK),))):
            top, left = row * BLOCK, column * BLOCK
            window = Window(left, top, min(BLOCK, side - left), min(BLOCK, side - top))
            pixels = _block(number * 7 % DISTINCT_BLOCKS)  # 7: neighbours differ
            file.write(pixels[:, : window.height, : window.width], window=window)


@functools.cache
def _picture(seed: int) -> bytes:
    """About 20 KB of JPEG, 256 × 256 pixels."""
    return encoded(draw_tile(KINDS[seed % len(KINDS)], np.random.default_rng(seed), TILE), quality=90)


@functools.cache
def _block(seed: int) -> np.ndarray:
    """uint8 [3, BLOCK, BLOCK]."""
    image = draw_tile(KINDS[seed % len(KINDS)], np.random.default_rng(seed), (BLOCK, BLOCK))
    return np.asarray(image).transpose(2, 0, 1)


def _with_comment(jpeg: bytes, number: int) -> bytes:
    """Insert a comment of 8 bytes after the start of a JPEG."""
    return jpeg[:2] + b"\xff\xfe\x00\x0a" + number.to_bytes(8, "big") + jpeg[2:]
