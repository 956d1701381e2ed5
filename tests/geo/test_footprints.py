"""Footprints against rasterio's own transforms of bounds, and against PROJ point by point."""

import numpy as np
import pytest
import shapely
from pyproj import Transformer
from rasterio.warp import transform_bounds
from shapely.geometry import MultiPolygon, Point, Polygon

from pipeline.errors import ReadError
from pipeline.geo.footprints import Affine, Window, crs_name, footprint, pixel_metres, window_transform

UTM: Affine = (10.0, 0.0, 500_000.0, 0.0, -10.0, 4_500_000.0)
POLAR: Affine = (1000.0, 0.0, -4_000_000.0, 0.0, -1000.0, 4_000_000.0)


def of(transform: Affine, crs: str, *window: int) -> Polygon | MultiPolygon:
    polygon = footprint(transform, crs, Window(*window))
    assert polygon is not None
    assert polygon.is_valid
    west, south, east, north = polygon.bounds
    assert -180 <= west <= east <= 180
    assert -90 <= south <= north <= 90
    assert all(shapely.is_ccw(part.exterior) for part in getattr(polygon, "geoms", [polygon]))
    return polygon


def corner(transform: Affine, column: float, row: float) -> tuple[float, float]:
    a, b, c, d, e, f = transform
    return a * column + b * row + c, d * column + e * row + f


def assert_holds_its_pixels(polygon: Polygon | MultiPolygon, transform: Affine, crs: str, window: Window) -> None:
    """Points inside the window are inside the polygon, and points just outside are not."""
    to_map = Transformer.from_crs(crs, "OGC:CRS84", always_xy=True)
    shares = np.linspace(0, 1, 9)
    for x, y in [(x, y) for x in shares for y in shares]:
        for margin, is_in in ((0.5, True), (-0.5, False)):
            if not is_in and 0 < x < 1 and 0 < y < 1:
                continue
            column = window.column + margin + x * (window.width - 2 * margin)
            row = window.row + margin + y * (window.height - 2 * margin)
            longitude, latitude = to_map.transform(*corner(transform, column, row))
            assert polygon.covers(Point((longitude + 180) % 360 - 180, latitude)) == is_in, (column, row)


@pytest.mark.parametrize(
    ("crs", "transform", "window"),
    [
        ("EPSG:32618", UTM, (100, 200, 224, 224)),
        ("EPSG:32618", UTM, (0, 0, 300, 50)),  # not square
        ("EPSG:32618", (10.0, 0.0, 500_000.0, 0.0, 10.0, 4_500_000.0), (100, 200, 224, 224)),  # south-up
        ("EPSG:32618", (7.0, 7.0, 500_000.0, 7.0, -7.0, 4_500_000.0), (100, 200, 224, 112)),  # rotated
        ("EPSG:32618", (10.0, 3.0, 500_000.0, 0.0, -10.0, 4_500_000.0), (100, 200, 224, 224)),  # sheared
        ("EPSG:32618", (-10.0, 0.0, 500_000.0, 0.0, -10.0, 4_500_000.0), (100, 200, 224, 224)),  # from east to west
        ("EPSG:32733", (30.0, 0.0, 200_000.0, 0.0, -30.0, 8_000_000.0), (1000, 1000, 512, 512)),
        ("EPSG:3857", (100.0, 0.0, 1e6, 0.0, -100.0, 6e6), (0, 0, 5000, 5000)),
        ("EPSG:4326", (0.01, 0.0, 10.0, 0.0, -0.01, 50.0), (10, 20, 224, 224)),
        ("EPSG:4326", (0.01, 0.0, 10.0, 0.0, 0.01, 40.0), (10, 20, 224, 224)),  # latitudes from the south
        ("EPSG:4326", (0.006, 0.002, 10.0, 0.002, -0.006, 50.0), (10, 20, 224, 224)),
        ("EPSG:3035", (1000.0, 0.0, 2_500_000.0, 0.0, -1000.0, 5_500_000.0), (0, 0, 2000, 1500)),
        ("EPSG:3413", POLAR, (1000, 1000, 500, 500)),
        ("EPSG:2263", (100.0, 0.0, 900_000.0, 0.0, -100.0, 300_000.0), (0, 0, 500, 500)),  # feet
        ("EPSG:2193", (100.0, 0.0, 1_600_000.0, 0.0, -100.0, 5_500_000.0), (0, 0, 500, 500)),  # northing first in EPSG
        ("EPSG:32601", (100.0, 0.0, 200_000.0, 0.0, -100.0, 7_000_000.0), (0, 0, 3000, 300)),  # 180° is inside
        ("EPSG:3832", (1000.0, 0.0, 3_000_000.0, 0.0, -1000.0, 0.0), (0, 0, 1000, 1000)),  # Pacific
        ("EPSG:3413", POLAR, (3990, 3990, 224, 224)),  # the North Pole is inside
        ("EPSG:3031", POLAR, (3800, 3950, 224, 224)),  # the South Pole is inside
    ],
)
def test_a_footprint_holds_the_pixels_of_its_window(crs: str, transform: Affine, window: tuple[int, ...]) -> None:
    assert_holds_its_pixels(of(transform, crs, *window), transform, crs, Window(*window))


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32618", UTM),
        ("EPSG:3857", (100.0, 0.0, 1e6, 0.0, -100.0, 6e6)),
        ("EPSG:3035", (1000.0, 0.0, 4_000_000.0, 0.0, -1000.0, 5_000_000.0)),
        ("EPSG:4326", (0.01, 0.0, 10.0, 0.0, -0.01, 50.0)),
    ],
)
def test_the_bounds_are_those_of_rasterio(crs: str, transform: Affine) -> None:
    left, top = corner(transform, 100, 200)
    right, bottom = corner(transform, 324, 424)
    expected = transform_bounds(crs, "OGC:CRS84", left, bottom, right, top, densify_pts=101)
    metre = 1e-5  # in degrees; the allowed error is a tenth of a pixel
    assert of(transform, crs, 100, 200, 224, 224).bounds == pytest.approx(expected, abs=0.1 * metre * 1000)


