"""Whole jobs over tile archives: rows, footprints, kills and repeated tiles."""

import os
import signal
import sqlite3
from pathlib import Path

import geopandas
import pandas as pd
import pytest
from whole import SLOW, TINY, Jobs, count_commits, embeddings, jpeg, same, wait_for

from pipeline.geo.tiles import bounds, flip
from pipeline.output.verify import verify

pytestmark = pytest.mark.slow

ZOOM = 9
SIDE = 8
PMTILES = Path(__file__).resolve().parents[3] / "shared/data/satellite/usgs_mt_whitney_z8-15_webp.pmtiles"


def write_mbtiles(path: Path, side: int = SIDE) -> Path:
    """A square of tiles near 11° W, 12° N. All on its western edge are one image, which is stored once."""
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE metadata (name TEXT, value TEXT)")
        database.execute("INSERT INTO metadata VALUES ('format', 'jpg')")
        database.execute("CREATE TABLE map (zoom_level INTEGER, tile_column INTEGER, tile_row INTEGER, tile_id TEXT)")
        database.execute("CREATE TABLE images (tile_id TEXT, tile_data BLOB)")
        for x in range(side):
            for y in range(side):
                name = "ocean" if x == 0 else f"{x}-{y}"
                database.execute("INSERT INTO map VALUES (?, ?, ?, ?)", (ZOOM, 240 + x, flip(ZOOM, 238 + y), name))
                if x or not y:
                    database.execute("INSERT INTO images VALUES (?, ?)", (name, jpeg(x * side + y)))
        database.execute(
            "CREATE VIEW tiles AS SELECT map.zoom_level, map.tile_column, map.tile_row, images.tile_data "
            "FROM map JOIN images ON images.tile_id = map.tile_id"
        )
    return path


def test_rows_have_the_places_of_their_tiles(jobs: Jobs, tmp_path: Path) -> None:
    archive = write_mbtiles(tmp_path / "a.mbtiles")
    jobs.run("embed", "--input", archive, "--output", tmp_path / "out", *TINY)
    verification = verify(str(tmp_path / "out"))
    assert verification.is_whole, list(verification.lines())
    frames = [geopandas.read_parquet(part) for part in (tmp_path / "out/results").iterdir()]
    rows = pd.concat(frames)
    assert len(rows) == SIDE * SIDE
    for row in rows.itertuples():
        assert row.image_id == f"{archive}#{row.tile_z}/{row.tile_x}/{row.tile_y}"
        assert row.geometry.bounds == bounds(row.tile_z, row.tile_x, row.tile_y)
    ocean = rows[rows["tile_x"] == 240]
    assert len(ocean) == SIDE
    assert len({vector.tobytes() for vector in ocean["embedding"]}) == 1
    assert len({vector.tobytes() for vector in rows["embedding"]}) > SIDE * (SIDE - 1) // 2


@pytest.mark.long
def test_a_killed_run_goes_on_to_the_same_rows(jobs: Jobs, tmp_path: Path) -> None:
    archive = write_mbtiles(tmp_path / "a.mbtiles", 12)
    jobs.run("embed", "--input", archive, "--output", tmp_path / "whole", *TINY)
    command = ("--input", archive, "--output", tmp_path / "out", *SLOW, "--rows-per-part", 8, "--batch-size", 4)
    for commits in (1, 3):
        process = jobs.start("embed", *command)
        wait_for(lambda commits=commits: count_commits(tmp_path / "out") >= commits)  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    jobs.run("embed", *command)
    verification = verify(str(tmp_path / "out"))
    assert verification.is_whole, list(verification.lines())
    assert verification.rows == 144
    assert same(embeddings(tmp_path / "out"), embeddings(tmp_path / "whole"))


def test_zoom_and_box_select_tiles(jobs: Jobs, tmp_path: Path) -> None:
    archive = write_mbtiles(tmp_path / "a.mbtiles")
    west, south, east, north = bounds(ZOOM, 241, 239)
    box = f"{west + 0.01},{south + 0.01},{east - 0.01},{north - 0.01}"
    jobs.run("embed", "--input", archive, "--output", tmp_path / "one", *TINY, f"--bbox={box}", "--zoom", ZOOM)
    rows = pd.read_parquet(tmp_path / "one")
    assert rows[["tile_z", "tile_x", "tile_y"]].to_numpy().tolist() == [[ZOOM, 241, 239]]
    done = jobs.run("embed", "--input", archive, "--output", tmp_path / "none", *TINY, "--zoom", 3, code=2)
    assert "contains no tiles of --zoom 3" in done.stderr


def test_tiles_of_mount_whitney_fall_on_it(jobs: Jobs, tmp_path: Path) -> None:
    if not PMTILES.exists():
        pytest.skip(f"{PMTILES.name} is not here")
    jobs.run("embed", "--input", PMTILES, "--output", tmp_path / "out", *TINY)
    rows = geopandas.read_parquet(next((tmp_path / "out/results").iterdir()))
    deepest = rows[rows["tile_z"] == rows["tile_z"].max()]
    centre = deepest.geometry.union_all().centroid
    assert (round(centre.y, 1), round(centre.x, 1)) == (36.6, -118.3)
