"""Footprints: a window of pixels, its transform and its CRS → a polygon in longitude and latitude. No I/O.

Polygons are in OGC:CRS84: longitude from -180 to 180, then latitude. Outer rings run counterclockwise, and a polygon
that crosses the antimeridian is cut there (RFC 7946, sections 3.1.6 and 3.1.9). The sides of a window are straight in
its CRS and curved on the map, so points are added until a side is off by less than MAX_ERROR_PIXELS.
"""

import functools
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import shapely
from numpy.typing import NDArray
from pyproj import CRS, Geod, Transformer
from pyproj.exceptions import CRSError, ProjError
from shapely.geometry import MultiPolygon, Polygon, box
from shapely.geometry.polygon import orient

from pipeline.errors import ReadError

LONGITUDE_LATITUDE = "OGC:CRS84"
MAX_ERROR_PIXELS = 0.1
MAX_SEGMENTS = 512
"""Per side of a window."""
POLE = 90 - 1e-9
ON_EDGE = 1e-6
"""A pole that is this near to the edge of a window, in pixels, is on it."""
EARTH_RADIUS_METRES = 6_371_008.8

Affine = tuple[float, float, float, float, float, float]
"""a, b, c, d, e, f, as rasterio orders them: x = a·column + b·row + c, y = d·column + e·row + f. (0, 0) is the outer
corner of the first pixel."""
Points = NDArray[np.float64]
"""[N, 2]: x and y, or longitude and latitude."""


@dataclass(frozen=True, slots=True)
class Window:
    """A rectangle of pixels: its first column and row, and its size."""

    column: int
    row: int
    width: int
    height: int


def window_transform(transform: Affine, window: Window) -> Affine:
    """The transform of a window's own pixels."""
    a, b, c, d, e, f = transform
    x, y = c + a * window.column + b * window.row, f + d * window.column + e * window.row
    return a, b, x, d, e, y


def footprint(transform: Affine, crs: str, window: Window) -> Polygon | MultiPolygon | None:
    """The polygon of a window; None if a part of it is outside of the world that its CRS describes.

    crs: any text that PROJ reads. Raises ReadError (unsupported) if it is no CRS of the Earth's surface.
    """
    projection = projection_of(crs)
    ring = _ring(projection, transform, window)
    return None if ring is None else _polygon(ring)


class Projection:
    """A CRS, with the way to longitude and latitude and back. For one thread.

    poles: where they are in this CRS, +1 for the North Pole; without those that are nowhere, or a line.
    """

    def __init__(self, crs: str) -> None:
        self.crs = parsed_crs(crs)
        self.to_map = Transformer.from_crs(self.crs, LONGITUDE_LATITUDE, always_xy=True)
        operation = self.crs.coordinate_operation
        self.is_periodic = operation is not None and "Mercator" in operation.method_name
        self.is_geographic = self.crs.is_geographic
        self.poles = {sign: pole for sign in (1, -1) if (pole := self._pole(sign)) is not None}

    def degrees(self, points: Points) -> Points | None:
        """Longitude and latitude; None if a point has none. Longitudes may be outside of -180 to 180."""
        longitude, latitude = self.to_map.transform(points[:, 0], points[:, 1])
        result = np.column_stack([longitude, latitude])
        return result if np.isfinite(result).all() else None

    def is_reversible(self, points: Points, degrees: Points, tolerance: float) -> bool:
        """Whether the way back leads to the same points. Outside of their world, some projections give others."""
        if self.is_geographic:
            return True
        back = np.column_stack(self.to_map.transform(degrees[:, 0], degrees[:, 1], direction="INVERSE"))
        error = np.abs(back - points)
        if self.is_periodic:  # Mercator goes on after 180° with the same scale
            error = error[:, 1:]
        return bool((error < tolerance).all())

    def _pole(self, sign: int) -> Points | None:
        if self.is_geographic:
            return None
        x, y = self.to_map.transform([0.0, 90.0, 180.0], [90.0 * sign] * 3, direction="INVERSE")
        points = np.column_stack([x, y])
        is_one = bool(np.isfinite(points).all()) and np.ptp(points, axis=0).max() < 1e-3
        return points[0] if is_one else None