def test_long_sides_get_as_many_points_as_they_need() -> None:
    small, large = of(UTM, "EPSG:32618", 0, 0, 224, 224), of(POLAR, "EPSG:3413", 4100, 0, 3000, 3000)
    assert len(small.exterior.coords) == 17
    assert len(large.exterior.coords) > 100
    assert len(of((0.01, 0, 10, 0, -0.01, 50), "EPSG:4326", 0, 0, 224, 224).exterior.coords) == 5


def test_a_window_across_the_antimeridian_is_two_polygons() -> None:
    polygon = of((0.1, 0.0, 179.0, 0.0, -0.1, 10.0), "EPSG:4326", 0, 0, 20, 20)
    assert [part.bounds for part in polygon.geoms] == [(179.0, 8.0, 180.0, 10.0), (-180.0, 8.0, -179.0, 10.0)]
    pacific = of((100.0, 0.0, 200_000.0, 0.0, -100.0, 7_000_000.0), "EPSG:32601", 0, 0, 3000, 300)
    west, east = sorted(pacific.geoms, key=lambda part: part.bounds)
    assert (west.bounds[0], east.bounds[2]) == (-180, 180)
    assert (west.bounds[2], east.bounds[0]) == (pytest.approx(-177.1, abs=0.5), pytest.approx(177.1, abs=0.5))


@pytest.mark.parametrize(("west", "expected"), [(178.0, (178.0, 180.0)), (180.0, (-180.0, -178.0))])
def test_a_window_that_touches_the_antimeridian_is_one_polygon(west: float, expected: tuple[float, float]) -> None:
    polygon = of((0.1, 0.0, west, 0.0, -0.1, 10.0), "EPSG:4326", 0, 0, 20, 20)
    assert (polygon.geom_type, polygon.bounds[0], polygon.bounds[2]) == ("Polygon", *expected)


def test_web_mercator_goes_on_behind_the_antimeridian() -> None:
    polygon = of((1000.0, 0.0, 20_000_000.0, 0.0, -1000.0, 0.0), "EPSG:3857", 0, 0, 100, 100)
    assert polygon.geom_type == "MultiPolygon"
    assert sum(part.bounds[2] - part.bounds[0] for part in polygon.geoms) == pytest.approx(100_000 / 111_319.49, 1e-6)


def test_longitudes_from_0_to_360() -> None:
    transform = (0.25, 0.0, 0.0, 0.0, -0.25, 90.0)
    assert of(transform, "EPSG:4326", 1000, 100, 200, 100).bounds == (-110.0, 40.0, -60.0, 65.0)
    assert of(transform, "EPSG:4326", 0, 0, 1440, 720).bounds == (-180.0, -90.0, 180.0, 90.0)
    assert of(transform, "EPSG:4326", 0, 0, 1440, 720).area == 360 * 180


def test_a_grid_of_points_around_the_world() -> None:
    """Its pixels are half of one beyond ±180° and the poles."""
    assert of((0.25, 0.0, -180.125, 0.0, -0.25, 90.125), "EPSG:4326", 0, 0, 1441, 721).area == 360 * 180


