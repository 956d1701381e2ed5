"""Web map tiles: where they are, which a box overlaps, and PMTiles' ids."""

import numpy as np
import pytest
from pmtiles.tile import tileid_to_zxy, zxy_to_tileid

from pipeline.geo import tiles
from pipeline.geo.tiles import Rectangle, Selection


def test_bounds_of_known_tiles() -> None:
    assert tiles.bounds(0, 0, 0) == pytest.approx((-180, -85.0511287798, 180, 85.0511287798))
    assert tiles.bounds(1, 1, 0) == pytest.approx((0, 0, 180, 85.0511287798))
    west, south, east, north = tiles.bounds(14, *tiles.tile_at(-118.2923, 36.5785, 14))  # the summit of Mount Whitney
    assert west < -118.2923 < east
    assert south < 36.5785 < north


def test_the_tile_at_a_point_contains_it() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        longitude, latitude = generator.uniform(-180, 180), generator.uniform(-85, 85)
        z = int(generator.integers(0, 20))
        west, south, east, north = tiles.bounds(z, *tiles.tile_at(longitude, latitude, z))
        assert west <= longitude <= east
        assert south - 1e-9 <= latitude <= north + 1e-9
    assert tiles.tile_at(180, 90, 3) == (7, 0)
    assert tiles.tile_at(-180, -90, 3) == (0, 7)


def test_tms_counts_from_the_south() -> None:
    assert [tiles.flip(2, y) for y in range(4)] == [3, 2, 1, 0]


def test_a_box_of_exactly_one_tile_is_that_tile() -> None:
    for z, x, y in [(3, 1, 2), (14, 2806, 6405), (20, 1, 1), (1, 0, 1)]:
        assert tiles.rectangles(tiles.bounds(z, x, y), z) == [Rectangle(x, y, x, y)]


@pytest.mark.parametrize(
    ("box", "z", "expected"),
    [
        ((-10.0, -10.0, 10.0, 10.0), 1, [Rectangle(0, 0, 1, 1)]),
        ((-180.0, -90.0, 180.0, 90.0), 2, [Rectangle(0, 0, 3, 3)]),
        ((1.0, 1.0, 1.001, 1.001), 1, [Rectangle(1, 0, 1, 0)]),
        ((170.0, -10.0, -170.0, 10.0), 3, [Rectangle(0, 3, 0, 4), Rectangle(7, 3, 7, 4)]),
        ((10.0, -10.0, -10.0, 10.0), 0, [Rectangle(0, 0, 0, 0)]),
        ((10.0, 1.0, -10.0, 2.0), 1, [Rectangle(0, 0, 0, 0), Rectangle(1, 0, 1, 0)]),
        ((0.0, 84.0, 10.0, 89.0), 3, [Rectangle(4, 0, 4, 0)]),
        ((0.0, 86.0, 10.0, 89.0), 3, []),
        ((170.0, -90.0, -170.0, -85.06), 3, []),
    ],
)
def test_tiles_of_a_box(box: tiles.Bounds, z: int, expected: list[Rectangle]) -> None:
    assert tiles.rectangles(box, z) == expected


def test_a_selection_of_zooms_and_a_box() -> None:
    selection = Selection(2, 3, (0.0, 0.0, 90.0, 45.0))
    assert not selection.is_all
    assert Selection().is_all
    assert selection.contains(2, 2, 1)
    assert not selection.contains(2, 1, 1)
    assert not selection.contains(2, 2, 2)
    assert not selection.contains(4, 8, 7)


@pytest.mark.parametrize("z", [0, 1, 2, 3, 7, 14, 26])
def test_tile_ids_are_those_of_the_package(z: int) -> None:
    generator = np.random.default_rng(z)
    x, y = generator.integers(0, 1 << z, (2, 300))
    ids = tiles.tile_ids(z, x, y)
    assert ids.tolist() == [zxy_to_tileid(z, int(a), int(b)) for a, b in zip(x, y, strict=True)]
    assert [tuple(map(int, each)) for each in zip(*tiles.tiles_of_ids(ids), strict=True)] == [
        tileid_to_zxy(int(each)) for each in ids
    ]


