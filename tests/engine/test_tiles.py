"""Whole runs over tile archives: one row per place, also after kills, updates and cut files."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tile_archives import Tile, square, tile_image, write_mbtiles, write_pmtiles
from whole import SLOW, TINY, Jobs, count_commits, embeddings, same, wait_for

from pipeline.output.commit import Commit
from pipeline.output.verify import verify
from pipeline.planning import plan as plans

OCEAN = tile_image(10**6)


def sea_and_land(count: int) -> dict[Tile, bytes]:
    return {tile: OCEAN if tile[1] % 2 else data for tile, data in square(5, count).items()}


def write(path: Path, tiles: dict[Tile, bytes]) -> Path:
    return write_mbtiles(path, tiles, "map") if path.suffix == ".mbtiles" else write_pmtiles(path, tiles, leaf_size=16)


def whole_report(output: Path) -> dict[str, int]:
    checked = verify(str(output))
    assert checked.is_whole, checked.problems
    report = json.loads((output / "_report.json").read_text())
    return {name: report[name] for name in ("planned", "rows", "errors", "resumed_images")}


def read_since(output: Path, shards: int) -> tuple[int, int]:
    """Images of all shards but the first ones that workers read, and their bytes."""
    commits = [Commit.from_json(path.read_bytes()) for path in output.glob("_commits/part-*.json")]
    new = [commit for commit in commits if min(commit.ranges, default=-1) >= shards]
    return sum(commit.rows + commit.errors for commit in new), sum(commit.bytes_read for commit in new)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".mbtiles", ".pmtiles"])
def test_one_row_per_place_and_an_update_of_what_changed(jobs: Jobs, tmp_path: Path, suffix: str) -> None:
    tiles = sea_and_land(200)
    path, out = tmp_path / f"a{suffix}", tmp_path / "out"
    write(path, tiles)
    settings = ("--input", path, *TINY, "--batch-size", 16, "--max-error-rate", 0.5)
    jobs.run("embed", *settings, "--output", out)
    assert whole_report(out) == {"planned": 200, "rows": 200, "errors": 0, "resumed_images": 0}
    table = pd.read_parquet(out).set_index(["tile_z", "tile_x", "tile_y"])
    assert set(table.index) == set(tiles)
    assert table.loc[(5, 1, 0), "image_id"] == f"{path}#5/1/0"
    assert table["tile_hash"].nunique() == len(set(tiles.values()))
    sea = np.stack(table[[tile[1] % 2 == 1 for tile in table.index]]["embedding"])
    assert (sea == sea[0]).all()
    assert json.loads((out / "_report.json").read_text())["bytes_read"] == sum(map(len, set(tiles.values())))

    changed = {**tiles, (5, 0, 3): tile_image(7000), (5, 31, 31): tile_image(7001), (5, 0, 4): b"broken now"}
    del changed[5, 2, 2]
    write(path, changed)
    planned = plans.load(str(out))
    assert planned is not None
    jobs.run("embed", *settings, "--output", out, "--update")
    assert whole_report(out) == {"planned": 200, "rows": 199, "errors": 1, "resumed_images": 197}
    new = [data for tile, data in changed.items() if tiles.get(tile) != data]
    assert read_since(out, planned.shards) == (3, sum(map(len, new))), "1 % of the tiles, and no other"
    jobs.run("embed", *settings, "--output", tmp_path / "new")
    assert same(embeddings(out), embeddings(tmp_path / "new"))
    done = jobs.run("embed", *settings, "--output", out, "--update")
    assert "1 images or shards are unchanged" in done.stdout

    write(path, {**changed, (5, 0, 4): tile_image(7002)})
    jobs.run("embed", *settings, "--output", out, "--update")
    assert whole_report(out) == {"planned": 200, "rows": 200, "errors": 0, "resumed_images": 199}
    path.touch()
    jobs.run("embed", *settings, "--output", out, "--update")
    assert whole_report(out)["resumed_images"] == 200
    done = jobs.run("embed", *settings, "--output", out, "--update")
    assert "1 images or shards are unchanged" in done.stdout


@pytest.mark.slow
def test_a_killed_run_resumes_within_the_places_of_a_tile(jobs: Jobs, tmp_path: Path) -> None:
    tiles = sea_and_land(400)
    path, out = write(tmp_path / "a.pmtiles", tiles), tmp_path / "out"
    settings = ("--input", path, *SLOW, "--batch-size", 4, "--rows-per-part", 8)
    process = jobs.start("embed", *settings, "--output", out)
    wait_for(lambda: count_commits(out) >= 2)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    jobs.run("embed", *settings, "--output", out)
    report = whole_report(out)
    assert (report["planned"], report["rows"]) == (400, 400)
    assert report["resumed_images"] > 0
    jobs.run("embed", *settings, "--output", tmp_path / "new")
    assert same(embeddings(out), embeddings(tmp_path / "new"))


@pytest.mark.slow
def test_a_folder_of_tiles_and_a_selection(jobs: Jobs, tmp_path: Path) -> None:
    for (z, x, y), data in {**square(3, 64), **square(4, 60, 100)}.items():
        tile = tmp_path / f"tiles/{z}/{x}/{y}.png"
        tile.parent.mkdir(parents=True, exist_ok=True)
        tile.write_bytes(data)
    out = tmp_path / "out"
    settings = ("--input", tmp_path / "tiles/{z}/{x}/{y}.png", *TINY, "--output", out)
    jobs.run("embed", *settings, "--zoom", "3", "--bbox", "-100,0,20,80")
    table = pd.read_parquet(out)
    assert set(table["tile_z"]) == {3}
    assert set(table["tile_x"]) == {1, 2, 3, 4}
    assert set(table["tile_y"]) == {0, 1, 2, 3}
    assert all(row.image_id == f"{tmp_path}/tiles/3/{row.tile_x}/{row.tile_y}.png" for row in table.itertuples())
    refused = jobs.run("embed", *settings, "--zoom", "4", code=2)
    assert "zoom was [3, 3] and is [4, 4]" in refused.stderr
    (tmp_path / "tiles/3/1/1.png").write_bytes(tile_image(900))
    jobs.run("embed", *settings, "--zoom", "3", "--bbox", "-100,0,20,80", "--update")
    assert whole_report(out)["resumed_images"] == 15