def parsed_crs(crs: str) -> CRS:
    """The CRS of a text. Raises ReadError (unsupported) if it is not one of the Earth's surface."""
    try:
        parsed = CRS.from_user_input(crs)
        Transformer.from_crs(parsed, LONGITUDE_LATITUDE, always_xy=True)
    except (CRSError, ProjError) as error:
        name = _name(crs)
        raise ReadError(
            "unsupported",
            f"its CRS {name!r} has no way to longitude and latitude of the Earth ({_reason(error)}); reproject it, or "
            "remove its CRS (gdal_edit.py -a_srs None) to get rows without geometry",
        ) from error
    if any(axis.direction == "west" for axis in parsed.axis_info):
        raise ReadError(
            "unsupported",
            f"its CRS {parsed.name!r} counts to the west, which programs read in different ways; reproject it",
        )
    return parsed


def _name(crs: str) -> str:
    try:
        return str(CRS.from_user_input(crs).name)
    except CRSError:
        return crs[:60]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return "it is of another celestial body" if "celestial body" in text else text[:200]


def projection_of(crs: str) -> Projection:
    """The projection of a CRS. Raises ReadError (unsupported)."""
    return _projection(crs, threading.get_ident())


@functools.lru_cache(maxsize=64)
def _projection(crs: str, thread: int) -> Projection:
    return Projection(crs)


def crs_name(crs: str) -> str:
    """`EPSG:32618` for a CRS that is exactly one with a code, otherwise its PROJJSON."""
    parsed = parsed_crs(crs)
    authority = parsed.to_authority(min_confidence=100)
    return ":".join(authority) if authority else parsed.to_json()


def pixel_metres(transform: Affine, crs: str, width: int, height: int) -> tuple[float, float]:
    """Width and height of a pixel in metres: of the map if the CRS is projected, on the ground at the scene's centre
    if it is geographic. Raises ReadError (unsupported) if that is not on the Earth."""
    projection = projection_of(crs)
    a, b, _, d, e, _ = transform
    if not projection.is_geographic:
        unit = projection.crs.axis_info[0].unit_conversion_factor or 1.0
        return math.hypot(a, d) * unit, math.hypot(b, e) * unit
    centre = np.array([[width / 2, height / 2], [width / 2 + 1, height / 2], [width / 2, height / 2 + 1]])
    degrees = projection.degrees(_apply(transform, centre))
    if degrees is None or np.abs(degrees[:, 1]).max() > 90:
        raise ReadError(
            "unsupported", "the centre of the scene is not on the Earth, so its pixels have no size in metres"
        )
    geod = Geod(ellps="WGS84")
    _, _, across = geod.inv(*degrees[0], *degrees[1])
    _, _, down = geod.inv(*degrees[0], *degrees[2])
    return float(across), float(down)


def _apply(transform: Affine, pixels: Points) -> Points:
    a, b, c, d, e, f = transform
    columns, rows = pixels[:, 0], pixels[:, 1]
    return np.column_stack([a * columns + b * rows + c, d * columns + e * rows + f])


def _invert(transform: Affine, point: Points) -> tuple[float, float]:
    a, b, c, d, e, f = transform
    determinant = a * e - b * d
    x, y = point[0] - c, point[1] - f
    return (e * x - b * y) / determinant, (a * y - d * x) / determinant


def _corners(window: Window) -> Points:
    left, top = window.column, window.row
    right, bottom = left + window.width, top + window.height
    return np.array([[left, top], [left, bottom], [right, bottom], [right, top]], np.float64)