def test_ids_of_several_zooms_at_once() -> None:
    ids = np.arange(2000)
    assert [tuple(map(int, each)) for each in zip(*tiles.tiles_of_ids(ids), strict=True)] == [
        tileid_to_zxy(number) for number in range(2000)
    ]
    assert [len(each) for each in tiles.tiles_of_ids([])] == [0, 0, 0]


@pytest.mark.parametrize(
    "selection",
    [
        Selection(),
        Selection(3, 5),
        Selection(2, 6, (-118.5, 36.4, 11.0, 40.0)),
        Selection(5, 6, (100.0, -50.0, -100.0, 60.0)),
        Selection(6, 6, (0.1, 0.1, 0.2, 0.2)),
        Selection(9, 12),
    ],
)
def test_ranges_of_ids_are_exactly_the_selected_tiles(selection: Selection) -> None:
    ids = np.arange(1, tiles.first_id(7))
    selected = {number for number in ids.tolist() if selection.contains(*tileid_to_zxy(number))}
    for each in (ids, ids[::7]):
        ranges = tiles.id_ranges(selection, each, each + 1)
        found = {number for start, stop in ranges.tolist() for number in range(start, stop)}
        assert found & set(each.tolist()) == selected & set(each.tolist())
        assert (ranges[1:, 0] > ranges[:-1, 1]).all(), "disjoint and not adjacent"
    whole = tiles.id_ranges(selection, ids[:1], ids[-1:] + 1)
    assert {number for start, stop in whole.tolist() for number in range(start, stop)} & set(ids.tolist()) == selected


@pytest.mark.parametrize("selection", [Selection(2, 6, (-118.5, 36.4, 11.0, 40.0)), Selection(6, 6, (0.1, 0.1, 1, 1))])
def test_ranges_that_say_which_intervals_are_selected(selection: Selection) -> None:
    cuts = np.unique(np.random.default_rng(0).integers(0, tiles.first_id(7), 60))
    starts, stops = cuts, np.append(cuts[1:], tiles.first_id(30))
    ranges = tiles.id_ranges(selection, starts, stops, is_exact=False)
    found = [bool(((ranges[:, 0] < stop) & (ranges[:, 1] > start)).any()) for start, stop in zip(starts, stops)]  # noqa: B905
    assert found[:-1] == [
        any(selection.contains(*tileid_to_zxy(number)) for number in range(start, stop))
        for start, stop in zip(starts[:-1].tolist(), stops[:-1].tolist(), strict=True)
    ]
    assert len(ranges) < 300


def test_a_large_box_has_few_ranges() -> None:
    first, last = np.array([tiles.first_id(14)]), np.array([tiles.first_id(15)])
    ranges = tiles.id_ranges(Selection(14, 14, (5.0, 45.0, 11.0, 48.0)), first, last)
    (rectangle,) = tiles.rectangles((5.0, 45.0, 11.0, 48.0), 14)
    width, height = rectangle.east - rectangle.west + 1, rectangle.south - rectangle.north + 1
    assert int((ranges[:, 1] - ranges[:, 0]).sum()) == width * height
    assert len(ranges) < 2 * (width + height)


@pytest.mark.parametrize("tile", [(0, 0, 0), (14, 2807, 6401), (3, 7, 7)])
def test_a_footprint_is_a_counterclockwise_box_of_the_bounds(tile: tuple[int, int, int]) -> None:
    shapely = pytest.importorskip("shapely")
    columns = tiles.footprint(*tile)
    polygon = shapely.from_wkb(columns["geometry"])
    assert polygon.bounds == tiles.bounds(*tile) == tuple(columns["bbox"].values())
    assert polygon.exterior.is_ccw
    assert polygon.equals(shapely.box(*tiles.bounds(*tile)))
