"""Real files, embedded and classified: a Landsat scene, a scene of int16, an MBTiles and a PMTiles archive.

Their counts come from rasterio, SQLite and the reader of PMTiles itself. Broken copies of each lose nothing silently.
"""

import json
import math
import sqlite3
from collections import Counter
from pathlib import Path

import geopandas
import numpy as np
import pandas as pd
import pytest
import rasterio
import shapely
from pmtiles.reader import MmapSource, all_tiles
from rasterio.warp import transform_bounds
from whole import ROOT, TINY, Jobs

from pipeline.output.verify import verify

pytestmark = pytest.mark.long

SIDE = 224
FOLDER = ROOT.parent / "shared/data/satellite"
LANDSAT, INT16 = "landsat_rgb_utm18n.tif", "scene_int16_utm21n.tif"
MBTILES, PMTILES = "one_tile.mbtiles", "usgs_mt_whitney_z8-15_webp.pmtiles"
NAMES = (LANDSAT, INT16, MBTILES, PMTILES)
SUMMIT = shapely.Point(-118.2923, 36.5785)
"""Of Mount Whitney: https://www.usgs.gov/ngs"""
SCENES = ("--tile-size", SIDE, "--scale", "-1000:4000")


@pytest.fixture(scope="module")
def files() -> Path:
    if missing := [name for name in NAMES if not (FOLDER / name).exists()]:
        pytest.skip(f"{', '.join(missing)} is not in {FOLDER}")
    return FOLDER


def count(path: Path) -> int:
    """The images of a file, without Nightshift."""
    if path.suffix == ".tif":
        with rasterio.open(path) as file:
            return math.ceil(file.width / SIDE) * math.ceil(file.height / SIDE)
    if path.suffix == ".mbtiles":
        with sqlite3.connect(path) as database:
            return int(database.execute("SELECT count(*) FROM tiles").fetchone()[0])
    with path.open("rb") as file:
        return sum(1 for _ in all_tiles(MmapSource(file)))


def windows_without_data(path: Path, max_nodata: float = 0.9) -> int:
    """Windows of a scene of which a larger share has no data, or all of it; 0 for a tile archive."""
    if path.suffix != ".tif":
        return 0
    with rasterio.open(path) as file:
        mask = file.read_masks().any(axis=0)
    height, width = mask.shape
    parts = [mask[y : y + SIDE, x : x + SIDE] for y in range(0, height, SIDE) for x in range(0, width, SIDE)]
    return sum(1 - part.mean() > max_nodata or not part.any() for part in parts)