def _sides(window: Window, segments: int, on_edge: Sequence[tuple[float, float]]) -> Points:
    """The points of a window's outline in pixels, without the last, which is the first. on_edge: further points."""
    corners = _corners(window)
    sides = []
    for start, stop in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        shares = np.arange(segments) / segments
        along = stop - start
        for point in on_edge:
            share = float(np.dot(point - start, along) / np.dot(along, along))
            distance = np.abs(start + share * along - point).max()
            if distance < ON_EDGE and ON_EDGE < share < 1 - ON_EDGE:
                shares = np.unique(np.append(shares, share))
        sides.append(start + shares[:, None] * along)
    return np.concatenate(sides)


@dataclass(frozen=True, slots=True)
class _Ring:
    """An outline in degrees, with longitudes that do not jump: they may leave -180 to 180.

    poles: the sign of each pole inside of it.
    """

    degrees: Points
    poles: tuple[int, ...]


def _ring(projection: Projection, transform: Affine, window: Window) -> _Ring | None:
    places = {sign: _invert(transform, pole) for sign, pole in projection.poles.items()}
    on_edge = [place for place in places.values() if _is_in(window, place, ON_EDGE)]
    poles = tuple(sign for sign, place in places.items() if _is_in(window, place, -ON_EDGE))
    segments = _first_segments(projection, transform, window)
    while True:
        points = _apply(transform, _sides(window, segments, on_edge))
        degrees = projection.degrees(points)
        if degrees is None:
            return None
        if projection.is_geographic and np.abs(degrees[:, 1]).max() > 90 + max(map(abs, transform[3:5])):
            return None
        ring = _unwrapped(degrees, has_poles=not projection.is_geographic)
        if segments >= MAX_SEGMENTS or _is_smooth(projection, points, degrees, ring, transform):
            break
        segments *= 2
    pixel = max(math.hypot(transform[0], transform[3]), math.hypot(transform[1], transform[4]))
    return _Ring(ring, poles) if projection.is_reversible(points, degrees, pixel) else None


def _first_segments(projection: Projection, transform: Affine, window: Window) -> int:
    """Segments per side to begin with. A longitude that is less than 90° from the last one does not jump."""
    if not projection.is_geographic:
        return 4
    unit = projection.crs.axis_info[0].unit_conversion_factor or math.radians(1)
    a, b, _, d, e, _ = transform
    longest = max(max(abs(a), abs(d)) * window.width, max(abs(b), abs(e)) * window.height)
    degrees = math.degrees(longest * unit)
    return min(MAX_SEGMENTS, max(1, math.ceil(degrees / 45)))


def _is_in(window: Window, place: tuple[float, float], margin: float) -> bool:
    column, row = place[0] - window.column, place[1] - window.row
    return -margin < column < window.width + margin and -margin < row < window.height + margin


def _unwrapped(degrees: Points, *, has_poles: bool) -> Points:
    """A closed ring whose longitudes do not jump at ±180°. A point on a pole becomes two, one on each side of it.

    has_poles: a pole is a point of the CRS, where a longitude has no meaning.
    """
    at_pole = np.flatnonzero(np.abs(degrees[:, 1]) > POLE)
    longitudes = degrees[:, 0]
    if has_poles and len(at_pole):  # a corner or a side of the window touches the pole
        first = int(at_pole[0])
        others = np.roll(degrees, -first, axis=0)[1:]
        longitudes = np.unwrap(others[:, 0], period=360)
        path = np.column_stack([longitudes, others[:, 1]])
        latitude = math.copysign(90, degrees[first, 1])
        return np.vstack([path, [path[-1, 0], latitude], [path[0, 0], latitude], path[:1]])
    closed = np.append(longitudes, longitudes[0])
    return np.column_stack([np.unwrap(closed, period=360), np.append(degrees[:, 1], degrees[0, 1])])


