"""Selection of STAC items by time and by place. No I/O."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from pipeline.geo.tiles import Bounds

OPEN = ("", "..")
RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d:\d\d(\.\d+)?([Zz]|[+-]\d\d:\d\d)")


def parse_time(text: str) -> datetime:
    """A time of RFC 3339, in UTC. Raises ValueError."""
    if not RFC_3339.fullmatch(text):
        raise ValueError(f"{text!r} is no time of RFC 3339, with seconds and a time zone")
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError as error:
        raise ValueError(f"{text!r} is outside of the years 1 to 9999 in UTC") from error


@dataclass(frozen=True, slots=True)
class TimeRange:
    """Times from `start` to `end`, both included. None: open."""

    start: datetime | None
    end: datetime | None

    @staticmethod
    def parse(text: str) -> "TimeRange":
        """A time, or START/END. Raises ValueError."""
        first, has_end, second = text.partition("/")
        start = None if first in OPEN and has_end else parse_time(first)
        end = (None if second in OPEN else parse_time(second)) if has_end else start
        if start is None and end is None:
            raise ValueError("both ends are open")
        if start and end and end < start:
            raise ValueError("it ends before it starts")
        return TimeRange(start, end)

    def touches(self, start: datetime, end: datetime) -> bool:
        """Whether a range of times has a time in common."""
        return (self.end is None or start <= self.end) and (self.start is None or end >= self.start)


def times_of(properties: Mapping[str, Any]) -> tuple[datetime, datetime] | None:
    """First and last time of an item; None without one. Raises ValueError."""
    if properties.get("datetime"):
        time = parse_time(str(properties["datetime"]))
        return time, time
    ends = [properties.get(name) for name in ("start_datetime", "end_datetime")]
    return (parse_time(str(ends[0])), parse_time(str(ends[1]))) if all(ends) else None


def touches(box: Bounds, geometry: Mapping[str, Any] | None, bbox: Sequence[float] | None) -> bool:
    """Whether an item has a point in a box: by its GeoJSON geometry, or else by its bbox. Raises ValueError."""
    import shapely
    import shapely.geometry

    if geometry:
        try:
            shape = shapely.geometry.shape(geometry)
            return any(shape.intersects(part) for part in _boxes(box))
        except (AttributeError, KeyError, TypeError, shapely.errors.ShapelyError) as error:
            raise ValueError(f"its geometry is not valid GeoJSON ({error})") from error
    if not bbox or len(bbox) not in (4, 6):
        return False
    half = len(bbox) // 2
    west, south, east, north = (float(bbox[place]) for place in (0, 1, half, half + 1))
    return any(one.intersects(other) for one in _boxes((west, south, east, north)) for other in _boxes(box))


def _boxes(box: Bounds) -> list[Any]:
    from shapely.geometry import box as rectangle

    west, south, east, north = box
    if west <= east:
        return [rectangle(west, south, east, north)]
    return [rectangle(west, south, 180, north), rectangle(-180, south, east, north)]
