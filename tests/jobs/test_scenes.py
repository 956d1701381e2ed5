"""Whole jobs over raster scenes: windows become rows, footprints are GeoParquet, and every window is accounted for."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import rasterio.warp
import scenes
import shapely
from affine import Affine
from servers import S3Server
from whole import SLOW, TINY, Jobs, count_commits, same, wait_for, write_folder

from pipeline.output import ledger as ledgers
from pipeline.output.verify import verify
from pipeline.predictors.base import Allotment
from pipeline.predictors.embed import Embedder
from pipeline.storage import access

pytestmark = pytest.mark.slow

SATELLITE = Path(__file__).resolve().parents[3] / "shared" / "data" / "satellite"
TILES = ("--tile-size", 32)


def part_uris(output: Path) -> list[str]:
    return [info.uri for info in ledgers.parts(str(output)) if "_errors" not in info.uri]


def results(output: Path) -> geopandas.GeoDataFrame:
    frames = [geopandas.read_parquet(uri) for uri in part_uris(output)]
    return pd.concat(frames).sort_values("image_id", ignore_index=True)


def vectors(output: Path) -> dict[str, np.ndarray]:
    table = results(output)
    return dict(zip(table["image_id"], table["embedding"], strict=True))


def scene_with_holes(path: Path, side: int = 320) -> Path:
    """A quarter of its windows of 32 pixels are empty."""
    array = scenes.numbers(3, side, side)
    array[:, : side // 2, : side // 2] = 0
    layout = {"tiled": True, "blockxsize": 64, "blockysize": 64, "compress": "deflate", "nodata": 0}
    return scenes.write(path, array, **layout)


def test_windows_become_rows_with_footprints(jobs: Jobs, tmp_path: Path) -> None:
    path = scene_with_holes(tmp_path / "in" / "a.tif")
    out = tmp_path / "out"
    done = jobs.run("embed", "--input", path.parent, "--output", out, *TINY, *TILES, "--rows-per-part", 40)
    assert "100 of 100 planned: 75 rows, 0 errors, 25 empty" in done.stdout
    report = json.loads((out / "_report.json").read_text())
    assert (report["planned"], report["rows"], report["errors"], report["empty"]) == (100, 75, 0, 25)
    verified = jobs.run("verify", out)
    assert "planned 100 = 75 rows + 0 errors + 25 empty" in verified.stdout
    table = results(out)
    assert table.crs.to_string() == "OGC:CRS84"
    assert len(table) == 75
    predictor = Embedder(model="tiny:network", weights="random", precision="float32")
    predictor.prepare()
    predictor.load(Allotment())
    with rasterio.open(path) as file:
        for row in table.itertuples():
            window = rasterio.windows.Window(row.window_col, row.window_row, row.window_width, row.window_height)
            pixels = file.read(window=window).transpose(1, 2, 0)
            expected = np.asarray(predictor.predict(pixels[None])["embedding"])[0]
            np.testing.assert_allclose(row.embedding, expected, rtol=1e-5, atol=1e-6)
            assert row.crs == "EPSG:32618"
            assert list(row.transform) == list(file.window_transform(window))[:6]
            assert row.geometry.is_valid


@pytest.mark.long
def test_real_scenes(jobs: Jobs, tmp_path: Path) -> None:
    names = ("landsat_rgb_utm18n.tif", "scene_int16_utm21n.tif")
    if missing := [name for name in names if not (SATELLITE / name).exists()]:
        pytest.skip(f"{SATELLITE} has no {', '.join(missing)}")
    out = tmp_path / "out"
    inputs = [SATELLITE / name for name in names]
    settings = ("--tile-size", 224, "--scale", "0:1000")
    done = jobs.run("embed", "--input", *inputs, "--output", out, *TINY, *settings)
    assert "160 of 160 planned: 99 rows, 0 errors, 61 empty" in done.stdout
    assert verify(str(out)).is_whole
    table = results(out)
    by_scene = table.dissolve("scene").geometry
    for path in inputs:
        with rasterio.open(path) as file:
            bounds = rasterio.warp.transform_bounds(file.crs, "OGC:CRS84", *file.bounds)
        west, south, east, north = by_scene[str(path)].bounds
        assert bounds[0] - 1e-4 <= west < east <= bounds[2] + 1e-4
        assert bounds[1] - 1e-4 <= south < north <= bounds[3] + 1e-4
    assert table["valid_fraction"].between(0.1, 1).all()


@pytest.mark.long
@pytest.mark.parametrize("kills", [(2, 5)])
def test_a_killed_job_resumes_in_the_middle_of_a_scene(jobs: Jobs, tmp_path: Path, kills: tuple[int, ...]) -> None:
    path = scene_with_holes(tmp_path / "in" / "a.tif", 512)
    settings = ("--input", path, *SLOW, *TILES, "--batch-size", 8, "--rows-per-part", 16)
    jobs.run("embed", *settings, "--output", tmp_path / "uninterrupted")
    out = tmp_path / "out"
    for kill_after in kills:
        process = jobs.start("embed", *settings, "--output", out)
        wait_for(lambda kill_after=kill_after: count_commits(out) >= kill_after)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL
    assert not verify(str(out)).is_whole
    jobs.run("embed", *settings, "--output", out)
    verification = verify(str(out))
    assert verification.is_whole, list(verification.lines())
    assert (verification.rows, verification.empty) == (192, 64)
    assert same(vectors(out), vectors(tmp_path / "uninterrupted"))


def test_a_mixed_archive(jobs: Jobs, tmp_path: Path) -> None:
    """Scenes, images, a scene without CRS, one of Mars, a truncated one, and a broken header."""
    folder = write_folder(tmp_path / "in", 6)
    array = scenes.numbers(3, 64, 64)
    scenes.write(folder / "good.tif", array)
    scenes.write(folder / "nowhere.tif", array, Affine.identity(), None)
    scenes.write(folder / "nowhere2.tif", array, Affine.identity(), None)
    scenes.write(folder / "mars.tif", array, crs="IAU_2015:49910")
    cut = scenes.write(folder / "cut.tif", scenes.numbers(3, 64, 64), tiled=True, blockxsize=32, blockysize=32)
    os.truncate(cut, cut.stat().st_size - 4000)
    (folder / "broken.tif").write_bytes(b"II*\0" + bytes(50))
    out = tmp_path / "out"
    settings = ("--input", folder, "--output", out, *TINY, *TILES, "--max-error-rate", 0.5)
    done = jobs.run("embed", *settings)
    assert f"{folder}/nowhere.tif and 1 more: no CRS or no transform: the rows have no geometry" in done.stderr
    assert "24 of 24 planned: 20 rows, 4 errors" in done.stdout
    assert verify(str(out)).is_whole
    errors = pd.concat([pd.read_parquet(info.uri) for info in ledgers.parts(str(out)) if "_errors" in info.uri])
    assert sorted(Path(uri).name for uri in errors["source"]) == ["broken.tif", "cut.tif", "cut.tif", "mars.tif"]
    assert errors.set_index("source").loc[f"{folder}/mars.tif", "error_type"] == "unsupported"
    assert "another celestial body" in errors.set_index("source").loc[f"{folder}/mars.tif", "message"]
    table = results(out)
    has_geometry = table.geometry.notna()
    assert set(table[has_geometry]["source"]) == {f"{folder}/good.tif", f"{folder}/cut.tif"}
    assert table[table["member"].isna()]["scene"].isna().all()


def test_verify_finds_a_footprint_that_is_not_the_plans(jobs: Jobs, tmp_path: Path) -> None:
    path = scenes.write(tmp_path / "in" / "a.tif", scenes.numbers(3, 64, 64))
    out = tmp_path / "out"
    jobs.run("embed", "--input", path, "--output", out, *TINY, *TILES)
    (uri,) = part_uris(out)
    table = pq.read_table(uri)
    shifted = [
        shapely.affinity.translate(shapely.from_wkb(each), 1e-6, 0).wkb for each in table["geometry"].to_pylist()
    ]
    changed = table.set_column(table.schema.get_field_index("geometry"), "geometry", pa.array(shifted, pa.binary()))
    pq.write_table(changed, uri)
    verified = jobs.run("verify", out, code=5)
    assert "row 0 of shard 0: geometry differ from those of the plan" in verified.stdout


def test_an_update_reads_a_replaced_scene_again(jobs: Jobs, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    scenes.write(folder / "a.tif", scenes.numbers(3, 64, 64))
    scene_with_holes(folder / "b.tif", 128)
    settings = ("--input", folder, "--output", tmp_path / "out", *TINY, *TILES)
    jobs.run("embed", *settings)
    time.sleep(0.01)
    scene_with_holes(folder / "b.tif", 192)
    done = jobs.run("embed", *settings, "--update")
    assert "1 images or shards are unchanged" in done.stdout
    verification = verify(str(tmp_path / "out"))
    assert verification.is_whole, list(verification.lines())
    assert (verification.planned, verification.rows, verification.empty) == (40, 31, 9)


def test_scenes_in_a_bucket(jobs: Jobs, s3: S3Server, tmp_path: Path) -> None:
    path = scene_with_holes(tmp_path / "a.tif", 128)
    access.write(s3.uri("scenes-of-a-job/a.tif"), path.read_bytes())
    settings = ("--input", s3.uri("scenes-of-a-job"), "--output", s3.uri("scene-output"), *TINY, *TILES)
    done = jobs.run("embed", *settings)
    assert "16 of 16 planned: 12 rows, 0 errors, 4 empty" in done.stdout
    assert verify(s3.uri("scene-output")).is_whole


@pytest.mark.long
def test_windows_of_another_network_size_and_format(jobs: Jobs, tmp_path: Path) -> None:
    path = scenes.write(tmp_path / "a.tif", scenes.numbers(6, 200, 300, "uint16"), interleave="band")
    settings = ("--input", path, "--output", tmp_path / "out", *TINY, "--tile-size", 100, "--scale", "0:10000")
    jobs.run("classify", *settings, "--bands", "3,2,1")
    assert len(results(tmp_path / "out")) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--edge", "drop"), "--edge needs --tile-size"),
        (("--tile-stride", 10), "--tile-stride needs --tile-size"),
        (("--resolution", 10), "--resolution needs --tile-size"),
        (("--max-nodata", 0.5), "--max-nodata needs --tile-size"),
        (("--tile-size", 0), "--tile-size is 0: it must be at least 1"),
        (("--tile-size", 100_000), "it can be at most 4096"),
        (("--tile-size", 32, "--resolution", 0), "--resolution is 0: it must be a number of metres from 0.001"),
        (("--tile-size", 32, "--max-nodata", 2), "--max-nodata is 2: it must be between 0 and 1"),
        (("--tile-size", 32, "--bands", "9"), "has 3 bands and no band '9'"),
    ],
)
def test_settings_that_cannot_work(jobs: Jobs, tmp_path: Path, more: tuple[Any, ...], message: str) -> None:
    path = scenes.write(tmp_path / "a.tif", scenes.numbers(3, 64, 64))
    done = jobs.run("embed", "--input", path, "--output", tmp_path / "out", *TINY, *more, code=2)
    assert message in done.stderr


def test_inputs_that_cannot_work(jobs: Jobs, tmp_path: Path) -> None:
    scenes.write(tmp_path / "mars" / "a.tif", scenes.numbers(3, 64, 64), crs="IAU_2015:49910")
    (tmp_path / "list.csv").write_text(f"uri\n{tmp_path}/mars/a.tif\n")
    (tmp_path / "a.vrt").write_text("<VRTDataset/>")
    out = ("--output", tmp_path / "out", *TINY)
    done = jobs.run("embed", "--input", tmp_path / "mars", *out, *TILES, code=2)
    assert "Mars" in done.stderr
    done = jobs.run("embed", "--input", tmp_path / "list.csv", *out, *TILES, code=2)
    assert "is a list of URIs, whose lines are images" in done.stderr
    done = jobs.run("embed", "--input", tmp_path / "a.vrt", *out, code=2)
    assert "a.vrt is a raster scene: give --tile-size" in done.stderr


@pytest.mark.long
def test_a_large_raster_that_is_read_as_an_image_is_noted_once(jobs: Jobs, tmp_path: Path) -> None:
    for name in ("a", "b"):
        scenes.write(tmp_path / "in" / f"{name}.tif", scenes.numbers(1, 100, 3000))
    done = jobs.run("embed", "--input", tmp_path / "in", "--output", tmp_path / "out", *TINY)
    assert done.stderr.count("--tile-size 224 cuts it into windows") == 1
    assert "a georeferenced raster of 3000 × 100 pixels is read as one image" in done.stderr
