"""Web map tiles: z/x/y ↔ longitude and latitude, tiles of a box, PMTiles' tile ids. Pure, without I/O.

A tile z/x/y is the one of the XYZ scheme (OpenStreetMap, Google): x counts from 180° W eastwards, y from the north. TMS
counts y from the south. The projection is web Mercator (EPSG:3857), which ends at MAX_LATITUDE.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_ZOOM = 29
"""Zoom, x and y of a tile fit in 63 bits."""
MAX_LATITUDE = math.degrees(math.atan(math.sinh(math.pi)))
EDGE = 1e-9
"""Share of a tile: a box that reaches less far into it only touches its edge."""

LITTLE_ENDIAN, POLYGON = 1, 3
"""Numbers of WKB (OGC 06-103r4, section 8.2)."""

Ids = NDArray[np.int64]
Bounds = tuple[float, float, float, float]
"""West, south, east and north in degrees. West is greater than east if the box crosses the antimeridian."""


class Rectangle(NamedTuple):
    """The tiles of one zoom with x from `west` to `east` and y from `north` to `south`, both included."""

    west: int
    north: int
    east: int
    south: int


def is_tile(z: int, x: int, y: int) -> bool:
    """True if there is such a tile."""
    return 0 <= z <= MAX_ZOOM and 0 <= x < 1 << z and 0 <= y < 1 << z


def flip(z: int, y: int) -> int:
    """The y of TMS for one of XYZ, and the other way round."""
    return (1 << z) - 1 - y


def bounds(z: int, x: int, y: int) -> Bounds:
    """West, south, east and north of a tile in degrees."""
    side = 360 / (1 << z)
    return x * side - 180, _latitude(z, y + 1), (x + 1) * side - 180, _latitude(z, y)


def footprint(z: int, x: int, y: int) -> dict[str, Any]:
    """The columns `geometry` and `bbox` of a tile: a polygon of its four corners, counterclockwise.

    Its edges are straight in degrees as well, so they need no further points.
    """
    west, south, east, north = bounds(z, x, y)
    ring = (west, south, east, south, east, north, west, north, west, south)
    return {
        "geometry": struct.pack("<BIII10d", LITTLE_ENDIAN, POLYGON, 1, 5, *ring),
        "bbox": {"xmin": west, "ymin": south, "xmax": east, "ymax": north},
    }


def tile_at(longitude: float, latitude: float, z: int) -> tuple[int, int]:
    """x and y of the tile that holds a point. Points beyond MAX_LATITUDE are in the first and last row."""
    x, y = _position(longitude, latitude, z)
    last = (1 << z) - 1
    return min(max(math.floor(x), 0), last), min(max(math.floor(y), 0), last)


def rectangles(box: Bounds, z: int) -> list[Rectangle]:
    """The tiles of one zoom that a box overlaps, from west to east: two rectangles if it crosses the antimeridian.

    [] for a box beyond MAX_LATITUDE, where there are no tiles.
    """
    west, south, east, north = box
    if south >= MAX_LATITUDE or north <= -MAX_LATITUDE:
        return []
    if west > east:
        parts = [*rectangles((-180.0, south, east, north), z), *rectangles((west, south, 180.0, north), z)]
        return [Rectangle(0, parts[0].north, (1 << z) - 1, parts[0].south)] if _touch(parts) else parts
    last = (1 << z) - 1
    left, top = _position(west, north, z)
    right, bottom = _position(east, south, z)
    first_x, first_y = (min(max(math.floor(value + EDGE), 0), last) for value in (left, top))
    last_x, last_y = (min(max(math.ceil(value - EDGE) - 1, 0), last) for value in (right, bottom))
    return [Rectangle(first_x, first_y, max(first_x, last_x), max(first_y, last_y))]


def _touch(parts: list[Rectangle]) -> bool:
    """Whether the western rectangle reaches the eastern one, as at a zoom with few tiles."""
    return len(parts) == 2 and parts[0].east >= parts[1].west


def _position(longitude: float, latitude: float, z: int) -> tuple[float, float]:
    """x and y of a point in tiles, with their fractions."""
    latitude = math.radians(min(max(latitude, -MAX_LATITUDE), MAX_LATITUDE))
    y = (1 - math.asinh(math.tan(latitude)) / math.pi) / 2
    return (longitude + 180) / 360 * (1 << z), y * (1 << z)


def _latitude(z: int, y: int) -> float:
    return math.degrees(math.atan(math.sinh(math.pi * (1 - 2 * y / (1 << z)))))


@dataclass(frozen=True, slots=True)
class Selection:
    """The tiles that a run is to read.

    min_zoom, max_zoom: both included. box: None for the whole world.
    """

    min_zoom: int = 0
    max_zoom: int = MAX_ZOOM
    box: Bounds | None = None

    @property
    def selects_all_zooms(self) -> bool:
        return (self.min_zoom, self.max_zoom) == (0, MAX_ZOOM)

    @property
    def is_all(self) -> bool:
        return self == ALL_TILES

    def rectangles(self, z: int) -> list[Rectangle]:
        """The selected tiles of one zoom, from west to east. [] if the zoom is not selected."""
        if not self.min_zoom <= z <= self.max_zoom:
            return []
        return rectangles(self.box, z) if self.box else [Rectangle(0, 0, (1 << z) - 1, (1 << z) - 1)]

    def contains(self, z: int, x: int, y: int) -> bool:
        """True if a tile is selected."""
        return any(each.west <= x <= each.east and each.north <= y <= each.south for each in self.rectangles(z))


ALL_TILES = Selection()


# Tile ids of PMTiles. The package `pmtiles` converts one tile at a time; these functions convert arrays.


def first_id(z: int) -> int:
    """The first tile id of a zoom: the number of all tiles of smaller zooms."""
    return ((1 << 2 * z) - 1) // 3


def tile_ids(z: int, x: Any, y: Any) -> Ids:
    """Tile ids of arrays of x and y of one zoom: their places on the zoom's Hilbert curve, after all smaller zooms."""
    x, y = np.array(x, np.int64), np.array(y, np.int64)
    ids = np.full(x.shape, first_id(z), np.int64)
    for level in range(z - 1, -1, -1):
        side = 1 << level
        right, down = (x & side) > 0, (y & side) > 0
        ids += (((3 * right) ^ down).astype(np.int64)) << (2 * level)
        x, y = _rotate(side, x & (side - 1), y & (side - 1), right, down)
    return ids