@pytest.fixture(scope="module")
def embedded(files: Path, ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("real") / "embeddings"
    jobs = Jobs(ray_cluster.environment)  # type: ignore[attr-defined]
    jobs.run("embed", "--input", *(files / name for name in NAMES), "--output", out, *TINY, *SCENES)
    return out


def file_of(source: str) -> str:
    return source.rpartition("/")[2]


def test_counts_are_those_of_the_files(embedded: Path, files: Path) -> None:
    rows = pd.read_parquet(embedded)
    empty = {name: windows_without_data(files / name) for name in NAMES}
    expected = {name: count(files / name) - empty[name] for name in NAMES}
    assert Counter(map(file_of, rows["source"])) == expected
    assert len(set(rows["image_id"])) == len(rows)
    report = json.loads((embedded / "_report.json").read_text())
    assert report["planned"] == sum(expected.values()) + sum(empty.values())
    assert (report["rows"], report["errors"], report["empty"]) == (len(rows), 0, sum(empty.values()))
    checked = verify(str(embedded))
    assert checked.is_whole, checked.problems
    vectors = np.stack(rows["embedding"])
    assert np.isfinite(vectors).all()
    assert len(np.unique(vectors, axis=0)) > 0.9 * len(rows)


def test_places_are_those_of_the_files(embedded: Path, files: Path) -> None:
    rows = pd.concat([geopandas.read_parquet(path) for path in (embedded / "results").iterdir()])
    assert rows.geometry.notna().all()
    tiles = rows[rows["source"].map(file_of) == PMTILES]
    assert (tiles["tile_z"].min(), tiles["tile_z"].max()) == (8, 15)
    for zoom, group in tiles.groupby("tile_z"):
        assert group.geometry.intersects(SUMMIT).sum() == 1, f"one tile of zoom {zoom} has the summit"
    middle = tiles[tiles["tile_z"] == 15].geometry.union_all().centroid
    assert (math.floor(middle.y * 10) / 10, math.ceil(middle.x * 10) / 10) == (36.5, -118.2)
    (corner,) = rows[(rows["source"].map(file_of) == MBTILES) & (rows["tile_z"] == 0)].geometry
    assert corner.bounds[0::2] == (-180, 180)
    for name in (LANDSAT, INT16):
        with rasterio.open(files / name) as file:
            west, south, east, north = transform_bounds(file.crs, "OGC:CRS84", *file.bounds, 21)
        of_scene = rows[rows["source"].map(file_of) == name].geometry.union_all().bounds
        assert west - 1e-3 <= of_scene[0]
        assert south - 1e-3 <= of_scene[1]
        assert of_scene[2] <= east + 1e-3
        assert of_scene[3] <= north + 1e-3


def test_the_same_images_are_classified(embedded: Path, files: Path, jobs: Jobs, tmp_path: Path) -> None:
    jobs.run("classify", "--input", *(files / name for name in NAMES), "--output", tmp_path / "out", *TINY, *SCENES)
    rows = pd.read_parquet(tmp_path / "out")
    assert set(rows["image_id"]) == set(pd.read_parquet(embedded)["image_id"])
    assert rows["label"].notna().all()
    assert rows["score"].between(0.2, 1).all(), "of five classes"
    checked = verify(str(tmp_path / "out"))
    assert checked.is_whole, checked.problems


def corrupt(data: bytes, name: str) -> bytes:
    """Overwrite what a reader can notice: numbers without compression have no wrong values."""
    start, stop = (4, 8) if name == LANDSAT else (len(data) // 3, 2 * len(data) // 3)
    return data[:start] + b"\xff" * (stop - start) + data[stop:]


def test_broken_copies_give_error_rows(files: Path, jobs: Jobs, tmp_path: Path) -> None:
    whole: dict[str, int] = {}
    empty: dict[str, int] = {}
    for name in NAMES:
        data = (files / name).read_bytes()
        for kind, broken in (("cut", data[: len(data) // 2]), ("corrupt", corrupt(data, name))):
            path = tmp_path / "in" / f"{kind}_{name}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(broken)
            whole[path.name] = count(files / name)
            empty[path.name] = windows_without_data(files / name, 1)
    out = tmp_path / "out"
    settings = (*TINY, *SCENES, "--max-error-rate", 1, "--max-nodata", 1)
    done = jobs.run("embed", "--input", tmp_path / "in", "--output", out, *settings)
    assert "Traceback" not in done.stderr + done.stdout
    errors = pd.read_parquet(out / "_errors")
    rows = Counter(map(file_of, pd.read_parquet(out)["source"]))
    failed = Counter(map(file_of, errors["source"]))
    assert set(failed) == set(whole), "each broken file has error rows"
    assert set(errors["error_type"]) <= {"corrupt", "truncated", "unreadable", "not_an_image", "unsupported"}
    assert errors["message"].str.len().gt(10).all()
    uncounted = {name for name in whole if (rows[name], failed[name]) == (0, 1)}
    missing = {name: images - rows[name] - failed[name] for name, images in whole.items() if name not in uncounted}
    assert all(0 <= missing[name] <= empty[name] for name in missing), "all but windows without data"
    assert {name.partition("_")[2] for name in uncounted} == {LANDSAT, MBTILES}, "headers at the end, and a database"
    checked = verify(str(out))
    assert checked.is_whole, checked.problems
    report = json.loads((out / "_report.json").read_text())
    assert report["planned"] == report["rows"] + report["errors"] + report["empty"]
    assert report["empty"] == sum(missing.values())
