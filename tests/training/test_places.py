"""Labels from a map: points and polygons find the windows of a real scene by their footprints."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio.transform
import rasterio.warp
import scenes
import shapely
from affine import Affine
from outputs import write_output as write_vectors
from scene_outputs import VECTORS, write_output

from pipeline.errors import InputRefused, OutputRefused
from pipeline.explore.table import Output, open_output
from pipeline.training.job import unknown_text
from pipeline.training.labels import Labels, find

SIDE, WINDOW = 256, 64
"""A scene of 4 × 4 windows."""


def windows(folder: Path, transform: Affine = scenes.UTM, crs: str = "EPSG:32618") -> Output:
    path = scenes.write(folder / "scene.tif", scenes.numbers(3, SIDE, SIDE), transform, crs)
    write_output(folder / "out", [path], scenes.tiling(WINDOW), lambda place: {"embedding": [1.0, 0, 0, 0]}, VECTORS, 5)
    return open_output(str(folder / "out"))


def at(column: float, row: float, transform: Affine = scenes.UTM, crs: str = "EPSG:32618") -> list[float]:
    """Longitude and latitude of a pixel."""
    x, y = rasterio.transform.xy(transform, row, column, offset="ul")
    longitude, latitude = rasterio.warp.transform(crs, "OGC:CRS84", [x], [y])
    return [longitude[0], latitude[0]]


def ring(left: float, top: float, right: float, bottom: float) -> list[list[list[float]]]:
    return [[at(*corner) for corner in ((left, top), (left, bottom), (right, bottom), (right, top), (left, top))]]


def feature(kind: str, coordinates: Any, value: Any = "forest", name: str = "label") -> dict[str, Any]:
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {name: value}}


def geojson(folder: Path, *features: Any, **more: Any) -> str:
    path = folder / "labels.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **more}))
    return str(path)


def places(found: Labels) -> dict[str, str]:
    """Window → class."""
    return {
        image_id.rpartition("#")[2]: classes[0]
        for image_id, classes in zip(found.image_ids, found.classes, strict=True)
    }


def test_a_point_labels_the_window_that_contains_it(tmp_path: Path) -> None:
    output = windows(tmp_path)
    several = feature("MultiPoint", [at(200, 200), at(100, 30)], "water")
    found = find(output, geojson(tmp_path, feature("Point", [*at(10, 10), 500.0]), several))
    assert places(found) == {"0,0": "forest", "192,192": "water", "64,0": "water"}
    ids = [value for batch in output.batches(["image_id"]) for value in batch.column(0).to_pylist()]
    assert tuple(ids[row] for row in found.rows) == found.image_ids
    assert list(found.rows) == sorted(found.rows)


def test_a_polygon_labels_the_windows_whose_centres_lie_in_it(tmp_path: Path) -> None:
    """The polygon covers a corner of windows of the third column, but not their centres."""
    two = [ring(130, 130, 150, 150), ring(190, 190, 230, 230)]
    labels = geojson(tmp_path, feature("Polygon", ring(0, 0, 150, 70)), feature("MultiPolygon", two, "water"))
    assert places(find(windows(tmp_path), labels)) == {"0,0": "forest", "64,0": "forest", "192,192": "water"}


def test_several_classes_in_one_window_are_listed_and_not_taken(tmp_path: Path) -> None:
    output = windows(tmp_path)
    labels = geojson(
        tmp_path,
        feature("Polygon", ring(0, 0, 128, 128)),
        feature("Point", at(70, 5), "water"),
        feature("Point", at(5, 5), "forest"),
        feature("Point", [0.0, 0.0], "elsewhere"),
        feature("Point", at(250, 250), 7),
    )
    found = find(output, labels)
    assert places(found) == {"0,0": "forest", "0,64": "forest", "64,64": "forest", "192,192": "7"}
    assert [each.rpartition("#")[2] for each in found.ambiguous] == ["64,0"]
    assert found.unknown == ("feature 4",)
    text = unknown_text(found)
    assert "1 name of the labels is not among the rows of the output: feature 4." in text
    assert "1 image in places of several classes left out: " in text
    both = find(output, labels, multi_label=True)
    assert ("forest", "water") in both.classes
    assert not both.ambiguous


def test_the_property_and_the_order_of_coordinates_of_old_files(tmp_path: Path) -> None:
    crs = {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::4326"}}
    labels = geojson(tmp_path, feature("Point", at(10, 10), "urban", "kind"), crs=crs)
    assert places(find(windows(tmp_path), labels, label_column="kind")) == {"0,0": "urban"}


def test_windows_across_the_antimeridian_have_their_centre_there(tmp_path: Path) -> None:
    transform = Affine(0.001, 0, 179.9, 0, -0.001, 10)
    output = windows(tmp_path, transform, "EPSG:4326")
    cut = [
        batch.column(0)[row].as_py()
        for batch in output.batches(["image_id", "geometry"])
        for row, shape in enumerate(shapely.from_wkb(batch.column(1).to_numpy(zero_copy_only=False)))
        if shape.geom_type == "MultiPolygon"
    ]
    assert len(cut) == 4
    box = shapely.box(179.92, 9.7, 179.97, 10)
    labels = geojson(tmp_path, feature("Polygon", shapely.geometry.mapping(box)["coordinates"]))
    assert set(places(find(output, labels))) == {f"0,{row}" for row in (0, 64, 128, 192)}
    box = shapely.box(179.991, 9.7, 180, 10)
    labels = geojson(tmp_path, feature("Polygon", shapely.geometry.mapping(box)["coordinates"]))
    assert set(find(output, labels).image_ids) == set(cut)


BOWTIE = [[[0, 0], [1, 1], [1, 0], [0, 1], [0, 0]]]


@pytest.mark.parametrize(
    ("features", "more", "message"),
    [
        ([], {}, "has no features: it must be a GeoJSON FeatureCollection"),
        (["x"], {}, "feature 1 has the geometry None: it must be a point or a polygon"),
        ([feature("LineString", [[0, 0], [1, 1]])], {}, "feature 1 has the geometry LineString"),
        ([feature("Point", [0, 0], name="kind")], {}, "feature 1 has no 'label', only kind; .* with --label-column"),
        ([feature("Point", [500_000, 4_500_000])], {}, "feature 1 is at 500000, 4.5e\\+06, which is not longitude"),
        ([feature("Point", ["a", "b"])], {}, "feature 1 is no valid Point"),
        ([feature("Point", [])], {}, "feature 1 is an empty Point"),
        ([feature("Point", [float("nan"), 1.0])], {}, "feature 1 is"),
        ([feature("Polygon", BOWTIE)], {}, "feature 1 is no valid Polygon: Self-intersection.*-makevalid"),
        ([feature("Polygon", [[[0, 0], [1, 1]]])], {}, "feature 1 is no valid Polygon"),
        (
            [feature("Point", [0, 0])],
            {"crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::32633"}}},
            "is in the CRS urn:ogc:def:crs:EPSG::32633: places must be in longitude and latitude; .* ogr2ogr",
        ),
        ([feature("Point", [0, 0])], {"crs": "EPSG:3857"}, "is in the CRS EPSG:3857"),
        ([feature("Point", [0, 0])], {"crs": {"type": "link", "properties": {"href": "x"}}}, "is in the CRS"),
        ([feature("Point", [0, 0])], {}, "labels no image of .*: all images are elsewhere"),
    ],
)
def test_what_is_no_map_of_labels_is_refused(
    tmp_path: Path, features: list[Any], more: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputRefused, match=rf"--labels .*labels.geojson:? {message}"):
        find(windows(tmp_path), geojson(tmp_path, *features, **more))


def test_images_without_a_place_are_refused(tmp_path: Path) -> None:
    output = open_output(str(write_vectors(tmp_path / "out", ["/a.jpg"], np.zeros((1, 3), np.float32))))
    with pytest.raises(OutputRefused, match=r"labels places, but the images of .* have none: its columns are image_id"):
        find(output, geojson(tmp_path, feature("Point", [0, 0])))
    other = tmp_path / "labels.json"
    Path(geojson(tmp_path, feature("Point", [0, 0]))).rename(other)
    with pytest.raises(InputRefused, match=r"it is GeoJSON: rename it to end in .geojson"):
        find(output, str(other))