def tiles_of_ids(ids: Any) -> tuple[Ids, Ids, Ids]:
    """z, x and y of an array of tile ids."""
    ids = np.asarray(ids, np.int64)
    starts = np.array([first_id(z) for z in range(MAX_ZOOM + 2)], np.int64)
    z = np.searchsorted(starts, ids, side="right") - 1
    place = ids - starts[z]
    x, y = np.zeros_like(ids), np.zeros_like(ids)
    for level in range(int(z.max(initial=0))):
        side = 1 << level
        right, down = (place >> 1 & 1) > 0, ((place ^ place >> 1) & 1) > 0
        inside = level < z
        rotated_x, rotated_y = _rotate(side, x, y, right, down)
        x = np.where(inside, rotated_x + side * right, x)
        y = np.where(inside, rotated_y + side * down, y)
        place = place >> 2
    return z, x, y


def _rotate(side: int, x: Ids, y: Ids, right: Any, down: Any) -> tuple[Ids, Ids]:
    """The orientation of the curve in one quadrant of a square of two times `side` tiles."""
    mirrored = right & ~down
    x, y = np.where(mirrored, side - 1 - x, x), np.where(mirrored, side - 1 - y, y)
    return np.where(down, x, y), np.where(down, y, x)


def id_ranges(selection: Selection, starts: Ids, stops: Ids, *, is_exact: bool = True) -> NDArray[np.int64]:
    """The selected tile ids as sorted, disjoint [start, stop) ranges, int64 [N, 2].

    starts, stops: sorted, disjoint intervals of ids; the ranges say what is selected inside of them, and may go beyond.
    A square of the curve is one range, so the ranges are about as many as intervals, and tiles on the border of a box
    within long ones. is_exact: False if it is enough that a range overlaps each interval with a selected tile, and no
    other one.
    """
    found = [np.empty((0, 2), np.int64)]
    for z in range(selection.min_zoom, selection.max_zoom + 1) if len(starts) else ():
        if starts[0] < first_id(z + 1) and stops[-1] > first_id(z):
            found += _ranges(z, selection.rectangles(z), starts, stops, is_exact=is_exact)
    ranges = np.concatenate(found)
    ranges = ranges[np.argsort(ranges[:, 0])]
    if not len(ranges):
        return ranges
    is_first = np.concatenate([[True], ranges[1:, 0] > ranges[:-1, 1]])
    last = np.append(np.flatnonzero(is_first)[1:] - 1, len(ranges) - 1)
    return np.stack([ranges[is_first, 0], ranges[last, 1]], axis=1)


def _ranges(z: int, wanted: list[Rectangle], starts: Ids, stops: Ids, *, is_exact: bool) -> Iterator[NDArray[np.int64]]:
    """The ranges of some rectangles of a zoom, level by level: squares inside them, then the squares of the others.

    A square without an id of the intervals is left out. Unless `is_exact`, one within a single interval is not divided.
    """
    x: Ids = np.zeros(1, np.int64)
    y = x
    for level in range(z + 1):
        side = 1 << z - level
        west, north = x * side, y * side
        inside, outside = np.zeros(len(x), bool), np.ones(len(x), bool)
        for each in wanted:
            is_beside = (west > each.east) | (west + side <= each.west)
            outside &= is_beside | (north > each.south) | (north + side <= each.north)
            is_within_x = (west >= each.west) & (west + side - 1 <= each.east)
            inside |= is_within_x & (north >= each.north) & (north + side - 1 <= each.south)
        first = first_id(z) + ((tile_ids(level, x, y) - first_id(level)) << 2 * (z - level))
        after = np.searchsorted(stops, first, side="right")  # the first interval that does not end before the square
        beyond = np.searchsorted(starts, first + side * side)
        outside |= after >= beyond
        if not is_exact:
            holds = starts[np.minimum(after, len(starts) - 1)] <= first
            inside |= holds & (stops[np.minimum(after, len(stops) - 1)] >= first + side * side)
        inside &= ~outside
        yield np.stack([first[inside], first[inside] + side * side], axis=1)
        parts = ~inside & ~outside
        x = (2 * x[parts, None] + np.array([0, 1, 0, 1])).ravel()
        y = (2 * y[parts, None] + np.array([0, 0, 1, 1])).ravel()
