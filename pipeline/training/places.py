"""Labels from a map: GeoJSON points and polygons with a class, and the footprints of windows and tiles.

A point labels the images whose footprints contain it, a polygon those whose centres lie in it; what lies on an edge
counts as inside. Needs the extra [geo].
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import InputRefused, OutputRefused, message_line
from pipeline.explore.table import Output
from pipeline.explore.target import need_geo
from pipeline.storage import access, uris

SUFFIX = ".geojson"
GEOMETRY = "geometry"
POINTS, POLYGONS = ("Point", "MultiPoint"), ("Polygon", "MultiPolygon")
LONGITUDE_LATITUDE = ("OGC:1.3:CRS84", "OGC::CRS84", "OGC:CRS84", "EPSG::4326", "EPSG:4326")
"""Ends of the names of a CRS in degrees. GeoJSON has longitude before latitude, also with EPSG:4326."""
WORLD = np.array([-180.0, -90.0, 180.0, 90.0])

Geometries = NDArray[np.object_]
Classes = tuple[str, ...]


@dataclass(frozen=True)
class Places:
    """The features of a file. geometries: of shapely, in degrees. names: for messages. classes: of each feature."""

    geometries: Geometries
    names: tuple[str, ...]
    classes: tuple[Classes, ...]


def is_map(uri: str) -> bool:
    """Whether a file of labels is GeoJSON, by its name."""
    return uris.redact(uri).lower().endswith(SUFFIX)


def read_places(uri: str, label_column: str, classes_of: Any) -> Places:
    """Read a GeoJSON file of points and polygons. Raises InputRefused for all else, and for coordinates not in degrees.

    label_column: the property with the class. classes_of: its value → classes.
    """
    need_geo("--labels with GeoJSON", "shapely")
    name = f"--labels {uris.redact(uri)}"
    try:
        content = json.loads(access.read(uris.normalize(uri)).decode("utf-8-sig"))
    except FileNotFoundError as error:
        raise InputRefused(f"{name} does not exist") from error
    except (OSError, ValueError, RecursionError) as error:
        raise InputRefused(f"{name} cannot be read: {message_line(error)}") from error
    features = content.get("features") if isinstance(content, dict) else None
    if not isinstance(features, list) or not features:
        raise InputRefused(f"{name} has no features: it must be a GeoJSON FeatureCollection of points or polygons")
    _check_crs(name, content.get("crs"))
    read = [_feature(name, number, feature, label_column) for number, feature in enumerate(features, start=1)]
    geometries = np.array([geometry for geometry, _ in read], object)
    _check_degrees(name, geometries)
    return Places(
        geometries,
        tuple(f"feature {number}" for number in range(1, len(read) + 1)),
        tuple(classes_of(value) for _, value in read),
    )


def match(output: Output, uri: str, places: Places) -> Iterator[tuple[int, str, Sequence[int]]]:
    """The rows of an output that features label: position, image_id, and the numbers of the features.

    Raises OutputRefused if the images have no footprints.
    """
    import shapely

    if output.parts and GEOMETRY not in output.columns:
        raise OutputRefused(
            f"--labels {uris.redact(uri)} labels places, but the images of {output.uri} have none: its columns are "
            f"{', '.join(output.columns)}; use windows of scenes or map tiles, or name images in a CSV file"
        )
    is_point = np.isin(shapely.get_type_id(places.geometries), (0, 4))
    numbers = np.flatnonzero(is_point), np.flatnonzero(~is_point)
    trees = [shapely.STRtree(places.geometries[chosen]) for chosen in numbers]
    first = 0
    for batch in output.batches(["image_id", GEOMETRY]):
        footprints = shapely.from_wkb(batch.column(1).to_numpy(zero_copy_only=False))
        found: dict[int, list[int]] = {}
        for tree, of_tree, shapes in zip(trees, numbers, (footprints, _centres(footprints)), strict=True):
            for row, place in tree.query(shapes, predicate="intersects").T.tolist():
                found.setdefault(row, []).append(int(of_tree[place]))
        for row in sorted(found):
            yield first + row, batch.column(0)[row].as_py(), sorted(found[row])
        first += len(batch)


def _centres(footprints: Geometries) -> Geometries:
    """The centres of footprints. One that is cut at the antimeridian is put together first."""
    import shapely

    whole = footprints.copy()
    west, _, east, _ = shapely.bounds(footprints).T
    cut = np.flatnonzero((shapely.get_type_id(footprints) == 6) & (east - west > 180))
    for row in cut:
        whole[row] = shapely.transform(footprints[row], lambda points: points + np.where(points < 0, 360, 0) * [1, 0])
    centres = shapely.centroid(whole)
    for row in cut:
        x, y = shapely.get_x(centres[row]), shapely.get_y(centres[row])
        centres[row] = shapely.Point((x + 180) % 360 - 180, y)
    return np.asarray(centres, object)


def _check_crs(name: str, crs: Any) -> None:
    """Refuse a CRS that is not longitude and latitude. Files of GeoJSON 2008 may name one."""
    if crs is None:
        return
    properties = crs.get("properties") if isinstance(crs, Mapping) else None
    text = str(properties.get("name", crs) if isinstance(properties, Mapping) else crs)
    if not text.upper().endswith(LONGITUDE_LATITUDE):
        raise InputRefused(
            f"{name} is in the CRS {text}: places must be in longitude and latitude; convert it with ogr2ogr "
            "-t_srs OGC:CRS84"
        )


def _feature(name: str, number: int, feature: Any, label_column: str) -> tuple[Any, Any]:
    """The geometry and the value of the class of one feature."""
    import shapely

    record: Mapping[str, Any] = feature if isinstance(feature, Mapping) else {}
    geometry, properties = record.get("geometry"), record.get("properties") or {}
    kind = geometry.get("type") if isinstance(geometry, Mapping) else geometry
    if kind not in (*POINTS, *POLYGONS):
        raise InputRefused(f"{name}: feature {number} has the geometry {kind}: it must be a point or a polygon")
    if not isinstance(properties, Mapping) or label_column not in properties:
        others = ", ".join(map(str, properties)) or "nothing"
        raise InputRefused(
            f"{name}: feature {number} has no {label_column!r}, only {others}; name the property with --label-column"
        )
    try:
        shape = shapely.force_2d(shapely.geometry.shape(geometry))
    except (shapely.errors.ShapelyError, TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        raise InputRefused(f"{name}: feature {number} is no valid {kind}: {message_line(error)}") from error
    if shape.is_empty:
        raise InputRefused(f"{name}: feature {number} is an empty {kind}: remove it")
    if not shape.is_valid:
        raise InputRefused(
            f"{name}: feature {number} is no valid {kind}: {shapely.is_valid_reason(shape)}; repair it, for example "
            "with ogr2ogr -makevalid"
        )
    return shape, properties[label_column]


def _check_degrees(name: str, geometries: Geometries) -> None:
    import shapely

    bounds = shapely.bounds(geometries)
    outside = ~((bounds[:, :2] >= WORLD[:2]) & (bounds[:, 2:] <= WORLD[2:])).all(axis=1)
    if outside.any():
        number = int(np.flatnonzero(outside)[0])
        shown = ", ".join(f"{value:g}" for value in bounds[number][:2])
        raise InputRefused(
            f"{name}: feature {number + 1} is at {shown}, which is not longitude and latitude in degrees; convert the "
            "file with ogr2ogr -t_srs OGC:CRS84"
        )