def _is_smooth(projection: Projection, points: Points, degrees: Points, ring: Points, transform: Affine) -> bool:
    """Whether the middle of each segment on the map is near to the middle of the segment in the CRS."""
    steps = np.abs(np.diff(ring[:, 0]))
    is_at_pole = not projection.is_geographic and (np.abs(ring[:, 1]) > POLE).any()
    if steps.max() >= 90 and not is_at_pole:  # too far apart to tell which way round
        return False
    middles = (points + np.roll(points, -1, axis=0)) / 2
    true = projection.degrees(middles)
    if true is None:
        return True
    following = np.roll(degrees, -1, axis=0)
    away = (following[:, 0] - degrees[:, 0] + 180) % 360 - 180
    straight = np.column_stack([degrees[:, 0] + away / 2, (degrees[:, 1] + following[:, 1]) / 2])
    east = ((true[:, 0] - straight[:, 0] + 180) % 360 - 180) * np.cos(np.radians(true[:, 1]))
    error_metres = np.radians(np.hypot(east, true[:, 1] - straight[:, 1])) * EARTH_RADIUS_METRES
    near_pole = np.maximum(np.abs(degrees[:, 1]), np.abs(following[:, 1])) > POLE
    return bool((error_metres[~near_pole] <= MAX_ERROR_PIXELS * _pixel_metres(projection, transform)).all())


def _pixel_metres(projection: Projection, transform: Affine) -> float:
    a, b, _, d, e, _ = transform
    unit = projection.crs.axis_info[0].unit_conversion_factor or 1.0  # to metres, or to radians
    return min(math.hypot(a, d), math.hypot(b, e)) * unit * (EARTH_RADIUS_METRES if projection.is_geographic else 1.0)


def _polygon(ring: _Ring) -> Polygon | MultiPolygon | None:
    degrees = ring.degrees.copy()
    degrees[:, 1] = degrees[:, 1].clip(-90, 90)  # half a pixel beyond a pole, in grids whose pixels are points
    turn = degrees[-1, 0] - degrees[0, 0]
    if abs(turn) > 180:
        if len(ring.poles) != 1:
            return None
        return _around_pole(degrees, turn, 90.0 * ring.poles[0])
    if ring.poles:
        return None
    west, east = degrees[:, 0].min(), degrees[:, 0].max()
    if east - west > 360 - 1e-9:  # around the world, or more: a grid with half a pixel at each end
        return orient(box(-180.0, degrees[:, 1].min(), 180.0, degrees[:, 1].max()))
    degrees[:, 0] -= 360 * math.floor((west + 180) / 360)
    polygon = Polygon(degrees)
    if not polygon.is_valid or not polygon.area:
        return None
    return _split(polygon)


def _around_pole(path: Points, turn: float, latitude: float) -> Polygon | None:
    """The polygon between a path once around the world and a pole."""
    path = path[:-1] if turn > 0 else path[:0:-1]  # eastward
    path = path - [360 * math.floor((path[0, 0] + 180) / 360), 0]
    twice = np.vstack([path - [360, 0], path, path[:1] + np.array([360, 0])])
    whole = Polygon(np.vstack([twice, [twice[-1, 0], latitude], [twice[0, 0], latitude]]))
    if not whole.is_valid:
        return None
    polygon = shapely.intersection(whole, box(-180, -90, 180, 90))
    return orient(polygon) if isinstance(polygon, Polygon) else None


def _split(polygon: Polygon) -> Polygon | MultiPolygon:
    """Cut a polygon that starts in -180 to 180 at 180°, and move what is east of it."""
    if polygon.bounds[2] <= 180:
        return orient(polygon)
    pieces = []
    for shift in (0.0, 360.0):
        piece = shapely.intersection(polygon, box(shift - 180, -90, shift + 180, 90))
        for each in getattr(piece, "geoms", [piece]):
            if isinstance(each, Polygon) and each.area:
                pieces.append(orient(shapely.transform(each, lambda points, by=shift: points - [by, 0])))
    return pieces[0] if len(pieces) == 1 else MultiPolygon(pieces)