@pytest.mark.parametrize(("crs", "latitude"), [("EPSG:3413", 90.0), ("EPSG:3031", -90.0)])
def test_poles(crs: str, latitude: float) -> None:
    inside = of(POLAR, crs, 3888, 3888, 224, 224)
    assert (inside.bounds[0], inside.bounds[2]) == (-180, 180)
    assert latitude in (inside.bounds[1], inside.bounds[3])
    quarters = [of(POLAR, crs, column, row, 224, 224) for column in (3776, 4000) for row in (3776, 4000)]
    assert sum(each.area for each in quarters) == pytest.approx(of(POLAR, crs, 3776, 3776, 448, 448).area, rel=1e-3)
    assert all(latitude in (each.bounds[1], each.bounds[3]) for each in quarters)
    for one, other in [(a, b) for a in quarters for b in quarters if a is not b]:
        assert one.intersection(other).area < 0.01
    half = of(POLAR, crs, 3776, 4000, 448, 224)  # the pole is in the middle of a side
    assert latitude in (half.bounds[1], half.bounds[3])
    assert half.area == pytest.approx(of(POLAR, crs, 3776, 3776, 448, 448).area / 2, rel=1e-2)


def test_neighbours_share_their_side() -> None:
    left, right = of(UTM, "EPSG:32618", 0, 0, 224, 224), of(UTM, "EPSG:32618", 224, 0, 224, 224)
    assert left.intersection(right).area < 1e-9 * left.area


@pytest.mark.parametrize(
    ("crs", "transform", "window"),
    [
        ("ESRI:54008", (1000.0, 0.0, -20_015_000.0, 0.0, -1000.0, 10_007_000.0), (0, 0, 200, 200)),  # sinusoidal
        ("EPSG:4326", (0.1, 0.0, 0.0, 0.0, -0.1, 95.0), (0, 0, 100, 100)),  # latitudes above 90
        (
            "+proj=geos +h=35786023 +lon_0=-75 +sweep=x",
            (2000.0, 0.0, -5_400_000.0, 0.0, -2000.0, 5_400_000.0),
            (0, 0, 224, 224),
        ),  # the sky beside the Earth
    ],
)
def test_a_window_outside_of_the_world_has_no_footprint(crs: str, transform: Affine, window: tuple[int, ...]) -> None:
    assert footprint(transform, crs, Window(*window)) is None


@pytest.mark.parametrize(
    ("crs", "name"),
    [
        ("IAU_2015:49900", "Mars (2015)"),
        ("IAU_2015:30100", "Moon (2015)"),
        ("+proj=stere +lat_0=90 +R=1560800", "unknown"),  # Europa
        ('LOCAL_CS["site",UNIT["metre",1]]', "site"),
        ("nonsense", "nonsense"),
        ("EPSG:2053", "Lo29"),  # counts to the west
    ],
)
def test_a_crs_of_another_body_is_refused_by_name(crs: str, name: str) -> None:
    with pytest.raises(ReadError, match="its CRS") as caught:
        footprint(UTM, crs, Window(0, 0, 10, 10))
    assert name in caught.value.message


def test_names_of_crs() -> None:
    assert crs_name("EPSG:32618") == "EPSG:32618"
    assert crs_name(Transformer.from_crs("EPSG:32618", "EPSG:4326").source_crs.to_wkt()) == "EPSG:32618"  # type: ignore[union-attr]
    custom = crs_name("+proj=laea +lat_0=52 +lon_0=11")
    assert custom.startswith("{")
    assert crs_name(custom) == custom


def test_transform_of_a_window() -> None:
    assert window_transform((7.0, 7.0, 100.0, 7.0, -7.0, 200.0), Window(2, 3, 5, 5)) == (
        7.0,
        7.0,
        135.0,
        7.0,
        -7.0,
        193.0,
    )


def test_pixel_metres() -> None:
    assert pixel_metres(UTM, "EPSG:32618", 100, 100) == (10, 10)
    assert pixel_metres((6.0, 8.0, 0.0, 8.0, -6.0, 0.0), "EPSG:32618", 100, 100) == (10, 10)
    assert pixel_metres((100.0, 0.0, 9e5, 0.0, -100.0, 3e5), "EPSG:2263", 9, 9) == pytest.approx((30.48, 30.48), 1e-4)
    across, down = pixel_metres((0.001, 0.0, 10.0, 0.0, -0.001, 60.05), "EPSG:4326", 100, 100)
    assert (across, down) == (pytest.approx(55.8, abs=0.1), pytest.approx(111.4, abs=0.1))
